"""What an evaluation is to find out: its plan, the attacks that there are, and the rows of its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from immunity_fast.attacks import Attack, radius_of
from immunity_fast.attacks.projections import Norm
from immunity_fast.evaluation.targets import TargetModel
from immunity_fast.runtime.precision import AttackAmp

GRADIENT_ATTACKS = ("fgsm", "bim", "mim", "pgd", "cw", "dlr", "cw100", "dlr100")
MEMBER_ATTACKS = ("pgd-sum", "arc", "mora")  # of what is made of members
OTHER_ATTACKS = ("square", "autoattack")
ATTACKS = (*GRADIENT_ATTACKS, *MEMBER_ATTACKS, *OTHER_ATTACKS)
SETS = {
    "quick": ("fgsm", "pgd"),
    "paper": ("fgsm", "bim", "mim", "pgd"),  # but for AutoAttack
    "default": ("fgsm", "bim", "mim", "pgd", *MEMBER_ATTACKS),
    "all": ATTACKS,
}
# Attacks that are for some attackers by what they are: the others are not missing.
FOR = {
    "cw100": ("off", "mean", "logits", "output"),
    "dlr100": ("off", "mean", "logits", "output"),
    "pgd-sum": ("sample",),
    "arc": ("sample",),
    "mora": ("off", "mean"),
}
AVERAGED = {"pgd-sum": ("mean",), "arc": ()}  # the same where nothing is drawn: the members answer together
RESTARTS = 5  # of PGD-100 on margins


@dataclass(frozen=True)
class Plan:
    """What is to be found out.

    Args:
        attacks: of `ATTACKS`.
        attackers: of the target's; None is all of them.
        images: how many of the test split, in its fixed random order, are attacked.
        eps: of the ball; None is 8/255 for Linf, 1 for L2. Curves and heatmaps are of this one.
        norm: of the ball, "Linf" or "L2".
        other_eps: radii at which the same attacks are made, to be put beside it.
        masking_images: how many of them the curves against ε, steps and draws are made of; 0 leaves them out.
        curve_eps: multiples of the radius.
        curve_steps: numbers of PGD's steps.
        curve_draws: numbers of draws that EOT averages, of what is random.
        drop_fooled: see `Attack`; an image that has fooled its attacker's own objective is then not attacked further:
            for good, where that is the gate's sample. Objectives that are random in another way are attacked to the
            end. Without it an image is attacked until no judge is right about it, see `TargetModel.settling`.
        amp: see `Attack`; of attacks that follow gradients, without AutoAttack, ARC and MORA.
        queries: of Square.
        autoattack_steps: of AutoAttack's gradient attacks.
        mora_steps: of each of MORA's stages.
        arc_steps: of ARC's walks over the members.
        seed: of random starts and draws.
        chunk: images at once.
    """

    attacks: tuple[str, ...] = SETS["default"]
    attackers: tuple[str, ...] | None = None
    images: int = 1000
    eps: float | None = None
    norm: Norm = "Linf"
    other_eps: tuple[float, ...] = ()
    masking_images: int = 64
    curve_eps: tuple[float, ...] = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
    curve_steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50)
    curve_draws: tuple[int, ...] = (1, 10, 50)
    drop_fooled: bool = False
    amp: AttackAmp = "off"
    queries: int = 5000
    autoattack_steps: int = 100
    mora_steps: int = 100
    arc_steps: int = 20
    seed: int = 0
    chunk: int = 50

    @property
    def radius(self) -> float:
        """The ball's radius: `eps`, its default filled in."""
        return radius_of(self.eps, self.norm)

    @property
    def radii(self) -> tuple[float, ...]:
        """All radii, from the least to the largest."""
        return tuple(sorted({self.radius, *self.other_eps}))


@dataclass(frozen=True)
class Row:
    """One attack by one attacker.

    Args:
        kind: "clean", all test images; "subset", those that are attacked, clean; "noise", with random noise; "attack";
            or a curve, "eps", "steps" or "draws".
        attack: its name in `ATTACKS`, of the kind "attack" alone.
        attacker: of the target's, of attacks and curves.
        settings: of an attack that follows gradients.
        eps: the radius, of attacks and noise, where it is not the plan's own.
    """

    kind: str
    attack: str = ""
    attacker: str = ""
    settings: Attack | None = None
    eps: float | None = None


def gradient_attack(name: str, plan: Plan) -> Attack:
    """The settings of an attack of `GRADIENT_ATTACKS`: steps of a quarter (Linf) or a fifth (L2) of the plan's radius.

    PGD-100 is on a margin, of the worst of 5 restarts, and leaves an image that it has fooled.

    Args:
        name: of the attack.
        plan: its radius, norm, `drop_fooled` and `amp`.
    """
    eps = plan.radius
    step = eps / 4 if plan.norm == "Linf" else eps / 5
    dropped = plan.drop_fooled
    base = Attack(eps, step, norm=plan.norm, keep_best=dropped, drop_fooled=dropped, amp=plan.amp)
    long = {"steps": 100, "random_start": True, "restarts": RESTARTS, "keep_best": True, "drop_fooled": True}
    changes: dict[str, dict[str, Any]] = {
        "fgsm": {"alpha": eps, "steps": 1},
        "bim": {"steps": 10},
        "mim": {"steps": 10, "decay": 1.0},
        "pgd": {"steps": 20, "random_start": True},
        "cw": {"steps": 20, "random_start": True, "loss": "cw"},
        "dlr": {"steps": 20, "random_start": True, "loss": "dlr"},
        "cw100": long | {"loss": "cw"},
        "dlr100": long | {"loss": "dlr"},
        "pgd-sum": {"steps": 20, "random_start": True},
    }
    return replace(base, **changes[name])


def attack_rows(target: TargetModel, plan: Plan) -> list[Row]:
    """The rows of a target's table under a plan, in its order: clean, noise, and each attack by each attacker.

    Those of the other radii follow, noise first.
    """
    rows = [Row("subset")]
    for radius in (None, *(other for other in plan.radii if other != plan.radius)):
        own = plan if radius is None else replace(plan, eps=radius)
        rows.append(Row("noise", eps=radius))
        for attack, attacker in _pairs(target, plan):
            if _why_not(target, attack, attacker) is None:
                follows = attack in GRADIENT_ATTACKS or attack == "pgd-sum"
                settings = gradient_attack(attack, own) if follows else None
                rows.append(Row("attack", attack, attacker, settings, radius))
    return rows


def left_out(target: TargetModel, plan: Plan) -> list[dict[str, str]]:
    """What a plan asks for and no row is made of, as {attack, attacker, why}."""
    return [
        {"attack": attack, "attacker": attacker, "why": why}
        for attack, attacker in _pairs(target, plan)
        if (why := _why_not(target, attack, attacker)) is not None
    ]


def _pairs(target: TargetModel, plan: Plan) -> list[tuple[str, str]]:
    chosen = [name for name in target.attackers if plan.attackers is None or name in plan.attackers]
    found = []
    for attack in plan.attacks:
        own = [name for name in chosen if name in _for(target, attack, chosen)]
        found += [(attack, name) for name in own or chosen[:1]]  # the first, to say why there is none
    return found


def _why_not(target: TargetModel, attack: str, attacker: str) -> str | None:
    """Why an attack is not for an attacker; None if it is."""
    if attack in ("dlr", "dlr100") and target.num_classes < 3:
        return "its ratio is not defined for fewer than 3 classes"
    if attack in MEMBER_ATTACKS and not target.has_members:
        return "it attacks through members, and it is not known what this is made of"
    takes = _for(target, attack, (attacker,))
    if not takes:
        return "it lowers the accuracy of a random answer, and nothing is drawn here; MORA attacks averaged answers"
    if attacker not in takes:
        return f"it is for {_listed(takes)}"
    if attack == "square" and attacker not in ("mean", "sample", "output"):
        return "it asks what answers, and differentiates nothing: it is for mean, sample and output"
    if attack == "autoattack" and attacker not in ("off", "mean", "sample", "output"):
        return "its standard version is for off, mean and output, its randomised one for sample"
    return None


def _for(target: TargetModel, attack: str, everyone: Sequence[str]) -> Sequence[str]:
    """The attackers that an attack is for; `everyone` where it is for all."""
    if target.has_members and not target.random and attack in AVERAGED:
        return AVERAGED[attack]
    return FOR.get(attack, everyone)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def curve_rows(target: TargetModel, plan: Plan) -> list[Row]:
    """The rows of the curves; none where a plan has no images.

    PGD against steps and against ε on the attacker whose objective is not random; and against draws on their average,
    where something is random.
    """
    if not plan.masking_images:
        return []
    draws = [Row("draws", "", "eot")] if "eot" in target.attackers and plan.curve_draws else []
    return [*(Row(kind, "", target.exact) for kind in ("steps", "eps")), *draws]
