"""`immunity-fast`: one door to all commands, which opens at once, and completes what stands behind it."""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import immunity_fast
from immunity_fast import __main__ as console
from immunity_fast.data.datasets import NAMES as DATASETS
from immunity_fast.runtime import commands, completion, interrupts, recorded
from tests import command_options
from tests.places import REPOSITORY

ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def ended(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as exit_:
        console.main(arguments)
    return exit_.value.code


# Which command


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [], ["help"]], ids=str)
def test_help_lists_the_commands_with_a_line_each(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(arguments) == 0
    output, error = capsys.readouterr()
    assert error == ""
    assert output.startswith("usage: immunity-fast ")
    for name, line in console.LINES.items():
        assert f"\n  {name} " in output
        assert line in output
    assert all(len(line) <= 80 for line in output.splitlines())


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_its_version_is_the_package_s(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended([option]) == 0
    assert capsys.readouterr().out == f"immunity_fast {immunity_fast.__version__}\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("trian", "did you mean train?"),
        ("Evaluate", "did you mean evaluate?"),
        ("exports", "did you mean export?"),
        ("zzz", "there is no such command ("),
        ("--epochs", "expected a command before its options"),
    ],
)
def test_an_unknown_command_is_one_line(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended([given, "--epochs", "3"]) == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith(f"error: {given}: ")
    assert said in error
    assert error.endswith(" (immunity-fast --help lists the commands)\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", commands.COMMANDS)
@pytest.mark.parametrize("order", [lambda name: [name, "--help"], lambda name: ["help", name]], ids=["after", "before"])
def test_each_command_s_help_names_the_console(name: str, order: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(order(name)) == 0
    output, error = capsys.readouterr()
    assert output.startswith(f"usage: immunity-fast {name} ")
    assert "python -m" not in output.partition("options:")[0]
    assert error == ""


def test_every_command_file_has_its_console_command() -> None:
    files = [(file.stem, file.read_text(encoding="utf-8")) for file in (REPOSITORY / "immunity_fast").glob("*.py")]
    doors = {name for name, text in files if "Parser(" in text}
    assert {command.module for command in commands.COMMANDS.values()} == doors


# As the commands themselves end


@pytest.mark.parametrize(
    "line",
    [
        ["train", "--out", "a b"],
        ["evaluate", "a b"],
        ["explain", "a b", "c", "--class", "d e"],
        ["export", "a b", "c"],
        ["ensemble", "a b", "--out", "c d"],
        ["reproduce", "all", "--out", "a b"],
        ["poison", "craft", "a b", "--out", "c d"],
        ["info", "--archs", "a b"],
    ],
    ids=lambda line: line[0],
)
def test_a_command_gets_its_words_and_ends_well(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr(f"immunity_fast.{commands.COMMANDS[line[0]].module}.main", given.append)
    assert ended(line) == 0
    assert given == [line[1:]]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["train", "--epochs", "0"], 1, "error: --epochs: expected at least 1, got 0\n"),
        (["train", "--epochs", "many"], 2, "error: argument --epochs: invalid int value: 'many'"),
        (["evaluate", "nowhere"], 1, "error: nowhere: there is no run"),
        (["export", "nowhere", "x.onnx"], 1, "error: nowhere: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line_and_its_status(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (interrupts.Terminated(), 143)], ids=repr)
def test_an_interrupt_has_its_status(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise error

    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    monkeypatch.setattr("immunity_fast.train.main", interrupted)
    assert ended(["train"]) == code
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_a_signal_while_importing_is_a_word_and_its_status(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from immunity_fast.__main__ import main\n"
        "main(['train'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "interrupted\n")


def test_a_reader_that_has_enough_ends_it_without_a_word(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-u", "-m", "immunity_fast", "--help"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=nobody,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, b"")


# How it was called


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The file that an installer makes of the entry point."""
    file = tmp_path / "bin dir" / "immunity-fast"
    file.parent.mkdir()
    file.write_text("#!/bin/sh\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def test_a_command_on_the_path_is_called_by_its_name(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(script.parent))
    assert console.called_from(str(script)) == "immunity-fast"


def test_a_command_off_the_path_is_called_by_its_file(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert console.called_from(str(script)) == f"'{script}'"


def test_the_package_as_a_program_is_called_by_python() -> None:
    assert console.called_from(str(REPOSITORY / "immunity_fast" / "__main__.py")) == "python -m immunity_fast"


def test_what_goes_on_is_said_as_it_was_begun() -> None:
    assert commands.shell_command("train", ["--resume", "a b"]) == "python -m immunity_fast.train --resume 'a b'"
    with commands.called_as("immunity-fast"):
        assert commands.shell_command("train", ["--resume", "a b"]) == "immunity-fast train --resume 'a b'"
        assert commands.program("export_model") == "immunity-fast export"
    assert commands.program("info") == "python -m immunity_fast.info"


def test_an_interrupted_command_is_told_in_its_own_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("immunity_fast.evaluate.evaluate_named", interrupted)
    assert ended(["evaluate", "runs/my run"]) == 130
    assert capsys.readouterr().out == "interrupted; go on with: immunity-fast evaluate 'runs/my run'\n"


def test_setup_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "setuptools", SimpleNamespace(setup=found.update))
    runpy.run_path(str(REPOSITORY / "setup.py"))
    assert found["entry_points"] == {"console_scripts": [f"{commands.CONSOLE} = immunity_fast.__main__:main"]}


# It opens at once


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["completion", "bash"], ["trian"], ["train", "--help"], ["evaluate", "--no-such-option"]],
    ids=" ".join,
)
def test_nothing_slow_is_imported_for_a_list(arguments: list[str], tmp_path: Path) -> None:
    slow = ["torch", "numpy", "rich", "matplotlib", "jinja2", "triton"]
    program = (
        "import sys\n"
        "from immunity_fast.__main__ import main\n"
        f"try: main({arguments!r})\n"
        f"finally: print([name for name in {slow!r} if name in sys.modules], file=sys.stderr)\n"
    )
    if arguments[0] == "completion":
        pytest.importorskip("shtab", reason="it writes completions")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "[]"


def test_public_names_are_there_when_they_are_asked_for() -> None:
    assert set(immunity_fast.__all__) <= set(dir(immunity_fast))
    for name in immunity_fast.__all__:
        assert getattr(immunity_fast, name).__name__ == name
    assert immunity_fast.functional.heatmap_losses is not None, "a module, without an import of its own"
    assert not hasattr(immunity_fast, "no_such_name")


# Completion


def completed(shell_file: Path, words: list[str], folder: Path) -> list[str]:
    """What bash proposes for the last of the words of a command line."""
    program = (
        f"source '{shell_file}'\n"
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
        "function=$(complete -p immunity-fast | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n"
        '"$function"\n'
        "printf '%s\\n' \"${COMPREPLY[@]}\"\n"
    )
    done = subprocess.run(
        ["bash", "-c", program, "bash", "immunity-fast", *words], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return sorted(done.stdout.split("\n")[:-1])


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("shtab", reason="it writes completions")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    file = tmp_path_factory.mktemp("completion") / "immunity-fast"
    file.write_text(completion.script("bash"), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, one whose name has a space, and what is none."""
    folder = tmp_path_factory.mktemp("folder")
    for file in ("runs/digits/config.json", "runs/my run/config.json", "runs/notes/text", "photos/a.png", "data.npz"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        (["tr"], ["train"]),
        ([""], sorted(console.LINES)),
        (["train", "--dataset", ""], sorted(DATASETS)),
        (["train", "--dataset", "npz", "--pre"], ["--preset"]),
        (["train", "--arch", "robnet_l"], ["robnet_large", "robnet_large_v2"]),
        (["train", "--resume", ""], ["runs"]),
        (["train", "--resume", "runs/"], ["runs/digits", "runs/my run"]),
        (["train", "--data", "d"], ["data.npz"]),
        (["evaluate", "runs/d"], ["runs/digits"]),
        (["evaluate", "runs/digits", "--attackers", "me"], ["mean"]),
        (["evaluate", "photos/"], []),
        (["explain", "runs/digits", "photos/"], ["photos/a.png"]),
        (["explain", "runs/digits", "photos/a.png", "da"], ["data.npz"]),
        (["export", "runs/digits", "x.pt2", "--format", "t"], ["torch.export", "torchscript"]),
        (["reproduce", "table"], ["table1", "table2", "table3"]),
        (["ensemble", "runs/digits", "runs/m"], ["runs/my run"]),
        (["poison", "c"], ["craft"]),
        (["poison", "craft", "runs/d"], ["runs/digits"]),
        (["completion", "z"], ["zsh"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in console.LINES else "",
)
def test_bash_completes(words: list[str], proposed: list[str], bash: Path, folder: Path) -> None:
    found = completed(bash, words, folder)
    assert [word for word in found if word] == proposed


def test_the_written_options_are_those_of_the_commands() -> None:
    assert recorded.read() == command_options.current(), (
        "options have changed: python -m tests.command_options writes immunity_fast/runtime/options.json anew"
    )
    file = REPOSITORY / "immunity_fast" / "runtime" / recorded.FILE
    assert file.read_text(encoding="utf-8") == recorded.to_text(recorded.read()), "an option a line"


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_shell_gets_its_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    shtab = pytest.importorskip("shtab", reason="it writes completions")
    if shell not in shtab.SUPPORTED_SHELLS:
        assert ended(["completion", shell]) == 1
        assert "needs a newer shtab" in capsys.readouterr().err
        return
    assert ended(["completion", shell]) == 0
    output = capsys.readouterr().out
    for word in ("immunity-fast", "evaluate", "robnet_free"):
        assert word in output
    if (program := shutil.which(shell)) and shell in ("bash", "zsh", "fish"):
        assert subprocess.run([program, "-n"], input=output, text=True, check=False).returncode == 0


def test_the_shell_is_the_user_s_own_where_none_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("shtab", reason="it writes completions")
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")
    assert ended(["completion"]) == 0
    assert capsys.readouterr().out.startswith("#compdef immunity-fast")
    monkeypatch.setenv("SHELL", "/bin/ksh")
    assert ended(["completion"]) == 2
    assert "required: SHELL" in capsys.readouterr().err


def test_without_shtab_it_is_said_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert ended(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "error: completion needs shtab: pip install shtab\n"
