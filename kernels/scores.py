"""Grad-CAM's contraction R = Σ_k w_k A_k with w_k = s·Σ_uv ∂y/∂A_k(u, v), eq. (3), and its derivative, in Triton.

These two kernels read and write everything that is large; what follows them works on maps of h×w cells. Activations and
gradients come in parts, tensors (n, B, C, h, w) whose n add up to N: one tensor, or one an expert, in their own memory.

What belongs to the network (C, h, w and the strides within a map) is known when a kernel is compiled, so that the
compiler sees which loads can be 16 bytes wide. Of the batch only the number of splits is, a power of two.

    forward   reads A and ∂y/∂A once          writes R (N, B, h·w) in float32, and Σ_uv ∂y/∂A (N, B, C)
    backward  reads A once                    writes ∂L/∂A once, and Σ_uv A·∂L/∂R (N, B, C)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from immunity_fast.kernels import launch
from immunity_fast.kernels.arithmetic import exact_scale
from immunity_fast.kernels.autograd import empty_grads


@triton.jit(do_not_specialize=["first_map", "samples"])
def _sums_kernel(
    gradients_ptr,  # maps (n, B, C, h, w) float32, bfloat16 or float16
    sums_ptr,  # (N, B, C) float32, out
    gradients_stride_n, gradients_stride_b, gradients_stride_c: tl.constexpr,
    gradients_stride_h: tl.constexpr, gradients_stride_w: tl.constexpr,
    first_map, samples, channels: tl.constexpr, cells: tl.constexpr, width: tl.constexpr,
    GRADIENTS_FLAT: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_CELLS: tl.constexpr,
):  # fmt: skip
    """Σ_uv ∂y/∂A(u, v) for the maps that are larger than a tile; a program a map and block of channels."""
    index = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = channel < channels
    channel_ptrs = gradients_ptr + (index // samples).to(tl.int64) * gradients_stride_n
    channel_ptrs += (index % samples).to(tl.int64) * gradients_stride_b
    channel_ptrs += channel.to(tl.int64)[:, None] * gradients_stride_c
    total = tl.zeros([BLOCK_CHANNELS, BLOCK_CELLS], tl.float32)
    for start in range(0, cells, BLOCK_CELLS):
        cell = start + tl.arange(0, BLOCK_CELLS)
        offset = _offset(cell, width, gradients_stride_h, gradients_stride_w, GRADIENTS_FLAT)
        mask = exists[:, None] & (cell < cells)[None, :]
        total += tl.load(channel_ptrs + offset[None, :], mask=mask, other=0).to(tl.float32)
    row = (first_map + index).to(tl.int64)
    tl.store(sums_ptr + row * channels + channel, tl.sum(total, 1), mask=exists)


@triton.jit(do_not_specialize=["first_map", "all_maps", "samples"])
def _scores_kernel(
    activations_ptr,  # maps (n, B, C, h, w) float32, bfloat16 or float16
    gradients_ptr,  # maps (n, B, C, h, w), or (n, B, C) if SUMMED; float32, bfloat16 or float16
    sums_ptr,  # (N, B, C) float32, out if KEEP; else `gradients` is a part of it already
    partials_ptr,  # (splits, N, B, h·w) float32, out: Σ_k w_k A_k / 2^e over a split's channels
    peaks_ptr,  # (splits, N, B) float32, out: max_k |w_k|, whose power of two is 2^e
    activations_stride_n, activations_stride_b, activations_stride_c: tl.constexpr,
    activations_stride_h: tl.constexpr, activations_stride_w: tl.constexpr,
    gradients_stride_n, gradients_stride_b, gradients_stride_c: tl.constexpr,
    gradients_stride_h: tl.constexpr, gradients_stride_w: tl.constexpr,
    first_map, all_maps, samples, channels: tl.constexpr, cells: tl.constexpr, width: tl.constexpr,
    scale,  # s of eq. (3)
    channels_per_program: tl.constexpr,
    SUMMED: tl.constexpr, KEEP: tl.constexpr, ACTIVATIONS_FLAT: tl.constexpr, GRADIENTS_FLAT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_CELLS: tl.constexpr,
):  # fmt: skip
    """R of one map, from the channels of one split; a program a map, split and (if SUMMED) tile of cells.

    Weights and activations of magnitude 1e30 must not overflow, nor those of 1e-30 vanish, and the losses do not see a
    map's scale. So each row of the tile is kept in units of the power of two of its largest weight so far.
    """
    index = tl.program_id(0)
    split = tl.program_id(1)
    expert = (index // samples).to(tl.int64)
    sample = (index % samples).to(tl.int64)
    row = (first_map + index).to(tl.int64)
    cell = tl.program_id(2) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    inside = cell < cells
    activation_ptrs = activations_ptr + expert * activations_stride_n + sample * activations_stride_b
    activation_ptrs += _offset(cell, width, activations_stride_h, activations_stride_w, ACTIVATIONS_FLAT)[None, :]
    gradient_map_ptr = gradients_ptr + expert * gradients_stride_n + sample * gradients_stride_b
    gradient_offset = _offset(cell, width, gradients_stride_h, gradients_stride_w, GRADIENTS_FLAT)
    accumulator = tl.zeros([BLOCK_CHANNELS, BLOCK_CELLS], tl.float32)
    peak = tl.zeros([BLOCK_CHANNELS], tl.float32)
    begin = split * channels_per_program
    end = tl.minimum(begin + channels_per_program, channels)
    for start in range(begin, end, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        exists = channel < channels
        mask = exists[:, None] & inside[None, :]
        wide = channel.to(tl.int64)
        activation = tl.load(activation_ptrs + wide[:, None] * activations_stride_c, mask=mask, other=0).to(tl.float32)
        gradient_ptrs = gradient_map_ptr + wide * gradients_stride_c
        if SUMMED:
            total = tl.load(gradient_ptrs, mask=exists, other=0).to(tl.float32)
        else:
            gradient = tl.load(gradient_ptrs[:, None] + gradient_offset[None, :], mask=mask, other=0)
            total = tl.sum(gradient.to(tl.float32), 1)
        if KEEP:
            tl.store(sums_ptr + row * channels + channel, total, mask=exists & (tl.program_id(2) == 0))
        weight = total * scale
        larger = tl.maximum(peak, tl.abs(weight))
        former, _ = exact_scale(peak)
        _, inverse = exact_scale(larger)
        accumulator = accumulator * (former * inverse)[:, None] + (weight * inverse)[:, None] * activation
        peak = larger
    own, _ = exact_scale(peak)
    largest = tl.max(peak, 0)
    _, inverse = exact_scale(largest)
    score = tl.sum(accumulator * (own * inverse)[:, None], 0)
    place = split.to(tl.int64) * all_maps + row
    tl.store(partials_ptr + place * cells + cell, score, mask=inside)
    if tl.program_id(2) == 0:
        tl.store(peaks_ptr + place, largest)


@triton.jit(do_not_specialize=["first_map", "samples"])
def _scores_backward_kernel(
    activations_ptr,  # maps (n, B, C, h, w) float32, bfloat16 or float16
    sums_ptr,  # (N, B, C) float32: Σ_uv ∂y/∂A
    grad_scores_ptr,  # (N, B, h·w) float32: 2^e·∂L/∂R
    inverses_ptr,  # (N, B) float32: 2^−e, the inverse scale of the weights
    grad_activations_ptr,  # maps (n, B, C, h, w) in the dtype of A, out: ∂L/∂A = w·∂L/∂R
    grad_sums_ptr,  # (N, B, C) float32, bfloat16 or float16, out: ∂L/∂(Σ_uv ∂y/∂A) = s·Σ_uv A·∂L/∂R
    activations_stride_n, activations_stride_b, activations_stride_c: tl.constexpr,
    activations_stride_h: tl.constexpr, activations_stride_w: tl.constexpr,
    grad_activations_stride_n, grad_activations_stride_b, grad_activations_stride_c: tl.constexpr,
    grad_activations_stride_h: tl.constexpr, grad_activations_stride_w: tl.constexpr,
    first_map, samples, channels: tl.constexpr, cells: tl.constexpr, width: tl.constexpr,
    scale,  # s of eq. (3)
    channels_per_program: tl.constexpr,
    NEEDS_ACTIVATIONS: tl.constexpr, NEEDS_SUMS: tl.constexpr,  # which of the two results are wanted
    ACTIVATIONS_FLAT: tl.constexpr, GRAD_ACTIVATIONS_FLAT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_CELLS: tl.constexpr,
):  # fmt: skip
    """Both derivatives of R = Σ_k w_k A_k in one pass over A; a program a map and split of its channels."""
    index = tl.program_id(0)
    expert = (index // samples).to(tl.int64)
    sample = (index % samples).to(tl.int64)
    row = (first_map + index).to(tl.int64)
    inverse = tl.load(inverses_ptr + row)
    activation_map_ptr = activations_ptr + expert * activations_stride_n + sample * activations_stride_b
    grad_map_ptr = grad_activations_ptr + expert * grad_activations_stride_n + sample * grad_activations_stride_b
    begin = tl.program_id(1) * channels_per_program
    end = tl.minimum(begin + channels_per_program, channels)
    for start in range(begin, end, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        exists = channel < channels
        wide = channel.to(tl.int64)
        place = row * channels + channel
        weight = tl.load(sums_ptr + place, mask=exists, other=0) * scale * inverse
        product = tl.zeros([BLOCK_CHANNELS, BLOCK_CELLS], tl.float32)
        for first_cell in range(0, cells, BLOCK_CELLS):
            cell = first_cell + tl.arange(0, BLOCK_CELLS)
            inside = cell < cells
            mask = exists[:, None] & inside[None, :]
            grad_score = tl.load(grad_scores_ptr + row * cells + cell, mask=inside, other=0)
            if NEEDS_SUMS:
                offset = _offset(cell, width, activations_stride_h, activations_stride_w, ACTIVATIONS_FLAT)
                activation_ptrs = activation_map_ptr + wide[:, None] * activations_stride_c + offset[None, :]
                product += tl.load(activation_ptrs, mask=mask, other=0).to(tl.float32) * grad_score[None, :]
            if NEEDS_ACTIVATIONS:
                offset = _offset(
                    cell, width, grad_activations_stride_h, grad_activations_stride_w, GRAD_ACTIVATIONS_FLAT
                )
                grad_activation = (weight[:, None] * grad_score[None, :]).to(grad_activations_ptr.dtype.element_ty)
                grad_activation_ptrs = grad_map_ptr + wide[:, None] * grad_activations_stride_c + offset[None, :]
                tl.store(grad_activation_ptrs, grad_activation, mask=mask)
        if NEEDS_SUMS:
            grad_sum = (tl.sum(product, 1) * inverse * scale).to(grad_sums_ptr.dtype.element_ty)
            tl.store(grad_sums_ptr + place, grad_sum, mask=exists)


@triton.jit
def _offset(cell, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Where cell (u, v) = (cell // width, cell % width) lies in its map."""
    if FLAT:
        offset = cell.to(tl.int64) * stride_w
    else:
        offset = (cell // width).to(tl.int64) * stride_h + (cell % width).to(tl.int64) * stride_w
    return offset


class Scores(NamedTuple):
    """R in pieces, as `scores` leaves it: R = Σ_split partials·2^⌊log2 peaks⌋."""

    partials: Tensor  # (splits, N, B, h·w) float32
    peaks: Tensor  # (splits, N, B) float32
    sums: Tensor  # (N, B, C) float32: Σ_uv ∂y/∂A


def scores(activations: Sequence[Tensor], gradients: Sequence[Tensor], scale: float) -> Scores:
    """R of eq. (3) before its ReLU. One launch a part; two where a map is larger than a tile and comes not yet summed.

    Args:
        activations: parts (n, B, C, h, w), float32, bfloat16 or float16, of any strides; B ≥ 1.
        gradients: ∂y/∂A in as many parts, of the same shapes, or summed over space, (n, B, C).
        scale: s of eq. (3).

    Returns:
        R in pieces, and the sums over space that the backward pass needs.
    """
    samples, channels, height, width = activations[0].shape[1:]
    cells = height * width
    maps = sum(part.shape[0] for part in activations) * samples
    tiles = [launch.tile(part) for part in activations]  # parts may differ in layout, but not in the number of splits
    per_program = [
        launch.channels_per_program(channels, tile.block_channels, maps, launch.MAX_SPLITS) for tile in tiles
    ]
    splits = max(triton.cdiv(channels, count) for count in per_program)
    new = activations[0].new_empty
    sums = new((maps // samples, samples, channels), dtype=torch.float32)
    partials = new((splits, maps // samples, samples, cells), dtype=torch.float32)
    peaks = new((splits, maps // samples, samples), dtype=torch.float32)
    first_map = 0
    with launch.on_device(sums):
        for maps_part, gradients_part, tile, count in zip(activations, gradients, tiles, per_program, strict=True):
            keep = gradients_part.dim() == 3 or cells <= tile.block_cells
            if not keep:
                gradients_part = _sum_over_space(gradients_part, sums, first_map, tile)
            summed = gradients_part.dim() == 3
            of_activations = launch.strides(maps_part)
            of_gradients = launch.strides(gradients_part[..., None, None] if summed else gradients_part)
            grid = (maps_part.shape[0] * samples, splits, triton.cdiv(cells, tile.block_cells))
            _scores_kernel[grid](
                maps_part, gradients_part, sums, partials, peaks, *of_activations.elements, *of_gradients.elements,
                first_map, maps, samples, channels, cells, width, scale, count,
                SUMMED=summed, KEEP=keep, ACTIVATIONS_FLAT=of_activations.flat, GRADIENTS_FLAT=of_gradients.flat,
                BLOCK_CHANNELS=tile.block_channels, BLOCK_CELLS=tile.block_cells, num_warps=tile.num_warps,
            )  # fmt: skip
            first_map += maps_part.shape[0] * samples
    return Scores(partials, peaks, sums)


def _sum_over_space(gradients: Tensor, sums: Tensor, first_map: int, tile: launch.Tile) -> Tensor:
    """Fills the rows of `sums` (N, B, C) that belong to a part (n, B, C, h, w), and returns them, (n, B, C)."""
    experts, samples, channels, height, width = gradients.shape
    strides = launch.strides(gradients)
    _sums_kernel[(experts * samples, triton.cdiv(channels, tile.block_channels))](
        gradients, sums, *strides.elements, first_map, samples, channels, height * width, width,
        GRADIENTS_FLAT=strides.flat,
        BLOCK_CHANNELS=tile.block_channels, BLOCK_CELLS=tile.block_cells, num_warps=tile.num_warps,
    )  # fmt: skip
    first = first_map // samples
    return sums[first : first + experts]


def scores_backward(
    grad_scores: Tensor,
    inverses: Tensor,
    activations: Sequence[Tensor],
    sums: Tensor,
    dtype: torch.dtype,
    scale: float,
    *,
    needs_activations: bool,
    needs_sums: bool,
) -> tuple[list[Tensor], Tensor]:
    """Both derivatives of R. One launch a part.

    Args:
        grad_scores: 2^e·∂L/∂R, (N, B, h·w) float32.
        inverses: 2^−e, (N, B) float32.
        activations: as of `scores`.
        sums: Σ_uv ∂y/∂A, (N, B, C) float32.
        dtype: of the second result.
        scale: s of eq. (3).
        needs_activations: whether the first result is wanted; if not it is an empty list, and costs nothing.
        needs_sums: whether the second is; if not it is an empty tensor.

    Returns:
        ∂L/∂A, one tensor a part in the part's dtype and memory layout, and ∂L/∂Σ_uv(∂y/∂A), (N, B, C).
    """
    samples, channels, height, width = activations[0].shape[1:]
    grad_activations, grad_sums = empty_grads(activations, sums, dtype, needs_activations, needs_sums)
    first_map = 0
    with launch.on_device(sums):
        for part, grad_part in zip(activations, grad_activations or activations, strict=True):
            tile = launch.tile(part)
            count = launch.channels_per_program(channels, tile.block_channels, sums.shape[0] * samples, 1 << 16)
            strides, grad_strides = launch.strides(part), launch.strides(grad_part)
            _scores_backward_kernel[(part.shape[0] * samples, triton.cdiv(channels, count))](
                part, sums, grad_scores, inverses, grad_part, grad_sums, *strides.elements, *grad_strides.elements,
                first_map, samples, channels, height * width, width, scale, count,
                NEEDS_ACTIVATIONS=needs_activations, NEEDS_SUMS=needs_sums,
                ACTIVATIONS_FLAT=strides.flat, GRAD_ACTIVATIONS_FLAT=grad_strides.flat,
                BLOCK_CHANNELS=tile.block_channels, BLOCK_CELLS=tile.block_cells, num_warps=tile.num_warps,
            )  # fmt: skip
            first_map += part.shape[0] * samples
    return grad_activations, grad_sums
