"""BatchNorm folded into the convolution before it, anew in each pass of evaluation mode: nothing of it is kept.

There a BatchNorm scales and shifts each channel by what no image changes, which a convolution can do with its own
weight and bias:

    s = γ / √(σ² + ε),  BN(W * x + b) = (s·W) * x + (β + s·(b − μ)).

That spares a pass over the maps, and one of each derivative, for one over the weight. On a GPU it would spare nothing:
there a convolution's bias is a pass of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

from immunity_fast.runtime.precision import at_least_float32

LEAST_SPARED = 2**16
"""By so many values the maps exceed the weight where folding was measured to be faster than the two layers."""


def normalised(convolution: nn.Module, normalisation: nn.Module, x: Tensor, *, relu: bool = False) -> Tensor:
    """`normalisation(convolution(x))`, and of that the ReLU if `relu`; folded where it is faster and nobody can tell.

    That is on a CPU, in evaluation mode, where the maps are larger than the convolution's weight, and both layers are
    PyTorch's own and have no hooks. Elsewhere the layers are called, one after another. Values and all derivatives are
    the same to rounding.

    Args:
        convolution: maps (B, C, h, w) to (B, C', h', w').
        normalisation: of C' channels, in either mode.
        x: (B, C, h, w).
        relu: whether a ReLU follows.
    """
    if _can_fold(convolution, normalisation, x):
        return _folded(convolution, normalisation, x, relu)
    maps: Tensor = normalisation(convolution(x))
    return F.relu(maps) if relu else maps


class Layers(nn.Sequential):
    """An `nn.Sequential` in which convolution, BatchNorm and ReLU that follow each other run as `normalised`."""

    def forward(self, x: Tensor) -> Tensor:
        """What the children make of x, one after another."""
        layers: list[Any] = list(self._modules.values())
        while layers:
            if len(layers) > 1 and _can_fold(layers[0], layers[1], x):
                relu = len(layers) > 2 and type(layers[2]) is nn.ReLU and _is_plain(layers[2])
                x = _folded(layers[0], layers[1], x, relu)
                del layers[: 3 if relu else 2]
            else:
                x = layers.pop(0)(x)
        return x


def _can_fold(convolution: Any, normalisation: Any, x: Tensor) -> bool:
    """Whether it is faster, and nobody sees what is between the two.

    A compiler, which fuses by itself, and whoever records the layers gets these.
    """
    if (
        type(convolution) is not nn.Conv2d
        or type(normalisation) is not nn.BatchNorm2d
        or normalisation.training
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or not isinstance(x, Tensor)
        or x.device.type != "cpu"
        or x.dim() != 4
    ):
        return False
    rows, columns = convolution.stride
    maps = x.shape[0] * convolution.out_channels * (x.shape[2] // rows) * (x.shape[3] // columns)
    return (
        maps >= convolution.weight.numel() + LEAST_SPARED
        and normalisation.running_mean is not None
        and convolution.padding_mode == "zeros"
        and _is_plain(convolution)
        and _is_plain(normalisation)
    )


_HOOKS = [f"{kind}_hooks" for kind in ("forward", "forward_pre", "backward", "backward_pre")]
_HOOKS_OF_ALL = [getattr(of_all_modules, f"_global_{hooks}") for hooks in _HOOKS]


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling it does what its class says, and nothing more."""
    own = vars(layer)
    return "forward" not in own and not any(own[f"_{hooks}"] for hooks in _HOOKS) and not any(_HOOKS_OF_ALL)


def _folded(convolution: Any, normalisation: Any, x: Tensor, relu: bool) -> Tensor:
    weight = convolution.weight
    mean, variance = at_least_float32(normalisation.running_mean), at_least_float32(normalisation.running_var)
    scale = (variance + normalisation.eps).rsqrt()
    if normalisation.weight is not None:
        scale = scale * normalisation.weight
    shift = (-mean if convolution.bias is None else convolution.bias - mean) * scale
    if normalisation.bias is not None:
        shift = shift + normalisation.bias
    maps = F.conv2d(
        x,
        (weight * scale[:, None, None, None]).to(weight.dtype),  # half precision rounds once
        shift.to(weight.dtype),
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
    )
    return F.relu(maps, inplace=True) if relu else maps  # of maps that nobody else has
