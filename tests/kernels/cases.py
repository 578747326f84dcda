"""Inputs that break kernels, and what counts as equal to float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.interpreter import quicken

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

quicken()


def seeded(examples: int) -> Any:
    """The same examples in every run. Function-scoped fixtures only patch, so that one set-up serves all examples."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # shrinking runs the interpreter for minutes
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = DEVICE
) -> Tensor:
    """Normal numbers, drawn in float64 on the CPU and rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def contiguous(maps: Tensor) -> Tensor:
    """(N, B, C, h, w) in the order of its axes."""
    return maps.contiguous()


def channels_last(maps: Tensor) -> Tensor:
    """Channels next to each other, in maps (…, C, h, w) of any number of axes before them."""
    return maps.movedim(-3, -1).contiguous().movedim(-1, -3)


def vmapped(maps: Tensor) -> Tensor:
    """Memory (B, N·C, h, w) seen as (N, B, C, h, w), as grouped convolutions leave it."""
    return maps.transpose(0, 1).contiguous().transpose(0, 1)


def vmapped_channels_last(maps: Tensor) -> Tensor:
    """Memory (B, h, w, N·C)."""
    return maps.permute(1, 3, 4, 0, 2).contiguous().permute(3, 0, 4, 1, 2)


def columns_apart(maps: Tensor) -> Tensor:
    """Every second column of a wider map: no axis is contiguous and rows do not follow each other."""
    wide = torch.full((*maps.shape[:-1], 2 * maps.shape[-1] + 1), torch.nan, dtype=maps.dtype, device=maps.device)
    wide[..., 1::2] = maps
    return wide[..., 1::2]


def transposed(maps: Tensor) -> Tensor:
    """Rows and columns exchanged in memory."""
    return maps.transpose(-1, -2).contiguous().transpose(-1, -2)


DENSE: list[Callable[[Tensor], Tensor]] = [contiguous, channels_last, vmapped, vmapped_channels_last, transposed]
LAYOUTS = [*DENSE, columns_apart]


class Maps(NamedTuple):
    """A case of the heatmap functions."""

    shape: tuple[int, int, int, int, int]
    size: tuple[int, int] | None
    layout: Callable[[Tensor], Tensor]
    gradients: str  # "maps", "sums", "broadcast" over space
    listed: bool  # a list of tensors, one an expert
    dtype: torch.dtype
    normalize: bool
    smoothing: float
    weight_scale: Any
    seed: int

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Activations, and gradients as maps or sums; values and memory as the case has them."""
        activations = self.layout(normal(*self.shape, seed=self.seed, dtype=self.dtype))
        if self.gradients == "maps":
            return activations, self.layout(normal(*self.shape, seed=self.seed + 1, dtype=self.dtype))
        sums = normal(*self.shape[:3], seed=self.seed + 1, dtype=self.dtype)
        return activations, sums if self.gradients == "sums" else sums[..., None, None].expand(self.shape)

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `heatmap_losses`."""
        return {name: getattr(self, name) for name in ("size", "normalize", "smoothing", "weight_scale")}


def _maps(experts: int, samples: int, channels: int, side: int) -> st.SearchStrategy[Maps]:
    """Cases of at most so many of each; a map has at most that side, and a heatmap half as much again."""
    sides, larger = st.integers(1, side), st.integers(1, side * 3 // 2)
    return st.builds(
        Maps,
        shape=st.tuples(st.integers(2, experts), st.integers(0, samples), st.integers(1, channels), sides, sides),
        size=st.none() | st.tuples(larger, larger),
        layout=st.sampled_from(LAYOUTS),
        gradients=st.sampled_from(["maps", "maps", "sums", "broadcast"]),
        listed=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float16]),
        normalize=st.booleans(),
        smoothing=st.sampled_from([0.01, 1e-4, 1.0]),
        weight_scale=st.sampled_from(["channels", "spatial"]),
        seed=st.integers(0, 10**6),
    )


maps = _maps(8, 9, 70, 17)  # seconds each in the interpreter
small_maps = _maps(4, 3, 40, 9)


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute error; NaN passes for infinite."""
    if not actual.numel():
        return 0.0
    distance = (actual.detach().double().cpu() - exact.detach().double().cpu()).abs().max()
    return float(distance) if distance.isfinite() else float("inf")


def assert_as_exact_as(
    actual: Tensor, reference: Tensor, exact: Tensor, dtype: torch.dtype, floor: float = 0.0
) -> None:
    """The kernel's error is at most twice that of PyTorch in the same precision, and a rounding band.

    Args:
        actual: the kernel's result.
        reference: the reference's in the precision of the kernel, float32 inside.
        exact: the reference's in float64.
        dtype: of the result, which is rounded to it at the end.
        floor: the magnitude of what adds up to the result, where that may cancel.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == dtype
    largest = max(float(exact.detach().abs().max()) if exact.numel() else 0.0, floor)
    band = 16 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert error(actual, exact) <= 2 * error(reference, exact) + band * largest


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Detached leaves with the same memory, or copies in another dtype."""
    return [(tensor.detach() if dtype is None else tensor.detach().to(dtype)).requires_grad_() for tensor in tensors]
