"""What the two cross-entropies of a mixture have in common: each expert's softmax, tiles, and memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from immunity_fast.kernels import launch

STATISTICS = 3  # rows of float32 numbers of each expert and sample that the backward pass reads again

# exp of more than this is infinite in float32; a shut gate's derivative is cut there, as the reference does.
LARGEST_EXPONENT = tl.constexpr(80.0)


@triton.jit
def log_softmax(
    logit_rows, logits_stride_k, present, classes: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """Of each expert max_k f_ik and log Σ_k exp(f_ik − max f_i), by one pass over the classes; 0 of an absent one."""
    peak = tl.full([BLOCK_EXPERTS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_EXPERTS], tl.float32)
    for start in range(0, classes, BLOCK_CLASSES):
        index = start + tl.arange(0, BLOCK_CLASSES)
        mask = present[:, None] & (index < classes)[None, :]
        logit_ptrs = logit_rows[:, None] + index.to(tl.int64)[None, :] * logits_stride_k
        values = tl.load(logit_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(peak, tl.max(values, 1))
        anchor = tl.where(larger == float("-inf"), 0, larger)
        total = total * tl.exp(peak - anchor) + tl.sum(tl.exp(values - anchor[:, None]), 1)
        peak = larger
    return tl.where(present, peak, 0), tl.log(tl.where(present, total, 1))


def empty(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the losses (B,) and the statistics (3, N, B), float32, of logits (N, B, K)."""
    experts, samples, _ = logits.shape
    losses = logits.new_empty(samples, dtype=torch.float32)
    return losses, losses.new_empty((STATISTICS, experts, samples))


def tile(experts: int, classes: int) -> dict[str, int]:
    """How many experts and classes a program's tile has, as its kernel takes them, and its warps.

    A warp for 512 elements: ten classes need one, a thousand eight.
    """
    block_experts: int = triton.next_power_of_2(experts)
    block_classes = launch.block_within(classes, block_experts)
    num_warps = min(max(block_experts * block_classes // 512, 1), 8)
    return {"BLOCK_EXPERTS": block_experts, "BLOCK_CLASSES": block_classes, "num_warps": num_warps}
