"""What became of something, as one process tells another in a line, and as records keep it.

An outcome is "passed", "failed", "not finished" (in its time), "not run", or "not judged": a rehearsal on a device that
computes nothing. It may have a cause, which is one line.
"""

import json
import os
import re
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "@outcome "  # begins a line that is an outcome
LONGEST = 600  # characters of a cause
PASSED, FAILED, NOT_FINISHED, NOT_RUN, NOT_JUDGED = "passed", "failed", "not finished", "not run", "not judged"

# An absolute path of two parts at least, and not a part of a relative one, of a number or of an address.
_ABSOLUTE = re.compile(r"(?<![\w.>~/:-])(?:/[\w.+@-]+)+/(?=[\w.+@-])")
_ERROR = r"(?:[a-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Interrupt|Failed|Exit)\b.*"
_RAISED = re.compile(rf"^(?:E\s+)?({_ERROR}|error: .*|Fatal Python error: .*)")


def report(name: str, outcome: str, cause: str = "", **details: Any) -> None:
    """Tell whoever started this process."""
    print(line(name, outcome, cause, **details), flush=True)


def line(name: str, outcome: str, cause: str = "", **details: Any) -> str:
    """An outcome, with its cause and details, as a line of text that `read` understands."""
    return MARK + json.dumps({"name": name, "outcome": outcome, **({"cause": cause} if cause else {}), **details})


def read(text: str) -> dict[str, Any] | None:
    """The inverse of `line`; None where the text is none."""
    if not text.startswith(MARK):
        return None
    try:
        found = json.loads(text[len(MARK) :])
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"name", "outcome"} <= found.keys() else None


def innermost_cause(error: BaseException) -> str:
    """What was raised first, in a line, and where: a compiler's exceptions wrap each other, and say little."""
    seen: list[BaseException] = []
    inner: Any = error
    while isinstance(inner, BaseException) and all(inner is not earlier for earlier in seen):
        seen.append(inner)
        inner = inner.__cause__ or getattr(inner, "inner_exception", None)
    error = seen[-1]
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    place = ""
    if traceback is not None:
        place = f" ({Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno})"
    text = str(error)
    # A compiler's worker process sends its traceback as text, whose last line says it.
    said = innermost_line(text) if "Traceback (most recent call last)" in text else " ".join(text.split())
    name = type(error).__name__
    return shortened(said if said.startswith(name) else f"{name}{place}: {said}")


def innermost_line(output: str) -> str:
    """The line of a program's output that names what was raised last, or else the last line that is not empty."""
    lines = [text.strip() for text in output.splitlines() if text.strip()]
    raised = [found.group(1) for text in lines if (found := _RAISED.match(text))]
    return shortened((raised or lines or [""])[-1])


def shortened(text: str) -> str:
    """In one line, and of a long text its beginning and its end: either may name what is wrong."""
    text = " ".join(text.split())
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - 3) // 2
    return f"{text[:half]} … {text[-half:]}"


def portable(text: str) -> str:
    """Without the places where this machine keeps things."""
    places = [
        (sys.executable, "python"),
        (str(ROOT), "."),
        (sys.prefix, "<python>"),
        (sysconfig.get_path("stdlib"), "<python>"),
        (tempfile.gettempdir(), "<tmp>"),
        (os.path.expanduser("~"), "~"),
    ]
    for place, name in places:
        if place and place != "/":
            text = text.replace(place, name)
    return _ABSOLUTE.sub("…/", text)


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, an entry of a list a line, without places of this machine; `path` only ever holds all of it."""
    from immunity_fast.runtime.files import write_atomically  # not at the top: it takes PyTorch's import along

    fields = []
    for name, value in _portable(content).items():
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in value) + "\n ]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        fields.append(f" {json.dumps(name)}: {text}")
    try:
        write_atomically(path, ("{\n" + ",\n".join(fields) + "\n}\n").encode(errors="backslashreplace"))
    except OSError as error:
        raise SystemExit(f"error: {path}: {error.strerror}") from None


def _portable(value: Any) -> Any:
    """The same with all its texts `portable`."""
    if isinstance(value, str):
        return portable(value)
    if isinstance(value, dict):
        return {key: _portable(each) for key, each in value.items()}
    return [_portable(each) for each in value] if isinstance(value, list | tuple) else value
