"""How N experts of one architecture run at once: tensors stacked in one module, applied by a loop or by `vmap`."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from immunity_fast.channelwise import ExpertsAsChannels
from immunity_fast.normalization import count_on_device, count_on_host
from immunity_fast.strategies import Batching, choose


def stack_modules(experts: Sequence[nn.Module]) -> nn.Module:
    """One module with the structure of an expert, each of whose parameters and buffers holds all N: (N, *shape).

    It cannot be called itself; `run_stacked` applies it, or any of its submodules. The experts are left as they are.

    Raises:
        ValueError: no experts, or experts that differ in anything but the values of their tensors.
    """
    if not experts:
        raise ValueError("experts: expected at least one, got none")
    description = _describe(experts[0])
    for index, expert in enumerate(experts):
        if _describe(expert) != description:
            raise ValueError(f"experts: number {index} differs from number 0 in its structure, shapes, dtypes or mode")
    parameters, buffers = stack_module_state(list(experts))
    tensors = {name: nn.Parameter(value.detach(), value.requires_grad) for name, value in parameters.items()}
    return count_on_device(_replace(experts[0], tensors | buffers))


def unstack_modules(stacked: nn.Module, num_experts: int) -> list[nn.Module]:
    """The inverse of `stack_modules`: N ordinary modules with tensors of their own."""

    def expert(index: int) -> nn.Module:
        tensors: dict[str, Tensor] = {}
        for name, parameter in stacked.named_parameters():
            tensors[name] = nn.Parameter(parameter.detach()[index].clone(), parameter.requires_grad)
        for name, buffer in stacked.named_buffers():
            tensors[name] = buffer[index].clone()
        return count_on_host(_replace(stacked, tensors))

    return [expert(index) for index in range(num_experts)]


def run_stacked(
    stacked: nn.Module, x: Tensor, num_experts: int, *, shared: bool, batching: Batching = "auto"
) -> Tensor:
    """Apply each expert to its input: x (B, ...) if `shared` by all, else (N, B, ...); returns (N, B, ...).

    Buffers that a forward pass updates in place, such as BatchNorm's statistics, are updated in `stacked`.
    """
    if choose(batching, x.device) == "loop":
        inputs = [x] * num_experts if shared else x.unbind()
        return torch.stack(
            [functional_call(stacked, own, (x,)) for own, x in zip(slices(stacked, num_experts), inputs, strict=True)]
        )

    def apply(own: dict[str, Tensor], x: Tensor) -> Any:
        with ExpertsAsChannels():
            return functional_call(stacked, own, (x,))

    tensors = _parameters(stacked) | dict(stacked.named_buffers())
    outputs: Tensor = torch.vmap(apply, in_dims=(0, None if shared else 0), randomness="different")(tensors, x)
    return outputs


def call_stacked(
    stacked: nn.Module, x: Tensor, num_experts: int, *, batching: Batching = "auto"
) -> tuple[Tensor, dict[str, Tensor]]:
    """`run_stacked` on x (N, B, ...) as a function: `stacked` stays as it is, so that `torch.func` can transform it.

    Returns (N, B, ...) and the buffers as `run_stacked` would have left them, (N, ...) each, detached.
    """
    buffers = {name: buffer.clone() for name, buffer in stacked.named_buffers()}
    if choose(batching, x.device) == "loop":
        outputs = []
        for own, mine, maps in zip(slices(stacked, num_experts), _unbound(buffers, num_experts), x, strict=True):
            outputs.append(functional_call(stacked, own | mine, (maps,)))
        return torch.stack(outputs), {name: buffer.detach() for name, buffer in buffers.items()}

    def apply(parameters: dict[str, Tensor], own: dict[str, Tensor], x: Tensor) -> Any:
        with ExpertsAsChannels():
            return functional_call(stacked, {**parameters, **own}, (x,))

    parameters = _parameters(stacked)
    result: Tensor = torch.vmap(apply, randomness="different")(parameters, buffers, x)
    return result, {name: buffer.detach() for name, buffer in buffers.items()}


def channels_last_(module: nn.Module) -> None:
    """Lay out the weights of 2-D convolutions channels-last, in place, stacked ones too; values and shapes stay.

    A stack of them has five dimensions, which PyTorch's own memory formats do not cover.
    """
    for parameter in module.parameters():
        if parameter.dim() in (4, 5):
            parameter.data = parameter.data.movedim(-3, -1).contiguous().movedim(-1, -3)


def _parameters(stacked: nn.Module) -> dict[str, Tensor]:
    """The parameters; on a GPU as views whose gradients come laid out as they are.

    The double backward of a convolution transposes its weight's gradient. What autograd has to lay out is a launch a
    weight, after the compiled backward pass; the backward pass of a reshaping view is part of it.
    """
    return {name: _as_laid_out(value) if value.is_cuda else value for name, value in stacked.named_parameters()}


def _as_laid_out(weight: Tensor) -> Tensor:
    convolution = weight.dim() in (4, 5)  # channels-last
    inward = weight.movedim(-3, -1) if convolution else weight
    if not inward.is_contiguous():
        return weight
    view = inward.flatten().view(inward.shape)
    return view.movedim(-1, -3) if convolution else view


def _unbound(tensors: dict[str, Tensor], num_experts: int) -> list[dict[str, Tensor]]:
    """A view of each expert's part; indexing, because autograd forbids in-place updates of unbind's views."""
    return [{name: tensor[index] for name, tensor in tensors.items()} for index in range(num_experts)]


def slices(stacked: nn.Module, num_experts: int) -> list[dict[str, Tensor]]:
    """Each expert's own parameters and buffers, as views, for `torch.func.functional_call`."""
    own: list[dict[str, Tensor]] = [{} for _ in range(num_experts)]
    for name, parameter in _parameters(stacked).items():
        # unbind, because its backward is one stack; indexing N times would add up N tensors of the stacked size.
        for tensors, value in zip(own, parameter.unbind(), strict=True):
            tensors[name] = value
    buffers = _unbound(dict(stacked.named_buffers()), num_experts)
    return [parameters | buffers for parameters, buffers in zip(own, buffers, strict=True)]


def _replace(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A deep copy of `module` with other tensors under its names, whatever their shapes."""
    memo = {id(old): tensors[name] for name, old in (*module.named_parameters(), *module.named_buffers())}
    return copy.deepcopy(module, memo)


def _describe(module: nn.Module) -> tuple[object, ...]:
    tensors = [(name, value.shape, value.dtype, value.requires_grad) for name, value in module.named_parameters()]
    buffers = [(name, value.shape, value.dtype) for name, value in module.named_buffers()]
    return (type(module), repr(module), tensors, buffers, [part.training for part in module.modules()])
