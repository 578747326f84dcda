"""Device functions that several kernels call: exact scaling, and bilinear resampling in both directions."""

import triton
import triton.language as tl


@triton.jit
def exact_scale(magnitude):
    """2^⌊log2 x⌋, x rounded down to a power of two, and its inverse, for x ≥ 0 in float32; 1 where x is not normal.

    Both are exact, and products with them lose nothing, so a map can be scaled to about 1 and its gradient back.
    """
    exponent = (magnitude.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.where(exponent == 0, 127, tl.minimum(exponent, 253))  # 253: the inverse is normal, too
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def relu(x):
    """max(x, 0), but NaN stays NaN, which `tl.maximum` would hide."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def neighbours(pixel, size, resampled):
    """The two cells that a pixel lies between and the share of the second: bilinear, `align_corners=False`.

    Source coordinate (pixel + ½)·size/resampled − ½, clipped to [0, size − 1], in exact integer arithmetic.
    """
    source = (2 * pixel + 1) * size - resampled  # in units of 1 / (2·resampled)
    source = tl.minimum(tl.maximum(source, 0), 2 * resampled * (size - 1))
    first = source // (2 * resampled)
    share = (source - first * 2 * resampled).to(tl.float32) / (2 * resampled)
    return first, tl.minimum(first + 1, size - 1), share


@triton.jit
def first_pixel(cell, size, resampled):
    """The first pixel that sees `cell`: the smallest whose source coordinate exceeds cell − 1, or 0 for cell 0."""
    return tl.where(cell == 0, 0, tl.maximum((2 * cell - 1) * resampled + size, 0) // (2 * size))


@triton.jit
def share_of(pixel, cell, size, resampled):
    """The weight of `cell` in `pixel`: a tent of the clipped source coordinate; 0 beyond the image."""
    source = (2 * pixel + 1) * size - resampled
    source = tl.minimum(tl.maximum(source, 0), 2 * resampled * (size - 1))
    distance = tl.abs(source - 2 * resampled * cell).to(tl.float32) / (2 * resampled)
    return tl.where(pixel < resampled, tl.maximum(1 - distance, 0), 0)


@triton.jit
def moments(cell, size, resampled, TAPS: tl.constexpr):
    """Σ_a W(a, cell) and Σ_a a·W(a, cell) over pixels a: what a cell adds to a heatmap's sum and centre."""
    pixel = first_pixel(cell, size, resampled)[:, None] + tl.arange(0, TAPS)[None, :]
    share = share_of(pixel, cell[:, None], size, resampled)
    return tl.sum(share, 1), tl.sum(share * pixel, 1)


@triton.jit
def resample(scores_ptr, row, column, height, width, out_height, out_width, mask):
    """ReLU and bilinear resampling, at pixels (row, column), of maps (height·width) that begin at `scores_ptr`."""
    up, down, share_down = neighbours(row, height, out_height)
    left, right, share_right = neighbours(column, width, out_width)
    upper_left = relu(tl.load(scores_ptr + (up * width + left), mask=mask, other=0))
    upper_right = relu(tl.load(scores_ptr + (up * width + right), mask=mask, other=0))
    lower_left = relu(tl.load(scores_ptr + (down * width + left), mask=mask, other=0))
    lower_right = relu(tl.load(scores_ptr + (down * width + right), mask=mask, other=0))
    upper = upper_left * (1 - share_right) + upper_right * share_right
    lower = lower_left * (1 - share_right) + lower_right * share_right
    return upper * (1 - share_down) + lower * share_down


@triton.jit
def resample_adjoint(
    image_ptr, image_stride_h, image_stride_w, u, v, height, width, out_height, out_width, mask,
    ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr,
):  # fmt: skip
    """Σ_ab W(ab, uv)·image(a, b) at cells (u, v): each cell gathers from the pixels that see it, so no atomics."""
    row = first_pixel(u, height, out_height)
    column = first_pixel(v, width, out_width)[:, None] + tl.arange(0, COLUMN_TAPS)[None, :]
    column_share = share_of(column, v[:, None], width, out_width)
    column_ptrs = image_ptr + column.to(tl.int64) * image_stride_w
    mask = mask[:, None] & (column < out_width)
    total = tl.zeros(column.shape, tl.float32)
    for tap in range(ROW_TAPS):
        seen = mask & (row + tap < out_height)[:, None]
        pixels = tl.load(column_ptrs + ((row + tap).to(tl.int64) * image_stride_h)[:, None], mask=seen, other=0)
        total += share_of(row + tap, u, height, out_height)[:, None] * pixels.to(tl.float32)
    return tl.sum(total * column_share, 1)
