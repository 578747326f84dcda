"""`immunity_fast.export`: files that answer as the model, for any number of images, without this package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import immunity_fast
from immunity_fast import ImmunityMoE
from immunity_fast.deployment import exporting
from immunity_fast.deployment.exporting import METADATA, description
from immunity_fast.models.moe import SingleNetwork
from tests import grids

FORMATS = ("onnx", "torch.export", "torchscript")
NAMES = ("cat", 'dog \\ "fox"', "ÿ")
TOLERANCE = 1e-5  # of a log-probability near 1, in float32: some rounding of convolutions in another order


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 3),
    )


def mixture(num_experts: int = 3) -> ImmunityMoE:
    """Small networks in one stack: an export takes seconds for each layer."""
    torch.manual_seed(0)
    kind = ImmunityMoE if num_experts > 1 else SingleNetwork
    model = kind.from_experts(
        [network() for _ in range(num_experts)],
        stage="2",
        image_size=(16, 20),
        classes=NAMES,
        mean=(0.25, 0.5, 0.75),
        std=(0.1, 0.2, 0.3),
    )
    return stirred(model)


def stirred(model: ImmunityMoE) -> ImmunityMoE:
    """As after some training: statistics, and weights of the gate that differ."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()  # type: ignore[union-attr]
                layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        for parameter in model.gate.parameters():
            parameter.mul_(4)
    return model


def needs(format: str) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="the extra export")
        pytest.importorskip("onnxruntime", reason="what runs the file")


def opened(file: Path, format: str) -> tuple[Callable[[Tensor], Tensor], dict[str, str]]:
    """What a file does and says of itself, as somebody without this package finds out."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(file)
        (given,) = session.get_inputs()
        assert (given.name, given.shape[1:]) == ("images", [3, 16, 20])
        assert isinstance(given.shape[0], str), "a name stands for any number"
        run = lambda x: torch.from_numpy(session.run(["log_probabilities"], {"images": x.numpy()})[0])  # noqa: E731
        return run, dict(session.get_modelmeta().custom_metadata_map)
    extra = {METADATA: ""}
    if format == "torch.export":
        module: Any = torch.export.load(file, extra_files=extra).module()
        called = [node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        assert {target.namespace for target in called} == {"aten"}, "no operation of this package's own"
    else:
        module = torch.jit.load(file, _extra_files=extra)  # type: ignore[no-untyped-call]
    return module, json.loads(extra[METADATA])


def answers(model: ImmunityMoE, x: Tensor, gate: str = "mean") -> Tensor:
    """By the model itself."""
    model.eval()
    with torch.no_grad(), model.gate.switched(gate):  # type: ignore[arg-type]
        found: Tensor = model(x)
    return found


@pytest.mark.parametrize(("format", "gate"), grids.every(2, FORMATS, ("mean", "off")))
def test_a_file_answers_as_the_model_for_any_batch(format: Any, gate: Any, tmp_path: Path) -> None:
    """Batches of N, of one and of others: a graph must not take their number for that of the experts."""
    needs(format)
    model = mixture()
    model.gate.switch = "call"
    file = immunity_fast.export(model, tmp_path / "new" / "model", format=format, gate=gate)
    assert [entry.name for entry in file.parent.iterdir()] == ["model"]
    run, about = opened(file, format)
    assert about == description(model, gate, torch.float32)
    other = "off" if gate == "mean" else "mean"
    for count in (3, 1, 2, 7):
        x = torch.rand(count, 3, 16, 20)
        expected = answers(model, x, gate)
        found = run(x)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max()))
        assert (answers(model, x, other) - expected).abs().max() > 100 * TOLERANCE


def test_it_says_what_it_is() -> None:
    model = mixture()
    model.arch = "resnet8"
    about = description(model, "mean", torch.float16)
    assert json.loads(about["classes"]) == list(NAMES)
    assert json.loads(about["image_size"]) == [16, 20]
    assert json.loads(about["mean"]) == [0.25, 0.5, 0.75]
    assert json.loads(about["std"]) == pytest.approx([0.1, 0.2, 0.3])
    assert json.loads(about["stage"]) == "2"
    assert (about["arch"], about["gate"], json.loads(about["num_experts"])) == ("resnet8", "mean", 3)
    assert "float16 (B, 3, H, W) in [0, 1]" in about["input"]
    plain = description(
        ImmunityMoE.from_experts([network(), network()], stage="2", image_size=16), "off", torch.float32
    )
    assert [plain[name] for name in ("classes", "mean", "std", "arch")] == ["null", "null", "null", ""]


@pytest.mark.parametrize("format", grids.sampled(FORMATS[1:], ordinary=lambda format: format == "torchscript"))
def test_one_network_and_different_ones_too(format: Any, tmp_path: Path) -> None:
    different = stirred(ImmunityMoE.from_experts([network(), _with_shapes()], stage=["2", "conv"], image_size=(16, 20)))
    for model in (mixture(num_experts=1), different):
        run, _ = opened(immunity_fast.export(model, tmp_path / "m", format=format), format)
        x = torch.rand(5, 3, 16, 20)
        assert (run(x) - answers(model, x)).abs().max() <= TOLERANCE


def _with_shapes() -> nn.Module:
    """A network that asks for shapes, as many do."""

    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn(self.conv(x)).relu()
            if out.shape[-1] > 4:
                out = out[..., ::2]
            logits: Tensor = self.fc(out.reshape(x.size(0), 4, -1).mean(-1))
            return logits

    return Shaped()


@pytest.mark.exhaustive  # of `make test`, small networks are it, and examples/export.py in the other formats
def test_an_architecture_of_ours_too(tmp_path: Path) -> None:
    """Others were tried by hand, in all three formats: each takes a minute or more."""
    needs("onnx")
    model = stirred(ImmunityMoE("resnet8", 2, 3, image_size=(16, 20)))
    run, _ = opened(immunity_fast.export(model, tmp_path / "m"), "onnx")
    x = torch.rand(5, 3, 16, 20)
    assert (run(x) - answers(model, x)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("format", grids.each(2, ["torchscript", "torch.export"]))
def test_float64_and_halves_are_kept_or_made(format: Any, tmp_path: Path) -> None:
    model = mixture().double()
    x = torch.rand(4, 3, 16, 20, dtype=torch.float64)
    run, about = opened(immunity_fast.export(model, tmp_path / "m", format=format), format)
    assert (run(x) - answers(model, x)).abs().max() < 1e-9
    assert "float64" in about["input"]
    file = immunity_fast.export(model, tmp_path / "m", format="torchscript", dtype=torch.bfloat16)
    found = opened(file, "torchscript")[0](x.bfloat16())
    assert found.dtype == torch.float32
    assert (found - answers(model, x)).abs().max() < 0.2


def test_it_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = mixture().train()
    model.gate.switch = "sample"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    immunity_fast.export(model, tmp_path / "m", format="torchscript")
    assert model.training
    assert model.gate.switch == "sample"
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.exhaustive  # of `make test`, the command's run is it
def test_a_run_is_exported_by_its_folder(tmp_path: Path) -> None:
    model = stirred(ImmunityMoE("resnet8", 2, 3, image_size=(16, 20)))
    model.save_pretrained(tmp_path / "saved")
    run, _ = opened(immunity_fast.export(tmp_path / "saved", str(tmp_path / "m"), format="torchscript"), "torchscript")
    x = torch.rand(2, 3, 16, 20)
    assert (run(x) - answers(model, x)).abs().max() <= TOLERANCE
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such run"):
        immunity_fast.export(tmp_path / "nowhere", tmp_path / "m", format="torchscript")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "call"}, "gate: expected 'mean' or 'off', got 'call'; a file does the same at each call"),
        ({"gate": "sample"}, "gate: expected 'mean' or 'off', got 'sample'"),
        ({"format": "pickle"}, "format: expected one of onnx, torch.export, torchscript, got 'pickle'"),
        ({"dtype": torch.int8}, "dtype: expected a floating-point type, got torch.int8"),
        ({"dtype": "half"}, "dtype: expected a floating-point type, got 'half'"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        immunity_fast.export(mixture(), tmp_path / "m", **({"format": "torchscript"} | options))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_mixture_and_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^model: expected a run's folder or an ImmunityMoE, got ExactMean$"):
        immunity_fast.export(mixture().deterministic(), tmp_path / "m", format="torchscript")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^path: expected the name of a file, got the folder "):
        immunity_fast.export(mixture(), tmp_path, format="torchscript")


def test_a_network_of_one_batch_size_is_refused(tmp_path: Path) -> None:
    """The file that was there stays, and nothing is left beside it."""

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            maps = self.conv(x)
            logits: Tensor = self.fc(torch.stack([maps[i].mean((-2, -1)) for i in range(int(x.shape[0]))]))
            return logits

    model = ImmunityMoE.from_experts([Fixed(), Fixed()], stage="conv", image_size=16)
    (tmp_path / "m").write_text("before", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"m: torchscript: expected (a file that runs on|the model's answers)"
    ) as caught:
        immunity_fast.export(model, tmp_path / "m", format="torchscript")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"m: expected a network that torch.export can hold, got ") as caught:
        immunity_fast.export(model, tmp_path / "m", format="torch.export")
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m").read_text(encoding="utf-8") == "before"


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x).mean((-2, -1))
        logits: Tensor = self.fc(maps.relu() if maps.mean() > 0 else -maps)
        return logits


@pytest.mark.parametrize("format", ["torchscript", "torch.export"])
def test_a_condition_on_values_is_refused(format: Literal["torchscript", "torch.export"], tmp_path: Path) -> None:
    """A trace has one side of it, and on noise answers rightly."""
    model = ImmunityMoE.from_experts([Branching(), Branching()], stage="conv", image_size=16)
    with pytest.raises(ValueError, match=r"m: expected a network that .* can hold, got .*ata-dependent"):
        immunity_fast.export(model, tmp_path / "m", format=format)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_to_script", lambda *_: lambda x: torch.zeros(len(x), 3))
    with pytest.raises(ValueError, match=r"m: torchscript: expected the model's answers to 1 images to 0.0001, got"):
        immunity_fast.export(mixture(), tmp_path / "m", format="torchscript")
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ModuleNotFoundError, match="format 'onnx' needs onnx and onnxscript: pip install onnx onnxscript"
    ):
        immunity_fast.export(mixture(), tmp_path / "m.onnx")


# A program of torch.export, which takes seconds to import what reads it, has of `make test` its operations looked at.
@pytest.mark.parametrize("format", grids.each(2, ["torchscript", "torch.export"]))
def test_a_process_without_this_package_runs_it(format: Any, tmp_path: Path) -> None:
    model = mixture()
    immunity_fast.export(model, tmp_path / "m", format=format)
    torch.save(answers(model, torch.full((4, 3, 16, 20), 0.3)), tmp_path / "expected.pt")
    opened = "torch.jit.load('m')" if format == "torchscript" else "torch.export.load('m').module()"
    program = (
        "import sys, torch\nsys.modules['immunity_fast'] = None\n"
        "x, expected = torch.full((4, 3, 16, 20), 0.3), torch.load('expected.pt')\n"
        f"assert ({opened}(x) - expected).abs().max() < 1e-5\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True)
