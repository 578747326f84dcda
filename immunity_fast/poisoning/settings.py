"""How poisons are made: the settings of Witches' Brew, and the options of its command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from immunity_fast.evaluation.settings import check_whole
from immunity_fast.runtime import cli
from immunity_fast.runtime.checks import is_number

LEVELS = 255  # between black and white: images are stored in bytes
ACTIONS = ("craft", "setups")
# Of the options, those of an action alone; craft takes these of training besides its own.
OF_CRAFT = ("target", "target_class", "checkpoint", "trust_code")
OF_SETUPS = ("setups",)
SHARED = ("eps", "seed", "device", "data")


@dataclass(frozen=True)
class CraftSettings:
    """How poisons are made; construction checks the ranges.

    Args:
        budget: the share of all training images that are poisons, at least one image.
        eps: Linf radius of the changes, of images in [0, 1]: whole levels of 1/255 of it are used.
        steps: of signed Adam.
        restarts: the best of so many.

    Raises:
        ValueError: a value out of its range, by its option.
    """

    budget: float = 0.01
    eps: float = 8 / 255
    steps: int = 250
    restarts: int = 8

    def __post_init__(self) -> None:
        if not (is_number(self.budget) and 0 < self.budget <= 1):
            raise ValueError(f"--budget: expected a share of the training images above 0, at most 1, got {self.budget}")
        if not (is_number(self.eps) and math.isfinite(self.eps) and 1 <= self.radius <= LEVELS):
            raise ValueError(f"--poison-eps: expected 1/255, one level of a pixel, to 1, got {self.eps}")
        check_whole("steps", self.steps, 1)
        check_whole("restarts", self.restarts, 1)

    @property
    def radius(self) -> int:
        """eps in whole levels of a pixel."""
        return math.floor(self.eps * LEVELS + 1e-9)

    def bases(self, images: int) -> int:
        """How many of so many training images become poisons."""
        return max(1, round(self.budget * images))

    def to_json(self) -> dict[str, Any]:
        """All settings, for files."""
        return {option.name: getattr(self, option.name) for option in fields(self)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command that are not those of training."""
    group = parser.add_argument_group("poisons")
    group.add_argument("--target", type=int, metavar="INT", help="for craft: test image; default: one drawn by --seed")
    group.add_argument(
        "--target-class",
        metavar="NAME",
        help="for craft: what it is to be taken for, a class or its number; default: one drawn by --seed",
    )
    group.add_argument(
        "--budget",
        type=cli.number,
        default=CraftSettings.budget,
        metavar="FLOAT",
        help=f"share of the training images that are poisons [{CraftSettings.budget}]",
    )
    group.add_argument(
        "--poison-eps",
        type=cli.number,
        metavar="FLOAT",
        help="Linf radius of the changes; for craft --eps is the same [8/255]",
    )
    group.add_argument(
        "--steps",
        type=int,
        default=CraftSettings.steps,
        metavar="INT",
        help=f"of signed Adam [{CraftSettings.steps}]",
    )
    group.add_argument(
        "--restarts",
        type=int,
        default=CraftSettings.restarts,
        metavar="INT",
        help=f"the best of so many counts [{CraftSettings.restarts}]",
    )
    group.add_argument(
        "--setups", type=int, metavar="INT", help="for setups: how many targets, each with a training of its own [8]"
    )
    group.add_argument("--checkpoint", choices=("best", "last"), help="for craft: default: the best, if there is one")
    group.add_argument("--trust-code", action="store_true", help=f"for craft: {cli.TRUST_CODE}")


def take(action: str, options: dict[str, Any], training: Mapping[str, Any]) -> CraftSettings:
    """The settings of a command line, whose own options are taken out of it.

    Args:
        action: of `ACTIONS`.
        options: all that are not training's, by name; those of `CraftSettings` are removed.
        training: the options of training that were given.

    Raises:
        ValueError: an option that is another action's, or a value out of its range.
    """
    for name in OF_SETUPS if action == "craft" else OF_CRAFT:
        if options[name] is not None and options[name] is not False:  # 0 is a target
            other = next(each for each in ACTIONS if each != action)
            raise ValueError(f"--{name.replace('_', '-')}: expected with {other} alone, got it with {action}")
    if action == "craft":
        for name in training:
            if name not in SHARED:
                raise ValueError(f"--{name.replace('_', '-')}: expected with setups alone, got it with craft")
    elif "poison" in training:
        raise ValueError("--poison: expected none with setups, which makes poisons for each, got one")
    given = options.pop("poison_eps")
    if given is None:
        given = training.get("eps", CraftSettings.eps) if action == "craft" else CraftSettings.eps
    return CraftSettings(eps=given, **{name: options.pop(name) for name in ("budget", "steps", "restarts")})
