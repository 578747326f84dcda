"""Folders of images: which files are of which split and class, before one of them is read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from immunity_fast.data.images import IMAGE_EXTENSIONS
from immunity_fast.runtime.failures import readable

ClassFiles: TypeAlias = dict[str, list[str]]  # of each class, by its folder's name: paths

# What splits are called, in any capitalisation: folders, arrays, archives and splits of other libraries.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SPLIT_SEED = 18787  # of every split this package cuts: a fixed property of the data, not of a run
TEST_SHARE = 0.2
OTHER_IMAGES = frozenset(
    {".arw", ".cr2", ".dcm", ".dng", ".exr", ".heic", ".heif", ".ico", ".jxl", ".nef", ".psd", ".raw", ".svg"}
)  # which somebody may have meant
_SEVERAL = {name: f"{name}s" for name in ("other folder", "broken link", "special file")}
_PACKED = "__MACOSX"  # what macOS puts into archives, beside everything


class Folder(NamedTuple):
    """What a folder of images consists of; classes, and the files of each, by the bytes of their names.

    Args:
        train, test: files of each class.
        validation: likewise; None where no folder has that split.
        notes: what was decided and passed over, a line each.
    """

    train: ClassFiles
    validation: ClassFiles | None
    test: ClassFiles
    notes: tuple[str, ...]


def list_folder(root: Path) -> Folder:
    """The files of a folder of images, one folder a class: root/train/<class>/…, root/test/<class>/… and perhaps
    root/val/<class>/…; or root/<class>/… alone.

    Splits may be called as `SPLITS` says, in any capitalisation. A class has the images at any depth of its folder,
    links followed; it is called by that folder's name, and its label is its place among the names, sorted by their
    bytes ("10" before "2", as torchvision has it). Hidden files, and those without an image's extension, are passed
    over, and a note says how many of which.

    Where nothing is the test, `TEST_SHARE` of each class's training images, at least one, is cut off for it, the same
    ones for every run: also where there is a validation split, which stays one.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: wrong content, with the file or folder, what was expected and what it has.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder, expected one folder of images for each class")
    passed_over: Counter[str] = Counter()
    notes: list[str] = []
    parts = _parts(root)
    if "train" not in parts:
        train = _classes(root, passed_over)
        validation = test = None
        where = root
    else:
        where = parts["train"]
        _pass_over_beside(root, parts, passed_over)
        train = _classes(where, passed_over)
        validation, test = (
            _same_classes(parts[name], train, passed_over) if name in parts else None for name in ("validation", "test")
        )
    if len(train) < 2:
        raise ValueError(f"{where}: expected at least 2 class folders, got {len(train)}{_instead(passed_over)}")
    if test is None:
        train, test = _test_cut(where, train)
        if "train" in parts:
            count = sum(map(len, test.values()))
            notes.append(
                f"{root}: no folder test, so {100 * TEST_SHARE:.0f} % of each class of {where.name}, {count:,} images, "
                "are the test, the same ones for every run"
            )
    if passed_over:
        notes.append(f"{root}: passed over {said(passed_over)}")
    return Folder(train, validation, test, tuple(notes))


def split_of(name: str) -> str | None:
    """Which split a name is one of, "train", "validation" or "test"; None if it is another's."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def said(passed_over: Counter[str]) -> str:
    """What was passed over, as a part of a line: "3 .txt, 2 hidden"."""
    shown = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{count:,} {_SEVERAL.get(kind, kind) if count > 1 else kind}" for kind, count in shown[:8])
    more = sum(count for _, count in shown[8:])
    text += f" and {more:,} others" if more else ""
    unread = [kind for kind, _ in shown if kind in OTHER_IMAGES]
    what = f"; {' and '.join(unread)} are images that are not read here: save them as .png or .jpg" if unread else ""
    return text + what


def _parts(root: Path) -> dict[str, Path]:
    """The folders of the splits, where there is one to train on; none where the folders are classes.

    Raises:
        ValueError: two of one split, or none to train on.
    """
    found: dict[str, list[Path]] = {}
    folders = _subfolders(root)
    for folder in folders:
        split = split_of(folder.name)
        if split is not None and (split != "train" or _subfolders(folder)):  # else a class of that name
            found.setdefault(split, []).append(folder)
    if "train" not in found:
        if folders and sum(map(len, found.values())) == len(folders) and any(map(_subfolders, folders)):
            names = " and ".join(folder.name for folder in folders)
            raise ValueError(f"{root}: expected a folder train, with a folder for each class, got {names}")
        return {}
    for split, several in found.items():
        if len(several) > 1:
            names = " and ".join(folder.name for folder in several)
            raise ValueError(f"{root}: expected one {split} split, got {names}")
    return {split: several[0] for split, several in found.items()}


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name)),
        key=os.fsencode,
    )


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == _PACKED


def _pass_over_beside(root: Path, parts: dict[str, Path], passed_over: Counter[str]) -> None:
    """Count what lies beside the folders of the splits."""
    for path in root.iterdir():
        if path.is_dir() and not _hidden(path.name):
            passed_over["other folder"] += path not in parts.values()
        else:
            passed_over[_kind(path.name)] += 1
    passed_over += Counter()  # without zeros


def _classes(folder: Path, passed_over: Counter[str]) -> ClassFiles:
    """The image files of each class.

    Raises:
        ValueError: a class without any.
    """
    for path in folder.iterdir():
        if not path.is_dir() or _hidden(path.name):
            passed_over[_kind(path.name)] += 1
    classes: ClassFiles = {}
    for path in _subfolders(folder):
        inside: Counter[str] = Counter()
        files = sorted(_images(str(path), inside, (os.path.realpath(path),)), key=os.fsencode)
        if not files:
            raise ValueError(f"{path}: expected at least one image in each class's folder, got none{_instead(inside)}")
        classes[path.name] = files
        passed_over.update(inside)
    return classes


def _images(folder: str, passed_over: Counter[str], above: tuple[str, ...]) -> Iterator[str]:
    """The images at any depth of a folder, in no order.

    Args:
        folder: the folder.
        passed_over: what is counted into.
        above: where it and those above it really lie, so that a link to one of them is not followed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if _hidden(entry.name):
                passed_over["hidden"] += 1
            elif entry.is_dir():
                real = os.path.realpath(entry.path)
                if real not in above:
                    yield from _images(entry.path, passed_over, (*above, real))
            elif not entry.is_file():
                passed_over["broken link" if entry.is_symlink() else "special file"] += 1
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS:
                yield entry.path
            else:
                passed_over[_kind(entry.name)] += 1


def _kind(name: str) -> str:
    """How a file that is passed over is counted."""
    if _hidden(name):
        return "hidden"
    extension = os.path.splitext(name)[1].lower()
    if extension in IMAGE_EXTENSIONS:
        return f"{extension} in no class's folder"
    return readable(extension) or "without an extension"


def _instead(passed_over: Counter[str]) -> str:
    return f" (passed over: {said(passed_over)})" if passed_over else ""


def _same_classes(folder: Path, train: ClassFiles, passed_over: Counter[str]) -> ClassFiles:
    """The image files of each class of another split than `train`.

    Raises:
        ValueError: it has not the same classes, or one without an image.
    """
    inside: Counter[str] = Counter()
    files = _classes(folder, inside)
    different = sorted(files.keys() ^ train.keys())
    if different:
        state = "none of" if different[0] in train else "also"
        # ImageNet's validation images come in one folder.
        why = "" if files else _instead(inside)
        raise ValueError(
            f"{folder}: expected the {len(train)} classes of train, got {state} the class {different[0]!r}{why}"
        )
    passed_over.update(inside)
    return files


def _test_cut(root: Path, files: ClassFiles) -> tuple[ClassFiles, ClassFiles]:
    """(train, test) files: TEST_SHARE of each class, at least 1 image, goes to the test."""
    random = np.random.RandomState(SPLIT_SEED)
    train, test = {}, {}
    for name, found in files.items():
        if len(found) < 2:
            raise ValueError(f"{root / name}: expected at least 2 images, of which one is cut off for the test, got 1")
        order = [found[index] for index in random.permutation(len(found))]
        size = max(1, round(TEST_SHARE * len(found)))
        train[name], test[name] = order[size:], order[:size]
    return train, test
