"""The examples on wrappers and attack libraries, as their first lines say they are run."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys

import pytest

from tests.places import REPOSITORY
from tests.processes import launch


def _run(name: str, *options: str) -> str:
    pytest.importorskip("sklearn", reason="the extra train")
    command = [sys.executable, str(REPOSITORY / "examples" / name), *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@pytest.mark.exhaustive  # of `make test`, tests/models/test_wrappers.py
@pytest.mark.parametrize("by", ["ddp", pytest.param("accelerate", marks=pytest.mark.exhaustive)])
def test_two_processes_end_where_one_does(by: str) -> None:
    if by == "accelerate":
        pytest.importorskip("accelerate", reason="an outside library that the project does not need")
    shown = _run("wrappers.py", "--by", by)
    moved, apart = (float(number) for number in re.findall(r"\d\.\de[+-]\d\d", shown))
    assert moved > 1e-3
    assert apart < 1e-12
    assert f"2 processes by {by} end within" in shown


def test_attack_libraries_are_listed_with_what_they_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the extra train")
    monkeypatch.setattr(sys, "argv", ["attack_libraries.py", "--epochs", "2", "--steps", "2"])
    runpy.run_path(str(REPOSITORY / "examples" / "attack_libraries.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert "clean accuracy, exact mean:" in shown
    for name in ("immunity_fast", "torchattacks", "foolbox", "art"):
        assert re.search(rf"^{name} +(is not installed|(\d+\.\d % *){{3}})$", shown, re.MULTILINE), shown


def test_shards_of_two_processes_end_where_one_process_does() -> None:
    example = REPOSITORY / "examples" / "sharded.py"
    shown = launch("-c", f"import runpy; runpy.run_path({str(example)!r}, run_name='__main__')")
    moved, apart = (float(number) for number in re.findall(r"\d\.\de[+-]\d\d", shown))
    assert moved > 1e-3
    assert apart < 1e-10
    assert re.search(r"process 1 of 2 keeps 55,\d{3} of 111,393 weights", shown)
