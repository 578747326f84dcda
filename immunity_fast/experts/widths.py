"""Architectures of another width: a name, `x` and what all numbers of channels are multiplied by, as `resnet8x1.73`."""

from __future__ import annotations

import re
from collections.abc import Collection

NARROWEST, WIDEST = 0.01, 100.0


def scaled(channels: int, times: float) -> int:
    """A number of channels times a width: the nearest whole number, at least 1."""
    return max(1, round(channels * times))


def split_width(name: str, names: Collection[str]) -> tuple[str, float]:
    """An architecture's name and its width: `resnet8x1.73` to ("resnet8", 1.73), and without a width (name, 1.0).

    Args:
        name: any text; what is of no form `NAMEx…` comes back as it is.
        names: those that may have a width.

    Raises:
        ValueError: what stands behind the `x` is no decimal number from 0.01 to 100.
    """
    own = next((own for own in names if name.startswith(f"{own}x")), None)
    if own is None or ":" in name or name.endswith(".json"):  # something importable, or a file
        return name, 1.0
    width = name[len(own) + 1 :]
    # Digits and a dot alone: float() would take 1e1, 1_0, infinity and other alphabets' digits.
    times = float(width) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", width) else 0.0
    if not NARROWEST <= times <= WIDEST:
        raise ValueError(
            f"name: expected {own}x and a decimal number from {NARROWEST:g} to {WIDEST:g}, got {name[:60]!r}"
        )
    return own, times
