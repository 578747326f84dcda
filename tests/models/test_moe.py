"""`ImmunityMoE`: what it computes, the networks it takes and gives back, and what an ordinary module can do."""

from __future__ import annotations

import copy
import io
import itertools
from collections import OrderedDict
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate
from immunity_fast.experts import create
from immunity_fast.experts.staged import StagedNetwork
from immunity_fast.functional import mixture_log_probabilities
from immunity_fast.models.gate import Switch
from immunity_fast.models.moe import CIFAR10_MEAN, CIFAR10_STD
from immunity_fast.models.stacking import Batching
from tests import grids
from tests.tensors import assert_same_state, noise

BOTH: list[Batching] = ["loop", "vmap"]
TARGETS = torch.tensor([0, 3, 1, 2])


def _model(experts: int = 3, seed: int = 0, *, training: bool = False, **options: Any) -> ImmunityMoE:
    torch.manual_seed(seed)
    options = {"image_size": 12, "switch": "off"} | options
    return ImmunityMoE("resnet8", experts, 4, **options).double().train(training)


def _chain(**children: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(children))


def _small_chain(*, inplace: bool = False) -> nn.Sequential:
    return _chain(
        conv=nn.Conv2d(3, 5, 3, padding=1),
        norm=nn.BatchNorm2d(5),
        act=nn.ReLU(inplace=inplace),
        pool=nn.AdaptiveAvgPool2d(2),
        flat=nn.Flatten(),
        fc=nn.Linear(20, 4),
    ).double()


class Branching(nn.Module):
    """A network that is no chain; `last` is where its map of 12×12 comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        out: Tensor = self.fc((x + torch.tanh(self.last(x))).mean((-2, -1)))
        return out


class Doubling(nn.Sequential):
    """A Sequential that does more than run its children."""

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = 2 * super().forward(images)
        return out


class Sized(nn.Sequential):
    """A Sequential whose constructor takes no children."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


@pytest.mark.parametrize("batching", BOTH)
def test_output_is_the_logarithm_of_the_gated_softmaxes(batching: Batching) -> None:
    model = _model(batching=batching)
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (CIFAR10_MEAN, CIFAR10_STD))
    weights = model.gate.network((noise() - mean) / std).softmax(-1)
    probabilities = sum(weights[:, i, None] * expert(noise()).softmax(-1) for i, expert in enumerate(model.unstack()))
    assert isinstance(probabilities, Tensor)
    torch.testing.assert_close(model(noise()), probabilities.log(), rtol=1e-6, atol=1e-6)
    assert model(noise()).shape == (4, 4)


@pytest.mark.parametrize("switch", get_args(Switch))
def test_probabilities_sum_to_one(switch: Switch) -> None:
    total = _model(switch=switch)(noise()).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64), rtol=1e-12, atol=0)


def test_mean_is_the_exact_average_over_all_permutations() -> None:
    model = _model(4)
    logits, _, trained = model.expert_outputs(noise())
    orders = list(itertools.permutations(range(4)))
    assert len(orders) == 24
    average = sum(mixture_log_probabilities(logits, trained[:, list(order)]).exp() for order in orders) / len(orders)
    assert isinstance(average, Tensor)
    model.gate.switch = "mean"
    torch.testing.assert_close(model(noise()), average.log(), rtol=1e-12, atol=0)


def test_the_default_gate_switches_in_evaluation_mode_only() -> None:
    model = _model(switch="call", generator=torch.Generator().manual_seed(0))
    outputs = [model(noise()) for _ in range(12)]
    assert len({tuple(output.flatten().tolist()) for output in outputs}) > 2
    assert ImmunityMoE("resnet8", 2, image_size=12).gate.switch == "call"
    model.gate.train()  # of the gate alone: batch statistics would change the experts
    assert torch.equal(model(noise()), model(noise()))


@pytest.mark.parametrize("training", [True, False])
def test_loop_and_vmap_agree_in_everything_that_the_loss_takes(training: bool) -> None:
    outputs = [_model(training=training, batching=batching).expert_outputs(noise()) for batching in BOTH]
    for loop, vmap in zip(*outputs, strict=True):
        torch.testing.assert_close(loop, vmap, rtol=1e-10, atol=1e-10)


def test_loop_and_vmap_agree_in_the_gradients_of_the_whole_loss() -> None:
    found = []
    for batching in BOTH:
        model = _model(training=True, batching=batching)
        logits, activations, gate = model.expert_outputs(noise())
        loss = FusedImmunityLoss(0.5, 1.0, 1e-3, (12, 12))(logits, activations, TARGETS, gate)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for loop, vmap in zip(*found, strict=True):
        torch.testing.assert_close(loop, vmap, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("batching", BOTH)
def test_activations_are_in_the_graph_that_leads_to_the_logits(batching: Batching) -> None:
    logits, activations, _ = _model(batching=batching).expert_outputs(noise())
    assert isinstance(activations, Tensor)
    assert activations.shape == (3, 4, 16, 12, 12)
    (gradient,) = torch.autograd.grad(logits[1].sum(), activations)
    assert gradient[1].any()
    assert not gradient[[0, 2]].any()


@pytest.mark.parametrize("batching", BOTH)
def test_forward_is_the_mixture_of_expert_outputs(batching: Batching) -> None:
    model = _model(batching=batching)
    logits, _, gate = model.expert_outputs(noise())
    torch.testing.assert_close(model(noise()), mixture_log_probabilities(logits, gate), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("stage", "shape"), [("stem", (16, 12)), ("layer2", (32, 6)), ("layer3", (64, 3))])
def test_any_stage_can_be_chosen(stage: str, shape: tuple[int, int]) -> None:
    model = _model(stage=stage)
    logits, activations, _ = model.expert_outputs(noise())
    assert isinstance(activations, Tensor)
    assert activations.shape == (3, 4, shape[0], shape[1], shape[1])
    torch.testing.assert_close(logits, _model().expert_outputs(noise())[0], rtol=1e-12, atol=1e-12)


def test_experts_start_different() -> None:
    for name, parameter in _model().experts.named_parameters():
        if parameter[0].dim() > 1:
            assert not torch.equal(parameter[0], parameter[1]), name


def test_state_dict_holds_every_tensor_once() -> None:
    model = _model()
    state = model.state_dict(keep_vars=True)
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})
    assert {name.split(".")[0] for name in state} == {"experts", "gate", "normalize"}
    experts = create("resnet8", 4).state_dict()
    assert {name.removeprefix("experts.") for name in state if name.startswith("experts.")} == set(experts)
    assert all(state[f"experts.{name}"].shape == (3, *value.shape) for name, value in experts.items())


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_carries_the_whole_model(assign: bool) -> None:
    model, other = _model(seed=0), _model(seed=1)
    assert not torch.equal(model(noise()), other(noise()))
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert torch.equal(model(noise()), other(noise()))
    assert torch.equal(model.expert_outputs(noise())[0], other.expert_outputs(noise())[0])


def test_a_deep_copy_is_independent() -> None:
    model = _model(training=True)
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    expected = twin.expert_outputs(noise())[0]
    optimiser = torch.optim.SGD(twin.parameters(), lr=0.1)
    expected.square().sum().backward()
    optimiser.step()
    assert not torch.equal(twin.expert_outputs(noise())[0], expected)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(model.expert_outputs(noise())[0], expected)


def test_a_saved_and_loaded_model_computes_the_same() -> None:
    model, file = _model(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(model.expert_outputs(noise())[0], twin.expert_outputs(noise())[0])


def test_casting_reaches_trunk_and_head() -> None:
    model = _model().float()
    assert model(noise().float()).dtype == torch.float32
    model.to(torch.float64)
    logits, activations, gate = model.expert_outputs(noise())
    assert isinstance(activations, Tensor)
    assert {logits.dtype, activations.dtype, gate.dtype, model(noise()).dtype} == {torch.float64}


@pytest.mark.parametrize(("batching", "inside", "dtype"), grids.every(2, BOTH, [True, False], [None, torch.float64]))
def test_channels_last_is_each_experts_own(batching: Batching, inside: bool, dtype: torch.dtype | None) -> None:
    """`to` as of any module, also of one that the model is a part of; values and gradients are the same, and back."""
    model = _model(training=True, batching=batching).float()
    twin = copy.deepcopy(model).to(dtype)
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    model(noise().float()).sum().backward()  # gradients are laid out as well
    options = {} if dtype is None else {"dtype": dtype}
    moved = (
        nn.Sequential(model).to(memory_format=torch.channels_last, **options)
        if inside
        else model.to(memory_format=torch.channels_last, **options)
    )
    assert inside or moved is model
    for parameter in [*model.experts.parameters(), *(p.grad for p in model.experts.parameters() if p.grad is not None)]:
        if parameter.dim() == 5:
            assert parameter[1].is_contiguous(memory_format=torch.channels_last)
    for gate in model.gate.parameters():
        assert gate.dim() != 4 or gate.is_contiguous(memory_format=torch.channels_last)
    model.load_state_dict(before)
    model.zero_grad()
    images = noise().to(dtype or torch.float32)
    found = []
    for one in (model, twin):
        logits, activations, weights = one.expert_outputs(images.to(memory_format=torch.channels_last))
        loss = FusedImmunityLoss(0.5, 1.0, 1e-3, (12, 12))(logits, activations, TARGETS, weights)
        found.append([loss, *torch.autograd.grad(loss, list(one.parameters()))])
    tolerance = 1e-3 if dtype is None else 1e-8
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, fused=True)
    optimiser.step()
    for expert in model.unstack():
        weight = expert.get_parameter("stem.0.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.contiguous_format)
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_experts_that_are_channels_last_stay_so() -> None:
    experts = [_small_chain().to(memory_format=torch.channels_last) for _ in range(2)]
    model = ImmunityMoE.from_experts(experts, image_size=12)
    assert model.experts.get_parameter("conv.weight")[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["chain", "branching", "arch"])
@pytest.mark.parametrize("batching", BOTH)
def test_a_wrong_dtype_is_named_but_where_the_network_converts(kind: str, batching: Batching) -> None:
    class Converting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Identity(), Branching().bfloat16()

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.inner(self.first(images).to(torch.bfloat16)).float()
            return out

    def model(make: Any) -> ImmunityMoE:
        return ImmunityMoE.from_experts([make(), make()], image_size=12, switch="mean", batching=batching)

    made = {
        "chain": lambda: model(_small_chain),
        "branching": lambda: model(Branching),
        "arch": lambda: _model(2, batching=batching),
    }[kind]().bfloat16()
    for method in ("forward", "expert_logits", "expert_outputs"):
        with pytest.raises(TypeError, match=r"images: expected torch\.bfloat16.* got torch\.float32"):
            getattr(made.eval(), method)(noise().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert made(noise().bfloat16()).isfinite().all()
    assert model(Converting).eval()(noise().float()).shape == (4, 4)


@pytest.mark.parametrize("switch", ["off", "mean"])
def test_probabilities_of_a_bfloat16_model_sum_to_one(switch: Switch) -> None:
    output = _model(switch=switch).bfloat16()(noise().bfloat16())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.exp().sum(-1), torch.ones(4))


def test_train_and_eval_reach_trunk_and_head() -> None:
    model = _model(training=True)
    logits = model.expert_outputs(noise())[0]
    before = copy.deepcopy(model.state_dict())
    assert not torch.equal(model.eval().expert_outputs(noise())[0], logits)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_an_empty_batch_gives_an_empty_output() -> None:
    assert _model()(noise(0)).shape == (0, 4)
    logits, activations, gate = _model().expert_outputs(noise(0))
    loss = FusedImmunityLoss(size=(12, 12))(logits, activations, TARGETS[:0], gate)
    assert float(loss.detach()) == 0


def test_unstacked_experts_are_ordinary_modules_that_normalise() -> None:
    model = _model()
    experts = model.unstack()
    logits = model.expert_outputs(noise())[0]
    for expert, expected in zip(experts, logits, strict=True):
        assert isinstance(expert, StagedNetwork)
        torch.testing.assert_close(expert(noise()), expected, rtol=1e-10, atol=1e-10)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in experts[0].parameters():
            parameter.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("rounds", grids.each(2, [2, 1]))
def test_a_mixture_of_unstacked_experts_is_the_mixture(rounds: int) -> None:
    model = _model(training=True)
    model(noise())
    model.eval()
    other = model
    for _ in range(rounds):
        other = ImmunityMoE.from_experts(other.unstack(), gate=other.gate, image_size=12)
    logits, activations, _ = model.expert_outputs(noise())
    same_logits, same_activations, _ = other.eval().expert_outputs(noise())
    assert other.stage == model.stage
    torch.testing.assert_close(same_logits, logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(same_activations, activations, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "batching"), grids.every(2, ["staged", "chain", "branching", "doubling"], BOTH))
def test_from_experts_takes_any_networks_and_they_are_trained(kind: str, batching: Batching) -> None:
    torch.manual_seed(0)
    make: Any = {
        "staged": lambda: create("resnet8", 4).double(),
        "chain": _small_chain,
        "branching": lambda: Branching().double(),
        "doubling": lambda: Doubling(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double(),
    }[kind]
    experts = [make() for _ in range(3)]
    half = (0.5, 0.5, 0.5)
    model = ImmunityMoE.from_experts(
        experts, image_size=12, batching=batching, switch="off", mean=half, std=half
    ).double()
    logits, activations, gate = model.expert_outputs(noise())
    expected = torch.stack([expert(2 * noise() - 1) for expert in experts])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert isinstance(activations, list) == (kind in ("branching", "doubling"))
    torch.testing.assert_close(mixture_log_probabilities(logits, gate), model(noise()), rtol=1e-9, atol=1e-9)
    FusedImmunityLoss(1.0, 1.0, 1e-3, (12, 12))(logits, activations, TARGETS, gate).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_chain_cut_or_caught_by_a_hook_gives_the_same_loss() -> None:
    class Hidden(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.inner(images)
            return out

    torch.manual_seed(0)
    chains = [_small_chain() for _ in range(2)]
    gate = RandomSwitchGate(2, switch="off").double()
    losses, gradients = [], []
    for model in (
        ImmunityMoE.from_experts(chains, gate=gate, stage="norm"),
        ImmunityMoE.from_experts([Hidden(chain) for chain in chains], gate=gate, stage="inner.norm"),
    ):
        logits, activations, weights = model.expert_outputs(noise())
        losses.append(FusedImmunityLoss(1.0, 1.0, 1e-3, (12, 12))(logits, activations, TARGETS, weights))
        gradients.append(torch.autograd.grad(losses[-1], list(model.experts.parameters())))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_from_experts_takes_torchvisions_resnet18(short: bool) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    experts = [models.resnet18(num_classes=4) for _ in range(2)]
    for expert in experts if short else []:  # without the blocks that have most of the weights
        expert.layer3, expert.layer4, expert.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 4)
    model = ImmunityMoE.from_experts(experts, stage="layer2", image_size=32)
    images = noise(2, 32).float()
    logits, activations, gate = model.expert_outputs(images)
    assert isinstance(activations, list)
    assert [tuple(maps.shape) for maps in activations] == [(2, 128, 4, 4)] * 2
    torch.testing.assert_close(logits, torch.stack([expert(images) for expert in experts]), rtol=1e-4, atol=1e-4)
    FusedImmunityLoss(1.0, 1.0, 1e-4, (32, 32))(logits, activations, TARGETS[:2], gate).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not model.experts.get_submodule("layer2")._forward_hooks


@pytest.mark.parametrize("inplace", [False, True])
def test_an_in_place_activation_after_the_stage_is_welcome(inplace: bool) -> None:
    """The default stage is then the ReLU itself, the last map that exceeds 8×8."""
    torch.manual_seed(0)
    model = ImmunityMoE.from_experts([_small_chain(inplace=inplace) for _ in range(2)], image_size=12, switch="off")
    logits, activations, gate = model.double().expert_outputs(noise())
    assert model.stage == "act"
    assert (activations[0] >= 0).all()
    FusedImmunityLoss(size=(12, 12))(logits, activations, TARGETS, gate).backward()


def test_a_chain_that_uses_a_module_twice_keeps_both_uses() -> None:
    def shared() -> nn.Sequential:
        act = nn.Tanh()
        children = [nn.Conv2d(3, 4, 3), act, nn.Conv2d(4, 4, 3), act, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*children).double()

    torch.manual_seed(0)
    experts = [shared() for _ in range(2)]
    half = (0.5, 0.5, 0.5)
    model = ImmunityMoE.from_experts(experts, stage="2", mean=half, std=half).double()
    expected = torch.stack([expert(2 * noise() - 1) for expert in experts])
    torch.testing.assert_close(model.expert_outputs(noise())[0], expected, rtol=1e-10, atol=1e-10)
    unstacked = torch.stack([expert(noise()) for expert in model.unstack()])
    torch.testing.assert_close(unstacked, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [lambda: Sized(4), lambda: Doubling(*Sized(4)), Branching])
def test_networks_of_any_constructor_are_unstacked_normalised(make: Any) -> None:
    torch.manual_seed(0)
    experts = [make().double() for _ in range(2)]
    half = (0.5, 0.5, 0.5)
    model = ImmunityMoE.from_experts(experts, image_size=12, mean=half, std=half).double()
    for mine, expert in zip(model.unstack(), experts, strict=True):
        torch.testing.assert_close(mine(noise()), expert(2 * noise() - 1), rtol=1e-10, atol=1e-10)


def test_a_child_called_normalize_does_not_replace_the_model_s() -> None:
    torch.manual_seed(0)
    half = (0.5, 0.5, 0.5)
    chains = [_chain(normalize=nn.Conv2d(3, 4, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()) for _ in range(2)]
    model = ImmunityMoE.from_experts(chains, image_size=12, mean=half, std=half).double().eval()
    for mine, logits in zip(model.unstack(), model.expert_logits(noise()), strict=True):
        torch.testing.assert_close(mine(noise()), logits, rtol=1e-10, atol=1e-10)
        assert not mine.training


def test_from_experts_copies() -> None:
    experts = [_small_chain() for _ in range(2)]
    before = copy.deepcopy(experts[0])
    model = ImmunityMoE.from_experts(experts, image_size=12).double()
    model(noise()).sum().backward()
    assert_same_state(experts[0], before)
    assert all(p.grad is None for p in experts[0].parameters())


@pytest.mark.parametrize("batching", BOTH)
def test_frozen_parameters_stay_frozen(batching: Batching) -> None:
    experts = [_small_chain() for _ in range(2)]
    for expert in experts:
        expert.get_submodule("conv").requires_grad_(False)
    model = ImmunityMoE.from_experts(experts, image_size=12, batching=batching).double()
    logits, activations, gate = model.expert_outputs(noise())
    FusedImmunityLoss(size=(12, 12))(logits, activations, TARGETS, gate).backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"experts.conv.weight", "experts.conv.bias"}
    assert {name for name, p in model.named_parameters() if p.grad is None} == frozen


@pytest.mark.parametrize("batching", BOTH)
def test_dropout_differs_between_experts(batching: Batching) -> None:
    torch.manual_seed(0)
    expert = _chain(conv=nn.Conv2d(3, 4, 3), drop=nn.Dropout(), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    model = ImmunityMoE.from_experts([expert, copy.deepcopy(expert)], stage="conv", batching=batching)
    logits = model.expert_outputs(noise().float())[0]
    assert not torch.equal(logits[0], logits[1])
    logits = model.eval().expert_outputs(noise().float())[0]
    torch.testing.assert_close(logits[0], logits[1])


@pytest.mark.parametrize("batching", BOTH)
def test_some_steps_of_sgd_lower_the_loss(batching: Batching) -> None:
    model = _model(2, training=True, batching=batching).float()
    loss_fn = FusedImmunityLoss(1.0, 1.0, 1e-5, (12, 12))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(8):
        logits, activations, gate = model.expert_outputs(noise().float())
        loss = loss_fn(logits, activations, TARGETS, gate)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_the_order_of_experts_does_not_matter_to_the_loss() -> None:
    model = _model()
    logits, activations, gate = model.expert_outputs(noise())
    assert isinstance(activations, Tensor)
    order = [2, 0, 1]
    loss = FusedImmunityLoss(1.0, 1.0, 1e-3, (12, 12))
    expected = loss(logits, activations, TARGETS, gate)
    turned = ImmunityMoE.from_experts([model.unstack()[i] for i in order], image_size=12, switch="off").double().eval()
    logits, activations, _ = turned.expert_outputs(noise())
    torch.testing.assert_close(loss(logits, activations, TARGETS, gate[:, order]), expected, rtol=1e-9, atol=0)


WRONG_IMAGES: list[tuple[Any, type[Exception], str]] = [
    (torch.rand(3, 12, 12), ValueError, r"images: .*\(B, 3, H, W\).*\(3, 12, 12\)"),
    (torch.zeros(2, 3, 12, 12, dtype=torch.uint8), TypeError, r"images: .*torch\.uint8"),
    (torch.rand(2, 1, 12, 12), ValueError, r"images: .*\(B, 3, H, W\).*\(2, 1, 12, 12\)"),
    (torch.rand(2, 12, 12, 3), ValueError, r"images: .*\(2, 12, 12, 3\)"),
    ([torch.rand(3, 12, 12)], TypeError, "images: .*list"),
    (torch.rand(2, 3, 12, 12).numpy(), TypeError, "images: .*got numpy.ndarray; torch.as_tensor makes one"),
]


@pytest.mark.parametrize(("images", "error", "text"), WRONG_IMAGES)
@pytest.mark.parametrize("method", ["forward", "expert_outputs"])
def test_wrong_images_are_named(images: Any, error: type[Exception], text: str, method: str) -> None:
    with pytest.raises(error, match=text):
        getattr(_model(2).float(), method)(images)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_experts": 1}, "num_experts: .*1"),
        ({"num_experts": 0}, "num_experts: .*0"),
        ({"num_classes": 1}, "num_classes: .*1"),
        ({"arch": "resnet9"}, "resnet8.*, got 'resnet9'"),
        ({"stage": "layer9"}, "stage: .*layer3, got 'layer9'"),
        ({"stage": "classifier"}, "stage: .*'classifier'"),
        ({"image_size": 8}, "8×8"),
        ({"batching": "map"}, "batching: .*'map'"),
        ({"switch": "on"}, "switch: .*'on'"),
        ({"mean": (0.5,)}, r"mean: expected 3 numbers, one a channel, got 1"),
        ({"std": (1.0, 0.0, 1.0)}, r"mean, std: .*\(1\.0, 0\.0, 1\.0\)"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ImmunityMoE(**{"arch": "resnet8", "num_experts": 2} | options)


@pytest.mark.parametrize(
    ("experts", "options", "text"),
    [
        ([_small_chain()], {}, "experts: expected at least 2 modules, got 1"),
        ([], {}, "experts: expected at least 2 modules, got 0"),
        ([_small_chain(), _small_chain().float()], {}, "number 1 to be like number 0"),
        ([_small_chain(), create("resnet8", 4)], {}, "number 1 to be on the device and in the dtype of the others"),
        ([_small_chain()] * 2, {"stage": "conv2"}, "stage: .*'conv2'"),
        ([Branching(), Branching()], {"stage": "middle"}, "stage: .*'middle'"),
        ([_small_chain()] * 2, {"image_size": 6}, "8×8"),
        ([_small_chain()] * 2, {"mean": (0.5, 0.5, 0.5)}, "mean, std: .*both"),
        ([_small_chain()] * 2, {"std": (0.5, 0.5, 0.5)}, "mean, std: .*both"),
    ],
)
def test_wrong_experts_are_named(experts: list[nn.Module], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ImmunityMoE.from_experts(experts, **{"image_size": 12} | options)


@pytest.mark.parametrize(
    ("experts", "got"),
    [
        (["a", "b"], "expected modules, got str as number 0"),
        ([nn.Linear(2, 2), None], "expected modules, got NoneType as number 1"),
        (nn.Linear(2, 2), "expected a list of at least 2 modules, got Linear"),
        ("ab", "expected a list of at least 2 modules, got str"),
        (2, "expected a list of at least 2 modules, got int"),
    ],
)
def test_experts_of_a_wrong_type_are_named(experts: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"^experts: {got}$"):
        ImmunityMoE.from_experts(experts)


def test_networks_that_vmap_does_not_run_are_looped_over() -> None:
    class Asking(Branching):
        def forward(self, images: Tensor) -> Tensor:
            if bool((images < 2).all()):  # of a value, which a batched tensor does not have
                images = images + 0 * self.first.weight.sum()
            shifted = images if float(self.fc.bias.sum()) < 1e9 else -images
            return super().forward(shifted)

    torch.manual_seed(0)
    networks = [Asking() for _ in range(2)]
    model = ImmunityMoE.from_experts(networks, image_size=12)
    assert model.batching == "loop"
    expected = torch.stack([network(noise().float()) for network in networks])
    torch.testing.assert_close(model.expert_logits(noise().float()), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"batching: expected 'auto' or 'loop' for networks that torch\.vmap does not run"
    ):
        ImmunityMoE.from_experts(networks, image_size=12, batching="vmap")
    assert ImmunityMoE.from_experts([Branching() for _ in range(2)], image_size=12).batching == "auto"


@pytest.mark.parametrize("number", [2.0, "2", None])
def test_a_number_of_experts_is_whole(number: Any) -> None:
    with pytest.raises(TypeError, match=r"^num_experts: expected a whole number, got "):
        ImmunityMoE("resnet8", number)
    with pytest.raises(TypeError, match=r"^num_experts: expected a whole number, got "):
        RandomSwitchGate(number)
