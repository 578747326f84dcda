"""How much a network computes, and the width at which one network computes as much as several."""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from immunity_fast.experts.registry import NAMES, create, split_names
from immunity_fast.experts.stems import StemChoice, chosen_stem
from immunity_fast.experts.widths import NARROWEST, WIDEST, split_width

_STEPS = 100  # of a width, to 1: two decimals
_NEAR = 0.03  # as a part of what is wanted, at the narrowest and the widest


def flops(
    arch: str,
    *,
    num_classes: int = 10,
    image_size: int | tuple[int, int] = 32,
    stem: StemChoice = "auto",
    channels: int = 3,
) -> int:
    """Floating-point operations of convolutions and matrix products in one image's forward pass.

    A multiplication and its addition count two, as `torch.utils.flop_counter` counts them. Nothing is computed: the
    tensors have shapes and no values.

    Args:
        arch: a name that `create` takes; of several with commas between, all of them together.
        num_classes: K ≥ 2.
        image_size: the image's side or (H, W), in pixels.
        stem: with what architectures of two forms begin; "auto" is that for the images' size.
        channels: of the image.

    Raises:
        ValueError: there is no such architecture, or the image is too small for it.
        ModuleNotFoundError: a library is not installed.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    total = 0
    for name in split_names(arch):
        with torch.device("meta"):
            network = create(
                name,
                num_classes,
                stem=chosen_stem(stem, (height, width)),
                image_size=(height, width),
                channels=channels,
            )
        total += _count(network, (1, channels, height, width))
    return total


def wider(
    arch: str,
    times: float,
    *,
    num_classes: int = 10,
    image_size: int | tuple[int, int] = 32,
    stem: StemChoice = "auto",
    channels: int = 3,
) -> str:
    """The name of an architecture at the width whose FLOPs are nearest to a multiple of its own.

    One network of this name computes as much as `times` networks of `arch`: what an ensemble of so many is compared
    with. Widths of two decimals are searched. A FLOP count grows with the square of the width, nearly: for `times` 3
    the width is about 1.73.

    Args:
        arch: one of `NAMES`, with a width or without.
        times: what its FLOPs are multiplied by, above 0.
        num_classes, image_size, stem, channels: see `flops`.

    Returns:
        Such as "resnet8x1.73"; without a width where that is 1.

    Raises:
        ValueError: `arch` is another or several, `times` is not positive and finite, or no width from 0.01 to 100 comes
            near.
    """
    own, had = split_width(arch, NAMES)
    if own not in NAMES:
        raise ValueError(f"arch: expected one of {', '.join(NAMES)}, with or without a width, got {arch!r}")
    if not 0 < times < math.inf:
        raise ValueError(f"times: expected a positive finite number, got {times}")

    @functools.cache
    def of(step: int) -> int:
        return flops(_named(own, step), num_classes=num_classes, image_size=image_size, stem=stem, channels=channels)

    wanted = times * flops(arch, num_classes=num_classes, image_size=image_size, stem=stem, channels=channels)
    # The count never falls as the width grows, so what is wanted lies between two neighbours. It is nearly quadratic,
    # so the next guess is close.
    least, most = round(NARROWEST * _STEPS), round(WIDEST * _STEPS)
    low, high = least - 1, most + 1
    guess = had * math.sqrt(times) * _STEPS
    while high - low > 1:
        step = min(max(round(min(guess, most)), low + 1), high - 1)
        low, high = (step, high) if of(step) < wanted else (low, step)
        guess = step * math.sqrt(wanted / of(step))
    near = min((step for step in (high, low) if least <= step <= most), key=lambda step: abs(of(step) - wanted))
    if (low < least or high > most) and abs(of(near) / wanted - 1) > _NEAR:
        raise ValueError(
            f"times: expected FLOPs that {own} has at a width from {NARROWEST:g} to {WIDEST:g}, got {times} times "
            f"those of {arch}"
        )
    return _named(own, near)


def _named(own: str, step: int) -> str:
    return own if step == _STEPS else f"{own}x{step / _STEPS:g}"


def _count(network: nn.Module, shape: tuple[int, ...]) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # not needed to train

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(shape, device="meta"))
    return int(counter.get_total_flops())
