"""Every attack library on every network, and on all that a mixture can be made into; see tests/compatible.py."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from immunity_fast import ImmunityMoE, SwitchingGateWarning, export
from immunity_fast.attacks import autoattack, pgd
from tests import compatible
from tests.compatible import ATTACKED, ATTACKS, CLASSES, NETWORKS, NOT_ATTACKED, NOT_ATTACKED_AS

EPS, ALPHA, STEPS = 0.3, 0.1, 4
ROW = compatible.GREY  # of what a mixture is made into
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _ours(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return pgd(model, images, labels, eps=EPS, alpha=ALPHA, steps=STEPS)


def _torchattacks(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    import torchattacks

    found: Tensor = torchattacks.PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS)(images, labels)
    return found


def _autoattack(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(?i:autoattack).*")
        return autoattack(model, images, labels, num_classes=CLASSES, eps=EPS, steps=2, queries=4)


def _foolbox(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    found: Tensor = foolbox.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS)(wrapped, images, labels, epsilons=EPS)[1]
    return found


def _art(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        loss=nn.NLLLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=CLASSES,
        clip_values=(0, 1),
        device_type="cpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=EPS, eps_step=ALPHA, max_iter=STEPS, num_random_init=1, verbose=False
    )
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


LIBRARIES: dict[str, Attack] = {
    "ours": _ours,
    "torchattacks": _torchattacks,
    "our AutoAttack": _autoattack,
    "foolbox": _foolbox,
    "ART": _art,
}


@cache
def _mixture(name: str) -> ImmunityMoE:
    """In float32, which all libraries take."""
    model = compatible.mixture(name).float()
    model.gate.switch = "call"
    return model


def _check(library: str, attacked: nn.Module, name: str) -> None:
    """Images stay in the ball and in [0, 1], and are worse for the mixture, by its exact mean, than they were."""
    exact = _mixture(name).deterministic()
    images = compatible.images(name).float()
    with torch.no_grad():
        labels = exact(images).argmax(-1)
    torch.manual_seed(0)
    found = LIBRARIES[library](attacked, images, labels)
    assert found.shape == images.shape
    assert float((found - images).abs().max()) <= EPS + 1e-6
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    with torch.no_grad():
        before, after = F.nll_loss(exact(images), labels), F.nll_loss(exact(found), labels)
    assert after > before


def _needs(name: str, library: str) -> None:
    lacking = compatible.missing(name)
    if lacking is not None:
        pytest.skip(f"{lacking}, whose network it is, is not installed")
    if ATTACKS[library]:
        pytest.importorskip(ATTACKS[library], reason="an outside library that the project does not need")


def _cells(rows: Iterable[str]) -> list[Any]:
    """Cells of rows, most of those that take long for `make test-exhaustive`."""
    return [
        pytest.param(row, library, marks=[pytest.mark.exhaustive] * compatible.is_left_out(row, library))
        for row in rows
        for library in LIBRARIES
    ]


@pytest.mark.parametrize(("name", "library"), _cells(NETWORKS))
def test_a_library_attacks_a_mixture_of_any_networks(name: str, library: str) -> None:
    _needs(name, library)
    assert (name, library) not in NOT_ATTACKED
    _check(library, _mixture(name).deterministic(), name)


# What is attacked


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _made(kind: str, folder: Path) -> nn.Module:
    """What `kind` of `ATTACKED` is, of the mixture of `ROW`."""
    mixture = _mixture(ROW)
    exact = mixture.deterministic()
    if kind == "`model.deterministic()`":
        return exact
    if kind == "`torch.compile` of it":
        torch.compiler.reset()
        compiled: nn.Module = torch.compile(exact, backend="aot_eager")
        return compiled
    if kind == "`AveragedModel`":
        averaged = AveragedModel(exact)
        averaged.update_parameters(exact)
        return averaged.eval()
    if kind == "`from_pretrained`":
        mixture.save_pretrained(folder / "saved")
        return ImmunityMoE.from_pretrained(folder / "saved", experts=compatible.experts(ROW)).deterministic()
    if kind == "`model.for_inference()`":
        return mixture.for_inference()
    if kind == "a file of torch.export":
        return torch.export.load(export(mixture, folder / "model.pt2", format="torch.export")).module()
    if kind == "a file of TorchScript":
        script: nn.Module = torch.jit.load(export(mixture, folder / "model.pt", format="torchscript"))
        return script
    assert kind == "a file of ONNX, in ONNX Runtime"
    runtime = pytest.importorskip("onnxruntime", reason="what runs a file of ONNX")
    pytest.importorskip("onnxscript", reason="what writes one")
    session = runtime.InferenceSession(export(mixture, folder / "model.onnx"), providers=["CPUExecutionProvider"])

    class InRuntime(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {"images": images.detach().numpy()})[0])

    return InRuntime()


OTHERS = ("`model.eval()`, whose gate draws", "a deep copy, a pickled one", "DDP")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], nn.Module]:
    """What is attacked, by its kind, each made once."""

    @cache
    def make(kind: str) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _made(kind, tmp_path_factory.mktemp("made"))

    return make


@pytest.mark.parametrize(("kind", "library"), _cells(kind for kind in ATTACKED if kind not in OTHERS))
def test_a_library_attacks_what_a_mixture_is_made_into(
    kind: str, library: str, made: Callable[[str], nn.Module]
) -> None:
    _needs(ROW, library)
    attacked = made(kind)
    if (kind, library) not in NOT_ATTACKED_AS:
        _check(library, attacked, ROW)
        return
    with pytest.raises(Exception, match=r"grad|depend|is not supported"):
        _check(library, attacked, ROW)


@pytest.mark.parametrize(("_kind", "library"), _cells(OTHERS[:1]))
def test_a_library_on_a_gate_that_draws_is_warned_of(_kind: str, library: str) -> None:
    _needs(ROW, library)
    model = copy.deepcopy(_mixture(ROW)).eval()
    with pytest.warns(SwitchingGateWarning):
        _check(library, model, ROW)


@pytest.mark.parametrize(("_kind", "library"), _cells(OTHERS[1:2]))
def test_a_library_attacks_copies(_kind: str, library: str) -> None:
    _needs(ROW, library)
    exact = _mixture(ROW).deterministic()
    _check(library, copy.deepcopy(exact), ROW)
    _check(library, pickle.loads(pickle.dumps(exact)), ROW)


@pytest.mark.parametrize(("_kind", "library"), _cells(OTHERS[2:]))
def test_a_library_attacks_a_mixture_in_ddp(_kind: str, library: str, tmp_path: Path) -> None:
    _needs(ROW, library)
    if not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch was built without gloo")
    with _one_process(tmp_path):
        attacked = nn.parallel.DistributedDataParallel(copy.deepcopy(_mixture(ROW)).deterministic())
        if ("DDP", library) not in NOT_ATTACKED_AS:
            _check(library, attacked, ROW)
        else:
            with pytest.raises(RuntimeError, match="Expected to"):
                _check(library, attacked, ROW)
        _check(library, copy.deepcopy(attacked.module), ROW)


def test_every_column_and_row_is_tested() -> None:
    assert LIBRARIES.keys() == ATTACKS.keys()
    assert set(OTHERS) < set(ATTACKED)
