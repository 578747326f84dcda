"""`python -m immunity_fast.ensemble RUN RUN … --out DIR`: networks that were trained alone, as one mixture.

The experts are the runs' networks as they are; each counts the same, whether the gate switches or not. What is written
is a run folder that has ended: `immunity_fast.evaluate` takes it as any other.
"""

from __future__ import annotations

from immunity_fast.runtime import recorded

if __name__ == "__main__":
    recorded.answer("ensemble")  # before what takes seconds to import

from immunity_fast.runtime import cli
from immunity_fast.runtime.commands import program
from immunity_fast.runtime.parser import description
from immunity_fast.training.ensemble import join


@cli.resumable("ensemble")
@cli.enough_memory("fewer or smaller runs")
def main(arguments: list[str] | None = None) -> None:
    """Join the runs that a command line names.

    Raises:
        cli.InputError, OSError: what was given is wrong; one clear line.
        KeyboardInterrupt: it was stopped, and has said how to go on.
    """
    parser = cli.Parser(prog=program("ensemble"), description=description(__doc__))
    parser.add_argument("runs", type=cli.path, nargs="+", metavar="RUN", help="a run of one network (--experts 1)")
    parser.add_argument("--out", type=cli.path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--trust-code", action="store_true", help=cli.TRUST_CODE)
    options = parser.parse_args(arguments)
    with cli.input_errors():
        run = join(options.runs, options.out, trust_code=options.trust_code)
    cli.console.print(f"joined {len(options.runs)} networks; evaluate with: {run.evaluate_command}")


if __name__ == "__main__":
    cli.run_command(main)
