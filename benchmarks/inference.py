"""Images a second of a mixture in evaluation mode, and of its `for_inference()`, beside as many ordinary networks.

    python -m benchmarks.inference --out benchmarks/results/inference_cpu.json [--compile]

"networks" are N ordinary networks of the same weights, one after another, and the mean of their probabilities: what
anybody has without this package. "not folded" and "not packed" are what a mixture and its `for_inference()` would do
without `experts.folding` and `experts.packed`. What is timed is timed in turns, in one process; a ratio is the median
of those within each round, to the networks.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import DEVICE
from benchmarks.measure import in_turns, ratio, summary
from benchmarks.outcomes import write
from benchmarks.record import header
from immunity_fast import ImmunityMoE
from immunity_fast.experts import folding
from immunity_fast.experts.packed import PackedConv2d

ROUNDS = 9


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description="Inference of a mixture, as trained and as folded.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", default="resnet8,resnet18", help="with commas between")
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--batches", default="1,32,128", help="images at once, with commas between")
    parser.add_argument("--compile", action="store_true", help="the networks and the plain module compiled, too")
    given = parser.parse_args()
    options = f"--arch {given.arch} --experts {given.experts} --batches {given.batches}{' --compile' * given.compile}"
    record = header(f"python -m benchmarks.inference {options}") | {"cases": list[dict[str, Any]]()}
    for arch in given.arch.split(","):
        for batch in map(int, given.batches.split(",")):
            record["cases"].append(case(arch, given.experts, batch, compiled=given.compile))
            write(given.out, record)


def case(arch: str, experts: int, batch: int, *, compiled: bool) -> dict[str, Any]:
    """The times of each way, its images a second, and how many times as fast as N ordinary networks it is."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = ImmunityMoE(arch, experts).to(DEVICE).eval()
    model.gate.switch = "mean"
    networks, plain = Networks(model.unstack()), model.for_inference().to(DEVICE)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "networks": not_folded(networks),
        "mixture, not folded": not_folded(model),
        "mixture": model,
        "for_inference, not packed": unpacked(model.for_inference().to(DEVICE)),
        "for_inference": plain,
    }
    if compiled:
        ways["networks, compiled"] = torch.compile(networks)
        ways["for_inference, compiled"] = torch.compile(model.for_inference().to(DEVICE))
    images = torch.rand(batch, 3, 32, 32, device=DEVICE)
    with torch.inference_mode():
        off = {name: float((way(images) - model(images)).abs().max()) for name, way in ways.items()}
        seconds = in_turns({name: lambda way=way: way(images) for name, way in ways.items()}, ROUNDS)
    return {
        "arch": arch,
        "experts": experts,
        "batch": batch,
        "ways": {
            name: summary(times)
            | {
                "images_per_second": round(batch / statistics.median(times), 1),
                "times_as_fast": ratio(seconds["networks"], times),
                "largest_difference": float(f"{off[name]:.2g}"),
            }
            for name, times in seconds.items()
        },
    }


class Networks(nn.Module):
    """N networks from images to logits, to the logarithm of their probabilities' mean."""

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks).eval()

    def forward(self, images: Tensor) -> Tensor:
        scores = [network(images).log_softmax(-1) for network in self.networks]
        return torch.stack(scores).logsumexp(0) - math.log(len(scores))


def not_folded(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A module whose layers run one after another, as PyTorch's own do."""

    def run(images: Tensor) -> Tensor:
        with _without_folding():
            answer: Tensor = module(images)
        return answer

    return run


def unpacked(module: nn.Module) -> nn.Module:
    """A module with ordinary convolutions in the place of packed ones."""
    for layer in module.modules():
        if isinstance(layer, PackedConv2d):
            layer.__class__ = nn.Conv2d
            vars(layer).pop("_packed", None)
    return module


@contextmanager
def _without_folding() -> Iterator[None]:
    least, folding.LEAST_SPARED = folding.LEAST_SPARED, 2**62
    try:
        yield
    finally:
        folding.LEAST_SPARED = least


if __name__ == "__main__":
    main()
