"""The functions that `FusedImmunityLoss` is made of, each usable alone; they check arguments and pick the kernels.

Shapes throughout: N experts, B samples, K classes, C channels, activation maps of h×w, heatmaps of H×W. Maps are
(B, C, h, w), or (B, h, w, C) with `layout="NHWC"`, as those of a Swin Transformer. Half-precision inputs are computed
in float32 (autocast included), float64 stays float64. Equation numbers: arXiv 2402.18787.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from immunity_fast.kernels import reference
from immunity_fast.runtime.checks import check_choice, check_weight

try:
    from immunity_fast.kernels import cross_entropy as fused_cross_entropy
    from immunity_fast.kernels import heatmap_losses as fused_losses
    from immunity_fast.kernels import heatmaps as fused_heatmaps
    from immunity_fast.kernels import launch
except ImportError:  # Triton is not made for every platform
    HAS_TRITON = False
else:
    HAS_TRITON = True

WeightScale = Literal["channels", "spatial"]
Score = Literal["logit", "probability"]
Backend = Literal["auto", "torch", "triton"]
Layout = Literal["NCHW", "NHWC"]
GATE_TOLERANCE = 0.01  # of a row's sum: half precision's rounding, and no more
Experts = Tensor | Sequence[Tensor]  # one tensor with the experts first, or a sequence of one tensor an expert


def gradcam_heatmaps(
    activations: Experts,
    gradients: Experts,
    *,
    size: tuple[int, int] | None = None,
    weight_scale: WeightScale = "channels",
    backend: Backend = "auto",
    layout: Layout = "NCHW",
) -> Tensor:
    """Grad-CAM heatmaps, eq. (3), not normalised.

    Args:
        activations: (N, B, C, h, w) maps A, or N tensors (B, C, h, w); as `layout` says.
        gradients: derivatives of the label's score with respect to A, of the same shapes; or those already summed over
            space, (N, B, C) or N tensors (B, C), which is all that Grad-CAM looks at.
        size: (H, W) of the heatmaps, by bilinear resampling; None keeps (h, w).
        weight_scale: the factor s of the channel weights, "channels" (1/C, the paper) or "spatial" (1/(h·w), Grad-CAM).
        backend: "torch" is plain PyTorch; "triton" the fused kernels, once differentiable, for CUDA tensors (or any, if
            TRITON_INTERPRET=1 was set before the import); "auto" is "triton" for CUDA tensors that are not float64, but
            "torch" under `torch.func` and in forward mode.
        layout: "NCHW", or "NHWC" for channels last, (N, B, h, w, C) or N tensors (B, h, w, C), which are read in place.
            That is about the order of the axes alone: what `memory_format=torch.channels_last` makes is "NCHW".

    Returns:
        (N, B, H, W), at least float32, ≥ 0, differentiable in both inputs.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, value or type.
    """
    size = check_heatmap_options(size, weight_scale, 0.0, backend)
    maps, slopes = _check_maps(activations, gradients, layout)
    scale = reference.weight_factor(maps[0], weight_scale)
    if _use_triton(backend, "activations", [*maps, *slopes]):
        heatmaps: Tensor = fused_heatmaps.gradcam_heatmaps(maps, slopes, list(size or maps[0].shape[3:]), scale)[0]
        return heatmaps
    with torch.autocast(maps[0].device.type, enabled=False):
        joined, weights = _reference_inputs(maps, slopes, scale)
        return reference.heatmaps(reference.score_maps(joined, weights), size)


def heatmap_losses(
    activations: Experts,
    gradients: Experts,
    *,
    size: tuple[int, int] | None = None,
    normalize: bool = True,
    smoothing: float = 0.01,
    weight_scale: WeightScale = "channels",
    backend: Backend = "auto",
    group_name: str = "",
    layout: Layout = "NCHW",
) -> tuple[Tensor, Tensor]:
    """Mutual-information loss, eq. (9), and position-stability loss, eqs. (10) and (11), of the experts' heatmaps.

    Args:
        activations: (N, B, C, h, w) maps A, N ≥ 2, or N tensors (B, C, h, w), each another one; as `layout` says. Read
            in place, whatever their strides.
        gradients: see `gradcam_heatmaps`.
        size: (H, W) of the heatmaps; None keeps (h, w). Distances are in these pixels.
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
    size = check_heatmap_options(size, weight_scale, smoothing, backend)
    maps, slopes = _check_maps(activations, gradients, layout)
    if sum(part.shape[0] for part in maps) < 2:
        raise ValueError(f"activations: at least 2 experts expected, got shape {tuple(maps[0].shape)}")
    scale = reference.weight_factor(maps[0], weight_scale)
    if _use_triton(backend, "activations", [*maps, *slopes]):
        information, stability, *_ = fused_losses.heatmap_losses(
            maps, slopes, list(size or maps[0].shape[3:]), normalize, float(smoothing), scale, group_name
        )
        return information, stability
    with torch.autocast(maps[0].device.type, enabled=False):
        joined, weights = _reference_inputs(maps, slopes, scale)
        p = reference.distributions(joined, weights, size, smoothing)
        in_information = p if normalize else reference.heatmaps(reference.score_maps(joined, weights), size)
        return (
            reference.mutual_information_loss(in_information),
            reference.position_stability(reference.centres(p), group_name),
        )


def heatmap_loss_gradients(
    activations: Tensor,
    gradients: Tensor,
    of_information: Tensor,
    of_stability: Tensor,
    *,
    size: tuple[int, int] | None = None,
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
    check_choice("layout", layout, Layout)
    maps, slopes = channels_first(activations.detach(), layout), gradients.detach()

    def losses(maps: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        return heatmap_losses(
            maps,
            slopes,
            size=size,
            normalize=normalize,
            smoothing=smoothing,
            weight_scale=weight_scale,
            backend="torch",
            group_name=group_name,
        )

    if not _use_triton(backend, "activations", [maps, slopes]):
        (information, stability), pullback = torch.func.vjp(losses, maps, slopes)  # type: ignore[misc]
        of_maps, of_slopes = pullback((of_information, of_stability))
        return information, stability, channels_back(of_maps, layout), of_slopes
    (maps_part,), (slopes_part,) = _check_maps(maps, slopes)
    scale = reference.weight_factor(maps, weight_scale)
    options = (normalize, float(smoothing), scale)
    information, stability, *saved = fused_losses.heatmap_losses(
        [maps_part], [slopes_part], list(size or maps.shape[3:]), *options, group_name
    )
    (of_maps,), of_slopes = fused_losses.heatmap_losses_backward(
        of_information, of_stability, [maps_part], *saved, *options, slopes.dtype, True, True
    )
    return information, stability, channels_back(of_maps, layout), of_slopes


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
    return log_mixture(logits, _check_gate(gate, logits, values=True))


def log_mixture(logits: Tensor, gate: Tensor | None = None) -> Tensor:
    """`mixture_log_probabilities` of a model's own logits (N, B, K) and gate, whose values nobody needs to look at."""
    gate = _at_least_float32(_check_gate(gate, logits, values=False))
    return reference.log_mixture(_at_least_float32(logits).log_softmax(-1), gate.T[..., None])


def mixture_cross_entropy(
    logits: Experts, gate: Tensor | None, targets: Tensor, alpha: float, *, backend: Backend = "auto"
) -> Tensor:
    """Cross-entropy of the mixture and, weighted by α, of each expert, eq. (2).

    Args:
        logits: (N, B, K), or N tensors (B, K).
        gate: see `mixture_log_probabilities`.
        targets: (B,) integer labels in [0, K).
        alpha: weight of the experts' own cross-entropies, ≥ 0.
        backend: see `gradcam_heatmaps`.

    Returns:
        (B,) in nats, at least float32; finite where the mixture's probability underflows.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, value or type.
    """
    logits = join_experts("logits", logits, 3, "(N, B, K)")
    check_weight("alpha", alpha)
    check_choice("backend", backend, Backend)
    gate = _check_gate(gate, logits, values=True)
    targets = check_targets(targets, logits.shape[1], logits.shape[2])
    _check_device("gate", logits, [gate])
    _check_device("targets", logits, [targets])
    if _use_triton(backend, "logits", [logits, gate]):
        losses: Tensor = fused_cross_entropy.mixture_cross_entropy(logits, gate, targets, float(alpha))[0]
        return losses
    return reference.mixture_cross_entropy(_at_least_float32(logits), _at_least_float32(gate), targets, alpha)


def label_scores(logits: Experts, targets: Tensor, score: Score) -> Tensor:
    """Sum over experts and samples of the label's logit or probability: what Grad-CAM differentiates; 0-d."""
    logits = stack_experts("logits", logits, 3, "(N, B, K)")
    scores = logits.softmax(-1) if score == "probability" else logits
    return scores.gather(-1, targets.expand(logits.shape[0], -1)[..., None]).sum()


def stack_experts(name: str, value: Experts, dim: int, expected: str) -> Tensor:
    """One tensor of at least float32 with the experts first, from such a tensor or from one tensor an expert."""
    return _at_least_float32(join_experts(name, value, dim, expected))


def join_experts(name: str, value: Experts, dim: int, expected: str) -> Tensor:
    """One tensor with the experts first, in the dtype it has, from such a tensor or from one tensor an expert."""
    parts = _parts(name, value, dim, expected)
    return parts[0] if isinstance(value, Tensor) else torch.cat(parts)


def _parts(name: str, value: Experts, dim: int, expected: str) -> list[Tensor]:
    """Tensors (n, ...) whose n add up to N, none of them copied: the one given, or one an expert."""
    if isinstance(value, Tensor):
        parts = [value]
    else:
        if not isinstance(value, Sequence) or not all(isinstance(part, Tensor) for part in value):
            kinds = [type(part).__name__ for part in value] if isinstance(value, Sequence) else type(value).__name__
            raise TypeError(f"{name}: expected a tensor {expected} or a list of tensors, got {kinds}")
        shapes = [tuple(part.shape) for part in value]
        if not shapes or len(set(shapes)) != 1:
            raise ValueError(f"{name}: expected tensors of one shape, got {shapes}")
        parts = [part[None] for part in value]
    for part in parts:
        if not part.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {part.dtype}")
        if part.dim() != dim or 0 in (part.shape[0], *part.shape[2:]):
            shape = tuple(part.shape if isinstance(value, Tensor) else (len(parts), *part.shape[1:]))
            raise ValueError(f"{name}: expected shape {expected}, got {shape}")
    return parts


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


def check_heatmap_options(
    size: tuple[int, int] | None, weight_scale: str, smoothing: float, backend: str
) -> tuple[int, int] | None:
    """The options that all heatmap functions share; returns `size` as a tuple."""
    check_choice("weight_scale", weight_scale, WeightScale)
    check_choice("backend", backend, Backend)
    check_weight("smoothing", smoothing)
    if size is None:
        return None
    if (
        not isinstance(size, (tuple, list))
        or len(size) != 2
        or not all(isinstance(side, int) and side > 0 for side in size)
    ):
        raise ValueError(f"size: expected two positive integers (H, W) or None, got {size!r}")
    return (size[0], size[1])


def channels_first(maps: Tensor, layout: Layout) -> Tensor:
    """Maps (…, C, h, w) of such as `layout` says, as a view."""
    return maps.movedim(-1, -3) if layout == "NHWC" else maps


def channels_back(maps: Tensor, layout: Layout) -> Tensor:
    """The inverse of `channels_first`."""
    return maps.movedim(-3, -1) if layout == "NHWC" else maps


def check_distinct(activations: Sequence[Tensor]) -> None:
    """Each expert has maps of its own: one tensor that stands for several is a mistake, and looks like agreement."""
    for index, maps in enumerate(activations):
        for earlier, other in enumerate(activations[:index]):
            if maps is other or _are_one(maps, other):
                raise ValueError(
                    f"activations: number {index} is the same tensor as number {earlier}; pass each expert's own"
                )


def _are_one(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one place in memory, where that can be asked: it costs nothing on a GPU either."""
    plain = type(one) is Tensor and type(other) is Tensor and one.device == other.device and not one.is_meta
    if not plain or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return one.is_set_to(other)


def _check_maps(activations: Experts, gradients: Experts, layout: Layout = "NCHW") -> tuple[list[Tensor], list[Tensor]]:
    """Parts (n, B, C, h, w) of the activations and (n, B, C, h, w) or (n, B, C) of the gradients, as many of each."""
    check_choice("layout", layout, Layout)
    axes = "(N, B, h, w, C)" if layout == "NHWC" else "(N, B, C, h, w)"
    maps = [channels_first(part, layout) for part in _parts("activations", activations, 5, axes)]
    if not isinstance(activations, Tensor):
        check_distinct(activations)
    summed = _dimensions(gradients) == 3
    slopes = _parts("gradients", gradients, *((3, "(N, B, C)") if summed else (5, axes)))
    if not summed:
        slopes = [channels_first(part, layout) for part in slopes]
    expected, found = _joined_shape(maps), _joined_shape(slopes)
    if found != (expected[:3] if summed else expected):
        raise ValueError(
            f"gradients: expected the shape of activations, {expected}, or that summed over space, {expected[:3]}, "
            f"got {found}"
        )
    if len(slopes) > len(maps):
        slopes = [torch.cat(slopes)]
    elif len(slopes) < len(maps):
        slopes = list(torch.split(slopes[0], 1))
    _check_device("activations", maps[0], maps)
    _check_device("gradients", maps[0], slopes)
    return maps, slopes


def _dimensions(value: Experts) -> int:
    """Of the tensor that the parts are joined to; 0 where there is none, for `_parts` to say so."""
    if isinstance(value, Tensor):
        return value.dim()
    return value[0].dim() + 1 if isinstance(value, Sequence) and value and isinstance(value[0], Tensor) else 0


def _joined_shape(parts: Sequence[Tensor]) -> tuple[int, ...]:
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def _reference_inputs(maps: Sequence[Tensor], slopes: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """Activations (N, B, C, h, w) and channel weights (N, B, C), in one dtype of at least float32."""
    joined, gradients = (_at_least_float32(torch.cat(list(x)) if len(x) > 1 else x[0]) for x in (maps, slopes))
    dtype = torch.promote_types(joined.dtype, gradients.dtype)
    sums = gradients.to(dtype)
    return joined.to(dtype), scale * (sums.sum((-2, -1)) if sums.dim() == 5 else sums)


def _use_triton(backend: str, name: str, tensors: Sequence[Tensor]) -> bool:
    """Whether the fused kernels are to run; an error where they were asked for by name and cannot."""
    if backend == "torch":
        return False
    if not HAS_TRITON:
        if backend == "auto":
            return False
        raise ValueError("backend: 'triton' is not installed here; use 'torch' or 'auto'")
    fit = all(tensor.dtype in launch.DTYPES for tensor in tensors)
    on_gpu = tensors[0].device.type == "cuda"
    if backend == "auto":
        return on_gpu and fit and not _is_transformed(tensors)
    if _is_transformed(tensors):
        raise ValueError(
            "backend: 'triton' is for reverse-mode autograd; under torch.func and in forward mode use 'torch' or 'auto'"
        )
    if not on_gpu and not launch.INTERPRETED:
        raise ValueError(
            f"backend: 'triton' expects CUDA tensors, got {name} on {tensors[0].device} (on a CPU it runs in Triton's "
            "interpreter, if TRITON_INTERPRET=1 was set before the import); use 'torch' or 'auto'"
        )
    if not fit:
        raise TypeError(
            f"{name}: backend 'triton' computes in float32 from float32, bfloat16 or float16, got "
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


def _check_device(name: str, tensor: Tensor, others: Sequence[Tensor]) -> None:
    """A kernel that is given another device's address stops the whole process."""
    for other in others:
        if other.device != tensor.device:
            raise ValueError(f"{name}: expected a tensor on {tensor.device}, got one on {other.device}")


def _check_gate(gate: Tensor | None, logits: Tensor, *, values: bool) -> Tensor:
    """Weights (B, N) for logits (N, B, K)."""
    experts, samples = logits.shape[:2]
    if gate is None:
        return torch.full((samples, experts), 1 / experts, dtype=_at_least_float32(logits).dtype, device=logits.device)
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"gate: expected a floating-point tensor, got {getattr(gate, 'dtype', type(gate).__name__)}")
    if gate.shape not in ((experts,), (samples, experts)):
        raise ValueError(
            f"gate: expected (B, N) = ({samples}, {experts}) or (N,) = ({experts},), got shape {tuple(gate.shape)}"
        )
    if values:
        _check_weights(gate, logits)
    return gate.expand(samples, experts)


def _check_weights(gate: Tensor, logits: Tensor) -> None:
    """Weights ≥ 0 whose rows sum to 1, on a CPU, where looking is free.

    NaN of a network that has diverged, in a graph or beside logits that are not finite either, goes on into the result,
    as anywhere else in PyTorch.
    """
    if gate.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    weights = gate.detach()
    if weights.numel() == 0:
        return
    smallest = float(weights.min())
    if math.isnan(smallest) and (gate.grad_fn is not None or not bool(logits.isfinite().all())):
        return
    if not smallest >= 0:
        raise ValueError(f"gate: expected weights of at least 0, got {smallest:.4g}")
    sums = weights.sum(-1, dtype=torch.promote_types(weights.dtype, torch.float32)).flatten()
    furthest = float(sums[(sums - 1).abs().argmax()])
    if not abs(furthest - 1) <= GATE_TOLERANCE:
        raise ValueError(f"gate: expected weights that sum to 1 over the experts, got a sum of {furthest:.4g}")


def _at_least_float32(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
