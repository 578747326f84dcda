"""Shuffled training batches and how to augment them, whose place in an epoch can be taken up again, bit for bit."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from immunity_fast.augmentation import draw
from immunity_fast.data import Split


class Batch(NamedTuple):
    """images: uint8 (B, 3, H, W); labels: (B,); motion: (5, B), what `augmentation.move` does to the images."""

    images: Tensor
    labels: Tensor
    motion: Tensor


class TrainLoader:
    """Batches of a split, on its device, in a new order each epoch.

    An epoch leaves out the last images of its order that do not fill a batch, so that all batches have one size; a
    split smaller than a batch is one batch. All numbers of an epoch are drawn and brought to the device at its start:
    between two batches nothing waits for the other side.

    Args:
        split: what to draw from.
        batch_size: of all processes together.
        seed: of the order and of the augmentation, the same in all processes.
        padding, degrees, flip: see `augment`.
        rank, processes: each process gets its part of each batch, whose images and augmentation do not depend on how
            many processes there are.

    Raises:
        ValueError: a batch that cannot be divided among the processes.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        *,
        padding: int,
        degrees: float,
        flip: bool,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if batch_size % processes or len(split) < processes:
            raise ValueError(
                f"batch_size was {batch_size} of {len(split)} images, expected a multiple of the {processes} processes"
            )
        self.split = split
        self.batch_size = min(batch_size, len(split) - len(split) % processes)
        self.padding, self.degrees, self.flip = padding, degrees, flip
        self.rank, self.processes = rank, processes
        self._generator = torch.Generator().manual_seed(seed)
        self._at_start = self._generator.get_state()  # of the present epoch
        self._order = torch.empty(0, dtype=torch.int64)
        self._motion = torch.empty(5, 0)
        self.position = 0  # batches already drawn from the present order

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.split) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch, or a whole new one where none has begun."""
        if self.position == 0:
            self._draw_epoch()
        share = self.batch_size // self.processes
        while self.position < len(self):
            start = self.position * self.batch_size + self.rank * share
            chosen = self._order[start : start + share]
            self.position += 1
            yield Batch(
                self.split.images[chosen],
                self.split.labels[chosen],
                self._motion[:, start : start + share].contiguous(),
            )
        self.position = 0

    def _draw_epoch(self) -> None:
        device = self.split.labels.device
        self._at_start = self._generator.get_state()
        self._order = torch.randperm(len(self.split), generator=self._generator).to(device)
        used = len(self) * self.batch_size
        motion = draw(used, self._generator, padding=self.padding, degrees=self.degrees, flip=self.flip)
        self._motion = motion.to(device)

    def state(self) -> dict[str, Tensor]:
        """Everything that the batches to come depend on."""
        generator = self._at_start if self.position else self._generator.get_state()
        return {"position": torch.tensor(self.position), "generator": generator}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up where `state` was taken, in this or any other number of processes."""
        self._generator.set_state(state["generator"])
        self.position = int(state["position"])
        if self.position:
            self._draw_epoch()
