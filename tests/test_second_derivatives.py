"""`SecondDerivatives` against the same layers written with primitives, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from immunity_fast.models.stacking import call_stacked, stack_modules
from immunity_fast.second_derivatives import SecondDerivatives
from tests import grids

LAYOUTS = [torch.contiguous_format, torch.channels_last]
CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 0), "bias": False},
    {"kernel_size": 1, "stride": 2, "groups": 2},
    {"kernel_size": (2, 3), "dilation": (1, 2), "padding": (0, 2), "groups": 3},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
]


def _by_hand(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer from products, sums and differences alone, whose derivatives of any order PyTorch knows."""
    if isinstance(layer, nn.BatchNorm2d):
        mean = x.mean((0, 2, 3), keepdim=True)
        x = (x - mean) / ((x - mean).square().mean((0, 2, 3), keepdim=True) + layer.eps).sqrt()
        return x if layer.weight is None else x * layer.weight[:, None, None] + layer.bias[:, None, None]
    if not isinstance(layer, nn.Conv2d):
        return layer(x)
    if isinstance(layer.padding, str):
        below = [(side - 1) * step for side, step in zip(layer.kernel_size, layer.dilation, strict=True)]
        x, padding = (
            F.pad(x, [below[1] // 2, below[1] - below[1] // 2, below[0] // 2, below[0] - below[0] // 2]),
            (0, 0),
        )
    elif layer.padding_mode != "zeros":
        x, padding = F.pad(x, [each for side in reversed(layer.padding) for each in (side, side)], "reflect"), (0, 0)
    else:
        padding = layer.padding
    side = [
        (size + 2 * pad - step * (kernel - 1) - 1) // stride + 1
        for size, pad, step, kernel, stride in zip(
            x.shape[2:], padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    columns = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    columns = columns.view(len(x), layer.groups, -1, columns.shape[-1])
    weight = layer.weight.reshape(layer.groups, -1, columns.shape[2])
    found = torch.einsum("gok,bgkp->bgop", weight, columns).reshape(len(x), -1, *side)
    return found if layer.bias is None else found + layer.bias[:, None, None]


def _loss(head: Sequence[nn.Module], maps: Tensor, *, direct: bool) -> Tensor:
    """A loss of ∂y/∂A, as Grad-CAM's; `direct` by the mode, else by hand."""
    if not direct:
        scores = maps
        for layer in head:
            scores = _by_hand(layer, scores)
        (slopes,) = torch.autograd.grad(scores.tanh().mean((2, 3)).square().sum(), maps, create_graph=True)
        return (slopes.sum((2, 3)) * maps.mean((2, 3)).sin()).square().sum() + scores.square().mean()
    second = SecondDerivatives(maps)
    with second:
        scores = maps
        for layer in head:
            scores = layer(scores)
    with second.input_gradient():
        (slopes,) = torch.autograd.grad(scores.tanh().mean((2, 3)).square().sum(), maps, create_graph=True)
    return (slopes.sum((2, 3)) * maps.mean((2, 3)).sin()).square().sum() + scores.square().mean()


def _gradients(head: nn.Sequential, maps: Tensor, *, direct: bool) -> list[Tensor]:
    leaf = maps.detach().requires_grad_()
    head.zero_grad()
    _loss(list(head), leaf * 1, direct=direct).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return [leaf.grad, *(parameter.grad for parameter in head.parameters() if parameter.grad is not None)]


def _head(options: dict[str, Any], *, affine: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Sequential(
        nn.Conv2d(6, 6, **options),
        nn.BatchNorm2d(6, affine=affine),
        nn.Softplus(),
        nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4),
    ).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.7)
    return head


def _maps(layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 6, 7, 5, dtype=torch.float64, generator=generator).contiguous(memory_format=layout)


def _assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-9) -> None:
    largest = max(float(each.abs().max()) for each in expected)
    assert largest > 1e-3
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= tolerance * largest


@pytest.mark.parametrize(
    ("options", "layout", "affine"),
    grids.grid(CONVOLUTIONS, LAYOUTS, [True, False], ordinary=lambda options, layout, affine: affine),
)
def test_gradients_are_those_of_primitives(options: dict[str, Any], layout: Any, affine: bool) -> None:
    head, maps = _head(options, affine=affine), _maps(layout)
    expected = _gradients(copy.deepcopy(head), maps, direct=False)
    _assert_equal(_gradients(head, maps, direct=True), expected)
    head[0].weight.data = head[0].weight.data.contiguous(memory_format=torch.channels_last)
    _assert_equal(_gradients(head, maps, direct=True), expected)


@pytest.mark.parametrize("which", [0, 1, 3])
def test_frozen_weights_get_no_gradient(which: int) -> None:
    head, maps = _head(CONVOLUTIONS[0]), _maps()
    head[which].requires_grad_(False)
    expected = _gradients(copy.deepcopy(head), maps, direct=False)
    _assert_equal(_gradients(head, maps, direct=True), expected)
    assert all(parameter.grad is None for parameter in head[which].parameters())


def test_a_batch_moves_running_statistics_once() -> None:
    head, maps = _head(CONVOLUTIONS[0]), _maps()
    other = copy.deepcopy(head)
    other(maps)
    _gradients(head, maps, direct=True)
    for (name, one), (_, two) in zip(head.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


def test_a_third_derivative_is_right_or_raises() -> None:
    """That of convolutions is right; BatchNorm refuses."""
    torch.manual_seed(0)
    head: Any = nn.Sequential(nn.Conv2d(6, 6, 3, 2, bias=False), nn.Softplus(), nn.Conv2d(6, 4, 1)).double()

    def third(direct: bool) -> list[Tensor]:
        leaf = _maps().requires_grad_()
        wanted = [leaf, *head.parameters()]
        loss = _loss(list(head), leaf * 1, direct=direct)
        first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
        total = sum((each.square().sum() for each in first if each is not None), torch.zeros(()))
        return list(torch.autograd.grad(total, [leaf, head[0].weight]))

    _assert_equal(third(True), third(False))
    head.insert(1, nn.BatchNorm2d(6).double())
    with pytest.raises(RuntimeError, match="3rd"):
        third(True)


def test_a_graph_of_second_derivatives_has_their_values() -> None:
    """Of `create_graph`, which nobody has to use."""
    head, maps = _head(CONVOLUTIONS[0]), _maps()
    leaf = maps.requires_grad_()
    loss = _loss(list(head), leaf * 1, direct=True)
    found = torch.autograd.grad(loss, [leaf, *head.parameters()], create_graph=True, allow_unused=True)
    expected = _gradients(copy.deepcopy(head), maps, direct=False)
    _assert_equal([each for each in found if each is not None], expected)


class _Kernels(TorchDispatchMode):
    """The kernels' largest side in each convolution that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[int] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        if function is torch.ops.aten.convolution.default:
            self.sides.append(max(args[1].shape[2:]))
        return function(*args, **(kwargs or {}))


def test_no_map_is_a_kernel_and_no_sum_is_taken_twice() -> None:
    """What PyTorch does otherwise: a convolution whose kernel is a map, and BatchNorm in fifteen operators."""
    counts = {}
    for direct in (True, False):
        head = _head({"kernel_size": 3, "padding": 1, "bias": False})
        maps = _maps().requires_grad_()
        second = SecondDerivatives(maps)
        with second if direct else nullcontext():
            scores = head(maps)
        with second.input_gradient():
            (slopes,) = torch.autograd.grad(scores.square().sum(), maps, create_graph=True)
        with _Kernels() as kernels:
            slopes.square().sum().backward()  # type: ignore[no-untyped-call]
        counts[direct] = len(kernels.names)
        assert (max(kernels.sides) == 3) == direct
    assert counts[True] < 0.6 * counts[False]


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("view", [True, False])
def test_weights_made_of_the_maps_are_left_to_pytorch(leaf: bool, view: bool) -> None:
    """Their gradient is part of that of the maps, where it must not be left out."""

    def gradient(direct: bool) -> Tensor:
        start = _maps().requires_grad_()
        maps = start if leaf else start * 1
        second = SecondDerivatives(maps)
        with second if direct else nullcontext():
            kernel = maps[:, :, :3, :3] if view else maps[:, :, :3, :3].sin()
            scores = F.batch_norm(F.conv2d(maps, kernel, padding=1), None, None, kernel[0, :3, 0, 0], training=True)
        with second.input_gradient():
            (slopes,) = torch.autograd.grad(scores.tanh().square().sum(), maps, create_graph=True)
        slopes.square().sum().backward()  # type: ignore[no-untyped-call]
        assert start.grad is not None
        return start.grad

    _assert_equal([gradient(True)], [gradient(False)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_exact_as_pytorchs_own(dtype: torch.dtype) -> None:
    head, maps = _head(CONVOLUTIONS[0]), _maps()
    expected = _gradients(copy.deepcopy(head), maps, direct=False)
    head, maps = head.float(), maps.float()
    largest = max(float(each.abs().max()) for each in expected)
    errors = []
    for direct in (True, False):
        leaf = maps.detach().requires_grad_()
        head.zero_grad()
        along = leaf * 1
        second = SecondDerivatives(along)
        with torch.autocast("cpu", dtype), second if direct else nullcontext():
            scores = head(along)
        with second.input_gradient():
            (slopes,) = torch.autograd.grad(scores.float().tanh().mean((2, 3)).square().sum(), along, create_graph=True)
        loss = (slopes.sum((2, 3)) * along.mean((2, 3)).sin()).square().sum() + scores.float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        found = [leaf.grad, *(parameter.grad for parameter in head.parameters() if parameter.grad is not None)]
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / largest)
    assert errors[0] <= max(1.5 * errors[1], 0.02), errors


def test_one_value_a_channel_is_refused_as_by_pytorch() -> None:
    with SecondDerivatives(torch.rand(1)), pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(3)(torch.rand(1, 3, 1, 1))


def test_unbatched_images_and_empty_batches_are_computed() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with SecondDerivatives(torch.rand(1)):
        assert layer[0](torch.rand(3, 5, 6)).shape == (4, 3, 4)
        assert layer(torch.rand(0, 3, 5, 6)).shape == (0, 4, 3, 4)
        assert nn.Conv1d(3, 4, 3)(torch.rand(2, 3, 7)).shape == (2, 4, 5)
        assert nn.Conv3d(3, 4, 3)(torch.rand(2, 3, 7, 5, 4)).shape == (2, 4, 5, 3, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_experts_of_a_vmap_are_groups_of_one_convolution(layout: Any, bias: bool) -> None:
    """Also of kernels' gradients, which PyTorch takes group by group; one expert after another gives the same."""
    heads = [_head({"kernel_size": 3, "stride": 2, "bias": bias}) for _ in range(3)]
    for index, head in enumerate(heads):
        for parameter in head.parameters():
            parameter.data.mul_(1 + index / 3)
    stacked = stack_modules(heads)
    start = torch.stack([_maps(layout) + index for index in range(3)]).requires_grad_()
    maps = start * 1
    second = SecondDerivatives(maps)
    with second:
        scores, _ = call_stacked(stacked, maps, 3, batching="vmap")
    with second.input_gradient():
        (slopes,) = torch.autograd.grad(scores.tanh().mean((3, 4)).square().sum(), maps, create_graph=True)
    loss = (slopes.sum((3, 4)) * maps.mean((3, 4)).sin()).square().sum((1, 2)) + scores.square().mean((1, 2, 3, 4))
    with _Kernels() as kernels:
        loss.sum().backward()  # type: ignore[no-untyped-call]
    assert max(kernels.sides) == 3
    assert sum("convolution_backward" in name for name in kernels.names) == 2 * 2
    found = [start.grad, *(parameter.grad for parameter in stacked.parameters())]
    for index, head in enumerate(heads):
        own = [each[index] for each in found if each is not None]
        _assert_equal(own, _gradients(head, start[index], direct=False))
