"""Encoded images where they lie, each read when it is asked for: files, members of tar archives, rows of a table.

A source holds names and places, no images: millions of them fit, and worker processes take it over at once.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from immunity_fast.runtime.failures import readable

Indices = NDArray[np.int64]
OPEN_FILES = 64  # archives that a process keeps open at once


class Source(ABC):
    """Encoded images in a fixed order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def encoded(self, index: int) -> str | bytes:
        """The file of an image, or its content.

        Raises:
            OSError: it cannot be read any more.
            ValueError: it is not what it was when it was listed.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person finds the image by."""

    @abstractmethod
    def key(self, index: int) -> bytes:
        """What tells the image from the others, wherever the data lie."""

    @abstractmethod
    def sizes(self) -> Indices:
        """How many bytes each image has, encoded."""

    def select(self, indices: Indices) -> Source:
        """Some of the images, in another order."""
        return Selected(self, indices)


class Labelled(NamedTuple):
    """Images and their labels, int64 (n,), in the order in which they are stored."""

    source: Source
    labels: Tensor


class Listed(NamedTuple):
    """What a data set consists of, before an image of it is read; a part that it does not have is None.

    `notes` are lines on what was passed over.
    """

    train: Labelled
    validation: Labelled | None
    test: Labelled | None
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


class Selected(Source):
    """Some images of another source, in an order of their own."""

    def __init__(self, source: Source, indices: Indices) -> None:
        self._source, self._indices = source, np.ascontiguousarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def encoded(self, index: int) -> str | bytes:
        return self._source.encoded(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def key(self, index: int) -> bytes:
        return self._source.key(int(self._indices[index]))

    def sizes(self) -> Indices:
        return self._source.sizes()[self._indices]

    def select(self, indices: Indices) -> Source:
        return Selected(self._source, self._indices[indices])


class Names(Sequence[bytes]):
    """Names in one block of memory, which processes share: a list of a million strings would be copied by each."""

    def __init__(self, names: Iterable[bytes]) -> None:
        found = list(names)
        self._ends = np.cumsum([0, *map(len, found)], dtype=np.int64)
        self._text = b"".join(found)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        return self._text[self._ends[index] : self._ends[index + 1]]


class Files(Source):
    """Image files.

    Args:
        root: a folder.
        names: of the files, relative to it, in the file system's bytes.
    """

    def __init__(self, root: str, names: Iterable[bytes]) -> None:
        self._root, self._names = os.fsencode(root), Names(names)

    def __len__(self) -> int:
        return len(self._names)

    def encoded(self, index: int) -> str:
        return os.fsdecode(os.path.join(self._root, self._names[index]))

    def name(self, index: int) -> str:
        return readable(self.encoded(index))

    def key(self, index: int) -> bytes:
        name: bytes = self._names[index]
        return name.replace(os.fsencode(os.sep), b"/")

    def sizes(self) -> Indices:
        return np.array([os.stat(self.encoded(index)).st_size for index in range(len(self))], dtype=np.int64)


class Members(Source):
    """Image files in tar archives that are not compressed, each read by its offset.

    Args:
        archives: their files.
        places: (n, 3): which archive, where in it the image begins, how many bytes it has.
        keys: what the archives call the samples.
    """

    def __init__(self, archives: Sequence[str], places: Indices, keys: Iterable[bytes]) -> None:
        self._archives, self._places, self._keys = list(archives), places, Names(keys)
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def encoded(self, index: int) -> bytes:
        archive, offset, size = map(int, self._places[index])
        content = _read(self._descriptor(archive), size, offset)
        if len(content) != size:
            raise ValueError(f"{self.name(index)}: expected {size} bytes, got {len(content)}: the archive has changed")
        return content

    def _descriptor(self, archive: int) -> int:
        if archive not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[archive] = os.open(self._archives[archive], os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._open.move_to_end(archive)
        return self._open[archive]

    def name(self, index: int) -> str:
        return readable(f"{self._archives[int(self._places[index, 0])]}: {os.fsdecode(self._keys[index])}")

    def key(self, index: int) -> bytes:
        key: bytes = self._keys[index]
        return key

    def sizes(self) -> Indices:
        return self._places[:, 2]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def _read(descriptor: int, size: int, offset: int) -> bytes:
    """Some bytes of a file, of which forked processes have the same descriptor and each its own place."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # Windows, where no process is forked
    return os.read(descriptor, size)


def listing(source: Source, labels: Tensor, shape: tuple[int, ...]) -> str:
    """A hash of the images' names, their sizes in bytes, their labels, and what shape they are brought to.

    It tells whether data are the same without reading them: an image that is exchanged for one of the same name and the
    same number of bytes passes.
    """
    digest = hashlib.sha256(f"{len(source)} {shape}".encode())
    for index, size in enumerate(source.sizes().tolist()):
        digest.update(b"%s\0%d\0" % (source.key(index), size))
    digest.update(labels.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def select(part: Labelled, indices: Tensor) -> Labelled:
    """Some images of a part with their labels."""
    return Labelled(part.source.select(indices.numpy()), part.labels[indices])


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Indices one after another; none of no parts."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])
