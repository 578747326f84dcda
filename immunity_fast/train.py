"""`python -m immunity_fast.train`: trains an Immunity mixture of experts; without options, minutes on two CPU cores.

A run folder holds config.json, metrics.jsonl (a record an epoch), checkpoints/, figures/, results.json, report.html.
"""

from immunity_fast.runtime import recorded

if __name__ == "__main__":
    recorded.answer("train")  # before what takes seconds to import

from immunity_fast.runtime import cli, distributed, interrupts
from immunity_fast.runtime.commands import program
from immunity_fast.runtime.parser import description
from immunity_fast.training import seeds
from immunity_fast.training.config import add_options, from_preset, read_settings, resolve_architecture
from immunity_fast.training.preparation import MEMORY_ADVICE, Preview, Start, begin, go_on
from immunity_fast.training.session import fit_and_evaluate

NOTHING_DONE = "interrupted, before anything was done; go on with the same command"


def parse(arguments: list[str] | None) -> Start:
    """What a command line starts.

    Raises:
        ValueError, OSError: settings out of range, or a run that cannot go on with them.
    """
    parser = cli.Parser(
        prog=program("train"),
        description=description(__doc__),
        epilog="In brackets: what the preset quickstart sets.",
    )
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--out", type=cli.path, metavar="DIR", help="folder of a new run; default: runs/DATASET-ARCH-TIME"
    )
    folder.add_argument(
        "--resume", type=cli.path, metavar="DIR", help="go on with the run, or the seeds, in this folder"
    )
    parser.add_argument(
        "--config",
        type=cli.path,
        metavar="FILE",
        help="settings in YAML or JSON, or a run's folder; options win over it",
    )
    parser.add_argument("--print-config", action="store_true", help="write all settings as YAML, and train nothing")
    parser.add_argument("--seeds", metavar="SEEDS", help="a run a seed in DIR/seed-0, …, and a summary: 0,1,2 or 0-4")
    parser.add_argument("--trust-code", action="store_true", help=cli.TRUST_CODE)
    add_options(parser)
    options = vars(parser.parse_args(arguments))
    out, resume, trust_code = options.pop("out"), options.pop("resume"), options.pop("trust_code")
    given, file, preview = options.pop("seeds"), options.pop("config"), options.pop("print_config")
    settings = {} if file is None else read_settings(file, "seeds")
    of_file = settings.pop("seeds", None)
    given = of_file if given is None and "seed" not in options else given
    resolve_architecture(settings)
    resolve_architecture(options)
    several = () if given is None else seeds.parse_seeds(given, options)
    if resume is not None and seeds.is_set(resume):
        start: Start = seeds.go_on_with_set(resume, {**settings, **options}, several, trust_code=trust_code)
    elif resume is not None and several:
        raise ValueError(f"--seeds: expected none with --resume {resume}, which holds one run, got {given}")
    elif resume is not None:
        start = go_on(resume, {**settings, **options}, trust_code=trust_code)
    else:
        config = from_preset(options, settings)
        start = seeds.begin_set(config, out, several) if several else begin(config, out)
    return Preview(*start) if preview else start


@cli.enough_memory(MEMORY_ADVICE)
def main(arguments: list[str] | None = None) -> None:
    """Train and evaluate what a command line says.

    Raises:
        cli.InputError, OSError: what was given is wrong; one clear line.
        KeyboardInterrupt: it was stopped, and has said how to go on.
    """
    with interrupts.explained(lambda: NOTHING_DONE, distributed.log_in_first(cli.console.print)), cli.input_errors():
        start = distributed.decided_by_first(lambda: parse(arguments))
        shown = start.config.to_yaml() if isinstance(start, Preview) else None
    if shown is not None:
        if distributed.in_first():
            print(shown, end="")
    elif isinstance(start, seeds.SeedSet):
        seeds.train_seeds(start)
    else:
        fit_and_evaluate(start)


if __name__ == "__main__":
    cli.run_command(main)
