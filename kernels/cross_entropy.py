"""Cross-entropy of the mixture and of each expert, eq. (2), and its derivative, in Triton; a program a sample.

With l_i = log softmax(f_i)[label], M = log Σ_i g_i exp(l_i) and r_i = g_i exp(l_i − M), expert i's share of the label:

    CE = −M − α Σ_i l_i,   ∂CE/∂f_ik = (r_i + α)·(softmax(f_i)_k − δ_k,label),   ∂CE/∂g_i = −exp(l_i − M)

Exponents are taken after subtracting the largest: nothing underflows where all experts are sure of another class.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from immunity_fast.kernels import launch, mixture
from immunity_fast.kernels.autograd import refuse_second_derivative
from immunity_fast.kernels.mixture import LARGEST_EXPONENT, log_softmax

# Rows of `statistics` (3, N, B) float32.
_LIKELIHOOD = tl.constexpr(0)  # l_i
_PEAK = tl.constexpr(1)  # max_k f_ik
_LOG_TOTAL = tl.constexpr(2)  # log Σ_k exp(f_ik − max f_i)


@triton.jit(do_not_specialize=["samples"])
def _cross_entropy_kernel(
    logits_ptr,  # (N, B, K) float32, bfloat16 or float16
    logits_stride_n, logits_stride_b, logits_stride_k,
    gate_ptr,  # (B, N) float32, bfloat16 or float16
    gate_stride_b, gate_stride_n,
    targets_ptr,  # (B,) int64
    targets_stride_b,
    losses_ptr,  # (B,) float32, out
    statistics_ptr,  # (3, N, B) float32, out
    samples, classes: tl.constexpr,
    alpha,
    EXPERTS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """The loss of one sample. A label out of range gives NaN: reading there could be reading anything."""
    sample = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_EXPERTS)
    present = expert < EXPERTS
    logit_rows = logits_ptr + expert.to(tl.int64) * logits_stride_n + sample * logits_stride_b
    peak, log_total = log_softmax(logit_rows, logits_stride_k, present, classes, BLOCK_EXPERTS, BLOCK_CLASSES)
    label = tl.load(targets_ptr + sample * targets_stride_b)
    known = present & (label >= 0) & (label < classes)
    value = tl.load(logit_rows + label * logits_stride_k, mask=known, other=float("nan")).to(tl.float32)
    likelihood = tl.where(present, value - peak - log_total, 0)
    weight = tl.load(gate_ptr + sample * gate_stride_b + expert.to(tl.int64) * gate_stride_n, mask=present, other=0).to(
        tl.float32
    )
    _, largest, sum_of_shares = _shares(likelihood, weight)
    mixture = tl.log(sum_of_shares) + largest
    tl.store(losses_ptr + sample, -mixture - alpha * tl.sum(likelihood, 0))
    statistic_ptrs = statistics_ptr + expert.to(tl.int64) * samples + sample
    all_maps = samples.to(tl.int64) * EXPERTS
    tl.store(statistic_ptrs + _LIKELIHOOD * all_maps, likelihood, mask=present)
    tl.store(statistic_ptrs + _PEAK * all_maps, peak, mask=present)
    tl.store(statistic_ptrs + _LOG_TOTAL * all_maps, log_total, mask=present)


@triton.jit(do_not_specialize=["samples"])
def _cross_entropy_backward_kernel(
    grad_losses_ptr,  # (B,) float32
    grad_losses_stride_b,
    logits_ptr,  # (N, B, K) float32, bfloat16 or float16
    logits_stride_n, logits_stride_b, logits_stride_k,
    gate_ptr,  # (B, N) float32, bfloat16 or float16
    gate_stride_b, gate_stride_n,
    targets_ptr,  # (B,) int64
    targets_stride_b,
    statistics_ptr,  # (3, N, B) float32
    grad_logits_ptr,  # (N, B, K) in the dtype of the logits, out
    grad_logits_stride_n, grad_logits_stride_b, grad_logits_stride_k,
    grad_gate_ptr,  # (B, N) float32, out
    samples, classes: tl.constexpr,
    alpha,
    EXPERTS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """∂L/∂logits and ∂L/∂gate of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_EXPERTS)
    present = expert < EXPERTS
    upstream = tl.load(grad_losses_ptr + sample * grad_losses_stride_b).to(tl.float32)
    statistic_ptrs = statistics_ptr + expert.to(tl.int64) * samples + sample
    all_maps = samples.to(tl.int64) * EXPERTS
    likelihood = tl.load(statistic_ptrs + _LIKELIHOOD * all_maps, mask=present, other=0)
    peak = tl.load(statistic_ptrs + _PEAK * all_maps, mask=present, other=0)
    log_total = tl.load(statistic_ptrs + _LOG_TOTAL * all_maps, mask=present, other=0)
    weight = tl.load(gate_ptr + sample * gate_stride_b + expert.to(tl.int64) * gate_stride_n, mask=present, other=0).to(
        tl.float32
    )
    shares, largest, sum_of_shares = _shares(likelihood, weight)
    # An open gate's own share bounds exp(l − M) by 1/g; a shut one's expert may be likelier by any factor.
    exponent = tl.where(weight > 0, likelihood - largest, tl.minimum(likelihood - largest, LARGEST_EXPONENT))
    grad_weight = -upstream * tl.exp(exponent - tl.log(sum_of_shares))
    tl.store(grad_gate_ptr + sample * EXPERTS + expert, grad_weight, mask=present)
    factor = upstream * (shares / sum_of_shares + alpha)
    label = tl.load(targets_ptr + sample * targets_stride_b)
    logit_rows = logits_ptr + expert.to(tl.int64) * logits_stride_n + sample * logits_stride_b
    grad_rows = grad_logits_ptr + expert.to(tl.int64) * grad_logits_stride_n + sample * grad_logits_stride_b
    for start in range(0, classes, BLOCK_CLASSES):
        index = start + tl.arange(0, BLOCK_CLASSES)
        mask = present[:, None] & (index < classes)[None, :]
        wide = index.to(tl.int64)[None, :]
        values = tl.load(logit_rows[:, None] + wide * logits_stride_k, mask=mask, other=0).to(tl.float32)
        probability = tl.exp(values - peak[:, None] - log_total[:, None])
        grad = factor[:, None] * (probability - tl.where(index == label, 1.0, 0.0)[None, :])
        tl.store(grad_rows[:, None] + wide * grad_logits_stride_k, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _shares(likelihood, weight):
    """g·exp(l − largest) of each expert, that largest exponent l + log g, and the shares' sum without its scale.

    `largest` is the largest l + log g, so the first result's largest is 1; a shut gate (g = 0) has no part in it.
    """
    open_gate = weight > 0
    exponent = likelihood + tl.log(tl.where(open_gate, weight, 1))
    largest = tl.max(tl.where(open_gate, exponent, float("-inf")), 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    shares = tl.where(open_gate, tl.exp(tl.where(open_gate, exponent - largest, 0)), 0)
    return shares, largest, tl.sum(shares, 0)


@torch.library.custom_op("immunity_fast::mixture_cross_entropy", mutates_args=())
def mixture_cross_entropy(logits: Tensor, gate: Tensor, targets: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the mixture and of each expert, eq. (2).

    Args:
        logits: (N, B, K) float32, bfloat16 or float16, of any strides.
        gate: (B, N) weights ≥ 0 that sum to 1 over the experts, float32, bfloat16 or float16, of any strides.
        targets: (B,) int64 labels in [0, K); another one gives NaN.
        alpha: weight of the experts' own cross-entropies.

    Returns:
        CE (B,) float32 in nats, and statistics (3, N, B) float32 that only the backward pass has a use for.
    """
    experts, samples, classes = logits.shape
    losses, statistics = mixture.empty(logits)
    if samples:
        with launch.on_device(logits):
            _cross_entropy_kernel[(samples,)](
                logits, *logits.stride(), gate, *gate.stride(), targets, *targets.stride(),
                losses, statistics, samples, classes, alpha,
                EXPERTS=experts, **mixture.tile(experts, classes),
            )  # fmt: skip
    return losses, statistics


@mixture_cross_entropy.register_fake
def _(logits, *_):
    return mixture.empty(logits)


@torch.library.custom_op("immunity_fast::mixture_cross_entropy_backward", mutates_args=())
def mixture_cross_entropy_backward(
    grad_losses: Tensor, logits: Tensor, gate: Tensor, targets: Tensor, statistics: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Both derivatives of `mixture_cross_entropy`.

    Args:
        grad_losses: ∂L/∂CE, (B,) float32.
        logits: as they were given.
        gate: as it was given.
        targets: as they were given.
        statistics: as they were returned, (3, N, B) float32.
        alpha: as it was given.

    Returns:
        ∂L/∂logits (N, B, K) and ∂L/∂gate (B, N), in the dtypes of logits and gate.
    """
    experts, samples, classes = logits.shape
    grad_logits = torch.empty_like(logits)
    grad_gate = statistics.new_empty((samples, experts))
    if samples:
        with launch.on_device(logits):
            _cross_entropy_backward_kernel[(samples,)](
                grad_losses, *grad_losses.stride(), logits, *logits.stride(), gate, *gate.stride(),
                targets, *targets.stride(), statistics, grad_logits, *grad_logits.stride(), grad_gate,
                samples, classes, alpha,
                EXPERTS=experts, **mixture.tile(experts, classes),
            )  # fmt: skip
    return grad_logits, grad_gate.to(gate.dtype)


@mixture_cross_entropy_backward.register_fake
def _(_grad_losses, logits, gate, *_):
    return torch.empty_like(logits), gate.new_empty(gate.shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps of inputs and outputs what `backward` needs."""
    logits, gate, targets, ctx.alpha = inputs
    ctx.save_for_backward(logits, gate, targets, output[1])
    ctx.mark_non_differentiable(output[1])


def backward(ctx: Any, grad_losses: Tensor, *_: None) -> tuple[Any, ...]:
    """The derivative with respect to each input, None where there is none, from ∂L/∂CE."""
    return (*mixture_cross_entropy_backward(grad_losses, *ctx.saved_tensors, ctx.alpha), None, None)


mixture_cross_entropy.register_autograd(backward, setup_context=setup_context)
mixture_cross_entropy_backward.register_autograd(refuse_second_derivative)
