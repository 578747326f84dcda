"""The command that evaluates a run: its numbers against independent ones, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from immunity_fast import FusedImmunityLoss, ImmunityMoE, evaluate, train
from immunity_fast.attacks import fgsm, pgd
from immunity_fast.checkpoint import load_checkpoint, load_model, save_checkpoint
from immunity_fast.data import load
from immunity_fast.metrics import sample
from immunity_fast.runs import Run
from tests.small_runs import CLASSES, arrays, change_config, error_line, options, split, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been trained and evaluated; tests take copies."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train.main([*options(data, lr=0.02, attack_images=20), "--out", str(folder)])
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(finished, tmp_path / "run")))


def _results(run: Run) -> dict[str, Any]:
    return json.loads(run.results_file.read_text(encoding="utf-8"))


def _accuracy(results: dict[str, Any]) -> dict[tuple[str, str | None, str], dict[str, Any]]:
    return {(r["attack"], r["attacker"], r["gate"]): r for r in results["accuracy"]}


def test_evaluating_again_gives_the_training_command_s_results_and_leaves_the_checkpoint(run: Run) -> None:
    results, checkpoint = run.results_file.read_bytes(), run.checkpoint.read_bytes()
    changed = run.checkpoint.stat().st_mtime_ns
    others = {file: file.read_bytes() for file in (run.config_file, run.metrics_file)}
    for file in (run.results_file, run.report, run.figures / "heatmaps.png", run.figures / "curves.png"):
        file.unlink()
    evaluate.main([str(run.folder), "--device", "cpu"])
    assert run.results_file.read_bytes() == results
    assert run.checkpoint.read_bytes() == checkpoint
    assert run.checkpoint.stat().st_mtime_ns == changed
    assert all(file.read_bytes() == content for file, content in others.items())
    assert run.report.is_file()
    assert sorted(file.name for file in run.figures.iterdir()) == ["curves.png", "heatmaps.png"]


def test_accuracies_with_the_exact_mean_are_those_of_the_experts_average(finished: Path, data: Path) -> None:
    results, images = _accuracy(_results(Run(finished))), load("npz", data)
    model, _ = load_model(finished)
    experts = model.unstack()

    def mean(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([expert.eval()(x).softmax(-1) for expert in experts]).mean(0).log()

    test, attacked = images.test, sample(images.test, 20)
    clean, x = test.images.float() / 255, attacked.images.float() / 255
    assert int((mean(clean).argmax(-1) == test.labels).sum()) == results["clean", None, "mean"]["correct"]
    right = int((mean(fgsm(mean, x, attacked.labels)).argmax(-1) == attacked.labels).sum())
    assert right == pytest.approx(results["FGSM", "mean", "mean"]["correct"], abs=1)
    # Another random start.
    stepped = pgd(mean, x, attacked.labels, steps=20, generator=torch.Generator().manual_seed(5))
    right = int((mean(stepped).argmax(-1) == attacked.labels).sum())
    assert right == pytest.approx(results["PGD-20", "mean", "mean"]["correct"], abs=3)


def test_every_attack_is_counted_for_what_its_attacker_knows(finished: Path) -> None:
    results = _accuracy(_results(Run(finished)))
    known = [(attacker, gate) for attacker in ("sample", "mean") for gate in ("sample", "mean")]
    assert results.keys() == {
        *(("clean", None, gate) for gate in ("sample", "mean")),
        *((attack, *knowledge) for attack in ("FGSM", "PGD-20") for knowledge in known),
    }
    for (attack, _, _), result in results.items():
        assert result["images"] == (30 if attack == "clean" else 20)
        assert result["accuracy"] == result["correct"] / result["images"]


def test_attacks_do_not_help(finished: Path) -> None:
    results = _accuracy(_results(Run(finished)))
    clean = results["clean", None, "mean"]["accuracy"]
    assert clean > 0.6, "the run has learnt too little for this test to mean anything"
    # The sample's own clean accuracy may lie some images above that of all.
    for attack in ("FGSM", "PGD-20"):
        assert results[attack, "mean", "mean"]["accuracy"] <= clean + 0.1
    assert results["PGD-20", "mean", "mean"]["accuracy"] <= results["FGSM", "mean", "mean"]["accuracy"]


def test_intervals_are_wilson_s(finished: Path) -> None:
    z = 1.959963984540054
    for result in _results(Run(finished))["accuracy"]:
        n, p = result["images"], result["accuracy"]
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert result["interval"] == pytest.approx([max(0, centre - half), min(1, centre + half)], abs=1e-6)


def test_the_report_shows_the_results(finished: Path) -> None:
    report = Run(finished).report.read_text(encoding="utf-8")
    text = unescape(re.sub("<[^>]*>", "", report))
    for result in _results(Run(finished))["accuracy"]:
        if (result["attacker"], result["gate"]) != ("sample", "mean"):
            assert f"{100 * result['accuracy']:.1f}" in text
    assert f"--resume {finished}" in text
    assert report.count("data:image/png;base64,") == 2


def test_a_limit_sets_how_many_images_are_attacked(run: Run) -> None:
    evaluate.main([str(run.folder), "--limit", "3", "--device", "cpu"])
    counts = {r["attack"]: r["images"] for r in _results(run)["accuracy"]}
    assert counts == {"clean": 30, "FGSM": 3, "PGD-20": 3}


def test_a_run_is_evaluated_where_its_data_lie_now(run: Run, data: Path, tmp_path: Path) -> None:
    results = run.results_file.read_bytes()
    change_config(run.folder, data="no longer there.npz")
    evaluate.main([str(run.folder), "--data", str(shutil.copy(data, tmp_path / "moved.npz")), "--device", "cpu"])
    assert run.results_file.read_bytes() == results


def test_evaluation_leaves_switch_generator_and_evaluation_mode() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(7)
    model = ImmunityMoE("resnet8", 2, CLASSES, image_size=12, switch="off", generator=generator)
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    state, shared = generator.get_state(), torch.get_rng_state()
    loss = FusedImmunityLoss(0.1, 0.1, 0.1, size=(12, 12))
    first = evaluate.evaluate(model.train(), loss, split(8), attack_images=3, seed=1)
    assert not model.training
    assert model.gate.switch == "off"
    assert model.gate.generator is generator
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), shared)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert evaluate.evaluate(model, loss, split(8), attack_images=3, seed=1) == first


def test_a_failing_evaluation_gives_the_model_its_gate_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("failed")

    model = ImmunityMoE("resnet8", 2, CLASSES, image_size=12)
    monkeypatch.setattr(evaluate, "fgsm", fail)
    with pytest.raises(RuntimeError, match="failed"):
        evaluate.evaluate(model, FusedImmunityLoss(0, 0, 0), split(3), attack_images=2, seed=0)
    assert model.gate.switch == "call"
    assert model.gate.generator is None


def test_tables_show_what_was_measured(finished: Path) -> None:
    results = _results(Run(finished))
    table = evaluate.accuracy_table(results)
    assert [row[0] for row in table.rows] == ["clean", "FGSM", "PGD-20"]
    found = _accuracy(results)
    for row in table.rows[1:]:
        for cell, (attacker, gate) in zip(row[2:], evaluate.SETTINGS, strict=True):
            assert cell.startswith(f"{100 * found[row[0], attacker, gate]['accuracy']:.1f} ± ")


# What it refuses


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert "no run" in error_line(capsys, evaluate.main, [str(folder)])
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_checkpoint_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.checkpoint.unlink()
    assert str(run.checkpoint) in error_line(capsys, evaluate.main, [str(run.folder)])


def test_a_run_that_was_not_finished_is_refused_with_the_way_to_go_on(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, info = load_checkpoint(run.checkpoint)
    save_checkpoint(run.checkpoint, tensors, info | {"epoch": 1})
    results = run.results_file.read_bytes()
    message = error_line(capsys, evaluate.main, [str(run.folder)])
    assert "1 of 2 epochs" in message
    assert f"--resume {run.folder}" in message
    assert run.results_file.read_bytes() == results


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_a_limit_below_one_is_refused(limit: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--limit" in error_line(capsys, evaluate.main, [str(run.folder), "--limit", limit])


@pytest.mark.parametrize("arguments", [[], ["run", "--limit", "many"], ["run", "--colour", "red"]])
def test_a_wrong_command_line_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error_line(capsys, evaluate.main, arguments, code=2)


def test_a_device_that_cannot_be_used_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device meta" in error_line(capsys, evaluate.main, [str(run.folder), "--device", "meta"])


def test_missing_data_are_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error_line(capsys, evaluate.main, [str(run.folder), "--data", str(tmp_path / "none.npz")])
    assert "none.npz" in message


def test_other_data_are_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_data(tmp_path / "other.npz", test_images=arrays(seed=1)["test_images"])
    message = error_line(capsys, evaluate.main, [str(run.folder), "--data", str(other)])
    assert "not those" in message


@pytest.mark.parametrize("changes", [{"arch": "resnet18"}, {"experts": 3}])
def test_a_checkpoint_of_another_run_is_refused(
    changes: dict[str, Any], run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = train.prepare(*train.parse([*options(data, **changes), "--out", str(tmp_path / "other")]))
    save_checkpoint(run.checkpoint, trainer.tensors(), trainer.info() | {"epoch": 2})
    assert str(run.checkpoint) in error_line(capsys, evaluate.main, [str(run.folder)])


def test_a_damaged_checkpoint_config_or_record_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("checkpoint", "config_file", "metrics_file")):
        run = Run(Path(shutil.copytree(finished, tmp_path / str(number))))
        file: Path = getattr(run, name)
        file.write_bytes(b"\0" * 50 + b"\n")
        assert str(file) in error_line(capsys, evaluate.main, [str(run.folder)])
