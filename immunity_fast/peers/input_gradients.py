"""Gradients of the experts' losses by their images, which can be differentiated once more, and how alike they are.

Shapes: N experts, B images (C, H, W), K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TypeAlias

import torch
from torch import Tensor, nn

from immunity_fast.losses import FLOAT16_SCALE, direct_vjp, is_traced
from immunity_fast.models.attention import MathAttention
from immunity_fast.models.expert_list import ExpertList
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.peers.base import EnsembleLoss, each_experts
from immunity_fast.runtime.checks import kind_given
from immunity_fast.targets import TargetOptions, read_targets

Members: TypeAlias = ImmunityMoE | ExpertList

SMALLEST = 1e-20  # of a gradient's largest number: of a smaller one a derivative would leave float32's range


class InputGradientLoss(EnsembleLoss):
    """What losses of ∇_x L_i have in common, where L_i is expert i's cross-entropy of an image x in [0, 1].

    Args:
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.
    """

    own_images = False

    def expert_slopes(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The derivatives of `expert_losses` by the logits, from their formula: autograd's would be the kernels'.

        They are computed in float64, because those of an image that is learned are differences of nearly equal numbers.

        Args:
            logits: (N, B, K).
            targets: see `expert_losses`.

        Returns:
            (N, B, K), of at least float32, differentiable; 0 of images that are ignored.
        """
        experts, samples, classes = logits.shape
        of = self._classes
        options = TargetOptions(of.label_smoothing, of.class_weights, of.ignore_index)
        flat = each_experts(targets, experts, samples).flatten(0, 1)
        found = read_targets(flat, experts * samples, classes, options, group_name=of.group_name)
        weights = found.coefficients(options, classes, torch.float64).view(experts, samples, classes)
        factor = found.per_weight(options, torch.float64, of.group_name)
        if factor is not None:
            weights = weights * factor
        slopes = weights.sum(-1, keepdim=True) * logits.softmax(-1, dtype=torch.float64) - weights
        return slopes.to(torch.promote_types(logits.dtype, torch.float32))

    def logits_and_gradients(
        self, members: Members, images: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A pass of all experts and one gradient call for all: each has a copy of the images, which it alone sees.

        It is a function: BatchNorm's statistics stay as they are. It may be compiled.

        Args:
            members: the experts.
            images: (B, C, H, W), by which the gradients can be differentiated, too, if they require a gradient.
            targets: see `expert_losses`.

        Returns:
            Logits (N, B, K); ∇_x L_i (N, B, C, H, W), at least float32, in the graph; and the buffers as the pass has
            left them.
        """
        copies = images.expand(number_of(members), *images.shape)
        if is_traced(copies) or not torch.is_grad_enabled():
            logits, pullback, buffers = torch.func.vjp(  # type: ignore[misc]
                lambda each: _outputs(members, each), copies, has_aux=True
            )
        else:
            logits, pullback, buffers = direct_vjp(lambda each: _outputs(members, each), copies, True)
        # Autocast would cast the backward pass of operations whose forward pass it has not seen.
        with torch.autocast(logits.device.type, enabled=False):
            slopes = self.expert_slopes(logits, targets)
            scale = scale_of(logits)
            (gradients,) = pullback((slopes * scale).to(logits.dtype))
            gradients = gradients.to(slopes.dtype) / scale
        return logits, gradients, buffers


def number_of(members: Members) -> int:
    """N."""
    return members.num_experts if isinstance(members, ImmunityMoE) else len(members)


def as_members(members: ImmunityMoE | nn.ModuleList | Sequence[nn.Module]) -> Members:
    """A mixture as it is, or a list of networks, which are not copied.

    Raises:
        TypeError: neither; or one that is wrapped in `nn.DataParallel`, which is not a function of its parameters.
    """
    if isinstance(members, ImmunityMoE | ExpertList):
        return members
    listed = isinstance(members, nn.ModuleList | list | tuple)
    if not listed or not all(isinstance(member, nn.Module) for member in members):
        raise TypeError(f"members: expected an ImmunityMoE or a list of networks, got {kind_given(members)}")
    for index, member in enumerate(members):
        if isinstance(member, nn.DataParallel):
            raise TypeError(f"members: expected networks as they are, its .module, got DataParallel as number {index}")
    found = ExpertList(members)
    found.training = any(member.training for member in found)
    return found


def update(members: Members, buffers: dict[str, Tensor]) -> None:
    """Take over what a pass of `logits_and_gradients` has made of the buffers."""
    members.update_experts(buffers)


def check_several(name: str, experts: int, method: str) -> None:
    """Check that there are experts to compare.

    Raises:
        ValueError: there is one.
    """
    if experts < 2:
        raise ValueError(f"{name}: expected at least 2 experts, whose gradients {method} compares, got {experts}")


def scale_of(logits: Tensor) -> float:
    """What slopes are multiplied by on their way: in float16 they would fall below its smallest number."""
    return FLOAT16_SCALE if logits.dtype == torch.float16 else 1.0


def cosines(gradients: Tensor, logits: Tensor) -> Iterator[Tensor]:
    """cos(∇_x L_i, ∇_x L_j) of each pair i < j, (B,).

    A gradient that is zero has no direction, and neither has one too small for the format that it was computed in:
    its cosines are 0, and have the gradient 0.

    Args:
        gradients: (N, B, …).
        logits: what they are of, whose dtype is that format.
    """
    flat = gradients.flatten(2)
    least = torch.finfo(torch.float16).tiny / FLOAT16_SCALE if logits.dtype == torch.float16 else SMALLEST
    largest = flat.detach().abs().amax(-1, keepdim=True)
    counts = largest > least
    scaled = torch.where(counts, flat, 0) / torch.where(counts, largest, 1)
    squares = scaled.square().sum(-1, keepdim=True)
    directions = scaled / torch.where(counts, squares, 1).sqrt()
    for one, other in combinations(directions.unbind(), 2):
        yield (one * other).sum(-1)


def _outputs(members: Members, copies: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    if isinstance(members, ImmunityMoE):
        return members.expert_logits_and_buffers(copies)
    attention = MathAttention()
    attention.begin()
    with attention:
        return members.logits_and_buffers(copies)
