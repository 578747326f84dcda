"""The command that evaluates a run or any network: its numbers against independent ones, and what it refuses.

`python -c "from tests.test_evaluate import evaluate_killed; evaluate_killed(…)"` is a process of its own, which forks
evaluations and kills them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import evaluate, evaluation_report, robustness, train
from immunity_fast.attacks import fgsm, pgd
from immunity_fast.checkpoint import load_checkpoint, load_model, save_checkpoint
from immunity_fast.data.datasets import load
from immunity_fast.data.sampling import sample, sample_order
from immunity_fast.evaluation_report import About, Outputs
from immunity_fast.findings import tables, to_csv
from immunity_fast.robustness import Evaluation, Plan
from immunity_fast.runs import Run
from immunity_fast.runtime import cli
from immunity_fast.subjects import Network
from tests.small_runs import CLASSES, arrays, change_config, dataset, error_line, options, split, trained, write_data

ROOT = Path(__file__).parent.parent
ATTACKED = 7
FEW = ["--device", "cpu", "--attacks", "fgsm", "--attackers", "single,mean", "--masking-images", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been trained and evaluated; tests take copies."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustness, "CURVE_STEPS", 4)
        train.main([*options(data, lr=0.02, attack_images=ATTACKED), "--out", str(folder)])
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(finished, tmp_path / "run")))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures, which take most of an evaluation's time."""
    monkeypatch.setattr(evaluation_report, "_figures", lambda *_: [])


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _accuracy(folder: Path) -> dict[tuple[str, str | None, str], dict[str, Any]]:
    """The entries by attack, attacker and judge, but for the time they took."""
    entries = [{k: v for k, v in entry.items() if k != "seconds"} for entry in _results(folder)["accuracy"]]
    found = {(entry["attack"], entry["attacker"], entry["judge"]): entry for entry in entries}
    assert len(found) == len(entries)
    return found


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _exact_mean(folder: Path) -> Callable[[Tensor], Tensor]:
    experts = [expert.eval() for expert in load_model(folder)[0].unstack()]
    return lambda x: torch.stack([expert(x).softmax(-1) for expert in experts]).mean(0).log()


def _correct(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> int:
    with torch.no_grad():
        return int((network(images).argmax(-1) == labels).sum())


# A run


def test_evaluating_again_takes_over_what_the_training_command_found(run: Run) -> None:
    before, found = _contents(run.folder), _results(run.folder)
    written = ("results.json", "results.md", "results.csv", "report.html", "figures/heatmaps.png", "figures/curves.png")
    for name in written:
        (run.folder / name).unlink()
    arguments = ["--attacks", "quick", "--attackers", "single,mean", "--masking-images", "0", "--device", "cpu"]
    evaluate.main([str(run.folder), *arguments])
    after, again = _contents(run.folder), _results(run.folder)
    assert all(again[name] == found[name] for name in ("accuracy", "worst_case", "heatmaps")), "the times, too"
    assert after.keys() == before.keys() | {"figures/robustness.png"}
    assert {name for name in after if after[name] != before[name]} <= set(written) - {"results.csv"}


def test_accuracies_with_the_exact_mean_are_those_of_the_experts_average(finished: Path, data: Path) -> None:
    found, test, mean = _accuracy(finished), load("npz", data).test, _exact_mean(finished)
    attacked = sample(test, ATTACKED)
    x, labels = attacked.images.float() / 255, attacked.labels
    assert _correct(mean, test.images.float() / 255, test.labels) == found["clean", None, "mean"]["correct"]
    assert _correct(mean, x, labels) == found["sample", None, "mean"]["correct"]
    stepped = fgsm(mean, x, labels)
    assert _correct(mean, stepped, labels) == pytest.approx(found["fgsm", "mean", "mean"]["correct"], abs=1)
    for i, expert in enumerate(load_model(finished)[0].unstack()):
        expected = _correct(expert.eval(), stepped, labels)
        assert found["fgsm", "mean", f"expert {i + 1}"]["correct"] == pytest.approx(expected, abs=1)
    # Another random start.
    stepped = pgd(mean, x, labels, steps=20, generator=torch.Generator().manual_seed(5))
    assert _correct(mean, stepped, labels) == pytest.approx(found["pgd", "mean", "mean"]["correct"], abs=2)


def test_every_attack_is_counted_for_what_its_attacker_knows_and_for_what_answers(finished: Path) -> None:
    found = _accuracy(finished)
    rows = [("clean", None), ("sample", None), ("noise", None)]
    rows += [(attack, attacker) for attack in ("fgsm", "pgd") for attacker in ("single", "mean")]
    judges = ("switching", "mean", "fixed", "worst", "expert 1", "expert 2")
    assert list(found) == [(*row, judge) for row in rows for judge in judges]
    for (attack, _, _), entry in found.items():
        assert entry["images"] == (30 if attack == "clean" else ATTACKED)
        assert entry["accuracy"] == entry["correct"] / entry["images"]
    assert _results(finished)["plan"] == {
        "attacks": ["fgsm", "pgd"],
        "attackers": ["single", "mean"],
        "images": ATTACKED,
        "eps": None,
        "norm": "Linf",
        "masking_images": 32,
        "curve_eps": [0.25, 1, 4, 32],
        "curve_steps": [1, 5, 20],
        "drop_fooled": False,
        "queries": 5000,
        "autoattack_steps": 100,
        "seed": 0,
        "chunk": 50,
    }


def test_attacks_do_not_help(finished: Path) -> None:
    found = _accuracy(finished)
    assert found["clean", None, "mean"]["accuracy"] > 0.6, "the run has learnt too little for this test"
    clean, one, many = (found[row]["correct"] for row in [("sample", None, "mean"), *_by("mean", "fgsm", "pgd")])
    assert many <= one <= clean
    worst = {entry["judge"]: entry for entry in _results(finished)["worst_case"]}
    assert all(worst[judge]["correct"] <= entry["correct"] for (_, _, judge), entry in found.items())
    assert worst["worst"]["correct"] <= min(worst[judge]["correct"] for judge in ("mean", "fixed", "switching"))


def _by(attacker: str, *attacks: str) -> list[tuple[str, str, str]]:
    return [(attack, attacker, attacker) for attack in attacks]


def test_intervals_are_wilson_s(finished: Path) -> None:
    z = 1.959963984540054
    found = _results(finished)
    for entry in [*found["accuracy"], *found["worst_case"], *found["curves"]["eps"], *found["curves"]["steps"]]:
        n, p = entry["images"], entry["accuracy"]
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert entry["interval"] == pytest.approx([max(0, centre - half), min(1, centre + half)], abs=1e-6)


def test_curves_are_of_the_radii_and_steps_that_were_asked_for(finished: Path) -> None:
    curves = _results(finished)["curves"]
    assert [point["eps"] for point in curves["eps"]] == pytest.approx([2 / 255, 8 / 255, 32 / 255, 1])
    assert [point["steps"] for point in curves["steps"]] == [1, 5, 20]
    assert all(point["images"] == ATTACKED for points in curves.values() for point in points)
    assert curves["steps"][-1]["loss"] > curves["steps"][0]["loss"]


def test_the_report_shows_the_results(finished: Path) -> None:
    report = (finished / "report.html").read_text(encoding="utf-8")
    text = " ".join(unescape(re.sub("<[^>]*>", " ", report)).split())
    found = _results(finished)
    for table in tables(found):
        assert table.caption in text
        for row in table.rows:
            assert " ".join(" ".join(cell.split()) for cell in row) in text
    for name, value in found["plan"].items():
        assert f"evaluation: {name} {tuple(value) if isinstance(value, list) else value}" in text
    assert f"immunity_fast.train --resume {finished}" in text
    assert f"immunity_fast.evaluate {finished}" in text
    passed = sum(check["passed"] for check in found["masking"])
    assert f"{passed} of {len(found['masking'])}" in text
    assert report.count("data:image/png;base64,") == 3


def test_results_lie_elsewhere_too_and_the_run_stays_untouched(run: Run, tmp_path: Path) -> None:
    before, out = _contents(run.folder), tmp_path / "made" / "elsewhere"
    evaluate.main([str(run.folder), *FEW, "--limit", "3", "--out", str(out)])
    assert _contents(run.folder) == before
    names = {"results.json", "results.md", "results.csv", "report.html", "evaluation.jsonl"}
    assert _contents(out).keys() == names | {"figures/heatmaps.png", "figures/curves.png"}
    found = _results(out)
    assert (out / "results.csv").read_text(encoding="utf-8") == to_csv(found)
    shown = [table.to_markdown() for table in tables(found)]
    assert (out / "results.md").read_text(encoding="utf-8") == "\n\n".join(shown) + "\n"
    assert (out / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 2


def test_what_is_printed_are_the_tables_and_where_the_report_is(
    run: Run, plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(run.folder), *FEW])
    printed = capsys.readouterr().out
    assert f"going on with {run.folder / 'evaluation.jsonl'}" in printed
    assert (run.folder / "results.md").read_text(encoding="utf-8").strip().replace("\n\n", "\n") in printed.replace(
        "\n\n", "\n"
    )
    assert printed.endswith(f"report: {run.report}\n")


def test_a_limit_sets_how_many_images_are_attacked(run: Run, plain: None) -> None:
    evaluate.main([str(run.folder), *FEW, "--limit", "3"])
    counts = {key[0]: entry["images"] for key, entry in _accuracy(run.folder).items()}
    assert counts == {"clean": 30, "sample": 3, "noise": 3, "fgsm": 3}


def test_a_run_is_evaluated_where_its_data_lie_now(run: Run, data: Path, tmp_path: Path, plain: None) -> None:
    accuracy = _accuracy(run.folder)
    change_config(run.folder, data="no longer there.npz")
    ledger = (run.folder / "evaluation.jsonl").read_bytes()
    moved = shutil.copy(data, tmp_path / "moved.npz")
    evaluate.main([str(run.folder), *FEW, "--data", str(moved)])
    assert _accuracy(run.folder).items() <= accuracy.items()
    assert (run.folder / "evaluation.jsonl").read_bytes() == ledger


def test_what_is_finished_counts_until_it_is_to_be_forgotten(
    run: Run, plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy, ledger = _accuracy(run.folder), run.folder / "evaluation.jsonl"
    content = ledger.read_text(encoding="utf-8")
    ledger.write_text(re.sub(r'"switching": "[01]+"', f'"switching": "{"0" * ATTACKED}"', content), encoding="utf-8")
    evaluate.main([str(run.folder), *FEW])
    assert _accuracy(run.folder)["noise", None, "switching"]["correct"] == 0
    capsys.readouterr()
    evaluate.main([str(run.folder), *FEW, "--again"])
    assert "going on" not in capsys.readouterr().out
    again = _accuracy(run.folder)
    assert again.items() <= accuracy.items()
    assert len(again) == 5 * 6
    assert len(ledger.read_text(encoding="utf-8").splitlines()) == 5


def test_more_attacks_are_added_to_what_is_finished(run: Run, plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = _counted(monkeypatch)
    accuracy = _accuracy(run.folder)
    evaluate.main([str(run.folder), *FEW, "--attacks", "quick,dlr", "--attackers", "mean,experts"])
    expected = [(attack, f"expert {i}") for attack in ("fgsm", "pgd") for i in (1, 2)]
    assert made == [*expected, *(("dlr", attacker) for attacker in ("mean", "expert 1", "expert 2"))]
    found = _accuracy(run.folder)
    assert all(found[place] == accuracy[place] for place in found.keys() & accuracy.keys())
    assert len(found) == (3 + 3 * 3) * 6
    assert {entry["attack"] for entry in _results(run.folder)["transfer_from_experts"]} == {"fgsm", "pgd", "dlr"}


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The attacks that are made from now on: (attack, attacker)."""
    made: list[tuple[str, str]] = []
    original = Evaluation.attacked

    def attacked(self: Evaluation, row: Any, *arguments: Any) -> Tensor:
        if row.attack:
            made.append((row.attack, row.attacker))
        return original(self, row, *arguments)

    monkeypatch.setattr(Evaluation, "attacked", attacked)
    return made


def test_another_seed_is_another_evaluation(run: Run, plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made, accuracy = _counted(monkeypatch), _accuracy(run.folder)
    evaluate.main([str(run.folder), *FEW, "--seed", "1"])
    assert made == [("fgsm", "single"), ("fgsm", "mean")]
    assert _results(run.folder)["plan"]["seed"] == 1
    found = _accuracy(run.folder)
    assert found["fgsm", "mean", "mean"] == accuracy["fgsm", "mean", "mean"], "no chance is in it"


def _perturbed(source: Path, target: Path, spread: float) -> None:
    """A checkpoint with noise on its weights."""
    tensors, info = load_checkpoint(source)
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: value + spread * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in tensors.items()
        if name.startswith("model/") and "running" not in name
    }
    save_checkpoint(target, tensors | noisy, info)


def test_the_best_checkpoint_is_evaluated_where_there_is_one_or_the_one_that_is_named(
    run: Run, data: Path, plain: None
) -> None:
    _perturbed(run.checkpoint, run.best_checkpoint, 0.3)
    test = load("npz", data).test
    expected = {
        name: _correct(_exact_mean(path), test.images.float() / 255, test.labels)
        for name, path in (("last", run.checkpoint), ("best", run.best_checkpoint))
    }
    assert expected["last"] != expected["best"]
    for arguments, name in (([], "best"), (["--checkpoint", "last"], "last"), (["--checkpoint", "best"], "best")):
        evaluate.main([str(run.folder), *FEW, "--limit", "1", *arguments])
        assert _accuracy(run.folder)["clean", None, "mean"]["correct"] == expected[name]


def test_another_run_s_adversarial_images_are_transferred(run: Run, data: Path, tmp_path: Path, plain: None) -> None:
    other = Run(Path(shutil.copytree(run.folder, tmp_path / "other")))
    _perturbed(run.checkpoint, other.checkpoint, 0.05)
    before = _contents(other.folder)
    arguments = ["--attackers", "mean,transfer", "--transfer-from", str(other.folder), "--eps", "60/255"]
    evaluate.main([str(run.folder), *FEW, *arguments])
    assert _contents(other.folder) == before
    found, chosen = _accuracy(run.folder), sample(load("npz", data).test, ATTACKED)
    assert {key[1] for key in found} == {None, "mean", "transfer"}
    images = fgsm(_exact_mean(other.folder), chosen.images.float() / 255, chosen.labels, eps=60 / 255)
    expected = _correct(_exact_mean(run.folder), images, chosen.labels)
    assert found["fgsm", "transfer", "mean"]["correct"] == pytest.approx(expected, abs=1)
    assert found["fgsm", "transfer", "mean"]["correct"] >= found["fgsm", "mean", "mean"]["correct"]
    rows = tables(_results(run.folder))[0].rows
    assert ["FGSM", "another, independently trained ensemble"] in [list(row[:2]) for row in rows]


def test_a_run_of_a_single_network_has_one_judge_and_one_attacker(data: Path, tmp_path: Path, plain: None) -> None:
    _, run = trained([*options(data, experts=1, lr=0.02, attack_images=5), "--out", str(tmp_path / "single")])
    evaluate.main([str(run.folder), "--device", "cpu", "--attacks", "fgsm", "--masking-images", "0"])
    found, test = _accuracy(run.folder), load("npz", data).test
    rows = [("clean", None), ("sample", None), ("noise", None), ("fgsm", "output")]
    assert list(found) == [(*row, "output") for row in rows]
    (network,) = load_model(run.folder)[0].unstack()
    network.eval()
    expected = _correct(network, test.images.float() / 255, test.labels)
    assert found["clean", None, "output"]["correct"] == expected
    chosen = sample(test, 5)
    images = fgsm(network, chosen.images.float() / 255, chosen.labels)
    assert found["fgsm", "output", "output"]["correct"] == pytest.approx(
        _correct(network, images, chosen.labels), abs=1
    )
    results = _results(run.folder)
    assert "heatmaps" not in results
    assert "transfer_from_experts" not in results
    assert [entry["judge"] for entry in results["worst_case"]] == ["output"]
    for attackers in ("mean", "experts"):
        with pytest.raises(cli.InputError, match=f"--attackers {attackers}: expected some of output"):
            evaluate.main([str(run.folder), "--attackers", attackers])


def test_the_model_is_left_as_it_was(finished: Path, tmp_path: Path, data: Path, plain: None) -> None:
    run, (model, _) = Run(finished), load_model(finished)
    generator = torch.Generator().manual_seed(7)
    model.gate.switch, model.gate.generator = "off", generator
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, shared = generator.get_state(), torch.get_rng_state()
    plan = Plan(attacks=("fgsm",), images=2, masking_images=1, curve_eps=(1,), curve_steps=(1,))
    found = evaluate.evaluate_run(run, model, load("npz", data), run.config(), plan, Outputs(tmp_path))
    assert found["accuracy"]
    assert not any(module.training for module in model.modules())
    assert model.gate.switch == "off"
    assert model.gate.generator is generator
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), shared)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p is not frozen for p in model.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_failing_evaluation_gives_the_model_back_too(
    finished: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("failed")

    run, (model, _) = Run(finished), load_model(finished)
    monkeypatch.setattr(robustness, "BoundAttack", fail)
    with pytest.raises(RuntimeError, match="failed"):
        evaluate.evaluate_run(run, model, load("npz", data), run.config(), Plan(images=2), Outputs(tmp_path))
    assert model.gate.switch == "call"
    assert model.gate.generator is None
    assert all(parameter.requires_grad for parameter in model.parameters())


# What a command line asks for


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Plan, Outputs]]:
    """Instead of evaluating: (subject, plan, outputs) of each evaluation."""
    calls: list[tuple[Any, Plan, Outputs]] = []
    monkeypatch.setattr(
        evaluate, "evaluate", lambda subject, _, plan, outputs, *__: calls.append((subject, plan, outputs)) or {}
    )
    return calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--attacks", "quick"], {"attacks": ("fgsm", "pgd")}),
        (["--attacks", "default,square"], {"attacks": ("fgsm", "bim", "mim", "pgd", "square")}),
        (["--attacks", "pgd,quick,pgd"], {"attacks": ("pgd", "fgsm")}),
        (
            ["--attacks", "all"],
            {"attacks": ("fgsm", "bim", "mim", "pgd", "cw", "dlr", "square", "autoattack")},
        ),
        (["--attackers", "worst,experts"], {"attackers": ("worst", "expert 1", "expert 2")}),
        (["--attackers", "expert 2"], {"attackers": ("expert 2",)}),
        (["--eps", "4/255"], {"eps": 4 / 255}),
        (["--eps", "0"], {"eps": 0.0}),
        (["--norm", "L2", "--eps", "0.5"], {"norm": "L2", "eps": 0.5}),
        (["--limit", "1"], {"images": 1}),
        (["--drop-fooled"], {"drop_fooled": True}),
        (["--masking-images", "0"], {"masking_images": 0}),
        (["--queries", "9", "--autoattack-steps", "8"], {"queries": 9, "autoattack_steps": 8}),
        (["--seed", "0"], {"seed": 0}),
    ],
)
def test_options_are_the_plan_s(
    run: Run, asked: list[tuple[Any, Plan, Outputs]], arguments: list[str], expected: dict[str, Any]
) -> None:
    change_config(run.folder, seed=3)
    evaluate.main([str(run.folder), "--device", "cpu", *arguments])
    ((subject, plan, outputs),) = asked
    assert plan == Plan(**{"images": ATTACKED, "seed": 3} | expected)
    assert subject.draws == 20
    assert outputs.folder == run.folder


def test_draws_are_the_subject_s(run: Run, asked: list[tuple[Any, Plan, Outputs]]) -> None:
    evaluate.main([str(run.folder), "--draws", "3", "--device", "cpu"])
    assert asked[0][0].draws == 3


def test_a_radius_and_a_norm_are_those_of_the_attacks(run: Run, data: Path, plain: None) -> None:
    evaluate.main([str(run.folder), *FEW, "--norm", "L2", "--eps", "3"])
    chosen, mean = sample(load("npz", data).test, ATTACKED), _exact_mean(run.folder)
    images = fgsm(mean, chosen.images.float() / 255, chosen.labels, eps=3, norm="L2")
    correct = _accuracy(run.folder)["fgsm", "mean", "mean"]["correct"]
    assert correct == pytest.approx(_correct(mean, images, chosen.labels), abs=1)
    assert correct < ATTACKED
    assert (_results(run.folder)["plan"]["norm"], _results(run.folder)["plan"]["eps"]) == ("L2", 3)


# After the first images


def _brightness(images: Tensor) -> Tensor:
    return 3 * images.mean((2, 3))


def _estimates(
    capsys: pytest.CaptureFixture[str], folder: Path, plan: Plan, network: Callable[[Tensor], Tensor] = _brightness
) -> list[str]:
    """The lines that an evaluation prints of what will come out."""
    capsys.readouterr()
    about = About(title="title", lead="lead", settings={}, commands={})
    evaluate.evaluate(Network(network, CLASSES), dataset(test=split(12)), plan, Outputs(folder), about)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("worst case so far")]


def test_an_estimate_is_printed_once_after_the_first_chunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(attacks=("fgsm",), images=11, chunk=4, masking_images=0, eps=0.01)
    (line,) = _estimates(capsys, tmp_path / "long", plan)
    first = Plan(attacks=("fgsm",), images=4, chunk=4, masking_images=0, eps=0.01)
    assert _estimates(capsys, tmp_path / "short", first) == [], "there is nothing to come"
    (worst,) = _results(tmp_path / "short")["worst_case"]
    assert 0 < worst["correct"] < 4
    low, high = worst["interval"]
    expected = f"{100 * worst['accuracy']:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f}), 4 images; these took "
    assert re.fullmatch(re.escape(f"worst case so far {expected}") + r"\d+ s", line)
    assert _estimates(capsys, tmp_path / "long", plan) == [], "all is there already"


def test_an_evaluation_that_goes_on_estimates_from_all_that_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(attacks=("fgsm",), images=11, chunk=4, masking_images=0)
    _estimates(capsys, tmp_path, Plan(attacks=("fgsm",), images=4, chunk=4, masking_images=0))
    (line,) = _estimates(capsys, tmp_path, plan)
    assert ", 8 images" in line


# Killed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded PyTorch")
def test_killed_with_sigkill_at_random_moments_it_ends_the_same(finished: Path, tmp_path: Path) -> None:
    code = f"from tests.test_evaluate import evaluate_killed; evaluate_killed({str(finished)!r}, {str(tmp_path)!r}, 0)"
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=alone, capture_output=True, text=True, check=False, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    kills = json.loads(ended.stdout.splitlines()[-1])
    assert [kill["killed"] for kill in kills] == [True] * len(kills)
    done = [kill["pieces"] for kill in kills]
    assert done == sorted(done)
    assert done[-1] > 0
    ledgers = {name: (tmp_path / name / "evaluation.jsonl").read_text().splitlines() for name in ("whole", "killed")}
    assert done[-1] < len(ledgers["whole"]) == 19
    pieces = {name: {piece.pop("key"): piece for piece in map(json.loads, lines)} for name, lines in ledgers.items()}
    for each in pieces.values():
        for piece in each.values():
            piece.pop("seconds")
    assert pieces["killed"] == pieces["whole"]
    # Nothing that was written down is computed again: what was in vain is at most a piece a kill.
    assert len(ledgers["killed"]) == 19
    assert sum(kill["begun"] for kill in kills) <= done[-1] + len(kills)
    found = {name: _results(tmp_path / name) for name in ("whole", "killed")}
    assert _accuracy(tmp_path / "killed") == _accuracy(tmp_path / "whole")
    assert all(found["killed"][name] == found["whole"][name] for name in found["whole"] if name != "accuracy")


def evaluate_killed(finished: str, folder: str, seed: int) -> None:
    """Evaluate into folder/whole, and into folder/killed with four SIGKILLs on the way; prints what they left."""
    from tests.killing import STEP, WRITE, _telling, kill

    chance, killed = random.Random(seed), Path(folder) / "killed"
    arguments = [finished, "--device", "cpu", "--attacks", "fgsm", "--masking-images", "0"]
    arguments += ["--draws", "2", "--limit", "5"]

    def start(name: str) -> tuple[int, int]:
        hearing, telling = os.pipe()
        process = os.fork()
        if process:
            os.close(telling)
            return process, hearing
        os.close(hearing)
        evaluation_report._figures = lambda *_: []  # type: ignore[assignment]
        evaluate.CHUNK["cpu"] = 3
        Evaluation._piece = _telling(telling, STEP, Evaluation._piece)  # type: ignore[method-assign]
        os.fsync = _telling(telling, WRITE, os.fsync)
        try:
            cli.run_command(lambda: evaluate.main([*arguments, "--out", str(Path(folder) / name)]))
        except SystemExit as end:
            os._exit(int(end.code or 0))

    def finish(name: str) -> None:
        process, pipe = start(name)
        while os.read(pipe, 4096):
            pass
        if os.waitpid(process, 0)[1]:
            raise SystemExit(f"{name} failed")

    finish("whole")
    kills = []
    for writing in (False, True, False, True):
        process, pipe = start("killed")
        kills.append(kill(process, pipe, chance.randint(1, 3), chance.uniform(0, 0.005), writing=writing))
        kills[-1]["pieces"] = (killed / "evaluation.jsonl").read_bytes().count(b"\n")
    finish("killed")
    print(json.dumps(kills))


# Any network


NETWORKS = '''
"""What a user may have."""

import torch
from torch import nn

from immunity_fast.checkpoint import load_model
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


def _network(networks: ModuleType, name: str, data: Path, out: Path) -> list[str]:
    arguments = ["--dataset", "npz", "--data", str(data), "--out", str(out), "--device", "cpu"]
    return [f"{networks.__name__}:{name}", *arguments, "--attacks", "fgsm", "--limit", "6", "--masking-images", "0"]


@pytest.mark.parametrize("name", ["instance", "make", "Brightness", "Holder.network", "plain"])
def test_any_network_is_evaluated(networks: ModuleType, name: str, data: Path, tmp_path: Path) -> None:
    shared, test = torch.get_rng_state(), load("npz", data).test
    evaluate.main([*_network(networks, name, data, tmp_path / "out"), "--eps", "26/255"])
    assert torch.equal(torch.get_rng_state(), shared)
    found = _accuracy(tmp_path / "out")
    rows = [("clean", None), ("sample", None), ("noise", None), ("fgsm", "output")]
    assert list(found) == [(*row, "output") for row in rows]
    expected = _correct(lambda x: x.mean((2, 3)), test.images.double() / 255, test.labels)
    assert found["clean", None, "output"]["correct"] == expected > 20, "dropout is off"
    chosen = sample(test, 6)
    # The worst image of the ball: the label's colour darker, the others brighter.
    images, own = chosen.images.double() / 255, nn.functional.one_hot(chosen.labels, 3).bool()[..., None, None]
    attacked = torch.where(own, (images - 26 / 255).clamp(0, 1), (images + 26 / 255).clamp(0, 1))
    assert found["fgsm", "output", "output"]["correct"] == _correct(lambda x: x.mean((2, 3)), attacked, chosen.labels)
    names = {"results.json", "results.md", "results.csv", "report.html", "evaluation.jsonl"}
    assert _contents(tmp_path / "out").keys() == names
    assert f"{networks.__name__}:{name} on npz" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"{networks.__name__}:{name}" not in (tmp_path / "out" / "results.json").read_text(encoding="utf-8")


def test_a_network_keeps_its_weights_and_what_is_to_be_trained(
    networks: ModuleType, data: Path, tmp_path: Path
) -> None:
    networks.instance.scale.grad = None
    evaluate.main(_network(networks, "instance", data, tmp_path))
    assert networks.instance.scale.requires_grad
    assert networks.instance.scale.grad is None
    assert networks.instance.scale.item() == 30


def test_a_function_makes_its_network_once(networks: ModuleType, data: Path, tmp_path: Path) -> None:
    networks.MADE.clear()
    evaluate.main(_network(networks, "make", data, tmp_path))
    assert len(networks.MADE) == 1
    assert not networks.MADE[0].training


def test_a_mixture_of_the_user_s_is_attacked_with_every_knowledge_and_like_a_run_of_the_same_weights(
    networks: ModuleType, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "folder", finished)
    arguments = ["--limit", str(ATTACKED), "--attackers", "single,mean,worst,experts"]
    evaluate.main([*_network(networks, "mixture", data, tmp_path), *arguments])
    found, of_run = _accuracy(tmp_path), _accuracy(finished)
    assert {key[1] for key in found} == {None, "single", "mean", "worst", "expert 1", "expert 2"}
    assert {key[2] for key in found} == {"switching", "mean", "fixed", "worst", "expert 1", "expert 2"}
    both = found.keys() & of_run.keys()
    assert len(both) == 5 * 6
    assert all(found[key] == of_run[key] for key in both)
    assert "heatmaps" not in _results(tmp_path)


def test_a_single_network_of_this_package_is_a_network(
    networks: ModuleType, data: Path, tmp_path: Path, asked: list[tuple[Any, Plan, Outputs]]
) -> None:
    evaluate.main(_network(networks, "single", data, tmp_path))
    assert asked[0][0].attackers == ("output",)


def test_a_random_network_is_attacked_by_eot_and_its_numbers_repeat_themselves(
    networks: ModuleType, data: Path, tmp_path: Path
) -> None:
    arguments = [*_network(networks, "blurred", data, tmp_path), "--draws", "5", "--eps", "24/255"]
    shared = torch.get_rng_state()
    evaluate.main(arguments)
    assert torch.equal(torch.get_rng_state(), shared)
    found = _accuracy(tmp_path)
    assert {key[1] for key in found} == {None, "output", "eot"}
    torch.manual_seed(77)
    evaluate.main([*arguments, "--again"])
    assert _accuracy(tmp_path) == found
    evaluate.main([*arguments, "--again", "--seed", "1"])
    assert _accuracy(tmp_path) != found


def test_networks_take_another_run_s_images(networks: ModuleType, data: Path, finished: Path, tmp_path: Path) -> None:
    evaluate.main([*_network(networks, "plain", data, tmp_path), "--transfer-from", str(finished)])
    assert {key[1] for key in _accuracy(tmp_path)} == {None, "output", "transfer"}


def test_networks_without_weights_are_told_apart_by_their_names(
    networks: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _counted(monkeypatch)
    for name in ("plain", "blurred", "plain"):
        evaluate.main(_network(networks, name, data, tmp_path))
    assert made == [("fgsm", "output")] * 2


def test_all_attacks_run(networks: ModuleType, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchattacks")
    arguments = ["--attacks", "all", "--queries", "3", "--autoattack-steps", "2", "--eps", "26/255", "--drop-fooled"]
    evaluate.main([*_network(networks, "instance", data, tmp_path), *arguments])
    found = _accuracy(tmp_path)
    attacks = ("fgsm", "bim", "mim", "pgd", "cw", "dlr", "square", "autoattack")
    rows = [("clean", None), ("sample", None), ("noise", None), *((attack, "output") for attack in attacks)]
    assert list(found) == [(*row, "output") for row in rows]
    correct = {key[0]: entry["correct"] for key, entry in found.items()}
    assert all(correct[attack] <= correct["sample"] for attack in attacks)
    # Of a linear network nothing is worse than one step, which AutoAttack's first part reaches.
    assert len({correct[attack] for attack in ("fgsm", "bim", "mim", "pgd", "cw", "autoattack")}) == 1
    (worst,) = _results(tmp_path)["worst_case"]
    assert worst["correct"] == correct["fgsm"] < 6


@pytest.mark.parametrize("attacked", [True, False])
def test_nan_is_named_with_the_number_of_its_test_image(
    networks: ModuleType,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    attacked: bool,
) -> None:
    test = load("npz", data).test
    index = int(sample_order(test, 30)[3 if attacked else 20])
    monkeypatch.setattr(networks, "broken", test.images[index] / 255)
    message = error_line(capsys, evaluate.main, _network(networks, "nan_for_one", data, tmp_path))
    assert f"test image {index} is NaN or infinite" in message


# What it refuses


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "cannot be imported"),
        ("Holder.missing", "cannot be imported"),
        ("", "cannot be imported"),
        ("number", "expected a network or a function that makes one, got int"),
        ("makes_a_number", "expected it to make a network, got int"),
        ("takes_images", "expected a network or a function that makes one"),
        ("four_classes", "expected outputs (B, 3), as many as there are classes, got (6, 4)"),
        ("mixture_of_four_classes", "expected outputs (B, 3), as many as there are classes, got (6, 4)"),
        ("constant", "does not depend on the images"),
        ("detached", "no gradient"),
        ("one_channel", "model: it does not take images (B, 3, 12, 12) of torch.float32 in [0, 1]; wrap it"),
        ("in_bfloat16", "model: it does not take images (B, 3, 12, 12) of torch.float32 in [0, 1]; wrap it"),
    ],
)
def test_what_is_no_network_for_these_data_is_refused_in_one_line(
    networks: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert message in error_line(capsys, evaluate.main, _network(networks, name, data, tmp_path / "out"))
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
    arguments = [place, *_network(networks, "", data, tmp_path / "out")[1:]]
    message = error_line(capsys, evaluate.main, arguments)
    assert place in message or "package_that_is_not_there" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["dataset", "out"])
def test_a_network_needs_a_data_set_and_a_folder(
    networks: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    arguments = _network(networks, "instance", data, tmp_path / "out")
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
    ("--attacks", "nonsense", "--attacks nonsense: expected one of fgsm, bim"),
    ("--attacks", "fgsm,", "--attacks : expected"),
    ("--attackers", "nonsense", "--attackers nonsense: expected some of"),
    ("--attackers", "mean,transfer,output", "--attackers "),
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
    ("--eps", "8", "--eps: images are in [0, 1], so at most 1, got 8; of 255 levels: 8/255"),
    ("--eps", "1.01", "--eps: images are in [0, 1], so at most 1, got 1.01"),
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
    before, out = _contents(run.folder), tmp_path / "out"
    arguments = [str(run.folder)] if of_run else _network(networks, "instance", data, out)
    assert message in error_line(capsys, evaluate.main, [*arguments, option, value])
    after = _contents(run.folder)
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
    arguments = [str(run.folder)] if of_run else _network(networks, "instance", data, tmp_path)
    evaluate.main([*arguments, "--norm", "L2", "--eps", "20.78"])
    assert asked[0][1].radius == 20.78
    message = error_line(capsys, evaluate.main, [*arguments, "--norm", "L2", "--eps", "20.79"])
    assert "12×12 pixels in [0, 1] are further apart in L2 than 20.78, got 20.79" in message


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


def test_a_run_that_was_not_finished_is_refused_with_the_way_to_go_on(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, info = load_checkpoint(run.checkpoint)
    save_checkpoint(run.checkpoint, tensors, info | {"epoch": 1})
    before = _contents(run.folder)
    message = error_line(capsys, evaluate.main, [str(run.folder), "--again"])
    assert "1 of 2 epochs" in message
    assert f"--resume {run.folder}" in message
    assert _contents(run.folder) == before


def test_a_run_whose_weights_are_no_numbers_is_refused(
    run: Run, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    tensors, info = load_checkpoint(run.checkpoint)
    name = next(name for name in tensors if name.startswith("model/experts") and name.endswith("weight"))
    save_checkpoint(run.checkpoint, tensors | {name: tensors[name] * torch.nan}, info)
    first = int(sample_order(load("npz", data).test, 1)[0])
    message = error_line(capsys, evaluate.main, [str(run.folder), "--device", "cpu"])
    assert f"for test image {first} is NaN or infinite" in message


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


@pytest.mark.parametrize("changes", [{"experts": 3}, {}], ids=["other experts", "other data"])
def test_a_best_checkpoint_of_another_run_is_called_by_its_name(
    changes: dict[str, Any], run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not changes:
        data = write_data(tmp_path / "other.npz", test_images=arrays(seed=1)["test_images"])
    trainer, _ = train.prepare(*train.parse([*options(data, **changes), "--out", str(tmp_path / "other")]))
    save_checkpoint(run.best_checkpoint, trainer.tensors(), trainer.info() | {"epoch": 2})
    message = error_line(capsys, evaluate.main, [str(run.folder)])
    assert message.startswith(f"error: {run.best_checkpoint}: of another run")
    assert str(run.checkpoint) not in message


@pytest.fixture
def others(run: Run, data: Path, tmp_path: Path) -> dict[str, Path]:
    """Runs of which no images can be transferred to `run`."""
    made = {"itself": run.folder, "its copy": Path(shutil.copytree(run.folder, tmp_path / "copy"))}
    unfinished = Run(Path(shutil.copytree(run.folder, tmp_path / "unfinished")))
    _perturbed(run.checkpoint, unfinished.checkpoint, 0.05)
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
    arguments = [str(run.folder)] if of_run else _network(networks, "mixture", data, tmp_path / "out")
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
    _perturbed(run.checkpoint, Run(other).checkpoint, 0.05)
    evaluate.main(["~/run", "--out=~/results", "--transfer-from=~/other"])
    arguments = _network(networks, "instance", data, tmp_path)
    arguments[arguments.index("--out") + 1] = "~/results"
    evaluate.main(arguments)
    assert [outputs.folder for _, _, outputs in asked] == [tmp_path / "results"] * 2


# Stopped by hand


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_hand_it_says_how_to_go_on_and_keeps_what_is_finished(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    plain: None,
    sent: signal.Signals,
    code: int,
) -> None:
    pieces, original = list[int](), Evaluation._piece

    def piece(self: Evaluation, *arguments: Any) -> Any:
        pieces.append(1)
        if len(pieces) == 3:
            os.kill(os.getpid(), sent)
            time.sleep(5)
        return original(self, *arguments)

    monkeypatch.setattr(Evaluation, "_piece", piece)
    folder, before = tmp_path / "a folder", signal.getsignal(signal.SIGTERM)
    arguments = [str(run.folder), *FEW, "--out", str(folder)]
    with pytest.raises(SystemExit) as end:
        cli.run_command(lambda: evaluate.main([*arguments, "--again"]))
    assert end.value.code == code
    told = capsys.readouterr()
    assert told.err == ""
    command = f"python -m immunity_fast.evaluate {shlex.join(arguments)}"
    assert told.out.endswith(f"interrupted; go on with: {command}\n")
    assert signal.getsignal(signal.SIGTERM) is before
    kept = (folder / "evaluation.jsonl").read_bytes()
    assert kept.count(b"\n") == 2
    evaluate.main(shlex.split(command)[3:])
    assert (folder / "evaluation.jsonl").read_bytes().startswith(kept)
    whole = tmp_path / "whole"
    evaluate.main([str(run.folder), *FEW, "--out", str(whole)])
    assert _accuracy(folder) == _accuracy(whole)


# In a log


def test_a_log_that_is_no_terminal_has_a_line_now_and_then(
    networks: ModuleType,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also within a piece, which may take long."""
    original, inside = Evaluation._piece, list[str]()

    def piece(self: Evaluation, row: Any, *arguments: Any) -> Any:
        if row.attack:
            time.sleep(0.5)
            inside.append(capsys.readouterr().out)
        return original(self, row, *arguments)

    monkeypatch.setattr(Evaluation, "_piece", piece)
    monkeypatch.setattr(cli, "TELL", 0.1)
    threads = threading.active_count()
    evaluate.main(_network(networks, "instance", data, tmp_path))
    assert inside[0].count("evaluation: 12 of 48 images after 0 min\n") >= 2
    assert threading.active_count() == threads
    monkeypatch.setattr(cli, "TELL", 60)
    evaluate.main([*_network(networks, "instance", data, tmp_path), "--again"])
    assert "evaluation:" not in capsys.readouterr().out


# What was not attacked


def test_attacks_that_are_for_none_of_the_attackers_are_an_error(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = _contents(run.folder)
    message = error_line(capsys, evaluate.main, [str(run.folder), "--attacks", "square", "--attackers", "worst"])
    assert "nothing is left to attack with (square by worst: it asks what answers" in message
    assert _contents(run.folder) == before


def test_a_pair_that_is_left_out_is_a_line_with_the_reason(
    run: Run, capsys: pytest.CaptureFixture[str], plain: None
) -> None:
    pytest.importorskip("torchattacks")
    arguments = ["--attacks", "fgsm,square", "--attackers", "worst,mean,experts", "--queries", "2", "--limit", "2"]
    evaluate.main([str(run.folder), *FEW, *arguments])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert [line.split(":")[1] for line in lines] == [f" square by {who}" for who in ("worst", "expert 1", "expert 2")]
    assert all("it asks what answers" in line for line in lines)
    assert [(pair["attack"], pair["attacker"]) for pair in _results(run.folder)["left_out"]] == [
        ("square", "worst"),
        ("square", "expert 1"),
        ("square", "expert 2"),
    ]
    for name in ("report.html", "results.md"):
        text = unescape((run.folder / name).read_text(encoding="utf-8"))
        assert "Left out: not attacked, and in no worst case" in text
        assert "worst, expert 1, expert 2" in text


def test_images_without_a_gradient_are_counted_in_text_json_and_html(
    networks: ModuleType, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last five of the six images that are attacked, and so the whole of a batch."""
    dark, test = arrays(), load("npz", data).test
    chosen = sample_order(test, 6)[1:]
    dark["test_images"][chosen] = 20
    dark["test_labels"][chosen] = 0
    file, out = write_data(tmp_path / "dark.npz", **dark), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluate.CHUNK, "cpu", 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluate.main(_network(networks, "no_gradient_in_the_dark", file, out))
    stuck = {"attack": "fgsm", "attacker": "output", "unmoved": 5, "right": 5, "images": 6}
    assert _results(out)["unmoved"] == [stuck]
    (check,) = (check for check in _results(out)["masking"] if not check["passed"])
    assert check["finding"] == "5 of 6 images (83.3 %) under FGSM (the model's own output)"
    texts = [
        capsys.readouterr().out,
        *((out / name).read_text(encoding="utf-8") for name in ("report.html", "results.md")),
    ]
    for text in texts:
        assert "their gradient is exactly zero" in text
        assert "5 of 6 images (83.3 %)" in text


# What a network is


def test_weights_replaced_behind_a_function_are_evaluated_anew(
    networks: ModuleType, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = load("npz", data).test
    images = test.images / 255
    for weights in (torch.eye(3), torch.eye(3)[[1, 2, 0]], torch.eye(3)):
        monkeypatch.setattr(networks, "WEIGHTS", weights)
        evaluate.main(_network(networks, "of_weights", data, tmp_path))
        expected = _correct(lambda x, w=weights: x.mean((2, 3)) @ w, images, test.labels)
        assert _accuracy(tmp_path)["clean", None, "output"]["correct"] == expected
    assert expected > 20


def test_the_report_names_the_classes(run: Run, networks: ModuleType, data: Path, tmp_path: Path, plain: None) -> None:
    evaluate.main([str(run.folder), *FEW, "--limit", "1"])
    evaluate.main(_network(networks, "instance", data, tmp_path / "out"))
    names = ", ".join(load("npz", data).classes)
    for folder in (run.folder, tmp_path / "out"):
        assert f'<tr><th scope="row">classes</th><td>{names}</td></tr>' in (folder / "report.html").read_text("utf-8")


def test_a_folder_of_images_of_any_size_is_brought_to_one_size(
    networks: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[tuple[Any, Plan, Outputs]]
) -> None:
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(("a", "b", "c") * 4):
        folder = tmp_path / "data" / ("train" if number < 9 else "test") / name
        folder.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (8 + number, 9), (10 * number, 5, 5)).save(folder / f"{number}.png")
    arguments = _network(networks, "instance", tmp_path / "data", tmp_path / "out")
    arguments[arguments.index("npz")] = "folder"
    assert "image_size brings all images to one size" in error_line(capsys, evaluate.main, arguments)
    evaluate.main([*arguments, "--image-size", "8"])
    assert len(asked) == 1
    assert "--image-size: expected at least 1" in error_line(capsys, evaluate.main, [*arguments, "--image-size", "0"])


def test_a_damaged_checkpoint_config_or_record_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("checkpoint", "config_file", "metrics_file")):
        run = Run(Path(shutil.copytree(finished, tmp_path / str(number))))
        file: Path = getattr(run, name)
        file.write_bytes(b"\0" * 50 + b"\n")
        assert str(file) in error_line(capsys, evaluate.main, [str(run.folder)])


def test_a_damaged_ledger_is_computed_again(run: Run, plain: None) -> None:
    accuracy, ledger = _accuracy(run.folder), run.folder / "evaluation.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"\0" * 50 + b"\n" + b"".join(lines[1:4]) + lines[4][:-9])
    evaluate.main([str(run.folder), *FEW])
    assert _accuracy(run.folder).items() <= accuracy.items()
