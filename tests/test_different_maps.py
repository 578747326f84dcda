"""Maps whose C, h and w are each expert's own: against the oracle, in values, gradients and second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast import FusedImmunityLoss
from immunity_fast.functional import gradcam_heatmaps, heatmap_losses
from tests import oracle
from tests.oracle import assert_matches
from tests.tensors import normal

SHAPES = [(5, 6, 7), (3, 4, 4), (2, 9, 3)]
SIZE = (8, 5)
TARGETS = torch.tensor([0, 2, 1, 0])


def _maps(samples: int = 4, shapes: list[tuple[int, int, int]] = SHAPES) -> list[Tensor]:
    return [normal(samples, *shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def _slopes(samples: int = 4) -> list[Tensor]:
    return [normal(samples, *shape, seed=7 + seed).requires_grad_() for seed, shape in enumerate(SHAPES)]


def _same(actual: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    assert_matches(actual, expected)
    upstream = normal(*actual.shape, seed=5)
    ours = torch.autograd.grad(actual, leaves, upstream, create_graph=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, leaves, upstream, create_graph=True, materialize_grads=True)
    for mine, other in zip(ours, theirs, strict=True):
        assert_matches(mine, other, floor=0.1)
    again = [
        torch.autograd.grad(
            sum((gradient * normal(*gradient.shape, seed=3)).sum() for gradient in found),
            leaves,
            materialize_grads=True,
            retain_graph=True,
        )
        for found in (ours, theirs)
    ]
    for mine, other in zip(*again, strict=True):
        assert_matches(mine, other, 1e-8, floor=0.1)


@pytest.mark.parametrize("weight_scale", ["channels", "spatial"])
def test_heatmaps_match_the_oracle(weight_scale: Any) -> None:
    maps, slopes = _maps(), _slopes()
    actual = gradcam_heatmaps(maps, slopes, size=SIZE, weight_scale=weight_scale)
    assert actual.shape == (3, 4, *SIZE)
    _same(actual, oracle.heatmaps(maps, slopes, SIZE, weight_scale), [*maps, *slopes])


@pytest.mark.parametrize(
    "options",
    [{}, {"normalize": False}, {"smoothing": 0.3, "weight_scale": "spatial"}],
    ids=lambda o: "-".join(o) or "default",
)
def test_losses_match_the_oracle(options: dict[str, Any]) -> None:
    maps, slopes = _maps(), _slopes()
    actual = heatmap_losses(maps, slopes, size=SIZE, **options)
    expected = oracle.heatmap_losses(maps, slopes, SIZE, **options)
    for mine, other in zip(actual, expected, strict=True):
        _same(mine, other, [*maps, *slopes])


def test_gradients_may_be_summed_over_space_of_some() -> None:
    maps, slopes = _maps(), _slopes()
    summed = [slope.sum((-2, -1)) for slope in slopes]
    for mine, other in zip(
        heatmap_losses(maps, summed, size=SIZE), heatmap_losses(maps, slopes, size=SIZE), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_channels_last_is_the_layout_of_all() -> None:
    maps, slopes = _maps(), _slopes()
    turned = [[part.permute(0, 2, 3, 1) for part in parts] for parts in (maps, slopes)]
    actual = heatmap_losses(*turned, size=SIZE, layout="NHWC")
    for mine, other in zip(actual, heatmap_losses(maps, slopes, size=SIZE), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)


def test_equal_maps_in_a_list_are_what_one_tensor_is() -> None:
    maps = normal(3, 4, 5, 6, 7)
    slopes = normal(3, 4, 5, 6, 7, seed=1)
    actual = heatmap_losses(list(maps), list(slopes), size=SIZE)
    for mine, other in zip(actual, heatmap_losses(maps, slopes, size=SIZE), strict=True):
        assert torch.equal(mine, other)


def test_of_one_size_but_other_channels_no_size_is_needed() -> None:
    maps = [normal(4, channels, 5, 6, seed=channels) for channels in (2, 5)]
    slopes = [normal(4, channels, 5, 6, seed=9 + channels) for channels in (2, 5)]
    expected = oracle.heatmap_losses(maps, slopes)
    for mine, other in zip(heatmap_losses(maps, slopes), expected, strict=True):
        assert_matches(mine, other)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_half_precision_is_computed_in_float32(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    maps = [part.detach().to(dtype) for part, dtype in zip(_maps(), [*dtypes, dtypes[0]], strict=True)]
    slopes = [part.detach().to(dtype) for part, dtype in zip(_slopes(), [*dtypes, dtypes[0]], strict=True)]
    exact = [part.double() for part in maps], [part.double() for part in slopes]
    actual = heatmap_losses(maps, slopes, size=SIZE)
    for mine, other in zip(actual, oracle.heatmap_losses(*exact, SIZE), strict=True):
        assert mine.dtype == torch.float32
        assert_matches(mine, other, 1e-4)


def test_an_empty_batch_gives_zeros() -> None:
    information, stability = heatmap_losses(_maps(0), _slopes(0), size=SIZE)
    assert information.shape == (0,)
    assert float(stability.detach()) == 0


class Heads:
    """Experts whose logits are some function of their maps."""

    def __init__(self) -> None:
        self.maps = _maps()
        self.weights = [normal(shape[0], 3, seed=20 + seed).requires_grad_() for seed, shape in enumerate(SHAPES)]

    def activations(self) -> list[Tensor]:
        return [maps.tanh() for maps in self.maps]

    def logits(self, activations: list[Tensor]) -> list[Tensor]:
        return [maps.square().mean((-2, -1)) @ weights for maps, weights in zip(activations, self.weights, strict=True)]


@pytest.mark.parametrize("score", ["logit", "probability"])
@pytest.mark.parametrize("detach_weights", [False, True])
def test_the_whole_loss_matches_the_oracle(score: Any, detach_weights: bool) -> None:
    experts = Heads()
    leaves = [*experts.maps, *experts.weights]
    loss_fn = FusedImmunityLoss(0.4, 1.3, 0.02, SIZE, score=score, detach_weights=detach_weights)
    activations = experts.activations()
    actual = loss_fn(experts.logits(activations), activations, TARGETS)

    activations = experts.activations()
    logits = experts.logits(activations)
    slopes = []
    for maps, scores in zip(activations, logits, strict=True):
        of_samples = []
        for q, label in enumerate(TARGETS.tolist()):
            y = scores[q, label] if score == "logit" else torch.softmax(scores[q], 0)[label]
            of_samples.append(torch.autograd.grad(y, maps, create_graph=True)[0][q])
        slopes.append(torch.stack(of_samples))
    if detach_weights:
        slopes = [slope.detach() for slope in slopes]
    gate = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    cross_entropies = oracle.cross_entropy(torch.stack(logits), gate, TARGETS, 0.4)
    expected = oracle.total(cross_entropies, *oracle.heatmap_losses(activations, slopes, SIZE), 3, 1.3, 0.02)
    assert_matches(actual, expected)
    ours, theirs = (torch.autograd.grad(loss, leaves) for loss in (actual, expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert_matches(mine, other)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"size": None}, r"size: expected \(H, W\) for maps of different sizes, got None"),
        (
            {"backend": "triton"},
            r"backend: expected 'torch' or 'auto' for maps of different shapes, \(5, 6, 7\), .*'triton'",
        ),
        ({"gradients": _slopes()[:2]}, "gradients: expected 3 tensors, as there are activations, got 2"),
        ({"gradients": _slopes()[::-1]}, r"gradients: expected the shape of activations, \(1, 4, 5, 6, 7\)"),
        ({"activations": [*_maps()[:2], normal(3, 2, 9, 3)]}, "activations: expected tensors of one batch"),
        ({"activations": [*_maps()[:2], normal(4, 2, 9)]}, r"activations: expected shape \(N, B, C, h, w\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {"activations": _maps(), "gradients": _slopes(), "size": SIZE} | change
    with pytest.raises(ValueError, match=text):
        heatmap_losses(**arguments)
