"""Attackers who know the gate, and the ways in which a mixture's answer is judged; all from one pass over the experts.

An attacker is a function from (images, labels) to what an attack differentiates, for `attacks.BoundAttack`. `judge`
says to a table of which images the answer is right; what says to an attack which are worst is in `attacks.mixtures`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from immunity_fast.attacks.mixtures import LabelledModel, Model, exact_judge, trained_gate
from immunity_fast.functional import log_mixture
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.permutations import permuted, worst_margins, worst_weights

Knowledge = Literal["fixed", "single", "eot", "mean", "worst"]
KNOWLEDGE: tuple[Knowledge, ...] = get_args(Knowledge)

# What a table says of each.
DESCRIPTIONS: dict[str, str] = {
    "fixed": "the trained gate, not switching",
    "single": "switching, one draw a gradient",
    "eot": "switching, an average over draws (EOT)",
    "mean": "the exact mean of all permutations (closed-form EOT)",
    "worst": "each image's worst permutation",
    "transfer": "another, independently trained ensemble",
    "output": "the model's own output",
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

            * "fixed": by the trained gate's weights, which is not what answers while the gate switches;
            * "single": by one random permutation of them for each image and gradient;
            * "eot": by `draws` permutations, whose losses are averaged (expectation over transformation, Athalye et
              al., arXiv 1707.07397), at the price of one;
            * "mean": by 1/N each, the exact expectation of the output over all N! permutations;
            * "worst": by the permutation of all N! that is worst for the image, see `worst_weights`;
            * a number 0..N−1: not at all, this expert alone, whose images are then transferred to the mixture.
        draws: k of "eot".
        generator: of the permutations; None is PyTorch's default generator.
        expert_logits: what computes the model's, if compiled code is to; None is `model.expert_logits`.

    Returns:
        (images (B, 3, H, W), labels (B,)) to log-probabilities (B, K), or (draws, B, K). Where they are random, or the
        mean of what is, an attribute `exact_judge` tells an attack what fools the mixture for good.

    Raises:
        ValueError: unknown knowledge, an expert that is not there, draws < 1.
    """
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    logits_of = expert_logits or model.expert_logits
    if isinstance(knowledge, int):
        if not 0 <= knowledge < model.num_experts:
            raise ValueError(f"knowledge: expected an expert 0 to {model.num_experts - 1}, got {knowledge}")
        alone = model.unstack()[knowledge].eval()
        return lambda images, labels: alone(images)
    if knowledge not in KNOWLEDGE:
        raise ValueError(f"knowledge: expected an expert's number or one of {', '.join(KNOWLEDGE)}, got {knowledge!r}")

    def outputs(images: Tensor, labels: Tensor) -> Tensor:
        if knowledge == "mean":
            return log_mixture(logits_of(images))
        logits, gate = logits_of(images), trained_gate(model, images)
        if knowledge == "fixed":
            return log_mixture(logits, gate)
        if knowledge == "worst":
            return log_mixture(logits, worst_weights(logits, gate, labels))
        if knowledge == "single":
            return log_mixture(logits, permuted(gate, generator))
        mixtures = [log_mixture(logits, permuted(gate, generator)) for _ in range(draws)]
        return torch.stack(mixtures)

    if knowledge in ("single", "eot", "mean"):  # who fools the mean alone is still answered rightly now and then
        outputs.exact_judge = exact_judge(model, expert_logits)  # type: ignore[attr-defined]
    return outputs


def averaged(model: Model, draws: int) -> LabelledModel:
    """EOT for any random model: its outputs (draws, B, K) at `draws` calls, whose losses an attack averages."""
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    return lambda images, labels: torch.stack([model(images) for _ in range(draws)])


def judge(logits: Tensor, gate: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Which images are answered rightly, (B,) bool each, by everything that may answer.

    * "switching": the gate switching, one permutation drawn for each image;
    * "mean": the exact mean of the gate;
    * "fixed": the trained gate;
    * "worst": right under every one of the N! permutations;
    * "expert 1" … "expert N": each alone.

    Args:
        logits: (N, B, K) of the experts.
        gate: (B, N) trained weights.
        labels: (B,) integers.
        generator: of the permutations.
    """
    mixtures = {"switching": permuted(gate, generator), "mean": None, "fixed": gate}
    right = {name: log_mixture(logits, weights).argmax(-1) == labels for name, weights in mixtures.items()}
    right["worst"] = worst_margins(logits, gate, labels).amax(-1) < 0
    return right | {f"expert {i + 1}": own.argmax(-1) == labels for i, own in enumerate(logits)}
