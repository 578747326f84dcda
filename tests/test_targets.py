"""Soft labels, smoothing, class weights, ignored samples: against PyTorch's cross-entropy and formulas in float64."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.functional import mixture_cross_entropy
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.targets import balanced_weights, checked_class_weights
from tests import oracle
from tests.oracle import assert_matches
from tests.tensors import normal

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.3], dtype=torch.float64)
LABELS = torch.tensor([1, 0, 3, 3, 2, 1, 0])
LOSS = FusedImmunityLoss(0.4, 1.3, 0.05, (5, 6))


def _soft(samples: int = 7, classes: int = 4, seed: int = 8) -> Tensor:
    """Probabilities, of which some are 0."""
    scores = 2 * normal(samples, classes, seed=seed)
    return scores.masked_fill(scores < scores.median(-1, keepdim=True).values, -torch.inf).softmax(-1)


def _masked(targets: Tensor, ignored: bool, ignore_index: int = -100) -> Tensor:
    targets = targets.clone()
    if ignored:
        targets[[0, 4]] = ignore_index
    return targets


OPTIONS = [
    {"label_smoothing": smoothing, "class_weights": weights}
    for smoothing, weights in itertools.product([0.0, 0.1, 1.0], [None, WEIGHTS])
]


def _names(options: dict[str, Any]) -> str:
    return f"{options['label_smoothing']}-{'plain' if options['class_weights'] is None else 'weighted'}"


@pytest.mark.parametrize("options", OPTIONS, ids=_names)
@pytest.mark.parametrize("kind", ["hard", "hard, ignored", "soft"])
def test_one_network_is_cross_entropy(options: dict[str, Any], kind: str) -> None:
    """Experts that are alike with α = 0, each sample and the mean; and the single network's loss."""
    targets = _soft() if kind == "soft" else _masked(LABELS, "ignored" in kind)
    network = normal(7, 4).requires_grad_()
    theirs = {"label_smoothing": options["label_smoothing"], "weight": options["class_weights"]}
    expected = F.cross_entropy(network, targets, **theirs)
    each = F.cross_entropy(network, targets, **theirs, reduction="none")
    logits = network.expand(3, 7, 4)
    assert_matches(mixture_cross_entropy(logits, None, targets, 0.0, **options), each, 1e-13)
    loss_fn = FusedImmunityLoss(0.0, 0.0, 0.0, **options)
    loss = loss_fn(logits, torch.zeros(3, 7, 2, 2, 2), targets)
    alone = loss_fn.mean(loss_fn.class_losses(network[None], None, targets, alpha=0.0), targets, 4)
    for found in (loss, alone):
        assert_matches(found, expected, 1e-13)
        assert_matches(*(torch.autograd.grad(f, network, retain_graph=True)[0] for f in (found, expected)), 1e-13)


def _formula(
    logits: Tensor, gate: Tensor, targets: Tensor, alpha: float, label_smoothing: float, class_weights: Tensor | None
) -> Tensor:
    """−Σ_k w_k t_k (log Σ_i g_i p_ik + α Σ_i log p_ik) with loops, t smoothed, for each sample that counts, else 0."""
    experts, samples, classes = logits.shape
    losses = []
    for q in range(samples):
        target = torch.zeros(classes, dtype=torch.float64)
        if targets.dim() == 2:
            target = targets[q]
        elif targets[q] >= 0:
            target[targets[q]] = 1.0
        loss = torch.zeros((), dtype=torch.float64)
        for k in range(classes if (target >= 0).all() and target.any() else 0):
            share = (1 - label_smoothing) * target[k] + label_smoothing / classes
            weight = 1.0 if class_weights is None else class_weights[k]
            p = [torch.exp(logits[i, q, k]) / torch.exp(logits[i, q]).sum() for i in range(experts)]
            mixture = sum(gate[q, i] * p[i] for i in range(experts))
            loss = loss - weight * share * (torch.log(mixture) + alpha * sum(torch.log(each) for each in p))
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("options", OPTIONS, ids=_names)
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("ignored", [False, True])
def test_mixtures_match_the_formula(options: dict[str, Any], kind: str, ignored: bool) -> None:
    """Values, and the derivatives by logits, gate and probabilities."""
    logits, gate = normal(3, 7, 4).requires_grad_(), normal(7, 3, seed=1).softmax(-1).requires_grad_()
    targets = _masked(LABELS if kind == "hard" else _soft(), ignored)
    leaves = [logits, gate]
    if kind == "soft":
        leaves.append(targets.requires_grad_())
    actual = mixture_cross_entropy(logits, gate, targets, 0.6, **options)
    expected = _formula(logits, gate, targets, 0.6, **options)
    assert_matches(actual, expected, 1e-12)
    upstream = normal(7, seed=2)
    for one, other in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (actual, expected)), strict=True):
        assert_matches(one, other, 1e-11)


@pytest.mark.parametrize("soft", [False, True])
def test_first_and_second_derivatives_are_finite_differences(soft: bool) -> None:
    logits, gate = normal(2, 3, 4).requires_grad_(), normal(3, 2, seed=1).softmax(-1).requires_grad_()
    targets = _soft(3) if soft else torch.tensor([1, -100, 3])

    def loss(logits: Tensor, gate: Tensor) -> Tensor:
        gate = gate / gate.sum(-1, keepdim=True)
        return mixture_cross_entropy(logits, gate, targets, 0.5, label_smoothing=0.1, class_weights=WEIGHTS)

    assert torch.autograd.gradcheck(loss, (logits, gate))
    assert torch.autograd.gradgradcheck(loss, (logits, gate))


# The whole loss


def _whole(
    loss_fn: FusedImmunityLoss, targets: Tensor, rows: Any = slice(None), way: str = "forward pass"
) -> tuple[Tensor, list[Tensor]]:
    """(loss and terms; gradients) of small smooth experts, of some samples of a batch of 7."""
    dtype = torch.float32 if loss_fn.backend == "triton" else torch.float64
    leaves = [(normal(3, *shape, seed=seed) / 2).to(dtype) for seed, shape in enumerate([(3, 24), (24, 6), (6, 4)])]
    trunk, hidden, last = (leaf.requires_grad_() for leaf in leaves)
    inputs, gate = normal(7, 3, seed=5).to(dtype)[rows], normal(7, 3, seed=3).to(dtype).softmax(-1)[rows]
    gate.requires_grad_()
    maps = F.softplus(torch.einsum("bd,nde->nbe", inputs, trunk)).unflatten(-1, (3, 2, 4))

    def head(maps: Tensor) -> Tensor:
        return torch.tanh(maps.flatten(2) @ hidden) @ last

    if way == "forward pass":
        loss, terms = loss_fn(head(maps), maps, targets[rows], gate, return_terms=True)
    else:
        loss, terms = loss_fn.from_head(
            head,
            maps,
            targets[rows],
            gate,
            return_terms=True,
            double_backprop=way,  # type: ignore[arg-type]
        )
    gradients = torch.autograd.grad(1.7 * loss, [trunk, hidden, last, gate], materialize_grads=True)
    gradients = (*gradients[:3], gradients[3])
    return torch.stack([loss, *terms]).detach(), list(gradients)


@pytest.mark.parametrize("score", ["logit", "probability"])
def test_soft_targets_in_gradcam_match_the_oracle(score: Any) -> None:
    """Grad-CAM of Σ_k t_k f_k or Σ_k t_k p_k, one sample of one expert at a time."""
    targets = _soft(4)
    trunk = (normal(3, 3, 24) / 2).requires_grad_()
    hidden, last, inputs = normal(3, 24, 6, seed=1) / 2, normal(3, 6, 4, seed=2), normal(4, 3, seed=5)
    gate = normal(4, 3, seed=3).softmax(-1)
    parts = list(F.softplus(torch.einsum("bd,nde->nbe", inputs, trunk)).unflatten(-1, (3, 2, 4)))
    maps = torch.stack(parts)
    logits = torch.tanh(maps.flatten(2) @ hidden) @ last
    loss = FusedImmunityLoss(0.4, 1.3, 0.05, (5, 6), score=score)(logits, maps, targets, gate)

    rows = []
    for i in range(3):
        of_expert = []
        for q in range(4):
            own = logits[i, q] if score == "logit" else logits[i, q].softmax(-1)
            y = sum((targets[q, k] * own[k] for k in range(4)), torch.zeros((), dtype=torch.float64))
            of_expert.append(torch.autograd.grad(y, maps, create_graph=True)[0][i, q])
        rows.append(torch.stack(of_expert))
    information, stability = oracle.heatmap_losses(maps, torch.stack(rows), (5, 6))
    losses = _formula(logits, gate, targets, 0.4, 0.0, None)
    expected = oracle.total(losses, information, stability, 3, 1.3, 0.05)
    assert_matches(loss, expected, 1e-11)
    assert_matches(*(torch.autograd.grad(each, trunk, retain_graph=True)[0] for each in (loss, expected)), 1e-9)


@pytest.mark.parametrize(
    ("way", "backend", "soft"),
    [
        *itertools.product(["forward pass", "reverse", "forward"], ["torch"], [False, True]),
        ("reverse", "triton", True),
        pytest.param("forward", "triton", False, marks=pytest.mark.exhaustive),
    ],
)
def test_an_ignored_sample_is_as_if_not_there(way: str, backend: Any, soft: bool) -> None:
    """In every term, values and gradients; whatever its row of probabilities was before."""
    if backend == "triton":
        from tests.kernels.interpreter import quicken

        quicken()
    targets = _masked(_soft().float() if soft else LABELS, True, 255)
    options: dict[str, Any] = {"class_weights": WEIGHTS.float(), "label_smoothing": 0.1, "ignore_index": 255}
    loss_fn = FusedImmunityLoss(0.4, 1.3, 0.05, (5, 6), backend=backend, **options)
    kept = [1, 2, 3, 5, 6]
    tolerance = 1e-10 if backend == "torch" else 2e-4
    actual, gradients = _whole(loss_fn, targets, way=way)
    expected, wanted = _whole(loss_fn, targets, kept, way)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
    assert not gradients[3][[0, 4]].any()
    gradients[3] = gradients[3][kept]
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("way", ["forward pass", "reverse", "forward"])
def test_a_batch_of_ignored_samples_gives_zero(way: str) -> None:
    loss_fn = FusedImmunityLoss(0.4, 1.3, 0.05, (5, 6), class_weights=WEIGHTS)
    found, gradients = _whole(loss_fn, torch.full((7,), -100), way=way)
    assert found.tolist() == [0, 0, 0, 0]
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("way", ["reverse", "forward"])
@pytest.mark.parametrize("kind", ["hard", "soft", "ignored"])
def test_every_way_gives_the_same(way: str, kind: str) -> None:
    targets = _masked(_soft() if kind == "soft" else LABELS, kind == "ignored")
    loss_fn = FusedImmunityLoss(0.4, 1.3, 0.05, (5, 6), label_smoothing=0.2, class_weights=WEIGHTS)
    expected, wanted = _whole(loss_fn, targets)
    actual, gradients = _whole(loss_fn, targets, way=way)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=0)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [pytest.param("ignored", marks=pytest.mark.exhaustive), "soft"])
def test_all_of_it_compiles_to_one_graph(kind: str) -> None:
    """With samples that are ignored, which change no shape: the second batch has others of them."""
    loss_fn = FusedImmunityLoss(0.4, 1.3, 0.05, (5, 6), label_smoothing=0.2, class_weights=WEIGHTS)
    last = normal(3, 24, 4, seed=1)

    def loss(maps: Tensor, targets: Tensor) -> Tensor:
        return loss_fn.from_head(lambda each: torch.tanh(each.flatten(2) @ last), maps, targets)  # type: ignore[no-any-return]

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in ([0, 4], [2]):
        targets = _soft() if kind == "soft" else LABELS.clone()
        targets[rows] = -100
        maps = normal(3, 7, 3, 2, 4).exp().requires_grad_()
        found = [each(maps, targets) for each in (compiled, loss)]
        assert_matches(*found, 1e-12)
        assert_matches(*(torch.autograd.grad(each, maps)[0] for each in found), 1e-11)


def test_the_model_itself_takes_them() -> None:
    """`model(images, targets)`, of experts that are cut, and of one network."""
    images, targets = torch.rand(7, 3, 12, 12), _masked(_soft().float(), True)
    model = ImmunityMoE("resnet8", 2, 4, image_size=12, switch="off").eval()
    model.loss_fn = FusedImmunityLoss(0.5, 1.0, 1e-3, 12, class_weights=WEIGHTS.tolist(), label_smoothing=0.1)
    kept = [1, 2, 3, 5, 6]
    loss, terms = model(images, targets, return_terms=True)
    expected, wanted = model(images[kept], targets[kept], return_terms=True)
    torch.testing.assert_close(torch.stack([loss, *terms]), torch.stack([expected, *wanted]), rtol=1e-4, atol=1e-5)
    single = SingleNetwork("resnet8", 4, image_size=12).eval()
    labels = _masked(LABELS, True)
    single.loss_fn = FusedImmunityLoss(class_weights=WEIGHTS.float())
    expected = F.cross_entropy(single.expert_logits(images)[0], labels, WEIGHTS.float())
    torch.testing.assert_close(single(images, labels), expected)


def test_weights_move_with_their_module_and_are_copied() -> None:
    loss_fn = FusedImmunityLoss(class_weights=[1, 2, 3.5])
    assert loss_fn.class_weights is not None
    assert loss_fn.class_weights.tolist() == [1, 2, 3.5]
    assert dict(loss_fn.named_buffers()).keys() == {"class_weights"}
    assert nn.Sequential(copy.deepcopy(loss_fn)).to("meta")[0].class_weights.is_meta
    model = ImmunityMoE("resnet8", 2, 3, image_size=12, loss_fn=FusedImmunityLoss(class_weights=[1, 2, 3.5]))
    assert not any("class_weights" in name for name in model.state_dict())
    assert model.to("meta").loss_fn.class_weights.is_meta
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert torch.equal(other.class_weights, loss_fn.class_weights)


def test_all_weights_of_zero_give_zero() -> None:
    loss_fn = FusedImmunityLoss(0.0, 0.0, 0.0, class_weights=[0.0, 1.0])
    logits = normal(2, 3, 2).requires_grad_()
    loss = loss_fn(logits, torch.zeros(2, 3, 1, 2, 2), torch.tensor([0, 0, 0]))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_of_any_precision(dtype: torch.dtype) -> None:
    targets = torch.tensor([[0.5, 0.25, 0.25, 0], [0, 0, 1, 0]])
    logits = normal(2, 2, 4).float()
    expected = mixture_cross_entropy(logits, None, targets, 0.5)
    assert torch.equal(mixture_cross_entropy(logits, None, targets.to(dtype), 0.5), expected)
    assert mixture_cross_entropy(logits.bfloat16(), None, targets.to(dtype), 0.5).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_the_ignored_label_of_any_integer_type(dtype: torch.dtype) -> None:
    index = {torch.uint8: 255, torch.int8: -1}.get(dtype, -100)
    labels = torch.tensor([1, index, 3]).to(dtype)
    losses = mixture_cross_entropy(normal(2, 3, 4), None, labels, 0.5, ignore_index=index)
    assert (losses == 0).tolist() == [False, True, False]


L, A = torch.zeros(2, 3, 4), torch.zeros(2, 3, 1, 2, 2)
T, P = torch.tensor([0, 1, 2]), torch.full((3, 4), 0.25)
WRONG: list[tuple[str, Tensor, dict[str, Any], type[Exception], str]] = [
    ("other classes", torch.full((3, 5), 0.2), {}, ValueError, r"targets: .*\(3,\).*\(3, 4\).*got shape \(3, 5\)"),
    ("another batch", P[:2], {}, ValueError, r"targets: .*\(3, 4\), got shape \(2, 4\)"),
    ("negative", P + torch.tensor([[0.5, -0.5, 0, 0]]), {}, ValueError, r"targets: .*at least 0, got -0\.25"),
    ("too much", 2 * P, {}, ValueError, "targets: .*sum to 1.*got a sum of 2"),
    ("nothing", 0 * P, {}, ValueError, "targets: .*sum to 1.*got a sum of 0"),
    ("NaN", math.nan * P, {}, ValueError, "targets: .*got nan"),
    ("one-hot integers", P.long(), {}, ValueError, r"targets: .*got \(3, 4\)"),
    ("three axes", P[None], {}, TypeError, r"targets: .*float32"),
    ("a label that no option ignores", T - 1, {"ignore_index": 255}, ValueError, r"targets: .*-1 to 1"),
    ("-100 where nothing is ignored", T - 100, {"ignore_index": None}, ValueError, r"targets: .*-100 to -98"),
    ("few weights", T, {"class_weights": [1.0, 2.0]}, ValueError, "class_weights: expected 4, .*got 2"),
    ("a negative weight", T, {"class_weights": [1, 1, -2, 1]}, ValueError, "class_weights: .*got -2 for class 2"),
    ("an infinite weight", T, {"class_weights": [1, 1, math.inf, 1]}, ValueError, "class_weights: .*inf for class 2"),
    ("weights in two axes", T, {"class_weights": P}, ValueError, r"class_weights: .*\(K,\).*got shape \(3, 4\)"),
    ("no weights at all", T, {"class_weights": []}, ValueError, r"class_weights: .*got shape \(0,\)"),
    ("weights that are words", T, {"class_weights": "balanced"}, TypeError, "class_weights: .*got str"),
    ("a weight alone", T, {"class_weights": 2.0}, TypeError, "class_weights: .*got float"),
    ("smoothing below 0", T, {"label_smoothing": -0.1}, ValueError, r"label_smoothing: .*\[0, 1\], got -0\.1"),
    ("smoothing above 1", T, {"label_smoothing": 1.5}, ValueError, r"label_smoothing: .*\[0, 1\], got 1\.5"),
    ("smoothing is NaN", T, {"label_smoothing": math.nan}, ValueError, "label_smoothing: .*nan"),
    ("smoothing is a word", T, {"label_smoothing": "much"}, TypeError, "label_smoothing: .*'much'"),
    ("a fraction is ignored", T, {"ignore_index": 0.5}, TypeError, r"ignore_index: .*0\.5"),
]


@pytest.mark.parametrize(("targets", "options", "error", "text"), [pytest.param(*c[1:], id=c[0]) for c in WRONG])
def test_wrong_targets_are_named(targets: Tensor, options: dict[str, Any], error: type[Exception], text: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: mixture_cross_entropy(L, None, targets, 1.0, **options),
        lambda: FusedImmunityLoss(beta=0.0, gamma=0.0, **options)(L, A, targets),
    ]
    for call in calls:
        with pytest.raises(error, match=text):
            call()


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    utils = pytest.importorskip("sklearn.utils.class_weight", reason="the reference of balanced weights")
    labels = torch.tensor([0, 1, 1, 3, 3, 3, 2, 3, 1])
    expected = utils.compute_class_weight("balanced", classes=np.arange(4), y=labels.numpy())
    np.testing.assert_allclose(balanced_weights(labels, 4).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(balanced_weights(F.one_hot(labels).float(), 4).numpy(), expected, rtol=1e-6)
    some = torch.cat([labels, torch.tensor([9, 9])])
    np.testing.assert_allclose(balanced_weights(some, 4, ignore_index=9).numpy(), expected, rtol=1e-6)
    assert balanced_weights(torch.tensor([0, 0, 2]), 3).tolist() == [0.75, 0, 1.5]


def test_weights_are_kept_as_they_are_given() -> None:
    assert checked_class_weights(None) is None
    given = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    kept = checked_class_weights(given)
    assert kept is not None
    assert kept.dtype == torch.float64
    assert not kept.requires_grad
    assert checked_class_weights(torch.tensor([1, 2])).dtype == torch.float32  # type: ignore[union-attr]
    assert checked_class_weights(np.array([1.0, 2.0])).tolist() == [1, 2]  # type: ignore[arg-type, union-attr]
