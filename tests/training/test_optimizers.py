"""Optimisers by name: what they compute, what they keep, and runs with them that go on to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from immunity_fast import train
from immunity_fast.training.checkpoint import load_checkpoint, load_optimizer_tensors, optimizer_tensors
from immunity_fast.training.config import TrainConfig, from_preset
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.optimizers import KINDS, NUMBERS, OPTIMISERS, make_optimizer, possible_state
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests.small_runs import CONFIG, CPU, dataset, error_line, interrupted, options, saved, trained


def _parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4, 2), (5,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def _give_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(parameter.dtype)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_are_those_of_torch_in_float64(name: str) -> None:
    kind = KINDS[name]
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    ours_only: dict[str, Any] = {}
    if kind.betas:
        settings["betas"] = (0.8, 0.95)
    if kind.eps:
        settings["eps"] = 1e-5
    if kind.momentum is not None:
        settings["momentum"] = 0.7
    if name == "sgd":
        ours_only["nesterov"] = True
    parameters, doubles = _parameters(), _parameters(torch.float64)
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}]
    twins = [{"params": doubles[:1]}, {"params": doubles[1:], "weight_decay": 0.0}]
    ours = make_optimizer(name, groups, **settings)
    theirs = getattr(torch.optim, kind.of_torch)(twins, **settings, **ours_only, foreach=False)
    for step in range(4):
        _give_gradients(parameters, step)
        _give_gradients(doubles, step)
        ours.step()
        theirs.step()
    for parameter, double in zip(parameters, doubles, strict=True):
        torch.testing.assert_close(parameter.double(), double, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_what_it_keeps_is_known_and_taken_up_to_the_same_bits(name: str) -> None:
    momentum = 0.5 if KINDS[name].momentum is not None else None
    runs = []
    for _ in range(2):
        parameters = _parameters()
        groups = [{"params": parameters[1:]}, {"params": parameters[:1]}]  # another order than the model's
        runs.append((parameters, make_optimizer(name, groups, 0.01, momentum=momentum)))
    (parameters, optimizer), (others, other) = runs
    for step in range(2):
        _give_gradients(parameters, step)
        optimizer.step()
    kept = {name: value.clone() for name, value in optimizer_tensors("o", optimizer, parameters).items()}
    known = possible_state(optimizer, parameters)
    assert kept.keys() == {f"o/{entry}" for entry in known}
    for entry, value in kept.items():
        like = known[entry.removeprefix("o/")]
        assert (value.shape, value.dtype) == (like.shape, like.dtype)
    with torch.no_grad():
        for mine, theirs in zip(others, parameters, strict=True):
            mine.copy_(theirs)
    load_optimizer_tensors(other, {entry.removeprefix("o/"): value for entry, value in kept.items()}, others)
    for step in range(2, 4):
        for own, each in ((parameters, optimizer), (others, other)):
            _give_gradients(own, step)
            each.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(others, parameters, strict=True))


def test_the_fast_implementation_is_taken_where_there_is_one() -> None:
    assert isinstance(make_optimizer("sgd", _parameters()), FusedSGD)
    for name in OPTIMISERS:
        assert bool(make_optimizer(name, _parameters()).defaults.get("fused")) == (KINDS[name].fused or name == "sgd")
    gaps = [nn.Parameter(torch.ones(4, 4)[:, ::2])]
    assert not make_optimizer("adam", gaps).defaults["fused"], "which would take the gaps for weights"


def test_defaults_are_those_of_the_table() -> None:
    for name, kind in KINDS.items():
        config = TrainConfig(optimizer=name)  # type: ignore[arg-type]
        assert (config.lr, config.weight_decay, config.momentum) == (kind.lr, kind.weight_decay, kind.momentum or 0)
        group = make_optimizer(name, _parameters()).param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (kind.lr, kind.weight_decay)
    assert (TrainConfig().lr, TrainConfig().momentum, TrainConfig().weight_decay) == (0.05, 0.9, 5e-4)


def test_another_optimiser_has_its_own_rate_unless_one_is_given() -> None:
    assert from_preset({"preset": "paper", "optimizer": "adamw"}).lr == 1e-3
    assert from_preset({"preset": "paper", "optimizer": "sgd"}).lr == 0.01
    assert from_preset({"preset": "paper", "optimizer": "adamw", "lr": 0.01}).lr == 0.01
    config = from_preset({"optimizer": "adamw", "lr": 0.05, "weight_decay": 5e-4})
    again = train.parse([*config.options(), "--out", "none"]).config
    assert again == config, "as they are the preset's numbers, of another optimiser"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--betas", "0.9,0.99"], "--betas: expected none with sgd, which has none, but adam"),
        (["--optimizer", "adamw", "--betas", "0.9"], "--betas: expected two numbers"),
        (["--optimizer", "adam", "--momentum", "0.5"], "--momentum: expected none with adam, which has none, but sgd"),
        (["--optimizer-eps", "1e-3"], "--optimizer-eps: expected none with sgd"),
        (["--milestones", "1,2"], "--milestones: expected none with --schedule cosine, but step, got (1.0, 2.0)"),
        (["--schedule", "onecycle", "--lr-factor", "0.5"], "--lr-factor: expected none with --schedule onecycle"),
        (["--lr", "0.01", "--lr-min", "0.1"], "--lr-min: expected 0 to 0.01, the learning rate, got 0.1"),
        (["--epochs", "1", "--warmup-epochs", "2"], "--warmup-epochs: expected 0 to 1, the run's epochs, got 2.0"),
    ],
)
def test_what_does_not_go_together_is_a_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in error_line(capsys, train.main, [*words, "--out", "none"])


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^optimizer: expected one of sgd, adam, .*, got 'lion'$"):
        make_optimizer("lion", _parameters())
    with pytest.raises(ValueError, match=r"^betas: expected none with rmsprop"):
        make_optimizer("rmsprop", _parameters(), betas=(0.9, 0.99))


@pytest.mark.parametrize("setting", [{"betas": (0.5, 0.9)}, {"optimizer_eps": 0.1}])
def test_settings_reach_the_optimiser(setting: dict[str, Any]) -> None:
    config = TrainConfig(**vars(CONFIG) | {"optimizer": "adam", "lr": 0.01} | setting)
    (group,) = TrainingState(config, dataset(), CPU).optimizer.param_groups
    assert group["betas"] == setting.get("betas", (0.9, 0.999))
    assert group["eps"] == setting.get("optimizer_eps", 1e-8)


@pytest.mark.parametrize("name", ["adamw", "nadam"])
def test_a_killed_run_goes_on_to_the_same_bits(name: str, data: Path, tmp_path: Path) -> None:
    """Groups have another order than the model; the schedule is taken up within its warm-up."""
    given = {
        "optimizer": name,
        "decay": "weights",
        "schedule": "onecycle",
        "warmup-epochs": 0.8,
        "accumulate": 2,
        "checkpoint-every": 1,
    }
    arguments = options(data, arch="resnet8", beta=0.0, gamma=0.0, **given)
    interrupted((TrainingState, "advance"), 4, [*arguments, "--out", str(tmp_path / "run")])
    tensors, info = load_checkpoint(Run(tmp_path / "run").checkpoint)
    assert (info["step"], int(tensors["loader/position"])) == (1, 2), "only whole steps are saved"
    kept = [entry for entry in tensors if entry.startswith("optimizer/")]
    assert len(kept) == info["momenta"]
    assert any(entry.rpartition("/")[2] in NUMBERS for entry in kept)
    trained(["--resume", str(tmp_path / "run")])
    trained([*arguments, "--out", str(tmp_path / "whole")])
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")
    records = Run(tmp_path / "run").metrics()
    assert [record["step"] for record in records] == [3, 6], "2 + 2 + 1 batches an epoch"
    rate = Run(tmp_path / "run").config().learning_rate(3)
    assert [record["lr"] for record in records] == [rate(2), rate(5)]
