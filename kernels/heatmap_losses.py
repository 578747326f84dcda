"""Mutual-information and position-stability loss of Grad-CAM heatmaps, eqs. (3), (9), (10), (11), fused, in Triton.

    forward    scores            a program a map and split of its channels: R = Σ_k w_k A_k
               maps              a program a sample, all its experts: distributions, log-shares, MI_q, centres
               stability         a program (or one a block of pairs) over the batch: PS, and mean_q d²_qij
    backward   maps_backward     a program a map: ∂L/∂R
               scores_backward   a program a map and split of its channels: ∂L/∂A and ∂L/∂Σ_uv(∂y/∂A)

Forward, in units where R̂ = R / 2^e has a maximum between 1 and 2 (the losses do not see the scale of a map):

    h = resampled ReLU(R̂),  m = mean |R̂|,  Z = Σ_ab (h + ε·m),  p = (h + ε·m) / Z,  l_i = log(p_i / Σ_j p_j)
    MI_q = −Σ_i Σ_ab p_i l_i,   (X, Y)_i = Σ_ab (a, b)·p_i,   PS = Σ_{i≠j} Σ_q (d²_qij − mean_q d²_qij)²

Backward, with g = ∂L/∂MI_q and G = ∂L/∂PS:

    ∂L/∂X_i      = 8·G·Σ_j (d²_qij − mean_q d²_qij)(X_i − X_j)          deviations sum to 0, so the mean is constant
    ∂L/∂p_i(a,b) = −g·l_i(a,b) + a·∂L/∂X_i + b·∂L/∂Y_i                  the terms ∓g of ∂(p·log p) cancel over experts
    ∂L/∂(h+εm)   = (∂L/∂p − c) / Z,   c = Σ_ab p·∂L/∂p = g·MI_i + X·∂L/∂X + Y·∂L/∂Y
    ∂L/∂R̂(u,v)  = [R̂ > 0]·Σ_ab W(ab,uv)·∂L/∂(h+εm) + sign(R̂)·ε/(h·w)·Σ_ab ∂L/∂(h+εm)

Samples that are not counted have no part in PS and its mean; of their MI_q the caller takes none.

W is the resampling. Its adjoint of 1, a and b is a product of sums over one axis, and Σ_ab of ∂L/∂p needs Σ_ab l alone:
only l, a heatmap in size, has to be read again. A map that is zero everywhere has 1/Z := 0, p uniform, no gradient.
With NORMALIZE off, eq. (9) is taken of h·2^e itself, l_i = log(h_i / Σ_j h_j), and only the centres see p.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from immunity_fast.kernels import launch
from immunity_fast.kernels.arithmetic import exact_scale, moments, relu, resample, resample_adjoint
from immunity_fast.kernels.autograd import (
    broadcast_over_space,
    common_dtype,
    describe,
    empty_grads,
    refuse_second_derivative,
)
from immunity_fast.kernels.group import group_mean, group_ratio
from immunity_fast.kernels.scores import scores, scores_backward

# Rows of `statistics` (7, N, B) float32: what the backward pass needs to know of each map.
_INVERSE_WEIGHTS = tl.constexpr(0)  # 2^−e of the weights
_INVERSE_SCORES = tl.constexpr(1)  # 2^−e of the scores
_INVERSE_MASS = tl.constexpr(2)  # 1 / Z
_ROW = tl.constexpr(3)  # X
_COLUMN = tl.constexpr(4)  # Y
_INFORMATION = tl.constexpr(5)  # MI_i = −Σ_ab p_i l_i
_LOG_SHARES = tl.constexpr(6)  # Σ_ab l_i
_STATISTICS = 7


@triton.jit(do_not_specialize=["samples"])
def _maps_kernel(
    partials_ptr,  # (splits, N, B, h·w) float32
    peaks_ptr,  # (splits, N, B) float32
    scores_ptr,  # (N, B, h·w) float32, out: R / 2^e of the weights; is `partials_ptr` itself if SPLITS is 1
    log_shares_ptr,  # (N, B, H, W) float32, out: l
    statistics_ptr,  # (7, N, B) float32, out
    information_ptr,  # (B,) float32, out: MI_q
    samples, height: tl.constexpr, width: tl.constexpr, out_height: tl.constexpr, out_width: tl.constexpr, smoothing,
    EXPERTS: tl.constexpr, SPLITS: tl.constexpr, NORMALIZE: tl.constexpr,
    ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """Everything between R and MI_q for one sample; all experts in one tile, because p_i meets Σ_j p_j."""
    sample = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_EXPERTS)
    present = expert < EXPERTS
    row = expert * samples.to(tl.int64) + sample
    all_maps = samples.to(tl.int64) * EXPERTS
    cells = height * width
    pixels = out_height * out_width

    peak = tl.zeros([BLOCK_EXPERTS], tl.float32)
    for split in range(SPLITS):
        peak = tl.maximum(peak, tl.load(peaks_ptr + split * all_maps + row, mask=present, other=0))
    scale_weights, inverse_weights = exact_scale(peak)
    largest = tl.zeros([BLOCK_EXPERTS], tl.float32)
    for start in range(0, cells, BLOCK_CELLS):
        cell = start + tl.arange(0, BLOCK_CELLS)
        mask = present[:, None] & (cell < cells)[None, :]
        place = row[:, None] * cells + cell[None, :]
        score = tl.zeros([BLOCK_EXPERTS, BLOCK_CELLS], tl.float32)
        for split in range(SPLITS):
            own, _ = exact_scale(tl.load(peaks_ptr + split * all_maps + row, mask=present, other=0))
            partial = tl.load(partials_ptr + split * all_maps * cells + place, mask=mask, other=0)
            score += partial * (own * inverse_weights)[:, None]
        if SPLITS > 1:
            tl.store(scores_ptr + place, score, mask=mask)
        largest = tl.maximum(largest, tl.max(tl.abs(score), 1))
    scale_scores, inverse_scores = exact_scale(largest)
    tl.debug_barrier()  # what follows reads scores that other threads of this program have written

    mean = tl.zeros([BLOCK_EXPERTS], tl.float32)
    mass = tl.zeros([BLOCK_EXPERTS], tl.float32)
    row_moment = tl.zeros([BLOCK_EXPERTS], tl.float32)
    column_moment = tl.zeros([BLOCK_EXPERTS], tl.float32)
    for start in range(0, cells, BLOCK_CELLS):
        cell = start + tl.arange(0, BLOCK_CELLS)
        mask = present[:, None] & (cell < cells)[None, :]
        score = tl.load(scores_ptr + row[:, None] * cells + cell[None, :], mask=mask, other=0)
        score *= inverse_scores[:, None]
        rows, row_moments = moments(cell // width, height, out_height, ROW_TAPS)
        columns, column_moments = moments(cell % width, width, out_width, COLUMN_TAPS)
        positive = relu(score)
        mean += tl.sum(tl.abs(score), 1)
        mass += tl.sum(positive * (rows * columns)[None, :], 1)
        row_moment += tl.sum(positive * (row_moments * columns)[None, :], 1)
        column_moment += tl.sum(positive * (rows * column_moments)[None, :], 1)
    floor = smoothing * mean / cells
    mass += floor * pixels
    alive = mass != 0  # NaN is alive: it must not pass for a uniform map
    inverse_mass = tl.where(alive, 1 / tl.where(alive, mass, 1), 0)
    base = tl.where(alive, floor * inverse_mass, 1.0 / pixels)
    centre_row = row_moment * inverse_mass + base * pixels * (out_height - 1) * 0.5
    centre_column = column_moment * inverse_mass + base * pixels * (out_width - 1) * 0.5

    entropy = tl.zeros([BLOCK_EXPERTS], tl.float32)
    log_sum = tl.zeros([BLOCK_EXPERTS], tl.float32)
    map_ptrs = scores_ptr + row[:, None] * cells
    for start in range(0, pixels, BLOCK_PIXELS):
        pixel = start + tl.arange(0, BLOCK_PIXELS)
        mask = present[:, None] & (pixel < pixels)[None, :]
        a = (pixel // out_width)[None, :]
        b = (pixel % out_width)[None, :]
        heat = resample(map_ptrs, a, b, height, width, out_height, out_width, mask) * inverse_scores[:, None]
        if NORMALIZE:
            share = heat * inverse_mass[:, None] + base[:, None]
        else:
            share = heat * scale_scores[:, None] * scale_weights[:, None]
        share = tl.where(mask, share, 0)
        total = tl.sum(share, 0)[None, :]
        positive = share > 0
        log_share = tl.where(positive, tl.log(tl.where(positive, share, 1) / tl.where(positive, total, 1)), share * 0)
        tl.store(log_shares_ptr + row[:, None] * pixels + pixel[None, :], log_share, mask=mask)
        entropy -= tl.sum(share * log_share, 1)
        log_sum += tl.sum(log_share, 1)
    tl.store(information_ptr + sample, tl.sum(entropy, 0))
    tl.store(statistics_ptr + _INVERSE_WEIGHTS * all_maps + row, inverse_weights, mask=present)
    tl.store(statistics_ptr + _INVERSE_SCORES * all_maps + row, inverse_scores, mask=present)
    tl.store(statistics_ptr + _INVERSE_MASS * all_maps + row, inverse_mass, mask=present)
    tl.store(statistics_ptr + _ROW * all_maps + row, centre_row, mask=present)
    tl.store(statistics_ptr + _COLUMN * all_maps + row, centre_column, mask=present)
    tl.store(statistics_ptr + _INFORMATION * all_maps + row, entropy, mask=present)
    tl.store(statistics_ptr + _LOG_SHARES * all_maps + row, log_sum, mask=present)


@triton.jit(do_not_specialize=["samples"])
def _stability_kernel(
    statistics_ptr,  # (7, N, B) float32
    mean_distances_ptr,  # (N, N) float32, out: mean_q d²_qij
    stability_ptr,  # (programs,) float32, out: each program's addend of PS
    counted_ptr,  # (B,) float32: 1 of a sample that counts, 0 of another; None unless MASKED
    samples,
    MASKED: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_SAMPLES: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of d² over the batch, for a block of ordered pairs (i, j), i = j included."""
    pair = tl.program_id(0) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    exists = pair < EXPERTS * EXPERTS
    ours = (pair // EXPERTS).to(tl.int64) * samples
    theirs = (pair % EXPERTS).to(tl.int64) * samples
    total = tl.zeros([BLOCK_PAIRS, BLOCK_SAMPLES], tl.float32)
    counted = tl.zeros([BLOCK_SAMPLES], tl.float32)
    for start in range(0, samples, BLOCK_SAMPLES):
        distances = _squared_distances(statistics_ptr, ours, theirs, exists, start, samples, EXPERTS, BLOCK_SAMPLES)
        if MASKED:
            share = _counted(counted_ptr, start, samples, BLOCK_SAMPLES)
            counted += share
            distances = tl.where((share > 0)[None, :], distances, 0)
        total += distances
    mean = tl.sum(total, 1) / (tl.maximum(tl.sum(counted, 0), 1) if MASKED else samples)
    total = tl.zeros([BLOCK_PAIRS, BLOCK_SAMPLES], tl.float32)
    for start in range(0, samples, BLOCK_SAMPLES):
        distances = _squared_distances(statistics_ptr, ours, theirs, exists, start, samples, EXPERTS, BLOCK_SAMPLES)
        inside = exists[:, None] & (start + tl.arange(0, BLOCK_SAMPLES) < samples)[None, :]
        if MASKED:
            inside &= (_counted(counted_ptr, start, samples, BLOCK_SAMPLES) > 0)[None, :]
        deviation = tl.where(inside, distances - mean[:, None], 0)
        total += deviation * deviation
    tl.store(mean_distances_ptr + pair, mean, mask=exists)
    tl.store(stability_ptr + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _counted(counted_ptr, start, samples, BLOCK_SAMPLES: tl.constexpr):
    """1 of the samples of a block that count, 0 of others."""
    sample = start + tl.arange(0, BLOCK_SAMPLES)
    return tl.load(counted_ptr + sample, mask=sample < samples, other=0)


@triton.jit
def _squared_distances(
    statistics_ptr, ours, theirs, exists, start, samples, EXPERTS: tl.constexpr, BLOCK_SAMPLES: tl.constexpr
):
    """d²_qij for a block of pairs and of samples."""
    sample = start + tl.arange(0, BLOCK_SAMPLES)
    mask = exists[:, None] & (sample < samples)[None, :]
    rows = statistics_ptr + _ROW * EXPERTS * samples.to(tl.int64)
    columns = statistics_ptr + _COLUMN * EXPERTS * samples.to(tl.int64)
    i = ours[:, None] + sample[None, :]
    j = theirs[:, None] + sample[None, :]
    down = tl.load(rows + i, mask=mask, other=0) - tl.load(rows + j, mask=mask, other=0)
    across = tl.load(columns + i, mask=mask, other=0) - tl.load(columns + j, mask=mask, other=0)
    return down * down + across * across


@triton.jit(do_not_specialize=["samples"])
def _maps_backward_kernel(
    grad_information_ptr,  # (B,) float32: g; None unless INFORMATION
    grad_information_stride_b,
    grad_stability_ptr,  # () float32: G; None unless STABILITY
    scores_ptr,  # (N, B, h·w) float32
    log_shares_ptr,  # (N, B, H, W) float32
    statistics_ptr,  # (7, N, B) float32
    mean_distances_ptr,  # (N, N) float32
    counted_ptr,  # (B,) float32, see `_stability_kernel`; None unless MASKED
    grad_scores_ptr,  # (N, B, h·w) float32, out: 2^e·∂L/∂R, e of the weights
    samples, height: tl.constexpr, width: tl.constexpr, out_height: tl.constexpr, out_width: tl.constexpr, smoothing,
    INFORMATION: tl.constexpr, STABILITY: tl.constexpr,  # whether L depends on MI, on PS
    MASKED: tl.constexpr,
    EXPERTS: tl.constexpr, NORMALIZE: tl.constexpr, ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_CELLS: tl.constexpr,
):  # fmt: skip
    """∂L/∂R of one map; a program a map and tile of its cells."""
    row = tl.program_id(0).to(tl.int64)
    all_maps = samples.to(tl.int64) * EXPERTS
    sample = row % samples
    expert = row // samples
    pixels = out_height * out_width
    cells = height * width
    inverse_weights = tl.load(statistics_ptr + _INVERSE_WEIGHTS * all_maps + row)
    inverse_scores = tl.load(statistics_ptr + _INVERSE_SCORES * all_maps + row)
    inverse_mass = tl.load(statistics_ptr + _INVERSE_MASS * all_maps + row)
    centre_row = tl.load(statistics_ptr + _ROW * all_maps + row)
    centre_column = tl.load(statistics_ptr + _COLUMN * all_maps + row)

    grad_row = 0.0
    grad_column = 0.0
    if STABILITY:
        other = tl.arange(0, BLOCK_EXPERTS)
        exists = other < EXPERTS
        place = other * samples.to(tl.int64) + sample
        down = centre_row - tl.load(statistics_ptr + _ROW * all_maps + place, mask=exists, other=0)
        across = centre_column - tl.load(statistics_ptr + _COLUMN * all_maps + place, mask=exists, other=0)
        mean = tl.load(mean_distances_ptr + expert * EXPERTS + other, mask=exists, other=0)
        deviation = tl.where(exists, down * down + across * across - mean, 0)
        factor = 8 * tl.load(grad_stability_ptr).to(tl.float32)
        if MASKED:
            factor *= tl.load(counted_ptr + sample)
        grad_row = factor * tl.sum(deviation * down, 0)
        grad_column = factor * tl.sum(deviation * across, 0)

    # ∂L/∂p is −g·l + a·∂L/∂X + b·∂L/∂Y, less its mean under p.
    offset = grad_row * centre_row + grad_column * centre_column
    sum_of_grads = 0.5 * pixels * (grad_row * (out_height - 1) + grad_column * (out_width - 1))
    factor_of_logs = 0.0
    if INFORMATION:
        factor_of_logs = -tl.load(grad_information_ptr + sample * grad_information_stride_b).to(tl.float32)
        if NORMALIZE:
            offset -= factor_of_logs * tl.load(statistics_ptr + _INFORMATION * all_maps + row)
            sum_of_grads += factor_of_logs * tl.load(statistics_ptr + _LOG_SHARES * all_maps + row)
    grad_mean = smoothing * (sum_of_grads - offset * pixels) * inverse_mass / cells

    cell = tl.program_id(1) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    inside = cell < cells
    u = cell // width
    v = cell % width
    score = tl.load(scores_ptr + row * cells + cell, mask=inside, other=0)
    rows, row_moments = moments(u, height, out_height, ROW_TAPS)
    columns, column_moments = moments(v, width, out_width, COLUMN_TAPS)
    grad_heat = grad_row * row_moments * columns + grad_column * rows * column_moments - offset * rows * columns
    if INFORMATION:
        logs = resample_adjoint(
            log_shares_ptr + row * pixels, out_width, 1, u, v, height, width, out_height, out_width, inside,
            ROW_TAPS, COLUMN_TAPS,
        )  # fmt: skip
        if NORMALIZE:
            grad_heat = (grad_heat + factor_of_logs * logs) * inverse_mass
        else:  # of h·2^e: the scale of the scores goes out again below, that of the weights in `scores_backward`
            grad_heat = grad_heat * inverse_mass + factor_of_logs * logs / inverse_scores / inverse_weights
    else:
        grad_heat *= inverse_mass
    sign = tl.where(score > 0, 1.0, tl.where(score < 0, -1.0, 0.0))
    grad_score = tl.where(score > 0, grad_heat, 0) + grad_mean * sign
    tl.store(grad_scores_ptr + row * cells + cell, grad_score * inverse_scores, mask=inside)


def _maps(
    partials: Tensor, peaks: Tensor, shape: tuple[int, int], size: tuple[int, int], normalize: bool, smoothing: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MI_q (B,), R (N, B, h·w) in units of its weights, log-shares (N, B, H, W) and statistics (7, N, B)."""
    splits, experts, samples, cells = partials.shape
    pixels = size[0] * size[1]
    new = partials.new_empty
    all_scores = partials[0] if splits == 1 else new((experts, samples, cells))
    log_shares, statistics = new((experts, samples, *size)), new((_STATISTICS, experts, samples))
    information = new(samples)
    block_experts = triton.next_power_of_2(experts)
    row_taps, column_taps = launch.taps(shape[0], size[0]), launch.taps(shape[1], size[1])
    num_warps = launch.maps_warps(samples)
    with launch.on_device(partials):
        _maps_kernel[(samples,)](
            partials, peaks, all_scores, log_shares, statistics, information, samples, *shape, *size, smoothing,
            EXPERTS=experts, SPLITS=splits, NORMALIZE=normalize,
            ROW_TAPS=row_taps, COLUMN_TAPS=column_taps,
            BLOCK_EXPERTS=block_experts,
            BLOCK_CELLS=launch.block_within(cells, max(block_experts, row_taps, column_taps), num_warps),
            BLOCK_PIXELS=launch.block_within(pixels, block_experts, num_warps),
            num_warps=num_warps, **launch.SAME_BITS,
            maxnreg=128,  # else the compiler spills a few bytes for an occupancy of no use
        )  # fmt: skip
    return information, all_scores, log_shares, statistics


def _stability(statistics: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """PS () and mean_q d²_qij (N, N)."""
    experts, samples = statistics.shape[1:]
    # One program is one launch, and right for a small batch; a large one takes a program a pair and a sum over them.
    pairs = min(triton.next_power_of_2(experts**2), launch.MAX_PAIRS) if samples <= launch.MAX_CELLS else 1
    programs = triton.cdiv(experts**2, pairs)
    mean_distances, stability = statistics.new_empty(experts, experts), statistics.new_empty(programs)
    with launch.on_device(statistics):
        _stability_kernel[(programs,)](
            statistics, mean_distances, stability, counted, samples,
            MASKED=counted is not None,
            EXPERTS=experts, BLOCK_PAIRS=pairs, BLOCK_SAMPLES=launch.block_within(samples, pairs),
            num_warps=4, **launch.SAME_BITS,
        )  # fmt: skip
    return stability[0] if programs == 1 else stability.sum(), mean_distances


def _maps_backward(
    grad_information: Tensor | None,
    grad_stability: Tensor | None,
    all_scores: Tensor,
    log_shares: Tensor,
    statistics: Tensor,
    mean_distances: Tensor,
    counted: Tensor | None,
    shape: tuple[int, int],
    normalize: bool,
    smoothing: float,
) -> Tensor:
    """2^e·∂L/∂R, (N, B, h·w), e of the weights."""
    experts, samples, cells = all_scores.shape
    size = log_shares.shape[2:]
    grad_scores = torch.empty_like(all_scores)
    row_taps, column_taps = launch.taps(shape[0], size[0]), launch.taps(shape[1], size[1])
    block_cells = launch.adjoint_cells(cells, row_taps, column_taps)
    with launch.on_device(all_scores):
        _maps_backward_kernel[(experts * samples, triton.cdiv(cells, block_cells))](
            grad_information, 0 if grad_information is None else grad_information.stride(0), grad_stability,
            all_scores, log_shares, statistics, mean_distances, counted, grad_scores,
            samples, *shape, *size, smoothing,
            INFORMATION=grad_information is not None, STABILITY=grad_stability is not None,
            MASKED=counted is not None,
            EXPERTS=experts, NORMALIZE=normalize,
            ROW_TAPS=row_taps, COLUMN_TAPS=column_taps,
            BLOCK_EXPERTS=triton.next_power_of_2(experts), BLOCK_CELLS=block_cells,
            num_warps=4, **launch.SAME_BITS,
        )  # fmt: skip
    return grad_scores


@torch.library.custom_op("immunity_fast::heatmap_losses", mutates_args=())
def heatmap_losses(
    activations: list[Tensor],
    gradients: list[Tensor],
    size: list[int],
    normalize: bool,
    smoothing: float,
    scale: float,
    group_name: str,
    counted: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mutual-information loss, eq. (9), and position-stability loss, eqs. (10) and (11), of Grad-CAM heatmaps, eq. (3).

    Args:
        activations: parts (n, B, C, h, w), float32, bfloat16 or float16, of any strides.
        gradients: ∂y/∂A in as many parts, of the same shapes, or summed over space, (n, B, C).
        size: [H, W] of the heatmaps, in whose pixels distances are.
        normalize: whether eq. (9) is taken of each heatmap's distribution, and not of the heatmap itself.
        smoothing: ε.
        scale: s of eq. (3).
        group_name: of the processes whose samples eq. (11)'s mean is over; "" is this process alone.
        counted: (B,) float32, contiguous, 1 of samples that have a part in PS and 0 of others; None: all have.

    Returns:
        MI_q (B,) and PS () in pixels⁴, float32, and five tensors that only the backward pass has a use for:
        Σ_uv ∂y/∂A (N, B, C), R (N, B, h·w), log-shares (N, B, H, W), statistics (7, N, B) and mean_q d²_qij (N, N).
    """
    _, samples, _, height, width = activations[0].shape
    if samples == 0:
        return tuple(tensor.zero_() for tensor in _empty_losses(activations, size))  # type: ignore[return-value]
    found = scores(activations, gradients, scale)
    shape, target = (height, width), (size[0], size[1])
    information, all_scores, log_shares, statistics = _maps(
        found.partials, found.peaks, shape, target, normalize, smoothing
    )
    stability, mean_distances = _stability(statistics, counted)
    if group_name:
        # The backward pass takes deviations from whatever means it is given, which is all of PS's gradient.
        local, number = mean_distances, samples if counted is None else counted.sum()
        if isinstance(number, Tensor):
            mean_distances = group_ratio(number * local, number, group_name)
        else:
            mean_distances = group_mean(local, group_name)
        stability = stability + number * (local - mean_distances).square().sum()
    return information, stability, found.sums, all_scores, log_shares, statistics, mean_distances


@heatmap_losses.register_fake
def _(activations, _gradients, size, *_):
    return _empty_losses(activations, size)


def _empty_losses(
    activations: list[Tensor], size: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for the seven results."""
    samples, channels, height, width = activations[0].shape[1:]
    experts = sum(part.shape[0] for part in activations)

    def new(*shape: int) -> Tensor:
        return activations[0].new_empty(shape, dtype=torch.float32)

    return (
        new(samples),
        new(),
        new(experts, samples, channels),
        new(experts, samples, height * width),
        new(experts, samples, *size),
        new(_STATISTICS, experts, samples),
        new(experts, experts),
    )


@torch.library.custom_op("immunity_fast::heatmap_losses_backward", mutates_args=())
def heatmap_losses_backward(
    grad_information: Tensor | None,
    grad_stability: Tensor | None,
    activations: list[Tensor],
    sums: Tensor,
    all_scores: Tensor,
    log_shares: Tensor,
    statistics: Tensor,
    mean_distances: Tensor,
    counted: Tensor | None,
    normalize: bool,
    smoothing: float,
    scale: float,
    dtype: torch.dtype,
    needs_activations: bool,
    needs_sums: bool,
) -> tuple[list[Tensor], Tensor]:
    """Both derivatives of `heatmap_losses`. A second one raises instead of being silently zero.

    Args:
        grad_information: ∂L/∂MI_q, (B,) float32; None is 0.
        grad_stability: ∂L/∂PS, () float32; None is 0.
        activations: as they were given.
        sums: as they were returned, and so are the next four.
        all_scores: R, (N, B, h·w) float32.
        log_shares: (N, B, H, W) float32.
        statistics: (7, N, B) float32.
        mean_distances: mean_q d²_qij, (N, N) float32.
        counted: as it was given.
        normalize: as it was given.
        smoothing: as it was given.
        scale: as it was given.
        dtype: of the second result.
        needs_activations: whether the first result is wanted; if not it is an empty list.
        needs_sums: whether the second is; if not it is an empty tensor.

    Returns:
        ∂L/∂A, a part each, and ∂L/∂Σ_uv(∂y/∂A), (N, B, C).
    """
    height, width = activations[0].shape[3:]
    if sums.shape[1] == 0:
        return empty_grads(activations, sums, dtype, needs_activations, needs_sums)
    grad_scores = _maps_backward(
        grad_information, grad_stability, all_scores, log_shares, statistics, mean_distances, counted,
        (height, width), normalize, smoothing,
    )  # fmt: skip
    return scores_backward(
        grad_scores,
        statistics[0],
        activations,
        sums,
        dtype,
        scale,
        needs_activations=needs_activations,
        needs_sums=needs_sums,
    )


@heatmap_losses_backward.register_fake
def _(_grad_information, _grad_stability, activations, sums, *rest):
    return empty_grads(activations, sums, *rest[-3:])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keeps of inputs and outputs what `backward` needs."""
    activations, gradients, _, ctx.normalize, ctx.smoothing, ctx.scale, _, counted = inputs
    ctx.gradient_specs = describe(gradients)
    ctx.save_for_backward(*activations, *output[2:], counted)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_information: Tensor | None, grad_stability: Tensor | None, *_: None) -> tuple[Any, ...]:
    """The derivative with respect to each input, None where there is none, from ∂L/∂MI_q and ∂L/∂PS (None: 0)."""
    *activations, sums, all_scores, log_shares, statistics, mean_distances, counted = ctx.saved_tensors
    needs_activations, needs_gradients = any(ctx.needs_input_grad[0]), any(ctx.needs_input_grad[1])
    grad_activations, grad_sums = heatmap_losses_backward(
        grad_information, grad_stability, activations, sums, all_scores, log_shares, statistics, mean_distances,
        counted, ctx.normalize, ctx.smoothing, ctx.scale, common_dtype(ctx.gradient_specs),
        needs_activations, needs_gradients,
    )  # fmt: skip
    return (
        grad_activations if needs_activations else [None] * len(activations),
        broadcast_over_space(grad_sums, ctx.gradient_specs) if needs_gradients else [None] * len(ctx.gradient_specs),
        None, None, None, None, None, None,
    )  # fmt: skip


heatmap_losses.register_autograd(backward, setup_context=setup_context)
heatmap_losses_backward.register_autograd(refuse_second_derivative)
