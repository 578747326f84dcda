"""`immunity-fast COMMAND`, and the same as `python -m immunity_fast COMMAND`: one door to all commands.

Nothing that takes seconds is imported before it is known which command is meant.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import immunity_fast
from immunity_fast.runtime import completion, interrupts, recorded
from immunity_fast.runtime.commands import COMMANDS, CONSOLE, called_as

LINES = {name: command.line for name, command in COMMANDS.items()} | {completion.COMMAND: completion.LINE}


def usage(called: str) -> str:
    """What --help says: the commands, with a line each."""
    width = max(map(len, LINES))
    return "\n".join(
        [
            f"usage: {called} [--help] [--version] COMMAND ...",
            "",
            (immunity_fast.__doc__ or "").split("\n")[0],
            "",
            "commands:",
            *(f"  {name:<{width}}  {line}" for name, line in LINES.items()),
            "",
            f"{called} COMMAND --help lists the options of each.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command that a command line names, and exit as it does.

    Args:
        arguments: None is what this process was given.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    called = called_from(sys.argv[0]) if arguments is None else CONSOLE
    with called_as(called), interrupts.ended_quietly():
        try:
            run(words, called)
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # where what is left goes when Python ends
            sys.exit(128 + 13)  # as shells count SIGPIPE


def run(words: list[str], called: str) -> NoReturn:
    """Run a command line, without the program's own name, and exit.

    Args:
        words: of the command line.
        called: what a shell calls this program.
    """
    command, *rest = words or ["--help"]
    if command == "help":  # as git has it
        command, rest = (rest[0], ["--help"]) if rest and rest[0] in LINES else ("--help", [])
    if command in ("--help", "-h"):
        ended(usage(called))
    if command in ("--version", "-V"):
        ended(f"immunity_fast {immunity_fast.__version__}")
    if command == completion.COMMAND:
        completion.main(rest, called)
        sys.exit(0)
    if command not in COMMANDS:
        refuse(command, called)
    recorded.answer(command, rest)
    module = importlib.import_module(f"immunity_fast.{COMMANDS[command].module}")
    if command == "info":  # which needs torch alone
        module.main(rest)
        sys.exit(0)
    run_command: Callable[[Callable[[], None]], NoReturn] = importlib.import_module(
        "immunity_fast.runtime.cli"
    ).run_command
    run_command(lambda: module.main(rest))


def ended(text: str) -> NoReturn:
    """Print what was asked for, and end."""
    sys.stdout.write(f"{text}\n")  # at once: print writes the end of the line for itself
    sys.exit(0)


def refuse(word: str, called: str) -> NoReturn:
    """End with a line on a command that there is not, which names the nearest one."""
    if word.startswith("-"):
        said = f"{word}: expected a command before its options"
    else:
        near = difflib.get_close_matches(word.lower(), LINES, n=1, cutoff=0.5)
        said = f"{word}: there is no such command" + (f"; did you mean {near[0]}?" if near else "")
    print(f"error: {said} ({called} --help lists the commands)", file=sys.stderr)
    sys.exit(2)


def called_from(program: str) -> str:
    """What a shell calls this program, from `sys.argv[0]`: of a command that it would not find by name, the path."""
    path = Path(program)
    if path.name == "__main__.py":
        return "python -m immunity_fast"
    found = shutil.which(path.name)
    if found is not None and path.exists() and os.path.samefile(found, path):
        return path.name
    return shlex.quote(program) if path.exists() else CONSOLE


if __name__ == "__main__":
    main()
