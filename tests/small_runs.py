"""Runs that take a second: a tiny data set, the options that go with it, and what of a run can be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from immunity_fast import train
from immunity_fast.data.datasets import ImageDataset, Split
from immunity_fast.runtime import cli
from immunity_fast.training import Trainer
from immunity_fast.training.checkpoint import load_checkpoint
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState

CPU = torch.device("cpu")
CLASSES = 3
STEPS = 10  # of a run with `options`: 5 an epoch, 2 epochs
TIMINGS = (
    "images_per_second",
    "seconds",
    "images_waited_share",
    "memory_peak_bytes",
    "workers_bytes",
)
CONFIG = TrainConfig(experts=2, batch_size=4, epochs=1, check_images=0)  # with `dataset`


def arrays(*, seed: int = 0, size: int = 12, train: int = 40, validation: int = 14, test: int = 30) -> dict[str, Any]:
    """A data set in MedMNIST's layout: noise, in which one colour, the class, is a little brighter."""
    random = np.random.default_rng(seed)
    made = {}
    for part, count in (("train", train), ("val", validation), ("test", test)):
        labels = random.permutation(np.arange(count) % CLASSES)
        images = random.integers(0, 200, (count, size, size, 3), dtype=np.uint8)
        images[np.arange(count), :, :, labels] += 50
        made |= {f"{part}_images": images, f"{part}_labels": labels}
    return made


def write_data(file: Path, **changes: Any) -> Path:
    """`arrays` as an .npz file, some of them exchanged."""
    np.savez(file, **arrays() | changes)
    return file


def options(data: Path, **changes: Any) -> list[str]:
    """Options of a run of 2 epochs of 5 steps each, on a CPU."""
    settings = {
        "dataset": "npz",
        "data": data,
        "experts": 2,
        "beta": 0.5,
        "gamma": 1e-4,
        "batch-size": 8,
        "epochs": 2,
        "check-images": 0,
        "attack-images": 6,
        "device": "cpu",
    }
    changed = settings | {name.replace("_", "-"): value for name, value in changes.items()}
    return [str(part) for name, value in changed.items() for part in (f"--{name}", value)]


def trained(arguments: list[str]) -> tuple[TrainingState, Run]:
    """What the command `train` does, but for the evaluation at its end."""
    folder, resume, config = train.parse(arguments)
    trainer = Trainer(config, out=folder, progress=True)
    trainer.fit(resume=resume)
    assert trainer.state is not None
    assert trainer.run is not None
    return trainer.state, trainer.run


class Killed(BaseException):
    """The end of the process, as far as one process can stand in for another."""


def counted(function: Callable[..., Any], count: int, error: BaseException, *, after: bool) -> Callable[..., Any]:
    """`function`, whose call number `count`, from 1, raises `error`, before or after it has done its work."""
    calls = 0

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            raise error
        result = function(*arguments, **keywords)
        if calls == count:
            raise error
        return result

    return wrapped


def interrupted(where: tuple[Any, str], count: int, arguments: list[str], *, after: bool = False) -> None:
    """Train until the `count`-th call of a function, and be killed there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*where, counted(getattr(*where), count, Killed(), after=after))
        with pytest.raises(Killed):
            trained(arguments)


def half_trained(data: Path, folder: Path) -> Path:
    """A run that is killed in its second epoch, after step 7; its folder."""
    interrupted((TrainingState, "advance"), 8, [*options(data, checkpoint_every=1), "--out", str(folder)])
    return folder


def go_on(folder: Path, arguments: list[str]) -> list[str]:
    """The command line that a user gives next: the same one where the run folder is not there yet."""
    return ["--resume", str(folder)] if folder.exists() else [*arguments, "--out", str(folder)]


def saved(folder: Path) -> dict[str, Any]:
    """All that a run has written down of its training: the checkpoint's tensors as bytes, its info, the records."""
    tensors, info = load_checkpoint(Run(folder).checkpoint)
    records = [{k: v for k, v in record.items() if k not in TIMINGS} for record in Run(folder).metrics()]
    return {"tensors": {name: as_bytes(tensor) for name, tensor in tensors.items()}, "info": info, "records": records}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What a command that is refused must leave as it was: all files, with the time of their last change."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def without_seconds(file: Path) -> Any:
    """An evaluation's accuracies, and the rest of its results; but for the time they took."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in found.pop("accuracy")], found


def as_bytes(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor's dtype, shape and bits."""
    return str(tensor.dtype), tuple(tensor.shape), tensor.detach().numpy().tobytes()


def weights(trainer: TrainingState) -> dict[str, Any]:
    """The model's parameters and buffers, as bits."""
    return {name: as_bytes(tensor) for name, tensor in trainer.model.state_dict().items()}


def split(count: int, *, size: int = 12, seed: int = 0) -> Split:
    """Noise with labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(CLASSES, (count,), generator=generator))


def dataset(**splits: Split) -> ImageDataset:
    """Three splits of noise, some of them exchanged."""
    made = {"train": split(20), "validation": split(10, seed=1), "test": split(10, seed=2)} | splits
    return ImageDataset(name="npz", classes=tuple("abc"), flip=False, **made)


def error_line(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], arguments: list[str], code: int = 1
) -> str:
    """Run a command that has to fail as a user's mistake does: its exit code, and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.run_command(lambda: main(arguments))
    error = capsys.readouterr().err
    assert exit_.value.code == code, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert "Traceback" not in error
    return error


def change_config(folder: Path, **changes: Any) -> None:
    """Change single settings in a run's config.json; a setting that is ... goes."""
    file = Run(folder).config_file
    settings = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {name: value for name, value in settings.items() if value is not ...}
    file.write_text(json.dumps(kept), encoding="utf-8")
