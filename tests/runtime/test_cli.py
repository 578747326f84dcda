"""What the commands share: exits, one-line errors, devices, output on any terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from immunity_fast import ensemble, evaluate, reproduce, train
from immunity_fast.experts.genotypes import reduced
from immunity_fast.runtime import cli
from tests.places import REPOSITORY
from tests.small_runs import error_line, options, trained, write_data


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
    file = str(REPOSITORY / "immunity_fast" / "runtime" / "cli.py")
    program = (
        f"import sys, types; sys.modules['torch'] = types.ModuleType('torch'); sys.modules[{missing!r}] = None\n"
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('cli', {file!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert missing in ended.stderr
    assert "pip install" in ended.stderr
    assert "immunity-fast[" not in ended.stderr, "no index has it"


# Paths


@pytest.mark.parametrize("given", ["~/x", "~"])
def test_a_path_may_begin_at_home(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.path(given) == tmp_path / given.removeprefix("~").removeprefix("/")


def test_every_option_of_a_path_may_begin_at_home(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path / "data.npz")
    for seed in "12":
        arguments = [*options(data, experts=1, epochs=1, seed=seed), "--data", "~/data.npz", "--out", f"~/runs/{seed}"]
        trained(arguments)
    assert (tmp_path / "runs" / "1" / "config.json").is_file()
    train.main(["--resume", "~/runs/1"])
    ensemble.main(["~/runs/1", "~/runs/2", "--out", "~/joined"])
    arguments = ["--attacks", "fgsm", "--limit", "2", "--masking-images", "0", "--out", "~/found"]
    evaluate.main(["~/joined", "--transfer-from", "~/runs/1", *arguments])
    assert (tmp_path / "found" / "report.html").is_file()
    (tmp_path / "cell.json").write_text(reduced("pdarts", 5, 2), encoding="utf-8")
    assert train.parse(["--arch", "~/cell.json"])[2].arch == reduced("pdarts", 5, 2)
    assert reproduce.parse(["table1", "--out", "~/tables"]).folder == tmp_path / "tables"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    "main", [train.main, evaluate.main, ensemble.main, reproduce.main], ids=lambda main: main.__module__
)
@pytest.mark.parametrize("name", [os.fsdecode(b"r\xff"), "~nobody-of-that-name/x"], ids=ascii)
def test_what_can_be_no_folder_is_refused_at_once(
    name: str, main: Callable[[list[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what = {train.main: [], evaluate.main: ["run"], ensemble.main: ["a", "b"], reproduce.main: ["table1"]}[main]
    assert "--out" in error_line(capsys, main, [*what, "--out", name], code=2)
    if main is not reproduce.main:
        option = ["--resume"] if main is train.main else []
        error_line(capsys, main, [*option, name, *what[1:], *(["--out", "x"] if main is ensemble.main else [])], code=2)


@pytest.mark.exhaustive  # a whole run; of `make test`, data sets and reports by themselves
@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere take UTF-8 alone")
@pytest.mark.parametrize("encoding", [pytest.param("utf-8", marks=pytest.mark.exhaustive), "ascii"])
def test_names_that_are_no_text_are_trained_on_and_reported(encoding: str, tmp_path: Path) -> None:
    """Class folders, their files, and the folder of all."""
    root = os.fsdecode(os.fsencode(tmp_path) + b"/da\xffta")
    for index, name in enumerate((b"d\xffg", "żółw".encode(), b"<$x^$>")):
        folder = Path(root, os.fsdecode(name))
        folder.mkdir(parents=True)
        for number in range(8):
            Image.fromarray(np.full((12, 12, 3), 80 * index + number, np.uint8)).save(folder / f"{number}.png")
    settings = ["--dataset", "folder", "--data", root, "--experts", "2", "--epochs", "1", "--batch-size", "8"]
    command = [*settings, "--check-images", "2", "--attack-images", "2", "--device", "cpu", "--out", "run"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    program = "import sys; from tests.processes import trained_and_evaluated; trained_and_evaluated(sys.argv[1:])"
    ended = subprocess.run(
        [sys.executable, "-c", program, *command], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(b"report: run/report.html") == 2, "of training, and of the command evaluate"
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "da\\xffta" in report
    assert json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["data"] == root
    assert (tmp_path / "run" / "figures" / "heatmaps.png").is_file()


def test_a_pipe_is_no_terminal_whatever_rich_is_told() -> None:
    """In a log of FORCE_COLOR a bar that nobody sees must not take the place of a line now and then."""
    code = "from immunity_fast.runtime import cli; print(cli.console.is_terminal, cli.interactive())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "FORCE_COLOR": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout == "True False\n"
