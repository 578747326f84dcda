"""What prose calls `module.name` is there: in docstrings, comments and Markdown, where the first word is a module's."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType

import pytest

from tests.docs.pages import PAGES, name
from tests.places import REPOSITORY

FOLDERS = ("immunity_fast", "kernels", "benchmarks", "tests", "examples")
SOURCES = sorted(file for folder in FOLDERS for file in (REPOSITORY / folder).rglob("*.py") if file.is_file())
REFERENCE = re.compile(r"(?<!`)`([a-z_]+(?:\.\w+)+)(?:\([^`]*\))?`(?!`)")
ENDINGS = {
    "csv",
    "html",
    "jinja",
    "json",
    "jsonl",
    "log",
    "md",
    "npz",
    "png",
    "py",
    "pt",
    "safetensors",
    "svg",
    "txt",
    "zip",
}
NOT_DOCUMENTED = {"forward", "extra_repr"}  # docs/conf.py leaves them out
OTHERS = {"autograd", "images", "output"}  # torch.autograd, what a network takes, and what it puts out


@cache
def _modules() -> dict[str, list[Path]]:
    """The files of the package's modules, by the last word of their names."""
    found: dict[str, list[Path]] = {"immunity_fast": [REPOSITORY / "immunity_fast" / "__init__.py"]}
    for folder in ("immunity_fast", "kernels"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            word = file.parent.name if file.name == "__init__.py" else file.stem
            found.setdefault(word, []).append(file)
    return found


@cache
def _names(file: Path) -> frozenset[str]:
    """What a module defines, assigns and imports, at its top and inside; of a folder its files, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    if file.name == "__init__.py":
        found.update(path.stem for path in file.parent.iterdir())
    return frozenset(found)


def _is_there(words: list[str], file: Path) -> bool:
    """Whether the words after a module's name lead to something of it."""
    if words[0] not in _names(file):
        return False
    below = [file.parent / f"{words[0]}.py", file.parent / words[0] / "__init__.py"]
    inside = [path for path in below if file.name == "__init__.py" and path.is_file()]
    return not inside or len(words) == 1 or any(_is_there(words[1:], path) for path in inside)


def _references(text: str) -> Iterator[str]:
    for match in REFERENCE.finditer(text):
        words = match[1].split(".")
        if words[0] in _modules().keys() - OTHERS and words[-1] not in ENDINGS:
            yield match[1]


@pytest.mark.parametrize("file", [*SOURCES, *PAGES], ids=name)
def test_what_is_referred_to_is_there(file: Path) -> None:
    missing = []
    for reference in _references(file.read_text(encoding="utf-8")):
        first, *rest = reference.split(".")
        if not any(_is_there(rest, module) for module in _modules()[first]):
            missing.append(reference)
    assert missing == []


def _foreign_docstrings() -> Iterator[str]:
    """Methods whose documentation would be that of a class of another package, whose references lead nowhere here."""
    for cls in _classes():
        foreign = [base for base in cls.__mro__ if base.__module__.split(".")[0] != "immunity_fast"]
        for word, method in vars(cls).items():
            own = getattr(method, "__func__", method)
            shown = isinstance(own, FunctionType) and word[0] != "_" and word not in NOT_DOCUMENTED
            if shown and own.__doc__ is None and any(getattr(vars(base).get(word), "__doc__", "") for base in foreign):
                yield f"{cls.__module__}.{cls.__name__}.{word}"


def _classes() -> Iterator[type]:
    """Those that the reference shows."""
    for page in (REPOSITORY / "docs" / "api").glob("*.md"):
        for module_name in re.findall(r"automodule:: (immunity_fast[\w.]*)", page.read_text(encoding="utf-8")):
            module = importlib.import_module(module_name)
            for value in vars(module).values():
                if isinstance(value, type) and value.__module__ == module_name and value.__name__[0] != "_":
                    yield value


def test_no_docstring_is_inherited_from_another_package() -> None:
    assert list(_foreign_docstrings()) == []
