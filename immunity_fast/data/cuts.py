"""What a set without a validation or a test split gives up of its training images for one, the same at every time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
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


def cut_as_sklearn(labels: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """(training, test) indices of `train_test_split(…, test_size=TEST_SHARE, stratify=labels)`, in its order.

    Runs on the digits were trained on its parts from the beginning; scikit-learn itself takes longer to import than all
    that is read.

    Args:
        labels: (n,) from 0, of classes of about the same size.
    """
    random = np.random.RandomState(SPLIT_SEED)
    counts, test = np.bincount(labels), math.ceil(TEST_SHARE * len(labels))
    of_train = _shares(counts, len(labels) - test, random)
    of_test = _shares(counts - of_train, test, random)
    by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    parts: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for found, first, second in zip(by_class, of_train, of_test, strict=True):
        order = found[random.permutation(len(found))]
        parts[0].append(order[:first])
        parts[1].append(order[first : first + second])
    chosen, left = (torch.from_numpy(random.permutation(np.concatenate(part))) for part in parts)
    return chosen, left


def _shares(counts: NDArray[np.int64], wanted: int, random: np.random.RandomState) -> NDArray[np.int64]:
    """How many of each class are taken of all: whole numbers, those with the largest remainders rounded up."""
    exact = counts / counts.sum() * wanted
    taken: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    remainder, missing = exact - np.floor(exact), wanted - int(taken.sum())
    for value in np.unique(remainder)[::-1]:
        if not missing:
            break
        alike = np.flatnonzero(remainder == value)
        up = random.choice(alike, size=min(len(alike), missing), replace=False)
        taken[up] += 1
        missing -= len(up)
    return taken
