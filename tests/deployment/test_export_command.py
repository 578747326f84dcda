"""`immunity-fast export RUN PATH`: the file that the function writes, its format taken from the file's ending."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import immunity_fast
from immunity_fast import export_model
from tests.small_runs import error_line, options, trained


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    trained([*options(data, epochs=1), "--out", str(folder)])
    return folder


def test_the_file_answers_as_the_model_of_the_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.pt"
    export_model.main([str(run), str(file), "--gate", "off", "--dtype", "float64"])
    assert f"{run} as torchscript, by the gate's off: {file}\n" in capsys.readouterr().out
    model = immunity_fast.load(run).double()
    model.gate.switch = "off"
    images = torch.rand(3, 3, *model.image_size, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.load(file)(images), model(images))


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.onnx", "onnx"), ("a.PT2", "torch.export"), ("a.pt", "torchscript"), ("a", "onnx"), ("a.b/c", "onnx")],
)
def test_the_format_is_the_ending_s(name: str, format: str) -> None:
    assert export_model.parse(["run", name])["format"] == format
    assert export_model.parse(["run", name, "--format", "torchscript"])["format"] == "torchscript"


def test_what_is_not_said_is_the_function_s_default() -> None:
    found = export_model.parse(["run", "x.onnx"])
    assert (found["gate"], found["dtype"], found["checkpoint"], found["trust_code"]) == ("mean", None, None, False)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere", "x.pt2"], 1, "nowhere"),
        (["run"], 2, "PATH"),
        (["run", "x.pt2", "--gate", "call"], 2, "--gate"),
        (["run", "x.pt2", "--checkpoint", "best"], 1, "best"),
    ],
    ids=["no run", "no file", "a gate that draws", "no best checkpoint"],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    code: int,
    said: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(run) if word == "run" else word for word in arguments]
    assert said in error_line(capsys, export_model.main, given, code=code)
    assert list(tmp_path.iterdir()) == []
