"""What one image of 224×224 costs a network with the stem for CIFAR, that for ImageNet, and torchvision's own.

    python -m benchmarks.stems --out benchmarks/results/stems_cpu.json

Forward and backward of one image, in training mode, by the clock: the networks take turns, round by round, and the
record holds each round's seconds, their median, and the quarter and three quarters of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import machine
from immunity_fast.experts import WITH_STEMS, create
from immunity_fast.runtime.files import write_atomically

CLASSES = 1000


def step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Forward and backward of a batch."""
    network.zero_grad(set_to_none=True)
    F.cross_entropy(network(images), labels).backward()


def measure(archs: list[str], side: int, rounds: int) -> list[dict[str, Any]]:
    """A record for each architecture and form, of rounds in which all take turns.

    Args:
        archs: names of `WITH_STEMS`.
        side: of the image, in pixels.
        rounds: how many, after one that does not count.
    """
    torch.manual_seed(0)
    images, labels = torch.rand(2, 3, side, side), torch.tensor([0, 1])  # two: BatchNorm wants more than one value
    networks = {
        (arch, form): create(name, CLASSES, stem=stem).train()
        for arch in archs
        for form, name, stem in (
            ("cifar", arch, "cifar"),
            ("imagenet", arch, "imagenet"),
            ("torchvision", f"torchvision:{arch}", "imagenet"),
        )
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in networks}
    for turn in range(rounds + 1):
        for key, network in networks.items():
            begin = time.perf_counter()
            step(network, images, labels)
            if turn:
                seconds[key].append((time.perf_counter() - begin) / len(images))
    records = []
    for (arch, form), found in seconds.items():
        lower, median, upper = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
        relative = median / statistics.median(seconds[arch, "torchvision"])
        records.append(
            {
                "arch": arch,
                "form": form,
                "seconds_an_image": median,
                "quartiles": [lower, upper],
                "times_torchvision": relative,
                "rounds": found,
            }
        )
    return records


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stems", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--archs", nargs="+", choices=WITH_STEMS, default=["resnet18"])
    parser.add_argument("--side", type=int, default=224, help="of the image, in pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    records = measure(options.archs, options.side, options.rounds)
    found = {
        "machine": machine.device(),
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
        "side": options.side,
        "records": records,
    }
    write_atomically(options.out, json.dumps(found, indent=1).encode())
    for record in records:
        lower, upper = record["quartiles"]
        print(
            f"{record['arch']:<12} {record['form']:<12} {1e3 * record['seconds_an_image']:8.0f} ms an image "
            f"({1e3 * lower:.0f} to {1e3 * upper:.0f}), {record['times_torchvision']:.2f} × torchvision's"
        )


if __name__ == "__main__":
    main()
