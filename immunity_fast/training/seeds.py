"""One training by several seeds: a run each, in a folder of its own, and what they have in common."""

from __future__ import annotations

import csv
import dataclasses
import gc
import io
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from immunity_fast.evaluation.words import JUDGES, NAMES, gate_in, knows
from immunity_fast.experts import title
from immunity_fast.experts.registry import check_trusted, imports_code
from immunity_fast.reporting.html import Table, write_report
from immunity_fast.runtime import cli, distributed, interrupts
from immunity_fast.runtime.commands import shell_command
from immunity_fast.runtime.files import abbreviated, parse_json, write_atomically
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.preparation import CHANGEABLE_ON_RESUME, Start, begin, go_on
from immunity_fast.training.run_folder import Run
from immunity_fast.training.session import fit_and_evaluate

FILE = "seeds.json"  # in a set's folder
MOST = 10_000  # seeds of a set: 0-99999999 is a mistake
MEASURES = {
    "val_accuracy_mean": "validation accuracy, gate mean",
    "val_accuracy_sample": "validation accuracy, gate sample",
    "val_pgd10_accuracy_mean": "validation accuracy under PGD-10",
}


class SeedSet(Start):
    """A training that is to start once a seed; `config` is that of all of them, but for its seed.

    Args:
        folder: of the set, in which each seed's run has its own.
        resume: whether it was begun before.
        config: the settings.
        seeds: in the order in which they are trained.
        trust_code: see `go_on`.
    """

    seeds: tuple[int, ...]
    trust_code: bool

    def __new__(
        cls, folder: Path, resume: bool, config: TrainConfig, seeds: Sequence[int], trust_code: bool = False
    ) -> SeedSet:
        made = super().__new__(cls, folder, resume, config)
        made.seeds, made.trust_code = tuple(seeds), trust_code
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        """For pickle, by which the first of several processes tells the others."""
        return (*self, self.seeds, self.trust_code)

    def run(self, seed: int) -> Run:
        """The run of a seed, whether it is there or not."""
        return Run(self.folder / f"seed-{seed}")

    @property
    def resume_command(self) -> str:
        """What goes on with all of it, for a shell."""
        trust = ["--trust-code"] if imports_code(self.config.arch) else []
        return shell_command("train", ["--resume", str(self.folder), *trust])


def parse_seeds(text: str | int | Sequence[Any], options: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Seeds as a person writes them: `0,1,2`, `0-4`, `0-2,7`, or a list of such.

    Args:
        text: that.
        options: settings that are given beside them.

    Raises:
        ValueError: it is no such text, or has a seed twice, or there is a single seed beside them.
    """
    if options and "seed" in options:
        raise ValueError(f"--seed: expected none beside --seeds {abbreviated(text)}, got {options['seed']}")
    parts = text.split(",") if isinstance(text, str) else [text] if isinstance(text, int) else list(text)
    seeds: list[int] = []
    for part in parts:
        first, dash, last = str(part).strip().partition("-")
        ends = [first, last] if dash else [first, first]
        if not all(end.isascii() and end.isdecimal() and len(end) < 19 for end in ends):
            raise ValueError(
                f"--seeds: expected whole numbers and ranges, such as 0,1,2 or 0-4, got {abbreviated(text)}"
            )
        low, high = int(ends[0]), int(ends[1])
        if not low <= high < low + MOST:
            raise ValueError(f"--seeds: expected a range of at most {MOST:,} seeds upwards, got {part}")
        seeds += range(low, high + 1)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds: expected each seed once, at least one, got {abbreviated(text)}")
    return tuple(seeds)


def begin_set(config: TrainConfig, out: Path | None, seeds: Sequence[int]) -> SeedSet:
    """Settle where a new set lies, as `begin` does of a run; nothing is written.

    Raises:
        ValueError, FileExistsError: see `begin`; or several processes are to train.
    """
    _check_alone()
    start = begin(config, out)
    return SeedSet(start.folder, False, start.config, seeds)


def is_set(folder: Path) -> bool:
    """Whether a folder is that of a set."""
    return (folder / FILE).is_file()


def go_on_with_set(
    folder: Path, changes: Mapping[str, Any], seeds: Sequence[int] = (), *, trust_code: bool = False
) -> SeedSet:
    """Settle how a set that was begun before goes on; nothing is written.

    Args:
        folder: the set's.
        changes: settings by name, of which those that change no result may differ.
        seeds: more of them, or some of its own.
        trust_code: see `go_on`.

    Raises:
        ValueError: its file is none of a set, or a setting would make other runs of it; or code is not trusted, or
            several processes are to train.
    """
    _check_alone()
    file = folder / FILE
    try:
        found = parse_json(file.read_bytes())
        config, own = TrainConfig.from_json(found["config"]), parse_seeds(found["seeds"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected the seeds and settings of a set of runs, got others ({error})") from error
    check_trusted(file, config.arch, trust_code)
    for name, value in changes.items():
        if name not in CHANGEABLE_ON_RESUME and value != getattr(config, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} {value}: the runs in {folder} were begun with {option} {getattr(config, name)}")
    more = [seed for seed in seeds if seed not in own]
    return SeedSet(folder, True, dataclasses.replace(config, **changes), (*own, *more), trust_code)


def train_seeds(start: SeedSet) -> None:
    """Train and evaluate a run a seed, one after another, and sum up those that have come to their end.

    What is finished is left, what was interrupted goes on, and where a run diverges, or cannot be evaluated, the others
    go on without it.

    Args:
        start: what.

    Raises:
        cli.InputError, OSError: what the user gave is wrong, or some of the runs have failed; one clear line.
        KeyboardInterrupt: it was stopped, and has said how to go on.
    """
    first = distributed.log_in_first(cli.console.print)
    with interrupts.explained(lambda: f"interrupted; go on with: {start.resume_command}", first):
        _write_set(start)
        failed: dict[int, str] = {}
        for number, seed in enumerate(start.seeds, start=1):
            run = start.run(seed)
            cli.console.print(f"seed {seed}, {number} of {len(start.seeds)}: ", end="")
            if is_finished(run):
                cli.console.print("finished")
            elif run.diverged.is_file():
                failed[seed] = f"has diverged; {run.resume_command} goes on with it"
                cli.console.print(failed[seed])
            else:
                cli.console.print(f"{run.folder}")
                try:
                    fit_and_evaluate(_start_of(start, seed))
                except cli.InputError as error:
                    if not run.config_file.is_file():  # nothing has begun, and nothing else of it would
                        _forget(start)
                        raise
                    failed[seed] = str(error)
                    cli.console.print(f"seed {seed}: {error}")
                _forget_compiled()
            found = write_summary(start, failed)
        for table in tables(found):
            cli.console.print(f"\n{table.to_markdown()}")
        cli.console.print(f"\nall seeds together: {start.folder / 'report.html'}")
        if failed:
            names = ", ".join(map(str, failed))
            done = len(found["finished"])
            reason = next(iter(failed.values()))
            raise cli.InputError(f"{done} of {len(start.seeds)} seeds are finished; not seed {names}: {reason}")


def is_finished(run: Run) -> bool:
    """Whether a run has been trained to its end and evaluated."""
    with suppress(OSError, ValueError):
        ended = run.checkpoint.is_file() and run.report.is_file() and run.results_file.is_file()
        return ended and run.has_ended(run.epochs_trained())
    return False


def write_summary(start: SeedSet, failed: Mapping[int, str]) -> dict[str, Any]:
    """Write summary.json, .md and .csv and report.html of the runs that are finished; what summary.json has.

    Args:
        start: the set.
        failed: why others are not, by seed.
    """
    found = summary(start, failed)
    shown = tables(found)
    text = "\n\n".join(table.to_markdown() for table in shown) + "\n"
    folder, config = start.folder, start.config
    write_atomically(folder / "summary.json", json.dumps(found, indent=1).encode())
    write_atomically(folder / "summary.md", text.encode())
    write_atomically(folder / "summary.csv", to_csv(found).encode())
    finished = ", ".join(map(str, found["finished"])) or "none yet"
    lead = f"{title(config.arch, config.experts)} on {config.dataset}, trained once a seed; finished: {finished}."
    if failed:
        lead += " Failed: " + " ".join(f"seed {seed}: {reason}." for seed, reason in failed.items())
    write_report(
        folder / "report.html",
        title=f"{title(config.arch, config.experts)} on {config.dataset}, {len(start.seeds)} seeds",
        lead=lead,
        facts={
            f"test accuracy, {JUDGES[entry['judge']]}": _plus_minus(entry)
            for entry in found["accuracy"]
            if entry["attack"] == "clean" and entry["judge"] in JUDGES
        },
        tables=shown,
        figures=[],
        commands={
            "go on, or add up again": start.resume_command,
            **{f"evaluate seed {seed}": start.run(seed).evaluate_command for seed in found["finished"]},
        },
        settings={name: value for name, value in config.to_json().items() if name != "seed"},
    )
    return found


def summary(start: SeedSet, failed: Mapping[int, str]) -> dict[str, Any]:
    """What the finished runs of a set have in common, as a JSON object:

    * seeds: all of them; finished: those that are; failed: why, by seed, others are not;
    * accuracy: {attack, attacker, judge, mean, std, values} on test images, `std` over n − 1 (None of one run), and
      `values` by seed;
    * worst_case: the same by judge;
    * last_epoch: {measure, mean, std, values} of each number in the last epoch's record;
    * gate: as `evaluation.results.results` says it of each run.
    """
    finished = [seed for seed in start.seeds if is_finished(start.run(seed))]
    results = {seed: parse_json(start.run(seed).results_file.read_bytes()) for seed in finished}
    records = {seed: start.run(seed).metrics()[-1:] for seed in finished}
    groups: dict[str, dict[tuple[Any, ...], dict[str, float]]] = {"accuracy": {}, "worst_case": {}, "last_epoch": {}}
    for seed in finished:
        for kind in ("accuracy", "worst_case"):
            for entry in results[seed][kind]:
                place = (entry.get("attack"), entry.get("attacker"), entry["judge"])
                groups[kind].setdefault(place, {})[str(seed)] = entry["accuracy"]
        for record in records[seed]:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name not in ("epoch", "step"):
                    groups["last_epoch"].setdefault((name,), {})[str(seed)] = value
    kinds = {gate for each in results.values() if (gate := each.get("gate")) is not None}
    named = {
        "accuracy": ("attack", "attacker", "judge"),
        "worst_case": ("attack", "attacker", "judge"),
        "last_epoch": ("measure",),
    }
    return {
        "seeds": list(start.seeds),
        "finished": finished,
        "failed": {str(seed): reason for seed, reason in failed.items()},
        **{
            kind: [dict(zip(named[kind], place, strict=True)) | spread(values) for place, values in group.items()]
            for kind, group in groups.items()
        },
        **({"gate": kinds.pop()} if kinds else {}),
    }


def spread(values: Mapping[str, float]) -> dict[str, Any]:
    """Mean, standard deviation (over n − 1; None of one value) and values by seed."""
    several = list(values.values())
    return {
        "mean": statistics.fmean(several),
        "std": statistics.stdev(several) if len(several) > 1 else None,
        "values": dict(values),
    }


def tables(found: Mapping[str, Any]) -> list[Table]:
    """The tables that a person reads, of `summary`; none where no run is finished."""
    seeds = [str(seed) for seed in found["finished"]]
    if not seeds:
        return []
    columns = ["mean", "standard deviation", *(f"seed {seed}" for seed in seeds)]
    note = f"Standard deviation over {len(seeds)} seeds, n − 1 in its denominator."
    rows = []
    for entry in [*found["accuracy"], *found["worst_case"]]:
        if entry["judge"] not in JUDGES:  # an expert alone; the file has it
            continue
        attack, attacker = entry["attack"], entry["attacker"]
        name, differentiates = "worst case for each image", "all of the above"
        if attack:
            name, differentiates = NAMES.get(attack, attack), knows(attack, attacker, gate_in(found))
        rows.append([name, differentiates, JUDGES[entry["judge"]], *_percents(entry, seeds)])
    test = Table(
        f"Test accuracy of {len(seeds)} seeds, %",
        ["attack", "what the attacker differentiates", "what answers", *columns],
        rows,
        note,
    )
    measured = [
        [MEASURES[entry["measure"]], *_percents(entry, seeds)]
        for entry in found["last_epoch"]
        if entry["measure"] in MEASURES
    ]
    validation = Table("Validation accuracy after the last epoch, %", ["measure", *columns], measured, note)
    return [test, *([validation] if measured else [])]


def to_csv(found: Mapping[str, Any]) -> str:
    """The accuracies of `summary` as CSV, one a line: attack, attacker, judge, mean, std, and a column a seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    seeds = [str(seed) for seed in found["finished"]]
    writer.writerow(["attack", "attacker", "judge", "mean", "std", *(f"seed {seed}" for seed in seeds)])
    worst = [{**entry, "attack": "worst case", "attacker": "all"} for entry in found["worst_case"]]
    for entry in [*found["accuracy"], *worst]:
        values = [entry["values"].get(seed, "") for seed in seeds]
        std = "" if entry["std"] is None else entry["std"]
        writer.writerow([entry["attack"], entry["attacker"] or "", entry["judge"], entry["mean"], std, *values])
    return text.getvalue()


def _percents(entry: Mapping[str, Any], seeds: Sequence[str]) -> list[str]:
    numbers = [entry["mean"], entry["std"], *(entry["values"].get(seed) for seed in seeds)]
    return ["—" if number is None or math.isnan(number) else f"{100 * number:.1f}" for number in numbers]


def _plus_minus(entry: Mapping[str, Any]) -> str:
    deviation = "" if entry["std"] is None else f" ± {100 * entry['std']:.1f} (standard deviation of a seed)"
    return f"{100 * entry['mean']:.1f} %{deviation}"


def _start_of(start: SeedSet, seed: int) -> Start:
    """How the run of a seed begins, or goes on."""
    run = start.run(seed)
    if not run.config_file.is_file():
        return Start(run.folder, False, dataclasses.replace(start.config, seed=seed))
    with cli.input_errors():
        changes = {name: getattr(start.config, name) for name in CHANGEABLE_ON_RESUME}
        return go_on(run.folder, changes, trust_code=start.trust_code)


def _check_alone() -> None:
    """Check that no other process trains with this one.

    Raises:
        ValueError: one does, or the environment is none of torchrun's.
    """
    distributed.check_environment()
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError("--seeds: expected one process, got several of torchrun; give it one --seed a run")


def _write_set(start: SeedSet) -> None:
    """Write down what the set consists of, before its first run."""
    start.folder.mkdir(parents=True, exist_ok=start.resume)
    content = {"seeds": list(start.seeds), "config": start.config.to_json()}
    write_atomically(start.folder / FILE, json.dumps(content, indent=1).encode())


def _forget(start: SeedSet) -> None:
    """Leave no folder of a new set of which nothing could begin."""
    if not start.resume and not any(start.run(seed).folder.exists() for seed in start.seeds):
        for name in (FILE, "summary.json", "summary.md", "summary.csv", "report.html"):
            (start.folder / name).unlink(missing_ok=True)
        with suppress(OSError):
            start.folder.rmdir()


def _forget_compiled() -> None:
    """Give back what a run has held, and code that was compiled for it: of one function there is only so much."""
    gc.collect()
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
