"""--help and wrong options: answered from what is written down, at once, and as the command itself would."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from immunity_fast.runtime import recorded
from immunity_fast.runtime.commands import COMMANDS
from tests import command_options
from tests.places import REPOSITORY

# Of each command some lines that argparse refuses, and some that it does not.
LINES = {
    "train": ["--no-such-option", "--preset slow", "--epochs x", "--lr 1/0", "--out a --resume b", "--epo", "--seed 1"],
    "evaluate": ["", "run --dataset mnist", "run --workers", "run --workers x", "run other", "run --steps 1.5", "run"],
    "explain": ["run", "run --class", "run image --checkpoint first", "run a b --cl c"],
    "export": ["run", "run path --format pt", "run path more", "run path --dtype float16"],
    "ensemble": ["a b", "--out c", "a b --out c"],
    "reproduce": ["", "table4", "all --scale huge", "all --seeds x", "all --no-shard --shard"],
    "poison": ["", "craft", "brew run --out x", "craft run --out x --steps x", "craft run --out x", "setups --out x"],
    "info": ["--jsn x", "x", "--json --archs", "--archs resnet"],
}


def said(parser: argparse.ArgumentParser, line: str, capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """(what a parser ends with, or None; what it prints)."""
    ended = None
    try:
        parser.parse_args(line.split())
    except SystemExit as exit:
        ended = exit.code
    return ended, "".join(capsys.readouterr())


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_written_down_reads_as_the_command_itself(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, written = command_options.parser_of(COMMANDS[name].module), recorded.parser_of(name)
    for width in ("120", "60"):
        monkeypatch.setenv("COLUMNS", width)
        assert written.format_help() == own.format_help()
    results = {line: said(own, line, capsys) for line in LINES[name]}
    assert {line: said(written, line, capsys) for line in LINES[name]} == results
    assert {ended for ended, _ in results.values()} == {2, None}


def test_no_command_imports_anything_slow_for_its_help(tmp_path: Path) -> None:
    program = (
        "import runpy, sys\n"
        f"for module in {[command.module for command in COMMANDS.values()]!r}:\n"
        "    for words in ['--help'], ['--no-such-option']:\n"
        "        sys.argv = [module, *words]\n"
        "        try: runpy.run_module(f'immunity_fast.{module}', run_name='__main__')\n"
        "        except SystemExit as ended: print('ended', ended.code, file=sys.stderr)\n"
        "print(sorted({'torch', 'numpy', 'rich', 'matplotlib', 'triton'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("usage: python -m immunity_fast.") == len(COMMANDS)
    ends = [line for line in done.stderr.splitlines() if line.startswith("ended")]
    assert ends == ["ended 0", "ended 2"] * len(COMMANDS)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_right_command_line_is_left_to_the_command() -> None:
    recorded.answer("train", ["--epochs", "3", "--out", "runs/a"])
    recorded.answer("evaluate", ["runs/a", "--attacks", "all"])


def test_help_is_shown_where_a_terminal_lacks_a_sign(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    line = [sys.executable, "-m", "immunity_fast.train", "--help"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "map exceeds 8?8" in " ".join(done.stdout.split())
