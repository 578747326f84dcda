"""Systems that lack what Linux has: everything can be imported, trained, attacked and saved all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import REPOSITORY

# Other packages come first: what they need of a system is their own matter.
PROGRAM = """
import importlib, os, pkgutil, signal, sys
from pathlib import Path

import jinja2, matplotlib.figure, matplotlib.textpath, PIL.Image, rich.progress, safetensors.torch, sklearn.datasets
import torch, torch.profiler

folder, missing = Path(sys.argv[1]), sys.argv[2:]
for name in missing:
    where, _, attribute = name.partition(".")
    if attribute:
        delattr(sys.modules[where], attribute)
    else:
        sys.modules[where] = None

import immunity_fast

names = [module.name for module in pkgutil.walk_packages(immunity_fast.__path__, "immunity_fast.")]
assert len(names) > 50, names
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # a kernel is nothing without its language
        assert error.name == "triton" and name.startswith("immunity_fast.kernels."), (name, error)

from immunity_fast.attacks import pgd
from immunity_fast.data.datasets import load
from immunity_fast.runtime.compilation import keep_caches
from immunity_fast.training.checkpoint import load_checkpoint
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.loop import train
from immunity_fast.training.preparation import begin, prepare
from immunity_fast.reproduction.jobs import describe

config = TrainConfig(experts=2, epochs=1, limit_train=8, batch_size=4, check_images=0, device="cpu")
trainer, run = prepare(*begin(config, folder / "run"))
with run.locked():
    train(trainer, run)
assert trainer.step == 2
assert load_checkpoint(run.checkpoint)[1]["step"] == 2

images, labels = trainer.dataset.test.images[:2] / 255, trainer.dataset.test.labels[:2]
attacked = pgd(trainer.model.eval(), images, labels, steps=2)
assert attacked.shape == images.shape
assert "cores" in describe(torch.device("cpu"))

os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
os.environ["XDG_CACHE_HOME"] = str(folder / "run" / "config.json")  # no folder, so it is among the temporary files
assert keep_caches().parent.name.startswith("immunity_fast")
"""
UNIX = ["fcntl", "pwd", "resource", "os.sched_getaffinity", "os.getuid", "os.sysconf", "signal.SIGHUP"]


@pytest.mark.exhaustive  # a process that imports and trains; the workflow runs it
@pytest.mark.parametrize(
    "missing",
    [
        pytest.param([*UNIX, "triton"], id="windows"),  # all that macOS lacks, too
        pytest.param(["resource", "os.sched_getaffinity", "triton"], id="macos", marks=pytest.mark.exhaustive),
    ],
)
def test_it_works_where_a_system_lacks_what_linux_has(missing: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), *missing]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
