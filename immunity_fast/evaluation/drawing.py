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
from immunity_fast.evaluation.words import DRAWN, NAMES, gate_in, knows, percent, share
from immunity_fast.reporting.html import Table

Pieces = Sequence[dict[str, Any]]


def drawn(attack: str, attacker: str | None, columns: Sequence[Pieces], exact: bool) -> dict[str, Any] | None:
    """What draws make of an attack, or of the worst of several for each image; None where nothing is drawn.

    Args:
        attack, attacker: its names.
        columns: the pieces of each attack.
        exact: whether all that may be drawn was tried where it does not agree.

    Returns:
        {attack, attacker, images, accuracy: the exact expectation over all that a gate may draw, where a mixture has
        one, else the mean of the draws; interval (Wilson, 95 %); exact; draws: the accuracy in each of ten; mean,
        spread (their standard deviation); withstood: {…} right in all ten, of each attack}. Of several attacks an
        image has the draws of the one that leaves it the lowest expectation: the luckiest draw of many would be no
        expectation.
    """
    looked = [(tries(pieces), shares(pieces)) for pieces in columns]
    if not looked or any(not each for each, _ in looked):
        return None
    images = min(len(each[0]) for each, _ in looked)
    everybody = [all(each[t][i] for each, _ in looked for t in range(TRIES)) for i in range(images)]
    means = [known or [sum(right) / TRIES for right in zip(*each, strict=True)] for each, known in looked]
    lowest = [min(range(len(looked)), key=lambda number: means[number][i]) for i in range(images)]
    accuracies = [
        sum(looked[lowest[i]][0][t][i] for i in range(images)) / images if images else 0.0 for t in range(TRIES)
    ]
    expected = statistics.fmean(means[lowest[i]][i] for i in range(images)) if images else 0.0
    known = [each for _, each in looked if each is not None]
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
        "withstood": share(everybody),
    }


def drawn_table(found: Mapping[str, Any]) -> Iterable[Table]:
    """The table of `drawn`; none where nothing is drawn."""
    rows, gate = [], gate_in(found)
    for entry in found.get("drawn", []):
        if (entry["attacker"] or "").startswith("expert "):
            continue  # the file has them
        least, most = min(entry["draws"]), max(entry["draws"])
        worst = entry["attack"] == "worst case"
        rows.append(
            [
                "worst case for each image" if worst else NAMES[entry["attack"]],
                "all of the above" if worst else knows(entry["attack"], entry["attacker"], gate),
                percent(entry),
                f"{100 * entry['mean']:.1f} ± {100 * entry['spread']:.1f} ({100 * least:.1f} to {100 * most:.1f})",
                percent(entry["withstood"]),
            ]
        )
    if not rows:
        return
    exact = all(entry["exact"] for entry in found["drawn"])
    expected = "exact expectation" if exact else "expectation"
    says = f"over all {DRAWN[gate]}"
    if not exact:
        mixture = any(entry["judge"] == "sample" for entry in found["accuracy"])
        says = (
            "over a fixed sample of permutations, where they do not agree" if mixture else "the mean of the ten draws"
        )
    if passes := found.get("passes"):
        says += (
            f", each the mean of {passes['answer']} of {passes['all']} passes, which all ten share: ten of "
            "passes of their own vary more, and fewer images may be right in all of them"
        )
    yield Table(
        "What answers at random, %",
        ["attack", "what the attacker differentiates", expected, "ten draws: mean ± spread", "right in all ten tries"],
        rows,
        f"The expectation is {says}. ± is half the 95 % Wilson interval; of ten draws the standard deviation, and from "
        "the lowest to the highest. Whoever may try ten times has broken an image that was wrong in one of them.",
    )
