"""Shuffled, augmented training batches whose place in an epoch can be saved and taken up again, bit for bit."""

from collections.abc import Iterator

import torch
from torch import Tensor

from immunity_fast.augmentation import augment
from immunity_fast.data import Split


class TrainLoader:
    """Batches (images (B, 3, H, W) in [0, 1], labels (B,)) of a split, on its device, in a new order each epoch.

    An epoch leaves out the last images of its order that do not fill a batch, so that all batches have one size; a
    split smaller than a batch is one batch.

    Args:
        split: what to draw from.
        batch_size: B.
        seed: of the order and of the augmentation.
        padding, degrees, flip: see `augment`.
    """

    def __init__(self, split: Split, batch_size: int, seed: int, *, padding: int, degrees: float, flip: bool) -> None:
        self.split = split
        self.batch_size = min(batch_size, len(split))
        self.padding, self.degrees, self.flip = padding, degrees, flip
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)
        self.position = 0  # batches already drawn from the present order

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.split) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the present epoch, or a whole new one where none has begun."""
        if self.position == 0:
            self._order = torch.randperm(len(self.split), generator=self._generator)
        order = self._order.to(self.split.labels.device)
        while self.position < len(self):
            chosen = order[self.position * self.batch_size : (self.position + 1) * self.batch_size]
            self.position += 1
            images = augment(
                self.split.images[chosen],
                self._generator,
                padding=self.padding,
                degrees=self.degrees,
                flip=self.flip,
            )
            yield images, self.split.labels[chosen]
        self.position = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that the batches to come depend on."""
        return {
            "order": self._order,
            "position": torch.tensor(self.position),
            "generator": self._generator.get_state(),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up where `state` was taken."""
        self._order = state["order"]
        self.position = int(state["position"])
        self._generator.set_state(state["generator"])
