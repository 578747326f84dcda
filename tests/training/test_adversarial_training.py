"""Runs of adversarial training: what their settings change, the best checkpoint, warnings, and what is recorded."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from immunity_fast import train
from immunity_fast.runtime import cli
from immunity_fast.training import loop, run_evaluation
from immunity_fast.training.adversarial import InnerAttackSettings
from immunity_fast.training.checkpoint import load_checkpoint, load_model
from immunity_fast.training.collapse import collapsed
from immunity_fast.training.config import PRESETS, TrainConfig, add_options
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from immunity_fast.training.validation import validate
from tests.adversarial_cases import ATTACK_SETTINGS, CONFIG, METHODS, train_run
from tests.small_runs import CPU, dataset, error_line, options, split, trained, weights, write_data

# A run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Weights after training by each method."""
    folder = tmp_path_factory.mktemp("runs")
    return {method: weights(train_run(folder / method, adversarial=method)[0]) for method in ("off", *METHODS)}


def test_every_method_trains_otherwise(plain: dict[str, dict[str, Any]]) -> None:
    found = list(plain.values())
    assert not any(found[i] == found[j] for i in range(4) for j in range(i))


EFFECTS: list[tuple[str, dict[str, Any]]] = [
    ("pgd", {"eps": 0.1}),
    ("fgsm-rs", {"eps": 0.1}),
    ("pgd", {"attack_alpha": 0.1}),
    ("trades", {"attack_steps": 3}),
    ("pgd", {"attack_batchnorm": "train"}),
    ("fgsm-rs", {"attack_gate": "mean"}),
    ("trades", {"trades_weight": 1.0}),
]
NO_EFFECT: list[dict[str, Any]] = [
    {"eps": 0.1, "attack_alpha": 0.1, "attack_steps": 3, "attack_batchnorm": "train", "attack_gate": "mean"},
    {"trades_weight": 1.0},
]


def test_every_setting_of_the_attack_is_tried_here() -> None:
    for tried in ([changes for _, changes in EFFECTS], NO_EFFECT):
        assert {"adversarial", *(name for changes in tried for name in changes)} == ATTACK_SETTINGS


@pytest.mark.parametrize(("method", "changes"), EFFECTS)
def test_every_setting_of_the_attack_has_an_effect(
    method: Any, changes: dict[str, Any], tmp_path: Path, plain: dict[str, dict[str, Any]]
) -> None:
    assert weights(train_run(tmp_path / "run", adversarial=method, **changes)[0]) != plain[method]


@pytest.mark.parametrize("changes", NO_EFFECT, ids=["attack", "trades"])
def test_without_adversarial_training_its_settings_have_none(
    changes: dict[str, Any], tmp_path: Path, plain: dict[str, dict[str, Any]]
) -> None:
    assert weights(train_run(tmp_path / "run", adversarial="off", **changes)[0]) == plain["off"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"attack_gate": "call"}),
        pytest.param({"experts": 1}),
    ],
    ids=["off", "call", "single"],
)
def test_checks_on_validation_images_do_not_change_the_training(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = {"epochs": 2, "batch_size": 20} | changes
    found = [weights(train_run(tmp_path / f"{n}", check_images=n, **settings)[0]) for n in (0, 3)]
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["off", "trades"])
def test_fgsm_on_validation_is_for_adversarial_training_alone(method: Any) -> None:
    images = dataset(validation=split(4))
    config = dataclasses.replace(CONFIG, adversarial=method, check_images=3)
    measured = validate(TrainingState(config, images, CPU))
    assert "val_pgd10_accuracy_mean" in measured
    assert ("val_fgsm_accuracy_mean" in measured) == (method != "off")
    without = validate(TrainingState(dataclasses.replace(config, check_images=0), images, CPU))
    assert without.keys() == {"val_accuracy_sample", "val_accuracy_mean"}


def test_validation_attacks_within_the_eps_of_the_settings() -> None:
    config = dataclasses.replace(CONFIG, check_images=10)
    nothing, all_of_it = (
        validate(TrainingState(dataclasses.replace(config, eps=eps), dataset(), CPU)) for eps in (0, 1)
    )
    for name in ("val_pgd10_accuracy_mean", "val_fgsm_accuracy_mean"):
        assert nothing[name] == nothing["val_accuracy_mean"]
        assert all_of_it[name] <= nothing[name]
    assert all_of_it["val_pgd10_accuracy_mean"] == 0


class _Untouchable:
    """A split that nobody may look at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test split's {name} was asked for")

    def __len__(self) -> int:
        raise AssertionError("the test split was counted")


def test_the_test_split_is_never_touched_in_training(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, epochs=2, batch_size=20, check_images=3, ema=0.5)
    trainer, run = TrainingState(config, dataset(), CPU), Run.create(tmp_path / "run", config)
    trainer.dataset = dataclasses.replace(trainer.dataset, test=_Untouchable())  # type: ignore[arg-type]
    loop.train(trainer, run)
    assert run.best_checkpoint.is_file()
    assert len(run.metrics()) == 2


# The best checkpoint


def _script(
    monkeypatch: pytest.MonkeyPatch, under_pgd: list[float], under_fgsm: list[float]
) -> list[dict[str, Tensor]]:
    """Have validation find these accuracies; the models that it was to look at."""
    seen: list[dict[str, Tensor]] = []

    def scripted(trainer: TrainingState) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        epoch = len(seen) - 1
        return {
            "val_accuracy_sample": 0.9,
            "val_accuracy_mean": 0.9,
            "val_pgd10_accuracy_mean": under_pgd[epoch],
            "val_fgsm_accuracy_mean": under_fgsm[epoch],
        }

    monkeypatch.setattr(loop, "validate", scripted)
    return seen


def _same(found: nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_the_best_checkpoint_is_the_first_that_is_best_under_pgd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _script(monkeypatch, [0.2, 0.5, 0.3, 0.5], [0.9, 0.6, 0.7, 0.8])
    _, run = train_run(tmp_path / "run", epochs=4, batch_size=20, check_images=10)
    model, info = load_model(run.best_checkpoint)
    assert (info["epoch"], info["val_pgd10_accuracy_mean"]) == (2, 0.5)
    assert _same(model, seen[1])
    assert not _same(model, seen[3])
    chosen, about = load_model(run.folder)
    assert about == info
    assert _same(chosen, seen[1])
    last, about = load_model(run.checkpoint)
    assert about["epoch"] == 4
    assert _same(last, seen[3])
    tensors, _ = load_checkpoint(run.best_checkpoint)
    assert all(name.startswith("model/") for name in tensors)


def test_the_best_checkpoint_is_there_from_the_first_epoch_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _script(monkeypatch, [0.0, 0.0], [0.0, 0.0])
    _, run = train_run(tmp_path / "run", epochs=2, batch_size=20, check_images=10)
    model, info = load_model(run.folder)
    assert info["epoch"] == 1
    assert _same(model, seen[0])


@pytest.mark.parametrize("changes", [{"adversarial": "off"}, {"check_images": 0}], ids=["plain", "unchecked"])
def test_without_attacks_in_training_and_checks_there_is_no_best(changes: dict[str, Any], tmp_path: Path) -> None:
    trainer, run = train_run(tmp_path / "run", **{"check_images": 4, "batch_size": 20} | changes)
    assert not run.best_checkpoint.exists()
    model, info = load_model(run.folder)
    assert info["epoch"] == 1
    assert _same(model, dict(trainer.model.state_dict()))


def test_the_command_evaluates_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _script(monkeypatch, [0.5, 0.4], [0.5, 0.5])
    evaluated = []
    monkeypatch.setattr(run_evaluation, "evaluate_run", lambda _run, target, *_, **__: evaluated.append(target.model))
    changes = {"adversarial": "fgsm-rs", "check_images": 4, "batch_size": 32}
    train.main([*options(write_data(tmp_path / "data.npz"), **changes), "--out", str(tmp_path / "run")])
    assert len(evaluated) == 1
    assert _same(evaluated[0], seen[0])
    assert not evaluated[0].training


# Catastrophic overfitting


def test_training_says_that_it_has_collapsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _script(monkeypatch, [0.3, 0.5, 0.0], [0.4, 0.6, 0.9])
    monkeypatch.setattr(loop, "collapsed", lambda records, images: collapsed(records, 100 * images))
    _, run = train_run(tmp_path / "run", epochs=3, batch_size=20, check_images=100, adversarial="fgsm-rs")
    lines = [line for line in capsys.readouterr().out.splitlines() if "catastrophic overfitting" in line]
    assert len(lines) == 1
    assert lines[0].startswith("epoch 3: ")
    assert "from 50.0 % to 0.0 %" in lines[0]
    assert "90.0 % under FGSM" in lines[0]
    assert str(run.best_checkpoint) in lines[0]
    assert load_model(run.best_checkpoint)[1]["epoch"] == 2


def test_training_counts_the_images_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _script(monkeypatch, [0.5], [0.5])
    counted = []
    monkeypatch.setattr(loop, "collapsed", lambda records_of, images: counted.append(images))
    train_run(tmp_path / "more", batch_size=20, check_images=100)
    _script(monkeypatch, [0.5], [0.5])
    train_run(tmp_path / "fewer", batch_size=20, check_images=4)
    assert counted == [10, 4]


def test_healthy_training_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _script(monkeypatch, [0.3, 0.5, 0.6], [0.4, 0.6, 0.9])
    train_run(tmp_path / "run", epochs=3, batch_size=20, check_images=100)
    assert "overfitting" not in capsys.readouterr().out


# Settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8/255", 8 / 255), ("0.03", 0.03), ("1e-3", 1e-3), ("-1/4", -0.25), ("2.5/5", 0.5), ("0/7", 0.0), ("3", 3.0)],
)
def test_a_number_may_be_a_fraction(text: str, expected: float) -> None:
    assert cli.number(text) == expected


@pytest.mark.parametrize("text", ["8/0", "1/2/3", "/", "", "a/2", "8/b", "8 of 255"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"could not convert|fraction of zero"):
        cli.number(text)


def test_options_of_the_attack_take_fractions() -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser)
    given = vars(parser.parse_args(["--eps", "8/255", "--attack-alpha", "2/255", "--ema", "999/1000"]))
    assert given == {"eps": 8 / 255, "attack_alpha": 2 / 255, "ema": 0.999}


@pytest.mark.parametrize(
    ("changes", "names", "code"),
    [
        ({"eps": "-0.1"}, "--eps", 1),
        ({"eps": "1.5"}, "--eps", 1),
        ({"eps": "nan"}, "--eps", 1),
        ({"eps": "8/0"}, "--eps", 2),
        ({"eps": "8:255"}, "--eps", 2),
        ({"attack_alpha": "-0.1"}, "--attack-alpha", 1),
        ({"attack_steps": "0"}, "--attack-steps", 1),
        ({"attack_steps": "1.5"}, "--attack-steps", 2),
        ({"trades_weight": "-1"}, "--trades-weight", 1),
        ({"trades_weight": "inf"}, "--trades-weight", 1),
        ({"ema": "1"}, "--ema", 1),
        ({"ema": "-0.5"}, "--ema", 1),
        ({"ema": "nan"}, "--ema", 1),
        ({"adversarial": "fgsm"}, "--adversarial", 2),
        ({"attack_batchnorm": "both"}, "--attack-batchnorm", 2),
        ({"attack_gate": "on"}, "--attack-gate", 2),
        ({"experts": "0"}, "--experts", 1),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_a_wrong_option_of_adversarial_training_is_named(
    changes: dict[str, str], names: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in changes.items()]
    message = error_line(capsys, train.main, [*arguments, "--out", str(tmp_path / "run")], code)
    assert names in message
    assert not (tmp_path / "run").exists()


def test_the_settings_of_the_attack_are_recorded(tmp_path: Path) -> None:
    given = {
        "adversarial": "trades",
        "eps": "4/255",
        "attack_alpha": "1/255",
        "attack_steps": 1,
        "attack_batchnorm": "train",
        "attack_gate": "sample",
        "trades_weight": 2.5,
        "ema": 0.5,
    }
    assert given.keys() - {"ema"} == ATTACK_SETTINGS
    data = write_data(tmp_path / "data.npz")
    _, run = trained([*options(data, epochs=1, batch_size=40, **given), "--out", str(tmp_path / "run")])
    written = json.loads(run.config_file.read_text(encoding="utf-8"))
    meant = given | {"eps": 4 / 255, "attack_alpha": 1 / 255}
    assert {name: written[name] for name in meant} == meant
    assert run.config().inner_attack == InnerAttackSettings("trades", 4 / 255, 1 / 255, 1, "train", "sample")


def test_without_adversarial_training_there_is_no_attack() -> None:
    assert TrainConfig(eps=0.1, attack_steps=3).inner_attack is None
    assert all(preset.inner_attack is None for preset in PRESETS.values())
    assert TrainingState(dataclasses.replace(CONFIG, adversarial="off"), dataset(), CPU).train_step.attack is None


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_s_attack_is_that_of_the_settings(method: Any) -> None:
    config = dataclasses.replace(CONFIG, adversarial=method, eps=0.1, attack_gate="mean", trades_weight=2.5)
    step = TrainingState(config, dataset(), CPU).train_step
    assert step.attack is not None
    assert step.attack.model is step.model
    assert step.attack.settings == InnerAttackSettings(method, 0.1, 2 / 255, 2, "eval", "mean")
    assert step.objective.trades_weight == (2.5 if method == "trades" else None)
    inner = step.attack.settings.attack()
    assert inner.random_start == (method != "trades")
    assert inner.steps == (1 if method == "fgsm-rs" else 2)
    assert inner.alpha == pytest.approx(0.125 if method == "fgsm-rs" else 2 / 255)
    assert np.isclose(inner.radius, 0.1)
    assert not math.isnan(inner.radius)
