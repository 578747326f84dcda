"""What `module.path:callable` names, found by importing it: code of whoever wrote that module runs then."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

from torch import nn

CHANNELS = ("in_channels", "in_chans", "input_channels", "num_channels", "channels")  # as arguments are called


def names_import(text: str) -> bool:
    """Whether a text has the form `module.path:callable`; nothing is imported."""
    path, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*path.split("."), *name.split(".")))


def imported(place: str) -> Any:
    """What `module.path:callable` names; importing the module runs its code.

    Raises:
        ValueError: it cannot be imported, or is a part of Python's standard library, where no network is.
    """
    path, _, name = place.partition(":")
    _check_own(place, path)
    try:
        found: Any = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a module may raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{place}: expected what can be imported, got {type(error).__name__}: {reason}") from error
    if inspect.isroutine(found) or inspect.isclass(found):
        _check_own(place, str(getattr(found, "__module__", None) or ""))
    return found


def made(place: str, num_classes: int, channels: int = 3) -> nn.Module:
    """A network of `module.path:callable`: a class, or a function that makes one.

    It is called with `num_classes=` where its signature takes that, else with the number where it requires one
    argument, else without any. Of the images' channels it is told by the first of `CHANNELS` that it has, where that
    has no default, or one of 1 or 3: a `channels=64` is a width.

    Raises:
        ValueError: it cannot be imported or called so, or makes no `nn.Module`.
    """
    found = imported(place)
    if isinstance(found, nn.Module) or not callable(found):
        raise ValueError(f"{place}: expected a class or a function that makes a network, got {type(found).__name__}")
    network = called(place, found, num_classes, channels)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{place}: expected it to make an nn.Module, got {type(network).__name__}")
    return network


def called(place: str, found: Any, num_classes: int, channels: int = 3) -> Any:
    """What a class or function makes, which is called as `made` says.

    Raises:
        ValueError: it cannot be called so, or fails.
    """
    positional, named = _arguments(place, found, num_classes, channels)
    try:
        return found(*positional, **named)
    except Exception as error:  # whatever the user's code may raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{place}: expected it to make a network, got {type(error).__name__}: {reason}") from error


def _arguments(place: str, found: Any, num_classes: int, channels: int) -> tuple[tuple[int, ...], dict[str, int]]:
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):  # some that are written in C have none
        return (), {}
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    depth = next((each for name in CHANNELS for each in named if each.name == name), None)
    told = {} if depth is None or depth.default not in (depth.empty, 1, 3) else {depth.name: channels}
    required = [
        each
        for each in parameters
        if each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and each.name not in told
    ]
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    if any(each.name == "num_classes" for each in named) or (takes_any and not required):
        return (), {"num_classes": num_classes} | told
    if len(required) == 1 and required[0].kind is not required[0].KEYWORD_ONLY:
        return (num_classes,), told
    if required:
        wanted = ", ".join(each.name for each in required)
        raise ValueError(
            f"{place}: expected one that takes num_classes, one argument or none, got one that requires {wanted}"
        )
    return (), told


def _check_own(place: str, path: str) -> None:
    if path.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"{place}: expected a module of yours or of a library, got Python's own standard library; if a file of "
            "yours has the name of one of its modules, give it another"
        )
