"""The loss of a batch, and its terms, of a mixture: from head on where its experts can be cut, else by autograd."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from immunity_fast.arguments import Experts
from immunity_fast.losses import Classification, FusedImmunityLoss, ImmunityTerms
from immunity_fast.runtime.compilation import eagerly
from immunity_fast.runtime.sharding import gathered_again, is_sharded
from immunity_fast.runtime.strategies import DoubleBackprop


class Differentiated(Protocol):
    """What is asked of a mixture for its loss; `ImmunityMoE` is such."""

    num_experts: int

    @property
    def has_head(self) -> bool:
        """Whether the experts can be cut where Grad-CAM looks."""

    def expert_logits(self, images: Tensor) -> Tensor:
        """Logits (N, B, K)."""

    def expert_outputs(self, images: Tensor, *, detach_weights: bool = False) -> tuple[Tensor, Experts, Tensor]:
        """Logits, activations, gate."""

    def trunk_outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Activations (N, B, C, h, w), gate."""

    def head_outputs(self, activations: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, buffers."""

    def update_head(self, buffers: dict[str, Tensor]) -> None:
        """Take over buffers."""


def loss_and_terms(
    model: Differentiated,
    loss_fn: FusedImmunityLoss,
    images: Tensor,
    labels: Tensor,
    *,
    double_backprop: DoubleBackprop = "reverse",
    classification: Classification | None = None,
) -> tuple[Tensor, ImmunityTerms]:
    """The loss of a batch, eq. (12), of one network its cross-entropy.

    Where the experts can be cut, all is one graph for `torch.compile(fullgraph=True)`.

    Args:
        model: the mixture. BatchNorm's statistics are those of one forward pass afterwards.
        loss_fn: what is minimised.
        images: (B, C, H, W) floating-point in [0, 1].
        labels: (B,) integers, or (B, K) probabilities.
        double_backprop: see `FusedImmunityLoss.from_head`.
        classification: see `FusedImmunityLoss.forward`.

    Returns:
        (the loss, 0-d; its terms before weighting).

    Raises:
        ValueError, TypeError: as `FusedImmunityLoss.forward`.
    """
    if model.num_experts == 1:
        # The baseline: it has no other to be apart from, and its cross-entropy counts once.
        logits = model.expert_logits(images)
        losses = partial(loss_fn.class_losses, targets=labels, alpha=0.0) if classification is None else classification
        loss = loss_fn.mean(losses(logits, None), labels, logits.shape[2])
        return loss, ImmunityTerms(loss, torch.zeros_like(loss), torch.zeros_like(loss))
    if not model.has_head:
        return _by_autograd(model, loss_fn, images, labels, classification)
    maps, gate = model.trunk_outputs(images)
    result, buffers = loss_fn.from_head(
        model.head_outputs,
        maps,
        labels,
        gate,
        return_terms=True,
        has_aux=True,
        double_backprop=double_backprop,
        classification=classification,
    )
    model.update_head(buffers)
    loss, terms = result
    return loss, terms


@eagerly  # a compiler has no double backward across its graphs
def _by_autograd(
    model: Differentiated,
    loss_fn: FusedImmunityLoss,
    images: Tensor,
    labels: Tensor,
    classification: Classification | None,
) -> tuple[Tensor, ImmunityTerms]:
    keeps_graph = torch.is_grad_enabled()
    assert isinstance(model, nn.Module)
    # Gradients, which Grad-CAM wants of a validation's loss, too; and of weights in shards, which it takes twice.
    with torch.enable_grad(), gathered_again(model):
        if is_sharded(model) and not images.requires_grad:
            images = images.detach().requires_grad_()  # FSDP2 frees a network behind its backward pass, if it sees it
        logits, activations, gate = model.expert_outputs(images, detach_weights=loss_fn.detach_weights)
        loss, terms = loss_fn(logits, activations, labels, gate, return_terms=True, classification=classification)
    return (loss, terms) if keeps_graph else (loss.detach(), ImmunityTerms(*(term.detach() for term in terms)))
