"""Several radii side by side: each is attacked as if alone, and the report ends with the least at all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from immunity_fast.evaluation.least import least_lines, least_sentence, least_table
from immunity_fast.evaluation.plan import Plan, attack_rows
from immunity_fast.evaluation.results import results, tables
from immunity_fast.evaluation.runner import bits
from immunity_fast.evaluation.targets import MixtureTarget, NetworkTarget
from immunity_fast.evaluation.words import percent, radius_words
from tests import evaluations
from tests.evaluations import PLAN, brightness, evaluation_of, run_to_end, trained_mixture
from tests.small_runs import CLASSES

small_chunks_and_short_curves = evaluations.small_chunks_and_short_curves

RADII = (0.02, 0.09, 0.3)
SEVERAL = replace(PLAN, attacks=("fgsm", "pgd"), attackers=("mean", "sample"), eps=0.09, other_eps=(0.02, 0.3))


def test_rows_of_other_radii_follow_with_settings_of_their_own() -> None:
    target = MixtureTarget(trained_mixture(), CLASSES)
    rows = attack_rows(target, SEVERAL)
    alone = [attack_rows(target, replace(SEVERAL, eps=eps, other_eps=())) for eps in (0.09, 0.02, 0.3)]
    assert [(row.attack, row.attacker, row.settings) for row in rows] == [
        (row.attack, row.attacker, row.settings) for number, each in enumerate(alone) for row in each[number > 0 :]
    ]
    assert [row.eps for row in rows] == [None] * 6 + [0.02] * 5 + [0.3] * 5
    assert SEVERAL.radii == RADII
    assert Plan(other_eps=(8 / 255,)).radii == (8 / 255,)


def test_each_radius_is_attacked_as_if_alone(tmp_path: Path) -> None:
    together = evaluation_of(tmp_path / "l", SEVERAL)
    run_to_end(together)
    found = results(together)
    assert [radius["eps"] for radius in found["radii"]] == list(RADII)
    for number, eps in enumerate(RADII):
        alone = evaluation_of(tmp_path / "alone", replace(SEVERAL, eps=eps, other_eps=()))
        run_to_end(alone)
        own, other = results(alone), found["radii"][number]
        assert other == own["radii"][0]
        assert other["worst_case"] == own["worst_case"]
        again = evaluation_of(tmp_path / "l", replace(SEVERAL, eps=eps, other_eps=(), masking_images=0))
        new = {(row.attack, row.attacker) for row, _ in run_to_end(again)}
        assert new == (set() if eps == SEVERAL.eps else {("pgd", "mean")}), "which needs heatmaps where it is alone"
    assert found["worst_case"] == found["radii"][1]["worst_case"]
    least = [radius["worst_case"][1]["correct"] for radius in found["radii"]]
    assert least[0] > least[2]


def test_a_white_box_has_neither_transfer_nor_noise(tmp_path: Path) -> None:
    target = MixtureTarget(trained_mixture(), CLASSES, transfer=brightness)
    plan = replace(PLAN, attacks=("fgsm",), attackers=("mean", "transfer"), masking_images=0)
    evaluation = evaluation_of(tmp_path / "l", plan, target)
    run_to_end(evaluation)
    (radius,) = results(evaluation)["radii"]
    counted = [
        row for row in evaluation.rows if row.kind == "subset" or (row.kind == "attack" and row.attacker == "mean")
    ]
    assert len(counted) < len(evaluation.rows) - 1
    for entry in radius["white_box"]["worst_case"]:
        columns = [bits(evaluation.results(row), entry["judge"]) for row in counted]
        assert entry["correct"] == sum(all(right) for right in zip(*columns, strict=True))
    alone = evaluation_of(tmp_path / "alone", replace(plan, attackers=("transfer",)), target)
    run_to_end(alone)
    assert "white_box" not in results(alone)["radii"][0]


def test_the_last_table_and_line_are_the_least_at_all_radii(tmp_path: Path) -> None:
    evaluation = evaluation_of(tmp_path / "l", replace(SEVERAL, attackers=("mean",)))
    run_to_end(evaluation)
    found = results(evaluation)
    table = tables(found)[-1]
    assert list(table.columns) == ["what answers", "ε = 0.02", "ε = 0.09", "ε = 0.3"]
    assert [row[0] for row in table.rows] == [
        "gate sample",
        "gate mean",
        "gate off",
        "gate worst",
        "gate sample, expected",
        "gate sample, in all ten tries",
        "best expert",
        "worst expert",
    ]
    lines = {row[0]: row[1:] for row in table.rows}
    for column, radius in enumerate(found["radii"]):
        entries = {entry["judge"]: entry for entry in radius["worst_case"]}
        assert lines["gate mean"][column] == percent(entries["mean"])
        experts = sorted((entries[f"expert {i}"]["accuracy"], f"expert {i}") for i in (1, 2))
        assert lines["worst expert"][column].startswith(f"{100 * experts[0][0]:.1f} ")
        assert lines["best expert"][column].startswith(f"{100 * experts[1][0]:.1f} ")
        assert lines["best expert"][column].endswith(" 1)") or lines["best expert"][column].endswith(" 2)")
        drawn = radius["drawn"][-1]
        assert (drawn["attack"], drawn["attacker"]) == ("worst case", "all")
        assert lines["gate sample, expected"][column] == percent(drawn)
        assert lines["gate sample, in all ten tries"][column] == percent(drawn["withstood"])
    sentence = least_sentence(found)
    assert sentence is not None
    mean = " | ".join(f"{100 * radius['worst_case'][1]['accuracy']:.1f}" for radius in found["radii"])
    assert sentence.startswith("least over all attacks for each image, %, at ε = 0.02 | 0.09 | 0.3: gate sample ")
    assert f"; gate mean {mean}; " in sentence


def test_a_network_has_one_line_and_without_attacks_none(tmp_path: Path) -> None:
    target = NetworkTarget(brightness, CLASSES)
    evaluation = evaluation_of(tmp_path / "l", replace(SEVERAL, attackers=None, masking_images=0), target)
    run_to_end(evaluation)
    lines = least_lines(results(evaluation))
    assert list(lines) == ["accuracy"]
    accuracies = [entry["accuracy"] for entry in lines["accuracy"] if entry is not None]
    assert len(accuracies) == 3
    assert accuracies == sorted(accuracies, reverse=True)
    nothing = results(evaluation_of(tmp_path / "n", replace(SEVERAL, attacks=())))
    assert list(least_table(nothing)) == []
    assert least_sentence(nothing) is None


def test_only_the_plan_s_own_radius_has_curves_and_heatmaps(tmp_path: Path) -> None:
    evaluation = evaluation_of(tmp_path / "l", SEVERAL)
    assert {row.eps for row in evaluation.curves} == {None}
    looked = [row for row in evaluation.rows if evaluation.has_heatmaps(row)]
    assert [(row.kind, row.attack, row.eps) for row in looked] == [("subset", "", None), ("attack", "pgd", None)]


def test_heatmaps_of_a_radius_that_was_alone_are_not_reported(tmp_path: Path) -> None:
    both = replace(SEVERAL, eps=0.3, other_eps=(0.02,), masking_images=0)
    fresh, after = evaluation_of(tmp_path / "fresh", both), tmp_path / "after"
    run_to_end(fresh)
    run_to_end(evaluation_of(after, replace(both, eps=0.02, other_eps=())))
    again = evaluation_of(after, both)
    assert {row.eps for row, _ in run_to_end(again)} == {None}
    assert results(again)["heatmaps"] == results(fresh)["heatmaps"]


def test_black_boxes_are_compared_at_radius_0_too(tmp_path: Path) -> None:
    plan = replace(SEVERAL, attacks=("fgsm", "square"), attackers=None, eps=0.3, other_eps=(0.0,), masking_images=0)
    evaluation = evaluation_of(tmp_path / "l", plan, NetworkTarget(brightness, CLASSES))
    run_to_end(evaluation)
    checks = {check["check"]: check for check in results(evaluation)["masking"]}
    assert checks["gradients break what black boxes break, at ε = 0"]["finding"] == (
        "0 of 7 images are broken by Square alone"
    )


@pytest.mark.parametrize(
    ("eps", "norm", "words"),
    [
        (2 / 255, "Linf", "2/255"),
        (255 / 255, "Linf", "255/255"),
        (0.01, "Linf", "0.01"),
        (0.0, "Linf", "0"),
        (8 / 255, "L2", "0.03137"),
        (float(torch.tensor(0.1)), "Linf", "0.1"),
    ],
)
def test_radii_are_written_as_people_write_them(eps: float, norm: str, words: str) -> None:
    assert radius_words(eps, norm) == words
