"""The examples of a trained model in use run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import REPOSITORY


def run(name: str, folder: Path) -> str:
    """What an example prints; it has to end well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(REPOSITORY / "examples" / name)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_is_loaded_and_explained(tmp_path: Path) -> None:
    for name in ("sklearn", "PIL", "matplotlib"):
        pytest.importorskip(name, reason="the extra train")
    said = run("load_run.py", tmp_path)
    assert "classes zero, one, two, three" in said
    assert "back from its folder to the same bits: True" in said
    assert (tmp_path / "load_run" / "explained" / "digit.png").is_file()
    assert (tmp_path / "load_run" / "saved" / "README.md").is_file()


@pytest.mark.slow
def test_a_model_is_exported(tmp_path: Path) -> None:
    said = {line.split()[0]: line for line in run("export.py", tmp_path).splitlines()}
    assert set(said) == {"torch.export", "torchscript", "onnx"}
    for line in said.values():
        assert 'classes ["cat", "dog", "fox", "owl"], gate mean' in line or "left out: " in line
