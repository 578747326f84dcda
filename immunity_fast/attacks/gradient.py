"""Attacks that follow gradients, on any callable from images to logits; conventions are torchattacks'.

Each is a function that takes the model as it is: the caller chooses evaluation mode and a gate's switch. `Attack` holds
the same settings, to be kept, listed or compiled. Attackers who know a mixture's gate are in
`evaluation.gate_attackers`: an attack needs of them a callable alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from immunity_fast.attacks.descent import Attack
from immunity_fast.attacks.losses import Loss
from immunity_fast.attacks.mixtures import Model
from immunity_fast.attacks.projections import Norm


def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    norm: Norm = "Linf",
    loss: Loss = "ce",
    targets: Tensor | None = None,
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., arXiv 1412.6572): one step of size eps.

    Args:
        model: images (B, C, H, W) in [0, 1] to logits or log-probabilities (B, K); or (draws, B, K), several draws of a
            random output, whose losses are averaged: expectation over transformation (EOT, arXiv 1707.07397).
        images: (B, C, H, W) floating-point, in [0, 1].
        labels: (B,) integers in 0..K−1.
        eps: radius of the ball, in units of the images' range; None is 8/255 for Linf, 1 for L2.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        loss: what is maximised: "ce", cross-entropy; or one of two margins that do not saturate where it does, "dlr"
            (difference of logits ratio, arXiv 2003.01690) and "cw" (arXiv 1608.04644).
        targets: (B,) classes that the attack is to reach; None is any but the label.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and inside [0, 1]: exactly, in
        bfloat16, too.

    Raises:
        ValueError: images outside [0, 1] or not 4-D; labels or targets of another shape, not integers or out of range;
            eps < 0; an output without a gradient, or one that is the same for
            different images and has no gradient for any; as `NotFiniteError`, an output or gradient that is NaN or
            infinite.

    Warns:
        UnmovedWarning: so many of the images have a gradient of exactly zero, so that the attack cannot move them; they
            are returned as they began.
    """
    radius = Attack(eps, norm=norm).radius
    return Attack(radius, radius, steps=1, norm=norm, loss=loss)(model, images, labels, targets)


def bim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    alpha: float | None = None,
    steps: int = 10,
    norm: Norm = "Linf",
    loss: Loss = "ce",
    targets: Tensor | None = None,
    keep_best: bool = False,
    drop_fooled: bool = False,
) -> Tensor:
    """Basic iterative method (Kurakin et al., arXiv 1607.02533): steps from the image itself.

    Args:
        model: images (B, C, H, W) in [0, 1] to logits or log-probabilities (B, K); or (draws, B, K), several draws of a
            random output, whose losses are averaged: expectation over transformation (EOT, arXiv 1707.07397).
        images: (B, C, H, W) floating-point, in [0, 1].
        labels: (B,) integers in 0..K−1.
        eps: radius of the ball, in units of the images' range; None is 8/255 for Linf, 1 for L2.
        alpha: size of a step, in the same units; None is 2/255 for Linf, 0.2 for L2.
        steps: number of steps.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        loss: what is maximised: "ce", cross-entropy; or one of two margins that do not saturate where it does, "dlr"
            (difference of logits ratio, arXiv 2003.01690) and "cw" (arXiv 1608.04644).
        targets: (B,) classes that the attack is to reach; None is any but the label.
        keep_best: the worst of all images on the way counts, not the last; see `descent` for models that are random.
        drop_fooled: an image that fools the model leaves the batch as it then is, and costs nothing more.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and inside [0, 1]: exactly, in
        bfloat16, too.

    Raises:
        ValueError: images outside [0, 1] or not 4-D; labels or targets of another shape, not integers or out of range;
            eps, alpha or steps < 0; an output without a gradient, or one that is the same for
            different images and has no gradient for any; as `NotFiniteError`, an output or gradient that is NaN or
            infinite.

    Warns:
        UnmovedWarning: so many of the images have a gradient of exactly zero, so that the attack cannot move them; they
            are returned as they began.
    """
    attack = Attack(eps, alpha, steps, norm, loss, keep_best=keep_best, drop_fooled=drop_fooled)
    return attack(model, images, labels, targets)


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    alpha: float | None = None,
    steps: int = 10,
    norm: Norm = "Linf",
    loss: Loss = "ce",
    targets: Tensor | None = None,
    random_start: bool = True,
    restarts: int = 1,
    keep_best: bool = False,
    drop_fooled: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al., arXiv 1706.06083): BIM from a random point of the ball.

    Args:
        model: images (B, C, H, W) in [0, 1] to logits or log-probabilities (B, K); or (draws, B, K), several draws of a
            random output, whose losses are averaged: expectation over transformation (EOT, arXiv 1707.07397).
        images: (B, C, H, W) floating-point, in [0, 1].
        labels: (B,) integers in 0..K−1.
        eps: radius of the ball, in units of the images' range; None is 8/255 for Linf, 1 for L2.
        alpha: size of a step, in the same units; None is 2/255 for Linf, 0.2 for L2.
        steps: number of steps.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        loss: what is maximised: "ce", cross-entropy; or one of two margins that do not saturate where it does, "dlr"
            (difference of logits ratio, arXiv 2003.01690) and "cw" (arXiv 1608.04644).
        targets: (B,) classes that the attack is to reach; None is any but the label.
        random_start: begin at a random point of the ball, not at the image.
        restarts: how often, the worst counting.
        keep_best: the worst of all images on the way counts, not the last; see `descent` for models that are random.
        drop_fooled: an image that fools the model leaves the batch as it then is, and costs nothing more.
        generator: of random starts; None is PyTorch's default generator.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and inside [0, 1]: exactly, in
        bfloat16, too.

    Raises:
        ValueError: images outside [0, 1] or not 4-D; labels or targets of another shape, not integers or out of range;
            eps, alpha or steps < 0, restarts < 1; an output without a gradient, or one that is the same for
            different images and has no gradient for any; as `NotFiniteError`, an output or gradient that is NaN or
            infinite.

    Warns:
        UnmovedWarning: so many of the images have a gradient of exactly zero, so that the attack cannot move them; they
            are returned as they began.
    """
    attack = Attack(
        eps,
        alpha,
        steps,
        norm,
        loss,
        random_start=random_start,
        restarts=restarts,
        keep_best=keep_best,
        drop_fooled=drop_fooled,
    )
    return attack(model, images, labels, targets, generator)


def mim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    alpha: float | None = None,
    steps: int = 10,
    decay: float = 1.0,
    norm: Norm = "Linf",
    loss: Loss = "ce",
    targets: Tensor | None = None,
    keep_best: bool = False,
    drop_fooled: bool = False,
) -> Tensor:
    """Momentum iterative method (Dong et al., arXiv 1710.06081): steps along a decaying sum of scaled gradients.

    Args:
        model: images (B, C, H, W) in [0, 1] to logits or log-probabilities (B, K); or (draws, B, K), several draws of a
            random output, whose losses are averaged: expectation over transformation (EOT, arXiv 1707.07397).
        images: (B, C, H, W) floating-point, in [0, 1].
        labels: (B,) integers in 0..K−1.
        eps: radius of the ball, in units of the images' range; None is 8/255 for Linf, 1 for L2.
        alpha: size of a step, in the same units; None is 2/255 for Linf, 0.2 for L2.
        steps: number of steps.
        decay: what a step keeps of the sum of gradients before it.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        loss: what is maximised: "ce", cross-entropy; or one of two margins that do not saturate where it does, "dlr"
            (difference of logits ratio, arXiv 2003.01690) and "cw" (arXiv 1608.04644).
        targets: (B,) classes that the attack is to reach; None is any but the label.
        keep_best: the worst of all images on the way counts, not the last; see `descent` for models that are random.
        drop_fooled: an image that fools the model leaves the batch as it then is, and costs nothing more.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and inside [0, 1]: exactly, in
        bfloat16, too.

    Raises:
        ValueError: images outside [0, 1] or not 4-D; labels or targets of another shape, not integers or out of range;
            eps, alpha, steps or decay < 0; an output without a gradient, or one that is the same for
            different images and has no gradient for any; as `NotFiniteError`, an output or gradient that is NaN or
            infinite.

    Warns:
        UnmovedWarning: so many of the images have a gradient of exactly zero, so that the attack cannot move them; they
            are returned as they began.
    """
    attack = Attack(eps, alpha, steps, norm, loss, decay=decay, keep_best=keep_best, drop_fooled=drop_fooled)
    return attack(model, images, labels, targets)
