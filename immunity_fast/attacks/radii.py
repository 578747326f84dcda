"""Radii of balls as they may be given: one number, one for each image, or several, each of which gives a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

Given = float | Tensor  # a number, 0-d or not; or (B,), one of each image
Result = TypeVar("Result")


def one_or_each(value: Given | None) -> tuple[float | None, Tensor | None]:
    """A radius or the size of a step as (the number of all images, None), or (None, what is said of each image).

    Args:
        value: what was given for it; None stays None.
    """
    if value is None or not hasattr(value, "__array__"):
        return value, None
    numbers = torch.as_tensor(value)
    return (float(numbers), None) if numbers.dim() == 0 else (None, numbers)


def for_each_image(name: str, values: Tensor | None, images: Tensor) -> Tensor | None:
    """A radius or the size of a step of each image, (B, 1, 1, 1) in float64 on the images' device.

    Args:
        name: of the argument.
        values: (B,); None stays None.
        images: (B, C, H, W).

    Raises:
        ValueError: another shape, or a number below 0, infinite or NaN.
    """
    if values is None:
        return None
    if values.shape != images.shape[:1]:
        raise ValueError(f"{name}: expected a number, or one of each image ({len(images)},), got {tuple(values.shape)}")
    values = values.detach().to(images.device, torch.float64)
    wrong = ~((values >= 0) & values.isfinite())
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0, 0])
        raise ValueError(f"{name}: expected finite numbers of at least 0, got {float(values[first])} for image {first}")
    return values.view(-1, *[1] * (images.dim() - 1))


def of_each(
    radii: Sequence[Given], attack: Callable[[Any], Result], images: Tensor, generator: torch.Generator | None
) -> list[Result]:
    """What an attack makes of each radius, all from the same random state, which is then as after the last.

    Args:
        radii: one after the other.
        attack: from a radius to what it makes of the images.
        images: (B, C, H, W); their device's generator is PyTorch's default one.
        generator: of random starts; None is PyTorch's default generator.
    """
    found = []
    with _begun_anew(images, generator) as begin:
        for radius in radii:
            begin()
            found.append(attack(radius))
    return found


@contextmanager
def _begun_anew(images: Tensor, generator: torch.Generator | None) -> Iterator[Callable[[], None]]:
    """A function that puts back the random states in which the `with` block began."""
    states: list[tuple[Callable[[Tensor], object], Tensor]] = []
    if generator is not None:
        states.append((generator.set_state, generator.get_state()))
    states.append((torch.set_rng_state, torch.get_rng_state()))
    if isinstance(images, Tensor) and images.is_cuda:
        device = images.device
        states.append((lambda state: torch.cuda.set_rng_state(state, device), torch.cuda.get_rng_state(device)))

    def begin() -> None:
        for put, state in states:
            put(state)

    yield begin
