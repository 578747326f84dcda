"""The attack in a training step: what is attacked and how, the model left as it was, and collapses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.attacks import pgd
from immunity_fast.models.gate import Switch
from immunity_fast.training.adversarial import BatchNormMode, InnerAttack
from immunity_fast.training.collapse import collapsed
from tests import grids
from tests.adversarial_cases import (
    ALPHA,
    EPS,
    LABELS,
    METHODS,
    STEPS,
    attacked,
    inner_settings,
    noisy_images,
    records_of,
    seeded,
    small_mixture,
    state_of,
)


def _outputs_of(
    model: ImmunityMoE, batchnorm: str, gate: str, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """The mixture's log-probabilities from experts of their own, in the mode that the settings describe."""
    experts = [copy.deepcopy(expert).train(batchnorm == "train") for expert in model.unstack()]
    network, normalize = copy.deepcopy(model.gate.network), copy.deepcopy(model.normalize)

    def outputs(images: Tensor) -> Tensor:
        logits = [expert(images) for expert in experts]
        scores = network(normalize(images)).softmax(-1)
        rows = []
        permutation: list[int] = []
        for q in range(len(images)):
            if gate == "sample" or not permutation:
                permutation = list(range(len(experts)))
                if gate in ("call", "sample"):
                    if q == 0:
                        count = len(images) if gate == "sample" else 1
                        keys = torch.rand(count, len(experts), generator=generator, dtype=torch.float64)
                    permutation = keys[q].argsort().tolist()
            mixture = torch.zeros(3, dtype=images.dtype)
            for i, j in enumerate(permutation):
                weight = 1 / len(experts) if gate == "mean" else scores[q, j]
                mixture = mixture + weight * torch.softmax(logits[i][q], 0)
            rows.append(mixture.log())
        return torch.stack(rows)

    return outputs


def _inside(x: Tensor, images: Tensor, eps: float = EPS) -> Tensor:
    """The nearest image of the ball that is in [0, 1]."""
    x = torch.minimum(torch.maximum(x, images - eps), images + eps)
    return x.clamp(0, 1)


def _steepest(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Signs of the gradient of a loss, summed over the images."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0].sign()


# What is attacked


@pytest.mark.parametrize("gate", get_args(Switch))
@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
def test_pgd_attacks_the_mixture_in_the_mode_of_the_settings(batchnorm: str, gate: str) -> None:
    model, images = small_mixture(), noisy_images()
    model.gate.generator = seeded()
    found = attacked(InnerAttack(model, inner_settings("pgd", batchnorm, gate)), images)
    settings = {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "random_start": True}
    torch.manual_seed(3)
    expected = pgd(_outputs_of(model, batchnorm, gate, seeded()), images, LABELS, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for other in ((batchnorm, {"off": "mean"}.get(gate, "off")), ({"eval": "train"}.get(batchnorm, "eval"), gate)):
        torch.manual_seed(3)  # and it can be told from another mode
        assert not torch.equal(pgd(_outputs_of(model, *other, seeded()), images, LABELS, **settings), found)


@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
def test_what_is_attacked_has_batch_or_running_statistics(batchnorm: str) -> None:
    model, images = small_mixture(), noisy_images()
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0].detach(), output)))
    attacked(InnerAttack(model, inner_settings("pgd", batchnorm)), images)
    hook.remove()
    twin = copy.deepcopy(model).train(batchnorm == "train")
    twin.gate.eval().switch = "off"
    assert len(seen) == STEPS
    for inputs, outputs in seen:
        torch.testing.assert_close(outputs.detach(), twin(inputs).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
@pytest.mark.parametrize("changes", [{}, {"alpha": 0.5, "steps": 7}], ids=["", "other steps"])
def test_fgsm_rs_is_one_step_of_1_25_eps_from_a_random_point(changes: dict[str, Any], batchnorm: str) -> None:
    model, images = small_mixture(), noisy_images()
    found = attacked(InnerAttack(model, inner_settings("fgsm-rs", batchnorm, **changes)), images)
    outputs = _outputs_of(model, batchnorm, "off", seeded())
    torch.manual_seed(3)
    start = _inside(images + ((2 * torch.rand(images.shape) - 1) * EPS).double(), images)
    signs = _steepest(lambda x: F.nll_loss(outputs(x), LABELS, reduction="none"), start)
    torch.testing.assert_close(found, _inside(start + 1.25 * EPS * signs, images), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("batchnorm", "gate"), grids.every(2, get_args(BatchNormMode), get_args(Switch)))
def test_trades_maximises_divergence_from_a_little_noise_on(batchnorm: str, gate: str) -> None:
    model, images = small_mixture(), noisy_images()
    model.gate.generator = seeded()
    found = attacked(InnerAttack(model, inner_settings("trades", batchnorm, gate)), images)
    outputs = _outputs_of(model, batchnorm, gate, seeded())
    clean = outputs(images).detach()
    torch.manual_seed(3)
    x = _inside(images + 1e-3 * torch.randn(images.shape, dtype=torch.float64), images)
    for _ in range(STEPS):
        signs = _steepest(lambda x: (clean.exp() * (clean - outputs(x))).sum(-1), x)
        x = _inside(x + ALPHA * signs, images)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_labels_are_nothing_to_the_attack_of_trades() -> None:
    attack = InnerAttack(small_mixture(), inner_settings("trades"))
    torch.manual_seed(3)
    other = attack(noisy_images(), LABELS.flip(0))
    assert torch.equal(attacked(attack, noisy_images()), other)


@pytest.mark.parametrize(("method", "amp", "eps"), grids.every(2, METHODS, ("off", "bf16"), (0.0, 8 / 255, 0.3)))
def test_adversarial_images_are_in_the_ball_and_range_exactly(method: str, amp: Any, eps: float) -> None:
    model, images = small_mixture(dtype=torch.float32), noisy_images(dtype=torch.float32)
    before = images.clone()
    found = attacked(InnerAttack(model, inner_settings(method, "train", eps=eps, alpha=eps / 2), amp=amp), images)
    assert torch.equal(images, before)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    distance = (found.double() - images.double()).abs()
    assert float(distance.max()) <= eps
    assert float(distance.max()) >= 0.999 * eps
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@pytest.mark.parametrize("method", ["pgd", "fgsm-rs"])
def test_an_attack_makes_the_loss_larger(method: str) -> None:
    model, images = small_mixture(), noisy_images()
    found = attacked(InnerAttack(model, inner_settings(method)), images)
    outputs = _outputs_of(model, "eval", "off", seeded())
    assert F.nll_loss(outputs(found), LABELS) > F.nll_loss(outputs(images), LABELS) + 0.01


def test_random_starts_are_pytorch_s_own_random_numbers() -> None:
    attack = InnerAttack(small_mixture(), inner_settings("pgd"))
    assert torch.equal(attacked(attack, noisy_images(), 3), attacked(attack, noisy_images(), 3))
    assert not torch.equal(attacked(attack, noisy_images(), 3), attacked(attack, noisy_images(), 4))


# The model is left as it was


def _motley(batching: str) -> ImmunityMoE:
    """A model whose parts are in different states."""
    model = small_mixture(batching=batching, track_running_stats=False)
    model.gate.switch = "sample"
    model.gate.network.requires_grad_(False)
    model.experts[1].eval()  # type: ignore[index]
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("method", "batchnorm", "gate"), grids.every(3, METHODS, get_args(BatchNormMode), get_args(Switch))
)
def test_an_attack_leaves_the_model_as_it_was(method: str, batchnorm: str, gate: str) -> None:
    for model in (_motley("loop"), small_mixture(batching="vmap").eval()):
        before = state_of(model)
        attacked(InnerAttack(model, inner_settings(method, batchnorm, gate)), noisy_images())
        assert state_of(model) == before


@pytest.mark.parametrize(
    ("call", "batchnorm", "gate"), grids.every(2, (1, 2), get_args(BatchNormMode), get_args(Switch))
)
def test_an_attack_that_is_stopped_leaves_the_model_as_it_was(call: int, batchnorm: str, gate: str) -> None:
    model = _motley("loop")
    before, calls = state_of(model), 0

    def stop(_module: nn.Module, _inputs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        attacked(InnerAttack(model, inner_settings("trades", batchnorm, gate)), noisy_images())
    hook.remove()
    assert state_of(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_images_that_the_model_refuses_leave_it_as_it_was(method: str) -> None:
    model = _motley("loop")
    before = state_of(model)
    with pytest.raises(ValueError, match="images: expected shape"):
        attacked(InnerAttack(model, inner_settings(method, "train", "mean")), noisy_images()[:, :2])
    assert state_of(model) == before


def test_a_gate_that_there_is_not_is_refused_without_a_trace() -> None:
    model = _motley("loop")
    before = state_of(model)
    with pytest.raises(ValueError, match="switch"):
        attacked(InnerAttack(model, inner_settings("pgd", "train", "maen")), noisy_images())
    assert state_of(model) == before


# Catastrophic overfitting


@pytest.mark.parametrize(
    ("under_pgd", "under_fgsm", "images", "expected"),
    [
        ([0.2, 0.3, 0.4, 0.45], [0.3, 0.4, 0.5, 0.6], 256, None),  # healthy
        ([0.45, 0.40], [0.5, 0.9], 256, None),  # a dip
        ([0.3, 0.1], [0.4, 0.9], 10, None),  # 3 and 1 of 10 images: chance
        ([0.3, 0.1], [0.4, 0.9], 1000, 0.3),  # of 1000 it is none
        ([0.2, 0.45, 0.01], [0.3, 0.5, 0.8], 256, 0.45),  # collapsed
        ([0.45, 0.01, 0.02], [0.5, 0.8, 0.9], 256, 0.45),  # and still is
        ([0.45, 0.01, 0.40], [0.5, 0.8, 0.5], 256, None),  # and has recovered
        ([0.45, 0.05], [0.5, 0.06], 256, None),  # both have fallen
        ([0.45, 0.01], [0.5, 0.02], 256, 0.45),  # half of that under FGSM, or less
        ([0.45, 0.01], [0.5, 0.019], 256, None),
        ([0.8, 0.4], [0.9, 0.8], 10_000, 0.8),  # half, or less
        ([0.8, 0.41], [0.9, 0.9], 10_000, None),
        ([0.01], [0.9], 256, None),  # it never was robust
        ([0.0, 0.0], [0.0, 0.0], 256, None),
        ([0.45, 0.0], [0.5, 0.0], 256, 0.45),  # nothing is half of nothing
        ([0.45, 0.01], [0.5, 0.8], 0, None),  # of no images
        ([], [], 256, None),
    ],
)
def test_a_collapse_is_a_fall_under_pgd_that_fgsm_does_not_share(
    under_pgd: list[float], under_fgsm: list[float], images: int, expected: float | None
) -> None:
    assert collapsed(records_of(under_pgd, under_fgsm), images) == expected


def test_records_without_these_accuracies_show_no_collapse() -> None:
    assert collapsed([{"epoch": 1, "loss": 0.3}], 256) is None
    fallen = records_of([0.45, 0.01], [0.5, 0.8])
    del fallen[-1]["val_fgsm_accuracy_mean"]
    assert collapsed(fallen, 256) is None
    older = [{"epoch": 0}, *records_of([0.45, 0.01], [0.5, 0.8])]
    assert collapsed(older, 256) == 0.45
