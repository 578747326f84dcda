"""What the loss's arguments are and have to be: experts' tensors in two forms, labels, a gate's weights, options.

Shapes throughout: N experts, B samples, K classes, C channels, activation maps of h×w, heatmaps of H×W.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from immunity_fast.runtime.checks import check_choice, check_weight, kind_given
from immunity_fast.runtime.precision import accumulation_dtype, at_least_float32

WeightScale = Literal["channels", "spatial"]
Score = Literal["logit", "probability"]
Backend = Literal["auto", "torch", "triton"]
Layout = Literal["NCHW", "NHWC"]
GATE_TOLERANCE = 0.01  # of a row's sum: half precision's rounding, and no more
Size = int | tuple[int, int] | None  # (H, W) of heatmaps, or the side of a square
Experts = Tensor | Sequence[Tensor]  # one tensor with the experts first, or a sequence of one tensor an expert
Maps = tuple[list[Tensor], list[Tensor]]  # activations and gradients, as many parts of each


@dataclass(frozen=True)
class HeatmapOptions:
    """How heatmaps are made and what is measured on them; what all functions of heatmaps share.

    Args:
        size: (H, W) of the heatmaps, by bilinear resampling; None keeps the activations' (h, w). `checked_size` makes
            it of an integer.
        normalize: eq. (9) on each heatmap's distribution; False puts the heatmap itself into eq. (9), as the paper
            prints it.
        smoothing: ε ≥ 0, what every pixel gets of the map's mean magnitude before normalising.
        weight_scale: the factor s of Grad-CAM's channel weights, "channels" (1/C) or "spatial" (1/(h·w)).
        backend: "auto", "triton" or "torch".
        group_name: of a `torch.distributed` process group whose processes measure together; "" is this process alone.

    Raises:
        ValueError: an option out of its range.
    """

    size: tuple[int, int] | None = None
    normalize: bool = True
    smoothing: float = 0.01
    weight_scale: WeightScale = "channels"
    backend: Backend = "auto"
    group_name: str = ""

    def __post_init__(self) -> None:
        check_choice("weight_scale", self.weight_scale, WeightScale)
        check_choice("backend", self.backend, Backend)
        check_weight("smoothing", self.smoothing)
        object.__setattr__(self, "size", checked_size(self.size))


def checked_size(size: Size) -> tuple[int, int] | None:
    """(H, W) of heatmaps, from these two or the side of a square; None is None.

    Raises:
        ValueError: no positive integers.
    """
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) and not isinstance(size, bool) else size
    if (
        not isinstance(sides, (tuple, list))
        or len(sides) != 2
        or not all(isinstance(side, int) and side > 0 for side in sides)
    ):
        raise ValueError(f"size: expected two positive integers (H, W), one for a square, or None, got {size!r}")
    return sides[0], sides[1]


def expert_parts(name: str, value: Experts, dim: int, expected: str, *, alike: bool = True) -> list[Tensor]:
    """Tensors (n, ...) whose n add up to N, none of them copied: the one given, or one an expert.

    Args:
        name, expected: what it is and has to be, for messages.
        value: one tensor, or one an expert.
        dim: of the one tensor.
        alike: whether all experts' have to be of one shape, or only of as many samples.

    Raises:
        ValueError: tensors of another shape than is expected, or of several.
        TypeError: no floating-point tensors.
    """
    if isinstance(value, Tensor):
        parts = [value]
    else:
        if not isinstance(value, Sequence) or not all(isinstance(part, Tensor) for part in value):
            kinds = [type(part).__name__ for part in value] if isinstance(value, Sequence) else type(value).__name__
            raise TypeError(f"{name}: expected a tensor {expected} or a list of tensors, got {kinds}")
        shapes = [tuple(part.shape) for part in value]
        if not shapes or len(set(shapes if alike else (shape[:1] for shape in shapes))) != 1:
            raise ValueError(f"{name}: expected tensors of one {'shape' if alike else 'batch'}, got {shapes}")
        parts = [part[None] for part in value]
    for part in parts:
        if not part.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {part.dtype}")
        if part.dim() != dim or 0 in (part.shape[0], *part.shape[2:]):
            shape = tuple(part.shape if isinstance(value, Tensor) else (len(parts), *part.shape[1:]))
            raise ValueError(f"{name}: expected shape {expected}, got {shape}")
    return parts


def join_experts(name: str, value: Experts, dim: int, expected: str) -> Tensor:
    """One tensor with the experts first, in the dtype it has, from such a tensor or from one tensor an expert."""
    parts = expert_parts(name, value, dim, expected)
    return parts[0] if isinstance(value, Tensor) else torch.cat(parts)


def stack_experts(name: str, value: Experts, dim: int, expected: str) -> Tensor:
    """One tensor of at least float32 with the experts first, from such a tensor or from one tensor an expert."""
    return at_least_float32(join_experts(name, value, dim, expected))


def check_targets(targets: Tensor, samples: int, classes: int, name: str = "targets") -> Tensor:
    """`targets` as int64, once its type, shape and (on a CPU, where looking is free) range are right.

    Raises:
        ValueError: another shape, or a label that is no class.
        TypeError: no integers.
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"{name}: expected an integer tensor, got {kind_given(targets)}")
    if targets.shape != (samples,):
        raise ValueError(f"{name}: expected shape ({samples},), got {tuple(targets.shape)}")
    if targets.device.type == "cpu" and samples and not torch.compiler.is_compiling():
        smallest, largest = (int(bound) for bound in targets.aminmax())
        if smallest < 0 or largest >= classes:
            raise ValueError(f"{name}: expected labels in [0, {classes}), got {smallest} to {largest}")
    return targets.long()


def check_gate(gate: Tensor | None, logits: Tensor, *, values: bool) -> Tensor:
    """Weights (B, N) for logits (N, B, K).

    Raises:
        ValueError: another shape; or, if `values` are looked at, weights that are negative or do not sum to 1.
        TypeError: no floating-point tensor.
    """
    experts, samples = logits.shape[:2]
    if gate is None:
        return torch.full((samples, experts), 1 / experts, dtype=accumulation_dtype(logits), device=logits.device)
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
    sums = weights.sum(-1, dtype=accumulation_dtype(weights)).flatten()
    furthest = float(sums[(sums - 1).abs().argmax()])
    if not abs(furthest - 1) <= GATE_TOLERANCE:
        raise ValueError(f"gate: expected weights that sum to 1 over the experts, got a sum of {furthest:.4g}")


def check_maps(activations: Experts, gradients: Experts, layout: Layout = "NCHW") -> Maps:
    """Parts (n, B, C, h, w) of the activations and (n, B, C, h, w) or (n, B, C) of the gradients, as many of each.

    Of lists, each expert may have its own C, h and w.

    Raises:
        ValueError, TypeError: tensors of other shapes, types or devices, or one that stands for several experts.
    """
    check_choice("layout", layout, Layout)
    axes = "(N, B, h, w, C)" if layout == "NHWC" else "(N, B, C, h, w)"
    maps = [channels_first(part, layout) for part in expert_parts("activations", activations, 5, axes, alike=False)]
    if not isinstance(activations, Tensor):
        check_distinct(activations)
    summed = _dimensions(gradients) == 3
    slopes = expert_parts("gradients", gradients, *((3, "(N, B, C)") if summed else (5, axes)), alike=False)
    if not summed:
        slopes = [channels_first(part, layout) for part in slopes]
    if are_alike(maps) and are_alike(slopes):
        _check_slopes(_joined_shape(maps), _joined_shape(slopes))
    elif len(maps) != len(slopes):
        raise ValueError(f"gradients: expected {len(maps)} tensors, as there are activations, got {len(slopes)}")
    else:
        for part, slope in zip(maps, slopes, strict=True):
            _check_slopes(tuple(part.shape), tuple(slope.shape))
    if len(slopes) > len(maps):
        slopes = [torch.cat(slopes)]
    elif len(slopes) < len(maps):
        slopes = list(torch.split(slopes[0], 1))
    check_device("activations", maps[0], maps)
    check_device("gradients", maps[0], slopes)
    return maps, slopes


def are_alike(parts: Sequence[Tensor]) -> bool:
    """Whether parts (n, …) differ in n alone, so that they can be one tensor."""
    return all(part.shape[1:] == parts[0].shape[1:] for part in parts)


def _check_slopes(maps: tuple[int, ...], slopes: tuple[int, ...]) -> None:
    if slopes not in (maps, maps[:3]):
        raise ValueError(
            f"gradients: expected the shape of activations, {maps}, or that summed over space, {maps[:3]}, got {slopes}"
        )


def check_distinct(activations: Sequence[Tensor]) -> None:
    """Check that each expert has maps of its own: one tensor for several is a mistake, and looks like agreement.

    Raises:
        ValueError: one does.
    """
    for index, maps in enumerate(activations):
        for earlier, other in enumerate(activations[:index]):
            if maps is other or _are_one(maps, other):
                raise ValueError(
                    f"activations: expected each expert's own, got number {index} that is the same tensor as number "
                    f"{earlier}"
                )


def _are_one(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one place in memory, where that can be asked: it costs nothing on a GPU either."""
    plain = type(one) is Tensor and type(other) is Tensor and one.device == other.device and not one.is_meta
    if not plain or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return one.is_set_to(other)


def check_device(name: str, tensor: Tensor, others: Sequence[Tensor]) -> None:
    """Check that all are on one device: a kernel that is given another's address stops the whole process.

    Raises:
        ValueError: one of `others` is on another device than `tensor`.
    """
    for other in others:
        if other.device != tensor.device:
            raise ValueError(f"{name}: expected a tensor on {tensor.device}, got one on {other.device}")


def channels_first(maps: Tensor, layout: Layout) -> Tensor:
    """Maps (…, C, h, w) of such as `layout` says, as a view."""
    return maps.movedim(-1, -3) if layout == "NHWC" else maps


def channels_back(maps: Tensor, layout: Layout) -> Tensor:
    """The inverse of `channels_first`."""
    return maps.movedim(-3, -1) if layout == "NHWC" else maps


def _dimensions(value: Experts) -> int:
    """Of the tensor that the parts are joined to; 0 where there is none, for `expert_parts` to say so."""
    if isinstance(value, Tensor):
        return value.dim()
    return value[0].dim() + 1 if isinstance(value, Sequence) and value and isinstance(value[0], Tensor) else 0


def _joined_shape(parts: Sequence[Tensor]) -> tuple[int, ...]:
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
