"""What a newcomer waits for: imports, --help, and the parts of the quickstart, of this tree and of an older one.

    git worktree add /tmp/old COMMIT
    python -m benchmarks.first_result --old /tmp/old --out benchmarks/results/first_result_cpu.json

Imports and short commands are medians of processes that begin in turns, whose first of each is thrown away: it reads
files that are not in memory yet, and writes compiled modules. The quickstart runs by turns, too, `--runs` times in each
tree; `benchmarks.phases` says where its time goes. Installing is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine
from immunity_fast.runtime.files import write_atomically

HERE = Path(__file__).resolve().parent
NAMES = "FusedImmunityLoss, ImmunityMoE"
TORCH = "import torch"
# What Python is called with.
SHORT = {
    TORCH: ["-c", TORCH],
    f"{TORCH}, immunity_fast": ["-c", f"{TORCH}, immunity_fast"],
    f"{TORCH}; from immunity_fast import {NAMES}": ["-c", f"{TORCH}; from immunity_fast import {NAMES}"],
    **{
        f"{command} {words}": ["-m", f"immunity_fast.{command}", *words.split()]
        for command, words in (
            ("train", "--help"),
            ("train", "--no-such-option"),
            ("evaluate", "--help"),
            ("reproduce", "--help"),
            ("info", "--help"),
            ("info", ""),
        )
    },
}
Seconds = dict[str, dict[str, Any]]  # by tree, by what was run


def seconds_of(tree: Path, words: list[str]) -> float:
    """How long Python takes for some words, the package being a tree's."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], env=environment(tree), cwd=tree, capture_output=True, check=False)
    return time.perf_counter() - begin


def environment(tree: Path) -> dict[str, str]:
    """This process's, with a tree's package before all others, and compiled modules kept."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"PYTHONPATH": str(tree)}


def short(trees: dict[str, Path], rounds: int) -> Seconds:
    """Seconds of each short command in each tree, a list of rounds each."""
    found: Seconds = {tree: {name: [] for name in SHORT} for tree in trees}
    turns = [(tree, name) for name in SHORT for tree in trees]
    for number in range(rounds + 1):
        for tree, name in turns[number % len(turns) :] + turns[: number % len(turns)]:
            seconds = seconds_of(trees[tree], SHORT[name])
            if number:
                found[tree][name].append(round(seconds, 4))
    return found


def quickstart(tree: Path, options: list[str]) -> dict[str, Any]:
    """A run of the command train: seconds of its parts, on the clock and of processors, and what came out."""
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder) / "phases.json", Path(folder) / "run"
        words = ["-c", (HERE / "phases.py").read_text(encoding="utf-8"), str(file), "--out", str(run), *options]
        subprocess.run([sys.executable, *words], env=environment(tree), cwd=folder, check=True)
        parts = json.loads(file.read_text(encoding="utf-8"))
        accuracy = json.loads((run / "results.json").read_text(encoding="utf-8"))["accuracy"]
    return {
        "seconds": {part: round(clock, 3) for part, (clock, _) in parts.items()},
        "of_processors": {part: round(used, 3) for part, (_, used) in parts.items()},
        "accuracy": {
            f"{row['attack']} by {row['attacker'] or 'nobody'}, gate {row['judge']}": row["accuracy"]
            for row in accuracy
        },
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown: medians in seconds, a column a tree, and what the last takes of the first's time."""
    trees = list(record["trees"])
    lines = [f"| seconds | {' | '.join(trees)} | ratio |", f"|---|{'---:|' * (len(trees) + 1)}"]

    def row(name: str, values: list[float]) -> None:
        ratio = f"{values[-1] / values[0]:.2f}" if len(values) > 1 and values[0] > 0 else ""
        lines.append(f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} | {ratio} |")

    for name in SHORT if record["short"] else ():
        row(name, [statistics.median(record["short"][tree][name]) for tree in trees])
    runs = {tree: [run["seconds"] for run in record["runs"][tree]] for tree in trees}
    if all(runs.values()):
        for part in runs[trees[-1]][0]:
            row(part, [statistics.median(run.get(part, 0.0) for run in runs[tree]) for tree in trees])
        row("the whole quickstart", [statistics.median(sum(run.values()) for run in runs[tree]) for tree in trees])
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m benchmarks.first_result`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_result", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--old", type=Path, metavar="TREE", help="a checkout that is measured beside this one")
    parser.add_argument("--rounds", type=int, default=9, help="processes of each short command [9]; 0: none")
    parser.add_argument("--runs", type=int, default=1, help="of the quickstart in each tree [1]; 0: none")
    parser.add_argument(
        "--options", type=shlex.split, default=[], help="of the command train, in one word: fewer epochs"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    trees = ({} if options.old is None else {"before": options.old.resolve()}) | {"now": HERE.parent}
    record: dict[str, Any] = {
        "machine": machine.device(),
        "versions": machine.versions(),
        "options": options.options,
        "trees": list(trees),
        "short": short(trees, options.rounds) if options.rounds else {},
        "runs": {tree: [] for tree in trees},
    }
    for number in range(options.runs):
        for tree in list(trees) if number % 2 == 0 else list(trees)[::-1]:
            record["runs"][tree].append(quickstart(trees[tree], options.options))
            write_atomically(options.out, json.dumps(record, indent=1).encode())
    write_atomically(options.out, json.dumps(record, indent=1).encode())
    print(table(record))


if __name__ == "__main__":
    main()
