"""What the commands share: one-line errors, the choice of a device, progress bars."""

import atexit
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NoReturn, ParamSpec

import torch

try:
    import jinja2  # noqa: F401  the reports' and the other two are asked for here so that one line says what is missing

    try:
        import matplotlib
    except (ValueError, RuntimeError) as refused:
        # MPLBACKEND of a notebook, which a process that it starts need not have; nothing here is shown.
        os.environ["MPLBACKEND"] = "agg"
        if isinstance(refused, RuntimeError):  # matplotlib 3.8, for a user without a home
            os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")
            atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # what of it was imported before it failed
        import matplotlib  # noqa: F401
    import safetensors  # noqa: F401
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"error: this command needs {missing.name}: pip install {missing.name}; or, in a checkout of immunity_fast, "
        "pip install '.[train]', for what all commands need"
    ) from None

from immunity_fast.runtime.notebook import NotebookProgress, in_notebook
from immunity_fast.runtime.parser import Parser as Parser
from immunity_fast.runtime.parser import left_to_torchrun, show_on_any_terminal
from immunity_fast.runtime.parser import number as number
from immunity_fast.runtime.parser import numbers as numbers
from immunity_fast.runtime.parser import path as path
from immunity_fast.runtime.parser import whole_or_word as whole_or_word

TRUST_CODE = "import and run the module.path:callable that a run's --arch names: only of runs that you trust"
STATUS_SECONDS = 30.0  # seconds between two lines in a log that is no terminal
# A folder's name may look like markup; in a notebook lines are text, of which a cell has one output and not one a line.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, force_jupyter=False)


P = ParamSpec("P")


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: what the user can mend is one line on stderr and status 1, never a traceback.

    Interrupted by a signal, it ends with the status that shells give such a process, 130 or 143.
    """
    from immunity_fast.runtime.compilation import keep_caches  # not at the top, where missing packages are asked for
    from immunity_fast.runtime.interrupts import raised, status_of
    from immunity_fast.runtime.memory import keep_freed

    show_on_any_terminal()
    try:
        keep_caches()  # before anything imports the compiler, which sets folders of its own
        keep_freed()
        with raised():
            main()
    except KeyboardInterrupt as interrupt:
        sys.exit(status_of(interrupt))
    except (InputError, OSError) as error:
        message = f"error: {' '.join(str(error).split())}"
        if not left_to_torchrun(message):
            print(message, file=sys.stderr)
        sys.exit(1)
    sys.exit(0)


class InputError(Exception):
    """Something the user gave is wrong; its text is one clear line."""


@contextmanager
def input_errors() -> Iterator[None]:
    """What a `with` block refuses of what the user gave, or misses of what is installed, is an `InputError`."""
    try:
        yield
    except (ValueError, ModuleNotFoundError) as error:
        raise InputError(str(error)) from error


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Running out of memory in a `with` block or a decorated function, on any device, is one line: what to "try"."""
    from immunity_fast.runtime.failures import out_of_memory  # not at the top, as above

    try:
        yield
    except Exception as error:
        tried = out_of_memory(error)
        if tried is None or isinstance(error, InputError):
            raise
        raise InputError(f"{tried}: try {advice}") from error


def resumable(module: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Of a command's main, whose work is kept piece by piece: an interrupt is told with the command that goes on."""
    from immunity_fast.runtime.commands import shell_command  # not at the top, as above
    from immunity_fast.runtime.interrupts import explained

    def wrap(main: Callable[P, None]) -> Callable[P, None]:
        @wraps(main)
        def wrapped(*given: P.args, **keywords: P.kwargs) -> None:
            arguments: Any = given[0] if given else keywords.get("arguments")
            words = sys.argv[1:] if arguments is None else arguments
            again = shell_command(module, (word for word in words if word != "--again"))  # that forgets what is done
            with explained(lambda: f"interrupted; go on with: {again}", console.print):
                main(*given, **keywords)

        return wrapped

    return wrap


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA where there is any.

    Of several processes on one machine, each gets a GPU of its own for "auto" and "cuda".

    Raises:
        ValueError: it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and os.environ.get("LOCAL_RANK"):  # torchrun's
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has no numbers to give back
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {name}: cannot be used here ({reason})") from error
    return device


def interactive() -> bool:
    """Whether somebody may see a bar move: not where what rich is told to take for a terminal is a pipe or a file."""
    return console.is_terminal and console.file.isatty()


@contextmanager
def status_lines(status: Callable[[], str], enabled: bool = True) -> Iterator[None]:
    """Where nobody sees a progress bar, a line now and then: an epoch or an attack may take an hour."""
    if interactive() or in_notebook() or not enabled:
        yield
        return
    over = threading.Event()

    def log() -> None:
        while not over.wait(STATUS_SECONDS):
            console.print(status())  # which flushes

    logger = threading.Thread(target=log, daemon=True)
    logger.start()
    try:
        yield
    finally:
        over.set()
        logger.join()


def progress_bar(enabled: bool = True) -> Progress:
    """A progress bar that disappears when done; in a log that is no terminal nothing is drawn, in a notebook a line."""
    if enabled and in_notebook():
        return NotebookProgress(console)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        transient=True,
        disable=not (enabled and interactive()),
    )
