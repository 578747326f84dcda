"""`python -m immunity_fast.reproduce table1|table2|table3|figure2|all|peers`: trains, evaluates, writes tables.

They are the paper's, and a comparison with other ways to train an ensemble, which all but `all` asks for by name.
Runs lie in OUT/runs and are not done twice: not by another table, not after a kill. Start the command a second time,
beside the first, and both share the work. Each table is written as Markdown, CSV, HTML, PNG and JSON.
"""

from __future__ import annotations

from immunity_fast.runtime import recorded

if __name__ == "__main__":
    recorded.answer("reproduce")  # before what takes seconds to import

import sys
from dataclasses import dataclass
from pathlib import Path

from immunity_fast.reproduction.experiments import SCALES
from immunity_fast.reproduction.making import ALL, make, wanted
from immunity_fast.reproduction.products import PRODUCTS, Product
from immunity_fast.runtime import cli
from immunity_fast.runtime.commands import program, shell_command
from immunity_fast.runtime.parser import description
from immunity_fast.training.config import add_options, check_data, resolve_architecture


@dataclass(frozen=True)
class Request:
    """What a command line asks for: see `making.make`."""

    products: dict[str, Product]
    folder: Path
    device: str
    data: str | None
    done_only: bool


def parse(arguments: list[str] | None) -> Request:
    """The request of a command line.

    Raises:
        ValueError: settings out of range.
    """
    parser = cli.Parser(
        prog=program("reproduce"),
        description=description(__doc__),
        epilog="All other options change that setting in every run, unless it is what a table compares.",
    )
    parser.add_argument(
        "what",
        choices=(*PRODUCTS, ALL),
        help="which of the paper's tables and figures, or peers: other ways to train an ensemble beside it",
    )
    parser.add_argument("--scale", choices=tuple(SCALES), default="smoke", help="how much is trained [smoke]")
    parser.add_argument("--out", type=cli.path, metavar="DIR", help="folder; default: reproduction-SCALE")
    parser.add_argument("--seeds", type=int, metavar="INT", help="how many, from --seed on; default: the scale's")
    parser.add_argument("--done-only", action="store_true", help="train nothing; write the tables of what is done")
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    what, scale, out, seeds, done_only = (options.pop(name) for name in ("what", "scale", "out", "seeds", "done_only"))
    device, data, dataset = options.pop("device", "auto"), options.pop("data", None), options.pop("dataset", None)
    if "preset" in options:
        raise ValueError("--preset: --scale takes its place")
    check_data(dataset, data)
    resolve_architecture(options)
    products = wanted(what, scale, options, seeds=seeds, dataset=dataset)
    cli.pick_device(device)
    return Request(products, out or Path(f"reproduction-{scale}"), device, data, done_only)


@cli.resumable("reproduce")
@cli.enough_memory("a smaller --batch-size, fewer --experts, or a smaller --arch")
def main(arguments: list[str] | None = None) -> None:
    """Make what a command line asks for.

    Raises:
        cli.InputError, OSError: what was given is wrong, or runs have failed; one clear line.
        KeyboardInterrupt: it was stopped, and has said how to go on.
    """
    with cli.input_errors():
        request = parse(arguments)
    command = shell_command("reproduce", sys.argv[1:] if arguments is None else arguments)
    make(
        request.products,
        request.folder,
        command,
        device=request.device,
        data=request.data,
        done_only=request.done_only,
    )


if __name__ == "__main__":
    cli.run_command(main)
