"""Attackers who know the gate, and the ways in which a mixture's answer is judged; all from one pass over the experts.

An attacker is a function from (images, labels) to what an attack differentiates, for `attacks.BoundAttack`. A judge
says of which images the answer is right, to a table; or, to an attack, which are worst.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from immunity_fast.functional import log_mixture
from immunity_fast.gate import RandomSwitchGate, without_waiting
from immunity_fast.model import ImmunityMoE

if TYPE_CHECKING:
    from immunity_fast.attacks import LabelledModel, Model

# By what an attack judges a model that is random: (images (B, C, H, W), labels (B,), targets (B,) or None) to (outputs
# (B, K) that are not random, (B,) bool: whether the attack has succeeded whatever the model draws).
Judge = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]

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


def drawn(model: ImmunityMoE, draws: int) -> Model:
    """What the mixture answers at `draws` calls, its gate as it is: (draws, B, K), by one pass over the experts."""

    def outputs(images: Tensor) -> Tensor:
        logits = model.expert_logits(images)
        return torch.stack([log_mixture(logits, model.gate_weights(images)) for _ in range(draws)])

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


def exact_judge(model: ImmunityMoE, expert_logits: Callable[[Tensor], Tensor] | None = None) -> Judge:
    """Of a mixture whose gate switches: the exact mean's log-probabilities, and who is fooled by every permutation.

    Args:
        model: in evaluation mode. Its switch does not matter.
        expert_logits: see `attacker`.
    """

    def judge(images: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        logits, gate = (expert_logits or model.expert_logits)(images), trained_gate(model, images)
        return log_mixture(logits), always_fooled(logits, gate, labels, targets)

    return judge


def judge_of(model: LabelledModel, images: Tensor, labels: Tensor) -> Judge | Literal["outputs"]:
    """What judges anything with gates, found by one pass: exactly if it is a mixture and nothing else.

    Of what does more with a mixture than to ask it, only the outputs for the exact means of its gates are known: nobody
    is then fooled whatever the gate draws. "outputs": no gate switches.
    """
    with torch.no_grad(), exact_means() as asked:
        outputs = model(images, labels)
    if not asked.switching:
        return "outputs"
    if (mixture := asked.only(images, outputs)) is not None:
        return exact_judge(mixture)

    def judge(images: Tensor, labels: Tensor, _targets: Tensor | None) -> tuple[Tensor, Tensor]:
        with exact_means():
            return model(images, labels), torch.zeros_like(labels, dtype=torch.bool)

    return judge


@dataclass
class Asked:
    """The gates that were asked and would draw, and the mixtures that were, with the images and outputs of each."""

    switching: list[RandomSwitchGate] = field(default_factory=list)
    mixtures: list[tuple[ImmunityMoE, Any, Any]] = field(default_factory=list)

    def only(self, images: Tensor, outputs: Tensor) -> ImmunityMoE | None:
        """The mixture that was shown these images and has said this, and so is all that was asked."""
        found = (mixture for mixture, shown, said in self.mixtures if shown is images and said is outputs)
        return next(found, None)


@contextmanager
def asked_modules(gate: Callable[[RandomSwitchGate], Any] | None = None) -> Iterator[Asked]:
    """Listen to this thread's gates and mixtures in a `with` block, wherever in a model they are.

    Args:
        gate: is called with each gate that would draw, before it does.
    """
    asked, thread = Asked(), get_ident()

    def heard() -> bool:  # a compiler that meets a hook has to trace it
        return not torch.compiler.is_compiling() and get_ident() == thread

    def before(module: nn.Module, _inputs: Any) -> None:
        if not heard():
            return
        # Inside compiled code nobody is heard: a compiled module's gates may all be asked.
        for asking in module.modules() if hasattr(module, "_orig_mod") else (module,):
            if isinstance(asking, RandomSwitchGate) and not asking.training and asking.switch in ("call", "sample"):
                asked.switching.append(asking)
                if gate is not None:
                    gate(asking)

    def after(module: nn.Module, inputs: Any, outputs: Any) -> None:
        module = getattr(module, "_orig_mod", module)
        if heard() and isinstance(module, ImmunityMoE):
            asked.mixtures.append((module, inputs[0] if inputs else None, outputs))

    hooks = register_module_forward_pre_hook(before), register_module_forward_hook(after)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile")  # of hooks that fire twice
            yield asked
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def exact_means() -> Iterator[Asked]:
    """Gates that would draw, wherever in a model they are, answer by their exact mean in a `with` block."""
    with ExitStack() as stack, asked_modules(lambda gate: stack.enter_context(gate.switched("mean"))) as asked:
        yield asked


def trained_gate(model: ImmunityMoE, images: Tensor) -> Tensor:
    """The gate's weights (B, N) as they were trained."""
    with model.gate.switched("off"):
        return model.gate_weights(images)


def permuted(gate: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each row of the weights (B, N) in a random order of its own, as `RandomSwitchGate` with `switch="sample"`."""
    source = gate.device if generator is None else generator.device
    keys = torch.rand(gate.shape, generator=generator, device=source, dtype=torch.float64)
    return gate.gather(-1, without_waiting(keys.argsort(-1), gate.device))


def worst_margins(logits: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
    """max over all N! permutations π of Σ_i g_π(i) (p_im − p_i,label), for each class m: (B, K); −∞ for the label.

    A class wins under some permutation if and only if its margin is positive. No permutation is tried: a sum of
    products is largest where both factors are in the same order (the rearrangement inequality), so sorting finds it.

    Args:
        logits: (N, B, K) of the experts; gate: (B, N) weights; labels: (B,) integers.
    """
    differences = _differences(logits, labels).sort(0).values
    weights = gate.sort(-1).values.T[..., None].to(differences.dtype)
    margins = (weights * differences).sum(0)
    return margins.scatter(-1, labels[:, None], -torch.inf)


def always_fooled(logits: Tensor, gate: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """(B,) bool: images that fool the mixture under every one of the N! permutations.

    With targets: that are the target then, exactly. Without: that are, each time, less likely the label than some class
    that is the same for all of them; images for which it would have to be another each time are left out.

    Args:
        logits: (N, B, K) of the experts; gate: (B, N) weights; labels, targets: (B,) integers.
    """
    if targets is not None:
        return worst_margins(logits, gate, targets).amax(-1) < 0
    # The least sum of products: factors in opposite orders.
    differences = _differences(logits, labels).sort(0).values
    weights = gate.sort(-1, descending=True).values.T[..., None].to(differences.dtype)
    return (weights * differences).sum(0).amax(-1) > 0  # of the label itself it is 0


def worst_weights(logits: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
    """The gate's weights (B, N), for each image in the order that gives the largest of `worst_margins`."""
    with torch.no_grad():
        rival = worst_margins(logits, gate, labels).argmax(-1)
        differences = _differences(logits, labels)
        towards = differences.gather(-1, rival.expand(len(logits), -1)[..., None])[..., 0].T
        ranks = towards.argsort(-1).argsort(-1)
    return gate.sort(-1).values.gather(-1, ranks)


def _differences(logits: Tensor, labels: Tensor) -> Tensor:
    """p_im − p_i,label: (N, B, K)."""
    probabilities = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    own = probabilities.gather(-1, labels.expand(len(logits), -1)[..., None])
    return probabilities - own
