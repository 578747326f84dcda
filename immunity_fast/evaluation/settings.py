"""What an evaluation is to find out, before it is known of which network: the options of its command as values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from immunity_fast.attacks.autoattack import check_installed
from immunity_fast.attacks.projections import Norm
from immunity_fast.evaluation.runner import ATTACKS, OTHER_ATTACKS, SETS, Plan
from immunity_fast.runtime.checks import check_choice, is_number

MOST_DRAWS = 10_000  # of EOT
LARGEST = 2**63 - 1  # of whole numbers
FORMER_ATTACKERS = {"fixed": "off", "single": "sample"}  # what they were called, for who still calls them so


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings of an evaluation; construction checks their ranges, `plan` what depends on the network.

    Args:
        attacks: of `ATTACKS`, and the names of `SETS` for several at once.
        attackers: what is known of the gate; "experts" is each expert; None is all that the network has.
        limit: how many test images are attacked; None is the run's setting.
        eps: radius, of images in [0, 1]; None is 8/255 for Linf, 1 for L2.
        norm: of the perturbation.
        draws: of the gate, or of a random model, for EOT; None is 20 for a gate, and no random model.
        drop_fooled: attack an image until it fools what its attacker attacks.
        masking_images: that the curves are made of; 0 makes none.
        queries: of Square.
        autoattack_steps: of AutoAttack's gradient attacks.
        seed: of what is random in attacks; None is the run's.

    Raises:
        ValueError: a value out of its range, or an attack that there is not, by its option.
    """

    attacks: tuple[str, ...] = ("default",)
    attackers: tuple[str, ...] | None = None
    limit: int | None = None
    eps: float | None = None
    norm: Norm = "Linf"
    draws: int | None = None
    drop_fooled: bool = False
    masking_images: int = 64
    queries: int = 5000
    autoattack_steps: int = 100
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in self.attacks:
            if name not in (*ATTACKS, *SETS):
                raise ValueError(f"--attacks: expected some of {', '.join((*ATTACKS, *SETS))}, got {name}")
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
        if self.draws is not None and self.draws > MOST_DRAWS:  # each is a mixture of its own in every step
            raise ValueError(f"--draws: expected at most {MOST_DRAWS}, got {self.draws}")
        if self.eps is not None and not (is_number(self.eps) and 0 <= self.eps < math.inf):
            raise ValueError(f"--eps: expected a finite number of at least 0, got {self.eps}")
        if self.eps is not None and self.norm == "Linf" and self.eps > 1:
            given = f"{self.eps:g}"
            raise ValueError(
                f"--eps: expected at most 1, as images are in [0, 1], got {given}; of 255 levels: {given}/255"
            )

    def check_installed(self) -> None:
        """Look for what the attacks need, before anything is loaded; ModuleNotFoundError where it is missing."""
        attacks = [attack for name in self.attacks for attack in SETS.get(name, (name,))]
        for attack in OTHER_ATTACKS:
            if attack in attacks:
                check_installed(attack)

    def plan(
        self, attackers: Sequence[str], image_size: tuple[int, int], *, images: int, seed: int, chunk: int
    ) -> Plan:
        """What these settings mean for a network.

        Args:
            attackers: those that the network has.
            image_size: (H, W) in pixels.
            images: how many are attacked where `limit` says nothing.
            seed: where `seed` says nothing.
            chunk: images at once.

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
            queries=self.queries,
            autoattack_steps=self.autoattack_steps,
            seed=seed if self.seed is None else self.seed,
            chunk=chunk,
        )
        height, width = image_size
        diagonal = math.sqrt(3 * height * width)
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
            if name in FORMER_ATTACKERS:
                raise ValueError(f"--attackers: expected {FORMER_ATTACKERS[name]}, as it is called now, got {name}")
            found = [a for a in attackers if a == name or (name == "experts" and a.startswith("expert "))]
            if not found:
                raise ValueError(f"--attackers: expected some of {', '.join(attackers)}, got {name}")
            chosen += found
        return tuple(chosen)

    def options(self) -> list[str]:
        """The options of `immunity_fast.evaluate` that mean these settings."""
        words: list[str] = []
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if value == field.default:
                continue
            if isinstance(value, bool):
                words.append(flag)
            else:
                words += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
        return words


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
