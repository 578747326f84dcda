"""Checks of single arguments, and how their errors read: "name: expected X, got Y"."""

import math
from typing import TypeGuard, get_args

from torch import Tensor


def kind_given(value: object) -> str:
    """What was given in the place of another tensor, as the end of a message: of a tensor its dtype, else its type."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    made = "; torch.as_tensor makes one of it" if hasattr(value, "__array__") else ""
    return f"{type(value).__module__}.{type(value).__name__}{made}".removeprefix("builtins.")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number, or can be one, as NumPy's can."""
    return isinstance(value, (int, float)) or hasattr(value, "__float__")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, or can be one, as NumPy's can."""
    return isinstance(value, int) or hasattr(value, "__index__")


def check_weight(name: str, value: object) -> None:
    """Check that a coefficient is a finite number ≥ 0.

    Raises:
        ValueError: a number that is negative, infinite or NaN.
        TypeError: no number.
    """
    if not is_number(value):
        raise TypeError(f"{name}: expected a finite number of at least 0, got {value!r}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def check_whole(name: str, value: object, least: int) -> None:
    """Check that a number of things is whole and at least `least`.

    Raises:
        ValueError: a smaller one.
        TypeError: no whole number.
    """
    if not is_whole(value):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def check_choice(name: str, value: object, choices: object) -> None:
    """Check that a word is one of a `Literal`'s.

    Raises:
        ValueError: it is none of them.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")
