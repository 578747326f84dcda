"""The attacks: torchattacks' results, inside the ball, leaving the model as it was; and torchattacks on the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast import ImmunityMoE
from immunity_fast.attacks import bim, fgsm, mim, pgd
from immunity_fast.gate import Switch

Attack = Callable[..., Tensor]
EPS = 8 / 255

# Few steps, for speed; and the same where the result must not depend on chance.
ATTACKS: dict[str, Attack] = {name: partial(f, steps=3) for name, f in (("bim", bim), ("mim", mim), ("pgd", pgd))}
ATTACKS["fgsm"] = fgsm
FIXED = ATTACKS | {"pgd": partial(pgd, steps=3, random_start=False)}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
each_fixed_attack = pytest.mark.parametrize("attack", FIXED.values(), ids=FIXED)


@cache
def _trained() -> ImmunityMoE:
    """A few steps of training, so that gradients are those of a model that has learnt something."""
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 3, 4, image_size=12)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        loss = F.nll_loss(model(_images()), _labels())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(4)


def _model(switch: Switch = "mean", seed: int = 0) -> ImmunityMoE:
    model = copy.deepcopy(_trained())
    model.gate.switch = switch
    model.gate.generator = torch.Generator().manual_seed(seed)
    return model


def _images(samples: int = 8) -> Tensor:
    """Some pixels are 0 and 1, where the box cuts the ball."""
    images = torch.rand(samples, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return (1.2 * images - 0.1).clamp(0, 1)


def _labels(samples: int = 8) -> Tensor:
    return torch.randint(4, (samples,), generator=torch.Generator().manual_seed(2))


def _assert_in_ball(adversarial: Tensor, images: Tensor, eps: float = EPS) -> None:
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert not adversarial.requires_grad
    assert float((adversarial - images).abs().max()) <= eps + 1e-6
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1


def _loss(model: ImmunityMoE, images: Tensor) -> float:
    with torch.no_grad():
        return float(F.nll_loss(model(images), _labels(len(images))))


PARITY: list[tuple[str, dict[str, Any], Attack, dict[str, Any]]] = [
    ("FGSM", {}, fgsm, {}),
    ("BIM", {"steps": 4}, bim, {"steps": 4}),
    ("MIFGSM", {"steps": 4}, mim, {"steps": 4}),
    ("MIFGSM", {"steps": 4, "decay": 0.5}, mim, {"steps": 4, "decay": 0.5}),
    ("PGD", {"steps": 4, "random_start": False}, pgd, {"steps": 4, "random_start": False}),
    ("PGD", {"steps": 4, "random_start": True}, pgd, {"steps": 4, "random_start": True}),
]


@pytest.mark.parametrize(("name", "theirs", "ours", "options"), PARITY)
def test_results_are_torchattacks(name: str, theirs: dict[str, Any], ours: Attack, options: dict[str, Any]) -> None:
    """The random start included: both draw the same numbers from the same global generator.

    A step is the sign of a gradient. Where that is all but zero, the last bit of an image, or of a loss that is a mean
    here and a sum there, may decide it; such a pixel is off by a whole step, hence the thousandth that may differ.
    """
    torchattacks = pytest.importorskip("torchattacks")
    model, images, labels = _model(), _images(), _labels()
    torch.manual_seed(3)
    expected = getattr(torchattacks, name)(model, eps=EPS, **theirs)(images, labels)
    torch.manual_seed(3)
    actual = ours(model, images, labels, eps=EPS, **options)
    assert float(((actual - expected).abs() <= 1e-6).float().mean()) >= 0.999
    assert float((actual - images).abs().mean()) > EPS / 2


@pytest.mark.parametrize("switch", ["call", "sample"])
@pytest.mark.parametrize("name", ["FGSM", "PGD"])
def test_torchattacks_run_on_the_model_unchanged(name: str, switch: Switch) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model = _model(switch)
    before = copy.deepcopy(model.state_dict())
    adversarial = getattr(torchattacks, name)(model)(_images(), _labels())
    _assert_in_ball(adversarial, _images())
    assert _loss(_model(), adversarial) > _loss(_model(), _images())
    assert not model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@each_attack
@pytest.mark.parametrize("switch", ["call", "sample", "off", "mean"])
def test_results_are_in_the_ball_and_raise_the_loss(attack: Attack, switch: Switch) -> None:
    adversarial = attack(_model(switch), _images(), _labels())
    _assert_in_ball(adversarial, _images())
    assert _loss(_model(), adversarial) > _loss(_model(), _images()) + 0.04


@each_attack
@pytest.mark.parametrize("eps", [0.0, 1 / 255, 0.5, 2.0])
def test_any_radius_is_kept(attack: Attack, eps: float) -> None:
    _assert_in_ball(attack(_model(), _images(), _labels(), eps=eps), _images(), eps)


def test_a_single_step_of_bim_the_size_of_the_ball_is_fgsm() -> None:
    expected = fgsm(_model(), _images(), _labels(), eps=EPS)
    assert torch.equal(bim(_model(), _images(), _labels(), eps=EPS, alpha=EPS, steps=1), expected)
    assert torch.equal(mim(_model(), _images(), _labels(), eps=EPS, alpha=EPS, steps=1), expected)


def test_pgd_without_a_random_start_is_bim() -> None:
    expected = bim(_model(), _images(), _labels(), steps=3)
    assert torch.equal(pgd(_model(), _images(), _labels(), steps=3, random_start=False), expected)


def test_pgd_raises_the_loss_at_least_as_much_as_fgsm() -> None:
    model = _model()
    assert _loss(model, pgd(model, _images(), _labels(), steps=8)) >= _loss(model, fgsm(model, _images(), _labels()))


def test_pgd_starts_where_its_generator_says() -> None:
    def run(seed: int) -> Tensor:
        return pgd(_model(), _images(), _labels(), steps=0, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(torch.get_rng_state(), before)
    _assert_in_ball(run(0), _images())
    assert float((run(0) - _images()).abs().max()) > 0.9 * EPS


def test_a_step_does_not_depend_on_the_size_of_the_batch() -> None:
    together = bim(_model(), _images(), _labels(), steps=2)
    alone = torch.cat(
        [bim(_model(), _images()[i : i + 1], _labels()[i : i + 1], steps=2) for i in range(len(_images()))]
    )
    assert float(((together - alone).abs() <= 1e-6).float().mean()) >= 0.999


@each_attack
@pytest.mark.parametrize("switch", ["call", "mean"])
def test_the_model_and_the_images_are_left_as_they_were(attack: Attack, switch: Switch) -> None:
    model, images = _model(switch), _images().requires_grad_()
    twin = copy.deepcopy(model)
    attack(model, images, _labels())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert images.grad is None
    assert torch.equal(images, _images())
    assert [part.training for part in model.modules()] == [part.training for part in twin.modules()]
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


@each_attack
def test_gradients_already_there_are_kept(attack: Attack) -> None:
    model = _model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    attack(model, _images(), _labels())
    assert all(p.grad is not None and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


@each_fixed_attack
def test_attacks_work_where_gradients_are_disabled(attack: Attack) -> None:
    expected = attack(_model(), _images(), _labels())
    with torch.no_grad():
        actual = attack(_model(), _images(), _labels())
    assert torch.equal(actual, expected)


@each_attack
def test_attacks_work_on_frozen_models_and_plain_functions(attack: Attack) -> None:
    _assert_in_ball(attack(_model().requires_grad_(False), _images(), _labels()), _images())
    _assert_in_ball(attack(lambda x: x.flatten(1)[:, :4], _images(), _labels()), _images())


@each_fixed_attack
def test_a_gradient_of_zero_moves_nothing(attack: Attack) -> None:
    """torchattacks' MIFGSM divides it by its own mean and returns NaN."""
    assert torch.equal(attack(lambda x: 0 * x.flatten(1)[:, :4], _images(), _labels()), _images())


@each_attack
def test_an_empty_batch_gives_an_empty_result(attack: Attack) -> None:
    assert attack(_model(), _images(0), _labels(0)).shape == (0, 3, 12, 12)


@pytest.mark.parametrize("name", ["bim", "mim", "pgd"])
def test_no_steps_give_detached_images(name: str) -> None:
    adversarial = FIXED[name](_model(), _images().requires_grad_(), _labels(), steps=0)
    assert torch.equal(adversarial, _images())
    assert not adversarial.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_are_welcome(dtype: torch.dtype) -> None:
    assert torch.equal(fgsm(_model(), _images(), _labels().to(dtype)), fgsm(_model(), _images(), _labels()))


@each_attack
@pytest.mark.parametrize("model", [lambda x: _trained()(x).detach(), lambda x: _trained()(0 * x.detach())])
def test_a_model_without_a_gradient_for_the_images_is_an_error(attack: Attack, model: Any) -> None:
    with pytest.raises(ValueError, match="model: its output has no gradient with respect to the images"):
        attack(model, _images(), _labels())


WRONG: list[tuple[str, tuple[Any, Any], dict[str, Any], str]] = [
    ("images exceed 1", (_images() + 0.5, _labels()), {}, r"images: .*\[0, 1\].* to 1\.5"),
    ("images are negative", (_images() - 0.5, _labels()), {}, r"images: .*\[0, 1\].*-0\.5"),
    ("images are not numbers", (_images() * float("nan"), _labels()), {}, r"images: .*\[0, 1\].*nan"),
    ("images are bytes", (_images().byte(), _labels()), {}, r"images: .*torch\.uint8"),
    ("images lack the batch", (_images()[0], _labels()[:1]), {}, r"images: .*\(3, 12, 12\)"),
    ("labels are too few", (_images(), _labels()[:3]), {}, r"labels: .*\(8,\).*\(3,\)"),
    ("labels are one-hot", (_images(), F.one_hot(_labels())), {}, r"labels: .*\(8,\).*\(8, 4\)"),
    ("labels are fractions", (_images(), _labels().float()), {}, r"labels: .*integers.*torch\.float32"),
    ("eps is negative", (_images(), _labels()), {"eps": -0.1}, r"eps: .*-0\.1"),
    ("eps is not a number", (_images(), _labels()), {"eps": float("nan")}, "eps: .*nan"),
]


@pytest.mark.parametrize(("inputs", "options", "text"), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
@each_attack
def test_wrong_arguments_are_named(attack: Attack, inputs: tuple[Any, Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        attack(_model(), *inputs, **options)


@pytest.mark.parametrize("attack", [bim, mim, pgd])
@pytest.mark.parametrize("name", ["alpha", "steps"])
def test_negative_steps_are_named(attack: Attack, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*-1"):
        attack(_model(), _images(), _labels(), **{name: -1})
