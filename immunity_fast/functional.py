"""The functions that `FusedImmunityLoss` is made of, each usable alone; they check arguments and pick the kernels.

Shapes throughout: N experts, B samples, K classes, C channels, activation maps of h×w, heatmaps of H×W. Half-precision
inputs are computed in float32 (autocast included), float64 stays float64. Equation numbers: arXiv 2402.18787.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from immunity_fast.kernels import reference

WeightScale = Literal["channels", "spatial"]
Score = Literal["logit", "probability"]
Backend = Literal["auto", "torch", "triton"]
Experts = Tensor | Sequence[Tensor]  # one tensor with the experts first, or a sequence of one tensor an expert


def gradcam_heatmaps(
    activations: Tensor,
    gradients: Tensor,
    *,
    size: tuple[int, int] | None = None,
    weight_scale: WeightScale = "channels",
    backend: Backend = "auto",
) -> Tensor:
    """Grad-CAM heatmaps, eq. (3), not normalised.

    Args:
        activations: (N, B, C, h, w) maps A.
        gradients: (N, B, C, h, w) derivatives of the label's score with respect to A.
        size: (H, W) of the heatmaps, by bilinear resampling; None keeps (h, w).
        weight_scale: the factor s of the channel weights, "channels" (1/C, the paper) or "spatial" (1/(h·w), Grad-CAM).
        backend: "torch", or "auto", which takes the fastest that is available.

    Returns:
        (N, B, H, W), at least float32, ≥ 0, differentiable in both inputs.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, value or type.
    """
    size = check_heatmap_options(size, weight_scale, 0.0, backend)
    activations, gradients = _check_maps(activations, gradients)
    with torch.autocast(activations.device.type, enabled=False):
        weights = reference.channel_weights(gradients, weight_scale)
        return reference.heatmaps(reference.score_maps(activations, weights), size)


def heatmap_losses(
    activations: Tensor,
    gradients: Tensor,
    *,
    size: tuple[int, int] | None = None,
    normalize: bool = True,
    smoothing: float = 0.01,
    weight_scale: WeightScale = "channels",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Mutual-information loss, eq. (9), and position-stability loss, eqs. (10) and (11), of the experts' heatmaps.

    Args:
        activations: (N, B, C, h, w) maps A, N ≥ 2.
        gradients: (N, B, C, h, w) derivatives of the label's score with respect to A.
        size: (H, W) of the heatmaps; None keeps (h, w). Distances are in these pixels.
        normalize: eq. (9) on each heatmap's distribution; False puts the heatmap itself into eq. (9), as the paper
            prints it. Centres are those of the distribution either way.
        smoothing: ε ≥ 0, what every pixel gets of the map's mean magnitude before normalising.
        weight_scale: see `gradcam_heatmaps`.
        backend: see `gradcam_heatmaps`.

    Returns:
        (mutual_information (B,), position_stability ()), not weighted, differentiable in both inputs. The first lies in
        [0, N·log N] when normalised, and log N minus its N-th part is the mutual information in nats. Zeros for B = 0.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, value or type.
    """
    size = check_heatmap_options(size, weight_scale, smoothing, backend)
    activations, gradients = _check_maps(activations, gradients)
    if activations.shape[0] < 2:
        raise ValueError(f"activations: at least 2 experts expected, got shape {tuple(activations.shape)}")
    with torch.autocast(activations.device.type, enabled=False):
        weights = reference.channel_weights(gradients, weight_scale)
        p = reference.distributions(activations, weights, size, smoothing)
        in_information = p if normalize else reference.heatmaps(reference.score_maps(activations, weights), size)
        return (
            reference.mutual_information_loss(in_information),
            reference.position_stability(reference.centres(p)),
        )


def mixture_log_probabilities(logits: Experts, gate: Tensor | None = None) -> Tensor:
    """The mixture, eq. (1), in logarithms: log Σ_i g_i softmax(f_i).

    Args:
        logits: (N, B, K), or N tensors (B, K).
        gate: (B, N) or (N,) weights ≥ 0 that sum to 1 over the experts; None is 1/N each.

    Returns:
        (B, K) log-probabilities, at least float32.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or type.
    """
    logits = stack_experts("logits", logits, 3, "(N, B, K)")
    gate = _check_gate(gate, logits)
    return reference.log_mixture(logits.log_softmax(-1), gate.T[..., None])


def mixture_cross_entropy(logits: Experts, gate: Tensor | None, targets: Tensor, alpha: float) -> Tensor:
    """Cross-entropy of the mixture and, weighted by α, of each expert, eq. (2).

    Args:
        logits: (N, B, K), or N tensors (B, K).
        gate: (B, N) or (N,) weights ≥ 0 that sum to 1 over the experts; None is 1/N each.
        targets: (B,) integer labels in [0, K).
        alpha: weight of the experts' own cross-entropies, ≥ 0.

    Returns:
        (B,) in nats, at least float32; finite where the mixture's probability underflows.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, value or type.
    """
    logits = stack_experts("logits", logits, 3, "(N, B, K)")
    check_weight("alpha", alpha)
    return reference.mixture_cross_entropy(
        logits, _check_gate(gate, logits), check_targets(targets, logits.shape[1], logits.shape[2]), alpha
    )


def label_scores(logits: Experts, targets: Tensor, score: Score) -> Tensor:
    """Sum over experts and samples of the label's logit or probability: what Grad-CAM differentiates; 0-d."""
    logits = stack_experts("logits", logits, 3, "(N, B, K)")
    scores = logits.softmax(-1) if score == "probability" else logits
    return scores.gather(-1, targets.expand(logits.shape[0], -1)[..., None]).sum()


def stack_experts(name: str, value: Experts, dim: int, expected: str) -> Tensor:
    """One tensor of at least float32 with the experts first, from such a tensor or from one tensor an expert."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Sequence) or not all(isinstance(part, Tensor) for part in value):
            kinds = [type(part).__name__ for part in value] if isinstance(value, Sequence) else type(value).__name__
            raise TypeError(f"{name}: expected a tensor {expected} or a list of tensors, got {kinds}")
        shapes = [tuple(part.shape) for part in value]
        if not shapes or len(set(shapes)) != 1:
            raise ValueError(f"{name}: expected tensors of one shape, got {shapes}")
        value = torch.stack(list(value))
    if not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    if value.dim() != dim or 0 in (value.shape[0], *value.shape[2:]):
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
    return _at_least_float32(value)


def check_targets(targets: Tensor, samples: int, classes: int) -> Tensor:
    """`targets` as int64, once its type, shape and (on a CPU, where looking is free) range are right."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets: expected an integer tensor, got {getattr(targets, 'dtype', type(targets).__name__)}")
    if targets.shape != (samples,):
        raise ValueError(f"targets: expected shape ({samples},), got {tuple(targets.shape)}")
    if targets.device.type == "cpu" and samples and not torch.compiler.is_compiling():
        smallest, largest = (int(bound) for bound in targets.aminmax())
        if smallest < 0 or largest >= classes:
            raise ValueError(f"targets: expected labels in [0, {classes}), got {smallest} to {largest}")
    return targets.long()


def check_weight(name: str, value: float) -> None:
    """A coefficient must be a finite number ≥ 0."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def check_choice(name: str, value: str, choices: object) -> None:
    """`value` must be one of a `Literal`'s words."""
    if value not in get_args(choices):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(choices))}, got {value!r}")


def check_heatmap_options(
    size: tuple[int, int] | None, weight_scale: str, smoothing: float, backend: str
) -> tuple[int, int] | None:
    """The options that all heatmap functions share; returns `size` as a tuple."""
    check_choice("weight_scale", weight_scale, WeightScale)
    check_choice("backend", backend, Backend)
    check_weight("smoothing", smoothing)
    if backend == "triton":
        raise ValueError("backend: this version has no Triton kernels yet; use 'torch' or 'auto'")
    if size is None:
        return None
    if (
        not isinstance(size, (tuple, list))
        or len(size) != 2
        or not all(isinstance(side, int) and side > 0 for side in size)
    ):
        raise ValueError(f"size: expected two positive integers (H, W) or None, got {size!r}")
    return (size[0], size[1])


def _check_maps(activations: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    activations = stack_experts("activations", activations, 5, "(N, B, C, h, w)")
    gradients = stack_experts("gradients", gradients, 5, "(N, B, C, h, w)")
    if gradients.shape != activations.shape:
        raise ValueError(
            f"gradients: expected the shape of activations, {tuple(activations.shape)}, got {tuple(gradients.shape)}"
        )
    dtype = torch.promote_types(activations.dtype, gradients.dtype)
    return activations.to(dtype), gradients.to(dtype)


def _check_gate(gate: Tensor | None, logits: Tensor) -> Tensor:
    experts, samples = logits.shape[:2]
    if gate is None:
        return logits.new_full((samples, experts), 1 / experts)
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"gate: expected a floating-point tensor, got {getattr(gate, 'dtype', type(gate).__name__)}")
    if gate.shape not in ((experts,), (samples, experts)):
        raise ValueError(
            f"gate: expected (B, N) = ({samples}, {experts}) or (N,) = ({experts},), got shape {tuple(gate.shape)}"
        )
    return _at_least_float32(gate).expand(samples, experts)


def _at_least_float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
