"""One reader a kind of data set: files in; images uint8 (n, C, H, W) and labels int64 (n,) out, or one clear line of
error. Each reader imports the packages it needs by itself, so that the others work without them."""

from __future__ import annotations

import importlib
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from immunity_fast.data.cuts import cut_as_sklearn
from immunity_fast.data.folders import split_of
from immunity_fast.data.images import check_channels, to_grey
from immunity_fast.runtime.failures import readable
from immunity_fast.targets import TargetOptions, read_targets

Pair: TypeAlias = tuple[Tensor, Tensor]
MOST_CHANNELS = 64  # of images, for a hint: a longer last axis is rather a side
NPZ_REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
NPZ_VALIDATION = ("val_images", "val_labels")


class Parts(NamedTuple):
    """(images uint8 (n, C, H, W), labels int64 (n,)) of each part, in the order in which they are stored."""

    train: Pair
    validation: Pair | None
    test: Pair
    classes: tuple[str, ...]
    flip: bool


def read_digits(channels: int = 3) -> Parts:
    """scikit-learn's 1,797 handwritten digits, 8×8 with values 0..16, as 32×32; 20 % of each class is the test."""
    check_channels(channels, "digits")
    rows = np.loadtxt(_digits_file(), delimiter=",", dtype=np.int64)  # 64 pixels and the digit
    labels = rows[:, -1]
    grey = torch.from_numpy(rows[:, :-1]).float().view(-1, 1, 8, 8) * (255 / 16)
    grey = interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False).round().to(torch.uint8)
    images, classes = grey.expand(-1, channels, -1, -1).contiguous(), tuple(map(str, range(10)))
    train, test = ((images[part], torch.from_numpy(labels)[part]) for part in cut_as_sklearn(labels))
    return Parts(train, None, test, classes, flip=False)


def _digits_file() -> Path:
    """Where scikit-learn has its digits; it is not imported for them, which takes longer than to read them."""
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("this data set needs scikit-learn: pip install scikit-learn (there is none here)")
    return Path(found.origin).with_name("datasets") / "data" / "digits.csv.gz"


def read_cifar(name: str, root: Path, channels: int = 3) -> Parts:
    """`name`, "cifar10" or "cifar100", from `root`; torchvision downloads and checks it. OSError where that fails.

    As grey images they are what `images.to_grey` makes of them.
    """
    check_channels(channels, name)
    source = getattr(_need("torchvision.datasets", "torchvision"), name.upper())
    try:
        train, test = source(root, train=True, download=True), source(root, train=False, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise OSError(
            f"{name} is not in {root} and could not be downloaded ({_reason(error)}): "
            f"fetch {source.url} by hand and put the file into {root}"
        ) from error

    def pair(part: Any) -> Pair:
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2)
        return (to_grey(images) if channels == 1 else images).contiguous(), torch.tensor(part.targets)

    return Parts(pair(train), None, pair(test), tuple(train.classes), flip=True)


def read_npz(file: Path, channels: int = 3, ignore_index: int | None = None) -> Parts:
    """An .npz file in MedMNIST's layout.

    * `train_images`, `test_images`: uint8 (n, H, W, C) of `channels` channels, or grey (n, H, W) or (n, H, W, 1). Grey
      images are repeated to 3 channels where these are wanted, and of 3 channels become grey where that is, as
      `images.to_grey` says; other numbers of channels are those of the file;
    * `train_labels`, `test_labels`: any integer dtype, (n,) or (n, 1), from 0; or probabilities, floating-point (n, K);
    * `val_images`, `val_labels`, which may be called `valid_…` or `validation_…`, too, and may be missing;
    * names in any capitalisation, such as `Train_images`; `training_…` and `testing_…` are understood;
    * `classes`: names, a string array (K,); without it K is the highest training label + 1, or as many as there are
      probabilities.

    Args:
        file: the file.
        channels: C.
        ignore_index: the label of images that have none, and of probabilities the value of such an image's whole row.

    Raises:
        FileNotFoundError: no such file.
        ValueError: wrong content, with the file, the array, what was expected and what it has.
    """
    arrays = _npz_arrays(file)
    images, labels = {}, {}
    for part in ("train", "val", "test"):
        if f"{part}_images" in arrays:
            images[part] = _npz_images(file, f"{part}_images", arrays[f"{part}_images"], channels)
            labels[part] = _npz_labels(file, f"{part}_labels", arrays[f"{part}_labels"], expected=len(images[part]))
    classes = _npz_classes(file, arrays.get("classes"), labels["train"], ignore_index)
    size = tuple(images["train"].shape[2:])
    pairs = {}
    for part in images:
        if tuple(images[part].shape[2:]) != size:
            raise ValueError(
                f"{file}: {part}_images: expected train_images' (H, W) = {size}, got {tuple(images[part].shape[2:])}"
            )
        pairs[part] = images[part], _npz_targets(file, f"{part}_labels", labels[part], len(classes), ignore_index)
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
            stored = _npz_names(names)
            for key in NPZ_REQUIRED + NPZ_VALIDATION + ("classes",):
                if key in stored:
                    arrays[key] = np.asarray(archive[stored[key]])
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


def _npz_names(names: list[str]) -> dict[str, str]:
    """What the file calls each array of the layout.

    Raises:
        ValueError: two names for one.
    """
    stored: dict[str, str] = {}
    for name in names:
        split, _, kind = name.lower().rpartition("_")
        part = {"validation": "val"}.get(split_of(split) or "", split_of(split))
        key = f"{part}_{kind}" if part and kind in ("images", "labels") else name.lower()
        if key in stored:
            one, other = (text.rpartition("_")[0] for text in (stored[key], name))
            raise ValueError(f"it has {one}_… and {other}_…, and one is enough")
        stored[key] = name
    return stored


def _npz_images(file: Path, key: str, array: NDArray[Any], channels: int) -> Tensor:
    if array.dtype != np.uint8:
        raise ValueError(f"{file}: {key}: expected uint8, got dtype {array.dtype}")
    pixels = array[..., None] if array.ndim == 3 else array
    takes = {channels} | ({1, 3} if channels in (1, 3) else set())
    if pixels.ndim != 4 or pixels.shape[-1] not in takes:
        shapes = [f"(n, H, W, {each})" for each in sorted(takes)]
        wanted = ["(n, H, W)", *shapes] if 1 in takes else shapes
        listed = f"{', '.join(wanted[:-1])} or {wanted[-1]}" if len(wanted) > 1 else wanted[0]
        hint = ""
        if pixels.ndim == 4 and pixels.shape[1] in takes:
            hint = "; its channels come first: images.transpose(0, 2, 3, 1) puts them last"
        elif pixels.ndim == 4 and 0 < pixels.shape[-1] <= MOST_CHANNELS:
            hint = f"; channels={pixels.shape[-1]} (--channels {pixels.shape[-1]}) takes it"
        raise ValueError(f"{file}: {key}: expected 2-D images as {listed}, got shape {array.shape}{hint}")
    if 0 in pixels.shape:
        raise ValueError(f"{file}: {key}: expected at least one image of at least one pixel, got shape {array.shape}")
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    if channels == 1:
        return to_grey(images).contiguous()
    return images.expand(-1, channels, -1, -1).contiguous()


def _npz_labels(file: Path, key: str, array: NDArray[Any], *, expected: int) -> NDArray[Any]:
    """Labels (n,), of the stored dtype: their range is yet to be checked, and int64 cannot hold every uint64."""
    soft = array.dtype.kind == "f" and array.ndim == 2 and array.shape[1] > 1
    if array.dtype.kind not in "iu" and not soft:
        raise ValueError(
            f"{file}: {key}: expected integers, or probabilities (n, K), got dtype {array.dtype}, shape {array.shape}"
        )
    labels = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if labels.ndim != 1 and not soft:
        raise ValueError(
            f"{file}: {key}: expected shape (n,) or (n, 1), one class for each image, got shape {array.shape}"
        )
    if len(labels) != expected:
        raise ValueError(f"{file}: {key}: expected {expected} labels, one for each image, got {len(labels)}")
    return labels


def _npz_targets(file: Path, key: str, labels: NDArray[Any], classes: int, ignore_index: int | None) -> Tensor:
    """Labels int64 (n,), or probabilities float32 (n, K), once they are such of K classes, or of none."""
    if labels.ndim == 2:
        options = TargetOptions(ignore_index=ignore_index)
        targets = torch.from_numpy(labels.astype(np.float32))
        try:
            read_targets(targets, len(targets), classes, options, name=key)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        return targets
    known = labels if ignore_index is None else labels[labels != ignore_index]
    low, high = (int(known.min()), int(known.max())) if len(known) else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"{file}: {key}: expected values 0 to {classes - 1} for {classes} classes, got from {low} to {high}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _npz_classes(
    file: Path, names: NDArray[Any] | None, train_labels: NDArray[Any], ignore_index: int | None
) -> tuple[str, ...]:
    if names is not None:
        if names.ndim != 1 or names.dtype.kind != "U":
            raise ValueError(f"{file}: classes: expected strings (K,), got shape {names.shape}, dtype {names.dtype}")
        classes = tuple(readable(str(name)) for name in names)
    elif train_labels.ndim == 2:
        classes = tuple(str(label) for label in range(train_labels.shape[1]))
    else:
        known = train_labels if ignore_index is None else train_labels[train_labels != ignore_index]
        count = int(known.max()) + 1 if len(known) else 0
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
