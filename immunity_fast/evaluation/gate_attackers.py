"""Attackers who know the gate, and the ways in which a mixture's answer is judged; all from one pass over the experts.

An attacker is a function from (images, labels) to what an attack differentiates, for `attacks.BoundAttack`.
`answered_rightly` says to a table of which images the answer is right; what says to an attack which are worst is in
`attacks.mixtures`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from immunity_fast.attacks.mixtures import Answers, ExactJudge, LabelledModel, Model, Rows, trained_gate
from immunity_fast.functional import log_mixture
from immunity_fast.models.gate import selected
from immunity_fast.models.layers import channels_last
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.permutations import permuted, random_orders, worst_margins, worst_weights
from immunity_fast.runtime.strategies import laid_out
from immunity_fast.selection import (
    all_right,
    fixed_weights,
    is_random,
    mean_logits,
    mean_mixture,
    selects,
    worst_selected,
)

Knowledge = Literal["off", "sample", "eot", "mean", "logits", "worst"]
KNOWLEDGE: tuple[Knowledge, ...] = get_args(Knowledge)
GATELESS = ("mean", "logits")  # who has no use for the gate's weights

# What the gate is called in tables and figures, as an answer and as what is attacked.
GATE_WORDS: dict[str, str] = {name: f"gate {name}" for name in ("sample", "mean", "off", "worst", "eot")}

# What a table says of each.
DESCRIPTIONS: dict[str, str] = {
    "off": f"{GATE_WORDS['off']}: the trained weights as they are",
    "sample": f"{GATE_WORDS['sample']}: one random permutation an image and gradient",
    "eot": f"{GATE_WORDS['eot']}: an average over several draws",
    "mean": f"{GATE_WORDS['mean']}: the exact mean of all permutations",
    "logits": "the mean of the experts' logits, transferred",
    "worst": f"{GATE_WORDS['worst']}: each image's worst permutation",
    "transfer": "another, independently trained ensemble",
    "output": "the model's own output",
}

# What is otherwise of gates that are not permuted, by `models.gate.kind_of_gate`.
OTHER_DESCRIPTIONS: dict[str, dict[str, str]] = {
    "selection": {
        "sample": f"{GATE_WORDS['sample']}: one random expert an image and gradient",
        "mean": f"{GATE_WORDS['mean']}: the exact expectation of the expert that is drawn",
        "worst": f"{GATE_WORDS['worst']}: each image's worst expert",
    },
    "uniform": {"mean": f"{GATE_WORDS['mean']}: the average of the experts, which answers"},
    "none": {"eot": "an average over several of its outputs (EOT)"},
}


def attacker(
    model: ImmunityMoE,
    knowledge: Knowledge | int,
    *,
    draws: int = 20,
    generator: torch.Generator | None = None,
    expert_logits: Callable[[Tensor], Tensor] | None = None,
) -> LabelledModel:
    """What somebody who knows this much of the gate differentiates.

    Args:
        model: the mixture, in evaluation mode. Its switch does not matter.
        knowledge: how the experts' probabilities are mixed:

            * "off": by the trained gate's weights as they are, which is not what answers while the gate switches;
            * "sample": by one random permutation of them for each image and gradient;
            * "eot": by `draws` permutations, whose losses are averaged (expectation over transformation, Athalye et
              al., arXiv 1707.07397), at the price of one;
            * "mean": by 1/N each, the exact expectation of the output over all N! permutations;
            * "logits": not their probabilities, but their logits, by 1/N each: nothing answers so, and what fools it is
              transferred to what does (it broke an aggregation whose own gradients misled, arXiv 2411.14834);
            * "worst": by the permutation of all N! that is worst for the image, see `worst_weights`;
            * a number 0..N−1: not at all, this expert alone, whose images are then transferred to the mixture.

            Of a gate that draws one expert, a `SelectionGate`, "sample" is a draw, "off" and "mean" are by its
            probabilities, the exact expectation, and "worst" is the expert of those it may draw that is worst for the
            image. Of a gate whose weights are fixed all are by these.
        draws: k of "eot".
        generator: of what is drawn; None is PyTorch's default generator.
        expert_logits: what computes the model's, if compiled code is to; None is `model.expert_logits`.

    Returns:
        (images (B, C, H, W), labels (B,)) to log-probabilities (B, K), or (draws, B, K): of the mixture a
        `GateAttacker`.

    Raises:
        ValueError: unknown knowledge, an expert that is not there, draws < 1.
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    logits_of = expert_logits or model.expert_logits
    if isinstance(knowledge, int):
        if not 0 <= knowledge < model.num_experts:
            raise ValueError(f"knowledge: expected an expert 0 to {model.num_experts - 1}, got {knowledge}")
        return alone(model, model.unstack()[knowledge].eval())
    if knowledge not in KNOWLEDGE:
        raise ValueError(f"knowledge: expected an expert's number or one of {', '.join(KNOWLEDGE)}, got {knowledge!r}")
    return GateAttacker(model, knowledge, draws, generator, logits_of)


def alone(model: ImmunityMoE, expert: nn.Module) -> LabelledModel:
    """What somebody differentiates who knows of one expert alone.

    Args:
        model: the mixture, whose memory format is the expert's, too.
        expert: images to logits, in evaluation mode; one of `model.unstack()`.
    """

    def outputs(images: Tensor, labels: Tensor) -> Tensor:
        if laid_out(model.memory_format, images.device, model.arch, "attack") == "channels_last":
            images = channels_last(images)
        logits: Tensor = expert(images)
        return logits

    return outputs


class GateAttacker:
    """What `attacker` says that somebody who knows something of the gate differentiates, of all experts.

    Args:
        model, knowledge, draws, generator: see `attacker`.
        expert_logits: what computes the model's.

    Attributes:
        exact_judge: where the outputs are random, or the mean of what is: tells an attack what fools the mixture for
            good; else None.
    """

    def __init__(
        self,
        model: ImmunityMoE,
        knowledge: Knowledge,
        draws: int,
        generator: torch.Generator | None,
        expert_logits: Callable[[Tensor], Tensor],
    ) -> None:
        self.model, self.knowledge, self.draws, self.generator = model, knowledge, draws, generator
        self.expert_logits = expert_logits
        # Who fools the mean alone is still answered rightly now and then.
        exact = knowledge in ("sample", "eot", "mean") and is_random(model.gate)
        self.exact_judge = ExactJudge(model, expert_logits) if exact else None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities (B, K), or (draws, B, K), of images (B, C, H, W) with labels (B,)."""
        logits = self.expert_logits(images)
        gate = None if self.knowledge in GATELESS else trained_gate(self.model, images)
        return self._mixed(logits, gate, labels, None)

    def observed(self, images: Tensor, labels: Tensor, rows: Rows | None = None) -> tuple[Tensor, Answers]:
        """(The same; what the experts and the gate have said.)

        Args:
            images, labels: as for a call.
            rows: which they are of a batch that others have left: what is drawn for an image is the same as if all were
                still there; None: they are all.
        """
        logits = self.expert_logits(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.knowledge not in GATELESS):
            gate = trained_gate(self.model, images)
        return self._mixed(logits, gate, labels, rows), Answers(logits.detach(), gate.detach())

    def _mixed(self, logits: Tensor, gate: Tensor | None, labels: Tensor, rows: Rows | None) -> Tensor:
        own = self.model.gate
        if self.knowledge == "logits":
            return mean_logits(own, logits).log_softmax(-1)
        if gate is None or self.knowledge == "mean":
            return mean_mixture(own, logits)
        if self.knowledge == "off" or not is_random(own):
            return log_mixture(logits, gate)
        if self.knowledge == "worst":
            worst = worst_selected if selects(own) else worst_weights
            return log_mixture(logits, worst(logits, gate, labels))
        if self.knowledge == "sample":
            return log_mixture(logits, self._drawn(gate, rows))
        return torch.stack([log_mixture(logits, self._drawn(gate, rows)) for _ in range(self.draws)])

    def _drawn(self, gate: Tensor, rows: Rows | None) -> Tensor:
        if (fixed := fixed_weights(self.model.gate, gate)) is not None:
            if rows is None:
                return selected(gate, self.generator)
            return selected(fixed.expand(rows.whole, -1), self.generator)[rows.where]
        if rows is None:
            return permuted(gate, self.generator)
        return gate.gather(-1, random_orders(rows.whole, gate.shape[1], self.generator, gate.device)[rows.where])


def averaged(model: Model, draws: int) -> LabelledModel:
    """EOT for any random model, whose losses at several calls an attack averages.

    Args:
        model: images (B, C, H, W) to random outputs (B, K).
        draws: how often it is called.

    Returns:
        (images, labels) to outputs (draws, B, K).

    Raises:
        ValueError: draws < 1.
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    return lambda images, labels: torch.stack([model(images) for _ in range(draws)])


def answered_rightly(
    logits: Tensor, gate: Tensor, labels: Tensor, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Which images are answered rightly, by everything that may answer; one pass over the experts serves all.

    * "sample": the gate's weights in one random permutation for each image;
    * "mean": the exact mean of all N! permutations;
    * "off": the gate's weights as they were trained;
    * "worst": right under every one of the N! permutations;
    * "expert 1" … "expert N": each alone.

    The permutation is drawn for each image, as it would be were each image a call of its own: one draw for a whole
    batch has the same mean, but its luck would pass for accuracy.

    Args:
        logits: (N, B, K) of the experts.
        gate: (B, N) weights as they were trained.
        labels: (B,) integers in 0..K−1.
        generator: of the permutations; None is PyTorch's default generator.

    Returns:
        (B,) bool each.
    """
    mixtures = {"sample": permuted(gate, generator), "mean": None, "off": gate}
    right = {name: log_mixture(logits, weights).argmax(-1) == labels for name, weights in mixtures.items()}
    right["worst"] = worst_margins(logits, gate, labels).amax(-1) < 0
    return right | {f"expert {i + 1}": own.argmax(-1) == labels for i, own in enumerate(logits)}


def selected_rightly(
    logits: Tensor, weights: Tensor, labels: Tensor, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """`answered_rightly` of a mixture that answers by one expert at random.

    * "sample": an expert drawn for each image;
    * "mean": the exact expectation of the draw;
    * "worst": every expert that may be drawn;
    * "expert 1" … "expert N": each alone.

    Args:
        logits: (N, B, K) of the experts.
        weights: (B, N) probabilities.
        labels: (B,) integers in 0..K−1.
        generator: of the draws; None is PyTorch's default generator.

    Returns:
        (B,) bool each.
    """
    alone = {f"expert {i + 1}": own.argmax(-1) == labels for i, own in enumerate(logits)}
    return {
        "sample": drawn_rightly(logits, weights, labels, generator),
        "mean": log_mixture(logits, weights).argmax(-1) == labels,
        "worst": all_right(logits, weights, labels),
    } | alone


def drawn_rightly(logits: Tensor, weights: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B,) bool: images that an expert, drawn for each, gets right. Arguments as of `selected_rightly`."""
    right = labels[:, None] == logits.argmax(-1).T
    return (right & (selected(weights, generator) > 0)).any(-1)


def averaged_rightly(logits: Tensor, weights: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`answered_rightly` of a mixture with fixed weights, by which all answer together: "mean" and each expert alone.

    Args:
        logits, labels: as of `selected_rightly`.
        weights: (B, N).

    Returns:
        (B,) bool each.
    """
    right = {"mean": log_mixture(logits, weights).argmax(-1) == labels}
    return right | {f"expert {i + 1}": own.argmax(-1) == labels for i, own in enumerate(logits)}
