"""Weights in shards, one a process: PyTorch's FSDP2, and what a loss that is differentiated twice needs of it.

FSDP2 gathers a module's weights for its forward pass and for its backward pass, and frees them after each. A loss on
Grad-CAM's heatmaps differentiates a backward pass once more, where FSDP2 has freed them: `gathered_again` has them
gathered for each operation that needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from immunity_fast.runtime import distributed

LARGE = 100_000  # parameters of a child that is gathered for itself
HELD = 2  # modules whose weights are kept gathered for a second backward pass: an operation has weights of one


def shard_network(network: nn.Module, mesh: Any) -> None:
    """Shard a network's weights over the processes of a mesh, in place: each process keeps 1/n of each weight.

    The children with many weights are gathered and freed one after another, the rest of the network with itself.
    Buffers, such as BatchNorm's statistics, stay whole in each process.

    Args:
        network: with the same weights in each process. Its children are left to be gathered with it where weights are
            shared between modules.
        mesh: a `DeviceMesh` of one dimension; weights are moved to its device, a child at a time.
    """
    from torch.distributed.fsdp import fully_shard

    places = [value for part in network.modules() for value in part._parameters.values() if value is not None]
    if len({id(value) for value in places}) == len(places):
        for child in _large_children(network):
            fully_shard(child, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def _large_children(network: nn.Module) -> Iterator[nn.Module]:
    """Children with many weights that run as modules; of lists of modules, which do not, their own children."""
    for child in network.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _large_children(child)
        elif sum(parameter.numel() for parameter in child.parameters()) >= LARGE:
            yield child


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds a module's weights, or those of a part of it, in shards."""
    return bool(_sharded_parts(module))


def _sharded_parts(module: nn.Module) -> list[Any]:
    if distributed.group() is None:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """This process' part of a tensor that is in shards, sharing its memory; any other tensor as it is."""
    mine: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return mine


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is in shards, which every process has to ask for; any other tensor as it is."""
    value = tensor.detach()
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


@contextmanager
def gathered_again(module: nn.Module) -> Iterator[None]:
    """What is computed in a `with` block may be differentiated twice, although FSDP2 holds the module's weights.

    Around the forward pass and the first derivative, which is taken with `create_graph=True`; the backward pass of what
    comes of it may be outside. An operation of it whose weights have been freed has them gathered, in all processes at
    the same point; few are kept at once, and none after the backward pass. Where nothing is sharded, this does nothing.
    """
    parts = _sharded_parts(module)
    if not parts:
        yield
        return
    keeper = _Keeper(parts)
    hooks = [part.register_forward_pre_hook(keeper.note) for part in parts]  # behind FSDP2's own, which gathers
    try:
        for part in parts:  # that have begun their pass already
            keeper.note(part, ())
        with saved_tensors_hooks(keeper.pack, keeper.unpack):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Keeper:
    """Knows which module's weights lie in which memory, and has them gathered where a backward pass finds it freed."""

    def __init__(self, parts: list[Any]) -> None:
        self.owners: dict[int, Any] = {}  # by the storage, which FSDP2 empties and fills, and keeps
        self.own = {part: list(_own_modules(part, set(parts) - {part})) for part in parts}
        self.held: list[Any] = []  # gathered here, the last one last
        self.ends = False  # whether all are given back when the backward pass is over

    def note(self, part: Any, _inputs: object) -> None:
        """A forward pre-hook: the module's weights are gathered now, unless its pass has not begun."""
        for owned in self.own[part]:
            for value in owned._parameters.values():
                if value is not None and not hasattr(value, "to_local"):
                    self.owners[value.untyped_storage()._cdata] = part

    def pack(self, tensor: Tensor) -> Any:
        """What is saved of a tensor: a weight is saved with its module."""
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        part = self.owners.get(tensor.untyped_storage()._cdata)
        return tensor if part is None else (part, tensor)

    def unpack(self, saved: Any) -> Tensor:
        """The tensor, with what it holds."""
        if isinstance(saved, Tensor):
            return saved
        part, tensor = saved
        if tensor.untyped_storage().size() == 0:
            self._gather(part)
        return tensor  # type: ignore[no-any-return]

    def _gather(self, part: Any) -> None:
        if not self.ends:
            torch.autograd.Variable._execution_engine.queue_callback(self._release)
            self.ends = True
        if part in self.held:  # FSDP2 has freed it meanwhile
            self.held.remove(part)
        while len(self.held) >= HELD:
            self.held.pop(0).reshard()
        part.unshard()
        self.held.append(part)

    def _release(self) -> None:
        while self.held:
            self.held.pop().reshard()
        self.ends = False


def _own_modules(part: nn.Module, others: set[nn.Module]) -> Iterator[nn.Module]:
    """A module and those in it, but for those of other sharded modules."""
    yield part
    for child in part.children():
        if child not in others:
            yield from _own_modules(child, others)
