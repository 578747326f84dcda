"""What all networks of cells share: stages that one map crosses, any image size, and training through Grad-CAM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.experts import create
from immunity_fast.experts.cells import FactorizedReduce, Node
from immunity_fast.experts.darts import ADVRUSH, PDARTS, Genotype, advrush, darts_network, pdarts
from immunity_fast.experts.registry import _BUILDERS
from immunity_fast.experts.robnet import (
    ROBNET_FREE,
    ROBNET_LARGE,
    robnet_free,
    robnet_large,
    robnet_large_v2,
    robnet_network,
)
from immunity_fast.experts.staged import StagedNetwork, default_stage
from immunity_fast.models.stacking import stack_modules
from immunity_fast.runtime.strategies import Batching
from tests import grids
from tests.cell_reference import images, stir
from tests.tensors import assert_same_state

CHANNELS, CELLS, CLASSES = 4, 6, 3
STAGES = ("stem", "cells1", "cells2", "cells3")
PUBLISHED: list[Callable[[int], StagedNetwork]] = [pdarts, advrush, robnet_free, robnet_large, robnet_large_v2]
TINY: dict[str, Callable[[], StagedNetwork]] = {
    "pdarts": lambda: darts_network(PDARTS, CLASSES, CHANNELS, CELLS),
    "advrush": lambda: darts_network(ADVRUSH, CLASSES, CHANNELS, CELLS),
    "robnet": lambda: robnet_network(ROBNET_FREE[:CELLS], CLASSES, CHANNELS, CELLS),
}
# With the fewest cells.
SMALLEST: dict[str, Callable[[], StagedNetwork]] = {
    "pdarts": lambda: darts_network(PDARTS, CLASSES, 2, 5),
    "advrush": lambda: darts_network(ADVRUSH, CLASSES, 2, 5),
    "robnet": lambda: robnet_network(ROBNET_FREE[:5], CLASSES, 2, 5),
}

each_tiny = pytest.mark.parametrize("name", TINY)


@cache
def _built(name: str) -> nn.Module:
    return stir(TINY[name]())


def _network(name: str) -> StagedNetwork:
    network = copy.deepcopy(_built(name))
    assert isinstance(network, StagedNetwork)
    return network


@pytest.mark.parametrize("build", grids.each(2, [pdarts, robnet_free]))
def test_stages_on_32_by_32(build: Callable[[int], StagedNetwork]) -> None:
    with torch.device("meta"), torch.no_grad():
        network = build(10).eval()
        maps, shapes = torch.empty(2, 3, 32, 32), {}
        for stage in network.stage_names:
            maps = network.get_submodule(stage)(maps)
            shapes[stage] = tuple(maps.shape[1:])
        assert network.get_submodule("classifier")(maps).shape == (2, 10)
    # 108 = 3·36 channels; a cell's output has 4·36, 8·36 and 16·36, and two cross a cut between cells.
    assert shapes == {"stem": (108, 32, 32), "cells1": (288, 32, 32), "cells2": (576, 16, 16), "cells3": (576, 8, 8)}
    assert default_stage(network, 32) == "cells2"


@pytest.mark.parametrize(("name", "size"), grids.every(3, TINY, [(33, 33), (30, 26), (9, 1), (1, 1)]))
def test_any_image_size(name: str, size: tuple[int, int]) -> None:
    network = _network(name)
    maps = images(*size)
    for stage, halvings in zip(STAGES, (0, 0, 1, 2), strict=True):
        maps = network.get_submodule(stage)(maps)
        assert maps.shape[2:] == tuple(-(-side // 2**halvings) for side in size)
    logits = network(images(*size))
    assert logits.shape == (2, CLASSES)
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", [(6, 4), (5, 4), (6, 7), (5, 7), (1, 1)])
def test_factorized_reduce_pads_odd_sides_with_zeros(size: tuple[int, int]) -> None:
    reduce = stir(FactorizedReduce(3, 4, affine=True))
    even = [side + side % 2 for side in size]
    bordered = torch.zeros(2, 3, *even, dtype=torch.float64)
    bordered[:, :, : size[0], : size[1]] = images(*size) - 0.5
    first = F.conv2d(bordered.relu()[:, :, ::2, ::2], reduce.get_parameter("conv1.weight"))
    second = F.conv2d(bordered.relu()[:, :, 1::2, 1::2], reduce.get_parameter("conv2.weight"))
    weight, bias = reduce.get_parameter("bn.weight"), reduce.get_parameter("bn.bias")
    expected = F.batch_norm(torch.cat([first, second], 1), None, None, weight, bias, training=True)
    torch.testing.assert_close(reduce(images(*size) - 0.5), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "stage"), grids.every(3, TINY, STAGES))
def test_trunk_then_head_is_the_network(name: str, stage: str) -> None:
    whole, cut = _network(name), _network(name)
    trunk, head = cut.split(stage)
    # Eval after train, so that the running statistics have moved.
    for training in (True, False):
        for module in (whole, trunk, head):
            module.train(training)
        activations = trunk(images(12, 12))
        captured = activations.clone()
        assert torch.equal(head(activations), whole(images(12, 12)))
        assert torch.equal(activations, captured)  # nothing after the stage works in place
        assert_same_state(cut, whole)


@each_tiny
def test_activations_are_the_last_two_cells_outputs(name: str) -> None:
    network = _network(name).eval()
    outputs: dict[str, Tensor] = {}
    for path, module in network.named_modules():
        if path.startswith("cells") and path.count(".") == 2:
            module.register_forward_hook(lambda _module, _inputs, output, path=path: outputs.update({path: output}))
    network(images(12, 12))
    assert list(outputs) == [f"cells{stage}.cells.{cell}" for stage in (1, 2, 3) for cell in (0, 1)]
    for stage in ("cells1", "cells2"):
        both = torch.cat([outputs[f"{stage}.cells.0"], outputs[f"{stage}.cells.1"]], 1)
        assert torch.equal(network.split(stage)[0](images(12, 12)), both)
    assert torch.equal(network.split("cells3")[0](images(12, 12)), outputs["cells3.cells.1"])


def _model(name: str, stage: str) -> ImmunityMoE:
    torch.manual_seed(3)
    experts: list[nn.Module] = [stir(SMALLEST[name]())]
    experts.append(copy.deepcopy(experts[0]))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in experts[1].parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    torch.manual_seed(5)
    return ImmunityMoE.from_experts(experts, stage=stage, image_size=(9, 10), batching="vmap").double().train()


def _batched(model: ImmunityMoE, batching: Batching) -> ImmunityMoE:
    """A copy of its own: looking at experts before they are taken is the slow part."""
    twin = copy.deepcopy(model)
    twin.batching = batching
    return twin


def _gradients(model: ImmunityMoE, way: str) -> dict[str, Tensor]:
    """The whole loss's, times 1.7, and what it left in the buffers."""
    targets, loss_fn = torch.tensor([0, 2, 1]), FusedImmunityLoss(0.5, 1.3, 0.4, size=(9, 9))
    if way == "forward":
        maps, gate = model.trunk_outputs(images(9, 10, samples=3))
        loss, _ = loss_fn.from_head(model.head_outputs, maps, targets, gate, double_backprop="forward", has_aux=True)
    else:
        logits, activations, gate = model.expert_outputs(images(9, 10, samples=3))
        loss = loss_fn(logits, activations, targets, gate)
    gradients = torch.autograd.grad(1.7 * loss, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), gradients, strict=True))


@pytest.mark.parametrize(
    ("name", "stage"),
    grids.grid(SMALLEST, ("cells1", "cells2"), ordinary=lambda *cell: cell == ("robnet", "cells2")),
)
def test_training_through_grad_cam(name: str, stage: str) -> None:
    """Double backprop, one expert after the other and both at once, and in forward mode: the same gradients."""
    model = _model(name, stage)
    loop, stacked = _batched(model, "loop"), _batched(model, "vmap")
    expected = _gradients(loop, "reverse")
    assert all(gradient.isfinite().all() for gradient in expected.values())
    assert all(gradient.any() for key, gradient in expected.items() if key.startswith("experts."))
    torch.testing.assert_close(_gradients(stacked, "reverse"), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(dict(stacked.named_buffers()), dict(loop.named_buffers()), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(_gradients(_batched(model, "loop"), "forward"), expected, rtol=1e-7, atol=1e-9)


def test_experts_of_different_wiring_are_not_stacked() -> None:
    changed = list(PDARTS.normal)
    changed[0], changed[2] = ("skip_connect", 1), ("skip_connect", 1)
    other = darts_network(Genotype(tuple(changed), PDARTS.reduce), CLASSES, CHANNELS, CELLS)
    experts = [TINY["pdarts"](), other]
    assert {k: v.shape for k, v in experts[0].state_dict().items()} == {
        k: v.shape for k, v in experts[1].state_dict().items()
    }
    with pytest.raises(ValueError, match="number 1 to be like number 0"):
        stack_modules(experts)


def test_no_operation_is_in_place() -> None:
    for name in TINY:
        assert not any(getattr(module, "inplace", False) for module in _network(name).modules())


@pytest.mark.parametrize("cells", [5, 6, 7, 8, 9])
def test_numbers_of_cells(cells: int) -> None:
    """Wherever the two reduction cells come to lie, every cut is crossed by maps of one size."""
    network = robnet_network(ROBNET_LARGE, CLASSES, CHANNELS, cells)
    assert sum(isinstance(module, Node) for module in network.modules()) == 4 * cells
    assert network(torch.rand(2, 3, 9, 9)).shape == (2, CLASSES)


@pytest.mark.parametrize(("channels", "cells"), [(4, 4), (4, 0), (0, 6), (-1, 6)])
def test_too_small_a_network(channels: int, cells: int) -> None:
    with pytest.raises(
        ValueError, match=r"^number of cells: expected at least 5, got|^channels: expected at least 1, got"
    ):
        darts_network(PDARTS, CLASSES, channels, cells)
    with pytest.raises(
        ValueError, match=r"^number of cells: expected at least 5, got|^channels: expected at least 1, got"
    ):
        robnet_network(ROBNET_LARGE, CLASSES, channels, cells)


def test_weights_start_as_pytorch_draws_them() -> None:
    """Within ±1/√fan-in, a depthwise convolution's fan-in being one channel's."""
    torch.manual_seed(0)
    for module in TINY["pdarts"]().modules():
        if isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.5 * bound < module.weight.abs().max() <= bound


def test_names_are_those_of_their_builders() -> None:
    assert all(_BUILDERS[build.__name__] is build for build in PUBLISHED)


@pytest.mark.parametrize("build", grids.sampled(PUBLISHED, ordinary=lambda build: build is pdarts))
def test_create(build: Callable[[int], StagedNetwork]) -> None:
    with torch.device("meta"):
        assert repr(create(build.__name__, 7)) == repr(build(7))
