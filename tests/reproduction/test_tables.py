"""Tables from made-up results: what stands in a cell, and what does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from immunity_fast.evaluation.metrics import wilson_interval
from immunity_fast.reporting.html import Table
from immunity_fast.reproduction import tables
from immunity_fast.reproduction.experiments import IMMUNITY, INDEPENDENT, Entry
from immunity_fast.reproduction.jobs import Done, Job
from immunity_fast.training.config import TrainConfig

CONFIG = TrainConfig(dataset="cifar10", experts=5)


def _job(**changes: Any) -> Job:
    return Job(dataclasses.replace(CONFIG, **changes))


def _done(accuracies: dict[tuple[str, str | None, str], int], heatmaps: dict[str, float] | None = None) -> Done:
    """Of 200 images, so many right."""
    entries = [
        {"attack": attack, "attacker": attacker, "judge": judge, **_share(count), "seconds": 1.0}
        for (attack, attacker, judge), count in accuracies.items()
    ]
    judges = dict.fromkeys(judge for _, _, judge in accuracies)
    results: dict[str, Any] = {"accuracy": entries, "worst_case": [{"judge": judge, **_share(7)} for judge in judges]}
    if heatmaps is not None:
        results["heatmaps"] = {"clean": heatmaps, "attacked": dict.fromkeys(heatmaps, -1.0)}
    return Done(results, {}, [], "", "", {}, 0.0, 0.0)


def _share(count: int) -> dict[str, Any]:
    return {"correct": count, "images": 200, "accuracy": count / 200, "interval": list(wilson_interval(count, 200))}


def _column(table: Table, name: str) -> list[str]:
    return [row[list(table.columns).index(name)] for row in table.rows]


HEATMAPS = {"mutual_information": 0.256, "iscore": 12.34, "cscore": 4567.8, "dead_heatmaps": 0.0}


def test_one_seed_has_the_wilson_interval_and_more_have_a_range() -> None:
    clean = tables.accuracy("clean", None, "mean")
    jobs = [_job(seed=seed) for seed in range(3)]
    counts = (100, 110, 90)
    found = {job: _done({("clean", None, "mean"): count}) for job, count in zip(jobs, counts, strict=True)}
    low, high = wilson_interval(100, 200)
    assert tables.cell(Entry(("a",), (jobs[0],)), found, clean) == f"50.0 ± {50 * (high - low):.1f}"
    assert tables.cell(Entry(("a",), tuple(jobs)), found, clean) == "50.0 ± 5.0"
    assert tables.number(Entry(("a",), tuple(jobs)), found, clean) == pytest.approx((50, 5))
    same = dict.fromkeys(jobs, found[jobs[0]])
    assert tables.cell(Entry(("a",), tuple(jobs)), same, clean) == "50.0 ± 0.0"
    # A seed that failed is left out of the mean.
    del found[jobs[1]]
    assert tables.cell(Entry(("a",), tuple(jobs)), found, clean) == "47.5 ± 2.5"
    assert tables.cell(Entry(("a",), (jobs[1],)), found, clean) == "not done"
    assert tables.cell(Entry(("a",), tuple(jobs)), found, tables.accuracy("fgsm", "mean", "mean")) == "—"


def test_a_measure_of_one_seed_has_no_spread() -> None:
    job = _job()
    found = {job: _done({("clean", None, "mean"): 100}, HEATMAPS)}
    entry = Entry(("a",), (job,))
    cells = [tables.cell(entry, found, value, digits) for value, digits in tables.HEATMAPS.values()]
    assert cells == ["0.26", "12.3", "4,568"]
    found = {job: _done({("clean", None, "mean"): 100})}
    assert [tables.cell(entry, found, value) for value, _ in tables.HEATMAPS.values()] == ["—"] * 3


def test_table_1() -> None:
    entries, found = [], {}
    for arch in ("ResNet18", "GoogLeNet"):
        for i, networks in enumerate((INDEPENDENT, IMMUNITY)):
            job = _job(arch={"ResNet18": "resnet18", "GoogLeNet": "googlenet"}[arch], beta=float(i))
            entries.append(Entry((arch, networks), (job,)))
            accuracies = {
                ("clean", None, "mean"): 150 + i,
                ("clean", None, "sample"): 140,
                ("pgd", "mean", "mean"): 9,
            }
            found[job] = _done(accuracies, HEATMAPS)
    table = tables.table1(entries, found)
    assert [list(row[:2]) for row in table.rows] == [list(entry.labels) for entry in entries]
    assert _column(table, "the paper's clean accuracy, %") == ["", "", "95.01", "93.46"]
    assert [cell.split()[0] for cell in _column(table, "clean, gate mean, %")] == ["75.0", "75.5"] * 2
    assert "Seeds: 0" in table.note
    # Other data than the paper's: its numbers are not beside ours.
    moved = [Entry(e.labels, tuple(_job(dataset="digits", beta=j.config.beta) for j in e.jobs)) for e in entries]
    table = tables.table1(moved, dict.fromkeys((job for e in moved for job in e.jobs), next(iter(found.values()))))
    assert "the paper's clean accuracy, %" not in table.columns


def test_table_2_shows_immunity_by_gate_sample_and_by_gate_mean() -> None:
    single, mixture = _job(experts=1), _job()
    attacks = ("fgsm", "bim", "mim", "pgd", "autoattack")
    alone = {("clean", None, "output"): 180, **{(a, "output", "output"): 60 - 2 * i for i, a in enumerate(attacks)}}
    both: dict[tuple[str, str | None, str], int] = {}
    for j, judge in enumerate(("sample", "mean")):
        both["clean", None, judge] = 170 - j
        for attacker in ("sample", "mean"):
            for i, attack in enumerate(attacks):
                both[attack, attacker, judge] = 100 - 2 * i - 20 * j - (10 if attacker == "mean" else 0)
    entries = [
        Entry(("cifar10", "standard", "P-DARTS, 8 cells"), (single,)),
        Entry(("cifar10", "standard", IMMUNITY), (mixture,)),
    ]
    table = tables.table2(entries, {single: _done(alone), mixture: _done(both)})
    assert _column(table, "network") == ["P-DARTS, 8 cells", "Immunity, gate sample", "Immunity, gate mean"]

    def shares(name: str) -> list[float]:
        return [2 * float(cell.split()[0]) for cell in _column(table, name)]

    assert shares("clean") == [180, 170, 169]
    assert shares("PGD-20") == [54, 94, 64]
    assert shares("AutoAttack") == [52, 92, 62]
    assert shares("PGD-20 on gate mean") == [54, 84, 64]
    assert shares("AutoAttack on gate mean") == [52, 82, 62]
    assert shares("worst case") == [7, 7, 7]
    assert _column(table, "published by its authors, %") == ["clean 97.50", "", ""]


def test_table_3_and_switch_modes() -> None:
    job = _job()
    accuracies: dict[tuple[str, str | None, str], int] = {}
    for i, attacker in enumerate((None, "off", "sample", "eot", "mean", "worst")):
        for j, judge in enumerate(("sample", "mean", "off", "worst")):
            accuracies["subset" if attacker is None else "pgd", attacker, judge] = 100 - 10 * i - 2 * j
    accuracies["clean", None, "sample"] = 111
    entry = Entry(("full",), (job,))
    found = {job: _done(accuracies, HEATMAPS)}
    table = tables.table3([entry, Entry(("MoE",), (_job(beta=0.0),))], found)
    assert _column(table, "clean, gate sample")[0].startswith("55.5")
    assert set(table.rows[1][1:-1]) == {"not done"}
    assert _column(table, "the paper's clean accuracy, %") == ["93.46", "94.74"]
    modes = tables.switch_modes(entry, found)
    cells = [[2 * float(cell.split()[0]) for cell in row[1:]] for row in modes.rows]
    assert cells == [[100 - 10 * i - 2 * j for i in range(6)] for j in range(4)]


def test_columns_that_nobody_has_an_entry_in_are_left_out() -> None:
    job = _job(dataset="digits")
    table = tables.table3([Entry(("full",), (job,))], {job: _done({("clean", None, "mean"): 3})})
    assert list(table.columns) == ["trained with", "clean, gate mean"]
