"""The first minutes on a GPU: what is broken, how fast it is, and what it learns, within a budget of seconds.

    python -m benchmarks.gpu --stages check,kernels,steps,science --budget SECONDS --out DIR [--data FILE.npz]

Stages run in this order, each within its share of the budget; what one leaves is for those after it. One that fails or
hangs stops no other. Results are written to DIR as they come:

    check.json       what does not work, with the innermost cause (`benchmarks.check`)
    kernels.json     `benchmarks.record`
    steps.json       `benchmarks.steps`; strategies.json is the package's table with what they found
    science.json     trainings and their accuracies (`benchmarks.science`), of --data, a file in MedMNIST's layout
    stages.json      what became of the stages

`--rehearse` takes the smallest sizes of everything, and judges nothing on a device that computes nothing. `--python`
is the command that runs Python in the processes that are started.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import outcomes, stages
from benchmarks.outcomes import FAILED, NOT_JUDGED, NOT_RUN, PASSED, portable, write
from benchmarks.science import RUNS
from benchmarks.stages import Job

RESERVE = 3.0  # seconds at the end, to stop what runs and to write
LAST_CASE = 30  # seconds that a benchmark may go on after its time, but at most
LAST_SHARE = 0.3  # of its time
TOLD = 3  # failures that the last line names


@dataclass
class Stage:
    """What a stage has to know."""

    out: Path
    python: list[str]
    rehearse: bool
    data: Path | None
    deadline: float  # of `time.monotonic`
    environment: dict[str, str]
    header: dict[str, Any]

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())

    def module(self, name: str, *arguments: object) -> list[str]:
        """The command of a benchmark, in the mode this one is in."""
        rehearse = ["--rehearse"] if self.rehearse else []
        return [*self.python, "-m", f"benchmarks.{name}", *map(str, arguments), *rehearse]

    def run(self, jobs: list[Job], take: stages.Take) -> None:
        """Run jobs until the stage's time is over."""
        cores = os.cpu_count() or 1
        stages.run(jobs, cores=cores, deadline=self.deadline, take=take, environment=self.environment)


def check(stage: Stage, take: stages.Take) -> None:
    """All outcomes of `benchmarks.check`, as they come."""
    from benchmarks import check  # which imports all that is checked: what fails there fails in this stage alone
    from benchmarks.cases import computes

    found: dict[str, Any] = stage.header | {"outcomes": []}

    def keep(outcome: dict[str, Any]) -> None:
        found["outcomes"].append(outcome)
        write(stage.out / "check.json", found)
        take(outcome)

    jobs = check.jobs(stage.python, os.cpu_count() or 1, stage.rehearse)
    if stage.rehearse and not computes():
        for name in check.NUMBERS:
            keep({"name": name, "outcome": NOT_JUDGED, "cause": "the device computes nothing"})
        jobs = [job for job in jobs if job.name not in check.NUMBERS]
    stage.run(jobs, keep)


def kernels(stage: Stage, take: stages.Take) -> None:
    """The stage that runs `benchmarks.record`."""
    _benchmark(stage, take, "kernels", "record")


def steps(stage: Stage, take: stages.Take) -> None:
    """`benchmarks.steps`, and what it makes of the package's table."""
    from immunity_fast.runtime.strategies import TABLE

    before = TABLE.read_bytes()
    try:
        _benchmark(stage, take, "steps", "steps", "--write-strategies")
        shutil.copyfile(TABLE, stage.out / "strategies.json")
    finally:
        if stage.rehearse:  # nothing was measured
            TABLE.write_bytes(before)


def _benchmark(stage: Stage, take: stages.Take, name: str, module: str, *options: str) -> None:
    """A benchmark, which is begun again behind what has cost it the device."""
    out, lost = stage.out / f"{name}.json", True
    while lost:
        limit = stage.left - min(LAST_CASE, LAST_SHARE * stage.left)
        command = stage.module(module, "--out", out, "--time-limit", int(limit), *options)
        stage.run([Job(name, command, echo=True)], take)
        lost = stage.left > LAST_CASE and out.is_file() and json.loads(out.read_text()).get("device_lost", False)
        options = (*(option for option in options if option != "--go-on"), "--go-on")


def science(stage: Stage, take: stages.Take) -> None:
    """The stage that runs `benchmarks.science`."""
    if stage.data is None:
        take({"name": "science", "outcome": NOT_RUN, "cause": "--data FILE.npz is missing, the images to train on"})
        return
    options = ["--data", stage.data, "--out", stage.out / "science.json", "--limit", int(stage.left)]
    options += ["--python", shlex.join(stage.python)]
    stage.run([Job("science", stage.module("science", *options), echo=True, expected=tuple(RUNS))], take)


RUN: dict[str, Callable[[Stage, stages.Take], None]] = {
    "check": check,
    "kernels": kernels,
    "steps": steps,
    "science": science,
}


def run_stages(
    names: tuple[str, ...], stage: Stage, end: float, run: dict[str, Any] = RUN
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Run stages one after the other; how many of each outcome, and the failures. `end` is when all is to be over."""
    found: dict[str, Any] = stage.header | {"stages": []}
    failures: list[dict[str, Any]] = []
    for name in names:
        if stages.interrupted.is_set():
            raise SystemExit(stages.INTERRUPTED)
        begin = time.monotonic()
        seconds = stages.share(name, names, end - begin)
        stage.deadline = begin + seconds
        counts: dict[str, int] = {}
        record = {"name": name, "share": round(seconds, 1), "outcomes": counts}
        print(f"== {name}: {seconds:.0f} s", flush=True)

        def take(outcome: dict[str, Any], name: str = name, counts: dict[str, int] = counts) -> None:
            print(told(outcome), flush=True)
            counts[outcome["outcome"]] = counts.get(outcome["outcome"], 0) + 1
            if outcome["outcome"] == FAILED:
                failures.append(outcome | {"stage": name})

        try:
            run[name](stage, take)
        except (Exception, SystemExit) as error:
            if stages.interrupted.is_set():
                raise
            take({"name": name, "outcome": FAILED, "cause": outcomes.innermost_cause(error)})
        finally:
            record["seconds"] = round(time.monotonic() - begin, 1)
            found["stages"].append(record)
            for unfinished in stage.out.glob(".*.unfinished"):  # of a process that was killed as it wrote
                unfinished.unlink()
            found["failures"] = [
                {key: one[key] for key in ("stage", "name", "cause", "tail") if key in one} for one in failures
            ]
            write(stage.out / "stages.json", found)
    total: dict[str, int] = {}
    for record in found["stages"]:
        for outcome, count in record["outcomes"].items():
            total[outcome] = total.get(outcome, 0) + count
    return total, failures


def told(outcome: dict[str, Any]) -> str:
    """An outcome in a line."""
    details = {k: v for k, v in outcome.items() if k not in ("name", "outcome", "cause", "seconds", "tail")}
    text = f"{outcome['name']}: {outcome['outcome']}"
    if "seconds" in outcome:
        text += f" after {outcome['seconds']} s"
    if details:
        text += f" {details}"
    if outcome.get("cause"):
        text += f": {outcome['cause']}"
    return portable(text)


def main() -> None:
    """The command `python -m benchmarks.gpu`."""
    begin = time.monotonic()  # importing torch counts
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stages", default=",".join(stages.STAGES), help="which, with commas [all]")
    parser.add_argument("--budget", type=float, required=True, metavar="SECONDS", help="for all of them together")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--data", type=Path, metavar="FILE", help="images for science: .npz in MedMNIST's layout")
    parser.add_argument("--python", default=sys.executable, metavar="COMMAND", help="what runs Python in processes")
    parser.add_argument("--rehearse", action="store_true", help="the smallest sizes, to see that all of it runs")
    options = parser.parse_args()
    try:
        names = stages.parse(options.stages)
        if not RESERVE < options.budget < math.inf:
            raise ValueError(f"--budget {options.budget:g}: expected more than {RESERVE:g} seconds, and an end")
        if options.data is not None and not options.data.is_file():
            raise ValueError(f"--data {options.data}: there is no such file")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    from benchmarks.cases import DEVICE
    from benchmarks.record import header
    from immunity_fast.runtime.compilation import keep_caches

    if DEVICE.type != "cuda":
        raise SystemExit("error: benchmarks.gpu needs a CUDA GPU, and torch finds none here")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --out {options.out}: {error.strerror}") from None
    signal.signal(signal.SIGTERM, _stop)
    cache = keep_caches()  # of all processes, from before they import torch._dynamo
    environment = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }
    chosen = f"--stages {','.join(names)} --budget {options.budget:g}" + (" --rehearse" if options.rehearse else "")
    stage = Stage(
        out=options.out.resolve(),
        python=shlex.split(options.python),
        rehearse=options.rehearse,
        data=None if options.data is None else options.data.resolve(),
        deadline=begin,
        environment=environment,
        header=header(f"python -m benchmarks.gpu {chosen}"),
    )
    counts, failures = run_stages(names, stage, begin + options.budget - RESERVE)
    told_counts = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "nothing was run"
    print(f"== {time.monotonic() - begin:.0f} s of {options.budget:.0f} s: {told_counts}")
    if failures:
        said = "; ".join(f"{one['name']}: {one.get('cause', '')[:150]}" for one in failures[:TOLD])
        more = f"; and {len(failures) - TOLD} more" if len(failures) > TOLD else ""
        raise SystemExit(portable(f"error: {len(failures)} failed: {said}{more}"))
    if not counts.keys() & {PASSED, NOT_JUDGED}:
        raise SystemExit(f"error: nothing has passed: {told_counts}")


def _stop(_signal: int, _frame: object) -> None:
    stages.interrupted.set()  # what runs is ended, and what is known is written


if __name__ == "__main__":
    main()
