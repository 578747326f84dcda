"""The options of all commands, from their own parsers. `python -m tests.command_options` writes options.json anew."""

from __future__ import annotations

import argparse
import importlib

import pytest

from immunity_fast.evaluation.gate_attackers import KNOWLEDGE
from immunity_fast.evaluation.runner import ATTACKS, SETS
from immunity_fast.experts import NAMES
from immunity_fast.runtime import recorded
from immunity_fast.runtime.commands import COMMANDS
from immunity_fast.training.loggers import LOGGERS
from immunity_fast.training.monitoring import DIRECTIONS

# Of what is open, or a list with commas, the beginnings.
WORDS = {
    "arch": NAMES,
    "device": ("auto", "cpu", "cuda"),
    "attacks": (*SETS, *ATTACKS),
    "attackers": tuple(KNOWLEDGE),
    "class_weights": ("balanced",),
    "loggers": tuple(LOGGERS),
    "monitor": tuple(DIRECTIONS),
    "workers": ("auto",),
}


class Parsed(BaseException):
    """A parser was asked to read a command line."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser of a command's module, as its main makes it."""

    def parse_args(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise Parsed(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(f"immunity_fast.{module}").main([])
    return parsed.value.parser


def current() -> dict[str, recorded.Described]:
    """What options.json has to say now."""
    return {name: recorded.describe(parser_of(command.module), WORDS) for name, command in COMMANDS.items()}


if __name__ == "__main__":
    print(recorded.write(current()))
