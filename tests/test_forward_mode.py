"""Forward mode, then reverse: the same weights' gradients as twice in reverse, whatever layers the head has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from immunity_fast import FusedImmunityLoss
from immunity_fast.forward_mode import ExactTangents, batch_norm, instance_norm, layer_norm
from tests.tensors import normal

LAYERS = {
    "batch norm": lambda: nn.BatchNorm2d(5),
    "batch norm, not affine": lambda: nn.BatchNorm2d(5, affine=False),
    "batch norm without statistics": lambda: nn.BatchNorm2d(5, track_running_stats=False),
    "batch norm, evaluating": lambda: nn.BatchNorm2d(5).eval(),
    "instance norm": lambda: nn.InstanceNorm2d(5, affine=True),
    "instance norm, evaluating": lambda: nn.InstanceNorm2d(5, track_running_stats=True).eval(),
    "layer norm": lambda: nn.LayerNorm([5, 4, 3]),
    "layer norm without bias": lambda: nn.LayerNorm([4, 3], bias=False),
    "group norm": lambda: nn.GroupNorm(5, 5),
    "dropout, evaluating": lambda: nn.Dropout(0.5).eval(),
    "dropout of nothing": lambda: nn.Dropout(0.0),
    "max pooling": lambda: nn.MaxPool2d(2, stride=1),
    "transposed convolution": lambda: nn.ConvTranspose2d(5, 2, 3),
    "softplus": lambda: nn.Softplus(),
}


def _network(layer: nn.Module) -> nn.Module:
    """A head around a layer, with weights and statistics that are not their first values."""
    torch.manual_seed(1)
    head = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(4)).double()
    head(normal(2, 3, 4, 3))
    for index, tensor in enumerate([*head.parameters(), *head.buffers()]):
        if tensor.is_floating_point():
            tensor.data.copy_(normal(*tensor.shape, seed=index).abs() + 0.3)
    return head


@pytest.mark.parametrize("kind", LAYERS)
def test_both_ways_give_the_same_gradients(kind: str) -> None:
    head = _network(LAYERS[kind]())
    maps = normal(2, 6, 3, 4, 3).requires_grad_()
    targets = torch.tensor([0, 1, 2, 3, 1, 2])
    loss_fn = FusedImmunityLoss(0.5, 1.3, 0.4, size=(5, 6))

    def run(maps: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in head.named_buffers()}
        return torch.stack([functional_call(head, buffers, (part,)) for part in maps])

    leaves = [maps, *head.parameters()]
    gradients = {}
    for way in ("reverse", "forward"):
        loss = 1.7 * loss_fn.from_head(run, maps, targets, double_backprop=way)  # type: ignore[arg-type]
        gradients[way] = torch.autograd.grad(loss, leaves)
    for one, other in zip(gradients["forward"], gradients["reverse"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    """Central differences of the loss along a direction in the weights, BatchNorm in training mode."""
    head = _network(nn.BatchNorm2d(5))
    maps = normal(2, 6, 3, 4, 3)
    loss_fn = FusedImmunityLoss(0.5, 1.3, 0.4, size=(5, 6))
    weights = {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}
    direction = {name: normal(*p.shape, seed=7) for name, p in weights.items()}

    def loss(moved: float, way: str) -> Tensor:
        def run(maps: Tensor) -> Tensor:
            tensors = {name: p + moved * direction[name] for name, p in weights.items()}
            buffers = {name: buffer.clone() for name, buffer in head.named_buffers()}
            return torch.stack([functional_call(head, tensors | buffers, (part,)) for part in maps])

        result: Tensor = loss_fn.from_head(
            run,
            maps,
            torch.tensor([0, 1, 2, 3, 1, 2]),
            double_backprop=way,  # type: ignore[arg-type]
        )
        return result

    found = torch.autograd.grad(loss(0.0, "forward"), list(weights.values()))
    slope = sum((g * d).sum() for g, d in zip(found, direction.values(), strict=True))
    with torch.no_grad():
        expected = (loss(1e-6, "reverse") - loss(-1e-6, "reverse")) / 2e-6
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Dropout(0.5),
        lambda: nn.Dropout2d(0.5),
        lambda: nn.AlphaDropout(0.5),
        lambda: nn.RReLU(),
        lambda: _Direct(),
    ],
)
def test_a_layer_that_would_be_wrong_is_an_error(layer: type[nn.Module]) -> None:
    head = nn.Sequential(layer(), nn.Flatten(), nn.Linear(12, 4)).double()
    maps = normal(2, 3, 3, 2, 2).requires_grad_()

    def run(maps: Tensor) -> Tensor:
        return torch.stack([head(part) for part in maps])

    with pytest.raises(ValueError, match=r"double_backprop: expected 'reverse' for a head with .*, got 'forward'"):
        FusedImmunityLoss(size=(4, 4)).from_head(run, maps, torch.tensor([0, 1, 2]), double_backprop="forward")


class _Direct(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, [2, 2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (6, 5, 4), (6, 5)])
def test_the_primitives_are_pytorch_s_functions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (3 * normal(*shape) + 1).to(dtype)
    weight, bias, mean, variance = (normal(5, seed=seed).abs().float() + 0.5 for seed in range(4))
    if dtype == torch.float64:
        weight, bias, mean, variance = (tensor.double() for tensor in (weight, bias, mean, variance))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]

    def same(actual: Tensor, expected: Tensor) -> None:
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    for training in (True, False):
        arguments = (weight, bias, training, 0.1, 1e-3)
        same(
            batch_norm(x, mean.clone(), variance.clone(), *arguments),
            F.batch_norm(x, mean.clone(), variance.clone(), *arguments),
        )
        if dtype != torch.bfloat16 and len(shape) > 2:
            same(
                instance_norm(x, mean.clone(), variance.clone(), weight, bias, training, 0.1, 1e-3),
                F.instance_norm(x, mean.clone(), variance.clone(), weight, bias, training, 0.1, 1e-3),
            )
    last = shape[1:]
    weights = [normal(*last, seed=seed).to(dtype) for seed in (5, 6)]
    same(layer_norm(x, last, *weights), F.layer_norm(x, last, *weights))


def test_running_statistics_are_left_alone() -> None:
    layer = nn.BatchNorm2d(3)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers() if buffer.is_floating_point()}
    with ExactTangents():
        layer(normal(2, 3, 4, 4).float())
    assert all(torch.equal(dict(layer.named_buffers())[name], value) for name, value in before.items())
