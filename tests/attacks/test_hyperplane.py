"""The nearest point of a hyperplane within a box: against bisection in float64, and what can be proven of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from immunity_fast.attacks.hyperplane import move_to_hyperplane
from immunity_fast.attacks.projections import Norm

each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def _bisected(point: Any, slopes: Any, gap: float, norm: Norm, low: float, high: float) -> Any:
    """The move, by bisection for the number that Newton's method is to find."""
    direction = np.sign(slopes) * (1 if gap >= 0 else -1)
    room = np.where(direction > 0, high - point, np.where(direction < 0, point - low, 0))
    largest = np.abs(slopes[room > 0]).max(initial=0) or 1.0
    weights, wanted = np.abs(slopes) / largest, abs(gap) / largest
    rates = np.ones_like(weights) if norm == "Linf" else weights

    def lengths(reach: float) -> Any:
        return np.minimum(reach * rates, room)

    if wanted >= weights @ room:
        return direction * room
    below, above = 0.0, 1.0
    while weights @ lengths(above) < wanted:
        above *= 2
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if weights @ lengths(middle) < wanted else (below, middle)
    return direction * lengths(above)


def _cases(n: int, low: float = 0.0, high: float = 1.0, samples: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """A third of the coordinates at the edge of the box, a fifth of the slopes 0, gaps of all sizes."""
    generator = torch.Generator().manual_seed(n)
    points = (1.6 * torch.rand(samples, n, generator=generator, dtype=torch.float64) - 0.3).clamp(0, 1)
    slopes = torch.randn(samples, n, generator=generator, dtype=torch.float64)
    slopes *= torch.rand(samples, n, generator=generator) > 0.2
    slopes *= 10 ** (4 * torch.rand(samples, n, generator=generator, dtype=torch.float64) - 4)
    within = torch.rand(samples, generator=generator, dtype=torch.float64) ** 3
    sign = 1 - 2 * (torch.arange(samples) % 2)
    gaps = sign * within * slopes.abs().sum(1) * (high - low)
    return low + (high - low) * points, slopes, gaps


@each_norm
@each_dtype
@pytest.mark.parametrize("n", [1, 2, 3, 17, 363])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0)], ids=str)
def test_moves_are_those_of_bisection(norm: Norm, dtype: torch.dtype, n: int, bounds: tuple[float, float]) -> None:
    points, slopes, gaps = (tensor.to(dtype) for tensor in _cases(n, *bounds))
    moves = move_to_hyperplane(points, slopes, gaps, norm, bounds)
    assert moves.dtype == dtype
    assert bool((points + moves >= bounds[0] - 1e-6).all())
    assert bool((points + moves <= bounds[1] + 1e-6).all())
    reached = 0
    for found, point, slope, gap in zip(moves.double(), points.double(), slopes.double(), gaps.double(), strict=True):
        expected = torch.from_numpy(_bisected(point.numpy(), slope.numpy(), float(gap), norm, *bounds))
        order = torch.inf if norm == "Linf" else 2
        tolerance = 2e-4 if dtype == torch.float32 else 1e-9
        lengths = [float(torch.linalg.vector_norm(move, ord=order)) for move in (found, expected)]
        assert lengths[0] == pytest.approx(lengths[1], rel=tolerance, abs=1e-12)
        assert float(slope @ found) == pytest.approx(float(slope @ expected), rel=tolerance / 20, abs=1e-12)
        reached += float(slope @ expected) == pytest.approx(float(gap), rel=1e-9, abs=1e-15)
    assert 10 < reached < 60  # both kinds were there: planes that the box reaches, and others


@each_norm
def test_no_point_of_the_box_and_the_plane_is_nearer(norm: Norm) -> None:
    """Points that were found otherwise: random ones, moved onto the plane along a random coordinate or two."""
    generator = torch.Generator().manual_seed(0)
    points, slopes, gaps = _cases(3, samples=40)
    moves = move_to_hyperplane(points, slopes, gaps, norm)
    order = torch.inf if norm == "Linf" else 2
    compared = 0
    for point, slope, gap, move in zip(points, slopes, gaps, moves, strict=True):
        others = torch.rand(3000, 3, generator=generator, dtype=torch.float64)
        for i in range(3):
            if slope[i] == 0:
                continue
            on_plane = others.clone()
            on_plane[:, i] += (gap - (others - point) @ slope) / slope[i]
            inside = on_plane[((on_plane >= 0) & (on_plane <= 1)).all(1)]
            lengths = torch.linalg.vector_norm(inside - point, ord=order, dim=1)
            assert bool((lengths >= torch.linalg.vector_norm(move, ord=order) * (1 - 1e-9)).all())
            compared += len(lengths)
    assert compared > 10_000


@each_norm
@each_dtype
def test_slopes_of_any_size_give_the_same_moves(norm: Norm, dtype: torch.dtype) -> None:
    """Powers of two, by which division is exact."""
    points, slopes, gaps = (tensor.to(dtype) for tensor in _cases(17))
    slopes = torch.where(slopes.abs() > 1e-4, slopes, 0)
    expected = move_to_hyperplane(points, slopes, gaps, norm)
    for factor in (2.0**-100, 2.0**60):
        moves = move_to_hyperplane(points, slopes * factor, gaps * factor, norm)
        torch.testing.assert_close(moves, expected, rtol=1e-5, atol=1e-7)


@each_norm
def test_tiny_slopes_count_where_the_others_have_no_room(norm: Norm) -> None:
    points = torch.tensor([[1.0, 0.5, 0.5, 0.25]])
    slopes = torch.tensor([[1.0, 1e-30, 0.0, -1e-30]])
    moves = move_to_hyperplane(points, slopes, torch.tensor([4e-31]), norm)
    torch.testing.assert_close(moves, torch.tensor([[0.0, 0.2, 0.0, -0.2]]))


@each_norm
def test_a_plane_out_of_reach_is_approached(norm: Norm) -> None:
    points = torch.tensor([[0.25, 0.5, 0.5, 1.0]]).expand(4, -1)
    slopes = torch.tensor([[2.0, -1e-20, 0.0, 1.0]]).expand(4, -1)
    gaps = torch.tensor([100.0, -100.0, torch.inf, -torch.inf])
    moves = move_to_hyperplane(points, slopes, gaps, norm)
    towards, away = [0.75, -0.5, 0.0, 0.0], [-0.25, 0.5, 0.0, -1.0]
    assert moves.tolist() == [towards, away, towards, away]


@each_norm
def test_no_gap_and_no_slope_are_no_move(norm: Norm) -> None:
    points, slopes, gaps = _cases(5)
    assert not move_to_hyperplane(points, slopes, torch.zeros_like(gaps), norm).any()
    assert not move_to_hyperplane(points, torch.zeros_like(slopes), gaps, norm).any()
    assert move_to_hyperplane(points[:0], slopes[:0], gaps[:0], norm).shape == (0, 5)


@each_norm
def test_slopes_are_broadcast_over_points(norm: Norm) -> None:
    points, slopes, gaps = _cases(7)
    both = move_to_hyperplane(torch.stack([points, 1 - points]), slopes, torch.stack([gaps, -gaps]), norm)
    torch.testing.assert_close(both[0], move_to_hyperplane(points, slopes, gaps, norm))
    torch.testing.assert_close(both[1], move_to_hyperplane(1 - points, slopes, -gaps, norm))


@each_norm
def test_breakpoints_at_every_scale_are_passed(norm: Norm) -> None:
    """Rooms and slopes in powers of 4: Newton's method meets many of the breaks, one after the other."""
    scales = 4.0 ** -torch.arange(20, dtype=torch.float64)
    points, slopes = 1 - scales[None], (1 / scales)[None].sqrt()
    for share in (0.1, 0.5, 0.9, 0.999):
        gaps = share * (slopes * scales).sum(1)
        moves = move_to_hyperplane(points, slopes, gaps, norm)
        assert float((slopes * moves).sum()) == pytest.approx(float(gaps), rel=1e-9)
