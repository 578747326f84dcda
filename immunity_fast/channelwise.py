"""N experts' channels side by side: how batch normalisation, pooling and concatenation run under `vmap`.

What a convolution under `vmap` returns lies in memory as the maps of one network of N·C channels. A function that
treats each channel on its own can take them as just that: one kernel, no copy, in whatever layout. PyTorch's own rules
move the experts to the batch instead, which copies and loses channels-last. For batch normalisation they ask a batched
tensor for its layout when they consider cuDNN, which for channels-last maps on a GPU raises; and they scale and shift
in kernels of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

_POOLING = {F.max_pool2d, torch.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d}
_CONCATENATION = {torch.cat, torch.concat, torch.concatenate}


class ExpertsAsChannels(TorchFunctionMode):
    """Inside of it, and of a `vmap` over experts, those functions take N experts of C channels for N·C channels.

    A compiler, which fuses kernels and chooses layouts itself, gets PyTorch's own rules, but for the question about
    the layout.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            return batch_norm(*args, **kwargs)
        if function is torch.batch_norm:
            return _torch_batch_norm(*args, **kwargs)
        if not torch.compiler.is_compiling():
            if function in _POOLING and args and _are_maps(args[0]):
                return _Pooling.apply(args[0], function, args[1:], kwargs)
            if function in _POOLING and _are_maps(kwargs.get("input")):
                return _Pooling.apply(kwargs.pop("input"), function, args, kwargs)
            if function in _CONCATENATION and (maps := _concatenated_channels(*args, **kwargs)):
                return _Concatenation.apply(*maps)
        return function(*args, **kwargs)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` of one expert inside a `vmap` over all."""
    tensors = (running_mean, running_var, weight, bias)
    given = [input, *(tensor for tensor in tensors if tensor is not None)]
    if has_torch_function_variadic(*given):  # another mode, such as `ExactTangents`, has a say as well
        result: Tensor = handle_torch_function(batch_norm, given, input, *tensors, training, momentum, eps)
        return result
    if torch.compiler.is_compiling():
        return _torch_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    if not any(map(is_batchedtensor, given)):  # a layout can be asked for, and cuDNN chosen
        return F.batch_norm(input, *tensors, training, momentum, eps)
    return _BatchNorm.apply(input, *tensors, training, momentum, eps)  # type: ignore[no-any-return]


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> Tensor:
    """`torch.batch_norm`, without its question of whether cuDNN is to do it, which is where the layout is asked for."""
    if training:
        F._verify_batch_size(input.size())  # type: ignore[attr-defined]
    return torch.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]


class Rule(torch.autograd.Function):
    """Exists for its rule under `vmap`, whose operations are differentiated as they are."""

    @staticmethod
    def forward(*_: Any) -> Tensor:
        raise RuntimeError("input: expected a tensor of each expert, got none that vmap batches")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: there is no backward pass of its own."""


class _BatchNorm(Rule):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], input: Tensor, *rest: Any) -> tuple[Tensor, int]:
        *tensors, training, momentum, eps = rest
        if training and any(t is not None and dim is None for t, dim in zip(tensors[:2], in_dims[1:3], strict=True)):
            raise ValueError(
                "running_mean: expected statistics of each expert in training, got some that all would update"
            )
        maps = expert_second(input, in_dims[0], info.batch_size)
        by_expert = [
            None if tensor is None else tensor.expand(info.batch_size, -1) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims[1:5], strict=True)
        ]
        by_channel = [None if tensor is None else tensor.flatten() for tensor in by_expert]
        mean, variance, factor, offset = by_channel
        # Our own function again: under another `vmap` around this one it is that one's turn.
        normalized = batch_norm(maps.flatten(1, 2), mean, variance, factor, offset, training, momentum, eps)
        if training:
            for own, updated in zip(by_expert[:2], by_channel[:2], strict=True):
                if own is not None and updated is not None and not own.is_contiguous():  # then a copy was updated
                    own.copy_(updated.view(own.shape))
        return normalized.view(maps.shape), 1


class _Pooling(Rule):
    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], input: Tensor, function: Any, args: Any, kwargs: Any
    ) -> tuple[Tensor, int]:
        maps = expert_second(input, in_dims[0], info.batch_size)
        pooled = function(maps.flatten(1, 2), *args, **kwargs)
        return pooled.view(*maps.shape[:3], *pooled.shape[2:]), 1


class _Concatenation(Rule):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        maps = [expert_second(x, dim, info.batch_size) for x, dim in zip(inputs, in_dims, strict=True)]
        nested = any(map(is_batchedtensor, maps))  # in another `vmap`, where no layout can be asked for
        if nested or not maps[0].flatten(1, 2).is_contiguous(memory_format=torch.channels_last):
            return torch.cat(maps, 2), 1
        # Written in the order of memory, (B, h, w, N, C), for torch.cat has no channels-last of five axes.
        return torch.cat([x.permute(0, 3, 4, 1, 2) for x in maps], 4).permute(0, 3, 4, 1, 2), 1


def _are_maps(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and is_batchedtensor(x)


def _concatenated_channels(tensors: Any, dim: int = 0, *, axis: int | None = None, out: Any = None) -> list[Tensor]:
    """The maps whose channels are to be put side by side; none where the call is another one."""
    maps = list(tensors)
    if out is not None or (dim if axis is None else axis) not in (1, -3):
        return []
    fit = all(isinstance(x, Tensor) and x.dim() == 4 and x.dtype == maps[0].dtype for x in maps)
    return maps if fit and any(map(is_batchedtensor, maps)) else []


def expert_second(x: Tensor, dim: int | None, experts: int) -> Tensor:
    """Maps in a rule under `vmap`, batched along `dim`, as (B, N, C, …).

    For what a convolution under `vmap` returns its first axes are one in memory.
    """
    return x.unsqueeze(1).expand(-1, experts, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
