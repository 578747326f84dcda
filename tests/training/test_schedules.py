"""The learning rate of each step, beside PyTorch's schedulers in float64, and in a run."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer, lr_scheduler

from immunity_fast.training.config import TrainConfig
from immunity_fast.training.schedules import LearningRate

LR, STEPS, EPOCH = 0.3, 35, 7  # 5 epochs


def _rates(scheduler: Any, steps: int = STEPS) -> list[float]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], LR)
    made = scheduler(optimizer)
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        made.step()
    return found


def _ours(**settings: Any) -> list[float]:
    rate = LearningRate(LR, STEPS, EPOCH, **settings)
    return [rate(step) for step in range(STEPS)]


SAME: dict[str, tuple[dict[str, Any], Any]] = {
    "cosine": ({}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
    "cosine to a rate": ({"lr_min": 0.01}, lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.01)),
    "linear": ({"schedule": "linear"}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, STEPS)),
    "linear to a rate": (
        {"schedule": "linear", "lr_min": 0.03},
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, STEPS),
    ),
    "step": (
        {"schedule": "step", "milestones": (1, 3.0), "factor": 0.2},
        lambda o: lr_scheduler.MultiStepLR(o, [7, 21], 0.2),
    ),
    "step by itself": ({"schedule": "step"}, lambda o: lr_scheduler.MultiStepLR(o, [18, 27], 0.1)),
    "exponential": ({"schedule": "exponential", "factor": 0.5}, lambda o: lr_scheduler.StepLR(o, EPOCH, 0.5)),
    "constant": ({"schedule": "constant"}, lambda o: lr_scheduler.ConstantLR(o, 1.0)),
    "onecycle": (
        {"schedule": "onecycle"},
        lambda o: lr_scheduler.OneCycleLR(o, LR, STEPS, cycle_momentum=False),
    ),
    "onecycle with a warm-up": (
        {"schedule": "onecycle", "warmup_epochs": 2},
        lambda o: lr_scheduler.OneCycleLR(o, LR, STEPS, pct_start=14 / STEPS, cycle_momentum=False),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_rates_are_those_of_torch(name: str) -> None:
    settings, scheduler = SAME[name]
    assert _ours(**settings) == pytest.approx(_rates(scheduler), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "exponential", "constant"])
@pytest.mark.parametrize("epochs", [2, 0.6])
def test_behind_a_warm_up_comes_the_whole_of_the_schedule(schedule: Any, epochs: float) -> None:
    warm = round(epochs * EPOCH)

    def both(optimizer: Optimizer) -> Any:
        rise = lr_scheduler.LinearLR(optimizer, 1 / warm, 1.0, warm - 1)
        left = STEPS - warm
        down = {
            "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, left),
            "linear": lambda: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, left),
            "exponential": lambda: lr_scheduler.StepLR(optimizer, EPOCH, 0.97),
            "constant": lambda: lr_scheduler.ConstantLR(optimizer, 1.0),
        }[schedule]()
        return lr_scheduler.SequentialLR(optimizer, [rise, down], [warm])

    rates = _ours(schedule=schedule, warmup_epochs=epochs)
    assert rates == pytest.approx(_rates(both), rel=1e-12, abs=1e-15)
    assert rates[0] == pytest.approx(LR / warm)
    assert rates[warm - 1] == rates[warm] == LR


def test_without_settings_the_bits_are_those_of_half_a_cosine() -> None:
    assert _ours() == [LR * 0.5 * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]


def test_a_warm_up_may_be_the_whole_run() -> None:
    assert _ours(warmup_epochs=5) == pytest.approx([LR * (step + 1) / STEPS for step in range(STEPS)])
    rate = LearningRate(LR, STEPS, EPOCH, "linear", warmup_epochs=5)
    assert rate(STEPS) == 0


def test_nothing_falls_below_the_least_rate() -> None:
    for schedule, warmup in itertools.product(("step", "exponential", "cosine", "linear", "onecycle"), (0, 1.5)):
        rates = _ours(schedule=schedule, lr_min=0.2, warmup_epochs=warmup)
        assert min(rates[max(11, round(warmup * EPOCH)) :]) >= 0.2 - 1e-15, schedule
        assert rates[-1] < LR


def test_a_run_of_one_step_has_the_highest_rate() -> None:
    for schedule in ("cosine", "linear", "step", "exponential", "constant", "onecycle"):
        assert LearningRate(LR, 1, 1, schedule)(0) == LR  # type: ignore[arg-type]


def test_milestones_are_epochs_of_the_whole_run() -> None:
    rates = _ours(schedule="step", milestones=(3,), warmup_epochs=2)
    assert rates[13:21] == [LR] * 8
    assert rates[21:] == pytest.approx([LR / 10] * 14)
    assert _ours(schedule="step", milestones=(9,)) == [LR] * STEPS, "beyond the end"


@pytest.mark.parametrize("epochs", [3, 7, 9, 30, 90])
@pytest.mark.parametrize("steps", [1, 7, 49, 391])
def test_a_milestone_is_the_first_step_of_its_epoch(epochs: int, steps: int) -> None:
    for milestone in range(1, epochs):
        rate = LearningRate(1.0, epochs * steps, steps, "step", milestones=(milestone,))
        assert rate(milestone * steps - 1) == 1.0
        assert rate(milestone * steps) == 0.1


def test_a_milestone_within_an_epoch_is_its_own_step() -> None:
    """0.7 · 10 is more than 7 in floating point."""
    rate = LearningRate(1.0, 20, 10, "step", milestones=(0.7, 1.15))
    assert [step for step in range(1, 20) if rate(step) < rate(step - 1)] == [7, 12]


def test_settings_are_the_schedule_s() -> None:
    config = TrainConfig(
        epochs=5, lr=0.4, schedule="step", milestones="2,4", lr_factor=0.5, warmup_epochs=1, lr_min=0.15
    )
    rate = config.learning_rate(steps_per_epoch=2)
    assert [rate(step) for step in range(10)] == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.2, 0.15, 0.15])
