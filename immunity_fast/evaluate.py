"""`python -m immunity_fast.evaluate RUN`: accuracy, clean and attacked, of a trained run or any network, with a report.

Every attacked number says what the attacker knew of the gate. An evaluation that was killed goes on where it was, and
the same command started twice shares the work.
"""

from immunity_fast.runtime import recorded

if __name__ == "__main__":
    recorded.answer("evaluate")  # before what takes seconds to import

import dataclasses
from typing import Any, get_args

from immunity_fast.data.datasets import NAMES as DATASETS
from immunity_fast.data.datasets import Stream
from immunity_fast.evaluation.settings import EvaluationSettings, add_options
from immunity_fast.runtime import cli
from immunity_fast.runtime.commands import program
from immunity_fast.runtime.compilation import Compile
from immunity_fast.runtime.parser import description
from immunity_fast.training.run_evaluation import evaluate_named


def parse(arguments: list[str] | None) -> tuple[EvaluationSettings, dict[str, Any]]:
    """(what is to be found out, where and of what, by names) of a command line.

    Raises:
        ValueError: a setting out of its range.
    """
    parser = cli.Parser(prog=program("evaluate"), description=description(__doc__))
    parser.add_argument("run", type=cli.path, metavar="RUN", help="a folder of a run; or module.path:callable")
    group = parser.add_argument_group("what is evaluated")
    group.add_argument("--checkpoint", choices=("best", "last"), help="default: the best, where there is one")
    group.add_argument("--dataset", choices=DATASETS, help="for module.path:callable")
    group.add_argument("--data", metavar="PATH", help="where the data set lies, or lies now")
    group.add_argument(
        "--image-size", type=int, metavar="INT", help="for module.path:callable on a folder of images: of what side"
    )
    group.add_argument("--stream", choices=get_args(Stream), help="how images are read; default: as in training")
    group.add_argument(
        "--workers", type=cli.whole_or_word, metavar="INT", help="processes that read images; default: as in training"
    )
    group.add_argument(
        "--channels", type=int, metavar="INT", help="for module.path:callable: of the images; 1: grey [3]"
    )
    group.add_argument(
        "--transfer-from", type=cli.path, metavar="RUN", help="attack this run, too, and transfer its images"
    )
    group.add_argument("--trust-code", action="store_true", help=cli.TRUST_CODE)
    add_options(parser)
    group = parser.add_argument_group("device and output")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto: CUDA if there is any")
    group.add_argument("--compile", choices=get_args(Compile), default="auto", help="compile the experts")
    group.add_argument("--out", type=cli.path, metavar="DIR", help="where to write; default: the run's folder")
    group.add_argument("--again", action="store_true", help="forget what is finished of an earlier evaluation there")
    options = vars(parser.parse_args(arguments))
    settings = {field.name: options.pop(field.name) for field in dataclasses.fields(EvaluationSettings)}
    return EvaluationSettings(**settings), options


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
        evaluate_named(str(options.pop("run")), settings, device, **options)


if __name__ == "__main__":
    cli.run_command(main)
