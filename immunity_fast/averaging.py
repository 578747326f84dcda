"""An exponential moving average of a model's weights and running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """θ' ← d·θ' + (1 − d)·θ after every step, d = min(decay, (1 + t)/(10 + t)) in step t, so that it forgets its start.

    Args:
        module: whose parameters and buffers are averaged; integers are copied.
        decay: in [0, 1).

    Raises:
        ValueError: a decay out of its range.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number of at least 0 and below 1, got {decay}")
        self.module, self.decay, self.steps = module, decay, 0
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present state in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        state = self.module.state_dict()
        averaged = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in averaged], [state[n] for n in averaged], 1 - decay)
        for name in state.keys() - set(averaged):
            self.average[name].copy_(state[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with its averaged state, in a `with` block."""
        before = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(before)

    def tensors(self) -> dict[str, Tensor]:
        """The average under the module's names."""
        return self.average

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """The inverse of `tensors`, for a module of the same kind, after so many updates."""
        for name, value in self.average.items():
            value.copy_(tensors[name])
        self.steps = steps

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in self.module.state_dict().items():
            value.copy_(values[name])
