"""What all peers have in common: the experts' own cross-entropies, and the places in a training where each does more.

Shapes: N experts, B images, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from immunity_fast.arguments import Experts, join_experts
from immunity_fast.losses import FusedImmunityLoss
from immunity_fast.models.gate import GateKind
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.targets import IGNORE_INDEX, ClassWeights


class EnsembleLoss(nn.Module):
    """How the experts of an ensemble are trained, where it is not by `FusedImmunityLoss`.

    A peer says at least what a batch costs, `loss_and_terms`; the other methods do nothing here.

    Args:
        label_smoothing, class_weights, ignore_index, group_name: of cross-entropy, as `FusedImmunityLoss` has them.

    Attributes:
        gate: how the ensemble answers, see `models.gate.gate_of`.
        measured: names of what `loss_and_terms` gives, the loss first.
        own_images: whether each expert may see images of its own, (N, B, C, H, W).
        fresh: whether it draws the experts' weights itself, and none can be begun from.
        needs_examples: whether `end_epoch` looks at images of the training set.
        compiles: whether `loss_and_terms` and what `attacked` gives may be compiled.
        adversarial: whether the images of `loss_and_terms` are adversarial training's; those of `prepare` never are.
    """

    gate: ClassVar[GateKind] = "uniform"
    measured: ClassVar[tuple[str, ...]] = ("loss", "cross_entropy")
    own_images: ClassVar[bool] = True
    compiles: ClassVar[bool] = True
    fresh: ClassVar[bool] = False
    needs_examples: ClassVar[bool] = False

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        class_weights: ClassWeights = None,
        ignore_index: int | None = IGNORE_INDEX,
        group_name: str = "",
    ) -> None:
        super().__init__()
        self.adversarial = False
        self._classes = FusedImmunityLoss(
            0.0,
            0.0,
            0.0,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            ignore_index=ignore_index,
            group_name=group_name,
        )

    def expert_losses(self, logits: Experts, targets: Tensor) -> Tensor:
        """Each expert's cross-entropy of each image.

        Args:
            logits: (N, B, K), or N tensors (B, K).
            targets: (B,) integer labels or (B, K) probabilities that all experts learn; or each expert's own, (N, B) or
                (N, B, K).

        Returns:
            (N, B) in nats; 0 of images that are ignored.

        Raises:
            ValueError, TypeError: a wrong shape or dtype.
        """
        stacked = join_experts("logits", logits, 3, "(N, B, K)")
        experts, samples, classes = stacked.shape
        flat = each_experts(targets, experts, samples).flatten(0, 1)
        losses = self._classes.class_losses(stacked.reshape(1, experts * samples, classes), None, flat, alpha=0.0)
        return losses.view(experts, samples)

    def mean(self, losses: Tensor, targets: Tensor, classes: int) -> Tensor:
        """The mean of losses (B,) over the images that count, of all processes; 0-d.

        Args:
            losses: (B,).
            targets: (B,) integers or (B, K) probabilities; or each expert's own, whose first are then looked at.
            classes: K.
        """
        own = targets[0] if targets.dim() == (3 if targets.is_floating_point() else 2) else targets
        return self._classes.mean(losses, own, classes)

    def loss_and_terms(
        self, model: ImmunityMoE, images: Tensor, targets: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a batch, 0-d, and what it is made of, 0-d each: what `measured` names behind "loss".

        It may be compiled; what cannot be is done in `prepare`.

        Args:
            model: in training mode; each expert's BatchNorm counts a batch once.
            images: (B, C, H, W) floating-point in [0, 1]; or (N, B, C, H, W), each expert's own.
            targets: (B,) integers or (B, K) probabilities; of own images that are not alike, (N, B) or (N, B, K).
            prepared: what `prepare` gave for this batch.
        """
        raise NotImplementedError

    def prepare(self, model: ImmunityMoE, images: Tensor, targets: Tensor) -> Tensor | None:
        """What a batch needs besides, such as images that an inner attack makes; never compiled as a whole.

        The model has to be left as it was: modes, gradients, statistics.
        """
        return None

    def check_experts(self, num_experts: int) -> None:
        """Check that so many experts can be trained so.

        Raises:
            ValueError: they cannot; "experts: expected …".
        """

    def check_model(self, model: ImmunityMoE) -> None:
        """Check that a model can be trained so.

        Raises:
            ValueError: it cannot.
        """
        self.check_experts(model.num_experts)
        if any(parameter.requires_grad for parameter in model.gate.parameters()):
            raise ValueError(
                "gate: expected one of fixed weights, gate_of('uniform', …) or gate_of('selection', …), beside a loss "
                f"that trains no gate, got {type(model.gate).__name__} with weights that are learned"
            )

    def stages(self, num_experts: int) -> int:
        """How many parts a training has, of as many epochs each, in which other weights are trained; mostly 1.

        In each the optimiser begins anew, and the learning rate rises and falls. Of several stages the last one's
        epochs alone can be the best, and the gate is one of fixed weights.
        """
        return 1

    def begin_epoch(self, model: ImmunityMoE, epoch: int, epochs: int, seed: int) -> bool:
        """Get ready for an epoch, 0-based, of so many.

        It is called once more where a run goes on in the middle of an epoch: what it draws depends on its arguments
        alone, and it changes no weights.

        Returns:
            Whether the epoch begins a stage, so that the optimiser begins anew.
        """
        return False

    def begin_stage(self, model: ImmunityMoE, epoch: int, epochs: int, seed: int) -> None:
        """Change the weights, or the gate's, where an epoch begins a stage: behind `begin_epoch`.

        The weights are those by which the ensemble answers, their average where one is kept. A run that is interrupted
        in the stage's first epoch, before a checkpoint, comes here again, with the weights from before.
        """

    def begin_batch(self, model: ImmunityMoE, batch: int, seed: int) -> None:
        """Get ready for a batch, by its number in the run, from 0; what is drawn depends on these alone."""

    def end_epoch(
        self,
        model: ImmunityMoE,
        examples: Callable[[int], tuple[Tensor, Tensor]],
        epoch: int,
        epochs: int,
        seed: int,
        eps: float,
    ) -> Sequence[float] | None:
        """New weights of the experts' votes, N of them ≥ 0 with a sum of 1, from now on; None leaves them.

        It is called behind an epoch's last step, before the ensemble is measured, in evaluation mode, with the weights
        by which it answers. It may change nothing.

        Args:
            model: the ensemble.
            examples: gives at most so many images of the training set, always the same, not augmented: (n, C, H, W) in
                [0, 1], and labels (n,).
            epoch, epochs, seed: as of `begin_epoch`.
            eps: radius of the run's attacks, Linf.
        """
        return None

    def attacked(self, model: ImmunityMoE) -> Callable[[Tensor], Tensor] | None:
        """What adversarial training attacks, images (B, C, H, W) to (B, K); None is the mixture."""
        return None

    def after_update(self, model: ImmunityMoE) -> None:
        """Put right what the optimiser has changed and should not have."""

    def after_average(self, model: ImmunityMoE, tensors: Mapping[str, Tensor]) -> None:
        """Put right the average of the weights after a step, where one is kept: tensors by their names in the model."""

    def passes(self, num_experts: int, attack_steps: int) -> float:
        """What a training image costs in an epoch, on average: passes over an expert and back, of plain training N.

        Args:
            num_experts: N.
            attack_steps: of adversarial training; 0 is standard training.
        """
        return float(num_experts * (1 + attack_steps))


def each_experts(targets: Tensor, experts: int, samples: int) -> Tensor:
    """Targets (N, B) or (N, B, K), whether they are given as all experts', (B,) or (B, K), or as each expert's own.

    Raises:
        ValueError: they are neither; what they are and what was expected.
    """
    own = targets.dim() == (3 if targets.is_floating_point() else 2)
    if own and targets.shape[:2] == (experts, samples):
        return targets
    if not own and targets.dim() and targets.shape[0] == samples:
        return targets.expand(experts, *targets.shape)
    raise ValueError(
        f"targets: expected labels ({samples},) or ({experts}, {samples}), or probabilities of as many, got shape "
        f"{tuple(targets.shape)}"
    )
