"""Errors have one grammar: the name of what is wrong, what was expected, what was given."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.places import REPOSITORY

NAMED = re.compile(r"[^:\n]{1,100}: ")
# The value before what was expected of it; or a demand, which says neither.
TURNED = re.compile(r"\b(had|has|was|got) [^;:]*, expected\b|\bmust (be|have|hold)\b")
# What another function catches, and puts the name before.
PARTS = {
    "it is no zip archive",
    "it has {}_… and {}_…, and one is enough",
    "its values are not of 16 bits, but from {} to {}",
    "its floating-point values are not in [0, 1], but from {} to {}",
    "expected an object, got {}",
    "expected a genotype, got JSON that is nested too deeply",
    "expected an object of settings, got {}",
    "nested too deeply",
    "--{}",
}


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return _text(node.left) + _text(node.right) if isinstance(node, ast.BinOp) else ""


def _messages() -> Iterator[tuple[str, str]]:
    """(file:line, text) of each ValueError and TypeError of the package; what is filled in is {}."""
    for folder in ("immunity_fast", "kernels"):
        for file in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                    name = getattr(node.exc.func, "id", "")
                    text = _text(node.exc.args[0])
                    if name in ("ValueError", "TypeError") and text and text not in PARTS:
                        yield f"{file.relative_to(REPOSITORY)}:{node.lineno}", text


def test_an_error_begins_with_the_name_of_what_is_wrong() -> None:
    assert [(place, text) for place, text in _messages() if not NAMED.match(text)] == []


def test_what_was_expected_comes_before_what_was_given() -> None:
    assert [(place, text) for place, text in _messages() if TURNED.search(text)] == []
