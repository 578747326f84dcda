"""Members as attacks on a mixture see them: what they say, how much they count, and in which mode they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.attacks.members import (
    MixtureMembers,
    NetworkMembers,
    all_attacked,
    mixture_in,
    networks_in,
)
from tests.attacked_models import small_images, small_network, trained_images, trained_mixture

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def _normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(numbers, dtype=images.dtype)[:, None, None] for numbers in (MEAN, STD))
    return (images - mean) / std


def test_networks_are_asked_all_or_one_alone() -> None:
    asked: list[int] = []

    def network(index: int) -> Any:
        def call(images: Tensor) -> Tensor:
            asked.append(index)
            found: Tensor = small_network(index)(images)
            return found

        return call

    members = NetworkMembers([network(i) for i in range(3)])
    expected = torch.stack([small_network(i)(small_images()) for i in range(3)])
    assert torch.equal(members.logits(small_images()), expected)
    assert asked == [0, 1, 2]
    assert torch.equal(members.one(2, small_images()), expected[2])
    assert asked == [0, 1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_of_networks_are_shares(dtype: torch.dtype) -> None:
    images = small_images(5, dtype)
    weights = NetworkMembers([small_network()] * 3, [1, 0, 2]).weights(images)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(weights, torch.tensor([1 / 3, 0, 2 / 3], dtype=torch.float64).to(weights).expand(5, 3))
    equal = NetworkMembers([small_network()] * 3).weights(images)
    assert torch.equal(equal, torch.full((5, 3), 1 / 3, dtype=torch.float64).to(equal))
    assert NetworkMembers([small_network()]).weights(images[:0]).shape == (0, 1)


def test_images_are_normalised_on_their_way() -> None:
    members = NetworkMembers([small_network(0), small_network(1)], None, {"mean": MEAN, "std": STD})
    expected = torch.stack([small_network(i)(_normalised(small_images())) for i in range(2)])
    torch.testing.assert_close(members.logits(small_images()), expected)
    torch.testing.assert_close(members.one(1, small_images()), expected[1])
    model = trained_mixture()
    mixed = MixtureMembers(model, preprocessing={"mean": MEAN, "std": STD})
    shown = _normalised(trained_images())
    torch.testing.assert_close(mixed.logits(trained_images()), model.expert_logits(shown))
    with model.gate.switched("off"):
        torch.testing.assert_close(mixed.weights(trained_images()), model.gate_weights(shown))


def test_experts_of_a_mixture_weigh_as_trained_or_alike() -> None:
    model = copy.deepcopy(trained_mixture())
    model.gate.switch = "sample"
    members, images = MixtureMembers(model), trained_images()
    assert torch.equal(members.logits(images), model.expert_logits(images))
    assert torch.equal(members.one(1, images), model.expert_logits(images)[1])
    state = torch.get_rng_state()
    weights = members.weights(images)
    assert torch.equal(MixtureMembers(model, "mean").weights(images), torch.full_like(weights, 1 / 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.gate.switch == "sample"
    with model.gate.switched("off"):
        assert torch.equal(weights, model.gate_weights(images))
    twice = MixtureMembers(model, "off", lambda x: 2 * model.expert_logits(x))
    assert torch.equal(twice.logits(images), 2 * members.logits(images))


WRONG: list[tuple[str, list[Any], Any, str]] = [
    ("none", [], None, "model: expected at least one network, got none"),
    ("too few weights", [abs, abs], [1.0], r"weights: expected one of each network \(2,\), got \(1,\)"),
    ("one number", [abs, abs], 0.5, r"weights: expected one of each network \(2,\), got \(\)"),
    ("negative", [abs, abs], [1.0, -1.0], "weights: expected finite numbers of at least 0"),
    ("all zero", [abs, abs], [0.0, 0.0], "weights: expected finite numbers of at least 0"),
    ("not a number", [abs, abs], [1.0, float("nan")], "weights: expected finite numbers"),
    ("infinite", [abs, abs], [1.0, float("inf")], "weights: expected finite numbers"),
]


@pytest.mark.parametrize(("networks", "weights", "text"), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
def test_wrong_networks_and_weights_are_named(networks: list[Any], weights: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        NetworkMembers(networks, weights)


def test_what_is_no_network_is_named() -> None:
    with pytest.raises(TypeError, match="model: expected networks that can be called, got str"):
        NetworkMembers([small_network(), "resnet8"])  # type: ignore[list-item]


@pytest.mark.parametrize("weights", ["ab", [1.0, "a"], {0: 1.0}], ids=str)
def test_weights_that_are_no_numbers_are_named(weights: Any) -> None:
    with pytest.raises(TypeError, match="weights: expected numbers, one of each"):
        NetworkMembers([abs, abs], weights)


def test_outputs_of_other_shapes_are_named() -> None:
    fewer = NetworkMembers([small_network(), lambda x: small_network()(x)[:, :3]])
    with pytest.raises(ValueError, match="model: expected 5 classes of network 1, got 3"):
        fewer.logits(small_images())
    for wrong in (lambda x: small_network()(x)[None], lambda x: small_network()(x)[0], lambda x: "label"):
        with pytest.raises(ValueError, match="model: expected"):
            NetworkMembers([wrong]).logits(small_images())  # type: ignore[list-item]


class _Around(nn.Module):
    """Does more with a mixture than to ask it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.model(images.round())
        return found


def test_a_mixture_is_found_where_nothing_else_is_done() -> None:
    model = trained_mixture()
    assert mixture_in(model) is model
    assert mixture_in(model.deterministic()) is model
    assert mixture_in(torch.compile(model)) is model
    assert mixture_in(torch.compile(model.deterministic())) is model
    for other in (_Around(model), small_network(), model.forward, [model], None, 3):
        assert mixture_in(other) is None


def test_networks_are_those_of_a_list() -> None:
    networks = [small_network(0), small_network(1)]
    for held in (networks, tuple(networks), nn.ModuleList(networks)):
        found = networks_in(held)
        assert found is not None
        assert [a is b for a, b in zip(found, networks, strict=True)] == [True, True]
    for other in (small_network(), nn.Sequential(*networks), trained_mixture(), abs, None):
        assert networks_in(other) is None


def test_all_members_are_in_evaluation_mode_for_a_while() -> None:
    first, second = copy.deepcopy(small_network(0)).train(), nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    second[1].eval()

    def modes() -> list[bool]:
        return [part.training for network in (first, second) for part in network.modules()]

    before = modes()
    for held in ([first, second, abs], nn.ModuleList([first, second])):
        with all_attacked(held):
            assert not any(modes())
        assert modes() == before
    with pytest.raises(KeyError), all_attacked([first, second]):
        raise KeyError
    assert modes() == before
    model = ImmunityMoE("resnet8", num_experts=2).train()
    with all_attacked(model.deterministic()):
        assert not any(part.training for part in model.modules())
    assert all(part.training for part in model.modules())
