"""What freed memory that is kept spares a step, and what a user's own loop takes; each way in a process of its own.

    python -m benchmarks.allocation --out benchmarks/results/allocation_cpu.json [--arch resnet8,resnet18]

glibc gives large blocks back to the system once they are free, which clears their pages anew for the next step. The
commands of the package keep them (`runtime.memory.keep_freed`). That is a setting of a process, so `steps`, which
takes all ways in one, does not show it: here a round starts a process a way, in turns, which takes some steps.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ratio, summary
from benchmarks.outcomes import write
from benchmarks.record import header
from benchmarks.step_cases import FULL, WAYS, StepCase
from immunity_fast.runtime.memory import keep_freed

SAMPLES = {"resnet8": 32, "resnet18": 16, "googlenet": 4, "densenet121": 4}
STEPS = {"resnet8": 20, "resnet18": 4, "googlenet": 3, "densenet121": 3}
WARMING = 2  # steps that are not counted
ROUNDS = 7
NAIVE = "naive loop"
# The way of `step_cases`, and whether freed memory is kept.
PROCESSES = {
    NAIVE: (None, False),
    f"{NAIVE}, kept": (None, True),
    "this step": ("eager loop", False),
    "this step, kept": ("eager loop", True),
}


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description="Training steps in processes of their own, freed memory kept or not.")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--arch", default="resnet8,resnet18", help="with commas between")
    parser.add_argument("--turn", choices=list(PROCESSES), help="one process; what the rounds are made of")
    given = parser.parse_args()
    if given.turn is not None:
        print(json.dumps(turn(given.arch, given.turn)))
        return
    record = header(f"python -m benchmarks.allocation --arch {given.arch}") | {"cases": list[dict[str, Any]]()}
    for arch in given.arch.split(","):
        record["cases"].append(case(arch))
        write(given.out, record)
        print(table(record["cases"][-1:]), flush=True)


def turn(arch: str, name: str) -> dict[str, float]:
    """A process' median seconds of a step, and pages that a step makes the system clear."""
    way_name, kept = PROCESSES[name]
    if kept and not keep_freed():
        raise SystemExit("error: freed memory is kept with glibc alone, and where the environment says nothing of it")
    case = StepCase(arch, None, SAMPLES[arch], amp="off")
    if way_name is None:
        step, _ = case.naive_step(FULL)
    else:
        way = next(way for way in WAYS if way.name == way_name)
        step, _ = case.step(way._replace(memory_format="auto"), FULL)
    for _ in range(WARMING):
        step()
    seconds, faults = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(STEPS[arch]):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"seconds": statistics.median(seconds), "faults": faults / STEPS[arch]}


def case(arch: str) -> dict[str, Any]:
    """Rounds of all ways, in rotating order."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PROCESSES}
    names = list(PROCESSES)
    for index in range(ROUNDS):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            command = [sys.executable, "-m", "benchmarks.allocation", "--arch", arch, "--turn", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout))
    seconds = {name: [each["seconds"] for each in rounds] for name, rounds in found.items()}
    return {
        "arch": arch,
        "samples": SAMPLES[arch],
        "ways": {
            name: summary(seconds[name])
            | {
                "of_the_naive_loop": ratio(seconds[name], seconds[NAIVE]),
                "faults": round(statistics.median(each["faults"] for each in found[name])),
            }
            for name in PROCESSES
        },
    }


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown: a row a way of a case."""
    rows = ["| 5 experts, images | step | ms | of the naive loop | page faults a step |", "|---|---|---:|---:|---:|"]
    for each in cases:
        for name, way in each["ways"].items():
            spread = f"{way['median_us'] / 1e3:,.1f} ± {way['iqr_us'] / 2e3:.1f}"
            rows.append(
                f"| {each['arch']}, {each['samples']} | {name} | {spread} | {way['of_the_naive_loop']:.2f} | "
                f"{way['faults']:,} |"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
