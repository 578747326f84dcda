"""Adversarial training: the attack in a step, TRADES, one network alone, the best checkpoint, and what is recorded."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate, train
from immunity_fast.adversarial import (
    BatchNormMode,
    InnerAttack,
    InnerAttackSettings,
    collapsed,
    divergence,
    trades_losses,
)
from immunity_fast.attacks import pgd
from immunity_fast.checkpoint import load_checkpoint, load_model
from immunity_fast.config import PRESETS, TrainConfig, add_options, number
from immunity_fast.data.augmentation import draw, move
from immunity_fast.experts.staged import GlobalAveragePool
from immunity_fast.models.gate import Switch
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.runs import Run
from immunity_fast.step import TrainStep
from immunity_fast.trainer import Trainer, validate
from tests import oracle
from tests.small_runs import as_bytes, dataset, error_line, options, split, trained, weights, write_data

CPU = torch.device("cpu")
METHODS = ("pgd", "trades", "fgsm-rs")
EPS, ALPHA, STEPS = 0.06, 0.025, 3
LOSS = FusedImmunityLoss(0.5, 0.7, 1e-3, size=(8, 9))
LABELS = torch.tensor([0, 2, 1, 1, 0])


class _Whole(nn.Module):
    """A network that is no chain, so that it cannot be cut into a trunk and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.body(x).mean((-2, -1)))
        return result


def _chain(**batchnorm: Any) -> nn.Sequential:
    """BatchNorm on both sides of the cut."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5, **batchnorm),
        nn.ReLU(),
        GlobalAveragePool(),
        nn.Linear(5, 3),
    )


def _model(
    experts: int = 3, *, batching: Any = "loop", dtype: torch.dtype = torch.float64, whole: bool = False, **norm: Any
) -> ImmunityMoE:
    """In training mode, with running statistics that are not those of any batch here."""
    torch.manual_seed(0)
    parts = [_Whole() if whole else _chain(**norm) for _ in range(experts)]
    about = {} if whole else {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    model = ImmunityMoE.from_experts(parts, stage="body" if whole else "2", batching=batching, **about).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(dtype))
        model(torch.rand(7, 3, 12, 13, generator=torch.Generator().manual_seed(8)).to(dtype) ** 2)
    return model


def _images(seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise, a part of which is exactly 0 or 1."""
    noise = torch.rand(5, 3, 12, 13, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (1.4 * noise - 0.2).clamp(0, 1).to(dtype)


def _settings(method: Any, batchnorm: Any = "eval", gate: Any = "off", **changes: Any) -> InnerAttackSettings:
    return dataclasses.replace(InnerAttackSettings(method, EPS, ALPHA, STEPS, batchnorm, gate), **changes)


def _attacked(attack: InnerAttack, images: Tensor, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return attack(images, LABELS)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


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
def test_pgd_attacks_the_mixture_in_the_mode_that_the_settings_name(batchnorm: str, gate: str) -> None:
    model, images = _model(), _images()
    model.gate.generator = _generator()
    found = _attacked(InnerAttack(model, _settings("pgd", batchnorm, gate)), images)
    settings = {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "random_start": True}
    torch.manual_seed(3)
    expected = pgd(_outputs_of(model, batchnorm, gate, _generator()), images, LABELS, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for other in ((batchnorm, {"off": "mean"}.get(gate, "off")), ({"eval": "train"}.get(batchnorm, "eval"), gate)):
        torch.manual_seed(3)  # and it can be told from another mode
        assert not torch.equal(pgd(_outputs_of(model, *other, _generator()), images, LABELS, **settings), found)


@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
def test_what_is_attacked_has_the_statistics_of_the_batch_or_the_running_ones(batchnorm: str) -> None:
    model, images = _model(), _images()
    seen: list[tuple[Tensor, Tensor]] = []
    hook = model.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0].detach(), output)))
    _attacked(InnerAttack(model, _settings("pgd", batchnorm)), images)
    hook.remove()
    twin = copy.deepcopy(model).train(batchnorm == "train")
    twin.gate.eval().switch = "off"
    assert len(seen) == STEPS
    for inputs, outputs in seen:
        torch.testing.assert_close(outputs.detach(), twin(inputs).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
@pytest.mark.parametrize("changes", [{}, {"alpha": 0.5, "steps": 7}], ids=["", "other steps"])
def test_fgsm_rs_is_one_step_of_five_quarters_of_eps_from_a_random_point(
    changes: dict[str, Any], batchnorm: str
) -> None:
    model, images = _model(), _images()
    found = _attacked(InnerAttack(model, _settings("fgsm-rs", batchnorm, **changes)), images)
    outputs = _outputs_of(model, batchnorm, "off", _generator())
    torch.manual_seed(3)
    start = _inside(images + ((2 * torch.rand(images.shape) - 1) * EPS).double(), images)
    signs = _steepest(lambda x: F.nll_loss(outputs(x), LABELS, reduction="none"), start)
    torch.testing.assert_close(found, _inside(start + 1.25 * EPS * signs, images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", get_args(Switch))
@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
def test_trades_maximises_the_divergence_from_the_clean_output_from_a_little_noise(batchnorm: str, gate: str) -> None:
    model, images = _model(), _images()
    model.gate.generator = _generator()
    found = _attacked(InnerAttack(model, _settings("trades", batchnorm, gate)), images)
    outputs = _outputs_of(model, batchnorm, gate, _generator())
    clean = outputs(images).detach()
    torch.manual_seed(3)
    x = _inside(images + 1e-3 * torch.randn(images.shape, dtype=torch.float64), images)
    for _ in range(STEPS):
        signs = _steepest(lambda x: (clean.exp() * (clean - outputs(x))).sum(-1), x)
        x = _inside(x + ALPHA * signs, images)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-12)


def test_labels_are_nothing_to_the_attack_of_trades() -> None:
    attack = InnerAttack(_model(), _settings("trades"))
    torch.manual_seed(3)
    other = attack(_images(), LABELS.flip(0))
    assert torch.equal(_attacked(attack, _images()), other)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("eps", [0.0, 8 / 255, 0.3])
def test_adversarial_images_are_inside_the_ball_and_the_range_exactly(method: str, amp: Any, eps: float) -> None:
    model, images = _model(dtype=torch.float32), _images(dtype=torch.float32)
    before = images.clone()
    found = _attacked(InnerAttack(model, _settings(method, "train", eps=eps, alpha=eps / 2), amp=amp), images)
    assert torch.equal(images, before)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    distance = (found.double() - images.double()).abs()
    assert float(distance.max()) <= eps
    assert float(distance.max()) >= 0.999 * eps
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@pytest.mark.parametrize("method", ["pgd", "fgsm-rs"])
def test_an_attack_makes_the_loss_larger(method: str) -> None:
    model, images = _model(), _images()
    found = _attacked(InnerAttack(model, _settings(method)), images)
    outputs = _outputs_of(model, "eval", "off", _generator())
    assert F.nll_loss(outputs(found), LABELS) > F.nll_loss(outputs(images), LABELS) + 0.01


def test_random_starts_are_pytorch_s_own_random_numbers() -> None:
    attack = InnerAttack(_model(), _settings("pgd"))
    assert torch.equal(_attacked(attack, _images(), 3), _attacked(attack, _images(), 3))
    assert not torch.equal(_attacked(attack, _images(), 3), _attacked(attack, _images(), 4))


# The model is left as it was


def _all_of(model: ImmunityMoE) -> dict[str, Any]:
    """Everything of a model that an attack might change, and random states apart, nothing may."""
    return {
        "tensors": {name: (id(t), as_bytes(t)) for name, t in model.state_dict(keep_vars=True).items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else as_bytes(p.grad) for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "tracking": {n: m.track_running_stats for n, m in model.named_modules() if hasattr(m, "track_running_stats")},
        "switch": model.gate.switch,
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


def _motley(batching: str) -> ImmunityMoE:
    """A model whose parts are in different states."""
    model = _model(batching=batching, track_running_stats=False)
    model.gate.switch = "sample"
    model.gate.network.requires_grad_(False)
    model.experts[1].eval()  # type: ignore[index]
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("gate", get_args(Switch))
@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
@pytest.mark.parametrize("method", METHODS)
def test_an_attack_leaves_the_model_as_it_was(method: str, batchnorm: str, gate: str) -> None:
    for model in (_motley("loop"), _model(batching="vmap").eval()):
        before = _all_of(model)
        _attacked(InnerAttack(model, _settings(method, batchnorm, gate)), _images())
        assert _all_of(model) == before


@pytest.mark.parametrize("gate", get_args(Switch))
@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
@pytest.mark.parametrize("call", [1, 2])
def test_an_attack_that_is_stopped_leaves_the_model_as_it_was(call: int, batchnorm: str, gate: str) -> None:
    model = _motley("loop")
    before, calls = _all_of(model), 0

    def stop(_module: nn.Module, _inputs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        _attacked(InnerAttack(model, _settings("trades", batchnorm, gate)), _images())
    hook.remove()
    assert _all_of(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_images_that_the_model_refuses_leave_it_as_it_was(method: str) -> None:
    model = _motley("loop")
    before = _all_of(model)
    with pytest.raises(ValueError, match="images: expected shape"):
        _attacked(InnerAttack(model, _settings(method, "train", "mean")), _images()[:, :2])
    assert _all_of(model) == before


def test_a_gate_that_there_is_not_is_refused_and_leaves_the_model_as_it_was() -> None:
    model = _motley("loop")
    before = _all_of(model)
    with pytest.raises(ValueError, match="switch"):
        _attacked(InnerAttack(model, _settings("pgd", "train", "maen")), _images())
    assert _all_of(model) == before


# A step on adversarial images


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(images, labels, adversarial images) of all attacks in training steps."""
    made = []
    attack = InnerAttack.__call__

    def recorded(self: InnerAttack, images: Tensor, labels: Tensor) -> Tensor:
        made.append((images, labels, attack(self, images, labels)))
        return made[-1][2].clone()

    monkeypatch.setattr(InnerAttack, "__call__", recorded)
    return made


def _step(
    model: ImmunityMoE, method: str | None = None, loss_fn: FusedImmunityLoss = LOSS, **changes: Any
) -> TrainStep:
    attack = None if method is None else InnerAttack(model, _settings(method, changes.pop("batchnorm", "eval")))
    return TrainStep(model, loss_fn, SGD(model.parameters(), 0.1), attack=attack, **changes)


def _gradients(model: ImmunityMoE) -> dict[str, tuple[Any, ...]]:
    return {name: as_bytes(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
@pytest.mark.parametrize("double_backprop", ["reverse", "forward"])
@pytest.mark.parametrize("method", ["pgd", "fgsm-rs"])
def test_a_step_is_that_of_the_adversarial_images(
    method: str, double_backprop: Any, batchnorm: str, attacks: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    model, other = _model(), _model()
    measured = _step(model, method, double_backprop=double_backprop, batchnorm=batchnorm)(_images(), LABELS)
    ((images, labels, adversarial),) = attacks
    assert torch.equal(images, _images())
    assert torch.equal(labels, LABELS)
    assert not torch.equal(adversarial, images)
    expected = _step(other, double_backprop=double_backprop)(adversarial, LABELS)
    assert torch.equal(measured, expected)
    assert _gradients(model) == _gradients(other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_images_are_augmented_before_they_are_attacked(
    method: str, attacks: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    stored = torch.randint(256, (5, 3, 12, 13), generator=_generator(), dtype=torch.uint8)
    motion = draw(5, _generator(), padding=2, flip=True)
    model, other = _model(dtype=torch.float32), _model(dtype=torch.float32)
    torch.manual_seed(3)
    measured = _step(model, method)(stored, LABELS, motion)
    torch.manual_seed(3)
    expected = _step(other, method)(move(stored, motion), LABELS)
    assert torch.equal(attacks[0][0], move(stored, motion))
    assert torch.equal(measured, expected)
    assert _gradients(model) == _gradients(other)


@pytest.mark.parametrize("method", METHODS)
def test_the_heatmap_terms_are_those_of_the_adversarial_images(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for adversarial in (_images(), _images(2)):
        monkeypatch.setattr(InnerAttack, "__call__", lambda *_, made=adversarial: made)
        measured = _step(_model(), method)(_images(), LABELS)
        logits, activations, gate = _model().expert_outputs(adversarial)
        _, terms = LOSS(logits, activations, LABELS, gate, return_terms=True)
        torch.testing.assert_close(measured[2], terms.mutual_information.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(measured[3], terms.position_stability.detach(), rtol=1e-12, atol=0)
        found.append(measured)
    assert (found[0] != found[1]).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
def test_running_statistics_count_what_is_trained_on_and_not_what_is_attacked(method: str, batchnorm: str) -> None:
    model = _model()
    counts = [b.clone() for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    _step(model, method, batchnorm=batchnorm)(_images(), LABELS)
    after = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert len(counts) == 2
    more = 2 if method == "trades" else 1
    assert all(torch.equal(b, a + more) for a, b in zip(counts, after, strict=True))


# TRADES' losses


def _random_outputs(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    gate = torch.rand(5, 3, generator=generator, dtype=torch.float64).softmax(-1)
    return logits.to(dtype).requires_grad_(), gate.to(dtype).requires_grad_()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of two rows of logarithms."""
    total = torch.zeros((), dtype=torch.float64)
    for k in range(len(log_p)):
        total = total + log_p[k].exp() * (log_p[k] - log_q[k])
    return total


def _trades_oracle(
    clean: tuple[Tensor, Tensor], adversarial: tuple[Tensor, Tensor], labels: Tensor, alpha: float, weight: float
) -> Tensor:
    """arXiv 1901.08573, eq. (5), of the mixture and, by α, of each expert: one image after the other."""
    losses = oracle.cross_entropy(*clean, labels, alpha)
    p, q = oracle.mixture_log_probabilities(*clean), oracle.mixture_log_probabilities(*adversarial)
    rows = []
    for b in range(len(labels)):
        drift = _kl(p[b], q[b])
        for i in range(len(clean[0])):
            drift = drift + alpha * _kl(
                torch.log_softmax(clean[0][i, b], 0), torch.log_softmax(adversarial[0][i, b], 0)
            )
        rows.append(losses[b] + weight * drift)
    return torch.stack(rows)


def _compare_with_the_oracle(alpha: float, weight: float, tolerance: float) -> None:
    labels = torch.tensor([6, 0, 3, 3, 1])
    upstream = torch.tensor([0.3, -1.7, 2.0, 0.9, 0.1], dtype=torch.float64)
    found = []
    for losses in (trades_losses, _trades_oracle):
        clean, adversarial = _random_outputs(1), _random_outputs(2)
        value = losses(clean, adversarial, labels, alpha, weight)
        value.backward(upstream)
        found.append([value, *(t.grad if t.grad is not None else torch.zeros_like(t) for t in (*clean, *adversarial))])
    for actual, expected in zip(*found, strict=True):
        oracle.assert_matches(actual, expected, tolerance)


@pytest.mark.parametrize(
    ("alpha", "weight", "tolerance"), [(0.0, 6.0, 1e-10), (0.7, 0.0, 1e-10), (0.0, 0.0, 1e-10), (0.7, 6.0, 1e-6)]
)
def test_trades_losses_are_the_paper_s(alpha: float, weight: float, tolerance: float) -> None:
    _compare_with_the_oracle(alpha, weight, tolerance)


def test_trades_losses_keep_the_precision_of_float64() -> None:
    _compare_with_the_oracle(0.7, 6.0, 1e-10)


def test_of_the_same_outputs_trades_is_cross_entropy() -> None:
    outputs, labels = _random_outputs(1), torch.tensor([6, 0, 3, 3, 1])
    found = trades_losses(outputs, outputs, labels, 0.7, 6.0)
    oracle.assert_matches(found, oracle.cross_entropy(*outputs, labels, 0.7))


def test_without_a_gate_trades_is_that_of_the_mean() -> None:
    (clean, _), (adversarial, _) = _random_outputs(1), _random_outputs(2)
    uniform, labels = torch.full((5, 3), 1 / 3, dtype=torch.float64), torch.tensor([6, 0, 3, 3, 1])
    found = trades_losses((clean, None), (adversarial, None), labels, 0.0, 2.5)
    oracle.assert_matches(found, _trades_oracle((clean, uniform), (adversarial, uniform), labels, 0.0, 2.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_half_precision_logits_trades_is_computed_in_single_precision(dtype: torch.dtype) -> None:
    clean, adversarial = _random_outputs(1, dtype), _random_outputs(2, dtype)
    labels = torch.tensor([6, 0, 3, 3, 1])
    found = trades_losses(clean, adversarial, labels, 0.7, 6.0)
    assert found.dtype == torch.float32
    exact = [(logits.detach().double(), gate.detach().double()) for logits, gate in (clean, adversarial)]
    oracle.assert_matches(found, _trades_oracle(exact[0], exact[1], labels, 0.7, 6.0), 1e-5)


def test_outputs_without_doubt_give_finite_losses_and_gradients() -> None:
    certain = torch.tensor([300.0, 0.0, -300.0]).expand(2, 3, 3).clone().requires_grad_()
    opposite = certain.detach().flip(-1).requires_grad_()
    gate = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    losses = trades_losses((certain, gate), (opposite, gate), torch.tensor([0, 1, 2]), 0.5, 6.0)
    losses.sum().backward()
    assert losses.isfinite().all()
    for logits in (certain, opposite):
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_divergence_is_kl_over_the_last_axis() -> None:
    p, q = (torch.randn(2, 4, 7, generator=_generator()).double().log_softmax(-1) for _ in range(2))
    q = q.flip(-1)
    expected = torch.stack([torch.stack([_kl(p[i, j], q[i, j]) for j in range(4)]) for i in range(2)])
    oracle.assert_matches(divergence(p, q), expected)
    assert (divergence(p, p) == 0).all()


# A whole step of TRADES


def _logits_and_maps(expert: nn.Module, stage: str, images: Tensor) -> tuple[Tensor, Tensor]:
    caught: list[Tensor] = []
    hook = expert.get_submodule(stage).register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    logits = expert(images)
    hook.remove()
    return logits, caught[0]


def _independent(
    model: ImmunityMoE, loss_fn: FusedImmunityLoss, clean: Tensor, adversarial: Tensor, weight: float
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients and buffers by autograd through each expert alone, the losses from their formulas in loops."""
    experts, gate = model.unstack(), copy.deepcopy(model.gate)
    before, logits, maps, slopes = [], [], [], []
    for expert in experts:
        # The second forward pass changes what the first one's backward pass would look at.
        first = copy.deepcopy(expert)
        before.append(torch.func.functional_call(first, dict(expert.named_parameters()), (clean,)))
        for buffer, counted in zip(expert.buffers(), first.buffers(), strict=True):
            buffer.copy_(counted)
        outputs, activations = _logits_and_maps(expert, model.stage, adversarial)
        score = outputs.gather(-1, LABELS[:, None]).sum()
        slopes.append(torch.autograd.grad(score, activations, create_graph=True)[0])
        logits.append(outputs)
        maps.append(activations)
    information, stability = oracle.heatmap_losses(torch.stack(maps), torch.stack(slopes), loss_fn.size)
    outputs = [
        (torch.stack(found), gate(model.normalize(images)))
        for found, images in ((before, clean), (logits, adversarial))
    ]
    losses = _trades_oracle(outputs[0], outputs[1], LABELS, loss_fn.alpha, weight)
    loss = oracle.total(losses, information, stability, len(experts), loss_fn.beta, loss_fn.gamma)
    loss.backward()
    gradients = {f"gate.{name}": p.grad for name, p in gate.named_parameters()}
    for name, _ in model.experts.named_parameters():
        gradients[f"experts.{name}"] = torch.stack([dict(e.named_parameters())[name].grad for e in experts])
    buffers = {
        f"experts.{name}": torch.stack([dict(e.named_buffers())[name] for e in experts])
        for name, _ in model.experts.named_buffers()
    }
    return loss.item(), gradients, buffers


@pytest.mark.parametrize(
    ("batching", "double_backprop", "whole"),
    [
        ("loop", "reverse", False),
        ("loop", "forward", False),
        ("vmap", "reverse", False),
        ("vmap", "forward", False),
        ("loop", "reverse", True),
        ("vmap", "reverse", True),
    ],
)
@pytest.mark.parametrize(("alpha", "tolerance"), [(0.0, 1e-9), (0.5, 1e-5)])
def test_a_step_of_trades_has_the_exact_gradient_and_counts_clean_images_first(
    alpha: float, tolerance: float, batching: Any, double_backprop: Any, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model(batching=batching, whole=whole)
    loss_fn = FusedImmunityLoss(alpha, 0.7, 1e-2, size=(8, 9))
    loss, gradients, buffers = _independent(model, loss_fn, _images(), _images(2), 2.5)
    swapped = _independent(model, loss_fn, _images(2), _images(), 2.5)[2]
    monkeypatch.setattr(InnerAttack, "__call__", lambda *_: _images(2))
    step = _step(model, "trades", loss_fn, double_backprop=double_backprop, trades_weight=2.5)
    assert float(step(_images(), LABELS)[0]) == pytest.approx(loss, rel=tolerance)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=tolerance, atol=tolerance * largest, msg=name)
    found = dict(model.named_buffers())
    for name, value in buffers.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)
    assert any(not torch.allclose(found[name], value, rtol=1e-6) for name, value in swapped.items())


def test_the_weight_of_trades_is_nothing_to_other_attacks() -> None:
    found = []
    for weight in (0.0, 9.0):
        torch.manual_seed(3)
        found.append(_step(_model(), "pgd", trades_weight=weight)(_images(), LABELS))
    assert torch.equal(*found)


# A compiled step


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Has graphs captured as they would be, but then run by PyTorch's own kernels, in the way that it is given."""
    compile_ = torch.compile

    def by(backend: str) -> None:
        def quickly(function: Any, **options: Any) -> Any:
            assert options["fullgraph"]
            assert not options["dynamic"]
            return compile_(function, fullgraph=True, dynamic=False, backend=backend)

        monkeypatch.setattr(torch, "compile", quickly)

    torch.compiler.reset()
    yield by
    torch.compiler.reset()


def _tiny() -> ImmunityMoE:
    """As little as has all parts of a step: what is captured costs time."""
    torch.manual_seed(0)
    experts = [
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), GlobalAveragePool(), nn.Linear(4, 3))
        for _ in "ab"
    ]
    gate = RandomSwitchGate(2, nn.Sequential(GlobalAveragePool(), nn.Linear(3, 2)), generator=_generator())
    return ImmunityMoE.from_experts(experts, gate=gate, stage="1", batching="loop")


@pytest.mark.parametrize(
    ("method", "batchnorm", "gate", "amp"), [("pgd", "eval", "off", "bf16"), ("trades", "train", "mean", "off")]
)
def test_a_compiled_attack_makes_the_images_that_an_eager_one_does(
    method: str, batchnorm: str, gate: str, amp: Any, without_inductor: Callable[[str], None]
) -> None:
    without_inductor("aot_eager")
    found, said = [], []
    for compile in ("on", "off"):
        settings, model = _settings(method, batchnorm, gate, steps=2), _tiny()
        before = _all_of(model)
        attack = InnerAttack(model, settings, compile=compile, amp=amp, announce=said.append)  # type: ignore[arg-type]
        torch.manual_seed(3)
        found.append(torch.stack([attack(_images(seed, torch.float32), LABELS) for seed in (1, 2)]))
        assert attack.compiled == (compile == "on")
        assert _all_of(model) == before
    assert said == []
    # Where a gradient is 0 but for rounding, its sign is another.
    assert (found[0] == found[1]).float().mean() > (0.9 if amp == "bf16" else 0.999)


def test_an_attack_on_a_gate_that_switches_is_the_same_where_it_is_to_be_compiled(
    without_inductor: Callable[[str], None],
) -> None:
    without_inductor("eager")
    found = []
    for compile in ("on", "off"):
        settings, said = _settings("pgd", "train", "call"), []
        attack = InnerAttack(_tiny(), settings, compile=compile, announce=said.append)  # type: ignore[arg-type]
        found.append(_attacked(attack, _images(dtype=torch.float32)))
        assert len(said) == (compile == "on" and not attack.compiled)  # it says so where it cannot
    torch.testing.assert_close(*found)


def test_a_compiled_step_on_adversarial_images_gives_what_an_eager_one_does(
    without_inductor: Callable[[str], None],
) -> None:
    without_inductor("eager")
    found, models, said = [], [], []
    for compile in ("on", "off"):
        model = _tiny()
        options: dict[str, Any] = {"compile": compile, "announce": said.append}
        attack = InnerAttack(model, _settings("trades", "train", steps=2), **options)
        step = TrainStep(model, LOSS, SGD(model.parameters(), 0.05, fused=True), attack=attack, **options)
        torch.manual_seed(3)
        stored = torch.randint(256, (5, 3, 12, 13), generator=_generator(), dtype=torch.uint8)
        found.append(torch.stack([step(stored, LABELS, draw(5, _generator(), padding=1)) for _ in range(2)]))
        models.append(model)
        assert step.compiled == attack.compiled == (compile == "on")
    assert said == []
    torch.testing.assert_close(*found, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(*(model.state_dict() for model in models), rtol=1e-3, atol=1e-4, check_stride=False)


# One network alone


def _single(batching: Any = "auto") -> SingleNetwork:
    torch.manual_seed(0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    return SingleNetwork("resnet8", 3, image_size=12, batching=batching, mean=mean, std=std).double()


def _small(seed: int = 1) -> Tensor:
    return _images(seed)[..., :12]


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_one_network_alone_is_that_network(batching: str) -> None:
    model = _single(batching)
    (network,) = model.unstack()
    expected = network(_small()).log_softmax(-1)
    torch.testing.assert_close(model(_small()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.expert_logits(_small())[0].log_softmax(-1), network(_small()).log_softmax(-1))
    network = model.unstack()[0].eval()
    for switch in get_args(Switch):
        model.eval().gate.switch = switch
        torch.testing.assert_close(model(_small()), network(_small()).log_softmax(-1), rtol=1e-12, atol=1e-12)
    assert (model.gate_weights(_small()) == 1).all()
    assert not list(model.gate.parameters())
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"experts"}


def test_a_mixture_still_needs_two_experts() -> None:
    with pytest.raises(ValueError, match="num_experts: expected at least 2, got 1"):
        ImmunityMoE("resnet8", num_experts=1)
    with pytest.raises(ValueError, match="num_experts: expected at least 2, got 1"):
        ImmunityMoE.from_experts([_chain()], stage="2")


@pytest.mark.parametrize("method", [None, "pgd", "trades"])
@pytest.mark.parametrize("loss_fn", [LOSS, FusedImmunityLoss(0.0, 0.0, 0.0)], ids=["weighted", "unweighted"])
def test_one_network_is_trained_by_its_cross_entropy_once(
    method: str | None, loss_fn: FusedImmunityLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _single()
    (network,) = model.unstack()
    monkeypatch.setattr(InnerAttack, "__call__", lambda *_: _small(2))
    parameters = dict(network.named_parameters())
    trained_on = _small() if method is None else _small(2)
    if method == "trades":
        first = copy.deepcopy(network)
        clean = torch.func.functional_call(first, parameters, (_small(),))
        for buffer, counted in zip(network.buffers(), first.buffers(), strict=True):
            buffer.copy_(counted)
        log_p, log_q = clean.log_softmax(-1), network(trained_on).log_softmax(-1)
        drift = torch.stack([_kl(log_p[b], log_q[b]) for b in range(5)])
        loss = F.cross_entropy(clean, LABELS) + 2.5 * drift.mean()
    else:
        loss = F.cross_entropy(network(trained_on), LABELS)
    loss.backward()
    measured = _step(model, method, loss_fn, trades_weight=2.5)(_small(), LABELS)
    assert measured.tolist() == pytest.approx([loss.item(), loss.item(), 0, 0], rel=1e-9)
    for name, parameter in model.experts.named_parameters():
        assert parameter.grad is not None
        expected = parameters[name].grad
        assert expected is not None
        torch.testing.assert_close(parameter.grad[0], expected, rtol=1e-9, atol=1e-9, msg=name)
    buffers = dict(network.named_buffers())
    for name, buffer in model.experts.named_buffers():
        torch.testing.assert_close(buffer[0], buffers[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_run_of_one_network_is_loaded_as_one(tmp_path: Path) -> None:
    trainer, run = _train(tmp_path / "run", experts=1, check_images=4)
    assert isinstance(trainer.model, SingleNetwork)
    (record,) = run.metrics()
    assert record["loss"] == record["cross_entropy"]
    assert record["mutual_information"] == 0
    assert "val_iscore" not in record
    for path in (run.folder, run.checkpoint, run.best_checkpoint):
        model, info = load_model(path)
        assert type(model) is SingleNetwork
        assert info["model"]["num_experts"] == 1
        assert not model.training
        torch.testing.assert_close(model(_small().float()), trainer.model.eval()(_small().float()))


def test_the_test_accuracy_of_one_network_is_measured_under_attack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "AFTER_TRAINING", dataclasses.replace(train.AFTER_TRAINING, masking_images=0))
    arguments = options(write_data(tmp_path / "data.npz"), experts=1, epochs=1, attack_images=3)
    train.main([*arguments, "--out", str(tmp_path / "run")])
    results = json.loads(Run(tmp_path / "run").results_file.read_text(encoding="utf-8"))
    assert "pgd" in {row["attack"] for row in results["accuracy"]}


# A run


CONFIG = TrainConfig(experts=2, batch_size=10, epochs=1, check_images=0, adversarial="pgd", attack_steps=2)


def _train(folder: Path, **changes: Any) -> tuple[Trainer, Run]:
    """A whole run without a command line, by default of 2 steps."""
    config = dataclasses.replace(CONFIG, **changes)
    trainer, run = Trainer(config, dataset(), CPU), Run.create(folder, config)
    train.train(trainer, run)
    return trainer, run


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Weights after training by each method."""
    folder = tmp_path_factory.mktemp("runs")
    return {method: weights(_train(folder / method, adversarial=method)[0]) for method in ("off", *METHODS)}


def test_every_method_trains_otherwise(plain: dict[str, dict[str, Any]]) -> None:
    found = list(plain.values())
    assert not any(found[i] == found[j] for i in range(4) for j in range(i))


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("pgd", {"eps": 0.1}),
        ("fgsm-rs", {"eps": 0.1}),
        ("pgd", {"attack_alpha": 0.1}),
        ("trades", {"attack_steps": 3}),
        ("pgd", {"attack_batchnorm": "train"}),
        ("fgsm-rs", {"attack_gate": "mean"}),
        ("trades", {"trades_weight": 1.0}),
    ],
)
def test_every_setting_of_the_attack_has_an_effect(
    method: Any, changes: dict[str, Any], tmp_path: Path, plain: dict[str, dict[str, Any]]
) -> None:
    assert weights(_train(tmp_path / "run", adversarial=method, **changes)[0]) != plain[method]


@pytest.mark.parametrize(
    "changes",
    [
        {"eps": 0.1, "attack_alpha": 0.1, "attack_steps": 3, "attack_batchnorm": "train", "attack_gate": "mean"},
        {"trades_weight": 1.0},
    ],
    ids=["attack", "trades"],
)
def test_without_adversarial_training_its_settings_have_none(
    changes: dict[str, Any], tmp_path: Path, plain: dict[str, dict[str, Any]]
) -> None:
    assert weights(_train(tmp_path / "run", adversarial="off", **changes)[0]) == plain["off"]


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
    found = [weights(_train(tmp_path / f"{n}", check_images=n, **settings)[0]) for n in (0, 3)]
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["off", "trades"])
def test_validation_under_fgsm_is_measured_in_adversarial_training_only(method: Any) -> None:
    images = dataset(validation=split(4))
    config = dataclasses.replace(CONFIG, adversarial=method, check_images=3)
    measured = validate(Trainer(config, images, CPU))
    assert "val_pgd10_accuracy_mean" in measured
    assert ("val_fgsm_accuracy_mean" in measured) == (method != "off")
    without = validate(Trainer(dataclasses.replace(config, check_images=0), images, CPU))
    assert without.keys() == {"val_accuracy_switching", "val_accuracy_mean"}


def test_validation_attacks_within_the_eps_of_the_settings() -> None:
    config = dataclasses.replace(CONFIG, check_images=10)
    nothing, all_of_it = (validate(Trainer(dataclasses.replace(config, eps=eps), dataset(), CPU)) for eps in (0, 1))
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
    trainer, run = Trainer(config, dataset(), CPU), Run.create(tmp_path / "run", config)
    trainer.dataset = dataclasses.replace(trainer.dataset, test=_Untouchable())  # type: ignore[arg-type]
    train.train(trainer, run)
    assert run.best_checkpoint.is_file()
    assert len(run.metrics()) == 2


# The best checkpoint


def _script(
    monkeypatch: pytest.MonkeyPatch, under_pgd: list[float], under_fgsm: list[float]
) -> list[dict[str, Tensor]]:
    """Have validation find these accuracies; the models that it was to look at."""
    seen: list[dict[str, Tensor]] = []

    def scripted(trainer: Trainer) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        epoch = len(seen) - 1
        return {
            "val_accuracy_switching": 0.9,
            "val_accuracy_mean": 0.9,
            "val_pgd10_accuracy_mean": under_pgd[epoch],
            "val_fgsm_accuracy_mean": under_fgsm[epoch],
        }

    monkeypatch.setattr(train, "validate", scripted)
    return seen


def _same(found: nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_the_best_checkpoint_is_that_of_the_first_epoch_that_did_best_under_pgd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _script(monkeypatch, [0.2, 0.5, 0.3, 0.5], [0.9, 0.6, 0.7, 0.8])
    _, run = _train(tmp_path / "run", epochs=4, batch_size=20, check_images=10)
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
    _, run = _train(tmp_path / "run", epochs=2, batch_size=20, check_images=10)
    model, info = load_model(run.folder)
    assert info["epoch"] == 1
    assert _same(model, seen[0])


@pytest.mark.parametrize("changes", [{"adversarial": "off"}, {"check_images": 0}], ids=["plain", "unchecked"])
def test_without_attacks_on_validation_images_or_training_on_attacked_ones_there_is_no_best(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    trainer, run = _train(tmp_path / "run", **{"check_images": 4, "batch_size": 20} | changes)
    assert not run.best_checkpoint.exists()
    model, info = load_model(run.folder)
    assert info["epoch"] == 1
    assert _same(model, dict(trainer.model.state_dict()))


def test_the_command_evaluates_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _script(monkeypatch, [0.5, 0.4], [0.5, 0.5])
    evaluated = []
    monkeypatch.setattr(train, "evaluate_run", lambda _run, model, *_rest, **_options: evaluated.append(model))
    changes = {"adversarial": "fgsm-rs", "check_images": 4, "batch_size": 32}
    train.main([*options(write_data(tmp_path / "data.npz"), **changes), "--out", str(tmp_path / "run")])
    assert len(evaluated) == 1
    assert _same(evaluated[0], seen[0])
    assert not evaluated[0].training


# Catastrophic overfitting


def _records(under_pgd: list[float], under_fgsm: list[float]) -> list[dict[str, float]]:
    return [
        {"epoch": epoch, "val_pgd10_accuracy_mean": p, "val_fgsm_accuracy_mean": f}
        for epoch, (p, f) in enumerate(zip(under_pgd, under_fgsm, strict=True), start=1)
    ]


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
    assert collapsed(_records(under_pgd, under_fgsm), images) == expected


def test_records_without_these_accuracies_show_no_collapse() -> None:
    assert collapsed([{"epoch": 1, "loss": 0.3}], 256) is None
    fallen = _records([0.45, 0.01], [0.5, 0.8])
    del fallen[-1]["val_fgsm_accuracy_mean"]
    assert collapsed(fallen, 256) is None
    older = [{"epoch": 0}, *_records([0.45, 0.01], [0.5, 0.8])]
    assert collapsed(older, 256) == 0.45


def test_training_says_that_it_has_collapsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _script(monkeypatch, [0.3, 0.5, 0.0], [0.4, 0.6, 0.9])
    monkeypatch.setattr(train, "collapsed", lambda records, images: collapsed(records, 100 * images))
    _, run = _train(tmp_path / "run", epochs=3, batch_size=20, check_images=100, adversarial="fgsm-rs")
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
    monkeypatch.setattr(train, "collapsed", lambda _records, images: counted.append(images))
    _train(tmp_path / "more", batch_size=20, check_images=100)
    _script(monkeypatch, [0.5], [0.5])
    _train(tmp_path / "fewer", batch_size=20, check_images=4)
    assert counted == [10, 4]


def test_healthy_training_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _script(monkeypatch, [0.3, 0.5, 0.6], [0.4, 0.6, 0.9])
    _train(tmp_path / "run", epochs=3, batch_size=20, check_images=100)
    assert "overfitting" not in capsys.readouterr().out


# Settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8/255", 8 / 255), ("0.03", 0.03), ("1e-3", 1e-3), ("-1/4", -0.25), ("2.5/5", 0.5), ("0/7", 0.0), ("3", 3.0)],
)
def test_a_number_may_be_a_fraction(text: str, expected: float) -> None:
    assert number(text) == expected


@pytest.mark.parametrize("text", ["8/0", "1/2/3", "/", "", "a/2", "8/b", "8 of 255"])
def test_what_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"could not convert|fraction of zero"):
        number(text)


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
    data = write_data(tmp_path / "data.npz")
    _, run = trained([*options(data, epochs=1, batch_size=40, **given), "--out", str(tmp_path / "run")])
    written = json.loads(run.config_file.read_text(encoding="utf-8"))
    meant = given | {"eps": 4 / 255, "attack_alpha": 1 / 255}
    assert {name: written[name] for name in meant} == meant
    assert run.config().inner_attack == InnerAttackSettings("trades", 4 / 255, 1 / 255, 1, "train", "sample")


def test_without_adversarial_training_there_is_no_attack() -> None:
    assert TrainConfig(eps=0.1, attack_steps=3).inner_attack is None
    assert all(preset.inner_attack is None for preset in PRESETS.values())
    assert Trainer(dataclasses.replace(CONFIG, adversarial="off"), dataset(), CPU).train_step.attack is None


@pytest.mark.parametrize("method", METHODS)
def test_the_trainer_s_attack_is_that_of_the_settings(method: Any) -> None:
    config = dataclasses.replace(CONFIG, adversarial=method, eps=0.1, attack_gate="mean", trades_weight=2.5)
    step = Trainer(config, dataset(), CPU).train_step
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
