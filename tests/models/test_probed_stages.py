"""What lies behind a stage: operations in place, and maps whose channels are last."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate
from immunity_fast.models.stacking import Batching
from tests.probed import BOTH, TARGETS, Fixed, Net, Permuted
from tests.tensors import noise

# In-place operations behind the stage


def _behind(inplace: bool) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 5, 3, padding=1),
            norm=nn.BatchNorm2d(5),
            act=nn.ReLU(inplace=inplace),
            conv2=nn.Conv2d(5, 5, 3, padding=1),
            pool=nn.AdaptiveAvgPool2d(2),
            flat=nn.Flatten(),
            fc=nn.Linear(20, 4),
        )
    )


class Whole(nn.Module):
    """The same, no chain; `how` is what the ReLU is made of."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = _behind(False), how

    def forward(self, images: Tensor) -> Tensor:
        x = self.inner.norm(self.inner.conv(images))
        if self.how == "functional":
            x = F.relu(x, inplace=True)
        elif self.how == "method":
            x.relu_()
        elif self.how == "of a view":
            x.flatten(1).relu_()
        elif self.how == "in training" and not self.training:
            x = x.relu()
        elif self.how == "in training":
            x = x.relu_()
        else:
            x = x.relu()
        out: Tensor = self.inner[3:](x)
        return out


def _gradients(experts: list[nn.Module], stage: str, batching: Batching, way: str) -> list[Tensor]:
    gate = RandomSwitchGate(2, switch="off").double()
    model = ImmunityMoE.from_experts(experts, stage=stage, image_size=12, batching=batching, gate=gate)
    loss_fn = FusedImmunityLoss(0.5, 1.3, 0.02, size=(12, 12))
    uniform = torch.full((2,), 0.5, dtype=torch.float64)
    if way == "outputs":
        logits, maps, _ = model.expert_outputs(noise())
        loss = loss_fn(logits, maps, TARGETS, uniform)
    else:
        maps, _ = model.trunk_outputs(noise())
        loss, _ = loss_fn.from_head(
            model.head_outputs,
            maps,
            TARGETS,
            uniform,
            has_aux=True,
            double_backprop=way,  # type: ignore[arg-type]
        )
    return list(torch.autograd.grad(loss, list(model.experts.parameters())))


@pytest.mark.parametrize("batching", BOTH)
@pytest.mark.parametrize("way", ["outputs", "reverse", "forward"])
def test_what_follows_in_place_in_a_chain_gets_a_copy(way: str, batching: Batching) -> None:
    torch.manual_seed(0)
    experts: list[nn.Module] = [_behind(True).double() for _ in range(2)]
    plain: list[nn.Module] = [_behind(False).double() for _ in range(2)]
    for one, other in zip(plain, experts, strict=True):
        one.load_state_dict(other.state_dict())
    expected = _gradients(plain, "norm", batching, way)
    for mine, theirs in zip(_gradients(experts, "norm", batching, way), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["functional", "method", "of a view", "in training"])
def test_what_follows_in_place_in_a_network_gets_a_copy(how: str) -> None:
    torch.manual_seed(0)
    experts: list[nn.Module] = [Whole(how).double() for _ in range(2)]
    plain: list[nn.Module] = [Whole("").double() for _ in range(2)]
    for one, other in zip(plain, experts, strict=True):
        one.load_state_dict(other.state_dict())
    expected = _gradients(plain, "inner.norm", "loop", "outputs")
    for mine, theirs in zip(_gradients(experts, "inner.norm", "loop", "outputs"), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "vgg", "densenet"])
def test_torchvisions_in_place_relus_change_no_gradient(name: str) -> None:
    models = pytest.importorskip("torchvision.models")

    def vgg() -> nn.Module:
        net = models.VGG(models.vgg.make_layers([8, "M", 8, 8, "M", 8]), num_classes=4, init_weights=False)
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)
        return net

    def resnet() -> nn.Module:
        net = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
        net.layer3, net.layer4, net.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 4)  # most of its weights
        return net

    make, stage = {
        "resnet18": (resnet, "bn1"),
        "vgg": (vgg, "features.3"),
        "densenet": (lambda: models.DenseNet(4, (2,), num_init_features=8, bn_size=2, num_classes=4), "features"),
    }[name]
    torch.manual_seed(0)
    experts: list[nn.Module] = [make().double() for _ in range(2)]
    plain = copy.deepcopy(experts)
    for part in [part for network in plain for part in network.modules()]:
        if isinstance(part, nn.ReLU):
            part.inplace = False
    patch = pytest.MonkeyPatch()
    mine = _gradients(experts, stage, "loop", "outputs")
    usual = F.relu
    patch.setattr(F, "relu", lambda x, inplace=False: usual(x))
    expected = _gradients(plain, stage, "loop", "outputs")
    patch.undo()
    for one, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("batching", BOTH)
@pytest.mark.parametrize("chain", [True, False])
def test_one_that_becomes_in_place_later_is_an_error(chain: bool, batching: Batching) -> None:
    model = ImmunityMoE.from_experts(
        [_behind(False) if chain else Whole("") for _ in range(2)],
        stage="norm" if chain else "inner.norm",
        image_size=12,
        batching=batching,
    )
    if chain:
        model.experts.get_submodule("act").inplace = True
    else:
        model.experts.how = "method"
    with pytest.raises((ValueError, RuntimeError), match=r"in-place operation behind|inplace"):
        model.expert_outputs(noise().float())


def test_a_hook_that_returns_a_copy_keeps_the_loss_right() -> None:
    """As `FusedImmunityLoss` says to those who catch activations themselves."""
    torch.manual_seed(0)
    experts: list[nn.Module] = [Whole("method").double() for _ in range(2)]
    expected = _gradients(experts, "inner.norm", "loop", "outputs")
    caught: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        caught.append(output)
        return output.clone()

    for expert in experts:
        expert.get_submodule("inner.norm").register_forward_hook(keep)
    logits = [expert(noise()) for expert in experts]
    loss = FusedImmunityLoss(0.5, 1.3, 0.02, size=(12, 12))(logits, caught, TARGETS)
    for index, expert in enumerate(experts):
        found = torch.autograd.grad(loss, list(expert.parameters()), retain_graph=True)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs[index], rtol=1e-9, atol=1e-12)


# The maps' axes


class Last(nn.Module):
    """A network whose maps are (B, h, w, C) between its two convolutions; `width` is C."""

    def __init__(self, width: int = 5, *, last: bool = True, inplace: bool = False) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), Permuted(0, 2, 3, 1) if last else nn.Identity())
        self.act = nn.ReLU(inplace=inplace)
        self.rest = nn.Sequential(Permuted(0, 3, 1, 2) if last else nn.Identity(), nn.Conv2d(width, 4, 3, stride=2))

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.rest(self.act(self.stage(images))).tanh().mean((-2, -1))
        return out


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh().mean((-2, -1))


def _as_chain(network: nn.Module) -> nn.Module:
    assert isinstance(network, Last)
    return nn.Sequential(OrderedDict(stage=network.stage, act=network.act, rest=network.rest, pool=Pooled()))


def _of_layout(last: bool, chain: bool, batching: Batching, **options: Any) -> ImmunityMoE:
    torch.manual_seed(0)
    experts: list[nn.Module] = [Last(last=last, **options).double() for _ in range(2)]
    gate = RandomSwitchGate(2, switch="off").double()
    experts = [_as_chain(expert) for expert in experts] if chain else experts
    return ImmunityMoE.from_experts(experts, stage="stage", image_size=12, gate=gate, batching=batching)


@pytest.mark.parametrize("batching", BOTH)
@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_maps_with_channels_last_are_found_and_read_as_such(chain: bool, inplace: bool, batching: Batching) -> None:
    found = []
    for last in (True, False):
        model = _of_layout(last, chain, batching, inplace=inplace and last)
        assert model.layout == ("NHWC" if last else "NCHW")
        logits, maps, gate = model.expert_outputs(noise(4, 12)[:, :, :10])
        assert [tuple(part.shape) for part in maps] == [(4, 5, 10, 12)] * 2
        loss, terms = FusedImmunityLoss(0.5, 1.3, 0.02, size=(10, 12))(logits, maps, TARGETS, gate, return_terms=True)
        found.append([loss, *terms, *torch.autograd.grad(loss, list(model.parameters()))])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batching", BOTH)
@pytest.mark.parametrize("double_backprop", ["reverse", "forward"])
def test_a_head_behind_channels_last_is_differentiated_alike(double_backprop: Any, batching: Batching) -> None:
    found = []
    for last in (True, False):
        model = _of_layout(last, True, batching)
        maps, gate = model.trunk_outputs(noise())
        loss, _ = FusedImmunityLoss(0.5, 1.3, 0.02, size=(12, 12)).from_head(
            model.head_outputs, maps, TARGETS, gate, has_aux=True, double_backprop=double_backprop
        )
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_torchvisions_swin_is_read_with_its_channels_last() -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    experts = [models.SwinTransformer([2, 2], 8, [1, 1], [1, 2], [4, 4], num_classes=4).double() for _ in range(2)]
    gate = RandomSwitchGate(2, switch="off").double()
    model = ImmunityMoE.from_experts(experts, stage="features.1", image_size=32, gate=gate).eval()
    assert model.layout == "NHWC"
    images = noise(4, 32)
    logits, maps, weights = model.expert_outputs(images)
    assert [tuple(part.shape) for part in maps] == [(4, 8, 16, 16)] * 2
    loss_fn = FusedImmunityLoss(size=(32, 32))
    _, terms = loss_fn(logits, maps, TARGETS, weights, return_terms=True)
    caught: list[Tensor] = []
    for expert in experts:
        expert.features[1].register_forward_hook(lambda _module, _inputs, output: caught.append(output))
    alone = [expert.eval()(images) for expert in experts]
    own = FusedImmunityLoss(size=(32, 32), layout="NHWC")
    _, expected = own(alone, caught, TARGETS, weights, return_terms=True)
    for mine, theirs in zip(terms, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    _, wrong = loss_fn(alone, caught, TARGETS, weights, return_terms=True)
    assert not torch.isclose(wrong.mutual_information, expected.mutual_information, rtol=1e-3)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("width", [3, 12, 24])
def test_the_layout_is_told_whatever_the_channels(last: bool, width: int) -> None:
    """Also where there are as many channels as rows or columns."""
    model = ImmunityMoE.from_experts([Last(width, last=last) for _ in range(2)], image_size=12)
    assert model.stage == "act"
    assert model.layout == ("NHWC" if last else "NCHW")


@pytest.mark.parametrize(("axes", "layout"), [((0, 1, 2, 3), "NCHW"), ((0, 2, 3, 1), "NHWC")])
def test_two_equal_sides_tell_where_nothing_else_does(axes: tuple[int, ...], layout: str) -> None:
    model = ImmunityMoE.from_experts([Fixed(4, *axes), Fixed(4, *axes)], image_size=12)
    assert model.layout == layout
    with pytest.raises(ValueError, match=r"layout: expected .*NHWC.*\(2, 9, 9, 9\)"):
        ImmunityMoE.from_experts([Fixed(9, *axes), Fixed(9, *axes)], image_size=12)
    said: Any = layout
    assert ImmunityMoE.from_experts([Fixed(9, *axes), Fixed(9, *axes)], image_size=12, layout=said).layout == layout


def test_stages_without_a_map_are_named() -> None:
    with pytest.raises(ValueError, match=r"stage: expected a map .* of 'fc', got a tensor \(2, 4\)"):
        ImmunityMoE.from_experts([Net(), Net()], stage="fc", image_size=12)
    with pytest.raises(ValueError, match=r"layout: .*'NCWH'"):
        ImmunityMoE.from_experts([Net(), Net()], stage="conv", image_size=12, layout="NCWH")  # type: ignore[arg-type]

    class Tokens(nn.Sequential):
        pass

    tokens = [Tokens(nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.AvgPool1d(100), nn.Flatten()) for _ in range(2)]
    with pytest.raises(ValueError, match=r"layout: .* '1' returns \(2, 4, 100\)"):
        ImmunityMoE.from_experts(tokens, stage="1", image_size=12)

    class Again(Net):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + self.norm(self.conv(images)).mean((-2, -1))

    with pytest.raises(ValueError, match="stage: expected 'conv' to run once in a forward pass, got 2 times"):
        ImmunityMoE.from_experts([Again(), Again()], stage="conv", image_size=12)
