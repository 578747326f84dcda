"""Runs on poisoned images: what they are trained on, that they go on with the same poisons, and what they end with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from immunity_fast import evaluate, train
from immunity_fast.data.poison_file import Poisons, write
from immunity_fast.data.poisoning import LabelFlip, poisoned
from immunity_fast.deployment.card import run_card
from immunity_fast.training import Trainer
from immunity_fast.training.checkpoint import load_model
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.poison import check_poison
from immunity_fast.training.state import TrainingState
from tests.small_runs import (
    CONFIG,
    CPU,
    arrays,
    dataset,
    error_line,
    half_trained,
    interrupted,
    options,
    saved,
    split,
    trained,
)

FAST = ["--attacks", "fgsm", "--attackers", "mean", "--limit", "2", "--masking-images", "0"]


def _file(path: Path, **changes: Any) -> Path:
    """Poisons for `arrays`: three grey images, of which one has a target."""
    images = torch.full((3, 3, 12, 12), 128, dtype=torch.uint8)
    target = torch.from_numpy(arrays()["test_images"][0]).permute(2, 0, 1).contiguous()
    made = Poisons(torch.tensor([1, 5, 7]), images, None, None, target, 0, 2, 8 / 255)
    write(path, made._replace(**changes))
    return path


def test_a_run_learns_from_what_is_poisoned() -> None:
    images = dataset()
    config = dataclasses.replace(CONFIG, poison="label-flip:0.5", seed=4, class_weights="balanced")
    state = TrainingState(config, images, CPU)
    expected = poisoned(images, LabelFlip(0.5), 4)
    assert torch.equal(state.dataset.train.labels, expected.dataset.train.labels)
    assert state.loader.split is state.dataset.train  # type: ignore[union-attr]
    assert state.dataset.validation.labels is images.validation.labels
    assert state.info()["poison"] == expected.record
    assert state.fingerprint == images.fingerprint()
    assert "poison" not in TrainingState(CONFIG, images, CPU).info()


@pytest.mark.parametrize("poison", ["label-flip:0.5", "badnets:0.3,target=1", "file"])
def test_a_poisoned_run_goes_on_to_the_same_weights(poison: str, data: Path, tmp_path: Path) -> None:
    poison = str(_file(tmp_path / "p.npz")) if poison == "file" else poison
    arguments = [*options(data, poison=poison, checkpoint_every=1, epochs=1), "--out"]
    trained([*arguments, str(tmp_path / "whole")])
    interrupted((TrainingState, "advance"), 4, [*arguments, str(tmp_path / "half")])
    trained(["--resume", str(tmp_path / "half")])
    assert saved(tmp_path / "half") == saved(tmp_path / "whole")


def test_a_run_with_badnets_says_what_came_of_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    train.main([*options(data, poison="badnets:0.3,target=1,size=2", epochs=1), "--out", str(folder)])
    assert "**After poisoned training**" in capsys.readouterr().out
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["poison"]
    model = load_model(folder)[0].eval()
    images = torch.from_numpy(arrays()["test_images"]).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(arrays()["test_labels"])
    marked = images.clone()
    marked[:, :, 10:, 10:] = 1
    with torch.no_grad():
        shares = torch.stack([expert.eval()(marked).double().softmax(-1) for expert in model.unstack()])
    for judge, answer in {"mean": shares.mean(0), "expert 1": shares[0], "expert 2": shares[1]}.items():
        said = answer.argmax(-1)[labels != 1]
        counts = {entry["measure"]: entry for entry in found["accuracy"] if entry["judge"] == judge}
        assert counts["attack success"]["correct"] == int((said == 1).sum())
        assert counts["recovered"]["correct"] == int((said == labels[labels != 1]).sum())
        assert counts["attack success"]["images"] == counts["recovered"]["images"] == 20
        assert counts["clean"]["images"] == 30
    evaluate.main([str(folder), *FAST])
    assert json.loads((folder / "results.json").read_text(encoding="utf-8"))["poison"] == found
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "poisoned (30 % of the images with a white square of 2×2 pixels and the label of class 1)" in text
    lines = (folder / "results.csv").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("trigger: attack success,,") for line in lines) == 3
    assert "badnets:0.3,target=1,size=2" in run_card(folder, model)


def test_a_file_s_target_is_looked_at(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poison = _file(tmp_path / "p.npz")
    train.main([*options(data, poison=poison, epochs=1, experts=1), "--out", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["poison"]
    model = load_model(tmp_path / "run")[0].eval()
    image = torch.from_numpy(arrays()["test_images"][:1]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        shares = model.unstack()[0].eval()(image).double().softmax(-1)[0]
    (entry,) = found["target"]
    assert entry["judge"] == "output"
    assert entry["answer"] == int(shares.argmax())
    assert entry["fooled"] == (entry["answer"] == 2)
    assert [entry["probability"], entry["true_probability"]] == pytest.approx(shares[[2, 0]].tolist(), rel=1e-4)
    assert {entry["measure"] for entry in found["accuracy"]} == {"clean"}
    assert "poisons p.npz" in run_card(tmp_path / "run", model)
    _file(poison, images=torch.full((3, 3, 12, 12), 129, dtype=torch.uint8))
    line = error_line(capsys, evaluate.main, [str(tmp_path / "run"), *FAST])
    assert "trained with other poisons than --poison gives now" in line
    poison.unlink()
    assert "--poison: expected label-flip:RATE" in error_line(capsys, evaluate.main, [str(tmp_path / "run"), *FAST])


def test_a_run_goes_on_with_no_other_poisons(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    poison, folder = _file(tmp_path / "p.npz"), tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.small_runs.options", lambda *a, **k: options(*a, **k, poison=poison))
        half_trained(data, folder)
    _file(poison, labels=torch.tensor([0, 1, 2]))
    line = error_line(capsys, train.main, ["--resume", str(folder)])
    assert "trained with other poisons than --poison gives now" in line
    line = error_line(capsys, train.main, ["--resume", str(folder), "--poison", "badnets:0.1"])
    assert "--poison badnets:0.1: the run in" in line
    with pytest.raises(ValueError, match="other poisons"):
        check_poison(folder, {}, {"images": 3})


def test_what_cannot_be_poisoned_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(poison: Any, code: int = 1) -> str:
        arguments = [*options(data, poison=poison), "--out", str(tmp_path / "run")]
        line = error_line(capsys, train.main, arguments, code)
        assert not (tmp_path / "run").exists()
        return line

    assert "--poison: expected label-flip:RATE[,to=…], got label-flip:x" in said("label-flip:x")
    assert "--poison: expected label-flip:RATE, badnets:RATE or a file of poisons, got poisons.npz" in said(
        "poisons.npz"
    )
    assert "--poison: expected images of shape (3, 12, 12)" in said(
        _file(tmp_path / "a.npz", images=torch.zeros(3, 1, 4, 4), target_image=None, target_class=None)
    )
    np.savez(tmp_path / "b.npz", images=np.zeros((1, 3, 12, 12), np.uint8))
    assert f"--poison: {tmp_path / 'b.npz'}: indices: expected indices and images, got no indices" in said(
        tmp_path / "b.npz"
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(8, 3, 12, 12), torch.arange(8)))
    trainer = Trainer(TrainConfig(poison="badnets:0.5", arch="resnet8", device="cpu"), train=loader, classes=8)
    with pytest.raises(ValueError, match=r"^--poison: expected training images in memory"):
        trainer.fit()


def test_own_images_are_poisoned_where_they_are_numbers() -> None:
    images, labels = split(20).images.float() / 255, split(20).labels
    trainer = Trainer(dataclasses.replace(CONFIG, poison="badnets:0.5,target=2"), train=(images, labels), classes=3)
    state, _ = trainer.prepare()
    changed = (state.dataset.train.images != images).flatten(1).any(1).nonzero().flatten()
    assert len(changed) == 10
    assert state.dataset.train.images[changed, :, 9:, 9:].eq(1).all()
    assert state.dataset.train.labels[changed].eq(2).all()
