"""Data that a user has in Python, as the splits that a training takes: tensors, data sets, loaders of batches.

Images are uint8, or floating-point in [0, 1], as (B, C, H, W); a picture of Pillow's, and an array (H, W, C), are read
as such. Targets are class numbers (B,), or probabilities (B, K). An item or a batch is (images, targets), or a
dictionary with "pixel_values", "image" or "images" and "labels", "label" or "targets"; see `IMAGE_KEYS`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from immunity_fast.data.datasets import ImageDataset, Split
from immunity_fast.data.folders import split_of
from immunity_fast.runtime.checks import check_whole
from immunity_fast.targets import check_probabilities

IMAGE_KEYS = ("pixel_values", "image", "images", "img", "jpg", "png")
TARGET_KEYS = ("labels", "label", "targets", "target", "fine_label", "class", "cls")
READ_BATCH = 64  # images that are read at once
STATISTICS_IMAGES = 5000  # of which the mean and deviation of images that are not in memory are taken


class Items(Dataset[Any]):
    """A data set of (image, target) items, each read when it is needed.

    What is random in reading an item is drawn from a seed of its own, so that the number of worker processes, and where
    a training stops and goes on, change nothing: torch's, NumPy's and Python's global generators are seeded for it.

    Args:
        items: with a length, and an item for each index.
        called: what errors call it.
        workers: processes that read.
    """

    def __init__(self, items: Any, called: str, workers: int = 0) -> None:
        if not len(items):
            raise ValueError(f"{called}: expected at least 1 image, got none")
        self.items, self.called, self.workers = items, called, workers
        self.device = torch.device("cpu")
        self.seed: int | None = None  # of what is random in reading

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch, as `DataLoader` asks for it."""
        read = []
        with _generators_kept():
            for index in indices:
                if self.seed is not None:
                    _seed_all(self.seed + 1_000_003 * index)
                read.append(self._item(index))
        first = read[0][0].shape
        for index, (image, _) in zip(indices, read, strict=True):
            if image.shape != first:
                raise ValueError(
                    f"{self.called}: expected images of one size, got {tuple(image.shape)} at {index} and "
                    f"{tuple(first)} at {indices[0]}; a transform of the data set's can bring them to one"
                )
        images = torch.stack([image for image, _ in read])
        return images, as_targets([target for _, target in read], self.called)

    def _item(self, index: int) -> tuple[Tensor, Any]:
        image, target = parted(self.items[index], self.called)
        image = as_images(image, self.called, single=True)
        return image, target

    @cached_property
    def first_image(self) -> Tensor:
        """(C, H, W)."""
        return self.__getitems__([0])[0][0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the first image."""
        height, width = self.first_image.shape[1:]
        return height, width

    @property
    def channels(self) -> int:
        """C of the first image."""
        return self.first_image.shape[0]

    @cached_property
    def known_targets(self) -> Tensor | None:
        """All targets, where the data set has them without its images."""
        return _known_targets(self.items, len(self))

    @cached_property
    def labels(self) -> Tensor:
        """All targets; where the data set does not have them by themselves, all of it is read once."""
        known = self.known_targets
        targets = torch.cat([targets for _, targets in self.batches()]) if known is None else known
        return targets.to(self.device)

    def batches(
        self, rows: Sequence[Sequence[int]] | None = None, seed: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, targets) of each row of indices; of None, all in order.

        Args:
            rows: the indices of each batch.
            seed: of what is random in reading them.
        """
        if rows is None:
            rows = [range(at, min(at + READ_BATCH, len(self))) for at in range(0, len(self), READ_BATCH)]
        seeded = Items(self.items, self.called)
        seeded.seed = seed
        yield from DataLoader(
            seeded,
            batch_sampler=[list(row) for row in rows],
            num_workers=min(self.workers, len(rows)),
            collate_fn=_as_is,
            generator=torch.Generator(),  # or its workers' seed would be drawn from the global one
        )

    def to(self, device: torch.device | str) -> Items:
        """The same items, whose batches are used on another device."""
        moved = Items(self.items, self.called, self.workers)
        moved.device = torch.device(device)
        return moved

    def sample(self, count: int) -> Iterator[Tensor]:
        """The images of at most `count` items, over the whole of the data set."""
        chosen = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int).tolist()
        rows = [chosen[at : at + READ_BATCH] for at in range(0, len(chosen), READ_BATCH)]
        for images, _ in self.batches(rows, seed=0):
            yield images

    def listing(self) -> str:
        """What can be said of the data without reading them, for a fingerprint."""
        known = self.known_targets
        labels = "" if known is None else hashlib.sha256(known.numpy().tobytes()).hexdigest()
        return f"{len(self)} items of {self.channels}×{self.image_size} {labels}"


@dataclass(frozen=True, eq=False)
class Batches:
    """A loader that gives (images, targets) batches, in its own order and with its own augmentation.

    Args:
        loader: a `DataLoader`, torchdata's `StatefulDataLoader`, or whatever can be iterated again and again.
        called: what errors call it.
        steps: batches of an epoch; None is its length.
        device: where the batches are used.
    """

    loader: Any
    called: str
    steps: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_whole("steps_per_epoch", self.steps, 1)

    @cached_property
    def count(self) -> int:
        """Batches of an epoch.

        Raises:
            ValueError: the loader has no length, and nobody has said it.
        """
        if self.steps is not None:
            return self.steps
        try:
            count = len(self.loader)
        except TypeError:
            raise ValueError(
                f"{self.called}: expected a loader with a length, or steps_per_epoch=, got a "
                f"{type(self.loader).__name__} without one"
            ) from None
        if not count:
            raise ValueError(f"{self.called}: expected at least 1 batch, got none")
        return count

    def __len__(self) -> int:
        """How many images an epoch has, as far as that can be told."""
        whole = self.count * len(self.first[1])
        data: Any = getattr(self.loader, "dataset", None)
        return min(whole, len(data)) if hasattr(data, "__len__") and self.steps is None else whole

    @cached_property
    def first(self) -> tuple[Tensor, Tensor]:
        """Its first batch."""
        first = next(self.batches(), None)
        if first is None:
            raise ValueError(f"{self.called}: expected at least 1 batch, got none")
        return first

    @property
    def first_image(self) -> Tensor:
        """(C, H, W) of the first batch."""
        return self.first[0][0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the first batch."""
        height, width = self.first_image.shape[1:]
        return height, width

    @property
    def channels(self) -> int:
        """C of the first batch."""
        return self.first_image.shape[0]

    @cached_property
    def known_targets(self) -> Tensor | None:
        """All targets, where the loader's data set has them without its images."""
        data: Any = getattr(self.loader, "dataset", None)
        return _known_targets(data, len(data)) if hasattr(data, "__len__") else None

    @cached_property
    def labels(self) -> Tensor:
        """The targets of an epoch; where the data set does not have them by themselves, one is read for them."""
        known = self.known_targets
        if known is None:
            self.count  # noqa: B018  which checks that there are any
            known = torch.cat([targets for _, targets in self.batches()])
        return known.to(self.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch's batches, which change no generator: a training that follows draws as if they had not been read."""
        with generators_kept(self.loader):
            for batch in islice(iter(self.loader), self.steps):
                yield as_batch(batch, self.called)

    def to(self, device: torch.device | str) -> Batches:
        """The same loader, whose batches are used on another device."""
        return replace(self, device=torch.device(device))

    def sample(self, count: int) -> Iterator[Tensor]:
        """The images of the first batches, at least `count` in all."""
        seen = 0
        for images, _ in self.batches():
            yield images
            seen += len(images)
            if seen >= count:
                return

    def listing(self) -> str:
        """What can be said of the data without reading them, for a fingerprint."""
        return f"{self.count} batches of {self.channels}×{self.image_size}"


def as_split(data: Any, called: str, *, steps: int | None = None, workers: int = 0) -> Split | Items | Batches:
    """One split of what a user has.

    Raises:
        ValueError, TypeError: it is no such data.
    """
    if isinstance(data, Split):
        return Split(as_images(data.images, called), as_targets(data.labels, called))
    if isinstance(data, ImageDataset):
        raise TypeError(f"{called}: expected one split, such as dataset.{called}, got a whole ImageDataset")
    if isinstance(data, (str, bytes)) or hasattr(data, "__fspath__"):
        raise TypeError(
            f'{called}: expected data, got a name: TrainConfig(dataset="folder", data={str(data)!r}) reads it'
        )
    if _is_pair(data, (3, 4)):  # grey images may have no axis of channels
        images, targets = as_images(data[0], called), as_targets(data[1], called)
        if len(images) != len(targets):
            raise ValueError(f"{called}: expected as many targets as images, got {len(targets)} for {len(images)}")
        if not len(images):
            raise ValueError(f"{called}: expected at least 1 image, got none")
        return Split(images, targets)
    if isinstance(data, Mapping):
        split = next((name for name in data if split_of(str(name)) is not None), None)
        if split is not None:
            raise TypeError(f"{called}: expected one split, such as data[{split!r}], got a dictionary of splits")
        return as_split(tuple(parted(data, called)), called)
    # Those of PyTorch have a __getitem__, which only raises; those of the library `datasets` have none.
    if isinstance(data, IterableDataset):
        raise TypeError(f"{called}: expected a DataLoader of it, which makes batches, got an IterableDataset")
    if isinstance(data, DataLoader) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__")):
        if iter(data) is data and not isinstance(data, DataLoader):
            raise TypeError(f"{called}: expected what can be iterated once an epoch, got a {type(data).__name__}")
        return Batches(data, called, steps)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if type(data) is TensorDataset and len(data.tensors) == 2:
            return as_split(data.tensors, called)
        if isinstance(data, (list, tuple)) and data and _is_pair(data[0]):
            return Batches(data, called, steps)  # a list of them
        return Items(data, called, workers)
    raise TypeError(
        f"{called}: expected an ImageDataset, (images, targets), a map-style data set of (image, target) or a "
        f"DataLoader of such batches, got {type(data).__name__}"
    )


def as_batch(batch: Any, called: str) -> tuple[Tensor, Tensor]:
    """(images, targets) of what a loader gives.

    Raises:
        ValueError, TypeError: it is no such batch.
    """
    images, targets = parted(batch, called)
    if getattr(images, "ndim", 4) == 3 and getattr(targets, "ndim", 0) == 0:
        raise TypeError(
            f"{called}: expected batches (B, C, H, W), got an image of shape {tuple(images.shape)}; DataLoader(…, "
            "batch_size=32) makes batches of them"
        )
    images, targets = as_images(images, called), as_targets(targets, called)
    if len(images) != len(targets):
        raise ValueError(f"{called}: expected as many targets as images, got {len(targets)} for {len(images)}")
    return images, targets


def parted(item: Any, called: str) -> tuple[Any, Any]:
    """An image, or images, and their target, of an item or a batch.

    Raises:
        TypeError: it is no such thing.
        ValueError: a dictionary without them.
    """
    if isinstance(item, Mapping) or hasattr(item, "keys"):
        image = next((key for key in IMAGE_KEYS if key in item), None)
        target = next((key for key in TARGET_KEYS if key in item), None)
        if image is None or target is None:
            missing = IMAGE_KEYS if image is None else TARGET_KEYS
            raise ValueError(
                f"{called}: expected one of {', '.join(missing)} in each dictionary, got {', '.join(item)}"
            )
        return item[image], item[target]
    if isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    what = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
    raise TypeError(f"{called}: expected (images, targets), or a dictionary with both, got {what}")


def as_images(images: Any, called: str, *, single: bool = False) -> Tensor:
    """Images as uint8, or as float32 in [0, 1], (B, C, H, W), or (C, H, W) of a single one.

    Raises:
        TypeError: something else.
        ValueError: another shape, or values out of their range.
    """
    if hasattr(images, "getbands"):  # Pillow's
        from immunity_fast.data.images import read_image

        channels = 1 if images.mode in ("1", "L", "I;16", "I", "F") else 3
        images = read_image(images, channels=channels, name=called)
    if isinstance(images, (list, tuple)):
        images = torch.stack([as_images(image, called, single=True) for image in images])
    last = isinstance(images, np.ndarray)  # whose channels are last, as everywhere but in PyTorch
    if last:
        images = torch.from_numpy(images)
    dimensions = 3 if single else 4
    if isinstance(images, Tensor) and images.ndim == dimensions - 1:  # grey ones without an axis
        images = images.unsqueeze(-1 if last else -3)
    if not isinstance(images, Tensor) or images.ndim != dimensions:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        shape = "(C, H, W)" if single else "(B, C, H, W)"
        raise TypeError(f"{called}: expected {'an image' if single else 'images'} {shape}, got {got}")
    if last and images.shape[-1] in (1, 3) and images.shape[-3] not in (1, 3):
        images = images.movedim(-1, -3).contiguous()
    if images.shape[-3] not in (1, 3):
        what = "; channels come first: .movedim(-1, -3)" if images.shape[-1] in (1, 3) else ""
        raise ValueError(f"{called}: expected images of 1 or 3 channels, got shape {tuple(images.shape)}{what}")
    read: Tensor = images
    if read.dtype == torch.uint8:
        return read
    if not images.is_floating_point():
        raise TypeError(
            f"{called}: expected images uint8, or floating-point in [0, 1], got {images.dtype}; of 0 to 255 "
            ".to(torch.uint8) makes such"
        )
    check_range(read, called)
    return read.float()


def check_range(images: Tensor, called: str) -> None:
    """Check that floating-point images are in [0, 1].

    Raises:
        ValueError: they are not; what may be the reason.
    """
    if not images.numel():
        return
    low, high = (float(value) for value in torch.aminmax(images))
    if low >= -1e-4 and high <= 1 + 1e-4:
        return
    advice = "leave the normalisation out: the model normalises by itself"
    if not (low < 0 or high < 2):
        advice = "divide them by 255, or give them as uint8"
    if not (low == low and high == high):
        advice = "they hold NaN"
    raise ValueError(
        f"{called}: expected floating-point images in [0, 1], got values from {low:.3g} to {high:.3g}: {advice}"
    )


def as_targets(targets: Any, called: str) -> Tensor:
    """Class numbers int64 (B,), or probabilities float32 (B, K).

    Raises:
        TypeError: something else.
        ValueError: another shape.
    """
    if isinstance(targets, (list, tuple)) and targets and isinstance(targets[0], (Tensor, np.ndarray)):
        targets = torch.stack([torch.as_tensor(target) for target in targets])
    try:
        targets = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError):
        kind = type(targets[0]).__name__ if isinstance(targets, (list, tuple)) and targets else type(targets).__name__
        raise TypeError(f"{called}: expected class numbers, or probabilities (B, K), got {kind}") from None
    found: Tensor = targets
    if found.ndim == 2 and found.shape[1] == 1:  # as MedMNIST has them
        found = found[:, 0]
    if found.ndim == 2 and found.is_floating_point():
        return found.float()
    whole = not found.is_floating_point() and not found.is_complex()
    if found.ndim == 2 and whole and bool(((found == 0) | (found == 1)).all() & (found.sum(1) == 1).all()):
        return found.float()  # one-hot
    if found.ndim != 1 or found.is_floating_point() or found.is_complex():
        raise ValueError(
            f"{called}: expected class numbers (B,), or probabilities (B, K), got {found.dtype} of shape "
            f"{tuple(found.shape)}"
        )
    return found.long()


def check_labels(targets: Tensor, classes: int, called: str, ignore_index: int | None = None) -> None:
    """Check that class numbers are of so many classes, and probabilities of as many.

    Raises:
        ValueError: they are not.
    """
    if targets.ndim == 2:
        if targets.shape[1] != classes:
            raise ValueError(f"{called}: expected probabilities of {classes} classes, got {targets.shape[1]}")
        counted = None if ignore_index is None else (targets != ignore_index).any(1)
        check_probabilities(targets, counted, called)
        return
    if ignore_index is not None:
        targets = targets[targets != ignore_index]
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        low, high = int(targets.min()), int(targets.max())
        raise ValueError(f"{called}: expected class numbers from 0 to {classes - 1}, got {low} to {high}")


@contextmanager
def generators_kept(loader: Any) -> Iterator[None]:
    """The generators that a loader draws from are as they were after a `with` block."""
    generators = generators_of(loader)
    states = [generator.get_state() for generator in generators]
    with _generators_kept():
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators of a loader's own, each once: its own and its sampler's."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


@contextmanager
def _generators_kept() -> Iterator[None]:
    """The global generators of torch's CPU, NumPy and Python are as they were after a `with` block."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002  what users draw from
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed % 2**63)  # not manual_seed, which would seed the GPU's as well
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def _as_is(batch: Any) -> Any:
    return batch


def _is_pair(data: Any, dimensions: tuple[int, ...] = (4,)) -> bool:
    """Whether it is (images, targets), and not a data set of two items."""
    return isinstance(data, (tuple, list)) and len(data) == 2 and getattr(data[0], "ndim", 0) in dimensions


def _known_targets(data: Any, count: int) -> Tensor | None:
    """The targets that a data set lists by themselves: torchvision's, of tensors, and of a part of such."""
    indices = getattr(data, "indices", None)
    if indices is not None and hasattr(data, "dataset"):
        whole = _known_targets(data.dataset, len(data.dataset))
        return None if whole is None else whole[torch.as_tensor(list(indices))]
    tensors = getattr(data, "tensors", None)
    if isinstance(tensors, tuple) and len(tensors) == 2:
        return as_targets(tensors[1], "targets")
    if getattr(data, "target_transform", None) is not None or (
        getattr(data, "transforms", None) is not None and getattr(data.transforms, "target_transform", None)
    ):
        return None
    for name in ("targets", "labels"):
        found = getattr(data, name, None)
        if found is not None and hasattr(found, "__len__") and len(found) == count:
            try:
                return as_targets(found, "targets")
            except (TypeError, ValueError):
                continue
    return None


def statistics(images: Iterable[Tensor]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8, or floating-point images in [0, 1], in units of [0, 1]."""
    count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for part in images:
        values = part.double().flatten(2) / (255 if part.dtype == torch.uint8 else 1)
        count += values.shape[0] * values.shape[2]
        total, squares = total + values.sum((0, 2)).cpu(), squares + values.square().sum((0, 2)).cpu()
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt().clamp_min(1 / 255)
    return mean.tolist(), deviation.tolist()
