"""In which mode a model is attacked: a module in evaluation mode, whatever mode it is in; a function as it is.

An attack asks a model dozens of times. In training mode each time moves BatchNorm's running statistics, towards those
of adversarial images, and drops other units. torchattacks switches modules, too. A function may hold modules anywhere:
what is done with them is its author's choice, and a warning says so where statistics have moved.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from immunity_fast.runtime.modes import evaluating

DEPTH = 6  # how far into functions, objects and lists modules are looked for
LARGEST = 100  # lists with more are not looked through


class MovedStatisticsWarning(UserWarning):
    """An attack on a function has moved running statistics of a module in training mode that the function uses."""


@contextmanager
def attacked(model: Callable[..., Any]) -> Iterator[None]:
    """What an attack does to a model's mode, and what it says of it, for the length of a `with` block.

    Args:
        model: a module, its bound method or a `functools.partial` of either: in evaluation mode until the block ends,
            however it ends, and then again the mode that each submodule was in. Any other callable stays as it is.

    Warns:
        MovedStatisticsWarning: of a callable, when it has moved a buffer of a module in training mode.
    """
    module = _module_of(model)
    if module is None:
        with _watched(model):
            yield
        return
    with ExitStack() as stack:
        if any(part.training for part in module.modules()):
            with suppress(NotImplementedError):  # what torch.export has made has no modes
                stack.enter_context(evaluating(module))
        yield


def _module_of(model: Any) -> nn.Module | None:
    while isinstance(model, functools.partial):
        model = model.func
    if isinstance(model, types.MethodType):
        model = model.__self__
    return model if isinstance(model, nn.Module) else None


@contextmanager
def _watched(model: Callable[..., Any]) -> Iterator[None]:
    parts = {id(part): part for module in held_modules(model) for part in module.modules() if part.training}
    # Not each buffer's own: BatchNorm writes its means without a new version, and counts batches with one.
    before = [(part, _versions(part)) for part in parts.values()]
    yield
    moved = next((part for part, versions in before if _versions(part) != versions), None)
    if moved is not None:
        warnings.warn(
            f"the attack has moved the statistics of a {type(moved).__name__} in training mode, which the attacked "
            "function uses: call eval() of the module first, or attack the module itself, which is then in evaluation "
            "mode for as long as the attack takes",
            MovedStatisticsWarning,
            stacklevel=2,
        )


def _versions(module: nn.Module) -> list[int]:
    """How often each of a module's own buffers was changed."""
    return [buffer._version for buffer in module.buffers(recurse=False) if not buffer.is_inference()]


def held_modules(model: Callable[..., Any]) -> list[nn.Module]:
    """Modules that a callable uses, as far as can be seen: in what it encloses, names, is bound to, or keeps.

    Args:
        model: any callable.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    level: list[Any] = [model]
    for _ in range(DEPTH):
        below: list[Any] = []
        for value in level:
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, nn.Module):
                found[id(value)] = value
            else:
                below += _inside(value)
        level = below
    return list(found.values())


def _inside(value: Any) -> list[Any]:
    """What a value is made of, where it may be part of a model."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # a name that has no value yet
                continue
        named = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *named]
    if isinstance(value, (list, tuple, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return list(parts) if len(value) <= LARGEST else []
    if isinstance(value, (type, types.ModuleType, Tensor)) or not callable(value):
        return []
    return list(getattr(value, "__dict__", {}).values())
