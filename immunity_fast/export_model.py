"""`immunity-fast export RUN PATH`: a run's model as a file that runs without this package, on any number of images.

`immunity_fast.export` is the function that does it, and so no module's name: this is `python -m immunity_fast export`.
"""

from __future__ import annotations

from immunity_fast.runtime import recorded

if __name__ == "__main__":
    recorded.answer("export")  # before what takes seconds to import

from pathlib import Path
from typing import Any, get_args

import torch

import immunity_fast
from immunity_fast.deployment.exporting import Format
from immunity_fast.models.inference import Gate
from immunity_fast.runtime import cli
from immunity_fast.runtime.commands import program
from immunity_fast.runtime.parser import description

ENDINGS = {".pt2": "torch.export", ".pt": "torchscript", ".ts": "torchscript"}  # of other files it is ONNX
DTYPES = ("float32", "float16", "bfloat16", "float64")


def parse(arguments: list[str] | None) -> dict[str, Any]:
    """What a command line asks for, by names."""
    parser = cli.Parser(prog=program("export_model"), description=description(__doc__))
    parser.add_argument("run", type=cli.path, metavar="RUN", help="a folder of a run, or a checkpoint")
    parser.add_argument("path", type=cli.path, metavar="PATH", help="the file to write; one that is there is replaced")
    parser.add_argument(
        "--format", choices=get_args(Format), help="default: by the file's ending, .pt2 or .pt, and otherwise onnx"
    )
    parser.add_argument(
        "--gate", choices=get_args(Gate), default="mean", help="what weighs the experts; off: the trained weights"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights and images; default: the run's")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: the best, where there is one")
    parser.add_argument("--trust-code", action="store_true", help=cli.TRUST_CODE)
    options = vars(parser.parse_args(arguments))
    options["format"] = options["format"] or ENDINGS.get(Path(options["path"]).suffix.lower(), "onnx")
    return options | {"dtype": options["dtype"] and getattr(torch, options["dtype"])}


@cli.enough_memory("a smaller --dtype")
def main(arguments: list[str] | None = None) -> None:
    """Export the run that a command line names.

    Raises:
        cli.InputError, OSError: what was given is wrong; one clear line.
    """
    with cli.input_errors():
        options = parse(arguments)
        run, checkpoint = options.pop("run"), options.pop("checkpoint")
        model = immunity_fast.load(run, checkpoint=checkpoint, trust_code=options.pop("trust_code"))
        file = immunity_fast.export(model, **options)
    cli.console.print(f"{run} as {options['format']}, by the gate's {options['gate']}: {file}")


if __name__ == "__main__":
    cli.run_command(main)
