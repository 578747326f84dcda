"""What the kernels do to memory, seen in Triton's interpreter, which by itself lets most mistakes pass.

It runs programs one after another, so races are invisible, and reads out of bounds without a word. Here each address of
each unmasked load and store is written down, and a launch fails in which

* an address lies in none of the tensors that the kernel was given, or that a test says it was given the addresses of;
* two programs write one address, or one reads what another writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.kernels.interpreter import quicken

quicken()

_reached: list[Tensor] = []  # besides a kernel's arguments


def reach(tensors: list[Tensor]) -> None:
    """Launches to come, of this test, may reach these tensors, whose addresses stand in a table."""
    _reached.extend(tensors)


class Access(NamedTuple):
    """Addresses of one instruction's unmasked elements, and the program that ran it."""

    program: int
    addresses: np.ndarray[Any, np.dtype[np.uint64]]


class Launch:
    """One launch of one kernel."""

    def __init__(self, kernel: str, tensors: list[Tensor]) -> None:
        self.kernel = kernel
        storages = [tensor.untyped_storage() for tensor in (*tensors, *_reached)]
        self.ranges = {(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages}
        self.loads: list[Access] = []
        self.stores: list[Access] = []

    def counts(self, kind: str, tensor: Tensor) -> Tensor:
        """How often each element of the tensor was loaded or stored ("loads", "stores"); elements share no memory."""
        accesses = [access.addresses for access in getattr(self, kind)]
        found, counts = np.unique(np.concatenate([*accesses, np.zeros(0, np.uint64)]), return_counts=True)
        offsets = torch.zeros((), dtype=torch.int64)
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            offsets = offsets[..., None] + torch.arange(length) * stride
        addresses = (tensor.data_ptr() + offsets * tensor.element_size()).numpy().astype(np.uint64).ravel()
        table = dict(zip(found.tolist(), counts.tolist(), strict=True))
        return torch.tensor([table.get(address, 0) for address in addresses.tolist()]).view(tensor.shape)

    def check(self) -> None:
        """Assert that all addresses lie inside, one program writes each, and no other one reads what it writes."""
        for access in [*self.loads, *self.stores]:
            inside = np.zeros(access.addresses.shape, bool)
            for first, last in self.ranges:
                inside |= (access.addresses >= first) & (access.addresses < last)
            assert inside.all(), f"{self.kernel}: program {access.program} reaches beyond the tensors it was given"
        stores, loads = _pairs(self.stores), _pairs(self.loads)
        written, counts = np.unique(stores[0], return_counts=True)
        assert (counts <= 1).all(), f"{self.kernel}: two programs write one address"
        shared = np.isin(loads[0], written)
        owner = stores[1][np.searchsorted(stores[0], loads[0][shared])]
        assert (owner == loads[1][shared]).all(), f"{self.kernel}: a program reads what another one writes"


def _pairs(accesses: list[Access]) -> tuple[Any, Any]:
    """Addresses and programs, each pair once, sorted by address."""
    addresses = np.concatenate([*(a.addresses for a in accesses), np.zeros(0, np.uint64)])
    programs = np.concatenate([*(np.full(a.addresses.shape, a.program) for a in accesses), np.zeros(0, np.int64)])
    order = np.lexsort((programs, addresses))
    addresses, programs = addresses[order], programs[order]
    first = np.ones(addresses.shape, bool)
    first[1:] = (addresses[1:] != addresses[:-1]) | (programs[1:] != programs[:-1])
    return addresses[first], programs[first]


@contextlib.contextmanager
def watched() -> Iterator[list[Launch]]:
    """Every launch inside, checked as it ends."""
    builder = interpreter.interpreter_builder
    load, store, run = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__
    launches: list[Launch] = []

    def record(kind: str, pointers: Any, mask: Any) -> None:
        x, y, z = builder.grid_idx
        _, height, depth = builder.grid_dim
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        getattr(launches[-1], kind).append(Access((x * height + y) * depth + z, addresses))

    def watched_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        record("loads", pointers, mask)
        return load(pointers, mask, *rest)

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        record("stores", pointers, mask)
        return store(pointers, value, mask, *rest)

    def watched_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(Launch(self.fn.__name__, [arg for arg in args if isinstance(arg, Tensor)]))
        result = run(self, *args, **kwargs)
        launches[-1].check()
        return result

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    interpreter.GridExecutor.__call__ = watched_run
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = run
        _reached.clear()
