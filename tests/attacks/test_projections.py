"""The balls: no rounding leads out of them, and nothing of them is given away. Fractions judge, which are exact."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from immunity_fast.attacks import pgd
from immunity_fast.attacks.projections import linf_bounds, project_l2, random_start

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
RADII = [0.0, 1 / 255, 8 / 255, 0.5, 2.0]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_radius = pytest.mark.parametrize("eps", RADII)
each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])
seeded = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def _neighbours(values: Tensor) -> Tensor:
    """Each value, the next number below it and the next above, where those are in [0, 1]."""
    ends = [torch.nextafter(values, torch.full_like(values, end)) for end in (0, 1)]
    return torch.cat([values, *ends])


def _extreme(dtype: torch.dtype) -> Tensor:
    """0, 1, denormals, what is hard to add 1/255 to, and all their neighbours, as (B, 3, 1, 1)."""
    info = torch.finfo(dtype)
    values = [0.0, 1.0, 0.5, 0.25, info.smallest_normal, info.smallest_normal / 2, info.eps, 1 - info.eps]
    for eps in RADII[1:3]:
        values += [eps, 1 - eps, 2 * eps, 0.5 - eps, 0.5 + eps]
    found = _neighbours(torch.tensor(values, dtype=torch.float64).to(dtype))
    assert (found[found > 0] < info.smallest_normal).any()
    return torch.cat([found, found.new_tensor([-0.0] * (-len(found) % 3))]).view(-1, 3, 1, 1)


def _images(dtype: torch.dtype, samples: int = 5) -> Tensor:
    """Random, with some pixels at the ends of the box."""
    images = torch.rand(samples, 3, 7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (1.2 * images - 0.1).clamp(0, 1).to(dtype)


def _moves(images: Tensor) -> Tensor:
    """Of every length from 1e-6 to 1e3, along random directions, (B, …) in float64."""
    move = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    lengths = torch.logspace(-6, 3, len(images), dtype=torch.float64)
    return move / move.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * lengths.view(-1, 1, 1, 1)


def _assert_in_box(adversarial: Tensor, images: Tensor) -> None:
    assert adversarial.dtype == images.dtype
    assert adversarial.shape == images.shape
    assert not adversarial.requires_grad
    assert bool(((adversarial >= 0) & (adversarial <= 1)).all())


def _assert_in_linf(adversarial: Tensor, images: Tensor, eps: float) -> None:
    _assert_in_box(adversarial, images)
    assert bool(((adversarial.double() - images.double()).abs() <= eps).all())


def _assert_in_l2(adversarial: Tensor, images: Tensor, eps: float) -> None:
    """The sum of squares of exact differences: no rounding of the judge's own."""
    _assert_in_box(adversarial, images)
    for image, other in zip(images.flatten(1).tolist(), adversarial.flatten(1).tolist(), strict=True):
        squares = sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(image, other, strict=True))
        assert squares <= Fraction(eps) ** 2


# Linf


@each_dtype
@each_radius
@pytest.mark.parametrize("images", [_images, _extreme])
def test_linf_bounds_are_in_the_ball_and_in_the_box(images: Any, dtype: torch.dtype, eps: float) -> None:
    x = images(dtype)
    low, high = linf_bounds(x, eps)
    for bound in (low, high):
        _assert_in_linf(bound, x, eps)
    assert bool((low <= x).all())
    assert bool((x <= high).all())
    if eps == 0:
        assert torch.equal(low, x)
        assert torch.equal(high, x)


@each_dtype
@each_radius
@pytest.mark.parametrize("images", [_images, _extreme])
def test_the_next_number_past_a_linf_bound_is_outside(images: Any, dtype: torch.dtype, eps: float) -> None:
    x = images(dtype)
    low, high = linf_bounds(x, eps)
    below = torch.nextafter(low, torch.full_like(low, -1))
    above = torch.nextafter(high, torch.full_like(high, 2))
    # In float64 the judge rounds as well: a difference that rounds to eps is neither here nor there.
    slack = 4e-16 if dtype == torch.float64 else 0
    assert bool(((below < 0) | (x.double() - below.double() > eps - slack)).all())
    assert bool(((above > 1) | (above.double() - x.double() > eps - slack)).all())


@seeded
@given(
    image=st.floats(0, 1, width=16) | st.floats(0, 1, width=32) | st.floats(0, 1),
    eps=st.sampled_from(RADII) | st.floats(0, 2) | st.floats(0, 1, width=32),
    dtype=st.sampled_from(DTYPES[1:]),
)
def test_linf_bounds_of_any_number_and_radius_are_the_exact_ones(image: float, eps: float, dtype: torch.dtype) -> None:
    x = torch.tensor([[[[image]]]], dtype=torch.float64).to(dtype)
    exact, radius = Fraction(x.item()), Fraction(eps)
    for bound, outward in zip(linf_bounds(x, eps), (-1.0, 2.0), strict=True):
        assert 0 <= bound.item() <= 1
        assert abs(Fraction(bound.item()) - exact) <= radius
        beyond = torch.nextafter(bound, torch.full_like(bound, outward)).item()
        assert not 0 <= beyond <= 1 or abs(Fraction(beyond) - exact) > radius


def test_clamping_to_linf_bounds_is_the_nearest_image() -> None:
    x = _images(torch.float64)
    adversarial = x + _moves(x)
    low, high = linf_bounds(x, 0.1)
    tensors = (x, adversarial, adversarial.clamp(low, high))
    for image, other, nearest in zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True):
        assert nearest == pytest.approx(min(max(other, image - 0.1, 0), image + 0.1, 1), abs=1e-15)


# L2


@each_dtype
@each_radius
@pytest.mark.parametrize("images", [_images, _extreme])
def test_l2_projections_are_in_the_ball_and_in_the_box(images: Any, dtype: torch.dtype, eps: float) -> None:
    x = images(dtype)
    moves = _moves(x)
    for sign in (-1, 1):
        projected = project_l2((x.double() + sign * moves).to(dtype), x, eps)
        _assert_in_l2(projected, x, eps)
        if eps == 0:
            assert torch.equal(projected, x)


@each_dtype
def test_l2_projections_along_one_pixel_are_in_the_ball(dtype: torch.dtype) -> None:
    """Where the rounding of one number is that of the whole length."""
    x = _extreme(dtype)
    for eps in RADII:
        for sign in (-3, 3):
            moved = x.clone()
            moved[:, 1] += sign
            _assert_in_l2(project_l2(moved, x, eps), x, eps)


@each_dtype
@each_radius
def test_l2_projections_are_the_reference_to_rounding(dtype: torch.dtype, eps: float) -> None:
    x = _images(dtype)
    adversarial = (x.double() + _moves(x)).to(dtype)
    actual = project_l2(adversarial, x, eps)
    for image, other, found in zip(x.double(), adversarial.double(), actual, strict=True):
        length = math.sqrt(sum(float(v) ** 2 for v in (other - image).flatten()))
        factor = min(1.0, eps / length) if length else 1.0
        expected = (image + factor * (other - image)).clamp(0, 1)
        # Rounded to the nearest, and where that is too far, one further in.
        ulp = torch.finfo(dtype).eps * expected.clamp_min(torch.finfo(dtype).smallest_normal)
        assert bool(((found.double() - expected).abs() <= ulp + 2e-12 * eps + 1e-15).all())


@each_dtype
def test_an_image_inside_the_l2_ball_stays_where_it_is(dtype: torch.dtype) -> None:
    x = _images(dtype)
    inside = (x.double() + 0.04 * torch.sign(_moves(x)) / math.sqrt(105)).clamp(0, 1).to(dtype)
    assert torch.equal(project_l2(inside, x, 0.1), inside)
    assert torch.equal(project_l2(x, x, 0.1), x)


@seeded
@given(
    pixels=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=5),
    move=st.lists(st.floats(-3, 3, width=32), min_size=5, max_size=5),
    eps=st.sampled_from(RADII) | st.floats(1e-3, 2),
    dtype=st.sampled_from(DTYPES),
)
def test_l2_projections_of_anything_are_in_the_ball(
    pixels: list[float], move: list[float], eps: float, dtype: torch.dtype
) -> None:
    x = torch.tensor(pixels, dtype=torch.float64).to(dtype).view(1, -1, 1, 1)
    other = x + torch.tensor(move[: len(pixels)], dtype=torch.float64).to(dtype).view(x.shape)
    _assert_in_l2(project_l2(other, x, eps), x, eps)


def test_the_smallest_l2_balls_are_kept() -> None:
    x = torch.full((1, 1, 1, 1), 0.75)
    eps = math.nextafter(2**-24, 0)  # all but one step of a float32 pixel
    _assert_in_l2(project_l2(x + 0.1, x, eps), x, eps)


# Random starts


@each_norm
@each_dtype
def test_random_starts_are_as_far_as_they_should_be(norm: Any, dtype: torch.dtype) -> None:
    """Uniform in the cube; in the ball a uniform radius. Of 400 images, so that a quarter of them is 100 ± 30."""
    x = torch.full((400, 3, 7, 5), 0.5, dtype=dtype)
    start = random_start(x, 0.25, norm, torch.Generator().manual_seed(3))
    assert start.dtype == dtype
    move = (start.double() - x.double()).flatten(1) / 0.25
    distance = move[:, 7] if norm == "Linf" else move.norm(dim=1) * 2 - 1
    assert float(distance.abs().max()) <= 1 + 8 * torch.finfo(dtype).eps
    for quarter in range(4):
        count = int(((distance >= quarter / 2 - 1) & (distance < quarter / 2 - 0.5)).sum())
        assert 70 <= count <= 130
    assert bool((move.mean(0).abs() < 0.2).all())


@each_norm
def test_a_generator_is_all_that_a_random_start_draws_from(norm: Any) -> None:
    def start(seed: int) -> Tensor:
        return random_start(_images(torch.float32), 0.1, norm, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    assert torch.equal(torch.get_rng_state(), before)


# All of it, in an attack


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 0.5])
@each_dtype
def test_a_whole_attack_stays_in_the_ball(norm: Any, eps: float, dtype: torch.dtype) -> None:
    """The model in the images' format, too; every iterate that it is shown is inside, not only the last."""
    weight = torch.randn(105, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    x, labels = _images(dtype), torch.arange(5) % 4
    shown: list[Tensor] = []

    def model(images: Tensor) -> Tensor:
        shown.append(images.detach())
        return images.flatten(1) @ weight

    adversarial = pgd(model, x, labels, eps=eps, alpha=eps / 2, steps=4, norm=norm)
    assert len(shown) == 4
    for images in (*shown, adversarial):
        (_assert_in_linf if norm == "Linf" else _assert_in_l2)(images, x, eps)
    assert not torch.equal(adversarial, x)
