"""Somebody's own training loop over three torchvision ResNets, and the same loop with the immunity loss.

    pip install '.[train]'
    python examples/drop_in.py

`plain` is an ordinary loop. `with_immunity` is the same loop with three lines added, each marked `# added`; of this
package it imports `FusedImmunityLoss` and `capture_activations` and nothing else. Below them are the networks, the
data, and what fills a table that shows what the lines do and what they cost.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from immunity_fast import FusedImmunityLoss, capture_activations

Batches = Iterable[tuple[Tensor, Tensor]]  # of images (B, 3, 32, 32) and labels (B,)


def plain(batches: Batches, device: str) -> nn.ModuleList:
    """Three networks, each trained by its own cross-entropy."""
    torch.manual_seed(0)
    experts = nn.ModuleList(resnet10() for _ in range(3)).to(device)
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.005, momentum=0.9)
    for images, labels in batches:
        logits = [expert(images) for expert in experts]
        loss = sum(F.cross_entropy(scores, labels) for scores in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return experts


def with_immunity(batches: Batches, device: str) -> nn.ModuleList:
    """The same loop; its loss has the cross-entropies too, and keeps the experts' heatmaps apart and in place."""
    torch.manual_seed(0)
    experts = nn.ModuleList(resnet10() for _ in range(3)).to(device)
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.005, momentum=0.9)
    captured = capture_activations(experts, "layer1")  # added: the maps Grad-CAM looks at
    immunity_loss = FusedImmunityLoss(size=(32, 32))  # added: the loss, with heatmaps of the images' size
    for images, labels in batches:
        loss = immunity_loss(*captured(images), labels)  # added: of logits and activations, in place of cross-entropy
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return experts


def resnet10() -> ResNet:
    """torchvision's ResNet with one block a stage: resnet18 has two, and takes twice as long here."""
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)


def digits(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits as (n, 3, 32, 32) in [0, 1]: images and labels to train on, and 360 held out."""
    source = load_digits()
    small = torch.from_numpy(source.images).float()[:, None] / 16
    images = F.interpolate(small, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1).to(device)
    labels = torch.from_numpy(source.target).long().to(device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    return images[order[360:]], labels[order[360:]], images[order[:360]], labels[order[:360]]


def random_batches(images: Tensor, labels: Tensor, steps: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, drawn with replacement, at every call."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        indices = torch.randint(len(labels), (batch_size,), generator=generator).to(images.device)
        yield images[indices], labels[indices]


def timed(batches: Batches, seconds: list[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, noting how long the loop's body took for each."""
    for images, labels in batches:
        start = time.perf_counter()
        yield images, labels
        if images.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)


def evaluate(experts: nn.ModuleList, images: Tensor, labels: Tensor) -> dict[str, float]:
    """What the table shows. Not under `torch.no_grad`: Grad-CAM takes gradients."""
    experts.eval()
    logits, activations = capture_activations(experts, "layer1")(images)
    _, terms = FusedImmunityLoss(size=(32, 32))(logits, activations, labels, return_terms=True)
    mixture = torch.stack(logits).softmax(-1).mean(0)
    information = math.log(len(experts)) - float(terms.mutual_information.detach()) / len(experts)
    return {
        "accuracy of the experts' mean, %": 100 * float((mixture.argmax(-1) == labels).float().mean()),
        "mutual information of the heatmaps, nats": information,
        "loss: cross-entropy, nats": float(terms.cross_entropy.detach()),
        "loss: mutual information, nats": float(terms.mutual_information.detach()),
        "loss: position stability, pixels^4": float(terms.position_stability.detach()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Three ResNets on digits, trained with and without the immunity loss.")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each training (default: 60)")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step, at least 2 (default: 32)")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.batch_size < 2:  # BatchNorm needs two images where maps have shrunk to 1×1
        parser.error("expected at least 1 step and 2 images a step")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels, test_images, test_labels = digits(device)

    columns = []
    for train in (plain, with_immunity):
        seconds: list[float] = []
        batches = random_batches(images, labels, arguments.steps, arguments.batch_size)
        experts = train(timed(batches, seconds), device)
        columns.append(evaluate(experts, test_images, test_labels))
        columns[-1]["milliseconds a step, median"] = 1e3 * statistics.median(seconds)

    print(f"{arguments.steps} steps of {arguments.batch_size} images on {device}; {len(test_labels)} held-out images")
    print(f"{'':42}{'plain':>12}{'with_immunity':>16}")
    for name, value in columns[0].items():
        print(f"{name:42}{value:12,.2f}{columns[1][name]:16,.2f}")


if __name__ == "__main__":
    main()
