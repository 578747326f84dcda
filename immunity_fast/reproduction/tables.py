"""The tables of arXiv 2402.18787 from evaluated runs: mean and spread over seeds, published numbers beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from immunity_fast.evaluation.gate_attackers import GATE_WORDS, KNOWLEDGE
from immunity_fast.evaluation.words import find
from immunity_fast.reporting.html import Table
from immunity_fast.reproduction.experiments import IMMUNITY, INDEPENDENT, Entry
from immunity_fast.reproduction.jobs import Done, Job

NOT_DONE = "not done"  # runs that failed, or that nobody has begun
Found = Mapping[Job, Done]
Value = Callable[[dict[str, Any]], "dict[str, Any] | float | None"]

# What is public of the paper's own numbers: clean accuracy on CIFAR-10 of GoogLeNet experts, in %.
PAPER_TABLE1 = {("GoogLeNet", INDEPENDENT): "95.01", ("GoogLeNet", IMMUNITY): "93.46"}
PAPER_TABLE3 = {"MoE": "94.74", "full": "93.46"}
# Published by the baselines' authors for CIFAR-10, Linf 8/255; networks and training as published, not as here.
PUBLISHED_TABLE2 = {
    ("standard", "P-DARTS"): "clean 97.50",
    ("PGD", "RobNet"): "clean 83.5, PGD-20 52.1",
    ("PGD", "AdvRush"): "AutoAttack 50.04",
}


def accuracy(attack: str, attacker: str | None, judge: str) -> Value:
    """An accuracy of a run's results; of a single network its only ones."""

    def value(results: dict[str, Any]) -> dict[str, Any] | None:
        if any(entry["judge"] == "output" for entry in results["accuracy"]):
            return find(results, attack, None if attacker is None else "output", "output")
        return find(results, attack, attacker, judge)

    return value


def worst(judge: str) -> Value:
    """The worst case for each image over all attacks."""

    def value(results: dict[str, Any]) -> dict[str, Any] | None:
        for entry in results["worst_case"]:
            if entry["judge"] in (judge, "output"):
                return dict(entry)
        return None

    return value


def measure(name: str) -> Value:
    """A measure of the heatmaps of clean images, by its name in a run's results."""
    return lambda results: results.get("heatmaps", {}).get("clean", {}).get(name)


def number(entry: Entry, found: Found, value: Value) -> tuple[float, float] | None:
    """(mean over the seeds that are done, half their range), of one seed half the Wilson interval; accuracies in %."""
    return summarised([value(found[job].results) for job in entry.jobs if job in found])


def summarised(got: Sequence[dict[str, Any] | float | None]) -> tuple[float, float] | None:
    """`number` of what several seeds have found: accuracies with their intervals, or measures; None is left out."""
    known = [one for one in got if one is not None]
    if not known:
        return None
    values = [100 * one["accuracy"] if isinstance(one, dict) else one for one in known]
    first = known[0]
    spread = (max(values) - min(values)) / 2
    if len(values) == 1 and isinstance(first, dict):
        spread = 50 * (first["interval"][1] - first["interval"][0])
    return sum(values) / len(values), spread


def cell(entry: Entry, found: Found, value: Value, digits: int = 1) -> str:
    """A table's cell: the mean and its spread, a dash where it was not measured, or that nothing was done."""
    if not any(job in found for job in entry.jobs):
        return NOT_DONE
    got = number(entry, found, value)
    if got is None:
        return "—"
    mean, spread = got
    several = sum(job in found for job in entry.jobs) > 1
    return f"{mean:,.{digits}f}" + (f" ± {spread:,.{digits}f}" if spread or several else "")


HEATMAPS: dict[str, tuple[Value, int]] = {
    "mutual information, nats": (measure("mutual_information"), 2),
    "IScore": (measure("iscore"), 1),
    "CScore, pixels⁴": (measure("cscore"), 0),
}
TABLE1: dict[str, tuple[Value, int]] = {
    "clean, gate mean, %": (accuracy("clean", None, "mean"), 1),
    "clean, gate sample, %": (accuracy("clean", None, "sample"), 1),
    **HEATMAPS,
    "PGD-20 on gate mean, answered by it, %": (accuracy("pgd", "mean", "mean"), 1),
}
TABLE3: dict[str, tuple[Value, int]] = {
    "clean, gate sample": (accuracy("clean", None, "sample"), 1),
    "FGSM on gate sample": (accuracy("fgsm", "sample", "sample"), 1),
    "PGD-20 on gate sample": (accuracy("pgd", "sample", "sample"), 1),
    "PGD-20 on gate mean": (accuracy("pgd", "mean", "sample"), 1),
    "worst case": (worst("sample"), 1),
    "clean, gate mean": (accuracy("clean", None, "mean"), 1),
    "PGD-20 on gate mean, answered by it": (accuracy("pgd", "mean", "mean"), 1),
    **HEATMAPS,
}


def table2_columns(attacker: str, judge: str) -> dict[str, tuple[Value, int]]:
    """The columns of Table 2, for who attacks and what answers."""
    attacks = {"FGSM": "fgsm", "BIM-10": "bim", "MIM-10": "mim", "PGD-20": "pgd", "AutoAttack": "autoattack"}
    columns: dict[str, tuple[Value, int]] = {"clean": (accuracy("clean", None, judge), 1)}
    columns |= {name: (accuracy(attack, attacker, judge), 1) for name, attack in attacks.items()}
    columns |= {
        f"{name} on gate mean": (accuracy(attacks[name], "mean", judge), 1) for name in ("PGD-20", "AutoAttack")
    }
    return columns | {"worst case": (worst(judge), 1)}


def table1(entries: Sequence[Entry], found: Found) -> Table:
    """Table 1: a row for each architecture, trained independently and as Immunity."""
    public = _on_cifar10(entries)
    rows = [
        [
            *entry.labels,
            *_cells(entry, found, TABLE1),
            PAPER_TABLE1.get((entry.labels[0], entry.labels[1]), "") if public else "",
        ]
        for entry in entries
    ]
    columns = ["architecture", "networks", *TABLE1, "the paper's clean accuracy, %"]
    return _without_empty_columns(
        "Table 1", columns, rows, entries, "Networks trained independently answer by the mean of their outputs."
    )


def table2(entries: Sequence[Entry], found: Found) -> Table:
    """The baselines and Immunity, which is there twice: answered by gate sample, and by gate mean."""
    rows = []
    for entry in entries:
        dataset, training, network = entry.labels
        ways = [("", "sample", "sample")]
        if network == IMMUNITY:
            ways = [(", gate sample", "sample", "sample"), (", gate mean", "mean", "mean")]
        published = PUBLISHED_TABLE2.get((training, network.split(",")[0]), "") if _on_cifar10([entry]) else ""
        for suffix, attacker, judge in ways:
            cells = _cells(entry, found, table2_columns(attacker, judge))
            rows.append([dataset, training, network + suffix, *cells, published])
    columns = ["data", "training", "network", *table2_columns("", ""), "published by its authors, %"]
    note = (
        "Accuracy in %. Against gate sample the attacker differentiates one draw of it, as in the paper, and "
        "AutoAttack is its randomised version; the columns on gate mean are an attacker who knows the exact mean. "
        "Published numbers are of the published networks and training."
    )
    return _without_empty_columns("Table 2", columns, rows, entries, note)


def table3(entries: Sequence[Entry], found: Found) -> Table:
    """Table 3: a row for each of the losses that were left out or changed."""
    public = _on_cifar10(entries)
    rows = [
        [*entry.labels, *_cells(entry, found, TABLE3), PAPER_TABLE3.get(entry.labels[0], "") if public else ""]
        for entry in entries
    ]
    columns = ["trained with", *TABLE3, "the paper's clean accuracy, %"]
    note = "Accuracy in %, answered by gate sample but where it says so."
    note += " The paper's experts are GoogLeNets." if public else ""
    return _without_empty_columns("Table 3", columns, rows, entries, note)


def switch_modes(entry: Entry, found: Found) -> Table:
    """What answers, against what the attacker knows, for PGD-20."""
    attackers = {"nobody": None} | {GATE_WORDS[name]: name for name in KNOWLEDGE if name in GATE_WORDS}
    judges = {GATE_WORDS[name]: name for name in ("sample", "mean", "off", "worst")}
    rows = [
        [
            name,
            *(
                cell(entry, found, accuracy("subset" if who is None else "pgd", who, judge))
                for who in attackers.values()
            ),
        ]
        for name, judge in judges.items()
    ]
    note = f"Accuracy in % under PGD-20, on the attacked images; {entry.labels[0]} loss."
    return _without_empty_columns(
        "What answers, by what the attacker knows", ["answered by", *attackers], rows, [entry], note
    )


def sweep_table(points: Sequence[tuple[float, Entry]], name: str, found: Found) -> Table:
    """The sweep of a coefficient: a row for each of its values."""
    rows = [[f"{value:g}", *_cells(entry, found, TABLE3)] for value, entry in points]
    return _without_empty_columns(
        f"Sweep of {name}", [name, *TABLE3], rows, [entry for _, entry in points], "Accuracy in %."
    )


def _cells(entry: Entry, found: Found, columns: Mapping[str, tuple[Value, int]]) -> list[str]:
    return [cell(entry, found, value, digits) for value, digits in columns.values()]


def _on_cifar10(entries: Sequence[Entry]) -> bool:
    return all(job.config.dataset == "cifar10" for entry in entries for job in entry.jobs)


def _without_empty_columns(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], entries: Sequence[Entry], note: str
) -> Table:
    """The table without columns that nobody has an entry in."""
    kept = [i for i in range(len(columns)) if any(row[i] not in ("", "—", NOT_DONE) for row in rows)]
    seeds = sorted({job.config.seed for entry in entries for job in entry.jobs})
    spread = "half the 95 % Wilson interval (of accuracies)" if len(seeds) == 1 else "half the range over the seeds"
    note = f"{note} Seeds: {', '.join(map(str, seeds))}; ± is {spread}."
    return Table(caption, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows], note)
