"""Runs a program where nothing computes: every number that is read from the device is zero, and nobody minds.

    python .ci/rehearsal/without_numbers.py -m immunity_fast.train|evaluate arguments…

For the mode `shapes` of an imitated GPU, in which memory holds anything: what a program does with its numbers, such as
to stop where a loss is not finite, says nothing there. What it launches, compiles and records does.
"""

import importlib
import sys

import torch
from torch import Tensor

from immunity_fast.attacks import checks, descent, parts
from immunity_fast.evaluation import targets
from immunity_fast.runtime import cli
from immunity_fast.training import loop, validation


def main() -> None:
    """The command."""
    library = torch.library.Library("aten", "IMPL")
    zero = {torch.bool: False, torch.float16: 0.0, torch.bfloat16: 0.0, torch.float32: 0.0, torch.float64: 0.0}
    library.impl("_local_scalar_dense", lambda x: zero.get(x.dtype, 0), "CUDA")
    library.impl("nonzero", lambda x: x.new_empty((0, x.dim()), dtype=torch.int64), "CUDA")
    library.impl("sort.stable", lambda x, **_: (torch.empty_like(x), torch.zeros_like(x, dtype=torch.int64)), "CUDA")
    to_cpu = Tensor.cpu
    Tensor.cpu = lambda x: to_cpu(x).zero_() if x.is_cuda else to_cpu(x)  # type: ignore[method-assign]
    tolist = Tensor.tolist
    Tensor.tolist = lambda x: tolist(x.cpu())  # type: ignore[method-assign]
    targets._check_outputs = lambda *_: None
    # Attacks that are functions of their module's name hide it in the package.
    attacks = [importlib.import_module(f"immunity_fast.attacks.{name}") for name in ("arc", "mora")]
    for module in (*attacks, checks, descent, parts, loop, targets, validation):
        for name in ("check_images", "check_range", "check_finite"):
            if hasattr(module, name):
                setattr(module, name, lambda *_: None)
    program = importlib.import_module(sys.argv[2])
    sys.argv = sys.argv[2:]
    cli.run_command(program.main)


if __name__ == "__main__":
    main()
