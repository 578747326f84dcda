"""Mixtures whose gate has fixed weights, as an evaluation sees them: one expert at random answers, or their average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast.attacks import LabelledModel, Model
from immunity_fast.attacks.arc import expected_loss, expected_outputs
from immunity_fast.attacks.mixtures import Answers, trained_gate
from immunity_fast.attacks.saving import hash_of_weights
from immunity_fast.attacks.settling import Settling
from immunity_fast.evaluation.gate_attackers import (
    KNOWLEDGE,
    averaged_rightly,
    drawn_rightly,
    selected_rightly,
)
from immunity_fast.evaluation.targets import (
    SLACK,
    TRIES,
    MixtureTarget,
    Verdict,
    check_outputs,
)
from immunity_fast.functional import log_mixture
from immunity_fast.models.gate import kind_of_gate
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.selection import nobody_right_alone, shares_selected


def mixture_target(
    model: ImmunityMoE,
    num_classes: int,
    *,
    draws: int = 20,
    transfer: Model | None = None,
    expert_logits: Callable[[Tensor], Tensor] | None = None,
) -> MixtureTarget:
    """A mixture of at least 2 experts as what its gate makes of it; arguments as of `MixtureTarget`."""
    kinds = {"switch": MixtureTarget, "selection": SelectionTarget, "uniform": UniformTarget}
    kind = kinds[kind_of_gate(model.gate)]
    return kind(model, num_classes, draws=draws, transfer=transfer, expert_logits=expert_logits)


class _FixedTarget(MixtureTarget):
    """What both have in common: weights that are the same for all images, and never permuted."""

    gate: str
    permuted = False
    shares_are_exact = True
    loss_of_expected: Any = staticmethod(expected_loss)

    def settling(self, name: str) -> Settling:
        def asked(images: Tensor, labels: Tensor) -> Tensor:
            with torch.no_grad():
                return seen(Answers(self.expert_logits(images), trained_gate(self.model, images)), labels)

        def seen(answers: Answers, labels: Tensor) -> Tensor:
            return nobody_right_alone(*answers, labels, SLACK)

        return Settling(asked, seen if name in KNOWLEDGE else None)

    def expected_loss(self) -> LabelledModel:
        members = self.members("off")
        return lambda images, labels: expected_outputs(members.logits(images), members.weights(images))

    def weights_hash(self) -> str:
        return f"{self.gate}-{super().weights_hash()}"


class SelectionTarget(_FixedTarget):
    """A mixture that answers by one expert, drawn with fixed probabilities, attacked with every knowledge of them.

    Args:
        model: with a `SelectionGate`; else as of `MixtureTarget`, as are the others.
    """

    gate = "selection"
    knowledge = ("sample", "eot", "mean", "logits", "worst")
    answers = ("sample", "mean", "worst")

    def judge(self, images: Tensor, labels: Tensor, generator: torch.Generator, *, tries: bool = True) -> Verdict:
        with torch.no_grad():
            logits, weights = self.expert_logits(images), trained_gate(self.model, images)
            check_outputs(logits, self.num_classes)
            loss = F.nll_loss(log_mixture(logits, weights), labels, reduction="none")
            right = selected_rightly(logits, weights, labels, generator)
            drawn = [drawn_rightly(logits, weights, labels, generator) for _ in range(TRIES * tries)]
            return Verdict(right, loss, shares_selected(logits, weights, labels), torch.stack(drawn) if tries else None)


class UniformTarget(_FixedTarget):
    """A mixture that answers by the average of its experts' probabilities: nothing in it is random.

    Args:
        model: whose gate has `FixedWeights`; else as of `MixtureTarget`, as are the others.
    """

    gate = "uniform"
    knowledge = ("mean", "logits")
    answers = ("mean",)
    random = ()
    has_shares = False

    def judge(self, images: Tensor, labels: Tensor, generator: torch.Generator, *, tries: bool = True) -> Verdict:
        with torch.no_grad():
            logits, weights = self.expert_logits(images), trained_gate(self.model, images)
            check_outputs(logits, self.num_classes)
            loss = F.nll_loss(log_mixture(logits, weights), labels, reduction="none")
            return Verdict(averaged_rightly(logits, weights, labels), loss)

    def weights_hash(self) -> str:
        other = hash_of_weights(self.transfer) if isinstance(self.transfer, nn.Module) else ""
        return f"{self.gate}-{hash_of_weights(self.model)}-{other}"
