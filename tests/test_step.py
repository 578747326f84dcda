"""One training step: what it measures and what it does to the weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.step import MEASURED, cosine_lr, train_step

LOSS = FusedImmunityLoss(alpha=0.5, beta=0.7, gamma=1e-3, size=(12, 12))


def _model() -> ImmunityMoE:
    torch.manual_seed(0)
    return ImmunityMoE("resnet8", 2, 3, image_size=12)


def _batch() -> tuple[Tensor, Tensor]:
    images = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return images, torch.tensor([0, 1, 2, 0, 1, 2])


def _gradient(model: ImmunityMoE) -> Tensor:
    """All of the loss's gradient for the batch, in one vector."""
    model = copy.deepcopy(model)
    images, labels = _batch()
    logits, activations, gate = model.expert_outputs(images)
    LOSS(logits, activations, labels, gate).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _weights(model: ImmunityMoE) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_measures_the_loss_and_its_terms_before_the_update() -> None:
    model = _model()
    images, labels = _batch()
    logits, activations, gate = copy.deepcopy(model).expert_outputs(images)
    loss, terms = LOSS(logits, activations, labels, gate, return_terms=True)
    measured = train_step(model, LOSS, SGD(model.parameters(), 0.1), images, labels)
    assert measured.dtype == torch.float64
    assert not measured.requires_grad
    assert MEASURED == ("loss", "cross_entropy", "mutual_information_loss", "position_stability")
    assert measured.tolist() == [loss.item(), *(term.item() for term in terms)]


def test_the_terms_add_up_to_the_loss() -> None:
    model = _model()
    loss, cross_entropy, information, stability = train_step(model, LOSS, SGD(model.parameters(), 0.1), *_batch())
    expected = cross_entropy + 0.7 / 2 * information + 1e-3 / 2 * stability
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_it_moves_the_weights_against_the_gradient() -> None:
    model = _model()
    gradient, before = _gradient(model), _weights(model)
    train_step(model, LOSS, SGD(model.parameters(), 0.125), *_batch())
    torch.testing.assert_close(_weights(model), before - 0.125 * gradient)


def test_gradients_of_an_earlier_step_are_forgotten() -> None:
    model = _model()
    gradient, before = _gradient(model), _weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    train_step(model, LOSS, SGD(model.parameters(), 0.125), *_batch())
    torch.testing.assert_close(_weights(model), before - 0.125 * gradient)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_gradient_that_is_too_long_is_scaled_down(share: float) -> None:
    model = _model()
    gradient, before = _gradient(model), _weights(model)
    limit = share * gradient.norm().item()
    train_step(model, LOSS, SGD(model.parameters(), 1.0), *_batch(), clip_grad_norm=limit)
    torch.testing.assert_close((before - _weights(model)).norm().item(), limit, rtol=1e-4, atol=0)
    torch.testing.assert_close(_weights(model), before - share * gradient, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_short_enough_is_left_alone() -> None:
    model, other = _model(), _model()
    train_step(model, LOSS, SGD(model.parameters(), 0.1), *_batch())
    train_step(other, LOSS, SGD(other.parameters(), 0.1), *_batch(), clip_grad_norm=1e9)
    assert torch.equal(_weights(model), _weights(other))


def test_gate_and_experts_are_both_trained() -> None:
    model = _model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(model, LOSS, SGD(model.parameters(), 0.1), *_batch())
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"gate", "experts"}


def test_running_statistics_move_once() -> None:
    model = _model()
    train_step(model, LOSS, SGD(model.parameters(), 0.1), *_batch())
    counts = [value for name, value in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert all((count == 1).all() for count in counts)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.4), (25, 0.2 * (1 + math.sqrt(0.5))), (50, 0.2), (99, 0.4 * 2.467e-4)]
)
def test_the_learning_rate_follows_half_a_cosine(step: int, expected: float) -> None:
    assert cosine_lr(0.4, step, 100) == pytest.approx(expected, rel=1e-3)


def test_the_learning_rate_only_falls_and_stays_positive() -> None:
    rates = [cosine_lr(0.1, step, 37) for step in range(37)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.1
    assert rates[-1] > 0
    assert cosine_lr(0.1, 0, 1) == 0.1
