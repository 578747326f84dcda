"""Networks that were trained alone, joined to a mixture that counts each the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from immunity_fast import ensemble, evaluate, train
from immunity_fast.data.augmentation import to_float
from immunity_fast.models.gate import Switch, kind_of_gate
from immunity_fast.training.checkpoint import load_model
from immunity_fast.training.ensemble import join
from immunity_fast.training.run_folder import Run
from tests.small_runs import arrays, change_config, error_line, options, split, trained, write_data


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for seed in (3, 4, 5):
        _, run = trained([*options(data, experts=1, seed=seed, epochs=1), "--out", str(folder / f"{seed}")])
        runs.append(run.folder)
    return runs


def test_each_expert_is_one_of_the_networks(alone: list[Path], tmp_path: Path) -> None:
    run = join(alone, tmp_path / "joined")
    mixture, info = load_model(run.folder)
    images = to_float(split(5).images)
    logits = mixture.expert_logits(images)
    for i, folder in enumerate(alone):
        single, _ = load_model(folder)
        torch.testing.assert_close(logits[i], single.expert_logits(images)[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(logits[0], logits[1])
    assert info["model"]["num_experts"] == 3


@pytest.mark.parametrize("switch", get_args(Switch))
def test_each_network_counts_the_same_whatever_the_gate_does(alone: list[Path], tmp_path: Path, switch: Switch) -> None:
    mixture, _ = load_model(join(alone, tmp_path / "joined").folder)
    images = to_float(split(4).images)
    with mixture.gate.switched(switch), torch.no_grad():
        assert torch.equal(mixture.gate_weights(images), torch.full((4, 3), 1 / 3))
        expected = torch.stack([module(images).softmax(-1) for module in mixture.unstack()]).mean(0).log()
        torch.testing.assert_close(mixture(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("settings", "kind"), [({}, "uniform"), ({"gate": "selection"}, "selection")])
def test_plain_networks_are_joined_by_the_gate_of_their_settings(
    settings: dict[str, str], kind: str, data: Path, tmp_path: Path
) -> None:
    alone = []
    for seed in (3, 4):
        arguments = options(data, experts=1, seed=seed, epochs=1, ensemble="plain", arch="resnet8", **settings)
        alone.append(trained([*arguments, "--out", str(tmp_path / f"{seed}")])[1].folder)
    run = join(alone, tmp_path / "joined")
    mixture, _ = load_model(run.folder)
    assert kind_of_gate(mixture.gate) == run.config().gate_kind == kind
    weights = mixture.gate.fixed_weights(torch.float64)
    assert weights is not None
    assert weights.tolist() == [0.5, 0.5]


def test_the_joined_run_is_evaluated_as_any_other(
    alone: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ensemble.main([*map(str, alone), "--out", str(tmp_path / "joined")])
    run = Run(tmp_path / "joined")
    assert run.evaluate_command in capsys.readouterr().out
    evaluate.main(
        [str(run.folder), "--attacks", "fgsm", "--attackers", "mean", "--limit", "4", "--masking-images", "0"]
    )
    assert "mutual_information" in run.results_file.read_text(encoding="utf-8")
    assert run.report.is_file()


def test_there_is_no_training_to_go_on_with(
    alone: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = join(alone, tmp_path / "joined")
    assert "no training to go on with" in error_line(capsys, train.main, ["--resume", str(run.folder)])


def test_runs_that_do_not_go_together_are_refused(
    alone: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_data = write_data(tmp_path / "other.npz", train_images=255 - _images(data))
    _, other = trained([*options(other_data, experts=1, epochs=1), "--out", str(tmp_path / "other")])
    _, mixture = trained([*options(data, epochs=1), "--out", str(tmp_path / "mixture")])
    _, unfinished = trained([*options(data, experts=1, epochs=1), "--out", str(tmp_path / "unfinished")])
    change_config(unfinished.folder, epochs=2)
    for second, expected in (
        (other.folder, "trained on other data"),
        (mixture.folder, "expected a run of one network, got 2 experts"),
        (unfinished.folder, "stopped after 1 of 2 epochs"),
        (tmp_path / "nothing", "there is no run"),
    ):
        line = error_line(capsys, ensemble.main, [str(alone[0]), str(second), "--out", str(tmp_path / "joined")])
        assert expected in line
        assert not (tmp_path / "joined").exists()
    assert "at least 2" in error_line(capsys, ensemble.main, [str(alone[0]), "--out", str(tmp_path / "joined")])
    line = error_line(capsys, ensemble.main, [*map(str, alone), "--out", str(alone[0])])
    assert "exists already" in line


def test_a_network_is_not_joined_with_itself(
    alone: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, link = tmp_path / "copy", tmp_path / "link"
    shutil.copytree(alone[0], copy)
    link.symlink_to(alone[0])
    for twice in (alone[0], copy, link):
        arguments = [str(alone[0]), str(alone[1]), str(twice), "--out", str(tmp_path / "joined")]
        line = error_line(capsys, ensemble.main, arguments)
        assert f"{twice}: the same network as {alone[0]}" in line
        assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size": 14}, "image size: expected that of {first}, [12, 12], got [14, 14]"),
        ({"classes": 4}, "number of classes: expected that of {first}, 3, got 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_keeps_two_networks_from_being_joined_is_named(
    changes: dict[str, Any],
    expected: str,
    alone: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = arrays(size=changes.pop("size", 12))
    if changes.pop("classes", 3) == 4:
        made["train_labels"][0] = 3
    np.savez(tmp_path / "data.npz", **made)
    arguments = options(tmp_path / "data.npz", experts=1, epochs=1, **changes)
    _, other = trained([*arguments, "--out", str(tmp_path / "other")])
    arguments = [str(alone[0]), str(other.folder), "--out", str(tmp_path / "joined")]
    line = error_line(capsys, ensemble.main, arguments)
    assert f"{other.folder}: {expected.format(first=alone[0])}" in line


def _images(data: Path) -> Any:
    return np.load(data)["train_images"]
