"""Every code block of the README and the documentation: Python runs, commands are read by their own argument parsers.

A comment in the line before a block, `<!-- parsed only: why -->`, is for what takes minutes, a data set or a GPU: its
Python is compiled, its commands are parsed, and nothing of it runs.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from immunity_fast.evaluation.gate_attackers import KNOWLEDGE
from immunity_fast.evaluation.runner import ATTACKS, SETS
from immunity_fast.runtime import completion
from immunity_fast.runtime.commands import COMMANDS
from tests import grids
from tests.docs.pages import PAGES, Block, blocks, name
from tests.places import REPOSITORY

ALL = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in ALL if block.language == "sh"]
PYTHON_PAGES = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
# Nothing to run: drawings, citations, directives of MyST.
OTHER = {"text", "bibtex", "{toctree}", "{eval-rst}", "{include}"}
PARSED_ONLY = re.compile(r"parsed only: \S")
# Programs that are not ours, of which we know that they are there and what they are given.
PYTEST_OPTIONS = {"--benchmark-only"}


def is_run(block: Block) -> bool:
    return not PARSED_ONLY.match(block.note)


@pytest.mark.parametrize("block", ALL, ids=str)
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.language in {"sh", "python", *OTHER}, "a block that no test looks at"
    assert not block.note or block.language in OTHER or PARSED_ONLY.match(block.note), block.note


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name)
def test_python_runs_in_the_order_of_the_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": f"snippets of {name(page)}"}
    for block in blocks(page):
        if block.language == "python":
            # With the lines of the page, which a traceback then names.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            if is_run(block):
                exec(code, namespace)


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name)
def test_python_is_no_wider_than_code(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)
            assert all(len(line) <= 120 for line in block.text.splitlines()), str(block)


class Parsed(BaseException):
    """A command line was read without an error."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command: lines joined, comments gone, variables put in."""
    variables = {"OUT": "out"}
    for line in re.sub(r"\\\n\s*", " ", block.text).replace("&&", "\n").splitlines():
        for variable, value in variables.items():
            line = re.sub(rf"\${variable}\b", lambda _, value=value: value, line)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and (assigned := re.fullmatch(r"(\w+)=(.*)", words[0])):
            variables[assigned[1]] = assigned[2]
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # the environment of one command
            words = words[1:]
        if words:
            yield words


def parse(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """AssertionError unless the command `python -m module arguments` takes these arguments."""
    read = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: object, **keywords: object) -> None:
        raise Parsed(read(self, *given, **keywords))  # type: ignore[call-overload]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed) as parsed:
        runpy.run_module(module, run_name="__main__")
    # Where a list is not read by the parser itself.
    for option, known in (("attacks", (*ATTACKS, *SETS)), ("attackers", (*KNOWLEDGE, "experts", "transfer"))):
        if given := getattr(parsed.value.options, option, None):
            words = given.split(",") if isinstance(given, str) else given
            assert set(words) <= set(known), f"--{option} {given}"


def extras() -> set[str]:
    found: dict[str, dict[str, list[str]]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=found.update))
        runpy.run_path(str(REPOSITORY / "setup.py"))
    return set(found["extras_require"])


def _without_torchrun_s(words: list[str]) -> list[str]:
    """What torchrun is to run, behind its own options, which its own parser has to know."""
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(words)
    return [*(["-m"] if given.module else []), given.training_script, *given.training_script_args]


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """That a command is there, and takes what it is given."""
    program, *rest = words[: words.index(">")] if ">" in words else words
    if program == "immunity-fast":
        command, *rest = rest
        if command == completion.COMMAND:
            assert set(rest) <= set(completion.SHELLS), words
            return
        if command.startswith("-"):
            assert command in ("--help", "--version"), words
            return
        program, rest = "python", ["-m", f"immunity_fast.{COMMANDS[command].module}", *rest]
    if program == "torchrun":
        program, rest = "python", _without_torchrun_s(rest)
    if program == "sbatch":
        script = next(index for index, word in enumerate(rest) if word.endswith(".sh"))
        assert (REPOSITORY / rest[script]).is_file(), words
        program, rest = "python", ["-m", "immunity_fast.train", *rest[script + 1 :]]
    if program in ("python", "python3") and rest[:3] == ["-m", "pip", "install"]:
        program, rest = "pip", rest[2:]
    if program == "pip":
        assert rest[0] == "install", words
        if extra := re.search(r"\.\[([\w,]+)\]", " ".join(rest)):
            assert set(extra[1].split(",")) <= extras(), words
    elif program in ("python", "python3") and rest[0] == "-m" and rest[1] != "pytest":
        pytest.importorskip("rich", reason="the commands need the extra train")
        parse(rest[1], rest[2:], monkeypatch)
    elif program in ("python", "python3"):
        assert rest[0].startswith("path/to/") or (REPOSITORY / rest[0]).is_file(), words
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(rest) <= set(targets), words
    elif program == "pytest":
        for word in rest:
            assert word in PYTEST_OPTIONS or (REPOSITORY / word).exists(), words
    elif program == "pre-commit":
        assert rest == ["install"], words
        assert (REPOSITORY / ".pre-commit-config.yaml").is_file()
    else:
        raise AssertionError(f"no test knows what {program} takes")


@pytest.mark.parametrize("block", SHELL, ids=str)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_command_takes_the_options_it_is_given(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = list(commands(block))
    assert found, "a block of no command"
    for words in found:
        with monkeypatch.context() as patch:
            check(words, patch)


# `info` is called on two pages.
@pytest.mark.parametrize(
    "block",
    grids.sampled([block for block in SHELL if is_run(block)], ordinary=lambda block: "networks" not in str(block)),
    ids=str,
)
def test_commands_that_take_no_time_run(block: Block, tmp_path: Path) -> None:
    for words in commands(block):
        assert words[0] in ("python", "immunity-fast"), f"only Python is run here: {words}"
        given = words[1:] if words[0] == "python" else ["-m", "immunity_fast", *words[1:]]
        subprocess.run(
            [sys.executable, *given],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            check=True,
            capture_output=True,
        )


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_an_option_that_is_gone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="the commands need the extra train")
    with pytest.raises(SystemExit):
        parse("immunity_fast.train", ["--no-such-option", "1"], monkeypatch)
    with pytest.raises(AssertionError, match="no test knows"):
        check(["rm", "-r", "runs"], monkeypatch)


def test_commands_are_split_as_a_shell_does() -> None:
    text = 'run="python -m a \\\n    --b 1"\n$run --c 2   # of three\nX=1 python -m d "$OUT" &&\npython -m e\n'
    found = list(commands(Block(REPOSITORY / "README.md", 1, "sh", text, "")))
    assert found == [
        ["python", "-m", "a", "--b", "1", "--c", "2"],
        ["python", "-m", "d", "out"],
        ["python", "-m", "e"],
    ]
