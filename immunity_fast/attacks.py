"""Plain Linf attacks on any callable from images to logits or log-probabilities; conventions are torchattacks'.

Each takes the model as it is: the caller chooses evaluation mode and the gate's switch. A random gate is attacked by
one draw a gradient; to attack its exact expectation, set `switch="mean"`.

Shared arguments:
    model: images (B, C, H, W) in [0, 1] to logits or log-probabilities (B, K).
    images: (B, C, H, W) floating-point, in [0, 1].
    labels: (B,) integers; the attack maximises their cross-entropy.
    eps: radius of the Linf ball, in units of the images' range.
    alpha: step size; steps: number of steps.
    generator: of random starts; None is PyTorch's default generator.

Each returns adversarial images (B, C, H, W), detached, inside the ball and inside [0, 1]. `ValueError`: images outside
[0, 1] or not 4-D, labels of another shape or not integers, eps or alpha < 0, steps < 0, or an output without a gradient
for the images.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Model = Callable[[Tensor], Tensor]


def fgsm(model: Model, images: Tensor, labels: Tensor, *, eps: float = 8 / 255) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., arXiv 1412.6572): one step of size eps."""
    _check(images, labels, eps, eps, 1)
    return _project(images + eps * _gradient(model, images, labels).sign(), images, eps)


def bim(
    model: Model, images: Tensor, labels: Tensor, *, eps: float = 8 / 255, alpha: float = 2 / 255, steps: int = 10
) -> Tensor:
    """Basic iterative method (Kurakin et al., arXiv 1607.02533): signed steps from the image itself."""
    _check(images, labels, eps, alpha, steps)
    return _descend(model, images, images, labels, eps, alpha, steps)


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 20,
    random_start: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al., arXiv 1706.06083): BIM from a uniformly random point of the ball."""
    _check(images, labels, eps, alpha, steps)
    start = images
    if random_start:
        device = images.device if generator is None else generator.device
        noise = torch.rand(images.shape, generator=generator, device=device, dtype=torch.float32)
        start = _project(images + (2 * noise - 1).to(images) * eps, images, eps)
    return _descend(model, start, images, labels, eps, alpha, steps)


def mim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    alpha: float = 2 / 255,
    steps: int = 10,
    decay: float = 1.0,
) -> Tensor:
    """Momentum iterative method (Dong et al., arXiv 1710.06081): signed steps along a decaying sum of gradients."""
    _check(images, labels, eps, alpha, steps)
    adversarial, momentum = images.detach(), torch.zeros_like(images)
    for _ in range(steps):
        gradient = _gradient(model, adversarial, labels)
        magnitude = gradient.abs().mean((1, 2, 3), keepdim=True)
        # A gradient of exactly zero stays zero; torchattacks divides 0 by 0 here and returns NaN images.
        momentum = decay * momentum + gradient / torch.where(magnitude > 0, magnitude, 1)
        adversarial = _project(adversarial + alpha * momentum.sign(), images, eps)
    return adversarial


def _descend(
    model: Model, start: Tensor, images: Tensor, labels: Tensor, eps: float, alpha: float, steps: int
) -> Tensor:
    adversarial = start.detach()
    for _ in range(steps):
        adversarial = _project(adversarial + alpha * _gradient(model, adversarial, labels).sign(), images, eps)
    return adversarial


def _gradient(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        # The sum, not the mean: an image's gradient then does not shrink with the size of its batch.
        loss = F.cross_entropy(model(images), labels.long(), reduction="sum")
        gradient = torch.autograd.grad(loss, images, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise ValueError(
            "model: its output has no gradient with respect to the images, so it cannot be attacked by one"
        )
    return gradient


def _project(adversarial: Tensor, images: Tensor, eps: float) -> Tensor:
    images = images.detach()
    return (images + (adversarial.detach() - images).clamp(-eps, eps)).clamp(0, 1)


def _check(images: Tensor, labels: Tensor, eps: float, alpha: float, steps: int) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images: expected floating-point (B, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels: expected integers ({images.shape[0]},), got {labels.dtype} {tuple(labels.shape)}")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images: expected values in [0, 1], got {images.min():.4g} to {images.max():.4g}")
    for name, value in (("eps", eps), ("alpha", alpha), ("steps", steps)):
        if not value >= 0:  # NaN too
            raise ValueError(f"{name}: expected at least 0, got {value}")
