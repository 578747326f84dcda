"""Cells of the user's own: a JSON file to a network.

Either kind of file has all of these members and no others::

    {"kind": "darts", "normal": [["sep_conv_3x3", 0], …], "reduce": […], "channels": 36, "cells": 20}
    {"kind": "robnet", "cells": ["11 11 01 …"], "channels": 36, "layers": 20}

`normal` and `reduce` are the 8 pairs of a `darts.Genotype`. `cells` of a RobNet are as many strings of 14 codes as it
has layers, or one for all: `robnet.robnet_network`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from immunity_fast.experts.cells import MIN_CELLS
from immunity_fast.experts.darts import ADVRUSH, PDARTS, Genotype, Pairs, darts_network
from immunity_fast.experts.robnet import ROBNET_LARGE, parse_cells, robnet_network
from immunity_fast.experts.staged import StagedNetwork

_MEMBERS = {"darts": ("normal", "reduce", "channels", "cells"), "robnet": ("cells", "channels", "layers")}
_PUBLISHED = {"pdarts": PDARTS, "advrush": ADVRUSH, "robnet_large": ROBNET_LARGE}
_LARGEST = 1000  # channels or cells; a slip of the pen would fill the memory


def load(path: str | os.PathLike[str]) -> Callable[..., StagedNetwork]:
    """The network of a genotype file, still without its number of classes: `load(path)(num_classes, in_channels=3)`.

    The file is read and checked here and not again.

    Raises:
        ValueError: it cannot be read, is no JSON, or says anything but what the top of this module shows; in one line
            that names the file and the member.
    """
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{os.fspath(path)}: {error.strerror or error}") from error
    except ValueError as error:  # UnicodeDecodeError is such too
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def parse(text: str) -> Callable[..., StagedNetwork]:
    """`load` of a file with this content.

    Raises:
        ValueError: see `load`; without the file's name.
    """
    try:
        return _network(json.loads(text, object_pairs_hook=_members))
    except RecursionError as error:
        raise ValueError("expected a genotype, got JSON that is nested too deeply") from error


def text(path: str | os.PathLike[str]) -> str:
    """What a genotype file says, in one line and without what JSON does not need.

    Raises:
        ValueError: see `load`.
    """
    load(path)
    return _line(json.loads(Path(path).read_text(encoding="utf-8")))


def title(text: str) -> str:
    """A genotype in a word: its kind, cells and channels, and four digits that tell it from others of that size."""
    description = json.loads(text)
    cells = description["cells"] if description["kind"] == "darts" else description["layers"]
    digest = hashlib.sha256(_line(description).encode()).hexdigest()[:4]
    return f"{description['kind']}-{cells}x{description['channels']}-{digest}"


def reduced(name: str, cells: int, channels: int) -> str:
    """The text of a published network's genotype with fewer cells and channels.

    Raises:
        ValueError: `name` is not pdarts, advrush or robnet_large, whose cells do not depend on their number.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"name: expected one of {', '.join(_PUBLISHED)}, got {name!r}")
    found = _PUBLISHED[name]
    if isinstance(found, Genotype):
        cell = {"normal": found.normal, "reduce": found.reduce}
        return _line({"kind": "darts", **cell, "channels": channels, "cells": cells})
    return _line({"kind": "robnet", "cells": found, "channels": channels, "layers": cells})


def _line(description: Any) -> str:
    return json.dumps(description, separators=(",", ":"))


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in members if names.count(name) > 1)
        raise ValueError(f"{twice}: expected once, got twice")
    return members


def _network(description: Any) -> Callable[..., StagedNetwork]:
    if not isinstance(description, dict):
        raise ValueError(f"expected an object, got {_shortened(description)}")
    kind = description.get("kind")
    if not isinstance(kind, str) or kind not in _MEMBERS:
        raise ValueError(f"kind: expected one of {', '.join(_MEMBERS)}, got {_shortened(kind)}")
    expected = {"kind", *_MEMBERS[kind]}
    if missing := expected - description.keys():
        raise ValueError(f"members: expected {', '.join(_MEMBERS[kind])}, got none of {', '.join(sorted(missing))}")
    if unknown := description.keys() - expected:
        raise ValueError(f"members: expected {', '.join(_MEMBERS[kind])}, got {', '.join(map(repr, sorted(unknown)))}")

    channels = _number(description, "channels", 1)
    if kind == "darts":
        cells = _number(description, "cells", MIN_CELLS)
        genotype = Genotype(_pairs(description, "normal"), _pairs(description, "reduce"))
        return partial(darts_network, genotype, channels=channels, cells=cells)
    layers = _number(description, "layers", MIN_CELLS)
    codes = description["cells"]
    if not isinstance(codes, list) or not all(isinstance(cell, str) for cell in codes):
        raise ValueError(f"cells: expected a list of strings, got {_shortened(codes)}")
    parse_cells(codes, layers)
    return partial(robnet_network, codes, channels=channels, layers=layers)


def _number(description: dict[str, Any], name: str, lowest: int) -> int:
    number = description[name]
    if type(number) is not int or not lowest <= number <= _LARGEST:
        raise ValueError(f"{name}: expected a whole number from {lowest} to {_LARGEST}, got {_shortened(number)}")
    return number


def _pairs(description: dict[str, Any], name: str) -> Pairs:
    pairs = description[name]
    if not isinstance(pairs, list):
        raise ValueError(f"{name}: expected a list of pairs [operation, input], got {_shortened(pairs)}")
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, int]:
            raise ValueError(f"{name}[{number}]: expected a pair [operation, input], got {_shortened(pair)}")
    return tuple((operation, index) for operation, index in pairs)


def _shortened(value: Any) -> str:
    """The value as it stands in the file, as much of it as fits into a message."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
