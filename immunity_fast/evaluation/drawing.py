"""What is random in an answer, and what it is worth: its exact expectation, ten draws, and who may try ten times.

An attacker who is answered by a random gate can show the same image again. What then counts is not one draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from immunity_fast.evaluation.metrics import wilson_interval
from immunity_fast.evaluation.runner import shares, tries
from immunity_fast.evaluation.targets import TRIES
from immunity_fast.evaluation.words import NAMES, knows, percent, share
from immunity_fast.reporting.html import Table

Pieces = Sequence[dict[str, Any]]


def drawn(attack: str, attacker: str | None, columns: Sequence[Pieces], exact: bool) -> dict[str, Any] | None:
    """What draws make of an attack, or of the worst of several for each image; None where nothing is drawn.

    Args:
        attack, attacker: its names.
        columns: the pieces of each attack.
        exact: whether all permutations were tried where they do not agree.

    Returns:
        {attack, attacker, images, accuracy: the exact expectation over all permutations, where a mixture has one, else
        the mean of the draws; interval (Wilson, 95 %); exact; draws: the accuracy in each of ten; mean, spread (their
        standard deviation); withstood: {…} right in all ten}.
    """
    looked = [(tries(pieces), shares(pieces)) for pieces in columns]
    if not looked or any(not each for each, _ in looked):
        return None
    images = min(len(each[0]) for each, _ in looked)
    rounds = [[all(each[t][i] for each, _ in looked) for i in range(images)] for t in range(TRIES)]
    accuracies = [sum(right) / images if images else 0.0 for right in rounds]
    expected = statistics.fmean(accuracies)
    known = [each for _, each in looked if each is not None]
    if len(known) == len(looked) and images:
        expected = statistics.fmean(min(each[i] for each in known) for i in range(images))
    return {
        "attack": attack,
        "attacker": attacker,
        "images": images,
        "accuracy": expected,
        "interval": list(wilson_interval(expected * images, images)),
        "exact": exact and len(known) == len(looked),
        "draws": accuracies,
        "mean": statistics.fmean(accuracies),
        "spread": statistics.stdev(accuracies),
        "withstood": share([all(right[i] for right in rounds) for i in range(images)]),
    }


def drawn_table(found: Mapping[str, Any]) -> Iterable[Table]:
    """The table of `drawn`; none where nothing is drawn."""
    rows = []
    for entry in found.get("drawn", []):
        least, most = min(entry["draws"]), max(entry["draws"])
        worst = entry["attack"] == "worst case"
        rows.append(
            [
                "worst case for each image" if worst else NAMES[entry["attack"]],
                "all of the above" if worst else knows(entry["attack"], entry["attacker"]),
                percent(entry),
                f"{100 * entry['mean']:.1f} ± {100 * entry['spread']:.1f} ({100 * least:.1f} to {100 * most:.1f})",
                percent(entry["withstood"]),
            ]
        )
    if not rows:
        return
    exact = all(entry["exact"] for entry in found["drawn"])
    expected = "exact expectation" if exact else "expectation"
    says = "over all permutations" if exact else "by a fixed sample of permutations, or by the ten draws"
    yield Table(
        "What answers at random, %",
        ["attack", "what the attacker differentiates", expected, "ten draws: mean ± spread", "right in all ten tries"],
        rows,
        f"The expectation is {says}. ± is half the 95 % Wilson interval; of ten draws the standard deviation, and from "
        "the lowest to the highest. Whoever may try ten times has broken an image that was wrong in one of them.",
    )
