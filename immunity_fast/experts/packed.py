"""Convolutions that keep their weights as a CPU's kernels want them, which else lay them out anew in each pass.

For one image that is half of the time of a deep network's convolutions. The kernels are those of oneDNN that PyTorch's
compiler calls; they have no derivatives, so wherever there is something to differentiate, trace, compile or convert
the layer is an ordinary `nn.Conv2d`.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from immunity_fast.experts.plain import is_plain, is_recorded
from immunity_fast.runtime.outputs import logits_of


class _Packed(NamedTuple):
    """A weight as the kernels want it, and that from which it was made, by which a change of it is seen."""

    weight: Tensor
    source: Tensor
    version: int


class PackedConv2d(nn.Conv2d):
    """An `nn.Conv2d` whose passes without derivatives, on a CPU in float32, take and make channels-last maps.

    Its weight is then in memory twice. A change of it is seen, but not what is written into `weight.data`, which
    PyTorch does not count.
    """

    _packed: _Packed | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Maps (B, C, h, w) to maps (B, C', h', w')."""
        if not _can_take(self, input):
            return super().forward(input)
        maps: Tensor = torch.ops.mkldnn._convolution_pointwise(
            input.contiguous(memory_format=torch.channels_last),
            self._kernel(),
            self.bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            "none",
            [],
            "",
        )
        return maps

    def _kernel(self) -> Tensor:
        packed, weight = self._packed, self.weight.detach()
        if packed and packed.version == weight._version and packed.source.data_ptr() == weight.data_ptr():
            return packed.weight
        made: Tensor = torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight.to_mkldnn(), list(self.padding), list(self.stride), list(self.dilation), self.groups
        )
        # The source is kept, for then nothing else can come to lie where it lay.
        self._packed = _Packed(made, weight, weight._version)
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedConv2d:
        self._packed = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made again, and cannot be saved."""
        return {name: value for name, value in vars(self).items() if name != "_packed"}


def packed(network: nn.Module, images: Tensor) -> nn.Module:
    """The network with such convolutions, in place, where it then answers as before; as it is where it does not.

    Subclasses and layers with hooks or a `forward` of their own stay. A network that looks at how its maps lie in
    memory, as `Tensor.view` does, stays as well.

    Args:
        network: from images to logits, whose parameters need no gradients.
        images: (B, C, H, W), on which it is tried; not in float32 on a CPU there is nothing to be gained.
    """
    if not _is_there() or images.device.type != "cpu" or images.dtype != torch.float32:
        return network
    layers = [layer for layer in network.modules() if type(layer) is nn.Conv2d and is_plain(layer)]
    with torch.no_grad():
        expected = logits_of(network(images))
        for layer in layers:
            layer.__class__ = PackedConv2d
        try:
            torch.testing.assert_close(logits_of(network(images)), expected, rtol=1e-3, atol=1e-4)
        except Exception:  # whatever a user's network says of maps that lie otherwise
            for layer in layers:
                layer.__class__ = nn.Conv2d
                vars(layer).pop("_packed", None)
    return network


def _can_take(layer: PackedConv2d, x: Tensor) -> bool:
    """Whether the kernels compute what is asked of the layer."""
    weight = layer.weight
    return (
        not is_recorded(x)
        and type(x) is Tensor
        and type(weight) is nn.Parameter
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() == 4
        and x.shape[1] == layer.in_channels
        and x.numel() > 0
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and not _is_product(layer, x)
        and not _has_derivatives(layer, x)
        and not is_functorch_wrapped_tensor(x)
        and not weight.is_inference()  # which has no count of its changes
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()  # somebody counts operations, and knows the usual ones
        and _is_there()
    )


def _is_product(layer: PackedConv2d, x: Tensor) -> bool:
    """Whether PyTorch multiplies matrices instead, of so few images that it was measured to be faster."""
    every_pixel = layer.kernel_size == layer.stride == (1, 1)
    return every_pixel and x.shape[0] < 4 and torch.get_num_threads() == 1


def _has_derivatives(layer: PackedConv2d, x: Tensor) -> bool:
    reverse = x.requires_grad or layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad)
    return (reverse and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def _is_there() -> bool:
    """Whether PyTorch has these kernels, and may use them."""
    return _was_built() and torch._C._get_mkldnn_enabled()


@functools.cache
def _was_built() -> bool:
    return (
        platform.machine() in ("x86_64", "AMD64")  # where it was measured
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )
