"""Every network in every wrapper: answers and gradients are those of plain code; see tests/compatible.py."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from immunity_fast import ImmunityMoE, capture_activations, export
from tests import compatible
from tests.captured import LABELS, Passed, assert_gradients, expected_gradients, gradients_of, loss_fn
from tests.compatible import NETWORKS, NOT_WRAPPED, WRAPPERS
from tests.processes import PROCESSES, launch

pytestmark = pytest.mark.filterwarnings(
    "ignore:attention behind", "ignore:`torch.jit", "ignore:.*LeafSpec", "ignore:Found .* in eval mode"
)


def _by_hook(layer: str) -> Callable[[Any, Tensor], Passed]:
    """A pass with the layer's output, kept by a plain hook; attention by the formula, which has a second derivative."""

    def run(network: nn.Module, images: Tensor) -> Passed:
        kept: list[Tensor] = []
        hook = network.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            output = network(images)
        hook.remove()
        return getattr(output, "logits", output), kept[0]

    return run


@cache
def _expected(name: str) -> list[Tensor]:
    """Gradients of a row's networks, by the oracle's formulas."""
    runs = [_by_hook(layer) for layer in compatible.layers(name)]
    turns = [network.to_maps for network in NETWORKS[name]]
    return expected_gradients(compatible.experts(name), compatible.images(name), runs, turns)


@cache
def _mixture(name: str) -> ImmunityMoE:
    return compatible.mixture(name)


@cache
def _answers(name: str) -> Tensor:
    """By the mean of the networks' probabilities."""
    with torch.no_grad():
        logits = [network(compatible.images(name)) for network in compatible.experts(name)]
    return torch.stack([getattr(each, "logits", each).softmax(-1) for each in logits]).mean(0).log()


def _assert_gradients_of(model: Any, name: str) -> None:
    """The mixture's experts have the gradients of plain code."""
    logits, activations, _ = model.expert_outputs(compatible.images(name))
    loss = loss_fn()(logits, activations, LABELS)
    found = gradients_of(loss, [model.experts])
    expected = _expected(name)
    if len(found) < len(expected):  # of one structure, stacked: parameter by parameter, expert by expert
        half = len(expected) // 2
        expected = [torch.stack(pair) for pair in zip(expected[:half], expected[half:], strict=True)]
    assert_gradients(found, expected)


def _assert_answers(answer: Callable[[Tensor], Tensor], name: str, exact: bool = True) -> None:
    with torch.no_grad():
        found = answer(compatible.images(name).to(torch.float64 if exact else torch.float32))
    tolerance = 1e-9 if exact else 1e-4
    torch.testing.assert_close(found.double(), _answers(name), rtol=tolerance, atol=tolerance)


def _plain_loop(name: str, _tmp_path: Path) -> None:
    networks = compatible.experts(name)
    logits, activations = capture_activations(networks, compatible.layers(name))(compatible.images(name))
    assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), _expected(name))


def _from_experts(name: str, _tmp_path: Path) -> None:
    _assert_gradients_of(_mixture(name), name)
    _assert_answers(_mixture(name).deterministic(), name)


def _compiled(name: str, _tmp_path: Path) -> None:
    torch.compiler.reset()
    model = compatible.mixture(name)
    loss = torch.compile(model, backend="aot_eager")(compatible.images(name), LABELS)
    loss.backward()
    expected = compatible.mixture(name)
    expected(compatible.images(name), LABELS).backward()
    torch.testing.assert_close(compatible.gradients(model), compatible.gradients(expected), rtol=1e-8, atol=1e-10)


def _copied(name: str, _tmp_path: Path) -> None:
    for twin in (copy.deepcopy(_mixture(name)), pickle.loads(pickle.dumps(_mixture(name)))):
        _assert_gradients_of(twin, name)


def _averaged(name: str, _tmp_path: Path) -> None:
    averaged = AveragedModel(_mixture(name))
    averaged.update_parameters(_mixture(name))
    _assert_gradients_of(averaged.module, name)
    with torch.no_grad():
        images = compatible.images(name)
        torch.testing.assert_close(averaged.eval()(images), _mixture(name)(images), rtol=1e-12, atol=1e-12)


def _in_lightning(name: str, tmp_path: Path) -> None:
    lightning = importlib.import_module("pytorch_lightning")
    model = compatible.mixture(name)
    images = compatible.images(name)

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.mixture = model

        def training_step(self, _batch: Any, _index: int) -> Tensor:
            loss: Tensor = self.mixture.eval()(images, LABELS)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", precision=64, max_steps=1, enable_checkpointing=False, default_root_dir=tmp_path, **quiet
    )
    trainer.fit(Module(), torch.zeros(1, 1))
    expected = compatible.mixture(name)
    expected(images, LABELS).backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    torch.testing.assert_close(dict(model.named_parameters()), dict(expected.named_parameters()), rtol=1e-8, atol=1e-9)


def _saved(name: str, tmp_path: Path) -> None:
    model = compatible.mixture(name)
    model.save_pretrained(tmp_path / "saved")
    torch.manual_seed(1)
    others = [network.make().double().eval() for network in NETWORKS[name]]
    found = ImmunityMoE.from_pretrained(tmp_path / "saved", experts=others)
    _assert_gradients_of(found, name)
    _assert_answers(found.deterministic(), name)


def _to_onnx(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="what runs a file of ONNX")
    file = export(_mixture(name), tmp_path / "model.onnx", format="onnx", dtype=torch.float32)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    _assert_answers(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), name, exact=False)


def _to_program(name: str, tmp_path: Path) -> None:
    file = export(_mixture(name), tmp_path / "model.pt2", format="torch.export")
    _assert_answers(torch.export.load(file).module(), name)


def _to_script(name: str, tmp_path: Path) -> None:
    file = export(_mixture(name), tmp_path / "model.pt", format="torchscript")
    _assert_answers(torch.jit.load(file), name)


CHECKS: dict[str, Callable[[str, Path], None]] = {
    "a plain loop, `capture_activations`": _plain_loop,
    "`from_experts`": _from_experts,
    "`torch.compile`": _compiled,
    "`deepcopy`, pickle": _copied,
    "`AveragedModel`": _averaged,
    "Lightning": _in_lightning,
    "`save_pretrained`": _saved,
    "`export`, ONNX": _to_onnx,
    "`export`, torch.export": _to_program,
    "`export`, TorchScript": _to_script,
}


def _needs(name: str, library: str) -> None:
    lacking = compatible.missing(name)
    if lacking is not None:
        pytest.skip(f"{lacking}, whose network it is, is not installed")
    if library:
        pytest.importorskip(library, reason="an outside library that the project does not need")


def _cells(wrappers: Iterable[str]) -> list[Any]:
    """Cells of columns, most of those that take long for `make test-exhaustive`."""
    return [
        pytest.param(name, wrapper, marks=[pytest.mark.exhaustive] * compatible.is_left_out(name, wrapper))
        for name in NETWORKS
        for wrapper in wrappers
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wrapper"), _cells(CHECKS))
def test_a_network_in_a_wrapper_is_what_plain_code_is(name: str, wrapper: str, tmp_path: Path) -> None:
    _needs(name, WRAPPERS[wrapper])
    why = NOT_WRAPPED.get((name, wrapper))
    if why is None:
        CHECKS[wrapper](name, tmp_path)
        return
    with pytest.raises(Exception, match=why):
        CHECKS[wrapper](name, tmp_path)


@pytest.fixture(scope="module")
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each of two processes, with half of the images, found of the cells that are asked for, in one launch."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch was built without gloo")
    cells = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and "parts" in item.fixturenames and item.path == request.path
    ]
    possible = [
        f"{cell['name']}|{cell['wrapper']}"
        for cell in cells
        if compatible.missing(cell["name"]) is None and _is_installed(WRAPPERS[cell["wrapper"]])
    ]
    out = tmp_path_factory.mktemp("wrapped") / "found"
    launch("-W", "ignore", "-m", "tests.compatible", str(out), *possible)
    return [torch.load(f"{out}-{rank}.pt") for rank in range(PROCESSES)]


def _is_installed(library: str) -> bool:
    return not library or importlib.util.find_spec(library) is not None


@pytest.mark.parametrize(("name", "wrapper"), _cells(compatible.PROCESSES))
def test_two_processes_have_the_gradients_of_one(
    name: str, wrapper: str, parts: list[dict[str, dict[str, Any]]]
) -> None:
    _needs(name, WRAPPERS[wrapper])
    found = [part[f"{name}|{wrapper}"] for part in parts]
    why = NOT_WRAPPED.get((name, wrapper))
    if why is not None:
        assert all(why in part["error"] for part in found)
        return
    assert not any("error" in part for part in found), found
    model = compatible.mixture(name)
    loss = model(compatible.images(name), LABELS)
    loss.backward()
    torch.testing.assert_close(sum(part["loss"] for part in found) / PROCESSES, loss.detach(), rtol=1e-9, atol=1e-9)
    for part in found:
        torch.testing.assert_close(part["gradients"], compatible.gradients(model), rtol=1e-7, atol=1e-9)


def test_every_column_is_tested() -> None:
    assert CHECKS.keys() | compatible.PROCESSES.keys() == WRAPPERS.keys()
