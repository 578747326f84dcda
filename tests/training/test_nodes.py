"""Two machines: torchrun agents of different ranks in folders of their own, of which the first alone has the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from immunity_fast import train
from immunity_fast.training.checkpoint import load_checkpoint
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests.nodes import STOPPED_AT, ended, smooth_options, start_nodes
from tests.small_runs import STEPS, interrupted, options, trained


class Nodes(NamedTuple):
    """What two machines' processes found, and printed."""

    folders: list[Path]
    found: list[dict[str, Any]]
    printed: list[str]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Nodes:
    out = tmp_path_factory.mktemp("nodes")
    folders = [out / "first", out / "second"]
    for folder in folders:
        folder.mkdir()
    statuses, printed = ended(start_nodes(folders, "tests.nodes", str(out), str(data)))
    assert statuses == [0, 0], "\n".join(printed)
    return Nodes(
        folders, [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)], printed
    )


@pytest.mark.slow
def test_a_signal_on_one_machine_stops_both_saved(nodes: Nodes) -> None:
    assert [found["stopped"] for found in nodes.found] == [143, 143]
    assert "interrupted; its checkpoint is of step" in nodes.printed[0]
    assert "interrupted" not in nodes.printed[1]


def test_the_run_of_two_machines_ends_as_that_of_one_process(nodes: Nodes, data: Path, tmp_path: Path) -> None:
    """It was stopped in between, and the second machine does not see the run's folder."""
    together = Run(nodes.folders[0] / "runs" / "several")
    alone = trained([*smooth_options(data), "--out", str(tmp_path / "alone")])[1]
    found, info = load_checkpoint(together.checkpoint)
    expected, _ = load_checkpoint(alone.checkpoint)
    assert info["step"] == STEPS > STOPPED_AT
    for name in expected:
        if not name.startswith("random/"):
            difference = float((found[name].double() - expected[name].double()).abs().max())
            assert difference <= 1e-4 * float(expected[name].double().abs().max()), name  # as far as float32 is exact
    for record, wanted in zip(together.metrics(), alone.metrics(), strict=True):
        assert record["loss"] == pytest.approx(wanted["loss"], rel=1e-5)


def test_only_the_first_machine_writes_and_speaks(nodes: Nodes) -> None:
    assert not (nodes.folders[1] / "runs").exists()
    assert "going on after epoch 1, step" in nodes.printed[0]
    assert "cpu × 2" in nodes.printed[0]
    assert "epoch" not in nodes.printed[1]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("other data", "--data: expected the same images and labels of npz in all processes, got others (process 0"),
        ("no data", "first.npz"),
        ("shards", "the run's folder, which has to be on a file system that all machines share"),
        ("wrong option", "--lr: expected a finite number above 0, got 0.0"),
    ],
)
def test_what_one_machine_refuses_both_do_in_a_line(case: str, said: str, nodes: Nodes) -> None:
    for found in nodes.found:
        assert said in found[case]
        assert "\n" not in found[case]
    if case in ("no data", "shards"):
        assert "process 1 on " in nodes.found[0][case]
    assert case == "shards" or not (nodes.folders[0] / "runs" / case.split()[0]).exists()


def test_what_torchrun_starts_again_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*options(data), "--out", str(tmp_path / "run")]
    interrupted((TrainingState, "advance"), 7, arguments)
    with pytest.raises(FileExistsError, match="exists already"):
        train.parse(arguments)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train.parse(arguments).resume
    with pytest.raises(FileExistsError, match="exists already"):
        train.parse([*arguments, "--lr", "0.3"])
    assert trained(arguments)[0].epoch == 2
