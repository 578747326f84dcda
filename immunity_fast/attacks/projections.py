"""The balls that attacks stay in, exactly: in no floating-point format does rounding carry an image outside.

A distance is meant as the difference of two stored numbers, taken exactly. Rounded naively, images + 8/255 lies outside
the ball for about half of all float32 pixels, and in bfloat16 by up to 2/255.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from immunity_fast.runtime.precision import at_least_float32

Norm = Literal["Linf", "L2"]
Bounds = tuple[float, float]
Radius = float | Tensor  # of all balls, or of each: (B, 1, …), float64

UNIT: Bounds = (0.0, 1.0)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_INSIDE = 1 - 1e-12  # a factor that float64's own rounding does not cross


def rounded_bounds(bounds: Bounds, dtype: torch.dtype) -> Bounds:
    """The lowest and the highest value of a pixel, as numbers of that dtype."""
    if bounds == UNIT:
        return UNIT
    low, high = torch.tensor(bounds, dtype=torch.float64).to(dtype).tolist()
    return low, high


def linf_bounds(images: Tensor, eps: Radius, bounds: Bounds = UNIT) -> tuple[Tensor, Tensor]:
    """The lowest and the highest image of the Linf balls, cut to a box: clamping to them is the exact projection.

    Args:
        images: (B, …) in the box, the balls' centres.
        eps: the balls' radius, or that of each.
        bounds: the box, of numbers that the images' dtype has; see `rounded_bounds`.

    Returns:
        (lowest, highest), both of the shape and dtype of `images`.
    """
    exact = images.detach().double()
    low, high = ((exact + move).clamp(*bounds) for move in (-eps, eps))
    # A number is filled in on the device: one that is copied there is waited for.
    limit = eps if isinstance(eps, Tensor) else exact.new_full((), eps)
    return _towards(exact, low, images.dtype, limit), _towards(exact, high, images.dtype, limit)


def project_l2(adversarial: Tensor, images: Tensor, eps: Radius, bounds: Bounds = UNIT) -> Tensor:
    """The nearest image of the L2 ball of each image, cut to a box.

    Args:
        adversarial: (B, …), of any floating-point dtype.
        images: (B, …) in the box, the balls' centres.
        eps: the balls' radius, or that of each.
        bounds: the box, see `linf_bounds`.

    Returns:
        (B, …) in the dtype of `images`.
    """
    exact = images.detach().double()
    move = adversarial.detach().double() - exact
    length = torch.linalg.vector_norm(move.flatten(1), dim=1).view(-1, *[1] * (images.dim() - 1))
    move = move * (_INSIDE * eps / length.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1)
    # Cutting to the box that the image is in only shortens a move.
    return _towards(exact, (exact + move).clamp(*bounds), images.dtype, move.abs())


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


def random_start(images: Tensor, eps: Radius, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """A random image of each ball, drawn as torchattacks does; it is still to be projected.

    Args:
        images: (B, …), the balls' centres.
        eps: the balls' radius, or that of each.
        norm: "Linf", uniform in the ball; or "L2", a uniform direction and a uniform radius.
        generator: on any device; None is PyTorch's default generator of the images' device.

    Returns:
        (B, …) of the dtype of `images`.
    """
    device = images.device if generator is None else generator.device
    if isinstance(eps, Tensor):
        eps = eps.to(device, torch.float32)
    if norm == "Linf":
        uniform = torch.rand(images.shape, generator=generator, device=device, dtype=torch.float32)
        in_cube: Tensor = images + ((2 * uniform - 1) * eps).to(images)
        return in_cube
    move = torch.randn(images.shape, generator=generator, device=device, dtype=torch.float32)
    length = torch.linalg.vector_norm(move.flatten(1), dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    part = torch.rand(len(images), generator=generator, device=device, dtype=torch.float32)
    radius = part * (eps.flatten() if isinstance(eps, Tensor) else eps)
    scale = (radius / length).view(-1, *[1] * (images.dim() - 1))
    start: Tensor = images + (move * scale).to(images)
    return start


def outside(adversarial: Tensor, images: Tensor, eps: Radius, norm: Norm) -> Tensor:
    """Which images of (B, …) are further from their balls' centres than the radius, exactly in Linf: (B,) bool.

    In L2 a length is a rounded sum, and a distance counts as larger from 1 + 10⁻¹² times the radius on.
    """
    found, exact = adversarial.double().flatten(1), images.double().flatten(1)
    radius = eps.to(exact).flatten() if isinstance(eps, Tensor) else exact.new_full((len(exact),), eps)
    if norm == "Linf":
        return _further(found, exact, radius[:, None]).any(1)
    further: Tensor = torch.linalg.vector_norm(found - exact, dim=1) > radius * (1 + 1e-12)
    return further


def _towards(start: Tensor, end: Tensor, dtype: torch.dtype, limit: Tensor) -> Tensor:
    """`end` in `dtype`, rounded so that it is no further from `start` than `limit`.

    Both are float64, and `start` has an exact value in `dtype`.
    """
    rounded = end.to(dtype)
    beyond = _further(rounded.double(), start, limit)
    # Read as integers, the bits of floating-point numbers are in the numbers' order: those below 0 backwards.
    bits = rounded.view(_INTEGERS[dtype.itemsize])
    least = torch.iinfo(bits.dtype).min
    order = torch.where(bits < 0, least - bits, bits)
    order = order + torch.where(rounded.double() > start, -1, 1).to(bits.dtype)
    return torch.where(beyond, torch.where(order < 0, least - order, order), bits).view(dtype)


def _further(end: Tensor, start: Tensor, limit: Tensor) -> Tensor:
    """Whether two float64 numbers are further apart than `limit`, where their difference itself may be rounded.

    What rounding takes from the difference is a float64 number, too (Knuth, The Art of Computer Programming, 4.2.2).
    """
    distance = end - start
    of_start = end - distance
    lost = (end - (distance + of_start)) + (of_start - start)
    size = distance.abs()
    return (size > limit) | ((size == limit) & (lost * distance.sign() > 0))
