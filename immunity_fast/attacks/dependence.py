"""Whether what a model says depends on its images: without that no attack that follows gradients can be made of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.attacks.mixtures import LabelledModel, exact_means
from immunity_fast.attacks.projections import UNIT, Bounds


def image_gradient(total: Tensor, images: Tensor, keep_graph: bool = False) -> Tensor:
    """The gradient of a number with respect to the images that it was computed from.

    Args:
        total: (), what is differentiated.
        images: (B, C, H, W), which require gradients.
        keep_graph: for another number of the same pass.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: there is no gradient, because of torch.inference_mode, or because an output was detached.
    """
    gradient = None
    if total.requires_grad:
        gradient = torch.autograd.grad(total, images, retain_graph=keep_graph, allow_unused=True)[0]
    if gradient is None and torch.is_inference_mode_enabled():
        raise ValueError(
            "model: expected outputs with a gradient with respect to the images, got those of torch.inference_mode, "
            "which have none: leave it; an attack under torch.no_grad() will do"
        )
    if gradient is None:
        raise ValueError(
            "model: expected outputs with a gradient with respect to the images, got detached ones; `square` alone "
            "can attack those"
        )
    return gradient


def check_dependence(
    model: LabelledModel, images: Tensor, labels: Tensor, elsewhere: Tensor | None, bounds: Bounds = UNIT
) -> None:
    """Check a model that has no gradient for any image of a batch: that alone is no proof that it ignores them.

    Args:
        model: (images, labels) to outputs (B, K), or (draws, B, K).
        images: (B, C, H, W) of the batch.
        labels: (B,).
        elsewhere: (M, C, H, W) images on which outputs are compared, too, or None.
        bounds: the lowest and the highest value of a pixel.

    Raises:
        ValueError: outputs agree on all these images and on made-up ones, or are detached.
    """
    with torch.enable_grad():  # compiled code takes what is detached for constant
        inputs = images.detach().requires_grad_()
        image_gradient(model(inputs, labels).sum(), inputs)
    others = [_made_up(images[0], bounds)]
    if elsewhere is not None:
        others += torch.split(elsewhere.to(images), len(images))
    first = None
    for shown in (images, *others):
        with torch.no_grad(), exact_means():  # one label for all: the outputs of some attackers depend on it
            outputs = model(shown, labels[:1].expand(len(shown))).movedim(-2, 0)
        first = outputs[:1] if first is None else first
        if bool((outputs != first).any()):
            return
    raise ValueError(
        "model: expected outputs that depend on the images, got the same one for all of them and a gradient of zero"
    )


def _made_up(like: Tensor, bounds: Bounds) -> Tensor:
    """Images (16, C, H, W) as unlike each other, and `like` (C, H, W), as can be: any network knows some apart."""
    generator = torch.Generator().manual_seed(0)
    channels, *size = like.shape

    def patches(count: int, side: int) -> Tensor:
        return F.interpolate(torch.rand(count, channels, side, side, generator=generator), size)

    plain = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, *like.shape)
    noise = torch.rand(4, *like.shape, generator=generator)
    made = torch.cat([plain, noise, noise[:2].round(), patches(4, 1), patches(3, 4)])
    low, high = bounds
    return torch.cat([low + high - like[None], (low + (high - low) * made).to(like)])
