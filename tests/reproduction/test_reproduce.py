"""The command that reproduces the paper: what it writes, and what it does once.

With networks and attacks smaller still than those of its smallest scale, which is what `-m exhaustive` makes.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from immunity_fast import reproduce
from immunity_fast.attacks.descent import Attack
from immunity_fast.data import datasets
from immunity_fast.data.readers import Parts, read_digits
from immunity_fast.evaluation import runner
from immunity_fast.reproduction.experiments import BASELINES, SCALES, Experiments
from immunity_fast.training import session
from immunity_fast.training.preparation import Start
from tests.small_runs import error_line

QUICK = ["--scale", "smoke", "--device", "cpu"]
TABLES = ("table1", "table2", "table3")


@pytest.fixture(scope="module", params=["tiny", pytest.param("smoke", marks=pytest.mark.exhaustive)])
def cells(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of the baselines; what the scale "smoke" is meanwhile."""
    smoke = SCALES["smoke"]
    assert smoke.cells is not None
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tiny":
            made = runner.gradient_attack

            def shorter(name: str, plan: runner.Plan) -> Attack:
                attack = made(name, plan)
                return dataclasses.replace(attack, steps=min(attack.steps, 1))

            @cache
            def smaller(channels: int) -> Parts:
                parts = read_digits(channels)
                train, test = (
                    (images[..., ::2, ::2].contiguous(), labels) for images, labels in (parts.train, parts.test)
                )
                return parts._replace(train=train, test=test)

            patch.setattr(runner, "gradient_attack", shorter)
            patch.setattr(datasets, "read_digits", smaller)
            smoke = dataclasses.replace(
                smoke,
                base=dataclasses.replace(smoke.base, limit_train=10, batch_size=10, check_images=0, attack_steps=1),
                cells=(5, 2),
                limit=1,
                betas=(0.0,),
                gammas=(0.0,),
                autoattack={"autoattack_steps": 1, "queries": 1},
            )
            patch.setitem(SCALES, "smoke", smoke)
            for name in ("RobNet", "AdvRush"):
                patch.delitem(BASELINES, name)
        assert smoke.cells is not None
        yield smoke.cells[0]


@pytest.fixture(scope="module")
def folder(cells: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, once."""
    out = tmp_path_factory.mktemp("reproduction") / "out"
    reproduce.main(["all", *QUICK, "--out", str(out)])
    return out


@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_written_in_every_form(folder: Path, table: str) -> None:
    record = json.loads((folder / f"{table}.json").read_text(encoding="utf-8"))
    markdown = (folder / f"{table}.md").read_text(encoding="utf-8")
    html = (folder / f"{table}.html").read_text(encoding="utf-8")
    with (folder / f"{table}.csv").open(encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert (folder / f"{table}.png").read_bytes().startswith(b"\x89PNG")
    assert not record["failed"]
    for written in record["tables"]:
        assert written["columns"] in lines
        for row in written["rows"]:
            assert row in lines
            assert "not done" not in row
            assert all(cell in markdown and cell in html for cell in row)
    for run in record["runs"].values():
        assert run["device"].startswith("CPU")
        assert run["training_seconds"] > 0
        assert run["attack_seconds"] > 0
        assert run["settings"]["dataset"] == "digits"
        assert all("immunity_fast" in command for command in run["commands"])
    assert "immunity_fast.reproduce all --scale smoke" in markdown
    assert "training: " in markdown


def test_the_rows_are_those_of_the_paper(folder: Path, cells: int) -> None:
    rows = {table: _rows(folder, table) for table in TABLES}
    assert [row[:2] for row in rows["table1"]] == [["ResNet8", "trained independently"], ["ResNet8", "Immunity"]]
    networks = [f"{name}, {cells} cells" for name in BASELINES] + ["Immunity, gate sample", "Immunity, gate mean"]
    assert [row[1:3] for row in rows["table2"]] == [[t, n] for t in ("standard", "PGD") for n in networks]
    expected = ["MoE", "MoE + MI", "MoE + PS", "full", "full, detached weights"]
    assert [row[0] for row in rows["table3"]] == expected
    captions = [t["caption"] for t in json.loads((folder / "table3.json").read_text(encoding="utf-8"))["tables"]]
    assert captions == ["Table 3", "What answers, by what the attacker knows", "Sweep of β", "Sweep of γ"]


def test_figure_2_is_a_figure_and_a_page(folder: Path) -> None:
    assert (folder / "figure2.pdf").read_bytes().startswith(b"%PDF")
    assert (folder / "figure2.png").read_bytes().startswith(b"\x89PNG")
    html = (folder / "figure2.html").read_text(encoding="utf-8")
    assert "trained independently" in html
    assert "Immunity" in html
    rows = _rows(folder, "figure2")
    assert len(rows) == 2 * 2 * 3, "two galleries of two experts, three images"
    assert "python -m immunity_fast.ensemble" in (folder / "figure2.md").read_text(encoding="utf-8")


def test_the_same_command_trains_nothing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(_start: Start) -> None:
        raise AssertionError("trained again")

    before = {file: file.read_bytes() for file in folder.glob("table*.json")}
    monkeypatch.setattr(session, "fit", fit)
    reproduce.main(["all", *QUICK, "--out", str(folder)])
    after = {file: json.loads(file.read_bytes()) for file in before}
    assert after == {file: json.loads(content) for file, content in before.items()}


def test_the_table_of_what_is_done_so_far(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "fit", None)
    rows = _rows(folder, "table3")
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    job = Experiments(SCALES["smoke"], {}).table3()[0].jobs[0]
    shutil.rmtree(kept / "runs" / job.name)
    reproduce.main(["table3", *QUICK, "--done-only", "--out", str(kept)])
    found = _rows(kept, "table3")
    assert set(found[0][1:]) == {"not done"}
    assert found[1:] == rows[1:]
    assert "runs are done" in capsys.readouterr().out
    assert not (kept / "runs" / job.name).exists()
    reproduce.main(["all", *QUICK, "--done-only", "--out", str(tmp_path / "nothing")])
    assert "table1: 0 of 2 runs are done" in capsys.readouterr().out


@pytest.mark.exhaustive  # tests/reproduction/test_jobs.py has a run that fails
@pytest.mark.usefixtures("cells")
def test_a_failed_run_is_reported_and_the_table_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = session.fit

    def sometimes(start: Start) -> Any:
        if start.config.detach_weights:
            raise MemoryError("no memory left")
        return fit(start)

    monkeypatch.setattr(session, "fit", sometimes)
    arguments = ["table3", *QUICK, "--out", str(tmp_path / "out")]
    line = error_line(capsys, reproduce.main, arguments)
    assert "1 failed, the same command" in line
    rows = {row[0]: row[1:] for row in _rows(tmp_path / "out", "table3")}
    assert set(rows["full, detached weights"]) == {"not done"}
    assert "not done" not in rows["full"]
    for form in ("md", "html"):
        assert "no memory left" in (tmp_path / "out" / f"table3.{form}").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["table3", "--preset", "fast"], "--preset"),
        (["table3", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["table3", "--seeds", str(10**30)], "--seeds: expected at most 1000, got 1"),
        (["table2", "--seed", str(2**63 - 1), "--seeds", "2"], "--seed: expected 0 to 2⁶³ − 1"),
        (["figure2", "--seed", str(2**63 - 1)], "--seed: expected 0 to 2⁶³ − 1"),
        (["table3", "--epochs", str(2**63)], "--epochs: expected less than 2⁶³"),
        (["table3", "--experts", "1"], "--experts: expected at least 2, got 1"),
        (["table3", "--epochs", "0"], "--epochs: expected at least 1, got 0"),
        (["table1", "--dataset", "npz"], "--data: missing"),
        (["table3", "--device", "nonsense"], "--device nonsense"),
        (["table3", "--dataset", "npz", "--data", "none.npz"], "none.npz"),
        (["table3", "--arch", "none.json"], "--arch none.json"),
        (["table3", "--arch", "resnet9"], "--arch resnet9"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    line = error_line(capsys, reproduce.main, [*arguments, "--out", str(tmp_path / "out")])
    assert expected in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_table_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "table4" in error_line(capsys, reproduce.main, ["table4"], code=2)


def _rows(folder: Path, table: str) -> list[list[str]]:
    rows: list[list[str]] = json.loads((folder / f"{table}.json").read_text(encoding="utf-8"))["tables"][0]["rows"]
    return rows
