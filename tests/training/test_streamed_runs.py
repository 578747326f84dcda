"""Runs on streamed images: the bits of a run in memory, killed and resumed by any number of workers, and evaluated."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from immunity_fast import evaluate, train
from immunity_fast.data.streaming import Decoder
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests.photos import write_folder, write_shards
from tests.small_runs import error_line, interrupted, saved, trained

STEPS = 3  # an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"))


def _options(data: Path, **changes: Any) -> list[str]:
    settings = {
        "dataset": "folder",
        "data": data,
        "image-size": 12,
        "experts": 1,
        "batch-size": 8,
        "epochs": 2,
        "check-images": 4,
        "attack-images": 4,
        "checkpoint-every": 1,
        "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


def _written(folder: Path) -> dict[str, Any]:
    """All that a run has written of its training but for how its data are told from others."""
    found = saved(folder)
    return found | {"info": {name: value for name, value in found["info"].items() if name != "data"}}


@pytest.fixture(scope="module")
def resident(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "resident"
    trained([*_options(folder), "--out", str(out)])
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_a_streamed_run_has_the_bits_of_one_in_memory(
    workers: int, folder: Path, resident: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, run = trained([*_options(folder, stream="on", workers=workers), "--out", str(tmp_path / "run")])
    assert _written(run.folder) == _written(resident)
    said = capsys.readouterr().out
    assert f"51 images of 12×12 take 21.5 KiB decoded: streamed by {'2 workers' if workers else 'this process'}" in said
    assert re.search(r"images/s, \d+ % of the time waiting for images  [\d.]+ .iB of memory at most", said)
    for record in run.metrics():
        assert 0 <= record["images_waited_share"] <= 1
        assert record["memory_peak_bytes"] > record["workers_bytes"] >= workers
    assert state.dataset.reader is not None
    assert len(state.dataset.reader.pids()) == workers
    state.dataset.reader.close()


def test_shards_and_a_folder_of_the_same_images_train_alike(resident: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", label="txt")
    _, run = trained([*_options(shards, dataset="webdataset", stream="on", workers=1), "--out", str(tmp_path / "run")])
    assert _written(run.folder)["tensors"] == _written(resident)["tensors"]


@pytest.mark.parametrize(
    "steps",
    [pytest.param(1, marks=pytest.mark.exhaustive), 2, pytest.param(STEPS, marks=pytest.mark.exhaustive), STEPS + 2],
)
def test_a_killed_run_resumes_to_the_same_bits(steps: int, folder: Path, resident: Path, tmp_path: Path) -> None:
    """Killed behind any step, and gone on with by another number of workers, streamed or in memory."""
    out = tmp_path / "run"
    options = [*_options(folder, stream="on", workers=2), "--out", str(out)]
    interrupted((TrainingState, "advance"), steps + 1, options)
    changes = ["--stream", "off"] if steps == 2 else ["--workers", str(steps % 3)]
    trained(["--resume", str(out), *changes])
    assert _written(out) == _written(resident)


def test_an_interrupt_is_saved_behind_its_step(
    folder: Path, resident: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the whole group of processes, as a terminal sends it: the workers leave it to their parent."""
    out = tmp_path / "run"

    def advance(self: TrainingState, batch: Any, own: Any = TrainingState.advance) -> Any:
        if self.step == 2:
            assert self.dataset.reader is not None
            for pid in [os.getpid(), *self.dataset.reader.pids()]:
                os.kill(pid, signal.SIGINT)
        return own(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            trained([*_options(folder, stream="on", workers=2), "--out", str(out)])
    assert saved(out)["info"]["step"] == 2
    trained(["--resume", str(out), "--workers", "1"])
    assert _written(out) == _written(resident)


def test_evaluation_reads_streamed_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    trained([*_options(folder, stream="off", experts=2, epochs=1, check_images=0), "--out", str(out)])
    options = ["--stream", "on", "--workers", "2", "--attacks", "fgsm", "--attackers", "mean", "--device", "cpu"]
    evaluate.main([str(out), *options, "--limit", "2", "--masking-images", "0"])
    assert "streamed by 2 workers" in capsys.readouterr().out
    assert (out / "report.html").is_file()
    assert (out / "figures" / "heatmaps.png").is_file()


def test_a_worker_that_dies_is_one_line_that_says_how_to_go_on(
    folder: Path, resident: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def killed(self: Decoder, task: Any, images: Any, own: Any = Decoder.__call__) -> Any:
        if task.source == 1:  # validation
            os.kill(os.getpid(), signal.SIGKILL)
        return own(self, task, images)

    def broken(self: Decoder, source: int, index: int, own: Any = Decoder.read) -> Any:
        if source == 0:
            raise ValueError(f"{self.sources[0].name(index)}: expected an image, got none")
        return own(self, source, index)

    monkeypatch.setattr("immunity_fast.training.state.channel_statistics", lambda _: ([0.5] * 3, [0.25] * 3))
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "read", broken)
        options = [*_options(folder, stream="on", workers=1), "--out", str(out)]
        line = error_line(capsys, train.main, options)
    assert re.search(r"training stopped: .*\.png: expected an image, got none; go on with: .*--resume", line)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__call__", killed)
        trained(["--resume", str(out), "--workers", "1"])
    records = Run(out).metrics()
    assert "was killed by SIGKILL" in records[0]["val_not_measured"]["accuracy"]
    assert "val_accuracy_mean" not in records[0]


@pytest.mark.exhaustive
def test_a_run_that_is_really_killed_resumes_to_the_same_bits(folder: Path, resident: Path, tmp_path: Path) -> None:
    """By SIGKILL, in its second epoch, in a process that starts as a user's does; its workers end, too."""
    out = tmp_path / "run"
    program = (
        "import os, sys, signal\n"
        "from immunity_fast import train\n"
        "from immunity_fast.training.state import TrainingState\n"
        "own = TrainingState.advance\n"
        "def advance(self, batch):\n"
        "    if self.step == 5:\n"
        "        print(*self.dataset.reader.pids(), flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return own(self, batch)\n"
        "TrainingState.advance = advance\n"
        "train.main(sys.argv[1:])\n"
    )
    words = [*_options(folder, stream="on", workers=2), "--out", str(out)]
    ended = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    workers = [Path("/proc", pid) for pid in ended.stdout.splitlines()[-1].split()]
    until = time.monotonic() + 20
    while any(worker.exists() for worker in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(workers) == 2
    assert not any(worker.exists() for worker in workers)
    trained(["--resume", str(out), "--workers", "1"])
    assert _written(out) == _written(resident)
