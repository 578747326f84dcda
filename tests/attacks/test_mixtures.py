"""Which modules attacks take for mixtures and random gates: by what they can do, on every Python."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, RandomSwitchGate
from immunity_fast.attacks.mixtures import Mixture, RandomGate, asked_modules, is_gate, is_mixture, judge_of
from immunity_fast.functional import log_mixture


class _Gate(nn.Module):
    """Of somebody else: half of the weights each, in one order or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = "call"

    @contextmanager
    def switched(self, switch: str) -> Iterator[None]:
        before, self.switch = self.switch, switch
        try:
            yield
        finally:
            self.switch = before

    def forward(self, images: Tensor) -> Tensor:
        return images.new_tensor([0.3, 0.7]).expand(len(images), -1)


class _Mixture(nn.Module):
    """Of somebody else; its gate is a submodule, which a class does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = _Gate()
        self.experts = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2))

    def expert_logits(self, images: Tensor) -> Tensor:
        return torch.stack([expert(images) for expert in self.experts])

    def gate_weights(self, images: Tensor) -> Tensor:
        weights: Tensor = self.gate(images)
        return weights

    def forward(self, images: Tensor) -> Tensor:
        return log_mixture(self.expert_logits(images), self.gate_weights(images))


def test_a_gate_and_a_mixture_are_known_by_what_they_can_do() -> None:
    ours = ImmunityMoE("resnet8", num_experts=2)
    assert is_mixture(ours)
    assert is_gate(ours.gate)
    assert is_gate(RandomSwitchGate(3))
    theirs = _Mixture()
    assert is_mixture(theirs)
    assert is_gate(theirs.gate)
    others = [
        module for module in (*ours.modules(), *theirs.modules()) if not isinstance(module, (ImmunityMoE, _Mixture))
    ]
    assert not any(is_mixture(module) for module in others)
    assert sum(is_gate(module) for module in others) == 2


def test_what_wraps_a_module_for_a_compiler_is_neither() -> None:
    assert not is_mixture(torch.compile(ImmunityMoE("resnet8", num_experts=2)))
    assert not is_gate(torch.compile(_Gate()))


@pytest.mark.parametrize("protocol", [RandomGate, Mixture])
def test_isinstance_is_an_error_rather_than_another_answer(protocol: type) -> None:
    """From Python 3.12 on it would look for a submodule in vain, and call no mixture one."""
    with pytest.raises(TypeError, match="runtime"):
        isinstance(_Mixture(), protocol)


@pytest.mark.parametrize("make", [lambda: ImmunityMoE("resnet8", num_experts=2), _Mixture], ids=["ours", "theirs"])
def test_a_mixture_that_is_asked_is_found_and_judged_exactly(make: type[nn.Module]) -> None:
    model = make().eval()
    images = torch.rand(3, 3, 2, 2) if isinstance(model, _Mixture) else torch.rand(3, 3, 8, 8)
    with asked_modules() as asked:
        outputs = model(images)
    assert asked.only(images, outputs) is model
    assert [gate is model.gate for gate in asked.random_gates] == [True]
    judge = judge_of(lambda x, _: model(x), images, torch.zeros(3, dtype=torch.long))
    assert callable(judge)
    mean, _ = judge(images, torch.zeros(3, dtype=torch.long), None)
    torch.testing.assert_close(mean, log_mixture(model.expert_logits(images)))  # type: ignore[operator]
