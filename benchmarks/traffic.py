"""Bytes that the losses have to move, from shapes alone: what achieved bandwidth is counted against.

Each large tensor counts once for each pass over it that docs/kernels.md allows. Heatmaps, sums over space, targets and
gate are not counted: moving them is overhead, and lowers the bandwidth that is reported.
"""

from collections.abc import Sequence
from math import prod


def heatmap_losses_forward(shape: Sequence[int], itemsize: int, summed: bool = False) -> int:
    """Reads A and ∂y/∂A once, both of `shape` (N, B, C, h, w); or A and Σ_uv ∂y/∂A, (N, B, C), if it comes `summed`."""
    return (prod(shape) + prod(shape[:3] if summed else shape)) * itemsize


def heatmap_losses_backward(shape: Sequence[int], itemsize: int) -> int:
    """Reads A once and writes ∂L/∂A once, both of `shape` (N, B, C, h, w)."""
    return 2 * prod(shape) * itemsize


def cross_entropy_forward(shape: Sequence[int], itemsize: int) -> int:
    """Reads the logits, of `shape` (N, B, K), once."""
    return prod(shape) * itemsize


def cross_entropy_backward(shape: Sequence[int], itemsize: int) -> int:
    """Reads the logits, of `shape` (N, B, K), once and writes their gradient once."""
    return 2 * prod(shape) * itemsize
