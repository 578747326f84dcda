"""The three splits that a training takes, of data that a user has in Python."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    default_collate,
)

from immunity_fast.data import OWN as NAME
from immunity_fast.data.datasets import ImageDataset, Split, fits_in_memory, with_labels
from immunity_fast.data.own import TARGET_KEYS, Batches, Items, as_split, check_labels
from immunity_fast.runtime.memory import check_fits
from immunity_fast.targets import hard_labels


@dataclass(frozen=True, eq=False)
class ReadSplit:
    """Images to measure on that are read each time they are asked for; the interface of `datasets.Split` otherwise.

    Args:
        items: what is read.
        labels: int64 (n,), on the device that images are brought to.
    """

    items: Items
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """C of the images."""
        return self.items.channels

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.items.image_size

    def read(self, indices: Tensor | slice | Sequence[int]) -> Tensor:
        """Some images (n, C, H, W), on the labels' device."""
        row = torch.arange(len(self))[indices.cpu() if isinstance(indices, Tensor) else indices]
        for images in self.stream([row]):
            return images
        return torch.empty(0, self.channels, *self.image_size, dtype=torch.uint8, device=self.labels.device)

    def stream(self, rows: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each row of indices, as `read` has them."""
        each = [row.tolist() for row in rows if len(row)]
        for images, _ in self.items.batches(each, seed=0):
            yield images.to(self.labels.device)

    def to(self, device: torch.device | str) -> ReadSplit:
        """The same split, whose images are brought to another device."""
        return replace(self, labels=self.labels.to(device))

    def listing(self) -> str:
        """What can be said of the images without reading them, and their labels, for a fingerprint."""
        labels = hashlib.sha256(self.labels.cpu().numpy().tobytes()).hexdigest()
        return f"{len(self)} items of {self.channels}×{self.image_size} {labels}"


Held: TypeAlias = Split | ReadSplit


@dataclass(frozen=True, eq=False)
class OwnDataset(ImageDataset):
    """Splits of a user's data, which may be read as they are needed: `Items` or `Batches`, and `ReadSplit`.

    Args:
        augment: whether a loader's batches are augmented as well.
    """

    train: Any
    validation: Any
    test: Any
    augment: bool = False


def own_dataset(
    train: Any,
    validation: Any = None,
    test: Any = None,
    *,
    classes: Sequence[str] | int | None = None,
    num_classes: int | None = None,
    steps: int | None = None,
    workers: int = 0,
    flip: bool = False,
    ignore_index: int | None = None,
    device: torch.device | None = None,
) -> ImageDataset:
    """A user's data as what a training takes.

    Args:
        train: an `ImageDataset`, whose other splits are taken where none are given; a `Split`, (images, targets), a
            data set, or a loader of batches.
        validation, test: likewise; None is none. They are held in memory, or read each time where they do not fit.
        classes: the classes' names, or how many there are; None is what the data say.
        num_classes: of a model that is there, or None.
        steps: batches of an epoch, where `train` is a loader.
        workers: processes that read a data set.
        flip: whether a mirrored image keeps its meaning.
        ignore_index: the label of images that have none.
        device: where what fits will be held; None is the host's memory.

    Raises:
        ValueError, TypeError: what was given is no such data; one line that names it.
    """

    def parts() -> dict[str, Any]:
        """What is measured on, which may all be read for it: after what can be refused without."""
        return {
            name: held(as_split(data, name, workers=workers), device, ignore_index)
            for name, data in (("validation", validation), ("test", test))
            if data is not None
        }

    if isinstance(train, ImageDataset):
        if classes is not None or steps is not None:
            name = "classes" if classes is not None else "steps_per_epoch"
            raise ValueError(f"{name}: expected None for an ImageDataset, which knows it, got another")
        return replace(train, **parts())
    trained = as_split(train, "train", steps=steps, workers=workers)
    if steps is not None and not isinstance(trained, Batches):
        raise ValueError("steps_per_epoch: expected None but for a loader of batches, got another")
    others = parts()
    names = _class_names(train, trained, list(others.values()), classes, num_classes, ignore_index)
    size = (trained.channels, *trained.image_size)
    for name, part in others.items():
        found = (part.channels, *part.image_size)
        if found != size:
            raise ValueError(f"{name}: expected images of shape {size} as those of train, got {found}")
        check_labels(part.labels, len(names), name, ignore_index)
    if isinstance(trained, Split):
        check_labels(trained.labels, len(names), "train", ignore_index)
    empty = Split(torch.zeros(0, *size, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    return OwnDataset(
        NAME, trained, others.get("validation", empty), others.get("test", empty), classes=names, flip=flip
    )


def held(split: Split | Items | Batches, device: torch.device | None = None, ignore_index: int | None = None) -> Held:
    """A split to measure on: in memory where it fits, else of the items that a data set, or a loader of one, has.

    Args:
        split: what a user has.
        device: where it will be held, besides the host's memory.
        ignore_index: the label of images that have none: of what is read each time they are left out.

    Raises:
        ValueError: there are no images; or they fit nowhere, and a loader does not tell what it reads.
    """
    if isinstance(split, Split):
        return split
    count = _count(split)
    size = 0 if count is None else count * split.first_image.nbytes
    items = split if isinstance(split, Items) else _items_of(split)
    if items is None or fits_in_memory(size, device or torch.device("cpu")):
        what = f"{split.called}: {count or 0:,} images of shape {tuple(split.first_image.shape)}"
        check_fits(size, torch.device("cpu"), what, "a data set instead of the loader, which is read item by item")
        parts = list(split.batches())
        return Split(torch.cat([images for images, _ in parts]), torch.cat([targets for _, targets in parts]))
    labels = items.labels
    if ignore_index is not None:
        known = with_labels(items.called, labels, ignore_index)
        items = Items(Subset(items.items, known.nonzero().flatten().tolist()), items.called, items.workers)
        labels = labels[known]
    return ReadSplit(items, hard_labels(labels))


def _count(split: Items | Batches) -> int | None:
    """How many images there are; None of a loader that does not know."""
    if isinstance(split, Batches):
        try:
            len(split.loader)
        except TypeError:
            return None
    return len(split)


def _items_of(batches: Batches) -> Items | None:
    """The items that a `DataLoader` makes its batches of, if it takes each of them as it is."""
    loader: Any = batches.loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    if loader.collate_fn is not default_collate or loader.drop_last or type(loader.batch_sampler) is not BatchSampler:
        return None
    if loader.batch_sampler.sampler is not loader.sampler:  # one of the user's
        return None
    once_each = type(loader.sampler) is SequentialSampler or (
        type(loader.sampler) is RandomSampler
        and not loader.sampler.replacement
        and len(loader.sampler) == len(loader.dataset)  # type: ignore[arg-type]
    )
    return Items(loader.dataset, batches.called, loader.num_workers) if once_each else None


def _class_names(
    data: Any,
    trained: Split | Items | Batches,
    parts: Sequence[Held],
    classes: Sequence[str] | int | None,
    num_classes: int | None,
    ignore_index: int | None,
) -> tuple[str, ...]:
    """The classes' names: those that were given, the model's number, the data set's, or the numbers that there are."""
    if isinstance(classes, str) or (classes is not None and not isinstance(classes, (int, Iterable))):
        raise TypeError(f"classes: expected several names, or how many there are, got {classes!r}")
    if isinstance(classes, int):
        num_classes, classes = classes, None
    if classes is None:
        named = _names_of(getattr(data, "dataset", data) if isinstance(trained, Batches) else data)
        if named and num_classes in (None, len(named)):
            classes = named
    if classes is not None:
        names = tuple(str(name) for name in classes)
        if num_classes is not None and len(names) != num_classes:
            raise ValueError(
                f"classes: expected {num_classes} names, as many as the model has classes, got {len(names)}"
            )
    elif num_classes is not None:
        names = tuple(map(str, range(num_classes)))
    else:
        labels = [trained.labels, *(part.labels for part in parts)]
        known = [part if part.ndim == 2 or ignore_index is None else part[part != ignore_index] for part in labels]
        widths = [part.shape[1] if part.ndim == 2 else int(part.max()) + 1 for part in known if len(part)]
        names = tuple(map(str, range(max(widths, default=0))))
    if len(names) < 2:
        raise ValueError(f"classes: expected at least 2, got {len(names)}")
    return names


def _names_of(data: Any) -> list[str]:
    """The classes' names, where a data set says them: torchvision's, the library `datasets`', and a part of such."""
    while hasattr(data, "dataset") and hasattr(data, "indices"):
        data = data.dataset
    named = getattr(data, "classes", None)
    features = getattr(data, "features", None)
    if named is None and isinstance(features, Mapping):
        target = next((key for key in TARGET_KEYS if key in features), None)
        named = None if target is None else getattr(features[target], "names", None)
    return [str(name) for name in named] if isinstance(named, (list, tuple)) else []
