"""Experts that do not know of each other, whose answers are averaged: the control of every other ensemble."""

from __future__ import annotations

from torch import Tensor

from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.peers.base import EnsembleLoss


class PlainLoss(EnsembleLoss):
    """Σ_i CE_i: each expert learns by its own cross-entropy alone.

    In adversarial training on the mixture, all see the images that fool their average; on each expert, its own.

    Args:
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch, 0-d.

        Args:
            logits: (N, B, K), or N tensors (B, K).
            targets: (B,) integers or (B, K) probabilities; or each expert's own, (N, B) or (N, B, K).
        """
        losses = self.expert_losses(logits, targets)
        return self.mean(losses.sum(0), targets, logits[0].shape[-1])

    def loss_and_terms(
        self, model: ImmunityMoE, images: Tensor, targets: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = self(model.expert_logits(images), targets)
        return loss, (loss / model.num_experts,)
