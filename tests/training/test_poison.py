"""Runs on poisoned images: what they are trained on, and that they go on with the same poisons."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from immunity_fast import train
from immunity_fast.data.datasets import Split, fingerprint, load
from immunity_fast.data.poison_file import Poisons, write
from immunity_fast.data.poisoning import LabelFlip, poisoned
from immunity_fast.training import Trainer
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.preparation import go_on, prepare
from immunity_fast.training.state import TrainingState
from tests.small_runs import CONFIG, CPU, dataset, error_line, half_trained, options, saved, split, trained, weights

POISONS = ["label-flip:0.5", "badnets:0.3,target=1"]


def _config(poison: str, **changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, poison=poison, **changes)


def test_a_run_learns_from_what_is_poisoned() -> None:
    images = dataset()
    state = TrainingState(_config("label-flip:0.5", seed=4), images, CPU)
    expected = poisoned(images, LabelFlip(0.5), 4)
    assert torch.equal(state.loader.split.labels, expected.dataset.train.labels)  # type: ignore[union-attr]
    assert state.dataset.validation is images.validation
    assert state.info()["poison"] == expected.record
    assert state.fingerprint == images.fingerprint()


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_run_goes_on_to_the_same_weights(poison: str, data: Path, tmp_path: Path) -> None:
    whole, _ = trained([*options(data, poison=poison), "--out", str(tmp_path / "whole")])
    clean, _ = trained([*options(data), "--out", str(tmp_path / "clean")])
    assert weights(whole) != weights(clean)
