"""The Random Switch Gate: what it permutes, when, and how uniformly."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast import RandomSwitchGate
from immunity_fast.models.gate import Switch

SWITCHES: list[Switch] = ["call", "sample", "off", "mean"]


def _gate(
    switch: Switch = "call", experts: int = 3, seed: int | None = 0, *, training: bool = False
) -> RandomSwitchGate:
    torch.manual_seed(0)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return RandomSwitchGate(experts, switch=switch, generator=generator).train(training)


def _images(samples: int = 6) -> Tensor:
    return torch.rand(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _orders(gate: RandomSwitchGate, images: Tensor) -> Tensor:
    """(B, N): which trained weight stands where."""
    trained = gate.network(images).softmax(-1)
    found = gate(images)
    orders = (found[:, :, None] == trained[:, None, :]).long()
    assert (orders.sum(-1) == 1).all()
    assert (orders.sum(-2) == 1).all()
    return orders.argmax(-1)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("samples", [0, 1, 6])
def test_rows_are_weights_that_sum_to_one(switch: Switch, training: bool, samples: int) -> None:
    weights = _gate(switch, 5, training=training)(_images(samples))
    assert weights.shape == (samples, 5)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(samples))


@pytest.mark.parametrize("switch", SWITCHES)
def test_training_mode_never_permutes(switch: Switch) -> None:
    gate = _gate(switch, training=True)
    trained = gate.network(_images()).softmax(-1)
    for _ in range(5):
        assert torch.equal(gate(_images()), trained)


def test_off_never_permutes() -> None:
    gate = _gate("off")
    for _ in range(5):
        assert torch.equal(gate(_images()), gate.network(_images()).softmax(-1))


def test_mean_is_one_nth_each() -> None:
    assert torch.equal(_gate("mean", 4)(_images()), torch.full((6, 4), 0.25))


def test_call_permutes_all_rows_alike() -> None:
    gate = _gate("call")
    for _ in range(5):
        orders = _orders(gate, _images())
        assert (orders == orders[0]).all()


def test_call_changes_from_call_to_call() -> None:
    gate = _gate("call")
    assert len({tuple(_orders(gate, _images(1))[0].tolist()) for _ in range(40)}) == 6


def test_sample_permutes_rows_each_in_its_own_way() -> None:
    assert len({tuple(order) for order in _orders(_gate("sample"), _images(40)).tolist()}) == 6


def _chi_square(orders: list[tuple[int, ...]]) -> float:
    expected = len(orders) / 6
    return sum((orders.count(order) - expected) ** 2 / expected for order in itertools.permutations(range(3)))


def test_sample_draws_all_permutations_equally_often() -> None:
    """χ² with 5 degrees of freedom exceeds 20.5 once in a thousand."""
    orders = [tuple(order) for order in _orders(_gate("sample"), _images(1).expand(3000, -1, -1, -1)).tolist()]
    assert _chi_square(orders) < 20.5


def test_call_draws_all_permutations_equally_often() -> None:
    gate = _gate("call")
    assert _chi_square([tuple(_orders(gate, _images(1))[0].tolist()) for _ in range(600)]) < 20.5


@pytest.mark.parametrize("switch", ["call", "sample"])
def test_a_seeded_generator_repeats_itself(switch: Switch) -> None:
    one, other = _gate(switch, seed=3), _gate(switch, seed=3)
    first = [one(_images()) for _ in range(4)]
    assert all(torch.equal(weights, other(_images())) for weights in first)
    third = _gate(switch, seed=4)
    assert not all(torch.equal(weights, third(_images())) for weights in first)


@pytest.mark.parametrize("switch", ["call", "sample"])
def test_a_generator_of_ones_own_leaves_the_global_one_alone(switch: Switch) -> None:
    gate = _gate(switch)
    before = torch.get_rng_state()
    gate(_images())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("switch", ["call", "sample"])
def test_without_a_generator_the_global_one_is_used(switch: Switch) -> None:
    gate = _gate(switch, seed=None)
    torch.manual_seed(5)
    first = [gate(_images()) for _ in range(4)]
    torch.manual_seed(5)
    assert all(torch.equal(weights, gate(_images())) for weights in first)


@pytest.mark.parametrize("switch", ["off", "mean"])
def test_nothing_random_draws_nothing(switch: Switch) -> None:
    gate = _gate(switch, seed=None)
    before = torch.get_rng_state()
    gate(_images())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_switch_may_be_turned_at_any_time() -> None:
    gate = _gate("call")
    gate.switch = "mean"
    assert gate.switch == "mean"
    assert torch.equal(gate(_images()), torch.full((6, 3), 1 / 3))


def test_gradients_flow_through_the_permutation() -> None:
    gate = _gate("sample")
    images = _images().requires_grad_()
    (gate(images) * torch.arange(3.0)).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gate.parameters())


def test_a_deep_copy_goes_on_alike_but_on_its_own() -> None:
    gate = _gate("sample", seed=7)
    gate(_images())
    twin = copy.deepcopy(gate)
    expected = [gate(_images()) for _ in range(3)]
    assert twin.generator is not gate.generator
    assert all(torch.equal(twin(_images()), weights) for weights in expected)


def test_the_generator_given_is_the_one_that_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    assert RandomSwitchGate(3, generator=generator).generator is generator


def test_the_state_is_the_networks_and_carries_over() -> None:
    gate = _gate("off")
    torch.manual_seed(1)
    other = RandomSwitchGate(3, switch="off").eval()
    assert not torch.equal(other(_images()), gate(_images()))
    assert all(name.startswith("network.") for name in gate.state_dict())
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(_images()), gate(_images()))


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype_sum_to_one_in_float32_or_better(switch: Switch, dtype: torch.dtype) -> None:
    """1/3 in bfloat16, three times, is 1.002."""
    weights = _gate(switch).to(dtype)(_images().to(dtype))
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(weights.sum(-1), torch.ones(6, dtype=weights.dtype))


@pytest.mark.parametrize("switch", ["Call", "", None, "random"])
def test_an_unknown_switch_is_named(switch: Any) -> None:
    with pytest.raises(ValueError, match=f"switch: .*call, sample, off, mean.*{switch!r}"):
        RandomSwitchGate(3, switch=switch)
    gate = RandomSwitchGate(3)
    with pytest.raises(ValueError, match=f"switch: .*{switch!r}"):
        gate.switch = switch
    assert gate.switch == "call"


@pytest.mark.parametrize("experts", [0, -1])
def test_a_gate_of_no_experts_is_an_error(experts: int) -> None:
    with pytest.raises(ValueError, match=f"num_experts: .*{experts}"):
        RandomSwitchGate(experts)


@pytest.mark.parametrize("switch", ["call", "off"])
@pytest.mark.parametrize("outputs", [1, 2, 4])
def test_a_network_with_another_number_of_outputs_is_named(outputs: int, switch: Switch) -> None:
    gate = RandomSwitchGate(3, RandomSwitchGate(outputs).network, switch=switch).eval()
    with pytest.raises(ValueError, match=rf"network: .*\(6, 3\).*\(6, {outputs}\)"):
        gate(_images())
