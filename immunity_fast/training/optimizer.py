"""`torch.optim.SGD` that clips and updates all weights in two launches on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import SGD

from immunity_fast.arguments import Backend
from immunity_fast.runtime.precision import begin_momentum
from immunity_fast.runtime.sharding import local

try:
    from immunity_fast.kernels import multi_tensor
except ImportError:  # Triton is not made for every platform
    HAS_KERNELS = False
else:
    HAS_KERNELS = True


class FusedSGD(SGD):
    """`torch.optim.SGD(…, fused=True)` whose step is a launch a group, and one more where the norm is clipped.

    What it computes and its `state_dict` are those of `torch.optim.SGD`. Kernels take float32 parameters on a GPU;
    PyTorch's own fused implementation takes all others.

    Args:
        params: tensors, which become one group; or groups, as `torch.optim` and `parameter_groups` have them.
        lr, momentum, weight_decay, nesterov: as of `torch.optim.SGD`. `lr` may change at every step.
        backend: "auto", "triton" (on a CPU, in Triton's interpreter), or "torch".

    Raises:
        TypeError: anything but tensors, or groups of them, in `params`.
        ValueError: backend "triton" for what the kernels do not take.
    """

    _tables: list[multi_tensor.Table] | None = None  # a group's each, and that of all; a copy of an optimiser has none

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        backend: Backend = "auto",
    ) -> None:
        groups, parameters = _listed(params)
        super().__init__(groups, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fuses(parameters))
        wanted = backend == "triton" or (backend == "auto" and parameters[0].is_cuda)
        if wanted and HAS_KERNELS and _fit(parameters):
            self._tables = [multi_tensor.Table(parameters[0].device)]
        if backend == "triton" and self._tables is None:
            raise ValueError("backend: 'triton' expects float32 parameters on one GPU, without gaps in their memory")

    @property
    def clips(self) -> bool:
        """Whether the kernels run, and `step` takes a `max_norm`: looked at anew, since parameters may have changed."""
        if self._tables is None:
            return False
        plain = all(
            not group["dampening"] and not group["maximize"] and not isinstance(group["lr"], Tensor)
            for group in self.param_groups
        )
        parameters = self._parameters()
        return plain and parameters[0].device == self._tables[0].device and _fit(parameters)

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
            return self._step_of_torch(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self._tables is not None
        # Gradients that had to be laid out anew have to live until they are used.
        rows, _gradients = self._rows()
        while len(self._tables) <= len(rows):  # the last is of all groups, whose gradients have one norm
            self._tables.append(multi_tensor.Table(self._tables[0].device))
        partials = None
        if max_norm is not None:
            together = self._tables[0 if len(rows) == 1 else len(rows)]
            together.set([row for each in rows for row in each])
            partials = multi_tensor.squares(together)
        for group, table, each in zip(self.param_groups, self._tables, rows, strict=False):
            table.set(each)
            multi_tensor.sgd(
                table,
                group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                partials=partials,
                max_norm=max_norm or 0.0,
                scale=getattr(self, "grad_scale", None),  # both are the float16 scaler's
                skip=getattr(self, "found_inf", None),
            )
        increment_version([parameter for parameter in self._parameters() if parameter.grad is not None])
        return loss

    def _step_of_torch(self, closure: Callable[[], Any] | None) -> Any:
        for group in self.param_groups:
            group["fused"] = bool(group["fused"]) and fuses(group["params"])
        begin_momentum(self)
        # Without the hooks, which `step` itself has: they would be called twice.
        step = SGD.step
        return (step.__wrapped__ if getattr(step, "hooked", False) else step)(self, closure)  # type: ignore[attr-defined]

    def _rows(self) -> tuple[list[list[tuple[int, int, int, int]]], list[Tensor]]:
        """The rows of each group's table, and the gradients that they point to."""
        rows: list[list[tuple[int, int, int, int]]] = []
        gradients = []
        for group in self.param_groups:
            rows.append([])
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise RuntimeError("FusedSGD does not support sparse gradients")
                if gradient.dtype != parameter.dtype or not multi_tensor.same_strides(gradient, parameter):
                    gradient = torch.empty_like(parameter).copy_(gradient)
                gradients.append(gradient)
                momentum = self._momentum(parameter).data_ptr() if group["momentum"] else 0
                rows[-1].append((parameter.data_ptr(), momentum, gradient.data_ptr(), parameter.numel()))
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


def _listed(params: Iterable[Any]) -> tuple[list[Any], list[Tensor]]:
    """What an optimiser was given, tensors or groups, as a list, and all tensors in it.

    Raises:
        TypeError: it is neither.
    """
    given = list(params)
    kinds = sorted({type(each).__name__ for each in given})
    if given and all(isinstance(each, dict) and "params" in each for each in given):
        given = [
            {**each, "params": [each["params"]] if isinstance(each["params"], Tensor) else list(each["params"])}
            for each in given
        ]
        parameters = [parameter for group in given for parameter in group["params"]]
    else:
        parameters = given
    if not parameters or not all(isinstance(parameter, Tensor) for parameter in parameters):
        raise TypeError(f"params: expected tensors, or groups of them, got {kinds}")
    return given, parameters


def fuses(parameters: list[Tensor]) -> bool:
    """Whether PyTorch's fused implementation is right, which takes a tensor for a piece of memory, gaps and all."""
    return all(
        parameter.device.type in ("cpu", "cuda")
        and local(parameter) is parameter  # of weights in shards it would take a part for the whole
        and torch.ops.aten.is_non_overlapping_and_dense(parameter)
        for parameter in parameters
    )


def _fit(parameters: list[Tensor]) -> bool:
    whole = all(local(parameter) is parameter for parameter in parameters)
    return whole and multi_tensor.fits(parameters) and all(value.dtype == torch.float32 for value in parameters)
