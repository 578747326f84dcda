"""The settings of poisons: their ranges, and which option is for which action."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from immunity_fast import poison
from immunity_fast.poisoning.settings import CraftSettings
from tests.small_runs import error_line

CRAFT = ["craft", "run", "--out", "x.npz", "--device", "cpu"]
SETUPS = ["setups", "--out", "x", "--device", "cpu"]


def test_the_defaults_are_the_published_ones() -> None:
    settings = CraftSettings()
    assert (settings.budget, settings.steps, settings.restarts) == (0.01, 250, 8)
    assert settings.radius == 8
    assert settings.bases(50_000) == 500
    assert settings.bases(10) == 1


@pytest.mark.parametrize(("eps", "radius"), [(1 / 255, 1), (16 / 255, 16), (0.05, 12), (1, 255)])
def test_a_radius_is_whole_levels_within_it(eps: float, radius: int) -> None:
    assert CraftSettings(eps=eps).radius == radius


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 0}, "--budget: expected a share of the training images above 0, at most 1, got 0"),
        ({"budget": 1.5}, "--budget: expected"),
        ({"eps": 0.003}, "--poison-eps: expected 1/255"),
        ({"eps": float("nan")}, "--poison-eps: expected"),
        ({"eps": 1.5}, "--poison-eps: expected"),
        ({"steps": 0}, "--steps: expected at least 1"),
        ({"restarts": 0}, "--restarts: expected at least 1"),
    ],
)
def test_a_value_out_of_range_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CraftSettings(**changes)


def test_eps_is_the_poisons_for_craft_and_the_victims_for_setups() -> None:
    assert _settings([*CRAFT, "--eps", "3/255"]).radius == 3
    assert _settings([*CRAFT, "--eps", "3/255", "--poison-eps", "4/255"]).radius == 4
    request = poison.parse([*SETUPS, "--eps", "3/255", "--poison-eps", "4/255", "--steps", "7"])
    config, settings = request.args[:2]  # type: ignore[attr-defined]
    assert config.eps == 3 / 255
    assert (settings.radius, settings.steps) == (4, 7)
    assert _settings(SETUPS, 1).radius == 8


def _settings(words: list[str], place: int = 2) -> Any:
    return poison.parse(words).args[place]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*CRAFT, "--lr", "0.1"], "--lr: expected with setups alone, got it with craft"),
        ([*CRAFT, "--setups", "3"], "--setups: expected with setups alone, got it with craft"),
        ([*SETUPS, "--target-class", "3"], "--target-class: expected with craft alone, got it with setups"),
        ([*SETUPS, "--target", "0"], "--target: expected with craft alone, got it with setups"),
        ([*SETUPS, "--poison", "x.npz"], "--poison: expected none with setups"),
        (["setups", "run", "--out", "x"], "run: expected no run with setups"),
        (["craft", "--out", "x"], "RUN: missing"),
        ([*SETUPS, "--setups", "0"], "--setups: expected at least 1, got 0"),
        ([*SETUPS, "--setups", "1001"], "--setups: expected at most 1000, got 1001"),
        ([*SETUPS, "--budget", "0"], "--budget: expected a share"),
    ],
)
def test_an_option_of_the_other_action_is_a_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in error_line(capsys, poison.main, words)
    assert list(tmp_path.iterdir()) == []
