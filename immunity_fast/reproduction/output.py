"""What is written of a table or figure: Markdown, CSV, JSON, the drawing, the page."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from immunity_fast.reporting.html import Table, write_report
from immunity_fast.reproduction.experiments import jobs_of
from immunity_fast.reproduction.jobs import Done, Job, Queue
from immunity_fast.reproduction.products import Product
from immunity_fast.runtime import cli
from immunity_fast.runtime.files import write_atomically


def write(name: str, product: Product, queue: Queue, folder: Path, command: str) -> None:
    """All files of a table or figure, from what its runs have found."""
    own = {job: queue.done[job] for job in jobs_of(product.entries) if job in queue.done}
    tables = product.tables(queue)
    failed = [
        f"{job.name}: {queue.failures[job]}" for job in dict.fromkeys(jobs_of(product.entries)) if job in queue.failures
    ]
    facts = facts_of(own)
    text = [table.to_markdown() for table in tables]
    text += ["Made by `" + command + "`; " + ", ".join(f"{key}: {value}" for key, value in facts.items()) + "."]
    text += ["Failed runs:\n\n" + "\n".join(f"* {line}" for line in failed)] if failed else []
    text += ["The runs, one after another:\n\n```sh\n" + "\n".join(commands_of(own)) + "\n```"]
    write_atomically(folder / f"{name}.md", ("\n\n".join(text) + "\n").encode())
    write_atomically(folder / f"{name}.csv", to_csv(tables).encode())
    content = record(tables, own, failed, command)
    write_atomically(folder / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    figures = product.draw(queue, folder / f"{name}.png")
    if product.page:
        write_report(
            folder / f"{name}.html",
            title=product.title,
            lead="\n".join([product.lead, *(f"Failed: {line}" for line in failed)]),
            facts=facts,
            tables=tables,
            figures=figures,
            commands={"Make all of it": command, "Its runs, one after another": "\n".join(commands_of(own))},
            settings={},
        )
        for table in tables:
            cli.console.print()
            cli.console.print(table.to_markdown())
    cli.console.print(f"\n{', '.join(str(file) for file in sorted(folder.glob(f'{name}.*')))}")


def facts_of(found: Mapping[Job, Done]) -> dict[str, str]:
    """On what some runs were computed, how many they are, and how long they took."""
    if not found:
        return {}
    devices = sorted({done.device for done in found.values()})
    versions = sorted({done.versions["torch"] for done in found.values()})
    return {
        "device": "; ".join(devices),
        "torch": "; ".join(versions),
        "runs": str(len(found)),
        "training": duration(sum(done.training_seconds for done in found.values())),
        "attacks": duration(sum(done.attack_seconds for done in found.values())),
    }


def duration(seconds: float) -> str:
    """Seconds as a text in the largest unit that fits: "90 s" is "1.5 min"."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def commands_of(found: Mapping[Job, Done]) -> list[str]:
    """The commands of some runs, each once, in an order in which they can be given."""
    return list(dict.fromkeys(command for done in found.values() for command in done.commands))


def record(tables: Sequence[Table], found: Mapping[Job, Done], failed: Sequence[str], command: str) -> dict[str, Any]:
    """What is kept of a table: its cells as they are shown, and of each run settings, commands, machine, time."""
    return {
        "command": command,
        "tables": [
            {"caption": t.caption, "columns": list(t.columns), "rows": [list(row) for row in t.rows], "note": t.note}
            for t in tables
        ],
        "runs": {
            job.name: {key: value for key, value in dataclasses.asdict(done).items() if key != "results"}
            for job, done in found.items()
        },
        "failed": list(failed),
    }


def to_csv(tables: Sequence[Table]) -> str:
    """Tables one after another, each under its caption."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for table in tables:
        writer.writerow([table.caption])
        writer.writerow(table.columns)
        writer.writerows(table.rows)
        writer.writerow([])
    return text.getvalue()
