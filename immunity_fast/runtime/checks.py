"""Checks of single arguments, and how their errors read: "name: expected X, got Y"."""

from typing import get_args


def check_weight(name: str, value: float) -> None:
    """A coefficient must be a finite number ≥ 0."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def check_choice(name: str, value: str, choices: object) -> None:
    """`value` must be one of a `Literal`'s words."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")
