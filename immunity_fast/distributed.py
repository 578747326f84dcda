"""Several processes that train one model, one a GPU, as `torchrun` starts them; on a CPU they work too.

Every function here is also right in a process that is alone, where it does next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT = timedelta(hours=2)  # others wait while one of them validates


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """The process group, for the length of a `with` block, if `torchrun` has started more than one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def group() -> dist.ProcessGroup | None:
    """All processes; None where there is one."""
    return dist.group.WORLD if _several() else None


def rank() -> int:
    """This process' number; 0 is the one that writes."""
    return dist.get_rank() if _several() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _several() else 1


@contextmanager
def first_of_all() -> Iterator[None]:
    """The first process runs a `with` block before the others do."""
    if _several() and rank() > 0:
        dist.barrier()
    yield
    if _several() and rank() == 0:
        dist.barrier()


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, the same in each; infinite or NaN where one of theirs is."""
    if not _several():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / count()


def average_buffers(module: nn.Module) -> None:
    """Running statistics, of which each process has gathered those of its own samples, become those of all."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(mean(buffer))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
