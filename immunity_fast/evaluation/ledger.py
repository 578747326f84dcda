"""What a long computation has finished, piece by piece, in a file: whoever kills it loses one piece at most.

Several processes may work on one ledger at once: each piece is claimed by the one at it, and the claim ends with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from immunity_fast.runtime.files import append_to, end_of_lines, lock_byte, named, parse_json, unlock_byte

Piece = TypeVar("Piece")
WRITING = 0  # the byte of the file that is locked by who writes to it; those behind it are claims


class Ledger:
    """Results of pieces under keys, a JSON object a line. A last line that was cut off is dropped.

    Args:
        path: the file; it is made with the first piece.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pieces: dict[str, dict[str, Any]] = {}
        self._file: int | None = None
        self._read = 0  # bytes of the file
        if path.is_file():
            self._take_over()

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.pieces[key]

    def __contains__(self, key: str) -> bool:
        return key in self.pieces

    def add(self, key: str, piece: Mapping[str, Any]) -> None:
        """Write a piece into the file under its key; a kill does not lose it any more."""
        with self._writing() as file:
            append_to(file, json.dumps({"key": key, **piece}).encode())
        self.pieces[key] = dict(piece)

    def forget(self, key: str) -> None:
        """Count a piece as not done in this process; the one that is added next under its key counts."""
        self.pieces.pop(key, None)

    def shared(self, pieces: Iterable[Piece], key: Callable[[Piece], str]) -> Iterator[Piece]:
        """Share pieces with other processes that work on the same file.

        Args:
            pieces: all that are to be done.
            key: of a piece.

        Yields:
            Each piece once, for the caller to look whether it is done, and to do it: until the next one is asked for,
            it is no other process'. Those at which another process is come last: when that has finished them, or has
            ended without.
        """
        left = list(pieces)
        for wait in (False, True):
            others = []
            for piece in left:
                name = key(piece)
                if name in self:
                    yield piece
                elif lock_byte(self._open(), _place(name), wait=wait):
                    try:
                        self._take_over()  # another process may have done it meanwhile
                        yield piece
                    finally:
                        unlock_byte(self._open(), _place(name))
                else:
                    others.append(piece)
            left = others

    def _take_over(self) -> None:
        """Read what was written since, and drop a line of which a kill has left a part."""
        with self._writing() as file:
            end, size = end_of_lines(file), os.fstat(file).st_size
            if end < size:
                os.ftruncate(file, end)
            os.lseek(file, min(self._read, end), os.SEEK_SET)
            content = b""
            while len(content) < end - self._read and (more := os.read(file, end - self._read - len(content))):
                content += more
            self._read = end
        for line in content.split(b"\n"):
            try:
                piece = parse_json(line)
                self.pieces[piece.pop("key")] = piece
            except (ValueError, KeyError, AttributeError, TypeError):
                continue  # not a piece of ours: it is computed again

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """The file's descriptor, while no other process writes."""
        file = self._open()
        with named(self.path):
            lock_byte(file, WRITING, wait=True)
            try:
                yield file
            finally:
                unlock_byte(file, WRITING)

    def _open(self) -> int:
        if self._file is None:
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._file = os.open(self.path, flags, 0o666)
            # One descriptor for good: closing any of this file would end this process' claims.
            weakref.finalize(self, os.close, self._file)
        return self._file


def _place(key: str) -> int:
    """The byte that stands for a key."""
    return 1 + int(hashlib.sha256(key.encode()).hexdigest()[:12], 16)


def key_of(description: Mapping[str, Any]) -> str:
    """A piece's key: a hash of its description, a JSON object of everything that it depends on."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
