"""Grids of parameters of which `make test` runs a sample, and `make test-exhaustive` the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count, product
from typing import Any

import pytest


def sampled(cells: Iterable[Any], ordinary: Callable[..., bool]) -> list[Any]:
    """Cells for `pytest.mark.parametrize`; what `ordinary`, called with a cell's parts, refuses is exhaustive."""
    made = []
    for cell in cells:
        parts = cell if isinstance(cell, tuple) else (cell,)
        made.append(pytest.param(*parts, marks=() if ordinary(*parts) else pytest.mark.exhaustive))
    assert any(not cell.marks for cell in made), "a grid without a cell in the sample is no test"
    return made


def grid(*axes: Iterable[Any], ordinary: Callable[..., bool]) -> list[Any]:
    """`sampled` of all combinations of some axes."""
    return sampled(product(*axes), ordinary)


def every(step: int, *axes: Iterable[Any]) -> list[Any]:
    """`grid`, of which each `step`-th diagonal is ordinary; every value of every axis is on one of these.

    A cell's diagonal is the sum of its values' places on their axes.
    """
    lists = [list(axis) for axis in axes]
    places = list(product(*(range(len(values)) for values in lists)))
    made = []
    for place in places:
        values = [values[index] for values, index in zip(lists, place, strict=True)]
        made.append(pytest.param(*values, marks=() if sum(place) % step == 0 else pytest.mark.exhaustive))
    return made


def each(step: int, cells: Iterable[Any]) -> list[Any]:
    """Each `step`-th cell is ordinary, from the first."""
    place = count()
    return sampled(cells, lambda *_: next(place) % step == 0)
