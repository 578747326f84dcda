"""The balls that attacks stay in, exactly: in float32, float16 and bfloat16, rounding never carries an image outside.

A distance is meant as the difference of two stored numbers, taken exactly. Rounded naively, images + 8/255 lies outside
the ball for about half of all float32 pixels, and in bfloat16 by up to 2/255.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from immunity_fast.runtime.precision import at_least_float32

Norm = Literal["Linf", "L2"]
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INSIDE = 1 - 1e-12  # a factor that float64's own rounding does not cross


def linf_bounds(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The lowest and the highest image of the Linf balls, cut to [0, 1]: clamping to them is the exact projection.

    Args:
        images: (B, …) in [0, 1], the balls' centres.
        eps: the balls' radius.

    Returns:
        (lowest, highest), both of the shape and dtype of `images`.
    """
    exact = images.detach().double()
    low, high = ((exact + move).clamp(0, 1) for move in (-eps, eps))
    limit = exact.new_full((), eps)  # filled on the device: a number that is copied there is waited for
    return _towards(exact, low, images.dtype, limit), _towards(exact, high, images.dtype, limit)


def project_l2(adversarial: Tensor, images: Tensor, eps: float) -> Tensor:
    """The nearest image of the L2 ball of each image, cut to [0, 1].

    Args:
        adversarial: (B, …), of any floating-point dtype.
        images: (B, …) in [0, 1], the balls' centres.
        eps: the balls' radius.

    Returns:
        (B, …) in the dtype of `images`.
    """
    exact = images.detach().double()
    move = adversarial.detach().double() - exact
    length = torch.linalg.vector_norm(move.flatten(1), dim=1).view(-1, *[1] * (images.dim() - 1))
    move = move * (_INSIDE * eps / length.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1)
    # Cutting to the box that the image is in only shortens a move.
    return _towards(exact, (exact + move).clamp(0, 1), images.dtype, move.abs())


def scaled(gradient: Tensor) -> Tensor:
    """Each gradient of (B, …) divided by its largest magnitude, in float32 at least; one of zero stays zero.

    What is made of it next, a norm or a mean, then neither underflows nor overflows, however small the gradient of a
    confident network is: the squares of 10⁻³⁰ are 0 in float32, and next to any constant that keeps a division from 0/0
    such a gradient is nothing.
    """
    gradient = at_least_float32(gradient)
    return gradient / largest_magnitude(gradient)


def largest_magnitude(gradient: Tensor) -> Tensor:
    """The largest magnitude in each gradient of (B, …), as (B, 1, …); 1 for a gradient of zero."""
    largest = gradient.abs().amax(tuple(range(1, gradient.dim())), keepdim=True)
    return torch.where(largest > 0, largest, 1)


def unit(gradient: Tensor) -> Tensor:
    """Each gradient of (B, …) with an L2 norm of 1, in float32 at least; one of zero stays zero."""
    gradient = scaled(gradient)
    length = torch.linalg.vector_norm(gradient.flatten(1), dim=1).view(-1, *[1] * (gradient.dim() - 1))
    return gradient / torch.where(length > 0, length, 1)


def random_start(images: Tensor, eps: float, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """A random image of each ball, drawn as torchattacks does; it is still to be projected.

    Args:
        images: (B, …) in [0, 1], the balls' centres.
        eps: the balls' radius.
        norm: "Linf", uniform in the ball; or "L2", a uniform direction and a uniform radius.
        generator: on any device; None is PyTorch's default generator of the images' device.

    Returns:
        (B, …) of the dtype of `images`.
    """
    device = images.device if generator is None else generator.device
    if norm == "Linf":
        uniform = torch.rand(images.shape, generator=generator, device=device, dtype=torch.float32)
        return images + ((2 * uniform - 1) * eps).to(images)
    move = torch.randn(images.shape, generator=generator, device=device, dtype=torch.float32)
    length = torch.linalg.vector_norm(move.flatten(1), dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    radius = torch.rand(len(images), generator=generator, device=device, dtype=torch.float32) * eps
    scale = (radius / length).view(-1, *[1] * (images.dim() - 1))
    start: Tensor = images + (move * scale).to(images)
    return start


def _towards(start: Tensor, end: Tensor, dtype: torch.dtype, limit: Tensor) -> Tensor:
    """`end` in `dtype`, rounded so that it is no further from `start` than `limit`.

    Both are float64 in [0, 1], and `start` has an exact value in `dtype`.
    """
    rounded = end.to(dtype)
    outside = (rounded.double() - start).abs() > limit
    # The bits of floating-point numbers ≥ 0, read as integers, are in the numbers' order.
    bits = rounded.view(_INTEGERS[dtype.itemsize])
    step = torch.where(rounded.double() > start, -1, 1).to(bits.dtype)
    return torch.where(outside, bits + step, bits).view(dtype)
