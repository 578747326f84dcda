"""One reader a kind of data set: files in; images uint8 (n, 3, H, W) and labels int64 (n,) out, or one clear line of
error. Each reader imports the packages it needs by itself, so that the others work without them."""

from __future__ import annotations

import importlib
import os
from http.client import HTTPException
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from immunity_fast.data.cuts import SPLIT_SEED, TEST_SHARE
from immunity_fast.data.images import is_image_file
from immunity_fast.data.sources import Files, Labelled, Listed
from immunity_fast.runtime.failures import readable

Pair: TypeAlias = tuple[Tensor, Tensor]
NPZ_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
VALIDATION = ("val", "valid", "validation")  # what that split is called
NPZ_VALIDATION = ("val_images", "val_labels")


class Parts(NamedTuple):
    """(images uint8 (n, 3, H, W), labels int64 (n,)) of each part, in the order in which they are stored."""

    train: Pair
    validation: Pair | None
    test: Pair
    classes: tuple[str, ...]
    flip: bool


def read_digits() -> Parts:
    """scikit-learn's 1,797 handwritten digits, 8×8 with values 0..16, as 32×32 RGB; 20 % of each class is the test."""
    datasets = _need("sklearn.datasets", "scikit-learn")
    selection = _need("sklearn.model_selection", "scikit-learn")
    digits = datasets.load_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    grey = interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    images, labels = grey.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(digits.target).long()
    train, test = selection.train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, stratify=digits.target, random_state=SPLIT_SEED
    )
    classes = tuple(str(name) for name in digits.target_names)
    return Parts((images[train], labels[train]), None, (images[test], labels[test]), classes, flip=False)


def read_cifar(name: str, root: Path) -> Parts:
    """`name`, "cifar10" or "cifar100", from `root`; torchvision downloads and checks it. OSError where that fails."""
    source = getattr(_need("torchvision.datasets", "torchvision"), name.upper())
    try:
        train, test = source(root, train=True, download=True), source(root, train=False, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise OSError(
            f"{name} is not in {root} and could not be downloaded ({_reason(error)}): "
            f"fetch {source.url} by hand and put the file into {root}"
        ) from error

    def pair(part: Any) -> Pair:
        return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)

    return Parts(pair(train), None, pair(test), tuple(train.classes), flip=True)


def read_npz(file: Path) -> Parts:
    """An .npz file in MedMNIST's layout.

    * `train_images`, `test_images`: uint8 (n, H, W, 3), or grey (n, H, W) or (n, H, W, 1), which is repeated to 3
      channels;
    * `train_labels`, `test_labels`: any integer dtype, (n,) or (n, 1), from 0;
    * `val_images`, `val_labels`, which may be called `valid_…` or `validation_…`, too, and may be missing;
    * `classes`: names, a string array (K,); without it K is the highest training label + 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: wrong content, with the file, the array, what was expected and what it has.
    """
    arrays = _npz_arrays(file)
    images, labels = {}, {}
    for part in ("train", "val", "test"):
        if f"{part}_images" in arrays:
            images[part] = _npz_images(file, f"{part}_images", arrays[f"{part}_images"])
            labels[part] = _npz_labels(file, f"{part}_labels", arrays[f"{part}_labels"], expected=len(images[part]))
    classes = _npz_classes(file, arrays.get("classes"), labels["train"])
    size = tuple(images["train"].shape[2:])
    pairs = {}
    for part in images:
        if tuple(images[part].shape[2:]) != size:
            raise ValueError(
                f"{file}: {part}_images: expected train_images' (H, W) = {size}, got {tuple(images[part].shape[2:])}"
            )
        low, high = int(labels[part].min()), int(labels[part].max())
        if low < 0 or high >= len(classes):
            raise ValueError(
                f"{file}: {part}_labels: expected values 0 to {len(classes) - 1} for {len(classes)} classes, "
                f"got from {low} to {high}"
            )
        pairs[part] = images[part], torch.from_numpy(labels[part].astype(np.int64))
    return Parts(pairs["train"], pairs.get("val"), pairs["test"], classes, flip=False)


def _npz_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """The arrays that the layout names, read in full."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file, expected an .npz file in MedMNIST's layout")
    arrays: dict[str, NDArray[Any]] = {}
    key = "the archive"
    try:
        with file.open("rb") as stream:  # np.load leaves a file that it opened itself open where it fails
            if stream.read(2) != b"PK":  # np.load would take it for a pickle, and advise to trust it
                raise ValueError("it is no zip archive")
            stream.seek(0)
            archive = np.load(stream, allow_pickle=False)
            names = sorted(archive.files)
            called = [name for name in VALIDATION if any(f"{name}_{kind}" in names for kind in ("images", "labels"))]
            if len(called) > 1:
                raise ValueError(f"it has {' and '.join(f'{name}_…' for name in called)}, and one is enough")
            for key in NPZ_REQUIRED + NPZ_VALIDATION + ("classes",):
                stored = key.replace("val_", f"{called[0]}_") if called else key
                if stored in names:
                    arrays[key] = np.asarray(archive[stored])
    except Exception as error:  # np.load reads lazily, and a damaged archive can raise nearly anything at any point
        # NumPy advises to allow pickles: to run whatever code the file has.
        pickled = "allow_pickle" in str(error)
        reason = "it is an array of Python objects, not of numbers" if pickled else _reason(error)
        raise ValueError(
            f"{file}: expected a whole .npz file without pickled objects, got that {key} could not be read ({reason})"
        ) from error
    wanted = NPZ_REQUIRED + (NPZ_VALIDATION if any(key in arrays for key in NPZ_VALIDATION) else ())
    missing = [key for key in wanted if key not in arrays]
    if missing:
        raise ValueError(
            f"{file}: expected {', '.join(wanted)}, got {_one_line(', '.join(names)) or 'nothing'}; "
            f"lacks {', '.join(missing)}"
        )
    return arrays


def _npz_images(file: Path, key: str, array: NDArray[Any]) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(f"{file}: {key}: expected uint8, got dtype {array.dtype}")
    pixels = array[..., None] if array.ndim == 3 else array
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        first = pixels.ndim == 4 and pixels.shape[1] in (1, 3)
        raise ValueError(
            f"{file}: {key}: expected 2-D images as (n, H, W), (n, H, W, 1) or (n, H, W, 3), got shape {array.shape}"
            + ("; its channels come first: images.transpose(0, 2, 3, 1) puts them last" if first else "")
        )
    if 0 in pixels.shape:
        raise ValueError(f"{file}: {key}: expected at least one image of at least one pixel, got shape {array.shape}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


def _npz_labels(file: Path, key: str, array: NDArray[Any], *, expected: int) -> NDArray[Any]:
    """Labels (n,), of the stored dtype: their range is yet to be checked, and int64 cannot hold every uint64."""
    if array.dtype.kind not in "iu":
        raise ValueError(f"{file}: {key}: expected integers, got dtype {array.dtype}")
    labels = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if labels.ndim != 1:
        raise ValueError(
            f"{file}: {key}: expected shape (n,) or (n, 1), one class for each image, got shape {array.shape}"
        )
    if len(labels) != expected:
        raise ValueError(f"{file}: {key}: expected {expected} labels, one for each image, got {len(labels)}")
    return labels


def _npz_classes(file: Path, names: NDArray[Any] | None, train_labels: NDArray[Any]) -> tuple[str, ...]:
    if names is not None:
        if names.ndim != 1 or names.dtype.kind != "U":
            raise ValueError(f"{file}: classes: expected strings (K,), got shape {names.shape}, dtype {names.dtype}")
        classes = tuple(readable(str(name)) for name in names)
    else:
        count = int(train_labels.max()) + 1
        # One label gone wrong, an identifier for instance, must not make a network of a billion classes.
        if count > len(train_labels):
            raise ValueError(
                f"{file}: train_labels: expected no more classes than images, got values up to {count - 1} for "
                f"{len(train_labels)} images"
            )
        classes = tuple(str(label) for label in range(count))
    if len(classes) < 2:
        raise ValueError(f"{file}: expected at least 2 classes, got {len(classes)}")
    return classes


def list_folder(root: Path) -> Listed:
    """A folder of images, one folder a class: root/train/<class>/* and root/test/<class>/*, with root/validation,
    root/valid or root/val of the same classes if there is one; or only root/<class>/*, all of it training images.

    Classes are sorted by name. Hidden files and files without an image's extension are passed over.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: wrong content, with the file or folder, what was expected and what it has.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder, expected one folder of images for each class")
    validation = test = None
    if (root / "train").is_dir() and _subfolders(root / "train"):
        train, test = _class_files(root / "train"), _class_files(root / "test")
        others = [folder for folder in _subfolders(root) if folder.name.lower() in VALIDATION]
        if len(others) > 1:
            raise ValueError(
                f"{root}: expected one validation split, got {' and '.join(other.name for other in others)}"
            )
        for other in others:
            validation = _class_files(other)
            _check_classes(other, validation, train)
        _check_classes(root / "test", test, train)
    else:
        train = _class_files(root)
    if len(train) < 2:
        raise ValueError(f"{root}: expected at least 2 class folders, got {len(train)}")

    def labelled(files: dict[str, list[Path]] | None) -> Labelled | None:
        if files is None:
            return None
        names = [os.fsencode(file.relative_to(root)) for found in files.values() for file in found]
        counts = torch.tensor([len(found) for found in files.values()])
        return Labelled(Files(str(root), names), torch.arange(len(files)).repeat_interleave(counts))

    listed = labelled(train)
    assert listed is not None
    return Listed(listed, labelled(validation), labelled(test), tuple(map(readable, train)))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")), key=os.fsencode
    )


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class, both sorted by the bytes of their names, which no locale changes."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder, expected one folder of images for each class")
    files = {
        path.name: sorted(
            filter(is_image_file, path.iterdir()),
            key=os.fsencode,
        )
        for path in _subfolders(folder)
    }
    for name, found in files.items():
        if not found:
            raise ValueError(f"{folder / name}: expected at least one image directly in each class's folder, got none")
    return files


def _check_classes(folder: Path, files: dict[str, list[Path]], train: dict[str, list[Path]]) -> None:
    different = sorted(files.keys() ^ train.keys())
    if different:
        state = "none of" if different[0] in train else "also"
        raise ValueError(
            f"{folder}: expected the {len(train)} classes of train, got {state} the class {different[0]!r}"
        )


def _need(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(f"this data set needs {package}: pip install {package} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The error's own words; zipfile's can quote a whole file."""
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return shorten(text, 200, placeholder=" …")
