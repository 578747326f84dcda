"""The options of all commands as they are written down: what answers --help and a wrong option at once.

options.json has an option a line; a test compares it with what the commands themselves take. A parser made of it needs
the standard library alone, where the commands' own need what they run, PyTorch first of all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from immunity_fast.runtime.commands import COMMANDS, program
from immunity_fast.runtime.parser import KINDS, Parser, show_on_any_terminal

FILE = "options.json"
Described = dict[str, Any]  # of a command: its "description" and "epilog", and its "options", a JSON object each


def answer(name: str, words: Sequence[str] | None = None) -> None:
    """Print --help and exit, or exit with the line that refuses an option; return where there is more to do.

    Args:
        name: of `COMMANDS`.
        words: of the command line; None is this process's.
    """
    show_on_any_terminal()
    parser_of(name).parse_args(words)


def parser_of(name: str) -> Parser:
    """A command's parser, of what is written down; what it reads of a command line is for nothing but its errors."""
    described = read()[name]
    parser = Parser(
        prog=program(COMMANDS[name].module), description=described["description"], epilog=described["epilog"]
    )
    places: dict[str | None, Any] = {None: parser}
    either = None
    for option in described["options"]:
        if option.get("either"):  # these stand one after another
            either = either or parser.add_mutually_exclusive_group()
            add(either, option)
            continue
        title = option.get("group")
        if title not in places:
            places[title] = parser.add_argument_group(title)
        add(places[title], option)
    return parser


def add(place: Any, option: Mapping[str, Any]) -> argparse.Action:
    """Add an option, or an argument, to a parser or a group of one."""
    flags, dest = option["flags"], option["dest"]
    keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": option["help"].replace("%", "%%")}
    keywords |= {key: option[key] for key in ("choices", "metavar", "required") if key in option}
    if "kind" in option:
        keywords["type"] = KINDS[option["kind"]]
    if option["nargs"] == 0:
        switch = f"--no-{dest.replace('_', '-')}" in flags
        keywords["action"] = argparse.BooleanOptionalAction if switch else "store_true"
        flags = flags[:1] if switch else flags
    elif option["nargs"] is not None:
        keywords["nargs"] = option["nargs"]
    added: argparse.Action = (
        place.add_argument(*flags, dest=dest, **keywords) if flags else place.add_argument(dest, **keywords)
    )
    return added


def read() -> dict[str, Described]:
    """What options.json says of each command."""
    text = resources.files("immunity_fast.runtime").joinpath(FILE).read_text(encoding="utf-8")
    found: dict[str, Described] = json.loads(text)
    return found


def describe(parser: argparse.ArgumentParser, words: Mapping[str, Sequence[str]]) -> Described:
    """What has to be known of a command without its own parser.

    Args:
        parser: the command's own.
        words: by `dest`, what completion may propose where a parser takes more than it could list.
    """
    either = {id(action) for group in parser._mutually_exclusive_groups for action in group._group_actions}
    titles = {
        id(action): group.title
        for group in parser._action_groups
        for action in group._group_actions
        if group not in (parser._positionals, parser._optionals)
    }
    kinds: dict[Any, str] = {function: kind for kind, function in KINDS.items()}
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        help = parser._get_formatter()._expand_help(action) if action.help else ""
        about = {"dest": action.dest, "flags": list(action.option_strings), "nargs": action.nargs, "help": help}
        more: dict[str, Any] = {
            "choices": [str(choice) for choice in action.choices or ()],
            "words": list(words.get(action.dest, ())) if not action.choices else [],
            "metavar": action.metavar,
            "kind": kinds.get(action.type),
            "required": bool(action.option_strings) and action.required,
            "either": id(action) in either,
            "group": titles.get(id(action)),
        }
        found.append(about | {key: value for key, value in more.items() if value})
    return {"description": parser.description, "epilog": parser.epilog, "options": found}


def to_text(commands: Mapping[str, Described]) -> str:
    """The text of options.json, an option a line: versions of it can be compared, and merged."""
    parts = []
    for name, described in commands.items():
        lines = [f"  {_json(key)}: {_json(described[key])}" for key in ("description", "epilog")]
        options = ",\n".join(f"   {_json(option)}" for option in described["options"])
        lines.append(f'  "options": [\n{options}\n  ]')
        parts.append(f"{_json(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def write(commands: Mapping[str, Described]) -> Path:
    """Write options.json anew, in a checkout; returns the file."""
    file = Path(__file__).with_name(FILE)
    file.write_text(to_text(commands), encoding="utf-8")
    return file


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
