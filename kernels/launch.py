"""What all launchers share: where kernels can run, how large their tiles are, and how strided tensors are described.

The sizes come from a table and not from autotuning: no pause at the first call, and the same bits in every run.
"""

import contextlib
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# TRITON_INTERPRET=1 must be set before the kernels are imported: it decides what `triton.jit` makes of them.
INTERPRETED: bool = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# A program holds a tile of activations (channels × cells) in registers. 4096 elements are 32 registers a thread of four
# warps, enough 16-byte loads in flight to hide the memory's latency, and leave room for several programs a
# multiprocessor; loads of single elements need an address each, hence fewer of them. Chosen from the compiled code
# (benchmarks/results/kernel_resources.json), not yet timed on a GPU.
TILE = 4096
UNALIGNED_TILE = 1024
MAX_CELLS = 1024  # of a tile; larger maps are read in several
MAX_CELLS_CHANNELS_LAST = 256
MAX_PAIRS = 64  # of a program of the position stability
MAPS_TILE = 2048  # experts × cells or pixels of a program that sees all experts, for eight warps
FEW_SAMPLES = 128  # about a multiprocessor each: a program may then have all of one
ADJOINT_TILE = 1024  # cells × taps of a program that gathers gradients from pixels
# For kernels in which a product is summed over threads: otherwise the compiler fuses the product into the first
# addition, fma(a, b, a'·b'), so that threads with copies of one sum round it differently, and all of them write it to
# the same place in shared memory. Which one wins is a race, if only of the last bit (triton-lang/triton#7264).
SAME_BITS = {"enable_fp_fusion": False}
ENOUGH_PROGRAMS = 1024  # about eight for each multiprocessor of a large GPU: fewer, and channels are split further
MAX_SPLITS = 16


class Tile(NamedTuple):
    """How activations are cut up: block_channels × block_cells elements a tile, `num_warps` warps a program."""

    block_channels: int
    block_cells: int
    num_warps: int


class Strides(NamedTuple):
    """Strides of maps (N, B, C, h, w), with h and w as one axis of cells where memory allows it."""

    elements: tuple[int, int, int, int, int]  # from one entry of each axis to the next
    flat: bool  # cell (u, v) lies at (u·w + v)·(the stride of w)


def strides(maps: Tensor) -> Strides:
    """Describes how maps (N, B, C, h, w) lie in memory, to the compiler and to kernels."""
    stride_n, stride_b, stride_c, stride_h, stride_w = maps.stride()
    height, width = maps.shape[3:]
    if width == 1:  # the stride of an axis of length 1 means nothing
        stride_w = stride_h
    flat = height == 1 or width == 1 or stride_h == width * stride_w
    return Strides((stride_n, stride_b, stride_c, stride_h, stride_w), flat)


def tile(maps: Tensor) -> Tile:
    """The tile for maps (n, B, C, h, w): whole maps where they fit, and as many channels as its size allows.

    Where channels lie next to each other, a tile takes at least 64 bytes of them, two sectors of memory.
    """
    channels, height, width = maps.shape[2:]
    channels_last = maps.stride(2) == 1 and height * width > 1
    elements = 8 // maps.element_size()  # of a load that is wide enough: 14 × 14 cells of bfloat16 allow no wider one
    outer = maps.stride()[:2] + (maps.stride()[3:] if channels_last else (maps.stride(2),))
    aligned = all(stride % elements == 0 for stride in outer)
    size = TILE if aligned else UNALIGNED_TILE
    block_cells = min(triton.next_power_of_2(height * width), MAX_CELLS_CHANNELS_LAST if channels_last else MAX_CELLS)
    wanted = max(size // block_cells, 64 // maps.element_size() if channels_last and aligned else 1)
    block_channels = min(triton.next_power_of_2(channels), wanted)
    return Tile(block_channels, block_cells, 8 if block_channels * block_cells > TILE else 4)


def channels_per_program(channels: int, block_channels: int, maps: int, most_splits: int) -> int:
    """How many channels one program works through, so that enough programs run.

    Splits are a power of two, so that few batch sizes are a reason to compile a kernel again.

    Args:
        channels: C.
        block_channels: of the tile.
        maps: N·B.
        most_splits: how many programs may share a map.

    Returns:
        A multiple of `block_channels`.
    """
    blocks = triton.cdiv(channels, block_channels)
    splits = max(1, min(blocks, most_splits, triton.next_power_of_2(triton.cdiv(ENOUGH_PROGRAMS, max(maps, 1)))))
    count: int = triton.cdiv(blocks, splits) * block_channels
    return count


def maps_warps(samples: int) -> int:
    """Warps of a program that works on one sample: many where few programs run, for latency."""
    return 16 if samples <= FEW_SAMPLES else 8


def block_within(length: int, beside: int = 1, num_warps: int = 8) -> int:
    """How many entries of an axis of `length` a tile takes that is `beside` wide in its other axis: a power of two."""
    block: int = triton.next_power_of_2(length)
    return min(block, max(MAPS_TILE * num_warps // 8 // beside, 16), MAX_CELLS)


def taps(size: int, resampled: int) -> int:
    """How many pixels at most see one cell where `size` cells become `resampled`, rounded up to a power of two."""
    return 1 if size == resampled else triton.next_power_of_2(triton.cdiv(2 * resampled, size))


def adjoint_cells(cells: int, row_taps: int, column_taps: int) -> int:
    """How many cells a tile has in which each gathers from pixels of so many rows and columns: a power of two."""
    block: int = triton.next_power_of_2(cells)
    return min(block, max(ADJOINT_TILE // max(row_taps, column_taps), 16))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which kernels are launched on the tensor's own GPU, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
