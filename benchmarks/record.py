"""Measures every case, without pytest, and writes one record.

    python -m benchmarks.record --out FILE [--time-limit SECONDS] [--go-on] [--rehearse]

The record is written after each case: an interruption costs what had not been measured by then. A fault of the device,
as a read of memory that is not there, leaves the process without one: it ends, and `--go-on` takes up FILE with what
comes after the case at fault. `--rehearse` takes a few small cases, and judges no result on a device that computes
nothing.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, timing
from benchmarks.cases import all_cases, rehearsed_cases
from benchmarks.measure import measure
from benchmarks.outcomes import write
from immunity_fast.runtime.compilation import keep_caches

NAMED = ("group", "samples", "shape", "dtype", "layout")  # what tells the records of one case from others


def header(command: str) -> dict[str, Any]:
    """Where and how a record is made."""
    return {
        "machine": machine.device(),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "command": command,
    }


def begun(out: Path, command: str, go_on: bool) -> dict[str, Any]:
    """A new record, or the one in `out` where it is to be gone on with; without the device's being lost."""
    if go_on:
        found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return found | {"device_lost": False, "not_measured": []}
    return header(command) | {"device_lost": False, "records": [], "failures": [], "not_measured": []}


def _named(fields: dict[str, Any]) -> str:
    return json.dumps([fields[key] for key in NAMED])


def record(seconds: float, out: Path, rehearse: bool = False, go_on: bool = False) -> dict[str, Any]:
    """The record as it stands in `out`; no case is begun after so many seconds, and those that were not are named."""
    begin = time.monotonic()
    if rehearse:
        timing.rehearse()
    found = begun(out, "python -m benchmarks.record" + (" --rehearse" if rehearse else ""), go_on)
    found["copy_gb_per_s"] = machine.copy_gb_per_s()
    write(out, found)  # where that is not possible, it is better known now
    cases = rehearsed_cases() if rehearse else all_cases()
    known = {_named(one) for one in found["records"]}
    failed = {one["case"] for one in found["failures"]}
    for index, case in enumerate(cases, 1):
        if str(case) in failed or _named(case.describe()) in known:
            continue
        if time.monotonic() - begin > seconds:
            found["not_measured"].append({"case": str(case), "reason": f"{seconds:.0f} s were over"})
            continue
        measured = measure(case, rehearse)
        found["records"] += measured.records.values()
        found["failures"] += [
            {"case": str(case), "mode": mode, "variant": variant, "error": error}
            for (mode, variant), error in measured.failures.items()
        ]
        if measured.skipped:
            found["not_measured"].append({"case": str(case), "reason": measured.skipped})
        note = f"{len(measured.failures)} failed" if measured.failures else measured.skipped or "done"
        print(f"[{index}/{len(cases)}, {time.monotonic() - begin:.0f} s] {case}: {note}", flush=True)
        found["device_lost"] = timing.lost()
        write(out, found)
        if found["device_lost"]:
            break
    return found


def main() -> None:
    """The command `python -m benchmarks.record`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="begin no case after")
    parser.add_argument("--go-on", action="store_true", help="with FILE, behind a case that cost the device")
    parser.add_argument("--rehearse", action="store_true", help="few and small cases")
    options = parser.parse_args()
    keep_caches()
    found = record(options.time_limit, options.out, options.rehearse, options.go_on)
    if found["failures"]:
        raise SystemExit(f"error: {len(found['failures'])} variants failed: {found['failures'][0]['error']}")


if __name__ == "__main__":
    main()
