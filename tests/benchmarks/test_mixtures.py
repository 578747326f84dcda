"""The benchmark of attacks on mixtures: what is trained and kept, and each part from beginning to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import mixtures, mixtures_training
from benchmarks.mixtures_training import Budget, Zoo, networks
from immunity_fast.data.datasets import load
from tests.small_runs import write_data


def test_members_have_weights_of_their_own() -> None:
    state = torch.get_rng_state()
    first, second = networks(2, 10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    (again,) = networks(1, 10, seed=3)
    for one, other, same in zip(first.parameters(), second.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, same)
        assert one.dim() < 2 or not torch.equal(one, other)


class Always(nn.Module):
    """A network that says the same class of each image, where it is bright, and another where it is not."""

    def __init__(self, bright: int, dark: int) -> None:
        super().__init__()
        self.answers = torch.eye(3)[[dark, bright]]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 3)."""
        return self.answers[(images.flatten(1).mean(1) > 0.5).long()]


def test_accuracies_are_expected_and_the_lowest_of_each_image() -> None:
    members = nn.ModuleList([Always(0, 1), Always(0, 0)])
    images, labels = torch.full((4, 3, 2, 2), 0.9), torch.zeros(4, dtype=torch.long)
    rows: list[dict[str, Any]] = []

    def darken(which: list[int]) -> mixtures.Attacker:
        def attack(images: Tensor, _labels: Tensor, _generator: torch.Generator) -> Tensor:
            images = images.clone()
            images[which] = 0.1
            return images

        return attack

    attacks = [mixtures.Named("one", darken([0]), random=False), mixtures.Named("two", darken([1, 2]))]
    case = mixtures.Case(attacks, lambda x, y: mixtures.drawn_right(members, x, y), 2)
    mixtures.measure(case, images, labels, 2, [], rows.append)
    assert [row["accuracy"] for row in rows] == [1.0, 0.875, 0.75, 0.625]
    assert [row["right"] for row in rows] == ["2222", "1222", "2112", "1112"]
    assert [len(row["by_seed"]) for row in rows] == [1, 1, 2, 1]
    again: list[dict[str, Any]] = []
    mixtures.measure(case, images, labels, 2, rows[:2], again.append)
    assert again == rows[2:]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("mixtures")
    counts = {"train": 40, "val": 14, "test": 30}
    four = {f"{part}_labels": np.arange(count) % 4 for part, count in counts.items()}  # more than ADP's three members
    data = write_data(folder / "data.npz", **four)
    return ["--data", str(data), "--models", str(folder / "models"), "--train-images", "9", "--epochs", "1"]


@pytest.mark.parametrize("part", mixtures.PARTS)
def test_a_part_is_written_and_its_networks_are_kept(
    part: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record.json"
    arguments = [*command, "--images", "3", "--seeds", "1", "--parts", part, "--rehearse", "--out", str(record)]
    mixtures.main(arguments)
    first = json.loads(record.read_text(encoding="utf-8"))
    assert "epoch 1 of 1" in capsys.readouterr().out
    mixtures.main(arguments)
    assert json.loads(record.read_text(encoding="utf-8")) == first
    said = capsys.readouterr().out
    assert "epoch" not in said
    assert "{" not in said
    assert first["command"].endswith("--seeds 1 --train-images 9 --epochs 1 --rehearse")
    rows = first[part]
    assert said.count("\n|") == 1 + len(rows)
    names = {"pair": {"first or second", "first or boosted"}, "adp": {"plain", "adp"}}[part]
    assert names < {row["networks"] for row in rows}
    for name in names:
        mine = {row["attack"]: row["accuracy"] for row in rows if row["networks"] == name}
        assert mine["the lowest of all for each image"] <= min(mine.values())
    record.write_text(json.dumps(first | {part: rows[:-1]}), encoding="utf-8")
    mixtures.main(arguments)
    said = capsys.readouterr().out
    assert said.count("{") == 1
    assert json.loads(record.read_text(encoding="utf-8"))[part] == rows
    assert ("ARC-20" if part == "pair" else "MORA, both") in {row["attack"] for row in rows}


def test_what_was_trained_otherwise_is_refused(command: list[str]) -> None:
    dataset, folder = load("npz", command[1]), Path(command[3])
    mixtures_training.main(["plain", *command])
    assert len(Zoo(dataset, folder, Budget(9, 1))["plain"]) == 3
    with pytest.raises(ValueError, match=r"expected .*epochs.*: 2"):
        Zoo(dataset, folder, Budget(9, 2))["plain"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--parts", "pair,trio"], "--parts: expected some of pair, adp, got trio"),
        (
            ["--parts", "adp", "--networks", "first"],
            "--networks: expected some of plain, plain 1, plain 2, plain 3, adp",
        ),
    ],
)
def test_what_is_not_known_is_refused(
    given: list[str], said: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        mixtures.main([*command, *given, "--out", "record.json"])
    assert said in " ".join(capsys.readouterr().err.split())
