"""Selection probabilities of an ensemble's members, chosen against the attack that knows them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def project_to_simplex(point: Tensor) -> Tensor:
    """The nearest probabilities (N,) to a point (N,), in the Euclidean distance: max(x + λ, 0) with a sum of 1.

    The method is that of Duchi et al. (ICML 2008).

    Args:
        point: (N,) floating-point, finite, N ≥ 1.

    Raises:
        ValueError: another shape.
    """
    if point.dim() != 1 or not len(point):
        raise ValueError(f"point: expected shape (N,), got {tuple(point.shape)}")
    falling = point.sort(descending=True).values
    count = torch.arange(1, len(point) + 1, dtype=point.dtype, device=point.device)
    shifts = (1 - falling.cumsum(0)) / count  # λ, were so many of the largest above 0
    above = int((falling + shifts > 0).nonzero().max())
    found = (point + shifts[above]).clamp_min(0)
    return found / found.sum()


def least_error(errors: Callable[[Tensor], Tensor], start: Tensor, updates: int, rate: float) -> Tensor:
    """Probabilities (N,) by which a member is drawn that is wrong as rarely as may be, under an attack that knows them.

    Step t = 0, 1, … goes from p to the projection of p − rate / (t + 1) · g, g being the members' errors under the
    attack on p, which is a subgradient of the expected error Σ p_i g_i. The best p that was tried counts, of those that
    are as good the last.

    Args:
        errors: from probabilities (N,) to each member's error (N,), both float64, as fractions.
        start: (N,) float64, tried first.
        updates: how many are tried, ≥ 1.
        rate: of the first step.
    """
    tried, best, least = start, start, float("inf")
    for step in range(updates):
        wrong = errors(tried)
        error = float((wrong * tried).sum())
        if error <= least:
            best, least = tried, error
        tried = project_to_simplex(tried - rate / (step + 1) * wrong)
    return best
