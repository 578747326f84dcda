"""What is written of victims of poisons: a row a setup, how many took the target as was wanted, clean accuracy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from immunity_fast.evaluation.metrics import wilson_interval
from immunity_fast.poisoning.settings import LEVELS, CraftSettings
from immunity_fast.reporting.html import Table
from immunity_fast.reproduction.jobs import Done, Job
from immunity_fast.reproduction.output import commands_of, facts_of
from immunity_fast.runtime import cli
from immunity_fast.runtime.files import write_atomically

NAME = "setups"  # of the files


@dataclass(frozen=True)
class Outcome:
    """What came of a setup.

    Args:
        target: index of the test image.
        label, wanted, answer: the names of its class, of what it was to be taken for, and of what the mixture, by the
            mean of its gate, takes it for.
        reached: whether that is what was wanted.
        experts_reached: how many of the experts, each by itself, take it for that.
        experts: how many there are.
        clean: accuracy on all test images.
        poisons: how many training images were changed.
        run, file: the names of the victim's folder and of the poisons' file.
    """

    target: int
    label: str
    wanted: str
    answer: str
    reached: bool
    experts_reached: int
    experts: int
    clean: float
    poisons: int
    run: str
    file: str


def summary(outcomes: Sequence[Outcome], clean: float) -> dict[str, Any]:
    """How many setups succeeded, with the 95 % Wilson interval of their share, and the clean accuracies.

    Args:
        outcomes: of the setups that are done.
        clean: accuracy of the clean run.
    """
    reached = sum(outcome.reached for outcome in outcomes)
    accuracies = [outcome.clean for outcome in outcomes]
    return {
        "setups": len(outcomes),
        "successes": reached,
        "interval": list(wilson_interval(reached, len(outcomes))),
        "clean accuracy": fmean(accuracies) if accuracies else None,
        "clean accuracy, least and most": [min(accuracies), max(accuracies)] if accuracies else None,
        "clean accuracy without poisons": clean,
    }


def tables(outcomes: Sequence[Outcome], clean: float, settings: CraftSettings) -> list[Table]:
    """The summary, and a row a setup."""
    found = summary(outcomes, clean)
    low, high = (100 * end for end in found["interval"])
    share = f"{100 * found['successes'] / len(outcomes):.0f}" if outcomes else "—"
    accuracy = "—"
    if outcomes:
        least, most = found["clean accuracy, least and most"]
        accuracy = f"{100 * found['clean accuracy']:.1f} ± {50 * (most - least):.1f}"
    row = [
        f"{found['successes']} of {len(outcomes)}",
        share,
        f"{low:.0f} to {high:.0f}",
        accuracy,
        f"{100 * clean:.1f}",
    ]
    columns = ["successes", "%", "95 % interval, %", "clean accuracy, %", "without poisons, %"]
    note = (
        f"Witches' Brew, clean labels: {100 * settings.budget:g} % of the training images, {settings.radius}/{LEVELS}, "
        f"{settings.steps} steps, {settings.restarts} restarts. A success is a target that the victim, trained from "
        "scratch with a seed of its own, takes for the class that was wanted, by the mean of its gate; the interval is "
        "Wilson's; ± is half the range over the setups."
    )
    rows = [
        [
            str(number),
            f"test image {outcome.target}, {outcome.label}",
            outcome.wanted,
            outcome.answer,
            "yes" if outcome.reached else "no",
            f"{outcome.experts_reached} of {outcome.experts}",
            f"{100 * outcome.clean:.1f}",
        ]
        for number, outcome in enumerate(outcomes, start=1)
    ]
    head = ["setup", "target", "wanted", "answer", "success", "experts that answer so", "clean accuracy, %"]
    return [Table("Poisons for single targets", columns, [row], note), Table("Setups", head, rows)]


def write(
    folder: Path,
    outcomes: Sequence[Outcome],
    clean: float,
    settings: CraftSettings,
    surrogate: Done,
    victims: Mapping[Job, Done],
    failed: Sequence[str],
    command: str,
) -> None:
    """Write setups.md and setups.json, and print the tables.

    Args:
        folder: where.
        outcomes: of the setups that are done.
        clean: accuracy of the clean run.
        settings: of the poisons.
        surrogate, victims: what their runs have found.
        failed: a line for each run that failed.
        command: what made all of it.
    """
    made = tables(outcomes, clean, settings)
    commands = list(dict.fromkeys([*surrogate.commands, *commands_of(victims)]))
    text = [table.to_markdown() for table in made]
    text += ["Made by `" + command + "`; " + ", ".join(f"{k}: {v}" for k, v in facts_of(victims).items()) + "."]
    text += ["Failed runs:\n\n" + "\n".join(f"* {line}" for line in failed)] if failed else []
    text += ["The runs, one after another:\n\n```sh\n" + "\n".join(commands) + "\n```"]
    write_atomically(folder / f"{NAME}.md", ("\n\n".join(text) + "\n").encode())
    content = {
        "command": command,
        "poisons": settings.to_json(),
        "summary": summary(outcomes, clean),
        "setups": [dataclasses.asdict(outcome) for outcome in outcomes],
        "runs": {
            job.name: {key: value for key, value in dataclasses.asdict(done).items() if key != "results"}
            for job, done in victims.items()
        },
        "surrogate": {key: value for key, value in dataclasses.asdict(surrogate).items() if key != "results"},
        "failed": list(failed),
    }
    write_atomically(folder / f"{NAME}.json", (json.dumps(content, indent=1) + "\n").encode())
    for table in made:
        cli.console.print()
        cli.console.print(table.to_markdown())
    cli.console.print(f"\n{folder / f'{NAME}.md'}, {folder / f'{NAME}.json'}")
