"""What a set without a validation or a test split gives up of its training images for one, the same at every time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from immunity_fast.data.folders import SPLIT_SEED, TEST_SHARE

# RandomState's stream is frozen for good, unlike torch's and the newer NumPy generators'.


def cut_validation(n: int, *, needed: bool) -> tuple[Tensor, Tensor]:
    """(validation, training) indices of n images, in a fixed random order; no validation indices unless needed."""
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(n))
    size = min(5000, max(1, n // 10)) if needed else 0
    return order[:size], order[size:]


def cut_test(labels: Tensor, called: Callable[[int], str]) -> tuple[Tensor, Tensor]:
    """(training, test) indices: `TEST_SHARE` of each class, at least 1 image, goes to the test.

    Args:
        labels: (n,) from 0.
        called: what an error calls a class.

    Raises:
        ValueError: a class of 1 image.
    """
    random = np.random.RandomState(SPLIT_SEED)
    train, test = [], []
    by_class = labels.argsort(stable=True)
    for label, found in enumerate(torch.split(by_class, torch.bincount(labels).tolist())):
        if len(found) == 1:
            raise ValueError(
                f"{called(label)}: expected at least 2 images, of which one is cut off for the test, got 1"
            )
        order = found[torch.from_numpy(random.permutation(len(found)))]
        size = max(1, round(TEST_SHARE * len(found))) if len(found) else 0
        train.append(order[size:])
        test.append(order[:size])
    return torch.cat(train), torch.cat(test)
