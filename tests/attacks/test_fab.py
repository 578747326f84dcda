"""FAB: the true distances of linear models, the steps of the authors' code, and no pass that need not be."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast.attacks.fab import fab_targeted
from immunity_fast.attacks.hyperplane import move_to_hyperplane
from immunity_fast.attacks.projections import Norm, linf_bounds, project_l2
from tests.attacked_models import Recorder, small_images, small_labels, small_network
from tests.grids import every

each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])
UNIT = (0.0, 1.0)


def _linear(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A linear model, images of which some pixels are 0 and 1, its labels and the class that is next."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * 7 * 5, 4, generator=generator, dtype=torch.float64).to(dtype) * scale
    images = (1.2 * torch.rand(12, 3, 7, 5, generator=generator, dtype=torch.float64) - 0.1).clamp(0, 1).to(dtype)

    def model(images: Tensor) -> Tensor:
        outputs: Tensor = images.flatten(1) @ weight
        return outputs

    order = model(images).sort(1).indices
    model.weight = weight  # type: ignore[attr-defined]
    return model, images, order[:, -1], order[:, -2]


def _length(moves: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(moves.flatten(1), ord=math.inf if norm == "Linf" else 2, dim=1)


def _distances(model: Any, images: Tensor, labels: Tensor, targets: Tensor, norm: Norm) -> Tensor:
    """From each image to the plane where a linear model gives both classes the same, within the box."""
    slopes = (model.weight[:, targets] - model.weight[:, labels]).T.double()
    points = images.flatten(1).double()
    return _length(move_to_hyperplane(points, slopes, -(slopes * points).sum(1), norm), norm)


def _fools(model: Any, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        fooled: Tensor = model(images).argmax(1) != labels
    return fooled


@pytest.mark.parametrize(("norm", "dtype"), every(2, ("Linf", "L2"), (torch.float32, torch.float64)), ids=str)
def test_distances_of_a_linear_model_are_the_true_ones(norm: Norm, dtype: torch.dtype) -> None:
    """No ball: the nearest image that was found at all comes back. It is beyond the boundary by a part of `eta`."""
    model, images, labels, targets = _linear(dtype=dtype)
    found = fab_targeted(model, images, labels, targets, eps=0, norm=norm, bounds=UNIT, steps=20)
    assert found.dtype == dtype
    assert bool(_fools(model, found, labels).all())
    assert bool(((found >= 0) & (found <= 1)).all())
    ratios = _length(found.double() - images.double(), norm) / _distances(model, images, labels, targets, norm)
    # Another class than the target may be nearer: not much, as the target is next.
    assert bool((ratios > 0.6).all())
    assert float(ratios.median()) == pytest.approx(1.003, abs=0.003)
    assert bool((ratios < 1.01).all())


@each_norm
def test_a_ball_a_little_larger_is_enough_at_once(norm: Norm) -> None:
    model, images, labels, targets = _linear()
    recorder = Recorder(model)
    eps = float(_distances(model, images, labels, targets, norm).max()) * 1.06
    found = fab_targeted(recorder, images, labels, targets, eps=eps, norm=norm, bounds=UNIT)
    assert bool(_fools(model, found, labels).all())
    assert bool((_length(found.double() - images.double(), norm) <= eps).all())
    assert [len(shown) for shown in recorder.shown] == [12, 12]


@each_norm
def test_rows_are_asked_as_long_as_they_withstand(norm: Norm) -> None:
    """Half of the images need two passes; the points of the others fool the model from outside, and cost two a step."""
    model, images, labels, targets = _linear()
    distances = _distances(model, images, labels, targets, norm)
    eps = float(distances.sort().values[5:7].mean())
    near = int((distances * 1.05 < eps).sum())
    recorder = Recorder(model)
    found = fab_targeted(recorder, images, labels, targets, eps=eps, norm=norm, bounds=UNIT, steps=4)
    inside = _length(found.double() - images.double(), norm) <= eps
    assert bool(_fools(model, found, labels).all())  # the others from outside
    assert near <= int(inside.sum()) <= 6 + 1
    counts = [len(shown) for shown in recorder.shown]
    assert counts[:3] == [12, 12, 12 - near]
    assert len(counts) == 1 + 2 + 2 + 2 + 1
    assert max(counts[3:]) <= 12 - near


@each_norm
def test_points_that_withstand_cost_one_pass_a_step(norm: Norm) -> None:
    """Steps that go to half of the way never arrive; each is that of the paper's algorithm 1."""
    model, images, labels, targets = _linear(dtype=torch.float64)
    recorder = Recorder(model)
    found = fab_targeted(recorder, images, labels, targets, eps=1, norm=norm, bounds=UNIT, eta=0.5, steps=5)
    assert torch.equal(found, images)
    assert [len(shown) for shown in recorder.shown] == [12] * 6
    slopes = (model.weight[:, targets] - model.weight[:, labels]).T
    for before, after in zip(recorder.shown, recorder.shown[1:], strict=False):
        here, there = (
            move_to_hyperplane(points, slopes, -(slopes * points).sum(1), norm)
            for points in (before.flatten(1), images.flatten(1))
        )
        alpha = (_length(here, norm) / (_length(here, norm) + _length(there, norm))).clamp_max(0.1)[:, None]
        moved = (before.flatten(1) + here / 2) * (1 - alpha) + (images.flatten(1) + there / 2) * alpha
        torch.testing.assert_close(after.flatten(1), moved.clamp(0, 1))


@each_norm
def test_rows_of_a_group_are_done_with_the_first(norm: Norm) -> None:
    model, images, labels, targets = _linear()
    eps = float(_distances(model, images, labels, targets, norm).max()) * 1.06
    never = labels  # no class to go to
    recorder = Recorder(model)
    found = fab_targeted(
        recorder,
        images.repeat(2, 1, 1, 1),
        labels.repeat(2),
        torch.cat([targets, never]),
        eps=eps,
        norm=norm,
        bounds=UNIT,
        groups=torch.arange(12).repeat(2),
    )
    assert bool(_fools(model, found[:12], labels).all())
    assert torch.equal(found[12:], images)
    assert [len(shown) for shown in recorder.shown] == [24, 24]


@each_norm
@pytest.mark.parametrize("scale", [1e-30, 1e20])
def test_gradients_of_any_size_are_followed(norm: Norm, scale: float) -> None:
    model, images, labels, targets = _linear(scale)
    plain, *_ = _linear()
    found, expected = (
        fab_targeted(asked, images, labels, targets, eps=0, norm=norm, bounds=UNIT, steps=6) for asked in (model, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, images)


@each_norm
def test_other_bounds_are_the_same_attack(norm: Norm) -> None:
    model, images, labels, targets = _linear(dtype=torch.float64)

    def shifted(images: Tensor) -> Tensor:
        outputs: Tensor = model((images + 2) / 5)
        return outputs

    kwargs: dict[str, Any] = {"norm": norm, "steps": 5}
    expected = fab_targeted(model, images, labels, targets, eps=0.01, bounds=UNIT, **kwargs)
    found = fab_targeted(shifted, 5 * images - 2, labels, targets, eps=0.05, bounds=(-2.0, 3.0), **kwargs)
    torch.testing.assert_close((found + 2) / 5, expected)


@each_norm
def test_an_impossible_target_is_no_error(norm: Norm) -> None:
    """The logarithm of 0 has no slope; the other images go on."""
    model, images, labels, targets = _linear()
    alone = fab_targeted(model, images, labels, targets, eps=0, norm=norm, bounds=UNIT, steps=5)

    def with_impossible(images: Tensor) -> Tensor:
        outputs: Tensor = model(images)
        return torch.cat([outputs, torch.full((len(outputs), 1), -math.inf)], 1)

    targets = torch.where(torch.arange(12) % 3 == 0, 4, targets)
    found = fab_targeted(with_impossible, images, labels, targets, eps=0, norm=norm, bounds=UNIT, steps=5)
    impossible = targets == 4
    assert torch.equal(found[impossible], images[impossible])
    torch.testing.assert_close(found[~impossible], alone[~impossible])


def test_gradients_that_are_no_numbers_are_errors() -> None:
    model, images, labels, targets = _linear()

    def broken(images: Tensor) -> Tensor:
        outputs: Tensor = model(images) + (0 * images).sqrt().flatten(1).sum(1, keepdim=True)
        return outputs

    with pytest.raises(ValueError, match="model: expected finite gradients, got NaN"):
        fab_targeted(broken, images, labels, targets, eps=0.1, norm="Linf", bounds=UNIT)
    with pytest.raises(ValueError, match="got detached ones"):
        fab_targeted(lambda x: model(x).detach(), images, labels, targets, eps=0.1, norm="Linf", bounds=UNIT)


@each_norm
def test_nothing_is_left_behind(norm: Norm) -> None:
    """Under `torch.no_grad`, and for no images, too."""
    network, images, labels = small_network(), small_images(), small_labels()
    state = torch.get_rng_state()
    with torch.no_grad():
        found = fab_targeted(network, images, labels, (labels + 1) % 5, eps=0.02, norm=norm, bounds=UNIT, steps=3)
        empty = fab_targeted(network, images[:0], labels[:0], labels[:0], eps=0.02, norm=norm, bounds=UNIT)
    assert not found.requires_grad
    assert empty.shape == (0, 3, 9, 8)
    assert torch.equal(images, small_images())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[1], images[1])  # it fools the model as it is


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.012), ("Linf", 0.03), ("L2", 0.12), ("L2", 0.3)])
def test_as_many_are_fooled_as_by_torchattacks(norm: Norm, eps: float) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    generator = torch.Generator().manual_seed(7)
    images = torch.rand(48, 3, 9, 8, generator=generator)
    network: nn.Module = small_network(dtype=torch.float32)
    order = network(images).sort(1).indices
    labels = order[:, -1]
    ours, theirs = (torch.zeros(48, dtype=torch.bool) for _ in range(2))
    for rank in (2, 3):
        attack = torchattacks.FAB(network, norm=norm, eps=eps, steps=12, multi_targeted=True)
        attack.target_class = rank
        with torch.no_grad():
            by_theirs = attack.attack_single_run_targeted(images, labels)
        by_ours = fab_targeted(network, images, labels, order[:, -rank], eps=eps, norm=norm, bounds=UNIT, steps=12)
        for fooled, found in ((theirs, by_theirs), (ours, by_ours)):
            inside = found.clamp(*linf_bounds(images, eps)) if norm == "Linf" else project_l2(found, images, eps)
            fooled |= _fools(network, inside, labels)
    assert 3 < int(theirs.sum()) < 45
    assert int((ours != theirs).sum()) <= 1
