"""Training that meets checks that cannot be made, a loss that is no number, or wrong input."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from immunity_fast import evaluate, train
from immunity_fast.data.augmentation import apply_affine
from immunity_fast.data.datasets import Split
from immunity_fast.training import loop, run_evaluation, validation
from immunity_fast.training.checkpoint import load_checkpoint, save_checkpoint
from immunity_fast.training.display import not_measured_line
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from immunity_fast.training.step import TrainStep
from immunity_fast.training.validation import validate
from tests import grids
from tests.small_runs import CONFIG, CPU, arrays, dataset, error_line, options, saved, trained, write_data

# Checks that cannot be made


def _after_each_step(monkeypatch: pytest.MonkeyPatch, change: Callable[[TrainStep], None]) -> None:
    take = TrainStep.__call__

    def changed(step: TrainStep, *batch: Any, **options: Any) -> torch.Tensor:
        measured = take(step, *batch, **options)
        with torch.no_grad():
            change(step)
        return measured

    monkeypatch.setattr(TrainStep, "__call__", changed)


def _kill(step: TrainStep) -> None:
    for name, parameter in step.model.named_parameters():
        if "classifier" in name:
            parameter.zero_()


@pytest.mark.parametrize(("experts", "method"), grids.every(2, (1, 2), ("off", "pgd")))
def test_a_dead_network_is_trained_to_its_end_and_called_dead(
    experts: int,
    method: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _after_each_step(monkeypatch, _kill)
    arguments = options(data, experts=experts, check_images=4, adversarial=method)
    with pytest.raises(SystemExit) as ended:
        train.cli.run_command(lambda: train.main([*arguments, "--out", str(tmp_path / "run")]))
    output, error = capsys.readouterr()
    run = Run(tmp_path / "run")
    assert ended.value.code == 1
    assert error.count("\n") == 1
    assert "training has ended" in error
    assert "expected outputs that depend on the images" in error
    assert "smaller --lr" in error
    assert f"go on with: {run.resume_command}" not in output
    assert load_checkpoint(run.checkpoint)[1]["epoch"] == 2
    assert not run.best_checkpoint.exists(), "no epoch was measured under attack, so none was best"
    assert [record["epoch"] for record in run.metrics()] == [1, 2]
    for record in run.metrics():
        assert record["val_accuracy_mean"] == pytest.approx(5 / 14), "all 14 are taken for the first class"
        assert "val_pgd10_accuracy_mean" not in record
        assert "expected outputs that depend on the images" in record["val_not_measured"]["pgd10"]
        line = f"epoch {record['epoch']}: accuracy under PGD-10 on validation images was not measured: "
        assert line + record["val_not_measured"]["pgd10"] in output
    # Nothing is stuck: the same again, to the same end.
    again = error_line(capsys, train.main, ["--resume", str(run.folder)])
    assert again == error
    assert len(run.metrics()) == 2
    assert "expected outputs that depend on the images" in error_line(capsys, evaluate.main, [str(run.folder)])


def test_outputs_that_are_no_numbers_are_no_accuracy() -> None:
    trainer = TrainingState(dataclasses.replace(CONFIG, check_images=4), dataset(), CPU)
    for name, parameter in trainer.model.named_parameters():
        if "classifier" in name:
            parameter.data.fill_(3e38)  # finite, but sums of products with it are not
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    measured = validate(trainer)
    assert "val_accuracy_mean" not in measured
    assert "val_pgd10_accuracy_mean" not in measured
    assert measured["val_not_measured"].keys() >= {"accuracy", "pgd10"}
    assert "NaN or infinite" in measured["val_not_measured"]["accuracy"]
    json.loads(json.dumps(measured, allow_nan=False))
    assert all(module.training for module in trainer.model.modules())


@pytest.mark.parametrize(
    "error",
    grids.sampled(
        [RuntimeError("a defect"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried…")],
        ordinary=lambda error: type(error) is RuntimeError,
    ),
)
def test_whatever_is_wrong_with_a_check_the_training_is_the_same(
    error: Exception, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained([*options(data, check_images=4), "--out", str(tmp_path / "whole")])
    whole = saved(tmp_path / "whole")

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(validation, "heatmap_metrics", fails)
    _, run = trained([*options(data, check_images=4), "--out", str(tmp_path / "run")])
    assert saved(run.folder)["tensors"] == whole["tensors"]
    for record, expected in zip(run.metrics(), whole["records"], strict=True):
        assert record["val_not_measured"].keys() == {"heatmaps"}
        assert record["val_pgd10_accuracy_mean"] == expected["val_pgd10_accuracy_mean"]


def test_the_best_epoch_is_the_best_of_those_that_were_attacked(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = [{"val_not_measured": {"pgd10": "dead"}}, {"val_pgd10_accuracy_mean": 0.0}] * 2
    monkeypatch.setattr(loop, "validate", lambda trainer: found[trainer.epoch - 1])
    _, run = trained([*options(data, adversarial="fgsm-rs", check_images=4, epochs=4), "--out", str(tmp_path / "run")])
    assert load_checkpoint(run.best_checkpoint)[1]["epoch"] == 2


def _fails(error: Exception) -> Callable[..., Any]:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    return failing


@pytest.mark.parametrize(
    ("where", "error", "traceback"),
    [
        ("load_model", ValueError("no model"), False),
        pytest.param(
            "evaluate_run",
            OSError(28, "No space left on device", "report.html"),
            False,
            marks=pytest.mark.exhaustive,
        ),
        pytest.param("evaluate_run", MemoryError(), False, marks=pytest.mark.exhaustive),
        ("evaluate_run", KeyError("a defect"), True),
    ],
    ids=["model", "disk", "memory", "defect"],
)
def test_what_follows_a_training_leaves_it_alone_where_it_fails(
    where: str,
    error: Exception,
    traceback: bool,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run_evaluation, where, _fails(error))
        line = error_line(capsys, train.main, [*options(data, epochs=1), "--out", str(run.folder)])
    assert "training has ended" in line
    assert run.resume_command in line
    assert (str(run.folder / "errors.log") in line) == traceback
    assert (run.folder / "errors.log").exists() == traceback
    before = saved(run.folder)
    train.main(["--resume", str(run.folder)])
    assert saved(run.folder) == before
    assert run.report.is_file()


def test_a_damaged_best_is_named_after_training(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*options(data, adversarial="fgsm-rs", check_images=4, epochs=1), "--out", str(tmp_path / "run")]
    _, run = trained(arguments)
    run.best_checkpoint.write_bytes(run.best_checkpoint.read_bytes()[:-7])
    assert str(run.best_checkpoint) in error_line(capsys, train.main, ["--resume", str(run.folder)])


@pytest.mark.parametrize("broken", ["writer", "numbers"])
def test_tensorboard_may_fail(
    broken: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    if broken == "writer":
        monkeypatch.setattr(tensorboard, "SummaryWriter", _fails(TypeError("of another protobuf")))
    else:
        monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", _fails(RuntimeError("no space")))
    _, run = trained([*options(data), "--out", str(tmp_path / "run")])
    assert len(run.metrics()) == 2
    assert capsys.readouterr().out.count("going on without TensorBoard: ") == 1


# A loss that is no number


def test_a_diverged_run_goes_on_with_a_smaller_learning_rate(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")

    def diverge(step: TrainStep) -> None:
        if step.optimizer.param_groups[0]["lr"] > 0.01:
            next(step.model.parameters()).view(-1)[0] = torch.nan

    with monkeypatch.context() as patch:
        _after_each_step(patch, diverge)
        line = error_line(capsys, train.main, [*options(data, lr=0.3), "--out", str(run.folder)])
        assert line.endswith(f": python -m immunity_fast.train --resume {run.folder} --lr 0.03\n")
        again = error_line(capsys, train.main, ["--resume", str(run.folder)])
        assert again == line, "where nothing is changed it ends there again"
        assert f"{run.resume_command}\n" in error_line(capsys, evaluate.main, [str(run.folder)])
        assert run.resume_command.endswith(" --lr 0.03")
        assert "--seed" in error_line(capsys, train.main, ["--resume", str(run.folder), "--seed", "3"])
        _, run = trained(["--resume", str(run.folder), "--lr", "0.01"])
    assert [record["epoch"] for record in run.metrics()] == [1, 2]
    assert run.metrics()[0]["lr"] < 0.01
    assert not run.diverged.exists()
    run.diverged.write_text('{"lr": 1e30}')
    assert run.resume_command.endswith(" --lr 0.05"), "a tenth would diverge as well"
    run.diverged.write_text("[]")
    assert " --lr" not in run.resume_command, "what is no such file changes nothing"
    run.diverged.unlink()
    assert run.config() == dataclasses.replace(run.config(), lr=0.01, experts=2, beta=0.5)
    train.main(["--resume", str(run.folder)])
    assert run.report.is_file()
    # What has not diverged keeps its settings.
    assert "--lr 0.5" in error_line(capsys, train.main, ["--resume", str(run.folder), "--lr", "0.5"])


def test_a_checkpoint_of_no_numbers_is_not_gone_on_with(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, run = trained([*options(data, epochs=1), "--out", str(tmp_path / "run")])
    next(trainer.model.parameters()).data.view(-1)[0] = torch.nan
    save_checkpoint(run.checkpoint, trainer.tensors(), trainer.info())
    line = error_line(capsys, train.main, ["--resume", str(run.folder)])
    assert str(run.checkpoint) in line
    assert "NaN" in line
    line = error_line(capsys, evaluate.main, [str(run.folder)])
    assert f"{run.checkpoint} holds weights that are NaN or infinite (gate." in line


@pytest.mark.parametrize("every", [1, 500])
def test_a_loss_that_is_no_number_stops_before_the_checkpoint(
    every: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options(data, lr="1e30", checkpoint_every=every), "--out", str(tmp_path / "run")]
    message = error_line(capsys, train.main, arguments)
    run = Run(tmp_path / "run")
    assert "epoch 1" in message
    assert str(run.checkpoint) in message
    tensors, info = load_checkpoint(run.checkpoint)
    assert info["step"] < 5
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    assert run.metrics() == []


@pytest.mark.parametrize("call", [3, 5])
def test_weights_that_are_no_numbers_do_not_reach_a_checkpoint(
    call: int, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A gradient can be NaN where the loss, which is from before the step, is a number.
    take, calls = TrainStep.__call__, 0

    def spoilt(step: TrainStep, *batch: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        measured = take(step, *batch, **options)
        if calls == call:
            next(step.model.parameters()).data.view(-1)[0] = torch.nan
        return measured

    monkeypatch.setattr(TrainStep, "__call__", spoilt)
    error_line(capsys, train.main, [*options(data, checkpoint_every=1), "--out", str(tmp_path / "run")])
    tensors, info = load_checkpoint(Run(tmp_path / "run").checkpoint)
    assert info["step"] == call - 1
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


# Wrong input: one line, and no run folder


def _other_size(made: dict[str, Any]) -> dict[str, Any]:
    return {"test_images": made["test_images"][:, :-1]}


def _label_too_high(made: dict[str, Any]) -> dict[str, Any]:
    return {"test_labels": made["test_labels"] + 1}


def _negative_label(made: dict[str, Any]) -> dict[str, Any]:
    return {"train_labels": made["train_labels"].astype(np.int64) - 1}


def _fewer_labels(made: dict[str, Any]) -> dict[str, Any]:
    return {"val_labels": made["val_labels"][1:]}


def _floats(made: dict[str, Any]) -> dict[str, Any]:
    return {"train_images": made["train_images"] / 255}


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (_other_size, "test_images"),
        (_label_too_high, "test_labels"),
        (_negative_label, "train_labels"),
        (_fewer_labels, "val_labels"),
        (_floats, "train_images"),
    ],
)
def test_wrong_data_are_named(
    spoil: Callable[[dict[str, Any]], dict[str, Any]],
    names: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_data(tmp_path / "wrong.npz", **spoil(arrays()))
    message = error_line(capsys, train.main, [*options(file), "--out", str(tmp_path / "runs" / "run")])
    assert str(file) in message
    assert names in message
    assert not (tmp_path / "runs").exists()


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*options(tmp_path / "none.npz"), "--out", str(tmp_path / "run")]
    assert "none.npz" in error_line(capsys, train.main, arguments)
    assert not (tmp_path / "run").exists()


def test_a_file_cut_off_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = data.read_bytes()
    for name, length in (("a.npz", len(content) // 2), ("b.npz", len(content) - 30), ("c.npz", 0)):
        (tmp_path / name).write_bytes(content[:length])
        arguments = [*options(tmp_path / name), "--out", str(tmp_path / "run")]
        assert name in error_line(capsys, train.main, arguments)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"lr": "0"}, "--lr"),
        ({"lr": "nan"}, "--lr"),
        ({"lr": "fast"}, "--lr"),
        ({"epochs": "0"}, "--epochs"),
        ({"epochs": "1.5"}, "--epochs"),
        ({"experts": "0"}, "--experts"),
        ({"batch_size": "0"}, "--batch-size"),
        ({"seed": "-1"}, "--seed"),
        ({"seed": str(2**64)}, "--seed"),
        *(
            ({name: "1" + 30 * "0"}, f"--{name.replace('_', '-')}")
            for name in ("epochs", "experts", "batch_size", "check_images", "attack_images", "checkpoint_every")
        ),
        ({"attack_steps": str(2**63)}, "--attack-steps"),
        ({"limit_train": str(2**63)}, "--limit-train"),
        ({"image_size": str(2**63)}, "--image-size"),
        ({"crop_padding": str(2**63)}, "--crop-padding"),
        ({"crop_padding": "1000"}, "--crop-padding"),
        ({"crop_padding": "12"}, "--crop-padding"),
        ({"image_size": "0"}, "--image-size"),
        ({"device": "nonsense"}, "--device nonsense"),
        ({"device": "meta"}, "--device meta"),
        ({"stage": "layer9"}, "stage"),
        ({"stage": "classifier"}, "stage"),
        ({"preset": "slow"}, "--preset"),
        ({"dataset": "mnist"}, "--dataset"),
        ({"arch": "resnet9"}, "--arch"),
        ({"score": "other"}, "--score"),
        ({"limit_train": "0"}, "--limit-train"),
        ({"limit_train": "41"}, "--limit-train"),
        ({"channels": "0"}, "--channels"),
        ({"channels": "4"}, "--channels 3"),
        ({"image_size": "16"}, "--image-size"),
        ({"colour": "red"}, "--colour"),
        ({"dataset": "digits"}, "digits"),
        ({"arch": "densenet121", "batch_size": "1"}, "densenet121"),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_a_wrong_option_is_named(
    changes: dict[str, str], names: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*options(data, **changes), "--out", str(tmp_path / "runs" / "run")]
    with pytest.raises(SystemExit) as ended:
        train.cli.run_command(lambda: train.main(arguments))
    assert ended.value.code in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert names in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*options(data, device="cuda"), "--out", str(tmp_path / "run")]
    assert "--device cuda" in error_line(capsys, train.main, arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["npz", "folder"])
def test_a_data_set_that_lies_somewhere_needs_a_path(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = error_line(capsys, train.main, ["--dataset", name, "--out", str(tmp_path / "run")])
    assert "--data" in message
    assert name in message
    assert not (tmp_path / "run").exists()


def test_random_crops_leave_something_of_every_image(data: Path, tmp_path: Path) -> None:
    trainer, _ = trained([*options(data, crop_padding=11, rotation=0, epochs=1), "--out", str(tmp_path / "run")])
    batch = next(iter(trainer.loader))
    assert (apply_affine(batch.images, batch.affine).flatten(1).amax(1) > 0).all()


def test_digits_are_not_mirrored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_line(capsys, train.main, ["--dataset", "digits", "--flip", "on", "--out", str(tmp_path / "run")])
    assert "--flip" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("arch", "size"), [("resnet8", 8), ("densenet121", 4)])
def test_images_too_small_for_the_architecture_are_refused(
    arch: str, size: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "small.npz", **arrays(size=size))
    arguments = [*options(tmp_path / "small.npz", arch=arch), "--out", str(tmp_path / "run")]
    assert f"{size}×{size}" in error_line(capsys, train.main, arguments)
    assert not (tmp_path / "run").exists()


def test_small_images_train_where_a_stage_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", **arrays(size=5))
    trainer, _ = trained([*options(tmp_path / "small.npz", stage="layer1", epochs=1), "--out", str(tmp_path / "run")])
    assert trainer.model.stage == "layer1"


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_a_name_that_is_taken_is_refused_and_what_is_there_stays(
    kind: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "taken"
    if kind == "folder":
        out.mkdir()
    elif kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(tmp_path / "nothing")
    message = error_line(capsys, train.main, [*options(data), "--out", str(out)])
    assert f"--out {out}" in message
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]
    assert out.is_symlink() if kind == "link to nothing" else out.is_dir() or out.read_text() == "mine"


def test_a_folder_below_a_file_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert "file" in error_line(capsys, train.main, [*options(data), "--out", str(tmp_path / "file" / "run")])


def test_a_run_may_have_a_name_that_looks_like_markup(data: Path, tmp_path: Path) -> None:
    train.main([*options(data, epochs=1), "--out", str(tmp_path / "[b]" / "[/c]")])
    assert Run(tmp_path / "[b]" / "[/c]").report.is_file()


def test_what_an_attack_warns_of_is_a_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits so far apart that the softmax has no gradient, which pass for robust."""
    trainer = TrainingState(dataclasses.replace(CONFIG, experts=1, check_images=4), dataset(), CPU)
    for name, parameter in trainer.model.named_parameters():
        if "classifier" in name:
            parameter.data.mul_(1e6)
    with torch.no_grad():  # only of right answers is the gradient zero
        answers = trainer.model.eval()(trainer.dataset.validation.images / 255).argmax(-1)
    trainer.dataset = dataclasses.replace(trainer.dataset, validation=Split(trainer.dataset.validation.images, answers))
    measured = validate(trainer)
    assert measured["val_pgd10_accuracy_mean"] == 1
    assert "the attack cannot move" in measured["val_doubts"]["pgd10"]
    monkeypatch.setattr(loop, "validate", lambda _: {"val_accuracy_sample": 1.0, "val_accuracy_mean": 1.0} | measured)
    _, run = trained([*options(data, epochs=1), "--out", str(tmp_path / "run")])
    assert f"epoch 1: accuracy under PGD-10 on validation images: {measured['val_doubts']['pgd10']}\n" in (
        capsys.readouterr().out
    )
    assert "val_doubts" not in run.metrics()[0], "a record has numbers, and reasons for those that it has not"


def test_a_check_without_memory_does_not_blame_the_learning_rate() -> None:
    assert "smaller --check-images" in not_measured_line(3, "heatmaps", "out of memory")
    assert "smaller --lr" in not_measured_line(3, "pgd10", "model: expected outputs that depend on the images")


def test_a_training_that_refuses_its_input_is_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "append_metrics", _fails(ValueError("what is wrong")))
    line = error_line(capsys, train.main, [*options(data), "--out", str(tmp_path / "run")])
    assert "what is wrong" in line
    assert Run(tmp_path / "run").resume_command in line
