"""Times calls in turns: in each round every one of them, in rotating order, so that a change of the machine meets all.

On CUDA what runs is the replay of a CUDA graph, which has no host in it, and the time is the device's. The graph holds
the call on several sets of inputs, so that the cache does not hold the next one's. A call that cannot be captured is
launched from the host, which its record says. On a CPU it is the clock on the wall.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.cases import DEVICE

CUDA = DEVICE.type == "cuda"
TURN = 1e-3 if CUDA else 5e-3  # seconds at least: long beside what events and the launch of a graph add
BUDGET = 0.4  # seconds for all rounds, whose number lies between
ROUNDS = (7, 50)  # these bounds
CPU_CACHE = 16 << 20  # bytes
REHEARSED_ROUNDS = 2

_rehearsing = False

Call = Callable[[], object]


class Run(NamedTuple):
    """What is repeated: some calls one after the other."""

    timed: str  # "cuda graph", "events" or "wall clock"
    calls: int
    start: Call
    alive: Sequence[Call] = ()  # a graph knows addresses only: what lies there lives as long as the calls do


class Timing(NamedTuple):
    """How a call was timed, and the seconds that one call took in each round."""

    timed: str
    seconds: list[float]


def rehearse() -> None:
    """From here on times mean nothing: two rounds, one set of inputs, and no graphs, which need memory of their own."""
    global _rehearsing
    _rehearsing = True


def sets(bytes_of_a_set: int) -> int:
    """How many sets of inputs outgrow the cache three times over; at most 16."""
    if _rehearsing:
        return 1
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if CUDA else CPU_CACHE
    return min(max(math.ceil(3 * cache / bytes_of_a_set), 1), 16)


@contextlib.contextmanager
def on_stream() -> Iterator[None]:
    """A stream that can be captured: a backward pass runs on the stream of its forward pass, so both belong in here."""
    if not CUDA:
        yield
        return
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def pool() -> Any:
    """Memory that CUDA graphs may share: no two of them run at once, and nobody looks at their results."""
    return torch.cuda.graph_pool_handle() if CUDA else None


def prepare(calls: Sequence[Call], pool: Any) -> Run:
    """What `interleaved` repeats: the same call on one set of inputs after the other."""

    def one_after_the_other() -> None:
        for call in calls:
            call()

    one_after_the_other()  # compiles what is to be compiled, and fills caches
    if not CUDA:
        return Run("wall clock", len(calls), one_after_the_other)
    if _rehearsing:
        return Run("events", len(calls), one_after_the_other)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream()):
            one_after_the_other()
    except RuntimeError as error:
        print(f"not captured in a CUDA graph: {error}", file=sys.stderr)
        _wait()
        return Run("events", len(calls), one_after_the_other)
    return Run("cuda graph", len(calls), graph.replay, calls)


def interleaved(runs: Mapping[str, Run], most: int | None = None) -> dict[str, Timing]:
    """Seconds that one call of each run takes, round by round; of `most` rounds where these are to be few."""
    if not runs:
        return {}
    repeats = {name: max(1, math.ceil(TURN / _duration(run.start))) for name, run in runs.items()}
    total = sum(_duration(run.start, repeats[name]) for name, run in runs.items())
    rounds = REHEARSED_ROUNDS if _rehearsing else min(max(int(BUDGET / total), ROUNDS[0]), ROUNDS[1])
    rounds = min(rounds, most or rounds)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    names = list(runs)
    for run in runs.values():  # the first mark must not find an idle device, and time the host
        run.start()
    for index in range(rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            begin = _mark()
            for _ in range(repeats[name]):
                runs[name].start()
            marks[name].append((begin, _mark()))
    _wait()
    return {
        name: Timing(run.timed, [_between(*pair) / (repeats[name] * run.calls) for pair in marks[name]])
        for name, run in runs.items()
    }


def _duration(call: Call, times: int = 1) -> float:
    """Seconds that the call takes so many times, nothing else going on."""
    _wait()
    begin = _mark()
    for _ in range(times):
        call()
    end = _mark()
    _wait()
    return _between(begin, end)


def _mark() -> Any:
    """A point of time."""
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(begin: Any, end: Any) -> float:
    """Seconds; on CUDA known once the device is there."""
    return float(begin.elapsed_time(end) / 1e3 if CUDA else end - begin)


def lost() -> bool:
    """Whether the device takes no more work from this process, as after a read of memory that is not there."""
    try:
        _wait()
    except RuntimeError:
        return True
    return False


def _wait() -> None:
    """Until the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
