"""`python -m immunity_fast.evaluate RUN`: accuracy, clean and attacked, of a trained run or any network, with a report.

Every attacked number says what the attacker knew of the gate. An evaluation that was killed goes on where it was, and
the same command started twice shares the work.
"""

import argparse
import dataclasses
from typing import Any

from immunity_fast.data.datasets import NAMES as DATASETS
from immunity_fast.evaluation.runner import ATTACKS, SETS
from immunity_fast.evaluation.settings import EvaluationSettings
from immunity_fast.runtime import cli
from immunity_fast.training.run_evaluation import evaluate_named


def parse(arguments: list[str] | None) -> tuple[EvaluationSettings, dict[str, Any]]:
    """(what is to be found out, where and of what, by names) of a command line.

    Raises:
        ValueError: a setting out of its range.
    """
    parser = cli.Parser(prog="python -m immunity_fast.evaluate", description=(__doc__ or "").split("\n")[0])
    add_target(parser)
    add_settings(parser)
    add_places(parser)
    options = vars(parser.parse_args(arguments))
    settings = {field.name: options.pop(field.name) for field in dataclasses.fields(EvaluationSettings)}
    return EvaluationSettings(**settings), options


def add_target(parser: argparse.ArgumentParser) -> None:
    """The run or network that is evaluated, and its data."""
    parser.add_argument(
        "run",
        type=lambda text: str(cli.path(text)),
        metavar="RUN",
        help="a folder that immunity_fast.train wrote; or module.path:callable",
    )
    group = parser.add_argument_group("what is evaluated")
    group.add_argument("--checkpoint", choices=("best", "last"), help="default: the best, where there is one")
    group.add_argument("--dataset", choices=DATASETS, help="for module.path:callable")
    group.add_argument("--data", metavar="PATH", help="where the data set lies, or lies now")
    group.add_argument(
        "--image-size", type=int, metavar="INT", help="for module.path:callable on a folder of images: of what side"
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What is to be found out: an option for each of `EvaluationSettings`."""
    default = EvaluationSettings()
    group = parser.add_argument_group("attacks")
    group.add_argument(
        "--attacks",
        type=words,
        default=default.attacks,
        metavar="LIST",
        help=f"with commas, of {', '.join(ATTACKS)}, {', '.join(SETS)}; default: {', '.join(SETS['default'])}",
    )
    group.add_argument(
        "--eps", type=cli.number, metavar="FLOAT", help="radius, of images in [0, 1]; default: 8/255 for Linf, 1 for L2"
    )
    group.add_argument("--norm", choices=("Linf", "L2"), default=default.norm, help="of the perturbation")
    group.add_argument("--limit", type=int, metavar="INT", help="test images to attack; default: the run's setting")
    group.add_argument(
        "--drop-fooled", action="store_true", help="attack an image until it fools what its attacker attacks; faster"
    )
    group.add_argument(
        "--masking-images",
        type=int,
        default=default.masking_images,
        metavar="INT",
        help="for the curves; 0: no curves",
    )
    group.add_argument("--queries", type=int, default=default.queries, metavar="INT", help="of Square")
    group.add_argument(
        "--autoattack-steps",
        type=int,
        default=default.autoattack_steps,
        metavar="INT",
        help="fewer than 100 is no AutoAttack",
    )
    group.add_argument("--seed", type=int, metavar="INT", help="default: the run's")
    group = parser.add_argument_group("attackers")
    group.add_argument(
        "--attackers",
        type=words,
        metavar="LIST",
        help="what is known of the gate, with commas: off, sample, eot, mean, worst, experts, transfer; default: all",
    )
    group.add_argument(
        "--draws", type=int, metavar="INT", help="of the gate, or of a random model, for EOT; default: 20"
    )
    group.add_argument(
        "--transfer-from", type=cli.path, metavar="RUN", help="attack this run, too, and transfer its images"
    )


def add_places(parser: argparse.ArgumentParser) -> None:
    """On what device an evaluation is computed, and where it is written."""
    group = parser.add_argument_group("device and output")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto: CUDA if there is any")
    group.add_argument("--compile", choices=("auto", "off", "on", "max"), default="auto", help="compile the experts")
    group.add_argument(
        "--out", type=cli.path, metavar="DIR", help="where results are written; default: the run's folder"
    )
    group.add_argument("--again", action="store_true", help="forget what is finished of an earlier evaluation there")


def words(text: str) -> tuple[str, ...]:
    """A list of a command line, with commas."""
    return tuple(text.split(","))


@cli.resumable("evaluate")
def main(arguments: list[str] | None = None) -> None:
    """Evaluate what a command line names.

    Raises:
        cli.InputError, OSError: what was given is wrong; one clear line.
        KeyboardInterrupt: it was stopped, and has said how to go on.
    """
    with cli.input_errors():
        settings, options = parse(arguments)
        device = cli.pick_device(options.pop("device"))
        evaluate_named(options.pop("run"), settings, device, **options)


if __name__ == "__main__":
    cli.run_command(main)
