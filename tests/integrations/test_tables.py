"""The tables of docs/compatibility.md are those of tests/compatible.py, whose cells are tested here."""

from __future__ import annotations

import re

import pytest

from tests import compatible
from tests.compatible import ATTACKED, ATTACKS, NETWORKS, WRAPPERS
from tests.places import REPOSITORY

PAGE = REPOSITORY / "docs" / "compatibility.md"


def test_the_page_shows_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for table in compatible.tables():
        assert table in page, f"what `python -m tests.compatible` prints:\n{table}"
    assert len(re.findall(r"^\| ---", page, re.MULTILINE)) == len(compatible.tables())


@pytest.mark.parametrize(
    ("refused", "rows", "columns"),
    [
        (compatible.NOT_WRAPPED, NETWORKS, WRAPPERS),
        (compatible.NOT_ATTACKED, NETWORKS, ATTACKS),
        (compatible.NOT_ATTACKED_AS, ATTACKED, ATTACKS),
    ],
)
def test_every_cell_that_does_not_work_is_a_cell(refused: compatible.Cells, rows: object, columns: object) -> None:
    for row, column in refused:
        assert row in rows  # type: ignore[operator]
        assert column in columns  # type: ignore[operator]


def test_a_table_numbers_what_does_not_work() -> None:
    found = compatible.table("x", ["a", "b"], ["c", "d"], {("a", "d"): "too wide", ("b", "d"): "too wide"})
    assert found == "| x | c | d |\n| --- | --- | --- |\n| a | yes | no (1) |\n| b | yes | no (1) |\n\n1. too wide."
