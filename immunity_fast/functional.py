"""The functions that `FusedImmunityLoss` is made of, each usable alone; they check arguments and pick the kernels.

Shapes throughout: N experts, B samples, K classes, C channels, activation maps of h×w, heatmaps of H×W. Maps are
(B, C, h, w), or (B, h, w, C) with `layout="NHWC"`, as those of a Swin Transformer. Half-precision inputs are computed
in float32 (autocast included), float64 stays float64. Equation numbers: arXiv 2402.18787.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.autograd import forward_ad

from immunity_fast.arguments import (
    Backend,
    Experts,
    HeatmapOptions,
    Layout,
    Score,
    Size,
    WeightScale,
    are_alike,
    channels_back,
    channels_first,
    check_device,
    check_gate,
    check_maps,
    checked_size,
    join_experts,
    stack_experts,
)
from immunity_fast.kernels import reference
from immunity_fast.runtime.checks import check_choice, check_weight
from immunity_fast.runtime.precision import accumulation_dtype, at_least_float32
from immunity_fast.targets import (
    IGNORE_INDEX,
    ClassWeights,
    TargetOptions,
    Targets,
    checked_class_weights,
    read_targets,
)

# Triton is not made for every platform. Where it is, it takes longer to import than all of this package, and so the
# kernels are imported where they run.
HAS_TRITON = find_spec("triton") is not None

__all__ = [
    "HAS_TRITON",
    "Backend",
    "Experts",
    "HeatmapOptions",
    "Layout",
    "Score",
    "WeightScale",
    "gradcam_heatmaps",
    "heatmap_loss_gradients",
    "heatmap_losses",
    "label_scores",
    "log_mixture",
    "mixture_cross_entropy",
    "mixture_log_probabilities",
]


def gradcam_heatmaps(
    activations: Experts,
    gradients: Experts,
    *,
    size: Size = None,
    weight_scale: WeightScale = "channels",
    backend: Backend = "auto",
    layout: Layout = "NCHW",
) -> Tensor:
    """Grad-CAM heatmaps, eq. (3), not normalised.

    Args:
        activations: (N, B, C, h, w) maps A, or N tensors (B, C, h, w), of which C, h and w may be each expert's own; as
            `layout` says.
        gradients: derivatives of the label's score with respect to A, of the same shapes; or those already summed over
            space, (N, B, C) or N tensors (B, C), which is all that Grad-CAM looks at.
        size: (H, W) of the heatmaps, or the side of a square, by bilinear resampling; None keeps (h, w), if all maps
            have the same.
        weight_scale: the factor s of the channel weights, "channels" (1/C, the paper) or "spatial" (1/(h·w), Grad-CAM).
        backend: "torch" is plain PyTorch; "triton" the fused kernels, once differentiable, for CUDA tensors (or any, if
            TRITON_INTERPRET=1 was set before the import); "auto" is "triton" for CUDA tensors that are not float64, but
            "torch" under `torch.func`, in forward mode and for maps of different shapes.
        layout: "NCHW", or "NHWC" for channels last, (N, B, h, w, C) or N tensors (B, h, w, C), which are read in place.
            That is about the order of the axes alone: what `memory_format=torch.channels_last` makes is "NCHW".

    Returns:
        (N, B, H, W), at least float32, ≥ 0, differentiable in both inputs.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, value or type.
    """
    size = HeatmapOptions(size=checked_size(size), weight_scale=weight_scale, backend=backend).size
    maps, slopes = check_maps(activations, gradients, layout)
    if _use_kernels(backend, maps, slopes, size):
        from immunity_fast.kernels import heatmaps as fused_heatmaps

        scale = reference.weight_factor(maps[0], weight_scale)
        heatmaps: Tensor = fused_heatmaps.gradcam_heatmaps(maps, slopes, list(size or maps[0].shape[3:]), scale)[0]
        return heatmaps
    with torch.autocast(maps[0].device.type, enabled=False):
        inputs = _reference_inputs(maps, slopes, weight_scale)
        return torch.cat([reference.heatmaps(reference.score_maps(*pair), size) for pair in inputs])


def heatmap_losses(
    activations: Experts,
    gradients: Experts,
    *,
    size: Size = None,
    normalize: bool = True,
    smoothing: float = 0.01,
    weight_scale: WeightScale = "channels",
    backend: Backend = "auto",
    group_name: str = "",
    layout: Layout = "NCHW",
) -> tuple[Tensor, Tensor]:
    """Mutual-information loss, eq. (9), and position-stability loss, eqs. (10) and (11), of the experts' heatmaps.

    Args:
        activations: (N, B, C, h, w) maps A, N ≥ 2, or N tensors (B, C, h, w), each another one, of which C, h and w may
            be each expert's own; as `layout` says. Read in place, whatever their strides.
        gradients: see `gradcam_heatmaps`.
        size: (H, W) of the heatmaps, or the side of a square; None keeps (h, w), if all maps have the same. Distances
            are in these pixels.
        normalize: eq. (9) on each heatmap's distribution; False puts the heatmap itself into eq. (9), as the paper
            prints it. Centres are those of the distribution either way.
        smoothing: ε ≥ 0, what every pixel gets of the map's mean magnitude before normalising.
        weight_scale: see `gradcam_heatmaps`.
        backend: see `gradcam_heatmaps`.
        group_name: of a `torch.distributed` process group (`ProcessGroup.group_name`) whose processes each call this
            with B samples of their own: eq. (11)'s mean is then over the samples of all, and the second result this
            process' share of the sum over all. Once differentiable. "" is this process alone.
        layout: see `gradcam_heatmaps`.

    Returns:
        (mutual_information (B,), position_stability ()), not weighted, differentiable in both inputs. The first lies in
        [0, N·log N] when normalised, and log N minus its N-th part is the mutual information in nats. Zeros for B = 0.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, value or type.
    """
    options = HeatmapOptions(checked_size(size), normalize, smoothing, weight_scale, backend, group_name)
    return losses_of_heatmaps(activations, gradients, options, layout)


def losses_of_heatmaps(
    activations: Experts,
    gradients: Experts,
    options: HeatmapOptions,
    layout: Layout = "NCHW",
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`heatmap_losses` with its options in one.

    Args:
        activations, gradients, layout: see `heatmap_losses`.
        options: the others of its arguments.
        counted: (B,) bool, of the samples that count; of others the mutual-information loss is 0, and they have no part
            in the position stability. None: all count.

    Raises:
        ValueError, TypeError: see `heatmap_losses`.
    """
    maps, slopes = check_maps(activations, gradients, layout)
    if sum(part.shape[0] for part in maps) < 2:
        raise ValueError(f"activations: expected at least 2 experts, got shape {tuple(maps[0].shape)}")
    if _use_kernels(options.backend, maps, slopes, options.size):
        from immunity_fast.kernels import heatmap_losses as fused_losses

        scale = reference.weight_factor(maps[0], options.weight_scale)
        mutual_information, position_stability, *_ = fused_losses.heatmap_losses(
            maps,
            slopes,
            list(options.size or maps[0].shape[3:]),
            options.normalize,
            float(options.smoothing),
            scale,
            options.group_name,
            None if counted is None else counted.float(),
        )
        return _of_counted(mutual_information, counted), position_stability
    with torch.autocast(maps[0].device.type, enabled=False):
        inputs = _reference_inputs(maps, slopes, options.weight_scale)
        p = torch.cat([reference.distributions(*pair, options.size, options.smoothing) for pair in inputs])
        in_information = p
        if not options.normalize:
            scores = [reference.score_maps(*pair) for pair in inputs]
            in_information = torch.cat([reference.heatmaps(score, options.size) for score in scores])
        return (
            _of_counted(reference.mutual_information_loss(in_information), counted),
            reference.position_stability(reference.centres(p), options.group_name, counted),
        )


def heatmap_loss_gradients(
    activations: Tensor,
    gradients: Tensor,
    of_information: Tensor,
    of_stability: Tensor,
    *,
    size: Size = None,
    normalize: bool = True,
    smoothing: float = 0.01,
    weight_scale: WeightScale = "channels",
    backend: Backend = "auto",
    group_name: str = "",
    layout: Layout = "NCHW",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`heatmap_losses` and their derivatives, computed at once, without a graph.

    Args:
        activations: (N, B, C, h, w).
        gradients: summed over space, (N, B, C).
        of_information, of_stability: ∂L/∂(each result of `heatmap_losses`), (B,) and ().
        size, normalize, smoothing, weight_scale, backend, group_name, layout: see `heatmap_losses`.

    Returns:
        (mutual_information (B,), position_stability (), ∂L/∂activations, ∂L/∂gradients), the last two as their
        namesakes; detached.

    Raises:
        ValueError, TypeError: see `heatmap_losses`.
    """
    options = HeatmapOptions(checked_size(size), normalize, smoothing, weight_scale, backend, group_name)
    return gradients_of_heatmap_losses(activations, gradients, of_information, of_stability, options, layout)


def gradients_of_heatmap_losses(
    activations: Tensor,
    gradients: Tensor,
    of_information: Tensor,
    of_stability: Tensor,
    options: HeatmapOptions,
    layout: Layout = "NCHW",
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`heatmap_loss_gradients` with its options in one.

    Args:
        activations, gradients, of_information, of_stability, layout: see `heatmap_loss_gradients`.
        options: the others of its arguments.
        counted: see `losses_of_heatmaps`.

    Raises:
        ValueError: an unknown layout.
    """
    check_choice("layout", layout, Layout)
    maps, slopes = channels_first(activations.detach(), layout), gradients.detach()
    if not _use_triton(options.backend, "activations", [maps, slopes]):
        by_torch = replace(options, backend="torch")
        (information, stability), pullback = torch.func.vjp(  # type: ignore[misc]
            lambda maps, slopes: losses_of_heatmaps(maps, slopes, by_torch, counted=counted), maps, slopes
        )
        of_maps, of_slopes = pullback((of_information, of_stability))
        return information, stability, channels_back(of_maps, layout), of_slopes
    from immunity_fast.kernels import heatmap_losses as fused_losses

    (maps_part,), (slopes_part,) = check_maps(maps, slopes)
    scale = reference.weight_factor(maps, options.weight_scale)
    in_kernels = (options.normalize, float(options.smoothing), scale)
    share = None if counted is None else counted.float()
    information, stability, *saved = fused_losses.heatmap_losses(
        [maps_part], [slopes_part], list(options.size or maps.shape[3:]), *in_kernels, options.group_name, share
    )
    of_information = _of_counted(of_information, counted)
    (of_maps,), of_slopes = fused_losses.heatmap_losses_backward(
        of_information, of_stability, [maps_part], *saved, share, *in_kernels, slopes.dtype, True, True
    )
    return _of_counted(information, counted), stability, channels_back(of_maps, layout), of_slopes


def mixture_log_probabilities(logits: Experts, gate: Tensor | None = None) -> Tensor:
    """The mixture, eq. (1), in logarithms: log Σ_i g_i softmax(f_i).

    Args:
        logits: (N, B, K), or N tensors (B, K).
        gate: (B, N) or (N,) weights ≥ 0 that sum to 1 over the experts; None is 1/N each. On a CPU the values are
            looked at; on a GPU, where that would wait for it, shape and dtype alone.

    Returns:
        (B, K) log-probabilities, at least float32.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or type.
    """
    logits = stack_experts("logits", logits, 3, "(N, B, K)")
    return log_mixture(logits, check_gate(gate, logits, values=True))


def log_mixture(logits: Tensor, gate: Tensor | None = None) -> Tensor:
    """`mixture_log_probabilities` of a model's own logits (N, B, K) and gate, whose values nobody needs to look at.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or type.
    """
    logits = join_experts("logits", logits, 3, "(N, B, K)")
    gate = at_least_float32(check_gate(gate, logits, values=False))
    return reference.log_mixture(at_least_float32(logits).log_softmax(-1), gate.T[..., None])


def mixture_cross_entropy(
    logits: Experts,
    gate: Tensor | None,
    targets: Tensor,
    alpha: float,
    *,
    label_smoothing: float = 0.0,
    class_weights: ClassWeights = None,
    ignore_index: int | None = IGNORE_INDEX,
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of the mixture and, weighted by α, of each expert, eq. (2).

    Of one network, or of experts that are alike with α = 0, it is `torch.nn.functional.cross_entropy` of the same
    arguments with `reduction="none"`.

    Args:
        logits: (N, B, K), or N tensors (B, K).
        gate: see `mixture_log_probabilities`.
        targets: (B,) integer labels in [0, K), or (B, K) probabilities, whose rows are ≥ 0 and sum to 1. On a CPU the
            values are looked at; on a GPU, where that would wait for it, shape and dtype alone.
        alpha: weight of the experts' own cross-entropies, ≥ 0.
        label_smoothing: ε in [0, 1]: a target t becomes (1 − ε)·t + ε/K.
        class_weights: (K,), ≥ 0: what the classes' parts of the target are multiplied by.
        ignore_index: the label of samples that are ignored, whose loss is 0 without a gradient; of probabilities the
            value of a whole row. None: no sample is.
        backend: see `gradcam_heatmaps`.

    Returns:
        (B,) in nats, at least float32; finite where the mixture's probability underflows.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, value or type.
    """
    options = TargetOptions(label_smoothing, checked_class_weights(class_weights), ignore_index)
    logits = join_experts("logits", logits, 3, "(N, B, K)")
    check_weight("alpha", alpha)
    check_choice("backend", backend, Backend)
    gate = check_gate(gate, logits, values=True)
    found = read_targets(targets, logits.shape[1], logits.shape[2], options)
    return cross_entropies(logits, gate, found, alpha, options, backend=backend)


def cross_entropies(
    logits: Tensor, gate: Tensor, targets: Targets, alpha: float, options: TargetOptions, *, backend: Backend = "auto"
) -> Tensor:
    """`mixture_cross_entropy` of targets that are read, (B,).

    Raises:
        ValueError: tensors of several devices, or a backend that cannot run.
    """
    check_device("gate", logits, [gate])
    check_device("targets", logits, [targets.values])
    by_kernel = _use_triton(backend, "logits", [logits, gate])
    if not by_kernel:
        logits, gate = at_least_float32(logits), at_least_float32(gate)
    if not targets.soft and options.label_smoothing == 0:
        if by_kernel:
            from immunity_fast.kernels import cross_entropy as fused_cross_entropy

            losses: Tensor = fused_cross_entropy.mixture_cross_entropy(logits, gate, targets.values, float(alpha))[0]
        else:
            losses = reference.mixture_cross_entropy(logits, gate, targets.values, alpha)
        weights = targets.weights(options)
        return targets.masked(losses if weights is None else weights.to(losses.dtype) * losses)
    coefficients = targets.coefficients(options, logits.shape[2], accumulation_dtype(logits))
    if by_kernel:
        from immunity_fast.kernels import soft_cross_entropy as fused_soft_cross_entropy

        losses = fused_soft_cross_entropy.soft_mixture_cross_entropy(logits, gate, coefficients, float(alpha))[0]
    else:
        losses = reference.soft_mixture_cross_entropy(logits, gate, coefficients, alpha)
    return targets.masked(losses)


def label_scores(logits: Experts, targets: Tensor, score: Score, counted: Tensor | None = None) -> Tensor:
    """Sum over experts and samples of what Grad-CAM differentiates; 0-d.

    Args:
        logits: (N, B, K), or N tensors (B, K).
        targets: (B,) labels, of which it is the logit or the probability; or (B, K) probabilities t, of which it is
            Σ_k t_k f_k or Σ_k t_k softmax(f)_k. They are constants to it.
        score: which of the two.
        counted: (B,) bool, of the samples that count; None: all do.
    """
    logits = stack_experts("logits", logits, 3, "(N, B, K)")
    scores = logits.softmax(-1) if score == "probability" else logits
    if targets.dim() == 2:
        shares = targets.detach().to(scores.dtype)
        of_samples = (shares * torch.where(shares == 0, 0, scores)).sum(-1)
    else:
        of_samples = scores.gather(-1, targets.expand(logits.shape[0], -1)[..., None])[..., 0]
    return _of_counted(of_samples, counted).sum()


def _of_counted(values: Tensor, counted: Tensor | None) -> Tensor:
    """Values (…, B), 0 of the samples that do not count."""
    return values if counted is None else torch.where(counted, values, 0)


def _reference_inputs(
    maps: Sequence[Tensor], slopes: Sequence[Tensor], weight_scale: WeightScale
) -> list[tuple[Tensor, Tensor]]:
    """Activations (n, B, C, h, w) and channel weights (n, B, C), in a dtype of at least float32.

    All experts at once, or, where their maps differ in shape, one after another.
    """
    if len(maps) > 1 and are_alike(maps) and are_alike(slopes):
        maps, slopes = [torch.cat(list(maps))], [torch.cat(list(slopes))]
    return [_in_one_dtype(*pair, weight_scale) for pair in zip(maps, slopes, strict=True)]


def _in_one_dtype(maps: Tensor, slopes: Tensor, weight_scale: WeightScale) -> tuple[Tensor, Tensor]:
    maps, slopes = at_least_float32(maps), at_least_float32(slopes)
    dtype = torch.promote_types(maps.dtype, slopes.dtype)
    sums = slopes.to(dtype)
    scale = reference.weight_factor(maps, weight_scale)
    return maps.to(dtype), scale * (sums.sum((-2, -1)) if sums.dim() == 5 else sums)


def _use_kernels(backend: Backend, maps: Sequence[Tensor], slopes: Sequence[Tensor], size: Size) -> bool:
    """Whether the fused kernels are to run; they take maps of one shape.

    Raises:
        ValueError: maps of several sizes, and no size that they are brought to; or an order that cannot be met.
    """
    if size is None and len({part.shape[3:] for part in maps}) > 1:
        raise ValueError("size: expected (H, W) for maps of different sizes, got None")
    if not are_alike(maps):
        if backend == "triton":
            shapes = ", ".join(dict.fromkeys(str(tuple(part.shape[2:])) for part in maps))
            raise ValueError(
                f"backend: expected 'torch' or 'auto' for maps of different shapes, {shapes}, got 'triton'"
            )
        return False
    return _use_triton(backend, "activations", [*maps, *slopes])


def _use_triton(backend: str, name: str, tensors: Sequence[Tensor]) -> bool:
    """Whether the fused kernels are to run; an error where they were asked for by name and cannot."""
    if backend == "torch":
        return False
    if not HAS_TRITON:
        if backend == "auto":
            return False
        raise ValueError("backend: expected 'torch' or 'auto', got 'triton', which is not installed here")
    on_gpu = tensors[0].device.type == "cuda"
    if backend == "auto" and not on_gpu:
        return False
    from immunity_fast.kernels import launch

    fit = all(tensor.dtype in launch.DTYPES for tensor in tensors)
    if backend == "auto":
        return fit and not _is_transformed(tensors)
    if _is_transformed(tensors):
        raise ValueError(
            "backend: expected 'torch' or 'auto' under torch.func and in forward mode, got 'triton', which is for "
            "reverse-mode autograd"
        )
    if not on_gpu and not launch.INTERPRETED:
        raise ValueError(
            f"backend: expected CUDA tensors for 'triton', got {name} on {tensors[0].device} (on a CPU it runs in "
            "Triton's interpreter, if TRITON_INTERPRET=1 was set before the import); use 'torch' or 'auto'"
        )
    if not fit:
        raise TypeError(
            f"{name}: expected float32, bfloat16 or float16 for backend 'triton', got "
            f"{' and '.join(sorted({str(tensor.dtype) for tensor in tensors}))}; use 'torch' for float64"
        )
    return True


def _is_transformed(tensors: Sequence[Tensor]) -> bool:
    """Whether derivatives are taken in a way that a custom op does not see: its tangents would be zero, in silence."""
    if torch.compiler.is_compiling():  # what the compiler cannot trace it refuses
        return False
    return torch._C._are_functorch_transforms_active() or any(
        forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors
    )
