"""What the custom ops share on their way through autograd: memory for gradients, their forms, and the one error."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TensorSpec(NamedTuple):
    """What a backward pass has to know of a part of ∂y/∂A; the tensor itself need not live until then."""

    shape: torch.Size
    dtype: torch.dtype


def describe(parts: Sequence[Tensor]) -> list[TensorSpec]:
    """Shape and dtype of each part."""
    return [TensorSpec(part.shape, part.dtype) for part in parts]


def common_dtype(specs: Sequence[TensorSpec]) -> torch.dtype:
    """The dtype that all parts have, so that a kernel writes their gradient as it is wanted; float32 if they differ."""
    dtypes = {spec.dtype for spec in specs}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def empty_grads(
    activations: Sequence[Tensor], sums: Tensor, dtype: torch.dtype, needs_activations: bool, needs_sums: bool
) -> tuple[list[Tensor], Tensor]:
    """Memory for ∂L/∂A and ∂L/∂Σ_uv(∂y/∂A).

    Args:
        activations: parts (n, B, C, h, w).
        sums: Σ_uv ∂y/∂A, (N, B, C) float32.
        dtype: of the second result.
        needs_activations: whether ∂L/∂A is wanted.
        needs_sums: whether ∂L/∂Σ_uv(∂y/∂A) is wanted.

    Returns:
        One tensor a part, in the part's dtype and memory layout, and one of the shape of `sums`. What is not wanted is
        an empty list or tensor.
    """
    grad_activations = [torch.empty_like(part) for part in activations] if needs_activations else []
    return grad_activations, sums.new_empty(sums.shape if needs_sums else 0, dtype=dtype)


def broadcast_over_space(grad_sums: Tensor, specs: Sequence[TensorSpec]) -> list[Tensor]:
    """∂L/∂(∂y/∂A) of each part: constant over space, so a view of stride 0 that is never written out.

    Args:
        grad_sums: ∂L/∂Σ_uv(∂y/∂A), (N, B, C).
        specs: of the parts, (n, B, C, h, w), or (n, B, C) where they came summed over space.

    Returns:
        A tensor of the shape and dtype of each part.
    """
    pieces: list[Tensor] = list(torch.split(grad_sums, [spec.shape[0] for spec in specs]))
    return [
        (piece.to(spec.dtype) if len(spec.shape) == 3 else piece.to(spec.dtype)[..., None, None].expand(spec.shape))
        for piece, spec in zip(pieces, specs, strict=True)
    ]


def refuse_second_derivative(ctx: Any, *grad_outputs: Any) -> Any:
    """The backward formula of every backward op: none. Without it autograd would raise as well, but less plainly.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError("backend: expected 'torch' for a second derivative, got 'triton', whose kernels have none")
