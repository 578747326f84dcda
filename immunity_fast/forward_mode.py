"""What makes a network's tangent (forward mode) right when it is then differentiated in reverse.

PyTorch's own tangents of batch, instance and layer normalisation treat the statistics that the forward pass saved as
constants, so that their reverse derivative is wrong, silently. Written with primitives, it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from immunity_fast import channelwise
from immunity_fast.runtime.precision import at_least_float32


class ExactTangents(TorchFunctionMode):
    """Inside of it, normalisation is computed from primitives; running statistics are left as they are.

    Raises:
        ValueError: a function whose tangent would be wrong: dropout, which draws anew each time that a head is run, or
            a normalisation that was called in another way than by `torch.nn.functional`.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _EXACT:
            return _EXACT[function](*args, **kwargs)
        if function in _DROPOUT and _is_identity(*args[1:], **kwargs):
            return function(*args, **kwargs)
        if function in _DROPOUT or function in _WRONG:
            raise ValueError(
                f"double_backprop: expected 'reverse' for a head with {function.__name__}, got 'forward', which cannot "
                "differentiate it"
            )
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
    """`torch.nn.functional.batch_norm`, but for the update of the running statistics."""
    return native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]


def native_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.native_batch_norm`, but for the update of the running statistics."""
    x = at_least_float32(input)
    if training or running_mean is None or running_var is None:
        variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    else:
        mean, variance = running_mean, running_var
    scale = factor = (variance + eps).rsqrt()
    if weight is not None:
        factor = factor * weight
    offset = -mean * factor
    if bias is not None:
        offset = offset + bias
    shape = [1, -1] + [1] * (x.dim() - 2)
    return (x * factor.view(shape) + offset.view(shape)).to(input.dtype), mean, scale


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.instance_norm`, but for the update of the running statistics."""
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _normalised(input, list(range(2, input.dim())), weight, bias, [-1] + [1] * (input.dim() - 2), eps)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`."""
    return _normalised(input, list(range(-len(normalized_shape), 0)), weight, bias, list(normalized_shape), eps)


def _normalised(
    input: Tensor, dims: list[int], weight: Tensor | None, bias: Tensor | None, shape: list[int], eps: float
) -> Tensor:
    x = at_least_float32(input)
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    x = (x - mean) * (variance + eps).rsqrt()
    if weight is not None:
        x = x * weight.view(shape)
    if bias is not None:
        x = x + bias.view(shape)
    return x.to(input.dtype)


def _is_identity(p: float = 0.5, training: bool = True, inplace: bool = False, **_: Tensor) -> bool:
    """Whether dropout with these arguments, in the order of `torch.nn.functional.dropout`, does nothing."""
    return not training or p == 0


_EXACT: dict[Any, Callable[..., Any]] = {
    F.batch_norm: batch_norm,
    torch.native_batch_norm: native_batch_norm,
    channelwise.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
}
_DROPOUT = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout}
_WRONG = {
    torch.batch_norm,
    torch.instance_norm,
    torch.layer_norm,
    torch.native_layer_norm,
    torch.dropout,
    torch.dropout_,
    torch.native_dropout,
    torch.rrelu,
    F.rrelu,
    torch.bernoulli,
    torch.rand_like,
    torch.randn_like,
    Tensor.bernoulli_,
}
