"""Networks that can be one mixture and those that cannot, told from what they do; names and ties of tensors."""

from __future__ import annotations

import copy
import functools
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate
from immunity_fast.models.stacking import Batching
from tests import grids
from tests.probed import BOTH, TARGETS, Attention, Net
from tests.tensors import noise


class Scale:
    """A function that is an object."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Tensor) -> Tensor:
        return (x * self.factor).relu()


def _hooked(factor: float, kind: str) -> nn.Module:
    net = Net()
    if kind == "hook":
        net.norm.register_forward_hook(lambda _module, _inputs, output: output * factor)
    elif kind == "backward":
        net.norm.register_full_backward_hook(lambda _module, gradients, _outputs: (gradients[0] * factor,))
    elif kind == "backward pre":
        net.norm.register_full_backward_pre_hook(lambda _module, gradients: (gradients[0] * factor,))
    else:
        net.conv.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * factor,))
    return net


def _patched(factor: float) -> nn.Module:
    net = Net()
    usual = net.forward
    net.forward = lambda images: usual(images) * factor  # type: ignore[method-assign, assignment]
    return net


def _chain_hooked(factor: float) -> nn.Module:
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))
    net.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * factor,))
    return net


def _silent(temperature: float) -> nn.Module:
    """As a fresh network whose last layer begins at zero: nothing can be seen of it."""
    net = Net(temperature=temperature)
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    return net


def _leaky_behind(slope: float, x: Tensor) -> Tensor:
    """ReLU, whose gradient below zero is not 0, but `slope`."""
    leaky = F.leaky_relu(x, slope)
    return leaky + (x.relu() - leaky).detach()


# What number 1 is made of, where number 0 is made of 1.0, and what the error says of it.
UNLIKE: dict[str, tuple[Callable[[float], nn.Module], float, str]] = {
    "a float": (lambda x: Net(mean=x), 0.4, r"mean \(1.0 and 0.4\)"),
    "a plain tensor": (lambda x: Net(mean=torch.full((3, 1, 1), x)), 0.4, "mean"),
    "a temperature": (lambda x: Net(temperature=x), 2.0, r"temperature \(1.0 and 2.0\)"),
    "a function": (lambda x: Net(act=torch.relu if x == 1 else torch.tanh), 0.4, "act"),
    "a bound": (lambda x: Net(act=functools.partial(torch.clamp, min=0, max=2 + x)), 2.0, "act"),
    "a partial": (lambda x: Net(act=functools.partial(F.leaky_relu, negative_slope=x / 2)), 0.4, "act"),
    "an object": (lambda x: Net(act=Scale(x)), 0.4, "act"),
    "a lambda": (lambda x: Net(prepare=lambda images: images * x), 0.4, "prepare"),
    "a hook": (lambda x: _hooked(x, "hook"), 0.4, "norm._forward_hooks"),
    "a pre-hook": (lambda x: _hooked(x, "pre-hook"), 0.4, "conv._forward_pre_hooks"),
    "a backward hook": (lambda x: _hooked(x, "backward"), 0.4, "gradients .*norm._backward_hooks"),
    "a backward pre-hook": (lambda x: _hooked(x, "backward pre"), 0.4, "gradients .*norm._backward_pre_hooks"),
    "a gradient of its own": (lambda x: Net(act=functools.partial(_leaky_behind, x)), 0.4, "gradients .*act"),
    "a pre-hook of a chain": (_chain_hooked, 0.4, "_forward_pre_hooks"),
    "heads": (lambda x: Attention(2 if x == 1 else 4), 0.4, r"attention.num_heads \(2 and 4\)"),
    "a hidden temperature": (_silent, 2.0, r"temperature \(1.0 and 2.0\)"),
    "dropout": (lambda x: Net(p=x / 4), 0.4, r"p \(0.25 and 0.1\)"),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_experts_that_differ_in_more_than_tensors_are_named(kind: str) -> None:
    make, other, text = UNLIKE[kind]
    torch.manual_seed(0)
    experts = [make(1.0), make(1.0), make(other)]
    with pytest.raises(ValueError, match=rf"experts: expected number 2 to (have|run in) the .*{text}"):
        ImmunityMoE.from_experts(experts, stage="conv", image_size=12)


@pytest.mark.parametrize(("kind", "batching"), grids.every(2, UNLIKE, BOTH))
def test_experts_that_differ_in_tensors_are_taken_and_given_back(kind: str, batching: Batching) -> None:
    make, other, _ = UNLIKE[kind]
    torch.manual_seed(0)
    experts = [make(other).double() for _ in range(3)]
    model = ImmunityMoE.from_experts(experts, stage="conv", image_size=12, batching=batching).double().eval()
    expected = torch.stack([expert.eval()(noise()) for expert in experts])
    assert not torch.equal(expected[0], expected[1]) or kind == "a hidden temperature"
    torch.testing.assert_close(model.expert_logits(noise()), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.expert_outputs(noise())[0], expected, rtol=1e-9, atol=1e-9)
    for mine, logits in zip(model.unstack(), expected, strict=True):
        torch.testing.assert_close(mine(noise()), logits, rtol=1e-9, atol=1e-9)


def test_equal_experts_that_reach_the_original_are_refused() -> None:
    """A copy of it would go on with the original's weights, however the copy is trained."""
    experts = [_patched(2.0)]
    experts.append(copy.deepcopy(experts[0]))
    with pytest.raises(ValueError, match=r"experts: expected number 0 .*reaches"):
        ImmunityMoE.from_experts(experts, stage="conv", image_size=12)


class Frozen(Net):
    """Its stage is in no graph, and no version of its maps is counted."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            maps = self.conv(images)
        out: Tensor = self.fc(maps.clone().mean((-2, -1)))
        return out


class Checkpointed(Net):
    """Its second pass, in the backward pass, is after the mixture has put its own tensors back."""

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda maps: self.fc(maps.mean((-2, -1))), self.conv(images), use_reentrant=False)
        return out


@pytest.mark.parametrize("kind", [Frozen, Checkpointed])
def test_networks_whose_gradients_cannot_be_compared_answer(kind: type[Net]) -> None:
    experts = [kind().double().eval() for _ in range(2)]
    model = ImmunityMoE.from_experts(experts, stage="conv", image_size=12, batching="loop")
    with torch.no_grad():
        expected = torch.stack([expert(noise()) for expert in experts])
        torch.testing.assert_close(model.expert_logits(noise()), expected, rtol=1e-9, atol=1e-9)


def test_a_hook_of_a_parameter_is_not_dropped_in_silence() -> None:
    experts = [Net(), Net()]
    experts[1].fc.weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(
        ValueError, match=r"experts: expected number 1 without a hook on the gradient of fc\.weight, got one"
    ):
        ImmunityMoE.from_experts(experts, stage="conv", image_size=12)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("way", ["weight_norm", "prune"])
@pytest.mark.parametrize("batching", BOTH)
def test_weights_that_each_pass_makes_anew_are_trained(way: str, batching: Batching) -> None:
    """They are tensors of a graph in plain attributes, which PyTorch does not copy."""
    torch.manual_seed(0)
    experts = [Net().double().eval() for _ in range(2)]
    for expert in experts:
        if way == "prune":
            prune.random_unstructured(expert.conv, "weight", 0.5)  # type: ignore[no-untyped-call]
        else:
            nn.utils.weight_norm(expert.conv)
        expert(noise())
    model = ImmunityMoE.from_experts(experts, stage="conv", image_size=12, batching=batching)
    expected = torch.stack([expert(noise()) for expert in experts])
    expected.square().sum().backward()
    for _ in range(2):
        model.zero_grad()
        logits = model.expert_logits(noise())
        logits.square().sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for name, value in model.experts.named_parameters():
        own = torch.stack([expert.get_parameter(name).grad for expert in experts])
        torch.testing.assert_close(value.grad, own, rtol=1e-9, atol=1e-9)
    for mine, logits in zip(model.unstack(), expected, strict=True):
        torch.testing.assert_close(mine(noise()), logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batching", BOTH)
def test_activations_left_by_a_pass_do_not_prevent_unstacking(batching: Batching) -> None:
    class Keeping(Net):
        def forward(self, images: Tensor) -> Tensor:
            self.features = images * self.fc.weight.mean()
            return super().forward(self.features)

    experts = [Keeping().double().eval() for _ in range(2)]
    model = ImmunityMoE.from_experts(experts, stage="conv", image_size=12, batching=batching)
    logits = model.expert_logits(noise())
    for mine, expected in zip(model.unstack(), logits, strict=True):
        torch.testing.assert_close(mine(noise()), expected, rtol=1e-9, atol=1e-9)


def test_what_a_pass_leaves_in_a_plain_attribute_is_not_shared() -> None:
    class Remembering(Net):
        def forward(self, images: Tensor) -> Tensor:
            x = super().forward(images - self.mean)
            self.mean = self.mean + float(images.mean())
            return x

    with pytest.raises(ValueError, match="experts: expected number 1 to have the"):
        ImmunityMoE.from_experts([Remembering(), Remembering()], stage="conv", image_size=12)


def test_attributes_that_hold_each_other_are_no_obstacle() -> None:
    experts = [Net(mean=0.0), Net(mean=0.4)]
    for expert in experts:
        expert.mirror = [expert]
    with pytest.raises(ValueError, match=r"experts: expected number 1 to have the"):
        ImmunityMoE.from_experts(experts, stage="conv", image_size=12)


def test_names_and_counters_may_differ() -> None:
    class Counting(Net):
        def forward(self, images: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(images)

    experts = [Counting(title=f"expert {i}") for i in range(2)]
    ImmunityMoE.from_experts(experts, stage="conv", image_size=12)
    assert not hasattr(experts[0], "calls")


@pytest.mark.parametrize("kind", ["torch", "python", "generator", "always"])
def test_random_layers_are_no_difference(kind: str) -> None:
    class Noisy(Net):
        def forward(self, images: Tensor) -> Tensor:
            if kind == "torch" and self.training:
                images = images + torch.randn_like(images)
            if kind == "python":
                images = images * random.random()
            if kind == "generator":
                images = images + torch.rand(images.shape, generator=self.generator)
            if kind == "always":
                images = F.dropout(images, 0.5, training=True)
            return super().forward(images)

    experts = [Noisy(generator=torch.Generator().manual_seed(i)) for i in range(2)]
    before = [expert.generator.get_state() for expert in experts]
    gate, state = RandomSwitchGate(2), torch.get_rng_state()
    ImmunityMoE.from_experts(experts, stage="conv", image_size=12, gate=gate)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(e.generator.get_state(), s) for e, s in zip(experts, before, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_looking_at_experts_leaves_them_as_they_are(training: bool) -> None:
    torch.manual_seed(0)
    experts = [Net(p=0.5).train(training) for _ in range(2)]
    experts[0].norm.train(not training)
    experts[1].norm.train(not training)
    experts[0].fc.weight.requires_grad_(False)
    experts[1].fc.weight.requires_grad_(False)
    before = copy.deepcopy(experts)
    model = ImmunityMoE.from_experts(experts, image_size=12)
    for expert, old in zip(experts, before, strict=True):
        torch.testing.assert_close(expert.state_dict(), old.state_dict(), rtol=0, atol=0)
        assert [m.training for m in expert.modules()] == [m.training for m in old.modules()]
        assert [p.requires_grad for p in expert.parameters()] == [p.requires_grad for p in old.parameters()]
        assert vars(expert).keys() == vars(old).keys()
        assert not any(m._forward_hooks for m in (*expert.modules(), *model.experts.modules()))
    assert [m.training for m in model.experts.modules()] == [m.training for m in experts[0].modules()]
    for name, value in model.experts.state_dict().items():
        assert torch.equal(value[1], experts[1].state_dict()[name])


def test_experts_that_cannot_run_say_so() -> None:
    class Fixed(nn.Sequential):
        def __init__(self, side: int) -> None:
            super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * side**2, 4))

    with pytest.raises(ValueError, match=r"experts: expected number 0 .*\(2, 3, 20, 20\), got Runtime.*image_size"):
        ImmunityMoE.from_experts([Fixed(12), Fixed(12)], stage="0", image_size=20)
    for side in (6, 12, 21, 224):  # which nobody has named
        ImmunityMoE.from_experts([Fixed(side), Fixed(side)], stage="0")
        if side > 8:
            assert ImmunityMoE.from_experts([Fixed(side), Fixed(side)]).stage == "0"
    whole = Net(mean=torch.ones(1, requires_grad=True) * 0.5)  # in a graph
    for stage in ("conv", None):
        with pytest.raises(ValueError, match="experts: expected networks that can be copied, got RuntimeError"):
            ImmunityMoE.from_experts([whole, whole], stage=stage, image_size=12)
    with pytest.raises(ValueError, match=r"experts: expected number 1 to run on images of \(2, 3, 12, 12\)"):
        ImmunityMoE.from_experts([Fixed(12), Fixed(16)], stage="0")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_experts_of_any_dtype_are_looked_at(dtype: torch.dtype) -> None:
    model = ImmunityMoE.from_experts([Net().to(dtype), Net().to(dtype)], image_size=12)
    assert model.stage == "norm"
    with pytest.raises(ValueError, match=r"experts: expected number 1 to have the outputs.*temperature"):
        ImmunityMoE.from_experts([Net().to(dtype), Net(temperature=3.0).to(dtype)], image_size=12)


def test_networks_without_memory_are_taken_as_they_are() -> None:
    model = ImmunityMoE.from_experts([Net().to("meta"), Net().to("meta")], image_size=12)
    assert model.stage == "norm"
    assert model.experts.get_parameter("conv.weight").shape == (2, 4, 3, 3, 3)


def test_inference_mode_does_not_matter() -> None:
    experts = [Net(), Net()]
    with torch.inference_mode():
        model = ImmunityMoE.from_experts(experts, image_size=12, switch="mean").eval()
        assert model.expert_outputs(noise().float())[0].shape == (2, 4, 4)


def test_networks_on_images_of_one_channel() -> None:
    def net(outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, outputs, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    model = ImmunityMoE.from_experts([net(4), net(4)], stage="0", gate=RandomSwitchGate(2, net(2)))
    assert model.expert_outputs(torch.rand(2, 1, 12, 12))[0].shape == (2, 2, 4)


def test_one_who_changes_the_images_in_place_is_refused() -> None:
    def net() -> nn.Module:
        return Net(prepare=lambda images: images.sub_(0.5))

    with pytest.raises(ValueError, match="experts: expected number 0 to leave its images"):
        ImmunityMoE.from_experts([net(), net()], stage="conv", image_size=12)


# Names, ties


class Renamed(nn.Module):
    """A layer under two names, as pretrainedmodels has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)
        self.last_linear = self.fc

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.last_linear(self.conv(images).tanh().mean((-2, -1)))
        return out


class Listed(nn.Module):
    """Layers by name, and again in a list, which is what runs; one of them has statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)
        self.layers = nn.ModuleList([self.conv, self.norm])

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = layer(images)
        out: Tensor = self.fc(images.tanh().mean((-2, -1)))
        return out


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.first, self.fc = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fc.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc(self.first(self.conv(images).mean((-2, -1))).tanh())
        return out


def _twice() -> nn.Sequential:
    """A layer and a normalisation twice in a chain, on both sides of the cut."""
    conv, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    return nn.Sequential(
        OrderedDict(
            conv=conv, norm=norm, act=nn.Tanh(), conv2=conv, norm2=norm, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()
        )
    )


SHARING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "two names": (Renamed, "conv"),
    "a list": (Listed, "norm"),
    "tied weights": (Tied, "conv"),
    "twice in a chain": (_twice, "act"),
}


@pytest.mark.parametrize(("kind", "batching"), grids.every(2, SHARING, BOTH))
def test_a_tensor_in_several_places_is_trained_as_in_one_expert(kind: str, batching: Batching) -> None:
    make, stage = SHARING[kind]
    torch.manual_seed(0)
    experts = [make().double() for _ in range(3)]
    gate = RandomSwitchGate(3, switch="off").double()
    model = ImmunityMoE.from_experts(experts, stage=stage, image_size=12, batching=batching, gate=gate)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    loss_fn = FusedImmunityLoss(0.7, 1.3, 0.01, size=(12, 12))

    logits, maps, weights = model.expert_outputs(noise())
    targets = TARGETS % logits.shape[2]
    loss = 1.7 * loss_fn(logits, maps, targets, weights)
    loss.backward()

    caught: list[Tensor] = []
    for expert in experts:
        expert.get_submodule(stage).register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    alone = [expert(noise()) for expert in experts]
    expected = 1.7 * loss_fn(alone, caught, targets, gate(noise()).detach())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for index, expert in enumerate(experts):
        for (name, mine), theirs in zip(model.experts.named_parameters(), expert.parameters(), strict=True):
            assert mine.grad is not None, name
            torch.testing.assert_close(mine.grad[index], theirs.grad, rtol=1e-7, atol=1e-10)
        for mine, theirs in zip(model.experts.buffers(), expert.buffers(), strict=True):
            torch.testing.assert_close(mine[index], theirs, rtol=1e-9, atol=1e-12)
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("batching", BOTH)
@pytest.mark.parametrize("way", ["reverse", "forward"])
def test_a_layer_on_both_sides_of_the_cut_is_trained_as_in_one(way: Any, batching: Batching) -> None:
    torch.manual_seed(0)
    experts = [_twice().double() for _ in range(3)]
    gate = RandomSwitchGate(3, switch="off").double()
    model = ImmunityMoE.from_experts(experts, stage="act", image_size=12, batching=batching, gate=gate)
    loss_fn = FusedImmunityLoss(0.7, 1.3, 0.01, size=(12, 12))
    maps, weights = model.trunk_outputs(noise())
    loss, buffers = loss_fn.from_head(model.head_outputs, maps, TARGETS % 3, weights, has_aux=True, double_backprop=way)
    model.update_head(buffers)
    found = torch.autograd.grad(1.7 * loss, list(model.experts.parameters()))

    caught: list[Tensor] = []
    for expert in experts:
        expert.get_submodule("act").register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    alone = [expert(noise()) for expert in experts]
    expected = loss_fn(alone, caught, TARGETS % 3, gate(noise()).detach())
    for index, expert in enumerate(experts):
        own = torch.autograd.grad(1.7 * expected, list(expert.parameters()), retain_graph=True)
        for mine, theirs in zip(found, own, strict=True):
            torch.testing.assert_close(mine[index], theirs, rtol=1e-9, atol=1e-12)
        for buffer, theirs in zip(model.experts.buffers(), expert.buffers(), strict=True):
            torch.testing.assert_close(buffer[index], theirs, rtol=1e-12, atol=1e-12)


def test_a_stage_may_go_by_any_of_its_names() -> None:
    experts = [Listed().double(), Listed().double()]
    models = [ImmunityMoE.from_experts(experts, stage=stage, image_size=12) for stage in ("norm", "layers.1")]
    one, other = (model.double().eval().expert_outputs(noise())[1] for model in models)
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(("kind", "batching"), grids.every(2, SHARING, BOTH))
def test_a_state_dict_from_after_a_pass_loads(kind: str, batching: Batching) -> None:
    make, stage = SHARING[kind]
    torch.manual_seed(0)
    models = []
    for _ in range(2):
        experts = [make().double() for _ in range(2)]
        gate = RandomSwitchGate(2, switch="off").double()
        models.append(ImmunityMoE.from_experts(experts, stage=stage, image_size=12, batching=batching, gate=gate))
    model, other = models
    for _ in range(2):
        model(noise())
        model.expert_outputs(noise())
        if model.has_head:
            _, buffers = model.head_outputs(model.trunk_outputs(noise())[0])
            model.update_head(buffers)
    other(noise())
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other.eval()(noise()), model.eval()(noise()))
    for mine, theirs in zip(model.unstack(), other.unstack(), strict=True):
        assert torch.equal(mine(noise()), theirs(noise()))
