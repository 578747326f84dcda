"""When an image is attacked no further: nobody who answers is right about it, so no accuracy can fall any more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ASKED_AT = (1, 4, 9)  # steps before which those who answer are asked, where that is a pass of its own


@dataclass(frozen=True)
class Settling:
    """Which images are settled: nobody who answers is right about them, whatever is drawn.

    Args:
        asked: (images (B, C, H, W), labels (B,)) to (B,) bool, by a pass of its own.
        seen: (what the attacked model's `observed` saw, labels (B,)) to the same, without one; None: what is attacked
            is not what answers.
    """

    asked: Callable[[Tensor, Tensor], Tensor]
    seen: Callable[[Any, Tensor], Tensor] | None = None
