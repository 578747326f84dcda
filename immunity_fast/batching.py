"""How N experts of one architecture run at once: tensors stacked in one module, applied by a loop or by `vmap`."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

Batching = Literal["auto", "loop", "vmap"]


def choose(batching: Batching, device: torch.device) -> Literal["loop", "vmap"]:
    """What "auto" means: on a CPU grouped convolutions lose to a plain loop; on a GPU its launches bind a loop."""
    if batching == "auto":
        return "loop" if device.type == "cpu" else "vmap"
    return batching


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
    return _replace(
        experts[0],
        {name: nn.Parameter(value.detach(), value.requires_grad) for name, value in parameters.items()} | buffers,
    )


def unstack_modules(stacked: nn.Module, num_experts: int) -> list[nn.Module]:
    """The inverse of `stack_modules`: N ordinary modules with tensors of their own."""

    def expert(index: int) -> nn.Module:
        tensors: dict[str, Tensor] = {}
        for name, parameter in stacked.named_parameters():
            tensors[name] = nn.Parameter(parameter.detach()[index].clone(), parameter.requires_grad)
        for name, buffer in stacked.named_buffers():
            tensors[name] = buffer[index].clone()
        return _replace(stacked, tensors)

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
        return functional_call(stacked, own, (x,))

    tensors = dict([*stacked.named_parameters(), *stacked.named_buffers()])
    outputs: Tensor = torch.vmap(apply, in_dims=(0, None if shared else 0), randomness="different")(tensors, x)
    return outputs


def slices(stacked: nn.Module, num_experts: int) -> list[dict[str, Tensor]]:
    """Each expert's own parameters and buffers, as views, for `torch.func.functional_call`."""
    own: list[dict[str, Tensor]] = [{} for _ in range(num_experts)]
    for name, parameter in stacked.named_parameters():
        # unbind, because its backward is one stack; indexing N times would add up N tensors of the stacked size.
        for tensors, value in zip(own, parameter.unbind(), strict=True):
            tensors[name] = value
    for name, buffer in stacked.named_buffers():
        for index, tensors in enumerate(own):
            tensors[name] = buffer[index]  # indexing, because autograd forbids in-place updates of unbind's views
    return own


def _replace(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A deep copy of `module` with other tensors under its names, whatever their shapes."""
    memo = {id(old): tensors[name] for name, old in (*module.named_parameters(), *module.named_buffers())}
    return copy.deepcopy(module, memo)


def _describe(module: nn.Module) -> tuple[object, ...]:
    tensors = [(name, value.shape, value.dtype, value.requires_grad) for name, value in module.named_parameters()]
    buffers = [(name, value.shape, value.dtype) for name, value in module.named_buffers()]
    return (type(module), repr(module), tensors, buffers, [part.training for part in module.modules()])
