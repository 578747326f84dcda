"""`python -m immunity_fast.reproduce table1|table2|table3|figure2|all`: trains, evaluates, writes the paper's tables.

Runs lie in OUT/runs and are not done twice: not by another table, not after a kill. Start the command a second time,
beside the first, and both share the work. Each table is written as Markdown, CSV, HTML, PNG and JSON.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from immunity_fast.reproduction.experiments import SCALES, Experiments, jobs_of
from immunity_fast.reproduction.jobs import Queue
from immunity_fast.reproduction.output import write
from immunity_fast.reproduction.products import PRODUCTS, Product
from immunity_fast.runtime import cli
from immunity_fast.training.config import add_options, resolve_architecture

MOST_SEEDS = 1000  # more are a mistyped number


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    products: dict[str, Product]
    folder: Path
    device: str
    data: str | None
    done_only: bool


def parse(arguments: list[str] | None) -> Request:
    """The request of a command line; ValueError for settings out of range."""
    parser = cli.Parser(
        prog="python -m immunity_fast.reproduce",
        description=(__doc__ or "").split("\n")[0],
        epilog="All other options change that setting in every run, unless it is what a table compares.",
    )
    parser.add_argument("what", choices=(*PRODUCTS, "all"))
    parser.add_argument("--scale", choices=tuple(SCALES), default="smoke", help="how much is trained [smoke]")
    parser.add_argument("--out", type=cli.path, metavar="DIR", help="folder; default: reproduction-SCALE")
    parser.add_argument("--seeds", type=int, metavar="INT", help="how many, from --seed on; default: the scale's")
    parser.add_argument("--done-only", action="store_true", help="train nothing; write the tables of what is done")
    add_options(parser)
    given = vars(parser.parse_args(arguments))
    what, scale, out, seeds, done_only = (given.pop(name) for name in ("what", "scale", "out", "seeds", "done_only"))
    device, data, dataset = given.pop("device", "auto"), given.pop("data", None), given.pop("dataset", None)
    if "preset" in given:
        raise ValueError("--preset: --scale takes its place")
    if given.get("experts", 2) < 2:
        raise ValueError(f"--experts: expected at least 2, got {given['experts']}")
    if seeds is not None and not 1 <= seeds <= MOST_SEEDS:
        limit = "at least 1" if seeds < 1 else f"at most {MOST_SEEDS}"
        raise ValueError(f"--seeds: expected {limit}, got {seeds}")
    if dataset in ("npz", "folder") and data is None:
        raise ValueError(f"--data: missing; --dataset {dataset} needs the path of what it reads")
    resolve_architecture(given)
    wanted = list(PRODUCTS) if what == "all" else [what]
    if "table2" in wanted and importlib.util.find_spec("torchattacks") is None:
        raise ValueError("table2 needs torchattacks: pip install torchattacks")
    experiments = Experiments(SCALES[scale], given, seeds, dataset)
    cli.pick_device(device)
    products = {name: PRODUCTS[name](experiments) for name in wanted}
    for product in products.values():
        for job in jobs_of(product.entries):
            job.alone()  # whose seeds can be too large where the job's own is not
    return Request(products, out or Path(f"reproduction-{scale}"), device, data, done_only)


@cli.resumable("reproduce")
@cli.enough_memory("a smaller --batch-size, fewer --experts, or a smaller --arch")
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    try:
        request = parse(arguments)
    except ValueError as error:
        raise cli.InputError(str(error)) from error
    command = f"python -m immunity_fast.reproduce {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
    try:
        queues = {
            name: Queue(request.folder / "runs", jobs_of(product.entries), device=request.device, data=request.data)
            for name, product in request.products.items()
        }
    except (ValueError, ModuleNotFoundError) as error:
        raise cli.InputError(str(error)) from error
    failures: dict[str, str] = {}

    def finish(name: str) -> None:
        request.folder.mkdir(parents=True, exist_ok=True)
        write(name, request.products[name], queues[name], request.folder, command)
        failures.update({job.name: line for job, line in queues[name].failures.items()})

    left = []
    for name, queue in queues.items():
        if request.done_only:
            queue.look()
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


if __name__ == "__main__":
    cli.run_command(main)
