"""Experts with equal weights: they are seen, they never part by themselves, and noise parts them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.experts.symmetry import identical, perturb_


def _network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def test_equal_networks_are_found() -> None:
    one, other = _network(), _network(1)
    twin = copy.deepcopy(one)
    assert identical([one, other]) == []
    assert identical([one, other, twin, copy.deepcopy(other), one]) == [(0, 2), (1, 3), (0, 4)]
    with torch.no_grad():
        next(twin.parameters()).view(-1)[5] += 1e-6
    assert identical([one, twin]) == []
    assert identical([nn.ReLU(), nn.ReLU()]) == []
    assert identical([nn.Linear(2, 3), nn.Linear(3, 2)]) == []


@pytest.mark.parametrize("scale", [1e-3, 0.5])
def test_noise_is_in_units_of_each_tensor(scale: float) -> None:
    networks = [_network().double() for _ in range(3)]
    networks[2] = networks[2].float()
    before = copy.deepcopy(networks)
    perturb_(networks, scale, seed=3)
    assert identical([networks[0], before[0]]) == [(0, 1)], "the first stays as it is"
    for network, old in zip(networks[1:], before[1:], strict=True):
        for (name, value), (_, was) in zip(network.named_parameters(), old.named_parameters(), strict=True):
            change = (value - was).double()
            size = scale * was.double().square().mean().sqrt()
            if name == "1.bias":  # zero throughout
                assert not change.any()
            else:
                assert 0 < change.abs().max() < 6 * size
        weight, was = network.get_parameter("0.weight").detach(), old.get_parameter("0.weight").detach()
        spread = (weight - was).double().std() / (scale * was.double().square().mean().sqrt())
        assert abs(float(spread) - 1) < 5 / (2 * weight.numel()) ** 0.5
    assert identical(networks) == []
    for (name, value), (_, was) in zip(networks[1].named_buffers(), before[1].named_buffers(), strict=True):
        assert torch.equal(value, was), name


def test_noise_is_that_of_its_seed() -> None:
    several = [[_network(), _network()] for _ in range(3)]
    state = torch.get_rng_state()
    for networks, seed in zip(several, (5, 5, 6), strict=True):
        perturb_(networks, 0.1, seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert identical([networks[1] for networks in several]) == [(0, 1)]


@pytest.mark.parametrize("scale", [-0.1, float("nan")])
def test_a_scale_out_of_range_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=r"^scale: expected a number of at least 0, got "):
        perturb_([_network(), _network()], scale)


def test_equal_experts_in_python_are_warned_of() -> None:
    networks = [_network(), _network(1), _network()]
    with pytest.warns(UserWarning, match=r"number 2 as 0, which training never parts: .*perturb_\(experts\)"):
        ImmunityMoE.from_experts(networks, stage="2", image_size=12)
    perturb_(networks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImmunityMoE.from_experts(networks, stage="2", image_size=12)


@pytest.mark.parametrize("parted", [False, True])
@pytest.mark.filterwarnings("ignore:experts. expected weights of their own")
def test_equal_experts_never_part_by_themselves(parted: bool) -> None:
    networks = [_network().double(), _network().double()]
    if parted:
        perturb_(networks, 0.01)
    model = ImmunityMoE.from_experts(networks, stage="2", image_size=12).double()
    loss_fn = FusedImmunityLoss(beta=1.0, size=(12, 12))
    optimizer = torch.optim.SGD(model.experts.parameters(), lr=0.1)
    images, labels = torch.rand(8, 3, 12, 12).double(), torch.arange(8) % 3
    for _ in range(10):
        logits, maps, _ = model.expert_outputs(images)
        loss, terms = loss_fn(logits, maps, labels, return_terms=True)  # without the gate, whose weights differ
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    equal = identical(model.unstack())
    assert equal == ([] if parted else [(0, 1)])
    # −Σ p log(p/Σp) of N equal heatmaps is N log N, its largest: the mutual information is 0.
    information = torch.tensor(2.0).log() - terms.mutual_information / 2
    assert (float(information) > 1e-6) == parted
