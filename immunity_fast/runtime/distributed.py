"""Several processes that train one model, one a GPU, as `torchrun` starts them; on a CPU they work too.

Every function here is also right in a process that is alone, where it does next to nothing.
"""

from __future__ import annotations

import os
import pickle
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from immunity_fast.runtime.pulse import kept

T = TypeVar("T")

# What Gloo, NCCL and the store say in a process that is left behind.
_LOST = re.compile(
    r"Connection (reset|closed|refused)|Broken pipe|remote (process|worker)|ncclRemoteError|[Tt]imed out waiting", re.I
)
TIMEOUT = timedelta(hours=2)  # others wait while one of them validates
MEETING = timedelta(minutes=10)  # until all have come, whose machines may start one after another
LEAVING = timedelta(seconds=20)  # until the others have heard why the first one ends

_store: Any = None  # where the processes meet, for as long as this one lives
_decisions = _groups = 0  # how many there were so far, by which their keys differ


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
    global _groups
    from torch.distributed.distributed_c10d import PrefixStore  # which not every PyTorch has

    with _finding_each_other():
        _groups += 1
        places = _told(f"device {_groups}", (socket.gethostname(), str(device)))
    _check_places(places)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _finding_each_other():
        # Each under a name of its own: what an earlier one has written there would lead this one astray.
        store = PrefixStore(f"group {_groups}", _meeting())
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=int(os.environ["RANK"]), world_size=_world_size(), timeout=TIMEOUT
        )
    # A store of its own: one that waits for a key keeps other threads from it.
    life = kept(store.clone(), rank(), count()) if hasattr(store, "clone") else nullcontext()
    try:
        with life:
            yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise ConnectionError(f"process {rank()} has lost the others, one of which has ended") from error
    finally:
        dist.destroy_process_group()


@contextmanager
def _finding_each_other() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().split("\n")[0]
        raise ConnectionError(f"the processes cannot find each other at {place} ({reason})") from error


def _meeting(patience: timedelta | None = None) -> Any:
    """The store in which all processes write and read, once all of them have come; RuntimeError where they do not."""
    global _store
    if _store is None:
        from torch.distributed.rendezvous import rendezvous  # which not every PyTorch has

        patience = patience or MEETING
        store, rank, _ = next(rendezvous("env://", timeout=patience))
        store.set(f"here/{rank}", "yes")
        store.wait([f"here/{other}" for other in range(_world_size())], patience)
        _store = store
    return _store


def _told(name: str, value: T) -> list[T]:
    """What each process says, in the order of their numbers, without a process group."""
    store = _meeting()
    store.set(f"{name} of {os.environ['RANK']}", pickle.dumps(value))
    return [pickle.loads(store.get(f"{name} of {other}")) for other in range(_world_size())]


def _check_places(places: list[tuple[str, str]]) -> None:
    """Check that processes compute on devices of one kind, each on a GPU of its own.

    Args:
        places: of each process the machine's name and the device.

    Raises:
        ValueError: they do not.
    """
    for number, (host, device) in enumerate(places):
        first_host, first_device = places[0]
        if device.split(":")[0] != first_device.split(":")[0]:
            raise ValueError(
                f"--device: expected one kind for all processes, got {first_device} in process 0 on {first_host}, "
                f"{device} in process {number} on {host}"
            )
        if device.startswith("cuda") and (earlier := places.index((host, device))) < number:
            raise ValueError(
                f"--device {device}: expected a GPU for each process, got one for processes {earlier} and {number} on "
                f"{host}: leave --device to auto, and start as many processes there as it has GPUs"
            )


def decided_by_first(decide: Callable[[], T]) -> T:
    """What the first process decides, in all processes, which call this at the same point.

    It needs no process group, and may be what tells on which device there will be one. So what a command line asks for
    is read by the process that sees the run's folder, and no clock or folder of another machine makes another thing of
    it.

    Raises:
        ValueError, OSError, ModuleNotFoundError, SystemExit: as `decide`, in the first process.
        ValueError: in the others where it raised anything.
        ConnectionError: the processes do not find each other.
    """
    global _decisions
    if _world_size() == 1:
        return decide()
    check_environment()
    _decisions += 1
    key = f"decision {_decisions}"
    if os.environ["RANK"] != "0":
        with _finding_each_other():
            kind, decided = pickle.loads(_meeting().get(key))
            _meeting().set(f"{key} heard by {os.environ['RANK']}", "yes")
        if kind == "exit":
            raise SystemExit(decided)
        if kind == "refused":
            raise ValueError(f"the first process has ended: {decided}")
        made: T = decided
        return made
    try:
        result = decide()
    except (Exception, SystemExit) as error:
        said = ("exit", error.code) if isinstance(error, SystemExit) else ("refused", " ".join(str(error).split()))
        with suppress(RuntimeError):  # what is wrong here is more to the point than who has not come
            store = _meeting(LEAVING)
            store.set(key, pickle.dumps(said))
            store.wait([f"{key} heard by {other}" for other in range(1, _world_size())], LEAVING)
        raise
    with _finding_each_other():
        _meeting().set(key, pickle.dumps(("decided", result)))
    return result


def in_first() -> bool:
    """Whether this is the process that writes; also outside of the process group."""
    return (os.environ.get("RANK") or "0") == "0"


def log_in_first(log: Callable[[str], Any]) -> Callable[[str], Any]:
    """`log` in the first process, nothing in the others; also after the process group has ended."""
    return log if in_first() else lambda _: None


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


def count_here() -> int:
    """How many of the processes that train the model together run on this machine."""
    given = os.environ.get("LOCAL_WORLD_SIZE") or "1"
    return max(1, int(given)) if _several() and given.isdecimal() else 1


@contextmanager
def first_of_all() -> Iterator[None]:
    """A `with` block that looks for a file and makes it where it is missing: nowhere do two processes make it at once.

    The first process runs it before the others do, then the first one of each other machine, which may have a disk of
    its own or share one, then all others.
    """
    turn = 0 if rank() == 0 else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
    for _ in range(turn):
        barrier()
    try:
        yield
    finally:  # also where it fails: the others would wait for this one
        for _ in range(turn, 2):
            barrier()


def barrier() -> None:
    """Until all processes have come here."""
    if _several():
        dist.barrier()


@contextmanager
def together() -> Iterator[None]:
    """What one process refuses in a `with` block, all refuse: none waits for another that has ended.

    Raises:
        ValueError, OSError, ModuleNotFoundError: this process' own; in the others a ValueError that says which process,
            on which machine, has refused it.
    """
    failure: Exception | None = None
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        failure = error
    said = every(None if failure is None else (socket.gethostname(), " ".join(str(failure).split())))
    if failure is not None:
        raise failure
    for number, refused in enumerate(said):
        if refused is not None:
            raise ValueError(f"process {number} on {refused[0]}: {refused[1]}")


def every(value: T) -> list[T]:
    """What each process gives, in the order of their numbers, in all of them."""
    if not _several():
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def of_first(value: T) -> T:
    """What the first process gives, in all of them."""
    if not _several():
        return value
    values: list[Any] = [value if rank() == 0 else None]
    dist.broadcast_object_list(values)
    given: T = values[0]
    return given


def read_by_first(read: Callable[[], tuple[dict[str, Tensor], T]]) -> tuple[dict[str, Tensor], T]:
    """Tensors of a file, on the CPU, and what is said of them, as the first process reads it, in all processes.

    The others need not see the file, and cannot see an older one.

    Raises:
        ValueError, OSError: as `read` in the first process; in the others a ValueError with the same words.
    """
    if not _several():
        return read()
    failure: Exception | None = None
    tensors: dict[str, Tensor] = {}
    said: Any = None
    if rank() == 0:
        try:
            tensors, said = read()
        except (ValueError, OSError) as error:
            failure = error
    outline = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    words = None if failure is None else " ".join(str(failure).split())
    words, outline, said = of_first((words, outline, said))
    if words is not None:
        raise failure or ValueError(words)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    for name, (shape, dtype) in outline.items():
        value = tensors[name].to(device) if rank() == 0 else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(value, 0)
        tensors[name] = value.cpu()
    return tensors, said


def check_same(name: str, value: str, differ: str) -> None:
    """Check that all processes have the same of something.

    Args:
        name: of what is wrong where they have not.
        value: this process' own.
        differ: what to say then; the processes and machines follow.

    Raises:
        ValueError: in all processes, which names one that differs.
    """
    found = every((value, socket.gethostname()))
    for number, (other, host) in enumerate(found):
        if other != found[0][0]:
            raise ValueError(f"{name}: {differ} (process 0 on {found[0][1]}, process {number} on {host})")


class Agreement:
    """Whether some process has been asked to stop: what all processes find out at the same step.

    Each asks once a step, and hears what was said a step before, so that none waits for a message.
    """

    def __init__(self) -> None:
        self._said: Tensor | None = None
        self._work: Any = None
        # Without, several would stop at different steps.
        self.possible = not _several() or dist.is_gloo_available()
        several = _several() and self.possible
        # Numbers on the CPU: those on a GPU would come behind all that it still has to compute.
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if several else None

    def ask(self, number: int) -> int:
        """Say the signal that has come, or 0; the largest number that was said in any process a step before."""
        if self._group is None:
            return number
        before = self.heard()
        self._said = torch.tensor([number])
        self._work = dist.all_reduce(self._said, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return before

    def now(self, number: int) -> int:
        """Say the signal that has come, or 0; the largest number that is said or was before."""
        before = self.ask(number)
        return max(before, self.heard()) if self._group is not None else number

    def heard(self) -> int:
        """What was said last; waits until all have said something."""
        if self._said is None:
            return 0
        self._work.wait()
        number, self._said = int(self._said), None
        return number


def mean(tensor: Tensor) -> Tensor:
    """The mean over all processes, the same in each; infinite or NaN where one of theirs is."""
    if not _several():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total / count()


def first_of_any(value: str | None) -> str | None:
    """The first text that a process has, the same in each; None where none has one."""
    if not _several():
        return value
    return next((text for text in every(value) if text is not None), None)


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
    # Which both kinds of FSDP leave for the compiler, too, in a module or, where experts are sharded, in its parts.
    if any(getattr(part, "_is_fsdp_managed_module", False) for part in module.modules()):
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
