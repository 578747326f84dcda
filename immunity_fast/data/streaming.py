"""Splits whose images stay where they are: read, decoded and cropped by worker processes when they are asked for.

What comes is what a split in memory would hold, bit for bit, whatever the number of workers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from immunity_fast.data.images import read_image
from immunity_fast.data.sources import Indices, Labelled, Source, listing
from immunity_fast.data.workers import Images, Pool
from immunity_fast.runtime import distributed
from immunity_fast.runtime.memory import peak, private

Workers = int | Literal["auto"]
MOST_WORKERS = 16  # that "auto" takes
SLOT_BYTES = 8 << 20  # of decoded images: what a worker reads at a time, at least one of them
AHEAD = 2  # tasks for each worker that are under way or wait
IN_MAIN = 1000  # images, up to which it pays to start no worker process to hold them all in memory


class Task(NamedTuple):
    """Images that one worker reads at a time: of which source, and which of it."""

    source: int
    indices: Indices


@dataclass(frozen=True)
class Decoder:
    """How images become arrays of one shape.

    Args:
        sources: of the images.
        shape: (C, H, W) of all of them.
        scaled: whether images of other sizes are scaled until they cover it, and cropped to the centre; else they are
            refused.
        first: the image that has the shape.
    """

    sources: tuple[Source, ...]
    shape: tuple[int, int, int]
    scaled: bool
    first: str

    def __call__(self, task: Task, out: Images) -> int:
        """Read a task's images into an array, uint8 (at least as many, C, H, W); how many they are.

        Raises:
            ValueError, OSError: one of them cannot be read; by its name.
        """
        for place, index in enumerate(task.indices.tolist()):
            out[place] = self.read(task.source, index)
        return len(task.indices)

    def read(self, source: int, index: int) -> Images:
        """An image, uint8 (C, H, W).

        Raises:
            ValueError, OSError: it cannot be read, or has another size; by its name.
        """
        channels, height, width = self.shape
        where = self.sources[source]
        image = read_image(
            where.encoded(index), (height, width) if self.scaled else None, channels, name=where.name(index)
        )
        if image.shape[:2] != (height, width):
            raise ValueError(
                f"{where.name(index)}: expected {width}×{height} pixels as {self.first} has, got "
                f"{image.shape[1]}×{image.shape[0]}; image_size (--image-size) brings all images to one size"
            )
        pixels: Images = image.transpose(2, 0, 1)
        return pixels

    def describe(self, task: Task) -> str:
        """What a task reads, for errors."""
        first, last = (self.sources[task.source].name(int(task.indices[place])) for place in (0, -1))
        return first if first == last else f"{first} … {last}"


class Reader:
    """Reads images by worker processes, which start when they are first needed and stay.

    Args:
        decoder: what makes arrays of them.
        workers: processes; 0 reads in this one; "auto" is one a core that this process may use, at most `MOST_WORKERS`.
        start_method: see `workers.Pool`.

    Attributes:
        waited: seconds that were spent waiting for images so far.

    Raises:
        ValueError: a wrong number of workers.
    """

    def __init__(self, decoder: Decoder, workers: Workers = "auto", *, start_method: str | None = None) -> None:
        self.decoder, self.workers, self.start_method = decoder, resolved(workers), start_method
        self.waited = 0.0
        self._pools: list[Pool] = []  # more than one where a run has begun before another has ended
        self._idle: list[Pool] = []

    @property
    def image_bytes(self) -> int:
        """Bytes of a decoded image."""
        return int(np.prod(self.decoder.shape))

    @property
    def chunk(self) -> int:
        """How many images a worker reads at a time."""
        return min(max(1, SLOT_BYTES // self.image_bytes), 64)

    def waiting_bytes(self, batch: int) -> int:
        """How many bytes of decoded images wait at most, where batches of so many are taken."""
        return 0 if not self.workers else self._slots(batch) * self.chunk * self.image_bytes

    def _slots(self, batch: int) -> int:
        # While a batch is used, the next one is read, and each worker is at something of the one after it.
        return max(AHEAD * self.workers, self.workers + -(-batch // self.chunk))

    def batches(self, source: int, rows: Iterable[Indices], size: int, *, pinned: bool = False) -> Iterator[Tensor]:
        """The images of each row of indices, uint8 (n, C, H, W), read ahead.

        Args:
            source: which of the decoder's.
            rows: indices of the images of each batch.
            size: of the largest row.
            pinned: in memory from which a GPU copies by itself.

        Raises:
            ValueError, OSError: an image cannot be read; by its name.
        """
        if not self.workers:
            for row in rows:
                began = time.perf_counter()
                batch = self._empty(len(row), pinned)
                self.decoder(Task(source, row), batch.numpy())
                self.waited += time.perf_counter() - began
                yield batch
            return
        kept: list[Indices] = []

        def tasks() -> Iterator[Task]:
            for row in rows:
                kept.append(row)
                yield from (Task(source, part) for part in _parts(row, self.chunk))

        pool = self._pool(size)
        before = pool.waited
        images = pool.run(tasks())
        try:
            batch, filled = self._empty(0, pinned), 0
            for found in images:
                if not filled:
                    batch = self._empty(len(kept.pop(0)), pinned)
                batch.numpy()[filled : filled + len(found)] = found
                filled += len(found)
                if filled == len(batch):
                    filled = 0
                    self.waited += pool.waited - before
                    before = pool.waited
                    yield batch
        finally:
            images.close()  # type: ignore[attr-defined]  # a generator
            if not pool.closed:
                self._idle.append(pool)

    def _empty(self, count: int, pinned: bool) -> Tensor:
        return torch.empty(count, *self.decoder.shape, dtype=torch.uint8, pin_memory=pinned)

    def _pool(self, batch: int) -> Pool:
        """A pool that nobody uses, with room for batches of so many images."""
        slots = self._slots(batch)
        while self._idle:
            pool = self._idle.pop()
            if not pool.closed and pool.slots >= slots:
                return pool
            pool.close()
        self._pools = [pool for pool in self._pools if not pool.closed]
        self._pools.append(self._started(slots))
        return self._pools[-1]

    def _started(self, slots: int) -> Pool:
        return Pool(
            self.decoder,
            (self.chunk, *self.decoder.shape),
            slots,
            self.workers,
            start_method=self.start_method,
            describe=self.decoder.describe,
        )

    def pids(self) -> list[int]:
        """The worker processes that there are."""
        return [pid for pool in self._pools if not pool.closed for pid in pool.pids]

    def measured(self, seconds: float) -> dict[str, float]:
        """What a record says of reading.

        Args:
            seconds: since `waited` was 0.

        Returns:
            "images_waited_share": of these seconds, what was spent waiting for images; "memory_peak_bytes": the most
            that this process has had in memory so far, and what its workers have besides it; "workers_bytes": the
            latter alone. No bytes where the system does not tell.
        """
        own, theirs = peak(), private(self.pids())
        found = {"images_waited_share": min(1.0, self.waited / max(seconds, 1e-9))}
        if own is not None and theirs is not None:
            found |= {"memory_peak_bytes": own + theirs, "workers_bytes": theirs}
        return found

    def close(self) -> None:
        """End the worker processes; where images are asked for again, others start."""
        for pool in self._pools:
            pool.close()
        self._pools, self._idle = [], []

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pools": [], "_idle": []}  # another process has workers of its own


@dataclass(frozen=True, eq=False)
class StreamedSplit:
    """A split whose images are read when they are asked for; the interface of `datasets.Split` but for `images`.

    Args:
        reader: of all splits of a data set.
        part: which of its sources this is.
        labels: int64 (n,), on the device that images are brought to.
    """

    reader: Reader
    part: int
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """C of the images."""
        return self.reader.decoder.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.reader.decoder.shape[1:]

    def read(self, indices: Tensor | slice | Sequence[int]) -> Tensor:
        """Some images, uint8 (n, C, H, W), on the labels' device.

        Raises:
            ValueError, OSError: one cannot be read; by its name.
        """
        chosen = torch.arange(len(self))[indices].numpy() if isinstance(indices, slice) else _int64(indices)
        for batch in self._batches([chosen], len(chosen)):
            return batch
        return torch.empty(0, *self.reader.decoder.shape, dtype=torch.uint8, device=self.labels.device)

    def stream(self, rows: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each row of indices, as `read` has them, the next ones of which are read meanwhile.

        Raises:
            ValueError, OSError: one cannot be read; by its name, where its turn comes.
        """
        if isinstance(rows, Tensor):
            rows = rows.cpu()  # at once: one row after another would wait for the device
        each = [_int64(row) for row in rows]
        yield from self._batches(each, max(map(len, each), default=0))

    def _batches(self, rows: list[Indices], size: int) -> Iterator[Tensor]:
        device = self.labels.device
        pinned = device.type == "cuda"
        for batch in self.reader.batches(self.part, [row for row in rows if len(row)], size, pinned=pinned):
            yield batch.to(device, non_blocking=pinned)

    def to(self, device: torch.device | str) -> StreamedSplit:
        """The same split, whose images are brought to another device."""
        return replace(self, labels=self.labels.to(device))

    def listing(self) -> str:
        """See `sources.listing`."""
        return listing(self.reader.decoder.sources[self.part], self.labels, self.reader.decoder.shape)


def resolved(workers: Workers) -> int:
    """How many worker processes are meant.

    Raises:
        ValueError: no such number.
    """
    if workers == "auto":
        return min(max(1, usable_cores() // distributed.count_here()), MOST_WORKERS)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"workers: expected auto or a number of processes from 0, got {workers!r}")
    return workers


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hold(decoder: Decoder, parts: Sequence[Labelled], workers: Workers = "auto") -> list[Tensor]:
    """All images in memory, those of each part uint8 (n, C, H, W).

    Args:
        decoder: whose sources are the parts'.
        parts: the splits.
        workers: that read; of few images none is started.

    Raises:
        ValueError, OSError: one cannot be read; by its name.
    """
    few = sum(len(part.labels) for part in parts) <= IN_MAIN
    reader = Reader(decoder, 0 if few and workers == "auto" else workers)
    held = []
    try:
        for number, part in enumerate(parts):
            images = torch.empty(len(part.labels), *decoder.shape, dtype=torch.uint8)
            filled = 0
            for batch in reader.batches(number, _parts(np.arange(len(images)), reader.chunk), reader.chunk):
                images[filled : filled + len(batch)] = batch
                filled += len(batch)
            held.append(images)
    finally:
        reader.close()
    return held


def _parts(indices: Indices, size: int) -> list[Indices]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _int64(indices: Tensor | Sequence[int]) -> Indices:
    if isinstance(indices, Tensor):
        indices = indices.cpu()
    found: NDArray[np.int64] = np.asarray(indices, dtype=np.int64)
    return found
