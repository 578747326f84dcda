"""Ctrl-C and SIGTERM: what is kept, what is said, and the status; and environments that are not for this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from immunity_fast import ensemble, evaluate, reproduce, train
from immunity_fast.evaluation.runner import Evaluation
from immunity_fast.runtime import cli, interrupts
from immunity_fast.training import ensemble as training_ensemble
from immunity_fast.training import loop, preparation
from immunity_fast.training import trainer as training_trainer
from immunity_fast.training.checkpoint import load_checkpoint
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests import grids
from tests.places import REPOSITORY
from tests.processes import launch
from tests.small_runs import error_line, options, saved, trained

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def _status(main: Callable[[list[str]], None], arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as ended:
        cli.run_command(lambda: main(arguments))
    return ended.value.code


def _signalling(number: int, call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in whose call of that number, from 1, this process gets a signal."""
    calls = 0

    def called(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **keywords)

    return called


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_training_stops_after_a_step_and_goes_on_bit_for_bit(
    number: signal.Signals,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained([*options(data), "--out", str(tmp_path / "whole")])
    run = Run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "advance", _signalling(number, 8, TrainingState.advance))
        assert _status(train.main, [*options(data), "--out", str(run.folder)]) == STATUS[number]
    output, error = capfd.readouterr()
    assert error == "stopping when this step is done and saved; again: at once\n"
    assert output.endswith(f"interrupted; its checkpoint is of step 8 of 10; go on with: {run.resume_command}\n")
    assert load_checkpoint(run.checkpoint)[1]["step"] == 8
    trained(["--resume", str(run.folder)])
    assert saved(run.folder) == saved(tmp_path / "whole")


def test_training_stopped_while_it_checks_keeps_the_epoch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "validate", _signalling(signal.SIGTERM, 1, loop.validate))
    assert _status(train.main, [*options(data), "--out", str(tmp_path / "run")]) == 143
    run = Run(tmp_path / "run")
    assert load_checkpoint(run.checkpoint)[1]["epoch"] == 1
    assert len(run.metrics()) == 1


def test_a_second_signal_ends_it_and_names_the_last_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = _signalling(signal.SIGTERM, 4, _signalling(signal.SIGTERM, 4, TrainingState.advance))
    monkeypatch.setattr(TrainingState, "advance", twice)
    arguments = [*options(data, checkpoint_every=2), "--out", str(tmp_path / "run")]
    assert _status(train.main, arguments) == 143
    assert "its checkpoint is of step 2 of 10; go on with: " in capsys.readouterr().out
    assert load_checkpoint(Run(tmp_path / "run").checkpoint)[1]["step"] == 2


def test_before_there_is_a_run_nothing_can_go_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "load", _signalling(signal.SIGINT, 1, preparation.load))
    assert _status(train.main, [*options(data), "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().out == "interrupted, before anything was written\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("where", "name"), [(train, "parse"), (cli, "pick_device")], ids=["parse", "device"])
def test_before_anything_is_known_an_interrupt_is_a_line(
    where: Any,
    name: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, name, _signalling(signal.SIGTERM, 1, getattr(where, name)))
    assert _status(train.main, [*options(data), "--out", str(tmp_path / "run")]) == 143
    assert capsys.readouterr().out.startswith("interrupted, before anything was ")


def test_after_training_evaluating_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evaluation, "run", _signalling(signal.SIGINT, 1, Evaluation.run))
    run = Run(tmp_path / "run")
    assert _status(train.main, [*options(data, epochs=1), "--out", str(run.folder)]) == 130
    assert f"training has ended; go on with: {run.resume_command}\n" in capsys.readouterr().out


def test_the_other_commands_say_how_to_go_on_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for seed in (1, 2):
        _, run = trained([*options(data, experts=1, epochs=1, seed=seed), "--out", str(tmp_path / f"{seed}")])
        runs.append(str(run.folder))
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "run", _signalling(signal.SIGTERM, 1, Evaluation.run))
        assert _status(evaluate.main, [runs[0], "--attacks", "fgsm"]) == 143
    go_on = f"interrupted; go on with: python -m immunity_fast.evaluate {runs[0]} --attacks fgsm\n"
    assert capsys.readouterr().out.endswith(go_on)
    joined = tmp_path / "joined"
    with monkeypatch.context() as patch:
        patch.setattr(
            training_ensemble, "save_checkpoint", _signalling(signal.SIGINT, 1, training_ensemble.save_checkpoint)
        )
        assert _status(ensemble.main, [*runs, "--out", str(joined)]) == 130
    go_on = f"interrupted; go on with: python -m immunity_fast.ensemble {' '.join(runs)} --out {joined}\n"
    assert capsys.readouterr().out == go_on
    assert not joined.exists(), "the same command can be given again"
    ensemble.main([*runs, "--out", str(joined)])
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(training_trainer, "train", _signalling(signal.SIGINT, 1, training_trainer.train))
        assert _status(reproduce.main, ["table1", "--device", "cpu", "--out", str(tmp_path / "tables")]) == 130
    told = [line for line in capsys.readouterr().out.splitlines() if "interrupted" in line]
    assert told == [
        f"interrupted; go on with: python -m immunity_fast.reproduce table1 --device cpu --out {tmp_path / 'tables'}"
    ]


def test_an_ignored_signal_stays_ignored(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup begins a process
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    with interrupts.raised(), interrupts.deferred() as asked:
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
    assert asked == []


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    for handled in (interrupts.raised, interrupts.deferred):
        with handled():
            assert [signal.getsignal(number) for number in interrupts.SIGNALS] != before
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


@pytest.mark.parametrize("number", STATUS, ids=lambda number: number.name)
def test_an_interrupt_while_importing_is_a_line(number: signal.Signals, tmp_path: Path) -> None:
    """Torch's import takes most of it: here a stand-in, in whose import Ctrl-C is pressed."""
    (tmp_path / "torch.py").write_text(f"import os, time\nos.kill(os.getpid(), {number:d})\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    for command in (
        "train",
        "evaluate run",
        "reproduce all",
        "ensemble one two --out both",
    ):  # complete: a line refuses others
        ended = subprocess.run(
            [sys.executable, "-m", *f"immunity_fast.{command}".split()],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (STATUS[number], "", "interrupted\n")


# Environments


@pytest.mark.parametrize(
    "backend",
    grids.sampled(
        ["module://matplotlib_inline.backend_inline", "module://none", "nonsense"],
        ordinary=lambda backend: backend == "module://none",
    ),
)
def test_a_missing_backend_of_matplotlib_s_does_not_matter(backend: str, tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path\n"
        "from immunity_fast.runtime import cli; from immunity_fast.reporting import curves\n"
        "curves.training_curves([{'epoch': 1, 'loss': 1.0}], Path(sys.argv[1]))"
    )
    file = tmp_path / "figure.png"
    subprocess.run(
        [sys.executable, "-c", program, str(file)], cwd=REPOSITORY, env=os.environ | {"MPLBACKEND": backend}, check=True
    )
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "no RANK, MASTER_ADDR, MASTER_PORT: start the processes with torchrun"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE in the environment: expected a number of processes, got two"),
        ({"WORLD_SIZE": "0"}, "a number of processes, got 0"),
        ({"WORLD_SIZE": "-1"}, "a number of processes, got -1"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
            "expected 0 to 1, got 2",
        ),
        ({"WORLD_SIZE": "2", "RANK": "", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}, "no RANK:"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "1 to 65535, got 99999"),
        pytest.param(
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29500"},
            "cannot find each other at no.such.host.invalid:29500",
            marks=pytest.mark.exhaustive,  # it is waited for
        ),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_several_processes_that_are_not_torchrun_s_are_named(
    environment: dict[str, str],
    expected: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("immunity_fast.runtime.distributed.MEETING", timedelta(seconds=2))
    line = error_line(capsys, train.main, [*options(data), "--out", str(tmp_path / "run")])
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_an_empty_number_of_processes_is_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert trained([*options(data, epochs=1), "--out", str(tmp_path / "run")])[0].epoch == 1


@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_hears_what_was_wrong_from_the_first_process(
    rank: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert _status(train.main, ["--lr", "0", "--out", str(tmp_path / "run")]) == 1
    line = "error: --lr: expected a finite number above 0, got 0.0"
    assert capsys.readouterr().err == (f"{line}\n" if rank == "0" else "")
    written = json.loads((tmp_path / "error.json").read_text(encoding="utf-8"))
    assert written["message"]["message"] == written["message"]["extraInfo"]["py_callstack"] == line


LEFT = """
import sys, torch
from immunity_fast.runtime import cli, distributed
def main():
    with distributed.processes(torch.device("cpu")):
        if distributed.rank() == 0:
            raise cli.InputError("the first is at fault")
        torch.distributed.barrier()
try:
    cli.run_command(main)
except SystemExit as end:
    sys.exit(0 if end.code == 1 else 2)
"""


def test_a_process_that_is_left_behind_says_so_in_a_line() -> None:
    lines = sorted(line for line in launch("-c", LEFT).splitlines() if "Warning" not in line)
    assert lines == ["error: process 1 has lost the others, one of which has ended", "error: the first is at fault"]
