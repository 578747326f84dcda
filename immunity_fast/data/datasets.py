"""Image data sets of three splits: uint8 images and int64 labels, whole in memory, or streamed from where they lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from immunity_fast.data.cuts import cut_test, cut_validation
from immunity_fast.data.folders import TEST_SHARE, ClassFiles, list_folder
from immunity_fast.data.huggingface import list_huggingface
from immunity_fast.data.images import check_channels, read_image
from immunity_fast.data.readers import Parts, read_cifar, read_digits, read_npz
from immunity_fast.data.shards import list_shards
from immunity_fast.data.sources import Files, Labelled, Listed, Source, listing, select
from immunity_fast.data.streaming import Decoder, Reader, StreamedSplit, Workers, hold
from immunity_fast.runtime import distributed
from immunity_fast.runtime.checks import check_choice, check_whole, is_whole
from immunity_fast.runtime.failures import in_units, readable
from immunity_fast.runtime.memory import available, check_fits
from immunity_fast.targets import hard_labels

NAMES = ("cifar10", "cifar100", "digits", "npz", "folder", "webdataset", "huggingface")
LISTED = ("folder", "webdataset", "huggingface")  # whose images are listed first, and can be streamed
RESIDENT_SHARE = 0.5  # of free memory: what decoded images may take that are not streamed
STATISTICS_IMAGES = 5000  # of a streamed split: so many are looked at for its mean and standard deviation

Stream = Literal["auto", "on", "off"]


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, in memory.

    Args:
        images: uint8 (n, C, H, W).
        labels: int64 (n,), each in 0..K−1; of training images also probabilities, floating-point (n, K).
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """C of the images."""
        return self.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        height, width = self.images.shape[-2:]
        return height, width

    def read(self, indices: Tensor | slice | Sequence[int]) -> Tensor:
        """Some images, uint8 (n, C, H, W), on their device."""
        return self.images[indices.to(self.images.device) if isinstance(indices, Tensor) else indices]

    def stream(self, rows: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        """The images of each row of indices, as `read` has them."""
        for row in rows:
            yield self.read(row)

    def to(self, device: torch.device | str) -> Split:
        """The same images and labels on a device."""
        return Split(self.images.to(device), self.labels.to(device))


AnySplit: TypeAlias = Split | StreamedSplit


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Three disjoint splits of images of one size and number of channels.

    Args:
        name: one of `NAMES`.
        train, validation, test: the splits.
        classes: K names.
        flip: whether a mirrored image keeps its meaning.
        listing: a hash of the names, sizes in bytes and labels of the images, where they were listed; the same whether
            they are streamed or not.
        notes: lines on what was decided and passed over when it was read.
    """

    name: str
    train: AnySplit
    validation: AnySplit
    test: AnySplit
    classes: tuple[str, ...]
    flip: bool
    listing: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """K, how many classes there are."""
        return len(self.classes)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.train.image_size

    @property
    def channels(self) -> int:
        """C of the images: 3 are red, green and blue, 1 is grey."""
        return self.train.channels

    @property
    def reader(self) -> Reader | None:
        """What reads the images, where they are streamed."""
        return self.train.reader if isinstance(self.train, StreamedSplit) else None

    def fingerprint(self) -> str:
        """A hash that tells whether a run goes on with the data it began with: of all images and labels; of streamed
        images of their names and sizes in bytes."""
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

    def is_of(self, fingerprint: object, listing: object = None) -> bool:
        """Whether these are the data that a checkpoint has these hashes of, streamed then or now or not."""
        return fingerprint == self.fingerprint() or (self.listing is not None and listing == self.listing)

    def to(self, device: torch.device | str) -> ImageDataset:
        """The same splits on a device."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )


def _labelled(part: str, split: AnySplit, ignore_index: int | None) -> AnySplit:
    if not isinstance(split, Split):  # its images without labels were left out when they were listed
        return split
    if ignore_index is not None:
        known = with_labels(part, split.labels, ignore_index)
        if not bool(known.all()):
            split = Split(split.images[known], split.labels[known])
    return split if split.labels.dim() == 1 else Split(split.images, hard_labels(split.labels))


def with_labels(part: str, labels: Tensor, ignore_index: int) -> Tensor:
    """Which images of a split have a label: bool (n,).

    Raises:
        ValueError: there are images, and none has.
    """
    known = (labels != ignore_index).flatten(1).any(1) if labels.dim() == 2 else labels != ignore_index
    if len(labels) and not bool(known.any()):
        raise ValueError(f"{part}: expected images with labels, got {len(labels)} of {ignore_index} alone")
    return known


def fingerprint(*splits: AnySplit) -> str:
    """A hash of all images and labels of some splits; of those that are read as they are needed, of their listing."""
    digest = hashlib.sha256()
    for split in splits:
        if not isinstance(split, Split):
            digest.update(split.listing().encode())
            continue
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
    stream: Stream = "auto",
    workers: Workers = "auto",
    device: torch.device | str = "cpu",
) -> ImageDataset:
    """Read a data set into memory, on the CPU; or list its images, which are read when they are needed.

    ===========  ====================================================  =================================
    name         path                                                  notes
    ===========  ====================================================  =================================
    cifar10/100  the folder torchvision downloads to (default "data")  downloaded where it is missing
    digits       None                                                  scikit-learn's 8×8 digits at 32×32
    npz          an .npz file in MedMNIST's layout                     see `read_npz`
    folder       root/train/<class>/..., root/test/<class>/..., or     see `folders.list_folder`
                 root/<class>/... alone
    webdataset   "shards/train-{000..009}.tar", or a folder of         see `list_shards`
                 ``train-*.tar``, ``val-*.tar``, ``test-*.tar``
    huggingface  a folder that save_to_disk has written, or of         see `list_huggingface`
                 parquet files
    ===========  ====================================================  =================================

    The training images come in a fixed random order. A set without a test split gives up 20 % of each class for one,
    and a set without a validation split 10 % of its training images (at least 1, at most 5,000). Both depend on the set
    alone, not on `limit_train` or a run's seed, so that no run trains on what another validates on.

    Images of the last three are kept in memory where, decoded, they take at most half of what is free of it
    (`RESIDENT_SHARE`), on the host and on the device; else they are streamed: read by worker processes when they are
    needed. Both are the same images in the same order, bit for bit.

    Args:
        name: of the table.
        path: of the table.
        limit_train: keep the first `limit_train` training images, a fair sample; the other splits stay whole.
        image_size: pixels; for the last three only: scale each image's short side to it and crop the centre square.
        channels: of the images: 3, or 1 for grey ones, whatever they are stored as; of `npz` any number that it has.
        ignore_index: the label of images that have none, of which validation and test go without.
        stream: "auto" decides by size; "on" streams; "off" reads all into memory.
        workers: processes that read images; 0 reads them in this one; "auto" is one a core, at most 16.
        device: where the images will be, for "auto".

    Raises:
        ValueError: a wrong argument or wrong content.
        FileNotFoundError: a missing file or folder.
        OSError: a download that fails.
        ModuleNotFoundError: a reader's package is missing. Each message is one line.
    """
    if name not in NAMES:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if image_size is not None and name not in LISTED:
        raise ValueError(
            f"image_size: expected None for {name!r}, since only {', '.join(LISTED)} resize images, got {image_size}"
        )
    if image_size is not None:
        if not is_whole(image_size):
            raise TypeError(f"image_size: expected a whole number of pixels, got {image_size!r}")
        if image_size < 1:
            raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
    check_choice("stream", stream, Stream)
    if stream == "on" and name not in LISTED:
        raise ValueError(f"stream: expected auto or off for {name!r}, which is read whole, got 'on'")
    check_whole("channels", channels, 1)
    if name in LISTED:
        check_channels(channels)
        shape = None if image_size is None else (image_size, image_size)
        listed, notes = _list(name, path)
        if listed.test is None:
            share = f"{100 * TEST_SHARE:.0f} % of each class"
            notes += (f"{path}: no test split, so {share} of the training images are it, the same ones for every run",)
        training, *others = _cut_listed(listed, name, path, limit_train)
        cut = (training, *(_with_labels(part, ignore_index) for part in others))
        decoder = _decoder(cut, listed.train.source, shape, channels)
        return _read_listed(name, cut, decoder, listed.classes, notes, stream, workers, torch.device(device))
    parts = _read(name, path, channels, ignore_index)
    validation, train = _cut(name, len(parts.train[1]), limit_train, needed=parts.validation is None)
    return ImageDataset(
        name=name,
        train=Split(*_select(parts.train, train)),
        validation=Split(*(parts.validation or _select(parts.train, validation))),
        test=Split(*parts.test),
        classes=parts.classes,
        flip=parts.flip,
    ).labelled(ignore_index)


def _with_labels(part: Labelled, ignore_index: int | None) -> Labelled:
    if ignore_index is None or not bool((part.labels == ignore_index).any()):
        return part
    return select(part, (part.labels != ignore_index).nonzero().flatten())


def _list(name: str, path: str | Path | None) -> tuple[Listed, tuple[str, ...]]:
    """What a data set consists of, and notes on that."""
    if path is None:
        raise ValueError(f"path: expected the folder that {name!r} reads, got None")
    if name != "folder":
        listed = (list_shards if name == "webdataset" else list_huggingface)(str(path))
        return listed, listed.notes
    root = _expanded(path)
    found = list_folder(root)

    def labelled(files: ClassFiles | None) -> Labelled | None:
        if files is None:
            return None
        names = [os.fsencode(os.path.relpath(file, root)) for each in files.values() for file in each]
        counts = torch.tensor([len(each) for each in files.values()])
        return Labelled(Files(str(root), names), torch.arange(len(files)).repeat_interleave(counts))

    train = labelled(found.train)
    assert train is not None
    listed = Listed(train, labelled(found.validation), labelled(found.test), tuple(map(readable, found.train)))
    return listed, found.notes


def _cut_listed(
    listed: Listed, name: str, path: str | Path | None, limit_train: int | None
) -> tuple[Labelled, Labelled, Labelled]:
    """The three parts, of which those that are missing are cut off the training images."""
    train, validation, test, classes, _ = listed
    if test is None:
        kept, cut = cut_test(train.labels, lambda label: f"{path}: class {classes[label]!r}")
        train, test = select(train, kept), select(train, cut)
    held_out, kept = _cut(name, len(train.labels), limit_train, needed=validation is None)
    return select(train, kept), validation or select(train, held_out), test


def _decoder(parts: Sequence[Labelled], first: Source, size: tuple[int, int] | None, channels: int) -> Decoder:
    """How all images become of one size: the one that was asked for, or that of the first image as it is stored."""
    called = first.name(0)
    height, width = size or read_image(first.encoded(0), None, channels, name=called).shape[:2]
    return Decoder(tuple(part.source for part in parts), (channels, height, width), size is not None, called)


def _read_listed(
    name: str,
    parts: Sequence[Labelled],
    decoder: Decoder,
    classes: tuple[str, ...],
    notes: tuple[str, ...],
    stream: Stream,
    workers: Workers,
    device: torch.device,
) -> ImageDataset:
    """A data set whose images were listed: in memory, or streamed."""
    channels, height, width = decoder.shape
    count = sum(len(part.labels) for part in parts)
    needed, what = count * channels * height * width, f"{count:,} images of {width}×{height}"
    splits: list[AnySplit]
    if stream == "on" or (stream == "auto" and not fits_in_memory(needed, device)):
        reader = Reader(decoder, workers)
        splits = [StreamedSplit(reader, number, part.labels) for number, part in enumerate(parts)]
        kept = f"streamed by {reader.workers} worker{'s' if reader.workers > 1 else ''}"
        kept = kept if reader.workers else "streamed by this process"
    else:
        advice = "--stream on, a smaller --image-size, or fewer images"
        check_fits(needed, torch.device("cpu"), f"{what} pixels", advice)
        held = hold(decoder, parts, workers)
        splits = [Split(images, part.labels) for images, part in zip(held, parts, strict=True)]
        kept = "kept in memory"
    digest = hashlib.sha256("".join(listing(part.source, part.labels, decoder.shape) for part in parts).encode())
    return ImageDataset(
        name=name,
        train=splits[0],
        validation=splits[1],
        test=splits[2],
        classes=classes,
        flip=False,
        listing=digest.hexdigest(),
        notes=(*notes, f"{what} take {in_units(needed)} decoded: {kept}"),
    )


def fits_in_memory(size: int, device: torch.device) -> bool:
    """Whether decoded images of so many bytes may stay in the memory of the host, where they are read, and a device.

    They may take `RESIDENT_SHARE` of what is free there, all processes of this machine together; of what is not known
    there is enough.
    """
    places = [(torch.device("cpu"), distributed.count_here())]
    if device.type == "cuda":
        places.append((device, 1))
    for place, copies in places:
        free = available(place)
        if free is not None and size * copies > RESIDENT_SHARE * free:
            return False
    return True


def _cut(name: str, count: int, limit_train: int | None, *, needed: bool) -> tuple[Tensor, Tensor]:
    """(validation, training) indices of so many training images."""
    held_out, kept = cut_validation(count, needed=needed)
    if not len(kept):
        raise ValueError(f"{name}: expected at least 2 training images, of which one is cut off for validation, got 1")
    if limit_train is not None and not 1 <= limit_train <= len(kept):
        raise ValueError(f"limit_train: expected 1 to {len(kept)}, the training images there are, got {limit_train}")
    return held_out, kept[:limit_train]


def _read(name: str, path: str | Path | None, channels: int, ignore_index: int | None) -> Parts:
    if name == "digits":
        if path is not None:
            raise ValueError(f"path: expected None, since 'digits' comes with scikit-learn, got {str(path)!r}")
        return read_digits(channels)
    if name in ("cifar10", "cifar100"):
        return read_cifar(name, _expanded("data" if path is None else path), channels)
    if path is None:
        raise ValueError(f"path: expected the file that {name!r} reads, got None")
    return read_npz(_expanded(path), channels, ignore_index)


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~ where there is no home, ~name where there is no such user
        raise ValueError(f"{path}: {error}") from error


def _select(part: tuple[Tensor, Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
    images, labels = part
    return images[indices], labels[indices]
