"""What the files of a run must hold: anything else is one line that names the file and the entry, before it is used."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from immunity_fast import evaluate, train
from immunity_fast.evaluation.ledger import Ledger
from immunity_fast.training import checkpoint, loop
from immunity_fast.training.checkpoint import load_checkpoint, load_info, load_model, save_checkpoint
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests import evaluated, grids
from tests.small_runs import (
    contents,
    error_line,
    half_trained,
    interrupted,
    options,
    saved,
    trained,
    without_seconds,
    write_data,
)

plain = evaluated.plain
FEW = ["--attacks", "pgd", "--attackers", "mean", "--limit", "4", "--masking-images", "2", "--device", "cpu"]
MOMENTUM = "optimizer/3/momentum_buffer"
STEM = "model/experts.stem.0.weight"
Change = Callable[[dict[str, Tensor], dict[str, Any]], object]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained and evaluated; tests take copies."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trained([*options(data), "--out", str(folder)])
    evaluate.main([str(folder), *FEW])
    return folder


@pytest.fixture(scope="module")
def stopped(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed in its second epoch, after step 7; tests take copies."""
    return half_trained(data, tmp_path_factory.mktemp("runs") / "stopped")


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(whole, tmp_path / "finished")))


@pytest.fixture
def half(stopped: Path, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(stopped, tmp_path / "half")))


def change(file: Path, how: Change) -> None:
    tensors, info = load_checkpoint(file)
    how(tensors, info)
    save_checkpoint(file, tensors, info)


def put(name: str, function: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors, _info: tensors.update({name: function(tensors[name])})


def tell(**values: Any) -> Change:
    return lambda _tensors, info: info.update(values)


def lose(name: str) -> Change:
    return lambda tensors, info: (tensors if name in tensors else info).pop(name)


def describe(**values: Any) -> Change:
    """Of another model; the classes' names, which would tell, are gone where that is asked for."""

    def told(_tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        if values.get("classes") is ...:
            info.pop("classes")
        info["model"].update({name: value for name, value in values.items() if value is not ...})

    return told


# A checkpoint that a run is to go on with

UNFIT: list[tuple[Change, str]] = [
    (put(MOMENTUM, lambda t: t[:1]), MOMENTUM),
    (put(MOMENTUM, lambda t: torch.cat([t, t])), MOMENTUM),
    (put(MOMENTUM, lambda t: t[None]), MOMENTUM),
    (put(MOMENTUM, lambda t: t.double()), f"{MOMENTUM}: expected dtype float32, got float64"),
    (put(MOMENTUM, lambda t: t.to(torch.int32)), MOMENTUM),
    (put(MOMENTUM, lambda t: torch.zeros(())), MOMENTUM),
    (put(MOMENTUM, lambda t: t * torch.nan), f"NaN or infinite, from which nothing can go on ({MOMENTUM})"),
    (put(MOMENTUM, lambda t: t + torch.inf), f"NaN or infinite, from which nothing can go on ({MOMENTUM})"),
    (put("sums", lambda t: t * torch.nan), "NaN or infinite, from which nothing can go on (sums)"),
    (lose(MOMENTUM), MOMENTUM),
    (lambda tensors, _: tensors.update({"optimizer/9999/momentum_buffer": torch.zeros(3)}), "optimizer/9999"),
    (lambda tensors, _: tensors.update({"optimizer/3/exp_avg": tensors[MOMENTUM]}), "optimizer/3/exp_avg"),
    (lambda tensors, _: tensors.update({"optimizer/x": torch.zeros(3)}), "optimizer/x"),
    (lambda tensors, _: tensors.update({"more": torch.zeros(3)}), "more"),
    (put(STEM, lambda t: t.to(torch.int32)), f"{STEM}: expected dtype float32, got int32"),
    (put(STEM, lambda t: t.double()), f"{STEM}: expected dtype float32, got float64"),
    (put(STEM, lambda t: t[:1]), f"{STEM}: expected shape (2, 16, 3, 3, 3), got (1,"),
    (put("sums", lambda t: t[:1]), "sums: expected shape (4,), got (1,)"),
    (put("sums", lambda t: t.float()), "sums: expected dtype float64, got float32"),
    (lose("random/torch"), "random/torch"),
    (lose("random/gate"), "random/gate"),
    (lose("loader/generator"), "loader/generator"),
    (lose("loader/position"), "loader/position"),
    (put("random/torch", lambda t: t[:-1]), "random/torch"),
    (put("random/torch", lambda t: t.new_full(t.shape, 255)), "random/torch"),
    (put("random/gate", lambda t: torch.cat([t[:16], t.new_full((8,), 9), t[24:]])), "random/gate"),
    (put("loader/position", lambda _: torch.tensor(-5)), "loader/position -5"),
    (put("loader/position", lambda _: torch.tensor(9999)), "loader/position 9999"),
    (put("loader/position", lambda _: torch.tensor(2.0)), "loader/position"),
    (put("loader/position", lambda _: torch.tensor(3)), "loader/position 3"),
    (put("loader/position", lambda _: torch.tensor([2])), "loader/position"),
    (tell(epoch=77), "epoch 77"),
    (tell(epoch=0), "epoch 0, step 7"),
    (tell(epoch=-1), "epoch was -1"),
    (tell(epoch=True), "epoch was True"),
    (tell(epoch="1"), "epoch was 1"),
    (tell(epoch=1.0), "epoch was 1.0"),
    (tell(epoch=None), "epoch was None"),
    (tell(step=8), "step 8"),
    (tell(step=10**30), "step was"),
    (tell(epoch=2, step=10), "epoch 2, step 10, loader/position 2"),
    (lose("epoch"), "epoch is missing"),
    (lose("step"), "step is missing"),
    (lose("data"), "data is missing"),
    (lose("model"), "model is missing"),
    (tell(data=3), "data was 3"),
    (tell(momenta=36), "has 35 of 36 momentum buffers"),
    (tell(momenta=-1), "momenta was -1"),
    (tell(model=[]), "model was []"),
    (tell(classes=["a", "b"]), "classes"),
    (tell(classes=[1, 2, 3]), "classes"),
    (tell(classes="abc"), "classes"),
    (tell(classes=["x", "y", "z"]), "names other classes than the data: ['x', 'y', 'z'], ['0', '1', '2']"),
    (describe(num_experts=10**6), "num_experts"),
    (describe(num_experts="2"), "num_experts"),
    (describe(extra=1), "extra"),
]


@pytest.mark.parametrize(
    ("how", "named"), grids.each(3, UNFIT), ids=[f"{number} {named}" for number, (_, named) in enumerate(UNFIT)]
)
def test_a_checkpoint_that_no_run_has_written_is_refused(
    how: Change, named: str, half: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    change(half.checkpoint, how)
    before = contents(half.folder)
    message = error_line(capsys, train.main, ["--resume", str(half.folder)])
    assert str(half.checkpoint) in message
    assert named in message
    assert contents(half.folder) == before


def test_a_momentum_of_another_shape_ends_no_process(half: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the check PyTorch's fused optimiser wrote beyond its end: a signal, which would end these tests."""
    change(half.checkpoint, put(MOMENTUM, lambda t: t[:1]))
    message = error_line(capsys, train.main, ["--resume", str(half.folder)])
    assert f"{half.checkpoint}: of another architecture: {MOMENTUM}: expected shape" in message


def test_the_scaler_of_float16_is_checked(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, run = trained([*options(data, amp="fp16", epochs=1), "--out", str(tmp_path / "run")])
    whole = run.checkpoint.read_bytes()
    for how, named in (
        (put("scaler/scale", lambda t: t * 0), "scaler/scale: expected a finite number above 0, got 0.0"),
        (put("scaler/scale", lambda t: t.long()), "scaler/scale"),
        (lose("scaler/_growth_tracker"), "scaler/_growth_tracker"),
    ):
        run.checkpoint.write_bytes(whole)
        change(run.checkpoint, how)
        assert named in error_line(capsys, train.main, ["--resume", str(run.folder)])


def test_a_network_with_parameters_without_a_gradient_goes_on(data: Path, tmp_path: Path) -> None:
    """The cells of this genotype leave their first input aside, and with it the layers before it."""
    cell = [["skip_connect", 1], ["sep_conv_3x3", 1]] * 4
    genotype = tmp_path / "cell.json"
    genotype.write_text(json.dumps({"kind": "darts", "normal": cell, "reduce": cell, "channels": 2, "cells": 5}))
    arguments = options(data, arch=genotype, experts=1, beta=0.0, gamma=0.0, stage="stem", epochs=1, checkpoint_every=1)
    interrupted((TrainingState, "advance"), 3, [*arguments, "--out", str(tmp_path / "run")])
    tensors, info = load_checkpoint(Run(tmp_path / "run").checkpoint)
    assert 0 < info["momenta"] == sum(name.startswith("optimizer/") for name in tensors)
    trainer, _ = trained(["--resume", str(tmp_path / "run")])
    assert info["momenta"] < len(list(trainer.model.parameters()))
    trained([*arguments, "--out", str(tmp_path / "whole")])
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")


def test_a_checkpoint_of_an_earlier_version_is_taken(half: Run, whole: Path) -> None:
    change(half.checkpoint, lose("classes"))
    change(half.checkpoint, lose("momenta"))
    trained(["--resume", str(half.folder)])
    assert saved(half.folder) == saved(whole)


# A model that is to be loaded

UNMADE: list[tuple[Change, str]] = [
    (describe(num_experts=10**6), "expected shape (1000000, "),
    (describe(num_experts=0), "num_experts"),
    (describe(num_experts=2.0), "num_experts"),
    (describe(num_classes=10**9, classes=...), "expected shape (2, 1000000000"),
    (describe(num_classes=10**18, classes=...), "cannot be made"),
    (describe(num_classes=1), "num_classes"),
    (describe(arch="resnet9"), "resnet9"),
    (describe(arch=["resnet8"]), "arch"),
    (describe(arch="{" + '"a":{' * 5000), "cannot be made"),
    (describe(arch="resnet18"), "of another architecture"),
    (describe(stage="nope"), "nope"),
    (describe(stage=3), "stage"),
    (describe(image_size=[12]), "image_size"),
    (describe(image_size=[10**12, 10**12]), "cannot be made"),
    (describe(image_size=[1, 1], stage=None), "cannot be made"),
    (describe(image_size="ab"), "image_size"),
    (lambda _, info: info["model"].pop("stage"), "model was"),
    (lose("model"), "model is missing"),
    (tell(model=None), "model was None"),
    (put(STEM, lambda t: t.to(torch.int32)), f"{STEM}: expected dtype float32, got int32"),
    (put(STEM, lambda t: t.half()), f"{STEM}: expected dtype float32, got float16"),
    (lose(STEM), f"{STEM}: expected shape (2, 16, 3, 3, 3), got none"),
    (lambda tensors, _: tensors.update({"model/more": torch.zeros(1)}), "model/more"),
]


@pytest.mark.parametrize(("how", "named"), UNMADE, ids=[f"{n} {named}" for n, (_, named) in enumerate(UNMADE)])
def test_a_model_that_is_not_what_its_info_says_is_refused(how: Change, named: str, finished: Run) -> None:
    change(finished.checkpoint, how)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="last") as error:
        load_model(finished.folder)
    assert time.perf_counter() - begin < 5
    message = str(error.value)
    assert str(finished.checkpoint) in message
    assert named in message
    assert "\n" not in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (tell(epoch=77), "epoch 77"),
        (tell(epoch=2, step=1), "step 1"),
        (lose("step"), "step is missing"),
        (lose("data"), "data is missing"),
        (tell(epoch="2"), "epoch was 2"),
        (describe(num_experts=3), "num_experts"),
        (describe(arch="resnet18"), "resnet18"),
    ],
)
def test_a_last_checkpoint_that_is_not_this_runs_is_named(
    how: Change, named: str, finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished.checkpoint, finished.best_checkpoint)
    change(finished.checkpoint, how)
    message = error_line(capsys, evaluate.main, [str(finished.folder), *FEW])
    assert str(finished.checkpoint) in message
    assert str(finished.best_checkpoint) not in message
    assert named in message


def test_a_wrong_best_is_not_called_the_last(
    finished: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, other = trained([*options(data, experts=3, epochs=1), "--out", str(tmp_path / "other")])
    shutil.copy(other.checkpoint, finished.best_checkpoint)
    message = error_line(capsys, evaluate.main, [str(finished.folder), *FEW])
    assert f"{finished.best_checkpoint}: of another run" in message
    assert str(finished.checkpoint) not in message


def test_a_checkpoint_that_may_not_be_read_is_not_called_missing(
    finished: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = Path.open

    def forbidden(path: Path, *arguments: Any, **keywords: Any) -> Any:  # root may read everything
        if path == finished.checkpoint:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", forbidden)
    for command, arguments in (
        (train.main, ["--resume", str(finished.folder)]),
        (evaluate.main, [str(finished.folder)]),
    ):
        message = error_line(capsys, command, arguments)
        assert os.strerror(errno.EACCES) in message
        assert str(finished.checkpoint) in message
        assert "No such file" not in message


@pytest.mark.parametrize("metadata", [None, "", "[" * 100_000, '{"format": 2, "a": ' + "[" * 100_000, "3", "\ud7ff"])
def test_metadata_that_say_nothing_are_refused(metadata: str | None, finished: Run) -> None:
    save_file({"a": torch.zeros(1)}, finished.checkpoint, None if metadata is None else {"immunity_fast": metadata})
    for load in (load_checkpoint, load_info, load_model):
        with pytest.raises(ValueError, match=r"last\.safetensors: not a checkpoint of immunity_fast"):
            load(finished.checkpoint)


# Names of the classes


def test_a_checkpoint_and_the_report_name_the_classes(tmp_path: Path, plain: None) -> None:
    names = ["<cat>", "größer", "a, b"]
    file = write_data(tmp_path / "data.npz", classes=names)
    run = Run(tmp_path / "run")
    train.main([*options(file, epochs=1), "--out", str(run.folder)])
    assert load_info(run.checkpoint)["classes"] == names
    assert load_model(run.folder)[1]["classes"] == names
    report = run.report.read_text(encoding="utf-8")
    assert "<cat>, größer, a, b" in unescape(report)
    assert "<cat>" not in report


# Records, pieces and what else is JSON

DEEP = b"[" * 100_000
BAD_LINES = [b"\0\xff\0", b"", b"null", b"3", b"[]", b"{}", DEEP, b'{"epoch": 1', b'{"epoch": "1"}', b'{"epoch": true}']
BAD_LINES += [b'{"epoch": 1.0}', b'{"epoch": 2}', b'{"epoch": 1, "loss": "small"}', b'{"epoch": 1, "loss": null}']
BAD_LINES += [b'{"epoch": 1, "val_not_measured": ["x"]}', b'{"epoch": 1, "val_not_measured": {"pgd10": 1}}']
BAD_LINES += [b'{"epoch": 1, "loss": []}', b'{"epoch": 1, "loss": 1' + b"0" * 400 + b"}", b'{"epoch": 1, "a": ' + DEEP]


@pytest.mark.parametrize(("command", "number"), grids.every(3, ("train", "evaluate"), range(len(BAD_LINES))))
def test_a_line_that_is_no_record_is_named(
    command: str, number: int, finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = finished.metrics_file.read_bytes().splitlines()
    finished.metrics_file.write_bytes(BAD_LINES[number] + b"\n" + lines[1] + b"\n")
    before = contents(finished.folder)
    main, arguments = (train.main, ["--resume"]) if command == "train" else (evaluate.main, FEW)
    message = error_line(capsys, main, [*arguments, str(finished.folder)])
    assert f"{finished.metrics_file}: line 1 is" in message
    assert {name: kept for name, kept in contents(finished.folder).items() if name in before} == before


def test_what_was_not_measured_may_be_said_in_a_record(finished: Run) -> None:
    records = finished.metrics()
    records[0]["val_not_measured"] = {"pgd10": "the network is dead"}
    del records[0]["val_accuracy_mean"]
    finished.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert finished.metrics() == records
    evaluate.main([str(finished.folder), *FEW])


def test_records_with_former_names_are_read_under_present_ones(finished: Run) -> None:
    records = finished.metrics()
    text = finished.metrics_file.read_text(encoding="utf-8")
    assert "val_accuracy_sample" in text
    finished.metrics_file.write_text(text.replace("val_accuracy_sample", "val_accuracy_switching"), encoding="utf-8")
    assert finished.metrics() == records
    finished.forget_metrics_after(len(records))
    assert finished.metrics_file.read_text(encoding="utf-8") == text, "a run that goes on has one name for one thing"


@pytest.mark.parametrize("lines", [(0, 0, 1), (1, 0), (0, 1, 1)])
def test_records_twice_or_out_of_order_are_named(
    lines: tuple[int, ...], finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    records = finished.metrics_file.read_bytes().splitlines(keepends=True)
    finished.metrics_file.write_bytes(b"".join(records[number] for number in lines))
    message = error_line(capsys, train.main, ["--resume", str(finished.folder)])
    wrong = next(number for number, line in enumerate(lines, start=1) if line + 1 != number)
    assert f"{finished.metrics_file}: line {wrong} is of epoch {lines[wrong - 1] + 1}" in message


def spoilt_pieces() -> list[Callable[[dict[str, Any]], object]]:
    """Ways in which a piece is none."""
    return [
        lambda piece: piece.clear(),
        lambda piece: piece.update(right=5),
        lambda piece: piece.update(right={}),
        lambda piece: piece.update(loss="1"),
        lambda piece: piece.update(loss=10**400),
        lambda piece: piece.update(seconds=None, points=None),
        lambda piece: piece.update(heatmaps={}, points=[{}]),
        lambda piece: piece.update(heatmaps=None, points=[]),
        lambda piece: piece.update(right={"mean": "01"}, points=3),
        lambda piece: [_spoil_bits(found) for found in piece.get("points", [piece])],
    ]


def _spoil_bits(found: dict[str, Any]) -> None:
    found["right"] = {judge: bits[:-1] + "2" for judge, bits in found["right"].items()}


@pytest.mark.parametrize(
    "first", [pytest.param(k, marks=() if k % 5 == 0 else pytest.mark.exhaustive) for k in range(len(spoilt_pieces()))]
)
def test_a_piece_that_is_none_is_computed_again(first: int, finished: Run, plain: None) -> None:
    """Each piece spoilt in another way, beginning with the `first`."""
    spoils = itertools.islice(itertools.cycle(spoilt_pieces()), first, None)
    file, results = finished.folder / "evaluation.jsonl", finished.results_file
    right = without_seconds(results)
    spoilt = []
    for line, spoil in zip(file.read_text(encoding="utf-8").splitlines(), spoils, strict=False):
        piece = json.loads(line)
        key = piece.pop("key")
        spoil(piece)
        spoilt.append(json.dumps({"key": key} | piece))
    file.write_text("\n".join(spoilt) + "\n", encoding="utf-8")
    evaluate.main([str(finished.folder), *FEW])
    assert without_seconds(results) == right
    pieces = Ledger(file).pieces
    assert len(pieces) == len(spoilt)
    evaluate.main([str(finished.folder), *FEW])
    assert Ledger(file).pieces == pieces, "what was computed again counts"


def test_a_config_nested_without_end_is_one_line(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (DEEP, b'{"arch": ' + DEEP, json.dumps({"arch": "{" + "[" * 50_000}).encode()):
        finished.config_file.write_bytes(content)
        for main, arguments in ((train.main, ["--resume"]), (evaluate.main, [])):
            message = error_line(capsys, main, [*arguments, str(finished.folder)])
            assert str(finished.config_file) in message
            assert len(message) < 1000


# A full disk


@pytest.mark.exhaustive  # by default records, and files that may not grow, which test_resume.py has
def test_on_a_full_disk_the_file_is_named_and_nothing_is_left(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full at one file after the other; each command goes on where the one before had to stop."""
    fsync, out = os.fsync, tmp_path / "out"

    def full(name: str, descriptor: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    for name in ("evaluation.jsonl", "heatmaps.png", "robustness.png", "curves.png", "report.html"):
        monkeypatch.setattr(os, "fsync", partial(full, name))
        message = error_line(capsys, evaluate.main, [str(finished.folder), *FEW, "--out", str(out)])
        assert os.strerror(errno.ENOSPC) in message
        assert name in message
        assert str(out) in message
        assert not [file for file in out.rglob("*") if file.is_file() and (name in file.name) and file.stat().st_size]
        assert not list(out.rglob(".*"))
    monkeypatch.setattr(os, "fsync", fsync)
    evaluate.main([str(finished.folder), *FEW, "--out", str(out)])
    assert without_seconds(out / "results.json") == without_seconds(finished.results_file)


def test_on_a_full_disk_the_records_are_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsync, run = os.fsync, Run(tmp_path / "run")

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/metrics.jsonl"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = error_line(capsys, train.main, [*options(data), "--out", str(run.folder)])
    assert str(run.metrics_file) in message
    assert run.metrics_file.read_bytes() == b""


# TensorBoard


def test_tensorboard_shows_each_epoch_once_after_a_kill(data: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "run"
    interrupted((loop, "save_checkpoint"), 3, [*options(data), "--out", str(folder)])  # after epoch 2's record
    trained(["--resume", str(folder)])
    shown = accumulator.EventAccumulator(str(Run(folder).tensorboard))
    shown.Reload()
    assert [event.step for event in shown.Scalars("loss")] == [1, 2]
    assert [event.value for event in shown.Scalars("loss")] == pytest.approx(
        [record["loss"] for record in Run(folder).metrics()]
    )


def test_the_format_has_not_changed() -> None:
    assert checkpoint.FORMAT == 2, "checkpoints of earlier versions are taken: what is new in them may be missing"
