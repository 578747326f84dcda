"""Whether layers may run in another way than by calling them: nobody looks at them, and nobody has changed them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_ALL = [getattr(of_all_modules, f"_global{hooks}") for hooks in _HOOKS]


def is_plain(layer: nn.Module) -> bool:
    """Whether calling it does what its class says, and nothing more."""
    own = vars(layer)
    return not ("forward" in own or any(own[hooks] for hooks in _HOOKS))


def is_recorded(x: Tensor) -> bool:
    """Whether somebody is to see each layer of a pass of x: a compiler, a tracer, or hooks of all modules."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or not isinstance(x, Tensor)
        or any(_HOOKS_OF_ALL)
    )
