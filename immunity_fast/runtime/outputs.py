"""Logits of what a network returns: a tensor, or a library's object that has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def logits_of(output: Any) -> Any:
    """The logits of an output object (``.logits``) or a dictionary ("logits"), or first in a tuple; a tensor is itself.

    So do Hugging Face's image classifiers return them, and torchvision's Inception and GoogLeNet in training mode.
    What has none is returned as it is.
    """
    if isinstance(output, Tensor):
        return output
    for found in (
        getattr(output, "logits", None),
        output.get("logits") if isinstance(output, Mapping) else None,
        output[0] if isinstance(output, (tuple, list)) and output else None,
    ):
        if isinstance(found, Tensor):
            return found
    return output


def check_logits(name: str, index: int, output: Any, samples: int) -> Tensor:
    """The logits (B, K) of what network number `index` returned.

    Raises:
        ValueError: it holds none.
    """
    logits = logits_of(output)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != samples:
        raise ValueError(f"{name}: expected logits ({samples}, K) of number {index}, got {kind_of(output)}")
    return logits


def kind_of(output: Any) -> str:
    """What something is, in a word or two for a message."""
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"{type(output).__name__} of {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {', '.join(kind_of(part) for part in output) or 'nothing'}"
    return type(output).__name__
