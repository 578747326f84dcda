"""Bytes of tensors alive: those of steps without values are those of computed ones, and of graphs that are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.memory_table import SMALL, WAYS, Alive, counted, faked, line, model_of, record
from tests import grids
from tests.places import REPOSITORY

BY_NAME = {way.name: way for way in WAYS}


@pytest.mark.parametrize("name", grids.sampled([*BY_NAME], ordinary=lambda name: name == "loop, checkpointed"))
def test_steps_without_values_hold_what_others_do(name: str) -> None:
    way = BY_NAME[name]
    computed = counted(model_of(SMALL), SMALL, way)
    model = model_of(SMALL)
    with faked(model):
        found = counted(model, SMALL, way)
    assert found["held"] == computed["held"]
    # A convolution of bfloat16 has other buffers for a moment where it is computed.
    assert found["peak"] == pytest.approx(computed["peak"], rel=0 if way.amp == "off" else 2e-3)


def test_what_is_counted_of_a_chain_is_known() -> None:
    """Maps of 4 KiB, of which a tanh keeps its result and a sum nothing; views and what is in place are no more."""
    x = torch.zeros(1024, requires_grad=True)
    with Alive() as alive:
        alive.note(x)
        alive.note(x.view(32, 32))
        kept = x.tanh()
        assert alive.bytes == 2 * 4096
        both = (kept * 2 + 1).tanh()  # of which both operands of the sum are gone
        assert (alive.bytes, alive.peak) == (3 * 4096, 4 * 4096)
        both.mul_(2).view(4, 256)
        assert alive.bytes == 3 * 4096
        total = both.sum()
        del both
        assert alive.bytes == 3 * 4096 + 4, "the second tanh has kept it"
        del total, kept
    assert alive.bytes == 4096


def test_between_steps_there_are_weights_gradients_and_momentum() -> None:
    model = model_of(SMALL)
    weights = sum(4 * value.numel() for value in model.parameters())
    buffers = sum(value.numel() * value.element_size() for value in model.buffers())
    found = counted(model, SMALL, WAYS[0])
    batch = 4 * SMALL.samples * (3 * SMALL.side**2 + 2)
    assert 0 <= found["held"] - (3 * weights + buffers + batch) < 1024


@pytest.mark.exhaustive  # a minute on a busy machine: tensors without values are slow
def test_a_record_has_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path / "memory.json", [SMALL._replace(samples=2, side=12)])
    rows = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))["records"]
    assert [row["way"] for row in rows] == [way.name for way in WAYS]
    peaks = {row["way"]: row["peak"] for row in rows}
    assert peaks["loop, checkpointed"] < peaks["loop"]
    assert peaks["vmap, checkpointed"] < peaks["vmap"]
    assert capsys.readouterr().out.splitlines() == [line(row) for row in rows]


def test_what_does_not_fit_is_a_row() -> None:
    row = {**SMALL._asdict(), "way": "loop", "held": None, "peak": None}
    assert line(row) == "| 2 × resnet8, 4 of 16×16 | loop | does not fit | | |"


def test_the_page_on_training_has_the_record() -> None:
    rows = json.loads((REPOSITORY / "benchmarks" / "results" / "memory.json").read_text(encoding="utf-8"))["records"]
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8").splitlines()
    assert [text for text in page if text.startswith("| 5 × ")] == [line(row) for row in rows]
