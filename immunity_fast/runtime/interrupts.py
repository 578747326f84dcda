"""Ctrl-C, SIGTERM, SIGUSR1 and a terminal that is closed: a command ends with a line on how to go on, and its status.

A command raises `KeyboardInterrupt` for all of them, at once, or `deferred` to where its state can be saved.
Nothing here imports more than the standard library, because it comes first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

# A terminal's, a scheduler's, that of a terminal that is closed, and what schedulers are often told to send before the
# time is over; the last two are not known everywhere.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))

_commands = 0  # that run, one within another


class Terminated(KeyboardInterrupt):
    """The command is to end because of a signal; `status` is what its process then ends with."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def status_of(interrupt: KeyboardInterrupt) -> int:
    """What a process ends with that was interrupted, as shells count."""
    return interrupt.status if isinstance(interrupt, Terminated) else 128 + signal.SIGINT


def end_quietly_while_importing() -> None:
    """Imports take seconds, and a signal in them is nobody's error: a line and its status, no traceback."""
    _handle(_end)


@contextmanager
def ended_quietly() -> Iterator[None]:
    """The same for the length of a `with` block; what it runs may handle signals in its own way."""
    before = _handle(_end)
    try:
        yield
    finally:
        _give_back(before)


@contextmanager
def raised() -> Iterator[None]:
    """`KeyboardInterrupt` for each of the signals in a `with` block, but for those that the process ignores."""
    before = _handle(_raise)
    try:
        yield
    finally:
        _give_back(before)


@contextmanager
def deferred(wanted: bool = True) -> Iterator[list[int]]:
    """A list of the signals that have come in a `with` block, which is to look at it; a second one ends it at once.

    Not under torchrun, which passes on what the process may have got already, and in the end kills what does not stop.
    Where `wanted` is false, or in a thread, the list stays empty, and signals are what they were.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked and not launched:
            _raise(number, frame)
        asked.append(number)
        if len(asked) == 1 and os.environ.get("LOCAL_RANK", "0") == "0":
            # Not by way of a stream, in the middle of whose writing this may be.
            again = b"" if launched else b"; again: at once"
            os.write(2, b"stopping when this step is done and saved" + again + b"\n")

    launched = bool(os.environ.get("TORCHELASTIC_RUN_ID"))

    before = _handle(note) if wanted else {}
    try:
        yield asked
    finally:
        _give_back(before)


def stop_if(number: int) -> None:
    """`KeyboardInterrupt` where a signal, by its number, was `deferred` to here; none where that is 0."""
    if number:
        _raise(number, None)


@contextmanager
def explained(line: Callable[[], str], log: Callable[[str], Any]) -> Iterator[None]:
    """Log a line on an interrupt in a `with` block; of commands that run within another only the outermost does."""
    global _commands
    _commands += 1
    try:
        yield
    except KeyboardInterrupt:
        if _commands == 1:
            log(line())
        raise
    finally:
        _commands -= 1


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


def _handle(handler: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Have the signals handled, which only the main thread can; the handlers from before."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}  # nohup's, for one
    for number in before:
        signal.signal(number, handler)
    return before


def _give_back(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


if sys.argv[:1] == ["-m"]:  # what `python -m` has there until it has found its module: a command of this package starts
    end_quietly_while_importing()
