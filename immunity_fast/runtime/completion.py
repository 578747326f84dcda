"""What a shell completes of the console command: its commands, their options, and what these take.

Nothing has to be imported for that but the standard library, because the options of all commands are `recorded`.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from immunity_fast.runtime import recorded
from immunity_fast.runtime.commands import COMMANDS, CONSOLE
from immunity_fast.runtime.parser import Parser

SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")
COMMAND = "completion"
LINE = "print what a shell needs to complete all this"

# What options and arguments take that are paths, by their `dest`: run folders, other folders, files.
RUNS = {"run", "runs", "resume", "transfer_from"}
FOLDERS = {"out"}
FILES = {"data", "weights", "images", "path", "config"}
# A run folder holds config.json; on the way to one are folders of such.
BASH_RUNS = """
_immunity_fast_run_dirs() {
  local directory found=()
  while IFS= read -r directory; do
    if [[ -f "$directory/config.json" ]] || compgen -G "$directory/*/config.json" > /dev/null; then
      found+=("$directory")
    fi
  done < <(compgen -d -- "$1")
  if [[ ${#found[@]} -gt 0 ]]; then printf '%s\\n' "${found[@]}"; else compgen -d -- "$1"; fi
}
"""


def main(arguments: Sequence[str], called: str = CONSOLE) -> None:
    """Print the completion of a shell.

    Args:
        arguments: of the command line: the shell's name, or nothing, which is the user's shell.
        called: what a shell calls this program.
    """
    parser = Parser(
        prog=f"{called} {COMMAND}",
        description=f"{LINE[0].upper()}{LINE[1:]}, for a file that the shell reads when it begins.",
        epilog=f"for bash:\n  {CONSOLE} {COMMAND} bash > ~/.local/share/bash-completion/completions/{CONSOLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = os.path.basename(os.environ.get("SHELL", ""))
    default: dict[str, Any] = {"default": own, "nargs": "?"} if own in SHELLS else {}
    parser.add_argument(
        "shell",
        choices=SHELLS,
        metavar="SHELL",
        help=f"{', '.join(SHELLS)}; default: the one of the variable SHELL",
        **default,
    )
    shell = parser.parse_args(list(arguments)).shell
    try:
        found = script(shell)
    except ModuleNotFoundError:
        parser.exit(1, "error: completion needs shtab: pip install shtab\n")
    except NotImplementedError:
        parser.exit(1, f"error: completion for {shell} needs a newer shtab: pip install --upgrade shtab\n")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # which a file of a shell's is
    print(found)


def script(shell: str) -> str:
    """The text that a shell is to read.

    Args:
        shell: of `SHELLS`.

    Raises:
        ModuleNotFoundError: shtab is not installed.
        NotImplementedError: it is too old to know the shell.
    """
    import shtab  # not at the top: it is an extra

    return str(shtab.complete(described_parser(), shell))


def described_parser() -> argparse.ArgumentParser:
    """A parser that knows the commands and options by name, what they take, and what they are for; it reads nothing."""
    parser = argparse.ArgumentParser(prog=CONSOLE)
    parser.add_argument("--version", "-V", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, described in recorded.read().items():
        added = commands.add_parser(name, help=COMMANDS[name].line, prog=f"{CONSOLE} {name}")
        for option in described["options"]:
            action = recorded.add(added, option)
            action.choices = action.choices or option.get("words")
            if (path := _path(option["dest"])) is not None:
                action.complete = path  # type: ignore[attr-defined]  # where shtab looks
    own = commands.add_parser(COMMAND, help=LINE, prog=f"{CONSOLE} {COMMAND}")
    own.add_argument("shell", choices=SHELLS)
    return parser


def _path(dest: str) -> Any:
    """What shtab takes for a path; None of what is none."""
    import shtab  # not at the top, as above

    if dest in RUNS:
        return shtab.DIRECTORY | {"bash": "_immunity_fast_run_dirs", "preamble": {"bash": BASH_RUNS}}
    if dest in FOLDERS:
        return shtab.DIRECTORY
    return shtab.FILE if dest in FILES else None
