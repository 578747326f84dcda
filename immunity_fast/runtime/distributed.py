"""Several processes that train one model, one a GPU, as `torchrun` starts them; on a CPU they work too.

Every function here is also right in a process that is alone, where it does next to nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# What Gloo and NCCL say in a process that is left behind.
_LOST = re.compile(r"Connection (reset|closed|refused)|Broken pipe|remote (process|worker)|ncclRemoteError", re.I)
TIMEOUT = timedelta(hours=2)  # others wait while one of them validates


def check_environment() -> None:
    """Check that the environment tells of one process, or of several as `torchrun` does.

    Raises:
        ValueError: of several in another way.
    """
    if _world_size() == 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"the environment has WORLD_SIZE={os.environ['WORLD_SIZE']} but no {', '.join(missing)}: start the "
            "processes with torchrun, or take WORLD_SIZE out of the environment"
        )
    for name, least, most in (("RANK", 0, _world_size() - 1), ("MASTER_PORT", 1, 65535)):
        if not (os.environ[name].isdecimal() and least <= int(os.environ[name]) <= most):
            raise ValueError(f"{name} in the environment: expected {least} to {most}, got {os.environ[name]}")


def _world_size() -> int:
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"WORLD_SIZE in the environment: expected a number of processes, got {given}")
    return int(given)


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """The process group, for the length of a `with` block, if `torchrun` has started more than one process.

    Raises:
        ValueError: an environment that is not torchrun's.
        ConnectionError: the processes do not find each other, or one of them has ended.
    """
    check_environment()
    if _world_size() == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().split("\n")[0]
        raise ConnectionError(f"the processes cannot find each other at {place} ({reason})") from error
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise ConnectionError(f"process {rank()} has lost the others, one of which has ended") from error
    finally:
        dist.destroy_process_group()


def log_in_first(log: Callable[[str], Any]) -> Callable[[str], Any]:
    """`log` in the first process, nothing in the others; also after the process group has ended."""
    return log if first_to_be() else lambda _: None


def first_to_be() -> bool:
    """Whether this process is, or will be, the first one, the one that writes."""
    return (os.environ.get("RANK") or "0") == "0"


def check_alone(call: str) -> None:
    """Check that no other process is to train along that this one does not know yet.

    Args:
        call: what makes them known to each other.

    Raises:
        RuntimeError: there are others.
    """
    if _world_size() > 1 and not _several():
        raise RuntimeError(f"{_world_size()} processes train together, which {call}() is to begin before anything else")


def group() -> dist.ProcessGroup | None:
    """All processes; None where there is one."""
    return dist.group.WORLD if _several() else None


def rank() -> int:
    """This process' number; 0 is the one that writes."""
    return dist.get_rank() if _several() else 0


def count() -> int:
    """How many processes train the model together; 1 without `torchrun`."""
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


def of_first(value: Any) -> Any:
    """What the first process has, in each: numbers, texts, lists and dictionaries."""
    if not _several():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def first_of_any(value: str | None) -> str | None:
    """The first text that a process has, the same in each; None where none has one."""
    if not _several():
        return value
    values: list[str | None] = [None] * count()
    dist.all_gather_object(values, value)
    return next((text for text in values if text is not None), None)


def training_group(module: nn.Module) -> str | None:
    """The process group over which the gradients of a forward pass that is under way will be averaged.

    Args:
        module: whose forward pass it is, or a part of it.

    Returns:
        The group's name; "" where there is one process; None where there are several and no wrapper is at work, so that
        gradients stay each process' own.
    """
    if not _several():
        return ""
    wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)  # PyTorch's own, for its compiler
    # A compiler's code does not look at modules as at objects; what it compiles in there is a part of what is wrapped.
    if wrapper is not None and (
        torch.compiler.is_compiling() or any(part is module for part in wrapper.module.modules())
    ):
        name: str = wrapper.process_group.group_name
        return name
    if getattr(module, "_is_fsdp_managed_module", False):  # which both kinds of FSDP leave for the compiler, too
        assert dist.group.WORLD is not None
        return dist.group.WORLD.group_name
    return None


def average_buffers(module: nn.Module) -> None:
    """Running statistics, of which each process has gathered those of its own samples, become those of all."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.copy_(mean(buffer))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
