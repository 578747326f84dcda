"""Experts of different structures in one mixture: the same answers as each alone, and all that a module can do."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.experts import create
from immunity_fast.functional import mixture_log_probabilities
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.models.stacking import channels_last_
from tests.probed import Attention, Net, Permuted
from tests.tensors import assert_same_state, noise


class Last(nn.Module):
    """A network whose maps have their channels last, and behind whose stage an operation is in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Permuted(0, 2, 3, 1))
        self.fc = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc(self.stage(images).relu_().mean((1, 2)))
        return out


def _networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [create("resnet8", 4).double(), Net().double(), Last().double()]


def _model(training: bool = False, **options: Any) -> ImmunityMoE:
    options = {"stage": ["layer1", "norm", "stage"], "image_size": 12, "switch": "off"} | options
    return ImmunityMoE.from_experts(_networks(), **options).double().train(training)


@pytest.mark.parametrize("training", [True, False])
def test_each_computes_what_it_computes_alone(training: bool) -> None:
    model, networks = _model(training), [network.train(training) for network in _networks()]
    logits, activations, gate = model.expert_outputs(noise())
    torch.testing.assert_close(logits, torch.stack([network(noise()) for network in networks]), rtol=1e-12, atol=0)
    assert [tuple(maps.shape) for maps in activations] == [(4, 16, 12, 12), (4, 4, 12, 12), (4, 6, 10, 10)]
    for index, maps in enumerate(activations):
        own = torch.autograd.grad(logits[index].sum(), maps, retain_graph=True)[0]
        assert own.any()
        others = [logits[other].sum() for other in range(3) if other != index]
        assert not torch.autograd.grad(sum(others[1:], others[0]), maps, retain_graph=True)[0].any()
    torch.testing.assert_close(model.eval()(noise()), mixture_log_probabilities(model.expert_logits(noise()), gate))
    for mine, theirs in zip(model.experts, networks, strict=True):
        assert isinstance(mine, nn.Module)
        assert_same_state(mine, theirs)


def test_gradients_are_those_of_each_alone() -> None:
    model, networks = _model(True), _networks()
    weights = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits, activations, _ = model.expert_outputs(noise())
    maps_too = sum(maps.square().mean() for maps in activations)
    ((weights * logits).sum() + maps_too).backward()
    for index, network in enumerate(networks):
        caught: list[Tensor] = []
        stage = network.get_submodule(("layer1", "norm", "stage")[index])

        def keep(_m: object, _i: object, output: Tensor, caught: list[Tensor] = caught) -> Tensor:
            caught.append(output)
            return output.clone()

        stage.register_forward_hook(keep)
        ((weights[index] * network(noise())).sum() + caught[0].square().mean()).backward()
        for (name, mine), (_, theirs) in zip(
            model.experts.get_submodule(str(index)).named_parameters(), network.named_parameters(), strict=True
        ):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_what_it_is_made_of_can_be_asked() -> None:
    model = _model(classes=("cat", "dog", "cow", "ant"))
    assert model.stage == ("layer1", "norm", "stage")
    assert model.layout == ("NCHW", "NCHW", "NHWC")
    assert (model.image_size, model.num_classes) == ((12, 12), 4)
    assert model.classes == ("cat", "dog", "cow", "ant")
    assert not model.has_head
    with pytest.raises(ValueError, match=r"experts: expected nn\.Sequential of one structure"):
        model.trunk_outputs(noise())


def test_one_stage_and_layout_may_stand_for_all() -> None:
    torch.manual_seed(0)
    networks = [Net(), nn.Sequential()]
    networks[1] = nn.Sequential()
    networks[1].add_module("conv", nn.Conv2d(3, 7, 5))
    networks[1].add_module("pool", nn.AdaptiveAvgPool2d(1))
    networks[1].add_module("flat", nn.Flatten())
    networks[1].add_module("fc", nn.Linear(7, 4))
    model = ImmunityMoE.from_experts(networks, stage="conv", layout="NCHW", image_size=12)
    assert (model.stage, model.layout) == ("conv", "NCHW")
    assert [tuple(maps.shape) for maps in model.expert_outputs(noise().float())[1]] == [(4, 4, 12, 12), (4, 7, 8, 8)]


def test_experts_of_one_structure_may_have_stages_of_their_own() -> None:
    torch.manual_seed(0)
    networks = [create("resnet8", 4).double() for _ in range(2)]
    model = ImmunityMoE.from_experts(networks, stage=["stem", "layer2"], image_size=12).double()
    logits, activations, _ = model.expert_outputs(noise())
    assert [tuple(maps.shape) for maps in activations] == [(4, 16, 12, 12), (4, 32, 6, 6)]
    torch.testing.assert_close(logits, torch.stack([network(noise()) for network in networks]), rtol=1e-10, atol=0)


def test_a_second_pass_before_the_backward_pass_of_both() -> None:
    model, plain = _model(True), _model(True)
    first = model.expert_logits_with_copied_buffers(noise())
    second = model.expert_logits_with_copied_buffers(noise().flip(0))
    (first.square() + second).sum().backward()
    plain.expert_logits(noise())
    plain.expert_logits(noise().flip(0))
    assert_same_state(model, plain)


def _saved(model: ImmunityMoE) -> ImmunityMoE:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: ImmunityMoE = torch.load(file, weights_only=False)
    return loaded


def _state_loaded(model: ImmunityMoE) -> ImmunityMoE:
    other = _model()
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("again", [copy.deepcopy, _saved, _state_loaded])
def test_a_copy_computes_the_same_and_is_independent(again: Callable[[ImmunityMoE], ImmunityMoE]) -> None:
    model = _model()
    twin = again(model)
    expected = model(noise())
    assert torch.equal(twin(noise()), expected)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(model(noise()), expected)


def test_names_of_tensors_count_the_experts() -> None:
    names = set(_model().state_dict())
    for index, network in enumerate(_networks()):
        assert {f"experts.{index}.{name}" for name in network.state_dict()} <= names


def test_unstacked_experts_are_copies() -> None:
    half = (0.5, 0.5, 0.5)
    model = _model(mean=half, std=half)
    experts = model.unstack()
    expected = model.expert_logits(noise())
    for expert, logits in zip(experts, expected, strict=True):
        torch.testing.assert_close(expert(noise()), logits, rtol=1e-10, atol=1e-12)
        for parameter in expert.parameters():
            parameter.data.zero_()
    assert torch.equal(model.expert_logits(noise()), expected)


def test_layout_and_dtype_are_converted_as_of_any_module() -> None:
    model = _model()
    expected = model(noise())
    model.to(memory_format=torch.channels_last)
    for name in ("0.stem.0.weight", "1.conv.weight", "2.stage.0.weight"):
        assert model.experts.get_parameter(name).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(noise()), expected, rtol=1e-10, atol=1e-12)
    model.to(memory_format=torch.contiguous_format)
    channels_last_(model)
    torch.testing.assert_close(model(noise()), expected, rtol=1e-10, atol=1e-12)
    model.to(torch.float32)
    torch.testing.assert_close(model(noise().float()), expected.float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"images: expected torch\.float32.* got torch\.float64"):
        model.expert_outputs(noise())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batching": "vmap"}, "batching: expected 'auto' or 'loop' for experts of different structures, got 'vmap'"),
        ({"stage": ["layer1", "norm"]}, "stage: expected one for all or 3, one an expert, got 2"),
        ({"stage": "layer1"}, "stage: expected the name of a submodule of the experts' .*, got 'layer1'"),
        ({"layout": ["NCHW"]}, "layout: expected one for all or 3, one an expert, got 1"),
        ({"classes": ("cat", "dog")}, "classes: expected 4 names, got 2"),
    ],
)
def test_wrong_options_are_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _model(**change)


def test_classes_are_names() -> None:
    with pytest.raises(TypeError, match="classes: expected 4 names, got 'abcd'"):
        _model(classes="abcd")


@pytest.mark.parametrize(
    ("networks", "text"),
    [
        (lambda: [Net(), create("resnet8", 5)], "number 1 to have 4 classes, as number 0, got 5"),
        (lambda: [Net(), Last().double()], "number 1 to be on the device and in the dtype of the others"),
        (lambda: [Net(), nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())], "number 1 to run on images of"),
    ],
)
def test_experts_that_do_not_fit_are_named(networks: Callable[[], list[nn.Module]], text: str) -> None:
    with pytest.raises(ValueError, match=f"experts: expected {text}"):
        ImmunityMoE.from_experts(networks(), image_size=12)


def test_an_expert_whose_copy_reaches_the_original_is_refused() -> None:
    networks = [Net(), Last()]
    usual = networks[0].forward
    networks[0].forward = lambda images: usual(images)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"number 0 to have the .* a copy has its own"):
        ImmunityMoE.from_experts(networks, stage=["norm", "stage"], image_size=12)


def test_a_list_of_architectures_takes_turns() -> None:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8,googlenet", 3, 4, image_size=12, stage=["layer1", "stem", "stem"], switch="off")
    assert [expert.stage_names[-1] for expert in model.experts] == ["layer3", "inception5", "layer3"]
    images = noise().float()
    logits = torch.stack([expert(images) for expert in ImmunityMoE.unstack(model)])
    torch.testing.assert_close(model.expert_logits(images), logits, rtol=1e-5, atol=1e-5)
    assert model.arch == "resnet8,googlenet"
    with pytest.raises(ValueError, match=r"batching: .* of different structures, got 'vmap'"):
        ImmunityMoE(("resnet8", "googlenet"), 2, image_size=12, batching="vmap")


def test_equal_names_are_one_stack() -> None:
    model = ImmunityMoE(["resnet8", "resnet8"], 2, 4, image_size=12)
    assert model.has_head
    assert model.experts.get_parameter("stem.0.weight").shape[0] == 2


def test_a_single_network_may_be_any() -> None:
    network = Attention(2)
    model = SingleNetwork.from_experts([network], stage="conv", image_size=12).eval()
    images = noise().float()
    torch.testing.assert_close(model(images), network.eval()(images).log_softmax(-1), rtol=1e-5, atol=1e-6)
    assert not list(model.gate.parameters())
    with pytest.raises(ValueError, match="experts: expected one network, got 2"):
        SingleNetwork.from_experts([Net(), Net()], image_size=12)


def test_grey_images_have_a_grey_gate() -> None:
    networks = [nn.Sequential(nn.Conv2d(1, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()) for width in (4, 4)]
    model = ImmunityMoE.from_experts(networks, image_size=12, mean=(0.5,), std=(0.5,))
    assert model(torch.rand(2, 1, 12, 12)).shape == (2, 4)
    assert model.gate.network[0].in_channels == 1  # type: ignore[index]
