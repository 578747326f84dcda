"""The package's table of strategies, as benchmarks write it."""

import json
from typing import Any

from benchmarks.outcomes import write
from immunity_fast.runtime.strategies import TABLE


def replace(chosen: list[dict[str, Any]]) -> None:
    """Put records into the table, in the place of those that it has of the same device, architecture and use."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))["records"]
    replaced = set(map(_key, chosen))
    write(TABLE, {"records": [entry for entry in table if _key(entry) not in replaced] + chosen})


def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["device"], entry["arch"], entry["use"]
