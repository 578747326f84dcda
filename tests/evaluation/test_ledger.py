"""What a killed computation has finished is there the next time, whatever the kill left of the last line."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from immunity_fast.evaluation.ledger import Ledger, key_of

PIECES: dict[str, dict[str, Any]] = {
    "a": {"right": {"mean": "0110", "expert 1": ""}, "loss": 0.1 + 0.2, "seconds": 1e-300},
    "b": {"points": [{"eps": 1 / 3, "right": {"α × β": "1"}}, {}], "centres": [[[1.5, -0.0]]]},
    "c": {},
}


def _written(path: Path) -> Ledger:
    ledger = Ledger(path)
    for key, piece in PIECES.items():
        ledger.add(key, piece)
    return ledger


def test_pieces_are_there_at_once_and_the_next_time(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    written = _written(file)
    for ledger in (written, Ledger(file)):
        assert ledger.pieces == PIECES
        assert all(key in ledger and ledger[key] == piece for key, piece in PIECES.items())
        assert "d" not in ledger
        with pytest.raises(KeyError):
            ledger["d"]


def test_a_line_is_a_json_object_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    _written(file)
    lines = file.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [{"key": key, **piece} for key, piece in PIECES.items()]


def test_no_file_is_made_before_there_is_a_piece(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.pieces == {}
    assert list(tmp_path.iterdir()) == []
    ledger.add("a", {})
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, 5e-324, 1.7976931348623157e308, -0.0, 0.1])
def test_numbers_come_back_bit_for_bit(tmp_path: Path, value: float) -> None:
    Ledger(tmp_path / "l").add("a", {"loss": value})
    back = Ledger(tmp_path / "l")["a"]["loss"]
    assert back == value
    assert math.copysign(1, back) == math.copysign(1, value)


def test_nan_comes_back(tmp_path: Path) -> None:
    Ledger(tmp_path / "l").add("a", {"loss": math.nan})
    assert math.isnan(Ledger(tmp_path / "l")["a"]["loss"])


def test_the_last_piece_of_a_key_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    ledger.add("a", {"loss": 1})
    ledger.add("a", {"loss": 2})
    assert ledger["a"] == Ledger(tmp_path / "l")["a"] == {"loss": 2}


def test_whatever_was_written_its_whole_lines_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every possible cut."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    whole = tmp_path / "whole"
    _written(whole)
    content = whole.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(content) if byte == ord("\n"))]
    assert len(ends) == 4
    for cut in range(len(content) + 1):
        file = tmp_path / "cut"
        file.write_bytes(content[:cut])
        ledger = Ledger(file)
        finished = sum(end <= cut for end in ends) - 1
        kept = dict(itertools.islice(PIECES.items(), finished))
        assert ledger.pieces == kept
        assert file.read_bytes() == content[: ends[finished]]
        ledger.add("new", {"loss": cut})
        expected = kept | {"new": {"loss": cut}}
        assert ledger.pieces == expected
        assert Ledger(file).pieces == expected
        assert file.read_bytes().count(b"\n") == finished + 1


GARBAGE = [
    b"",
    b"   ",
    b"garbage",
    b"\0" * 40,
    b"\xff\xfe{}",
    b'{"right": {}}',
    b'{"key": "z", "right": ',
    b'{"key": "z"} {"key": "y"}',
    b"null",
    b"3.5",
    b'"key"',
    b"[]",
    b"[1, 2]",
    b'{"key": []}',
    b'{"key": {}}',
]


@pytest.mark.parametrize("line", GARBAGE)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_line_that_is_no_piece_is_ignored(tmp_path: Path, line: bytes, place: int) -> None:
    file = tmp_path / "ledger.jsonl"
    _written(file)
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"".join(part + b"\n" for part in [*lines[:place], line, *lines[place:]]))
    content = file.read_bytes()
    ledger = Ledger(file)
    assert ledger.pieces == PIECES
    assert file.read_bytes() == content
    ledger.add("new", {})
    assert Ledger(file).pieces == PIECES | {"new": {}}


def test_a_piece_is_on_the_disk_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, synced = tmp_path / "l", []
    ledger = Ledger(file)

    def fsync(_descriptor: int) -> None:
        synced.append(file.read_bytes())
        assert "a" not in ledger

    monkeypatch.setattr(os, "fsync", fsync)
    ledger.add("a", {})
    assert synced == [b'{"key": "a"}\n']


def test_a_piece_that_cannot_be_written_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "l")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        ledger.add("a", {})
    assert "a" not in ledger


def test_a_piece_is_kept_as_it_was_when_it_was_added(tmp_path: Path) -> None:
    ledger, piece = Ledger(tmp_path / "l"), {"loss": 1}
    ledger.add("a", piece)
    piece["loss"] = 2
    assert ledger["a"] == {"loss": 1}


# Keys


DESCRIPTION = {"kind": "attack", "eps": 8 / 255, "settings": {"steps": 20, "targets": None}, "points": [1, 2], "n": 1}


@pytest.mark.parametrize(
    "other",
    [
        DESCRIPTION | {"kind": "noise"},
        DESCRIPTION | {"eps": math.nextafter(8 / 255, 1)},
        DESCRIPTION | {"settings": {"steps": 21, "targets": None}},
        DESCRIPTION | {"settings": {"steps": 20, "targets": 0}},
        DESCRIPTION | {"settings": {"steps": 20}},
        DESCRIPTION | {"points": [2, 1]},
        DESCRIPTION | {"points": [1, 2, 3]},
        DESCRIPTION | {"n": "1"},
        DESCRIPTION | {"n": None},
        DESCRIPTION | {"more": ""},
        {name: value for name, value in DESCRIPTION.items() if name != "n"},
        {"kind": "attack"},
        {},
    ],
)
def test_a_key_depends_on_everything_in_the_description(other: dict[str, Any]) -> None:
    assert key_of(other) != key_of(DESCRIPTION)


def test_a_key_does_not_depend_on_the_order_or_on_the_process() -> None:
    turned = {name: DESCRIPTION[name] for name in reversed(DESCRIPTION)}
    turned["settings"] = dict(reversed(DESCRIPTION["settings"].items()))  # type: ignore[attr-defined]
    assert list(turned) != list(DESCRIPTION)
    assert key_of(turned) == key_of(DESCRIPTION)
    # Of the text '{"a": 1}', by another program.
    assert key_of({"a": 1}) == "f9d86028c6e0d64e225186f96acb69338b2c59764df79162107f5c4bb34d1310"
