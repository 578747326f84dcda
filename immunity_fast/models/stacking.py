"""How N experts of one architecture run at once: tensors stacked in one module, applied by a loop or by `vmap`."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.func import functional_call

from immunity_fast.channelwise import ExpertsAsChannels
from immunity_fast.experts.staged import copied
from immunity_fast.models.normalization import count_on_device, count_on_host
from immunity_fast.runtime.outputs import logits_of
from immunity_fast.runtime.strategies import Batching, choose

# A call with other tensors puts them into the module for its length, which other threads must not see.
_IN_USE = threading.RLock()


def stack_modules(experts: Sequence[nn.Module]) -> nn.Module:
    """One module with the structure of an expert, each of whose parameters and buffers holds all N: `(N, *shape)`.

    It cannot be called itself; `run_stacked` applies it, or any of its submodules. The experts are left as they are.
    Kernels that all lie channels-last do so in the stack. All that is no parameter and no buffer is number 0's: where
    experts can differ in that, `probe.check_alike` looks.

    Raises:
        ValueError: no experts, or experts that differ in anything but the values of their tensors.
    """
    if not experts:
        raise ValueError("experts: expected at least one, got none")
    description = _describe(experts[0])
    for index, expert in enumerate(experts):
        if _describe(expert) != description:
            raise ValueError(
                f"experts: expected number {index} to be like number 0, got another structure, shape, dtype, device or "
                "mode"
            )
    of_experts = [own_tensors(expert) for expert in experts]
    tensors: dict[str, Tensor] = {}
    for name, first in of_experts[0].items():
        value = stack_maps([own[name].detach() for own in of_experts])
        tensors[name] = nn.Parameter(value, first.requires_grad) if isinstance(first, nn.Parameter) else value
    return count_on_device(_replace(experts[0], tensors))


def unstack_modules(stacked: nn.Module, num_experts: int) -> list[nn.Module]:
    """The inverse of `stack_modules`: N ordinary modules with tensors of their own."""

    def expert(index: int) -> nn.Module:
        tensors: dict[str, Tensor] = {}
        for name, parameter in stacked.named_parameters():
            tensors[name] = nn.Parameter(parameter.detach()[index].clone(), parameter.requires_grad)
        for name, buffer in stacked.named_buffers():
            tensors[name] = buffer[index].clone()
        return count_on_host(_replace(stacked, tensors, used=True))

    return [expert(index) for index in range(num_experts)]


def run_stacked(
    stacked: nn.Module, x: Tensor, num_experts: int, *, shared: bool, batching: Batching = "auto"
) -> Tensor:
    """Apply each expert to its input: x (B, ...) if `shared` by all, else (N, B, ...); returns (N, B, ...).

    Buffers that a forward pass updates in place, such as BatchNorm's statistics, are updated in `stacked`.
    """
    if choose(batching, x.device) == "loop":
        inputs = [x] * num_experts if shared else x.unbind()
        with in_use():
            own = slices(stacked, num_experts)
            return stack_maps([call(stacked, mine, x) for mine, x in zip(own, inputs, strict=True)])

    with in_use():
        return run_by_vmap(stacked, stacked_tensors(stacked), x, shared=shared)


def run_by_vmap(
    stacked: nn.Module,
    tensors: Mapping[str, Tensor],
    x: Tensor,
    *,
    shared: bool,
    mode: Callable[[], AbstractContextManager[object]] = ExpertsAsChannels,
) -> Tensor:
    """`run_stacked` by `vmap`, with such tensors (N, ...) in the place of the module's own. To be called `in_use`.

    `mode` is what each expert runs in.
    """

    def apply(own: Mapping[str, Tensor], x: Tensor) -> Any:
        with mode():
            return call(stacked, own, x)

    outputs: Tensor = torch.vmap(apply, in_dims=(0, None if shared else 0), randomness="different")(dict(tensors), x)
    return outputs


def stacked_tensors(stacked: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, (N, ...) each, as they are computed with."""
    return _parameters(stacked) | dict(stacked.named_buffers())


def call_stacked(
    stacked: nn.Module, x: Tensor, num_experts: int, *, batching: Batching = "auto"
) -> tuple[Tensor, dict[str, Tensor]]:
    """`run_stacked` on x (N, B, ...) as a function: `stacked` stays as it is, so that `torch.func` can transform it.

    Returns (N, B, ...) and the buffers as `run_stacked` would have left them, (N, ...) each, detached.
    """

    def apply(parameters: dict[str, Tensor], own: dict[str, Tensor], x: Tensor) -> Any:
        with ExpertsAsChannels():
            return call(stacked, {**parameters, **own}, x)

    with in_use():
        buffers = {name: buffer.clone() for name, buffer in stacked.named_buffers()}
        if choose(batching, x.device) == "loop":
            own = zip(slices(stacked, num_experts), _unbound(buffers, num_experts), x, strict=True)
            outputs = stack_maps([call(stacked, parameters | mine, maps) for parameters, mine, maps in own])
        else:
            outputs = torch.vmap(apply, randomness="different")(_parameters(stacked), buffers, x)
    return outputs, {name: buffer.detach() for name, buffer in buffers.items()}


def write_back(buffers: Mapping[str, Tensor], updated: Mapping[str, Tensor]) -> None:
    """Buffers become what a pass has made of copies of them; autograd, which may have kept them, does not see it."""
    kept: tuple[Tensor, ...] = tuple(buffers.values())
    with torch.no_grad() if torch.compiler.is_compiling() else _unsafe_preserve_version_counter(kept):
        for name, buffer in buffers.items():
            buffer.copy_(updated[name].detach())


def call(module: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Any:
    """`module(x)` with other tensors in the place of its own, named as by `own_tensors`. To be called `in_use`.

    Of an object that holds logits, these.

    Raises:
        TypeError: an input of another dtype than the tensors, where that is what the module fails of.
    """
    # `functional_call` given one place under two names takes it twice, and puts the wrong tensor back.
    by_own = {value: tensors[name] for name, value in own_tensors(module).items()}
    by_place = {name: by_own[value] for name, value in places(module)}
    return logits_of(explained(lambda: functional_call(module, by_place, (x,), tie_weights=False), tensors, x))


def explained(run: Callable[[], Any], tensors: Mapping[str, Tensor], x: Tensor) -> Any:
    """What `run` returns, a pass of x with such tensors.

    Raises:
        TypeError: an input of another dtype than the tensors, where that is what the pass fails of.
    """
    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except RuntimeError as error:
        dtypes = {value.dtype for value in tensors.values() if value.is_floating_point()}
        explains = "type" in str(error) and not torch.is_autocast_enabled(x.device.type)
        if not dtypes or x.dtype in dtypes or not explains:
            raise
        own = " and ".join(sorted(map(str, dtypes)))
        raise TypeError(
            f"images: expected {own}, as the network's weights, got {x.dtype}: convert either with .to(dtype) ({error})"
        ) from error


def in_use() -> AbstractContextManager[object]:
    """While experts run, theirs are in the places of the stacked tensors: other threads wait, in a `with` block.

    A compiler's code has no need of it.
    """
    return nullcontext() if torch.compiler.is_compiling() else _IN_USE


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each once, under the first of its names."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def places(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Where a parameter or buffer is kept, each place under one name; tied tensors are in several places."""
    for prefix, part in module.named_modules():
        for name, value in (*part._parameters.items(), *part._buffers.items()):
            if value is not None:
                yield f"{prefix}.{name}" if prefix else name, value


def expert_by_expert(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A conversion of tensors, as `nn.Module.to` makes it, for stacked ones: a layout is that of each expert's own."""

    def convert(stack: Tensor) -> Tensor:
        if stack.dim() < 4:
            return function(stack)
        # The first two axes are one in memory, whatever the kernels' layout.
        converted = function(stack.flatten(0, 1))
        return converted.view(*stack.shape[:2], *converted.shape[1:])

    return convert


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


def stack_maps(tensors: Sequence[Tensor]) -> Tensor:
    """(N, ...); channels-last where all are, which `torch.stack` does not know for five axes."""
    if all(_is_channels_last(tensor) for tensor in tensors):
        return torch.stack([tensor.movedim(1, -1) for tensor in tensors]).movedim(-1, 2)
    return torch.stack(list(tensors))


def _is_channels_last(tensor: Tensor) -> bool:
    # A compiler chooses layouts itself, and in a `vmap` none can be asked for.
    if tensor.dim() != 4 or torch.compiler.is_compiling() or is_functorch_wrapped_tensor(tensor):
        return False
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _replace(module: nn.Module, tensors: dict[str, Tensor], *, used: bool = False) -> nn.Module:
    """A deep copy of `module` with other tensors under its names, whatever their shapes; `used`: see `copied`."""
    memo = {id(old): tensors[name] for name, old in own_tensors(module).items()}
    return copied(module, memo, used=used)


def _describe(module: nn.Module) -> tuple[object, ...]:
    tensors = [
        (name, value.shape, value.dtype, value.device, isinstance(value, nn.Parameter), value.requires_grad)
        for name, value in own_tensors(module).items()
    ]
    return (type(module), repr(module), tensors, [part.training for part in module.modules()])
