"""What can be said in one line: an exception, that memory was not enough, a name that is no text."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from immunity_fast.runtime.compilation import append_traceback, shortened

# What PyTorch's allocators and libraries say where they raise a plain RuntimeError.
_NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|bad_alloc|_ALLOC_FAILED"
    r"|could not create a (primitive|memory)",  # oneDNN's
    re.I,
)
_TRIED = re.compile(r"(?:tried to allocate|unable to allocate) (?P<size>[\d.]+) ?(?P<unit>[KMGT]?i?B|bytes)\b", re.I)


def one_line(error: BaseException) -> str:
    """An exception's own words, shortened; with its type where that is no ordinary refusal of an input."""
    if (tried := out_of_memory(error)) is not None:
        return tried
    text = " ".join(str(error).split())
    if text and isinstance(error, (ValueError, OSError)):
        return shortened(text)
    return shortened(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def out_of_memory(error: BaseException) -> str | None:
    """That memory was short and what was tried, where that is what the exception means; else None."""
    text = str(error)
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not known and not (isinstance(error, (RuntimeError, OSError)) and _NO_MEMORY.search(text)):
        return None
    found = _TRIED.search(text)
    if found is None:
        return "out of memory"
    size, unit = found["size"], found["unit"]
    return f"out of memory (tried to allocate {in_units(float(size)) if unit == 'bytes' else f'{size} {unit}'})"


def in_units(size: float) -> str:
    """A number of bytes as a text in the largest unit that fits: 2048 is "2.0 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def readable(text: str) -> str:
    """A text as UTF-8 can hold it: other bytes of a file's name, which Python keeps as lone surrogates, as \\xff."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that are no file name's
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def traceback_note(error: BaseException, folder: Path) -> str:
    """Where a defect's traceback lies, as the end of a line; nothing for what the line says all of."""
    if isinstance(error, (ValueError, OSError)) or out_of_memory(error) is not None:
        return ""
    return append_traceback(error, folder / "errors.log")
