"""What is made of an evaluation's pieces, against loops: results, tables, signs of masking, and what was left out."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast.data.datasets import Split
from immunity_fast.evaluation import results as findings
from immunity_fast.evaluation import runner, words
from immunity_fast.evaluation.plan import ATTACKS, Plan, Row
from immunity_fast.evaluation.results import results, tables, to_csv
from immunity_fast.evaluation.runner import Evaluation, bits, mean_loss
from immunity_fast.evaluation.targets import TRIES, MixtureTarget, NetworkTarget
from immunity_fast.reporting.html import Table
from tests import evaluations, grids
from tests.evaluations import (
    PLAN,
    brightness,
    check_share,
    colored,
    evaluation_of,
    quadratic,
    run_to_end,
    trained_mixture,
)
from tests.small_runs import CLASSES

small_chunks_and_short_curves = evaluations.small_chunks_and_short_curves
whole = evaluations.whole


# What is made of the pieces


def _made_up(path: Path, seed: int = 0, *, images: int = 11, plan: Plan | None = None) -> Evaluation:
    """An evaluation of random bits, without an attack."""
    plan = plan or Plan(attacks=ATTACKS, images=images, chunk=4, masking_images=6, curve_eps=(0.5, 4), eps=0.05)
    curves = {"eps": plan.curve_eps, "steps": plan.curve_steps, "draws": plan.curve_draws}
    target = MixtureTarget(trained_mixture(3), CLASSES, transfer=brightness)
    evaluation = evaluation_of(path, plan, target, loss_fn=None)
    generator = torch.Generator().manual_seed(seed)

    def judged(row: Row, start: int, stop: int) -> dict[str, Any]:
        # Likelier right than wrong, so that something is left of the worst case.
        drawn = torch.rand(len(target.judges), stop - start, generator=generator) < 0.97
        right = {judge: "".join("01"[int(bit)] for bit in row) for judge, row in zip(target.judges, drawn, strict=True)}
        loss = float(torch.rand(1, generator=generator)) * (stop - start)
        shares = torch.rand(stop - start, generator=generator).tolist()
        drawn = torch.rand(TRIES, stop - start, generator=generator) < 0.97
        return {
            "right": right,
            "loss": loss,
            "shares": shares,
            "tries": ["".join("01"[int(bit)] for bit in row) for row in drawn],
        }

    for row, start, stop in evaluation.pieces():
        if row.kind in curves:
            piece: dict[str, Any] = {"points": [{row.kind: v} | judged(row, start, stop) for v in curves[row.kind]]}
        else:
            piece = judged(row, start, stop) | {"seconds": 0.25}
        evaluation.ledger.pieces[evaluation.key(row, start, stop)] = piece
    return evaluation


def _bits(evaluation: Evaluation, row: Row, judge: str) -> list[int]:
    """The bits of a row, piece by piece from the ledger."""
    found = []
    for other, start, stop in evaluation.pieces():
        if other == row:
            found += [int(bit) for bit in evaluation.ledger[evaluation.key(row, start, stop)]["right"][judge]]
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_results_are_sums_over_the_bits(tmp_path: Path, seed: int) -> None:
    evaluation = _made_up(tmp_path / "l", seed)
    found, judges = results(evaluation), evaluation.target.judges
    entries = {(e["attack"], e["attacker"], e["judge"]): e for e in found["accuracy"]}
    rows = [Row("clean"), *evaluation.rows]
    assert list(entries) == [(r.attack or r.kind, r.attacker or None, judge) for r in rows for judge in judges]
    assert len(found["accuracy"]) == len(entries)
    for row, judge in itertools.product(rows, judges):
        entry = entries[row.attack or row.kind, row.attacker or None, judge]
        check_share(entry, _bits(evaluation, row, judge))
        assert entry["images"] == (23 if row.kind == "clean" else 11)
        assert entry["seconds"] == 0.25 * 3
    assert [entry["judge"] for entry in found["worst_case"]] == list(judges)
    for entry in found["worst_case"]:
        columns = [_bits(evaluation, row, entry["judge"]) for row in evaluation.rows]
        check_share(entry, [int(all(column[i] for column in columns)) for i in range(11)])
        assert findings.worst_case(evaluation, entry["judge"]).items() <= entry.items()
    assert 0 < sum(entry["correct"] for entry in found["worst_case"]) < 11 * len(judges)


def test_withstanding_transfer_is_doing_so_from_every_expert(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    found = results(evaluation)["transfer_from_experts"]
    names = ("fgsm", "bim", "mim", "pgd", "cw", "dlr")
    expected = [(attack, judge) for attack in names for judge in evaluation.target.judges]
    assert [(entry["attack"], entry["judge"]) for entry in found] == expected
    for entry in found:
        assert entry["attacker"] == "any expert"
        rows = [row for row in evaluation.rows if row.attack == entry["attack"] and row.attacker[:6] == "expert"]
        assert len(rows) == 3
        columns = [_bits(evaluation, row, entry["judge"]) for row in rows]
        check_share(entry, [int(all(column[i] for column in columns)) for i in range(11)])


def test_curves_are_of_what_the_exact_attacker_attacks(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    found = results(evaluation)["curves"]
    assert [row.kind for row in evaluation.curves] == ["steps", "eps", "draws"]
    for row in evaluation.curves[:2]:
        values = {"eps": (0.5, 4), "steps": evaluation.plan.curve_steps}[row.kind]
        assert [point[row.kind] for point in found[row.kind]] == list(values)
        pieces = [evaluation.ledger[evaluation.key(row, *chunk)]["points"] for chunk in ((0, 4), (4, 6))]
        for i, point in enumerate(found[row.kind]):
            check_share(point, [int(bit) for piece in pieces for bit in piece[i]["right"]["mean"]])
            assert point["loss"] == pytest.approx(sum(piece[i]["loss"] for piece in pieces) / 6)
    pieces = [evaluation.ledger[evaluation.key(evaluation.curves[2], *chunk)]["points"] for chunk in ((0, 4), (4, 6))]
    for i, (point, draws) in enumerate(zip(found["draws"], (1, 10, 50), strict=True)):
        assert (point["draws"], point["images"]) == (draws, 6)
        assert point["accuracy"] == pytest.approx(sum(sum(piece[i]["shares"]) for piece in pieces) / 6)


def test_the_worst_case_so_far_is_of_the_finished_chunks(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    whole = {row: _bits(evaluation, row, "worst") for row in evaluation.rows}
    last = evaluation.rows[-1]
    for start, stop in ((8, 11), (4, 8)):
        del evaluation.ledger.pieces[evaluation.key(last, start, stop)]
        right = [int(all(column[i] for column in whole.values())) for i in range(start)]
        check_share(findings.worst_case(evaluation, "worst"), right)
    del evaluation.ledger.pieces[evaluation.key(last, 0, 4)]
    assert findings.worst_case(evaluation, "worst")["images"] == 0


def test_results_are_json(whole: Evaluation, tmp_path: Path) -> None:
    for evaluation in (whole, _made_up(tmp_path / "l")):
        found = results(evaluation)
        back = json.loads(json.dumps(found, allow_nan=False))
        assert back["accuracy"] == found["accuracy"]
        assert Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in back["plan"].items()}) == evaluation.plan


def test_no_images_have_no_mean_loss() -> None:
    assert math.isnan(mean_loss([]))
    assert bits([], "mean") == []


# Tables


def test_the_csv_has_every_number(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    found = results(evaluation)
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert list(lines[0]) == ["attack", "attacker", "judge", "correct", "images", "accuracy", "low", "high"]
    expected = [*found["accuracy"], *found["transfer_from_experts"]]
    expected += [{"attack": "worst case", "attacker": "all", **entry} for entry in found["worst_case"]]
    assert len(lines) == len(expected)
    for line, entry in zip(lines, expected, strict=True):
        assert (line["attack"], line["attacker"], line["judge"]) == (
            entry["attack"],
            entry["attacker"] or "",
            entry["judge"],
        )
        assert (int(line["correct"]), int(line["images"])) == (entry["correct"], entry["images"])
        assert [float(line[name]) for name in ("accuracy", "low", "high")] == [entry["accuracy"], *entry["interval"]]


def _captioned(evaluation: Evaluation, beginning: str) -> Table:
    """The table of an evaluation whose caption begins so."""
    (table,) = (table for table in tables(results(evaluation)) if table.caption.startswith(beginning))
    return table


def _cell(right: list[int]) -> str:
    """An accuracy with half its interval, in percent."""
    z, n, p = 1.959964, len(right), sum(right) / len(right)
    low, high = ((p + z**2 / (2 * n) + s * z * math.sqrt(p * (1 - p) / n + (z / n) ** 2 / 4)) for s in (-1, 1))
    low, high = max(0, low / (1 + z**2 / n)), min(1, high / (1 + z**2 / n))
    return f"{100 * p:.1f} ± {100 * (high - low) / 2:.1f}"


def test_the_table_has_a_row_an_attack_and_a_column_a_judge(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    table = tables(results(evaluation))[0]
    judges = {
        "gate sample": "sample",
        "gate mean": "mean",
        "gate off": "off",
        "gate worst": "worst",
    }
    assert list(table.columns) == ["attack", "what the attacker differentiates", "images", *judges]
    clean, *rows = [Row("clean"), *evaluation.rows]
    shown = [clean, *(row for row in rows if not row.attacker.startswith("expert "))]
    assert len(table.rows) == len(shown) + 6 + 1
    own = [row for row in table.rows if row[1] != "an expert alone, transferred; the worst of them"][:-1]
    for row, line in zip(shown, own, strict=True):
        assert line[0] == words.NAMES[row.attack or row.kind]
        assert (line[1] == "—") == (not row.attacker)
        assert line[2] == ("23" if row.kind == "clean" else "11")
        assert list(line[3:]) == [_cell(_bits(evaluation, row, judge)) for judge in judges.values()]
    transferred = [row for row in table.rows if row not in own][:-1]
    for attack, line in zip(("fgsm", "bim", "mim", "pgd", "cw", "dlr"), transferred, strict=True):
        columns = [row for row in evaluation.rows if row.attack == attack and row.attacker.startswith("expert ")]
        assert line[0] == words.NAMES[attack]
        for cell, judge in zip(line[3:], judges.values(), strict=True):
            right = [_bits(evaluation, row, judge) for row in columns]
            assert cell == _cell([int(all(column)) for column in zip(*right, strict=True)])
    assert table.rows[-1][:3] == ["worst case for each image", "all of the above", "11"]
    for cell, judge in zip(table.rows[-1][3:], judges.values(), strict=True):
        right = [_bits(evaluation, row, judge) for row in evaluation.rows]
        assert cell == _cell([int(all(column)) for column in zip(*right, strict=True)])
    names = [row[0] for row in table.rows[:-1]]
    assert [name for name, _ in itertools.groupby(names)] == list(words.NAMES.values())


def test_the_experts_table_has_the_mean_s_attack_and_their_own(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    table = _captioned(evaluation, "Accuracy of each expert alone")
    assert list(table.columns[2:]) == ["expert 1", "expert 2", "expert 3"]
    found = {(row[0], row[1]): list(row[2:]) for row in table.rows}
    assert len(found) == len(table.rows) == 3 + 11 + 6
    for row in [Row("clean"), *evaluation.rows]:
        name = words.NAMES[row.attack or row.kind]
        if not row.attacker or row.attacker == "mean":
            knows = "—" if not row.attacker else "gate mean: the exact mean of all permutations"
            if row.attack == "mora":
                knows = "the experts, each weighed by what it adds; gate mean"
            assert found[name, knows] == [_cell(_bits(evaluation, row, f"expert {i}")) for i in (1, 2, 3)]
        elif row.attacker.startswith("expert "):
            cell = found[name, "this expert alone"][int(row.attacker[-1]) - 1]
            assert cell == _cell(_bits(evaluation, row, row.attacker))


def test_tables_as_markdown_have_every_cell(whole: Evaluation) -> None:
    for table in tables(results(whole)):
        lines = table.to_markdown().split("\n")
        assert lines[0] == f"**{table.caption}**"
        for row in table.rows:
            assert any(all(cell in line for cell in row) for line in lines)


def test_a_notebook_shows_the_tables_and_where_the_report_is(whole: Evaluation) -> None:
    found = results(whole)
    html = found._repr_html_()
    assert html.count("<table>") == len(tables(found)) == len(found.tables())
    assert "report" not in html
    found.report = Path("runs/<a>/report.html")
    assert found._repr_html_().endswith("<p>report: runs/&lt;a&gt;/report.html</p>")
    pretty = pytest.importorskip("IPython.lib.pretty", reason="which prints values in notebooks")
    text = pretty.pretty(found)
    assert text.startswith(tables(found)[0].to_markdown())
    assert text.endswith("report: runs/<a>/report.html")


def test_a_network_has_one_column(tmp_path: Path) -> None:
    evaluation = evaluation_of(
        tmp_path / "l", replace(PLAN, attackers=None, masking_images=0), NetworkTarget(brightness, 3)
    )
    run_to_end(evaluation)
    accuracy, least = tables(results(evaluation))
    assert [(row[0], row[1]) for row in least.rows] == [("accuracy", accuracy.rows[-1][-1])]
    assert list(accuracy.columns) == ["attack", "what the attacker differentiates", "images", "accuracy"]
    assert [row[0] for row in accuracy.rows] == [
        "clean",
        "clean, the attacked images",
        "random noise of the same size",
        "FGSM",
        "BIM-10",
        "worst case for each image",
    ]
    assert "transfer_from_experts" not in results(evaluation)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eps": None}, "Linf, ε = 8/255."),
        ({"eps": None, "norm": "L2"}, "L2, ε = 1."),
        ({"eps": 0.125}, "Linf, ε = 0.125."),
        ({"eps": 0.5, "norm": "L2"}, "L2, ε = 0.5."),
        ({"eps": 0.0}, "Linf, ε = 0."),
        ({"eps": 8 / 255}, "Linf, ε = 8/255."),
    ],
)
def test_the_table_says_what_the_radius_is(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    plan = replace(Plan(attacks=("fgsm",), images=3, chunk=3, masking_images=0), **changes)
    assert tables(results(_made_up(tmp_path / "l", plan=plan)))[0].note.startswith(expected)


def test_the_table_says_whose_gradients_are_in_bfloat16(tmp_path: Path) -> None:
    ends = {
        ("fgsm",): " Gradients were taken in bfloat16; everything is judged in float32.",
        ("fgsm", "mora"): " Gradients were taken in bfloat16, without those of MORA; everything is judged in float32.",
    }
    for attacks, end in ends.items():
        plan = Plan(attacks=attacks, images=3, chunk=3, masking_images=0, amp="bf16")
        assert tables(results(_made_up(tmp_path / attacks[-1], plan=plan)))[0].note.endswith(end)


# Signs of masking


UNMOVED = "every image has a gradient that an attack can follow"
CHECKS = {
    "noise": "random noise of the same size is weaker than gradients",
    "steps": "many steps are at least as strong as one",
    "transfer": "the model's own gradients are stronger than transfer and black boxes",
    "black": "gradients break what black boxes break",
    "loss": "loss rises with the number of steps",
    "success": "success rises with ε, to 100 %",
}


class _Masked(torch.autograd.Function):
    """The images as they are; their gradient multiplied by a number for each."""

    @staticmethod
    def forward(context: Any, images: Tensor, factors: Tensor) -> Tensor:
        context.save_for_backward(factors)
        return images.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factors,) = context.saved_tensors
        return gradient * factors, None


def _flipped(images: Tensor) -> Tensor:
    """Its gradient points the wrong way."""
    return brightness(_Masked.apply(images, -torch.ones(1)))


def _right_at_stored_images(images: Tensor) -> Tensor:
    """Its gradient is right where all pixels are whole numbers of 255ths, and points the wrong way elsewhere."""
    stored = ((255 * images - (255 * images).round()).abs() < 1e-3).flatten(1).all(1)
    return brightness(_Masked.apply(images, torch.where(stored, 1.0, -1.0)[:, None, None, None]))


def _set_in_its_ways(images: Tensor) -> Tensor:
    """Class 0 wins, whatever an attack does."""
    return brightness(images) + torch.tensor([100.0, 0, 0])


def _masking(
    tmp_path: Path, network: Any, *, transfer: Any = None, attacks: tuple[str, ...] = ("fgsm", "pgd")
) -> dict[str, bool]:
    """Which of the checks were passed, on images of which every fifth has a wrong label."""
    labels = torch.where(torch.arange(30) % 5 == 0, (colored(30).labels + 1) % 3, colored(30).labels)
    plan = replace(
        PLAN,
        attacks=attacks,
        attackers=None,
        eps=0.15,
        masking_images=30,
        images=30,
        chunk=30,
        curve_steps=(1, 5, 10),
        curve_eps=(0.5, 1, 2, 10),
        queries=40,
    )
    test = Split(colored(30).images, labels)
    target = NetworkTarget(network, CLASSES, name=network.__name__, transfer=transfer)
    evaluation = evaluation_of(tmp_path / "l", plan, target, test)
    run_to_end(evaluation)
    found = results(evaluation)
    names = {text: name for name, text in CHECKS.items()} | {UNMOVED: "gradient"}
    checks = {names[check["check"]]: check for check in found["masking"]}
    assert len(checks) == len(found["masking"])
    (table,) = (table for table in tables(found) if table.caption == "Signs of gradient masking")
    assert [list(row) for row in table.rows] == [
        [c["check"], "passed" if c["passed"] else "NOT PASSED", c["finding"]] for c in found["masking"]
    ]
    percents = {
        name: f"{100 * entry['accuracy']:.1f} %"
        for name in ("noise", "fgsm", "pgd")
        for entry in found["accuracy"]
        if entry["attack"] == name and entry["attacker"] in (None, "output")
    }
    if "pgd" in percents:
        assert checks["noise"]["finding"] == f"{percents['noise']} under noise, {percents['pgd']} under PGD-20"
    return {name: check["passed"] for name, check in checks.items()}


def test_an_honest_network_passes_every_check(tmp_path: Path) -> None:
    other = lambda x: quadratic(x) + brightness(x)  # noqa: E731
    assert _masking(tmp_path, brightness, transfer=other) == dict.fromkeys(CHECKS, True)


def test_a_gradient_of_wrong_sign_passes_the_check_of_steps_only(tmp_path: Path) -> None:
    found = _masking(tmp_path, _flipped, transfer=brightness)
    assert found == dict.fromkeys(CHECKS, False) | {"steps": True}


def test_one_step_that_is_stronger_than_many_does_not_pass(tmp_path: Path) -> None:
    found = _masking(tmp_path, _right_at_stored_images)
    assert not found["steps"]
    assert not found["success"]
    assert "transfer" not in found


def test_images_that_no_radius_fools_do_not_pass(tmp_path: Path) -> None:
    """Class 0 is so sure that its cross-entropy has no gradient."""
    honest = {"noise": True, "steps": True, "loss": True, "success": False}
    assert _masking(tmp_path, _set_in_its_ways) == honest | {"gradient": False}


def test_a_random_network_s_attacks_are_compared_by_expectation(tmp_path: Path) -> None:
    def network(images: Tensor) -> Tensor:
        return brightness(images) + 3 * torch.randn(len(images), CLASSES)

    plan = replace(PLAN, attacks=("bim", "autoattack"), attackers=("output",), masking_images=0)
    evaluation = evaluation_of(tmp_path / "l", plan, NetworkTarget(network, CLASSES, draws=2))
    run_to_end(evaluation)
    found = results(evaluation)
    expected = {entry["attack"]: entry["accuracy"] for entry in found["drawn"]}
    once = {entry["attack"]: entry["accuracy"] for entry in found["accuracy"]}
    assert expected["autoattack"] != once["autoattack"]
    (check,) = (check for check in found["masking"] if check["check"].startswith("AutoAttack"))
    assert f"{100 * expected['autoattack']:.1f} % under AutoAttack, {100 * expected['bim']:.1f} %" in check["finding"]


def test_a_black_box_that_is_stronger_does_not_pass(tmp_path: Path) -> None:
    honest = _masking(tmp_path, brightness, attacks=("pgd", "square"))
    assert honest == {"noise": True, "transfer": True, "black": True, "loss": True, "success": True}
    masked = _masking(tmp_path, _flipped, attacks=("pgd", "square"))
    assert not masked["transfer"]
    assert not masked["black"]


def test_checks_whose_attacks_were_not_made_are_left_out(tmp_path: Path) -> None:
    assert _masking(tmp_path, brightness, attacks=("fgsm",)).keys() == {"loss", "success"}
    assert _masking(tmp_path, brightness, attacks=("pgd",)).keys() == {"noise", "loss", "success"}


@pytest.mark.parametrize(
    ("which", "accuracies", "losses", "passed"),
    [
        ("noise", {"noise": 101, "pgd": 100}, None, True),
        ("noise", {"noise": 100, "pgd": 100}, None, True),
        ("noise", {"noise": 99, "pgd": 100}, None, False),
        ("steps", {"fgsm": 99, "pgd": 100}, None, True),
        ("steps", {"fgsm": 96, "pgd": 100}, None, False),
        ("transfer", {"transfer": 99, "pgd": 100, "square": 150}, None, True),
        ("transfer", {"transfer": 150, "pgd": 100, "square": 96}, None, False),
        ("transfer", {"transfer": 96, "pgd": 100, "square": 150}, None, False),
        ("loss", {}, [1, 2, 2, 3], True),
        ("loss", {}, [1, 3, 2.95, 3], True),
        ("loss", {}, [1, 3, 2.9, 4], False),
        ("loss", {}, [1, 1, 1, 1], False),
        ("loss", {}, [1, 2, 3, math.nan], False),
        ("success", {"eps": [200, 100, 0]}, None, True),
        ("success", {"eps": [100, 101, 0]}, None, True),
        ("success", {"eps": [100, 104, 0]}, None, False),
        ("success", {"eps": [200, 100, 1]}, None, False),
        ("success", {"eps": [0, 0, 0]}, None, True),
    ],
)
def test_each_check_is_passed_and_not_passed_where_it_should(
    tmp_path: Path, which: str, accuracies: dict[str, Any], losses: list[float] | None, passed: bool
) -> None:
    """Of 200 images, so many right; an image is half a percent."""
    plan = Plan(attacks=("fgsm", "pgd", "square"), images=200, chunk=200, masking_images=200, eps=0.1)
    plan = replace(plan, curve_eps=(1, 2, 3), curve_steps=(1, 2, 3, 4))
    target = NetworkTarget(brightness, CLASSES, transfer=quadratic)
    evaluation = evaluation_of(tmp_path / "l", plan, target, colored(200))
    default = {"noise": 180, "fgsm": 150, "pgd": 100, "square": 140, "transfer": 160, "eps": [150, 100, 0]} | accuracies

    def piece(right: int, loss: float = 1.0) -> dict[str, Any]:
        return {"right": {"output": "1" * right + "0" * (200 - right)}, "loss": 200 * loss, "seconds": 0.0}

    for row, start, stop in evaluation.pieces():
        if row.kind == "steps":
            values = zip((1, 2, 3, 4), losses or [1, 2, 3, 4], strict=True)
            made: dict[str, Any] = {"points": [{"steps": s} | piece(9, loss) for s, loss in values]}
        elif row.kind == "eps":
            made = {"points": [{"eps": e} | piece(n) for e, n in zip((1, 2, 3), default["eps"], strict=True)]}
        elif row.attacker == "transfer":
            made = piece(default["transfer"])
        else:
            made = piece(default.get(row.attack or row.kind, 200 if start == 0 else 0))
            made["right"]["output"] = made["right"]["output"][: stop - start]
        evaluation.ledger.pieces[evaluation.key(row, start, stop)] = made
    checks = {check["check"]: check["passed"] for check in results(evaluation)["masking"]}
    expected = dict.fromkeys(CHECKS.values(), True) | {CHECKS[which]: passed}
    if which == "transfer":
        expected[CHECKS["black"]] = passed
    assert checks == expected


# Images that cannot be moved


def _knows_no_dark_ones(images: Tensor) -> Tensor:
    """`brightness`, but of a dark image it has no gradient: it takes it for class 0."""
    dark = images.amax((1, 2, 3)) < 0.3
    return torch.where(dark[:, None], torch.tensor([1.0, 0, 0]) + 0 * images.mean((2, 3)), brightness(images))


@pytest.mark.parametrize(("chunk", "drop_fooled"), grids.every(2, [30, 10, 1], [False, True]))
def test_images_without_a_gradient_are_counted_and_end_nothing(tmp_path: Path, chunk: int, drop_fooled: bool) -> None:
    """Ten of thirty; whole chunks of nothing else; and one at a time."""
    order = runner.sample_order(colored(30), 30)
    images, labels = colored(30).images.clone(), colored(30).labels.clone()
    images[order[20:]] = 30
    labels[order[20:]] = 0
    labels[order[20]] = 1
    plan = replace(PLAN, attacks=("fgsm", "pgd"), attackers=None, images=30, chunk=chunk, masking_images=30, eps=0.05)
    plan = replace(plan, drop_fooled=drop_fooled)
    target = NetworkTarget(_knows_no_dark_ones, CLASSES)
    evaluation = evaluation_of(tmp_path / "l", plan, target, Split(images, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_to_end(evaluation)
    found = results(evaluation)
    assert found["unmoved"] == [
        {"attack": attack, "attacker": "output", "unmoved": 10, "right": 9, "images": 30} for attack in ("fgsm", "pgd")
    ]
    (check,) = (check for check in found["masking"] if check["check"] == UNMOVED)
    assert not check["passed"]
    assert check["finding"] == "10 of 30 images (33.3 %) under FGSM (the model's own output)"
    (table,) = (table for table in tables(found) if "exactly zero" in table.caption)
    assert [list(row) for row in table.rows] == [
        [name, "the model's own output", "10 of 30 images (33.3 %)", "9"] for name in ("FGSM", "PGD-20")
    ]


def test_saturated_probabilities_image_by_image_are_no_constant(tmp_path: Path) -> None:
    """39 of 40 images have the same output, to the last bit, and so have images that are made up."""
    rare = colored(40).images[runner.sample_order(colored(40), 40)[-1]] / 255

    def sure(images: Tensor) -> Tensor:
        near = (images - rare).square().mean((1, 2, 3))
        return (1e6 * torch.stack([near - 0.005, 0.005 - near, 0 * near - 1], 1)).softmax(-1)

    plan = replace(PLAN, attacks=("fgsm",), attackers=None, images=3, chunk=1, masking_images=2)
    evaluation = evaluation_of(tmp_path / "l", plan, NetworkTarget(sure, CLASSES), colored(40))
    run_to_end(evaluation)
    assert results(evaluation)["unmoved"][0]["unmoved"] == 3


def test_where_every_image_can_be_moved_nothing_is_said_of_it(whole: Evaluation) -> None:
    found = results(whole)
    assert found["unmoved"] == []
    assert UNMOVED not in {check["check"] for check in found["masking"]}
    assert not [table for table in tables(found) if "exactly zero" in table.caption]


# What is left out


def test_what_is_not_attacked_is_listed_and_in_no_worst_case(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=("square", "fgsm"), attackers=("worst", "mean"), images=3, masking_images=0)
    evaluation = evaluation_of(tmp_path / "l", plan, loss_fn=None)
    run_to_end(evaluation)
    found = results(evaluation)
    assert [(pair["attack"], pair["attacker"]) for pair in found["left_out"]] == [("square", "worst")]
    rows = {(entry["attack"], entry["attacker"]) for entry in found["accuracy"]}
    assert ("square", "worst") not in rows
    assert ("square", "mean") in rows
    (table,) = (table for table in tables(found) if table.caption.startswith("Left out"))
    assert list(table.rows[0][:2]) == ["Square (no gradients)", "worst"]
    assert "asks what answers" in table.rows[0][2]


@pytest.mark.parametrize(
    ("attacks", "attackers", "pair"),
    [
        (("square",), ("worst",), "square by worst"),
        (("square", "autoattack"), ("eot", "expert 1"), "autoattack by expert 1"),
        (("fgsm",), ("nobody",), "no such attacker"),
    ],
)
def test_an_evaluation_without_an_attack_is_an_error(
    tmp_path: Path, attacks: tuple[str, ...], attackers: tuple[str, ...], pair: str
) -> None:
    with pytest.raises(ValueError, match=f"expected at least one for an attacker, got none .*{pair}"):
        evaluation_of(tmp_path / "l", replace(PLAN, attacks=attacks, attackers=attackers))
    two = NetworkTarget(lambda x: brightness(x)[:, :2], 2)
    with pytest.raises(ValueError, match="dlr by output: its ratio is not defined for fewer than 3 classes"):
        evaluation_of(tmp_path / "l", replace(PLAN, attacks=("dlr",), attackers=None), two)


def test_without_an_attack_there_is_no_worst_case(tmp_path: Path) -> None:
    evaluation = evaluation_of(tmp_path / "l", replace(PLAN, attacks=()))
    run_to_end(evaluation)
    assert results(evaluation)["worst_case"] == []
    assert "worst case" not in to_csv(results(evaluation))
