"""Settings in a file: YAML or JSON, flat, under the names that config.json has; and what each may be written as.

YAML is read as its version 1.2 has it: `off` and `on` are words, `1e-3` is a number. Nothing in a file is ever run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from immunity_fast.runtime import cli
from immunity_fast.runtime.files import abbreviated, parse_json

# YAML 1.2.2, chapter 10.3: the core schema.
NULL = re.compile(r"^(?:null|Null|NULL|~|)$")
TRUTH = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
WHOLE = re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


def read_mapping(path: Path) -> dict[str, Any]:
    """What a file of settings says, by name; `.json` is JSON, everything else YAML. A run's folder is its config.json.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        ValueError: it is no mapping of names, or names one twice.
        ModuleNotFoundError: it is YAML, and PyYAML is not installed.
    """
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of settings")
    content = path.read_bytes()
    try:
        found = parse_json(content) if path.suffix.lower() == ".json" else parse_yaml(content)
    except ValueError as error:
        raise ValueError(f"{path}: expected settings by name, got what cannot be read ({error})") from error
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{path}: expected settings, name: value, got {abbreviated(found)}")
    named = {name.replace("-", "_"): value for name, value in found.items()}
    if len(named) != len(found):
        twice = next(name for name in found if "-" in name and name.replace("-", "_") in found)
        raise ValueError(f"{path}: {twice}: expected each setting once, got it with - and with _")
    return named


def parse_yaml(content: bytes | str) -> Any:
    """What a text of YAML 1.2 says; no tag of it makes anything but the usual kinds of values.

    Raises:
        ValueError: it is no YAML, or a mapping has a name twice.
        ModuleNotFoundError: PyYAML is not installed.
    """
    yaml = _yaml()
    try:
        return yaml.load(content, Loader=_loader())  # which is a SafeLoader
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise ValueError(f"YAML: {' '.join(str(error).split())}") from error


def to_yaml(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Settings as YAML that versions 1.1 and 1.2 read alike, under a comment a group.

    Args:
        groups: by heading, settings by name: numbers, texts, truth values, None, lists of these.

    Raises:
        ModuleNotFoundError: PyYAML is not installed.
    """
    yaml = _yaml()
    dump = functools.partial(yaml.safe_dump, allow_unicode=True, width=1 << 30)

    def line(name: str, value: Any) -> str:
        several = isinstance(value, (list, tuple))
        written: str = dump(list(value), default_flow_style=True) if several else dump({name: value})
        return f"{name}: {written}" if several else written

    parts = [
        f"# {heading}\n" + "".join(line(name, value) for name, value in settings.items())
        for heading, settings in groups.items()
    ]
    return "\n".join(parts)


def suggestion(name: str, known: Sequence[str]) -> str:
    """What is nearest to an unknown name, as the end of a message."""
    within = [other for other in known if name in other.split("_")]
    around = [other for other in known if other in name.split("_")]
    found = within or get_close_matches(name, known, n=1, cutoff=0.6) or around
    return f"; did you mean {found[0]}?" if found else "; --help lists them"


def converted(value: Any, kinds: Sequence[type], choices: Sequence[str] = ()) -> Any:
    """A value of a file as a setting of these kinds, where it is one in another spelling; else as it is.

    `8/255` for a number, a whole number as `1e2`, a list for what takes several with commas between, and `true` and
    `false` where YAML 1.1 would have read `on` and `off` as such.

    Args:
        value: as it was read.
        kinds: what the setting may be.
        choices: the words that it may be, where they are listed.
    """
    if isinstance(value, bool):
        word = "on" if value else "off"
        return word if bool not in kinds and word in choices else value
    if isinstance(value, list) and str in kinds and tuple not in kinds:
        return ",".join(str(part) for part in value)
    if tuple in kinds and value is not None:
        return _numbers(value)
    if isinstance(value, (int, float)) and str in kinds and float not in kinds and int not in kinds:
        return str(value)
    if isinstance(value, str) and str not in kinds and bool not in kinds:
        value = _number(value)
    if isinstance(value, float) and float not in kinds and int in kinds and value.is_integer():
        return int(value)
    if type(value) is int and float in kinds and abs(value) < 2**63:
        return float(value)
    return value


def _numbers(value: Any) -> Any:
    """Several numbers, of a list, of one number or of a text with commas between."""
    if isinstance(value, (int, float)):
        return (value,)
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, (list, tuple)):
        return tuple(_number(part) if isinstance(part, str) else part for part in parts)
    return value


def _number(text: str) -> Any:
    """What a text says as a number, whole where it is written so; the text itself where it says none."""
    try:
        return int(text) if WHOLE.match(text) else cli.number(text)
    except ValueError:
        return text


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "settings in YAML need PyYAML: pip install pyyaml; a file of JSON, such as a run's config.json, does not",
            name="yaml",
        ) from missing
    return yaml


@functools.cache
def _loader() -> Any:
    """PyYAML's SafeLoader with the rules of YAML 1.2, which refuses a name that comes twice."""
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  PyYAML's own attribute

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"{twice} stands there twice", node.start_mark)
            made: dict[Any, Any] = super().construct_mapping(node, deep)
            return made

    def whole(loader: Any, node: Any) -> int:
        return int(str(loader.construct_scalar(node)), 0 if str(node.value).startswith(("0o", "0x")) else 10)

    Loader.add_constructor("tag:yaml.org,2002:int", whole)
    for tag, pattern, first in (
        ("null", NULL, [*"nN~", ""]),
        ("bool", TRUTH, [*"tTfF"]),
        ("int", WHOLE, [*"-+0123456789"]),
        ("float", FLOAT, [*"-+.0123456789"]),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", pattern, first)
    Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"])
    return Loader
