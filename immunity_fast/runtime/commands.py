"""The package's commands, and how a person types them into a shell: in the way in which this process was called."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

CONSOLE = "immunity-fast"  # the console command that setup.py installs


class Command(NamedTuple):
    """What does a command's work, and what it does, in a line."""

    module: str  # of immunity_fast
    line: str


COMMANDS = {
    "train": Command("train", "train a mixture of experts, attack it, and write a report"),
    "evaluate": Command("evaluate", "attack a trained run, or any network, in more ways"),
    "explain": Command("explain", "draw where each expert of a run looks in images of yours"),
    "export": Command("export_model", "write a run's model as ONNX, torch.export or TorchScript"),
    "ensemble": Command("ensemble", "join networks that were trained alone"),
    "reproduce": Command("reproduce", "make the paper's tables and figure again"),
    "poison": Command("poison", "make poisons of training images, and test how often they work"),
    "info": Command("info", "versions, devices, and what auto means on this machine"),
}

_console: str | None = None  # what this process was called as, where it was by the console command


@contextmanager
def called_as(console: str) -> Iterator[None]:
    """In a `with` block, commands are shown as those of the console command, which a shell knows by this name."""
    global _console
    before, _console = _console, console
    try:
        yield
    finally:
        _console = before


def program(module: str) -> str:
    """What a shell calls to run a command's module: the beginning of its usage, and of `shell_command`."""
    if _console is None:
        return f"python -m immunity_fast.{module}"
    names = {command.module: name for name, command in COMMANDS.items()}
    return f"{_console} {names[module]}"


def shell_command(module: str, words: Iterable[str]) -> str:
    """The line for a shell that runs a command's module with these arguments, quoted where they have to be."""
    return f"{program(module)} {shlex.join(words)}"
