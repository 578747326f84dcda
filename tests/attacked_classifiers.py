"""Classifiers that attacks are tried on, as strong as can be where that is known: one trained, and linear ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast.attacks.projections import Norm

CLASSES = 5
EPS: dict[Norm, float] = {"Linf": 16 / 255, "L2": 0.6}  # about half of the images withstand it
Model = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny operations: several threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def data(samples: int = 48) -> tuple[Tensor, Tensor]:
    """Four faint patches of colour for each class, and noise; some pixels are 0 and 1, where the box cuts the ball."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(CLASSES, 3, 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.randint(CLASSES, (48,), generator=generator)
    noise = torch.rand(48, 3, 8, 8, generator=generator)
    images = (1.2 * (0.2 * patterns[labels] + 0.8 * noise) - 0.1).clamp(0, 1)
    return images[:samples], labels[:samples]


@cache
def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(288, CLASSES)
    )
    images, labels = data()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(20):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval()


def classifier() -> nn.Sequential:
    return copy.deepcopy(trained())


def correct(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1) == labels


def assert_in_ball(adversarial: Tensor, images: Tensor, eps: float, norm: Norm = "Linf") -> None:
    """Exactly: the difference of two stored numbers, in float64."""
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert not adversarial.requires_grad
    move = (adversarial.double() - images.double()).flatten(1)
    assert float(move.abs().max() if norm == "Linf" else torch.linalg.vector_norm(move, dim=1).max()) <= eps
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1


def linear(classes: int = CLASSES, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A linear model, images far enough from the edge of the box, and the labels it gives them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, classes))
    images = 0.2 + 0.6 * torch.rand(40, 3, 6, 6)
    return model, images, model(images).argmax(1)


def distances(model: nn.Sequential, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """From each image to the nearest that a linear model takes for another class: min_m (z_y − z_m) / ‖w_y − w_m‖."""
    weight, bias = model[1].weight.double(), model[1].bias.double()
    found = []
    for image, label in zip(images.flatten(1).double(), labels, strict=True):
        others = [m for m in range(len(weight)) if m != label]
        gaps = [weight[label] @ image + bias[label] - weight[m] @ image - bias[m] for m in others]
        slopes = [torch.linalg.vector_norm(weight[label] - weight[m], ord=1 if norm == "Linf" else 2) for m in others]
        found.append(min(gap / slope for gap, slope in zip(gaps, slopes, strict=True)))
    return torch.stack(found).detach()
