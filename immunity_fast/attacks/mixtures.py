"""What an attack may ask of a mixture whose gate switches at random, whoever wrote it.

A gate and a mixture are known by what they can do, `RandomGate` and `Mixture`; `ImmunityMoE` and its gate are such. A
judge says to an attack which images are worst.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, Literal, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from immunity_fast.functional import log_mixture
from immunity_fast.permutations import always_fooled
from immunity_fast.selection import always_fooled_by_one, is_random, mean_mixture, selects

Model = Callable[[Tensor], Tensor]
LabelledModel = Callable[[Tensor, Tensor], Tensor]

# By what an attack judges a model that is random: (images (B, C, H, W), labels (B,), targets (B,) or None) to (outputs
# (B, K) that are not random, (B,) bool: whether the attack has succeeded whatever the model draws).
Judge = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]


class Answers(NamedTuple):
    """What a mixture said of B images, on the way to its outputs; without a graph."""

    logits: Tensor  # (N, B, K) of the experts
    gate: Tensor  # (B, N) weights as they were trained


class Rows(NamedTuple):
    """Which images of a batch a model is shown, where others have left it: what it draws for them stays the same."""

    where: Tensor  # (B,)
    whole: int


class Observed(Protocol):
    """A model that can be asked what it saw on its way, so that it need not be asked a second time."""

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Outputs (B, K), or (draws, B, K)."""

    def observed(self, images: Tensor, labels: Tensor, rows: Rows | None = None) -> tuple[Tensor, Any]:
        """(the outputs of a call; what it saw: `Answers` of a mixture)."""


class RandomGate(Protocol):
    """A module that weighs experts; in evaluation mode it draws a permutation while `switch` is "call" or "sample".

    One whose attribute `selects` is true draws one expert, and one whose `is_random` is false nothing; the weights of
    both are fixed, as a function `fixed_weights` of a dtype to (N,).
    """

    training: bool
    switch: Any

    def switched(self, switch: Any) -> AbstractContextManager[None]:
        """Another `switch` for the length of a `with` block: "off" for the trained weights, "mean" for the mean."""


class Mixture(Protocol):
    """A module from images (B, C, H, W) to log-probabilities (B, K), of N experts that a gate weighs."""

    gate: Any

    def expert_logits(self, images: Tensor) -> Tensor:
        """Logits (N, B, K) of each expert."""

    def gate_weights(self, images: Tensor) -> Tensor:
        """The gate's weights (B, N)."""


# By their classes: from Python 3.12 on `isinstance` of a protocol finds no submodule, which `gate` is; and what wraps a
# module for a compiler has all of its attributes.
def is_gate(module: nn.Module) -> TypeGuard[RandomGate]:
    """Whether a module is a `RandomGate`: its class has `switched`, and it a `switch`."""
    return callable(getattr(type(module), "switched", None)) and hasattr(module, "switch")


def is_mixture(module: nn.Module) -> TypeGuard[Mixture]:
    """Whether a module is a `Mixture`: its class has `expert_logits` and `gate_weights`, and it a `gate`."""
    methods = ("expert_logits", "gate_weights")
    return all(callable(getattr(type(module), name, None)) for name in methods) and hasattr(module, "gate")


def drawn(model: Mixture, draws: int) -> Model:
    """What a mixture answers at several calls, its gate as it is, by one pass over the experts.

    Args:
        model: in evaluation mode.
        draws: how many calls.

    Returns:
        Images (B, C, H, W) to log-probabilities (draws, B, K).
    """

    def outputs(images: Tensor) -> Tensor:
        logits = model.expert_logits(images)
        return torch.stack([log_mixture(logits, model.gate_weights(images)) for _ in range(draws)])

    return outputs


class ExactJudge:
    """The judge of a mixture whose gate draws: its exact mean, and who is fooled whatever is drawn.

    Args:
        model: in evaluation mode. Its switch does not matter.
        expert_logits: what computes the model's, if compiled code is to; None is `model.expert_logits`.
    """

    def __init__(self, model: Mixture, expert_logits: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self.expert_logits = model, expert_logits or model.expert_logits

    def __call__(self, images: Tensor, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Judge`."""
        answers = Answers(self.expert_logits(images), trained_gate(self.model, images))
        return self.of_answers(answers, labels, targets)

    def of_answers(self, answers: Answers, labels: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """What it says of images of which the mixture's answers are known already."""
        gate = self.model.gate
        mean = mean_mixture(gate, answers.logits)
        if not is_random(gate):  # the mean is what answers
            return mean, torch.ones_like(labels, dtype=torch.bool)
        always = always_fooled_by_one if selects(gate) else always_fooled
        return mean, always(*answers, labels, targets)


def judge_of(model: LabelledModel, images: Tensor, labels: Tensor) -> Judge | Literal["outputs"]:
    """The judge of anything with gates, found by one pass: exact if it is a mixture and nothing else.

    Of what does more with a mixture than to ask it, only the outputs for the exact means of its gates are known: nobody
    is then fooled whatever the gate draws.

    Args:
        model: (images, labels) to outputs.
        images: (B, C, H, W) for the pass.
        labels: (B,).

    Returns:
        The judge; "outputs" where no gate switches.
    """
    with torch.no_grad(), exact_means() as asked:
        outputs = model(images, labels)
    if not asked.random_gates:
        return "outputs"
    if (mixture := asked.only(images, outputs)) is not None:
        return ExactJudge(mixture)

    def judge(images: Tensor, labels: Tensor, _targets: Tensor | None) -> tuple[Tensor, Tensor]:
        with exact_means():
            return model(images, labels), torch.zeros_like(labels, dtype=torch.bool)

    return judge


@dataclass
class Asked:
    """The gates that were asked and would draw, and the mixtures that were, with the images and outputs of each."""

    random_gates: list[RandomGate] = field(default_factory=list)
    mixtures: list[tuple[Mixture, Any, Any]] = field(default_factory=list)

    def only(self, images: Tensor, outputs: Tensor) -> Mixture | None:
        """The mixture that was shown these images and has said this, and so is all that was asked."""
        found = (mixture for mixture, shown, said in self.mixtures if shown is images and said is outputs)
        return next(found, None)


@contextmanager
def asked_modules(gate: Callable[[RandomGate], Any] | None = None) -> Iterator[Asked]:
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
            if is_gate(asking) and is_random(asking) and not asking.training and asking.switch in ("call", "sample"):
                asked.random_gates.append(asking)
                if gate is not None:
                    gate(asking)

    def after(module: nn.Module, inputs: Any, outputs: Any) -> None:
        module = getattr(module, "_orig_mod", module)
        if heard() and is_mixture(module):
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


def trained_gate(model: Mixture, images: Tensor) -> Tensor:
    """A mixture's gate weights (B, N) for images (B, C, H, W), as they were trained: its gate `off`.

    Of a gate that draws one expert they are the probabilities.
    """
    with model.gate.switched("off"):
        return model.gate_weights(images)
