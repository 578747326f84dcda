"""What attacks are tried on: a trained mixture, a small smooth network, and what there is to ask of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.attacks import bim, fgsm, mim, pgd
from tests.graphs import captured

Attack = Callable[..., Tensor]
Call = tuple[Any, ...]
EPS = 8 / 255


# Few steps, for speed; and the same where the result must not depend on chance.
ATTACKS: dict[str, Attack] = {name: partial(f, steps=3) for name, f in (("bim", bim), ("mim", mim), ("pgd", pgd))}
ATTACKS["fgsm"] = fgsm


each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@cache
def trained_mixture() -> ImmunityMoE:
    """A few steps of training, so that gradients are those of a model that has learnt something."""
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 3, 4, image_size=12)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        loss = F.nll_loss(model(trained_images()), trained_labels())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(4)


def trained_images(samples: int = 8) -> Tensor:
    """Some pixels are 0 and 1, where the box cuts the ball."""
    images = torch.rand(samples, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return (1.2 * images - 0.1).clamp(0, 1)


def trained_labels(samples: int = 8) -> Tensor:
    return torch.randint(4, (samples,), generator=torch.Generator().manual_seed(2))


def assert_in_ball(adversarial: Tensor, images: Tensor, eps: float = EPS, slack: float = 0.0) -> None:
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert not adversarial.requires_grad
    assert float((adversarial.double() - images.double()).abs().max()) <= eps + slack
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1


@cache
def small_network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Smooth, of 5 classes, steep enough that steps of 1/255 change what it says of some images, and bent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5))
    with torch.no_grad():
        model[0].weight *= 5
        model[3].weight *= 4
    return model.to(dtype).eval()


def small_images(samples: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """Some pixels are 0 and 1."""
    images = torch.rand(samples, 3, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (1.2 * images - 0.1).clamp(0, 1).to(dtype)


def said_by(model: Attack, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(-1)


def small_labels(samples: int = 7, seed: int = 0) -> Tensor:
    """What the model says: but of the second image, which fools it from the start."""
    labels = said_by(small_network(seed), small_images(samples))
    labels[1:2] = (labels[1:2] + 1) % 5
    return labels


class Recorder:
    """A model that remembers what it was shown."""

    def __init__(self, model: Attack) -> None:
        self.model, self.shown = model, list[Tensor]()

    def __call__(self, images: Tensor) -> Tensor:
        self.shown.append(images.detach().clone())
        return self.model(images)

    @property
    def count(self) -> int:
        """Of images."""
        return sum(len(images) for images in self.shown)


SETTINGS: dict[str, dict[str, Any]] = {
    "Linf": {"eps": 6 / 255, "alpha": 1 / 255, "steps": 8},
    "Linf, momentum": {"eps": 6 / 255, "alpha": 1.5 / 255, "steps": 6, "decay": 0.7},
    "Linf, past the ball": {"eps": 0.04, "alpha": 0.07, "steps": 6, "loss": "cw"},
    "L2": {"eps": 0.35, "alpha": 0.06, "steps": 8, "norm": "L2", "loss": "dlr"},
    "L2, momentum": {"eps": 0.3, "alpha": 0.5, "steps": 5, "norm": "L2", "decay": 0.3},
}


each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])


def some_targets(targeted: bool) -> Tensor | None:
    """Of the third image, what it already is."""
    targets = (small_labels() + torch.tensor([1, 2, 0, 3, 4, 1, 2])) % 5
    return targets if targeted else None


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """(inputs, outputs) of each call of a compiled step, which is captured as it would be, but run by PyTorch's own
    kernels."""
    compile_ = captured()
    calls: list[Call] = []

    def quickly(function: Any, **options: Any) -> Any:
        compiled = compile_(function, **options)

        def call(*arguments: Any) -> Any:
            results = compiled(*arguments)
            calls.append((arguments, results))
            return results

        return call

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", quickly)
    yield calls
    torch.compiler.reset()


class Broken:
    """A model whose output for one image, known by its first pixel, is NaN (or else) from one call on."""

    def __init__(self, sample: int, since: int = 0, value: float = float("nan")) -> None:
        self.sample, self.since, self.value, self.calls = sample, since, value, 0

    def __call__(self, images: Tensor) -> Tensor:
        outputs = small_network()(images)
        sick = (images[:, 0, 0, 0] * 10).round() == self.sample
        if self.calls >= self.since:
            outputs = torch.where(sick[:, None] & (torch.arange(5) == 2), self.value, outputs)
        self.calls += 1
        return outputs


def marked_images() -> Tensor:
    """The first pixels are .0, .1, .2, …"""
    images = small_images()
    images[:, 0, 0, 0] = torch.arange(len(images)) / 10
    return images
