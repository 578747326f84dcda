"""Which images of a split are looked at, and how many at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from immunity_fast.data.augmentation import as_float
from immunity_fast.data.datasets import AnySplit, Split
from immunity_fast.data.folders import SPLIT_SEED

# Images at once: they bound memory, and no result depends on them but by rounding.
EVALUATION_BATCH = 250  # that a model is shown
ATTACK_BATCH = {"cpu": 50, "cuda": 250}  # that are attacked, by the device's type


def attack_batch(device: torch.device) -> int:
    """How many images are attacked at once."""
    return ATTACK_BATCH.get(device.type, ATTACK_BATCH["cuda"])


def batches(split: AnySplit, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images (B, C, H, W) in [0, 1], labels (B,)) of a split in order, `size` at a time, the rest last."""
    starts = range(0, len(split), size)
    rows = [torch.arange(start, min(start + size, len(split))) for start in starts]
    for start, images in zip(starts, split.stream(rows), strict=True):
        yield as_float(images), split.labels[start : start + size]


def sample(split: AnySplit, count: int) -> Split:
    """A fixed random sample of at most `count` images, in memory: a stored order may be sorted by class."""
    indices = sample_order(split, count)
    return Split(split.read(indices), split.labels[indices.to(split.labels.device)])


def sample_order(split: AnySplit, count: int) -> Tensor:
    """The indices of `sample`'s images, int64 on the CPU; of a larger sample they are the first."""
    return torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(split))[:count])
