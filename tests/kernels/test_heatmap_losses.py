"""The fused heatmap losses and heatmaps against the float64 reference, forward and backward."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from immunity_fast.functional import (
    HeatmapOptions,
    gradcam_heatmaps,
    gradients_of_heatmap_losses,
    heatmap_losses,
    losses_of_heatmaps,
)
from immunity_fast.kernels import heatmap_losses as fused
from immunity_fast.kernels import heatmaps as fused_heatmaps
from immunity_fast.kernels import launch
from tests import grids, oracle
from tests.kernels.cases import (
    DEVICE,
    LAYOUTS,
    Maps,
    assert_as_exact_as,
    channels_last,
    contiguous,
    error,
    leaves,
    maps,
    normal,
    seeded,
    small_maps,
    vmapped,
)

pytestmark = pytest.mark.gpu


def _run(
    function: Any, inputs: list[Tensor], case: Maps, backend: str, chosen: slice, upstream: list[Tensor] | None
) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
    """All outputs, the upstream gradients of the chosen ones (drawn if None), and the gradients of both inputs."""
    activations, gradients = (list(x) if case.listed else x for x in inputs)
    found = function(activations, gradients, backend=backend)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    if upstream is None:
        upstream = [normal(*output.shape, seed=9 + i) for i, output in enumerate(outputs[chosen])]
    derivatives = torch.autograd.grad(
        outputs[chosen], inputs, [value.to(outputs[0]) for value in upstream], materialize_grads=True
    )
    return outputs, upstream, derivatives


def _check(function: Any, case: Maps, chosen: slice, output_floors: list[float], gradient_floor: float) -> None:
    """The kernels against float64, with twice the error of float32 PyTorch allowed."""
    inputs = case.inputs()
    outputs, upstream, derivatives = _run(function, leaves(inputs), case, "triton", chosen, None)
    exact = _run(function, leaves(inputs, torch.float64), case, "torch", chosen, upstream)
    reference = _run(function, leaves(inputs, torch.float32), case, "torch", chosen, upstream)
    for ours, theirs, wanted, floor in zip(outputs, reference[0], exact[0], output_floors, strict=True):
        assert_as_exact_as(ours, theirs, wanted, torch.float32, floor)
    for ours, theirs, wanted in zip(derivatives, reference[2], exact[2], strict=True):
        assert_as_exact_as(ours, theirs, wanted, case.dtype, gradient_floor)


def _check_losses(case: Maps, chosen: slice) -> None:
    # What cancels in position stability: squared distances, in pixels, squared, over all pairs and samples.
    height, width = case.size or case.shape[3:]
    experts, samples = case.shape[:2]
    extent = float(height**2 + width**2) ** 2 * experts**2
    floor = 1.0 if chosen == INFORMATION else extent
    _check(
        lambda *inputs, backend: heatmap_losses(*inputs, **case.options, backend=backend),
        case,
        chosen,
        [1.0, extent * samples],
        floor,
    )


def _check_heatmaps(case: Maps) -> None:
    _check(
        lambda *inputs, backend: gradcam_heatmaps(
            *inputs, size=case.size, weight_scale=case.weight_scale, backend=backend
        ),
        case,
        slice(None),
        [0.0],
        0.0,
    )


INFORMATION, STABILITY, BOTH = slice(0, 1), slice(1, 2), slice(0, 2)


@seeded(5)
@given(small_maps, st.sampled_from([INFORMATION, STABILITY, BOTH]))
def test_losses_and_gradients_are_as_exact_as_float32_can_be(case: Maps, chosen: slice) -> None:
    _check_losses(case, chosen)


@pytest.mark.exhaustive
@seeded(10)
@given(maps, st.sampled_from([INFORMATION, STABILITY, BOTH]))
def test_losses_and_gradients_of_many_cases(case: Maps, chosen: slice) -> None:
    _check_losses(case, chosen)


@seeded(4)
@given(small_maps)
def test_heatmaps_and_gradients_are_as_exact_as_float32_can_be(case: Maps) -> None:
    _check_heatmaps(case)


@pytest.mark.exhaustive
@seeded(5)
@given(maps)
def test_heatmaps_and_gradients_of_many_cases(case: Maps) -> None:
    _check_heatmaps(case)


CASE = Maps((3, 2, 5, 4, 6), (7, 9), contiguous, "maps", False, torch.float32, True, 0.01, "channels", 0)


@pytest.mark.parametrize(
    ("activation_scale", "gradient_scale", "smoothing"),
    grids.every(3, (1e-30, 1.0, 1e30), (1e-30, 1.0, 1e30), (0.0, 0.01)),
)
def test_extreme_magnitudes_equal_float64(activation_scale: float, gradient_scale: float, smoothing: float) -> None:
    inputs = leaves([normal(2, 2, 3, 3, 4) * activation_scale, normal(2, 2, 3, 3, 4, seed=1) * gradient_scale])
    exact = leaves([leaf.cpu() for leaf in inputs], torch.float64)
    actual = heatmap_losses(*inputs, size=(5, 6), smoothing=smoothing, backend="triton")
    expected = oracle.heatmap_losses(*exact, (5, 6), smoothing=smoothing)
    found = torch.autograd.grad(actual[0].sum() + 0.3 * actual[1], inputs)
    wanted = torch.autograd.grad(expected[0].sum() + 0.3 * expected[1], exact)
    for ours, theirs in zip([*actual, *found], [*expected, *wanted], strict=True):
        assert error(ours, theirs) <= 1e-4 * float(theirs.detach().abs().max())


def test_channels_of_far_magnitudes_neither_overflow_nor_vanish() -> None:
    """The first channels' weights are 60 orders of magnitude below the last: the running scale has to follow."""
    scale = torch.logspace(-30, 30, 150, device=DEVICE)[:, None, None]
    inputs = leaves([normal(2, 1, 150, 3, 4), normal(2, 1, 150, 3, 4, seed=1) * scale])
    exact = leaves([leaf.cpu() for leaf in inputs], torch.float64)
    actual = heatmap_losses(*inputs, smoothing=0.01, backend="triton")[0]
    expected = oracle.heatmap_losses(*exact, None)[0]
    assert error(actual, expected) <= 1e-5
    ours, theirs = torch.autograd.grad(actual.sum(), inputs)[0], torch.autograd.grad(expected.sum(), exact)[0]
    assert error(ours, theirs) <= 1e-4 * float(theirs.abs().max())


DEAD: dict[str, Any] = {
    "zero activations": lambda a, g: (a * 0, g),
    "zero gradients": lambda a, g: (a, g * 0),
    "negative scores": lambda a, g: (a.abs(), -g.abs()),
}


@pytest.mark.parametrize(
    ("dead", "smoothing", "normalize", "experts"),
    grids.every(4, DEAD, (0.0, 0.01), (True, False), (slice(0, 1), slice(0, 2))),
)
def test_dead_maps_are_uniform_and_have_no_gradient(
    dead: str, smoothing: float, normalize: bool, experts: slice
) -> None:
    activations, gradients = normal(2, 2, 4, 3, 5), normal(2, 2, 4, 3, 5, seed=1)
    activations[experts], gradients[experts] = DEAD[dead](activations[experts], gradients[experts])
    inputs = leaves([activations, gradients])
    exact = leaves([leaf.cpu() for leaf in inputs], torch.float64)
    options: dict[str, Any] = {"size": (6, 10), "smoothing": smoothing, "normalize": normalize}
    actual = heatmap_losses(*inputs, **options, backend="triton")
    expected = heatmap_losses(*exact, **options)
    for ours, theirs in zip(actual, expected, strict=True):
        assert error(ours, theirs) <= 1e-5 * max(1.0, float(theirs.detach().abs().max()))
    found = torch.autograd.grad(actual[0].sum() + 0.1 * actual[1], inputs)
    wanted = torch.autograd.grad(expected[0].sum() + 0.1 * expected[1], exact)
    is_exact = dead != "negative scores" or smoothing == 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert error(ours, theirs) <= 1e-4 * max(1.0, float(theirs.abs().max()))
        assert float(ours[experts].abs().max()) <= (0 if is_exact else 1e-4)


def test_one_hot_maps_that_are_disjoint_share_nothing() -> None:
    activations = torch.zeros(3, 1, 1, 2, 2, device=DEVICE)
    for expert, cell in enumerate([(0, 0), (0, 1), (1, 1)]):
        activations[expert, 0, 0][cell] = 1
    inputs = leaves([activations, torch.ones_like(activations)])
    information, stability = heatmap_losses(*inputs, smoothing=0.0, backend="triton")
    assert information.tolist() == [0]
    assert float(stability.detach()) == 0
    for gradient in torch.autograd.grad(information.sum() + stability, inputs):
        assert not gradient.any()


def test_saturated_maps_that_are_the_same_share_everything() -> None:
    """All mass on one of many cells, for all experts: MI_q = N·log N, and no gradient that could tell them apart."""
    activations = torch.full((3, 2, 2, 5, 5), 1e-6, device=DEVICE)
    activations[..., 2, 3] = 1e6
    inputs = leaves([activations, torch.ones_like(activations)])
    information, stability = heatmap_losses(*inputs, size=(9, 9), backend="triton")
    assert information.tolist() == pytest.approx([3 * math.log(3)] * 2, rel=1e-6)
    assert float(stability.detach()) == 0
    for gradient in torch.autograd.grad(information.sum() + stability, inputs):
        assert float(gradient.abs().max()) <= 1e-5


@pytest.mark.parametrize("broken", ["activations", "gradients"])
def test_nan_does_not_pass_for_a_dead_map(broken: str) -> None:
    activations, gradients = normal(2, 3, 4, 3, 5), normal(2, 3, 4, 3, 5, seed=1)
    (activations if broken == "activations" else gradients)[0, 1, 2, 1, 1] = torch.nan
    for backend in ("torch", "triton"):
        information, stability = heatmap_losses(activations, gradients, backend=backend)  # type: ignore[arg-type]
        assert information.isnan().tolist() == [False, True, False]
        assert stability.isnan()
    assert gradcam_heatmaps(activations, gradients, backend="triton")[0, 1].isnan().any()


@pytest.mark.parametrize(
    ("shape", "layout"),
    grids.every(4, [(2, 1, 3, 33, 40), (2, 1, 40, 17, 16), (2, 1, 150, 3, 3), (2, 1, 3, 1, 70)], LAYOUTS),
)
def test_maps_larger_than_a_tile_and_many_channels(shape: tuple[int, int, int, int, int], layout: Any) -> None:
    _check_losses(CASE._replace(shape=shape, layout=layout, size=(8, 8)), BOTH)


@pytest.mark.parametrize(("dtype", "gradients"), grids.every(2, (torch.bfloat16, torch.float16), ("maps", "sums")))
def test_half_precision_is_read_as_it_is_and_computed_in_float32(dtype: torch.dtype, gradients: str) -> None:
    _check_losses(CASE._replace(dtype=dtype, gradients=gradients), BOTH)


def test_parts_may_differ_in_layout_and_dtype() -> None:
    """A list of activations is read where each of its tensors lies: nothing stacks them."""
    kinds = [(contiguous, torch.float32), (channels_last, torch.bfloat16), (vmapped, torch.float16)]
    activations = [
        layout(normal(1, 2, 37, 5, 4, seed=i)).to(dtype)[0].requires_grad_() for i, (layout, dtype) in enumerate(kinds)
    ]
    gradients = [normal(2, 37, 5, 4, seed=7 + i).requires_grad_() for i in range(3)]
    exact = [leaves([leaf.cpu() for leaf in parts], torch.float64) for parts in (activations, gradients)]
    actual = heatmap_losses(activations, gradients, size=(8, 8), backend="triton")
    expected = heatmap_losses(*exact, size=(8, 8))
    found = torch.autograd.grad(actual[0].sum() + 0.01 * actual[1], [*activations, *gradients])
    wanted = torch.autograd.grad(expected[0].sum() + 0.01 * expected[1], [*exact[0], *exact[1]])
    for ours, theirs, leaf in zip(found, wanted, [*activations, *gradients], strict=True):
        assert ours.dtype == leaf.dtype
        assert error(ours, theirs) <= (torch.finfo(leaf.dtype).eps + 1e-5) * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("activations_form", "gradients_form", "summed"),
    grids.every(2, ("tensor", "list"), ("tensor", "list"), (False, True)),
)
def test_tensors_and_lists_mix(activations_form: str, gradients_form: str, summed: bool) -> None:
    activations, gradients = normal(3, 2, 4, 3, 5), normal(3, 2, 4, 3, 5, seed=1)
    expected = heatmap_losses(activations, gradients, backend="torch")
    slopes = gradients.sum((-2, -1)) if summed else gradients
    arguments = [
        list(x) if form == "list" else x for x, form in [(activations, activations_form), (slopes, gradients_form)]
    ]
    for backend in ("torch", "triton"):
        for ours, theirs in zip(heatmap_losses(*arguments, backend=backend), expected, strict=True):  # type: ignore[arg-type]
            assert error(ours, theirs) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("layout", [contiguous, channels_last, vmapped])
def test_gradients_lie_as_their_inputs_or_are_a_broadcast(layout: Any) -> None:
    inputs = leaves([layout(normal(3, 2, 5, 4, 6, seed=seed)) for seed in (0, 1)])
    information, stability = heatmap_losses(*inputs, backend="triton")
    grad_activations, grad_gradients = torch.autograd.grad(information.sum() + stability, inputs)
    assert grad_activations.stride() == inputs[0].stride()
    assert grad_gradients.shape == inputs[1].shape
    assert grad_gradients.stride()[3:] == (0, 0)


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_derivative_that_is_wanted_is_computed(wanted: int) -> None:
    both, one = (leaves([normal(3, 2, 5, 4, 6), normal(3, 2, 5, 4, 6, seed=1)]) for _ in range(2))
    one[1 - wanted].requires_grad_(False)
    losses = [sum(x.sum() for x in heatmap_losses(*inputs, backend="triton")) for inputs in (both, one)]
    expected = torch.autograd.grad(losses[0], both[wanted])[0]  # type: ignore[arg-type]
    assert torch.equal(torch.autograd.grad(losses[1], one[wanted])[0], expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [1, 3, 1500])
@pytest.mark.parametrize("experts", [2, 5])
def test_position_stability_of_small_and_large_batches(samples: int, experts: int) -> None:
    statistics = torch.full((7, experts, samples), torch.nan, device=DEVICE)
    centres = 4 * normal(2, experts, samples) + 16
    statistics[3:5] = centres
    stability, means = fused._stability(statistics, None)
    exact = centres.double().cpu()
    distances = (exact[:, :, None] - exact[:, None]).square().sum(0)
    assert error(means, distances.mean(-1)) <= 1e-5 * float(distances.max())
    expected = (distances - distances.mean(-1, keepdim=True)).square().sum()
    assert error(stability, expected) <= 1e-5 * float(expected) + 1e-6


def test_two_runs_give_the_same_bits() -> None:
    def run() -> list[Tensor]:
        inputs = leaves([normal(3, 2, 70, 5, 5), normal(3, 2, 70, 5, 5, seed=1)])
        outputs = heatmap_losses(*inputs, size=(9, 9), backend="triton")
        return [*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1], inputs)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


@pytest.mark.parametrize("function", [heatmap_losses, gradcam_heatmaps])
def test_a_second_derivative_raises(function: Any) -> None:
    inputs = leaves([normal(2, 2, 3, 3, 3), normal(2, 2, 3, 3, 3, seed=1)])
    found = function(*inputs, backend="triton")
    first = torch.autograd.grad((found if isinstance(found, Tensor) else found[0]).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="backend: expected 'torch' for a second derivative"):
        torch.autograd.grad(first[0].square().sum(), inputs)


@pytest.mark.parametrize(("backend", "kept"), [("torch", [0, 2, 3]), ("torch", [1]), ("torch", []), ("triton", [0, 2])])
def test_samples_that_do_not_count_are_as_if_not_there(backend: Any, kept: list[int]) -> None:
    """Values and gradients, also of what is not computed for a graph."""
    case = CASE._replace(shape=(2, 4, 4, 3, 5), gradients="sums")
    counted = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    counted[kept] = True
    options = HeatmapOptions(size=(5, 6), smoothing=0.1, backend=backend)
    upstream = normal(4, seed=3).abs()
    found = []
    for rows in (slice(None), counted):
        inputs = leaves([part[:, rows] for part in case.inputs()])
        mask = counted if rows == slice(None) else None
        information, stability = losses_of_heatmaps(*inputs, options, counted=mask)
        slopes = torch.autograd.grad((upstream[rows] * information).sum() + 0.3 * stability, inputs)
        direct = gradients_of_heatmap_losses(
            *inputs, upstream[rows], torch.tensor(0.3, device=DEVICE), options, counted=mask
        )
        found.append([information, stability, *slopes, *direct])
    for name, ours, theirs in zip(("MI", "PS", "A", "G") * 2, *found, strict=True):
        assert error(ours if name == "PS" else ours[..., kept] if name == "MI" else ours[:, kept], theirs) <= 1e-4
        if name in "AG":
            assert not ours[:, ~counted].any()
        elif name == "MI":
            assert not ours[~counted].any()


@pytest.mark.parametrize(
    ("gradients", "samples", "both"),
    grids.grid(
        ("sums", "maps"),
        (0, 2),
        (True, False),
        ordinary=lambda gradients, samples, both: (gradients == "maps") == (samples == 2) == both,
    ),
)
def test_ops_are_what_the_compiler_takes_them_for(gradients: str, samples: int, both: bool) -> None:
    """Schema, fake tensors, autograd registration and dynamic shapes, for the forward and the backward ops."""
    case = CASE._replace(shape=(2, samples, 3, 3, 4), gradients=gradients)
    inputs = leaves(case.inputs())
    parts = ([inputs[0][:1], inputs[0][1:]], [inputs[1][:1], inputs[1][1:]])
    torch.library.opcheck(fused.heatmap_losses, (*parts, [5, 6], True, 0.01, 0.3, "", None))
    torch.library.opcheck(fused_heatmaps.gradcam_heatmaps, (*parts, [5, 6], 0.3))
    activations = [part.detach() for part in parts[0]]
    slopes = [part.detach() for part in parts[1]]
    saved = fused.heatmap_losses(activations, slopes, [5, 6], True, 0.01, 0.3, "", None)
    maps, sums, scores = fused_heatmaps.gradcam_heatmaps(activations, slopes, [5, 6], 0.3)
    needs = (both, True)
    torch.library.opcheck(
        fused.heatmap_losses_backward,
        (normal(samples), None, activations, *saved[2:], None, True, 0.01, 0.3, torch.float32, *needs),
    )
    torch.library.opcheck(
        fused_heatmaps.gradcam_heatmaps_backward,
        (normal(*maps.shape), activations, sums, scores, 0.3, torch.float32, *needs),
    )


def test_compiled_with_a_dynamic_batch_it_is_one_graph() -> None:
    graphs = 0

    def count(module: Any, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return module

    def losses(activations: Tensor, gradients: Tensor) -> Tensor:
        information, stability = heatmap_losses(activations, gradients, size=(6, 5), backend="triton")
        return 2 * information.sum() + 0.1 * stability

    torch.compiler.reset()
    counted = torch.compile(losses, fullgraph=True, dynamic=True, backend=count)
    differentiated = torch.compile(losses, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (5, 4):  # no other axis is as long: equal lengths would be taken for one
        inputs = leaves([normal(2, samples, 1, 3, 2), normal(2, samples, 1, 3, 2, seed=1)])
        expected = losses(*inputs)
        assert torch.equal(counted(*inputs), expected)
        actual = differentiated(*inputs)
        assert torch.equal(actual, expected)
        pairs = zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert graphs == 1


def test_autocast_changes_nothing() -> None:
    inputs = leaves([normal(2, 2, 3, 3, 4), normal(2, 2, 3, 3, 4, seed=1)])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        inside = heatmap_losses(*inputs, backend="triton")
        gradients = torch.autograd.grad(inside[0].sum(), inputs)
    outside = heatmap_losses(*inputs, backend="triton")
    expected = torch.autograd.grad(outside[0].sum(), inputs)
    for one, other in zip([*inside, *gradients], [*outside, *expected], strict=True):
        assert torch.equal(one, other)


def test_splits_are_few_and_a_power_of_two() -> None:
    for all_maps, channels in itertools.product([1, 7, 160, 1024, 10**6], [1, 16, 100, 2048]):
        for most in (16, 1 << 16):
            chunk = launch.channels_per_program(channels, 16, all_maps, most)
            blocks = -(-channels // 16)
            splits = -(-channels // chunk)
            assert chunk % 16 == 0
            assert splits <= min(blocks, most)
            assert all_maps < 1024 or splits == 1
