"""Worker processes that read: order, bounds, failures, signals, and their end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from immunity_fast.data.images import read_image
from immunity_fast.data.sources import Files
from immunity_fast.data.streaming import Decoder, Task
from immunity_fast.data.workers import Images, Pool, WorkerError, shared
from tests.photos import photo

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks its workers")


def _decode(task: int, out: Images) -> int:
    """Task t is of 1 + t % 3 images, all of the value t; some take longer than others, and some go wrong."""
    if task % 4 == 0:
        time.sleep(0.01)
    if task == 13:
        raise ValueError("photo 13: expected an image, got\n nonsense")
    if task == 77:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 88:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
    out[: 1 + task % 3] = task
    return 1 + task % 3


def _pool(workers: int = 3, slots: int = 6) -> Pool:
    return Pool(_decode, (3, 2, 2), slots, workers, start_method="fork", describe=lambda task: f"photo {task}")


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = _pool()
    yield made
    made.close()


def _values(found: Iterator[Images]) -> list[tuple[int, ...]]:
    return [tuple(images.reshape(len(images), -1)[:, 0].tolist()) for images in found]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_done_comes_in_the_order_of_the_tasks(workers: int) -> None:
    pool = _pool(workers)
    tasks = [t for t in range(40) if t != 13]
    for _ in range(2):
        assert _values(pool.run(tasks)) == [(t,) * (1 + t % 3) for t in tasks]
    assert _values(pool.run([])) == []
    pool.close()


def test_no_more_is_read_ahead_than_there_are_slots(pool: Pool) -> None:
    taken = []

    def tasks() -> Iterator[int]:
        for task in range(100, 160):
            taken.append(task)
            yield task

    for done, _ in enumerate(pool.run(tasks()), start=1):
        assert len(taken) <= done + pool.slots


def test_a_failure_comes_in_its_turn_and_the_pool_goes_on(pool: Pool) -> None:
    run = pool.run(range(10, 30))
    assert [int(next(run)[0, 0, 0]) for _ in range(3)] == [10, 11, 12]
    with pytest.raises(ValueError, match=r"^photo 13: expected an image, got nonsense$"):
        next(run)
    assert not pool.closed
    assert _values(pool.run([1, 2])) == [(1, 1), (2, 2, 2)]


def test_a_worker_s_lack_of_memory_is_told_as_one_s_own(pool: Pool) -> None:
    with pytest.raises(MemoryError, match="out of memory"):
        list(pool.run([88]))


def test_a_worker_that_dies_is_one_line_with_what_it_read(pool: Pool) -> None:
    processes = list(pool.pids)
    with pytest.raises(WorkerError, match=r"was killed by SIGKILL, .* while it read photo 77: try fewer --workers"):
        list(pool.run([74, 75, 76, 77, 78]))
    assert pool.closed
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


def test_a_run_that_is_given_up_leaves_nothing_behind(pool: Pool) -> None:
    run = pool.run(range(20, 60))
    next(run)
    run.close()  # type: ignore[attr-defined]
    assert _values(pool.run([4, 5])) == [(4, 4), (5, 5, 5)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_group_leave_workers_to_their_parent(pool: Pool, number: int) -> None:
    assert _values(pool.run([1, 2, 3])) == [(1, 1), (2, 2, 2), (3,)]
    for pid in pool.pids:
        os.kill(pid, number)
    assert _values(pool.run([4, 5])) == [(4, 4), (5, 5, 5)]


def test_workers_end_with_their_parent() -> None:
    """Also with one that is killed, and tells nobody."""
    hearing, telling = os.pipe()
    parent = os.fork()
    if not parent:
        pool = _pool(2)
        list(pool.run([1]))
        os.write(telling, (" ".join(map(str, pool.pids)) + "\n").encode())
        signal.pause()
    workers = [int(pid) for pid in os.read(hearing, 100).split()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until = time.monotonic() + 20
    while any(_runs(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in workers)


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def test_spawned_workers_do_the_same_and_leave_no_memory(tmp_path: Path) -> None:
    """What they run is the package's own: a spawned process cannot import this file."""
    file = tmp_path / "one.png"
    file.write_bytes(photo(3))
    decoder = Decoder((Files(str(tmp_path), [b"one.png"]),), (3, 11, 14), False, "one.png")
    before = set(os.listdir("/dev/shm"))
    pool = Pool(decoder, (2, 3, 11, 14), 2, 1, start_method="spawn")
    assert len(set(os.listdir("/dev/shm")) - before) == 1
    (found,) = (images.copy() for images in pool.run([Task(0, np.array([0, 0]))]))
    pool.close()
    assert set(os.listdir("/dev/shm")) == before
    assert (found == read_image(file).transpose(2, 0, 1)).all()


def test_memory_that_cannot_be_shared_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(WorkerError, match=r"^no 24 bytes of memory .*No space left.*: try a smaller --b"):
        shared((2, 3, 2, 2), forked=False)
    assert set(os.listdir("/dev/shm")) == before
