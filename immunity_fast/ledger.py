"""What a long computation has finished, piece by piece, in a file: whoever kills it loses one piece at most."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Ledger:
    """Results of pieces under keys, a JSON object a line. A last line that was cut off is dropped.

    Args:
        path: the file; it is made with the first piece.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pieces: dict[str, dict[str, Any]] = {}
        if not path.is_file():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                piece = json.loads(line)
                self.pieces[piece.pop("key")] = piece
            except (ValueError, KeyError, AttributeError, TypeError):
                continue  # not a piece of ours: it is computed again
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.pieces[key]

    def __contains__(self, key: str) -> bool:
        return key in self.pieces

    def add(self, key: str, piece: Mapping[str, Any]) -> None:
        """Write a piece down, for good."""
        with self.path.open("ab") as file:
            file.write(json.dumps({"key": key, **piece}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.pieces[key] = dict(piece)


def key_of(description: Mapping[str, Any]) -> str:
    """A hash of everything that a piece depends on."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
