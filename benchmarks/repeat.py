"""Runs the Triton kernels, forward and backward, again and again, and fails where any bit differs.

    python -m benchmarks.repeat [--small]

`--small` takes few and odd sizes, for compute-sanitizer, under which everything is slow.
"""

import argparse

import torch
from torch import Tensor

from benchmarks.cases import DEVICE, MAPS, SIZE, TRITON, Case, CrossEntropyCase, HeatmapCase, Inputs, Operation
from benchmarks.verify import results
from immunity_fast.functional import gradcam_heatmaps
from immunity_fast.kernels import launch

TIMES = {True: 2, False: 20}
INTEGERS = {2: torch.int16, 4: torch.int32}


def cases(small: bool) -> list[Case]:
    """Both layouts, sizes that are and are not multiples of a tile, one program for the batch's statistics and many."""
    if small:
        return [
            HeatmapCase(3, (16, 8, 8), "bf16"),
            HeatmapCase(2, (33, 7, 5), "fp32"),
            HeatmapCase(2, (33, 7, 5), "bf16", channels_last=True),
            CrossEntropyCase(3, (10,), "bf16"),
            CrossEntropyCase(2, (1003,), "fp32"),
        ]
    heatmaps = [HeatmapCase(128, maps, "bf16", channels_last) for maps in MAPS for channels_last in (False, True)]
    return [
        *heatmaps,
        HeatmapCase(32, MAPS[0], "fp32"),
        HeatmapCase(2048, MAPS[1], "bf16"),
        CrossEntropyCase(2048, (10,), "fp32"),
        CrossEntropyCase(2048, (1000,), "bf16"),
    ]


def operations(case: Case) -> dict[str, tuple[Operation, Inputs]]:
    """What is run for a case, under its name."""
    inputs = case.inputs(0)
    found = {str(case): (case.operations()[TRITON], inputs)}
    if isinstance(case, HeatmapCase):
        upstream = torch.rand(*case.largest[:2], *SIZE, device=DEVICE)
        found[f"heatmaps themselves, {case}"] = (_heatmaps, Inputs(inputs.arguments, (upstream,)))
    return found


def _heatmaps(activations: Tensor, gradients: Tensor) -> tuple[Tensor]:
    return (gradcam_heatmaps(activations, gradients, size=SIZE, backend="triton"),)


def bits(tensor: Tensor) -> Tensor:
    """Its elements as integers, so that 0 is not −0 and NaN is itself."""
    return tensor.view(INTEGERS[tensor.element_size()])


def main() -> None:
    """The command `python -m benchmarks.repeat`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    if DEVICE.type == "cpu" and not launch.INTERPRETED:
        raise SystemExit("error: the kernels need a CUDA GPU, or TRITON_INTERPRET=1, and there is neither")
    todo = {name: pair for case in cases(small) for name, pair in operations(case).items()}
    first = {name: results(*pair) for name, pair in todo.items()}
    for _ in range(TIMES[small] - 1):  # all of them each time, so that each finds other things in memory and caches
        for name, pair in todo.items():
            for index, (ours, theirs) in enumerate(zip(results(*pair), first[name], strict=True)):
                if not torch.equal(bits(ours), bits(theirs)):
                    raise SystemExit(f"error: tensor {index} of {name} changed from one run to the next")
    print(f"{len(todo)} operations, {TIMES[small]} times each: the same bits")


if __name__ == "__main__":
    main()
