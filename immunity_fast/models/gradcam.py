"""Grad-CAM heatmaps of a mixture's experts for chosen classes, taken without a trace in the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from immunity_fast.arguments import Experts, Score, WeightScale, check_targets
from immunity_fast.functional import gradcam_heatmaps, label_scores
from immunity_fast.models.gate import RandomSwitchGate
from immunity_fast.runtime.checks import check_choice, is_whole
from immunity_fast.runtime.modes import evaluating
from immunity_fast.selection import mean_mixture


class Mixture(Protocol):
    """What is asked of a mixture here; `ImmunityMoE` is one."""

    gate: RandomSwitchGate

    def expert_outputs(self, images: Tensor, *, detach_weights: bool = False) -> tuple[Tensor, Experts, Tensor]:
        """Logits (N, B, K), activations of each expert in their graph, the gate's weights (B, N)."""


def expert_heatmaps(
    model: Mixture,
    images: Tensor,
    classes: Tensor | Sequence[int] | int | None = None,
    *,
    size: tuple[int, int] | None = None,
    score: Score = "logit",
    weight_scale: WeightScale = "channels",
    normalize: bool = False,
) -> Tensor:
    """What `ImmunityMoE.heatmaps` returns; see there.

    Raises:
        ValueError, TypeError: images or classes that the model cannot be asked about.
    """
    assert isinstance(model, nn.Module)
    check_choice("score", score, Score)
    devices = [images.device] if isinstance(images, Tensor) and images.is_cuda else []
    # Outside of inference mode, in which nothing has a derivative; a copy, since what was made in it keeps that.
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model), torch.random.fork_rng(devices):
        if isinstance(images, Tensor) and images.is_floating_point():
            # Of the images, too: the model's own tensors may be frozen.
            images = (images.clone() if images.is_inference() else images.detach()).requires_grad_()
        with model.gate.switched("mean"):
            logits, activations, _ = model.expert_outputs(images, detach_weights=True)
        targets = _targets(classes, mean_mixture(model.gate, logits.detach()))
        parts = [activations] if isinstance(activations, Tensor) else list(activations)
        # Autocast would cast the backward pass of operations whose forward pass it has not seen.
        with torch.autocast(images.device.type, enabled=False):
            slopes = torch.autograd.grad(label_scores(logits, targets, score), parts)
    size = size or (images.shape[-2], images.shape[-1])
    found = [
        # One by one: experts of different structures have maps of different sizes.
        gradcam_heatmaps(*_as_experts(maps, slope), size=size, weight_scale=weight_scale)
        for maps, slope in zip(parts, slopes, strict=True)
    ]
    heatmaps = torch.cat(found).detach()
    if not normalize:
        return heatmaps
    peaks = heatmaps.amax((-2, -1), keepdim=True)
    return heatmaps / torch.where(peaks > 0, peaks, 1)


def _as_experts(maps: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the experts first: of one alone (B, C, h, w) as (1, B, C, h, w)."""
    own = maps.detach(), slopes.detach()
    return own if maps.dim() == 5 else (own[0][None], own[1][None])


def _targets(classes: Tensor | Sequence[int] | int | None, log_probabilities: Tensor) -> Tensor:
    """The class (B,) of each image that its heatmaps are for.

    Raises:
        ValueError, TypeError: no classes of the model.
    """
    count, number = log_probabilities.shape
    if not isinstance(classes, Tensor):  # or NumPy's
        classes = getattr(classes, "tolist", lambda: classes)()
    if classes is None:
        return log_probabilities.argmax(-1)
    if isinstance(classes, Tensor):
        asked = classes.expand(count) if classes.dim() == 0 else classes
    elif is_whole(classes):
        asked = torch.full((count,), int(classes))
    elif isinstance(classes, Sequence) and all(map(is_whole, classes)):
        asked = torch.tensor([int(each) for each in classes], dtype=torch.int64)
    else:
        raise TypeError(f"classes: expected whole numbers, one an image, or one for all, got {classes!r}")
    targets = check_targets(asked.cpu(), count, number, "classes")  # of few numbers, and worth the wait
    return targets.to(log_probabilities.device)
