"""The benchmark of AutoAttack: its parts are known by their names, it goes on where it was, and adds up what it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchattacks")

from benchmarks import autoattack
from benchmarks.autoattack import OURS, PARTS, PLAIN, THEIRS, Outcome
from immunity_fast.training.run_folder import Run
from tests.small_runs import arrays, options, trained, write_data

CLASSES = 5  # the targeted DLR loss needs four


def apgd_dlr(images: Tensor) -> Tensor:
    return images


def square(images: Tensor) -> Tensor:
    return images


def carlini(images: Tensor) -> Tensor:
    return images


def test_parts_have_torchattacks_names() -> None:
    assert autoattack.names_of([apgd_dlr, apgd_dlr, square]) == ["APGD", "APGDT", "Square"]
    with pytest.raises(ValueError, match="expected APGD, APGDT, FAB, Square, got carlini"):
        autoattack.names_of([apgd_dlr, carlini])


class Dark(nn.Module):
    """Says 1 of dark images."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 2)."""
        mean = images.flatten(1).mean(1)
        return torch.stack([mean, 1 - mean], -1)


def test_a_batch_is_counted_part_by_part() -> None:
    images, labels = torch.full((5, 3, 2, 2), 0.6), torch.tensor([0, 0, 0, 0, 1])
    adversarial = images.clone()
    adversarial[0], adversarial[1] = 0.4, 0.6 - 8 / 255
    outcome = Outcome({"APGD": 1.5, "FAB": 2.25}, {"APGD": 4, "FAB": 3}, adversarial)
    found = autoattack.entry(THEIRS, 10, outcome, Dark(), images, labels)
    assert found["clean"] == 4
    assert found["survived"] == {"APGD": 3, "APGDT": 3, "FAB": 3, "Square": 3}
    assert found["robust"] == [11, 12, 13]
    assert found["outside"] == 1
    nobody = Outcome({"APGD": 1.5}, {"APGD": 4}, torch.zeros_like(images))
    found = autoattack.entry(THEIRS, 0, nobody, Dark(), images, labels)
    assert found["survived"] == dict.fromkeys(PARTS, 1)  # the last one, of class 1, was right in the end


def _batch(way: str, start: int, survived: list[int], robust: list[int]) -> dict[str, Any]:
    return {
        "way": way,
        "start": start,
        "images": 4,
        "clean": 4,
        "survived": dict(zip(PARTS, survived, strict=True)),
        "seconds": {"APGD": 1.0, "FAB": 2.0},
        "robust": robust,
        "outside": 0,
    }


def test_only_batches_that_all_have_attacked_are_added_up() -> None:
    batches = [
        _batch(OURS, 0, [3, 2, 1, 1], [2]),
        _batch(THEIRS, 0, [3, 2, 2, 2], [0, 2]),
        _batch(PLAIN, 0, [3, 2, 2, 2], [0, 2]),
        _batch(OURS, 4, [0, 0, 0, 0], []),
    ]
    found = autoattack.summary(batches)
    assert found["ways"][OURS]["accuracy"] == {"APGD": 0.75, "APGDT": 0.5, "FAB": 0.25, "Square": 0.25}
    assert found["ways"][OURS]["seconds"]["all"] == 3.0
    assert found["ways"][OURS]["images"] == 4
    differ = {(each["by"], each["not by"]): each["images"] for each in found["robust by one alone"]}
    assert differ[THEIRS, OURS] == [0]
    assert differ[OURS, THEIRS] == differ[THEIRS, PLAIN] == []
    text = autoattack.table(found).to_markdown()
    assert "25.0" in text
    assert autoattack.summary(batches[:2])["ways"][OURS]["accuracy"]["APGD"] is None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("autoattack")
    labels = {
        f"{part}_labels": np.arange(len(arrays()[f"{part}_labels"])) % CLASSES for part in ("train", "val", "test")
    }
    data = write_data(folder / "data.npz", **labels)
    return trained([*options(data, epochs=1), "--out", str(folder / "run")])[1]


def test_it_goes_on_where_it_was(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "record.json"
    command = [str(run.folder), "--images", "5", "--batch", "3", "--steps", "2", "--queries", "3", "--out", str(record)]
    autoattack.main([*command, "--limit-batches", "1"])
    first = json.loads(record.read_text(encoding="utf-8"))
    assert [(each["way"], each["start"]) for each in first["batches"]] == [(OURS, 0), (THEIRS, 0), (PLAIN, 0)]
    autoattack.main(command)
    found = json.loads(record.read_text(encoding="utf-8"))
    assert found["batches"][:3] == first["batches"]
    assert [(each["way"], each["start"]) for each in found["batches"][3:]] == [(THEIRS, 3), (PLAIN, 3), (OURS, 3)]
    for each in found["batches"]:
        assert each["outside"] == 0
        assert set(each["seconds"]) - {"all else"} <= set(PARTS)
        assert each["clean"] >= each["survived"]["APGD"] >= each["survived"]["Square"] == len(each["robust"])
        assert all(value >= 0 for value in each["seconds"].values())
    assert any("APGD" in each["seconds"] for each in found["batches"] if each["way"] == OURS)
    clean = {way: each["clean"] for way, each in found["summary"]["ways"].items()}
    assert clean[OURS] == clean[THEIRS] == clean[PLAIN]
    with pytest.raises(SystemExit):
        autoattack.main([*command, "--queries", "4"])
    assert "expected the record of this command on this machine, got another command" in capsys.readouterr().err
