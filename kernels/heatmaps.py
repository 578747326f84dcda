"""Grad-CAM heatmaps, eq. (3), not normalised, and their derivative, in Triton.

forward    scores → heatmaps                      ReLU and resampling; a program a map
backward   heatmaps_backward → scores_backward    the adjoint, ReLU's mask; a program a map and tile of cells
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from immunity_fast.kernels import launch
from immunity_fast.kernels.arithmetic import exact_scale, resample, resample_adjoint
from immunity_fast.kernels.autograd import (
    broadcast_over_space,
    common_dtype,
    describe,
    empty_grads,
    refuse_second_derivative,
)
from immunity_fast.kernels.scores import scores, scores_backward


@triton.jit(do_not_specialize=["maps"])
def _heatmaps_kernel(
    partials_ptr,  # (splits, N, B, h·w) float32
    peaks_ptr,  # (splits, N, B) float32
    scores_ptr,  # (N, B, h·w) float32, out: R
    heatmaps_ptr,  # (N, B, H, W) float32, out
    maps, height: tl.constexpr, width: tl.constexpr, out_height: tl.constexpr, out_width: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """One map: R from its splits, ReLU, bilinear resampling."""
    row = tl.program_id(0).to(tl.int64)
    cells = height * width
    pixels = out_height * out_width
    for start in range(0, cells, BLOCK_CELLS):
        cell = start + tl.arange(0, BLOCK_CELLS)
        score = tl.zeros([BLOCK_CELLS], tl.float32)
        for split in range(SPLITS):
            scale, _ = exact_scale(tl.load(peaks_ptr + split * maps.to(tl.int64) + row))
            place = (split * maps.to(tl.int64) + row) * cells + cell
            score += tl.load(partials_ptr + place, mask=cell < cells, other=0) * scale
        tl.store(scores_ptr + row * cells + cell, score, mask=cell < cells)
    tl.debug_barrier()  # what follows reads scores that other threads of this program have written
    for start in range(0, pixels, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        heat = resample(
            scores_ptr + row * cells, pixel // out_width, pixel % out_width,
            height, width, out_height, out_width, pixel < pixels,
        )  # fmt: skip
        tl.store(heatmaps_ptr + row * pixels + pixel, heat, mask=pixel < pixels)


@triton.jit(do_not_specialize=["samples"])
def _heatmaps_backward_kernel(
    grad_heatmaps_ptr,  # (N, B, H, W) float32
    grad_heatmaps_stride_n, grad_heatmaps_stride_b, grad_heatmaps_stride_h, grad_heatmaps_stride_w,
    scores_ptr,  # (N, B, h·w) float32
    grad_scores_ptr,  # (N, B, h·w) float32, out
    samples, height: tl.constexpr, width: tl.constexpr, out_height: tl.constexpr, out_width: tl.constexpr,
    ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr, BLOCK_CELLS: tl.constexpr,
):  # fmt: skip
    """∂L/∂R = [R > 0]·Wᵀ(∂L/∂h) of one tile of one map's cells."""
    row = tl.program_id(0).to(tl.int64)
    cells = height * width
    cell = tl.program_id(1) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    inside = cell < cells
    image_ptr = grad_heatmaps_ptr
    image_ptr += (row // samples) * grad_heatmaps_stride_n + (row % samples) * grad_heatmaps_stride_b
    grad_score = resample_adjoint(
        image_ptr, grad_heatmaps_stride_h, grad_heatmaps_stride_w, cell // width, cell % width,
        height, width, out_height, out_width, inside, ROW_TAPS, COLUMN_TAPS,
    )  # fmt: skip
    score = tl.load(scores_ptr + row * cells + cell, mask=inside, other=0)
    tl.store(grad_scores_ptr + row * cells + cell, tl.where(score > 0, grad_score, 0), mask=inside)


@torch.library.custom_op("immunity_fast::gradcam_heatmaps", mutates_args=())
def gradcam_heatmaps(
    activations: list[Tensor], gradients: list[Tensor], size: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Grad-CAM heatmaps, eq. (3), not normalised.

    Args:
        activations: parts (n, B, C, h, w), float32, bfloat16 or float16, of any strides.
        gradients: ∂y/∂A in as many parts, of the same shapes, or summed over space, (n, B, C).
        size: [H, W] of the heatmaps.
        scale: s of eq. (3).

    Returns:
        Heatmaps (N, B, H, W) float32, and two tensors that only the backward pass has a use for: Σ_uv ∂y/∂A (N, B, C)
        and R (N, B, h·w), float32.
    """
    samples, _, height, width = activations[0].shape[1:]
    heatmaps, sums, all_scores = _empty(activations, size)
    if samples == 0:
        return heatmaps, sums, all_scores
    found = scores(activations, gradients, scale)
    maps, cells, pixels = heatmaps.shape[0] * samples, height * width, size[0] * size[1]
    with launch.on_device(heatmaps):
        _heatmaps_kernel[(maps,)](
            found.partials, found.peaks, all_scores, heatmaps, maps, height, width, *size,
            SPLITS=found.partials.shape[0],
            BLOCK_CELLS=launch.block_within(cells),
            BLOCK_PIXELS=launch.block_within(pixels),
            num_warps=4,
        )  # fmt: skip
    return heatmaps, found.sums, all_scores


@gradcam_heatmaps.register_fake
def _(activations, _gradients, size, _scale):
    return _empty(activations, size)


def _empty(activations: list[Tensor], size: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the heatmaps, the sums and the scores."""
    samples, channels, height, width = activations[0].shape[1:]
    experts = sum(part.shape[0] for part in activations)

    def new(*shape: int) -> Tensor:
        return activations[0].new_empty((experts, samples, *shape), dtype=torch.float32)

    return new(*size), new(channels), new(height * width)


@torch.library.custom_op("immunity_fast::gradcam_heatmaps_backward", mutates_args=())
def gradcam_heatmaps_backward(
    grad_heatmaps: Tensor,
    activations: list[Tensor],
    sums: Tensor,
    all_scores: Tensor,
    scale: float,
    dtype: torch.dtype,
    needs_activations: bool,
    needs_sums: bool,
) -> tuple[list[Tensor], Tensor]:
    """Both derivatives of `gradcam_heatmaps`.

    Args:
        grad_heatmaps: ∂L/∂h, (N, B, H, W) float32, of any strides.
        activations: as they were given.
        sums: Σ_uv ∂y/∂A, as they were returned, (N, B, C) float32.
        all_scores: R, as it was returned, (N, B, h·w) float32.
        scale: as it was given.
        dtype: of the second result.
        needs_activations: whether the first result is wanted; if not it is an empty list.
        needs_sums: whether the second is; if not it is an empty tensor.

    Returns:
        ∂L/∂A, a part each, and ∂L/∂Σ_uv(∂y/∂A), (N, B, C).
    """
    experts, samples, cells = all_scores.shape
    height, width = activations[0].shape[3:]
    out_height, out_width = grad_heatmaps.shape[2:]
    if samples == 0:
        return empty_grads(activations, sums, dtype, needs_activations, needs_sums)
    grad_scores = torch.empty_like(all_scores)
    row_taps, column_taps = launch.taps(height, out_height), launch.taps(width, out_width)
    block_cells = launch.adjoint_cells(cells, row_taps, column_taps)
    with launch.on_device(sums):
        _heatmaps_backward_kernel[(experts * samples, triton.cdiv(cells, block_cells))](
            grad_heatmaps, *grad_heatmaps.stride(), all_scores, grad_scores,
            samples, height, width, out_height, out_width,
            ROW_TAPS=row_taps, COLUMN_TAPS=column_taps,
            BLOCK_CELLS=block_cells, num_warps=4, **launch.SAME_BITS,
        )  # fmt: skip
    ones = sums.new_ones((experts, samples))
    return scores_backward(
        grad_scores,
        ones,
        activations,
        sums,
        dtype,
        scale,
        needs_activations=needs_activations,
        needs_sums=needs_sums,
    )


@gradcam_heatmaps_backward.register_fake
def _(_grad_heatmaps, activations, sums, *rest):
    return empty_grads(activations, sums, *rest[-3:])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps of inputs and outputs what `backward` needs."""
    activations, gradients, _, ctx.scale = inputs
    ctx.gradient_specs = describe(gradients)
    ctx.save_for_backward(*activations, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def backward(ctx: Any, grad_heatmaps: Tensor, *_: None) -> tuple[Any, ...]:
    """The derivative with respect to each input, None where there is none, from ∂L/∂h."""
    *activations, sums, all_scores = ctx.saved_tensors
    needs_activations, needs_gradients = any(ctx.needs_input_grad[0]), any(ctx.needs_input_grad[1])
    grad_activations, grad_sums = gradcam_heatmaps_backward(
        grad_heatmaps,
        activations,
        sums,
        all_scores,
        ctx.scale,
        common_dtype(ctx.gradient_specs),
        needs_activations,
        needs_gradients,
    )
    return (
        grad_activations if needs_activations else [None] * len(activations),
        broadcast_over_space(grad_sums, ctx.gradient_specs) if needs_gradients else [None] * len(ctx.gradient_specs),
        None,
        None,
    )


gradcam_heatmaps.register_autograd(backward, setup_context=setup_context)
gradcam_heatmaps_backward.register_autograd(refuse_second_derivative)
