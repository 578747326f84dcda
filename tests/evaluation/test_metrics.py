"""The measures on a trained mixture, against plain loops in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.data.datasets import Split
from immunity_fast.data.sampling import batches, sample
from immunity_fast.evaluation.metrics import correct, expert_maps, heatmap_metrics, wilson_interval
from immunity_fast.experts.staged import StagedNetwork
from tests import grids
from tests.small_runs import CLASSES, split

EXPERTS = 3


def _model(seed: int = 0) -> ImmunityMoE:
    """A mixture whose running statistics fit its images, in evaluation mode."""
    torch.manual_seed(seed)
    model = ImmunityMoE("resnet8", EXPERTS, CLASSES, image_size=12, stage="layer2")
    with torch.no_grad():
        for _ in range(20):
            model(split(30, seed=7).images / 255)
    return model.eval()


def _loss(**options: object) -> FusedImmunityLoss:
    return FusedImmunityLoss(0.3, 0.1, 0.1, **{"size": (12, 12), "smoothing": 0.02} | options)  # type: ignore[arg-type]


def _heatmaps(model: ImmunityMoE, images: Split, *, size: tuple[int, int], smoothing: float) -> tuple[Tensor, Tensor]:
    """(3): heatmaps h and distributions p, both (N, B, H, W), in float64, an expert and an image at a time."""
    h = torch.zeros(EXPERTS, len(images), *size, dtype=torch.float64)
    p = torch.zeros_like(h)
    for i, expert in enumerate(model.unstack()):
        assert isinstance(expert, StagedNetwork)
        trunk, head = expert.double().eval().split("layer2")
        for q in range(len(images)):
            maps = trunk(images.images[q : q + 1].double() / 255).detach().requires_grad_()
            (slope,) = torch.autograd.grad(head(maps)[0, images.labels[q]], maps)
            weights = slope[0].sum((1, 2)) / slope.shape[1]
            raw = sum(w * a for w, a in zip(weights, maps[0].detach(), strict=True))
            assert isinstance(raw, Tensor)
            h[i, q] = F.interpolate(raw.relu()[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            smoothed = h[i, q] + smoothing * raw.abs().mean()
            p[i, q] = smoothed / smoothed.sum()
    return h, p


def _pairs() -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(EXPERTS) for j in range(EXPERTS) if i != j)


def _measures(h: Tensor, p: Tensor) -> dict[str, float]:
    """The paper's sums as they are written."""
    experts, count, height, width = h.shape
    information, iscore, dead = 0.0, 0.0, 0
    distances = np.zeros((experts, experts, count))
    for q in range(count):
        for a in range(height):
            for b in range(width):
                column = p[:, q, a, b]
                information += float(sum(x * math.log(x / column.sum()) for x in column if x > 0))
        scaled = [m / m.max() if m.max() > 0 else m for m in h[:, q]]
        dead += sum(int(m.max() == 0) for m in h[:, q])
        iscore += sum(float(((scaled[i] - scaled[j]) ** 2).sum()) for i, j in _pairs()) / (experts * (experts - 1))
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        centres = [(float((m * rows).sum()), float((m * columns).sum())) for m in p[:, q]]
        for i, j in _pairs():
            distances[i, j, q] = math.dist(centres[i], centres[j]) ** 2
    return {
        # The mean over images of log N − MI/N, where MI = −Σ p log(p / Σ p).
        "mutual_information": math.log(experts) + information / experts / count,
        "dead_heatmaps": dead / (experts * count),
        "iscore": iscore / count,
        "cscore": float(((distances - distances.mean(-1, keepdims=True)) ** 2).sum() / count),
    }


@pytest.mark.parametrize("size", [(12, 12), pytest.param((6, 6), marks=pytest.mark.exhaustive), (9, 15)])
def test_heatmap_metrics_are_the_paper_s_sums(size: tuple[int, int]) -> None:
    model, images = _model(), split(7, seed=3)
    expected = _measures(*_heatmaps(model, images, size=size, smoothing=0.02))
    measured = heatmap_metrics(model, _loss(size=size), images, 3)
    assert measured.keys() == expected.keys()
    assert measured == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_expert_maps_are_grad_cam_s() -> None:
    model, images = _model(), split(4, seed=3)
    maps, p = expert_maps(model, _loss(), images.images / 255, images.labels)
    expected_maps, expected_p = _heatmaps(model, images, size=(12, 12), smoothing=0.02)
    torch.testing.assert_close(maps.double(), expected_maps, rtol=1e-3, atol=1e-5 * float(expected_maps.max()))
    torch.testing.assert_close(p.double(), expected_p, rtol=1e-3, atol=1e-6)
    assert not maps.requires_grad
    assert not p.requires_grad


@pytest.mark.parametrize("batch_size", grids.sampled([1, 4, 9, 100], ordinary=lambda size: size in (1, 100)))
def test_heatmap_metrics_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    # The CScore's mean is over all images, not over a batch's.
    model, images = _model(), split(9, seed=3)
    expected = heatmap_metrics(model, _loss(), images, 5)
    assert heatmap_metrics(model, _loss(), images, batch_size) == pytest.approx(expected, rel=1e-4)


def test_heatmap_metrics_leave_the_model_as_it_is() -> None:
    model, images = _model(), split(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heatmap_metrics(model, _loss(), images, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert model.gate.switch == "call"


def test_experts_that_are_the_same_measure_no_difference() -> None:
    model, images = _model(), split(6)
    for value in model.experts.state_dict().values():
        value.copy_(value[:1].expand_as(value))
    measured = heatmap_metrics(model, _loss(), images, 4)
    assert measured["mutual_information"] == pytest.approx(0, abs=1e-6)
    assert measured["iscore"] == pytest.approx(0, abs=1e-4)
    assert measured["cscore"] == 0


def test_dead_heatmaps_are_counted() -> None:
    model, images = _model(), split(5)
    # A classifier that ignores its input has no gradient.
    model.experts.get_parameter("classifier.1.weight").data[0].zero_()
    measured = heatmap_metrics(model, _loss(), images, 2)
    assert measured["dead_heatmaps"] >= 1 / EXPERTS
    assert all(math.isfinite(value) for value in measured.values())


def test_batches_are_the_split_in_its_order() -> None:
    images = split(11)
    parts = list(batches(images, 4))
    assert [len(labels) for _, labels in parts] == [4, 4, 3]
    assert torch.equal(torch.cat([labels for _, labels in parts]), images.labels)
    assert torch.equal(torch.cat([part for part, _ in parts]), images.images.float() / 255)


def test_a_sample_is_the_same_each_time_and_repeats_no_image() -> None:
    images = split(50)
    labelled = Split(images.images, torch.arange(50))
    first, again = sample(labelled, 20), sample(labelled, 20)
    assert torch.equal(first.labels, again.labels)
    assert len(set(first.labels.tolist())) == 20
    assert torch.equal(first.images, images.images[first.labels])
    assert first.labels.tolist() != sorted(first.labels.tolist())


def test_a_larger_sample_begins_with_the_smaller() -> None:
    labelled = Split(split(50).images, torch.arange(50))
    assert torch.equal(sample(labelled, 30).labels[:10], sample(labelled, 10).labels)


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (5, 5), (6, 5)])
def test_a_sample_is_no_larger_than_its_split(count: int, expected: int) -> None:
    assert len(sample(split(5), count)) == expected


def test_correct_counts_with_the_gate_on_call_and_with_its_mean() -> None:
    model, images = _model(), split(40, seed=5)
    model.gate.generator = torch.Generator().manual_seed(4)
    right = correct(model, images.images / 255, images.labels)
    with torch.no_grad():
        experts = torch.stack([expert(images.images / 255).softmax(-1) for expert in model.unstack()])
        model.gate.generator = torch.Generator().manual_seed(4)
        with model.gate.switched("sample"):
            switched = model(images.images / 255)
    assert right["mean"] == int((experts.mean(0).argmax(-1) == images.labels).sum())
    assert right["sample"] == int((switched.argmax(-1) == images.labels).sum())
    assert model.gate.switch == "call"


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (10, 10), (3, 10), (617, 1000), (1, 1), (0, 1)])
def test_the_interval_is_wilson_s(successes: int, trials: int) -> None:
    # Its ends are where a proportion p is 1.96 standard errors, of p itself, away from the one that was found.
    z = 1.959963984540054
    share = successes / trials
    a, b, c = 1 + z * z / trials, -(2 * share + z * z / trials), share**2
    ends = sorted(np.roots([a, b, c]).real)
    assert wilson_interval(successes, trials) == pytest.approx(ends, abs=1e-6)


def test_an_interval_holds_its_proportion_and_stays_in_0_to_1() -> None:
    for trials in (1, 2, 7, 100, 10_000):
        for successes in {0, 1, trials // 2, trials}:
            low, high = wilson_interval(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1


def test_nothing_tried_is_nothing_known() -> None:
    assert wilson_interval(0, 0) == (0, 1)
