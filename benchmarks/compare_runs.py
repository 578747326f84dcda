"""Collects finished runs into one record and prints them as a table; runs that differ in their seed alone are one row.

    python -m benchmarks.compare_runs runs/plain-0 runs/plain-1 runs/full-0 --out benchmarks/results/NAME.json

Test accuracies and heatmap measures are those of each run's results.json; ± is half the range over the seeds.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from immunity_fast.checkpoint import write_atomically
from immunity_fast.evaluate import ATTACKS, SETTINGS
from immunity_fast.report import Table
from immunity_fast.runs import Run

MEASURES = {"mutual_information": "mutual information, nats", "cscore": "CScore", "iscore": "IScore"}


def collect(folder: Path) -> dict[str, Any]:
    """What is kept of a run: settings without paths, results, the last epoch's record."""
    run = Run.open(folder)
    settings = {name: value for name, value in run.config().to_json().items() if name not in ("data", "device")}
    results = json.loads(run.results_file.read_text(encoding="utf-8"))
    return {"settings": settings, "results": results, "last_epoch": run.metrics()[-1]}


def values(run: dict[str, Any]) -> dict[str, float]:
    """Column → number of one run; accuracies in %."""
    row = {title: run["results"]["heatmaps"][name] for name, title in MEASURES.items()}
    for attack in ATTACKS:
        for (attacker, gate), title in SETTINGS.items():
            for entry in run["results"]["accuracy"]:
                if (entry["attack"], entry["attacker"], entry["gate"]) == (attack, attacker, gate):
                    row[f"{attack}, {title}"] = 100 * entry["accuracy"]
    for entry in run["results"]["accuracy"]:
        if entry["attacker"] is None:
            row[f"clean, {entry['gate']}"] = 100 * entry["accuracy"]
    return row


def table(runs: list[dict[str, Any]]) -> Table:
    """A column a setting of α, β, γ and whether weights are detached, a row a measure."""
    groups: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        settings = run["settings"]
        name = f"α={settings['alpha']:g} β={settings['beta']:g} γ={settings['gamma']:g}"
        name += " detached" if settings["detach_weights"] else ""
        groups.setdefault(name, []).append(values(run))
    rows = []
    for measure in next(iter(groups.values()))[0]:
        cells = []
        for group in groups.values():
            seen = [row[measure] for row in group]
            digits = 2 if "nats" in measure else 1 if max(seen) < 1000 else 0
            cells.append(f"{sum(seen) / len(seen):,.{digits}f} ± {(max(seen) - min(seen)) / 2:,.{digits}f}")
        rows.append([measure, *cells])
    seeds = sorted({run["settings"]["seed"] for run in runs})
    return Table("", ["measure", *groups], rows, f"Mean over the seeds {seeds}; ± is half their range.")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    record = {
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}",
        "runs": [collect(folder) for folder in options.runs],
    }
    write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())
    print(table(record["runs"]).to_markdown())


if __name__ == "__main__":
    main()
