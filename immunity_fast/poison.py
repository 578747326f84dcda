"""`python -m immunity_fast.poison craft RUN|setups`: poisons training images for a target; or tests how often it works.

craft writes poisons that are made with a run, for `immunity_fast.train --poison`. setups trains a run, makes poisons
for several targets with it, and trains a victim on those of each; started again, it goes on.
"""

from __future__ import annotations

from immunity_fast.runtime import recorded

if __name__ == "__main__":
    recorded.answer("poison")  # before what takes seconds to import

import sys
from collections.abc import Callable
from functools import partial

from immunity_fast.poisoning import settings as poisoning
from immunity_fast.poisoning.crafting import craft_named
from immunity_fast.poisoning.setups import SETUPS, check_count, evaluate_setups
from immunity_fast.runtime import cli
from immunity_fast.runtime.commands import program, shell_command
from immunity_fast.runtime.parser import description
from immunity_fast.training.config import add_options, check_data, from_preset, resolve_architecture


def parse(arguments: list[str] | None) -> Callable[[], object]:
    """What a command line asks for, to be called.

    Raises:
        ValueError: settings out of range, or of the other action.
    """
    parser = cli.Parser(
        prog=program("poison"),
        description=description(__doc__),
        epilog="For setups the options of training are the victims'; of them craft takes --seed, --device and --data.",
    )
    parser.add_argument("action", choices=poisoning.ACTIONS, help="make poisons with a run; or test them in setups")
    parser.add_argument("run", type=cli.path, nargs="?", metavar="RUN", help="for craft: a run's folder")
    parser.add_argument(
        "--out", type=cli.path, required=True, metavar="PATH", help="for craft the file, .npz; for setups a folder"
    )
    poisoning.add_options(parser)
    own = {action.dest for action in parser._actions}
    add_options(parser)
    given = vars(parser.parse_args(arguments))
    options = {name: value for name, value in given.items() if name in own}
    training = {name: value for name, value in given.items() if name not in own}
    action, run, out = options.pop("action"), options.pop("run"), options.pop("out")
    settings = poisoning.take(action, options, training)
    device, data = training.pop("device", "auto"), training.pop("data", None)
    picked = cli.pick_device(device)
    if action == "craft":
        if run is None:
            raise ValueError("RUN: missing; craft makes poisons with a run")
        del options["setups"]
        return partial(craft_named, run, out, settings, picked, data=data, seed=training.get("seed", 0), **options)
    if run is not None:
        raise ValueError(f"{run}: expected no run with setups, which trains its own")
    check_data(training.get("dataset"), data)
    resolve_architecture(training)
    config, count = from_preset(training), SETUPS if options["setups"] is None else options["setups"]
    check_count(config, count)
    command = shell_command("poison", sys.argv[1:] if arguments is None else arguments)
    return partial(evaluate_setups, config, settings, out, command, count=count, device=device, data=data)


@cli.resumable("poison")
@cli.enough_memory("another --device, fewer --experts, or a smaller --arch")
def main(arguments: list[str] | None = None) -> None:
    """Make poisons, or test them, as a command line says.

    Raises:
        cli.InputError, OSError: what was given is wrong, or runs have failed; one clear line.
        KeyboardInterrupt: it was stopped, and has said how to go on.
    """
    with cli.input_errors():
        parse(arguments)()


if __name__ == "__main__":
    cli.run_command(main)
