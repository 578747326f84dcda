"""Signs of life between processes, two of which are threads of this one."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack

import pytest
import torch.distributed as dist

from immunity_fast.runtime.pulse import kept

BEAT, PATIENCE = 0.02, 10


@pytest.mark.parametrize("rank", [0, 1])
def test_a_silent_process_is_lost_and_one_that_is_heard_not(rank: int) -> None:
    store, lost, found = dist.HashStore(), [], threading.Event()

    def note(number: int, minutes: float) -> None:
        lost.append((number, minutes))
        found.set()

    with kept(store, rank, 2, lost=note, beat=BEAT, patience=PATIENCE):
        other = ExitStack()
        other.enter_context(kept(store, 1 - rank, 2, lost=note, beat=BEAT, patience=1000))
        assert not found.wait(4 * PATIENCE * BEAT)
        other.close()  # it leaves, as one does whose work is done
        assert not found.wait(2 * PATIENCE * BEAT)
        store.set(f"pulse of {1 - rank}", "17")  # its last sign
        assert found.wait(20)
    assert lost == [(1 - rank, pytest.approx(PATIENCE * BEAT / 60))]


def test_where_the_store_is_gone_the_first_process_is_lost() -> None:
    class Gone:
        def set(self, *_: str) -> None:
            raise RuntimeError("Connection reset by peer")

    found = threading.Event()
    with kept(Gone(), 1, 2, lost=lambda number, _: found.set(), beat=BEAT, patience=PATIENCE):
        assert found.wait(20)


def test_it_ends_with_its_block() -> None:
    threads, started = threading.active_count(), time.monotonic()
    with kept(dist.HashStore(), 0, 2, beat=60):
        assert threading.active_count() == threads + 2
    assert threading.active_count() == threads
    assert time.monotonic() - started < 10
