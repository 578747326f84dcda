"""A whole evaluation of a run at its defaults, by this tree and by an older one, in turns, in one table.

    python -m benchmarks.evaluation RUN --old TREE --out benchmarks/results/evaluation_cpu.json [--images 100]

What is timed is the command, `python -m immunity_fast.evaluate RUN --limit N`, each time in a process and a folder of
its own, by one tree after the other; TREE is a checkout, such as `git worktree add TREE COMMIT` makes, and RUN one that
it can read, trained by itself for instance. Beside the seconds stand the accuracies that both have found, judge by
judge: how far the newer one's are at most above the older one's, and the worst case of each. `--amp` and `--attacks`
are added to the newer one's command, as ways of their own.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ratio, summary
from benchmarks.outcomes import write
from benchmarks.record import header
from immunity_fast.reporting.html import Table

TREE = Path(__file__).resolve().parent.parent


def evaluated(run: Path, tree: Path, options: list[str]) -> tuple[float, float, dict[str, Any]]:
    """(seconds, seconds of processors, results) of the command, by the package in `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "immunity_fast.evaluate", str(run), "--out", folder, *options]
        used, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env=environment, cwd=tree, check=True, stdout=subprocess.DEVNULL)
        seconds, now = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    return seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, found


def accuracies(found: dict[str, Any]) -> dict[tuple[str, str, str], float]:
    """Of each attack by each attacker, by judge; and of the worst case."""
    entries = {(e["attack"], e["attacker"] or "", e["judge"]): e["accuracy"] for e in found["accuracy"]}
    return entries | {("worst case", "", e["judge"]): e["accuracy"] for e in found["worst_case"]}


def compared(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """How accuracies differ: the newer one's minus the older one's, in all that both have measured."""
    before, after = accuracies(old), accuracies(new)
    same = before.keys() & after.keys()
    change = {place: after[place] - before[place] for place in same}
    worst = sorted(place for place in same if place[0] == "worst case")
    return {
        "accuracies": len(same),
        "equal": sum(value == 0 for value in change.values()),
        "highest": round(max(change.values()), 6),
        "lowest": round(min(change.values()), 6),
        "worst_case": {judge: [before[name, who, judge], after[name, who, judge]] for name, who, judge in worst},
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """What the record says, for people."""
    rows = []
    for entry in found["ways"]:
        differs = entry.get("compared", {})
        rows.append(
            [
                entry["way"],
                f"{entry['median_us'] / 1e6:.1f} ± {entry['iqr_us'] / 2e6:.1f}",
                f"{entry['processor_seconds']:.1f}",
                f"{entry['speedup']:.2f}",
                f"{differs['equal']} of {differs['accuracies']}" if differs else "—",
                f"{100 * differs['lowest']:+.1f} to {100 * differs['highest']:+.1f}" if differs else "—",
            ]
        )
    columns = ["way", "seconds", "of processors", "speed-up", "equal accuracies", "others differ by, points"]
    return [Table(f"Evaluation of {found['images']} images", columns, rows)]


def main() -> None:
    """The command `python -m benchmarks.evaluation`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that immunity_fast.train wrote")
    parser.add_argument("--old", type=Path, required=True, metavar="TREE", help="a checkout to compare with")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--amp", choices=("off", "bf16", "auto"), default="off", help="measure this, too")
    parser.add_argument("--attacks", metavar="LIST", help="measure these, too")
    given = parser.parse_args()
    run, options = given.run.resolve(), ["--limit", str(given.images)]
    ways: dict[str, tuple[Path, list[str]]] = {"old": (given.old.resolve(), options), "new": (TREE, options)}
    if given.amp != "off":
        ways[f"new, --amp {given.amp}"] = (TREE, [*options, "--amp", given.amp])
    if given.attacks:
        ways[f"new, --attacks {given.attacks}"] = (TREE, [*options, "--attacks", given.attacks])
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    used: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, dict[str, Any]] = {}
    for index in range(given.rounds):
        names = list(ways)
        for way in names[index % len(names) :] + names[: index % len(names)]:
            passed, processors, results[way] = evaluated(run, *ways[way])
            seconds[way].append(passed)
            used[way].append(processors)
    entries = [
        {
            "way": way,
            **summary(seconds[way]),
            "processor_seconds": round(sorted(used[way])[len(used[way]) // 2], 2),
            "speedup": ratio(seconds["old"], seconds[way]),
            **({} if way == "old" else {"compared": compared(results["old"], results[way])}),
        }
        for way in ways
    ]
    commit = subprocess.run(
        ["git", "-C", str(given.old), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    more = "" if given.amp == "off" else f" --amp {given.amp}"
    more += f" --attacks {given.attacks}" if given.attacks else ""
    command = f"python -m benchmarks.evaluation RUN --old TREE --images {given.images} --rounds {given.rounds}{more}"
    found = header(command) | {"old": commit.stdout.strip(), "images": given.images, "ways": entries}
    write(given.out, found)
    print("\n\n".join(table.to_markdown() for table in tables(found)))


if __name__ == "__main__":
    main()
