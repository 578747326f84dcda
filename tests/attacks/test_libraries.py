"""Outside libraries as their users call them, on `model.eval().deterministic()`: in the ball, and as strong as ours."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, SwitchingGateWarning
from immunity_fast.attacks import pgd

EPS, ALPHA, STEPS = 32 / 255, 8 / 255, 7


@cache
def _images() -> tuple[Tensor, Tensor]:
    """Four faint patterns, and noise; some pixels are 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(4, 3, 12, 12, generator=generator)
    labels = torch.randint(4, (64,), generator=generator)
    noise = torch.rand(64, 3, 12, 12, generator=generator)
    return (1.2 * (0.3 * patterns[labels] + 0.7 * noise) - 0.1).clamp(0, 1), labels


@cache
def _trained() -> ImmunityMoE:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 3, 4, image_size=12)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(25):
        optimiser.zero_grad()
        logits = model.expert_logits(_images()[0])
        sum(F.cross_entropy(each, _images()[1]) for each in logits).backward()  # type: ignore[union-attr]
        optimiser.step()
    optimiser.zero_grad()
    return model


@pytest.fixture
def model() -> Iterator[ImmunityMoE]:
    """In evaluation mode; a warning of its gate is an error, and afterwards all is as it was."""
    model = copy.deepcopy(_trained()).eval()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SwitchingGateWarning)
        yield model
    assert not any(part.training for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def _accuracy(model: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(-1) == _images()[1]).double().mean())


def _check(exact: nn.Module, adversarial: Tensor) -> None:
    """In the ball, and as strong as our own attack of as many steps."""
    images, labels = _images()
    assert float((adversarial.double() - images.double()).abs().max()) <= EPS + 1e-6
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1
    ours = pgd(exact, images, labels, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=False)
    clean, theirs, own = (_accuracy(exact, each) for each in (images, adversarial, ours))
    assert clean > 0.9
    assert own < clean - 0.3
    assert abs(theirs - own) <= 0.1


def test_torchattacks(model: ImmunityMoE) -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="a library that only tests use")
    exact = model.eval().deterministic()
    attack = torchattacks.PGD(exact, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=False)
    _check(exact, attack(*_images()))


def test_foolbox(model: ImmunityMoE) -> None:
    foolbox = pytest.importorskip("foolbox", reason="an outside library that the project does not need")
    exact = model.eval().deterministic()
    wrapped = foolbox.PyTorchModel(exact, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS, random_start=False)
    _, adversarial, _ = attack(wrapped, *_images(), epsilons=EPS)
    _check(exact, adversarial)


def test_art(model: ImmunityMoE) -> None:
    pytest.importorskip("art", reason="adversarial-robustness-toolbox, which the project does not need")
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    exact = model.eval().deterministic()
    classifier = PyTorchClassifier(
        exact, loss=nn.NLLLoss(), input_shape=(3, 12, 12), nb_classes=4, clip_values=(0, 1), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=ALPHA, max_iter=STEPS, num_random_init=0, batch_size=64, verbose=False
    )
    adversarial = attack.generate(_images()[0].numpy(), _images()[1].numpy())
    _check(exact, torch.from_numpy(adversarial))


def test_the_calls_that_robustbench_makes(model: ImmunityMoE) -> None:
    """`clean_accuracy`: batches in [0, 1] without gradients, of a model that somebody has put into evaluation mode."""
    exact, (images, labels) = model.deterministic(), _images()
    right = 0
    with torch.no_grad():
        for start in range(0, 64, 30):
            outputs = exact(images[start : start + 30].to(torch.device("cpu")))
            right += int((outputs.max(1)[1] == labels[start : start + 30]).sum())
    assert right / 64 == _accuracy(exact, images)
    assert right / 64 == _accuracy(exact, images)  # the same again: nothing is drawn


def test_robustbench(model: ImmunityMoE) -> None:
    try:
        utils = importlib.import_module("robustbench.utils")
    except ImportError as error:
        pytest.skip(f"robustbench cannot be imported here ({error})")
    exact = model.eval().deterministic()
    assert utils.clean_accuracy(exact, *_images(), batch_size=30) == pytest.approx(_accuracy(exact, _images()[0]))


def _attacked_by(library: str, model: nn.Module) -> None:
    """A short attack on the images, as the library's users write it."""
    module: Any = pytest.importorskip(library, reason="an outside library")
    images, labels = _images()
    if library == "torchattacks":
        module.PGD(model, steps=2)(images, labels)
    elif library == "foolbox":
        wrapped = module.PyTorchModel(model, bounds=(0, 1), device="cpu")
        module.attacks.LinfPGD(steps=2)(wrapped, images, labels, epsilons=EPS)
    else:
        from art.attacks.evasion import FastGradientMethod
        from art.estimators.classification import PyTorchClassifier

        classifier = PyTorchClassifier(
            model, loss=nn.NLLLoss(), input_shape=(3, 12, 12), nb_classes=4, clip_values=(0, 1), device_type="cpu"
        )
        FastGradientMethod(classifier, eps=EPS).generate(images.numpy(), labels.numpy())


@pytest.mark.parametrize("library", ["torchattacks", "foolbox", "art"])
def test_the_mixture_itself_is_warned_of(library: str) -> None:
    """Whose gate draws a permutation at each call."""
    model = copy.deepcopy(_trained()).eval()
    with pytest.warns(SwitchingGateWarning, match="attack model.deterministic"):
        _attacked_by(library, model)
