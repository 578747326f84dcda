"""Compiled attacks: the results of the eager ones, in few sizes, and in eager where they cannot be compiled."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast import attacks
from immunity_fast.attacks import BoundAttack, bim
from immunity_fast.attacks.descent import compiled_size
from immunity_fast.runtime.compilation import Compile
from tests import attacked_models
from tests.attacked_models import SETTINGS, Call, Recorder, small_images, small_labels, small_network, some_targets
from tests.graphs import captured
from tests.oracle import assert_matches

seeded = attacked_models.seeded
called = attacked_models.called


def _both(attack: attacks.Attack, model: Any, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor, BoundAttack]:
    """Results compiled and eager, and what is compiled."""
    said: list[str] = []
    compiled = BoundAttack(attack, model, compile="on", log=said.append)
    found = []
    for bound in (compiled, BoundAttack(attack, model)):
        found.append(bound(*inputs, generator=torch.Generator().manual_seed(5), **options))
    assert said == []
    return found[0], found[1], compiled


@pytest.mark.parametrize(
    ("name", "targeted"), [("Linf, momentum", False), ("Linf, past the ball", True), ("L2, momentum", True)]
)
def test_a_compiled_attack_is_the_eager_one(called: list[Call], name: str, targeted: bool) -> None:
    """And leaves no gradients of parameters, nor makes what would have some."""
    model = small_network()
    before = copy.deepcopy(model.state_dict())
    inputs = (small_images(), small_labels(), some_targets(targeted))
    attack = attacks.Attack(**SETTINGS[name], random_start=True, keep_best=True)
    actual, expected, bound = _both(attack, lambda x, _: model(x), *inputs)
    assert_matches(actual, expected)
    assert bound.compiled
    assert len(called) == attack.steps
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    tensors = [tensor for call in called for part in call for tensor in part if isinstance(tensor, Tensor)]
    assert not any(tensor.requires_grad for tensor in (actual, *tensors))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_compiled_attack_on_labels_and_draws_is_the_eager_one(called: list[Call]) -> None:
    """A model that itself looks at the labels, of several outputs."""
    first, second = small_network(0), small_network(1)

    def model(images: Tensor, labels: Tensor) -> Tensor:
        own = labels[:, None] == torch.arange(5)  # not F.one_hot, which torch 2.11 does not compile
        shift = own * images.mean((1, 2, 3))[:, None]
        return torch.stack([first(images) + shift, second(images)])

    actual, expected, bound = _both(attacks.Attack(steps=3, loss="dlr"), model, small_images(), small_labels())
    assert_matches(actual, expected)
    assert bound.compiled
    assert len(called) == 3


def test_a_compiled_attack_is_called_with_few_sizes(called: list[Call]) -> None:
    """The images that are left, filled up to a half, a quarter or an eighth of the batch."""
    model, images, labels = small_network(), small_images(19), small_labels(19)
    options: dict[str, Any] = {"random_start": True, "restarts": 2, "drop_fooled": True, "decay": 1.0}
    attack = attacks.Attack(eps=0.1, alpha=0.01, steps=9, **options)
    reference = torch.softmax(model(images).detach(), -1)
    actual, expected, bound = _both(attack, lambda x, _: model(x), images, labels, reference=reference)
    assert_matches(actual, expected)
    assert bound.compiled
    left = Recorder(model)
    eager, generator = BoundAttack(attack, lambda x, _: left(x)), torch.Generator().manual_seed(5)
    eager(images, labels, generator=generator, reference=reference)
    assert len({len(shown) for shown in left.shown}) > 4
    sizes = [len(inputs[0]) for inputs, _ in called]
    assert set(sizes) == {19, 10, 5, 3}
    for inputs, outputs in called:
        assert {len(tensor) for tensor in (*inputs, *outputs) if isinstance(tensor, Tensor)} == {len(inputs[0])}


@pytest.mark.parametrize(("whole", "sizes"), [(1, {1}), (2, {1, 2}), (7, {1, 2, 4, 7}), (64, {8, 16, 32, 64})])
def test_what_is_left_fits_and_fills_more_than_half_of_its_size(whole: int, sizes: set[int]) -> None:
    found = {left: compiled_size(left, whole) for left in range(1, whole + 1)}
    assert set(found.values()) == sizes
    for left, size in found.items():
        assert left <= size
        assert size == min(sizes) or size <= 2 * left


def test_compiled_attacks_do_not_take_each_other_for_themselves(called: list[Call]) -> None:
    """They share the code of a step: other weights and other settings must not meet an earlier one's graph."""
    for seed, alpha in ((0, 0.01), (1, 0.01), (1, 0.02)):
        model = small_network(seed)
        bound = BoundAttack(
            attacks.Attack(eps=0.1, alpha=alpha, steps=3), lambda x, _, model=model: model(x), compile="on"
        )
        expected = bim(model, small_images(), small_labels(), eps=0.1, alpha=alpha, steps=3)
        assert_matches(bound(small_images(), small_labels()), expected)
        assert bound.compiled
    assert len(called) == 9


def test_any_number_of_sizes_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of two attacks that drop what is fooled, on whole batches and on a last one: four sizes each."""
    compile_, said = torch.compile, list[str]()
    torch.compiler.reset()
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile_(function, fullgraph=True, dynamic=False, backend="eager")
    )
    with torch._dynamo.config.patch(recompile_limit=2):
        bound = BoundAttack(attacks.Attack(steps=1), lambda x, _: x.flatten(1), compile="on", log=said.append)
        assert torch._dynamo.config.recompile_limit >= 16
        for samples in range(2, 6):
            bound(torch.rand(samples, 1, 1, 17), torch.arange(samples))
    assert said == []


def test_a_failure_to_compile_is_said_and_the_attack_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_function: Any, **_options: Any) -> Any:
        def call(*_arguments: Any) -> Any:
            raise RuntimeError("no compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    model, said = small_network(), list[str]()
    attack = attacks.Attack(steps=3, drop_fooled=True)
    bound = BoundAttack(attack, lambda x, _: model(x), compile="on", log=said.append)
    expected = attack(model, small_images(), small_labels())
    for _ in range(2):
        assert torch.equal(bound(small_images(), small_labels()), expected)
    assert said == ["compiling failed, going on in eager mode: RuntimeError: no compiler"]
    assert not bound.compiled
    with pytest.warns(UserWarning, match="compiling failed, going on in eager mode: RuntimeError: no compiler"):
        BoundAttack(attack, lambda x, _: model(x), compile="on")(small_images(), small_labels())


@pytest.mark.parametrize("name", ["apgd", "apgd, targeted", "autoattack"])
def test_compiled_looks_are_the_eager_ones(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In few sizes, without gradients of parameters."""
    compile_, sizes = captured(), set[int]()

    def quickly(function: Any, **options: Any) -> Any:
        compiled = compile_(function, **options)

        def call(*inputs: Tensor) -> Any:
            sizes.add(len(inputs[0]))
            return compiled(*inputs)

        return call

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", quickly)
    model, images, labels = small_network(), small_images(9), small_labels(9)

    def attack(compile: Compile) -> Tensor:
        if name == "autoattack":
            return attacks.autoattack(model, images, labels, num_classes=5, steps=4, queries=6, compile=compile)
        targets = (labels + 1) % 5 if "targeted" in name else None
        generator = torch.Generator().manual_seed(5)
        return attacks.apgd(model, images, labels, targets=targets, steps=8, generator=generator, compile=compile)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = attack("on")
    assert len(sizes) > 1 or "targeted" in name
    assert sizes <= {9, 5, 3, 2}
    assert_matches(actual, attack("off"))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    torch.compiler.reset()
