"""`python -m immunity_fast.train`: trains an Immunity mixture of experts; without options, minutes on two CPU cores.

A run folder holds config.json, metrics.jsonl (a record an epoch), checkpoints/, figures/, results.json, report.html.
"""

from immunity_fast.runtime import cli, distributed, interrupts
from immunity_fast.training.config import add_options, from_preset, resolve_architecture
from immunity_fast.training.preparation import MEMORY_ADVICE, Start, begin, go_on
from immunity_fast.training.session import fit_and_evaluate

NOTHING_DONE = "interrupted, before anything was done; go on with the same command"


def parse(arguments: list[str] | None) -> Start:
    """What a command line starts.

    Raises:
        ValueError, OSError: settings out of range, or a run that cannot go on with them.
    """
    parser = cli.Parser(
        prog="python -m immunity_fast.train",
        description=(__doc__ or "").split("\n")[0],
        epilog="In brackets: what the preset quickstart sets.",
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--out", type=cli.path, metavar="DIR", help="folder of a new run; default: runs/DATASET-ARCH-TIME"
    )
    folder.add_argument("--resume", type=cli.path, metavar="DIR", help="go on with the run in this folder")
    parser.add_argument("--trust-code", action="store_true", help=cli.TRUST_CODE)
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    out, resume, trust_code = options.pop("out"), options.pop("resume"), options.pop("trust_code")
    resolve_architecture(options)
    return begin(from_preset(options), out) if resume is None else go_on(resume, options, trust_code=trust_code)


@cli.enough_memory(MEMORY_ADVICE)
def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate what a command line says.

    Raises:
        cli.InputError, OSError: what was given is wrong; one clear line.
        KeyboardInterrupt: it was stopped, and has said how to go on.
    """
    with interrupts.explained(lambda: NOTHING_DONE, distributed.log_in_first(cli.console.print)), cli.input_errors():
        start = distributed.decided_by_first(lambda: parse(arguments))
    fit_and_evaluate(start)


if __name__ == "__main__":
    cli.run_command(main)
