"""Three small networks, trained together by the loss of another robust ensemble; seconds on a CPU.

pip install .
python examples/other_losses.py --loss gal
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from immunity_fast import ADPLoss, DVERGELoss, GALLoss, TRSLoss

CLASSES = 10
Objective = Callable[[nn.ModuleList, Tensor, Tensor], Tensor]


def network(width: int) -> nn.Module:
    """A network of your own, which does its normalisation itself; smooth activations suit GAL and TRS."""
    layers = [
        nn.Conv2d(3, width, 3, stride=2, bias=False),  # BatchNorm would take it away
        nn.BatchNorm2d(width),
        nn.GELU(),
        nn.Conv2d(width, 2 * width, 3),
        nn.GELU(),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES))


def adp(experts: nn.ModuleList, images: Tensor, labels: Tensor) -> Tensor:
    """Of logits alone."""
    loss: Tensor = ADPLoss(alpha=2.0, beta=0.5)([expert(images) for expert in experts], labels)
    return loss


def gal(experts: nn.ModuleList, images: Tensor, labels: Tensor) -> Tensor:
    """Of logits, and of the images that they come from: a copy for each network."""
    copies = [images.clone().requires_grad_() for _ in experts]
    logits = [expert(seen) for expert, seen in zip(experts, copies, strict=True)]
    loss: Tensor = GALLoss(weight=0.5)(logits, copies, labels)
    return loss


# These run the networks themselves, and know the epoch: a loss is made once.
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "adp": lambda: adp,
    "gal": lambda: gal,
    "trs": lambda: TRSLoss(steps=2),
    "dverge": lambda: DVERGELoss(steps=3),
}


def batches(count: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Random images in [0, 1] and random labels, in the place of your data."""
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(size, 3, 32, 32, generator=random), torch.randint(CLASSES, (size,), generator=random))
        for _ in range(count)
    ]


def train(name: str, epochs: int = 2, steps: int = 3, size: int = 16) -> tuple[nn.ModuleList, list[float]]:
    """The networks, and the loss of each step."""
    torch.manual_seed(0)
    experts = nn.ModuleList(network(width) for width in (6, 8, 10))
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.05, momentum=0.9)
    objective = OBJECTIVES[name]()
    losses = []
    for epoch in range(epochs):
        if isinstance(objective, TRSLoss | DVERGELoss):  # the radius grows; another layer is drawn
            objective.begin_epoch(experts, epoch, epochs, seed=0)
        for images, labels in batches(steps, size, seed=epoch):
            loss = objective(experts, images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"{name}, epoch {epoch + 1}: loss {sum(losses[-steps:]) / steps:.3f}")
    return experts, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--loss", choices=OBJECTIVES, default="adp")
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    experts, _ = train(options.loss, options.epochs)
    images, _ = batches(1, 4, seed=-1)[0]
    with torch.no_grad():
        probabilities = torch.stack([expert(images) for expert in experts.eval()]).softmax(-1).mean(0)
    print(f"the ensemble answers by the mean probabilities: classes {probabilities.argmax(-1).tolist()}")


if __name__ == "__main__":
    main()
