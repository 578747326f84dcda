"""One training step: what it measures and what it does to the weights."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate
from immunity_fast.data.augmentation import apply_affine, draw_affine
from immunity_fast.experts.staged import GlobalAveragePool, split
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.step import MEASURED, TrainStep
from tests import grids, oracle
from tests.tensors import noise

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
    measured = TrainStep(model, LOSS, SGD(model.parameters(), 0.1))(images, labels)
    assert measured.dtype == torch.float64
    assert not measured.requires_grad
    assert MEASURED == ("loss", "cross_entropy", "mutual_information_loss", "position_stability")
    assert measured.tolist() == [loss.item(), *(term.item() for term in terms)]


def test_the_terms_add_up_to_the_loss() -> None:
    model = _model()
    loss, cross_entropy, information, stability = TrainStep(model, LOSS, SGD(model.parameters(), 0.1))(*_batch())
    expected = cross_entropy + 0.7 / 2 * information + 1e-3 / 2 * stability
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_it_moves_the_weights_against_the_gradient() -> None:
    model = _model()
    gradient, before = _gradient(model), _weights(model)
    TrainStep(model, LOSS, SGD(model.parameters(), 0.125))(*_batch())
    torch.testing.assert_close(_weights(model), before - 0.125 * gradient)


def test_gradients_of_an_earlier_step_are_forgotten() -> None:
    model = _model()
    gradient, before = _gradient(model), _weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    TrainStep(model, LOSS, SGD(model.parameters(), 0.125))(*_batch())
    torch.testing.assert_close(_weights(model), before - 0.125 * gradient)


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_a_gradient_that_is_too_long_is_scaled_down(share: float) -> None:
    model = _model()
    gradient, before = _gradient(model), _weights(model)
    limit = share * gradient.norm().item()
    TrainStep(model, LOSS, SGD(model.parameters(), 1.0), clip_grad_norm=limit)(*_batch())
    torch.testing.assert_close((before - _weights(model)).norm().item(), limit, rtol=1e-4, atol=0)
    torch.testing.assert_close(_weights(model), before - share * gradient, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_short_enough_is_left_alone() -> None:
    model, other = _model(), _model()
    TrainStep(model, LOSS, SGD(model.parameters(), 0.1))(*_batch())
    TrainStep(other, LOSS, SGD(other.parameters(), 0.1), clip_grad_norm=1e9)(*_batch())
    assert torch.equal(_weights(model), _weights(other))


def test_gate_and_experts_are_both_trained() -> None:
    model = _model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    TrainStep(model, LOSS, SGD(model.parameters(), 0.1))(*_batch())
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"gate", "experts"}


def test_running_statistics_move_once() -> None:
    model = _model()
    TrainStep(model, LOSS, SGD(model.parameters(), 0.1))(*_batch())
    counts = [value for name, value in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts
    assert all((count == 1).all() for count in counts)


# The gradient, in float64, BatchNorm in training mode


LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def _independent(model: ImmunityMoE, loss_fn: FusedImmunityLoss) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by autograd through each expert alone, the losses from their formulas in loops."""
    images, experts = noise(6), model.unstack()
    logits, maps, slopes = [], [], []
    for expert in experts:
        assert isinstance(expert, nn.Sequential)
        trunk, head = split(expert, model.stage)
        maps.append(trunk(images))
        logits.append(head(maps[-1]))
        label_logits = logits[-1] if loss_fn.score == "logit" else logits[-1].softmax(-1)
        score = label_logits.gather(-1, LABELS[:, None]).sum()
        slopes.append(torch.autograd.grad(score, maps[-1], create_graph=True)[0])
        if loss_fn.detach_weights:
            slopes[-1] = slopes[-1].detach()
    information, stability = oracle.heatmap_losses(torch.stack(maps), torch.stack(slopes), loss_fn.size)
    gate = copy.deepcopy(model.gate)
    cross_entropies = oracle.cross_entropy(torch.stack(logits), gate(model.normalize(images)), LABELS, loss_fn.alpha)
    loss = oracle.total(cross_entropies, information, stability, len(experts), loss_fn.beta, loss_fn.gamma)
    loss.backward()
    found = {f"gate.{name}": p.grad for name, p in gate.named_parameters()}
    for name, _ in model.experts.named_parameters():
        found[f"experts.{name}"] = torch.stack([dict(expert.named_parameters())[name].grad for expert in experts])
    return loss.item(), found


@pytest.mark.parametrize(
    ("batching", "double_backprop", "options"),
    grids.grid(
        ("loop", "vmap"),
        ("reverse", "forward"),
        ({}, {"score": "probability"}, {"detach_weights": True}),
        ordinary=lambda batching, way, options: not options or (batching == "vmap") == (way == "forward"),
    ),
)
def test_every_way_gives_the_exact_gradient(batching: Any, double_backprop: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 3, 3, image_size=12, batching=batching).double()
    loss_fn = FusedImmunityLoss(0.5, 0.7, 1e-3, size=(11, 13), **options)
    loss, expected = _independent(model, loss_fn)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    step = TrainStep(model, loss_fn, SGD(model.parameters(), 1e-9), double_backprop=double_backprop)
    assert float(step(noise(6), LABELS)[0]) == pytest.approx(loss, rel=1e-9)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-9 * largest, msg=name)
    counts = [name for name in statistics if name.endswith("num_batches_tracked")]
    assert counts
    assert all((dict(model.named_buffers())[name] == statistics[name] + 1).all() for name in counts)


def test_forward_mode_updates_running_statistics_as_reverse_does() -> None:
    states = []
    for way in ("reverse", "forward"):
        model = _model().double()
        TrainStep(model, LOSS, SGD(model.parameters(), 0.1), double_backprop=way)(noise(6), LABELS)  # type: ignore[arg-type]
        states.append(model.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=1e-9, atol=1e-11)


def test_experts_that_cannot_be_cut_are_trained_as_well() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 4, 3)
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.body(x).relu().mean((-2, -1)))
            return result

    model = ImmunityMoE.from_experts([Whole() for _ in range(2)], stage="body")
    before = _weights(model)
    TrainStep(model, LOSS, SGD(model.parameters(), 0.1))(*_batch())
    assert not torch.equal(_weights(model), before)


# Augmentation


def test_bytes_are_augmented_in_the_step() -> None:
    images = torch.randint(256, (6, 3, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    affine = draw_affine(6, torch.Generator().manual_seed(2), flip=True)
    model, other = _model(), _model()
    measured = TrainStep(model, LOSS, SGD(model.parameters(), 0.1))(images, LABELS, affine)
    expected = TrainStep(other, LOSS, SGD(other.parameters(), 0.1))(apply_affine(images, affine), LABELS)
    assert torch.equal(measured, expected)
    assert torch.equal(_weights(model), _weights(other))


# Half precision


def _step_gradient(model: ImmunityMoE, **options: Any) -> tuple[Tensor, Tensor]:
    """What a step measures, and the gradient it takes."""
    step = TrainStep(model, LOSS, SGD(model.parameters(), 1e-9), **options)
    if options.get("amp") == "fp16":
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)  # the scale it would arrive at
    measured = step(*_batch())
    return measured, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("amp", "closeness", "double_backprop"),
    grids.sampled(
        [(*amp, way) for amp in (("bf16", 0.95), ("fp16", 0.98)) for way in ("reverse", "forward")],
        ordinary=lambda amp, _, way: (amp == "bf16") == (way == "reverse"),
    ),
)
def test_half_precision_follows_single_precision(amp: Any, closeness: float, double_backprop: Any) -> None:
    expected, single = _step_gradient(_model())
    model = _model()
    measured, half = _step_gradient(model, amp=amp, double_backprop=double_backprop, clip_grad_norm=1e9)
    assert not torch.equal(half, single)  # it is half precision
    assert torch.cosine_similarity(half, single, 0) > closeness
    torch.testing.assert_close(half.norm(), single.norm(), rtol=0.05, atol=0)  # no scale is left in it
    torch.testing.assert_close(measured[:3], expected[:3], rtol=0.05, atol=0)
    assert all(t.dtype == torch.float32 for t in model.state_dict().values() if t.is_floating_point())


def test_half_precision_keeps_statistics_and_losses_in_float32() -> None:
    """Of activations around 300: float16 does not hold their squares, bfloat16 not their spread."""
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), GlobalAveragePool(), nn.Linear(4, 3)) for _ in "ab"]
    for expert in experts:
        expert[0].bias.data.fill_(300.0)
    for amp in ("bf16", "fp16"):
        model = ImmunityMoE.from_experts(experts, stage="1")
        measured = TrainStep(model, LOSS, SGD(model.parameters(), 0.1), amp=amp)(*_batch())  # type: ignore[arg-type]
        assert measured.isfinite().all()
        convolved = torch.stack([expert[0](_batch()[0]).transpose(0, 1).flatten(1).mean(1) for expert in experts])
        torch.testing.assert_close(model.experts.get_buffer("1.running_mean"), 0.1 * convolved, rtol=1e-2, atol=0)


def test_a_gradient_beyond_float16_skips_a_step_and_lowers_scale() -> None:
    model = _model()
    before = _weights(model)
    step = TrainStep(model, LOSS, SGD(model.parameters(), 0.1, fused=True), amp="fp16")
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    step(*_batch())
    assert torch.equal(_weights(model), before)
    assert step.scaler.get_scale() == 2.0**119
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    step(*_batch())
    assert not torch.equal(_weights(model), before)


OPTIMISERS: dict[str, Any] = {
    "SGD": partial(SGD, fused=False),
    "SGD, fused": partial(SGD, fused=True),
    "FusedSGD": partial(FusedSGD, backend="torch"),
    "FusedSGD, kernels": partial(FusedSGD, backend="triton"),
}


def _small() -> ImmunityMoE:
    """For float16, in which a CPU is slow."""
    torch.manual_seed(0)
    experts = [
        nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), GlobalAveragePool(), nn.Linear(4, 3))
        for _ in range(2)
    ]
    gate = RandomSwitchGate(2, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), GlobalAveragePool(), nn.Linear(4, 2)))
    return ImmunityMoE.from_experts(experts, gate=gate, stage="2")


@pytest.mark.parametrize(
    ("kind", "clip_grad_norm", "nesterov"),
    grids.each(
        2,
        [
            (kind, *others)
            for others in ((None, False), (0.5, True))
            for kind in ("SGD, fused", "FusedSGD", "FusedSGD, kernels")
        ],
    ),
)
def test_momentum_is_nothing_after_a_first_step_that_is_skipped(
    kind: str, clip_grad_norm: float | None, nesterov: bool
) -> None:
    """A fused optimiser's, as that of one which is not called where the scaler skips a step."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written is NaN
    try:
        weights = []
        for made in (kind, "SGD"):
            model = _small()
            options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov}
            optimizer = OPTIMISERS[made](model.parameters(), **options)
            step = TrainStep(model, LOSS, optimizer, amp="fp16", clip_grad_norm=clip_grad_norm)
            for scale in (2.0**120, 2.0**10, 2.0**10):
                step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
                step(*_batch())
            assert step.scaler.get_scale() == scale
            weights.append(_weights(model))
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights[0], _weights(_small()))


@pytest.mark.parametrize("kind", ["SGD, fused", "FusedSGD", "FusedSGD, kernels"])
def test_momentum_is_nothing_where_a_later_first_step_is_skipped(kind: str) -> None:
    """The gate is not trained in the first step, and the second, its first one, overflows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        weights = []
        for made in (kind, "SGD"):
            model = _small()
            optimizer = OPTIMISERS[made](model.parameters(), lr=0.05, momentum=0.9)
            step = TrainStep(model, LOSS, optimizer, amp="fp16")
            for trained, scale in ((False, 2.0**10), (True, 2.0**120), (True, 2.0**10), (True, 2.0**10)):
                model.gate.requires_grad_(trained)
                step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
                step(*_batch())
            weights.append(_weights(model))
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
