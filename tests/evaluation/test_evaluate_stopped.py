"""An evaluation that is killed or stopped by hand, and how it says in a log where it is."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from immunity_fast import evaluate
from immunity_fast.evaluation.runner import Evaluation
from immunity_fast.runtime import cli
from immunity_fast.training.run_folder import Run
from tests import evaluated
from tests.evaluated import FEW, accuracy_of, network_options, results_of
from tests.places import REPOSITORY

finished = evaluated.finished
networks = evaluated.networks
plain = evaluated.plain
run = evaluated.run


# Killed


@pytest.mark.exhaustive  # a training is killed in `make test`, too; here what was not written yet is interrupted
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded PyTorch")
def test_killed_with_sigkill_at_random_moments_it_ends_the_same(finished: Path, tmp_path: Path) -> None:
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.killing_evaluations", str(finished), str(tmp_path), "0"],
        cwd=REPOSITORY,
        env=alone,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    kills = json.loads(ended.stdout.splitlines()[-1])
    assert [kill["killed"] for kill in kills] == [True] * len(kills)
    done = [kill["pieces"] for kill in kills]
    assert done == sorted(done)
    assert done[-1] > 0
    ledgers = {name: (tmp_path / name / "evaluation.jsonl").read_text().splitlines() for name in ("whole", "killed")}
    assert done[-1] < len(ledgers["whole"]) == 19
    pieces = {name: {piece.pop("key"): piece for piece in map(json.loads, lines)} for name, lines in ledgers.items()}
    for each in pieces.values():
        for piece in each.values():
            piece.pop("seconds")
    assert pieces["killed"] == pieces["whole"]
    # Nothing that was written down is computed again: what was in vain is at most a piece a kill.
    assert len(ledgers["killed"]) == 19
    assert sum(kill["begun"] for kill in kills) <= done[-1] + len(kills)
    found = {name: results_of(tmp_path / name) for name in ("whole", "killed")}
    assert accuracy_of(tmp_path / "killed") == accuracy_of(tmp_path / "whole")
    assert all(found["killed"][name] == found["whole"][name] for name in found["whole"] if name != "accuracy")


# Stopped by hand


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_says_how_to_go_on_and_keeps_what_is_finished(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    plain: None,
    sent: signal.Signals,
    code: int,
) -> None:
    pieces, original = list[int](), Evaluation._piece

    def piece(self: Evaluation, *arguments: Any) -> Any:
        pieces.append(1)
        if len(pieces) == 3:
            os.kill(os.getpid(), sent)
            time.sleep(5)
        return original(self, *arguments)

    monkeypatch.setattr(Evaluation, "_piece", piece)
    folder, before = tmp_path / "a folder", signal.getsignal(signal.SIGTERM)
    arguments = [str(run.folder), *FEW, "--out", str(folder)]
    with pytest.raises(SystemExit) as end:
        cli.run_command(lambda: evaluate.main([*arguments, "--again"]))
    assert end.value.code == code
    told = capsys.readouterr()
    assert told.err == ""
    command = f"python -m immunity_fast.evaluate {shlex.join(arguments)}"
    assert told.out.endswith(f"interrupted; go on with: {command}\n")
    assert signal.getsignal(signal.SIGTERM) is before
    kept = (folder / "evaluation.jsonl").read_bytes()
    assert kept.count(b"\n") == 2
    evaluate.main(shlex.split(command)[3:])
    assert (folder / "evaluation.jsonl").read_bytes().startswith(kept)
    whole = tmp_path / "whole"
    evaluate.main([str(run.folder), *FEW, "--out", str(whole)])
    assert accuracy_of(folder) == accuracy_of(whole)


# In a log


def test_a_log_that_is_no_terminal_has_a_line_now_and_then(
    networks: ModuleType,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also within a piece, which may take long."""
    original, inside = Evaluation._piece, list[str]()

    def piece(self: Evaluation, row: Any, *arguments: Any) -> Any:
        if row.attack:
            time.sleep(0.5)
            inside.append(capsys.readouterr().out)
        return original(self, row, *arguments)

    monkeypatch.setattr(Evaluation, "_piece", piece)
    monkeypatch.setattr(cli, "STATUS_SECONDS", 0.1)
    threads = threading.active_count()
    evaluate.main(network_options(networks, "instance", data, tmp_path))
    assert inside[0].count("evaluation: 12 of 48 images after 0 min\n") >= 2
    assert threading.active_count() == threads
    monkeypatch.setattr(cli, "STATUS_SECONDS", 60)
    evaluate.main([*network_options(networks, "instance", data, tmp_path), "--again"])
    assert "evaluation:" not in capsys.readouterr().out
