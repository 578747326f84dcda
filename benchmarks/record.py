"""Measures every case, without pytest, and writes one record.

    python -m benchmarks.record --out FILE [--time-limit SECONDS]

It is written after each case: an interruption costs what had not been measured by then.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import all_cases
from benchmarks.measure import measure


def header(command: str) -> dict[str, Any]:
    """Where and how a record is made."""
    return {
        "machine": machine.device(),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "command": command,
    }


def record(seconds: float, out: Path) -> dict[str, Any]:
    """The record as it stands in `out`; no case is begun after so many seconds, and those that were not are named."""
    begin = time.monotonic()
    found = header("python -m benchmarks.record") | {"copy_gb_per_s": machine.copy_gb_per_s()}
    found |= {"records": [], "failures": [], "not_measured": []}
    write(out, found)  # where that is not possible, it is better known now
    cases = all_cases()
    for index, case in enumerate(cases, 1):
        if time.monotonic() - begin > seconds:
            found["not_measured"].append({"case": str(case), "reason": f"{seconds:.0f} s were over"})
            continue
        measured = measure(case)
        found["records"] += measured.records.values()
        found["failures"] += [
            {"case": str(case), "mode": mode, "variant": variant, "error": error}
            for (mode, variant), error in measured.failures.items()
        ]
        if measured.skipped:
            found["not_measured"].append({"case": str(case), "reason": measured.skipped})
        note = f"{len(measured.failures)} failed" if measured.failures else measured.skipped or "done"
        print(f"[{index}/{len(cases)}, {time.monotonic() - begin:.0f} s] {case}: {note}", flush=True)
        write(out, found)
    write(out, found)
    return found


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, an entry of a list a line; `path` only ever holds all of it."""
    fields = []
    for name, value in content.items():
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in value) + "\n ]"
        else:
            text = json.dumps(value, ensure_ascii=False)
        fields.append(f" {json.dumps(name)}: {text}")
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise SystemExit(f"error: {path}: {error.strerror}") from None


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="begin no case after")
    options = parser.parse_args()
    found = record(options.time_limit, options.out)
    if found["failures"]:
        raise SystemExit(f"error: {len(found['failures'])} variants failed: {found['failures'][0]['error']}")


if __name__ == "__main__":
    main()
