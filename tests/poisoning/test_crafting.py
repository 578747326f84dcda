"""Poisons of a run: what is in their file, which setups there can be, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from immunity_fast import poison
from immunity_fast.attacks import gradient_matching
from immunity_fast.data import poison_file
from immunity_fast.data.datasets import fingerprint
from immunity_fast.poisoning.crafting import Setup, Surrogate, chosen, class_of, craft, load_surrogate
from immunity_fast.poisoning.settings import CraftSettings
from tests.small_runs import CPU, error_line, options, trained, write_data

SETTINGS = CraftSettings(budget=0.1, eps=16 / 255, steps=8, restarts=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crafting")
    write_data(folder / "data.npz")
    trained([*options(folder / "data.npz", epochs=1), "--out", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="module")
def surrogate(run: Path) -> Surrogate:
    return load_surrogate(run, CPU)


def _other(surrogate: Surrogate, target: int) -> Setup:
    return Setup(target, (int(surrogate.dataset.test.labels[target]) + 1) % surrogate.dataset.num_classes)


def test_a_file_has_what_training_needs(run: Path, surrogate: Surrogate, tmp_path: Path) -> None:
    file, setup = tmp_path / "poisons.npz", _other(surrogate, 4)
    words = ["craft", str(run), "--out", str(file), "--target", "4", "--target-class", str(setup.target_class)]
    poison.main([*words, "--budget", "0.1", "--eps", "16/255", "--steps", "2", "--restarts", "1", "--device", "cpu"])
    train, test, found = surrogate.dataset.train, surrogate.dataset.test, poison_file.read(file)
    assert len(found.indices) == 4
    assert found.labels is None
    assert found.images.dtype == torch.uint8
    bases = train.read(found.indices)
    change = (found.images.int() - bases.int()).abs()
    assert 0 < change.max() <= 16
    assert (train.labels[found.indices] == setup.target_class).all()
    assert found.fingerprint == fingerprint(train)
    assert found.target_image is not None
    assert torch.equal(found.target_image, test.read([4])[0])
    assert (found.target_label, found.target_class) == (int(test.labels[4]), setup.target_class)
    assert found.eps == pytest.approx(16 / 255)


def test_poisons_match_better_than_their_bases(surrogate: Surrogate) -> None:
    setup = _other(surrogate, 2)
    steps: list[int] = []
    crafted = craft(surrogate, setup, SETTINGS, seed=3, on_step=lambda: steps.append(1))
    assert len(steps) == 16
    assert crafted.after < crafted.before
    again = craft(surrogate, setup, SETTINGS, seed=3)
    other = craft(surrogate, setup, SETTINGS, seed=4)
    assert torch.equal(again.poisons.images, crafted.poisons.images)
    assert not torch.equal(other.poisons.images, crafted.poisons.images)
    assert crafted.poisons.target_image is not None
    value, _ = gradient_matching(
        surrogate.model.unstack(),
        crafted.poisons.target_image / 255,
        setup.target_class,
        crafted.poisons.images / 255,
        torch.full((4,), setup.target_class),
    )
    assert crafted.after == pytest.approx(float(value))


def test_what_is_drawn_is_right_and_another_class(surrogate: Surrogate) -> None:
    labels = surrogate.dataset.test.labels
    drawn = [chosen(surrogate, SETTINGS, seed=seed) for seed in range(30)]
    assert all(int(labels[each.target]) == int(surrogate.answers[each.target]) for each in drawn)
    assert all(each.target_class != int(labels[each.target]) for each in drawn)
    assert len(set(drawn)) > 3
    assert drawn[5] == chosen(surrogate, SETTINGS, seed=5)
    fixed = [chosen(surrogate, SETTINGS, seed=seed, target_class=1) for seed in range(9)]
    assert {each.target_class for each in fixed} == {1}
    assert all(int(labels[each.target]) != 1 for each in fixed)


def test_nothing_right_and_classes_too_small_are_refused(surrogate: Surrogate) -> None:
    wrong = surrogate._replace(answers=(surrogate.dataset.test.labels + 1) % 3)
    with pytest.raises(ValueError, match="--target: expected a test image that the run answers rightly, got none"):
        chosen(wrong, SETTINGS, seed=0)
    large = dataclasses.replace(SETTINGS, budget=0.5)
    with pytest.raises(ValueError, match="--budget: expected a share for which the largest class has enough of the 40"):
        chosen(surrogate, large, seed=0)
    with pytest.raises(ValueError, match="--budget: expected a share for which class 1 has enough"):
        chosen(surrogate, large, seed=0, target=int((surrogate.dataset.test.labels != 1).nonzero()[0]), target_class=1)


def test_a_class_is_a_name_or_a_number() -> None:
    assert class_of("dog", ("cat", "dog")) == 1
    assert class_of("0", ("cat", "dog")) == 0
    assert class_of("0", ("1", "0")) == 1
    for name in ("2", "mouse", "-1"):
        with pytest.raises(ValueError, match="--target-class: expected one of"):
            class_of(name, ("cat", "dog"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target", "30"], "--target: expected 0 to 29, the test images there are, got 30"),
        (["--target", "-1"], "--target: expected 0 to 29"),
        (["--target", "0", "--target-class", "OWN"], "--target-class: expected another than the target's own"),
        (["--target-class", "zebra"], "--target-class: expected one of"),
        (["--budget", "0.9"], "--budget: expected a share for which"),
        (["--eps", "0"], "--poison-eps: expected 1/255"),
    ],
)
def test_what_is_wrong_is_a_line_and_no_file(
    words: list[str],
    said: str,
    run: Path,
    surrogate: Surrogate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = str(int(surrogate.dataset.test.labels[0]))
    words = [own if word == "OWN" else word for word in words]
    command = ["craft", str(run), "--out", str(tmp_path / "x.npz"), "--steps", "1", "--restarts", "1", *words]
    assert said in error_line(capsys, poison.main, [*command, "--device", "cpu"])
    assert list(tmp_path.iterdir()) == []


def test_runs_that_cannot_be_surrogates_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(folder: Path, out: Path = tmp_path / "x.npz") -> str:
        return error_line(capsys, poison.main, ["craft", str(folder), "--out", str(out), "--device", "cpu"])

    assert "there is no run" in said(tmp_path / "none")
    assert "there is no such folder" in said(run, tmp_path / "none" / "x.npz")
    folder = tmp_path / "run"
    _copied(run, folder, poison="label-flip:0.2")
    assert "expected a run on clean images, got one with --poison label-flip:0.2" in said(folder)


def _copied(run: Path, folder: Path, **changes: Any) -> None:
    """A run's settings alone, some of them changed."""
    folder.mkdir()
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def test_a_file_survives_a_round_trip(surrogate: Surrogate, tmp_path: Path) -> None:
    crafted = craft(surrogate, _other(surrogate, 0), dataclasses.replace(SETTINGS, steps=1, restarts=1), seed=0)
    poison_file.write(tmp_path / "x.npz", crafted.poisons)
    found = poison_file.read(tmp_path / "x.npz")
    for name, value in crafted.poisons._asdict().items():
        again = getattr(found, name)
        same = torch.equal(value, again) if isinstance(value, torch.Tensor) else value == again
        assert same, name
    assert np.load(tmp_path / "x.npz")["indices"].dtype == np.int64
