"""Shuffled training batches and how to augment them, whose place in an epoch can be taken up again, bit for bit."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from immunity_fast.data.augmentation import draw_affine
from immunity_fast.data.datasets import AnySplit


class Batch(NamedTuple):
    """What a training step is made of.

    Args:
        images: uint8 (B, C, H, W), not augmented.
        labels: (B,) integers.
        affine: (5, B), by which `augmentation.apply_affine` augments the images; None of those that stay as they
            are, floating-point in [0, 1].
    """

    images: Tensor
    labels: Tensor
    affine: Tensor | None


class TrainLoader:
    """Batches of a split, on its device, in a new order each epoch.

    An epoch leaves out the last images of its order that do not fill a batch, so that all batches have one size; a
    split smaller than a batch is one batch. All numbers of an epoch are drawn and brought to the device at its start:
    between two batches nothing waits for the other side, and one launch gathers the images of a split in memory. Those
    of a streamed split are read ahead, in the order that was drawn here: where an epoch stands, and the generator's
    state at its start, say all of what is to come, whatever the number of workers.

    In parts the split is cut at random into as many of one size, once and for all, and what is left over is left out.
    Each batch has as many images of each: first those of the first part, then those of the second.

    Args:
        split: what to draw from.
        batch_size: of all processes together.
        seed: of the order, of the augmentation and of the parts, the same in all processes.
        parts: N, of which a batch has as many images each; `batch_size` is rounded down to a multiple of them.
        padding, degrees, flip: see `augment`.
        rank, processes: each process gets its part of each batch, whose images and augmentation do not depend on how
            many processes there are.

    Raises:
        ValueError: a batch that cannot be divided among the processes, or has no image of each part.
    """

    def __init__(
        self,
        split: AnySplit,
        batch_size: int,
        seed: int,
        *,
        padding: int,
        degrees: float,
        flip: bool,
        rank: int = 0,
        processes: int = 1,
        parts: int = 1,
    ) -> None:
        if batch_size % processes or len(split) < processes:
            raise ValueError(
                f"batch_size: expected a multiple of the {processes} processes, got {batch_size} of {len(split)} images"
            )
        if min(batch_size // processes, len(split) // processes) < parts:
            raise ValueError(
                f"batch_size: expected at least {parts * processes}, an image of each of {parts} parts, got "
                f"{batch_size} of {len(split)} images"
            )
        self.split = split
        whole = parts * processes  # of which a batch has a multiple
        self.batch_size = min(batch_size - batch_size % whole, len(split) - len(split) % whole)
        self.parts = None if parts == 1 else partition(len(split), parts, seed)
        self.padding, self.degrees, self.flip = padding, degrees, flip
        self.rank, self.processes = rank, processes
        self._generator = torch.Generator().manual_seed(seed)
        self._at_start = self._generator.get_state()  # of the present epoch
        # Of each batch, this process' share: (batches, share), (batches, share) and (batches, 5, share).
        self._order = self._labels = torch.empty(0, 0, dtype=torch.int64)
        self._affine = torch.empty(0, 5, 0)
        self.position = 0  # batches already drawn from the present order

    def __len__(self) -> int:
        """How many batches an epoch has."""
        images = len(self.split) if self.parts is None else self.parts.numel()
        return images // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch, or a whole new one where none has begun."""
        if self.position == 0:
            self._draw_epoch()
        for images in self.split.stream(self._order[self.position :]):
            index = self.position
            self.position += 1
            yield Batch(images, self._labels[index], self._affine[index])
        self.position = 0

    def _draw_epoch(self) -> None:
        device = self._device
        self._at_start = self._generator.get_state()
        count, used = 1 if self.parts is None else len(self.parts), len(self) * self.batch_size
        order = self._drawn_order(used // count)
        affine = draw_affine(used, self._generator, padding=self.padding, degrees=self.degrees, flip=self.flip)
        # Of each batch and each part this process' share.
        shape = (len(self), count, self.processes, self.batch_size // count // self.processes)
        self._order = order.view(shape)[:, :, self.rank].flatten(1).to(device)
        self._labels = self._labels_of(self._order)
        # A batch's numbers lie together: then they are a view, and nothing is launched for them.
        self._affine = affine.view(5, *shape)[:, :, :, self.rank].flatten(2).movedim(1, 0).contiguous().to(device)

    def _drawn_order(self, used: int) -> Tensor:
        """The images of an epoch, one batch after the other, of each part so many."""
        if self.parts is None:
            return torch.randperm(len(self.split), generator=self._generator)[:used]
        orders = [part[torch.randperm(len(part), generator=self._generator)[:used]] for part in self.parts]
        return torch.stack(orders).view(len(self.parts), len(self), -1).movedim(1, 0).flatten()

    @property
    def _device(self) -> torch.device:
        return self.split.labels.device

    def _labels_of(self, order: Tensor) -> Tensor:
        return self.split.labels[order]

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


def partition(count: int, parts: int, seed: int) -> Tensor:
    """So many images in parts of one size, at random: int64 (parts, count // parts), no image twice.

    Args:
        count: of the images; fewer than `parts` of them may be in none.
        parts: how many.
        seed: of the draw.
    """
    random = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"parts %d" % seed).digest()[:7], "big"))
    return torch.randperm(count, generator=random)[: count - count % parts].view(parts, -1)
