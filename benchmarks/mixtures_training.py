"""The networks that `benchmarks.mixtures` attacks, each group trained once and kept.

    python -m benchmarks.mixtures_training GROUP … --data cifar10.npz --models DIR

* `first`, `second`: ResNet8, adversarially trained apart, by FGSM from a random start (Wong et al., arXiv 2001.03994).
* `boosted`: ResNet8, trained on images that PGD-10 made against `first` alone (Pinot et al., arXiv 2002.11565).
* `adp`: three ResNet8 trained together with ADP's loss (Pang et al., arXiv 1901.08846).
* `plain`: three ResNet8 by the same recipe without ADP's terms.

All see the same training images, cropped and mirrored at random, and nothing is chosen by the test images. A file has
the settings it was made with: another run of other settings refuses it.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from immunity_fast import ADPLoss, experts
from immunity_fast.attacks import Attack
from immunity_fast.data.augmentation import apply_affine, as_float, draw_affine, to_float
from immunity_fast.data.datasets import ImageDataset, Split, load
from immunity_fast.peers import PlainLoss

EPS = 8 / 255
BATCH = 64
LOOKED_AT = 200  # validation images after each epoch

Loss = Callable[[Tensor, Tensor], Tensor]  # logits (N, B, K) and labels (B,) to their mean loss


@dataclass(frozen=True)
class Budget:
    """How much a network is trained on: so many training images, so often."""

    images: int = 8000
    epochs: int = 6


class Normalised(nn.Module):
    """A network of images in [0, 1], which normalises them itself by CIFAR-10's mean and standard deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for name, values in {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W)."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def networks(count: int, classes: int, seed: int) -> nn.ModuleList:
    """So many fresh ResNet8, of random weights of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = [Normalised(experts.create("resnet8", classes)) for _ in range(count)]
    return nn.ModuleList(made).to(memory_format=torch.channels_last)


def _augmented(split: Split, images: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's batches, each image shifted and mirrored at random."""
    for rows in torch.randperm(len(split), generator=generator).split(BATCH):
        affine = draw_affine(len(rows), generator, degrees=0, flip=True)
        moved = apply_affine(images[rows], affine).contiguous(memory_format=torch.channels_last)
        yield moved, split.labels[rows]


def _triangle(steps: int, step: int) -> float:
    """A learning rate's share of its peak: up over the first third of the steps, and down to 0."""
    return min(3 * (step + 1) / steps, 1.5 * (1 - step / steps), 1.0)


def train(
    members: nn.ModuleList,
    split: Split,
    images: Tensor,
    epochs: int,
    seed: int,
    *,
    loss: Loss,
    adversarial: bool,
    report: Callable[[int, float], None],
) -> None:
    """Train networks in place, each seeing all batches.

    Args:
        members: the networks.
        split: whose labels count.
        images: what is shown in place of the split's images: these, uint8 or float32 in [0, 1].
        epochs: over all images.
        seed: of the batches' order, of the random crops and of the attack's start.
        loss: what is minimised.
        adversarial: FGSM from a random start, with steps of 1.25·eps, on the first network; SGD then, Adam otherwise.
        report: is told the epoch and its mean loss.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * -(-len(split) // BATCH)
    optimizer: Optimizer
    if adversarial:
        optimizer = SGD(members.parameters(), 0.05, 0.9, weight_decay=5e-4, nesterov=True)
    else:
        optimizer = Adam(members.parameters(), 3e-3)
    schedule = LambdaLR(optimizer, partial(_triangle, steps))
    attack = Attack(EPS, 1.25 * EPS, 1, random_start=True)
    for epoch in range(1, epochs + 1):
        total = 0.0
        members.train()
        for batch, labels in _augmented(split, images, generator):
            if adversarial:
                batch = attack(members[0], batch, labels, generator=generator)
            mean = loss(torch.stack([member(batch) for member in members]), labels)
            optimizer.zero_grad()
            mean.backward()
            optimizer.step()
            schedule.step()
            total += len(labels) * float(mean.detach())
        report(epoch, total / len(split))
    members.eval()


class Zoo:
    """Groups of trained networks: made when they are first asked for, and kept in a folder.

    Args:
        dataset: with CIFAR-10's three channels, in memory.
        folder: for a file of each group.
        budget: of each group.
    """

    SIZES = {"first": 1, "second": 1, "boosted": 1, "adp": 3, "plain": 3}  # noqa: RUF012

    def __init__(self, dataset: ImageDataset, folder: Path, budget: Budget) -> None:
        self.dataset, self.folder, self.budget = dataset, folder, budget

    def __getitem__(self, group: str) -> nn.ModuleList:
        """The networks of a group, in evaluation mode.

        Raises:
            ValueError: the file was made with other settings.
        """
        file = self.folder / f"{group}.safetensors"
        seed = list(self.SIZES).index(group)
        settings = {"settings": json.dumps(asdict(self.budget) | {"seed": seed, "batch": BATCH}, sort_keys=True)}
        members = networks(self.SIZES[group], self.dataset.num_classes, seed)
        if not file.is_file():
            self._train(group, members, seed)
            self.folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.contiguous() for name, tensor in members.state_dict().items()}
            save_file(tensors, file, settings)
        with safe_open(file, "pt") as opened:
            if opened.metadata() != settings:
                raise ValueError(f"{file}: expected {settings}, got {opened.metadata()}")
        members.load_state_dict(load_file(file))
        return members.eval()

    def _train(self, group: str, members: nn.ModuleList, seed: int) -> None:
        split, validation = self.dataset.train, self.dataset.validation
        assert isinstance(split, Split)
        rows = slice(self.budget.images)
        split = Split(split.images[rows], split.labels[rows])
        images = split.images
        looked_at, labels = to_float(validation.read(slice(LOOKED_AT))), validation.labels[:LOOKED_AT]
        begin = time.monotonic()

        def report(epoch: int, loss: float) -> None:
            members.eval()
            shares = [right(member, looked_at, labels) for member in members]
            text = f"{group}: epoch {epoch} of {self.budget.epochs}, loss {loss:.3f}, validation {shares}"
            if len(members) == 1:
                attacked = Attack(EPS, EPS / 4, 5)(members[0], looked_at, labels)
                text += f", PGD-5 {right(members[0], attacked, labels)}"
            print(f"{text}, {time.monotonic() - begin:.0f} s", flush=True)

        if group == "boosted":
            images = against(self["first"][0], split)
            print(f"boosted: images against `first`, {time.monotonic() - begin:.0f} s", flush=True)
        loss = ADPLoss() if group == "adp" else PlainLoss()
        adversarial = group in ("first", "second")
        train(members, split, images, self.budget.epochs, seed, loss=loss, adversarial=adversarial, report=report)


def against(network: nn.Module, split: Split) -> Tensor:
    """A split's images as PGD-10 makes them against a network: float32 (n, C, H, W)."""
    attack, generator = Attack(EPS, EPS / 4, 10, random_start=True), torch.Generator().manual_seed(0)
    pairs = zip(split.images.split(BATCH), split.labels.split(BATCH), strict=True)
    return torch.cat([attack(network, as_float(images), labels, generator=generator) for images, labels in pairs])


def right(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that a network in evaluation mode gets right."""
    with torch.no_grad():
        return round(float((network(images).argmax(-1) == labels).double().mean()), 4)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What this command and `benchmarks.mixtures` are both asked."""
    parser.add_argument("--data", required=True, help="CIFAR-10 as .npz, in MedMNIST's layout")
    parser.add_argument("--models", type=Path, required=True, help="folder where trained networks are kept")
    parser.add_argument(
        "--train-images", type=int, default=Budget.images, help="training images (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=Budget.epochs, help="of each training (default: %(default)s)")


def zoo_of(options: argparse.Namespace) -> Zoo:
    """The trained networks that options name."""
    return Zoo(load("npz", options.data), options.models, Budget(options.train_images, options.epochs))


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m benchmarks.mixtures_training`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("groups", nargs="+", choices=list(Zoo.SIZES), metavar="GROUP", help=", ".join(Zoo.SIZES))
    add_options(parser)
    options = parser.parse_args(arguments)
    zoo = zoo_of(options)
    for group in options.groups:
        zoo[group]


if __name__ == "__main__":
    main()
