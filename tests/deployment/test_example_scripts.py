"""The examples of a trained model in use run as their first lines say."""

from __future__ import annotations

import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.places import REPOSITORY


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs an example in a folder of its own; what it prints."""

    def run(name: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(REPOSITORY / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_run_is_loaded_and_explained(run: Callable[[str], str], tmp_path: Path) -> None:
    for name in ("sklearn", "PIL", "matplotlib"):
        pytest.importorskip(name, reason="the extra train")
    said = run("load_run.py")
    assert "classes zero, one, two, three" in said
    assert "back from its folder to the same bits: True" in said
    assert (tmp_path / "load_run" / "explained" / "digit.png").is_file()
    assert (tmp_path / "load_run" / "saved" / "README.md").is_file()


@pytest.mark.parametrize("onnx", [False, pytest.param(True, marks=[pytest.mark.exhaustive, pytest.mark.slow])])
def test_a_model_is_exported(onnx: bool, run: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not onnx:  # as where it is not installed
        monkeypatch.setitem(sys.modules, "onnxscript", None)
    lines = [line for line in run("export.py").splitlines() if not line.startswith("[torch.onnx]")]
    said = {line.split()[0]: line for line in lines}
    assert set(said) == {"torch.export", "torchscript", "onnx"}
    assert onnx or "left out: " in said["onnx"]
    for line in said.values():
        assert 'classes ["cat", "dog", "fox", "owl"], gate mean' in line or "left out: " in line
