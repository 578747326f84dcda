"""States of any shape in a checkpoint: what JSON can hold as JSON, tensors beside it; nothing is pickled."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def taken_apart(value: Any, where: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """A nested value as what JSON can hold, and the tensors that were in it, by number.

    Args:
        value: None, numbers, texts, bytes, tensors and NumPy's arrays, and lists, tuples and dictionaries of such.
        where: what an error calls it.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}
    return _plain(value, where, tensors), tensors


def put_together(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `taken_apart`.

    Raises:
        ValueError: it is not what that gives.
    """
    if isinstance(plain, list):
        return [put_together(each, tensors) for each in plain]
    if not isinstance(plain, dict):
        return plain
    try:
        ((kind, content),) = plain.items()
        if kind == "dict":
            return {put_together(key, tensors): put_together(each, tensors) for key, each in content}
        if kind == "tuple":
            return tuple(put_together(each, tensors) for each in content)
        if kind == "bytes":
            return base64.b64decode(content)
        if kind in ("tensor", "array"):
            return tensors[content] if kind == "tensor" else tensors[content].numpy()
        raise KeyError(kind)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"state: expected what a checkpoint has of one, got {type(plain).__name__}") from error


def _plain(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (Tensor, np.ndarray)):
        name = str(len(tensors))
        tensors[name] = value.detach() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return {"tensor" if isinstance(value, Tensor) else "array": name}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(k, where, tensors), _plain(v, f"{where}[{k!r}]", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        listed = [_plain(each, f"{where}[{index}]", tensors) for index, each in enumerate(value)]
        return listed if isinstance(value, list) else {"tuple": listed}
    raise TypeError(
        f"{where}: expected numbers, texts, tensors, and lists and dictionaries of such, which a checkpoint can hold, "
        f"got {type(value).__name__}"
    )
