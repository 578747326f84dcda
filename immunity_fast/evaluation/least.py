"""The least that is left: an image counts only if it withstood every attack, at every radius side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from immunity_fast.evaluation.words import JUDGES, percent, radius_words
from immunity_fast.reporting.html import Table

BEST, WORST = "best expert", "worst expert"


def least_lines(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any] | None]]:
    """What answers → its worst case at each of `found["radii"]`; the experts' best and worst stand for all of them."""
    lines: dict[str, list[dict[str, Any] | None]] = {}
    for number, radius in enumerate(found["radii"]):
        entries = {entry["judge"]: entry for entry in radius["worst_case"]}
        experts = [entry for judge, entry in entries.items() if judge.startswith("expert ")]
        cells: dict[str, dict[str, Any]] = {JUDGES[judge]: entries[judge] for judge in JUDGES if judge in entries}
        drawn = next((each for each in radius["drawn"] if each["attack"] == "worst case"), None)
        if drawn is not None:
            answer = JUDGES["sample" if "sample" in entries else "output"]
            cells[f"{answer}, expected"] = drawn
            cells[f"{answer}, in all ten tries"] = drawn["withstood"]
        if experts:
            cells[BEST] = max(experts, key=lambda entry: entry["accuracy"])
            cells[WORST] = min(experts, key=lambda entry: entry["accuracy"])
        for name, entry in cells.items():
            lines.setdefault(name, [None] * len(found["radii"]))[number] = entry
    return lines


def least_table(found: Mapping[str, Any]) -> Iterable[Table]:
    """The last table of a report; none where nothing was attacked."""
    lines = least_lines(found) if any(radius["worst_case"] for radius in found["radii"]) else {}
    if not lines:
        return
    norm = found["plan"]["norm"]
    headings = [f"ε = {radius_words(radius['eps'], norm)}" for radius in found["radii"]]
    rows = [[name, *(_cell(name, entry) for entry in cells)] for name, cells in lines.items()]
    yield Table(
        "The least over all attacks, for each image, %",
        ["what answers", *headings],
        rows,
        f"{norm}. An image counts where it withstood every attack of every attacker. ± is half the 95 % Wilson "
        "interval.",
    )


def least_sentence(found: Mapping[str, Any]) -> str | None:
    """The same in one line, for the end of a command's output; None where nothing was attacked."""
    lines = least_lines(found) if any(radius["worst_case"] for radius in found["radii"]) else {}
    if not lines:
        return None
    norm = found["plan"]["norm"]
    radii = " | ".join(radius_words(radius["eps"], norm) for radius in found["radii"])
    parts = []
    for name, cells in lines.items():
        numbers = " | ".join("—" if entry is None else f"{100 * entry['accuracy']:.1f}" for entry in cells)
        parts.append(f"{name} {numbers}")
    return f"least over all attacks for each image, %, at ε = {radii}: {'; '.join(parts)}"


def _cell(name: str, entry: dict[str, Any] | None) -> str:
    which = f" ({entry['judge']})" if entry is not None and name in (BEST, WORST) else ""
    return percent(entry) + which
