"""The losses in plain PyTorch: the oracle of tests and benchmarks, and the CPU path.

Everything here is differentiable any number of times, runs in the dtype it is given (callers pass at least float32),
and checks nothing: `immunity_fast.functional` does. Numbers in brackets are the equations of arXiv 2402.18787.

Shapes: N experts, B samples, C channels, maps of h×w cells, heatmaps of H×W pixels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.kernels.group import group_mean, group_ratio


def channel_weights(gradients: Tensor, weight_scale: str) -> Tensor:
    """(3): w = s·Σ_uv ∂y/∂A(u, v).

    Args:
        gradients: ∂y/∂A, (N, B, C, h, w).
        weight_scale: see `weight_factor`.

    Returns:
        w, (N, B, C).
    """
    return gradients.sum((-2, -1)) * weight_factor(gradients, weight_scale)


def weight_factor(maps: Tensor, weight_scale: str) -> float:
    """s of (3).

    Args:
        maps: (N, B, C, h, w), of which the shape alone is looked at.
        weight_scale: "channels" is 1/C, the paper's; "spatial" 1/(h·w), Grad-CAM's.
    """
    channels, height, width = maps.shape[2:]
    return 1 / (channels if weight_scale == "channels" else height * width)


def score_maps(activations: Tensor, weights: Tensor) -> Tensor:
    """(3) before its ReLU: R = Σ_k w_k A_k.

    Args:
        activations: A, (N, B, C, h, w).
        weights: w, (N, B, C).

    Returns:
        R, (N, B, h, w).
    """
    return torch.einsum("nbc,nbchw->nbhw", weights, activations)


def heatmaps(scores: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(3): ReLU, then bilinear resampling (`align_corners=False`).

    Args:
        scores: R, (N, B, h, w).
        size: (H, W); None keeps (h, w).

    Returns:
        (N, B, H, W), ≥ 0, not normalised.
    """
    small = scores.relu()
    if size is None or tuple(size) == tuple(small.shape[-2:]):
        return small
    if small.shape[1] == 0:  # interpolate refuses an empty batch
        return small.sum((-2, -1), keepdim=True).expand(-1, -1, *size)
    return F.interpolate(small, size=size, mode="bilinear", align_corners=False)


def distributions(activations: Tensor, weights: Tensor, size: tuple[int, int] | None, smoothing: float) -> Tensor:
    """p = (h + ε·m) / Σ_ab (h + ε·m), where h is the heatmap and m the mean of |R| over the h×w cells.

    A map that is zero everywhere gives the uniform distribution, with zero gradient.

    Args:
        activations: A, (N, B, C, h, w).
        weights: w, (N, B, C).
        size: (H, W); None keeps (h, w).
        smoothing: ε ≥ 0.

    Returns:
        p, (N, B, H, W), which sums to 1 over (H, W).
    """
    # p does not change with the scale of w or of R. Dividing by their maxima, held constant, therefore changes neither
    # the value nor any derivative, and keeps float32 away from overflow and underflow.
    scores = score_maps(activations, weights / _maximum(weights, (-1,)))
    scores = scores / _maximum(scores, (-2, -1))
    smoothed = heatmaps(scores, size) + smoothing * scores.abs().mean((-2, -1), keepdim=True)
    total = smoothed.sum((-2, -1), keepdim=True)
    alive = total != 0  # NaN is alive: it must not pass for a uniform map
    height, width = smoothed.shape[-2:]
    return torch.where(alive, smoothed / torch.where(alive, total, 1), 1 / (height * width))


def _maximum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """max |x| over some axes, which stay, held constant; 1 where it is no normal number."""
    largest = x.detach().abs().amax(dims, keepdim=True)
    return torch.where(largest >= torch.finfo(x.dtype).tiny, largest, 1)


def mutual_information_loss(p: Tensor) -> Tensor:
    """(9): MI_q = −Σ_i Σ_ab p_i log(p_i / Σ_j p_j), with 0·log 0 = 0.

    The gradient at p_i = 0 is infinite; here it is some finite number, of no consequence, because such a pixel lies
    where the ReLU is off, and the normalisation sees only its zero share.

    Args:
        p: (N, B, H, W).

    Returns:
        MI_q, (B,), in nats; in [0, N·log N] where each p_i sums to 1.
    """
    positive = p > 0
    total = p.sum(0)
    log_ratio = torch.where(positive, p, 1).log() - torch.where(total > 0, total, 1).log()
    return -(p * torch.where(positive, log_ratio, 0)).sum((0, -2, -1))


def centres(p: Tensor) -> Tensor:
    """(10): Σ_ab (a, b)·p(a, b).

    Args:
        p: (N, B, H, W), which sums to 1 over (H, W).

    Returns:
        (N, B, 2), row first, in pixels counted from 0.
    """
    rows = torch.arange(p.shape[-2], dtype=p.dtype, device=p.device)
    columns = torch.arange(p.shape[-1], dtype=p.dtype, device=p.device)
    return torch.stack([(p.sum(-1) * rows).sum(-1), (p.sum(-2) * columns).sum(-1)], -1)


def position_stability(positions: Tensor, group_name: str = "", counted: Tensor | None = None) -> Tensor:
    """(11): PS = Σ_{i≠j} Σ_q (d²_qij − mean_q d²_qij)² over ordered pairs.

    Args:
        positions: centres (N, B, 2), in pixels.
        group_name: of a process group whose processes have B samples each: the mean is over all of them, and the result
            this process' share of the sum. Its gradient is exact, because PS has no derivative with respect to the
            mean; its second derivative is not. "" is this process alone.
        counted: (B,) bool, of the samples that count; None: all do.

    Returns:
        PS, (), in pixels⁴.
    """
    squared_distances = (positions[:, None] - positions[None]).square().sum(-1)
    if counted is not None:
        squared_distances = torch.where(counted, squared_distances, 0)
        totals, count = squared_distances.sum(-1, keepdim=True), counted.sum(dtype=squared_distances.dtype)
        means = group_ratio(totals, count, group_name) if group_name else totals / torch.where(count > 0, count, 1)
        return torch.where(counted, squared_distances - means, 0).square().sum()
    means = squared_distances.sum(-1, keepdim=True) / max(positions.shape[1], 1)
    if group_name:
        means = group_mean(means, group_name)
    return (squared_distances - means).square().sum()


def log_mixture(log_probabilities: Tensor, gate: Tensor) -> Tensor:
    """(1) in logarithms: log Σ_i g_i exp(l_i).

    Stable where every term underflows, and right in value and gradient where a weight is exactly 0.

    Args:
        log_probabilities: l, (N, ...).
        gate: weights g ≥ 0 that broadcast against them.

    Returns:
        (...).
    """
    open_gate = gate > 0
    exponents = log_probabilities + torch.where(open_gate, gate, 1).log()
    largest = exponents.detach().masked_fill(~open_gate, -torch.inf).amax(0)
    largest = torch.where(largest.isfinite(), largest, 0)
    # A shut gate contributes nothing, but its derivative is the expert's probability; the clamp keeps 0·exp(·) finite.
    shut = gate * (log_probabilities - largest).clamp(max=80).exp()
    opened = torch.where(open_gate, exponents - largest, 0).exp()
    return torch.where(open_gate, opened, shut).sum(0).log() + largest


def mixture_cross_entropy(logits: Tensor, gate: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """(2): CE_q = −log ŷ_q[label] − α Σ_i log softmax(f_i)[label].

    Args:
        logits: f, (N, B, K).
        gate: (B, N) weights ≥ 0 that sum to 1 over the experts.
        targets: (B,) int64 labels.
        alpha: α.

    Returns:
        CE, (B,), in nats.
    """
    index = targets.expand(logits.shape[0], -1)[..., None]
    log_likelihoods = logits.log_softmax(-1).gather(-1, index)[..., 0]
    return -log_mixture(log_likelihoods, gate.T) - alpha * log_likelihoods.sum(0)


def soft_mixture_cross_entropy(logits: Tensor, gate: Tensor, coefficients: Tensor, alpha: float) -> Tensor:
    """(2) of a target that is a distribution: CE_q = −Σ_k c_k log ŷ_q[k] − α Σ_i Σ_k c_k log softmax(f_i)[k].

    Args:
        logits: f, (N, B, K).
        gate: (B, N) weights ≥ 0 that sum to 1 over the experts.
        coefficients: c, (B, K), ≥ 0: what the target gives to each class, times the weight of the class. Where it is 0
            the probability may be 0, too.
        alpha: α.

    Returns:
        CE, (B,), in nats.
    """
    log_likelihoods = logits.log_softmax(-1)
    # 0·log 0 = 0
    log_likelihoods = torch.where((coefficients == 0) & (log_likelihoods == -torch.inf), 0, log_likelihoods)
    mixture = log_mixture(log_likelihoods, gate.T[..., None])
    return -(coefficients * (mixture + alpha * log_likelihoods.sum(0))).sum(-1)
