"""The expert networks, one file a kind of architecture."""

from __future__ import annotations

from collections.abc import Callable

from immunity_fast.experts import genotypes
from immunity_fast.experts.darts import advrush, pdarts
from immunity_fast.experts.densenet import densenet121
from immunity_fast.experts.googlenet import googlenet
from immunity_fast.experts.resnet import resnet8, resnet18
from immunity_fast.experts.robnet import robnet_free, robnet_large, robnet_large_v2
from immunity_fast.experts.staged import StagedNetwork

_BUILDERS: dict[str, Callable[[int], StagedNetwork]] = {
    "resnet18": resnet18,
    "googlenet": googlenet,
    "densenet121": densenet121,
    "resnet8": resnet8,
    "pdarts": pdarts,
    "advrush": advrush,
    "robnet_free": robnet_free,
    "robnet_large": robnet_large,
    "robnet_large_v2": robnet_large_v2,
}

NAMES: tuple[str, ...] = tuple(_BUILDERS)
"""The architectures that `create` knows by name."""


def create(name: str, num_classes: int = 10) -> StagedNetwork:
    """A freshly initialised expert: images (B, 3, H, W) to logits (B, num_classes).

    Args:
        name: one of `NAMES`; or the path of a genotype file, `….json`; or the text of one, as `resolve` gives it.
        num_classes: K ≥ 2.

    Raises:
        ValueError: `name` is none of these, the genotype is wrong, or `num_classes` is below 2.
    """
    builder = _builder(name)
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    return builder(num_classes)


def split_names(arch: str) -> tuple[str, ...]:
    """The names that a list of architectures holds, "resnet8,resnet18"; the text of a genotype is one."""
    return (arch,) if arch.startswith("{") else tuple(name.strip() for name in arch.split(","))


def resolve(name: str) -> str:
    """What a run keeps of an architecture's name: of a genotype file its text, so that the run does without the file.

    Raises:
        ValueError: there is no such architecture, or the genotype is wrong.
    """
    if name.endswith(".json"):
        return genotypes.text(name)
    _builder(name)
    return name


def title(name: str) -> str:
    """An architecture in a word, also where `resolve` has made a long text of it."""
    return genotypes.title(name) if name.startswith("{") else name


def _builder(name: str) -> Callable[[int], StagedNetwork]:
    if name in _BUILDERS:
        return _BUILDERS[name]
    if name.startswith("{"):
        return genotypes.parse(name)
    if name.endswith(".json"):
        return genotypes.load(name)
    raise ValueError(f"name: expected one of {', '.join(NAMES)}, or a genotype file, ….json, got {name!r}")
