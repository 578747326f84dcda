"""Attackers who know the gate and judges of its answers: against loops over images and over all N! permutations."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, RandomSwitchGate, permutations
from immunity_fast.attacks import Attack, BoundAttack, pgd
from immunity_fast.attacks.mixtures import trained_gate
from immunity_fast.evaluation import gate_attackers
from immunity_fast.evaluation.gate_attackers import DESCRIPTIONS, KNOWLEDGE, answered_rightly, attacker, averaged
from immunity_fast.experts.staged import GlobalAveragePool
from immunity_fast.functional import mixture_log_probabilities
from immunity_fast.permutations import (
    always_fooled,
    orders_tried,
    permuted,
    share_is_exact,
    shares_right,
    worst_margins,
    worst_weights,
)
from tests import grids, oracle

CLASSES = 4
SAMPLES = 7


def _case(experts: int, kind: str = "random") -> tuple[Tensor, Tensor, Tensor]:
    """float64 logits (N, B, K), gate (B, N) and labels (B,)."""
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(experts, SAMPLES, CLASSES, generator=generator, dtype=torch.float64)
    scores = 2 * torch.randn(SAMPLES, experts, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    if kind == "ties":  # experts that agree, classes that are alike, an expert that likes all classes as much
        logits[1] = logits[0]
        logits[:, 2:4, 1] = logits[:, 2:4, 3]
        logits[-1, 4] = 0
    gate = scores.softmax(-1)
    if kind == "equal weights":
        gate = torch.full_like(gate, 1 / experts)
    if kind == "two equal weights":
        gate[:, :2] = gate[:, :2].mean(-1, keepdim=True)
    if kind == "one weight":
        gate = F.one_hot(gate.argmax(-1), experts).double()
    return logits, gate, labels


def _mixtures(logits: Tensor, gate: Tensor, sample: int) -> Iterator[list[float]]:
    """The classes' probabilities for one image, under one permutation of the weights after the other."""
    probabilities = logits[:, sample].softmax(-1).tolist()
    for weights in itertools.permutations(gate[sample].tolist()):
        yield [
            math.fsum(w * p for w, p in zip(weights, column, strict=True))
            for column in zip(*probabilities, strict=True)
        ]


KINDS = ["random", "ties", "equal weights", "two equal weights", "one weight"]
every_case = pytest.mark.parametrize(("experts", "kind"), list(itertools.product(range(2, 6), KINDS)))


# The worst of all permutations


@every_case
def test_worst_margins_are_those_of_the_worst_permutation(experts: int, kind: str) -> None:
    logits, gate, labels = _case(experts, kind)
    margins = worst_margins(logits, gate, labels)
    assert margins.shape == (SAMPLES, CLASSES)
    for q, label in enumerate(labels.tolist()):
        for m in range(CLASSES):
            expected = max(mixture[m] - mixture[label] for mixture in _mixtures(logits, gate, q))
            assert float(margins[q, m]) == (-math.inf if m == label else pytest.approx(expected, abs=1e-14))


@every_case
def test_worst_weights_are_a_permutation_that_no_other_beats(experts: int, kind: str) -> None:
    logits, gate, labels = _case(experts, kind)
    weights = worst_weights(logits, gate, labels)
    assert weights.shape == gate.shape
    for q, label in enumerate(labels.tolist()):
        assert sorted(weights[q].tolist()) == sorted(gate[q].tolist())
        own = [sum(w * p for w, p in zip(weights[q], logits[:, q].softmax(-1)[:, m], strict=True)) for m in range(4)]
        reached = max(float(own[m] - own[label]) for m in range(CLASSES) if m != label)
        best = max(
            mixture[m] - mixture[label] for mixture in _mixtures(logits, gate, q) for m in range(CLASSES) if m != label
        )
        assert reached == pytest.approx(best, abs=1e-14)


@every_case
def test_the_share_that_is_right_is_counted(experts: int, kind: str) -> None:
    logits, gate, labels = _case(experts, kind)
    shares = shares_right(logits, gate, labels)
    assert shares.dtype == torch.float64
    for sample, label in enumerate(labels.tolist()):
        # Beyond rounding a class beats the label or not; where it is as likely, either count of it is one.
        margins = [
            max(p for k, p in enumerate(mixed) if k != label) - mixed[label]
            for mixed in _mixtures(logits, gate, sample)
        ]
        surely, perhaps = (sum(m < slack for m in margins) / len(margins) for slack in (-1e-12, 1e-12))
        assert surely - 1e-12 <= float(shares[sample]) <= perhaps + 1e-12


def test_shares_are_of_all_kinds() -> None:
    """All, none, and some of the permutations right: each is counted in its own way."""
    shares = torch.cat([shares_right(*_case(experts)) for experts in range(2, 6)])
    assert bool((shares == 0).any())
    assert bool((shares == 1).any())
    assert int(((shares > 0) & (shares < 1)).sum()) > 5


def test_a_class_as_likely_as_the_label_is_wrong() -> None:
    logits = torch.zeros(2, 1, 3, dtype=torch.float64)
    gate, label = torch.tensor([[0.25, 0.75]], dtype=torch.float64), torch.tensor([1])
    assert shares_right(logits, gate, label).tolist() == [0]
    logits[0, 0, 1] = 1.0
    assert shares_right(logits, gate, label).tolist() == [1]


def test_shares_do_not_depend_on_how_many_orders_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = shares_right(*_case(5))
    for cells in (1, 100):
        monkeypatch.setattr(permutations, "CELLS", cells)
        assert torch.equal(shares_right(*_case(5)), expected)


def test_shares_of_edges() -> None:
    logits, gate, labels = _case(3)
    assert shares_right(logits[:, :0], gate[:0], labels[:0]).shape == (0,)
    alone = shares_right(logits[:1], torch.ones_like(gate[:, :1]), labels)
    assert torch.equal(alone, (logits[0].argmax(-1) == labels).double())
    narrow = shares_right(logits.float(), gate.float(), labels)
    assert torch.equal(narrow, shares_right(logits, gate, labels))


@pytest.mark.parametrize("experts", [1, 2, 3, 5, 7])
def test_all_orders_are_tried_once(experts: int) -> None:
    found = sorted(map(tuple, orders_tried(experts).tolist()))
    assert found == list(itertools.permutations(range(experts)))
    assert share_is_exact(experts)


def test_of_many_experts_some_orders_are_tried() -> None:
    """The same each time, whatever the global generator; the share is then an estimate."""
    assert share_is_exact(8)
    assert len(orders_tried(8)) == math.factorial(8)
    assert not share_is_exact(9)
    state = torch.get_rng_state()
    orders = orders_tried(9)
    assert torch.equal(torch.get_rng_state(), state)
    assert orders.shape == (5040, 9)
    assert torch.equal(orders_tried(9), orders)
    assert torch.equal(orders.sort(-1).values, torch.arange(9).expand(5040, -1))
    # Each expert is about as often at each place: within five standard deviations.
    counts = torch.stack([(orders == expert).sum(0) for expert in range(9)]).double()
    assert float((counts - 560).abs().max()) < 5 * math.sqrt(5040 * (1 / 9) * (8 / 9))
    # One expert alone is right, and the largest weight alone suffices: a ninth of all orders.
    logits = torch.zeros(9, 1, 2, dtype=torch.float64)
    logits[:, 0, 1] = 8.0
    logits[4, 0] = torch.tensor([8.0, 0.0])
    gate = torch.tensor([[0.6] + [0.05] * 8], dtype=torch.float64)
    assert float(shares_right(logits, gate, torch.tensor([0]))) == pytest.approx(1 / 9, abs=5 * 0.0045)


@every_case
def test_who_is_always_fooled_is_so_by_every_permutation(experts: int, kind: str) -> None:
    """With a target exactly those are; without, of those for whom the same class always beats the label, all are."""
    logits, gate, labels = _case(experts, kind)
    targets = (labels + 1 + torch.arange(SAMPLES) % 3) % CLASSES
    found, reached = always_fooled(logits, gate, labels), always_fooled(logits, gate, labels, targets)
    for q, (label, target) in enumerate(zip(labels.tolist(), targets.tolist(), strict=True)):
        mixtures = list(_mixtures(logits, gate, q))
        beaten = [min(mixture[m] - mixture[label] for mixture in mixtures) for m in range(CLASSES) if m != label]
        assert bool(found[q]) == (max(beaten) > 1e-12), "of rounding there is none in these cases"
        others = [max(mixture[m] - mixture[target] for mixture in mixtures) for m in range(CLASSES) if m != target]
        assert bool(reached[q]) == (max(others) < -1e-12)


def test_there_are_cases_of_both() -> None:
    found = [always_fooled(*_case(experts, kind)) for experts, kind in itertools.product(range(2, 6), KINDS)]
    assert 10 < int(torch.cat(found).sum()) < 130


def test_worst_weights_have_no_gradient_but_the_gate_s_own() -> None:
    logits, gate, labels = _case(3)
    scores = gate.log().requires_grad_()
    gate = scores.softmax(-1)
    weights = worst_weights(logits.requires_grad_(), gate, labels)
    upstream = torch.arange(weights.numel(), dtype=torch.float64).view_as(weights)
    gradients = torch.autograd.grad((weights * upstream).sum(), [scores, logits], allow_unused=True, retain_graph=True)
    order = [[gate[q].tolist().index(w) for w in weights[q].tolist()] for q in range(SAMPLES)]
    chosen = gate.gather(-1, torch.tensor(order))
    torch.testing.assert_close(gradients[0], torch.autograd.grad((chosen * upstream).sum(), scores)[0])
    assert gradients[1] is None


def test_margins_of_half_precision_are_taken_in_float32() -> None:
    logits, gate, labels = _case(3)
    rounded = logits.bfloat16()
    margins = worst_margins(rounded, gate.float(), labels)
    assert margins.dtype == torch.float32
    torch.testing.assert_close(margins, worst_margins(rounded.double(), gate, labels).float(), rtol=1e-5, atol=1e-6)


# Judges


@every_case
def test_judges_are_loops_over_images_and_permutations(experts: int, kind: str) -> None:
    logits, gate, labels = _case(experts, kind)
    found = answered_rightly(logits, gate, labels, torch.Generator().manual_seed(3))
    assert list(found) == ["sample", "mean", "off", "worst", *(f"expert {i + 1}" for i in range(experts))]
    assert all(bits.shape == (SAMPLES,) and bits.dtype == torch.bool for bits in found.values())
    switched = _gate_that_gives(gate, torch.Generator().manual_seed(3))(torch.zeros(SAMPLES, 3, 1, 1))
    for q, label in enumerate(labels.tolist()):
        probabilities = logits[:, q].softmax(-1)
        for name, weights in (("off", gate[q]), ("mean", torch.full_like(gate[q], 1 / experts))):
            mixture = sum(w * p for w, p in zip(weights, probabilities, strict=True))
            assert _wins(mixture.tolist(), label, found[name][q])
        mixture = sum(w * p for w, p in zip(switched[q], probabilities, strict=True))
        assert _wins(mixture.tolist(), label, found["sample"][q])
        worst = min(2 * mixture[label] - sum(_best_two(mixture, label)) for mixture in _mixtures(logits, gate, q))
        if abs(worst) > 1e-12:
            assert bool(found["worst"][q]) == (worst > 0)
        for i in range(experts):
            assert _wins(probabilities[i].tolist(), label, found[f"expert {i + 1}"][q])


def _best_two(mixture: list[float], label: int) -> tuple[float, float]:
    """The label's probability, and the largest of the others."""
    return mixture[label], max(p for m, p in enumerate(mixture) if m != label)


def _wins(mixture: list[float], label: int, right: Tensor) -> bool:
    """Whether a judge that says `right` is right; who wins a tie is nobody's business."""
    own, other = _best_two(mixture, label)
    return abs(own - other) < 1e-12 or bool(right) == (own > other)


def _gate_that_gives(weights: Tensor, generator: torch.Generator) -> RandomSwitchGate:
    """A gate whose trained weights are these."""

    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return weights.log()

    return RandomSwitchGate(weights.shape[-1], Constant(), switch="sample", generator=generator).eval()


def test_a_tie_under_one_permutation_is_not_right_under_all() -> None:
    logits = torch.tensor([[[1.0, 1.0, 0.0]], [[1.0, 1.0, -1.0]]]).double()
    gate = torch.tensor([[0.25, 0.75]]).double()
    for label in (0, 1):
        assert not answered_rightly(logits, gate, torch.tensor([label]))["worst"]


def test_what_all_permutations_get_right_all_judges_do() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3000, 3, generator=generator)
    logits[..., 0] += 1.5
    gate = torch.randn(3000, 5, generator=generator).softmax(-1)
    found = answered_rightly(logits, gate, torch.zeros(3000, dtype=torch.int64), generator)
    assert 300 < int(found["worst"].sum()) < 2700
    for name in ("sample", "off", "mean"):
        assert bool(found[name][found["worst"]].all())
        assert not bool(found["worst"][~found[name]].any())


def test_the_sample_judge_repeats_itself_from_one_seed_alone() -> None:
    logits = torch.randn(3, 200, 5, generator=torch.Generator().manual_seed(0))
    gate = torch.tensor([0.1, 0.2, 0.7]).expand(200, 3)
    labels = torch.zeros(200, dtype=torch.int64)
    before = torch.get_rng_state()
    first, again, other = (answered_rightly(logits, gate, labels, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert [name for name in first if not torch.equal(first[name], other[name])] == ["sample"]


# Permutations


def test_permutations_are_those_of_the_gate_on_sample() -> None:
    """The same draws from the same generator, so the same distribution."""
    gate = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)).double().log().softmax(-1)
    switching = _gate_that_gives(gate, torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        permuted(gate, torch.Generator().manual_seed(5)), switching(torch.zeros(50, 3, 1, 1)), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("draw", [permuted, lambda gate, g: _gate_that_gives(gate, g)(torch.zeros(len(gate), 3, 1, 1))])
def test_every_permutation_is_as_likely_for_each_image(draw: Any) -> None:
    count = 6000
    gate = torch.tensor([0.5, 0.3, 0.2]).double().expand(count, 3)
    found = Counter(tuple(round(w, 6) for w in row) for row in draw(gate, torch.Generator().manual_seed(2)).tolist())
    assert set(found) == set(itertools.permutations((0.5, 0.3, 0.2)))
    # χ² with 5 degrees of freedom exceeds 20.5 once in a thousand.
    assert sum((n - count / 6) ** 2 / (count / 6) for n in found.values()) < 20.5


def test_permutations_come_from_the_global_generator_by_default() -> None:
    gate = torch.rand(9, 5)
    torch.manual_seed(8)
    first = permuted(gate)
    torch.manual_seed(8)
    assert torch.equal(permuted(gate), first)
    assert not torch.equal(permuted(gate), first)


# Attackers


def _model(experts: int = 3, *, seed: int = 0, generator: torch.Generator | None = None) -> ImmunityMoE:
    """A float64 mixture of different small networks with a gate that has its preferences."""
    torch.manual_seed(seed)
    networks = [
        nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), GlobalAveragePool(), nn.Linear(5, CLASSES))
        for _ in range(experts)
    ]
    gate = RandomSwitchGate(
        experts,
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), GlobalAveragePool(), nn.Linear(4, experts)),
        switch="call",
        generator=generator,
    )
    model = ImmunityMoE.from_experts(networks, gate=gate, stage="1", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model.double().eval()


def _images(samples: int = SAMPLES) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 0.3 + 0.4 * torch.rand(samples, 3, 7, 5, generator=generator, dtype=torch.float64)


LABELS = torch.tensor([0, 1, 2, 3, 3, 1, 0])


def _parts(model: ImmunityMoE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, B, K) and trained weights (B, N), from each expert and the gate alone."""
    logits = torch.stack([expert(images) for expert in model.unstack()])
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    scores = model.gate.network((images - mean) / std)
    exponentials = torch.exp(scores)
    return logits, exponentials / exponentials.sum(-1, keepdim=True)


def _loss_and_gradient(outputs: Any, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What an attack maximises, (B,), and its gradient."""
    x = images.clone().requires_grad_()
    found = outputs(x, labels)
    draws = found if found.dim() == 3 else found[None]
    losses = torch.stack([F.cross_entropy(draw, labels, reduction="none") for draw in draws]).mean(0)
    return losses.detach(), torch.autograd.grad(losses.sum(), x)[0]


def test_every_knowledge_is_described() -> None:
    assert set(DESCRIPTIONS) == {*KNOWLEDGE, "transfer", "output"}
    assert KNOWLEDGE == ("off", "sample", "eot", "mean", "logits", "worst")


@pytest.mark.parametrize(("knowledge", "experts"), grids.every(2, KNOWLEDGE, [2, 3, 4]))
def test_what_each_attacker_differentiates_is_its_formula(knowledge: Any, experts: int) -> None:
    model, images = _model(experts), _images()
    generator = torch.Generator().manual_seed(6)
    found = attacker(model, knowledge, draws=3, generator=generator)(images, LABELS)
    logits, gate = _parts(model, images)
    weights = [gate]
    if knowledge == "logits":
        expected = torch.stack([sum(logits[i][q] for i in range(experts)) / experts for q in range(SAMPLES)])
        expected = expected - expected.exp().sum(-1, keepdim=True).log()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        return
    if knowledge == "mean":
        weights = [torch.full_like(gate, 1 / experts)]
    elif knowledge == "worst":
        weights = [torch.stack([_worst_by_trying(logits, gate, q) for q in range(SAMPLES)])]
    elif knowledge != "off":
        switching = _gate_that_gives(gate, torch.Generator().manual_seed(6))
        weights = [switching(images) for _ in range(3 if knowledge == "eot" else 1)]
        assert len({tuple(w.flatten().tolist()) for w in weights}) == len(weights)
    expected = torch.stack([oracle.mixture_log_probabilities(logits, w) for w in weights])
    torch.testing.assert_close(found, expected if knowledge == "eot" else expected[0], rtol=1e-10, atol=1e-10)


def _worst_by_trying(logits: Tensor, gate: Tensor, sample: int) -> Tensor:
    """The permutation of an image's weights with the largest margin of any other class over the label."""
    label, probabilities = int(LABELS[sample]), logits[:, sample].softmax(-1)
    best, chosen = -math.inf, gate[sample]
    for order in itertools.permutations(range(gate.shape[-1])):
        weights = gate[sample, list(order)]
        own, other = _best_two((weights @ probabilities).tolist(), label)
        if other - own > best:
            best, chosen = other - own, weights
    return chosen


@pytest.mark.parametrize("knowledge", ["off", "mean", "worst", "sample"])
def test_gradients_are_those_of_the_formula_the_gate_s_included(knowledge: Any) -> None:
    model, images = _model(), _images()
    generators = [torch.Generator().manual_seed(6) for _ in range(2)]
    actual = _loss_and_gradient(attacker(model, knowledge, generator=generators[0]), images, LABELS)

    def formula(x: Tensor, labels: Tensor) -> Tensor:
        logits, gate = _parts(model, x)
        if knowledge == "mean":
            gate = torch.full_like(gate, 1 / 3)
        elif knowledge == "worst":
            gate = torch.stack([_worst_by_trying(logits, gate, q) for q in range(SAMPLES)])
        elif knowledge == "sample":
            keys = torch.rand(SAMPLES, 3, generator=generators[1], dtype=torch.float64)
            gate = torch.stack([row[order] for row, order in zip(gate, keys.argsort(-1), strict=True)])
        return oracle.mixture_log_probabilities(logits, gate)

    torch.testing.assert_close(actual, _loss_and_gradient(formula, images, LABELS), rtol=1e-9, atol=1e-12)


def test_mean_s_loss_is_the_cross_entropy_of_mean_probabilities() -> None:
    model, images = _model(), _images()
    loss, gradient = _loss_and_gradient(attacker(model, "mean"), images, LABELS)
    x = images.clone().requires_grad_()
    own = torch.stack([expert(x).softmax(-1) for expert in model.unstack()]).mean(0)[range(SAMPLES), LABELS]
    torch.testing.assert_close(loss, -own.log(), check_dtype=True, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(-own.log().sum(), x)[0], rtol=1e-9, atol=1e-12)


def _gradients_of_all_permutations(model: ImmunityMoE, images: Tensor) -> Tensor:
    """Those of the losses, (N!, B, 3, H, W)."""
    x = images.clone().requires_grad_()
    logits, gate = _parts(model, x)
    losses = [
        oracle.cross_entropy(logits, gate[:, list(order)], LABELS, 0.0)
        for order in itertools.permutations(range(model.num_experts))
    ]
    return torch.stack([torch.autograd.grad(loss.sum(), x, retain_graph=True)[0] for loss in losses])


def test_eot_of_many_draws_has_the_gradient_of_all_permutations() -> None:
    model, images, draws = _model(), _images(), 500
    of_each = _gradients_of_all_permutations(model, images).flatten(2)
    exact = of_each.mean(0)
    _, found = _loss_and_gradient(
        attacker(model, "eot", draws=draws, generator=torch.Generator().manual_seed(0)), images, LABELS
    )
    # The mean of k draws is off by the square root of the covariance's trace over k, typically.
    typical = ((of_each - exact).square().sum(-1).mean(0) / draws).sqrt()
    assert bool(((found.flatten(1) - exact).norm(dim=1) < 3 * typical).all())
    # The gradient of the mean output's loss, "mean", is another one.
    _, of_mean = _loss_and_gradient(attacker(model, "mean"), images, LABELS)
    assert bool(((of_mean.flatten(1) - exact).norm(dim=1) > 3 * typical).any())


def test_eot_over_all_permutations_steps_along_the_exact_average(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    orders = itertools.cycle(itertools.permutations(range(3)))
    monkeypatch.setattr(gate_attackers, "permuted", lambda gate, generator: gate[:, list(next(orders))])
    model, images = _model(), _images()
    outputs, exact = attacker(model, "eot", draws=6), _gradients_of_all_permutations(model, images).mean(0)
    torch.testing.assert_close(_loss_and_gradient(outputs, images, LABELS)[1], exact, rtol=1e-9, atol=1e-12)
    moved = BoundAttack(Attack(eps=0.1, alpha=0.05, steps=1, norm="L2"), outputs)(images, LABELS)
    torch.testing.assert_close((moved - images).flatten(1), 0.05 * F.normalize(exact.flatten(1), dim=1))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_expert_s_number_attacks_that_expert_alone(number: int) -> None:
    model, images = _model(), _images()
    found = _loss_and_gradient(attacker(model, number), images, LABELS)
    alone = model.unstack()[number]
    torch.testing.assert_close(found, _loss_and_gradient(lambda x, _: alone(x), images, LABELS))
    others = _model(seed=1)
    with torch.no_grad():
        for name, parameter in others.experts.named_parameters():
            parameter[number] = dict(model.experts.named_parameters())[name][number]
    torch.testing.assert_close(_loss_and_gradient(attacker(others, number), images, LABELS), found)


def test_an_expert_is_attacked_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 2, CLASSES, image_size=12).train()
    images = torch.rand(5, 3, 12, 12)
    attacker(model, 1)(images, LABELS[:5])
    model.eval()
    torch.testing.assert_close(attacker(model, 1)(images, LABELS[:5]), model.expert_logits(images)[1])


@pytest.mark.parametrize("knowledge", KNOWLEDGE)
def test_other_code_may_compute_the_experts(knowledge: Any) -> None:
    model, images = _model(), _images()
    seen = []

    def logits(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros(3, len(x), CLASSES, dtype=torch.float64)

    found = attacker(model, knowledge, expert_logits=logits)(images, LABELS)
    torch.testing.assert_close(found, torch.full_like(found, math.log(1 / CLASSES)))
    assert len(seen) == 1, "a draw is to cost no pass over the experts"


@pytest.mark.parametrize(("knowledge", "switch"), grids.every(3, [*KNOWLEDGE, 1], ["call", "off", "mean"]))
def test_the_gate_s_switch_and_generator_are_left_alone(knowledge: Any, switch: Any) -> None:
    own = torch.Generator().manual_seed(9)
    model, state, shared = _model(generator=own), own.get_state(), torch.get_rng_state()
    model.gate.switch = switch
    shared = torch.get_rng_state()
    _loss_and_gradient(attacker(model, knowledge, generator=torch.Generator().manual_seed(0)), _images(), LABELS)
    assert model.gate.switch == switch
    assert model.gate.generator is own
    assert torch.equal(own.get_state(), state)
    assert torch.equal(torch.get_rng_state(), shared)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gate_that_fails_has_its_switch_back() -> None:
    class Failing(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            raise RuntimeError("failed")

    model = _model()
    model.gate.network = Failing()
    with pytest.raises(RuntimeError, match="failed"):
        trained_gate(model, _images())
    assert model.gate.switch == "call"


def test_what_is_unknown_is_refused() -> None:
    model = _model()
    for knowledge in ("nonsense", "transfer", "expert 1", -1, 3):
        with pytest.raises(ValueError, match="knowledge: expected"):
            attacker(model, knowledge)  # type: ignore[arg-type]
    for draws in (0, -2):
        with pytest.raises(ValueError, match=f"draws: expected at least 1, got {draws}"):
            attacker(model, "eot", draws=draws)
        with pytest.raises(ValueError, match=f"draws: expected at least 1, got {draws}"):
            averaged(lambda x: x, draws)


def test_any_random_model_is_averaged_over_its_calls() -> None:
    numbers = iter(range(100))
    outputs = averaged(lambda x: x.flatten(1)[:, :3] + next(numbers), 4)(_images(), LABELS)
    assert outputs.shape == (4, SAMPLES, 3)
    for i, draw in enumerate(outputs):
        torch.testing.assert_close(draw, _images().flatten(1)[:, :3] + i)


# What keep_best, drop_fooled and restarts judge by


def _divided(experts: int = 3) -> tuple[ImmunityMoE, Tensor, Tensor]:
    """Experts that have learnt to tell colours from other parts of the images, and a gate that follows one of them."""
    return copy.deepcopy(_learnt(experts))


@cache
def _learnt(experts: int) -> tuple[ImmunityMoE, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (150,), generator=generator)
    images = 0.25 + 0.5 * torch.rand(150, 3, 6, 6, generator=generator)
    images[:, :, :2, :2] += 0.1 * F.one_hot(labels, CLASSES)[:, :3, None, None]
    images[:, :, 3:, 3:] += 0.1 * F.one_hot(labels, CLASSES)[:, :3, None, None]
    torch.manual_seed(0)
    networks = [
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(216, 4)) for _ in range(3)
    ]
    gate = RandomSwitchGate(experts, nn.Sequential(nn.Flatten(), nn.Linear(108, experts)))
    with torch.no_grad():
        gate.network[-1].weight.mul_(10)  # type: ignore[union-attr, index, operator]
    model = ImmunityMoE.from_experts(networks[:experts], gate=gate, stage="0", mean=(0.5,) * 3, std=(0.25,) * 3)
    optimiser = torch.optim.Adam(model.experts.parameters(), lr=0.01)
    for _ in range(60):
        loss = sum(F.cross_entropy(logits, labels) for logits in model.expert_logits(images))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
    return model.eval(), images, labels


def _answers(model: ImmunityMoE, images: Tensor, labels: Tensor) -> dict[str, float]:
    """The robust accuracy of everything that may answer; of the switching gate over all permutations, exactly."""
    with torch.no_grad():
        logits, gate = model.expert_logits(images), trained_gate(model, images)
    right = []
    for order in itertools.permutations(range(gate.shape[1])):
        mixture = mixture_log_probabilities(logits, gate[:, list(order)])
        right.append((mixture.argmax(-1) == labels).double().mean())
    mean = (mixture_log_probabilities(logits).argmax(-1) == labels).double().mean()
    return {"sample": float(torch.stack(right).mean()), "mean": float(mean)}


OPTIONS: list[dict[str, Any]] = [
    {"keep_best": True},
    {"drop_fooled": True},
    {"keep_best": True, "drop_fooled": True},
    {"keep_best": True, "drop_fooled": True, "restarts": 2},
]
WAYS: dict[str, Any] = {
    "a mixture": lambda model: model,
    "a function of it": lambda model: lambda x: model(x),
    "compiled": lambda model: torch.compile(model, backend="eager", dynamic=False),
    "something more": lambda model: nn.Sequential(model, nn.Softmax(-1)).eval(),
}


@pytest.mark.parametrize(
    ("norm", "switch", "way"),
    grids.sampled(
        [
            (norm, switch, way)
            for norm, switch, way in itertools.product(["Linf", "L2"], ["call", "sample"], WAYS)
            if way != "compiled" or (norm, switch) == ("Linf", "call")  # the compiler takes long
        ],
        ordinary=lambda norm, switch, way: (
            (norm, switch, way) in [("L2", "call", "a mixture"), ("Linf", "sample", "a function of it")]
            or (norm, switch, way) == ("L2", "sample", "something more")
        ),
    ),
)
def test_on_a_random_gate_the_best_kept_is_never_a_lucky_one(switch: Any, norm: Any, way: str) -> None:
    """Judged by the draw that it was attacked by, an image that was fooled once would be kept, and answered rightly."""
    model, images, labels = _divided()
    model.gate.switch = switch
    eps = 0.02 if norm == "Linf" else 0.17
    answers = []
    for options in ({}, *OPTIONS):
        torch.manual_seed(2)
        generator = torch.Generator().manual_seed(1)
        settings = {"eps": eps, "alpha": eps / 4, "steps": 15, "norm": norm, "generator": generator}
        adversarial = pgd(WAYS[way](model), images, labels, **settings, **options)
        answers.append(_answers(model, adversarial, labels))
    assert 0.05 < answers[0]["sample"] < 0.8
    for options, found in zip(OPTIONS, answers[1:], strict=True):
        for name, share in found.items():
            assert share <= answers[0][name] + 0.01, (options, name)


@pytest.mark.parametrize("knowledge", ["sample", "eot", "mean"])
def test_against_a_random_gate_the_worst_for_the_mean_is_kept(knowledge: Any) -> None:
    model, images, labels = _divided()
    answers = []
    for options in ({}, *OPTIONS[:3]):
        outputs = attacker(model, knowledge, draws=2, generator=torch.Generator().manual_seed(3))
        attack = Attack(0.02, 0.005, 15, random_start=True, **options)
        adversarial = BoundAttack(attack, outputs)(images, labels, generator=torch.Generator().manual_seed(1))
        answers.append(_answers(model, adversarial, labels))
    assert 0.05 < answers[0]["sample"] < 0.8
    # Dropping changes who gets which draw: by an image or two.
    assert all(found[name] <= answers[0][name] + 0.02 for found in answers[1:] for name in found)


def test_on_a_random_gate_dropping_the_fooled_costs_less() -> None:
    model, images, labels = _divided()
    counts, whole = [], model._logits
    shown: list[int] = []
    model._logits = lambda x: shown.append(len(x)) or whole(x)  # type: ignore[method-assign, assignment, func-returns-value]
    for drop_fooled in (False, True):
        shown.clear()
        pgd(model, images, labels, eps=0.2, alpha=0.05, steps=15, keep_best=True, drop_fooled=drop_fooled)
        counts.append(sum(shown))
    assert counts[0] == 150 * (2 * 15 + 1 + 1), "a step, its judge; what finds that out, and a last look"
    assert counts[1] < counts[0] / 2


@pytest.mark.parametrize("switch", ["off", "mean"])
def test_a_gate_that_does_not_switch_is_judged_by_its_outputs(switch: Any) -> None:
    model, images, labels = _divided()
    model.gate.switch = switch
    shown: list[int] = []
    whole = model._logits
    model._logits = lambda x: shown.append(len(x)) or whole(x)  # type: ignore[method-assign, assignment, func-returns-value]
    pgd(model, images[:9], labels[:9], steps=4, keep_best=True)
    assert shown == [9] * 5


def test_a_compiled_attack_is_judged_by_a_gate_s_mean_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, images, labels = _divided()
    results = []
    for compiled in ("off", "on"):  # with a draw more or less
        torch.manual_seed(2)
        attack = Attack(0.02, 0.005, 8, keep_best=True, drop_fooled=True)
        bound = BoundAttack(attack, lambda x, _: model(x), compile=compiled)  # type: ignore[arg-type]
        results.append(_answers(model, bound(images, labels), labels))
    assert results[0]["mean"] == pytest.approx(results[1]["mean"], abs=0.05)


def test_restarts_without_a_step_are_judged_by_the_mean_too() -> None:
    """Of thirty random starts the one counts that is worst for the mean, not one that met an unlucky draw."""
    model, images, labels = _divided()
    settings = {"eps": 0.1, "steps": 0, "restarts": 30}
    results = []
    for switch in ("mean", "sample"):
        model.gate.switch = switch  # type: ignore[assignment]
        results.append(pgd(model, images, labels, **settings, generator=torch.Generator().manual_seed(1)))
    assert float((results[0] == results[1]).double().mean()) > 0.95, "who always fools goes before who fools the mean"
    assert not torch.equal(results[0], pgd(model, images, labels, eps=0.1, steps=0))


def test_hooks_are_gone_after_an_attack_and_after_an_error() -> None:
    module = torch.nn.modules.module
    before = dict(module._global_forward_pre_hooks), dict(module._global_forward_hooks)
    model, images, labels = _divided()
    pgd(model, images[:3], labels[:3], steps=2, keep_best=True)
    with pytest.raises(RuntimeError):
        pgd(lambda x: model(x[..., :2, :2]), images[:3], labels[:3], steps=2, keep_best=True)
    assert (dict(module._global_forward_pre_hooks), dict(module._global_forward_hooks)) == before
    assert model.gate.switch == "call"
