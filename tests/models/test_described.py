"""Which tensors the experts of a described mixture have, however many are described."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from immunity_fast import ImmunityMoE
from immunity_fast.models.described import expert_tensors

OPTIONS: Any = {"num_classes": 3, "image_size": (32, 32), "stem": "cifar"}


def network(num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, num_classes))


@pytest.fixture(autouse=True)
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with two names of one structure."""
    module = ModuleType("twins")
    vars(module).update(one=network, other=network)
    monkeypatch.setitem(sys.modules, "twins", module)


@pytest.mark.parametrize(
    ("arch", "number", "stage"),
    [("resnet8", 3, None), ("resnet8,resnet18", 3, None), ("twins:one,twins:other", 2, "0")],
    ids=["stack", "list", "two names, one stack"],
)
def test_they_are_those_of_the_mixture(arch: str, number: int, stage: str | None) -> None:
    model = ImmunityMoE(arch, number, 3, stage=stage)
    own = {name.removeprefix("experts."): each for name, each in model.state_dict().items() if name[:8] == "experts."}
    found = expert_tensors(arch, number, own, **OPTIONS)
    assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
        name: (each.shape, each.dtype) for name, each in own.items()
    }


def test_any_number_takes_no_memory() -> None:
    stack, several = (ImmunityMoE(arch, 2, 3).experts.state_dict() for arch in ("resnet8", "resnet8,resnet18"))
    found = expert_tensors("resnet8", 10**12, stack, **OPTIONS)
    assert found.keys() == stack.keys()
    assert all(each.is_meta and len(each) == 10**12 for each in found.values())
    with pytest.raises(ValueError, match=r"num_experts: expected at most 178, as many as there are tensors, got 4611"):
        expert_tensors("resnet8,resnet18", 2**62, several, **OPTIONS)
