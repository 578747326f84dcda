"""The making of tables and figures: which are wanted at which scale, what of their runs is missing, and their files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from immunity_fast.reproduction.experiments import SCALES, Experiments, jobs_of
from immunity_fast.reproduction.jobs import Queue
from immunity_fast.reproduction.output import write
from immunity_fast.reproduction.products import PAPER, PRODUCTS, Product
from immunity_fast.runtime import cli

MOST_SEEDS = 1000  # more are a mistyped number
ALL = "all"  # of `PAPER`


def wanted(
    what: str, scale: str, changes: Mapping[str, Any], *, seeds: int | None = None, dataset: str | None = None
) -> dict[str, Product]:
    """What is to be made, by its name.

    Args:
        what: one of `PRODUCTS`, or "all" of the paper.
        scale: one of `SCALES`.
        changes: settings of `TrainConfig` that differ in every run, unless they are what a table compares.
        seeds: how many, from the settings' on; None is the scale's.
        dataset: instead of the scale's.

    Raises:
        ValueError: settings out of range.
    """
    if changes.get("experts", 2) < 2:
        raise ValueError(f"--experts: expected at least 2, got {changes['experts']}")
    if seeds is not None and not 1 <= seeds <= MOST_SEEDS:
        limit = "at least 1" if seeds < 1 else f"at most {MOST_SEEDS}"
        raise ValueError(f"--seeds: expected {limit}, got {seeds}")
    names = list(PAPER) if what == ALL else [what]
    experiments = Experiments(SCALES[scale], dict(changes), seeds, dataset)
    products = {name: PRODUCTS[name](experiments) for name in names}
    for product in products.values():
        for job in jobs_of(product.entries):
            job.alone()  # whose seeds can be too large where the job's own is not
    return products


def make(
    products: Mapping[str, Product],
    folder: Path,
    command: str,
    *,
    device: str = "auto",
    data: str | None = None,
    done_only: bool = False,
) -> None:
    """Do the runs that are missing, and write each table and figure when its own are done.

    First come those with whose runs no other process is busy; for the others it helps or waits.

    Args:
        products: by their names.
        folder: where their files lie, and their runs in runs/.
        command: what makes all of it, as the files say.
        device: of the runs.
        data: where the data set lies; None is its default.
        done_only: train and evaluate nothing, and write what there is.

    Raises:
        cli.InputError: data that cannot be read, or runs that failed: the rest is written.
    """
    with cli.input_errors():
        queues = {
            name: Queue(folder / "runs", jobs_of(product.entries), device=device, data=data)
            for name, product in products.items()
        }
    failures: dict[str, str] = {}

    def finish(name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write(name, products[name], queues[name], folder, command)
        failures.update({job.name: line for job, line in queues[name].failures.items()})

    left = []
    for name, queue in queues.items():
        if done_only:
            queue.find_done()
            cli.console.print(f"{name}: {len(queue.done)} of {len(queue.jobs)} runs are done")
            finish(name)
        elif queue.run(wait=False):
            finish(name)
        else:
            left.append(name)
    for name in left:  # another process is at some of their runs
        queues[name].run()
        finish(name)
    if failures:
        raise cli.InputError(f"{len(failures)} failed, the same command tries them again: {', '.join(failures)}")
