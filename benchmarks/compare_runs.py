"""Collects evaluated runs into one record and prints them as tables; runs that differ in their seed alone are one row.

    python -m benchmarks.compare_runs runs/plain-0 runs/plain-1 runs/full-0 --out benchmarks/results/NAME.json

Test accuracies and heatmap measures are those of each run's results.json. ± is half the range over the seeds; of one
run half the 95 % Wilson interval.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import header
from immunity_fast.evaluation.gate_attackers import DESCRIPTIONS, GATE_WORDS
from immunity_fast.evaluation.words import NAMES
from immunity_fast.reporting.html import Table
from immunity_fast.reproduction.tables import summarised
from immunity_fast.runtime.files import write_atomically
from immunity_fast.training.run_folder import Run

MEASURES = {"mutual_information": "mutual information, nats", "cscore": "CScore", "iscore": "IScore"}
ATTACKERS = {
    **GATE_WORDS,
    "logits": "the mean of logits",
    "any expert": "an expert",
    "transfer": "another ensemble",
}
Runs = Sequence[dict[str, Any]]


def collect(folder: Path) -> dict[str, Any]:
    """What is kept of a run: settings without paths, results, the last epoch's record."""
    run = Run.open(folder)
    settings = {name: value for name, value in run.config().to_json().items() if name not in ("data", "device")}
    results = json.loads(run.results_file.read_text(encoding="utf-8"))
    judges = {found["judge"] for found in results["accuracy"]}
    if judges.isdisjoint(("sample", "output")):
        raise SystemExit(
            f"{run.results_file}: expected results of this version, got an earlier one's; evaluate it again"
        )
    return {"settings": settings, "results": results, "last_epoch": run.metrics()[-1]}


def groups(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """The runs under what distinguishes them besides the seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(name(run["settings"]), []).append(run)
    return found


def name(settings: dict[str, Any]) -> str:
    """A few words on how a run was trained, the same for all its seeds."""
    words = {"off": "standard"}.get(settings["adversarial"], settings["adversarial"])
    if settings["experts"] == 1:
        return f"{words}, single"
    words += f", α={settings['alpha']:g} β={settings['beta']:g} γ={settings['gamma']:g}"
    return words + (", detached" if settings["detach_weights"] else "")


def entry(run: dict[str, Any], attack: str, attacker: str | None, judge: str) -> dict[str, Any] | None:
    """One accuracy; a single network is its own mean, and what answers."""
    if run["settings"]["experts"] == 1:
        attacker, judge = {"mean": "output"}.get(str(attacker), attacker), "output"
    results = run["results"]
    for found in [*results["accuracy"], *results.get("transfer_from_experts", [])]:
        if (found["attack"], found["attacker"], found["judge"]) == (attack, attacker, judge):
            return dict(found)
    return None


def cell(entries: Sequence[dict[str, Any] | None]) -> str:
    """A table's cell: mean and spread, in %, over runs that differ in their seed."""
    known = summarised(entries)
    return "—" if known is None else f"{known[0]:.1f} ± {known[1]:.1f}"


def robustness(runs: Runs) -> Table:
    """A row a training and an attack, a column an attacker; gate sample answers, in the last column gate mean."""
    rows = []
    for title, group in groups(runs).items():
        attacks = dict.fromkeys(found["attack"] for found in group[0]["results"]["accuracy"])
        for attack in (a for a in NAMES if a in attacks):
            if attack in ("clean", "subset", "noise"):
                cells = [cell([entry(run, attack, None, "sample") for run in group])]
                cells += ["—"] * (len(ATTACKERS) - 1)
                last = cell([entry(run, attack, None, "mean") for run in group])
            else:
                cells = [cell([entry(run, attack, who, "sample") for run in group]) for who in ATTACKERS]
                last = cell([entry(run, attack, "mean", "mean") for run in group])
            rows.append([title, NAMES[attack], *cells, last])
        judges = ("output", "output") if group[0]["settings"]["experts"] == 1 else ("sample", "mean")
        worst = [
            cell([next(w for w in run["results"]["worst_case"] if w["judge"] == judge) for run in group])
            for judge in judges
        ]
        rows.append([title, "worst case for each image", worst[0], *["—"] * (len(ATTACKERS) - 1), worst[1]])
    # Columns in which nobody has a number.
    kept = [i for i, _ in enumerate(ATTACKERS) if any(row[2 + i] != "—" for row in rows)]
    columns = [list(ATTACKERS.values())[i] for i in kept]
    shown = [[*row[:2], *(row[2 + i] for i in kept), row[-1]] for row in rows]
    seeds = sorted({run["settings"]["seed"] for run in runs})
    return Table(
        "",
        ["training", "attack", *columns, "gate mean, answered by it"],
        shown,
        f"Accuracy in %; columns say what the attacker differentiates ({DESCRIPTIONS['mean']}). Seeds {seeds}.",
    )


def heatmaps(runs: Runs) -> Table:
    """The heatmap measures, on clean images."""
    rows = []
    for title, group in groups(runs).items():
        measured = [run["results"]["heatmaps"]["clean"] for run in group if "heatmaps" in run["results"]]
        if not measured:
            continue
        cells = []
        for key in MEASURES:
            values = [found[key] for found in measured]
            digits = 2 if key == "mutual_information" else 1 if max(values) < 1000 else 0
            spread = f" ± {(max(values) - min(values)) / 2:,.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):,.{digits}f}{spread}")
        rows.append([title, *cells])
    return Table("", ["training", *MEASURES.values()], rows)


def main() -> None:
    """The command `python -m benchmarks.compare_runs`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    record = header("python -m benchmarks.compare_runs") | {"runs": [collect(folder) for folder in options.runs]}
    write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())
    print(robustness(record["runs"]).to_markdown())
    print()
    print(heatmaps(record["runs"]).to_markdown())


if __name__ == "__main__":
    main()
