"""`python -m immunity_fast.explain RUN IMAGE…`: where each expert of a trained run looks in images, and what it sees.

For each image a figure, the image beside each expert's Grad-CAM heatmap and that of all together, with the classes that
they predict, and a JSON file with the numbers.
"""

from __future__ import annotations

from immunity_fast.runtime import recorded

if __name__ == "__main__":
    recorded.answer("explain")  # before what takes seconds to import

from typing import Any

from immunity_fast.deployment.explaining import FOLDER, explain_named
from immunity_fast.runtime import cli
from immunity_fast.runtime.commands import program
from immunity_fast.runtime.parser import description


def parse(arguments: list[str] | None) -> dict[str, Any]:
    """What a command line asks for, by names.

    Raises:
        ValueError: a device that cannot be used.
    """
    parser = cli.Parser(prog=program("explain"), description=description(__doc__))
    parser.add_argument("run", type=cli.path, metavar="RUN", help="a folder of a run, or a checkpoint")
    parser.add_argument(
        "images",
        type=cli.path,
        nargs="+",
        metavar="IMAGE",
        help="files of any size, which is made the model's, and folders of such",
    )
    parser.add_argument(
        "--class", dest="class_name", metavar="NAME", help="heatmaps are for it; default: the predicted"
    )
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: the best, where there is one")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …; auto: CUDA if there is any")
    parser.add_argument("--out", type=cli.path, metavar="DIR", help=f"where to write; default: {FOLDER}")
    parser.add_argument(
        "--trust-code", action="store_true", help="import a network of the form module.path:callable, which runs code"
    )
    options = vars(parser.parse_args(arguments))
    return options | {"device": cli.pick_device(options["device"])}


@cli.enough_memory("another --device")
def main(arguments: list[str] | None = None) -> None:
    """Explain the images that a command line names.

    Raises:
        cli.InputError, OSError: what was given is wrong; one clear line.
    """
    with cli.input_errors():
        explain_named(**parse(arguments))


if __name__ == "__main__":
    cli.run_command(main)
