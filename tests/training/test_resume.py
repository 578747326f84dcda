"""A run that is interrupted, in whatever way and however often, ends as if it had never been."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from immunity_fast import train
from immunity_fast.training import checkpoint, loop
from immunity_fast.training.checkpoint import load_checkpoint
from immunity_fast.training.preparation import CHANGEABLE_ON_RESUME, prepare
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from tests import grids
from tests.processes import launch
from tests.small_runs import (
    STEPS,
    arrays,
    change_config,
    contents,
    counted,
    error_line,
    go_on,
    half_trained,
    interrupted,
    options,
    saved,
    trained,
    write_data,
)
from tests.typed_settings import GIVEN, option_of


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trained([*options(data), "--out", str(folder)])
    left = saved(folder)
    assert left["info"]["epoch"] == 2
    assert left["info"]["step"] == STEPS
    assert [record["epoch"] for record in left["records"]] == [1, 2]
    return left


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been trained and evaluated; tests take copies."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.main([*options(data), "--out", str(folder)])
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def killed_once(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in the middle of its second epoch; tests take copies."""
    folder = half_trained(data, tmp_path_factory.mktemp("runs") / "half")
    assert load_checkpoint(Run(folder).checkpoint)[1]["step"] == 7
    return folder


@pytest.fixture
def half(killed_once: Path, tmp_path: Path) -> Path:
    """A copy of the run that was killed."""
    return Path(shutil.copytree(killed_once, tmp_path / "half"))


# Bit for bit


def test_the_same_command_twice_trains_the_same(whole: dict[str, Any], data: Path, tmp_path: Path) -> None:
    trained([*options(data), "--out", str(tmp_path / "run")])
    assert saved(tmp_path / "run") == whole


def test_a_checkpoint_holds_all_that_a_training_goes_on_with(whole: dict[str, Any]) -> None:
    names = whole["tensors"].keys()
    assert {"loader/position", "loader/generator", "random/torch", "random/gate", "sums"} <= names
    assert any(name.startswith("optimizer/") and name.endswith("momentum_buffer") for name in names)
    assert any(name.endswith("running_var") for name in names)
    assert any(name.startswith("model/gate") for name in names)


@pytest.mark.parametrize(
    ("every", "stops"),
    [
        pytest.param(1, (1,), marks=pytest.mark.exhaustive),
        pytest.param(1, (6,), marks=pytest.mark.exhaustive),
        pytest.param(1, (1, 1, 1), marks=pytest.mark.exhaustive),
        (1, (2, 4, 3)),
        (2, (4, 2)),
        pytest.param(3, (10,), marks=pytest.mark.exhaustive),
        pytest.param(500, (3,), marks=pytest.mark.exhaustive),
        (500, (8, 2, 5)),
    ],
)
def test_interrupted_at_any_steps_it_ends_the_same(
    every: int, stops: tuple[int, ...], whole: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    # Each stop counts an attempt's own steps; without checkpoints inside an epoch, an attempt starts its epoch anew.
    arguments, folder = options(data, checkpoint_every=every), tmp_path / "run"
    for stop in stops:
        interrupted((TrainingState, "advance"), stop, go_on(folder, arguments))
    trained(go_on(folder, arguments))
    assert saved(folder) == whole


@pytest.mark.exhaustive  # by default at steps that are named, between them, while writing, and killed at random moments
def test_interrupted_at_eight_random_places_it_ends_the_same(whole: dict[str, Any], data: Path, tmp_path: Path) -> None:
    # After a step and before its checkpoint, so that some attempts get nowhere.
    chance, arguments, folder = random.Random(3), options(data, checkpoint_every=1), tmp_path / "run"
    for _ in range(8):
        stop = chance.choice([1, 1, 1, 2])
        interrupted((TrainingState, "advance"), stop, go_on(folder, arguments), after=True)
    assert load_checkpoint(Run(folder).checkpoint)[1]["step"] > 0
    trained(go_on(folder, arguments))
    assert saved(folder) == whole


@pytest.mark.parametrize(
    ("where", "count", "after"),
    grids.grid(
        ((loop, "validate"), (Run, "append_metrics")),
        (1, 2),
        (False, True),
        ordinary=lambda where, count, after: (where[0] is Run) + (count == 2) + after in (0, 2),
    ),
)
def test_interrupted_between_steps_it_ends_the_same(
    where: tuple[Any, str], count: int, after: bool, whole: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    arguments, folder = options(data), tmp_path / "run"
    interrupted(where, count, go_on(folder, arguments), after=after)
    trained(go_on(folder, arguments))
    assert saved(folder) == whole


@pytest.mark.parametrize(
    ("count", "function", "after"),
    grids.sampled(
        [
            (count, *way)
            for count in (1, 2, 3, 8)
            for way in (("fsync", False), ("replace", False), ("replace", True))  # not flushed, not renamed, renamed
        ],
        ordinary=lambda *cell: (
            cell
            in [
                (1, "replace", True),
                (2, "fsync", False),
                (3, "replace", False),
                (8, "fsync", False),
                (8, "replace", True),
            ]
        ),
    ),
)
def test_killed_while_writing_it_ends_the_same(
    count: int, function: str, after: bool, whole: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    # Call 1 writes config.json, 2 the first checkpoint, 3 the empty metrics, the others checkpoints after a step.
    arguments, folder = options(data, checkpoint_every=1), tmp_path / "run"
    interrupted((os, function), count, go_on(folder, arguments), after=after)
    if Run(folder).checkpoint.exists():
        load_checkpoint(Run(folder).checkpoint)
    trained(go_on(folder, arguments))
    assert saved(folder) == whole


def test_attacks_on_validation_images_do_not_disturb_it(data: Path, tmp_path: Path) -> None:
    arguments = options(data, check_images=4)
    trained([*arguments, "--out", str(tmp_path / "whole")])
    interrupted((loop, "validate"), 2, [*arguments, "--out", str(tmp_path / "run")])
    trained(["--resume", str(tmp_path / "run")])
    assert saved(tmp_path / "run") == saved(tmp_path / "whole")
    assert "val_pgd10_accuracy_mean" in saved(tmp_path / "run")["records"][1]


def test_a_file_half_written_is_not_taken_for_a_checkpoint(half: Path, whole: dict[str, Any]) -> None:
    checkpoint = Run(half).checkpoint
    content = checkpoint.read_bytes()
    for name in (".last.safetensors.unfinished", "last.safetensors.tmp"):
        checkpoint.with_name(name).write_bytes(content[: len(content) // 2])
    (half / ".config.json.unfinished").write_text("{")
    (half / ".metrics.jsonl.unfinished").write_text("garbage")
    (half.parent / f".{half.name}.a1b2c3").mkdir()
    trained(["--resume", str(half)])
    assert saved(half) == whole


def test_a_record_cut_off_by_a_kill_is_written_again(half: Path, whole: dict[str, Any]) -> None:
    with Run(half).metrics_file.open("a", encoding="utf-8") as file:
        file.write('{"epoch": 2, "loss": 1.')
    trained(["--resume", str(half)])
    assert saved(half) == whole


def test_records_of_epochs_after_the_checkpoint_are_dropped(half: Path, whole: dict[str, Any]) -> None:
    Run(half).append_metrics({"epoch": 2, "loss": -1.0})
    trained(["--resume", str(half)])
    assert saved(half) == whole


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    data: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    interrupted((loop, "save_checkpoint"), 1, [*options(data), "--out", str(folder)])
    assert not Run(folder).checkpoint.exists()
    trained(["--resume", str(folder)])
    assert saved(folder) == whole


@pytest.mark.parametrize("left", ["records", "best", "both", "results.json", "report.html"])
def test_a_trained_run_without_its_last_checkpoint_is_refused(
    left: str, half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(half)
    files = {"records": run.metrics_file, "both": run.metrics_file, "best": run.best_checkpoint}
    named = files.get(left, run.folder / left)
    if left in ("best", "both"):
        shutil.copy(run.checkpoint, run.best_checkpoint)
    if left not in ("records", "both"):
        run.metrics_file.write_bytes(b"")
    if named.parent == run.folder and named != run.metrics_file:
        named.write_bytes(b"{}")
    run.checkpoint.unlink()
    before = contents(half)
    message = error_line(capsys, train.main, ["--resume", str(half)])
    assert f"{run.checkpoint}: there is no such checkpoint" in message
    assert str(named) in message
    assert "--out" in message
    assert contents(half) == before


@pytest.mark.parametrize("kept", [0, 1])
def test_a_run_whose_records_are_missing_is_refused_untouched(
    kept: int, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Run(run).metrics_file
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:kept]))
    before = contents(run)
    assert f"{file}: has {kept} records where 2 epochs were trained" in error_line(
        capsys, train.main, ["--resume", str(run)]
    )
    assert contents(run) == before


def test_a_run_goes_on_where_it_and_its_data_were_moved(
    half: Path, data: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    moved = half.rename(tmp_path / "moved")
    copy = shutil.copy(data, tmp_path / "copy.npz")
    trained(["--resume", str(moved), "--data", str(copy)])
    assert saved(moved) == whole


def test_options_that_repeat_the_settings_are_accepted(half: Path, data: Path, whole: dict[str, Any]) -> None:
    trained([*options(data), "--resume", str(half)])
    assert saved(half) == whole


def test_an_interrupt_says_how_to_go_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingState, "advance", counted(TrainingState.advance, 3, KeyboardInterrupt(), after=False))
    with pytest.raises(KeyboardInterrupt):
        train.main([*options(data), "--out", str(tmp_path / "run")])
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded PyTorch")
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.exhaustive)])
def test_killed_with_sigkill_at_any_moments_it_ends_the_same(data: Path, tmp_path: Path, kills: int) -> None:
    printed = launch("-m", "tests.killing", str(tmp_path), str(data), "0", str(kills), processes=1)
    told = json.loads(printed.splitlines()[-1])
    assert [kill["killed"] for kill in told["kills"]] == [True] * kills
    steps = [kill["step"] for kill in told["kills"]]
    assert steps == sorted(steps)
    whole, killed = saved(tmp_path / "whole"), saved(tmp_path / "killed")
    # Nothing begins anew: what was trained in vain is at most a step an attempt.
    total = whole["info"]["step"]
    assert sum(kill["begun"] for kill in told["kills"]) + told["rest"] <= total + kills
    assert steps[-1] + told["rest"] == total
    assert len(whole["records"]) == total // 5
    assert killed == whole


# A finished run


def test_resuming_a_finished_run_trains_no_more_and_reports_anew(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingState, "advance", None)
    results = Run(run).results_file.read_bytes()
    for file in (Run(run).results_file, Run(run).report, run / "figures" / "heatmaps.png"):
        file.unlink()
    train.main(["--resume", str(run)])
    assert saved(run) == saved(finished)
    assert Run(run).checkpoint.read_bytes() == Run(finished).checkpoint.read_bytes()
    assert Run(run).results_file.read_bytes() == results
    assert Run(run).report.is_file()
    assert (run / "figures" / "heatmaps.png").is_file()


# A full disk


def fails_with_no_space(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    return counted(function, count, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), after=False)


@pytest.mark.parametrize("count", grids.sampled([2, 3, 4, 9], ordinary=lambda count: count in (2, 9)))
def test_on_a_full_disk_it_stops_with_one_line_and_goes_on_later(
    count: int,
    whole: dict[str, Any],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, folder = options(data, checkpoint_every=1), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails_with_no_space(count, os.fsync))
        message = error_line(capsys, train.main, [*arguments, "--out", str(folder)])
    assert os.strerror(errno.ENOSPC) in message
    assert str(folder) in message
    assert not list(folder.rglob("*.unfinished"))
    if count > 2:
        load_checkpoint(Run(folder).checkpoint)
    trained(["--resume", str(folder)])
    assert saved(folder) == whole


def test_on_a_full_disk_no_run_folder_is_begun(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fails_with_no_space(1, os.fsync))
    error_line(capsys, train.main, [*options(data), "--out", str(tmp_path / "runs" / "run")])
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_disk_too_full_for_a_record_leaves_a_run_that_goes_on(
    whole: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"

    def half_a_record(run: Run, record: Any) -> None:
        with run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record)[:40])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "append_metrics", half_a_record)
        error_line(capsys, train.main, [*options(data), "--out", str(folder)])
    trained(["--resume", str(folder)])
    assert saved(folder) == whole


def test_files_that_may_not_grow_stop_it_with_one_line(
    whole: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    folder = tmp_path / "run"
    arguments = [*options(data, checkpoint_every=1), "--out", str(folder)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The first checkpoint, which has no momentum, is half as large as those after a step: room for it alone.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        line = error_line(capsys, train.main, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    reason = f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{Run(folder).checkpoint}'"
    assert line == f"error: training stopped: {reason}; go on with: {Run(folder).resume_command}\n"
    assert load_checkpoint(Run(folder).checkpoint)[1]["step"] == 0
    assert not list(folder.rglob("*.unfinished"))
    trained(["--resume", str(folder)])
    assert saved(folder) == whole


# What cannot go on


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path / "none") in error_line(capsys, train.main, ["--resume", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run" in error_line(capsys, train.main, ["--resume", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"", "config.json"),
        (b"{", "config.json"),
        (b"[]", "config.json"),
        (b"null", "config.json"),
        (b'"text"', "config.json"),
        (b"{}", "arch"),
        (b"\xff\xfe\x00", "config.json"),
    ],
    ids=["empty", "cut", "list", "null", "string", "no settings", "binary"],
)
def test_a_config_that_holds_no_settings_is_refused(
    content: bytes, names: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(run).config_file.write_bytes(content)
    message = error_line(capsys, train.main, ["--resume", str(run)])
    assert names in message
    assert "config.json" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arch", ...),
        ("colour", "red"),
        ("epochs", "2"),
        ("epochs", 2.0),
        ("epochs", 0),
        ("experts", True),
        ("lr", None),
        ("detach_weights", 0),
        ("arch", "resnet9"),
        ("arch", ["resnet8"]),
        ("score", "other"),
    ],
)
def test_a_config_with_a_wrong_setting_is_refused(
    name: str, value: object, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(run, **{name: value})
    message = error_line(capsys, train.main, ["--resume", str(run)])
    assert name in message
    assert "config.json" in message


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _cut_header(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def _longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _garbage(file: Path) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(5000))


def _pickle(file: Path) -> None:
    torch.save({"a": torch.zeros(3)}, file)


def _foreign(file: Path) -> None:
    save_file({"a": torch.zeros(3)}, file)


def _foreign_metadata(file: Path) -> None:
    save_file({"a": torch.zeros(3)}, file, {"immunity_fast": "[1]"})


def _newer(file: Path) -> None:
    save_file({"a": torch.zeros(3)}, file, {"immunity_fast": json.dumps({"format": checkpoint.FORMAT + 1})})


@pytest.mark.parametrize(
    "spoil", [_cut, _cut_header, _longer, _empty, _garbage, _pickle, _foreign, _foreign_metadata, _newer]
)
def test_a_file_that_is_no_checkpoint_is_refused_untouched(
    spoil: Callable[[Path], None], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Run(run).checkpoint
    spoil(file)
    content = file.read_bytes()
    assert str(file) in error_line(capsys, train.main, ["--resume", str(run)])
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("changes", "names"),
    [({"arch": "resnet18"}, "classifier"), ({"experts": 3}, "experts"), ({"stage": "stem"}, "stem")],
)
def test_a_checkpoint_of_another_model_is_refused(
    changes: dict[str, Any], names: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, resume, config = train.parse([*options(data, **changes), "--out", str(tmp_path / "other")])
    trainer, _ = prepare(folder, resume, config)
    checkpoint.save_checkpoint(Run(run).checkpoint, trainer.tensors(), trainer.info())
    message = error_line(capsys, train.main, ["--resume", str(run)])
    assert str(Run(run).checkpoint) in message
    assert names in message


@pytest.mark.parametrize("name", [name for name in GIVEN if name not in CHANGEABLE_ON_RESUME])
def test_another_value_of_a_setting_is_refused(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typed, meant = GIVEN[name]
    assert getattr(Run(run).config(), name) != meant
    option = option_of(name)
    assert f"was begun with {option} " in error_line(capsys, train.main, ["--resume", str(run), option, *typed])


@pytest.mark.parametrize("part", ["train_images", "train_labels", "val_images", "test_images"])
def test_changed_data_are_refused(part: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = arrays()[part].copy()
    changed.flat[0] = (int(changed.flat[0]) + 1) % 3
    other = write_data(tmp_path / "other.npz", **{part: changed})
    assert "other data" in error_line(capsys, train.main, ["--resume", str(run), "--data", str(other)])


def test_metrics_that_are_no_records_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(run).metrics_file.write_bytes(b"\0\0\0\n")
    assert "metrics.jsonl" in error_line(capsys, train.main, ["--resume", str(run)])


def test_a_new_run_and_an_old_one_at_once_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_line(capsys, train.main, ["--resume", str(run), "--out", str(run / "new")], code=2)
    assert "--out" in message
    assert "--resume" in message
    assert not (run / "new").exists()
