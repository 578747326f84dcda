"""The expert networks: their sizes, their stages, and what training through Grad-CAM asks of them."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from immunity_fast import experts
from immunity_fast.experts.staged import StagedNetwork, default_stage, split
from tests import grids
from tests.tensors import assert_same_state

STAGES = {
    "resnet18": ("stem", "layer1", "layer2", "layer3", "layer4"),
    "googlenet": ("stem", "inception3", "inception4", "inception5"),
    "densenet121": ("stem", "block1", "block2", "block3", "block4"),
    "resnet8": ("stem", "layer1", "layer2", "layer3"),
}
PARAMETERS = {"resnet18": 11_173_962, "googlenet": 6_166_250, "densenet121": 6_956_298, "resnet8": 78_042}
# The last stage larger than 8×8, by its place in the tuples above: the first two of all four have the image's size, and
# each that follows half the one before.
DEFAULTS: list[tuple[int | tuple[int, int], int]] = [(32, 2), ((20, 64), 2), (64, 3), (9, 1)]

each_name = pytest.mark.parametrize("name", list(STAGES))
each_small = pytest.mark.parametrize(
    "name", grids.sampled(STAGES, ordinary=lambda name: name in ("googlenet", "resnet8"))
)
ALL = [(name, stage) for name in STAGES for stage in STAGES[name]]


@cache
def _built(name: str) -> StagedNetwork:
    torch.manual_seed(0)
    return experts.create(name)


def _expert(name: str) -> StagedNetwork:
    """A copy of its own for each test: initialising is the slow part."""
    return copy.deepcopy(_built(name))


def _images(*size: int, seed: int = 1) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))


@each_name
def test_parameter_count(name: str) -> None:
    assert sum(p.numel() for p in _expert(name).parameters() if p.requires_grad) == PARAMETERS[name]


@each_name
def test_children_are_the_stages_and_a_classifier(name: str) -> None:
    network = _expert(name)
    assert network.stage_names == STAGES[name]
    assert [child for child, _ in network.named_children()] == [*STAGES[name], "classifier"]


@each_name
@pytest.mark.parametrize("size", [(8, 8), (17, 12)])
def test_logits_at_any_size(name: str, size: tuple[int, int]) -> None:
    logits = _expert(name)(_images(*size))
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@each_small
def test_float64(name: str) -> None:
    network = _expert(name).eval()
    expected = network(_images(16, 16))
    actual = network.double()(_images(16, 16).double())
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual.float(), expected, rtol=1e-3, atol=1e-4)


@each_name
def test_initial_weights(name: str) -> None:
    for module in _expert(name).modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            spread = module.weight.std() * (fan_out / 2) ** 0.5
            # Five standard errors of a standard deviation estimated from that many normal draws.
            assert abs(spread - 1) < 5 / (2 * module.weight.numel()) ** 0.5
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("name", "stage"),
    grids.sampled(
        ALL,  # resnet18 has resnet8's blocks
        ordinary=lambda name, stage: name == "resnet8" or (stage == STAGES[name][2] and name != "resnet18"),
    ),
)
def test_trunk_then_head_is_the_network(name: str, stage: str) -> None:
    whole, cut = _expert(name), _expert(name)
    trunk, head = cut.split(stage)
    # Eval after train, so that the running statistics are no longer 0 and 1.
    for training in (True, False):
        for module in (whole, trunk, head):
            module.train(training)
        activations = trunk(_images(16, 16))
        captured = activations.clone()
        assert torch.equal(head(activations), whole(_images(16, 16)))
        assert torch.equal(activations, captured)  # nothing after the stage works in place
        assert_same_state(cut, whole)


@pytest.mark.parametrize(
    ("name", "stage"),
    grids.sampled(ALL, ordinary=lambda name, stage: name == "resnet8" or stage == STAGES[name][2]),
)
def test_split_partitions_and_shares(name: str, stage: str) -> None:
    network = _expert(name)
    trunk, head = network.split(stage)
    assert type(trunk) is type(head) is nn.Sequential
    parts = [*trunk.named_parameters(), *head.named_parameters()]
    assert [key for key, _ in parts] == [key for key, _ in network.named_parameters()]
    assert all(part is whole for (_, part), whole in zip(parts, network.parameters(), strict=True))
    assert [*trunk.state_dict(), *head.state_dict()] == list(network.state_dict())


def test_state_dict_through_a_split() -> None:
    source, target = experts.create("resnet8"), experts.create("resnet8")
    source(_images(16, 16))  # moves the running statistics
    trunk, head = source.split("layer1")
    target_trunk, target_head = target.split("layer2")
    target.load_state_dict({**trunk.state_dict(), **head.state_dict()})
    assert_same_state(target, source)
    state = source.state_dict()
    target_trunk.load_state_dict({key: state[key].clone().zero_() for key in target_trunk.state_dict()})
    target_head.load_state_dict({key: state[key].clone().zero_() for key in target_head.state_dict()})
    assert not any(value.any() for value in target.state_dict().values())


def test_split_keeps_modes() -> None:
    network = _expert("resnet8").eval()
    network.get_submodule("layer3").train()
    trunk, head = network.split("layer2")
    assert not trunk.training
    assert not head.training
    assert network.get_submodule("layer3").training
    assert not network.get_submodule("layer1").training


@pytest.mark.parametrize("stage", ["layer5", "classifier", ""])
def test_unknown_stage(stage: str) -> None:
    with pytest.raises(ValueError, match=f"expected one of stem, layer1, layer2, layer3, got '{stage}'$"):
        _expert("resnet8").split(stage)


def test_split_of_any_sequential() -> None:
    relu = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 5, 3), relu, nn.Flatten(), nn.LazyLinear(2))
    expected = network(_images(12, 12))
    for stage in "01234":
        trunk, head = split(network, stage)
        assert torch.equal(head(trunk(_images(12, 12))), expected)
    with pytest.raises(ValueError, match=r"expected one of 0, 1, 2, 3, 4, got '5'$"):
        split(network, "5")


@pytest.mark.parametrize(
    ("size", "place", "name"),
    grids.sampled(
        [(size, place, name) for name in STAGES for size, place in DEFAULTS],
        ordinary=lambda size, _, name: name == "resnet8" or size == 32,
    ),
)
def test_default_stage(size: int | tuple[int, int], place: int, name: str) -> None:
    network = _expert(name)
    assert default_stage(network, size) == STAGES[name][place]
    trunk, _ = network.split(default_stage(network, 32))
    assert trunk(_images(32, 32)).shape[2:] == (16, 16)


@each_small
@pytest.mark.parametrize("size", [8, (8, 64)])
def test_default_stage_of_small_images(name: str, size: int | tuple[int, int]) -> None:
    width = size if isinstance(size, int) else size[1]
    with pytest.raises(
        ValueError, match=rf"8×8 for images of 8×{width}, got none \(stem 8×{width}, .*\); name a stage"
    ):
        default_stage(_expert(name), size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_default_stage_leaves_the_network_alone(dtype: torch.dtype) -> None:
    network = _expert("resnet8").to(dtype)
    network.get_submodule("layer2").eval()
    before = copy.deepcopy(network)
    assert default_stage(network, 32) == "layer2"
    assert_same_state(network, before)
    assert [module.training for module in network.modules()] == [module.training for module in before.modules()]
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("stage", STAGES["resnet8"])
def test_double_backward(stage: str) -> None:
    network = _expert("resnet8").double()
    trunk, head = network.split(stage)
    images = _images(8, 8).double()

    def penalty() -> Tensor:
        activations = trunk(images)
        (gradient,) = torch.autograd.grad(head(activations)[:, 3].sum(), activations, create_graph=True)
        loss: Tensor = (gradient.sum((2, 3)) * activations.mean((2, 3))).square().sum()
        return loss

    weight = network.get_parameter("stem.0.weight")
    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction = torch.randn(weight.shape, dtype=weight.dtype, generator=torch.Generator().manual_seed(2))
    step = 1e-7
    with torch.no_grad():
        weight.add_(direction, alpha=step)
    above = penalty().detach()
    with torch.no_grad():
        weight.sub_(direction, alpha=2 * step)
    below = penalty().detach()
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / (2 * step), rtol=1e-4, atol=0)


@each_small
def test_vmap_over_stacked_experts(name: str) -> None:
    """Two experts at once, batch statistics and running statistics included, equal the two one after the other."""
    networks = [_expert(name), _expert(name)]
    with torch.no_grad():
        for parameter in networks[1].parameters():
            parameter.mul_(1.1)
    parameters, buffers = stack_module_state(list[nn.Module](networks))
    images = _images(16, 16)

    def forward(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        logits: Tensor = functional_call(networks[0], (parameters, buffers), (images,))
        return logits

    with torch.no_grad():
        actual = vmap(forward)(parameters, buffers)
        expected = torch.stack([network(images) for network in networks])
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    for key, stacked in buffers.items():
        expected_buffers = torch.stack([network.get_buffer(key) for network in networks])
        torch.testing.assert_close(stacked, expected_buffers, rtol=1e-3, atol=1e-3)


def test_create() -> None:
    assert set(experts.NAMES) > set(STAGES)
    assert experts.create("resnet8", num_classes=7)(_images(8, 8)).shape == (2, 7)
    with pytest.raises(ValueError, match=r"resnet18, googlenet, .*resnet8.*got 'resnet9'; did you mean resnet8"):
        experts.create("resnet9")
    for num_classes in (1, 0, -3):
        with pytest.raises(ValueError, match=f"num_classes: expected at least 2, got {num_classes}"):
            experts.create("resnet8", num_classes)
