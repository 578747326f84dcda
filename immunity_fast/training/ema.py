"""An exponential moving average of a model's weights and running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from immunity_fast.arguments import Backend
from immunity_fast.runtime.sharding import local
from immunity_fast.training.optimizer import HAS_KERNELS

if HAS_KERNELS:
    from immunity_fast.kernels import multi_tensor


class WeightAverage:
    """θ' ← d·θ' + (1 − d)·θ after every step, d = min(decay, (1 + t)/(10 + t)) in step t, so that it forgets its start.

    On a GPU that is one launch for all of float32 and all integers of 32 and 64 bits.

    Args:
        module: whose parameters and buffers are averaged; integers are copied.
        decay: in [0, 1).
        backend: "auto" takes the kernel on a GPU; "triton" also in Triton's interpreter on a CPU; "torch" never.

    Raises:
        ValueError: a decay out of its range.
    """

    def __init__(self, module: nn.Module, decay: float, *, backend: Backend = "auto") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number of at least 0 and below 1, got {decay}")
        self.module, self.decay, self.steps = module, decay, 0
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self._backend = backend
        self._table: multi_tensor.Table | None = None
        self._fitting: dict[str, None] | None = None  # what the kernel averages, once the module is as it will be

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's present weights, after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        # Which makes no new tensors. Of weights in shards each process averages its own part.
        state = {name: local(value) for name, value in self.module.state_dict(keep_vars=True).items()}
        left = self._launch(state, 1 - decay)
        averaged = [name for name in left if state[name].is_floating_point()]
        if averaged:
            torch._foreach_lerp_([self._own(n) for n in averaged], [state[n] for n in averaged], 1 - decay)
        for name in left.keys() - set(averaged):
            self._own(name).copy_(state[name])

    def _own(self, name: str) -> Tensor:
        return local(self.average[name])

    def _launch(self, state: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
        """Average in one launch what the kernel takes; returns what it does not."""
        if self._fitting is None:
            self._fitting = self._lay_out(state)
        rows = []
        for name in self._fitting:
            average, value = self._own(name), state[name]
            if not _alike(average, value) or not multi_tensor.same_strides(average, value):  # the module has changed
                self._fitting = None
                return self._launch(state, weight)
            words = value.numel() * value.element_size() // 4
            rows.append((average.data_ptr(), value.data_ptr(), int(value.is_floating_point()), words))
        if not rows:
            return state
        if self._table is None or self._table.device != value.device:
            self._table = multi_tensor.Table(value.device)
        self._table.set(rows)
        multi_tensor.lerp(self._table, weight)
        increment_version([self._own(name) for name in self._fitting])
        return {name: value for name, value in state.items() if name not in self._fitting}

    def _lay_out(self, state: dict[str, Tensor]) -> dict[str, None]:
        """Names of what the kernel takes, in an order; their averages lie in memory as they do."""
        if not HAS_KERNELS or self._backend == "torch":
            return {}
        found: dict[str, None] = {}
        for name, value in state.items():
            words = not value.dtype.is_floating_point and value.element_size() % 4 == 0
            on_device = value.is_cuda or self._backend == "triton"
            kind = value.dtype == torch.float32 or words
            if on_device and kind and multi_tensor.fits([value]) and _alike(self._own(name), value):
                found[name] = None
                in_shards = self._own(name) is not self.average[name]
                if not in_shards and not multi_tensor.same_strides(self.average[name], value):
                    self.average[name] = torch.empty_like(value).copy_(self.average[name])
        return found

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with its averaged state, in a `with` block."""
        before = {name: value.detach().clone() for name, value in self.module.state_dict().items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(before)

    def hand_over(self) -> None:
        """Give the module its averaged state, for good."""
        self._write(self.average)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged tensors, under the names that they have in the module."""
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


def _alike(average: Tensor, value: Tensor) -> bool:
    """Whether a kernel can take one for the other; where it cannot, PyTorch says what is wrong."""
    return (average.dtype, average.device, average.shape) == (value.dtype, value.device, value.shape)
