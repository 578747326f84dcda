"""Callbacks: when they are called, early stopping, the best epochs as files, and what goes on after a kill."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from immunity_fast import load, train
from immunity_fast.data.datasets import ImageDataset
from immunity_fast.runtime.nested import put_together, taken_apart
from immunity_fast.training import Callback, CallbackError, Checkpoint, EarlyStopping, LambdaCallback, Trainer
from immunity_fast.training.callbacks import Callbacks
from immunity_fast.training.run_folder import Run
from tests.small_runs import CONFIG, dataset, error_line, options, saved, trained, write_data

SETTINGS = dataclasses.replace(CONFIG, epochs=4, device="cpu", experts=1)


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    return dataset()


class Stage:
    """What a callback sees of a trainer, whose epochs are made up."""

    def __init__(self) -> None:
        self.run, self.said, self.loaded = None, list[str](), 0
        self.epoch = 0

    def stop(self, reason: str) -> None:
        self.said.append(reason)

    def weights(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.tensor([float(self.epoch)])}

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        self.loaded = int(weights["weight"])

    def save_model(self, path: Path) -> None:
        path.write_text(str(self.epoch))


def played(callback: Callback, name: str, values: list[float]) -> Stage:
    stage = Stage()
    for value in values:
        stage.epoch += 1
        callback.on_epoch_end(stage, {"epoch": stage.epoch, name: value})
        if stage.said:
            break
    callback.on_fit_end(stage)
    return stage


STOPS: list[tuple[dict[str, Any], str, list[float], int | None, int]] = [
    ({"patience": 2}, "val_accuracy_mean", [0.1, 0.3, 0.3, 0.2, 0.9], 4, 2),
    ({"patience": 1, "monitor": "loss"}, "loss", [3.0, 2.0, 1.0], None, 3),
    ({"patience": 1, "monitor": "loss"}, "loss", [3.0, 3.5, 1.0], 2, 1),
    ({"patience": 2, "min_delta": 0.1}, "val_accuracy_mean", [0.1, 0.15, 0.19, 0.9], 3, 1),
    ({"patience": 1, "mode": "max", "monitor": "mine"}, "mine", [1.0, float("nan")], 2, 1),
    ({"patience": 1, "monitor": "val_accuracy"}, "val_accuracy_mean", [0.5, 0.4], 2, 1),
]


@pytest.mark.parametrize(("options", "name", "values", "stopped", "best"), STOPS)
def test_early_stopping(
    options: dict[str, Any], name: str, values: list[float], stopped: int | None, best: int
) -> None:
    callback = EarlyStopping(**options, restore_best=True)
    stage = played(callback, name, values)
    assert (callback.stopped_epoch, callback.best_epoch, stage.loaded) == (stopped, best, best)
    assert bool(stage.said) == (stopped is not None)


def test_states_survive_in_a_checkpoint() -> None:
    callback = EarlyStopping(patience=3, restore_best=True)
    played(callback, "val_accuracy_mean", [0.1, 0.3, 0.2])
    listed, tensors = Callbacks([callback]).state()
    other = EarlyStopping(patience=3, restore_best=True)
    Callbacks([LambdaCallback(), other]).load(listed, tensors)
    assert (other.best, other.best_epoch, other.wait) == (0.3, 2, 1)
    assert played(other, "val_accuracy_mean", [0.1, 0.1]).loaded == 2


def test_nested_states_come_back_as_they_were() -> None:
    state = {"a": (1, [2.5, None, True]), 3: {"b": b"\x00\xff", "t": torch.arange(3)}, "dict": {"tensor": "0"}, "": []}
    found = put_together(*taken_apart(state))
    assert found.keys() == state.keys()
    assert (found["a"], found["dict"], found[3]["b"], found[""]) == (
        (1, [2.5, None, True]),
        {"tensor": "0"},
        b"\x00\xff",
        [],
    )
    assert found[3]["t"].tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match=r"^state\['x'\]: expected numbers, .*got object$"):
        taken_apart({"x": object()})


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: EarlyStopping(patience=0), ValueError, "patience: expected at least 1, got 0"),
    (lambda: EarlyStopping("mine"), ValueError, "mode: expected min or max for 'mine'"),
    (lambda: EarlyStopping(mode="up"), ValueError, "mode: expected auto, min or max"),  # type: ignore[arg-type]
    (lambda: EarlyStopping(min_delta=-1), ValueError, "min_delta: expected"),
    (lambda: Checkpoint(best=0), ValueError, "best: expected at least 1"),
    (lambda: LambdaCallback(on_epoch=print), TypeError, "on_epoch: expected one of on_fit_start"),
    (lambda: EarlyStopping().on_epoch_end(Stage(), {"epoch": 1, "loss": 1.0}), ValueError, "expected one of loss"),
]


@pytest.mark.parametrize(("made", "kind", "said"), WRONG)
def test_what_is_wrong_is_one_line(made: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        made()


def test_the_hooks_are_called_in_order(images: ImageDataset) -> None:
    calls: list[str] = []
    hooks = {
        "on_fit_start": lambda trainer: calls.append("fit"),
        "on_epoch_start": lambda trainer: calls.append(f"epoch {trainer.epoch}"),
        "on_step_end": lambda trainer, metrics: calls.append(f"step {trainer.step} {metrics['loss'] > 0}"),
        "on_epoch_end": lambda trainer, record: calls.append(f"end {record['epoch']} {len(trainer.history)}"),
        "on_fit_end": lambda trainer: calls.append("over"),
    }
    Trainer(SETTINGS, images, callbacks=LambdaCallback(**hooks), epochs=2, batch_size=10).fit()
    steps = [[f"epoch {epoch}", *(f"step {2 * epoch + each} True" for each in (1, 2))] for epoch in (0, 1)]
    assert calls == ["fit", *steps[0], "end 1 1", *steps[1], "end 2 2", "over"]


def test_the_best_epochs_are_kept(images: ImageDataset, tmp_path: Path) -> None:
    best, every = Checkpoint(monitor="loss", best=2), Checkpoint(tmp_path / "every", every=2)
    trainer = Trainer(SETTINGS, images, callbacks=[best, every], out=tmp_path / "run")
    losses = [record["loss"] for record in trainer.fit()]
    order = sorted(range(4), key=lambda index: losses[index])[:2]
    assert [path.name.split("-")[1] for path in best.paths] == [f"{index + 1:04}" for index in order]
    assert best.best_value == min(losses)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {
        "last.safetensors",
        *(path.name for path in best.paths),
    }
    assert [path.name for path in every.paths] == ["epoch-0002.safetensors", "epoch-0004.safetensors"]
    assert every.best_path is not None
    model = load(every.best_path)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_callbacks_begin_anew_in_another_training(images: ImageDataset, tmp_path: Path) -> None:
    config = dataclasses.replace(SETTINGS, epochs=2, check_images=0)
    stopping, kept = EarlyStopping("loss", patience=1, min_delta=1e3), Checkpoint(monitor="loss")
    for name in ("one", "two"):
        trainer = Trainer(config, images, callbacks=[stopping, kept], out=tmp_path / name)
        assert len(trainer.fit()) == 2
        assert (stopping.best_epoch, stopping.wait) == (1, 1)
        assert [path.parent for path in kept.paths] == [tmp_path / name / "checkpoints"]


def test_what_cannot_be_watched_is_said_before_the_training(images: ImageDataset) -> None:
    seen: list[Any] = []
    watching = LambdaCallback(on_step_end=lambda trainer, metrics: seen.append(metrics))
    for given in ({"callbacks": [watching, EarlyStopping()]}, {"callbacks": watching, "early_stopping": 2}):
        with pytest.raises(CallbackError, match="monitor: expected validation images to watch val_accuracy_mean of"):
            Trainer(SETTINGS, images.train, **given).fit()
    assert not seen


def test_a_stopped_command_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data.npz")
    # Position stability of one network is always 0, and so never better.
    arguments = options(data, experts=1, epochs=9, early_stopping=1, monitor="position_stability", loggers="csv")
    state, run = trained([*arguments, "--out", str(tmp_path / "run")])
    assert state.epoch == 2
    assert "epoch 2: training ends: position_stability has not improved for 1 epoch" in capsys.readouterr().out
    assert run.best_checkpoint.is_file()
    before = saved(run.folder)
    trained(["--resume", str(run.folder)])
    assert saved(run.folder) == before
    assert Run(run.folder).has_ended(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(run.folder)
    assert (run.folder / "metrics.csv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"early_stopping": 0}, "--early-stopping: expected at least 1 epoch, got 0"),
        ({"monitor": "speed"}, "--monitor: expected one of loss, "),
        ({"monitor": "val_pgd10_accuracy_mean"}, "--monitor: expected what is measured with these settings"),
        ({"loggers": "csv,paper"}, "--loggers: expected none, or of tensorboard, csv"),
    ],
)
def test_wrong_options_are_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options(tmp_path / "none.npz", **changes), "--out", str(tmp_path / "run")]
    assert said in error_line(capsys, train.main, arguments)
