"""Commands are thin: they read arguments, and make one call of what does the work."""

from __future__ import annotations

import ast

import pytest

from tests.places import REPOSITORY

MOST_LINES = 60


# `info` is not here: it needs torch alone, and is all that there is of what it does.
@pytest.mark.parametrize("command", ["train", "evaluate", "explain", "export_model", "ensemble", "reproduce", "poison"])
def test_a_command_holds_arguments_and_a_call(command: str) -> None:
    file = REPOSITORY / "immunity_fast" / f"{command}.py"
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert {function.name for function in functions} <= {"parse", "main"}
    for function in functions:
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= MOST_LINES, f"{function.name} has {lines} lines"
