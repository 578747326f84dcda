"""Gradient alignment loss: experts whose losses are not to grow in the same direction of an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from immunity_fast.arguments import Experts, join_experts
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.peers.input_gradients import InputGradientLoss, check_several, cosines, scale_of, update
from immunity_fast.runtime.checks import check_weight, kind_given
from immunity_fast.runtime.compilation import eagerly
from immunity_fast.targets import IGNORE_INDEX, ClassWeights


class GALLoss(InputGradientLoss):
    """mean_i CE_i + λ·mean_x log Σ_{i<j} exp cos(∇_x L_i, ∇_x L_j): GAL (Kariyappa & Qureshi, arXiv 1901.09981).

    L_i is expert i's cross-entropy of an image x. A gradient that is 0 has the cosine 0 with any other. Its authors
    claim robustness against transferred attacks alone, and train networks with leaky ReLUs, because second derivatives
    of networks with ReLUs are sparse.

    Args:
        weight: λ; 0.5 as the authors have it.
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.

    `measured` are the loss, the mean of the experts' cross-entropies, and the mean logarithm, which falls as the
    gradients part: the loss is the one plus λ times the other.

    Raises:
        ValueError: a setting that is negative or not finite; of a batch, one expert alone.
    """

    measured = ("loss", "cross_entropy", "diversity")

    def __init__(
        self,
        weight: float = 0.5,
        *,
        label_smoothing: float = 0.0,
        class_weights: ClassWeights = None,
        ignore_index: int | None = IGNORE_INDEX,
        group_name: str = "",
    ) -> None:
        super().__init__(
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            ignore_index=ignore_index,
            group_name=group_name,
        )
        check_weight("weight", weight)
        self.weight = weight

    def extra_repr(self) -> str:
        return f"weight={self.weight}"

    @eagerly  # a compiler has no double backward across its graphs
    def forward(self, logits: Experts, images: Tensor | Sequence[Tensor], targets: Tensor) -> Tensor:
        """The loss of a batch, 0-d; takes the gradients by the images itself.

        Args:
            logits: (N, B, K), or N tensors (B, K), N ≥ 2.
            images: (B, C, H, W) that require a gradient and lead to the logits, which takes N backward passes; or
                (N, B, C, H, W) or N tensors (B, C, H, W), of which each expert has seen its own alone: one pass.
            targets: (B,) integers or (B, K) probabilities.

        Raises:
            ValueError: a wrong shape, one expert, or images that are not in the graph of the logits.
            TypeError: a wrong dtype.
        """
        stacked = join_experts("logits", logits, 3, "(N, B, K)")
        check_several("logits", len(stacked), "GAL")
        gradients = self._gradients(stacked, images, targets)
        return self._terms(stacked, gradients, targets)[0]

    def loss_and_terms(
        self, model: ImmunityMoE, images: Tensor, targets: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_several("experts", model.num_experts, "GAL")
        logits, gradients, buffers = self.logits_and_gradients(model, images, targets)
        update(model, buffers)
        loss, *terms = self._terms(logits, gradients, targets)
        return loss, tuple(terms)

    def check_experts(self, num_experts: int) -> None:
        check_several("experts", num_experts, "GAL")

    def passes(self, num_experts: int, attack_steps: int) -> float:
        """See `EnsembleLoss`; the backward pass of a backward pass counts as one more of both."""
        return float(num_experts * (2 + attack_steps))

    def _terms(self, logits: Tensor, gradients: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        classes = logits.shape[-1]
        losses = self.expert_losses(logits, targets).mean(0)
        with torch.autocast(logits.device.type, enabled=False):
            alignment = torch.stack(list(cosines(gradients, logits))).logsumexp(0)
        return (
            self.mean(losses + self.weight * alignment, targets, classes),
            self.mean(losses, targets, classes),
            self.mean(alignment, targets, classes),
        )

    def _gradients(self, logits: Tensor, images: Tensor | Sequence[Tensor], targets: Tensor) -> Tensor:
        """∇_x L_i, (N, B, C, H, W), in the graph."""
        experts, samples = logits.shape[:2]
        parts = [images] if isinstance(images, Tensor) else list(images)
        if not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"images: expected a tensor or a list of tensors, got {kind_given(images)}")
        hint = "in the graph that leads to logits, with gradients enabled"
        if not logits.requires_grad:
            raise ValueError(f"logits: expected images {hint}, got logits without a graph")
        if not all(part.requires_grad for part in parts):
            raise ValueError(f"images: expected tensors {hint}, got some that require no gradient")
        stacked = isinstance(images, Tensor) and images.dim() == 5
        shared = isinstance(images, Tensor) and not stacked
        lead = (experts, samples) if stacked else (samples,)
        as_many = len(parts) == (1 if isinstance(images, Tensor) else experts)
        if not as_many or any(part.shape[: len(lead)] != lead for part in parts):
            shapes = " and ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(
                f"images: expected shape ({samples}, C, H, W), ({experts}, {samples}, C, H, W) or a list of {experts} "
                f"tensors ({samples}, C, H, W), got {shapes}"
            )
        if len({id(part) for part in parts}) < len(parts):
            # The gradient by it would be the sum of the experts', and all of them alike.
            raise ValueError(
                "images: expected a copy for each expert, or the one tensor itself, got one of a list twice"
            )
        # Autocast would cast the backward pass of operations whose forward pass it has not seen.
        with torch.autocast(logits.device.type, enabled=False):
            scale = scale_of(logits)
            slopes = (self.expert_slopes(logits, targets) * scale).to(logits.dtype)
            found: list[Tensor | None] = []
            for own, along in zip(logits, slopes, strict=True) if shared else [(logits, slopes)]:
                found += torch.autograd.grad(own, parts, along, create_graph=True, retain_graph=True, allow_unused=True)
            gradients = [gradient for gradient in found if gradient is not None]
            if len(gradients) < len(found):
                raise ValueError(f"images: expected tensors {hint}, got some that logits do not depend on")
            return (gradients[0] if stacked else torch.stack(gradients)) / scale
