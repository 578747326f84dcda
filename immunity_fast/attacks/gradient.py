"""Attacks that follow gradients, on any callable from images to logits; conventions are torchattacks'.

Each is a function. A module is attacked in evaluation mode, and is then again in the mode that it was in; any other
callable is taken as it is. `Attack` holds the same settings, to be kept, listed or compiled. Attackers who know a
mixture's gate are in `evaluation.gate_attackers`: an attack needs of them a callable alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import overload

import torch
from torch import Tensor

from immunity_fast.attacks.descent import Attack
from immunity_fast.attacks.losses import Loss, OwnLoss
from immunity_fast.attacks.mixtures import Model
from immunity_fast.attacks.preprocessing import Preprocessing
from immunity_fast.attacks.projections import UNIT, Bounds, Norm
from immunity_fast.attacks.radii import Given, of_each, one_or_each
from immunity_fast.runtime.precision import AttackAmp


@overload
def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | None = None,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> Tensor: ...


@overload
def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[Given],
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> list[Tensor]: ...


def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | Sequence[Given] | None = None,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> Tensor | list[Tensor]:
    """Fast gradient sign method (Goodfellow et al., arXiv 1412.6572): one step of size eps.

    Args:
        model: images (B, C, H, W) to logits or log-probabilities (B, K); or (draws, B, K), several draws of a random
            output, whose losses are averaged: expectation over transformation (EOT, arXiv 1707.07397). A module is in
            evaluation mode for as long as the attack takes.
        images: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers in 0..K−1.
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`. A
            tensor (B,) has a radius of each image's own. A list or tuple has several, for each of which there is a
            result: what a call with it alone gives, from the same random state.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        loss: what is maximised: "ce", cross-entropy; or one of two margins that do not saturate where it does, "dlr"
            (difference of logits ratio, arXiv 2003.01690) and "cw" (arXiv 1608.04644); or a function of outputs (B, K),
            float32 at least, and labels (B,) to (B,), which with `targets` is given these as labels and minimised.
        targets: (B,) classes that the attack is to reach; None is any but the label.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        preprocessing: what is done to images on their way to the model, `dict(mean=…, std=…)`: (images − mean) / std.
        amp: "bf16" takes gradients under autocast, in bfloat16; what fools the model is found out without.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds: exactly, in
        bfloat16, too. Of several radii a list.

    Raises:
        ValueError: images out of bounds or not 4-D; labels or targets of another shape, not integers or out of range;
            eps < 0; an output without a gradient, or one that is the same for different images and has no
            gradient for any; as `NotFiniteError`, an output or gradient that is NaN or infinite.
        TypeError: images, labels or targets that are no tensors.

    Warns:
        UnmovedWarning: so many of the images have a gradient of exactly zero, so that the attack cannot move them; they
            are returned as they began.
        MovedStatisticsWarning: the model is a function that asks a module in training mode, whose statistics moved.
    """
    settings = partial(Attack, steps=1, norm=norm, loss=loss, bounds=bounds, amp=amp)

    def one(radius: Given | None) -> Tensor:
        radius = settings().radius if radius is None else radius
        return _attack(settings, model, images, labels, radius, radius, targets, None, preprocessing)

    return _each(one, eps, images, None)


@overload
def bim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | None = None,
    alpha: Given | None = None,
    steps: int = 10,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    keep_best: bool = False,
    drop_fooled: bool = False,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> Tensor: ...


@overload
def bim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[Given],
    alpha: Given | None = None,
    steps: int = 10,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    keep_best: bool = False,
    drop_fooled: bool = False,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> list[Tensor]: ...


def bim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | Sequence[Given] | None = None,
    alpha: Given | None = None,
    steps: int = 10,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    keep_best: bool = False,
    drop_fooled: bool = False,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> Tensor | list[Tensor]:
    """Basic iterative method (Kurakin et al., arXiv 1607.02533): steps from the image itself.

    Args:
        model: images (B, C, H, W) to logits or log-probabilities (B, K); or (draws, B, K), several draws of a random
            output, whose losses are averaged: expectation over transformation (EOT, arXiv 1707.07397). A module is in
            evaluation mode for as long as the attack takes.
        images: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers in 0..K−1.
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`. A
            tensor (B,) has a radius of each image's own. A list or tuple has several, for each of which there is a
            result: what a call with it alone gives, from the same random state.
        alpha: size of a step, in the same units; None is 2/255 for Linf, 0.2 for L2, times that range. A tensor (B,)
            has one of each image's own.
        steps: number of steps.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        loss: what is maximised: "ce", cross-entropy; or one of two margins that do not saturate where it does, "dlr"
            (difference of logits ratio, arXiv 2003.01690) and "cw" (arXiv 1608.04644); or a function of outputs (B, K),
            float32 at least, and labels (B,) to (B,), which with `targets` is given these as labels and minimised.
        targets: (B,) classes that the attack is to reach; None is any but the label.
        keep_best: the worst of all images on the way counts, not the last; see `descent` for models that are random.
        drop_fooled: an image that fools the model leaves the batch as it then is, and costs nothing more.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        preprocessing: what is done to images on their way to the model, `dict(mean=…, std=…)`: (images − mean) / std.
        amp: "bf16" takes gradients under autocast, in bfloat16; what fools the model is found out without.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds: exactly, in
        bfloat16, too. Of several radii a list.

    Raises:
        ValueError: images out of bounds or not 4-D; labels or targets of another shape, not integers or out of range;
            eps, alpha or steps < 0; an output without a gradient, or one that is the same for different images and has
            no gradient for any; as `NotFiniteError`, an output or gradient that is NaN or infinite.
        TypeError: images, labels or targets that are no tensors.

    Warns:
        UnmovedWarning: so many of the images have a gradient of exactly zero, so that the attack cannot move them; they
            are returned as they began.
        MovedStatisticsWarning: the model is a function that asks a module in training mode, whose statistics moved.
    """
    settings = partial(
        Attack, steps=steps, norm=norm, loss=loss, keep_best=keep_best, drop_fooled=drop_fooled, bounds=bounds, amp=amp
    )

    def one(radius: Given | None) -> Tensor:
        return _attack(settings, model, images, labels, radius, alpha, targets, None, preprocessing)

    return _each(one, eps, images, None)


@overload
def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | None = None,
    alpha: Given | None = None,
    steps: int = 10,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    random_start: bool = True,
    restarts: int = 1,
    keep_best: bool = False,
    drop_fooled: bool = False,
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> Tensor: ...


@overload
def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[Given],
    alpha: Given | None = None,
    steps: int = 10,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    random_start: bool = True,
    restarts: int = 1,
    keep_best: bool = False,
    drop_fooled: bool = False,
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> list[Tensor]: ...


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | Sequence[Given] | None = None,
    alpha: Given | None = None,
    steps: int = 10,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    random_start: bool = True,
    restarts: int = 1,
    keep_best: bool = False,
    drop_fooled: bool = False,
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> Tensor | list[Tensor]:
    """Projected gradient descent (Madry et al., arXiv 1706.06083): BIM from a random point of the ball.

    Args:
        model: images (B, C, H, W) to logits or log-probabilities (B, K); or (draws, B, K), several draws of a random
            output, whose losses are averaged: expectation over transformation (EOT, arXiv 1707.07397). A module is in
            evaluation mode for as long as the attack takes.
        images: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers in 0..K−1.
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`. A
            tensor (B,) has a radius of each image's own. A list or tuple has several, for each of which there is a
            result: what a call with it alone gives, from the same random state.
        alpha: size of a step, in the same units; None is 2/255 for Linf, 0.2 for L2, times that range. A tensor (B,)
            has one of each image's own.
        steps: number of steps.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        loss: what is maximised: "ce", cross-entropy; or one of two margins that do not saturate where it does, "dlr"
            (difference of logits ratio, arXiv 2003.01690) and "cw" (arXiv 1608.04644); or a function of outputs (B, K),
            float32 at least, and labels (B,) to (B,), which with `targets` is given these as labels and minimised.
        targets: (B,) classes that the attack is to reach; None is any but the label.
        random_start: begin at a random point of the ball, not at the image.
        restarts: how often, the worst counting.
        keep_best: the worst of all images on the way counts, not the last; see `descent` for models that are random.
        drop_fooled: an image that fools the model leaves the batch as it then is, and costs nothing more.
        generator: of random starts; None is PyTorch's default generator.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        preprocessing: what is done to images on their way to the model, `dict(mean=…, std=…)`: (images − mean) / std.
        amp: "bf16" takes gradients under autocast, in bfloat16; what fools the model is found out without.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds: exactly, in
        bfloat16, too. Of several radii a list.

    Raises:
        ValueError: images out of bounds or not 4-D; labels or targets of another shape, not integers or out of range;
            eps, alpha or steps < 0, restarts < 1; an output without a gradient, or one that is the same for different
            images and has no gradient for any; as `NotFiniteError`, an output or gradient that is NaN or infinite.
        TypeError: images, labels or targets that are no tensors.

    Warns:
        UnmovedWarning: so many of the images have a gradient of exactly zero, so that the attack cannot move them; they
            are returned as they began.
        MovedStatisticsWarning: the model is a function that asks a module in training mode, whose statistics moved.
    """
    settings = partial(
        Attack,
        steps=steps,
        norm=norm,
        loss=loss,
        random_start=random_start,
        restarts=restarts,
        keep_best=keep_best,
        drop_fooled=drop_fooled,
        bounds=bounds,
        amp=amp,
    )

    def one(radius: Given | None) -> Tensor:
        return _attack(settings, model, images, labels, radius, alpha, targets, generator, preprocessing)

    return _each(one, eps, images, generator)


@overload
def mim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | None = None,
    alpha: Given | None = None,
    steps: int = 10,
    decay: float = 1.0,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    keep_best: bool = False,
    drop_fooled: bool = False,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> Tensor: ...


@overload
def mim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[Given],
    alpha: Given | None = None,
    steps: int = 10,
    decay: float = 1.0,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    keep_best: bool = False,
    drop_fooled: bool = False,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> list[Tensor]: ...


def mim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | Sequence[Given] | None = None,
    alpha: Given | None = None,
    steps: int = 10,
    decay: float = 1.0,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    keep_best: bool = False,
    drop_fooled: bool = False,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    amp: AttackAmp = "off",
) -> Tensor | list[Tensor]:
    """Momentum iterative method (Dong et al., arXiv 1710.06081): steps along a decaying sum of scaled gradients.

    Args:
        model: images (B, C, H, W) to logits or log-probabilities (B, K); or (draws, B, K), several draws of a random
            output, whose losses are averaged: expectation over transformation (EOT, arXiv 1707.07397). A module is in
            evaluation mode for as long as the attack takes.
        images: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers in 0..K−1.
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`. A
            tensor (B,) has a radius of each image's own. A list or tuple has several, for each of which there is a
            result: what a call with it alone gives, from the same random state.
        alpha: size of a step, in the same units; None is 2/255 for Linf, 0.2 for L2, times that range. A tensor (B,)
            has one of each image's own.
        steps: number of steps.
        decay: what a step keeps of the sum of gradients before it.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        loss: what is maximised: "ce", cross-entropy; or one of two margins that do not saturate where it does, "dlr"
            (difference of logits ratio, arXiv 2003.01690) and "cw" (arXiv 1608.04644); or a function of outputs (B, K),
            float32 at least, and labels (B,) to (B,), which with `targets` is given these as labels and minimised.
        targets: (B,) classes that the attack is to reach; None is any but the label.
        keep_best: the worst of all images on the way counts, not the last; see `descent` for models that are random.
        drop_fooled: an image that fools the model leaves the batch as it then is, and costs nothing more.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        preprocessing: what is done to images on their way to the model, `dict(mean=…, std=…)`: (images − mean) / std.
        amp: "bf16" takes gradients under autocast, in bfloat16; what fools the model is found out without.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds: exactly, in
        bfloat16, too. Of several radii a list.

    Raises:
        ValueError: images out of bounds or not 4-D; labels or targets of another shape, not integers or out of range;
            eps, alpha, steps or decay < 0; an output without a gradient, or one that is the same for different images
            and has no gradient for any; as `NotFiniteError`, an output or gradient that is NaN or infinite.
        TypeError: images, labels or targets that are no tensors.

    Warns:
        UnmovedWarning: so many of the images have a gradient of exactly zero, so that the attack cannot move them; they
            are returned as they began.
        MovedStatisticsWarning: the model is a function that asks a module in training mode, whose statistics moved.
    """
    settings = partial(
        Attack,
        steps=steps,
        norm=norm,
        loss=loss,
        decay=decay,
        keep_best=keep_best,
        drop_fooled=drop_fooled,
        bounds=bounds,
        amp=amp,
    )

    def one(radius: Given | None) -> Tensor:
        return _attack(settings, model, images, labels, radius, alpha, targets, None, preprocessing)

    return _each(one, eps, images, None)


def _attack(
    settings: Callable[..., Attack],
    model: Model,
    images: Tensor,
    labels: Tensor,
    eps: Given | None,
    alpha: Given | None,
    targets: Tensor | None,
    generator: torch.Generator | None,
    preprocessing: Preprocessing | None,
) -> Tensor:
    """An attack whose radius and step are each that of all images, or one of each image's own."""
    (radius, radii), (step, steps) = one_or_each(eps), one_or_each(alpha)
    attack = settings(eps=radius, alpha=step)
    return attack(model, images, labels, targets, generator, eps=radii, alpha=steps, preprocessing=preprocessing)


def _each(
    attack: Callable[[Given | None], Tensor],
    eps: Given | Sequence[Given] | None,
    images: Tensor,
    generator: torch.Generator | None,
) -> Tensor | list[Tensor]:
    if isinstance(eps, Sequence):
        return of_each(eps, attack, images, generator)
    return attack(eps)
