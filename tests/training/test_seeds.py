"""Several seeds: a run each, what is skipped, taken up or left out, and what they have in common."""

from __future__ import annotations

import gc
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from immunity_fast import train
from immunity_fast.runtime import cli, interrupts
from immunity_fast.training import seeds
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.preparation import Start
from immunity_fast.training.run_folder import Run
from immunity_fast.training.seeds import SeedSet, parse_seeds, spread, summary
from tests.small_runs import error_line, options, saved

ENTRIES = (("clean", None, "sample"), ("clean", None, "expert 1"), ("pgd", "mean", "sample"))


class Training:
    """What stands in for a training and its evaluation: files as they leave them, or what ends them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.started: list[Start] = []
        self.ends: dict[int, Callable[[Run], None]] = {}
        patch.setattr(seeds, "fit_and_evaluate", self)
        patch.setattr(seeds, "is_finished", lambda run: run.report.is_file())
        patch.setattr(gc, "collect", lambda: 0)  # which takes longer than all the rest, and nothing was trained

    def __call__(self, start: Start) -> None:
        self.started.append(start)
        run = Run.open(start.folder) if start.resume else Run.create(start.folder, start.config)
        seed = start.config.seed
        if seed in self.ends:
            self.ends.pop(seed)(run)
        record = {"epoch": 1, "step": 5, "val_accuracy_mean": seed / 8, "loss": 1.0 + seed}
        run.append_metrics(record)
        found = {
            "accuracy": [_entry(*place, seed / 10) for place in ENTRIES],
            "worst_case": [{"judge": "sample", "accuracy": seed / 100}],
        }
        run.results_file.write_text(json.dumps(found), encoding="utf-8")
        run.report.write_text("<html>", encoding="utf-8")

    @property
    def seeds(self) -> list[int]:
        """Those that were started, in order."""
        return [start.config.seed for start in self.started]


def _entry(attack: str, attacker: str | None, judge: str, accuracy: float) -> dict[str, Any]:
    return {"attack": attack, "attacker": attacker, "judge": judge, "accuracy": accuracy, "images": 10, "correct": 1}


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    return Training(monkeypatch)


def _diverge(run: Run) -> None:
    run.diverged.write_text('{"lr": 0.5}', encoding="utf-8")
    raise cli.InputError("the loss became infinite or NaN in epoch 1")


def _begin(out: Path, *words: str) -> list[str]:
    return ["--out", str(out), "--seeds", *(words or ("0,1,2",))]


def _read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0,1,2", (0, 1, 2)), ("0-3", (0, 1, 2, 3)), ("7", (7,)), ("3-3", (3,)), ("5, 0-1", (5, 0, 1)), ([4, 2], (4, 2))],
)  # fmt: skip
def test_seeds_are_lists_and_ranges(text: Any, expected: tuple[int, ...]) -> None:
    assert parse_seeds(text) == expected


@pytest.mark.parametrize("text", ["", "a", "1,", "1,1", "0-2,1", "4-0", "-1", "1.5", "0-99999999", "1-2-3", "²", []])
def test_what_names_no_seeds_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"^--seeds: expected .*, got "):
        parse_seeds(text)


def test_each_seed_has_a_run_of_its_own(training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    train.main([*_begin(out), "--lr", "0.01"])
    assert [(start.folder, start.resume) for start in training.started] == [
        (out / f"seed-{n}", False) for n in range(3)
    ]
    assert training.seeds == [0, 1, 2]
    assert all(start.config == TrainConfig(**vars(start.config) | {"lr": 0.01}) for start in training.started)
    output = capsys.readouterr().out
    assert f"seed 1, 2 of 3: {out / 'seed-1'}" in output
    assert f"all seeds together: {out / 'report.html'}" in output


def test_the_summary_is_mean_and_deviation(training: Training, tmp_path: Path) -> None:
    out = tmp_path / "set"
    train.main(_begin(out, "1,4,7"))
    found = _read(out)
    assert (found["seeds"], found["finished"], found["failed"]) == ([1, 4, 7], [1, 4, 7], {})
    clean = next(entry for entry in found["accuracy"] if (entry["attack"], entry["judge"]) == ("clean", "sample"))
    assert clean["values"] == {"1": 0.1, "4": 0.4, "7": 0.7}
    assert clean["mean"] == pytest.approx(0.4)
    assert clean["std"] == pytest.approx(math.sqrt(((0.3) ** 2 + 0 + (0.3) ** 2) / 2)), "n − 1"
    assert found["worst_case"][0]["mean"] == pytest.approx(0.04)
    loss = next(entry for entry in found["last_epoch"] if entry["measure"] == "loss")
    assert loss["values"] == {"1": 2.0, "4": 5.0, "7": 8.0}
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert re.search(r"\| clean +\| — +\| gate sample +\| +40\.0 \| +30\.0 \| +10\.0 \| +40\.0 \| +70\.0 \|", text)
    assert "expert 1" not in text
    assert "validation accuracy, gate mean" in text
    lines = (out / "summary.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "attack,attacker,judge,mean,std,seed 1,seed 4,seed 7"
    assert len(lines) == 1 + len(ENTRIES) + 1
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "40.0 % ± 30.0" in report


def test_the_deviation_is_the_statistics_module_s() -> None:
    assert spread({"a": 0.25, "b": 0.75, "c": 0.5})["std"] == statistics.stdev([0.25, 0.75, 0.5])
    assert spread({"a": 0.25}) == {"mean": 0.25, "std": None, "values": {"a": 0.25}}


def test_a_seed_that_diverges_does_not_stop_the_others(
    training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"
    training.ends[1] = _diverge
    line = error_line(capsys, train.main, _begin(out))
    assert "2 of 3 seeds are finished; not seed 1: the loss became infinite or NaN" in line
    assert training.seeds == [0, 1, 2]
    found = _read(out)
    assert (found["finished"], list(found["failed"])) == ([0, 2], ["1"])
    assert "Failed: seed 1" in (out / "report.html").read_text(encoding="utf-8")
    training.started.clear()
    line = error_line(capsys, train.main, ["--resume", str(out)])
    assert training.seeds == [], "it would diverge at the same place again"
    assert f"has diverged; python -m immunity_fast.train --resume {out / 'seed-1'} --lr 0.05 goes on with it" in line


def test_what_is_finished_is_left_and_what_was_stopped_goes_on(
    training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "set"

    def stop(_run: Run) -> None:
        raise interrupts.Terminated

    training.ends[1] = stop
    with pytest.raises(KeyboardInterrupt):
        train.main([*_begin(out), "--optimizer", "adamw"])
    assert f"interrupted; go on with: python -m immunity_fast.train --resume {out}\n" in capsys.readouterr().out
    assert _read(out)["finished"] == [0]
    training.started.clear()
    train.main(["--resume", str(out)])
    assert [(start.config.seed, start.resume) for start in training.started] == [(1, True), (2, False)]
    assert {start.config.optimizer for start in training.started} == {"adamw"}
    assert "seed 0, 1 of 3: finished" in capsys.readouterr().out
    assert _read(out)["finished"] == [0, 1, 2]
    training.started.clear()
    train.main(["--resume", str(out), "--seeds", "2-3"])
    assert training.seeds == [3]
    assert _read(out)["finished"] == [0, 1, 2, 3]


def test_a_set_keeps_its_settings(training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    train.main(_begin(out, "0"))
    line = error_line(capsys, train.main, ["--resume", str(out), "--lr", "0.5"])
    assert f"--lr 0.5: the runs in {out} were begun with --lr 0.05" in line
    assert f"--out {out}: exists already" in error_line(capsys, train.main, _begin(out))
    train.main(["--resume", str(out), "--device", "cpu"])
    (out / "seeds.json").write_text("{}", encoding="utf-8")
    line = error_line(capsys, train.main, ["--resume", str(out)])
    assert f"{out / 'seeds.json'}: expected the seeds and settings of a set of runs" in line


def test_what_cannot_begin_leaves_nothing(
    training: Training, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_start: Start) -> None:
        raise cli.InputError("there is no such file")

    monkeypatch.setattr(seeds, "fit_and_evaluate", refuse)
    assert error_line(capsys, train.main, _begin(tmp_path / "set")) == "error: there is no such file\n"
    assert list(tmp_path.iterdir()) == []
    assert training.started == []


@pytest.mark.parametrize(("text", "expected"), [("[2, 5]", [2, 5]), ("2-3", [2, 3]), ("7", [7])])
def test_seeds_may_stand_in_the_file(text: str, expected: list[int], training: Training, tmp_path: Path) -> None:
    pytest.importorskip("yaml", reason="the file is YAML")
    file = tmp_path / "c.yaml"
    file.write_text(f"lr: 1e-3\nseeds: {text}\n", encoding="utf-8")
    train.main(["--config", str(file), "--out", str(tmp_path / "set")])
    assert training.seeds == expected
    training.started.clear()
    assert isinstance(train.parse(["--config", str(file), "--seeds", "0", "--out", "none"]), SeedSet)
    assert not isinstance(train.parse(["--config", str(file), "--seed", "0", "--out", "none"]), SeedSet)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--seed", "3", "--seeds", "0,1"], "--seed: expected none beside --seeds 0,1, got 3"),
        (["--seeds", "x"], "--seeds: expected whole numbers and ranges"),
    ],
)
def test_seeds_that_make_no_sense_are_a_line(
    words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in error_line(capsys, train.main, [*words, "--out", str(tmp_path / "set")])


def test_one_run_has_no_seeds_to_go_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create(tmp_path / "run", TrainConfig())
    line = error_line(capsys, train.main, ["--resume", str(run.folder), "--seeds", "0,1"])
    assert f"--seeds: expected none with --resume {run.folder}, which holds one run" in line


def test_several_processes_are_refused(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train.main(_begin(tmp_path / "one", "0"))
    training.started.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    for arguments in (_begin(tmp_path / "set"), ["--resume", str(tmp_path / "one")]):
        with pytest.raises(ValueError, match=r"^--seeds: expected one process, got several of torchrun"):
            train.parse(arguments)
    assert training.started == []
    assert not (tmp_path / "set").exists()


def test_settings_of_a_set_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("yaml", reason="settings are shown as YAML")
    train.main([*_begin(tmp_path / "set"), "--print-config", "--epochs", "3"])
    assert "epochs: 3\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_unfinished_runs_are_no_part_of_a_summary(tmp_path: Path) -> None:
    Run.create(tmp_path / "seed-0", TrainConfig())
    found = summary(SeedSet(tmp_path, True, TrainConfig(), (0, 1)), {})
    assert found["finished"] == []
    assert found["accuracy"] == []


@pytest.mark.exhaustive  # two trainings and their evaluations
def test_a_seed_of_a_set_is_the_run_of_that_seed(data: Path, tmp_path: Path) -> None:
    arguments = options(data, epochs=1, attack_images=2, limit_train=16)
    train.main([*arguments, *_begin(tmp_path / "set", "3,4")])
    train.main([*arguments, "--seed", "4", "--out", str(tmp_path / "alone")])
    assert saved(tmp_path / "set" / "seed-4") == saved(tmp_path / "alone")
    assert all(seeds.is_finished(Run(tmp_path / "set" / f"seed-{seed}")) for seed in (3, 4))


@pytest.mark.parametrize(
    ("gate", "judge", "attacker", "says"),
    [
        ("switch", "sample", "sample", "one random permutation an image"),
        ("selection", "sample", "sample", "one random expert an image"),
        ("uniform", "mean", "mean", "the average of the experts"),
        (None, "output", "eot", "^an average over several of its outputs"),
    ],
)
def test_a_table_says_what_the_gate_of_its_runs_does(gate: str | None, judge: str, attacker: str, says: str) -> None:
    entry = {"attack": "pgd", "attacker": attacker, "judge": judge} | spread({"0": 0.5})
    found = {"finished": [0], "accuracy": [entry], "worst_case": [], "last_epoch": []}
    found |= {} if gate is None else {"gate": gate}
    assert re.search(says, seeds.tables(found)[0].rows[0][1])
