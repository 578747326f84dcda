"""How experts part that begin from one network's weights: by how much noise, with the gate and without it.

    python -m benchmarks.begin_alike --out benchmarks/results/begin_alike_cpu.json

A ResNet8 is trained on scikit-learn's digits. Three experts begin from its weights, all but the first with noise, and
are trained together by the whole loss. Recorded is, after so many steps, the mutual information of expert and position
on validation images, 0 where all look at the same place, and the accuracy of the mean of the experts. The test split
is not used.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import machine
from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.data.datasets import ImageDataset, Split, load
from immunity_fast.evaluation.metrics import heatmap_metrics
from immunity_fast.experts import create, perturb_
from immunity_fast.runtime.files import write_atomically

SCALES = (0.0, 1e-4, 1e-3, 1e-2, 5e-2, 2e-1)
AFTER = (0, 10, 40, 100)  # steps
EXPERTS, BATCH, LR, CLASSES = 3, 32, 0.02, 10


def batches(split: Split, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Random images in [0, 1], and their labels."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(split), (steps, BATCH), generator=generator)
    return [(split.images[rows].float() / 255, split.labels[rows]) for rows in chosen]


def pretrained(data: ImageDataset, steps: int) -> nn.Module:
    """The network that all experts begin from."""
    torch.manual_seed(0)
    network = create("resnet8", CLASSES)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for images, labels in batches(data.train, steps, seed=1):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network


def parting(
    network: nn.Module, data: ImageDataset, scale: float, gated: bool, after: tuple[int, ...]
) -> dict[str, Any]:
    """How three experts of one network's weights part, in a record."""
    experts = [copy.deepcopy(network) for _ in range(EXPERTS)]
    perturb_(experts, scale, seed=0)
    torch.manual_seed(0)
    model = ImmunityMoE.from_experts(experts, stage="layer2", image_size=data.image_size)
    loss_fn = FusedImmunityLoss(size=data.image_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    found = []
    for step, (images, labels) in enumerate(batches(data.train, max(after) + 1, seed=2)):
        if step in after:
            found.append({"step": step} | measured(model, loss_fn, data.validation))
        model.train()
        logits, maps, gate = model.expert_outputs(images)
        loss = loss_fn(logits, maps, labels, gate if gated else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"scale": scale, "gate": gated, "after": found}


def measured(model: ImmunityMoE, loss_fn: FusedImmunityLoss, split: Split) -> dict[str, float]:
    """Mutual information in nats, and accuracy, on a split."""
    model.eval()
    with torch.no_grad():
        mean = model.expert_logits(split.images.float() / 255).softmax(-1).mean(0)
    return {
        "mutual_information": heatmap_metrics(model, loss_fn, split, 64)["mutual_information"],
        "accuracy": float((mean.argmax(-1) == split.labels).double().mean()),
    }


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m benchmarks.begin_alike`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.begin_alike", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--scales", nargs="+", type=float, default=SCALES)
    parser.add_argument("--after", nargs="+", type=int, default=AFTER, help="so many steps it is measured")
    parser.add_argument("--pretraining", type=int, default=120, help="steps of the network that all begin from")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    data = load("digits")
    network = pretrained(data, options.pretraining)
    record: dict[str, Any] = {"machine": machine.device(), "versions": machine.versions(), "runs": []}
    for gated in (False, True):
        for scale in options.scales:
            run = parting(network, data, scale, gated, tuple(options.after))
            record["runs"].append(run)
            write_atomically(options.out, json.dumps(record, indent=1).encode())
            told = ", ".join(
                f"{each['mutual_information']:.5f} nats and {100 * each['accuracy']:.1f} % after {each['step']}"
                for each in run["after"]
            )
            print(f"noise {scale:g}, {'with the gate' if gated else 'no gate'}: {told}")


if __name__ == "__main__":
    main()
