"""What the tests of the command that evaluates share: a finished run, a user's networks, and what results say."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast import train
from immunity_fast.evaluation import report, runner
from immunity_fast.evaluation.report import Outputs
from immunity_fast.evaluation.runner import Evaluation, Plan
from immunity_fast.training import run_evaluation
from immunity_fast.training.checkpoint import load_checkpoint, save_checkpoint
from immunity_fast.training.run_folder import Run
from tests import sketches
from tests.small_runs import options

ATTACKED = 7
FEW = ["--device", "cpu", "--attacks", "fgsm", "--attackers", "sample,mean", "--masking-images", "0"]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been trained and evaluated; tests take copies."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "CURVE_STEPS", 4)
        place = run_evaluation, "AFTER_TRAINING"
        patch.setattr(*place, sketches.WHOLE[place])
        train.main([*options(data, lr=0.02, attack_images=ATTACKED), "--out", str(folder)])
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(finished, tmp_path / "run")))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, which take most of an evaluation's time."""
    monkeypatch.setattr(report, "_figures", lambda *_: [])


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def accuracy_of(folder: Path) -> dict[tuple[str, str | None, str], dict[str, Any]]:
    """The entries by attack, attacker and judge, but for the time they took."""
    entries = [{k: v for k, v in entry.items() if k != "seconds"} for entry in results_of(folder)["accuracy"]]
    found = {(entry["attack"], entry["attacker"], entry["judge"]): entry for entry in entries}
    assert len(found) == len(entries)
    return found


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def count_correct(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> int:
    with torch.no_grad():
        return int((network(images).argmax(-1) == labels).sum())


def attacks_made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The attacks that are made from now on: (attack, attacker)."""
    made: list[tuple[str, str]] = []
    original = Evaluation.attacked

    def attacked(self: Evaluation, row: Any, *arguments: Any) -> Tensor:
        if row.attack:
            made.append((row.attack, row.attacker))
        return original(self, row, *arguments)

    monkeypatch.setattr(Evaluation, "attacked", attacked)
    return made


def perturb(source: Path, target: Path, spread: float) -> None:
    """A checkpoint with noise on its weights."""
    tensors, info = load_checkpoint(source)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: value + spread * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in tensors.items()
        if name.startswith("model/") and "running" not in name
    }
    save_checkpoint(target, tensors | noisy, info)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Plan, Outputs]]:
    """Instead of evaluating: (target, plan, outputs) of each evaluation."""
    calls: list[tuple[Any, Plan, Outputs]] = []
    monkeypatch.setattr(
        run_evaluation,
        "evaluate",
        lambda target, _, plan, outputs, *__, **___: calls.append((target, plan, outputs)) or {},
    )
    return calls


NETWORKS = '''
"""What a user may have."""

from types import SimpleNamespace

import torch
from torch import nn

from immunity_fast.training.checkpoint import load_model
from immunity_fast.models.moe import ImmunityMoE, SingleNetwork

MADE = []


class Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(30.0))
        self.dropout = nn.Dropout(0.9)

    def forward(self, images):
        return self.dropout(self.scale * images.mean((2, 3)))


class Holder:
    network = Brightness()


instance = Brightness()
number = 3
broken = None
folder = None


def make():
    MADE.append(Brightness())
    return MADE[-1]


def plain():
    return lambda images: 30 * images.mean((2, 3))


def blurred():
    return lambda images: 30 * images.mean((2, 3)) + 2 * torch.randn(len(images), 3)


def mixture():
    return load_model(folder)[0]


def single():
    torch.manual_seed(0)
    return SingleNetwork("resnet8", 3, image_size=12)


WEIGHTS = torch.eye(3)


def of_weights():
    return lambda images: 30 * images.mean((2, 3)) @ WEIGHTS


def in_an_object():
    return lambda images: SimpleNamespace(logits=30 * images.mean((2, 3)))


def in_a_tuple():
    return lambda images: (30 * images.mean((2, 3)), images)


def features_alone():
    return lambda images: {"features": images.mean((2, 3))}


def no_gradient_in_the_dark():
    def network(images):
        dark = images.amax((1, 2, 3)) < 0.2
        return torch.where(dark[:, None], torch.tensor([1.0, 0, 0]), 30 * images.mean((2, 3)))

    return network


def one_channel():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def in_bfloat16():
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(torch.bfloat16)


def four_classes():
    return lambda images: torch.cat([images.mean((2, 3)), images[:, :1, 0, 0]], 1)


def mixture_of_four_classes():
    return ImmunityMoE("resnet8", 2, 4, image_size=12).eval()


def constant():
    return lambda images: 0 * images.mean((2, 3)) + torch.tensor([1.0, 0, 0])


def detached():
    return lambda images: images.mean((2, 3)).detach()


def nan_for_one():
    def network(images):
        same = (images - broken).abs().amax((1, 2, 3)) < 1e-6
        return (30 * images.mean((2, 3))).where(~same[:, None], torch.nan)

    return network


def makes_a_number():
    return 3


class OfClasses(Brightness):
    def __init__(self, num_classes):
        assert num_classes == 3
        super().__init__()


def takes_images(images):
    return 30 * images.mean((2, 3))


def misses_a_package():
    import package_that_is_not_there
'''


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A user's module, which can be imported."""
    folder, name = tmp_path_factory.mktemp("networks"), "networks_of_a_user"
    (folder / f"{name}.py").write_text(NETWORKS, encoding="utf-8")
    (folder / f"{name}_that_fail.py").write_text("import package_that_is_not_there\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module(name)
    del sys.modules[name]


def network_options(networks: ModuleType, name: str, data: Path, out: Path) -> list[str]:
    arguments = ["--dataset", "npz", "--data", str(data), "--out", str(out), "--device", "cpu"]
    return [f"{networks.__name__}:{name}", *arguments, "--attacks", "fgsm", "--limit", "6", "--masking-images", "0"]
