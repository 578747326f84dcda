"""What a newcomer waits for, measured: parts of a run that add up, and a table of two trees."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path

import pytest

from benchmarks import first_result, phases


def test_a_part_within_another_is_counted_once() -> None:
    ticks = itertools.count()
    watch = phases.Stopwatch(lambda: (next(ticks) ** 2,))  # 0, 1, 4, 9, …
    inner = watch.timed("inner", lambda: None)
    watch.timed("outer", lambda: [inner(), inner()])()
    watch.switch()
    assert watch.parts == {"all else": (1 + 13,), "outer": (3 + 7 + 11,), "inner": (5 + 9,)}


def test_a_part_that_fails_is_counted_too() -> None:
    ticks = itertools.count()
    watch = phases.Stopwatch(lambda: (float(next(ticks)),))
    with pytest.raises(ZeroDivisionError):
        watch.timed("part", lambda: 1 / 0)()
    assert watch.parts == {"all else": (1.0,), "part": (1.0,)}
    assert watch.open == ["all else"]


def test_each_part_is_a_function_where_it_is_called() -> None:
    for places in phases.PARTS.values():
        for place in places:
            module, _, name = place.rpartition(".")
            assert callable(getattr(importlib.import_module(module), name))


def test_the_table_has_medians_and_ratios() -> None:
    record = {
        "trees": ["before", "now"],
        "short": {
            "before": {name: [1.0, 8.0, 4.0] for name in first_result.SHORT},
            "now": {name: [3.0, 1.0, 1.0] for name in first_result.SHORT},
        },
        "runs": {
            "before": [{"seconds": {"import": 3.0, "steps": 30.0}}],
            "now": [{"seconds": {"import": 1.5, "steps": 9.0}}, {"seconds": {"import": 2.5, "steps": 11.0}}],
        },
    }
    lines = first_result.table(record).splitlines()
    assert lines[0] == "| seconds | before | now | ratio |"
    assert "| train --help | 4.00 | 1.00 | 0.25 |" in lines
    assert lines[-3:] == [
        "| import | 3.00 | 2.00 | 0.67 |",
        "| steps | 30.00 | 10.00 | 0.33 |",
        "| the whole quickstart | 33.00 | 12.00 | 0.36 |",
    ]


@pytest.mark.exhaustive
def test_a_small_run_is_measured(tmp_path: Path) -> None:
    small = "--epochs 1 --limit-train 32 --experts 2 --check-images 2 --attack-images 2"
    first_result.main(["--rounds", "0", "--options", small, "--out", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    (run,) = record["runs"]["now"]
    assert set(run["seconds"]) == {*phases.PARTS, "import", "import of torch", "all else"}
    assert all(seconds > 0 for seconds in run["seconds"].values())
    assert 0 <= run["accuracy"]["pgd by mean, gate mean"] <= 1
