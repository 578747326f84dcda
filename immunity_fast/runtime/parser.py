"""The argument parser of all commands, whose error is one line; nothing is imported here that takes seconds."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose error is one line, without the long usage before it."""

    def error(self, message: str) -> NoReturn:
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
