"""A training step on adversarial images: its loss and gradients, those of TRADES, and all of it compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate
from immunity_fast.data.augmentation import apply_affine, draw_affine
from immunity_fast.experts.staged import GlobalAveragePool
from immunity_fast.training.adversarial import BatchNormMode, InnerAttack, divergence, trades_losses
from immunity_fast.training.step import TrainStep
from tests import grids, oracle
from tests.adversarial_cases import (
    LABELS,
    LOSS,
    METHODS,
    attacked,
    inner_settings,
    kl,
    noisy_images,
    seeded,
    small_mixture,
    state_of,
    train_step,
)
from tests.graphs import captured
from tests.small_runs import as_bytes

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


def _gradients(model: ImmunityMoE) -> dict[str, tuple[Any, ...]]:
    return {name: as_bytes(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("method", "double_backprop", "batchnorm"),
    grids.every(2, ("pgd", "fgsm-rs"), ("reverse", "forward"), get_args(BatchNormMode)),
)
def test_a_step_is_that_of_the_adversarial_images(
    method: str, double_backprop: Any, batchnorm: str, attacks: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    model, other = small_mixture(), small_mixture()
    measured = train_step(model, method, double_backprop=double_backprop, batchnorm=batchnorm)(noisy_images(), LABELS)
    ((images, labels, adversarial),) = attacks
    assert torch.equal(images, noisy_images())
    assert torch.equal(labels, LABELS)
    assert not torch.equal(adversarial, images)
    expected = train_step(other, double_backprop=double_backprop)(adversarial, LABELS)
    assert torch.equal(measured, expected)
    assert _gradients(model) == _gradients(other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_images_are_augmented_before_they_are_attacked(
    method: str, attacks: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    stored = torch.randint(256, (5, 3, 12, 13), generator=seeded(), dtype=torch.uint8)
    affine = draw_affine(5, seeded(), padding=2, flip=True)
    model, other = small_mixture(dtype=torch.float32), small_mixture(dtype=torch.float32)
    torch.manual_seed(3)
    measured = train_step(model, method)(stored, LABELS, affine)
    torch.manual_seed(3)
    expected = train_step(other, method)(apply_affine(stored, affine), LABELS)
    assert torch.equal(attacks[0][0], apply_affine(stored, affine))
    assert torch.equal(measured, expected)
    assert _gradients(model) == _gradients(other)


@pytest.mark.parametrize("method", METHODS)
def test_the_heatmap_terms_are_those_of_the_adversarial_images(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for adversarial in (noisy_images(), noisy_images(2)):
        monkeypatch.setattr(InnerAttack, "__call__", lambda *_, made=adversarial: made)
        measured = train_step(small_mixture(), method)(noisy_images(), LABELS)
        logits, activations, gate = small_mixture().expert_outputs(adversarial)
        _, terms = LOSS(logits, activations, LABELS, gate, return_terms=True)
        torch.testing.assert_close(measured[2], terms.mutual_information.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(measured[3], terms.position_stability.detach(), rtol=1e-12, atol=0)
        found.append(measured)
    assert (found[0] != found[1]).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batchnorm", get_args(BatchNormMode))
def test_running_statistics_count_what_is_trained_on_alone(method: str, batchnorm: str) -> None:
    model = small_mixture()
    counts = [b.clone() for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    train_step(model, method, batchnorm=batchnorm)(noisy_images(), LABELS)
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


def _trades_oracle(
    clean: tuple[Tensor, Tensor], adversarial: tuple[Tensor, Tensor], labels: Tensor, alpha: float, weight: float
) -> Tensor:
    """arXiv 1901.08573, eq. (5), of the mixture and, by α, of each expert: one image after the other."""
    losses = oracle.cross_entropy(*clean, labels, alpha)
    p, q = oracle.mixture_log_probabilities(*clean), oracle.mixture_log_probabilities(*adversarial)
    rows = []
    for b in range(len(labels)):
        drift = kl(p[b], q[b])
        for i in range(len(clean[0])):
            drift = drift + alpha * kl(torch.log_softmax(clean[0][i, b], 0), torch.log_softmax(adversarial[0][i, b], 0))
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
def test_trades_of_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
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
    p, q = (torch.randn(2, 4, 7, generator=seeded()).double().log_softmax(-1) for _ in range(2))
    q = q.flip(-1)
    expected = torch.stack([torch.stack([kl(p[i, j], q[i, j]) for j in range(4)]) for i in range(2)])
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


WAYS = [
    ("loop", "reverse", False),
    ("loop", "forward", False),
    ("vmap", "reverse", False),
    ("vmap", "forward", False),
    ("loop", "reverse", True),
    ("vmap", "reverse", True),
]


@pytest.mark.parametrize(
    ("batching", "double_backprop", "whole", "alpha", "tolerance"),
    grids.sampled(
        [(*way, *of_alpha) for way in WAYS for of_alpha in ((0.0, 1e-9), (0.5, 1e-5))],
        ordinary=lambda batching, _way, whole, alpha, _: ((batching == "vmap") != whole) == (alpha > 0),
    ),
)
def test_a_step_of_trades_is_exact_and_counts_clean_images_first(
    alpha: float, tolerance: float, batching: Any, double_backprop: Any, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_mixture(batching=batching, whole=whole)
    loss_fn = FusedImmunityLoss(alpha, 0.7, 1e-2, size=(8, 9))
    loss, gradients, buffers = _independent(model, loss_fn, noisy_images(), noisy_images(2), 2.5)
    swapped = _independent(model, loss_fn, noisy_images(2), noisy_images(), 2.5)[2]
    monkeypatch.setattr(InnerAttack, "__call__", lambda *_: noisy_images(2))
    step = train_step(model, "trades", loss_fn, double_backprop=double_backprop, trades_weight=2.5)
    assert float(step(noisy_images(), LABELS)[0]) == pytest.approx(loss, rel=tolerance)
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
        found.append(train_step(small_mixture(), "pgd", trades_weight=weight)(noisy_images(), LABELS))
    assert torch.equal(*found)


# A compiled step


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Has graphs captured as they would be, but then run by PyTorch's own kernels, in the way that it is given."""
    compiled = torch.compile

    def by(backend: str) -> None:
        monkeypatch.setattr(torch, "compile", compiled)  # whatever an earlier call has put in its place
        monkeypatch.setattr(torch, "compile", captured(backend))

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
    gate = RandomSwitchGate(2, nn.Sequential(GlobalAveragePool(), nn.Linear(3, 2)), generator=seeded())
    return ImmunityMoE.from_experts(experts, gate=gate, stage="1", batching="loop")


@pytest.mark.parametrize(
    ("method", "batchnorm", "gate", "amp"),
    grids.each(2, [("trades", "train", "mean", "off"), ("pgd", "eval", "off", "bf16")]),
)
def test_a_compiled_attack_makes_the_images_of_an_eager_one(
    method: str, batchnorm: str, gate: str, amp: Any, without_inductor: Callable[[str], None]
) -> None:
    without_inductor("aot_eager")
    found, said = [], []
    for compile in ("on", "off"):
        settings, model = inner_settings(method, batchnorm, gate, steps=2), _tiny()
        before = state_of(model)
        attack = InnerAttack(model, settings, compile=compile, amp=amp, log=said.append)  # type: ignore[arg-type]
        torch.manual_seed(3)
        found.append(torch.stack([attack(noisy_images(seed, torch.float32), LABELS) for seed in (1, 2)]))
        assert attack.compiled == (compile == "on")
        assert state_of(model) == before
    assert said == []
    # Where a gradient is 0 but for rounding, its sign is another.
    assert (found[0] == found[1]).float().mean() > (0.9 if amp == "bf16" else 0.999)


def test_an_attack_on_a_switching_gate_stays_the_same_compiled(
    without_inductor: Callable[[str], None],
) -> None:
    without_inductor("eager")
    found = []
    for compile in ("on", "off"):
        settings, said = inner_settings("pgd", "train", "call"), []
        attack = InnerAttack(_tiny(), settings, compile=compile, log=said.append)  # type: ignore[arg-type]
        found.append(attacked(attack, noisy_images(dtype=torch.float32)))
        assert len(said) == (compile == "on" and not attack.compiled)  # it says so where it cannot
    torch.testing.assert_close(*found)


def test_a_compiled_adversarial_step_gives_what_eager_ones_do(
    without_inductor: Callable[[str], None],
) -> None:
    without_inductor("eager")
    found, models, said = [], [], []
    for compile in ("on", "off"):
        model = _tiny()
        options: dict[str, Any] = {"compile": compile, "log": said.append}
        attack = InnerAttack(model, inner_settings("trades", "train", steps=2), **options)
        step = TrainStep(model, LOSS, SGD(model.parameters(), 0.05, fused=True), attack=attack, **options)
        torch.manual_seed(3)
        stored = torch.randint(256, (5, 3, 12, 13), generator=seeded(), dtype=torch.uint8)
        found.append(torch.stack([step(stored, LABELS, draw_affine(5, seeded(), padding=1)) for _ in range(2)]))
        models.append(model)
        assert step.compiled == attack.compiled == (compile == "on")
    assert said == []
    torch.testing.assert_close(*found, rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(*(model.state_dict() for model in models), rtol=1e-3, atol=1e-4, check_stride=False)
