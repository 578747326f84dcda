"""What the command that evaluates refuses, in one line, and what of a run's files it can do without."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from immunity_fast import evaluate, train
from immunity_fast.data.datasets import load
from immunity_fast.data.sampling import sample_order
from immunity_fast.evaluation.report import Outputs
from immunity_fast.evaluation.runner import Plan
from immunity_fast.training.checkpoint import load_checkpoint, save_checkpoint
from immunity_fast.training.preparation import prepare
from immunity_fast.training.run_folder import Run
from tests import evaluated
from tests.evaluated import FEW, accuracy_of, file_bytes, network_options, perturb
from tests.small_runs import arrays, change_config, error_line, options, trained, write_data

asked = evaluated.asked
finished = evaluated.finished
networks = evaluated.networks
plain = evaluated.plain
run = evaluated.run


# What it refuses


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "expected what can be imported, got "),
        ("Holder.missing", "expected what can be imported, got "),
        ("", "expected what can be imported, got "),
        ("number", "expected a network or a function that makes one, got int"),
        ("makes_a_number", "expected it to make a network, got int"),
        ("takes_images", "expected it to make a network, got AttributeError"),
        ("features_alone", "expected outputs (B, 3), as many as there are classes, got dict of features"),
        ("four_classes", "expected outputs (B, 3), as many as there are classes, got (6, 4)"),
        ("mixture_of_four_classes", "expected outputs (B, 3), as many as there are classes, got (6, 4)"),
        ("constant", "expected outputs that depend on the images"),
        ("detached", "expected outputs with a gradient"),
        (
            "one_channel",
            "model: expected a network that takes images (B, 3, 12, 12) of torch.float32 in [0, 1], got",
        ),
        (
            "in_bfloat16",
            "model: expected a network that takes images (B, 3, 12, 12) of torch.float32 in [0, 1], got",
        ),
    ],
)
def test_what_is_no_network_for_the_data_is_refused_in_one_line(
    networks: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert message in error_line(capsys, evaluate.main, network_options(networks, name, data, tmp_path / "out"))
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    "place",
    [
        "no_such_module:network",
        "no.such.module:network",
        ":network",
        "networks_of_a_user_that_fail:network",
        "networks_of_a_user:misses_a_package",
        ".relative:network",
    ],
)
def test_a_module_that_cannot_be_imported_is_refused(
    networks: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    arguments = [place, *network_options(networks, "", data, tmp_path / "out")[1:]]
    message = error_line(capsys, evaluate.main, arguments)
    assert place in message or "package_that_is_not_there" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["dataset", "out"])
def test_a_network_needs_a_data_set_and_a_folder(
    networks: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    arguments = network_options(networks, "instance", data, tmp_path / "out")
    place = arguments.index(f"--{missing}")
    del arguments[place : place + 2]
    assert f"--{missing}: missing" in error_line(capsys, evaluate.main, arguments)


def test_a_data_set_that_lies_somewhere_needs_a_path(
    networks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"{networks.__name__}:instance", "--dataset", "npz", "--out", str(tmp_path / "out")]
    assert "npz" in error_line(capsys, evaluate.main, arguments)
    assert not (tmp_path / "out").exists()


WRONG = [
    ("--attacks", "nonsense", "--attacks: expected some of fgsm, bim"),
    ("--attacks", "nonsense", ", got nonsense"),
    ("--attacks", "fgsm,", "--attacks: expected"),
    ("--attackers", "nonsense", "--attackers: expected some of"),
    ("--attackers", "mean,transfer,output", "--attackers: expected "),
    ("--attackers", "fixed,mean", "--attackers: expected off, as it is called now, got fixed"),
    ("--attackers", "single", "--attackers: expected sample, as it is called now, got single"),
    ("--eps", "-1", "eps: expected a finite number of at least 0, got -1"),
    ("--eps", "-0.1", "eps: expected a finite number of at least 0, got -0.1"),
    ("--eps", "nan", "eps: expected a finite number of at least 0, got nan"),
    ("--eps", "inf", "eps: expected a finite number of at least 0, got inf"),
    ("--limit", "0", "--limit: expected at least 1, got 0"),
    ("--limit", "-1", "--limit: expected at least 1, got -1"),
    ("--draws", "0", "--draws: expected at least 1, got 0"),
    ("--draws", "10001", "--draws: expected at most 10000, got 10001"),
    ("--masking-images", "-1", "--masking-images: expected at least 0, got -1"),
    ("--queries", "0", "--queries: expected at least 1, got 0"),
    ("--autoattack-steps", "0", "--autoattack-steps: expected at least 1, got 0"),
    ("--seed", "-1", "--seed: expected at least 0, got -1"),
    *(
        (f"--{name}", str(10**30), f"--{name}: expected at most 2⁶³ − 1, got a number of 31 digits")
        for name in ("seed", "limit", "draws", "masking-images", "queries", "autoattack-steps")
    ),
    ("--seed", str(2**63), "--seed: expected at most 2⁶³ − 1"),
    ("--eps", "8", "--eps: expected at most 1, as images are in [0, 1], got 8; of 255 levels: 8/255"),
    ("--eps", "1.01", "--eps: expected at most 1, as images are in [0, 1], got 1.01"),
    ("--transfer-from", "no run", "no run"),
    ("--device", "meta", "--device meta"),
    ("--data", "none.npz", "none.npz"),
]


@pytest.mark.parametrize(("option", "value", "message"), WRONG)
@pytest.mark.parametrize("of_run", [True, False], ids=["run", "network"])
def test_a_value_out_of_its_range_is_refused(
    run: Run,
    networks: ModuleType,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    message: str,
    of_run: bool,
) -> None:
    before, out = file_bytes(run.folder), tmp_path / "out"
    arguments = [str(run.folder)] if of_run else network_options(networks, "instance", data, out)
    assert message in error_line(capsys, evaluate.main, [*arguments, option, value])
    after = file_bytes(run.folder)
    assert all(after[name] == content for name, content in before.items())
    assert not (out / "results.json").exists()


@pytest.mark.parametrize("of_run", [True, False], ids=["run", "network"])
def test_an_l2_radius_has_a_bound_of_its_own(
    run: Run,
    networks: ModuleType,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    of_run: bool,
    asked: list[tuple[Any, Plan, Outputs]],
) -> None:
    """From black to white, of 3×12×12 values: √432."""
    arguments = [str(run.folder)] if of_run else network_options(networks, "instance", data, tmp_path)
    evaluate.main([*arguments, "--norm", "L2", "--eps", "20.78"])
    assert asked[0][1].radius == 20.78
    message = error_line(capsys, evaluate.main, [*arguments, "--norm", "L2", "--eps", "20.79"])
    assert "--eps: expected at most 20.78, " in message
    assert "12×12 pixels, got 20.79" in message


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run", "--limit", "many"],
        ["run", "--colour", "red"],
        ["run", "--eps", "small"],
        ["run", "--eps", "1/0"],
        ["run", "--norm", "L1"],
        ["run", "--checkpoint", "first"],
        ["run", "--dataset", "imagenet"],
    ],
)
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error_line(capsys, evaluate.main, arguments, code=2)


@pytest.mark.parametrize("name", ["runs/a:b", "C:\\\\runs\\\\first", "C:/runs", "a b:c", "2026-01-01T12:30:00"])
def test_a_folder_that_is_missing_is_no_network_for_a_colon(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_line(capsys, evaluate.main, [name])
    assert f"{name}: there is no run (no config.json) in this folder" in message
    assert "--dataset" not in message


def test_what_may_be_either_is_said_to_be_neither(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_line(capsys, evaluate.main, ["a:b"])
    assert "--dataset: missing; a:b is no folder that is here, and a network needs it" in message


def test_architectures_are_no_networks_with_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", "digits", "--out", str(tmp_path)]
    assert "got a library's network, which has random weights" in error_line(
        capsys, evaluate.main, ["timm:resnet18", *words]
    )
    assert "resnet18: there is no such run; a network is named as module" in error_line(
        capsys, evaluate.main, ["resnet18", *words]
    )


def test_a_run_has_a_data_set_of_its_own(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_line(capsys, evaluate.main, [str(run.folder), "--dataset", "digits"])
    assert f"--dataset digits: the run in {run.folder} has its own" in message
    message = error_line(capsys, evaluate.main, [str(run.folder), "--image-size", "8"])
    assert f"--image-size 8: the run in {run.folder} has its own" in message


def test_a_best_checkpoint_that_is_not_there_is_named(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_line(capsys, evaluate.main, [str(run.folder), "--checkpoint", "best"])
    assert str(run.best_checkpoint) in message


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert "no run" in error_line(capsys, evaluate.main, [str(folder)])
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.checkpoint.unlink()
    assert str(run.checkpoint) in error_line(capsys, evaluate.main, [str(run.folder)])


def test_an_unfinished_run_is_refused_with_the_way_to_go_on(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, info = load_checkpoint(run.checkpoint)
    save_checkpoint(run.checkpoint, tensors, info | {"epoch": 1})
    before = file_bytes(run.folder)
    message = error_line(capsys, evaluate.main, [str(run.folder), "--again"])
    assert "1 of 2 epochs" in message
    assert f"--resume {run.folder}" in message
    assert file_bytes(run.folder) == before


def test_a_run_whose_weights_are_no_numbers_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    tensors, info = load_checkpoint(run.checkpoint)
    name = next(name for name in tensors if name.startswith("model/experts") and name.endswith("weight"))
    save_checkpoint(run.checkpoint, tensors | {name: tensors[name] * torch.nan}, info)
    first = int(sample_order(load("npz", data).test, 1)[0])
    message = error_line(capsys, evaluate.main, [str(run.folder), "--device", "cpu"])
    assert f"got NaN or infinite ones for test image {first}" in message


def test_other_data_are_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_data(tmp_path / "other.npz", test_images=arrays(seed=1)["test_images"])
    message = error_line(capsys, evaluate.main, [str(run.folder), "--data", str(other)])
    assert "got others" in message


@pytest.mark.parametrize("changes", [pytest.param({"arch": "resnet18"}, marks=pytest.mark.exhaustive), {"experts": 3}])
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = prepare(*train.parse([*options(data, **changes), "--out", str(tmp_path / "other")]))
    save_checkpoint(run.checkpoint, trainer.tensors(), trainer.info() | {"epoch": 2})
    assert str(run.checkpoint) in error_line(capsys, evaluate.main, [str(run.folder)])


@pytest.mark.parametrize("changes", [{"experts": 3}, {}], ids=["other experts", "other data"])
def test_a_best_checkpoint_of_another_run_is_called_by_its_name(
    changes: dict[str, Any], run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not changes:
        data = write_data(tmp_path / "other.npz", test_images=arrays(seed=1)["test_images"])
    trainer, _ = prepare(*train.parse([*options(data, **changes), "--out", str(tmp_path / "other")]))
    save_checkpoint(run.best_checkpoint, trainer.tensors(), trainer.info() | {"epoch": 2})
    message = error_line(capsys, evaluate.main, [str(run.folder)])
    assert message.startswith(f"error: {run.best_checkpoint}: of another run")
    assert str(run.checkpoint) not in message


@pytest.fixture
def others(run: Run, data: Path, tmp_path: Path) -> dict[str, Path]:
    """Runs of which no images can be transferred to `run`."""
    made = {"itself": run.folder, "its copy": Path(shutil.copytree(run.folder, tmp_path / "copy"))}
    unfinished = Run(Path(shutil.copytree(run.folder, tmp_path / "unfinished")))
    perturb(run.checkpoint, unfinished.checkpoint, 0.05)
    tensors, info = load_checkpoint(unfinished.checkpoint)
    save_checkpoint(unfinished.checkpoint, tensors, info | {"epoch": 1})
    made["unfinished"] = unfinished.folder
    two = write_data(tmp_path / "two.npz", **{k: v % 2 for k, v in arrays().items() if k.endswith("labels")})
    _, other = trained([*options(two), "--out", str(tmp_path / "two classes")])
    made["of two classes"] = other.folder
    made["of another data set"] = Path(shutil.copytree(unfinished.folder, tmp_path / "digits"))
    save_checkpoint(Run(made["of another data set"]).checkpoint, tensors, info)
    change_config(made["of another data set"], dataset="digits", data=None)
    return made


@pytest.mark.parametrize("of_run", [True, False], ids=["run", "network"])
def test_a_run_whose_images_say_nothing_is_not_transferred_from(
    run: Run,
    networks: ModuleType,
    data: Path,
    tmp_path: Path,
    others: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    of_run: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(networks, "folder", run.folder)
    arguments = [str(run.folder)] if of_run else network_options(networks, "mixture", data, tmp_path / "out")
    expected = {
        "itself": "that is the run that is evaluated",
        "its copy": "that is the run that is evaluated",
        "unfinished": f"stopped after 1 of 2 epochs; go on with: python -m immunity_fast.train --resume {tmp_path}",
        "of two classes": "it was trained on 2 classes, and these data have 3",
        "of another data set": "it was trained on digits, whose classes are not those of npz",
    }
    for name, text in expected.items():
        message = error_line(capsys, evaluate.main, [*arguments, "--transfer-from", str(others[name])])
        assert message.startswith(f"error: --transfer-from {others[name]}: "), name
        assert text in message
    assert not (tmp_path / "out").exists()


def test_a_tilde_is_the_home_folder(
    run: Run, networks: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    other = Path(shutil.copytree(run.folder, tmp_path / "other"))
    perturb(run.checkpoint, Run(other).checkpoint, 0.05)
    evaluate.main(["~/run", "--out=~/results", "--transfer-from=~/other"])
    arguments = network_options(networks, "instance", data, tmp_path)
    arguments[arguments.index("--out") + 1] = "~/results"
    evaluate.main(arguments)
    assert [outputs.folder for _, _, outputs in asked] == [tmp_path / "results"] * 2


# Damaged files


def test_a_damaged_checkpoint_config_or_record_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("checkpoint", "config_file", "metrics_file")):
        run = Run(Path(shutil.copytree(finished, tmp_path / str(number))))
        file: Path = getattr(run, name)
        file.write_bytes(b"\0" * 50 + b"\n")
        assert str(file) in error_line(capsys, evaluate.main, [str(run.folder)])


def test_a_damaged_ledger_is_computed_again(run: Run, plain: None) -> None:
    accuracy, ledger = accuracy_of(run.folder), run.folder / "evaluation.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"\0" * 50 + b"\n" + b"".join(lines[1:4]) + lines[4][:-9])
    evaluate.main([str(run.folder), *FEW])
    assert accuracy_of(run.folder).items() <= accuracy.items()
