"""A forward pass of a mixture in evaluation mode beside its `for_inference()`, as it is and compiled, in turns.

    python -m benchmarks.inference --out benchmarks/results/inference_cpu.json [--compile]

What is timed is timed in turns, in one process; a ratio is the median of those within each round.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.cases import DEVICE
from benchmarks.measure import ratio, summary
from benchmarks.outcomes import write
from benchmarks.record import header
from immunity_fast import ImmunityMoE

ROUNDS = 15


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description="Inference of a mixture, as trained and as folded.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", default="resnet8", help="with commas between")
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--batches", default="1,32", help="images at once, with commas between")
    parser.add_argument("--compile", action="store_true", help="the plain module compiled, too")
    given = parser.parse_args()
    options = f"--arch {given.arch} --experts {given.experts} --batches {given.batches}{' --compile' * given.compile}"
    record = header(f"python -m benchmarks.inference {options}") | {"cases": list[dict[str, Any]]()}
    for arch in given.arch.split(","):
        for batch in map(int, given.batches.split(",")):
            record["cases"].append(case(arch, given.experts, batch, compiled=given.compile))
            write(given.out, record)


def case(arch: str, experts: int, batch: int, *, compiled: bool) -> dict[str, Any]:
    """The times of each way, and how many times as fast as the mixture it is."""
    torch.manual_seed(0)
    model = ImmunityMoE(arch, experts).to(DEVICE).eval()
    model.gate.switch = "mean"
    ways: dict[str, nn.Module] = {"mixture": model, "for_inference": model.for_inference().to(DEVICE)}
    if compiled:
        ways["for_inference, compiled"] = torch.compile(model.for_inference().to(DEVICE))  # type: ignore[assignment]
    images = torch.rand(batch, 3, 32, 32, device=DEVICE)
    with torch.inference_mode():
        off = {name: float((way(images) - model(images)).abs().max()) for name, way in ways.items()}
        seconds = in_turns({name: lambda way=way: way(images) for name, way in ways.items()})
    return {
        "arch": arch,
        "experts": experts,
        "batch": batch,
        "ways": {
            name: summary(times)
            | {"times_as_fast": ratio(seconds["mixture"], times), "largest_difference": float(f"{off[name]:.2g}")}
            for name, times in seconds.items()
        },
    }


def in_turns(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each call, round by round, in rotating order, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for index in range(ROUNDS + 1):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            calls[name]()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
