"""Packed convolutions answer as ordinary ones, see each change of a weight, and are ordinary wherever they must be."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from immunity_fast.experts import packed as packing
from immunity_fast.experts.packed import PackedConv2d, packed
from tests.oracle import assert_matches
from tests.tensors import normal

where_there_are_kernels = pytest.mark.skipif(not packing._is_there(), reason="PyTorch has no such kernels here")


def convolution(cin: int = 4, cout: int = 6, kernel: int = 3, **options: Any) -> Any:
    layer = nn.Conv2d(cin, cout, kernel, **options).requires_grad_(False)
    layer.__class__ = PackedConv2d
    return layer


def exact(layer: Any, x: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.double()
    return F.conv2d(x.double(), layer.weight.double(), bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def answers_packed(layer: Any, x: Tensor) -> bool:
    """Whether the kernels answer, after a look at the answer."""
    layer._packed = None
    assert_matches(layer(x), exact(layer, x).to(x.dtype), tolerance=1e-5)
    return layer._packed is not None


@where_there_are_kernels
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "stride": 2, "padding": (0, 2)},
        {"groups": 2, "dilation": (2, 1)},
        {"cin": 6, "groups": 6},
        {"kernel": 1, "cin": 1},
    ],
)
def test_it_answers_as_an_ordinary_one(options: dict[str, Any]) -> None:
    layer = convolution(**options)
    for shape in ((3, 7, 9), (1, 5, 5), (17, 8, 6)):
        x = normal(shape[0], layer.in_channels, *shape[1:], dtype=torch.float32)
        product = layer.kernel_size == (1, 1) and shape[0] < 4 and torch.get_num_threads() == 1
        for maps in (x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
            assert answers_packed(layer, maps) != product
            assert product or layer(maps).is_contiguous(memory_format=torch.channels_last)


def _written(layer: Any) -> None:
    layer.weight.mul_(2)


def _loaded(layer: Any) -> None:
    layer.load_state_dict({"weight": layer.weight / 3, "bias": layer.bias})


def _replaced(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.flip(0), requires_grad=False)


def _given_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data + 1


def _there_and_back(layer: Any) -> None:
    layer.bfloat16().float()


@where_there_are_kernels
@pytest.mark.parametrize("change", [_written, _loaded, _replaced, _given_data, _there_and_back])
def test_a_change_of_a_weight_is_seen(change: Callable[[Any], None]) -> None:
    layer, x = convolution(), normal(2, 4, 7, 6, dtype=torch.float32)
    before = layer(x)
    assert layer._packed is not None
    change(layer)
    assert_matches(layer(x), exact(layer, x), tolerance=1e-5)
    assert not torch.allclose(layer(x), before, rtol=1e-6, atol=1e-6)


@where_there_are_kernels
def test_copies_and_files_are_without_the_packed_weight() -> None:
    layer, x = convolution(), normal(2, 4, 7, 6, dtype=torch.float32)
    expected = layer(x)
    assert list(layer.state_dict()) == ["weight", "bias"]
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert twin._packed is None
        assert torch.equal(twin(x), expected)


X = normal(2, 4, 7, 6, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize(
    ("around", "x"),
    [
        (nullcontext, X.double()),
        (nullcontext, X.bfloat16()),
        (nullcontext, X[:0]),
        (nullcontext, X[0]),
        (lambda: torch.autocast("cpu", torch.bfloat16), X),
        (lambda: FlopCounterMode(display=False), X),
        (lambda: torch.backends.mkldnn.flags(enabled=False), X),
        (nullcontext, X.clone().requires_grad_()),
        (forward_ad.dual_level, X),
    ],
)
def test_elsewhere_it_is_an_ordinary_one(around: Callable[[], AbstractContextManager[Any]], x: Tensor) -> None:
    layer = convolution()
    if x.dtype != torch.float32:
        layer.to(x.dtype)
    twin = nn.Conv2d(4, 6, 3).to(x.dtype)
    twin.load_state_dict(layer.state_dict())
    with around():
        found = layer(x)
        assert torch.equal(found, twin(x))
    assert layer._packed is None


def test_derivatives_are_an_ordinary_one_s() -> None:
    layer = convolution()
    x, along = X.clone().requires_grad_(), normal(2, 4, 7, 6, seed=1, dtype=torch.float32)
    upstream = normal(2, 6, 5, 4, seed=2, dtype=torch.float32)
    (found,) = torch.autograd.grad((layer(x) * upstream).sum(), x)
    double = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((exact(layer, double) * upstream).sum(), double)
    assert_matches(found, expected, tolerance=1e-5)
    _, tangent = torch.func.jvp(layer, (X,), (along,))
    linear = exact(layer, along) - layer.bias.double().view(1, -1, 1, 1)
    assert_matches(tangent, linear, tolerance=1e-5)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(X, along))).tangent
    assert_matches(tangent, linear, tolerance=1e-5)
    assert_matches(torch.vmap(layer)(X[None]), exact(layer, X)[None], tolerance=1e-5)
    layer.weight.requires_grad_()
    layer(X).sum().backward()
    assert layer.weight.grad is not None
    assert layer._packed is None


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_graphs_hold_an_ordinary_one() -> None:
    layer = convolution()
    graphs = [
        str(torch.jit.trace(layer, X, check_trace=False).graph),  # type: ignore[no-untyped-call]
        str(torch.export.export(layer, (X,)).graph),
        torch.fx.symbolic_trace(nn.Sequential(layer)).code,
    ]
    for graph in graphs:
        assert "conv" in graph
        assert "pointwise" not in graph
    torch._dynamo.reset()
    assert_matches(torch.compile(layer, backend="eager", fullgraph=True)(X), exact(layer, X), tolerance=1e-5)
    assert layer._packed is None


class Viewing(nn.Module):
    """A network that wants its maps to lie as it is used to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out: Tensor = self.fc(x.view(len(x), -1))
        return out


class Striding(Viewing):
    """One that reads its maps as they lie."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        out: Tensor = self.fc(x.as_strided((len(x), 36), (36, 1)))
        return out


@pytest.mark.parametrize("network", [Viewing(), Striding()])
def test_a_network_that_looks_at_memory_stays(network: nn.Module) -> None:
    x = normal(2, 3, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        expected = network(x)
        assert packed(network, x) is network
        assert torch.equal(network(x), expected)
    assert type(network.conv) is nn.Conv2d
    assert "_packed" not in vars(network.conv)


@where_there_are_kernels
def test_of_a_network_what_is_pytorch_s_own_is_packed() -> None:
    class Own(nn.Conv2d):
        pass

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), Own(4, 4, 1), nn.Flatten(1)).requires_grad_(False)
    network[1].register_forward_hook(lambda _layer, _inputs, output: 2 * output)
    x = normal(2, 3, 8, 8, dtype=torch.float32)
    expected = network(x)
    assert [type(layer) for layer in packed(network, x)] == [PackedConv2d, nn.Conv2d, Own, nn.Flatten]
    assert_matches(network(x), expected, tolerance=1e-5)
    assert [type(layer) for layer in packed(nn.Sequential(nn.Conv2d(3, 4, 3)).double(), x.double())] == [nn.Conv2d]
