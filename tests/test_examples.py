"""The examples: what they add to an ordinary loop, that it is right, and that they run as the README says."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import math
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss
from immunity_fast.losses import ALPHA, BETA, GAMMA
from tests import oracle
from tests.oracle import assert_matches
from tests.places import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
FEW = 24  # held-out images where their number is not the matter


@pytest.fixture(scope="module")
def drop_in() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))  # as `python examples/drop_in.py` has it
        yield importlib.import_module("drop_in")


def _batches(drop_in: ModuleType, steps: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels, *_ = drop_in.digits("cpu")
    batches: Iterator[tuple[Tensor, Tensor]] = drop_in.random_batches(images, labels, steps, batch_size)
    return batches


def _few_held_out(drop_in: ModuleType) -> Callable[[str], tuple[Tensor, ...]]:
    """The example's data with fewer images to evaluate on, which is most of its time."""
    images, labels, test_images, test_labels = drop_in.digits("cpu")
    return lambda device: (images, labels, test_images[:FEW], test_labels[:FEW])


def _untrained(drop_in: ModuleType) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(drop_in.resnet10() for _ in range(3))


def _assert_every_weight_moved(experts: nn.ModuleList, initial: nn.ModuleList) -> None:
    assert len(experts) == len(initial) == 3
    for (name, after), before in zip(experts.named_parameters(), initial.parameters(), strict=True):
        assert after.isfinite().all(), name
        assert not torch.equal(after.cpu(), before), name


def test_the_loops_differ_by_the_three_lines_that_are_marked(drop_in: ModuleType) -> None:
    plain, immune = (inspect.getsource(loop).splitlines()[2:] for loop in (drop_in.plain, drop_in.with_immunity))
    changes = [line for line in difflib.ndiff(plain, immune) if line[0] in "+-"]
    added = [line for line in changes if line[0] == "+"]
    removed = [line for line in changes if line[0] == "-"]
    assert len(added) == 3
    assert all("# added" in line for line in added)
    assert [line[1:].strip() for line in removed] == [
        "logits = [expert(images) for expert in experts]",
        "loss = sum(F.cross_entropy(scores, labels) for scores in logits)",
    ]
    assert inspect.getsource(drop_in).count("  # added") == 3


def test_of_the_package_the_example_imports_two_names(drop_in: ModuleType) -> None:
    imported = [
        name.name
        for node in ast.walk(ast.parse(inspect.getsource(drop_in)))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("immunity_fast")
        for name in node.names
    ]
    assert imported == ["FusedImmunityLoss", "capture_activations"]
    assert "import immunity_fast" not in inspect.getsource(drop_in)


def test_the_plain_loop_runs_without_the_loss_and_without_hooks(
    drop_in: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("not in the plain loop")

    monkeypatch.setattr(drop_in, "FusedImmunityLoss", forbidden)
    monkeypatch.setattr(drop_in, "capture_activations", forbidden)
    experts = drop_in.plain(_batches(drop_in, 2, 4), "cpu")
    assert not any(module._forward_hooks for module in experts.modules())
    _assert_every_weight_moved(experts, _untrained(drop_in))


def test_with_the_loss_every_weight_of_every_expert_moves(drop_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []

    class Recorded(FusedImmunityLoss):
        def forward(self, *arguments: object) -> Tensor:  # type: ignore[override]
            loss: Tensor = super().forward(*arguments)  # type: ignore[call-overload]
            losses.append(float(loss.detach()))
            return loss

    monkeypatch.setattr(drop_in, "FusedImmunityLoss", Recorded)
    experts = drop_in.with_immunity(_batches(drop_in, 2, 4), "cpu")
    _assert_every_weight_moved(experts, _untrained(drop_in))
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


def _double_experts(drop_in: ModuleType, *, training: bool) -> tuple[nn.ModuleList, Tensor, Tensor]:
    """In float64, with BatchNorm statistics that are not the initial ones."""
    experts = _untrained(drop_in).double()
    images, labels, *_ = drop_in.digits("cpu")
    for expert in experts:
        expert(images[:32].double())
    return experts.train(training), images[32:36].double(), labels[32:36]


def test_the_captured_loss_matches_the_oracle_of_cut_networks(drop_in: ModuleType) -> None:
    experts, images, labels = _double_experts(drop_in, training=False)
    parameters = tuple(experts.parameters())
    loss = FusedImmunityLoss(size=(32, 32))(*drop_in.capture_activations(experts, "layer1")(images), labels)

    maps = [e.layer1(e.maxpool(e.relu(e.bn1(e.conv1(images))))) for e in experts]
    heads = [
        e.fc(e.avgpool(e.layer4(e.layer3(e.layer2(part)))).flatten(1)) for e, part in zip(experts, maps, strict=True)
    ]
    slopes = oracle.label_gradients(torch.stack(heads), maps, labels, "logit")
    information, stability = oracle.heatmap_losses(torch.stack(maps), slopes, (32, 32))
    gate = torch.full((len(labels), 3), 1 / 3, dtype=torch.float64)
    cross_entropies = oracle.cross_entropy(torch.stack(heads), gate, labels, ALPHA)
    expected = oracle.total(cross_entropies, information, stability, 3, BETA, GAMMA)

    assert_matches(loss, expected)
    gradients = torch.autograd.grad(loss, parameters)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        assert_matches(ours, theirs)


def test_its_gradient_is_the_slope_with_batch_norm_in_training(drop_in: ModuleType) -> None:
    """With respect to all weights at once, along a random direction, and through torchvision's in-place ReLUs."""
    experts, images, labels = _double_experts(drop_in, training=True)
    parameters = list(experts.parameters())
    captured = drop_in.capture_activations(experts, "layer1")
    immunity_loss = FusedImmunityLoss(size=(32, 32))

    def loss() -> Tensor:
        found: Tensor = immunity_loss(*captured(images), labels)
        return found

    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def moved(step: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
        return float(loss().detach())

    gradients = torch.autograd.grad(loss(), parameters)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    step = 3e-10  # small, so that hardly a ReLU is crossed
    above = moved(step)
    below = moved(-2 * step)
    assert slope == pytest.approx((above - below) / (2 * step), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [4, pytest.param(44, marks=pytest.mark.exhaustive)])
def test_the_command_prints_what_the_loss_does(
    drop_in: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["drop_in.py", "--steps", str(steps)])
    if steps < 44:
        monkeypatch.setattr(drop_in, "digits", _few_held_out(drop_in))
    drop_in.main()
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{steps} steps of 32 images on ")
    assert title.endswith(f"{360 if steps >= 44 else FEW} held-out images")
    assert header.split() == ["plain", "with_immunity"]
    table = {row[:42].strip(): [float(cell.replace(",", "")) for cell in row[42:].split()] for row in rows}
    assert all(len(cells) == 2 and all(map(math.isfinite, cells)) for cells in table.values())
    information = table["mutual information of the heatmaps, nats"]
    losses = table["loss: mutual information, nats"]
    assert information == pytest.approx([math.log(3) - loss / 3 for loss in losses], abs=0.01)
    assert all(cell > 0 for cell in table["milliseconds a step, median"])
    if steps >= 44:
        assert information[1] > information[0]
        assert all(cell > 50 for cell in table["accuracy of the experts' mean, %"])


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--batch-size", "1"]])
def test_the_command_refuses_what_cannot_be_trained(
    drop_in: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["drop_in.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        drop_in.main()
    assert ended.value.code == 2
    assert "expected at least 1 step and 2 images a step" in capsys.readouterr().err


def test_the_capture_example_prints_where_each_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    capture = importlib.import_module("capture")
    monkeypatch.setattr(sys, "argv", ["capture.py", "--steps", "2"])
    capture.main()
    title, *networks, first, last = capsys.readouterr().out.splitlines()
    assert title == "images (8, 3, 48, 48), heatmaps 48×48"
    assert [line.split()[0] for line in networks] == ["resnet", "vit", "swin"]
    assert all(line.endswith("12, 12)") for line in networks)
    for number, line in enumerate((first, last), 1):
        assert line.startswith(f"step {number}: loss ")
        values = [
            float(part.split()[-1].replace(",", "")) for part in line.split("loss ")[1].replace(";", ",").split(", ")
        ]
        assert len(values) == 4
        assert all(math.isfinite(value) for value in values)


def test_the_command_starts_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["drop_in.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "drop_in.py"), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--steps" in shown
    assert "--batch-size" in shown


@pytest.fixture
def lightning_module(drop_in: ModuleType) -> ModuleType:
    if not any(importlib.util.find_spec(name) for name in ("lightning", "pytorch_lightning")):
        pytest.skip("neither lightning nor pytorch_lightning is installed")
    return importlib.import_module("lightning_module")


def test_the_lightning_module_trains_validates_and_logs_terms(
    drop_in: ModuleType, lightning_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lightning_module, "digits", _few_held_out(drop_in))
    mixture, metrics = lightning_module.fit(2, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    _assert_every_weight_moved(nn.ModuleList(mixture.model.unstack()), _untrained(drop_in))
    assert metrics["loss"] == pytest.approx(
        metrics["cross_entropy"]
        + BETA / 3 * metrics["mutual_information_loss"]
        + GAMMA / 6 * metrics["position_stability"],
        rel=1e-5,
    )
    assert 0 < metrics["mutual_information_loss"] < 3 * math.log(3)
    *_, images, labels = _few_held_out(drop_in)("cpu")
    with torch.no_grad():
        correct = mixture.eval()(images).argmax(-1) == labels
    assert metrics["val_accuracy_mean"] == pytest.approx(float(correct.float().mean()), abs=1e-3)
    assert not list(tmp_path.iterdir())


def test_a_data_set_and_a_callback_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    (record,) = importlib.import_module("own_loop").main(epochs=1)
    assert 0 <= record["val_accuracy_mean"] <= 1
    shown = capsys.readouterr().out
    assert shown.startswith("epoch,step,lr,loss,")
    assert shown.endswith("fastest: epoch 1\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loss", ["adp", "gal", "trs", "dverge"])
def test_each_other_loss_trains_every_weight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    other_losses = importlib.import_module("other_losses")
    assert set(other_losses.OBJECTIVES) == {"adp", "gal", "trs", "dverge"}
    initial, _ = other_losses.train(loss, epochs=0)
    experts, losses = other_losses.train(loss, epochs=1, steps=2, size=4)
    _assert_every_weight_moved(experts, initial)
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    assert capsys.readouterr().out == f"{loss}, epoch 1: loss {sum(losses) / 2:.3f}\n"


def test_the_example_of_other_losses_answers_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["other_losses.py", "--loss", "gal", "--epochs", "1"])
    importlib.import_module("other_losses").main()
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("gal, epoch 1: loss ")
    assert last.startswith("the ensemble answers by the mean probabilities: classes [")


def test_networks_of_libraries_train_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm", reason="the example's second network")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module("any_network").main()
    found = capsys.readouterr().out
    for part in (
        "2 × torchvision:squeezenet1_1 + 1 × timm:test_resnet on npz",
        "its classifier head of 10 classes is replaced by a fresh one of 3 (fc.weight, fc.bias)",
        "expert 3 would begin as another does, and never part from it: noise of 0.01",
        "Grad-CAM looks at features.1 (15×15, 64 channels) in torchvision:squeezenet1_1, act1 (16×16, 32 channels)",
        "from the run: torchvision:squeezenet1_1,timm:test_resnet, logits (3, 2, 3), gate (2, 3)",
    ):
        assert part in found
    assert list(tmp_path.iterdir()) == [], "all files are temporary"


SAID = {
    "hooks behind a trunk that is frozen": ("ValueError: activations: expected", "images.requires_grad_()"),
    "activations that a hook has detached": ("ValueError: activations: expected", "require no gradient"),
    "the loss under torch.no_grad": ("ValueError: logits: expected", "torch.no_grad"),
    "the loss in torch.inference_mode": ("ValueError: logits: expected", "torch.inference_mode"),
    "activations of one expert at the place of another": ("ValueError: activations: expected", "number 0"),
    "attention's fast kernel behind plain hooks": ("ValueError: activations: expected", "detach_weights=True"),
    "a network whose dictionary has no logits": ("ValueError: networks: expected logits", "dict of scores"),
    "a layer that the network does not have": ("ValueError: layer: expected", "'layer2'"),
    "a layer that is called twice": ("ValueError: layer: expected", "call="),
    "images as an array of NumPy": ("TypeError: images: expected", "ndarray"),
    "images as an array of NumPy, attacked": ("TypeError: images: expected", "numpy.ndarray; torch.as_tensor"),
    "images as bytes": ("TypeError: images: expected", "torch.uint8"),
    "a mixture for images of another size than its networks": ("ValueError: experts: expected", "image_size says"),
    "a size that is none": ("ValueError: size: expected", "'large'"),
    "gradients through a gate that draws": ("SwitchingGateWarning: ", "model.deterministic()"),
    "a file of a gate that draws": ("ValueError: gate: expected 'mean' or 'off'", "draws no permutation"),
    "a function that cannot be compiled": ("UserWarning: compiling failed", "in input_of_the_user, messages.py:"),
    "evaluate without --image-size": ("error: model: expected", "--image-size N"),
}


def test_each_mistake_gives_the_line_that_the_example_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["messages.py"])
    importlib.import_module("messages").main()
    mistakes, rest = capsys.readouterr().out.split("\n\nWhat is none any more:\n")
    lines = mistakes.splitlines()
    assert lines[::2] == list(SAID), "a name and a line each, no more"
    for (begins, holds), line in zip(SAID.values(), lines[1::2], strict=True):
        assert line.removeprefix("    ").startswith(begins)
        assert holds in line
    assert len(rest.splitlines()) == 5
    assert all(line.endswith(": works") for line in rest.splitlines())
    assert list(tmp_path.iterdir()) == []
