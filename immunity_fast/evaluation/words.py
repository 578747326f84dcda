"""What tables call attacks, attackers, judges and radii; and accuracies as they are written down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from immunity_fast.evaluation.gate_attackers import DESCRIPTIONS, GATE_WORDS, OTHER_DESCRIPTIONS
from immunity_fast.evaluation.metrics import wilson_interval

NAMES = {
    "clean": "clean",
    "subset": "clean, the attacked images",
    "noise": "random noise of the same size",
    "fgsm": "FGSM",
    "bim": "BIM-10",
    "mim": "MIM-10",
    "pgd": "PGD-20",
    "cw": "PGD-20 on the CW margin",
    "dlr": "PGD-20 on DLR",
    "cw100": "PGD-100 on the CW margin, 5 restarts",
    "dlr100": "PGD-100 on DLR, 5 restarts",
    "pgd-sum": "PGD-20 on the expected loss",
    "arc": "ARC",
    "mora": "MORA",
    "square": "Square (no gradients)",
    "autoattack": "AutoAttack",
}
JUDGES = {name: GATE_WORDS[name] for name in ("sample", "mean", "off", "worst")} | {"output": "accuracy"}
# What is differentiated by attacks that are more than a loss.
OF_MEMBERS = {
    "pgd-sum": "the mean loss of all permutations: what ARC has to beat",
    "arc": "one permutation after the other, for the expected accuracy of all",
    "mora": "the experts, each weighed by what it adds",
}
# Likewise, of gates that are not permuted.
OF_OTHER_MEMBERS: dict[str, dict[str, str]] = {
    "selection": {
        "pgd-sum": "the expected loss of the expert that is drawn: what ARC has to beat",
        "arc": "one expert after the other, for the expected accuracy of the one that is drawn",
    },
    "uniform": {"pgd-sum": "the mean of the experts' losses"},
}
# What the columns of a table say of what answers, by the kind of gate.
COLUMNS = {
    "switch": "one random permutation an image, drawn anew for each attack (sample), the exact mean of all "
    "permutations (mean), the trained weights as they are (off), or each image's worst permutation (worst)",
    "selection": "one random expert an image, drawn anew for each attack (sample), the exact expectation of the draw "
    "(mean), or each image's worst expert (worst)",
    "uniform": "the average of the experts (mean)",
}
# Over what an expectation is, and its sample where not all is tried.
DRAWN = {"none": "draws", "switch": "permutations", "selection": "experts that may be drawn"}


def gate_in(found: Mapping[str, Any]) -> str:
    """The kind of gate that `results` are of, see `models.gate.kind_of_gate`; "none" of a network, which has none."""
    if any(entry["judge"] == "output" for entry in found.get("accuracy", ())):
        return "none"
    return str(found.get("gate", "switch"))


def knows(attack: str, attacker: str | None, gate: str = "switch") -> str:
    """What somebody differentiates who makes an attack, as a table says it.

    Args:
        attack, attacker: their names.
        gate: the kind of gate, see `gate_in`.
    """
    if attacker is None:
        return "—"
    if attack in OF_MEMBERS:
        of_members = OF_MEMBERS | OF_OTHER_MEMBERS.get(gate, {})
        return of_members[attack] + (f"; {GATE_WORDS[attacker]}" if attack == "mora" else "")
    if attacker == "any expert":
        return "an expert alone, transferred; the worst of them"
    return (DESCRIPTIONS | OTHER_DESCRIPTIONS.get(gate, {})).get(attacker, attacker)


def radius_words(eps: float, norm: str) -> str:
    """A radius as people write it: 8/255, where Linf's is so many levels of a pixel; else a number."""
    levels = 255 * eps
    whole = norm == "Linf" and levels >= 0.5 and math.isclose(levels, round(levels), rel_tol=1e-9)
    return f"{round(levels)}/255" if whole else f"{eps:.4g}"


def share(right: Sequence[bool]) -> dict[str, Any]:
    """{correct, images, accuracy, interval (Wilson, 95 %)} of bits."""
    correct, images = sum(right), len(right)
    return {
        "correct": correct,
        "images": images,
        "accuracy": correct / images if images else math.nan,
        "interval": list(wilson_interval(correct, images)),
    }


def percent(entry: Mapping[str, Any] | None) -> str:
    """An accuracy in %, ± half its interval; a dash for None."""
    if entry is None:
        return "—"
    return f"{100 * entry['accuracy']:.1f} ± {50 * (entry['interval'][1] - entry['interval'][0]):.1f}"


def find(found: Mapping[str, Any], attack: str, attacker: str | None, judge: str) -> dict[str, Any] | None:
    """The entry of `results`' accuracies for an attack, an attacker (None: nobody) and a judge; None without one."""
    for entry in found["accuracy"]:
        if (entry["attack"], entry["attacker"], entry["judge"]) == (attack, attacker, judge):
            return dict(entry)
    return None
