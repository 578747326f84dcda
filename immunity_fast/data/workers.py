"""Worker processes that read images: what they are given to do comes back in order, in a bounded piece of memory.

Each worker has a pipe of its own. Images go through memory that all processes share, divided into slots of equal size:
as many images wait as there are slots, however slow the one is who takes them. Whichever worker is free gets the next
task, and what is taken comes in the order of the tasks: nothing depends on how many workers there are.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, util
from multiprocessing.shared_memory import SharedMemory
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from immunity_fast.runtime.failures import in_units, one_line, out_of_memory

Images = NDArray[np.uint8]
Decode = Callable[[Any, Images], int]
POLL = 2.0  # seconds after which a worker that has nothing to do looks whether its parent is still there
PATIENCE = 1.0  # seconds that a worker is given to end by itself
# What a task may fail with, which is raised where its turn comes; anything else becomes a RuntimeError.
_PASSED_ON = (ValueError, FileNotFoundError, ModuleNotFoundError, MemoryError, OSError)
ADVICE = "fewer --workers, or --workers 0, which reads in the main process"


class WorkerError(OSError):
    """A worker process has ended, or could not be started; one line that says what to do."""


class _Sent(NamedTuple):
    ticket: int
    slot: int
    task: Any


class Pool:
    """Worker processes that do tasks, and the memory for what comes of them.

    Args:
        decode: does a task: it writes into a slot and returns of how many images. It can be pickled.
        slot: shape of a slot, uint8.
        slots: how many there are, at least one for each worker.
        workers: processes.
        start_method: "fork", "spawn" or "forkserver"; None is what the program has set, or else "fork" on Linux, where
            it costs nothing, and "spawn" elsewhere.
        describe: what a task reads, for errors.

    Raises:
        WorkerError: there is not enough memory to share, or no process can be started.
    """

    def __init__(
        self,
        decode: Decode,
        slot: tuple[int, ...],
        slots: int,
        workers: int,
        *,
        start_method: str | None = None,
        describe: Callable[[Any], str] = str,
    ) -> None:
        self.slots, self.workers, self.process = slots, workers, os.getpid()
        self.waited = 0.0  # seconds that were spent waiting for images
        self._describe = describe
        context: Any = multiprocessing.get_context(start_method or default_start_method())
        shape = (slots, *slot)
        forked = context.get_start_method() == "fork"
        self._memory = shared(shape, forked=forked)
        self._arrays = [as_array(self._memory, shape)]  # one, or none once it is closed
        self._free = list(range(slots))
        self._done: dict[int, tuple[int, int | Exception]] = {}  # by ticket: slot, and images or what went wrong
        self._ticket = 0
        self._processes: list[Any] = []
        self._pipes: list[connection.Connection] = []
        self._sent: list[deque[_Sent]] = []
        # Before `multiprocessing` ends daemons at exit, by a signal that workers do not listen to.
        held = (self._processes, self._pipes, self._memory, self._arrays)
        self._end = util.Finalize(self, _close, held, exitpriority=20)
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                inherited = ours if forked else None
                process = context.Process(
                    target=_work, args=(decode, self._memory, shape, theirs, inherited), daemon=True
                )
                with _quiet_start(forked=forked):
                    process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
                self._sent.append(deque())
        except OSError as error:
            self.close()
            raise WorkerError(f"no worker process could be started ({one_line(error)}): try {ADVICE}") from error

    @property
    def closed(self) -> bool:
        """Whether it can do nothing any more: it was closed, a worker has died, or this is a process forked since."""
        return not self._pipes or self.process != os.getpid()

    @property
    def pids(self) -> list[int]:
        """The worker processes."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End the workers, and give the memory back."""
        self._end()

    def run(self, tasks: Iterable[Any]) -> Iterator[Images]:
        """What comes of each task, in order; an array is good until the next one is asked for.

        One run at a time; where it is given up half-way, what was begun is waited for.

        Raises:
            WorkerError: a worker has died; the pool is closed then.
            ValueError, OSError, MemoryError, RuntimeError: of a task, where its turn comes.
        """
        left, order = iter(tasks), deque[int]()
        try:
            while True:
                while self._free and (task := next(left, None)) is not None:
                    order.append(self._send(task))
                if not order:
                    return
                began = time.perf_counter()
                while order[0] not in self._done:
                    self._receive()
                self.waited += time.perf_counter() - began
                slot, found = self._done.pop(order.popleft())
                if isinstance(found, Exception):
                    self._free.append(slot)
                    self._drain()
                    raise found
                try:
                    yield self._arrays[0][slot, :found]
                finally:
                    self._free.append(slot)
        except GeneratorExit:
            self._drain()
            raise
        except BaseException:
            if any(self._sent):  # in the middle of something: what comes through the pipes cannot be told any more
                self.close()
            raise

    def _send(self, task: Any) -> int:
        worker = min(range(self.workers), key=lambda number: len(self._sent[number]))
        slot = self._free.pop()
        self._ticket += 1
        self._sent[worker].append(_Sent(self._ticket, slot, task))
        try:
            self._pipes[worker].send((slot, task))
        except OSError:
            self._died(worker)
        return self._ticket

    def _receive(self) -> None:
        """Wait until a worker has done a task, and take note of it."""
        ready = connection.wait([*self._pipes, *(process.sentinel for process in self._processes)])
        for worker, pipe in enumerate(self._pipes):
            if pipe in ready:
                try:
                    found = pipe.recv()
                except (EOFError, OSError):
                    self._died(worker)
                sent = self._sent[worker].popleft()
                self._done[sent.ticket] = sent.slot, found
        for worker, process in enumerate(self._processes):
            if process.sentinel in ready and self._pipes[worker] not in ready:
                self._died(worker)

    def _drain(self) -> None:
        """Wait for what was begun, and forget it."""
        if self.closed:
            return
        while any(self._sent):
            self._receive()
        self._free += [slot for slot, _ in self._done.values()]
        self._done.clear()

    def _died(self, worker: int) -> None:
        process = self._processes[worker]
        process.join(PATIENCE)
        at = f" while it read {self._describe(self._sent[worker][0].task)}" if self._sent[worker] else ""
        self.close()
        raise WorkerError(f"worker process {process.pid} {_how_it_ended(process.exitcode)}{at}: try {ADVICE}")


def default_start_method() -> str:
    """How worker processes start: as the program has set it; or else by fork on Linux, by spawn elsewhere.

    A forked worker does nothing but read and decode: it takes no lock that another thread may have held.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    return chosen or ("fork" if sys.platform == "linux" else "spawn")


def shared(shape: tuple[int, ...], *, forked: bool) -> Any:
    """Memory that worker processes share: nameless where they are forked, so that no /dev/shm can be too small.

    Raises:
        WorkerError: there is not enough.
    """
    size = max(int(np.prod(shape)), 1)
    try:
        if forked:
            return mmap.mmap(-1, size)
        memory = SharedMemory(create=True, size=size)
        try:
            if hasattr(os, "posix_fallocate"):  # now, and not by a signal in the middle of a write
                with open(f"/dev/shm/{memory.name}", "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, size)
        except FileNotFoundError:  # a system that keeps it elsewhere
            pass
        except OSError:
            memory.close()
            memory.unlink()
            raise
    except OSError as error:
        raise WorkerError(
            f"no {in_units(size)} of memory for worker processes to share ({one_line(error)}): try a smaller "
            f"--batch-size, {ADVICE}"
        ) from error
    return memory


def as_array(memory: Any, shape: tuple[int, ...]) -> Images:
    """Shared memory as numbers."""
    array: Images = np.ndarray(shape, np.uint8, buffer=memory.buf if isinstance(memory, SharedMemory) else memory)
    return array


@contextmanager
def _quiet_start(*, forked: bool) -> Iterator[None]:
    """A `with` block in which a process starts.

    Forked, without the warning that there are other threads, see `default_start_method`. Spawned, without importing the
    program's main module again: a worker needs nothing of it, and a script need not expect it.
    """
    if forked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
        return
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(
    decode: Decode,
    memory: Any,
    shape: tuple[int, ...],
    pipe: connection.Connection,
    inherited: connection.Connection | None,
) -> None:
    """A worker's life: a task, an answer, until the parent has closed the pipe or is gone."""
    if inherited is not None:  # the parent's end: as long as anybody holds it, the pipe does not end
        inherited.close()
    # Ctrl-C and a scheduler's signal go to all processes of a group: the parent decides what comes of them.
    for number in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, number):
            signal.signal(getattr(signal, number), signal.SIG_IGN)
    parent, array = os.getppid(), as_array(memory, shape)
    with suppress(EOFError, OSError):
        while True:
            while not pipe.poll(POLL):
                if os.getppid() != parent:
                    return
            task = pipe.recv()
            if task is None:
                return
            pipe.send(_answer(decode, task[1], array[task[0]]))


def _answer(decode: Decode, task: Any, slot: Images) -> int | Exception:
    try:
        return decode(task, slot)
    except Exception as error:
        if out_of_memory(error) is not None:
            return MemoryError(one_line(error))
        for kind in _PASSED_ON:
            if isinstance(error, kind):
                return kind(" ".join(str(error).split()))
        return RuntimeError(one_line(error))


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "answers no more"
    if code >= 0:
        return f"has ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    why = {"SIGKILL": ", as a system does that is short of memory", "SIGBUS": ", as where /dev/shm is too small"}
    return f"was killed by {name}{why.get(name, '')}"


def _close(processes: list[Any], pipes: list[connection.Connection], memory: Any, arrays: list[Images]) -> None:
    arrays.clear()  # or the memory could not be given back
    for pipe in pipes:
        with suppress(OSError, ValueError):
            pipe.send(None)
        pipe.close()
    pipes.clear()
    until = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    if isinstance(memory, SharedMemory):
        with suppress(BufferError):  # somebody still looks at an array of it
            memory.close()
        memory.unlink()
