"""A layer's output as maps (B, C, h, w), and the output again, made of them, so that they are in the logits' graph.

What comes is maps with their channels first or last, or the tokens of a transformer, bare or in a tuple.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from immunity_fast.runtime.outputs import kind_of

MapLayout = Literal["NCHW", "NHWC", "tokens"]
Reshape = Callable[[Tensor], Tensor]  # a layer's output to (B, C, h, w): pytorch-grad-cam's `reshape_transform`

MOST_SKEWED = 2.0  # how far a grid's sides may be from the images' aspect: patches cut off what is left of a side


@dataclass(frozen=True)
class Reading:
    """How a layer's output is read.

    Args:
        layout: "NCHW" for (B, C, h, w), "NHWC" for (B, h, w, C), "tokens" for (B, T, C), or a function to (B, C, h, w),
            which selects, reorders or averages.
        prefix: of tokens, how many come before those of the image: class token, distilled token, registers.
        overwritten: whether something behind the layer changes its output in place: it gets a copy.
        attention: whether attention follows, whose fast kernels cannot be differentiated twice.
    """

    layout: MapLayout | Reshape = "NCHW"
    prefix: int = 0
    overwritten: bool = False
    attention: bool = False


def read(output: Any, reading: Reading, sides: tuple[int, int]) -> tuple[Tensor, Any]:
    """Maps (B, C, h, w) of a layer's output, and an equal output that depends on them.

    Where gradients are enabled and the output needs none, as behind a frozen trunk, the maps begin a graph of their
    own: Grad-CAM differentiates what follows alone.

    Args:
        sides: (H, W) of the images.

    Raises:
        ValueError: no such output.
    """
    found, put_back = pick(output)
    if found is None or not found.is_floating_point():
        raise ValueError(f"layer: expected an output that holds a floating-point map, got {kind_of(output)}")
    if torch.is_grad_enabled() and not found.requires_grad and not found.is_inference():
        found = found.detach().requires_grad_()
    maps, onward = _split(found, reading, sides)
    return maps, put_back(onward.clone() if reading.overwritten else onward)


def pick(output: Any) -> tuple[Tensor | None, Callable[[Tensor], Any]]:
    """The map in a layer's output, and what puts another in its place.

    Of a tuple, list or dictionary it is the first tensor of three or four axes.
    """
    if isinstance(output, Tensor):
        return output, lambda tensor: tensor
    if isinstance(output, Mapping):
        for key, value in output.items():
            if _is_map(value):
                return value, lambda tensor, key=key: _with(output, key, tensor)
    elif isinstance(output, (tuple, list)):
        for index, value in enumerate(output):
            if _is_map(value):
                return value, lambda tensor, index=index: _replaced(output, index, tensor)
    return None, lambda tensor: tensor


def grid(cells: int, sides: tuple[int, int]) -> tuple[int, int] | None:
    """(h, w) of so many cells, of about the images' aspect; None where there is none."""
    wanted = math.log(sides[0] / sides[1])
    pairs = [(cells // width, width) for width in range(1, cells + 1) if cells % width == 0]
    best = min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1]) - wanted), default=None)
    if best is None or abs(math.log(best[0] / best[1]) - wanted) > math.log(MOST_SKEWED):
        return None
    return best


def find_prefix(tokens: int, sides: tuple[int, int], grids: Sequence[tuple[int, int]] = ()) -> int | None:
    """How many tokens come before those of the image; None where no number leaves a grid.

    Args:
        tokens: T.
        sides: (H, W) of the images.
        grids: (h, w) of the maps that convolutions gave, the embedding of patches among them: the fewest that leave
            such a grid, or one with halved sides. Without, the fewest that leave a grid of exactly the images' aspect.
    """
    known = [tokens - (h >> times) * (w >> times) for h, w in grids for times in range(6)]
    known = [prefix for prefix in known if 0 <= prefix < tokens]
    if known and grid(tokens - min(known), sides) is not None:
        return min(known)
    common = math.gcd(*sides)
    unit = (sides[0] // common) * (sides[1] // common)
    for prefix in range(tokens // 2 + 1):
        times, rest = divmod(tokens - prefix, unit)
        if rest == 0 and times > 0 and math.isqrt(times) ** 2 == times:
            return prefix
    return None


def _split(found: Tensor, reading: Reading, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maps, and a tensor equal to `found` in whose graph they are."""
    layout = reading.layout
    if layout == "tokens":
        return _split_tokens(found, reading.prefix, sides)
    if not isinstance(layout, str):
        return _split_by(layout, found)
    if found.dim() != 4:
        axes = "(B, h, w, C)" if layout == "NHWC" else "(B, C, h, w)"
        raise ValueError(f"layer: expected a map {axes}, got {tuple(found.shape)}")
    if layout == "NHWC":
        maps = found.movedim(-1, -3)
        return maps, maps.movedim(-3, -1)
    return found, found


def _split_tokens(found: Tensor, prefix: int, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if found.dim() != 3:
        raise ValueError(f"layer: expected tokens (B, T, C), got {tuple(found.shape)}")
    cells = grid(found.shape[1] - prefix, sides)
    if cells is None:
        raise ValueError(
            f"layer: expected tokens of a grid of the aspect of images of {sides[0]}×{sides[1]} behind {prefix} "
            f"others, got {found.shape[1]}"
        )
    maps = found[:, prefix:].transpose(1, 2)
    maps = maps.view(*maps.shape[:2], *cells)
    back = maps.flatten(2).transpose(1, 2)
    return maps, torch.cat([found[:, :prefix], back], 1) if prefix else back


def _split_by(reshape: Reshape, found: Tensor) -> tuple[Tensor, Tensor]:
    """By a linear function f: what it selects of the output comes back by its transpose, all else stays.

    The derivative of what follows by the maps is then f of that by the output, which is what pytorch-grad-cam takes.
    """
    selected, transposed = torch.func.vjp(reshape, found.detach())  # type: ignore[misc]
    if not isinstance(selected, Tensor) or selected.dim() != 4 or len(selected) != len(found):
        raise ValueError(f"reshape: expected maps (B, C, h, w) for {tuple(found.shape)}, got {kind_of(selected)}")
    of_output = reshape(found)
    maps = of_output.view_as(of_output)
    return maps, found - transposed(of_output)[0] + transposed(maps)[0]


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() in (3, 4) and value.is_floating_point()


def _with(output: Any, key: Any, tensor: Tensor) -> Any:
    changed = copy.copy(output)
    changed[key] = tensor
    return changed


def _replaced(output: Any, index: int, tensor: Tensor) -> Any:
    parts = [*output[:index], tensor, *output[index + 1 :]]
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
