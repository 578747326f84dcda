"""Convolution and batch normalisation whose input gradients have derivatives of their own, for double backprop.

PyTorch writes the derivative of a convolution's input gradient by the kernel as a convolution of transposed maps, whose
kernel is a whole map: on a CPU several times as slow as what it equals, the kernel's gradient itself; and where experts
are groups it takes a call a group. That of batch normalisation is some fifteen operators, each a pass over the
maps. Here the first is the one kernel that it equals, the second three reductions in two passes and one sum of maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor, peek_interpreter_stack
from torch.overrides import TorchFunctionMode

from immunity_fast.channelwise import Rule, expert_second

aten = torch.ops.aten

_CONVOLUTIONS: dict[Callable[..., Tensor], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class _Pass:
    """What backward passes look at; not the mode itself, which as an argument would be asked about each function."""

    def __init__(self, mode: SecondDerivatives) -> None:
        self.mode = mode
        self.of_input = False  # whether it is the input gradient that is being taken


class SecondDerivatives(TorchFunctionMode):
    """Inside of it convolutions, and batch normalisation in training mode, are differentiated twice by these formulas.

    ::

        with SecondDerivatives(maps) as second:
            logits = head(maps)
        with second.input_gradient():
            (slopes,) = torch.autograd.grad(logits.sum(), maps, create_graph=True)

    The values, and all derivatives of any order, are PyTorch's, but for rounding. Left to PyTorch are weights that are
    no parameters (they might depend on the maps), images without a batch, and what a compiler or `torch.func` traces.

    Args:
        maps: what the gradient will be taken by.
    """

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self._storage = maps.untyped_storage()._cdata
        self._pass = _Pass(self)

    @contextmanager
    def input_gradient(self) -> Iterator[None]:
        """While in it, backward passes give the gradients of maps alone; those of the weights are left out."""
        self._pass.of_input = True
        try:
            yield
        finally:
            self._pass.of_input = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if peek_interpreter_stack() is not None:
            given = _convolution(*args, **kwargs) if function in _CONVOLUTIONS else None
            if given is not None and is_batchedtensor(given[0]) and is_batchedtensor(given[1]):
                return _OfExperts.apply(self._pass, function, *given)
            return function(*args, **kwargs)
        if function in _CONVOLUTIONS:
            given = _convolution(*args, **kwargs)
            if given is not None and self._are_constant(given[1:3]) and given[0].dim() == 2 + _CONVOLUTIONS[function]:
                return _Convolution.apply(self._pass, *_autocast(*given[:3]), *given[3:])
        elif function is F.batch_norm:
            known = _batch_norm(*args, **kwargs)
            if known is not None and self._are_constant(known[1:3]):
                return _BatchNorm.apply(self._pass, *known)
        return function(*args, **kwargs)

    def _are_constant(self, weights: Sequence[Tensor | None]) -> bool:
        """Whether all are parameters or views of them, and so nothing that maps could have been made into."""
        return all(
            weight is None or (_is_parameter(weight) and weight.untyped_storage()._cdata != self._storage)
            for weight in weights
        )


def _is_parameter(weight: Tensor) -> bool:
    """Whether it is a leaf of the graph, or a view of one, as an expert's of a stack is."""
    return weight.is_leaf or bool(weight._is_view() and weight._base.is_leaf)  # type: ignore[union-attr]


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Any, ...] | None:
    """The arguments of `_Convolution`; None where it is not for them."""
    if isinstance(padding, str):
        return None
    sides = weight.dim() - 2
    lists = [[each] * sides if isinstance(each, int) else list(each) for each in (stride, padding, dilation)]
    lists = [each * sides if len(each) == 1 else each for each in lists]
    return input, weight, bias, *lists, groups


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...] | None:
    """The arguments of `_BatchNorm`; None where it is not for them."""
    if not training or input.numel() == 0:
        return None
    F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    return input, weight, bias, running_mean, running_var, momentum, eps


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors as autocast, where it is on, gives them to a convolution."""
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of: _Pass, input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.of, ctx.options, ctx.biased = of, options, bias is not None
        result: Tensor = aten.convolution(input, weight, bias, *_geometry(options))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        input, weight = ctx.saved_tensors
        if ctx.of.of_input:
            own = None
            if ctx.needs_input_grad[1]:
                own = _ConvolutionInputGradient.apply(gradient, weight, input.detach(), *ctx.options)
            return None, own, None, None, None, None, None, None
        sizes = [weight.shape[0]] if ctx.biased else None
        wanted = [needed and (index < 2 or ctx.biased) for index, needed in enumerate(ctx.needs_input_grad[1:4])]
        found = aten.convolution_backward(gradient, input, weight, sizes, *_geometry(ctx.options), wanted)
        return None, *found, None, None, None, None


class _OfExperts(Rule):
    """A convolution of each expert inside of a `vmap` over all, as one of N groups."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        of: _Pass,
        function: Callable[..., Tensor],
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, int]:
        maps, kernels = expert_second(input, in_dims[2], info.batch_size), weight.movedim(in_dims[3], 0)
        if bias is not None:
            bias = bias.expand(info.batch_size, -1) if in_dims[4] is None else bias.movedim(in_dims[4], 0)
            bias = bias.flatten()
        *geometry, groups = options
        with of.mode:  # in which a function's own rule does not run
            found = function(maps.flatten(1, 2), kernels.flatten(0, 1), bias, *geometry, groups * info.batch_size)
        return found.view(len(found), info.batch_size, -1, *found.shape[2:]), 1


class _ConvolutionInputGradient(torch.autograd.Function):
    """∂y/∂x from ∂y/∂(W∗x) and W. With V in its place in the sum, its derivatives are W∗V and W's gradient at x = V."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, weight: Tensor, like: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(gradient, weight)
        ctx.options = options
        ctx.layout = _layout(like)
        result: Tensor = aten.convolution_backward(
            gradient, like, weight, None, *_geometry(options), [True, False, False]
        )[0]
        return result

    @staticmethod
    def backward(ctx: Any, along: Tensor) -> tuple[Any, ...]:
        gradient, weight = ctx.saved_tensors
        along = along.contiguous(memory_format=ctx.layout)  # Grad-CAM's is one number a channel, of no layout
        geometry = _geometry(ctx.options)
        by_gradient = by_weight = None
        if ctx.needs_input_grad[0]:
            by_gradient = aten.convolution(along, weight, None, *geometry)
        if ctx.needs_input_grad[1]:
            wanted = [False, True, False]
            by_weight = aten.convolution_backward(gradient, along, weight, None, *geometry, wanted)[1]
        return by_gradient, by_weight, None, None, None, None, None


def _geometry(options: tuple[Any, ...]) -> tuple[Any, ...]:
    """What `aten.convolution` takes behind the tensors."""
    stride, padding, dilation, groups = options
    return stride, padding, dilation, False, [0] * len(stride), groups


def _layout(maps: Tensor) -> torch.memory_format:
    if maps.dim() == 4 and not maps.is_contiguous() and maps.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        of: _Pass,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        result: Tensor
        result, mean, scale = aten.native_batch_norm(
            input, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(input, weight, mean, scale)
        ctx.of, ctx.eps = of, eps
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        input, weight, mean, scale = ctx.saved_tensors
        if ctx.of.of_input:
            own = None
            if ctx.needs_input_grad[1]:
                own = _BatchNormInputGradient.apply(gradient, input, weight, mean, scale, ctx.eps)
            return None, own, None, None, None, None, None, None
        found = _batch_norm_gradients(gradient, input, weight, mean, scale, ctx.eps, ctx.needs_input_grad[1:4])
        return None, *found, None, None, None, None


class _BatchNormInputGradient(torch.autograd.Function):
    """∂y/∂x of normalisation by a batch's own statistics, from g = ∂y/∂(γ·x̂ + β) and x, over M numbers a channel.

    With x̂ = (x − μ)·r it is γ·r·P(g), where P(g) = g − mean(g) − x̂·mean(g·x̂) projects, and is symmetric. Of
    ⟨v, γ·r·P(g)⟩, with a = mean(g·x̂), b = mean(v·x̂) and c = mean(v·P(g)), the derivatives are

    * by g: γ·r·P(v), the same backward pass once more;
    * by γ: r·M·c;
    * by x: −γ·r²·(a·v + b·g + (c − 2ab)·x̂ − a·mean(v) − b·mean(g)).
    """

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float
    ) -> Tensor:
        found: Tensor
        found, along, total = _batch_norm_gradients(gradient, input, weight, mean, scale, eps, (True, True, True))
        ctx.save_for_backward(gradient, input, weight, mean, scale, along, total)
        ctx.eps = eps
        return found

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        g, x, weight, *_ = ctx.saved_tensors
        found = _BatchNormInputGradient._derivatives(ctx, v)
        if torch.is_grad_enabled():
            found = tuple(None if each is None else _Last.apply(each, v, g, x, weight) for each in found)
        return *found, None, None, None

    @staticmethod
    @torch.no_grad()
    def _derivatives(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        """By g, by x and by γ."""
        g, x, weight, mean, scale, g_along, g_total = ctx.saved_tensors
        v = v.contiguous(memory_format=_layout(x))
        by_g, v_along, v_total = _batch_norm_gradients(v, x, weight, mean, scale, ctx.eps, (True, True, True))
        zero, one = torch.zeros_like(mean), torch.ones_like(scale)
        # Σ v·g, as the one kernel takes such a sum, in float32 of half precision.
        product = _batch_norm_gradients(v, g, None, zero, one, ctx.eps, (True, True, True))[1]
        count = x.numel() // x.shape[1]
        a, b = g_along / count, v_along / count
        projected = product - v_total * g_total / count - v_along * a  # M·c
        factor = -scale.square() if weight is None else -weight * scale.square()
        by_x = _normalised(
            x, mean, factor * scale * (projected / count - 2 * a * b), -factor * (a * v_total + b * g_total) / count
        )
        channel = (1, -1, *[1] * (x.dim() - 2))
        by_x.addcmul_(v, (factor * a).to(by_x.dtype).view(channel))
        by_x.addcmul_(g, (factor * b).to(by_x.dtype).view(channel))
        return by_g, by_x, None if weight is None else scale * projected


def _batch_norm_gradients(
    gradient: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    scale: Tensor,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Any, ...]:
    """γ·r·P(g), Σ g·x̂ and Σ g a channel."""
    factor = torch.ones_like(scale) if weight is None else weight  # without one not every device gives the sums
    found: tuple[Any, ...] = aten.native_batch_norm_backward(
        gradient, input, factor, None, None, mean, scale, True, eps, list(wanted)
    )
    return found


def _normalised(x: Tensor, mean: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """factor·(x − mean) + offset, one number of each a channel, in one pass."""
    one = torch.ones_like(mean)
    result: Tensor = aten.native_batch_norm(x, factor, offset, mean, one, False, 0.0, 0.0)[0]
    return result


class _Last(torch.autograd.Function):
    """A second derivative, in the graph of what it was made of, which refuses to be differentiated once more.

    PyTorch's own formula does so, too, from 2.14 on; that of 2.11 is wrong, in silence.
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, *_: Tensor | None) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("batch_norm: expected at most second derivatives, got a 3rd: it has no formula")
