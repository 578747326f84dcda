"""Which parameters decay: of stacks, lists, gates and any module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.training import parameter_groups
from immunity_fast.training.optimizer import FusedSGD


def _decaying(model: nn.Module) -> set[str]:
    groups = parameter_groups(model, 0.1)
    inside = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


class _Small(nn.Module):
    """Each kind of parameter that should not decay, and three that should."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 3, padding=1)
        self.batch = nn.BatchNorm2d(width)
        self.layer = nn.LayerNorm((width, 8, 8))
        self.group = nn.GroupNorm(2, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.temperature = nn.Parameter(torch.ones(()))
        self.pos_embed = nn.Parameter(torch.zeros(1, width, 8, 8))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.layer(self.batch(self.convolution(x)))) + self.pos_embed
        x = x * self.scale[:, None, None]
        return self.head(x.mean((-2, -1))) * self.temperature  # type: ignore[no-any-return]


WEIGHTS = {"convolution.weight", "head.weight"}


def test_of_any_module_weights_alone_decay() -> None:
    assert _decaying(_Small()) == WEIGHTS


def test_a_stack_is_what_its_experts_are() -> None:
    """A bias is (N, C) there, a normalisation's weight too, a scale, and an embedding has five axes."""
    torch.manual_seed(0)
    model = ImmunityMoE.from_experts([_Small(), _Small()], image_size=8, stage="convolution")
    assert {name.removeprefix("experts.") for name in _decaying(model) if name.startswith("experts.")} == WEIGHTS
    weights = {name for name in _decaying(model) if name.startswith("gate.")}
    assert weights
    assert all(name.endswith(".weight") for name in weights)


def test_a_list_of_experts_is_no_stack() -> None:
    torch.manual_seed(0)
    model = ImmunityMoE.from_experts([_Small(4), _Small(6)], image_size=8, stage="convolution")
    found = {name for name in _decaying(model) if name.startswith("experts.")}
    assert found == {f"experts.{index}.{name}" for index in range(2) for name in WEIGHTS}


def test_our_architectures_have_normalisations_in_stacks() -> None:
    model = ImmunityMoE("resnet8", 2, 3, image_size=12)
    decaying = _decaying(model)
    axes = {name: parameter.dim() for name, parameter in model.named_parameters()}
    assert {axes[name] for name in decaying if name.startswith("experts.")} == {3, 5}  # (N, out, in) and convolutions
    assert not any(axes[name] <= 2 for name in axes if name.startswith("experts.") and name in decaying)


def test_names_that_a_network_gives_itself_do_not_decay() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 3))
            self.relative_position_bias_table = nn.Parameter(torch.zeros(3, 3))
            self.weight = nn.Parameter(torch.zeros(3, 3))

        def no_weight_decay(self) -> set[str]:
            return {"table", "not_there"}

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = Own()
            self.position_embeddings = nn.Embedding(4, 3)
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
            self.kind_embed = nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay_keywords(self) -> set[str]:
            return {"kind_"}

    assert _decaying(Outer()) == {"own.weight", "attention.in_proj_weight", "attention.out_proj.weight"}


def test_every_parameter_is_in_one_group_and_in_order() -> None:
    model = _Small()
    model.twice = model.head.weight  # under two names, but once
    for parameter in model.convolution.parameters():
        parameter.requires_grad = False
    decaying, others = parameter_groups(model, 0.1)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    order = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    found = [[order[id(parameter)] for parameter in group["params"]] for group in (decaying, others)]
    assert sorted(found[0] + found[1]) == list(range(len(order)))
    assert found == [sorted(each) for each in found]


def test_all_is_one_group_and_none_is_empty() -> None:
    model = _Small()
    (group,) = parameter_groups(model, 0.1, "all")
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model.parameters()]
    assert group["weight_decay"] == 0.1
    (group,) = parameter_groups(nn.BatchNorm2d(3), 0.1)
    assert group["weight_decay"] == 0.0
    (group,) = parameter_groups(nn.Linear(3, 3, bias=False), 0.1)
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_step_is_torch_s_with_those_groups(backend: Any) -> None:
    torch.manual_seed(0)
    model = _Small()
    if backend == "triton":
        pytest.importorskip("triton", reason="the kernels are Triton's")
    twin = _Small().double()
    twin.load_state_dict(model.state_dict())
    images = torch.rand(3, 3, 8, 8)
    ours = FusedSGD(parameter_groups(model, 0.3), 0.1, 0.9, nesterov=True, backend="torch")
    if backend == "triton":
        from tests.kernels import memory

        memory.reach([*model.parameters()])
        ours = FusedSGD(parameter_groups(model, 0.3), 0.1, 0.9, nesterov=True, backend="triton")
    theirs = torch.optim.SGD(parameter_groups(twin, 0.3), 0.1, 0.9, nesterov=True)
    model(images).square().sum().backward()
    twin(images.double()).square().sum().backward()
    if backend == "triton":
        reached = ours._rows()[1]
        memory.reach([*reached, *(state["momentum_buffer"] for state in ours.state.values())])
    ours.step()
    theirs.step()
    for mine, exact in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("weight_decay", "decay"), [(-1.0, "all"), (0.1, "biases"), (float("nan"), "weights")])
def test_what_makes_no_sense_is_refused(weight_decay: float, decay: Any) -> None:
    with pytest.raises(ValueError, match=r"^(weight_)?decay: expected "):
        parameter_groups(nn.Linear(1, 1), weight_decay, decay)
