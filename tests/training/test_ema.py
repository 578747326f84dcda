"""The average of the weights: what it is, that a run is judged by it, and that it is taken up again bit for bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import train
from immunity_fast.data.datasets import AnySplit
from immunity_fast.training import loop, run_evaluation, validation
from immunity_fast.training.checkpoint import load_checkpoint, load_model, under
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.ema import WeightAverage
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from immunity_fast.training.validation import validate
from tests import grids
from tests.small_runs import as_bytes, dataset, interrupted, options, saved, trained, weights, write_data

CPU = torch.device("cpu")


def _module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 2))


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _change(module: nn.Module, seed: int) -> None:
    """What a training step might do to weights and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    module(torch.rand(4, 3, 5, 5, generator=generator))


def _decay(step: int, decay: float) -> float:
    """Of step 1, 2, …"""
    return min(decay, (1 + step) / (10 + step))


def _averaged(states: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average after the last of a module's states, the first being from before the first step; in float64."""
    average = {name: value.double() for name, value in states[0].items()}
    for step, state in enumerate(states[1:], start=1):
        d = _decay(step, decay)
        for name, value in state.items():
            whole = not value.is_floating_point()
            average[name] = value.double() if whole else d * average[name] + (1 - d) * value.double()
    return average


def _close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    return all(
        torch.allclose(value.double(), expected[name].double(), rtol=1e-4, atol=1e-6) for name, value in found.items()
    )


# What it is


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
def test_it_is_the_recursion_written_out(decay: float) -> None:
    module = _module()
    average, states = WeightAverage(module, decay), [_state(module)]
    for step in range(13):
        _change(module, step)
        average.update()
        states.append(_state(module))
    assert _close(average.tensors(), _averaged(states, decay))
    assert not _close(average.tensors(), states[-1]) or decay == 0
    assert average.steps == 13


def test_the_decay_grows_until_it_is_what_was_asked_for() -> None:
    module = nn.Linear(1, 1, bias=False)
    expected = [2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 0.45, 0.45]
    average, kept = WeightAverage(module, 0.45), []
    for _ in expected:
        before = average.tensors()["weight"].clone()
        with torch.no_grad():
            module.weight.copy_(before + 1)
        average.update()
        kept.append(1 - float(average.tensors()["weight"] - before))
    assert kept == pytest.approx(expected, abs=1e-5)


def test_integers_are_copied() -> None:
    module = _module()
    average = WeightAverage(module, 0.999)
    for step in range(3):
        _change(module, step)
        average.update()
        count = average.tensors()["1.num_batches_tracked"]
        assert count.dtype == torch.int64
        assert count == step + 1


def test_of_what_does_not_change_it_is_that() -> None:
    module = _module()
    average, before = WeightAverage(module, 0.9), _state(module)
    for _ in range(5):
        average.update()
    assert all(torch.equal(value, before[name]) for name, value in average.tensors().items())


def test_it_is_apart_from_the_module_and_its_graph() -> None:
    module = _module()
    average = WeightAverage(module, 0.9)
    module(torch.ones(1, 3, 5, 5)).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    average.update()
    own = {value.data_ptr() for value in module.state_dict().values()}
    assert not own & {value.data_ptr() for value in average.tensors().values()}
    assert not any(value.requires_grad for value in average.tensors().values())
    assert all(p.grad is g for p, g in zip(module.parameters(), gradients, strict=True))
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_a_decay_out_of_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay: expected a number of at least 0 and below 1"):
        WeightAverage(_module(), decay)


def _some() -> tuple[nn.Module, WeightAverage]:
    module = _module()
    average = WeightAverage(module, 0.9)
    for step in range(3):
        _change(module, step)
        average.update()
    return module, average


def test_applied_it_is_the_module_s_state_for_a_while() -> None:
    module, average = _some()
    before, kept = _state(module), {name: value.clone() for name, value in average.tensors().items()}
    tensors = [id(parameter) for parameter in module.parameters()]
    with average.applied():
        assert all(torch.equal(value, kept[name]) for name, value in module.state_dict().items())
        _change(module, 9)  # whatever happens to the module, the average stays
        assert [id(parameter) for parameter in module.parameters()] == tensors
        assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(value, kept[name]) for name, value in average.tensors().items())


def test_after_an_exception_the_module_is_as_it_was() -> None:
    module, average = _some()
    before = _state(module)
    with pytest.raises(KeyboardInterrupt), average.applied():
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_was_saved_goes_on_bit_for_bit() -> None:
    module, average = _some()
    stored = {name: value.clone() for name, value in average.tensors().items()}
    other = WeightAverage(module, 0.9)
    other.load(stored, average.steps)
    for both in (average, other):
        both.update()
    for name, value in stored.items():
        assert torch.equal(average.tensors()[name], other.tensors()[name])
        assert other.tensors()[name] is not value
    assert average.steps == other.steps == 4


# A run


CONFIG = TrainConfig(experts=2, batch_size=10, epochs=2, check_images=3, adversarial="fgsm-rs", ema=0.6)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The model's states before the first step and after each."""
    seen: list[dict[str, Tensor]] = []
    advance = TrainingState.advance

    def recorded(trainer: TrainingState, *batch: Any) -> None:
        if not seen:
            seen.append(_state(trainer.model))
        advance(trainer, *batch)
        seen.append(_state(trainer.model))

    monkeypatch.setattr(TrainingState, "advance", recorded)
    return seen


def test_a_run_is_judged_by_its_average(
    states: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated: list[dict[str, Tensor]] = []
    measure: Callable[[TrainingState, AnySplit], dict[str, float]] = validation._validate

    def recorded(trainer: TrainingState, split: AnySplit) -> dict[str, float]:
        validated.append(_state(trainer.model))
        # The second epoch is not as good as the first.
        return measure(trainer, split) | {"val_pgd10_accuracy_mean": 0.5 / len(validated)}

    monkeypatch.setattr(validation, "_validate", recorded)
    trainer, run = TrainingState(CONFIG, dataset(), CPU), Run.create(tmp_path / "run", CONFIG)
    loop.train(trainer, run)
    assert len(states) == 5
    first, second = _averaged(states[:3], 0.6), _averaged(states, 0.6)
    assert not _close(states[2], first)
    assert not _close(states[4], second)
    assert _close(validated[0], first)
    assert _close(validated[1], second)
    assert all(torch.equal(value, states[4][name]) for name, value in trainer.model.state_dict().items())
    for path, epoch, expected in ((run.checkpoint, 2, second), (run.best_checkpoint, 1, first), (run.folder, 1, first)):
        model, info = load_model(path)
        assert info["epoch"] == epoch
        assert _close(model.state_dict(), expected)
    tensors, _ = load_checkpoint(run.checkpoint)
    assert _close(under("model", tensors), states[4])


def test_without_an_attack_the_last_average_is_the_model(
    states: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = []
    monkeypatch.setattr(run_evaluation, "evaluate_run", lambda _run, target, *_, **__: evaluated.append(target.model))
    arguments = options(write_data(tmp_path / "data.npz"), epochs=1, batch_size=20, ema=0.6)
    train.main([*arguments, "--out", str(tmp_path / "run")])
    expected = _averaged(states, 0.6)
    assert not _close(states[-1], expected)
    for model in (evaluated[0], load_model(tmp_path / "run")[0]):
        assert _close(model.state_dict(), expected)
        assert not model.training


def test_what_validation_measures_is_that_of_the_average() -> None:
    trainer, other = (TrainingState(dataclasses.replace(CONFIG, ema=ema), dataset(), CPU) for ema in (0.6, None))
    assert trainer.average is not None
    other.model.load_state_dict(trainer.model.state_dict())
    expected = validate(other)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(-1.5)
    spoilt = weights(trainer)
    assert validate(trainer)["val_mutual_information"] == pytest.approx(expected["val_mutual_information"], rel=1e-6)
    assert weights(trainer) == spoilt
    trainer.average.update()
    assert not _close(trainer.average.tensors(), before)
    assert validate(trainer)["val_mutual_information"] != expected["val_mutual_information"]


def test_an_average_changes_nothing_about_the_training(tmp_path: Path) -> None:
    found = []
    for ema in (None, 0.6):
        config = dataclasses.replace(CONFIG, ema=ema)
        trainer = TrainingState(config, dataset(), CPU)
        loop.train(trainer, Run.create(tmp_path / str(ema), config))
        found.append(weights(trainer))
    assert found[0] == found[1]


# Taken up again


@pytest.mark.parametrize(
    ("settings", "where", "count", "after"),
    grids.sampled(
        [
            ({"ema": 0.7}, (TrainingState, "advance"), 3, False),
            ({"ema": 0.7}, (loop, "validate"), 2, True),
            ({"adversarial": "pgd"}, (TrainingState, "advance"), 4, True),
            ({"adversarial": "trades", "ema": 0.7, "experts": 1}, (TrainingState, "advance"), 2, False),
            ({"adversarial": "fgsm-rs", "attack_gate": "sample", "ema": 0.7}, (loop, "save_best"), 1, True),
            ({"adversarial": "fgsm-rs", "experts": 1}, (loop, "save_best"), 2, False),
        ],
        ordinary=lambda settings, where, *_: (
            ("adversarial" not in settings and where[0] is TrainingState) or settings.get("attack_gate") == "sample"
        ),
    ),
    ids=["average", "average-validation", "pgd", "trades", "fgsm-rs", "fgsm-rs-single"],
)
def test_an_interrupted_run_ends_as_if_it_had_never_been(
    settings: dict[str, Any], where: tuple[Any, str], count: int, after: bool, tmp_path: Path
) -> None:
    common = {"batch_size": 20, "attack_steps": 2, "check_images": 3, "checkpoint_every": 1, "lr": 0.02}
    arguments = options(write_data(tmp_path / "data.npz"), **common, **settings)
    _, whole = trained([*arguments, "--out", str(tmp_path / "whole")])
    interrupted(where, count, [*arguments, "--out", str(tmp_path / "run")], after=after)
    torch.manual_seed(11)  # another process
    _, run = trained(["--resume", str(tmp_path / "run")])
    found = saved(tmp_path / "run")
    assert found == saved(tmp_path / "whole")
    assert any(name.startswith("ema/") for name in found["tensors"]) == ("ema" in settings)
    assert run.best_checkpoint.exists() == whole.best_checkpoint.exists() == ("adversarial" in settings)
    if run.best_checkpoint.exists():
        assert run.best_checkpoint.read_bytes() == whole.best_checkpoint.read_bytes()


def test_a_checkpoint_holds_the_average_beside_the_weights(tmp_path: Path) -> None:
    arguments = options(write_data(tmp_path / "data.npz"), ema=0.7, epochs=1, batch_size=20)
    trainer, run = trained([*arguments, "--out", str(tmp_path / "run")])
    tensors, _ = load_checkpoint(run.checkpoint)
    assert trainer.average is not None
    assert trainer.average.steps == trainer.step == 2
    assert under("ema", tensors).keys() == under("model", tensors).keys()
    for name, value in trainer.average.tensors().items():
        assert as_bytes(tensors[f"ema/{name}"]) == as_bytes(value)
    assert any(not torch.equal(tensors[f"ema/{name}"], value) for name, value in under("model", tensors).items())
