"""Image data sets held whole in memory, so that they can live on the device: uint8 images, int64 labels, 3 splits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from immunity_fast.data.folders import SPLIT_SEED
from immunity_fast.data.readers import Parts, read_cifar, read_digits, read_folder, read_npz
from immunity_fast.runtime.checks import check_whole
from immunity_fast.targets import hard_labels

NAMES = ("cifar10", "cifar100", "digits", "npz", "folder")


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Args:
        images: uint8 (n, C, H, W).
        labels: int64 (n,), each in 0..K−1; of training images also probabilities, floating-point (n, K).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """The same images and labels on a device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Three disjoint splits of images of one size and number of channels.

    Args:
        name: one of `NAMES`.
        train, validation, test: the splits.
        classes: K names.
        flip: whether a mirrored image keeps its meaning.
        notes: lines on what was decided and passed over when it was read.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    flip: bool
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """K, how many classes there are."""
        return len(self.classes)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        height, width = self.train.images.shape[-2:]
        return height, width

    @property
    def channels(self) -> int:
        """C of the images: 3 are red, green and blue, 1 is grey."""
        return self.train.images.shape[1]

    def fingerprint(self) -> str:
        """A hash of all images and labels, to tell whether a run goes on with the data it began with."""
        return fingerprint(self.train, self.validation, self.test)

    def labelled(self, ignore_index: int | None) -> ImageDataset:
        """The same data, in whose validation and test each image has one class: of probabilities the likeliest.

        Args:
            ignore_index: the label of images that have none, which are left out there; None: there are no such.

        Raises:
            ValueError: no image is left.
        """
        return replace(
            self,
            validation=_labelled("validation", self.validation, ignore_index),
            test=_labelled("test", self.test, ignore_index),
        )

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same splits on a device."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )


def _labelled(part: str, split: Split, ignore_index: int | None) -> Split:
    labels = split.labels
    if ignore_index is not None:
        known = (labels != ignore_index).flatten(1).any(1) if labels.dim() == 2 else labels != ignore_index
        if not bool(known.any()):
            raise ValueError(f"{part}: expected images with labels, got {len(labels)} of {ignore_index} alone")
        if not bool(known.all()):
            split = Split(split.images[known], labels[known])
    return split if split.labels.dim() == 1 else Split(split.images, hard_labels(split.labels))


def fingerprint(*splits: Split) -> str:
    """A hash of all images and labels of some splits."""
    digest = hashlib.sha256()
    for split in splits:
        for tensor in (split.images, split.labels):
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def load(
    name: str,
    path: str | Path | None = None,
    *,
    limit_train: int | None = None,
    image_size: int | None = None,
    channels: int = 3,
    ignore_index: int | None = None,
) -> ImageDataset:
    """Read a data set into memory, on the CPU.

    ===========  ====================================================  ===============================
    name         path                                                  notes
    ===========  ====================================================  ===============================
    cifar10/100  the folder torchvision downloads to (default "data")  downloaded where it is missing
    digits       None                                                  scikit-learn's 8×8 digits at 32×32
    npz          an .npz file in MedMNIST's layout                     see `read_npz`
    folder       root/train/<class>/..., root/test/<class>/..., or     see `read_folder`
                 root/<class>/... alone
    ===========  ====================================================  ===============================

    The training images come in a fixed random order. A set without a validation split gives up 10 % of its training
    images (at least 1, at most 5,000) for one. Both depend on the set alone, not on `limit_train` or a run's seed, so
    that no run trains on what another validates on.

    Args:
        name: of the table.
        path: of the table.
        limit_train: keep the first `limit_train` training images, a fair sample; the other splits stay whole.
        image_size: pixels; for `folder` only: scale each image's short side to it and crop the centre square.
        channels: of the images: 3, or 1 for grey ones, whatever they are stored as; of `npz` any number that it has.
        ignore_index: for `npz`: the label of images that have none. Validation and test go without them.

    Raises:
        ValueError: a wrong argument or wrong content.
        FileNotFoundError: a missing file or folder.
        OSError: a download that fails.
        ModuleNotFoundError: a reader's package is missing. Each message is one line.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if image_size is not None and name != "folder":
        raise ValueError(
            f"image_size: expected None for {name!r}, since only 'folder' resizes images, got {image_size}"
        )
    check_whole("channels", channels, 1)
    parts = _read(name, path, image_size, channels, ignore_index)
    held_out, kept = _validation_cut(len(parts.train[1]), needed=parts.validation is None)
    if not len(kept):
        raise ValueError(f"{name}: expected at least 2 training images, of which one is cut off for validation, got 1")
    if limit_train is not None and not 1 <= limit_train <= len(kept):
        raise ValueError(f"limit_train: expected 1 to {len(kept)}, the training images there are, got {limit_train}")
    validation = parts.validation or _select(parts.train, held_out)
    return ImageDataset(
        name=name,
        train=Split(*_select(parts.train, kept[:limit_train])),
        validation=Split(*validation),
        test=Split(*parts.test),
        classes=parts.classes,
        flip=parts.flip,
        notes=parts.notes,
    ).labelled(ignore_index)


def _read(name: str, path: str | Path | None, image_size: int | None, channels: int, ignore_index: int | None) -> Parts:
    if name == "digits":
        if path is not None:
            raise ValueError(f"path: expected None, since 'digits' comes with scikit-learn, got {str(path)!r}")
        return read_digits(channels)
    if name in ("cifar10", "cifar100"):
        return read_cifar(name, _expanded("data" if path is None else path), channels)
    if path is None:
        raise ValueError(f"path: expected the {'file' if name == 'npz' else 'folder'} that {name!r} reads, got None")
    if name == "npz":
        return read_npz(_expanded(path), channels, ignore_index)
    return read_folder(_expanded(path), image_size, channels)


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~ where there is no home, ~name where there is no such user
        raise ValueError(f"{path}: {error}") from error


def _validation_cut(n: int, *, needed: bool) -> tuple[Tensor, Tensor]:
    """(validation, training) indices of n images, in a fixed random order; no validation indices unless needed."""
    # RandomState's stream is frozen for good, unlike torch's and the newer NumPy generators'.
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(n))
    size = min(5000, max(1, n // 10)) if needed else 0
    return order[:size], order[size:]


def _select(part: tuple[Tensor, Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
    images, labels = part
    return images[indices], labels[indices]
