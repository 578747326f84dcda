"""Batches that do not fit into memory: smaller ones, as if the run had been begun with them, and nothing else."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from immunity_fast import ImmunityMoE, train
from immunity_fast.training import Trainer, auto_batch
from immunity_fast.training.auto_batch import AutoBatch, is_begun_with, smaller
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.preparation import begin
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from immunity_fast.training.step import TrainStep
from tests.processes import launch
from tests.small_runs import (
    CONFIG,
    CPU,
    dataset,
    error_line,
    interrupted,
    options,
    saved,
    split,
    trained,
    weights,
    write_data,
)

ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99"),
}


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A memory for so many images a batch: the pass is done, statistics, gradients and random numbers, and then fails.

    `where` is the number of the step in which that is seen first.
    """
    limit: dict[str, Any] = {"images": 2, "error": "cuda", "where": 1, "seen": []}
    backward, update = TrainStep._backward, TrainStep.update
    taken = [0]

    def short(self: TrainStep, batch: Any, index: int, count: int) -> Tensor:
        measured = backward(self, batch, index, count)
        limit["seen"].append(len(batch[0]))
        if len(batch[0]) > limit["images"] and taken[0] + 1 >= limit["where"]:
            taken[0] = 0
            raise ERRORS[limit["error"]]()
        return measured

    def counted(self: TrainStep) -> None:
        update(self)
        taken[0] += 1

    monkeypatch.setattr(TrainStep, "_backward", short)
    monkeypatch.setattr(TrainStep, "update", counted)
    return limit


RUN: dict[str, Any] = {"auto-batch": None, "mixup": 0.4, "ema": 0.5, "optimizer": "adamw", "loggers": "none"}


def _options(data: Path, **changes: Any) -> list[str]:
    words = options(data, **({name.replace("-", "_"): value for name, value in RUN.items()} | changes))
    return [word for word in words if word != "None"]


@pytest.mark.parametrize(("error", "where"), [("cuda", 1), ("cpu", 2)])
def test_it_is_the_run_that_was_begun_with_smaller_batches(
    tmp_path: Path, limited: dict[str, Any], error: str, where: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data.npz")
    limited |= {"error": error, "where": where}
    trained([*_options(data), "--out", str(tmp_path / "found")])
    said = [line for line in capsys.readouterr().out.splitlines() if "beginning again" in line.replace("\n", " ")]
    assert len(said) == 2
    limited["images"] = 99
    trained([*_options(data, batch_size=2, accumulate=4), "--out", str(tmp_path / "given")])
    assert saved(tmp_path / "found") == saved(tmp_path / "given")
    config = json.loads(Run(tmp_path / "found").config_file.read_text(encoding="utf-8"))
    assert config == json.loads(Run(tmp_path / "given").config_file.read_text(encoding="utf-8"))
    assert (config["batch_size"], config["accumulate"], config["auto_batch"]) == (2, 4, True)
    records = Run(tmp_path / "found").metrics()
    assert [(record["batch_size"], record["accumulate"], record["step"]) for record in records] == [
        (2, 4, 5),
        (2, 4, 10),
    ]


def test_a_line_says_what_was_found(
    tmp_path: Path, limited: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    limited["images"] = 4
    trained([*_options(write_data(tmp_path / "data.npz")), "--out", str(tmp_path / "run")])
    said = [line for line in capsys.readouterr().out.splitlines() if "beginning again" in line]
    assert said == [
        "out of memory (tried to allocate 2.00 GiB): batches of 8 images do not fit (cpu); beginning again with "
        "--batch-size 4 --accumulate 2: as many images a step, but BatchNorm and position stability see 4"
    ]


def test_a_run_that_goes_on_keeps_what_was_found(tmp_path: Path, limited: dict[str, Any]) -> None:
    arguments = [*_options(write_data(tmp_path / "data.npz"), checkpoint_every=1), "--out", str(tmp_path / "whole")]
    trained(arguments)
    arguments[-1] = str(tmp_path / "stopped")
    interrupted((TrainStep, "update"), 7, arguments)
    limited["seen"].clear()
    trained(["--resume", str(tmp_path / "stopped")])
    assert set(limited["seen"]) == {2}
    assert saved(tmp_path / "stopped") == saved(tmp_path / "whole")


def test_a_model_and_data_of_one_s_own_begin_again_too(limited: dict[str, Any]) -> None:
    def fitted(**settings: Any) -> Trainer:
        torch.manual_seed(4)
        model = ImmunityMoE("resnet8", 2, 3, image_size=12)
        images = split(12).images
        data = [(images[index] / 255, index % 3) for index in range(12)]
        trainer = Trainer(dataclasses.replace(CONFIG, **settings), data, model=model, device="cpu")
        trainer.fit()
        return trainer

    found = fitted(batch_size=6, auto_batch=True)
    assert (found.config.batch_size, found.config.accumulate) == (1, 6)
    given = fitted(batch_size=1, accumulate=6)
    assert found.state is not None
    assert given.state is not None
    assert weights(found.state) == weights(given.state)


@pytest.mark.parametrize(
    ("settings", "images"),
    [({}, 2), ({"auto-batch": None, "batch-size": 2}, 0)],
    ids=["not asked for", "one image is too much"],
)
def test_what_does_not_fit_is_said(
    tmp_path: Path, limited: dict[str, Any], settings: dict[str, Any], images: int, capsys: pytest.CaptureFixture[str]
) -> None:
    limited["images"] = images
    data = write_data(tmp_path / "data.npz")
    given = options(data, **{name.replace("-", "_"): value for name, value in settings.items()})
    arguments = [word for word in given if word != "None"]
    message = error_line(capsys, train.main, [*arguments, "--out", str(tmp_path / "run")])
    assert "out of memory (tried to allocate 2.00 GiB): try a smaller --batch-size, --auto-batch" in message


def test_later_steps_do_not_begin_a_run_again(tmp_path: Path, limited: dict[str, Any]) -> None:
    """It may have hours behind it, and other memory is short then."""
    limited["where"] = auto_batch.FIRST_STEPS + 1
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(dataclasses.replace(CONFIG, auto_batch=True), dataset(), device="cpu").fit()


def test_other_errors_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(TrainStep, "_backward", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        Trainer(dataclasses.replace(CONFIG, auto_batch=True), dataset(), device="cpu").fit()


@pytest.mark.parametrize(
    ("batch", "accumulate", "parts"),
    [
        (128, 1, [(64, 2), (32, 4), (16, 8), (8, 16), (4, 32), (2, 64), (1, 128)]),
        (30, 2, [(15, 4), (5, 12), (1, 60)]),
        (7, 1, [(1, 7)]),
        (1, 3, []),
    ],
)
def test_batches_become_whole_parts_down_to_one(batch: int, accumulate: int, parts: list[tuple[int, int]]) -> None:
    config: TrainConfig | None = TrainConfig(batch_size=batch, accumulate=accumulate)
    found = []
    while config is not None:
        found.append((config.batch_size, config.accumulate))
        config = smaller(config, config.batch_size)
    assert found == [(batch, accumulate), *parts]


def test_a_small_data_set_s_batch_is_what_is_halved(limited: dict[str, Any]) -> None:
    limited["images"] = 10
    trainer = Trainer(dataclasses.replace(CONFIG, batch_size=64, auto_batch=True), dataset(), device="cpu")
    trainer.fit()
    assert (trainer.config.batch_size, trainer.config.accumulate) == (10, 2)
    assert limited["seen"] == [20, 10, 10]


def test_a_restarted_process_knows_the_run_with_other_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = TrainConfig(batch_size=32, auto_batch=True)
    found = dataclasses.replace(asked, batch_size=8, accumulate=4)
    Run.create(tmp_path / "run", found)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begin(asked, tmp_path / "run") == (tmp_path / "run", True, found)
    assert not is_begun_with(found, dataclasses.replace(asked, auto_batch=False))
    assert not is_begun_with(found, dataclasses.replace(asked, lr=1.0))


def test_a_loader_s_batches_are_its_own() -> None:
    loader = torch.utils.data.DataLoader([(torch.rand(3, 12, 12), index % 3) for index in range(8)], batch_size=4)
    with pytest.raises(ValueError, match="auto_batch: expected False beside a loader"):
        Trainer(dataclasses.replace(CONFIG, auto_batch=True), loader, classes=3, device="cpu").fit()


LIMIT = """
import ctypes, dataclasses, resource
from immunity_fast.training import Trainer
from tests.small_runs import CONFIG, CPU, dataset, split
ctypes.CDLL(None).mallopt(-3, 2**16)  # what is freed goes back: a limit of addresses counts what is kept for later, too
size = 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")))
resource.setrlimit(resource.RLIMIT_AS, (size + 300 * 2**20,) * 2)
config = dataclasses.replace(CONFIG, batch_size=256, auto_batch=True, crop_padding=0, beta=0.0, gamma=0.0)
trainer = Trainer(config, dataset(train=split(256, size=32)), device="cpu", progress=True)
trainer.fit()
assert trainer.step == 1, trainer.step
print("ends with", trainer.config.batch_size, trainer.config.accumulate)
"""


@pytest.mark.exhaustive  # ten seconds, of an allocator's own
def test_a_cpu_s_memory_that_ends_is_noticed() -> None:
    """In a process that may have some 300 MiB more than it has, where the step of 256 images takes 1 GiB."""
    said = launch("-c", LIMIT, processes=1).replace("\n", " ")
    assert "of 256 images do not fit (cpu); beginning again with" in said
    batch, accumulate = map(int, said.partition("ends with ")[2].split()[:2])
    assert 4 <= batch <= 128
    assert batch * accumulate == 256


class Kept(torch.autograd.Function):
    """Knows whether its graph is there."""

    graphs: ClassVar[list[weakref.ref[Any]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.sign = lambda: None
        Kept.graphs.append(weakref.ref(ctx.sign))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients


def test_nothing_is_left_of_a_backward_pass_that_failed() -> None:
    """PyTorch keeps what such a pass had still to do, and so its graph, until a later one comes to something older."""
    found = AutoBatch(TrainingState(dataclasses.replace(CONFIG, auto_batch=True), dataset(), CPU), None)

    def short(*_: Any) -> None:
        raise ERRORS["cuda"]()

    first, second = (Kept.apply(torch.ones(2, requires_grad=True)) for _ in range(2))
    second.grad_fn.register_prehook(short)
    tried = None
    try:
        torch.stack([first * 2, second]).sum().backward()
    except torch.OutOfMemoryError as error:
        tried = found.instead(error)
    assert tried is not None
    del first, second
    gc.collect()
    assert [graph() is not None for graph in Kept.graphs] == [True, False], "what this test is about"
    found.begin_again(tried)
    assert [graph() is not None for graph in Kept.graphs] == [False, False]


def test_compiled_steps_begin_again_too(limited: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that runs out of memory is tried in eager mode first, and compiled again behind that."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = Trainer(dataclasses.replace(CONFIG, auto_batch=True, compile="on"), dataset(), device="cpu")
    found.fit()
    given = Trainer(dataclasses.replace(CONFIG, batch_size=2, accumulate=2, compile="on"), dataset(), device="cpu")
    given.fit()
    assert found.state is not None
    assert given.state is not None
    assert found.state.train_step.compiled
    assert limited["seen"][:3] == [4, 4, 2]
    assert weights(found.state) == weights(given.state)
