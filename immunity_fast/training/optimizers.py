"""The optimisers that a run may have: what they begin with where nobody says more, and what of them is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from immunity_fast.training.optimizer import FusedSGD, fuses

Optimiser = Literal["sgd", "adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "adagrad", "adadelta"]
OPTIMISERS: tuple[str, ...] = get_args(Optimiser)

# State that is one number; all other state is of its parameter's shape.
NUMBERS = ("step", "mu_product")


@dataclass(frozen=True)
class Kind:
    """What one optimiser of `torch.optim` has.

    Args:
        of_torch: its name there.
        lr, weight_decay: where nobody says more: torch's own, but for SGD's and for RMSprop's rate.
        state: what it keeps of a parameter, by name.
        momentum: where nobody says more; None: it has none that could be set.
        betas, eps: whether it has them.
        fused: whether it has a step in few launches that float16's scaler need not wait for: on a CPU and on a GPU.
        capturable: whether it can keep all of its state on a GPU, where otherwise it would read numbers back.
    """

    of_torch: str
    lr: float
    weight_decay: float = 0.0
    state: tuple[str, ...] = ()
    momentum: float | None = None
    betas: bool = False
    eps: bool = True
    fused: bool = False
    capturable: bool = False


ADAM = ("step", "exp_avg", "exp_avg_sq")
KINDS: dict[str, Kind] = {
    "sgd": Kind("SGD", 0.05, 5e-4, ("momentum_buffer",), momentum=0.9, eps=False),
    "adam": Kind("Adam", 1e-3, 0.0, ADAM, betas=True, fused=True),
    "adamw": Kind("AdamW", 1e-3, 1e-2, ADAM, betas=True, fused=True),
    "nadam": Kind("NAdam", 2e-3, 0.0, (*ADAM, "mu_product"), betas=True, capturable=True),
    "radam": Kind("RAdam", 1e-3, 0.0, ADAM, betas=True, capturable=True),
    "adamax": Kind("Adamax", 2e-3, 0.0, ("step", "exp_avg", "exp_inf"), betas=True, capturable=True),
    # torch's own rate, 0.01, moves each weight by 0.1 in the first step.
    "rmsprop": Kind("RMSprop", 1e-3, 0.0, ("step", "square_avg", "momentum_buffer"), momentum=0.0, capturable=True),
    "adagrad": Kind("Adagrad", 1e-2, 0.0, ("step", "sum"), fused=True),
    "adadelta": Kind("Adadelta", 1.0, 0.0, ("step", "square_avg", "acc_delta"), capturable=True),
}


def make_optimizer(
    name: str,
    params: Sequence[Any],
    lr: float | None = None,
    *,
    momentum: float | None = None,
    weight_decay: float | None = None,
    betas: Sequence[float] | None = None,
    eps: float | None = None,
) -> Optimizer:
    """An optimiser by its name, in the implementation that waits for nothing where there is one.

    SGD is `FusedSGD`, with Nesterov's momentum where it has any; the others are `torch.optim`'s.

    Args:
        name: of `OPTIMISERS`.
        params: tensors or groups, as of `parameter_groups`.
        lr, momentum, weight_decay: None is what `KINDS` has. A group's own decay comes before. `weight_decay` of AdamW
            shrinks the weights by lr · weight_decay; that of the others is added to the gradient, times the weights.
        betas: of Adam and those named after it; None is torch's own.
        eps: of all but SGD; None is torch's own.

    Raises:
        ValueError: no such optimiser, or one that has no such setting.
    """
    if name not in KINDS:
        raise ValueError(f"optimizer: expected one of {', '.join(KINDS)}, got {name!r}")
    kind = KINDS[name]
    check_has(name, betas=betas, eps=eps)
    rate = kind.lr if lr is None else lr
    decay = kind.weight_decay if weight_decay is None else weight_decay
    velocity = kind.momentum if momentum is None else momentum
    if name == "sgd":
        return FusedSGD(params, rate, velocity or 0.0, weight_decay=decay, nesterov=bool(velocity))
    options: dict[str, Any] = {"lr": rate, "weight_decay": decay}
    if betas is not None:
        options["betas"] = tuple(betas)
    if eps is not None:
        options["eps"] = eps
    if kind.momentum is not None:
        options["momentum"] = velocity
    tensors = [t for each in params for t in (each["params"] if isinstance(each, dict) else [each])]
    on_gpu = any(tensor.is_cuda for tensor in tensors)
    if kind.fused and fuses(tensors) and (not on_gpu or _fused_on_gpu(name)):
        options["fused"] = True
    elif kind.capturable and on_gpu:
        options["capturable"] = True
    optimizer: Optimizer = getattr(torch.optim, kind.of_torch)(params, **options)
    return optimizer


def _fused_on_gpu(name: str) -> bool:
    """Whether this PyTorch has the kernel for a GPU, which Adagrad's came to later."""
    return name != "adagrad" or torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adagrad_", "CUDA")


def check_has(name: str, *, betas: object = None, eps: object = None, momentum: object = None) -> None:
    """Check that an optimiser has the settings that are given, those that are not None.

    Raises:
        ValueError: it has not.
    """
    kind = KINDS[name]
    given = {
        "betas": (betas, kind.betas),
        "optimizer_eps": (eps, kind.eps),
        "momentum": (momentum, kind.momentum is not None),
    }
    for setting, (value, has) in given.items():
        if value is not None and not has:
            having = ", ".join(other for other in KINDS if _has(other, setting))
            raise ValueError(f"{setting}: expected none with {name}, which has none, but {having}, got {value}")


def _has(name: str, setting: str) -> bool:
    kind = KINDS[name]
    return {"betas": kind.betas, "optimizer_eps": kind.eps, "momentum": kind.momentum is not None}[setting]


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimiser, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def possible_state(optimizer: Optimizer, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """What an optimiser of `make_optimizer` may keep, under `index/name`, as tensors of the right shape and dtype.

    Args:
        optimizer: which.
        parameters: its parameters, in the order in which they are numbered.
    """
    kind = next(kind for kind in KINDS.values() if _is(optimizer, kind))
    moves = any(group.get("momentum") for group in optimizer.param_groups)
    names = [name for name in kind.state if moves or name != "momentum_buffer"]
    return {
        f"{index}/{name}": number() if name in NUMBERS else parameter
        for index, parameter in enumerate(parameters)
        for name in names
    }


def _is(optimizer: Optimizer, kind: Kind) -> bool:
    made = getattr(torch.optim, kind.of_torch)
    return type(optimizer) is made or (made is torch.optim.SGD and isinstance(optimizer, made))


def number() -> Tensor:
    """A tensor such as PyTorch's optimisers keep a number in; it has no value."""
    wide = torch.get_default_dtype() == torch.float64
    return torch.empty((), dtype=torch.float64 if wide else torch.float32)


def lay_out_state(optimizer: Optimizer) -> None:
    """Bring what an optimiser keeps into the layout of its parameters, which fused implementations want, in place."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            alike = isinstance(value, Tensor) and value.shape == parameter.shape
            if alike and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)
