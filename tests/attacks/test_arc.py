"""ARC: the optimum where it is known, never weaker than what follows a mean, exact balls, and what it leaves alone."""

from __future__ import annotations

import copy
import itertools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast.attacks import NotFiniteError, UnmovedWarning, pgd
from immunity_fast.attacks.arc import Arc, arc, every_member, expected_loss
from immunity_fast.attacks.members import MixtureMembers, NetworkMembers
from immunity_fast.attacks.mixtures import trained_gate
from immunity_fast.attacks.projections import outside
from immunity_fast.functional import log_mixture
from immunity_fast.permutations import shares_right
from tests.attacked_models import (
    Broken,
    marked_images,
    said_by,
    small_images,
    small_labels,
    small_network,
    trained_images,
    trained_labels,
    trained_mixture,
)

each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])


class _Linear(nn.Module):
    """Logits W (x − 1/2) + b, in float64."""

    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.matrix, self.offset = nn.Parameter(matrix.double()), nn.Parameter(offset.double())

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = (images.flatten(1) - 0.5) @ self.matrix.T + self.offset
        return logits


def _linear(count: int, classes: int, pixels: int, seed: int = 0) -> list[nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(count, classes, pixels, generator=generator, dtype=torch.float64)
    offsets = 0.15 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return [_Linear(matrix, offset) for matrix, offset in zip(matrices, offsets, strict=True)]


def _points(pixels: int, samples: int = 30) -> Tensor:
    """Images (samples, 1, 1, pixels), far enough from 0 and 1 for balls of up to 0.2."""
    points = torch.rand(samples, 1, 1, pixels, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return 0.2 + 0.6 * points


def _share(networks: Any, weights: list[float], images: Tensor, labels: Tensor) -> Tensor:
    """Σ a_i [f_i is right] by a loop, (B,) float64."""
    total = torch.zeros(len(images), dtype=torch.float64)
    with torch.no_grad():
        for network, weight in zip(networks, weights, strict=True):
            total += weight * (network(images).argmax(-1) == labels)
    return total / sum(weights)


def _lowest(networks: Any, weights: list[float], images: Tensor, labels: Tensor, eps: float, norm: str) -> Tensor:
    """The lowest share in each ball, (B,): by trying a fine grid and, in L2, many points of the sphere."""
    pixels = images.shape[-1]
    side = torch.linspace(-1, 1, {2: 81, 3: 31}[pixels], dtype=torch.float64)
    moves = torch.stack(torch.meshgrid(*[side] * pixels, indexing="ij"), -1).view(-1, pixels)
    if norm == "L2":
        moves = torch.cat([moves[moves.norm(dim=1) <= 1], F.normalize(moves)])
    found = torch.full((len(images),), 2.0, dtype=torch.float64)
    for i, image in enumerate(images):
        tried = image + eps * moves[:, None, None, :]
        found[i] = _share(networks, weights, tried, labels[i].expand(len(tried))).min()
    return found


LINEAR = [  # networks, classes, pixels, weights, images of 30 that may be missed
    (2, 2, 2, [0.5, 0.5], 1),
    (2, 3, 2, [0.5, 0.5], 1),
    (2, 2, 3, [0.3, 0.7], 1),
    (3, 3, 3, [0.5, 0.3, 0.2], 3),
    (3, 2, 2, [1.0, 1.0, 1.0], 3),
]


@each_norm
@pytest.mark.parametrize(("count", "classes", "pixels", "weights", "missed"), LINEAR)
def test_the_optimum_of_linear_networks_is_reached(
    count: int, classes: int, pixels: int, weights: list[float], missed: int, norm: Any
) -> None:
    """Which members can be wrong at once is tried point by point; what follows their mean loss finds less."""
    networks, images, eps = _linear(count, classes, pixels), _points(pixels), 0.15
    labels = said_by(networks[0], images)
    best = _lowest(networks, weights, images, labels, 0.99 * eps, norm)
    found = arc(networks, images, labels, weights=weights, eps=eps, norm=norm, local_eps=eps)
    reached = _share(networks, weights, found, labels)
    assert int((reached > best + 1e-9).sum()) <= missed
    assert float(reached.mean()) <= float(best.mean()) + 0.02
    weak = pgd(
        every_member(networks, weights), images, labels, eps=eps, norm=norm, alpha=eps / 4, steps=20, loss=expected_loss
    )
    assert float(reached.mean()) <= float(_share(networks, weights, weak, labels).mean())
    assert not bool(outside(found, images, eps, norm).any())


def test_opposite_gradients_do_not_stop_it() -> None:
    """What follows the mean loss stands still between two members; one of them can be fooled."""
    matrix = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    offset = torch.tensor([0.0, -0.2])
    networks = [_Linear(matrix, offset), _Linear(-matrix, offset)]
    images, labels = torch.full((2, 1, 1, 2), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    with pytest.warns(UnmovedWarning):
        weak = pgd(every_member(networks), images, labels, eps=0.1, random_start=False, loss=expected_loss)
    assert _share(networks, [1, 1], weak, labels).tolist() == [1, 1]
    for norm in ("Linf", "L2"):
        found = arc(networks, images, labels, eps=0.1, norm=norm, local_eps=0.1)
        assert _share(networks, [1, 1], found, labels).tolist() == [0.5, 0.5]


def test_weights_say_who_is_worth_more() -> None:
    """Of two members that cannot be fooled at once, the one that answers more often is."""
    matrix = torch.tensor([[0.0, 0.0], [2.0, -1.0]])
    networks = [_Linear(matrix, torch.tensor([0.0, -0.2])), _Linear(-matrix, torch.tensor([0.0, -0.2]))]
    images, labels = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    for weights, expected in (([3, 1], [False, True]), ([1, 3], [True, False]), ([0, 2], [True, False])):
        found = arc(networks, images, labels, weights=weights, eps=0.1)
        assert [bool((network(found).argmax(-1) == labels)[0]) for network in networks] == expected


# Trained networks and mixtures


class _Gate(nn.Module):
    """Of somebody else; the weights are the same for all images."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.switch = "call"
        self.weights = torch.tensor([0.5, 0.3] + [0.2 / (count - 2)] * (count - 2), dtype=torch.float64)

    def switched(self, switch: str) -> AbstractContextManager[None]:
        return nullcontext()


class _Mixture(nn.Module):
    """Of small networks."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.gate, self.count = _Gate(count), count

    def expert_logits(self, images: Tensor) -> Tensor:
        return torch.stack([small_network(seed)(images) for seed in range(self.count)])

    def gate_weights(self, images: Tensor) -> Tensor:
        return self.gate.weights.expand(len(images), -1)

    def mean(self, images: Tensor) -> Tensor:
        return log_mixture(self.expert_logits(images))


def _gate_share(images: Tensor, labels: Tensor, model: Any = None) -> Tensor:
    model = model or _Mixture()
    with torch.no_grad():
        return shares_right(model.expert_logits(images), trained_gate(model, images), labels)


def _case() -> tuple[Tensor, Tensor]:
    """Images that the mixture's mean is right about."""
    images = small_images(16)
    return images, said_by(_Mixture().mean, images)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 4 / 255), ("L2", 0.15)])
def test_on_a_gate_it_is_no_weaker_than_what_follows_a_mean(norm: Any, eps: float) -> None:
    images, labels = _case()
    settings: dict[str, Any] = {"eps": eps, "norm": norm, "alpha": eps / 4, "steps": 20}
    mean = pgd(_Mixture().mean, images, labels, **settings)
    summed = pgd(every_member(_Mixture()), images, labels, **settings, loss=expected_loss)
    found = arc(_Mixture(), images, labels, eps=eps, norm=norm)
    share = float(_gate_share(found, labels).mean())
    assert share < float(_gate_share(images, labels).mean()) - 0.05
    assert share <= min(float(_gate_share(other, labels).mean()) for other in (mean, summed))


def test_on_a_trained_mixture_it_is_no_weaker() -> None:
    model, images, eps = trained_mixture(), trained_images(), 8 / 255
    labels = said_by(model.deterministic(), images)
    mean = pgd(model.deterministic(), images, labels, eps=eps, alpha=eps / 4, steps=10)
    found = arc(model, images, labels, eps=eps, steps=3, members=3)
    share, of_mean, clean = (float(_gate_share(z, labels, model).mean()) for z in (found, mean, images))
    assert share <= of_mean
    assert share < clean - 0.05


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 3 / 255), ("L2", 0.15)])
def test_on_networks_it_is_no_weaker_than_their_mean_loss(norm: Any, eps: float) -> None:
    networks, weights = [small_network(seed) for seed in range(3)], [0.5, 0.3, 0.2]
    images = small_images(24)
    labels = said_by(networks[0], images)
    weak = pgd(
        every_member(networks, weights), images, labels, eps=eps, norm=norm, alpha=eps / 4, steps=20, loss=expected_loss
    )
    found = arc(networks, images, labels, weights=weights, eps=eps, norm=norm)
    share = float(_share(networks, weights, found, labels).mean())
    assert share <= float(_share(networks, weights, weak, labels).mean())
    assert share < float(_share(networks, weights, images, labels).mean()) - 0.05


class _Permuted(nn.Module):
    """The mixture by one order of its gate's weights."""

    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = list(order)

    def forward(self, images: Tensor) -> Tensor:
        model = _Mixture()
        return log_mixture(model.expert_logits(images), model.gate_weights(images)[:, self.order])


def test_permutations_are_attacked_like_a_list_of_them() -> None:
    images, labels = _case()
    networks = [_Permuted(order) for order in itertools.permutations(range(3))]
    found = arc(_Mixture(), images, labels, eps=4 / 255, steps=8)
    listed = arc(networks, images, labels, eps=4 / 255, steps=8)
    share, of_list = (_share(networks, [1] * 6, adversarial, labels) for adversarial in (found, listed))
    torch.testing.assert_close(share, _gate_share(found, labels))
    assert abs(float(share.mean() - of_list.mean())) < 0.04
    few = arc(_Mixture(), images, labels, eps=4 / 255, steps=8, members=2)
    assert float(_gate_share(few, labels).mean()) < float(_gate_share(images, labels).mean()) - 0.05


def test_a_mixture_s_switch_does_not_matter() -> None:
    images, labels = trained_images(4), trained_labels(4)
    model = copy.deepcopy(trained_mixture())
    expected = arc(model, images, labels, steps=1, members=1)
    for switch in ("off", "mean", "sample"):
        model.gate.switch = switch
        assert torch.equal(arc(model, images, labels, steps=1, members=1), expected)
    assert torch.equal(arc(model.deterministic(), images, labels, steps=1, members=1), expected)
    members = MixtureMembers(model)
    assert torch.equal(Arc(steps=1, members=1).attack_members(members, images, labels, permuted=True), expected)


# What it returns


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@each_norm
def test_results_are_in_the_ball_exactly(dtype: torch.dtype, norm: Any) -> None:
    networks = [lambda x, s=seed: small_network(s)(x.double()).to(dtype) for seed in range(2)]
    images, eps = small_images(dtype=dtype), 0.05 if norm == "Linf" else 0.3
    found = arc(networks, images, small_labels(), eps=eps, norm=norm, steps=4, random_start=True, restarts=2)
    assert found.dtype == dtype
    assert found.shape == images.shape
    assert not found.requires_grad
    assert not torch.equal(found, images)
    assert not bool(outside(found, images, eps, norm).any())
    assert bool(((found >= 0) & (found <= 1)).all())


def _networks() -> list[nn.Module]:
    return [small_network(0), small_network(1)]


def test_what_nobody_is_right_about_or_can_move_stays() -> None:
    """The second image fools the first network, and with no weight on the other nothing is left to do."""
    images, labels = small_images(), small_labels()
    found = arc(_networks(), images, labels, weights=[1, 0], eps=0.05)
    assert torch.equal(found[1], images[1])
    assert not torch.equal(found[0], images[0])
    for settings in ({"eps": 0.0}, {"steps": 0}):
        same = arc(_networks(), images, labels, **settings)
        assert torch.equal(same, images)
        assert same.data_ptr() != images.data_ptr()


@each_norm
def test_no_result_is_worse_than_the_image(norm: Any) -> None:
    images, labels = small_images(24), said_by(small_network(1), small_images(24))
    before = _share(_networks(), [1, 1], images, labels)
    each: list[dict[str, Any]] = [{}, {"random_start": True, "steps": 0}, {"random_start": True, "steps": 2}]
    for settings in each:
        found = arc(_networks(), images, labels, eps=0.02, norm=norm, **settings)
        after = _share(_networks(), [1, 1], found, labels)
        assert bool((after <= before).all())
        moved = (found != images).flatten(1).any(1)
        assert torch.equal(moved, after < before)


def test_more_restarts_are_no_weaker() -> None:
    images, labels = small_images(24), said_by(small_network(1), small_images(24))
    settings: dict[str, Any] = {"eps": 0.02, "steps": 2, "random_start": True}
    shares = [
        _share(_networks(), [1, 1], arc(_networks(), images, labels, restarts=n, **settings), labels) for n in (1, 3)
    ]
    assert bool((shares[1] <= shares[0]).all())


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@each_norm
def test_gradients_of_any_size_are_followed(scale: float, norm: Any) -> None:
    images, labels = small_images(dtype=torch.float32), small_labels()
    networks = [small_network(seed, torch.float32) for seed in range(2)]
    scaled = [lambda x, n=network: n(x) * scale for network in networks]
    settings: dict[str, Any] = {"eps": 0.03 if norm == "Linf" else 0.3, "norm": norm, "steps": 5}
    expected, found = arc(networks, images, labels, **settings), arc(scaled, images, labels, **settings)
    shares = [_share(networks, [1, 1], z, labels) for z in (images, expected, found)]
    assert float(shares[1].mean()) < float(shares[0].mean())
    assert torch.equal(shares[1], shares[2])


def test_radii_may_be_of_each_image_or_several() -> None:
    images, labels = small_images(), small_labels()
    radii = torch.tensor([0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
    found = arc(_networks(), images, labels, eps=radii, local_eps=radii / 2, steps=4)
    for i, radius in enumerate(radii.double().tolist()):
        alone = arc(_networks(), images[i : i + 1], labels[i : i + 1], eps=radius, local_eps=radius / 2, steps=4)
        torch.testing.assert_close(found[i : i + 1], alone)
    several = arc(_networks(), images, labels, eps=[0.02, 0.05], random_start=True)
    assert isinstance(several, list)
    assert torch.equal(several[1], arc(_networks(), images, labels, eps=0.05, random_start=True))


def test_bounds_and_preprocessing_move_the_box() -> None:
    images, labels = small_images(), small_labels()
    expected = arc(_networks(), images, labels, eps=0.03)
    twice = arc(_networks(), 2 * images - 1, labels, eps=0.06, bounds=(-1, 1), preprocessing={"mean": -1.0, "std": 2.0})
    torch.testing.assert_close(twice, 2 * expected - 1)
    assert Arc(bounds=(-1, 1)).eps == 16 / 255


# What it leaves alone


def test_chance_is_its_own() -> None:
    images, labels = _case()
    state, generator = torch.get_rng_state(), torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"steps": 2, "members": 2, "random_start": True}
    found = arc(_Mixture(), images, labels, **settings)
    assert torch.equal(found, arc(_Mixture(), images, labels, **settings))
    assert torch.equal(found, arc(_Mixture(), images, labels, generator=generator, **settings))
    other = torch.Generator().manual_seed(1)
    assert not torch.equal(found, arc(_Mixture(), images, labels, generator=other, **settings))
    assert torch.equal(torch.get_rng_state(), state)


def test_models_and_images_are_left_as_they_were() -> None:
    model = copy.deepcopy(trained_mixture()).train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    images = trained_images().requires_grad_()
    expected = arc(trained_mixture(), trained_images(), trained_labels(), steps=1)
    found = arc(model, images, trained_labels(), steps=1)
    assert not found.requires_grad
    assert torch.equal(found, expected)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(part.training for part in model.modules())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())
    assert images.grad is None
    assert torch.equal(images, trained_images())


def test_it_works_without_gradients_and_without_images() -> None:
    images, labels = small_images(), small_labels()
    expected = arc(_networks(), images, labels, steps=3)
    with torch.no_grad():
        assert torch.equal(arc(nn.ModuleList(_networks()), images, labels.int(), steps=3), expected)
    assert arc(_networks(), images[:0], labels[:0]).shape == (0, *images.shape[1:])
    assert arc(trained_mixture(), trained_images(0), trained_labels(0)).shape == (0, 3, 12, 12)


def test_more_than_eight_experts_are_walked_over() -> None:
    """The permutations are then a sample."""
    model, images = _Mixture(9), small_images()
    labels = said_by(model.mean, images)
    found = arc(model, images, labels, eps=0.03, steps=2, members=3)
    before, after = (_gate_share(shown, labels, model) for shown in (images, found))
    assert float(after.mean()) < float(before.mean())
    assert bool((after <= before).all())
    assert every_member(model)(images).shape == (7, 5)


# What it refuses


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "a network alone",
        {"model": small_network()},
        "model: expected a mixture of experts or a list of networks, got S",
    ),
    ("nothing", {"model": []}, "model: expected at least one network"),
    ("weights of a mixture", {"model": trained_mixture, "weights": [1, 1, 1]}, "weights: expected None of a mixture"),
    ("too few weights", {"weights": [1]}, "weights: expected one of each network"),
    ("eps", {"eps": -0.1}, "eps: .*-0.1"),
    ("eps of too few", {"eps": torch.ones(3)}, r"eps: expected a number, or one of each image \(7,\)"),
    ("local eps", {"local_eps": -0.1}, "local_eps: .*-0.1"),
    ("steps", {"steps": -1}, "steps: .*-1"),
    ("restarts", {"restarts": 0}, "restarts: .*0"),
    ("classes", {"classes": 0}, "classes: expected at least 1, got 0"),
    ("members", {"members": 0}, "members: expected at least 1, got 0"),
    ("norm", {"norm": "L1"}, "norm: expected one of Linf, L2, got 'L1'"),
    ("bounds", {"bounds": (1, 0)}, "bounds: "),
    ("images out of bounds", {"images": small_images() + 0.5}, "images: "),
    ("labels of another shape", {"labels": small_labels()[:3]}, "labels: "),
    ("labels out of range", {"labels": small_labels() + 5}, "labels: expected 0 to 4, got"),
    ("one class", {"model": [lambda x: x.flatten(1)[:, :1]], "labels": 0 * small_labels()}, "model: .*2 classes"),
    ("detached", {"model": [lambda x: small_network()(x).detach()]}, "model: expected outputs with a gradient"),
    ("other classes", {"model": [small_network(), lambda x: small_network()(x)[:, :3]]}, "model: expected 5 classes"),
]


@pytest.mark.parametrize(("changes", "text"), [pytest.param(*case[1:], id=case[0]) for case in REFUSED])
def test_wrong_arguments_are_named(changes: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"model": _networks(), "images": small_images(), "labels": small_labels()} | changes
    if given["model"] is trained_mixture:
        given |= {"model": trained_mixture(), "images": trained_images(7), "labels": trained_labels(7)}
    with pytest.raises(ValueError, match=text):
        arc(given.pop("model"), given.pop("images"), given.pop("labels"), **given)


@pytest.mark.parametrize("since", [0, 3])
def test_outputs_that_are_no_numbers_are_an_error(since: int) -> None:
    with pytest.raises(NotFiniteError, match="image 4"):
        arc([Broken(4, since), small_network(1)], marked_images(), small_labels(), eps=0.03, steps=3)


def test_probabilities_of_zero_are_no_error() -> None:
    """−∞ for a class that is never the answer: its boundary is not looked at."""

    def never(images: Tensor) -> Tensor:
        outputs = small_network()(images)
        found: Tensor = torch.where(torch.arange(5) == impossible, -torch.inf, outputs).log_softmax(-1)
        return found

    images = small_images()
    impossible = int(said_by(small_network(), images).mode().values)
    labels = said_by(never, images)
    found = arc([never, small_network(1)], images, labels, eps=0.05, classes=4)
    after, before = (_share([never, small_network(1)], [1, 1], z, labels).mean() for z in (found, images))
    assert float(after) < float(before)


def test_who_cannot_be_moved_is_said() -> None:
    def flat(images: Tensor) -> Tensor:
        found: Tensor = small_network()(images).round() + 0 * images.sum()
        return found

    with pytest.warns(UnmovedWarning, match="exactly zero for 7 of 7 images"):
        found = arc([flat], small_images(), said_by(flat, small_images()), steps=1)
    assert torch.equal(found, small_images())


# What it is compared with


def test_every_member_is_the_expected_loss_of_networks() -> None:
    """Against a sum of cross-entropies, and its gradient."""
    networks, weights = [small_network(seed) for seed in range(3)], [0.5, 0.2, 0.3]
    images, labels = small_images().requires_grad_(), small_labels()
    outputs = every_member(networks, [5, 2, 3])(images)
    expected = sum(
        w * F.cross_entropy(network(images), labels, reduction="none")
        for network, w in zip(networks, weights, strict=True)
    )
    assert isinstance(expected, Tensor)
    loss = expected_loss(outputs, labels)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(value.sum(), images)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    impossible = [small_network(), lambda x: small_network()(x).masked_fill(torch.arange(5) == 2, -torch.inf)]
    torch.testing.assert_close(every_member(impossible, [1, 0])(images), small_network()(images).log_softmax(-1))


def test_every_member_is_the_expected_loss_of_permutations() -> None:
    images, labels = small_images(), small_labels()
    losses = [F.nll_loss(_Permuted(o)(images), labels, reduction="none") for o in itertools.permutations(range(3))]
    found = expected_loss(every_member(_Mixture())(images), labels)
    torch.testing.assert_close(found, torch.stack(losses).mean(0))


def test_a_member_that_gives_no_class_a_probability_is_an_error() -> None:
    networks = [small_network(), lambda x: small_network()(x) - torch.inf]
    with pytest.raises(NotFiniteError, match="image 0"):
        arc(networks, small_images(), small_labels())


def test_every_member_is_attacked_in_evaluation_mode() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(216, 3)).double().train()
    before = copy.deepcopy(network.state_dict())
    pgd(every_member([network, network]), small_images(), small_labels() % 3, steps=2, loss=expected_loss)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert network.training
    with pytest.raises(ValueError, match="model: expected a mixture of experts or a list"):
        every_member(network)


def test_settings_are_kept_with_their_defaults() -> None:
    assert Arc().eps == 8 / 255
    assert Arc(norm="L2", bounds=(0, 255)).eps == 255.0
    networks = NetworkMembers(_networks())
    found = Arc(eps=0.03).attack_members(networks, small_images(), small_labels(), permuted=False)
    assert torch.equal(found, arc(_networks(), small_images(), small_labels(), eps=0.03))
