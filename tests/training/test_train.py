"""The command that trains: what it depends on and what not, and what it measures and writes."""

from __future__ import annotations

import builtins
import dataclasses
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from immunity_fast import evaluate, train
from immunity_fast.data.datasets import ImageDataset
from immunity_fast.experts.genotypes import reduced
from immunity_fast.kernels import reference
from immunity_fast.runtime import cli
from immunity_fast.training import loop, session
from immunity_fast.training.checkpoint import load_checkpoint, load_model
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState, channel_statistics
from immunity_fast.training.step import TrainStep
from immunity_fast.training.validation import training_means, validate
from tests.adversarial_cases import ATTACK_SETTINGS
from tests.small_runs import CONFIG, CPU, dataset, error_line, options, saved, split, trained, weights


def _train(images: ImageDataset, folder: Path, **changes: Any) -> TrainingState:
    """A whole run without a command line."""
    config = dataclasses.replace(CONFIG, **changes)
    trainer = TrainingState(config, images, CPU)
    loop.train(trainer, Run.create(folder, config))
    return trainer


# What the weights depend on


def test_a_seed_fixes_the_weights(tmp_path: Path) -> None:
    first, again, other = (
        weights(_train(dataset(), tmp_path / name, seed=seed)) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == again
    assert first != other


def test_the_global_random_state_before_a_run_plays_no_part(tmp_path: Path) -> None:
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        found.append(weights(_train(dataset(), tmp_path / str(seed))))
    assert found[0] == found[1]


def test_a_log_that_is_no_terminal_has_a_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within an epoch, which may take an hour."""
    advance, inside = TrainingState.advance, list[str]()

    def slow(self: TrainingState, batch: Any) -> None:
        advance(self, batch)
        time.sleep(0.5)
        inside.append(capsys.readouterr().out)

    monkeypatch.setattr(TrainingState, "advance", slow)
    monkeypatch.setattr(cli, "STATUS_SECONDS", 0.1)
    _train(dataset(), tmp_path / "run")
    assert inside[0].count("epoch 1/1: step 1 of") >= 2


def test_every_expert_begins_elsewhere() -> None:
    state = TrainingState(CONFIG, dataset(), CPU).model.experts.state_dict()
    convolutions = [value for value in state.values() if value.dim() == 5]
    assert convolutions
    assert not any(torch.equal(value[0], value[1]) for value in convolutions)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_no_other_split_is_trained_on(part: str, tmp_path: Path) -> None:
    poison = split(7, seed=9)
    poison.images.fill_(255)
    poison.labels.fill_(1)
    clean = weights(_train(dataset(), tmp_path / "clean", check_images=4))
    assert weights(_train(dataset(**{part: poison}), tmp_path / "poisoned", check_images=4)) == clean


def test_the_test_split_is_not_looked_at_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = TrainingState(CONFIG, dataset(), CPU)
    trainer.dataset = dataclasses.replace(trainer.dataset, test=None)  # type: ignore[arg-type]
    loop.train(trainer, Run.create(tmp_path / "run", CONFIG))
    assert trainer.epoch == 1


def test_checks_on_validation_images_do_not_change_the_training(tmp_path: Path) -> None:
    checked = weights(_train(dataset(), tmp_path / "checked", epochs=2, check_images=4))
    assert weights(_train(dataset(), tmp_path / "unchecked", epochs=2, check_images=0)) == checked


EFFECTS: dict[str, Any] = {
    "arch": "tests.own_networks:Plain",
    "experts": 3,
    "stage": "layer2",
    "alpha": 0.7,
    "beta": 0.7,
    "gamma": 0.1,
    "smoothing": 0.3,
    "score": "probability",
    "detach_weights": True,
    "label_smoothing": 0.2,
    "class_weights": "1,2,0.5",
    "ignore_index": 1,
    "mixup": 0.4,
    "cutmix": 1.0,
    "lr": 0.3,
    "momentum": 0.5,
    "accumulate": 2,
    "optimizer": "adamw",
    "schedule": "linear",
    "warmup_epochs": 0.5,
    "lr_min": 0.01,
    "decay": "weights",
    "weight_decay": 0.1,
    "clip_grad_norm": 0.1,
    "crop_padding": 0,
    "rotation": 0.0,
    "flip": "on",
    "batch_size": 5,
    "epochs": 2,
    "seed": 1,
    "amp": "bf16",
    "ensemble": "plain",
    "gate": "uniform",
}
NO_EFFECT: dict[str, Any] = {"check_images": 4, "attack_images": 3, "checkpoint_every": 1, "ema": 0.5, "profile": True}
NO_EFFECT |= {"auto_batch": True, "checkpoint_activations": True}
# `_train` is given its images.
OF_IMAGES = {"preset", "dataset", "data", "image_size", "channels", "stream", "workers", "limit_train"}
OF_PEERS = {"adversary", "shards", "poison"}  # test_adversaries.py, tests/data
BEGINNING = {"stem", "weights", "perturbation"}  # with what networks begin: test_any_network.py
OF_TRAINER = {"early_stopping", "monitor", "loggers"}  # test_trainer.py, test_callbacks.py, test_loggers.py
# Of other optimisers and schedules than the default: test_optimizers.py, test_schedules.py
OTHERS = {"betas", "optimizer_eps", "milestones", "lr_factor"}
ALIKE = {"device", "compile", "batching", "double_backprop", "float32", "shard"}  # the same but for rounding


def test_of_every_setting_it_is_known_whether_it_has_an_effect() -> None:
    # ATTACK_SETTINGS: test_adversarial_training.py
    known = [*EFFECTS, *NO_EFFECT, *OTHERS, *OF_IMAGES, *BEGINNING, *OF_TRAINER, *OF_PEERS, *ALIKE, *ATTACK_SETTINGS]
    assert len(known) == len(set(known))
    assert {field.name for field in dataclasses.fields(TrainConfig)} <= set(known)


@pytest.mark.parametrize("name", EFFECTS)
def test_every_setting_of_the_training_has_an_effect(name: str, tmp_path: Path, plain: dict[str, Any]) -> None:
    assert weights(_train(dataset(), tmp_path / "run", **{name: EFFECTS[name]})) != plain


@pytest.mark.parametrize("name", NO_EFFECT)
def test_what_only_looks_at_the_training_has_none(name: str, tmp_path: Path, plain: dict[str, Any]) -> None:
    assert weights(_train(dataset(), tmp_path / "run", **{name: NO_EFFECT[name]})) == plain


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return weights(_train(dataset(), tmp_path_factory.mktemp("runs") / "plain"))


def test_without_tensorboard_the_same_is_trained(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained([*options(data), "--out", str(tmp_path / "with")])
    import_ = builtins.__import__

    def no_tensorboard(name: str, *rest: Any, **keywords: Any) -> Any:
        if "tensorboard" in name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return import_(name, *rest, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_tensorboard)
        _, run = trained([*options(data), "--out", str(tmp_path / "without")])
    assert not run.tensorboard.exists()
    assert saved(tmp_path / "without") == saved(tmp_path / "with")


# What it measures and writes


def test_channel_statistics_are_numpy_s() -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 9), dtype=np.uint8)
    images[:, 1] //= 3
    mean, std = channel_statistics(torch.from_numpy(images))
    np.testing.assert_allclose(mean, (images / 255).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255).std((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("value", [0, 255, 93])
def test_a_channel_of_one_value_has_a_spread_to_divide_by(value: int) -> None:
    mean, std = channel_statistics(torch.full((2, 3, 4, 4), value, dtype=torch.uint8))
    assert mean == pytest.approx([value / 255] * 3)
    assert std == [1 / 255] * 3


def test_the_model_normalises_with_the_training_images_alone() -> None:
    images = dataset()
    model = TrainingState(CONFIG, images, CPU).model
    mean, std = channel_statistics(images.train.images)
    state = model.normalize.state_dict()
    np.testing.assert_allclose(state["mean"].flatten(), mean, rtol=1e-6)
    np.testing.assert_allclose(state["std"].flatten(), std, rtol=1e-6)


def test_validation_leaves_training_mode_switch_and_generator() -> None:
    trainer = TrainingState(dataclasses.replace(CONFIG, check_images=3), dataset(), CPU)
    trainer.model.train()
    generator, before = trainer.model.gate.generator, weights(trainer)
    validate(trainer)
    assert all(module.training for module in trainer.model.modules())
    assert trainer.model.gate.switch == "call"
    assert trainer.model.gate.generator is generator is trainer.gate_generator
    assert weights(trainer) == before
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_validation_measures_the_validation_split() -> None:
    trainer = TrainingState(dataclasses.replace(CONFIG, check_images=100), dataset(validation=split(9, seed=5)), CPU)
    measured = validate(trainer)
    images, labels = trainer.dataset.validation.images / 255, trainer.dataset.validation.labels
    with torch.no_grad():
        experts = [module.eval()(images).softmax(-1) for module in trainer.model.unstack()]
    right = torch.stack(experts).mean(0).argmax(-1) == labels
    assert measured["val_accuracy_mean"] == int(right.sum()) / 9
    assert 0 <= measured["val_accuracy_sample"] <= 1
    assert measured["val_pgd10_accuracy_mean"] <= measured["val_accuracy_mean"]
    assert measured.keys() >= {f"val_{n}" for n in ("mutual_information", "dead_heatmaps", "iscore", "cscore")}


def test_without_images_to_check_only_accuracies_are_measured() -> None:
    measured = validate(TrainingState(CONFIG, dataset(), CPU))
    assert measured.keys() == {"val_accuracy_sample", "val_accuracy_mean"}


def test_a_record_holds_the_means_of_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    take = TrainStep.__call__

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        steps.append(take(*arguments, **options))
        return steps[-1]

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    _train(dataset(), tmp_path / "run", epochs=2)
    means = torch.stack(steps).view(2, 5, 4).mean(1).tolist()
    for number, (record, mean) in enumerate(zip(Run(tmp_path / "run").metrics(), means, strict=True), start=1):
        loss, cross_entropy, information, stability = mean
        assert record["epoch"] == number
        assert record["step"] == 5 * number
        assert record["loss"] == pytest.approx(loss, rel=1e-12)
        assert record["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-12)
        assert record["mutual_information"] == pytest.approx(math.log(2) - information / 2, rel=1e-12)
        assert record["position_stability"] == pytest.approx(stability, rel=1e-12)


def test_the_learning_rate_falls_over_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = []
    take = TrainStep.__call__

    def recorded(step: TrainStep, *batch: Any, **options: Any) -> torch.Tensor:
        rates.extend(group["lr"] for group in step.optimizer.param_groups)
        return take(step, *batch, **options)

    monkeypatch.setattr(TrainStep, "__call__", recorded)
    _train(dataset(), tmp_path / "run", epochs=2, lr=0.04)
    assert rates == pytest.approx([0.02 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    assert [record["lr"] for record in Run(tmp_path / "run").metrics()] == [rates[4], rates[9]]


def test_mutual_information_is_0_where_all_look_at_one_place() -> None:
    trainer = TrainingState(CONFIG, dataset(), CPU)
    p = torch.full((2, 1, 12, 12), 1 / 144)
    trainer.sums[2] = float(reference.mutual_information_loss(p)) * len(trainer.loader)
    assert training_means(trainer)["mutual_information"] == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("whole_end")
def test_a_run_folder_holds_what_the_command_promises(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main([*options(data, seed=5), "--out", str(tmp_path / "new" / "run")])
    run = Run(tmp_path / "new" / "run")
    assert run.config().seed == 5
    assert len(run.metrics()) == 2
    assert load_checkpoint(run.checkpoint)[1]["epoch"] == 2
    found = json.loads(run.results_file.read_text(encoding="utf-8"))
    assert {(row["attack"], row["attacker"]) for row in found["accuracy"]} >= {("clean", None), ("pgd", "mean")}
    assert {"worst_case", "masking", "heatmaps"} <= found.keys()
    assert "<html" in run.report.read_text(encoding="utf-8")
    assert sorted(file.name for file in run.figures.iterdir()) == ["curves.png", "heatmaps.png", "robustness.png"]
    assert list(run.tensorboard.iterdir())
    assert [folder.name for folder in run.folder.parent.iterdir()] == ["run"]
    assert not list(run.folder.rglob(".*"))
    output, error = capsys.readouterr()
    assert "40 training, 14 validation, 30 test images" in output
    assert "epoch   2/2" in output
    assert f"more attacks, more attackers: python -m immunity_fast.evaluate {run.folder}" in output
    assert error == ""


def test_a_genotype_of_the_users_own_is_kept_in_the_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genotype = tmp_path / "cell.json"
    genotype.write_text(reduced("pdarts", 5, 2), encoding="utf-8")
    arguments = options(data, arch=genotype, epochs=1, limit_train=8, attack_images=2, beta=0, gamma=0)
    session.fit(train.parse([*arguments, "--out", str(tmp_path / "run")]))
    genotype.unlink()
    run = Run(tmp_path / "run")
    assert run.config().arch == reduced("pdarts", 5, 2)
    assert "2 × darts-5x2-" in capsys.readouterr().out
    model, _ = load_model(run.folder)
    assert model.stage == "cells1", "12×12, the last that exceeds 8×8"
    evaluate.main(
        [str(run.folder), "--attacks", "fgsm", "--attackers", "mean", "--limit", "2", "--masking-images", "0"]
    )
    line = error_line(capsys, train.main, [*options(data, arch=genotype), "--out", str(tmp_path / "other")])
    assert f"--arch {genotype}: " in line
    genotype.write_text("{}", encoding="utf-8")
    line = error_line(capsys, train.main, [*options(data, arch=genotype), "--out", str(tmp_path / "other")])
    assert "kind" in line


def test_a_run_finds_a_name_of_its_own(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, resume, _ = train.parse(options(data))
    assert not resume
    assert folder.parent == Path("runs")
    assert folder.name.startswith("npz-resnet8-")
    assert list(tmp_path.iterdir()) == []


def test_options_change_the_preset_s_settings() -> None:
    _, _, config = train.parse(["--preset", "paper", "--epochs", "3", "--out", "none"])
    assert (config.preset, config.arch, config.epochs, config.lr) == ("paper", "googlenet", 3, 0.01)
