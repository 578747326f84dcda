"""In which mode a model is attacked, what of it moves, and how it is left: in its modes, with its statistics."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast.attacks import Attack as Settings
from immunity_fast.attacks import BoundAttack, MovedStatisticsWarning, autoattack, square
from immunity_fast.attacks.modes import held_modules
from tests import attacked_models
from tests.attacked_models import ATTACKS, Attack, small_images, small_labels

seeded = attacked_models.seeded


def _all_attacks() -> dict[str, Attack]:
    others = {
        "autoattack": partial(autoattack, num_classes=5, steps=2, queries=5, eps=0.1),
        "square": partial(square, queries=5, eps=0.1),
    }
    return ATTACKS | others


NAMES = ("fgsm", "bim", "mim", "pgd", "autoattack", "square")
each = pytest.mark.parametrize("name", NAMES)


@cache
def _network() -> nn.Sequential:
    """With all that behaves otherwise in training mode; a part is in another mode than the whole."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5)
    )
    with torch.no_grad():
        for _ in range(3):
            model(small_images(dtype=torch.float32) ** 2)
    model[2].eval()
    return model


def _fresh() -> nn.Sequential:
    return copy.deepcopy(_network())


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [part.training for part in model.modules()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def _assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = _state(model)
    assert after["modes"] == before["modes"]
    assert after["requires_grad"] == before["requires_grad"]
    torch.testing.assert_close(after["tensors"], before["tensors"], rtol=0, atol=0)
    for now, then in zip(after["gradients"], before["gradients"], strict=True):
        assert (now is None and then is None) or torch.equal(now, then)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "method": lambda model: model.forward,
    "partial": lambda model: partial(model),
    "container": lambda model: nn.Sequential(nn.Identity(), model),
}


@each
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_module_that_trains_is_attacked_in_evaluation_mode(name: str, wrapper: str) -> None:
    """What comes out is what its evaluation mode gives; and it is left as it was, its generators, too."""
    attack, images, labels = _all_attacks()[name], small_images(dtype=torch.float32), small_labels()
    model, evaluating = _fresh(), _fresh().eval()
    torch.manual_seed(3)
    expected = attack(evaluating, images, labels)
    after = torch.rand(())
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    before = _state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(3)
        actual = attack(WRAPPERS[wrapper](model), images, labels)
    assert torch.equal(actual, expected)
    assert torch.equal(torch.rand(()), after)
    _assert_same(model, before)


@each
def test_modes_are_put_back_after_an_error(name: str) -> None:
    model = _fresh()
    model.append(nn.Module())  # which has no forward
    before = _state(model)
    with pytest.raises(NotImplementedError):
        _all_attacks()[name](model, small_images(dtype=torch.float32), small_labels())
    _assert_same(model, before)


def test_modules_are_asked_in_evaluation_mode() -> None:
    model, seen = _fresh(), list[bool]()
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    for attack in _all_attacks().values():
        attack(model, small_images(dtype=torch.float32), small_labels())
    assert seen
    assert not any(seen)


class _Holder:
    def __init__(self, model: nn.Module) -> None:
        self.parts = {"first": [model]}

    def __call__(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.parts["first"][0](images)
        return outputs

    def asked(self, images: Tensor) -> Tensor:
        return self(images)


def _functions(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    def inner(images: Tensor, module: nn.Module) -> Tensor:
        outputs: Tensor = module(images)
        return outputs

    return {
        "enclosed": lambda x: model(x),
        "default": lambda x, module=model: module(x),
        "partial": partial(inner, module=model),
        "object": _Holder(model),
        "bound": _Holder(model).asked,
        "nested": lambda x: _Holder.__call__(_Holder(model), x),
    }


@pytest.mark.parametrize("kind", list(_functions(nn.Identity())))
def test_of_a_function_moved_statistics_are_said(kind: str) -> None:
    images, labels = small_images(dtype=torch.float32), small_labels()
    model = _fresh()
    function = _functions(model)[kind]
    assert held_modules(function) == [model]
    with pytest.warns(MovedStatisticsWarning, match="has moved the statistics of a BatchNorm2d in training mode"):
        ATTACKS["bim"](function, images, labels)
    assert [part.training for part in model.modules()] == [part.training for part in _network().modules()]
    assert not torch.equal(model[1].running_mean, _network()[1].running_mean)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ATTACKS["bim"](_functions(_fresh().eval())[kind], images, labels)


def test_a_function_that_moves_nothing_says_nothing() -> None:
    """A module in training mode without statistics; and one that is not the function's."""
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 8, 5))
    _fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ATTACKS["bim"](lambda x: plain(x), small_images(dtype=torch.float32), small_labels())
    assert plain.training


def test_a_bound_attack_leaves_modes_to_its_caller() -> None:
    """Training on adversarial images has its own way; see `training.adversarial`."""
    model, seen = _fresh(), list[bool]()
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    BoundAttack(Settings(steps=2), lambda x, _: model(x))(small_images(dtype=torch.float32), small_labels())
    assert seen == [True, True]


def test_settings_attack_as_their_functions_do() -> None:
    model = _fresh()
    before = _state(model)
    Settings(steps=2)(model, small_images(dtype=torch.float32), small_labels())
    _assert_same(model, before)


def test_an_exported_module_has_no_mode() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 9 * 8, 5)).eval()
    exported = torch.export.export(network, (small_images(dtype=torch.float32),)).module()
    images, labels = small_images(dtype=torch.float32), small_labels()
    assert torch.equal(ATTACKS["bim"](exported, images, labels), ATTACKS["bim"](network, images, labels))
