"""Witches' Brew: the matching loss beside a float64 computation with loops, its bounds, and what it leaves alone."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from immunity_fast.attacks.witches_brew import Networks, _moved, _moves, gradient_matching, rate_factor, witches_brew

CLASSES = 4
SHAPE = (2, 5, 7)


def _network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(0.5)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)).to(dtype)
    network.get_buffer("1.running_mean").normal_()
    return network.train()


def _images(count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(target image, bases, labels of class 2)."""
    drawn = torch.rand(count + 1, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(5))
    return drawn[0], drawn[1:], torch.full((count,), 2)


def _expected(networks: list[nn.Module], target: Tensor, images: Tensor, labels: Tensor) -> float:
    """The formula, an image and a parameter at a time."""
    total = 0.0
    for network in networks:
        network = copy.deepcopy(network).eval()

        def gradient(image: Tensor, label: int, of: nn.Module = network) -> Tensor:
            of.zero_grad()
            cross_entropy(of(image[None]), torch.tensor([label])).backward()
            return torch.cat([value.grad.flatten() for value in of.parameters() if value.grad is not None])

        wanted = gradient(target, 2)
        found = torch.zeros_like(wanted)
        for image, label in zip(images, labels.tolist(), strict=True):
            found += gradient(image, label)
        total += 1 - float(wanted @ found / (wanted.norm() * found.norm()))
    return total / len(networks)


@pytest.mark.parametrize(("members", "batch_size"), [(1, 512), (1, 2), (2, 512), (2, 1)])
def test_the_loss_and_its_gradient_are_the_formulas(members: int, batch_size: int) -> None:
    networks: list[nn.Module] = [_network(seed) for seed in range(members)]
    target, images, labels = _images()
    model: Networks = networks[0] if members == 1 else networks
    value, gradient = gradient_matching(model, target, 2, images, labels, batch_size=batch_size)
    torch.testing.assert_close(float(value), _expected(networks, target, images, labels), rtol=1e-10, atol=1e-12)
    for place in ((0, 0, 0, 0), (1, 1, 2, 3), (2, 0, 4, 6)):
        step = torch.zeros_like(images)
        step[place] = 1e-5
        ends = [_expected(networks, target, images + sign * step, labels) for sign in (1, -1)]
        torch.testing.assert_close(float(gradient[place]), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-9)


def test_a_loss_of_ones_own_is_matched_by_all_parameters() -> None:
    networks = [_network(0), _network(1)]
    target, images, labels = _images()
    both = nn.ModuleList(networks)

    def loss(batch: Tensor, classes: Tensor) -> Tensor:
        return cross_entropy(networks[0](batch), classes) + 2 * cross_entropy(networks[1](batch), classes)

    value, _ = gradient_matching(both, target, 2, images, labels, loss=loss)
    frozen = copy.deepcopy(networks)

    def gradient(batch: Tensor, classes: Tensor) -> Tensor:
        parts = []
        for weight, network in zip((1, 2), frozen, strict=True):
            network.eval().zero_grad()
            (weight * cross_entropy(network(batch), classes)).backward()
            parts += [value.grad.flatten() for value in network.parameters() if value.grad is not None]
        return torch.cat(parts)

    wanted, found = gradient(target[None], torch.tensor([2])), gradient(images, labels)
    torch.testing.assert_close(float(value), 1 - float(torch.cosine_similarity(wanted, found, dim=0)))


@pytest.mark.parametrize("augment", [False, True])
def test_poisons_match_better_and_stay_in_the_ball(augment: bool) -> None:
    network, (target, images, labels) = _network(dtype=torch.float32), _images(4, torch.float32)
    images[0], images[1] = 0, 1  # where the box cuts the ball
    given = images.clone()
    found = witches_brew(
        network, target, 2, images, labels, eps=0.1, steps=12, restarts=2, augment=augment, padding=1,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert not found.requires_grad
    assert torch.equal(images, given)
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found.double() - images.double()).abs().max() <= 0.1
    before = float(gradient_matching(network, target, 2, images, labels)[0])
    after = float(gradient_matching(network, target, 2, found, labels)[0])
    assert after < 0.8 * before


def test_the_best_restart_counts() -> None:
    network, (target, images, labels) = _network(dtype=torch.float32), _images(3, torch.float32)
    losses = []
    for restarts in (1, 2, 3, 4):
        generator = torch.Generator().manual_seed(3)
        settings: dict[str, Any] = {"steps": 2, "restarts": restarts, "padding": 1, "generator": generator}
        found = witches_brew(network, target, 2, images, labels, eps=0.2, **settings)
        losses.append(float(gradient_matching(network, target, 2, found, labels)[0]))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_batches_change_nothing_but_memory() -> None:
    network, (target, images, labels) = _network(), _images(5)
    found = [
        witches_brew(
            network, target, 2, images, labels, steps=5, restarts=1, padding=2, batch_size=size,
            generator=torch.Generator().manual_seed(0),
        )
        for size in (512, 2)
    ]  # fmt: skip
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_the_model_is_left_as_it_was() -> None:
    network, (target, images, labels) = _network(dtype=torch.float32), _images(2, torch.float32)
    network[0].weight.requires_grad_(False)
    network[6].weight.grad = torch.ones_like(network[6].weight)
    network[3].eval()
    before = copy.deepcopy(network.state_dict())
    calls = []
    with torch.no_grad():
        witches_brew(
            network, target, 2, images, labels, steps=2, restarts=2, padding=0, on_step=lambda: calls.append(1)
        )
    assert len(calls) == 4
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [part.training for part in network] == [True, True, True, False, True, True, True]
    assert not network[0].weight.requires_grad
    assert network[0].bias.requires_grad
    assert torch.equal(network[6].weight.grad, torch.ones_like(network[6].weight))
    assert all(value.grad is None for value in network[:6].parameters())


def test_images_are_moved_by_whole_pixels_and_mirrored() -> None:
    images = torch.arange(1.0, 1 + 40 * 70).view(40, *SHAPE)
    moves = _moves(images, 2, True, torch.Generator().manual_seed(0))
    seen = set()
    rows = slice(3, 40)
    for image, moved in zip(images[rows], _moved(images[rows], moves, rows, 2), strict=True):
        padded = torch.zeros(2, 9, 11)
        padded[:, 2:7, 2:9] = image
        fits = [
            (down, right, mirrored)
            for down, right, mirrored in itertools.product(range(5), range(5), (False, True))
            if torch.equal(moved, padded[:, down : down + 5, right : right + 7].flip(2 if mirrored else ()))
        ]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) > 15
    assert {mirrored for *_, mirrored in seen} == {False, True}
    still = _moves(images, 0, False, None)
    assert torch.equal(_moved(images, still, slice(0, 40), 0), images)


def test_the_step_falls_as_published() -> None:
    factors = [rate_factor(done, 250) for done in range(250)]
    falls = [done for done in range(1, 250) if factors[done] < factors[done - 1]]
    assert falls == [93, 156, 218]
    torch.testing.assert_close(factors[-1], 1e-3)
    assert rate_factor(0, 1) == rate_factor(0, 2) == 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"images": torch.rand(0, *SHAPE), "labels": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one"),
        ({"labels": torch.tensor([2, 1])}, ValueError, "labels: expected target_class 2, got 1 for image 1"),
        ({"target_class": 4, "labels": torch.tensor([4, 4])}, ValueError, "target_class: expected 0 to 3, got 4"),
        ({"target_class": -1}, ValueError, "target_class: expected at least 0"),
        ({"target_image": torch.rand(2, 5, 6)}, ValueError, "target_image: expected floating-point"),
        ({"target_image": [0.0]}, TypeError, "target_image: expected a tensor"),
        ({"images": torch.rand(2, *SHAPE) + 1}, ValueError, "images: expected values in"),
        ({"eps": 0}, ValueError, "eps: expected a number above 0"),
        ({"eps": 8}, ValueError, "eps: expected a number above 0 and at most 1, got 8"),
        ({"step": -1.0}, ValueError, "step: expected"),
        ({"steps": 0}, ValueError, "steps: expected at least 1"),
        ({"restarts": 0}, ValueError, "restarts: expected at least 1"),
        ({"model": []}, ValueError, "model: expected at least one network"),
        ({"model": nn.Flatten()}, ValueError, "model: expected networks with parameters"),
        ({"model": [len]}, TypeError, "model: expected modules"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_in_a_line(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    target, images, labels = _images(2, torch.float32)
    given: dict[str, Any] = {"model": _network(dtype=torch.float32), "target_image": target, "target_class": 2}
    given |= {"images": images, "labels": labels, "steps": 1, "restarts": 1} | changes
    with pytest.raises(error, match=words):
        witches_brew(**given)


def test_a_target_without_a_gradient_is_refused() -> None:
    network, (target, images, labels) = _network(dtype=torch.float32), _images(2, torch.float32)
    with torch.no_grad():
        network.get_parameter("6.weight").zero_()
        network.get_parameter("6.bias").copy_(torch.tensor([0.0, 0.0, 1e4, 0.0]))
    with pytest.raises(ValueError, match="target_image: expected a loss for target_class"):
        witches_brew(network, target, 2, images, labels, steps=1, restarts=1)
