"""A file of poisons: training images that somebody has changed, so that a network learns what they want; an .npz.

Shapes: n poisons of (C, H, W) images.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from immunity_fast.runtime.failures import one_line
from immunity_fast.runtime.files import write_atomically

LAYOUT = "expected an .npz file with indices and images"


class Poisons(NamedTuple):
    """Training images to put in the place of others, and what they are for.

    Args:
        indices: int64 (n,), rows of the training split, none twice.
        images: (n, C, H, W), uint8, or float32 in [0, 1].
        labels: int64 (n,), the classes that they get; None leaves them theirs: poisons of clean labels.
        fingerprint: `datasets.fingerprint` of the training split that they were made for, as it is without them.
        target_image: (C, H, W), uint8, or float32 in [0, 1]: what the poisons want to be classified wrongly.
        target_label: its true class.
        target_class: the class that it is to get.
        eps: the Linf radius within which the images were changed, in units of [0, 1].
    """

    indices: Tensor
    images: Tensor
    labels: Tensor | None = None
    fingerprint: str | None = None
    target_image: Tensor | None = None
    target_label: int | None = None
    target_class: int | None = None
    eps: float | None = None


def write(path: str | os.PathLike[str], poisons: Poisons) -> None:
    """Write a file that `read` reads, whole or not at all.

    Args:
        path: of the file.
        poisons: on any device; what is None is left out.

    Raises:
        ValueError: they are no such poisons; by name.
        OSError: the file cannot be written.
    """
    arrays: dict[str, Any] = {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for name, value in poisons._asdict().items()
        if value is not None
    }
    _checked(arrays)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(Path(path), content.getvalue())


def read(path: str | os.PathLike[str]) -> Poisons:
    """What a file of poisons has, on the CPU; arrays of other names are passed over.

    Args:
        path: of an .npz file with the arrays that `Poisons` names: `indices` and `images` at least.

    Raises:
        FileNotFoundError: no such file.
        ValueError: wrong content, with the file, the array, what was expected and what it has.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, {LAYOUT}")
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with path.open("rb") as stream:
            if stream.read(2) != b"PK":  # np.load would take it for a pickle
                raise ValueError("it is no zip archive")
            stream.seek(0)
            archive = np.load(stream, allow_pickle=False)
            arrays = {name: np.asarray(archive[name]) for name in Poisons._fields if name in archive.files}
    except Exception as error:  # a damaged archive can raise nearly anything
        reason = "it has Python objects" if "allow_pickle" in str(error) else one_line(error)
        raise ValueError(f"{path}: {LAYOUT}, got one that cannot be read ({reason})") from error
    try:
        return _checked(arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(arrays: dict[str, NDArray[Any]]) -> Poisons:
    """The poisons of these arrays.

    Raises:
        ValueError: one is missing, or is not what it ought to be; by name.
    """
    missing = [name for name in ("indices", "images") if name not in arrays]
    if missing:
        raise ValueError(f"{missing[0]}: expected indices and images, got no {' and no '.join(missing)}")
    images = _images("images", arrays["images"], 4, "(n, C, H, W)")
    indices = _rows("indices", arrays["indices"], len(images))
    if len(set(indices.tolist())) != len(indices):
        raise ValueError("indices: expected each row once, got one several times")
    target = None
    if "target_image" in arrays:
        target = _images("target_image", arrays["target_image"], 3, "(C, H, W)")
        if target.shape != images.shape[1:]:
            raise ValueError(f"target_image: expected {tuple(images.shape[1:])} as images, got {tuple(target.shape)}")
    classes = {name: _whole(name, arrays[name]) for name in ("target_label", "target_class") if name in arrays}
    if target is not None and "target_class" not in classes:
        raise ValueError("target_class: expected the class that target_image is to get, got none")
    eps = None
    if "eps" in arrays:
        eps = float(arrays["eps"]) if arrays["eps"].ndim == 0 and arrays["eps"].dtype.kind in "fiu" else math.nan
        if not 0 <= eps <= 1:
            raise ValueError(f"eps: expected a number of 0 to 1, got {_told(arrays['eps'])}")
    mark = arrays.get("fingerprint")
    if mark is not None and (mark.ndim or mark.dtype.kind != "U"):
        raise ValueError(f"fingerprint: expected a string, got {_told(mark)}")
    return Poisons(
        indices=indices,
        images=images,
        labels=_rows("labels", arrays["labels"], len(images)) if "labels" in arrays else None,
        fingerprint=None if mark is None else str(mark),
        target_image=target,
        target_label=classes.get("target_label"),
        target_class=classes.get("target_class"),
        eps=eps,
    )


def _images(name: str, array: NDArray[Any], dimensions: int, shape: str) -> Tensor:
    if array.dtype not in (np.uint8, np.float32) or array.ndim != dimensions or 0 in array.shape:
        raise ValueError(f"{name}: expected uint8 or float32 images {shape}, got {_told(array)}")
    if array.dtype == np.float32 and not bool(((array >= 0) & (array <= 1)).all()):
        raise ValueError(f"{name}: expected float32 in [0, 1], got values from {array.min()} to {array.max()}")
    return torch.from_numpy(np.ascontiguousarray(array))


def _rows(name: str, array: NDArray[Any], count: int) -> Tensor:
    """Whole numbers of at least 0, one for each image."""
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise ValueError(f"{name}: expected {count} integers, one for each image, got {_told(array)}")
    if int(array.min()) < 0 or int(array.max()) >= 2**63:
        raise ValueError(f"{name}: expected at least 0, got from {array.min()} to {array.max()}")
    return torch.from_numpy(array.astype(np.int64))


def _whole(name: str, array: NDArray[Any]) -> int:
    if array.ndim or array.dtype.kind not in "iu" or int(array) < 0:
        raise ValueError(f"{name}: expected a class number, got {_told(array)}")
    return int(array)


def _told(array: NDArray[Any]) -> str:
    return f"dtype {array.dtype}, shape {array.shape}" + (f", {array}" if array.ndim == 0 else "")
