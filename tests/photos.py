"""A few small image files of random pixels, in each of the layouts that data sets have."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")
COUNTS = {"train": 10, "val": 3, "test": 4}  # images of each class


def photo(seed: int, *, size: tuple[int, int] = (14, 11), kind: str = "PNG") -> bytes:
    """An image file's content, of (width, height) pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def photos(part: str) -> Iterator[tuple[int, int, bytes]]:
    """(label, number, content) of each image of a part, of slightly different sizes."""
    for label in range(len(CLASSES)):
        for number in range(COUNTS[part]):
            seed = 1000 * list(COUNTS).index(part) + 100 * label + number
            yield label, number, photo(seed, size=(13 + number % 3, 12))


def write_folder(root: Path) -> Path:
    """An image folder of three parts."""
    for part in COUNTS:
        for label, number, content in photos(part):
            file = root / part / CLASSES[label] / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    return root


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    """An archive of files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def write_shards(root: Path, *, label: str = "cls", shards: int = 2) -> Path:
    """The same images as WebDataset's archives, in the order of the folder."""
    for part in COUNTS:
        samples = list(photos(part))
        for shard in range(shards):
            members = []
            for number, (own, index, content) in enumerate(samples):
                if number * shards // len(samples) == shard:
                    key = f"{CLASSES[own]}/{index:02d}"
                    members += [(f"{key}.png", content), (f"{key}.{label}", _label(label, own))]
            write_tar(root / f"{part}-{shard:03d}.tar", members)
    return root


def _label(kind: str, label: int) -> bytes:
    made: dict[str, Any] = {"cls": str(label), "txt": CLASSES[label], "json": json.dumps({"label": label})}
    return str(made[kind]).encode()
