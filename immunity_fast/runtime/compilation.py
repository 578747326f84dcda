"""Compiled functions that a person can live with: caches that are kept, and a fall-back to eager that says so."""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

Compile = Literal["auto", "off", "on", "max"]
Log = Callable[[str], None]
Function = TypeVar("Function", bound=Callable[..., Any])

# "on" replays CUDA graphs; "max" also times several kernels for each operation, which takes minutes.
_MODES = {
    ("cuda", "on"): "reduce-overhead",
    ("cuda", "max"): "max-autotune",
    ("cpu", "max"): "max-autotune-no-cudagraphs",
}


RECOMPILE_LIMIT = 256
TRACEBACKS = "compilation.log"  # in a run's folder: of all that could not be compiled
CAUSE_LENGTH = 300  # of an innermost cause in a line, in characters
CODE_LENGTH = 100  # of a line of code in one

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (\S+)\n\s+(\S[^\n]*)')
_OPERATION = re.compile(r"(?m)^\s*target: (\S+)$")


WHY_EAGER = (
    "what Grad-CAM looks at inside of such networks is differentiated twice, which compiled code cannot do: leave "
    "fullgraph=True out"
)


def eagerly(function: Function) -> Function:
    """A function that `torch.compile` leaves alone, with all that it calls: it differentiates inside of a graph."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # nothing is compiled; it takes seconds to import
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=WHY_EAGER))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    disabled: list[Any] = []
    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = WHY_EAGER  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def resolve(choice: Compile, device: torch.device) -> Literal["off", "on", "max"]:
    """What "auto" means: on a CPU compiling takes a minute or two, and a step is not faster for it."""
    if choice == "auto":
        return "on" if device.type == "cuda" else "off"
    return choice


def keep_caches() -> Path:
    """Have compiled code kept from one run to the next; returns the folder of Inductor's.

    That is ~/.cache/immunity_fast (XDG_CACHE_HOME's), or else, where that cannot be written to or there is no home, a
    folder among the temporary files. TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR, where they are set and can be made,
    are respected: but not what PyTorch sets by itself when `torch._dynamo` is imported.
    """
    found = None
    for name, part in (("TRITON_CACHE_DIR", "triton"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        given = os.environ.get(name)
        if not given or _is_torchs(given) or not _can_be_made(Path(given)):
            found = found or _cache_folder()
            os.environ[name] = str(found / part)
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def _cache_folder() -> Path:
    """The first folder that can be written to, which then exists."""
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "immunity_fast"
        if _can_be_made(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    with suppress(OSError):
        user = os.getuid() if hasattr(os, "getuid") else None  # Windows' temporary files are the user's own
        folder = Path(tempfile.gettempdir()) / ("immunity_fast" if user is None else f"immunity_fast-{user}")
        folder.mkdir(mode=0o700, exist_ok=True)
        # Anyone can make a folder of that name, and fill it with code of theirs.
        if user in (None, folder.lstat().st_uid) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="immunity_fast-"))


def _can_be_made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return True


def _is_torchs(folder: str) -> bool:
    """Whether it is PyTorch's choice, which it writes into the environment as if the user had made it."""
    module = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    default = getattr(module, "default_cache_dir", None)
    try:
        return default is not None and os.path.abspath(default()) == os.path.abspath(folder)
    except (KeyError, OSError, ImportError):  # it is named after the user, who has no account
        return False


def at_size(function: Compiled, images: Tensor, size: int) -> Tensor:
    """`function(images)` (N, B, …) of at most `size` images, by code that is compiled for that many; eager for more."""
    if not function.active or len(images) > size:
        return function.plain(images)  # type: ignore[no-any-return]
    logits: Tensor = function(pad(images, (0, 0, 0, 0, 0, 0, 0, size - len(images))))
    return logits[:, : len(images)]


class Compiled:
    """A function that is compiled to one graph at its first call, for the shapes of that call.

    Where compiling fails it is announced, in a line with the innermost cause, and the function runs in eager mode from
    then on.

    Args:
        function: what is to be compiled; it is called with tensors.
        choice: "off" runs the function as it is.
        device: where the tensors are.
        log: what takes the line; None is `warnings.warn`.
        traceback_file: where the whole traceback is appended to, which the line then names; None keeps none.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        choice: Compile,
        device: torch.device,
        log: Log | None = None,
        traceback_file: Path | None = None,
    ) -> None:
        self._function = function
        self._log = log or warnings.warn
        self._traceback_file = traceback_file
        self._compiled: Callable[..., Any] | None = None
        choice = resolve(choice, device)
        if choice != "off":
            mode = _MODES.get((device.type, choice))
            # All graphs of one code count, of whatever object and size: an attack has four, and there are many attacks.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
            self._compiled = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)

    @property
    def active(self) -> bool:
        """Whether calls go to compiled code, which they do until it fails."""
        return self._compiled is not None

    @property
    def plain(self) -> Callable[..., Any]:
        """The function as it was given, which is not compiled."""
        return self._function

    def __call__(self, *arguments: Any) -> Any:
        """The function's result, by compiled code where there is any."""
        if self._compiled is None:
            return self._function(*arguments)
        try:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return self._compiled(*arguments)
        except Exception as error:
            return self.fall_back(error, lambda: self._function(*arguments))

    def fall_back(self, error: Exception, call: Callable[[], Any]) -> Any:
        """The result of `call` in eager mode, which is for good: unless that, too, raises what is wrong with its input.

        Args:
            error: what compiled code raised in its place.
            call: what uses this function.
        """
        compiled, self._compiled = self._compiled, None
        try:
            result = call()
        except Exception:
            self._compiled = compiled
            raise
        kept = "" if self._traceback_file is None else append_traceback(error, self._traceback_file)
        self._log(f"compiling failed, going on in eager mode: {innermost_cause(error)}{place_of(error)}{kept}")
        return result


def append_traceback(error: BaseException, path: Path) -> str:
    """Append a whole traceback to a file; where it lies, as the end of a line, and nothing where that fails."""
    with suppress(OSError):  # a full disk must not stop what goes on without the file
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            # Each by itself: printed as a chain, what was raised "from None" would hide its cause.
            parts = ("".join(traceback.format_exception(each, chain=False)) for each in causes(error))
            file.write("\nwhich was raised because of:\n\n".join(parts) + "\n")
        return f"; whole traceback: {path}"
    return ""


def innermost_cause(error: BaseException) -> str:
    """What went wrong at first, in one line: compilers wrap an exception in several of their own."""
    error = causes(error)[-1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    if any("Traceback (most recent call last)" in line for line in lines):  # of another process, as text
        return shortened(lines[-1])
    # Where the first line only announces what follows, such as code, what is wrong with it comes last.
    told = f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") else lines[0]
    return shortened(f"{type(error).__name__}: {told}")


def place_of(error: BaseException) -> str:
    """Where in the code that is compiled a compiler has failed, as the end of a line; nothing where it does not say.

    Dynamo quotes the code that it was tracing, Inductor names the operation that it was lowering.
    """
    texts = [str(each) for each in reversed(causes(error))]
    for text in texts:
        frames = _FRAME.findall(text.partition("from user code:")[2])
        if frames:
            file, line, function, code = frames[-1]
            return f"; in {function}, {Path(file).name}:{line}: {shortened(code.strip(), CODE_LENGTH)}"
    for text in texts:
        if operation := _OPERATION.search(text):
            return f"; in the operation {operation[1]}"
    return ""


def causes(error: BaseException) -> list[BaseException]:
    """An exception, what it was raised from, and so on to the innermost.

    Not what it was only raised while handling, which need not have to do with it, unless it quotes that.
    """
    found: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and all(inner is not earlier for earlier in found):
        found.append(inner)
        handled = inner.__context__
        quoted = handled is not None and f"{type(handled).__name__}: {handled}" in str(inner)
        wrapped = getattr(inner, "inner_exception", None)
        wrapped = wrapped if isinstance(wrapped, BaseException) else None
        inner = wrapped or inner.__cause__ or (handled if quoted else None)
    return found


def shortened(text: str, length: int = CAUSE_LENGTH) -> str:
    """A text in so many characters: of a longer one the beginning and the end."""
    if len(text) <= length:
        return text
    half = (length - 3) // 2
    return f"{text[:half]} … {text[-half:]}"
