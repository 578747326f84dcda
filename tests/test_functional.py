"""The public functions against the float64 oracle, at the edges of their domain, and given wrong arguments."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from immunity_fast import FusedImmunityLoss
from immunity_fast.functional import (
    gradcam_heatmaps,
    heatmap_loss_gradients,
    heatmap_losses,
    label_scores,
    log_mixture,
    mixture_cross_entropy,
    mixture_log_probabilities,
)
from tests import grids, oracle
from tests.oracle import assert_matches
from tests.tensors import normal

seeded = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def _labels(samples: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))


class Maps(NamedTuple):
    """A case of the heatmap functions."""

    shape: tuple[int, int, int, int, int]
    size: tuple[int, int] | None
    weight_scale: Any
    normalize: bool
    smoothing: float
    rectified: bool
    seed: int

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Activations and gradients."""
        activations, gradients = normal(*self.shape, seed=self.seed), normal(*self.shape, seed=self.seed + 1)
        if self.rectified:  # as behind a ReLU, where scores are often exactly 0
            activations = activations.relu()
        return activations.requires_grad_(), gradients.requires_grad_()


class Mixture(NamedTuple):
    """A case of the mixture functions."""

    shape: tuple[int, int, int]
    gate: str
    scale: float
    alpha: float
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Logits, gate, the gate's rows as the oracle takes them, labels."""
        experts, samples, classes = self.shape
        logits = (self.scale * normal(*self.shape, seed=self.seed)).requires_grad_()
        labels = _labels(samples, classes, self.seed)
        if self.gate == "none":
            return logits, None, torch.full((samples, experts), 1 / experts, dtype=torch.float64), labels
        shape = (experts,) if self.gate == "row" else (samples, experts)
        gate = normal(*shape, seed=self.seed + 1).softmax(-1).requires_grad_()
        return logits, gate, gate.expand(samples, experts), labels


experts, samples, channels = st.integers(2, 5), st.sampled_from([0, 1, 2, 7]), st.integers(1, 9)
sides, seeds = st.integers(1, 11), st.integers(0, 10**6)
maps = st.builds(
    Maps,
    shape=st.tuples(experts, samples, channels, st.integers(1, 5), st.integers(1, 6)),
    size=st.none() | st.tuples(sides, sides),
    weight_scale=st.sampled_from(["channels", "spatial"]),
    normalize=st.booleans(),
    smoothing=st.sampled_from([0.0, 1e-4, 0.01, 1.0]),
    rectified=st.booleans(),
    seed=seeds,
)
mixtures = st.builds(
    Mixture,
    shape=st.tuples(experts, samples, channels),
    gate=st.sampled_from(["none", "row", "rows"]),
    scale=st.sampled_from([0.1, 3.0, 20.0]),
    alpha=st.sampled_from([0.0, 0.3, 2.0]),
    seed=seeds,
)


def _assert_same_gradients(actual: Tensor, expected: Tensor, leaves: tuple[Tensor, ...], seed: int = 5) -> None:
    upstream = normal(*actual.shape, seed=seed)
    if not expected.requires_grad:  # an empty batch: the oracle adds nothing up
        expected = expected + sum((leaf * 0).sum() for leaf in leaves)
    ours = torch.autograd.grad(actual, leaves, upstream, retain_graph=True)
    theirs = torch.autograd.grad(expected, leaves, upstream, retain_graph=True, materialize_grads=True)
    # Some gradients are zero by cancellation alone (the losses are scale-free): hence one floor for all leaves.
    floor = max([0.1, *(float(reference.abs().max()) for reference in theirs if reference.numel())])
    for gradient, reference in zip(ours, theirs, strict=True):
        assert_matches(gradient, reference, floor=floor)


@seeded
@given(maps)
def test_gradcam_heatmaps_match_the_oracle(case: Maps) -> None:
    leaves = case.leaves()
    actual = gradcam_heatmaps(*leaves, size=case.size, weight_scale=case.weight_scale)
    expected = oracle.heatmaps(*leaves, case.size, case.weight_scale)
    assert_matches(actual, expected)
    _assert_same_gradients(actual, expected, leaves)


@seeded
@given(maps)
def test_heatmap_losses_match_the_oracle(case: Maps) -> None:
    leaves = case.leaves()
    options = {name: getattr(case, name) for name in ("size", "normalize", "smoothing", "weight_scale")}
    actual, expected = heatmap_losses(*leaves, **options), oracle.heatmap_losses(*leaves, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_matches(ours, theirs)
        _assert_same_gradients(ours, theirs, leaves)


@seeded
@given(mixtures)
def test_mixture_log_probabilities_match_the_oracle(case: Mixture) -> None:
    logits, gate, rows, _ = case.tensors()
    actual, expected = mixture_log_probabilities(logits, gate), oracle.mixture_log_probabilities(logits, rows)
    assert_matches(actual, expected)
    _assert_same_gradients(actual, expected, (logits,) if gate is None else (logits, gate))


@seeded
@given(mixtures)
def test_mixture_cross_entropy_matches_the_oracle(case: Mixture) -> None:
    logits, gate, rows, labels = case.tensors()
    actual = mixture_cross_entropy(logits, gate, labels, case.alpha)
    expected = oracle.cross_entropy(logits, rows, labels, case.alpha)
    assert_matches(actual, expected)
    _assert_same_gradients(actual, expected, (logits,) if gate is None else (logits, gate))


def test_cross_entropy_is_the_mixture_s_likelihood() -> None:
    logits, gate, labels = normal(3, 4, 5), normal(4, 3, seed=1).softmax(-1), _labels(4, 5)
    likelihoods = mixture_log_probabilities(logits, gate)[torch.arange(4), labels]
    assert_matches(mixture_cross_entropy(logits, gate, labels, 0.0), -likelihoods, 1e-15)


def test_mixture_probabilities_sum_to_one() -> None:
    total = mixture_log_probabilities(normal(3, 4, 5), normal(4, 3, seed=1).softmax(-1)).exp().sum(-1)
    assert_matches(total, torch.ones(4, dtype=torch.float64), 1e-14)


def test_lists_of_tensors_give_what_stacked_tensors_give() -> None:
    logits, labels = normal(3, 4, 5), _labels(4, 5)
    activations, gradients = normal(3, 4, 2, 3, 3), normal(3, 4, 2, 3, 3, seed=1)
    assert torch.equal(mixture_log_probabilities(list(logits)), mixture_log_probabilities(logits))
    assert torch.equal(
        mixture_cross_entropy(tuple(logits), None, labels, 1.0), mixture_cross_entropy(logits, None, labels, 1.0)
    )
    assert torch.equal(label_scores(list(logits), labels, "logit"), label_scores(logits, labels, "logit"))
    pairs = zip(heatmap_losses(list(activations), list(gradients)), heatmap_losses(activations, gradients), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(("normalize", "size"), grids.every(2, (True, False), (None, (3, 2), (1, 2))))
def test_gradcheck_and_gradgradcheck_where_maps_are_positive(normalize: bool, size: tuple[int, int] | None) -> None:
    leaves = (normal(2, 2, 2, 2, 3).exp().requires_grad_(), normal(2, 2, 2, 2, 3, seed=1).exp().requires_grad_())

    def losses(activations: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        return heatmap_losses(activations, gradients, size=size, normalize=normalize)

    assert torch.autograd.gradcheck(losses, leaves)
    assert torch.autograd.gradgradcheck(losses, leaves)


def test_gradcheck_and_gradgradcheck_of_the_mixture() -> None:
    labels = _labels(2, 4)

    def loss(logits: Tensor, gate: Tensor) -> Tensor:
        return mixture_cross_entropy(logits, gate, labels, 0.5)

    leaves = (normal(3, 2, 4).requires_grad_(), normal(2, 3, seed=1).softmax(-1).requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    """channels-last maps, and vmap's memory (B, N·C, h, w) seen as (N, B, C, h, w)."""
    activations, gradients = normal(3, 4, 5, 6, 7), normal(3, 4, 5, 6, 7, seed=1)
    expected = heatmap_losses(activations, gradients, size=(9, 9))
    last = [x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) for x in (activations, gradients)]
    grouped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (activations, gradients)]
    for strided in (last, grouped):
        assert not strided[0].is_contiguous()
        for one, other in zip(heatmap_losses(*strided, size=(9, 9)), expected, strict=True):
            assert_matches(one, other, 1e-12)


def test_gradients_that_are_broadcast_over_space_are_welcome() -> None:
    gradients = normal(2, 3, 4, 1, 1).expand(2, 3, 4, 5, 5)
    expected = heatmap_losses(normal(2, 3, 4, 5, 5), gradients.contiguous())
    for one, other in zip(heatmap_losses(normal(2, 3, 4, 5, 5), gradients), expected, strict=True):
        assert_matches(one, other, 1e-12)


DEAD = {
    "zero activations": lambda a, g: (a * 0, g),
    "zero gradients": lambda a, g: (a, g * 0),
    "negative scores": lambda a, g: (a.abs(), -g.abs()),
}


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("smoothing", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_maps_count_as_uniform(dead: str, smoothing: float, dtype: torch.dtype) -> None:
    leaves = [normal(3, 2, 4, 3, 5, seed=seed, dtype=dtype) for seed in (0, 1)]
    leaves = [x.requires_grad_() for x in DEAD[dead](*leaves)]
    information, stability = heatmap_losses(*leaves, size=(6, 10), smoothing=smoothing)
    assert information.tolist() == pytest.approx([3 * math.log(3)] * 2, rel=1e-6)
    assert float(stability.detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("smoothing", [0.0, 0.01])
@pytest.mark.parametrize("normalize", [True, False])
def test_dead_maps_of_one_expert_have_no_gradient(dead: str, smoothing: float, normalize: bool) -> None:
    """The other expert lives; zero inputs give an exact zero, negative scores one of rounding where smoothed."""
    activations, gradients = normal(2, 3, 4, 3, 5), normal(2, 3, 4, 3, 5, seed=1)
    activations[0], gradients[0] = DEAD[dead](activations[0], gradients[0])
    leaves = (activations.requires_grad_(), gradients.requires_grad_())
    information, stability = heatmap_losses(*leaves, size=(6, 10), smoothing=smoothing, normalize=normalize)
    ours = torch.autograd.grad(information.sum() + stability, leaves)
    exact = dead != "negative scores" or smoothing == 0
    for gradient in ours:
        assert gradient.isfinite().all()
        assert float(gradient[0].abs().max()) <= (0 if exact else 1e-12)
        assert float(gradient[1].abs().max()) > 0


def test_one_hot_maps_that_are_disjoint_share_nothing() -> None:
    activations = torch.zeros(3, 1, 1, 2, 2)
    for expert, cell in enumerate([(0, 0), (0, 1), (1, 1)]):
        activations[expert, 0, 0][cell] = 1
    information, stability = heatmap_losses(activations, torch.ones_like(activations), smoothing=0.0)
    assert information.tolist() == [0]
    assert float(stability.detach()) == 0


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_identical_maps_share_everything(experts: int) -> None:
    activations, gradients = (normal(1, 4, 3, 5, 5, seed=seed).expand(experts, -1, -1, -1, -1) for seed in (0, 1))
    information, stability = heatmap_losses(activations, gradients, size=(8, 8))
    assert_matches(information, torch.full((4,), experts * math.log(experts), dtype=torch.float64), 1e-13)
    assert float(stability.detach()) == 0


@pytest.mark.parametrize("of_activations", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("of_gradients", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("smoothing", [0.0, 0.01])
def test_extreme_magnitudes_in_float32_equal_the_oracle(
    of_activations: float, of_gradients: float, smoothing: float
) -> None:
    leaves = [
        (normal(3, 2, 4, 3, 5, seed=seed, dtype=torch.float32) * scale).requires_grad_()
        for seed, scale in ((0, of_activations), (1, of_gradients))
    ]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    actual = heatmap_losses(*leaves, size=(6, 7), smoothing=smoothing)
    expected = oracle.heatmap_losses(*exact, (6, 7), smoothing=smoothing)
    for ours, theirs in zip(actual, expected, strict=True):
        assert_matches(ours, theirs, 1e-4)
        found = torch.autograd.grad(ours.sum(), leaves, retain_graph=True)
        wanted = torch.autograd.grad(theirs.sum(), exact, retain_graph=True)
        for gradient, reference in zip(found, wanted, strict=True):
            assert_matches(gradient, reference, 1e-3, floor=0)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_losses_do_not_change_with_the_scale_of_their_inputs(scale: float) -> None:
    activations, gradients = normal(3, 2, 4, 3, 5), normal(3, 2, 4, 3, 5, seed=1)
    expected = heatmap_losses(activations, gradients)
    for inputs in ((activations * scale, gradients), (activations, gradients * scale)):
        for one, other in zip(heatmap_losses(*inputs), expected, strict=True):
            assert_matches(one, other, 1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [None, (4, 4)])
def test_an_empty_batch_gives_zeros_and_empty_gradients(normalize: bool, size: tuple[int, int] | None) -> None:
    leaves = [torch.zeros(2, 0, 3, 4, 5, requires_grad=True) for _ in range(2)]
    information, stability = heatmap_losses(*leaves, size=size, normalize=normalize)
    (information.sum() + stability).backward()
    assert information.shape == (0,)
    assert float(stability.detach()) == 0
    assert all(leaf.grad is not None and leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    activations, gradients = (normal(2, 3, 4, 5, 5, seed=seed, dtype=dtype) for seed in (0, 1))
    actual = [*heatmap_losses(activations, gradients), gradcam_heatmaps(activations, gradients)]
    expected = [
        *heatmap_losses(activations.float(), gradients.float()),
        gradcam_heatmaps(activations.float(), gradients.float()),
    ]
    logits, gate, labels = normal(2, 3, 4, dtype=dtype), normal(3, 2, dtype=dtype).softmax(-1), _labels(3, 4)
    actual += [mixture_log_probabilities(logits, gate), mixture_cross_entropy(logits, gate, labels, 1.0)]
    expected += [
        mixture_log_probabilities(logits.float(), gate.float()),
        mixture_cross_entropy(logits.float(), gate.float(), labels, 1.0),
    ]
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


def test_half_precision_leaves_get_half_precision_gradients() -> None:
    leaves = [normal(2, 3, 4, 5, 5, seed=seed, dtype=torch.bfloat16).requires_grad_() for seed in (0, 1)]
    information, stability = heatmap_losses(*leaves)
    (information.sum() + stability).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    activations, gradients = (normal(2, 3, 4, 5, 5, seed=seed, dtype=dtype) for seed in (0, 1))
    logits, gate, labels = normal(2, 3, 4, dtype=dtype), normal(3, 2, dtype=dtype).softmax(-1), _labels(3, 4)

    def everything() -> list[Tensor]:
        return [
            *heatmap_losses(activations, gradients, size=(8, 8)),
            gradcam_heatmaps(activations, gradients, size=(8, 8)),
            mixture_log_probabilities(logits, gate),
            mixture_cross_entropy(logits, gate, labels, 1.0),
        ]

    outside = everything()
    with torch.autocast("cpu", torch.bfloat16):
        inside = everything()
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cross_entropy_where_every_probability_underflows(dtype: torch.dtype) -> None:
    """Labels 2e4 below the largest logit: −log ŷ = 2e4 + log 2 − …, and each gradient is the expert's share of it."""
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, -1e4, 1e4]]], dtype=dtype, requires_grad=True)
    loss = mixture_cross_entropy(logits, None, torch.tensor([1]), 0.25)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([2e4 + 0.25 * 4e4], rel=1e-6)
    assert logits.grad is not None
    expected = [[[0.75, -0.75, 0.0]], [[0.0, -0.75, 0.75]]]
    torch.testing.assert_close(logits.grad, torch.tensor(expected, dtype=dtype))


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_one_hot_gate_is_the_chosen_expert(chosen: int) -> None:
    logits, labels = normal(3, 4, 5).requires_grad_(), _labels(4, 5)
    gate = torch.eye(3, dtype=torch.float64)[chosen].requires_grad_()
    loss = mixture_cross_entropy(logits, gate, labels, 0.0)
    assert_matches(loss, torch.nn.functional.cross_entropy(logits[chosen], labels, reduction="none"), 1e-14)
    of_logits, of_gate = torch.autograd.grad(loss.sum(), (logits, gate))
    likelihoods = logits.detach().softmax(-1)[:, torch.arange(4), labels]
    assert_matches(of_gate, -(likelihoods / likelihoods[chosen]).sum(-1), 1e-13)
    assert [bool(gradient.any()) for gradient in of_logits] == [i == chosen for i in range(3)]


def test_label_scores_sum_what_gradcam_differentiates() -> None:
    logits, labels = normal(3, 4, 5), _labels(4, 5)
    picked = [logits[i, q, label] for i in range(3) for q, label in enumerate(labels.tolist())]
    assert float(label_scores(logits, labels, "logit")) == pytest.approx(float(sum(picked)), rel=1e-12)
    picked = [logits[i, q].softmax(0)[label] for i in range(3) for q, label in enumerate(labels.tolist())]
    assert float(label_scores(logits, labels, "probability")) == pytest.approx(float(sum(picked)), rel=1e-12)


A = torch.ones(2, 3, 4, 5, 6)
L = torch.zeros(2, 3, 4)
T = torch.tensor([0, 1, 2])

WRONG_MAPS: list[tuple[str, tuple[Any, Any], dict[str, Any], type[Exception], str]] = [
    ("size is zero", (A, A), {"size": 0}, ValueError, r"size: .*got 0"),
    ("size is a truth", (A, A), {"size": True}, ValueError, r"size: .*got True"),
    ("size is a fraction", (A, A), {"size": 3.5}, ValueError, r"size: .*got 3\.5"),
    ("size has a zero", (A, A), {"size": (0, 3)}, ValueError, r"size: .*got \(0, 3\)"),
    ("size is negative", (A, A), {"size": (4, -3)}, ValueError, r"size: .*got \(4, -3\)"),
    ("size has three sides", (A, A), {"size": (1, 2, 3)}, ValueError, r"size: .*got \(1, 2, 3\)"),
    ("size has fractions", (A, A), {"size": (7.0, 7.0)}, ValueError, r"size: .*got \(7\.0, 7\.0\)"),
    ("weight_scale is unknown", (A, A), {"weight_scale": "both"}, ValueError, "weight_scale: .*'both'"),
    ("backend is unknown", (A, A), {"backend": "cuda"}, ValueError, "backend: .*'cuda'"),
    ("activations lack the experts", (A[0], A[0]), {}, ValueError, r"activations: .*\(3, 4, 5, 6\)"),
    ("activations have no channels", (A[:, :, :0], A[:, :, :0]), {}, ValueError, r"activations: .*\(2, 3, 0, 5, 6\)"),
    ("activations have no experts", (A[:0], A[:0]), {}, ValueError, r"activations: .*\(0, 3, 4, 5, 6\)"),
    ("activations are integers", (A.long(), A), {}, TypeError, r"activations: .*torch\.int64"),
    ("activations are nothing", (None, A), {}, TypeError, "activations: .*NoneType"),
    ("activations are numbers", ([1.0, 2.0], A), {}, TypeError, "activations: .*float"),
    ("activations are ragged", ([A[0], A[0, 1:]], A), {}, ValueError, r"activations: .*\(2, 4, 5, 6\)"),
    ("activations are an empty list", ([], A), {}, ValueError, r"activations: .*\[\]"),
    (
        "gradients have another shape",
        (A, A[..., 1:]),
        {},
        ValueError,
        r"gradients: .*\(2, 3, 4, 5, 6\).*\(2, 3, 4, 5, 5\)",
    ),
    ("gradients are integers", (A, A.int()), {}, TypeError, r"gradients: .*torch\.int32"),
]


@pytest.mark.parametrize(("inputs", "options", "error", "text"), [pytest.param(*c[1:], id=c[0]) for c in WRONG_MAPS])
@pytest.mark.parametrize("function", [gradcam_heatmaps, heatmap_losses])
def test_wrong_maps_are_named(
    function: Any, inputs: tuple[Any, Any], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        function(*inputs, **options)


def test_one_side_is_a_square() -> None:
    assert torch.equal(gradcam_heatmaps(A, A, size=7), gradcam_heatmaps(A, A, size=(7, 7)))
    for one, other in zip(heatmap_losses(A, A, size=9), heatmap_losses(A, A, size=(9, 9)), strict=True):
        assert torch.equal(one, other)
    assert FusedImmunityLoss(size=12).size == (12, 12)


@pytest.mark.parametrize("smoothing", [-0.01, math.nan, math.inf])
def test_a_wrong_smoothing_is_named(smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"smoothing: .*{smoothing}"):
        heatmap_losses(A, A, smoothing=smoothing)


def test_one_expert_alone_has_no_heatmap_losses() -> None:
    with pytest.raises(ValueError, match=r"activations: expected at least 2 experts.*\(1, 3, 4, 5, 6\)"):
        heatmap_losses(A[:1], A[:1])


WRONG_MIXTURES: list[tuple[str, tuple[Any, Any, Any, Any], type[Exception], str]] = [
    ("logits lack the experts", (L[0], None, T, 1.0), ValueError, r"logits: .*\(3, 4\)"),
    ("logits have no classes", (L[..., :0], None, T, 1.0), ValueError, r"logits: .*\(2, 3, 0\)"),
    ("logits are integers", (L.long(), None, T, 1.0), TypeError, r"logits: .*torch\.int64"),
    ("logits are nothing", (None, None, T, 1.0), TypeError, "logits: .*NoneType"),
    ("logits are ragged", ([L[0], L[0, 1:]], None, T, 1.0), ValueError, r"logits: .*\(3, 4\), \(2, 4\)"),
    ("gate has another batch", (L, L.new_ones(2, 2), T, 1.0), ValueError, r"gate: .*\(3, 2\).*\(2, 2\)"),
    ("gate is transposed", (L, L.new_ones(2, 3), T, 1.0), ValueError, r"gate: .*\(2, 3\)"),
    ("gate has another length", (L, L.new_ones(3), T, 1.0), ValueError, r"gate: .*\(3,\)"),
    ("gate is integers", (L, torch.ones(2, dtype=torch.long), T, 1.0), TypeError, r"gate: .*torch\.int64"),
    ("gate is a list", (L, [0.5, 0.5], T, 1.0), TypeError, "gate: .*list"),
    ("targets have another batch", (L, None, T[:2], 1.0), ValueError, r"targets: .*\(3,\).*\(2,\)"),
    ("targets are one-hot", (L, None, torch.ones(3, 4).long(), 1.0), ValueError, r"targets: .*\(3, 4\)"),
    ("targets are fractions", (L, None, T.float(), 1.0), TypeError, r"targets: .*torch\.float32"),
    ("targets are booleans", (L, None, T.bool(), 1.0), TypeError, r"targets: .*torch\.bool"),
    ("targets are a list", (L, None, [0, 1, 2], 1.0), TypeError, "targets: .*list"),
    ("targets are too large", (L, None, T + 2, 1.0), ValueError, r"targets: .*\[0, 4\).*2 to 4"),
    ("targets are negative", (L, None, T - 1, 1.0), ValueError, r"targets: .*\[0, 4\).*-1 to 1"),
    ("alpha is negative", (L, None, T, -0.5), ValueError, r"alpha: .*-0\.5"),
    ("alpha is not a number", (L, None, T, math.nan), ValueError, "alpha: .*nan"),
    ("alpha is infinite", (L, None, T, math.inf), ValueError, "alpha: .*inf"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), [pytest.param(*c[1:], id=c[0]) for c in WRONG_MIXTURES])
def test_wrong_mixtures_are_named(arguments: tuple[Any, Any, Any, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        mixture_cross_entropy(*arguments)


# The gate's values, one tensor twice, the order of the axes

GATES: list[tuple[str, Any, str]] = [
    ("negative", [0.7, 0.5, -0.2], r"gate: .*at least 0, got -0\.2"),
    ("NaN", [0.5, math.nan, 0.5], "gate: .*nan"),
    ("infinite", [0.5, 0.5, math.inf], "gate: .*inf"),
    ("too much", [0.5, 0.5, 0.5], r"gate: .*sum to 1.*1\.5"),
    ("too little", [0.3, 0.3, 0.3], r"gate: .*sum to 1.*0\.9"),
    ("ones", [1.0, 1.0, 1.0], "gate: .*sum to 1.*3"),
    ("nothing", [0.0, 0.0, 0.0], "gate: .*sum to 1.*0"),
]


@pytest.mark.parametrize(("values", "text"), [pytest.param(*case[1:], id=case[0]) for case in GATES])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_gate_that_is_no_distribution_is_named(values: Any, text: str, rows: bool, dtype: torch.dtype) -> None:
    row = torch.tensor(values, dtype=dtype)
    gate = torch.stack([torch.full((3,), 1 / 3, dtype=dtype), row]) if rows else row
    logits, labels = normal(3, 2, 4), _labels(2, 4)
    with pytest.raises(ValueError, match=text):
        mixture_log_probabilities(logits, gate)
    with pytest.raises(ValueError, match=text):
        mixture_cross_entropy(logits, gate, labels, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("experts", [3, 5, 9])
def test_a_gate_of_half_precision_sums_to_one_well_enough(dtype: torch.dtype, experts: int) -> None:
    gate = (4 * normal(50, experts)).to(dtype).softmax(-1)
    assert mixture_log_probabilities(normal(experts, 50, 4), gate).isfinite().all()


def test_weights_of_a_diverged_network_go_on_into_the_loss() -> None:
    logits, scores = normal(3, 2, 4), normal(2, 3, seed=1).requires_grad_()
    gate = (scores * math.nan).softmax(-1)
    assert mixture_cross_entropy(logits, gate, _labels(2, 4), 0.5).isnan().all()
    assert mixture_log_probabilities(logits * math.nan, gate.detach()).isnan().all()


def test_a_gate_is_taken_under_transforms() -> None:
    logits, gate = normal(3, 2, 4), normal(2, 3, seed=1).softmax(-1)
    expected = mixture_log_probabilities(logits, gate)
    one = torch.vmap(lambda x: mixture_log_probabilities(logits, x))(gate[None])
    assert_matches(one[0], expected)
    compiled = torch.compile(mixture_log_probabilities, fullgraph=True, backend="eager")
    assert_matches(compiled(logits, gate), expected)


@pytest.mark.parametrize("how", ["the same object", "the same memory"])
def test_one_tensor_that_stands_for_two_experts_is_named(how: str) -> None:
    maps, slopes = normal(3, 2, 4, 5, 6), normal(3, 2, 4, 5, 6, seed=1)
    first = maps[0]
    twice = [first, maps[1], first if how == "the same object" else maps[0]]
    for function in (gradcam_heatmaps, heatmap_losses):
        with pytest.raises(
            ValueError, match=r"activations: expected .*, got number 2 that is the same tensor as number 0"
        ):
            function(twice, list(slopes))  # type: ignore[operator]
        function([first, maps[1], maps[0].clone()], list(slopes))  # type: ignore[operator]
        function(list(maps), [slopes[0]] * 3)  # type: ignore[operator]  # gradients may agree


@pytest.mark.parametrize(
    ("backend", "summed", "stacked"),
    grids.grid(
        ("torch", "triton"),
        (True, False),
        (True, False),
        ordinary=lambda backend, summed, stacked: backend == "torch" or summed == stacked,
    ),
)
def test_maps_with_channels_last_are_those_with_channels_first(backend: Any, summed: bool, stacked: bool) -> None:
    if backend == "triton":
        from tests.kernels.interpreter import quicken

        quicken()
    maps, slopes = normal(3, 2, 4, 3, 4, dtype=torch.float32), normal(3, 2, 4, 3, 4, seed=1, dtype=torch.float32)
    gradients = slopes.sum((-2, -1)) if summed else slopes
    of_information, of_stability = normal(2, seed=2).float(), torch.tensor(0.3)
    found = []
    for layout in ("NCHW", "NHWC"):
        last = layout == "NHWC"
        leaves = [maps.movedim(-3, -1).contiguous() if last else maps.clone(), gradients.clone()]
        if last and not summed:
            leaves[1] = gradients.movedim(-3, -1).contiguous()
        inputs = [leaf.requires_grad_() for leaf in leaves]
        given = inputs if stacked else [list(leaf) for leaf in inputs]
        options: Any = {"size": (4, 5), "backend": backend, "layout": layout}
        heatmaps = gradcam_heatmaps(*given, **options)
        information, stability = heatmap_losses(*given, **options)
        loss = (information * of_information).sum() + stability * of_stability
        of_maps, of_slopes = torch.autograd.grad(loss, inputs)
        results = [heatmaps, information, stability, of_maps, of_slopes]
        if stacked and summed:
            results += heatmap_loss_gradients(*inputs, of_information, of_stability, **options)
        found.append([part.movedim(-1, -3) if last and part.shape == leaves[0].shape else part for part in results])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_wrong_layout_is_named() -> None:
    maps = normal(3, 2, 4, 5, 6)
    for function in (gradcam_heatmaps, heatmap_losses):
        with pytest.raises(ValueError, match=r"layout: .*NCHW, NHWC.*'NCWH'"):
            function(maps, maps, layout="NCWH")  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"activations: .*\(N, B, h, w, C\)"):
            function(maps[0], maps[0], layout="NHWC")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("logits", "error", "got"),
    [
        (torch.rand(2), ValueError, r"shape \(N, B, K\), got \(2,\)"),
        (torch.rand(2, 3), ValueError, r"shape \(N, B, K\), got \(2, 3\)"),
        (torch.ones(2, 3, 4, dtype=torch.int64), TypeError, r"a floating-point tensor, got torch\.int64"),
        ("x", TypeError, r"a tensor \(N, B, K\) or a list of tensors, got "),
    ],
)
def test_wrong_logits_are_named(logits: Any, error: type[Exception], got: str) -> None:
    for mixture in (log_mixture, mixture_log_probabilities):
        with pytest.raises(error, match=f"^logits: expected {got}"):
            mixture(logits)


@pytest.mark.parametrize("value", ["x", None, [1.0]])
def test_a_weight_that_is_no_number_is_named(value: Any) -> None:
    expected = "expected a finite number of at least 0, got "
    with pytest.raises(TypeError, match=f"^smoothing: {expected}"):
        heatmap_losses(normal(2, 1, 1, 2, 2), normal(2, 1, 1, 2, 2), smoothing=value)
    with pytest.raises(TypeError, match=f"^alpha: {expected}"):
        mixture_cross_entropy(normal(2, 1, 3), None, torch.zeros(1, dtype=torch.int64), value)
    for name in ("alpha", "beta", "gamma", "smoothing"):
        with pytest.raises(TypeError, match=f"^{name}: {expected}"):
            FusedImmunityLoss(**{name: value})
