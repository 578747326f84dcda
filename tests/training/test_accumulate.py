"""Several batches an optimiser's step: the gradient of one batch as large, and what of a run counts steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.training import loop, step
from immunity_fast.training.adversarial import InnerAttack, InnerAttackSettings
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from immunity_fast.training.step import TrainStep
from tests.small_runs import CONFIG, CPU, dataset, weights


def _network() -> nn.Module:
    """Without BatchNorm, whose statistics are a batch's."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))


def _model() -> ImmunityMoE:
    torch.manual_seed(0)
    return ImmunityMoE.from_experts([_network(), _network()], image_size=8, stage="0").double()


def _batch(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 3


def _gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _stepped(parts: int, *, gamma: float = 0.0, attack: bool = False, **options: Any) -> tuple[nn.Module, Tensor]:
    model = _model()
    loss_fn = FusedImmunityLoss(alpha=0.5, beta=0.7, gamma=gamma, size=(8, 8))
    if attack:
        options["attack"] = InnerAttack(model, InnerAttackSettings("fgsm-rs", eps=0.0))
    train_step = TrainStep(model, loss_fn, torch.optim.SGD(model.parameters(), 0.5), **options)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    images, labels = _batch()
    measured = []
    for index, (some, theirs) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True)):
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)), "not before"
        measured.append(train_step(some, theirs, index=index, count=parts))
    return model, torch.stack(measured).mean(0)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.05}, {"attack": True}], ids=["plain", "clip", "attack"])
def test_batches_together_are_one_as_large(parts: int, options: dict[str, Any]) -> None:
    """Cross-entropies and mutual information are means over images: exactly, in float64."""
    whole, of_whole = _stepped(1, **options)
    model, of_parts = _stepped(parts, **options)
    torch.testing.assert_close(_gradients(model), _gradients(whole), rtol=1e-10, atol=1e-13)
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(of_parts[:3], of_whole[:3], rtol=1e-10, atol=0)


def test_position_stability_is_each_batch_s_own() -> None:
    """Its mean distance is the batch's: with γ the gradient is the mean of those of the parts."""
    model, _ = _stepped(2, gamma=0.3)
    images, labels = _batch()
    means = []
    for some, theirs in zip(images.chunk(2), labels.chunk(2), strict=True):
        twin = _model()
        loss_fn = FusedImmunityLoss(alpha=0.5, beta=0.7, gamma=0.3, size=(8, 8))
        TrainStep(twin, loss_fn, torch.optim.SGD(twin.parameters(), 0.5))(some, theirs)
        means.append(_gradients(twin))
    torch.testing.assert_close(_gradients(model), torch.stack(means).mean(0), rtol=1e-10, atol=1e-13)
    whole, _ = _stepped(1, gamma=0.3)
    assert not torch.allclose(_gradients(model), _gradients(whole), rtol=1e-3)


def test_the_scaler_of_float16_moves_once_a_step() -> None:
    model = _model().float()
    loss_fn = FusedImmunityLoss(alpha=0.5, beta=0.7, gamma=0.0, size=(8, 8))
    train_step = TrainStep(model, loss_fn, torch.optim.SGD(model.parameters(), 0.5), amp="fp16")
    moved = []
    train_step.scaler.update = lambda: moved.append(1)  # type: ignore[method-assign]
    images, labels = _batch()
    for index in range(3):
        train_step(images[index::3].float(), labels[index::3], index=index, count=3)
    assert moved == [1]


def test_processes_meet_at_the_last_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[str] = []

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *batch: Any) -> Any:
            alone.append("forward")
            return self.module(*batch)

        @contextlib.contextmanager
        def no_sync(self) -> Iterator[None]:
            alone.append("alone")
            yield
            alone.append("end")

    monkeypatch.setattr(step, "DistributedDataParallel", Wrapped)
    monkeypatch.setattr(step, "_distributed", lambda objective, _group: Wrapped(objective))
    _stepped(3, group=object())
    assert alone == ["alone", "forward", "end", "alone", "forward", "end", "forward"]


# A run


def _run(folder: Path, **changes: Any) -> tuple[TrainingState, list[dict[str, Any]]]:
    config = dataclasses.replace(CONFIG, **changes)
    state = TrainingState(config, dataset(), CPU)  # 5 batches of 4 an epoch
    run = Run.create(folder, config)
    loop.train(state, run)
    return state, run.metrics()


def test_a_run_counts_steps_of_the_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares, update = [], TrainStep._backward

    def seen(self: TrainStep, batch: Any, index: int, count: int) -> Tensor:
        shares.append((index, count, self.optimizer.param_groups[0]["lr"]))
        return update(self, batch, index, count)

    monkeypatch.setattr(TrainStep, "_backward", seen)
    state, records = _run(tmp_path / "run", accumulate=2, epochs=2, ema=0.5, warmup_epochs=1, lr=0.3)
    assert [share[:2] for share in shares] == 2 * [(0, 2), (1, 2), (0, 2), (1, 2), (0, 1)]
    rates = [share[2] for share in shares[:5]]
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3]), "one of each step"
    assert [record["step"] for record in records] == [3, 6]
    assert (state.step, state.steps, state.steps_per_epoch) == (6, 6, 3)
    assert state.average is not None
    assert state.average.steps == 6


def test_more_batches_than_an_epoch_has_are_the_epoch(tmp_path: Path) -> None:
    state, records = _run(tmp_path / "many", accumulate=99, epochs=2)
    assert [record["step"] for record in records] == [1, 2]
    other, _ = _run(tmp_path / "all", accumulate=5, epochs=2)
    assert weights(state) == weights(other)


@pytest.mark.exhaustive  # half a minute of tracing
def test_compiled_steps_accumulate_as_eager_ones_do() -> None:
    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        return graph.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: torch._dynamo.optimize(backend)(function))
        compiled, _ = _stepped(2, compile="on")
    eager, _ = _stepped(2)
    torch.testing.assert_close(_gradients(compiled), _gradients(eager), rtol=1e-9, atol=1e-12)
