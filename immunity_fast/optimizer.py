"""`torch.optim.SGD` that clips and updates all weights in two launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import SGD

from immunity_fast.functional import HAS_TRITON, Backend

if HAS_TRITON:
    from immunity_fast.kernels import multi_tensor


class FusedSGD(SGD):
    """`torch.optim.SGD(…, fused=True)` whose step is one launch, or two where the gradient's norm is clipped.

    What it computes and its `state_dict` are those of `torch.optim.SGD`. Kernels take float32 parameters of one group
    on a GPU; PyTorch's own fused implementation takes all others.

    Args:
        params: tensors, which become one group.
        lr, momentum, weight_decay, nesterov: as of `torch.optim.SGD`. `lr` may change at every step.
        backend: "auto", "triton" (on a CPU, in Triton's interpreter), or "torch".

    Raises:
        ValueError: backend "triton" for what the kernels do not take.
    """

    _table: multi_tensor.Table | None = None  # a copy of an optimiser has none

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.0,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        backend: Backend = "auto",
    ) -> None:
        parameters = list(params)
        # PyTorch's fused implementation takes a tensor for a piece of memory, and updates the gaps of one that has any.
        fused = all(
            parameter.device.type in ("cpu", "cuda") and torch.ops.aten.is_non_overlapping_and_dense(parameter)
            for parameter in parameters
        )
        super().__init__(parameters, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused)
        wanted = backend == "triton" or (backend == "auto" and parameters[0].is_cuda)
        if wanted and HAS_TRITON and _fit(parameters):
            self._table = multi_tensor.Table(parameters[0].device)
        if backend == "triton" and self._table is None:
            raise ValueError("backend: 'triton' expects float32 parameters on one GPU, without gaps in their memory")

    @property
    def clips(self) -> bool:
        """Whether the kernels run, and `step` takes a `max_norm`."""
        group = self.param_groups[0]
        plain = not group["dampening"] and not group["maximize"] and not isinstance(group["lr"], Tensor)
        return self._table is not None and len(self.param_groups) == 1 and plain

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, max_norm: float | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: as of `torch.optim.SGD`.
            max_norm: the norm of all gradients together is brought down to it where it is larger; gradients themselves
                stay as they are. None does not clip.

        Raises:
            ValueError: a `max_norm` where `clips` is false.
        """
        if not self.clips:
            if max_norm is not None:
                raise ValueError("max_norm: only where `clips` is true; else use torch.nn.utils.clip_grad_norm_")
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        assert self._table is not None
        # Gradients that had to be laid out anew have to live until they are used.
        rows, _gradients = self._rows(group["momentum"] != 0)
        self._table.set(rows)
        multi_tensor.sgd(
            self._table,
            group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            partials=None if max_norm is None else multi_tensor.squares(self._table),
            max_norm=max_norm or 0.0,
            scale=getattr(self, "grad_scale", None),  # both are the float16 scaler's
            skip=getattr(self, "found_inf", None),
        )
        increment_version([parameter for parameter in self._parameters() if parameter.grad is not None])
        return loss

    def _rows(self, has_momentum: bool) -> tuple[list[tuple[int, int, int, int]], list[Tensor]]:
        rows, gradients = [], []
        for parameter in self._parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                raise RuntimeError("FusedSGD does not support sparse gradients")
            if gradient.dtype != parameter.dtype or not multi_tensor.same_strides(gradient, parameter):
                gradient = torch.empty_like(parameter).copy_(gradient)
            gradients.append(gradient)
            momentum = self._momentum(parameter).data_ptr() if has_momentum else 0
            rows.append((parameter.data_ptr(), momentum, gradient.data_ptr(), parameter.numel()))
        return rows, gradients

    def _momentum(self, parameter: Tensor) -> Tensor:
        """A parameter's momentum in its layout: of the first step it is the gradient, so it begins at zero."""
        state = self.state[parameter]
        momentum: Tensor | None = state.get("momentum_buffer")
        if momentum is None:
            momentum = torch.zeros_like(parameter)
        elif not multi_tensor.same_strides(momentum, parameter):
            momentum = torch.empty_like(parameter).copy_(momentum)
        else:
            return momentum
        state["momentum_buffer"] = momentum
        return momentum

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]


def _fit(parameters: list[Tensor]) -> bool:
    return multi_tensor.fits(parameters) and all(parameter.dtype == torch.float32 for parameter in parameters)
