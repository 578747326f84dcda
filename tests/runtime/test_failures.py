"""Exceptions in a line; too little memory, found out before and after it is asked for."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from immunity_fast import ensemble, evaluate, reproduce, train
from immunity_fast.data.datasets import load
from immunity_fast.evaluation.runner import Evaluation
from immunity_fast.experts import create
from immunity_fast.reproduction import making
from immunity_fast.runtime import memory
from immunity_fast.runtime.failures import in_units, one_line, out_of_memory, traceback_note
from immunity_fast.training import ensemble as training_ensemble
from immunity_fast.training import preparation
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.step import TrainStep
from tests.places import REPOSITORY
from tests.small_runs import error_line, options, trained, write_data

CPU = torch.device("cpu")
CUDA = (
    "CUDA out of memory. Tried to allocate 20.51 GiB. GPU 0 has a total capacity of 79.11 GiB of which 3.30 GiB is "
    "free.\nOf the allocated memory 70 GiB is allocated by PyTorch, and 1 GiB is reserved by PyTorch but unallocated."
)


def _raised(function: Callable[[], Any]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_raised(lambda: torch.empty(10**15, dtype=torch.uint8)), "out of memory (tried to allocate 909.5 TiB)"),
        (_raised(lambda: np.empty(10**15, np.uint8)), "out of memory (tried to allocate 909. TiB)"),
        (torch.OutOfMemoryError(CUDA), "out of memory (tried to allocate 20.51 GiB)"),
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (RuntimeError("could not create a primitive"), "out of memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out of memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("out of memory is what this is not"), None),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, expected: str | None) -> None:
    assert out_of_memory(error) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
        (KeyError("name"), "KeyError: 'name'"),
        (OSError(errno.ENOSPC, "No space left on device", "a/file"), "[Errno 28] No space left on device: 'a/file'"),
        (torch.OutOfMemoryError(CUDA), "out of memory (tried to allocate 20.51 GiB)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_s_line_is_its_own_words(error: Exception, expected: str) -> None:
    assert one_line(error) == expected


def test_a_long_error_is_shortened() -> None:
    line = one_line(ValueError("begin " + 10**6 * "x" + " end"))
    assert len(line) <= 300
    assert line.startswith("begin ")
    assert line.endswith(" end")


def test_a_defect_s_traceback_is_kept_and_a_refusal_s_is_not(tmp_path: Path) -> None:
    assert traceback_note(ValueError("plain"), tmp_path) == ""
    assert traceback_note(MemoryError(), tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path / "errors.log") in traceback_note(_raised(lambda: {}["a"]), tmp_path)
    assert "KeyError: 'a'" in (tmp_path / "errors.log").read_text(encoding="utf-8")
    assert traceback_note(KeyError(), tmp_path / "none") == "", "a folder that is not there stops nothing"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**60, "1,048,576.0 TiB")],
)
def test_bytes_have_units(size: float, text: str) -> None:
    assert in_units(size) == text


# What cannot fit


def test_a_process_has_the_memory_that_it_may_have() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (40 << 30, 40 << 30))\n"
        "import torch\nfrom immunity_fast.runtime import memory\nprint(memory.total(torch.device('cpu')))"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**28 < int(ended.stdout) <= min(40 << 30, machine)


def test_what_fits_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total", lambda device: 1000)
    memory.check_fits(1000, CPU, "this", "that")
    with pytest.raises(ValueError, match=r"^this would take at least 1001 bytes .* 1000 bytes \(cpu\): try that$"):
        memory.check_fits(1001, CPU, "this", "that")
    monkeypatch.setattr(memory, "total", lambda device: None)
    memory.check_fits(10**30, CPU, "this", "that")


@pytest.mark.parametrize("experts", [1, 2])
def test_the_estimate_of_a_step_s_memory_is_one_from_below(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients and momentum exactly; of activations less than the network holds."""
    found: list[float] = []
    monkeypatch.setattr(preparation, "check_fits", lambda size, *_: found.append(size))
    config = TrainConfig(experts=experts, batch_size=7)
    preparation.check_trainable(config, (16, 16), 3, 40, CPU)
    expert = create("resnet8", 3)
    outputs: list[int] = []
    for module in expert.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _m, _i, output: outputs.append(output.numel() * output.element_size()))
    expert(torch.rand(7, 3, 16, 16))
    state = 3 * sum(parameter.numel() * parameter.element_size() for parameter in expert.parameters())
    assert found == [experts * (state + sum(outputs) / 4)]


@pytest.mark.parametrize(
    "changes", [{"experts": 10**6}, {"experts": 2**62}, {"experts": 10**6, "arch": "googlenet"}], ids=str
)
def test_more_experts_than_memory_are_refused_before_one_is_made(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "TrainingState", None)
    arguments = [*options(write_data(tmp_path / "data.npz"), **changes), "--out", str(tmp_path / "run")]
    line = error_line(capsys, train.main, arguments)
    assert f"{changes['experts']} × " in line
    assert "fewer --experts" in line
    assert not (tmp_path / "run").exists()


def _photos(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(np.full((12, 12, 3), index, np.uint8)).save(folder / name / f"{index}.png")
    return folder


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_images_beyond_memory_are_refused_before_one_is_made(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = _photos(tmp_path / "photos")
    monkeypatch.setattr("immunity_fast.data.streaming.read_image", None)
    if command == "train":
        arguments = ["--dataset", "folder", "--data", str(photos), "--image-size", "100000", "--device", "cpu"]
        line = error_line(capsys, train.main, [*arguments, "--out", str(tmp_path / "run")])
        assert "100000×100000" in line
        assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "total", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"^8 images of 1000×1000 pixels would take at least 22.9 MiB"):
        load("folder", photos, image_size=1000, stream="off")


# What has run out of memory


def test_commands_say_what_was_tried_and_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data.npz")
    _, run = trained([*options(data, experts=1, epochs=1), "--out", str(tmp_path / "run")])

    def too_much(*_: Any, **__: Any) -> None:
        torch.empty(10**15, dtype=torch.uint8)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", too_much)
        line = error_line(capsys, train.main, [*options(data), "--out", str(tmp_path / "other")])
    assert "909.5 TiB" in line
    assert "--batch-size" in line
    assert "--experts" in line
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "run", too_much)
        line = error_line(capsys, evaluate.main, [str(run.folder), "--attacks", "fgsm"])
    assert "909.5 TiB" in line
    assert "--batch-size" not in line, "evaluate has no such option"
    with monkeypatch.context() as patch:
        patch.setattr(training_ensemble, "load_model", too_much)
        line = error_line(capsys, ensemble.main, [str(run.folder), str(run.folder), "--out", str(tmp_path / "joined")])
    assert "909.5 TiB" in line
    with monkeypatch.context() as patch:
        patch.setattr(making, "Queue", too_much)
        line = error_line(capsys, reproduce.main, ["table1", "--out", str(tmp_path / "tables")])
    assert "909.5 TiB" in line
