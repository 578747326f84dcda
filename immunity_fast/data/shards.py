"""WebDataset's tar archives: an index of what lies where in them, from their headers alone, by which any image is read.

A sample is what shares a name up to the first dot after the last slash, in one archive: `n01/0007.jpg` and
`n01/0007.cls`. Needs no library but for pictures.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from immunity_fast.data.folders import SPLITS, split_of
from immunity_fast.data.images import IMAGE_EXTENSIONS
from immunity_fast.data.sources import Labelled, Listed, Members
from immunity_fast.runtime.failures import readable

LABELS = ("cls", "txt", "json")  # the extensions of labels; the first that is there is taken
KEYS = ("label", "cls", "class", "target", "class_name", "category")  # of a .json, where its label stands
MOST_LABEL_BYTES = 1 << 20  # of a label: anything longer is none
CLASSES = "classes.txt"  # beside the archives: a name a line
_PART = re.compile(rf"(?<![a-z])({'|'.join(sorted(sum(SPLITS.values(), ()), key=len, reverse=True))})(?![a-z])", re.I)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


class Sample(NamedTuple):
    """A sample of an archive: what it is called, where its image lies, and its label, a number or a name."""

    key: str
    offset: int
    size: int
    label: int | str


def list_shards(given: str) -> Listed:
    """The samples of archives, by their parts.

    Args:
        given: a pattern such as `shards/{train,test}-{000..009}.tar`, with `*`, `{a,b}` and `{000..009}`, several with
            `::` between; or a folder of archives, or of a folder of archives for each part. An archive belongs to the
            part that a word of its name, or its folder, is called by: train, val, valid, validation or test. Where none
            says so, all are training samples.

    Raises:
        FileNotFoundError: no such archive.
        ValueError: wrong content, with the archive and the sample.
    """
    parts = _parts(given)
    passed_over: list[str] = []
    found = {
        part: (archives, [list(read_index(archive, passed_over)) for archive in archives])
        for part, archives in parts.items()
    }
    classes = _classes(given, found)
    known = {name: number for number, name in enumerate(classes)}

    def labelled(part: str) -> Labelled | None:
        if part not in found:
            return None
        archives, indexed = found[part]
        places, labels, keys = [], [], []
        for number, (archive, samples) in enumerate(zip(archives, indexed, strict=True)):
            for sample in samples:
                label = sample.label if isinstance(sample.label, int) else known.get(sample.label, -1)
                if not 0 <= label < len(classes):
                    raise ValueError(
                        f"{archive}: {readable(sample.key)}: expected a label of the {len(classes)} classes, "
                        f"got {sample.label!r}"
                    )
                places.append((number, sample.offset, sample.size))
                labels.append(label)
                keys.append(os.fsencode(sample.key))
        if not labels:
            raise ValueError(f"{archives[0]}: expected at least one sample with an image, got none")
        return Labelled(Members(archives, np.array(places, dtype=np.int64), keys), torch.tensor(labels))

    train = labelled("train")
    assert train is not None
    notes: tuple[str, ...] = ()
    if passed_over:
        count = f"{len(passed_over):,} sample{'s' if len(passed_over) > 1 else ''} without an image"
        notes = (f"{given}: passed over {count}, {passed_over[0]} for one",)
    return Listed(train, labelled("validation"), labelled("test"), classes, notes)


def expanded(pattern: str) -> list[str]:
    """The names that a pattern with braces means: `{a,b}` each of them, `{000..009}` a number with as many digits."""
    found = _BRACES.search(pattern)
    if found is None:
        return [pattern]
    numbers = _RANGE.fullmatch(found[1])
    if numbers:
        low, high = int(numbers[1]), int(numbers[2])
        choices = [f"{number:0{len(numbers[1])}d}" for number in range(low, high + 1)]
    else:
        choices = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [name for choice in choices for name in expanded(f"{before}{choice}{after}")]


def _parts(given: str) -> dict[str, list[str]]:
    """The archives of each part, sorted as they are given, or by name."""
    archives: list[str] = []
    for pattern in given.split("::"):
        if pattern.startswith("pipe:") or "://" in pattern:
            raise ValueError(f"{pattern}: expected archives on this machine, got an address: fetch them first")
        place = os.path.expanduser(pattern)
        if os.path.isdir(place):
            inside = [*Path(place).glob("*.tar"), *Path(place).glob("*/*.tar")]
            if not inside:
                raise FileNotFoundError(f"{pattern}: there is no archive (*.tar) in this folder")
            archives += sorted((str(file) for file in inside if not file.name.startswith(".")), key=os.fsencode)
            continue
        for name in expanded(place):
            matching = sorted(glob.glob(name), key=os.fsencode) if glob.has_magic(name) else [name]
            if not matching:
                raise FileNotFoundError(f"{name}: there is no such archive")
            archives += matching
    parts: dict[str, list[str]] = {}
    for archive in dict.fromkeys(archives):
        parts.setdefault(part_of(archive), []).append(archive)
    if "" in parts:
        if len(parts) > 1:
            others = ", ".join(sorted({part for part in parts if part}))
            raise ValueError(
                f"{parts[''][0]}: expected train, val or test in its name, as the archives of {others} have"
            )
        parts = {"train": parts[""]}
    if "train" not in parts:
        raise ValueError(f"{given}: expected archives of training samples, got those of {', '.join(sorted(parts))}")
    return parts


def part_of(file: str) -> str:
    """Which part a file is of, by a word in its name, `train-000.tar` or `cats_val.tar`, or by its folder's whole name.

    Returns:
        "train", "validation" or "test"; "" where nothing says so.
    """
    found = _PART.search(os.path.basename(file))
    word = found[1] if found else os.path.basename(os.path.dirname(file))
    return split_of(word) or ""


def read_index(archive: str, passed_over: list[str] | None = None) -> Iterator[Sample]:
    """The samples of an archive, in order, from its headers and its labels; no image is read.

    Args:
        archive: its name.
        passed_over: gets the names of what is no sample: members with neither an image nor a label of an image's.

    Raises:
        FileNotFoundError: there is no such archive.
        ValueError: it is no whole tar archive, it is compressed, or a sample has no image or no label.
    """
    try:
        with open(archive, "rb") as file:
            begin = file.read(6)
        length = os.path.getsize(archive)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{archive}: there is no such archive") from error
    if begin.startswith(_COMPRESSED):
        raise ValueError(f"{archive}: expected a plain .tar, of which any image can be read, got a compressed one")
    key = ""
    fields: dict[str, tuple[int, int]] = {}
    with open(archive, "rb") as file:

        def ended() -> Iterator[Sample]:
            """The sample whose members have all been seen, if there is one."""
            if _is_sample(fields):
                yield _sample(archive, file, key, fields)
            elif fields and passed_over is not None:
                passed_over.append(f"{readable(key)}.{next(iter(fields))}")

        for name, offset, size in _members(archive, file):
            if offset + size > length:
                raise ValueError(f"{archive}: {readable(name)}: expected {size} bytes, got the end of the archive")
            folder, _, last = name.rpartition("/")
            stem, dot, extension = last.partition(".")
            if not stem or not dot or not extension:
                continue
            own = f"{folder}/{stem}" if folder else stem
            if own != key:
                yield from ended()
                fields = {}
            key = own
            fields[extension.lower()] = offset, size
        yield from ended()


def _is_sample(fields: Iterable[str]) -> bool:
    """Whether members of one name are meant for a sample: a `meta.json` of a whole archive's is none."""
    return any(f".{field.rpartition('.')[2]}" in IMAGE_EXTENSIONS or field in ("cls", "txt") for field in fields)


def _members(archive: str, file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of each file in an archive."""
    try:
        with tarfile.open(archive, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # which would be kept, millions of them
                if member.isreg():
                    yield member.name, member.offset_data, member.size
            # To tarfile a header that is damaged, or cut off, is the end of an archive, and what follows is not there.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise ValueError(f"{archive}: expected a whole tar archive, got one that cannot be read ({error})") from error


def _sample(archive: str, file: BinaryIO, key: str, fields: dict[str, tuple[int, int]]) -> Sample:
    image = next((place for extension, place in fields.items() if f".{extension}" in IMAGE_EXTENSIONS), None)
    kind = next((kind for kind in LABELS if kind in fields), None)
    if image is None or kind is None:
        wanted = "an image" if image is None else f"a label ({', '.join(LABELS)})"
        raise ValueError(f"{archive}: {readable(key)}: expected {wanted}, got {', '.join(sorted(fields))}")
    offset, size = fields[kind]
    if size > MOST_LABEL_BYTES:
        raise ValueError(f"{archive}: {readable(key)}.{kind}: expected a label, got {size:,} bytes")
    file.seek(offset)
    return Sample(key, *image, _label(f"{archive}: {readable(key)}.{kind}", kind, file.read(size)))


def _label(where: str, kind: str, content: bytes) -> int | str:
    """The number or the name that a label is."""
    try:
        text = content.decode("utf-8").strip()
        value = json.loads(text) if kind == "json" else text
    except ValueError as error:
        raise ValueError(
            f"{where}: expected {'JSON' if kind == 'json' else 'text'} in UTF-8, got other bytes"
        ) from error
    if isinstance(value, dict):
        value = next((value[key] for key in KEYS if key in value), None)
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value.strip()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        expected = f"a number or a name under one of {', '.join(KEYS)}" if kind == "json" else "a number or a name"
        raise ValueError(f"{where}: expected {expected}, got {text[:80]!r}")
    return value


def _classes(given: str, found: dict[str, tuple[list[str], list[list[Sample]]]]) -> tuple[str, ...]:
    """The classes' names: of `classes.txt` beside the archives; or the training labels, numbers or names."""
    archives, indexed = found["train"]
    labels = {sample.label for samples in indexed for sample in samples}
    count = sum(map(len, indexed))
    if not count:
        raise ValueError(f"{archives[0]}: expected at least one sample with an image, got none")
    file = _names_file(archives)
    if file is not None:
        classes = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    elif all(isinstance(label, str) for label in labels):
        classes = tuple(sorted(readable(str(label)) for label in labels))
    elif any(isinstance(label, str) for label in labels):
        examples = next(str(label) for label in labels if isinstance(label, str))
        raise ValueError(f"{given}: expected labels that are all numbers or all names, got both, {examples!r} for one")
    else:
        numbers = [int(label) for label in labels]
        low, high = min(numbers), max(numbers)
        # A label gone wrong, an identifier for instance, must not make a network of a billion classes.
        if low < 0 or high >= max(count, 2):
            raise ValueError(
                f"{given}: expected labels from 0, no more classes than samples ({count}), got {low} to {high}"
            )
        classes = tuple(str(number) for number in range(high + 1))
    if len(classes) < 2:
        raise ValueError(f"{given}: expected at least 2 classes, got {len(classes)}")
    return classes


def _names_file(archives: Iterable[str]) -> Path | None:
    for folder in dict.fromkeys(Path(archive).parent for archive in archives):
        for place in (folder, folder.parent):
            if (place / CLASSES).is_file():
                return place / CLASSES
    return None
