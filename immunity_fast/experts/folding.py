"""BatchNorm folded into the convolution before it, anew in each pass of evaluation mode: nothing of it is kept.

There a BatchNorm scales and shifts each channel by what no image changes, which a convolution can do with its own
weight and bias:

    s = γ / √(σ² + ε),  BN(W * x + b) = (s·W) * x + (β + s·(b − μ)).

That spares a pass over the maps, and one of each derivative, for one over the weight. On a GPU folding would spare
nothing: there a convolution's bias is a pass of its own. An addition and a ReLU behind a BatchNorm are done in place,
in either mode and on any device: its backward pass does not look at what it returned.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from immunity_fast.experts.packed import PackedConv2d
from immunity_fast.experts.plain import is_plain, is_recorded
from immunity_fast.runtime.precision import at_least_float32

LEAST_SPARED = 2**16
"""By so many values the maps exceed the weight where folding was measured to be faster than the two layers."""


def normalised(
    convolution: nn.Module, normalisation: nn.Module, x: Tensor, *, plus: Tensor | None = None, relu: bool = False
) -> Tensor:
    """`normalisation(convolution(x)) + plus`, and of that the ReLU; folded where it is faster and nobody can tell.

    That is on a CPU, in evaluation mode, where the maps are larger than the convolution's weight, and both layers are
    PyTorch's own and have no hooks. Elsewhere the layers are called, one after another. Values and all derivatives are
    the same to rounding.

    Args:
        convolution: maps (B, C, h, w) to (B, C', h', w').
        normalisation: of C' channels, in either mode; or, of a network that was folded for good, the identity.
        x: (B, C, h, w).
        plus: (B, C', h', w'); None is nothing.
        relu: whether a ReLU follows.
    """
    fresh = folded = _are_one(convolution, normalisation, x)
    maps: Tensor = _made(convolution, normalisation, x) if folded else normalisation(convolution(x))
    if not folded:
        fresh = _is_fresh(normalisation, x)
    if plus is not None:
        # What no other has is added to in place, unless it may not be able to hold the sum.
        alike = fresh and maps.dtype == plus.dtype and not is_functorch_wrapped_tensor(plus)
        maps = maps.add_(plus) if alike else maps + plus
    return F.relu(maps, inplace=fresh) if relu else maps


class Layers(nn.Sequential):
    """An `nn.Sequential` in which convolution, BatchNorm and ReLU that follow each other run as `normalised`."""

    def forward(self, x: Tensor) -> Tensor:
        """What the children make of x, one after another."""
        layers: list[Any] = list(self._modules.values())
        while layers:
            if len(layers) > 1 and _are_one(layers[0], layers[1], x):
                x, fresh = _made(layers[0], layers[1], x), True
                del layers[:2]
            else:
                fresh = _is_fresh(layers[0], x)
                x = layers.pop(0)(x)
            if fresh and layers and type(layers[0]) is nn.ReLU and is_plain(layers[0]):
                x = F.relu(x, inplace=True)
                del layers[0]
        return x


def _is_fresh(layer: Any, x: Tensor) -> bool:
    """Whether what a layer makes of x is nobody else's, nor needed for its backward pass: it may be written over.

    Of a transformation's tensors it is not asked: writing over some of them copies more than it spares.
    """
    plain = type(layer) is nn.BatchNorm2d and is_plain(layer)
    return plain and not is_recorded(x) and not is_functorch_wrapped_tensor(x)


def _are_one(convolution: Any, normalisation: Any, x: Tensor) -> bool:
    """Whether that is faster, and what it makes is nobody else's, nor what would be between the two."""
    if type(convolution) is nn.Conv2d and type(normalisation) is nn.BatchNorm2d:
        return (
            not normalisation.training
            and not is_recorded(x)
            and x.device.type == "cpu"
            and x.dim() == 4
            and _size(convolution, x) >= convolution.weight.numel() + LEAST_SPARED
            and normalisation.running_mean is not None
            and convolution.padding_mode == "zeros"
            and is_plain(convolution)
            and is_plain(normalisation)
        )
    folded = type(convolution) is PackedConv2d and type(normalisation) is nn.Identity
    return folded and not is_recorded(x) and is_plain(convolution) and is_plain(normalisation)


def _size(convolution: nn.Conv2d, x: Tensor) -> int:
    """About how many values are in its maps."""
    rows, columns = convolution.stride
    return x.shape[0] * convolution.out_channels * (x.shape[2] // rows) * (x.shape[3] // columns)


def _made(convolution: Any, normalisation: Any, x: Tensor) -> Tensor:
    """The maps of two layers that are one, which nobody else has."""
    if isinstance(normalisation, nn.Identity):
        maps: Tensor = convolution(x)
        return maps
    weight = convolution.weight
    mean, variance = at_least_float32(normalisation.running_mean), at_least_float32(normalisation.running_var)
    scale = (variance + normalisation.eps).rsqrt()
    if normalisation.weight is not None:
        scale = scale * normalisation.weight
    shift = (-mean if convolution.bias is None else convolution.bias - mean) * scale
    if normalisation.bias is not None:
        shift = shift + normalisation.bias
    return F.conv2d(
        x,
        (weight * scale[:, None, None, None]).to(weight.dtype),  # half precision rounds once
        shift.to(weight.dtype),
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
    )
