"""The plain-PyTorch kernels: hand formulas of the derivatives, known values, and the edges of each formula."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from immunity_fast.kernels import reference
from tests.kernels.cases import normal
from tests.oracle import assert_matches

_normal = functools.partial(normal, dtype=torch.float64, device="cpu")


def _distributions(*shape: int, seed: int = 0) -> Tensor:
    return _normal(*shape, seed=seed).flatten(2).softmax(-1).view(shape)


def _one_hot(height: int, width: int, *cells: tuple[int, int]) -> Tensor:
    """(N, 1, height, width), expert i all on cell i."""
    maps = torch.zeros(len(cells), 1, height, width, dtype=torch.float64)
    for i, cell in enumerate(cells):
        maps[i, 0][cell] = 1
    return maps


@pytest.mark.parametrize(("weight_scale", "divisor"), [("channels", 4), ("spatial", 6)])
def test_channel_weights_sum_over_space_and_scale_as_named(weight_scale: str, divisor: int) -> None:
    gradients = _normal(3, 2, 4, 2, 3)
    assert_matches(reference.channel_weights(gradients, weight_scale), gradients.sum(4).sum(3) / divisor)


def test_heatmaps_are_sampled_at_pixel_centres() -> None:
    scores = torch.tensor([[1.0, 3.0]], dtype=torch.float64)[None, None]
    expected = torch.tensor([[1.0, 1.5, 2.5, 3.0]], dtype=torch.float64)[None, None]
    assert torch.equal(reference.heatmaps(scores, (1, 4)), expected)


def test_heatmaps_rectify_before_they_resample() -> None:
    scores = torch.tensor([[-1.0, 3.0]], dtype=torch.float64)[None, None]
    expected = torch.tensor([[0.0, 0.75, 2.25, 3.0]], dtype=torch.float64)[None, None]
    assert torch.equal(reference.heatmaps(scores, (1, 4)), expected)


@pytest.mark.parametrize("size", [None, (3, 5)])
def test_heatmaps_of_their_own_size_are_the_rectified_scores(size: tuple[int, int] | None) -> None:
    scores = _normal(2, 2, 3, 5)
    assert torch.equal(reference.heatmaps(scores, size), scores.clamp(min=0))


@pytest.mark.parametrize("size", [None, (3, 7)])
def test_heatmaps_of_an_empty_batch_stay_in_the_graph(size: tuple[int, int] | None) -> None:
    scores = torch.zeros(2, 0, 3, 5, requires_grad=True)
    maps = reference.heatmaps(scores, size)
    maps.sum().backward()
    assert maps.shape == (2, 0, *(size or (3, 5)))
    assert scores.grad is not None
    assert scores.grad.shape == scores.shape


@pytest.mark.parametrize("smoothing", [0.0, 1e-4, 0.01, 1.0])
@pytest.mark.parametrize("size", [None, (9, 4), (2, 3)])
def test_distributions_are_positive_and_sum_to_one(smoothing: float, size: tuple[int, int] | None) -> None:
    p = reference.distributions(_normal(3, 4, 5, 4, 6), _normal(3, 4, 5, seed=1), size, smoothing)
    assert (p >= 0).all() if smoothing == 0 else (p > 0).all()
    assert_matches(p.sum((-2, -1)), torch.ones(3, 4, dtype=torch.float64), 1e-14)


def test_smoothing_is_relative_to_the_mean_magnitude_of_scores() -> None:
    activations = torch.tensor([[2.0, -4.0, 0.0, 6.0]], dtype=torch.float64)[None, None, None]
    p = reference.distributions(activations, torch.ones(1, 1, 1, dtype=torch.float64), None, 0.5)
    mean = 0.5 * (2 + 4 + 0 + 6) / 4
    expected = torch.tensor([[2 + mean, mean, mean, 6 + mean]], dtype=torch.float64) / (8 + 4 * mean)
    assert_matches(p[0, 0], expected, 1e-15)


@pytest.mark.parametrize("scale", [1e-200, 1e-3, 7.0, 1e100])
def test_distributions_do_not_see_the_scale_of_either_input(scale: float) -> None:
    activations, weights = _normal(2, 2, 3, 4, 4), _normal(2, 2, 3, seed=1)
    expected = reference.distributions(activations, weights, (6, 6), 0.01)
    assert_matches(reference.distributions(activations * scale, weights, (6, 6), 0.01), expected, 1e-14)
    assert_matches(reference.distributions(activations, weights * scale, (6, 6), 0.01), expected, 1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.01])
def test_gradient_is_orthogonal_to_a_scale_free_input(smoothing: float) -> None:
    """Euler: p(cA) = p(A) for c > 0 means Σ A ∂f/∂A = 0 for each expert and sample; the same for w."""
    activations, weights = _normal(2, 3, 4, 5, 5).requires_grad_(), _normal(2, 3, 4, seed=1).requires_grad_()
    p = reference.distributions(activations, weights, (7, 7), smoothing)
    loss = (p * _normal(*p.shape, seed=2)).sum()
    grad_activations, grad_weights = torch.autograd.grad(loss, (activations, weights))
    assert float((grad_activations * activations).sum((-3, -2, -1)).detach().abs().max()) < 1e-14
    assert float((grad_weights * weights).sum(-1).detach().abs().max()) < 1e-14


def test_mutual_information_gradient_is_minus_log_share() -> None:
    """∂MI/∂p_i = −log(p_i / Σ_j p_j)."""
    p = _distributions(4, 3, 5, 6).requires_grad_()
    upstream = _normal(3, seed=1)
    (gradient,) = torch.autograd.grad(reference.mutual_information_loss(p), p, upstream)
    assert_matches(gradient, -(p / p.sum(0)).log().detach() * upstream[:, None, None], 1e-13)


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_mutual_information_of_identical_maps_is_its_maximum(experts: int) -> None:
    p = _distributions(1, 4, 5, 6).expand(experts, -1, -1, -1)
    expected = torch.full((4,), experts * math.log(experts), dtype=torch.float64)
    assert_matches(reference.mutual_information_loss(p), expected, 1e-14)


def test_mutual_information_of_disjoint_maps_is_zero() -> None:
    assert float(reference.mutual_information_loss(_one_hot(3, 4, (0, 0), (2, 3), (1, 1)))) == 0


def test_mutual_information_of_two_of_three_on_one_cell() -> None:
    loss = reference.mutual_information_loss(_one_hot(3, 4, (0, 0), (0, 0), (1, 1)))
    assert float(loss) == pytest.approx(2 * math.log(2), rel=1e-15)


def test_mutual_information_lies_between_zero_and_n_log_n() -> None:
    loss = reference.mutual_information_loss(_distributions(5, 50, 4, 4) ** 3)
    scaled = reference.mutual_information_loss(_distributions(5, 50, 4, 4))
    assert (loss > 0).all()
    assert (scaled > 0).all()
    assert (scaled < 5 * math.log(5)).all()


def test_empty_pixels_give_finite_gradients_or_none() -> None:
    """Finite ones where an expert leaves a pixel empty, none where all do."""
    p = _one_hot(2, 2, (0, 0), (1, 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(reference.mutual_information_loss(p).sum(), p)
    assert gradient.isfinite().all()
    assert not gradient[..., 0, 1].any()
    assert not gradient[..., 1, 0].any()


def test_empty_pixels_do_not_reach_the_activations() -> None:
    """Disjoint one-hot maps without smoothing: each distribution is constant near this point."""
    activations = _one_hot(2, 2, (0, 0), (1, 1))[:, :, None].requires_grad_()
    weights = torch.ones(2, 1, 1, dtype=torch.float64, requires_grad=True)
    p = reference.distributions(activations, weights, None, 0.0)
    for gradient in torch.autograd.grad(reference.mutual_information_loss(p).sum(), (activations, weights)):
        assert not gradient.any()


def test_centre_is_counted_from_zero_row_first() -> None:
    centres = reference.centres(_one_hot(5, 9, (4, 2), (0, 8)))
    assert centres.tolist() == [[[4, 2]], [[0, 8]]]


def test_centre_of_a_uniform_map_is_the_images() -> None:
    centres = reference.centres(torch.full((1, 1, 5, 8), 1 / 40, dtype=torch.float64))
    assert_matches(centres, torch.tensor([[[2.0, 3.5]]], dtype=torch.float64), 1e-15)


def test_position_stability_by_hand() -> None:
    """Two experts, squared distances 25 and 1: deviations ±12, over both ordered pairs."""
    centres = torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[3.0, 4.0], [1.0, 2.0]]], dtype=torch.float64)
    assert float(reference.position_stability(centres)) == 2 * (12**2 + 12**2)


def test_position_stability_gradient_is_twice_the_deviation() -> None:
    """∂PS/∂d²_qij = 2(d²_qij − mean), and ∂d²_qij/∂centre_qi = 2(centre_qi − centre_qj), over ordered pairs."""
    centres = (10 * _normal(4, 5, 2)).requires_grad_()
    (gradient,) = torch.autograd.grad(3 * reference.position_stability(centres), centres)
    expected = torch.zeros_like(centres)
    for i in range(4):
        for j in range(4):
            if i == j:
                continue
            offsets = (centres[i] - centres[j]).detach()
            squared = offsets.square().sum(-1)
            contribution = (2 * (squared - squared.mean()))[:, None] * 2 * offsets
            expected[i] += 3 * contribution
            expected[j] -= 3 * contribution
    assert_matches(gradient, expected, 1e-13)


@pytest.mark.parametrize("samples", [0, 1])
def test_position_stability_of_no_or_one_sample_is_zero(samples: int) -> None:
    assert float(reference.position_stability(_normal(3, samples, 2))) == 0


def test_position_stability_does_not_see_a_samples_common_shift() -> None:
    centres = _normal(3, 4, 2)
    shifted = centres + _normal(1, 4, 2, seed=1)
    assert_matches(reference.position_stability(shifted), reference.position_stability(centres), 1e-12)


def test_log_mixture_where_every_term_underflows() -> None:
    log_probabilities = torch.tensor([[-1e4], [-1e4 - math.log(3)]], dtype=torch.float64)
    mixture = reference.log_mixture(log_probabilities, torch.full((2, 1), 0.5, dtype=torch.float64))
    assert float(mixture) == pytest.approx(-1e4 + math.log(0.5 * (1 + 1 / 3)), rel=1e-15)


def test_log_mixture_of_a_shut_gate_is_that_of_the_others() -> None:
    log_probabilities = torch.tensor([[-3.0], [-2.0]], dtype=torch.float64)
    assert float(reference.log_mixture(log_probabilities, torch.tensor([[1.0], [0.0]]))) == -3


def test_log_mixture_gradient_of_a_shut_gate_is_its_share() -> None:
    """∂/∂g_i log Σ_j g_j e^{l_j} = e^{l_i} / Σ_j g_j e^{l_j}, also at g_i = 0."""
    log_probabilities = _normal(3, 4).log_softmax(0).requires_grad_()
    gate = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 1.0, 0.0, 0.25], [1.0, 0.0, 0.0, 0.25]], dtype=torch.float64)
    gate.requires_grad_()
    grad_gate, grad_terms = torch.autograd.grad(
        reference.log_mixture(log_probabilities, gate).sum(), (gate, log_probabilities)
    )
    share = log_probabilities.exp() / (gate * log_probabilities.exp()).sum(0)
    assert_matches(grad_gate, share.detach(), 1e-14)
    assert_matches(grad_terms, (gate * share).detach(), 1e-14)


def test_log_mixture_is_finite_where_the_shut_expert_is_likelier() -> None:
    log_probabilities = torch.tensor([[-1e4], [0.0]]).requires_grad_()
    gate = torch.tensor([[1.0], [0.0]]).requires_grad_()
    mixture = reference.log_mixture(log_probabilities, gate)
    grad_gate, grad_terms = torch.autograd.grad(mixture.sum(), (gate, log_probabilities))
    assert mixture.tolist() == [-1e4]
    assert grad_gate.isfinite().all()
    assert grad_terms.tolist() == [[1.0], [0.0]]


def test_log_mixture_gradient_of_a_nearly_shut_gate_is_right() -> None:
    gate = torch.tensor([[1.0], [1e-30]], requires_grad=True)
    mixture = reference.log_mixture(torch.tensor([[-2.0], [-1.0]]), gate)
    (gradient,) = torch.autograd.grad(mixture.sum(), gate)
    assert gradient.flatten().tolist() == pytest.approx([1, math.e], rel=1e-5)


def test_second_derivatives_are_those_of_finite_differences() -> None:
    activations, weights = (
        _normal(2, 2, 2, 3, 2).exp().requires_grad_(),
        _normal(2, 2, 2, seed=1).exp().requires_grad_(),
    )

    def losses(activations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        p = reference.distributions(activations, weights, (4, 3), 0.01)
        return reference.mutual_information_loss(p), reference.position_stability(reference.centres(p))

    assert torch.autograd.gradcheck(losses, (activations, weights))
    assert torch.autograd.gradgradcheck(losses, (activations, weights))
