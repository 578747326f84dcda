"""The tests' own house rules: short names, short files, and helpers that are no tests."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.places import REPOSITORY

FILES = sorted((REPOSITORY / "tests").rglob("*.py"))
TESTS = [file for file in FILES if file.name.startswith("test_")]
MOST_LETTERS = 60
MOST_LINES = 1000


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _tests(file: Path) -> list[str]:
    return [node.name for node in _tree(file).body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"]


def _imported(file: Path) -> Iterator[str]:
    """Each part of the name of each module that a file imports, anywhere in it, and each name taken from one."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "tests.test_" in node.value:
            names = ["tests.test_"]  # in code for another process
        else:
            continue
        for name in names:
            yield from name.split(".")


def test_names_of_tests_are_short() -> None:
    assert [(file, name) for file in TESTS for name in _tests(file) if len(name) > MOST_LETTERS] == []


def test_a_module_has_no_two_tests_of_one_name() -> None:
    assert [(file, name) for file in TESTS for name, count in Counter(_tests(file)).items() if count > 1] == []


def test_files_of_tests_are_short() -> None:
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in TESTS}
    assert {file: count for file, count in lines.items() if count > MOST_LINES} == {}


def test_no_module_of_tests_is_imported() -> None:
    others = [file for file in FILES if file != Path(__file__)]  # which names what it looks for
    assert [(file, name) for file in others for name in _imported(file) if name.startswith("test_")] == []
