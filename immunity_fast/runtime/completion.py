"""What a shell completes of the console command: its commands, their options, and what these take.

The options of all commands are written down in options.json, an option a line, so that nothing has to be imported for
them but the standard library; a test compares them with what the commands take.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from immunity_fast.runtime.commands import COMMANDS, CONSOLE
from immunity_fast.runtime.parser import Parser

SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")
OPTIONS = "options.json"
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
    for name, options in described().items():
        added = commands.add_parser(name, help=COMMANDS[name].line, prog=f"{CONSOLE} {name}")
        for option in options:
            _add(added, option)
    own = commands.add_parser(COMMAND, help=LINE, prog=f"{CONSOLE} {COMMAND}")
    own.add_argument("shell", choices=SHELLS)
    return parser


def described() -> dict[str, list[dict[str, Any]]]:
    """The options of each command, as options.json has them."""
    text = resources.files("immunity_fast.runtime").joinpath(OPTIONS).read_text(encoding="utf-8")
    found: dict[str, list[dict[str, Any]]] = json.loads(text)
    return found


def describe(parser: argparse.ArgumentParser, words: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """What completion has to know of a command's options and arguments, of each a JSON object.

    Args:
        parser: the command's own.
        words: by `dest`, what may be proposed where a parser takes more than it could list.
    """
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        help = parser._get_formatter()._expand_help(action) if action.help else ""
        about = {"dest": action.dest, "flags": list(action.option_strings), "nargs": action.nargs, "help": help}
        choices = [str(choice) for choice in action.choices or words.get(action.dest, ())]
        found.append(about | ({"choices": choices} if choices else {}))
    return found


def to_text(options: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The text of options.json, an option a line: versions of it can be compared, and merged."""
    parts = []
    for name, described in options.items():
        lines = ",\n".join(f"  {json.dumps(option, ensure_ascii=False)}" for option in described)
        parts.append(f"{json.dumps(name)}: [\n{lines}\n ]")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def write(options: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Write options.json anew, in a checkout; returns the file."""
    file = Path(__file__).with_name(OPTIONS)
    file.write_text(to_text(options), encoding="utf-8")
    return file


def _add(parser: argparse.ArgumentParser, option: Mapping[str, Any]) -> None:
    keywords: dict[str, Any] = {"help": option["help"].replace("%", "%%")}
    if option.get("choices"):
        keywords["choices"] = option["choices"]
    if option["nargs"] == 0:
        keywords["action"] = "store_true"
    elif option["nargs"] is not None:
        keywords["nargs"] = option["nargs"]
    flags = option["flags"]
    action = parser.add_argument(*flags, dest=option["dest"], **keywords) if flags else None
    if action is None:
        action = parser.add_argument(option["dest"], **keywords)
    if (path := _path(option["dest"])) is not None:
        action.complete = path  # type: ignore[attr-defined]  # where shtab looks


def _path(dest: str) -> Any:
    """What shtab takes for a path; None of what is none."""
    import shtab  # not at the top, as above

    if dest in RUNS:
        return shtab.DIRECTORY | {"bash": "_immunity_fast_run_dirs", "preamble": {"bash": BASH_RUNS}}
    if dest in FOLDERS:
        return shtab.DIRECTORY
    return shtab.FILE if dest in FILES else None
