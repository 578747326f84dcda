"""The argument parser of all commands, whose error is one line; nothing is imported here that takes seconds."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose error is one line, without the long usage before it."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, and exit with status 2."""
        line = f"error: {message} (--help lists the options)"
        self.exit(2, None if left_to_torchrun(line) else f"{line}\n")


def description(doc: str | None) -> str:
    """What --help says of a command, from its module's docstring: the first line, without the command's name."""
    first = (doc or "").split("\n")[0].partition(": ")[2]
    return first[:1].upper() + first[1:]


def left_to_torchrun(message: str) -> bool:
    """Write down for torchrun what its report is to say of this process; whether that is enough.

    It is for all processes but the first: what is wrong is mostly wrong in each of them, and said once.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    # As `torch.distributed.elastic.multiprocessing.errors.ErrorHandler` does, but for the traceback.
    said = {"message": message, "extraInfo": {"py_callstack": message, "timestamp": f"{time.time():.0f}"}}
    try:
        Path(file).write_text(json.dumps({"message": said}), encoding="utf-8")
    except OSError:
        return False
    return os.environ.get("RANK") != "0"


def show_on_any_terminal() -> None:
    """A × that a terminal cannot show is a question mark there, and ends no run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def path(text: str) -> Path:
    """A path of a command line, for argparse: ~ is the home, which shells leave in ``--out=~/runs``.

    It has to be UTF-8: checkpoints cannot be read from any other.

    Raises:
        argparse.ArgumentTypeError: it is no path.
    """
    try:
        os.fsencode(text).decode("utf-8")
        return Path(text).expanduser()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{text}: expected a name in UTF-8") from None
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def number(text: str) -> float:
    """A number of a command line, for argparse, also as a fraction: 8/255.

    Raises:
        ValueError: it is no number.
    """
    numerator, _, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator or 1)
    except ZeroDivisionError:
        raise ValueError(f"{text}: a fraction of zero") from None


def numbers(text: str) -> float | tuple[float, ...]:
    """One number of a command line, for argparse, or several with commas: 2/255,4/255.

    Raises:
        ValueError: one is no number.
    """
    found = tuple(number(part) for part in text.split(","))
    return found[0] if len(found) == 1 else found


def whole_or_word(text: str) -> int | str:
    """A whole number of a command line, or a word such as auto, for argparse."""
    try:
        return int(text)
    except ValueError:
        return text


# What turns a word of a command line into a value, by the name under which an option's is recorded; what is another's
# takes part in nothing that is recorded.
KINDS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "number": number,
    "numbers": numbers,
    "path": path,
    "whole_or_word": whole_or_word,
}
