"""An evaluation's settings: every one is an option of the command, and the options mean the settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from immunity_fast import evaluate
from immunity_fast.evaluation.settings import EvaluationSettings
from immunity_fast.runtime import precision

CHANGED: dict[str, Any] = {
    "attacks": ("quick", "dlr"),
    "attackers": ("mean", "experts"),
    "limit": 3,
    "eps": 0.1,
    "norm": "L2",
    "draws": 7,
    "drop_fooled": True,
    "amp": "bf16",
    "masking_images": 0,
    "queries": 9,
    "autoattack_steps": 8,
    "mora_steps": 6,
    "arc_steps": 5,
    "seed": 4,
}


def test_every_setting_is_tried_here() -> None:
    assert list(CHANGED) == [field.name for field in dataclasses.fields(EvaluationSettings)]
    assert all(value != getattr(EvaluationSettings(), name) for name, value in CHANGED.items())


@pytest.mark.parametrize("changes", [{}, CHANGED, *({name: value} for name, value in CHANGED.items())])
def test_options_and_settings_mean_each_other(changes: dict[str, Any]) -> None:
    settings = EvaluationSettings(**changes)
    options = settings.options()
    assert len([word for word in options if word.startswith("--")]) == len(changes)
    assert evaluate.parse(["run", *options])[0] == settings


def test_a_plan_has_the_settings_and_for_the_rest_the_run_s() -> None:
    attackers = ("mean", "expert 1", "expert 2")
    plan = EvaluationSettings().plan(attackers, (8, 8), images=5, seed=6, chunk=2)
    assert (plan.attacks, plan.attackers) == (("fgsm", "bim", "mim", "pgd", "pgd-sum", "arc", "mora"), None)
    assert (plan.images, plan.seed, plan.chunk) == (5, 6, 2)
    plan = EvaluationSettings(**CHANGED).plan(attackers, (8, 8), images=5, seed=6, chunk=2)
    assert (plan.attacks, plan.attackers) == (("fgsm", "pgd", "dlr"), attackers)
    assert (plan.images, plan.seed) == (3, 4)
    for name in (
        "eps",
        "norm",
        "drop_fooled",
        "amp",
        "masking_images",
        "queries",
        "autoattack_steps",
        "mora_steps",
        "arc_steps",
    ):
        assert getattr(plan, name) == CHANGED[name]


def test_several_radii_are_the_largest_and_others() -> None:
    settings = evaluate.parse(["run", "--eps", "4/255,8/255,2/255"])[0]
    assert settings.eps == (4 / 255, 8 / 255, 2 / 255)
    assert evaluate.parse(["run", *settings.options()])[0] == settings
    plan = settings.plan(("mean",), (8, 8), images=5, seed=6, chunk=2)
    assert (plan.eps, plan.other_eps) == (8 / 255, (2 / 255, 4 / 255))
    assert plan.radii == (2 / 255, 4 / 255, 8 / 255)


def test_the_widest_radius_in_l2_is_that_of_the_images() -> None:
    settings = EvaluationSettings(norm="L2", eps=10.0)
    for channels, fits in ((1, False), (3, True)):  # the corners of an 8×8 image are √(64·C) apart
        if fits:
            settings.plan(("mean",), (8, 8), images=1, seed=0, chunk=1, channels=channels)
        else:
            with pytest.raises(ValueError, match="--eps: expected at most 8, as far as black is from white"):
                settings.plan(("mean",), (8, 8), images=1, seed=0, chunk=1, channels=channels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ("pgd", "none")}, "--attacks: expected some of .*, got none"),
        ({"limit": 0}, "--limit: expected at least 1, got 0"),
        ({"masking_images": -1}, "--masking-images: expected at least 0, got -1"),
        ({"draws": 10_001}, "--draws: expected at most 10000, got 10001"),
        ({"seed": 2**63}, "--seed: expected at most 2⁶³ − 1, got a number of 19 digits"),
        ({"eps": 8.0}, "--eps: expected at most 1, .* got 8"),
        ({"limit": 2.5}, "--limit: expected a whole number, got 2.5"),
        ({"seed": True}, "--seed: expected a whole number, got True"),
        ({"eps": (0.1, -0.1)}, "--eps: expected a finite number of at least 0, got -0.1"),
        ({"eps": ()}, "--eps: expected at least one radius, got none"),
        ({"norm": "L3"}, "--norm: expected one of Linf, L2, got 'L3'"),
        ({"eps": "x"}, "--eps: expected a finite number of at least 0, got x"),
        ({"eps": float("nan")}, "--eps: expected a finite number of at least 0, got nan"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        EvaluationSettings(**changes)


@pytest.mark.parametrize(
    ("amp", "has", "expected"), [("off", True, "off"), ("auto", True, "bf16"), ("auto", False, "off")]
)
def test_auto_is_bfloat16_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, amp: Any, has: bool, expected: str
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda: has)
    plan = EvaluationSettings(amp=amp).plan(("mean",), (8, 8), images=1, seed=0, chunk=1)
    assert plan.amp == expected
    with pytest.raises(ValueError, match=r"--amp: expected .*fp16"):
        EvaluationSettings(amp="fp16")  # type: ignore[arg-type]
