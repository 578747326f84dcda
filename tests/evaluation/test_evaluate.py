"""The command that evaluates a run: its numbers against independent ones, its options, and its first estimate."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast import evaluate
from immunity_fast.attacks import fgsm, pgd
from immunity_fast.data.datasets import load
from immunity_fast.data.sampling import sample
from immunity_fast.evaluation import pipeline, runner
from immunity_fast.evaluation.plan import MEMBER_ATTACKS, Plan
from immunity_fast.evaluation.report import About, Outputs
from immunity_fast.evaluation.results import tables, to_csv
from immunity_fast.evaluation.targets import NetworkTarget
from immunity_fast.runtime import cli
from immunity_fast.training.checkpoint import load_model
from immunity_fast.training.run_evaluation import evaluate_run, target_of
from immunity_fast.training.run_folder import Run
from tests import evaluated
from tests.evaluated import (
    ATTACKED,
    FEW,
    accuracy_of,
    attacks_made,
    count_correct,
    file_bytes,
    network_options,
    perturb,
    results_of,
)
from tests.small_runs import CLASSES, change_config, dataset, error_line, options, split, trained

asked = evaluated.asked
finished = evaluated.finished
networks = evaluated.networks
plain = evaluated.plain
run = evaluated.run


def _exact_mean(folder: Path) -> Callable[[Tensor], Tensor]:
    experts = [expert.eval() for expert in load_model(folder)[0].unstack()]
    return lambda x: torch.stack([expert(x).softmax(-1) for expert in experts]).mean(0).log()


# A run


def test_evaluating_again_takes_over_what_training_found(run: Run) -> None:
    before, found = file_bytes(run.folder), results_of(run.folder)
    written = ("results.json", "results.md", "results.csv", "report.html", "figures/heatmaps.png", "figures/curves.png")
    for name in written:
        (run.folder / name).unlink()
    arguments = ["--attacks", "quick", "--attackers", "sample,mean", "--masking-images", "0", "--device", "cpu"]
    evaluate.main([str(run.folder), *arguments])
    after, again = file_bytes(run.folder), results_of(run.folder)
    assert all(again[name] == found[name] for name in ("accuracy", "worst_case", "heatmaps")), "the times, too"
    assert after.keys() == before.keys() | {"figures/robustness.png"}
    assert {name for name in after if after[name] != before[name]} <= set(written) - {"results.csv"}


def test_accuracies_of_the_exact_mean_are_the_experts_average_s(finished: Path, data: Path) -> None:
    found, test, mean = accuracy_of(finished), load("npz", data).test, _exact_mean(finished)
    attacked = sample(test, ATTACKED)
    x, labels = attacked.images.float() / 255, attacked.labels
    assert count_correct(mean, test.images.float() / 255, test.labels) == found["clean", None, "mean"]["correct"]
    assert count_correct(mean, x, labels) == found["subset", None, "mean"]["correct"]
    stepped = fgsm(mean, x, labels)
    assert count_correct(mean, stepped, labels) == pytest.approx(found["fgsm", "mean", "mean"]["correct"], abs=1)
    for i, expert in enumerate(load_model(finished)[0].unstack()):
        expected = count_correct(expert.eval(), stepped, labels)
        assert found["fgsm", "mean", f"expert {i + 1}"]["correct"] == pytest.approx(expected, abs=1)
    # Another random start.
    stepped = pgd(mean, x, labels, steps=20, generator=torch.Generator().manual_seed(5))
    assert count_correct(mean, stepped, labels) == pytest.approx(found["pgd", "mean", "mean"]["correct"], abs=2)


def test_every_attack_is_counted_for_its_attacker_and_its_judge(finished: Path) -> None:
    found = accuracy_of(finished)
    rows = [("clean", None), ("subset", None), ("noise", None)]
    rows += [(attack, attacker) for attack in ("fgsm", "pgd") for attacker in ("sample", "mean")]
    judges = ("sample", "mean", "off", "worst", "expert 1", "expert 2")
    assert list(found) == [(*row, judge) for row in rows for judge in judges]
    for (attack, _, _), entry in found.items():
        assert entry["images"] == (30 if attack == "clean" else ATTACKED)
        assert entry["accuracy"] == entry["correct"] / entry["images"]
    assert results_of(finished)["plan"] == {
        "attacks": ["fgsm", "pgd"],
        "attackers": ["sample", "mean"],
        "images": ATTACKED,
        "eps": None,
        "norm": "Linf",
        "other_eps": [],
        "masking_images": 32,
        "curve_eps": [0.25, 1, 4, 32],
        "curve_steps": [1, 5, 20],
        "curve_draws": [],
        "drop_fooled": False,
        "amp": "off",
        "queries": 5000,
        "autoattack_steps": 100,
        "mora_steps": 100,
        "arc_steps": 20,
        "seed": 0,
        "chunk": 50,
    }


def test_attacks_do_not_help(finished: Path) -> None:
    found = accuracy_of(finished)
    assert found["clean", None, "mean"]["accuracy"] > 0.6, "the run has learnt too little for this test"
    clean, one, many = (found[row]["correct"] for row in [("subset", None, "mean"), *_by("mean", "fgsm", "pgd")])
    assert many <= one <= clean
    worst = {entry["judge"]: entry for entry in results_of(finished)["worst_case"]}
    assert all(worst[judge]["correct"] <= entry["correct"] for (_, _, judge), entry in found.items())
    assert worst["worst"]["correct"] <= min(worst[judge]["correct"] for judge in ("mean", "off", "sample"))


def _by(attacker: str, *attacks: str) -> list[tuple[str, str, str]]:
    return [(attack, attacker, attacker) for attack in attacks]


def test_intervals_are_wilson_s(finished: Path) -> None:
    z = 1.959963984540054
    found = results_of(finished)
    for entry in [*found["accuracy"], *found["worst_case"], *found["curves"]["eps"], *found["curves"]["steps"]]:
        n, p = entry["images"], entry["accuracy"]
        centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        assert entry["interval"] == pytest.approx([max(0, centre - half), min(1, centre + half)], abs=1e-6)


def test_curves_are_of_the_radii_and_steps_that_were_asked_for(finished: Path) -> None:
    curves = results_of(finished)["curves"]
    assert [point["eps"] for point in curves["eps"]] == pytest.approx([2 / 255, 8 / 255, 32 / 255, 1])
    assert [point["steps"] for point in curves["steps"]] == [1, 5, 20]
    assert all(point["images"] == ATTACKED for points in curves.values() for point in points)
    assert curves["steps"][-1]["loss"] > curves["steps"][0]["loss"]


def test_the_report_shows_the_results(finished: Path) -> None:
    report = (finished / "report.html").read_text(encoding="utf-8")
    text = " ".join(unescape(re.sub("<[^>]*>", " ", report)).split())
    found = results_of(finished)
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


@pytest.mark.usefixtures("whole_end")
def test_results_lie_elsewhere_too_and_the_run_stays_untouched(run: Run, tmp_path: Path) -> None:
    before, out = file_bytes(run.folder), tmp_path / "made" / "elsewhere"
    evaluate.main([str(run.folder), *FEW, "--limit", "3", "--out", str(out)])
    assert file_bytes(run.folder) == before
    names = {"results.json", "results.md", "results.csv", "report.html", "evaluation.jsonl"}
    assert file_bytes(out).keys() == names | {"figures/heatmaps.png", "figures/curves.png"}
    found = results_of(out)
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
    least, report = printed.rstrip().split("\n")[-3::2]
    assert least.startswith("least over all attacks for each image, %, at ε = 8/255: gate sample ")
    assert report == f"report: {run.report}"


def test_a_limit_sets_how_many_images_are_attacked(run: Run, plain: None) -> None:
    evaluate.main([str(run.folder), *FEW, "--limit", "3"])
    counts = {key[0]: entry["images"] for key, entry in accuracy_of(run.folder).items()}
    assert counts == {"clean": 30, "subset": 3, "noise": 3, "fgsm": 3}


def test_a_run_is_evaluated_where_its_data_lie_now(run: Run, data: Path, tmp_path: Path, plain: None) -> None:
    accuracy = accuracy_of(run.folder)
    change_config(run.folder, data="no longer there.npz")
    ledger = (run.folder / "evaluation.jsonl").read_bytes()
    moved = shutil.copy(data, tmp_path / "moved.npz")
    evaluate.main([str(run.folder), *FEW, "--data", str(moved)])
    assert accuracy_of(run.folder).items() <= accuracy.items()
    assert (run.folder / "evaluation.jsonl").read_bytes() == ledger


def test_what_is_finished_counts_until_it_is_to_be_forgotten(
    run: Run, plain: None, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy, ledger = accuracy_of(run.folder), run.folder / "evaluation.jsonl"
    content = ledger.read_text(encoding="utf-8")
    ledger.write_text(re.sub(r'"sample": "[01]+"', f'"sample": "{"0" * ATTACKED}"', content), encoding="utf-8")
    evaluate.main([str(run.folder), *FEW])
    assert accuracy_of(run.folder)["noise", None, "sample"]["correct"] == 0
    capsys.readouterr()
    evaluate.main([str(run.folder), *FEW, "--again"])
    assert "going on" not in capsys.readouterr().out
    again = accuracy_of(run.folder)
    assert again.items() <= accuracy.items()
    assert len(again) == 5 * 6
    assert len(ledger.read_text(encoding="utf-8").splitlines()) == 5


def test_more_attacks_are_added_to_what_is_finished(run: Run, plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = attacks_made(monkeypatch)
    accuracy = accuracy_of(run.folder)
    evaluate.main([str(run.folder), *FEW, "--attacks", "quick,dlr", "--attackers", "mean,experts"])
    expected = [(attack, f"expert {i}") for attack in ("fgsm", "pgd") for i in (1, 2)]
    assert made == [*expected, *(("dlr", attacker) for attacker in ("mean", "expert 1", "expert 2"))]
    found = accuracy_of(run.folder)
    assert all(found[place] == accuracy[place] for place in found.keys() & accuracy.keys())
    assert len(found) == (3 + 3 * 3) * 6
    assert {entry["attack"] for entry in results_of(run.folder)["transfer_from_experts"]} == {"fgsm", "pgd", "dlr"}


def test_another_seed_is_another_evaluation(run: Run, plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made, accuracy = attacks_made(monkeypatch), accuracy_of(run.folder)
    evaluate.main([str(run.folder), *FEW, "--seed", "1"])
    assert made == [("fgsm", "sample"), ("fgsm", "mean")]
    assert results_of(run.folder)["plan"]["seed"] == 1
    found = accuracy_of(run.folder)
    assert found["fgsm", "mean", "mean"] == accuracy["fgsm", "mean", "mean"], "no chance is in it"


def test_the_best_checkpoint_or_the_named_one_is_evaluated(run: Run, data: Path, plain: None) -> None:
    perturb(run.checkpoint, run.best_checkpoint, 0.3)
    test = load("npz", data).test
    expected = {
        name: count_correct(_exact_mean(path), test.images.float() / 255, test.labels)
        for name, path in (("last", run.checkpoint), ("best", run.best_checkpoint))
    }
    assert expected["last"] != expected["best"]
    for arguments, name in (([], "best"), (["--checkpoint", "last"], "last"), (["--checkpoint", "best"], "best")):
        evaluate.main([str(run.folder), *FEW, "--limit", "1", *arguments])
        assert accuracy_of(run.folder)["clean", None, "mean"]["correct"] == expected[name]


def test_another_run_s_adversarial_images_are_transferred(run: Run, data: Path, tmp_path: Path, plain: None) -> None:
    other = Run(Path(shutil.copytree(run.folder, tmp_path / "other")))
    perturb(run.checkpoint, other.checkpoint, 0.05)
    before = file_bytes(other.folder)
    arguments = ["--attackers", "mean,transfer", "--transfer-from", str(other.folder), "--eps", "60/255"]
    evaluate.main([str(run.folder), *FEW, *arguments])
    assert file_bytes(other.folder) == before
    found, chosen = accuracy_of(run.folder), sample(load("npz", data).test, ATTACKED)
    assert {key[1] for key in found} == {None, "mean", "transfer"}
    images = fgsm(_exact_mean(other.folder), chosen.images.float() / 255, chosen.labels, eps=60 / 255)
    expected = count_correct(_exact_mean(run.folder), images, chosen.labels)
    assert found["fgsm", "transfer", "mean"]["correct"] == pytest.approx(expected, abs=1)
    assert found["fgsm", "transfer", "mean"]["correct"] >= found["fgsm", "mean", "mean"]["correct"]
    rows = tables(results_of(run.folder))[0].rows
    assert ["FGSM", "another, independently trained ensemble"] in [list(row[:2]) for row in rows]


def test_a_run_of_one_network_has_one_judge_and_one_attacker(data: Path, tmp_path: Path, plain: None) -> None:
    _, run = trained([*options(data, experts=1, lr=0.02, attack_images=5), "--out", str(tmp_path / "single")])
    evaluate.main([str(run.folder), "--device", "cpu", "--attacks", "fgsm", "--masking-images", "0"])
    found, test = accuracy_of(run.folder), load("npz", data).test
    rows = [("clean", None), ("subset", None), ("noise", None), ("fgsm", "output")]
    assert list(found) == [(*row, "output") for row in rows]
    (network,) = load_model(run.folder)[0].unstack()
    network.eval()
    expected = count_correct(network, test.images.float() / 255, test.labels)
    assert found["clean", None, "output"]["correct"] == expected
    chosen = sample(test, 5)
    images = fgsm(network, chosen.images.float() / 255, chosen.labels)
    assert found["fgsm", "output", "output"]["correct"] == pytest.approx(
        count_correct(network, images, chosen.labels), abs=1
    )
    results = results_of(run.folder)
    assert "heatmaps" not in results
    assert "transfer_from_experts" not in results
    assert [entry["judge"] for entry in results["worst_case"]] == ["output"]
    for attackers in ("mean", "experts"):
        with pytest.raises(cli.InputError, match=f"--attackers: expected some of output, got {attackers}"):
            evaluate.main([str(run.folder), "--attackers", attackers])


def test_the_model_is_left_as_it_was(finished: Path, tmp_path: Path, data: Path, plain: None) -> None:
    run, (model, _) = Run(finished), load_model(finished)
    generator = torch.Generator().manual_seed(7)
    model.gate.switch, model.gate.generator = "off", generator
    frozen = next(model.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, shared = generator.get_state(), torch.get_rng_state()
    plan = Plan(attacks=("fgsm",), images=2, masking_images=1, curve_eps=(1,), curve_steps=(1,))
    target = target_of(model, CLASSES)
    found = evaluate_run(run, target, load("npz", data), run.config(), plan, Outputs(tmp_path))
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
    monkeypatch.setattr(runner, "BoundAttack", fail)
    target = target_of(model, CLASSES)
    with pytest.raises(RuntimeError, match="failed"):
        evaluate_run(run, target, load("npz", data), run.config(), Plan(images=2), Outputs(tmp_path))
    assert model.gate.switch == "call"
    assert model.gate.generator is None
    assert all(parameter.requires_grad for parameter in model.parameters())


# What a command line asks for


OPTIONS: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["--attacks", "quick"], {"attacks": ("fgsm", "pgd")}),
    (["--attacks", "paper,square"], {"attacks": ("fgsm", "bim", "mim", "pgd", "square")}),
    (["--attacks", "default"], {"attacks": ("fgsm", "bim", "mim", "pgd", "pgd-sum", "arc", "mora")}),
    (["--attacks", "pgd,quick,pgd"], {"attacks": ("pgd", "fgsm")}),
    (
        ["--attacks", "all"],
        {
            "attacks": (
                "fgsm",
                "bim",
                "mim",
                "pgd",
                "cw",
                "dlr",
                "cw100",
                "dlr100",
                *MEMBER_ATTACKS,
                "square",
                "autoattack",
            )
        },
    ),
    (["--attackers", "worst,experts"], {"attackers": ("worst", "expert 1", "expert 2")}),
    (["--attackers", "expert 2"], {"attackers": ("expert 2",)}),
    (["--eps", "4/255"], {"eps": 4 / 255}),
    (["--eps", "0"], {"eps": 0.0}),
    (["--norm", "L2", "--eps", "0.5"], {"norm": "L2", "eps": 0.5}),
    (["--limit", "1"], {"images": 1}),
    (["--drop-fooled"], {"drop_fooled": True}),
    (["--amp", "bf16"], {"amp": "bf16"}),
    (["--masking-images", "0"], {"masking_images": 0}),
    (["--eps", "2/255,4/255"], {"eps": 4 / 255, "other_eps": (2 / 255,)}),
    (["--queries", "9", "--autoattack-steps", "8"], {"queries": 9, "autoattack_steps": 8}),
    (["--mora-steps", "7", "--arc-steps", "6"], {"mora_steps": 7, "arc_steps": 6}),
    (["--seed", "0"], {"seed": 0}),
]


def test_every_setting_of_a_plan_is_tried_by_its_option() -> None:
    tried = {name for _, expected in OPTIONS for name in expected}
    assert tried | {"curve_eps", "curve_steps", "curve_draws", "chunk"} == {
        field.name for field in dataclasses.fields(Plan)
    }


@pytest.mark.parametrize(("arguments", "expected"), OPTIONS)
def test_options_are_the_plan_s(
    run: Run, asked: list[tuple[Any, Plan, Outputs]], arguments: list[str], expected: dict[str, Any]
) -> None:
    change_config(run.folder, seed=3)
    evaluate.main([str(run.folder), "--device", "cpu", *arguments])
    ((target, plan, outputs),) = asked
    assert plan == Plan(**{"images": ATTACKED, "seed": 3} | expected)
    assert target.draws == 20
    assert outputs.folder == run.folder


def test_draws_are_the_target_s(run: Run, asked: list[tuple[Any, Plan, Outputs]]) -> None:
    evaluate.main([str(run.folder), "--draws", "3", "--device", "cpu"])
    assert asked[0][0].draws == 3


def test_a_radius_and_a_norm_are_those_of_the_attacks(run: Run, data: Path, plain: None) -> None:
    evaluate.main([str(run.folder), *FEW, "--norm", "L2", "--eps", "3"])
    chosen, mean = sample(load("npz", data).test, ATTACKED), _exact_mean(run.folder)
    images = fgsm(mean, chosen.images.float() / 255, chosen.labels, eps=3, norm="L2")
    correct = accuracy_of(run.folder)["fgsm", "mean", "mean"]["correct"]
    assert correct == pytest.approx(count_correct(mean, images, chosen.labels), abs=1)
    assert correct < ATTACKED
    assert (results_of(run.folder)["plan"]["norm"], results_of(run.folder)["plan"]["eps"]) == ("L2", 3)


# After the first images


def _brightness(images: Tensor) -> Tensor:
    return 3 * images.mean((2, 3))


def _estimates(
    capsys: pytest.CaptureFixture[str], folder: Path, plan: Plan, network: Callable[[Tensor], Tensor] = _brightness
) -> list[str]:
    """The lines that an evaluation prints of what will come out."""
    capsys.readouterr()
    about = About(title="title", lead="lead", settings={}, commands={})
    pipeline.evaluate(NetworkTarget(network, CLASSES), dataset(test=split(12)), plan, Outputs(folder), about)
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("worst case so far")]


def test_an_estimate_is_printed_once_after_the_first_chunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(attacks=("fgsm",), images=11, chunk=4, masking_images=0, eps=0.01)
    (line,) = _estimates(capsys, tmp_path / "long", plan)
    first = Plan(attacks=("fgsm",), images=4, chunk=4, masking_images=0, eps=0.01)
    assert _estimates(capsys, tmp_path / "short", first) == [], "there is nothing to come"
    (worst,) = results_of(tmp_path / "short")["worst_case"]
    assert 0 < worst["correct"] < 4
    low, high = worst["interval"]
    expected = f"{100 * worst['accuracy']:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f}), 4 images; these took "
    assert re.fullmatch(re.escape(f"worst case so far {expected}") + r"\d+ s", line)
    assert _estimates(capsys, tmp_path / "long", plan) == [], "all is there already"


def test_going_on_it_estimates_from_all_that_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(attacks=("fgsm",), images=11, chunk=4, masking_images=0)
    _estimates(capsys, tmp_path, Plan(attacks=("fgsm",), images=4, chunk=4, masking_images=0))
    (line,) = _estimates(capsys, tmp_path, plan)
    assert ", 8 images" in line


# What was not attacked


def test_attacks_that_are_for_none_of_the_attackers_are_an_error(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = file_bytes(run.folder)
    message = error_line(capsys, evaluate.main, [str(run.folder), "--attacks", "square", "--attackers", "worst"])
    assert "expected at least one for an attacker, got none (square by worst: it asks what answers" in message
    assert file_bytes(run.folder) == before


def test_a_pair_that_is_left_out_is_a_line_with_the_reason(
    run: Run, capsys: pytest.CaptureFixture[str], plain: None
) -> None:
    arguments = ["--attacks", "fgsm,square", "--attackers", "worst,mean,experts", "--queries", "2", "--limit", "2"]
    evaluate.main([str(run.folder), *FEW, *arguments])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert [line.split(":")[1] for line in lines] == [f" square by {who}" for who in ("worst", "expert 1", "expert 2")]
    assert all("it asks what answers" in line for line in lines)
    assert [(pair["attack"], pair["attacker"]) for pair in results_of(run.folder)["left_out"]] == [
        ("square", "worst"),
        ("square", "expert 1"),
        ("square", "expert 2"),
    ]
    for name in ("report.html", "results.md"):
        text = unescape((run.folder / name).read_text(encoding="utf-8"))
        assert "Left out: not attacked, and in no worst case" in text
        assert "worst, expert 1, expert 2" in text


# Names


def test_the_report_names_the_classes(run: Run, networks: ModuleType, data: Path, tmp_path: Path, plain: None) -> None:
    evaluate.main([str(run.folder), *FEW, "--limit", "1"])
    evaluate.main(network_options(networks, "instance", data, tmp_path / "out"))
    names = ", ".join(load("npz", data).classes)
    for folder in (run.folder, tmp_path / "out"):
        assert f'<tr><th scope="row">classes</th><td>{names}</td></tr>' in (folder / "report.html").read_text("utf-8")
