"""Cross-entropy of the mixture and of each expert, eq. (2), of targets that are distributions, and its derivatives.

In Triton, a program a sample. With coefficients c_k ≥ 0 (what the target gives to class k, times the weight of the
class), l_ik = log softmax(f_i)_k, m_k = log Σ_i g_i exp(l_ik) and r_ik = g_i exp(l_ik − m_k), expert i's share of the
class:

    CE         = −Σ_k c_k m_k − α Σ_i Σ_k c_k l_ik
    ∂CE/∂f_ij  = softmax(f_i)_j·(S_i + α Σ_k c_k) − c_j (r_ij + α),   S_i = Σ_k c_k r_ik,  Σ_i S_i = Σ_k c_k
    ∂CE/∂g_i   = −Σ_k c_k exp(l_ik − m_k)
    ∂CE/∂c_k   = −m_k − α Σ_i l_ik

Of a label alone, `cross_entropy` computes the same with less.
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
_PEAK = tl.constexpr(0)  # max_k f_ik
_LOG_TOTAL = tl.constexpr(1)  # log Σ_k exp(f_ik − max f_i)
_SHARE = tl.constexpr(2)  # S_i


@triton.jit(do_not_specialize=["samples"])
def _soft_cross_entropy_kernel(
    logits_ptr,  # (N, B, K) float32, bfloat16 or float16
    logits_stride_n, logits_stride_b, logits_stride_k,
    gate_ptr,  # (B, N) float32, bfloat16 or float16
    gate_stride_b, gate_stride_n,
    coefficients_ptr,  # (B, K) float32
    coefficients_stride_b, coefficients_stride_k,
    losses_ptr,  # (B,) float32, out
    statistics_ptr,  # (3, N, B) float32, out
    samples, classes: tl.constexpr,
    alpha,
    EXPERTS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """The loss of one sample: once over the classes for each expert's softmax, and once more for the loss."""
    sample = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_EXPERTS)
    present = expert < EXPERTS
    logit_rows = logits_ptr + expert.to(tl.int64) * logits_stride_n + sample * logits_stride_b
    peak, log_total = log_softmax(logit_rows, logits_stride_k, present, classes, BLOCK_EXPERTS, BLOCK_CLASSES)
    weight = tl.load(gate_ptr + sample * gate_stride_b + expert.to(tl.int64) * gate_stride_n, mask=present, other=0).to(
        tl.float32
    )
    loss = tl.zeros([BLOCK_CLASSES], tl.float32)
    share = tl.zeros([BLOCK_EXPERTS], tl.float32)
    for start in range(0, classes, BLOCK_CLASSES):
        index = start + tl.arange(0, BLOCK_CLASSES)
        wide = index.to(tl.int64)
        mask = present[:, None] & (index < classes)[None, :]
        coefficient_ptrs = coefficients_ptr + sample * coefficients_stride_b + wide * coefficients_stride_k
        coefficient = tl.load(coefficient_ptrs, mask=index < classes, other=0).to(tl.float32)
        values = tl.load(logit_rows[:, None] + wide[None, :] * logits_stride_k, mask=mask, other=0).to(tl.float32)
        likelihood = _likelihood(values, peak, log_total, coefficient, mask)
        shares, largest, sum_of_shares = _shares_of_classes(likelihood, weight)
        loss -= coefficient * (tl.log(sum_of_shares) + largest + alpha * tl.sum(likelihood, 0))
        share += tl.sum(coefficient[None, :] * shares / sum_of_shares[None, :], 1)
    tl.store(losses_ptr + sample, tl.sum(loss, 0))
    statistic_ptrs = statistics_ptr + expert.to(tl.int64) * samples + sample
    all_maps = samples.to(tl.int64) * EXPERTS
    tl.store(statistic_ptrs + _PEAK * all_maps, peak, mask=present)
    tl.store(statistic_ptrs + _LOG_TOTAL * all_maps, log_total, mask=present)
    tl.store(statistic_ptrs + _SHARE * all_maps, share, mask=present)


@triton.jit(do_not_specialize=["samples"])
def _soft_cross_entropy_backward_kernel(
    grad_losses_ptr,  # (B,) float32
    grad_losses_stride_b,
    logits_ptr,  # (N, B, K) float32, bfloat16 or float16
    logits_stride_n, logits_stride_b, logits_stride_k,
    gate_ptr,  # (B, N) float32, bfloat16 or float16
    gate_stride_b, gate_stride_n,
    coefficients_ptr,  # (B, K) float32
    coefficients_stride_b, coefficients_stride_k,
    statistics_ptr,  # (3, N, B) float32
    grad_logits_ptr,  # (N, B, K) in the dtype of the logits, out
    grad_logits_stride_n, grad_logits_stride_b, grad_logits_stride_k,
    grad_gate_ptr,  # (B, N) float32, out
    grad_coefficients_ptr,  # (B, K) float32, out; None unless NEEDS_COEFFICIENTS
    samples, classes: tl.constexpr,
    alpha,
    NEEDS_COEFFICIENTS: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_EXPERTS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """∂L/∂logits, ∂L/∂gate and ∂L/∂coefficients of one sample, in one pass over its classes."""
    sample = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_EXPERTS)
    present = expert < EXPERTS
    upstream = tl.load(grad_losses_ptr + sample * grad_losses_stride_b).to(tl.float32)
    statistic_ptrs = statistics_ptr + expert.to(tl.int64) * samples + sample
    all_maps = samples.to(tl.int64) * EXPERTS
    peak = tl.load(statistic_ptrs + _PEAK * all_maps, mask=present, other=0)
    log_total = tl.load(statistic_ptrs + _LOG_TOTAL * all_maps, mask=present, other=0)
    share = tl.load(statistic_ptrs + _SHARE * all_maps, mask=present, other=0)
    weight = tl.load(gate_ptr + sample * gate_stride_b + expert.to(tl.int64) * gate_stride_n, mask=present, other=0).to(
        tl.float32
    )
    factor = share + alpha * tl.sum(share, 0)
    grad_weight = tl.zeros([BLOCK_EXPERTS], tl.float32)
    logit_rows = logits_ptr + expert.to(tl.int64) * logits_stride_n + sample * logits_stride_b
    grad_rows = grad_logits_ptr + expert.to(tl.int64) * grad_logits_stride_n + sample * grad_logits_stride_b
    for start in range(0, classes, BLOCK_CLASSES):
        index = start + tl.arange(0, BLOCK_CLASSES)
        wide = index.to(tl.int64)
        mask = present[:, None] & (index < classes)[None, :]
        coefficient_ptrs = coefficients_ptr + sample * coefficients_stride_b + wide * coefficients_stride_k
        coefficient = tl.load(coefficient_ptrs, mask=index < classes, other=0).to(tl.float32)
        values = tl.load(logit_rows[:, None] + wide[None, :] * logits_stride_k, mask=mask, other=0).to(tl.float32)
        likelihood = _likelihood(values, peak, log_total, coefficient, mask)
        shares, largest, sum_of_shares = _shares_of_classes(likelihood, weight)
        probability = tl.exp(values - peak[:, None] - log_total[:, None])
        own = coefficient[None, :] * (shares / sum_of_shares[None, :] + alpha)
        grad = upstream * (probability * factor[:, None] - own)
        grad_ptrs = grad_rows[:, None] + wide[None, :] * grad_logits_stride_k
        tl.store(grad_ptrs, grad.to(grad_logits_ptr.dtype.element_ty), mask=mask)
        # An open gate's own share bounds exp(l − m) by 1/g; a shut one's expert may be likelier by any factor.
        exponent = likelihood - largest[None, :]
        exponent = tl.where((weight > 0)[:, None], exponent, tl.minimum(exponent, LARGEST_EXPONENT))
        ratio = tl.exp(exponent - tl.log(sum_of_shares)[None, :])
        grad_weight -= tl.sum(tl.where(mask & (coefficient != 0)[None, :], coefficient[None, :] * ratio, 0), 1)
        if NEEDS_COEFFICIENTS:
            slope = -(tl.log(sum_of_shares) + largest + alpha * tl.sum(likelihood, 0))
            tl.store(grad_coefficients_ptr + sample * classes + wide, upstream * slope, mask=index < classes)
    tl.store(grad_gate_ptr + sample * EXPERTS + expert, upstream * grad_weight, mask=present)


@triton.jit
def _likelihood(values, peak, log_total, coefficient, mask):
    """l (experts, classes) of a block of classes: 0 outside of it, and where it is −∞ nothing asks for it."""
    likelihood = values - peak[:, None] - log_total[:, None]
    unasked = (likelihood == float("-inf")) & (coefficient == 0)[None, :]
    return tl.where(mask & (unasked == 0), likelihood, 0)


@triton.jit
def _shares_of_classes(likelihood, weight):
    """Of each class of a block: g·exp(l − largest) of each expert, that largest exponent l + log g, the shares' sum.

    `largest` is the largest l + log g, so that a share is 1; a shut gate (g = 0) has no part in it.
    """
    open_gate = (weight > 0)[:, None]
    exponent = likelihood + tl.log(tl.where(weight > 0, weight, 1))[:, None]
    largest = tl.max(tl.where(open_gate, exponent, float("-inf")), 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    shares = tl.where(open_gate, tl.exp(tl.where(open_gate, exponent - largest[None, :], 0)), 0)
    return shares, largest, tl.sum(shares, 0)


@torch.library.custom_op("immunity_fast::soft_mixture_cross_entropy", mutates_args=())
def soft_mixture_cross_entropy(
    logits: Tensor, gate: Tensor, coefficients: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the mixture and of each expert, eq. (2), of targets that are distributions.

    Args:
        logits: (N, B, K) float32, bfloat16 or float16, of any strides.
        gate: (B, N) weights ≥ 0 that sum to 1 over the experts, float32, bfloat16 or float16, of any strides.
        coefficients: (B, K) float32, ≥ 0, of any strides.
        alpha: weight of the experts' own cross-entropies.

    Returns:
        CE (B,) float32 in nats, and statistics (3, N, B) float32 that only the backward pass has a use for.
    """
    experts, samples, classes = logits.shape
    losses, statistics = mixture.empty(logits)
    if samples:
        with launch.on_device(logits):
            _soft_cross_entropy_kernel[(samples,)](
                logits, *logits.stride(), gate, *gate.stride(), coefficients, *coefficients.stride(),
                losses, statistics, samples, classes, alpha,
                EXPERTS=experts, **mixture.tile(experts, classes), **launch.SAME_BITS,
            )  # fmt: skip
    return losses, statistics


@soft_mixture_cross_entropy.register_fake
def _(logits, *_):
    return mixture.empty(logits)


@torch.library.custom_op("immunity_fast::soft_mixture_cross_entropy_backward", mutates_args=())
def soft_mixture_cross_entropy_backward(
    grad_losses: Tensor,
    logits: Tensor,
    gate: Tensor,
    coefficients: Tensor,
    statistics: Tensor,
    alpha: float,
    needs_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of `soft_mixture_cross_entropy`.

    Args:
        grad_losses: ∂L/∂CE, (B,) float32.
        logits: as they were given.
        gate: as it was given.
        coefficients: as they were given.
        statistics: as they were returned, (3, N, B) float32.
        alpha: as it was given.
        needs_coefficients: whether the third result is wanted; if not it is an empty tensor.

    Returns:
        ∂L/∂logits (N, B, K), ∂L/∂gate (B, N) and ∂L/∂coefficients (B, K), in the dtypes of logits, gate and
        coefficients.
    """
    experts, samples, classes = logits.shape
    grad_logits = torch.empty_like(logits)
    grad_gate = statistics.new_empty((samples, experts))
    grad_coefficients = statistics.new_empty((samples, classes) if needs_coefficients else 0)
    if samples:
        with launch.on_device(logits):
            _soft_cross_entropy_backward_kernel[(samples,)](
                grad_losses, *grad_losses.stride(), logits, *logits.stride(), gate, *gate.stride(),
                coefficients, *coefficients.stride(), statistics, grad_logits, *grad_logits.stride(), grad_gate,
                grad_coefficients if needs_coefficients else None, samples, classes, alpha,
                NEEDS_COEFFICIENTS=needs_coefficients,
                EXPERTS=experts, **mixture.tile(experts, classes), **launch.SAME_BITS,
            )  # fmt: skip
    return grad_logits, grad_gate.to(gate.dtype), grad_coefficients


@soft_mixture_cross_entropy_backward.register_fake
def _(_grad_losses, logits, gate, coefficients, _statistics, _alpha, needs_coefficients):
    grad_coefficients = coefficients.new_empty(coefficients.shape if needs_coefficients else 0)
    return torch.empty_like(logits), gate.new_empty(gate.shape), grad_coefficients


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps of inputs and outputs what `backward` needs."""
    logits, gate, coefficients, ctx.alpha = inputs
    ctx.save_for_backward(logits, gate, coefficients, output[1])
    ctx.mark_non_differentiable(output[1])


def backward(ctx: Any, grad_losses: Tensor, *_: None) -> tuple[Any, ...]:
    """The derivative with respect to each input, None where there is none, from ∂L/∂CE."""
    needs = ctx.needs_input_grad[2]
    grad_logits, grad_gate, grad_coefficients = soft_mixture_cross_entropy_backward(
        grad_losses, *ctx.saved_tensors, ctx.alpha, needs
    )
    return grad_logits, grad_gate, grad_coefficients if needs else None, None


soft_mixture_cross_entropy.register_autograd(backward, setup_context=setup_context)
soft_mixture_cross_entropy_backward.register_autograd(refuse_second_derivative)
