"""The records of a training, as the list that they are and as the table that is shown."""

from __future__ import annotations

import json

import pytest

from immunity_fast.training import TrainConfig, Trainer
from immunity_fast.training.records import Records

EPOCHS = [
    {"epoch": 1, "loss": 2.5, "mutual_information_loss": 0.0, "mutual_information": 0.0, "images_per_second": 99.6},
    {"epoch": 2, "loss": 1.25, "mutual_information_loss": 0.0, "mutual_information": 0.0, "val_accuracy_mean": 0.5},
]


def test_records_are_a_list_of_what_was_measured() -> None:
    records = Records(EPOCHS)
    assert records == EPOCHS
    assert json.loads(json.dumps(records)) == EPOCHS
    assert records[-1] is EPOCHS[-1]
    assert isinstance(records[1:], Records)
    assert records[1:] == EPOCHS[1:]


def test_what_is_shown_is_a_row_an_epoch() -> None:
    table = Records(EPOCHS).table()
    assert table.columns == ["epoch", "loss", "accuracy, gate mean, %", "images/s"], "of one network, no information"
    assert table.rows == [["1", "2.500", "—", "100"], ["2", "1.250", "50.0", "—"]]


def test_experts_have_their_mutual_information() -> None:
    record = {"epoch": 1, "mutual_information_loss": 1.2, "mutual_information": 0.456, "val_accuracy_mean": 0.0}
    assert Records([record]).table().rows == [["1", "0.46", "0.0"]]


def test_other_ensembles_have_none() -> None:
    assert Records([{"epoch": 1, "loss": 2.5, "diversity": 0.3}]).table().columns == ["epoch", "loss"]


def test_a_notebook_shows_the_table_and_a_terminal_its_text() -> None:
    assert Records(EPOCHS)._repr_html_() == Records(EPOCHS).table().to_html()
    assert Records()._repr_html_() == "no epochs yet"
    pretty = pytest.importorskip("IPython.lib.pretty", reason="which prints values in notebooks")
    assert pretty.pretty(Records(EPOCHS)).startswith("| epoch |  loss |")
    assert pretty.pretty(Records()) == "[]"


def test_a_trainer_s_history_is_such_before_it_begins() -> None:
    trainer = Trainer(TrainConfig())
    assert isinstance(trainer.history, Records)
    assert trainer.history == []
