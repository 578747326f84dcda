"""What an evaluation is to find out, before it is known of which network: the options of its command as values."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from immunity_fast.attacks.projections import Norm
from immunity_fast.evaluation.gate_attackers import KNOWLEDGE
from immunity_fast.evaluation.runner import ATTACKS, SETS, Plan
from immunity_fast.runtime import cli
from immunity_fast.runtime.checks import check_choice, is_number
from immunity_fast.runtime.precision import chosen_amp

MOST_DRAWS = 10_000  # of EOT
LARGEST = 2**63 - 1  # of whole numbers
AMPS = Literal["off", "bf16", "auto"]
FORMER_ATTACKERS = {"fixed": "off", "single": "sample"}  # what they were called, for who still calls them so


def _option(group: str, default: Any, text: str) -> Any:
    """A setting: under which heading of --help it stands, its default, what it does."""
    return field(default=default, metadata={"group": group, "help": text})


_attack = partial(_option, "attacks")
_attacker = partial(_option, "attackers")


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation; construction checks their ranges, `plan` what depends on the network.

    Raises:
        ValueError: a value out of its range, or an attack that there is not, by its option.
    """

    attacks: tuple[str, ...] = _attack(("default",), f"of {', '.join(ATTACKS)}; several: {', '.join(SETS)}")
    attackers: tuple[str, ...] | None = _attacker(
        None, f"what is known of the gate: {', '.join(KNOWLEDGE)}, experts (each), transfer; default: all there are"
    )
    limit: int | None = _attack(None, "test images to attack; default: the run's setting")
    eps: float | None = _attack(None, "radius, of images in [0, 1]; default: 8/255 for Linf, 1 for L2")
    norm: Norm = _attack("Linf", "of the perturbation")
    draws: int | None = _attacker(None, "of the gate, or of a random model, for EOT; default: 20 of a gate")
    drop_fooled: bool = _attack(False, "attack an image until it fools what its attacker attacks; faster")
    amp: AMPS = _attack("off", "bf16: gradients in bfloat16, judged in float32; auto: where the processor has it")
    masking_images: int = _attack(64, "that the curves are made of; 0: no curves")
    queries: int = _attack(5000, "of Square")
    autoattack_steps: int = _attack(100, "of AutoAttack's gradient attacks; fewer than 100 is no AutoAttack")
    seed: int | None = _attack(None, "of what is random in attacks; default: the run's")

    def __post_init__(self) -> None:
        for name in self.attacks:
            if name not in (*ATTACKS, *SETS):
                raise ValueError(f"--attacks: expected some of {', '.join((*ATTACKS, *SETS))}, got {name}")
        for name in self.attackers or ():
            if name in FORMER_ATTACKERS:
                raise ValueError(f"--attackers: expected {FORMER_ATTACKERS[name]}, as it is called now, got {name}")
        for name, least in (
            ("limit", 1),
            ("draws", 1),
            ("masking_images", 0),
            ("queries", 1),
            ("autoattack_steps", 1),
            ("seed", 0),
        ):
            check_whole(name, getattr(self, name), least)
        check_choice("--norm", self.norm, Norm)
        check_choice("--amp", self.amp, AMPS)
        if self.draws is not None and self.draws > MOST_DRAWS:  # each is a mixture of its own in every step
            raise ValueError(f"--draws: expected at most {MOST_DRAWS}, got {self.draws}")
        if self.eps is not None and not (is_number(self.eps) and 0 <= self.eps < math.inf):
            raise ValueError(f"--eps: expected a finite number of at least 0, got {self.eps}")
        if self.eps is not None and self.norm == "Linf" and self.eps > 1:
            given = f"{self.eps:g}"
            raise ValueError(
                f"--eps: expected at most 1, as images are in [0, 1], got {given}; of 255 levels: {given}/255"
            )

    def plan(
        self,
        attackers: Sequence[str],
        image_size: tuple[int, int],
        *,
        images: int,
        seed: int,
        chunk: int,
        channels: int = 3,
        device: torch.device | None = None,
    ) -> Plan:
        """What these settings mean for a network.

        Args:
            attackers: those that the network has.
            image_size: (H, W) in pixels.
            images: how many are attacked where `limit` says nothing.
            seed: where `seed` says nothing.
            chunk: images at once.
            channels: of the images.
            device: where it is attacked; None is the CPU.

        Raises:
            ValueError: the network has no such attacker, or no two images are as far apart as the radius.
        """
        plan = Plan(
            attacks=tuple(dict.fromkeys(attack for name in self.attacks for attack in SETS.get(name, (name,)))),
            attackers=None if self.attackers is None else self._chosen(self.attackers, attackers),
            images=self.limit or images,
            eps=self.eps,
            norm=self.norm,
            masking_images=self.masking_images,
            drop_fooled=self.drop_fooled,
            amp=chosen_amp(self.amp, device or torch.device("cpu")),
            queries=self.queries,
            autoattack_steps=self.autoattack_steps,
            seed=seed if self.seed is None else self.seed,
            chunk=chunk,
        )
        height, width = image_size
        diagonal = math.sqrt(channels * height * width)
        if plan.norm == "L2" and plan.radius > diagonal:
            raise ValueError(
                f"--eps: expected at most {diagonal:.4g}, as far as black is from white in L2 in images of "
                f"{height}×{width} pixels, got {plan.radius:g}"
            )
        return plan

    @staticmethod
    def _chosen(names: Sequence[str], attackers: Sequence[str]) -> tuple[str, ...]:
        """Of the attackers that there are those that are asked for."""
        chosen: list[str] = []
        for name in names:
            found = [a for a in attackers if a == name or (name == "experts" and a.startswith("expert "))]
            if not found:
                raise ValueError(f"--attackers: expected some of {', '.join(attackers)}, got {name}")
            chosen += found
        return tuple(chosen)

    def options(self) -> list[str]:
        """The options of `immunity_fast.evaluate` that mean these settings."""
        words: list[str] = []
        for option in dataclasses.fields(self):
            value, flag = getattr(self, option.name), f"--{option.name.replace('_', '-')}"
            if value == option.default:
                continue
            if isinstance(value, bool):
                words.append(flag)
            else:
                words += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
        return words


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option a setting, with its default."""
    hints = typing.get_type_hints(EvaluationSettings)
    kinds: dict[Any, Any] = {int: int, float: cli.number, tuple: _words}
    groups: dict[str, Any] = {}
    for option in dataclasses.fields(EvaluationSettings):
        group, hint, text = option.metadata["group"], hints[option.name], option.metadata["help"]
        keywords: dict[str, Any] = {"default": option.default, "help": text}
        if hint is bool:
            keywords["action"] = "store_true"
        else:
            shown = ",".join(option.default) if isinstance(option.default, tuple) else option.default
            keywords["help"] += "" if shown is None else f" [{shown}]"
            if typing.get_origin(hint) is Literal:
                keywords["choices"] = typing.get_args(hint)
            else:
                parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
                kind = next(kind for kind in kinds if kind in (parts[0], typing.get_origin(parts[0])))
                keywords |= {"type": kinds[kind], "metavar": "LIST" if kind is tuple else kind.__name__.upper()}
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{option.name.replace('_', '-')}", **keywords)


def _words(text: str) -> tuple[str, ...]:
    """A list of a command line, with commas."""
    return tuple(text.split(","))


def check_whole(name: str, value: object, least: int) -> None:
    """Check a whole number, or None.

    Args:
        name: of its setting.
        value: what is checked.
        least: what it has to be at least.

    Raises:
        ValueError: no whole number, too small a one, or one that no 64 bits hold.
    """
    if value is None:
        return
    option = f"--{name.replace('_', '-')}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{option}: expected a whole number, got {value}")
    if value < least:
        raise ValueError(f"{option}: expected at least {least}, got {value}")
    if value > LARGEST:
        raise ValueError(f"{option}: expected at most 2⁶³ − 1, got a number of {len(str(value))} digits")
