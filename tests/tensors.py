"""Numbers that tests begin with, in float64, and the comparison of two modules' tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers of a seed, drawn in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def noise(samples: int = 4, height: int = 12, width: int | None = None, seed: int = 1) -> Tensor:
    """Images (samples, 3, height, width) of uniform noise, square where no width is given."""
    shape = (samples, 3, height, height if width is None else width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_state(actual: nn.Module, expected: nn.Module, tolerance: float = 0) -> None:
    """Two modules have the same parameters and buffers."""
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), rtol=tolerance, atol=tolerance)
