"""Signs of life between processes that train together: one whose machine has gone silent is not waited for.

Where a process ends, its connections tell the others at once. Where its machine loses power, or its network, they
tell nothing, and a collective operation would wait for its timeout of hours.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

BEAT = 10.0  # seconds from one sign to the next
PATIENCE = 60  # beats without a sign: ten minutes
LEFT = b"left"


def end(number: int, minutes: float) -> None:
    """End this process, whose main thread waits in PyTorch, with a line."""
    line = f"error: process {number} has given no sign of life for {minutes:.0f} minutes: its machine is gone"
    os.write(2, f"{line}\n".encode())
    os._exit(1)


@contextmanager
def kept(
    store: Any,
    rank: int,
    count: int,
    *,
    lost: Callable[[int, float], None] = end,
    beat: float = BEAT,
    patience: int = PATIENCE,
) -> Iterator[None]:
    """Give signs of life in a `with` block, and look for others': the first process for all, the others for its.

    Args:
        store: of `torch.distributed`, for this alone: its calls may come from another thread.
        rank, count: which process this is, of how many.
        lost: is called with the number of one that is silent, and for how many minutes it was.
        beat: seconds from one sign to the next.
        patience: so many beats without a sign are too many.
    """
    others = [number for number in range(count) if number != rank] if rank == 0 else [0]
    signs: dict[int, bytes] = {}
    over = threading.Event()

    def give_and_take() -> None:
        number = 0
        with suppress(RuntimeError):  # the store is gone: then nobody is heard of any more
            while not over.wait(beat):
                number += 1
                store.set(f"pulse of {rank}", str(number))
                for other in others:
                    if store.check([f"pulse of {other}"]):
                        signs[other] = store.get(f"pulse of {other}")

    def watch() -> None:
        before, silent = dict(signs), dict.fromkeys(others, 0)
        while not over.wait(beat):  # counted in beats of this process: one that was suspended has not waited
            for other in others:
                silent[other] = 0 if signs.get(other) != before.get(other) else silent[other] + 1
                if silent[other] >= patience and signs.get(other) != LEFT:
                    lost(other, silent[other] * beat / 60)
                    return
            before = dict(signs)

    threads = [threading.Thread(target=part, daemon=True) for part in (give_and_take, watch)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(beat)
        with suppress(RuntimeError):
            store.set(f"pulse of {rank}", LEFT.decode())
