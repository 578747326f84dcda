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
from immunity_fast.kernels.arithmetic import power_of_two
from immunity_fast.kernels.autograd import empty_grads


@triton.jit(do_not_specialize=["first_map", "samples"])
def _sums_kernel(
    gradients,  # maps (n, B, C, h, w) with the strides that follow
    sums,  # (N, B, C) float32, out
    expert_stride, sample_stride, channel_stride: tl.constexpr, row_stride: tl.constexpr, column_stride: tl.constexpr,
    first_map, samples, channels: tl.constexpr, cells: tl.constexpr, width: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_CELLS: tl.constexpr,
):  # fmt: skip
    """Σ_uv ∂y/∂A(u, v) for the maps that are larger than a tile; a program a map and block of channels."""
    index = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = channel < channels
    maps = gradients + (index // samples).to(tl.int64) * expert_stride + (index % samples).to(tl.int64) * sample_stride
    maps += channel.to(tl.int64)[:, None] * channel_stride
    total = tl.zeros([BLOCK_CHANNELS, BLOCK_CELLS], tl.float32)
    for start in range(0, cells, BLOCK_CELLS):
        cell = start + tl.arange(0, BLOCK_CELLS)
        offset = _offset(cell, width, row_stride, column_stride, FLAT)
        mask = exists[:, None] & (cell < cells)[None, :]
        total += tl.load(maps + offset[None, :], mask=mask, other=0).to(tl.float32)
    row = (first_map + index).to(tl.int64)
    tl.store(sums + row * channels + channel, tl.sum(total, 1), mask=exists)


@triton.jit(do_not_specialize=["first_map", "all_maps", "samples"])
def _scores_kernel(
    activations,  # maps (n, B, C, h, w)
    gradients,  # maps (n, B, C, h, w), or (n, B, C) if SUMMED
    sums,  # (N, B, C) float32, out if KEEP; else `gradients` is a part of it already
    partials,  # (splits, N, B, h·w) float32, out: Σ_k w_k A_k / 2^e over a split's channels
    peaks,  # (splits, N, B) float32, out: max_k |w_k|, whose power of two is 2^e
    a_expert, a_sample, a_channel: tl.constexpr, a_row: tl.constexpr, a_column: tl.constexpr,
    g_expert, g_sample, g_channel: tl.constexpr, g_row: tl.constexpr, g_column: tl.constexpr,
    first_map, all_maps, samples, channels: tl.constexpr, cells: tl.constexpr, width: tl.constexpr,
    scale,  # s of eq. (3)
    channels_per_program: tl.constexpr,
    SUMMED: tl.constexpr, KEEP: tl.constexpr, A_FLAT: tl.constexpr, G_FLAT: tl.constexpr,
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
    a_maps = activations + expert * a_expert + sample * a_sample
    a_maps += _offset(cell, width, a_row, a_column, A_FLAT)[None, :]
    g_maps = gradients + expert * g_expert + sample * g_sample
    g_offset = _offset(cell, width, g_row, g_column, G_FLAT)
    accumulator = tl.zeros([BLOCK_CHANNELS, BLOCK_CELLS], tl.float32)
    peak = tl.zeros([BLOCK_CHANNELS], tl.float32)
    begin = split * channels_per_program
    end = tl.minimum(begin + channels_per_program, channels)
    for start in range(begin, end, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        exists = channel < channels
        mask = exists[:, None] & inside[None, :]
        wide = channel.to(tl.int64)
        values = tl.load(a_maps + wide[:, None] * a_channel, mask=mask, other=0).to(tl.float32)
        if SUMMED:
            total = tl.load(g_maps + wide * g_channel, mask=exists, other=0).to(tl.float32)
        else:
            slopes = tl.load(g_maps + wide[:, None] * g_channel + g_offset[None, :], mask=mask, other=0)
            total = tl.sum(slopes.to(tl.float32), 1)
        if KEEP:
            tl.store(sums + row * channels + channel, total, mask=exists & (tl.program_id(2) == 0))
        weight = total * scale
        larger = tl.maximum(peak, tl.abs(weight))
        former, _ = power_of_two(peak)
        _, inverse = power_of_two(larger)
        accumulator = accumulator * (former * inverse)[:, None] + (weight * inverse)[:, None] * values
        peak = larger
    own, _ = power_of_two(peak)
    largest = tl.max(peak, 0)
    _, inverse = power_of_two(largest)
    score = tl.sum(accumulator * (own * inverse)[:, None], 0)
    place = split.to(tl.int64) * all_maps + row
    tl.store(partials + place * cells + cell, score, mask=inside)
    if tl.program_id(2) == 0:
        tl.store(peaks + place, largest)


@triton.jit(do_not_specialize=["first_map", "samples"])
def _scores_backward_kernel(
    activations,  # maps (n, B, C, h, w)
    sums,  # (N, B, C) float32: Σ_uv ∂y/∂A
    of_scores,  # (N, B, h·w) float32: 2^e·∂L/∂R
    inverses,  # (N, B) float32: 2^−e, the inverse scale of the weights
    of_activations,  # maps (n, B, C, h, w), out: ∂L/∂A = w·∂L/∂R
    of_sums,  # (N, B, C), out: ∂L/∂(Σ_uv ∂y/∂A) = s·Σ_uv A·∂L/∂R
    a_expert, a_sample, a_channel: tl.constexpr, a_row: tl.constexpr, a_column: tl.constexpr,
    d_expert, d_sample, d_channel: tl.constexpr, d_row: tl.constexpr, d_column: tl.constexpr,
    first_map, samples, channels: tl.constexpr, cells: tl.constexpr, width: tl.constexpr,
    scale,  # s of eq. (3)
    channels_per_program: tl.constexpr,
    ACTIVATIONS: tl.constexpr, SUMS: tl.constexpr,  # which of the two results are wanted
    A_FLAT: tl.constexpr, D_FLAT: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_CELLS: tl.constexpr,
):  # fmt: skip
    """Both derivatives of R = Σ_k w_k A_k in one pass over A; a program a map and split of its channels."""
    index = tl.program_id(0)
    expert = (index // samples).to(tl.int64)
    sample = (index % samples).to(tl.int64)
    row = (first_map + index).to(tl.int64)
    inverse = tl.load(inverses + row)
    a_maps = activations + expert * a_expert + sample * a_sample
    d_maps = of_activations + expert * d_expert + sample * d_sample
    begin = tl.program_id(1) * channels_per_program
    end = tl.minimum(begin + channels_per_program, channels)
    for start in range(begin, end, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        exists = channel < channels
        wide = channel.to(tl.int64)
        place = row * channels + channel
        weight = tl.load(sums + place, mask=exists, other=0) * scale * inverse
        product = tl.zeros([BLOCK_CHANNELS, BLOCK_CELLS], tl.float32)
        for first_cell in range(0, cells, BLOCK_CELLS):
            cell = first_cell + tl.arange(0, BLOCK_CELLS)
            inside = cell < cells
            mask = exists[:, None] & inside[None, :]
            slope = tl.load(of_scores + row * cells + cell, mask=inside, other=0)
            if SUMS:
                offset = _offset(cell, width, a_row, a_column, A_FLAT)
                values = tl.load(a_maps + wide[:, None] * a_channel + offset[None, :], mask=mask, other=0)
                product += values.to(tl.float32) * slope[None, :]
            if ACTIVATIONS:
                offset = _offset(cell, width, d_row, d_column, D_FLAT)
                result = (weight[:, None] * slope[None, :]).to(of_activations.dtype.element_ty)
                tl.store(d_maps + wide[:, None] * d_channel + offset[None, :], result, mask=mask)
        if SUMS:
            result = (tl.sum(product, 1) * inverse * scale).to(of_sums.dtype.element_ty)
            tl.store(of_sums + place, result, mask=exists)


@triton.jit
def _offset(cell, width, row_stride, column_stride, FLAT: tl.constexpr):
    """Where cell (u, v) = (cell // width, cell % width) lies in its map."""
    if FLAT:
        offset = cell.to(tl.int64) * column_stride
    else:
        offset = (cell // width).to(tl.int64) * row_stride + (cell % width).to(tl.int64) * column_stride
    return offset


class Scores(NamedTuple):
    """R in pieces, as `scores` leaves it: R = Σ_split partials·2^⌊log2 peaks⌋."""

    partials: Tensor  # (splits, N, B, h·w) float32
    peaks: Tensor  # (splits, N, B) float32
    sums: Tensor  # (N, B, C) float32: Σ_uv ∂y/∂A


def scores(activations: Sequence[Tensor], gradients: Sequence[Tensor], scale: float) -> Scores:
    """R of parts (n, B, C, h, w) and ∂y/∂A of the same shapes, or already summed over space, (n, B, C). B ≥ 1.

    One launch a part; two where a map is larger than a tile and its gradients are still to be summed.
    """
    samples, channels, height, width = activations[0].shape[1:]
    cells = height * width
    maps = sum(part.shape[0] for part in activations) * samples
    tiles = [launch.tile(part) for part in activations]  # parts may differ in layout, but not in the number of splits
    per_program = [launch.channels_per_program(channels, t.block_channels, maps, launch.MAX_SPLITS) for t in tiles]
    splits = max(-(-channels // each) for each in per_program)
    new = activations[0].new_empty
    sums = new((maps // samples, samples, channels), dtype=torch.float32)
    partials = new((splits, maps // samples, samples, cells), dtype=torch.float32)
    peaks = new((splits, maps // samples, samples), dtype=torch.float32)
    first_map = 0
    with launch.on_device(sums):
        for part, slopes, each, chunk in zip(activations, gradients, tiles, per_program, strict=True):
            keep = slopes.dim() == 3 or cells <= each.block_cells
            if not keep:
                slopes = _sum_over_space(slopes, sums, first_map, each)
            summed = slopes.dim() == 3
            a = launch.strides(part)
            g = launch.strides(slopes[..., None, None] if summed else slopes)
            grid = (part.shape[0] * samples, splits, -(-cells // each.block_cells))
            _scores_kernel[grid](
                part, slopes, sums, partials, peaks, *a[:5], *g[:5],
                first_map, maps, samples, channels, cells, width, scale, chunk,
                SUMMED=summed, KEEP=keep, A_FLAT=a.flat, G_FLAT=g.flat,
                BLOCK_CHANNELS=each.block_channels, BLOCK_CELLS=each.block_cells, num_warps=each.num_warps,
            )  # fmt: skip
            first_map += part.shape[0] * samples
    return Scores(partials, peaks, sums)


def _sum_over_space(gradients: Tensor, sums: Tensor, first_map: int, each: launch.Tile) -> Tensor:
    """The part's rows of `sums` (N, B, C), filled."""
    experts, samples, channels, height, width = gradients.shape
    g = launch.strides(gradients)
    _sums_kernel[(experts * samples, -(-channels // each.block_channels))](
        gradients, sums, *g[:5], first_map, samples, channels, height * width, width,
        FLAT=g.flat, BLOCK_CHANNELS=each.block_channels, BLOCK_CELLS=each.block_cells, num_warps=each.num_warps,
    )  # fmt: skip
    first = first_map // samples
    return sums[first : first + experts]


def scores_backward(
    of_scores: Tensor,
    inverses: Tensor,
    activations: Sequence[Tensor],
    sums: Tensor,
    dtype: torch.dtype,
    scale: float,
    *,
    needs_activations: bool,
    needs_sums: bool,
) -> tuple[list[Tensor], Tensor]:
    """∂L/∂A, one tensor a part in the memory layout of that part, and ∂L/∂Σ_uv(∂y/∂A), (N, B, C) in `dtype`.

    Args:
        of_scores: (N, B, h·w) float32, 2^e·∂L/∂R.
        inverses: (N, B) float32, 2^−e.
        needs_activations, needs_sums: what is not wanted is an empty list or tensor, and costs nothing.
    """
    samples, channels, height, width = activations[0].shape[1:]
    of_activations, of_sums = empty_grads(activations, sums, dtype, needs_activations, needs_sums)
    first_map = 0
    with launch.on_device(sums):
        for part, result in zip(activations, of_activations or activations, strict=True):
            each = launch.tile(part)
            chunk = launch.channels_per_program(channels, each.block_channels, sums.shape[0] * samples, 1 << 16)
            a, d = launch.strides(part), launch.strides(result)
            _scores_backward_kernel[(part.shape[0] * samples, -(-channels // chunk))](
                part, sums, of_scores, inverses, result, of_sums, *a[:5], *d[:5],
                first_map, samples, channels, height * width, width, scale, chunk,
                ACTIVATIONS=needs_activations, SUMS=needs_sums, A_FLAT=a.flat, D_FLAT=d.flat,
                BLOCK_CHANNELS=each.block_channels, BLOCK_CELLS=each.block_cells, num_warps=each.num_warps,
            )  # fmt: skip
            first_map += part.shape[0] * samples
    return of_activations, of_sums
