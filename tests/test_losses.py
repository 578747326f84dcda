"""`FusedImmunityLoss`: its value and gradients against the oracle and finite differences, and every way to call it."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from immunity_fast import FusedImmunityLoss, ImmunityMoE, ImmunityTerms
from immunity_fast.models.stacking import stack_modules
from tests import grids, oracle
from tests.oracle import assert_matches
from tests.tensors import normal

WAYS = ("reverse", "forward")
SCORES: list[Any] = ["logit", "probability"]
LAYOUTS: list[Any] = ["NCHW", "NHWC"]


class Experts(NamedTuple):
    """N small smooth experts in float64: maps A = softplus(x·V), logits tanh(A·W)·U."""

    trunk: Tensor  # (N, 3, C·h·w)
    hidden: Tensor  # (N, C·h·w, 7)
    last: Tensor  # (N, 7, 4)
    gate: Tensor  # (B, N)
    inputs: Tensor  # (B, 3)
    targets: Tensor  # (B,)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.trunk, self.hidden, self.last, self.gate

    def maps(self) -> list[Tensor]:
        """N activations (B, C, h, w) with C = 3, h×w = 2×4."""
        flat = nn.functional.softplus(torch.einsum("bd,nde->nbe", self.inputs, self.trunk))
        return list(flat.unflatten(-1, (3, 2, 4)))

    def head(self, maps: Tensor) -> Tensor:
        """(N, B, C, h, w) to (N, B, K)."""
        return torch.tanh(maps.flatten(2) @ self.hidden) @ self.last


def _experts(experts: int = 3, samples: int = 4) -> Experts:
    trunk, hidden, last = (normal(experts, *shape, seed=seed) for seed, shape in enumerate([(3, 24), (24, 7), (7, 4)]))
    gate = normal(samples, experts, seed=3).softmax(-1)
    targets = torch.randint(4, (samples,), generator=torch.Generator().manual_seed(4))
    leaves = [leaf.requires_grad_() for leaf in (trunk, hidden / 4, last, gate)]
    return Experts(*leaves, normal(samples, 3, seed=5), targets)


def _gradients(loss: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(1.7 * loss, leaves, retain_graph=True, materialize_grads=True)


def _assert_same(actual: Tensor, expected: Tensor, leaves: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    assert_matches(actual, expected, tolerance)
    for ours, theirs in zip(_gradients(actual, leaves), _gradients(expected, leaves), strict=True):
        assert_matches(ours, theirs, tolerance)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"smoothing": 0.0, "weight_scale": "spatial"},
    {"normalize": False, "smoothing": 1e-4},
    {"detach_weights": True, "smoothing": 1.0},
]


@pytest.mark.parametrize(
    ("score", "size", "options", "stacked"), grids.every(2, SCORES, (None, (5, 6), (1, 3)), OPTIONS, (True, False))
)
def test_loss_and_every_gradient_match_the_oracle(
    score: Any, size: tuple[int, int] | None, options: dict[str, Any], stacked: bool
) -> None:
    experts = _experts()
    alpha, beta, gamma = 0.3, 1.7, 0.05
    parts = experts.maps()
    maps: Any = torch.stack(parts) if stacked else parts
    logits = experts.head(maps if stacked else torch.stack(parts))
    loss = FusedImmunityLoss(alpha, beta, gamma, size, score=score, **options)
    actual, terms = loss(logits if stacked else list(logits), maps, experts.targets, experts.gate, return_terms=True)

    logits = experts.head(torch.stack(parts))
    slopes = oracle.label_gradients(logits, parts, experts.targets, score)
    if options.get("detach_weights"):
        slopes = slopes.detach()
    of_maps = {name: options[name] for name in ("normalize", "smoothing", "weight_scale") if name in options}
    cross_entropies = oracle.cross_entropy(logits, experts.gate, experts.targets, alpha)
    information, stability = oracle.heatmap_losses(torch.stack(parts), slopes, size, **of_maps)
    expected = oracle.total(cross_entropies, information, stability, 3, beta, gamma)

    _assert_same(actual, expected, experts.leaves)
    _assert_same(terms.cross_entropy, cross_entropies.mean(), experts.leaves)
    _assert_same(terms.mutual_information, information.mean(), experts.leaves)
    _assert_same(terms.position_stability, stability / 4, experts.leaves)


@pytest.mark.parametrize("gate", ["none", "row"])
def test_a_gate_for_all_rows_or_none_matches_the_oracle(gate: str) -> None:
    experts = _experts()
    maps = torch.stack(experts.maps())
    logits = experts.head(maps)
    row = torch.full((3,), 1 / 3, dtype=torch.float64) if gate == "none" else normal(3).softmax(-1).requires_grad_()
    loss = FusedImmunityLoss(0.5, 0.0, 0.0)(logits, maps, experts.targets, None if gate == "none" else row)
    expected = oracle.cross_entropy(logits, row.expand(4, 3), experts.targets, 0.5).mean()
    _assert_same(loss, expected, experts.leaves if gate == "none" else (*experts.leaves, row))


@pytest.mark.parametrize("experts", [2, 3, 5])
@pytest.mark.parametrize("coefficients", [(0.0, 0.0, 0.0), (1.0, 0.0, 2.0), (0.5, 3.0, 0.0), (2.0, 0.25, 1e-3)])
def test_terms_recombine_to_the_loss(experts: int, coefficients: tuple[float, float, float]) -> None:
    alpha, beta, gamma = coefficients
    mixture = _experts(experts)
    maps = torch.stack(mixture.maps())
    loss = FusedImmunityLoss(alpha, beta, gamma, size=(5, 5))
    total, terms = loss(mixture.head(maps), maps, mixture.targets, mixture.gate, return_terms=True)
    assert isinstance(terms, ImmunityTerms)
    assert total.shape == ()
    cross_entropy, information, stability = (float(term.detach()) for term in terms)
    assert float(total.detach()) == pytest.approx(
        cross_entropy + beta / experts * information + gamma / (experts * (experts - 1)) * stability, rel=1e-13
    )
    assert torch.equal(total, loss(mixture.head(maps), maps, mixture.targets, mixture.gate))


def _model(experts: int, *, training: bool) -> tuple[ImmunityMoE, Tensor, Tensor]:
    torch.manual_seed(experts)
    model = ImmunityMoE("resnet8", experts, 4, image_size=12, switch="off").double()
    images = torch.rand(4, 3, 12, 12, dtype=torch.float64)
    if not training:  # statistics that are neither the initial ones nor the batch's
        for _ in range(2):
            model(torch.rand(8, 3, 12, 12, dtype=torch.float64))
    return model.train(training), images, torch.tensor([0, 3, 1, 2])


@pytest.mark.parametrize(
    ("experts", "score", "training"),
    grids.sampled(
        [(2, "logit", True), (2, "logit", False), (3, "probability", True), (3, "probability", False)],
        lambda experts, _, training: training == (experts == 3),
    ),
)
def test_gradient_through_gradcam_is_that_of_finite_differences(experts: int, score: Any, training: bool) -> None:
    """All three terms, with respect to all weights at once, along random directions."""
    model, images, targets = _model(experts, training=training)
    loss = FusedImmunityLoss(0.5, 1.0, 1.0, size=(12, 12), score=score)
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def terms() -> ImmunityTerms:
        logits, activations, gate = model.expert_outputs(images)
        found: ImmunityTerms = loss(logits, activations, targets, gate, return_terms=True)[1]
        return found

    def moved(directions: list[Tensor], step: float) -> Tensor:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
        return torch.stack(terms()).detach()

    gradients = [torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True) for term in terms()]
    step = 3e-9  # small, so that hardly a ReLU is crossed
    for _ in range(3):
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        above = moved(directions, step)
        below = moved(directions, -2 * step)
        moved(directions, step)
        measured = (above - below) / (2 * step)
        for difference, term in zip(measured, gradients, strict=True):
            slope = sum(float((g * d).sum()) for g, d in zip(term, directions, strict=True) if g is not None)
            assert slope == pytest.approx(float(difference), rel=2e-5, abs=1e-6)


def test_detached_weights_change_the_gradient_and_not_the_value() -> None:
    model, images, targets = _model(2, training=True)
    losses, gradients = [], []
    for detach in (False, True):
        loss = FusedImmunityLoss(0.5, 1.0, 1e-3, size=(12, 12), detach_weights=detach)
        logits, activations, gate = model.expert_outputs(images)
        losses.append(loss(logits, activations, targets, gate))
        gradients.append(torch.autograd.grad(losses[-1], model.experts.get_submodule("stem.0").weight)[0])
    assert torch.equal(*losses)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) > 1e-2


def test_a_detached_loss_never_asks_for_a_second_derivative() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    experts = _experts()
    maps = torch.stack(experts.maps())
    logits = Once.apply(experts.head(maps))
    FusedImmunityLoss(1.0, 1.0, 1.0, detach_weights=True)(logits, maps, experts.targets).backward()
    assert experts.trunk.grad is not None


@pytest.mark.parametrize("return_terms", [False, True])
@pytest.mark.parametrize("size", [None, (6, 6)])
@pytest.mark.parametrize("normalize", [True, False])
def test_an_empty_batch_gives_zero_and_zero_gradients(
    return_terms: bool, size: tuple[int, int] | None, normalize: bool
) -> None:
    experts = _experts(samples=0)
    maps = torch.stack(experts.maps())
    loss = FusedImmunityLoss(1.0, 1.0, 1.0, size, normalize)
    result = loss(experts.head(maps), maps, experts.targets, experts.gate, return_terms=return_terms)
    total, terms = result if return_terms else (result, ())
    total.backward()
    assert float(total.detach()) == 0
    assert [float(term.detach()) for term in terms] == [0] * len(terms)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in (experts.trunk, experts.hidden))


def test_dead_experts_give_finite_gradients() -> None:
    """Activations behind a ReLU that is shut everywhere."""
    inputs = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    weights = (-normal(2, 5, 3).abs().float()).requires_grad_()
    maps = torch.einsum("nck,bkhw->nbchw", weights, inputs).relu()
    logits = maps.mean((-2, -1)) @ normal(2, 5, 4).float()
    for smoothing in (0.0, 0.01):
        loss, terms = FusedImmunityLoss(1.0, 1.0, 1.0, (6, 6), smoothing=smoothing)(
            logits, maps, torch.arange(4), return_terms=True
        )
        (gradient,) = torch.autograd.grad(loss, weights, retain_graph=True)
        assert not gradient.any()
        assert float(terms.mutual_information.detach()) == pytest.approx(2 * math.log(2))
        assert float(terms.position_stability.detach()) == pytest.approx(0, abs=1e-9)


def test_half_precision_gives_what_its_values_give_in_float32() -> None:
    maps = normal(2, 3, 4, 5, 5).bfloat16().float().requires_grad_()
    half = maps.detach().bfloat16().requires_grad_()
    head = torch.eye(4)
    targets = torch.tensor([0, 1, 2])
    loss = FusedImmunityLoss(1.0, 1.0, 1e-3, (8, 8))
    expected = loss((maps.sum((-2, -1)) @ head).bfloat16(), maps, targets)
    actual = loss(half.sum((-2, -1)) @ head.bfloat16(), half, targets)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)
    actual.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_autocast_round_the_loss_changes_no_value_or_gradient() -> None:
    """Grad-CAM's inner backward pass runs in the loss, so it must run in the dtypes of the forward pass."""
    experts = _experts()
    experts = Experts(*(leaf.detach().float().requires_grad_() for leaf in experts.leaves), *experts[4:])
    experts = experts._replace(inputs=experts.inputs.float())
    maps = torch.stack(experts.maps())
    logits = experts.head(maps)
    loss = FusedImmunityLoss(1.0, 1.0, 1e-3, (8, 8))
    outside = loss(logits, maps, experts.targets, experts.gate)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(logits, maps, experts.targets, experts.gate)
    assert torch.equal(inside, outside)
    for one, other in zip(_gradients(inside, experts.leaves), _gradients(outside, experts.leaves), strict=True):
        assert torch.equal(one, other)


def test_a_step_under_autocast_is_finite_and_close_to_float32() -> None:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 2, 4, image_size=12)
    images, targets = torch.rand(4, 3, 12, 12), torch.tensor([0, 3, 1, 2])
    loss = FusedImmunityLoss(1.0, 1.0, 1e-4, (12, 12))
    values = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits, activations, gate = model.expert_outputs(images)
            values.append(loss(logits, activations, targets, gate))
        model.zero_grad()
        values[-1].backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert values[1].dtype == torch.float32
    assert float(values[1].detach()) == pytest.approx(float(values[0].detach()), rel=0.05)


def test_without_heatmap_terms_activations_need_no_graph() -> None:
    experts = _experts()
    maps = torch.stack(experts.maps())
    logits = experts.head(maps)
    loss = FusedImmunityLoss(0.5, 0.0, 0.0)(logits, maps.detach(), experts.targets, experts.gate)
    expected = oracle.cross_entropy(logits, experts.gate, experts.targets, 0.5).mean()
    _assert_same(loss, expected, experts.leaves)
    with torch.no_grad():
        assert torch.equal(FusedImmunityLoss(0.5, 0.0, 0.0)(logits, maps, experts.targets, experts.gate), loss.detach())


def _from_head(loss: FusedImmunityLoss, experts: Experts, maps: Tensor, way: Any) -> tuple[Tensor, ImmunityTerms]:
    found: tuple[Tensor, ImmunityTerms] = loss.from_head(
        experts.head, maps, experts.targets, experts.gate, return_terms=True, double_backprop=way
    )
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("coefficients", [(0.5, 1.0, 0.05), (0.5, 0.0, 0.0), (0.5, 1.0, 0.0), (0.5, 0.0, 0.05)])
def test_from_head_equals_forward(way: Any, score: Any, detach: bool, coefficients: tuple[float, float, float]) -> None:
    experts = _experts()
    loss = FusedImmunityLoss(*coefficients, size=(5, 5), score=score, detach_weights=detach)
    maps = torch.stack(experts.maps())
    expected, wanted = loss(experts.head(maps), maps, experts.targets, experts.gate, return_terms=True)
    actual, found = _from_head(loss, experts, maps, way)
    _assert_same(actual, expected, experts.leaves)
    for one, other in zip(found, wanted, strict=True):
        assert_matches(one, other)
    _assert_same(
        loss.from_head(experts.head, maps, experts.targets, experts.gate, double_backprop=way),
        expected,
        experts.leaves,
    )


@pytest.mark.parametrize("way", WAYS)
def test_from_head_needs_no_graph_for_the_value_alone(way: Any) -> None:
    experts = _experts()
    loss = FusedImmunityLoss(0.5, 1.0, 0.05, size=(5, 5))
    maps = torch.stack(experts.maps())
    expected = loss(experts.head(maps), maps, experts.targets, experts.gate)
    with torch.no_grad():
        assert_matches(_from_head(loss, experts, maps, way)[0], expected.detach())


def _head(experts: int) -> nn.Module:
    """Stacked heads with BatchNorm in training mode, in float64."""
    torch.manual_seed(0)
    heads = [
        nn.Sequential(
            nn.Conv2d(3, 5, 3, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(5 * 16, 4),
        ).double()
        for _ in range(experts)
    ]
    return stack_modules(heads)


def _applied(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """All heads at once; BatchNorm updates copies of its buffers, made inside."""

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], maps: Tensor) -> Tensor:
        out: Tensor = functional_call(head, (parameters, buffers), (maps,))
        return out

    def run(maps: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in head.named_buffers()}
        logits: Tensor = torch.vmap(one)(dict(head.named_parameters()), buffers, maps)
        return logits

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("score", SCORES)
def test_from_head_equals_forward_for_vmapped_batch_norm(way: Any, score: Any) -> None:
    head = _head(3)
    run = _applied(head)
    leaves = (normal(3, 6, 3, 4, 4, seed=1).requires_grad_(), *head.parameters())
    targets, gate = torch.tensor([0, 1, 2, 3, 0, 1]), normal(6, 3, seed=2).softmax(-1)
    loss = FusedImmunityLoss(0.5, 1.0, 0.05, size=(7, 7), score=score)
    expected = loss(run(leaves[0]), leaves[0], targets, gate)
    actual = loss.from_head(run, leaves[0], targets, gate, double_backprop=way)
    assert isinstance(actual, Tensor)
    _assert_same(actual, expected, leaves)


@pytest.mark.parametrize(
    ("score", "way", "layout"),
    grids.grid(SCORES, WAYS, LAYOUTS, ordinary=lambda *cell: cell == ("probability", "forward", "NHWC")),
)
def test_from_head_compiles_to_one_graph_backward_included(score: Any, way: Any, layout: Any) -> None:
    head = _head(2)
    apply, maps = _applied(head), normal(2, 4, 3, 4, 4, seed=1)
    maps = maps.movedim(-3, -1).contiguous() if layout == "NHWC" else maps
    leaves = (maps.requires_grad_(), *head.parameters())
    targets, gate = torch.tensor([0, 1, 2, 3]), normal(4, 2, seed=2).softmax(-1)
    loss = FusedImmunityLoss(0.5, 1.0, 0.05, size=(7, 7), score=score, layout=layout)

    def run(maps: Tensor) -> Tensor:
        return apply(maps.movedim(-1, -3) if layout == "NHWC" else maps)

    def step(maps: Tensor) -> tuple[Tensor, ImmunityTerms]:
        found: tuple[Tensor, ImmunityTerms] = loss.from_head(
            run, maps, targets, gate, return_terms=True, double_backprop=way
        )
        return found

    torch.compiler.reset()
    actual, terms = torch.compile(step, fullgraph=True, backend="aot_eager")(leaves[0])
    expected, wanted = step(leaves[0])
    _assert_same(actual, expected, leaves)
    for one, other in zip(terms, wanted, strict=True):
        assert_matches(one, other)


def test_the_loss_is_an_ordinary_module() -> None:
    loss = FusedImmunityLoss(0.5, 1.0, 2.0, size=(3, 4), score="probability")
    twin = copy.deepcopy(loss)
    assert isinstance(loss, nn.Module)
    assert repr(loss) == "FusedImmunityLoss(alpha=0.5, beta=1.0, gamma=2.0, size=(3, 4))"
    assert (repr(twin), twin.score) == (repr(loss), "probability")
    assert not list(loss.parameters())
    assert not loss.state_dict()
    experts = _experts()
    maps = torch.stack(experts.maps())
    arguments = (experts.head(maps), maps, experts.targets)
    assert torch.equal(loss(*arguments), twin(*arguments))


def test_two_calls_give_the_same_bits() -> None:
    experts = _experts()
    maps = torch.stack(experts.maps())
    logits = experts.head(maps)
    first, second = (FusedImmunityLoss(1.0, 1.0, 1.0)(logits, maps, experts.targets) for _ in range(2))
    assert torch.equal(first, second)
    pairs = zip(_gradients(first, experts.leaves), _gradients(second, experts.leaves), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def _outside_the_graph(logits: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    return logits, maps.detach().requires_grad_()


def _no_gradient_for_activations(logits: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    return logits, maps.detach()


def _no_gradient_for_logits(logits: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    return logits.detach(), maps


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (_outside_the_graph, "activations: expected tensors in the graph .*, got some that logits do not depend on"),
        (
            _no_gradient_for_activations,
            "activations: expected tensors in the graph .*, got some that require no gradient",
        ),
        (_no_gradient_for_logits, "logits: expected activations in the graph .*, got logits that require no gradient"),
    ],
)
@pytest.mark.parametrize("stacked", [True, False])
def test_activations_that_do_not_lead_to_the_logits_are_an_error(
    broken: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], text: str, stacked: bool
) -> None:
    experts = _experts()
    maps = torch.stack(experts.maps())
    logits, maps = broken(experts.head(maps), maps)
    with pytest.raises(ValueError, match=text):
        FusedImmunityLoss()(logits, maps if stacked else list(maps), experts.targets)


@pytest.mark.parametrize("stacked", [True, False])
def test_logits_of_inference_mode_are_named_outside_of_it(stacked: bool) -> None:
    experts = _experts()
    with torch.inference_mode():
        maps = torch.stack(experts.maps())
        logits = experts.head(maps)
    with pytest.raises(ValueError, match=r"logits: .* of torch\.inference_mode, .*: leave it"):
        FusedImmunityLoss()(logits if stacked else list(logits), maps, experts.targets)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@pytest.mark.parametrize("first", [True, False])
def test_a_head_of_one_derivative_is_told_how_to_do_without(first: bool) -> None:
    """Where it is the first thing that the activations meet, too."""
    experts = _experts()
    maps = torch.stack(experts.maps())
    logits = experts.head(_Once.apply(maps) if first else _Once.apply(maps.tanh()))
    with pytest.raises(ValueError, match=r"activations: .* differentiates once alone.*; detach_weights=True"):
        FusedImmunityLoss(backend="torch")(logits, maps, experts.targets)
    assert FusedImmunityLoss(backend="torch", detach_weights=True)(logits, maps, experts.targets).isfinite()


def test_targets_of_numpy_are_named() -> None:
    experts = _experts()
    maps = torch.stack(experts.maps())
    with pytest.raises(TypeError, match=r"targets: expected an integer tensor, got numpy\.ndarray; torch\.as_tensor"):
        FusedImmunityLoss()(experts.head(maps), maps, experts.targets.numpy())


def test_without_gradients_enabled_the_error_says_so() -> None:
    experts = _experts()
    maps = torch.stack(experts.maps())
    logits = experts.head(maps)
    with torch.no_grad(), pytest.raises(ValueError, match="with gradients enabled"):
        FusedImmunityLoss()(logits, maps, experts.targets)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        *(
            ({name: value}, f"{name}: .*{value}")
            for name, value in itertools.product(("alpha", "beta", "gamma", "smoothing"), (-1.0, math.nan, math.inf))
        ),
        ({"size": 0}, "size: .*got 0"),
        ({"size": (0, 3)}, r"size: .*got \(0, 3\)"),
        ({"size": (3,)}, r"size: .*got \(3,\)"),
        ({"weight_scale": "both"}, "weight_scale: .*channels, spatial.*'both'"),
        ({"score": "loss"}, "score: .*logit, probability.*'loss'"),
        ({"layout": "HWC"}, "layout: .*NCHW, NHWC.*'HWC'"),
        ({"backend": "numpy"}, "backend: .*auto, torch, triton.*'numpy'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FusedImmunityLoss(**options)


A = torch.ones(2, 3, 4, 5, 6)
L = torch.zeros(2, 3, 4)
T = torch.tensor([0, 1, 2])

WRONG: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("logits lack the experts", (L[0], A, T), ValueError, r"logits: .*\(3, 4\)"),
    ("one expert", (L[:1], A[:1], T), ValueError, r"logits: expected at least 2 experts.*\(1, 3, 4\)"),
    ("logits are integers", (L.long(), A, T), TypeError, r"logits: .*torch\.int64"),
    ("logits are nothing", (None, A, T), TypeError, "logits: .*NoneType"),
    ("logits are ragged", ([L[0], L[1, 1:]], A, T), ValueError, r"logits: .*\(3, 4\), \(2, 4\)"),
    (
        "activations have more experts",
        (L, torch.cat([A, A]), T),
        ValueError,
        r"activations: .*\(2, 3, C, h, w\).*got 4",
    ),
    ("activations have another batch", (L, A[:, :2], T), ValueError, r"activations: .*got 2 of \(2, 4, 5, 6\)"),
    ("activations are flat", (L, A.flatten(3), T), ValueError, r"activations: .*\(3, 4, 30\)"),
    ("activations are a number", (L, A.sum(), T), ValueError, r"activations: .*\(\)"),
    ("activations are nothing", (L, None, T), TypeError, "activations: .*NoneType"),
    ("activations lack one", (L, [A[0]], T), ValueError, r"activations: .*list of 2.*got 1 of \(3, 4, 5, 6\)"),
    ("activations are none", (L, [], T), ValueError, "activations: .*got 0"),
    ("activations are ragged", (L, [A[0], A[1, 1:]], T), ValueError, r"\(3, 4, 5, 6\) and \(2, 4, 5, 6\)"),
    ("targets have another batch", (L, A, T[:2]), ValueError, r"targets: .*\(3,\).*\(2,\)"),
    ("targets are fractions", (L, A, T.float()), TypeError, r"targets: .*torch\.float32"),
    ("targets are too large", (L, A, T + 2), ValueError, r"targets: .*\[0, 4\).*2 to 4"),
    ("targets are negative", (L, A, T - 1), ValueError, r"targets: .*-1 to 1"),
    ("gate is transposed", (L, A, T, L.new_ones(2, 3)), ValueError, r"gate: .*\(3, 2\).*\(2, 3\)"),
    ("gate is negative", (L, A, T, torch.tensor([1.5, -0.5])), ValueError, r"gate: .*at least 0.*-0\.5"),
    ("gate is NaN", (L, A, T, torch.tensor([math.nan, 0.5])), ValueError, "gate: .*nan"),
    ("gate is not normalised", (L, A, T, torch.ones(2)), ValueError, "gate: .*sum to 1.*2"),
    (
        "activations are one tensor twice",
        (L, [A[0], A[0]], T),
        ValueError,
        r"activations: expected .*, got number 1 that is the same .*0",
    ),
    ("gate is integers", (L, A, T, torch.ones(2).long()), TypeError, r"gate: .*torch\.int64"),
    ("gate is a list", (L, A, T, [0.5, 0.5]), TypeError, "gate: .*list"),
]


@pytest.mark.parametrize(("arguments", "error", "text"), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], error: type[Exception], text: str, beta: float) -> None:
    with pytest.raises(error, match=text):
        FusedImmunityLoss(beta=beta, gamma=beta)(*arguments)


@pytest.mark.parametrize(
    ("head", "error", "text"),
    [
        (lambda maps: maps.mean((-3, -2, -1)), ValueError, r"head: .*\(N, B, K\).*\(2, 3\)"),
        (lambda maps: maps.mean((-2, -1))[0], ValueError, r"head: .*\(N, B, K\).*\(3, 4\)"),
        (lambda maps: None, TypeError, "head: .*NoneType"),
    ],
)
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_head_that_returns_no_logits_is_named(
    head: Callable[[Tensor], Any], error: type[Exception], text: str, beta: float
) -> None:
    with pytest.raises(error, match=text):
        FusedImmunityLoss(beta=beta, gamma=beta).from_head(head, A, T)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("detach_weights", [True, False])
def test_maps_with_channels_last_match_the_oracle(way: Any, detach_weights: bool) -> None:
    """Of the caller's own tensors (N, B, h, w, C), which `from_head` hands to the head as they are."""
    experts = _experts()
    maps = torch.stack(experts.maps()).movedim(-3, -1).contiguous()
    options: dict[str, Any] = {"size": (5, 6), "detach_weights": detach_weights}
    own = FusedImmunityLoss(0.3, 1.7, 0.05, layout="NHWC", **options)

    def head(maps: Tensor) -> Tensor:
        assert maps.shape[-3:] == (2, 4, 3)
        return experts.head(maps.movedim(-1, -3))

    usual = torch.stack(experts.maps())
    expected = FusedImmunityLoss(0.3, 1.7, 0.05, **options)(experts.head(usual), usual, experts.targets, experts.gate)
    stacked = own(head(maps), maps, experts.targets, experts.gate)
    _assert_same(stacked, expected, experts.leaves)
    parts = list(maps.unbind())
    listed = own(list(head(torch.stack(parts))), parts, experts.targets, experts.gate)
    _assert_same(listed, expected, experts.leaves)
    actual, terms = own.from_head(head, maps, experts.targets, experts.gate, double_backprop=way, return_terms=True)
    _assert_same(actual, expected, experts.leaves)
    assert terms.mutual_information.isfinite()


@pytest.mark.exhaustive
def test_from_head_compiles_with_channels_last() -> None:
    maps, targets = normal(2, 4, 4, 5, 3).requires_grad_(), torch.tensor([0, 1, 2, 0])
    loss = FusedImmunityLoss(0.5, 1.0, 0.05, size=(7, 7), layout="NHWC")

    def step(maps: Tensor) -> Tensor:
        found: Tensor = loss.from_head(lambda maps: torch.tanh(maps).square().mean((-3, -2)), maps, targets)
        return found

    torch.compiler.reset()
    _assert_same(torch.compile(step, fullgraph=True, backend="aot_eager")(maps), step(maps), (maps,))


def test_maps_that_belong_to_no_expert_are_named() -> None:
    """Two of one expert's, none of the other's, all of them in the graph."""
    first = [normal(2, 3, 4, 5, seed=seed).requires_grad_() for seed in range(2)]
    second = normal(2, 3, 4, 5, seed=3).requires_grad_()
    maps = [first[0] * 2, first[1] * 3, second * 4]
    logits = [(maps[0] * maps[1]).tanh().mean((-2, -1)), maps[2].tanh().mean((-2, -1))]
    targets = torch.tensor([0, 1])
    loss = FusedImmunityLoss(size=(4, 5))
    with pytest.raises(ValueError, match=r"activations: expected one of each expert, .* number 1 depend on"):
        loss(logits, maps[:2], targets)
    with pytest.raises(ValueError, match=r"activations: expected one of each expert, .* number 1 depend on"):
        loss(torch.stack(logits), maps[:2], targets)
    expected = loss(logits, [maps[0], maps[2]], targets)
    torch.testing.assert_close(loss(torch.stack(logits), [maps[0], maps[2]], targets), expected)
    joined = torch.stack([part.transpose(0, 1) for part in logits], 1).transpose(0, 2)  # another axis is stacked
    torch.testing.assert_close(loss(joined.transpose(0, 1), [maps[0], maps[2]], targets), expected)
    for disordered in (logits[::-1], torch.stack(logits[::-1])):
        with pytest.raises(ValueError, match=r"activations: .* at its place, got logits of number 0 .* of number 1"):
            loss(disordered, [maps[0], maps[2]], targets)


def test_several_threads_take_tangents() -> None:
    """PyTorch counts levels of forward mode for the whole process."""
    experts = _experts()
    maps = torch.stack(experts.maps()).detach().requires_grad_()
    loss = FusedImmunityLoss(0.5, 1.0, 0.05, size=(5, 5))
    barrier = threading.Barrier(4)

    def gradient() -> Tensor:
        found = loss.from_head(experts.head, maps, experts.targets, experts.gate.detach(), double_backprop="forward")
        return torch.autograd.grad(found, maps)[0]

    def work(_: int) -> None:
        barrier.wait(timeout=60)
        for _ in range(25):
            assert_matches(gradient(), expected)

    expected, before = gradient(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4), timeout=300))
    finally:
        sys.setswitchinterval(before)
