"""What the commands share: exits, one-line errors, devices, output on any terminal."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from immunity_fast import cli, evaluate, train
from tests.small_runs import error_line

ROOT = Path(__file__).parents[1]


def _raising(error: BaseException) -> Callable[[list[str]], None]:
    def main(_: list[str]) -> None:
        raise error

    return main


def test_success_is_exit_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run_command(lambda: print("done"))
    assert ended.value.code == 0
    assert capsys.readouterr() == ("done\n", "")


def test_an_error_of_the_user_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_line(capsys, _raising(cli.InputError("two\n  lines")), []) == "error: two lines\n"


def test_an_error_of_the_system_is_one_line_with_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
    message = error_line(capsys, _raising(error), [])
    assert os.strerror(errno.ENOSPC) in message
    assert "some/file" in message


def test_a_defect_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="defect"):
        cli.run_command(lambda: _raising(RuntimeError("defect"))([]))


def test_an_interrupt_is_exit_130_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run_command(lambda: _raising(KeyboardInterrupt())([]))
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_a_parser_s_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.Parser()
    parser.add_argument("--count", type=int)
    message = error_line(capsys, lambda a: parser.parse_args(a) and None, ["--count", "many"], code=2)
    assert "--count" in message
    assert "many" in message


@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train", "evaluate"])
def test_help_goes_to_stdout(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run_command(lambda: main(["--help"]))
    assert ended.value.code == 0
    output, error = capsys.readouterr()
    assert output.startswith("usage: python -m immunity_fast.")
    assert error == ""


def test_text_that_a_terminal_cannot_show_does_not_end_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        cli.run_command(lambda: print("5 × resnet8"))
    assert ended.value.code == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"5 ? resnet8" + os.linesep.encode()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["runs/[b]", "runs/[/b]", "[link=x]", ":smile:"])
def test_a_folder_s_name_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.console.print(f"report: {name}")
    assert capsys.readouterr().out == f"report: {name}\n"


def test_the_automatic_device_is_cuda_where_there_is_any() -> None:
    assert cli.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_device_is_taken_by_its_name() -> None:
    assert cli.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["nonsense", "", "cuda:x", "cuda:99", "meta"])
def test_a_device_that_cannot_be_used_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^--device {name}: cannot be used here"):
        cli.pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="--device cuda: cannot be used here"):
        cli.pick_device("cuda")


@pytest.mark.parametrize("missing", ["matplotlib", "safetensors", "rich", "jinja2"])
def test_a_missing_package_is_one_line(missing: str, tmp_path: Path) -> None:
    program = (
        f"import sys, types; sys.modules['torch'] = types.ModuleType('torch'); sys.modules[{missing!r}] = None\n"
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('cli', {str(ROOT / 'immunity_fast' / 'cli.py')!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert missing in ended.stderr
    assert "pip install" in ended.stderr
