"""Networks of a user's own, for `--arch tests.own_networks:…`: small, and none of them a chain of stages of ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """Two convolutions and a linear head; the maps of `second` are half the images'."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(torch.relu(self.norm(self.first(images))))
        logits: Tensor = self.head(torch.relu(maps).mean((2, 3)))
        return logits


def wide(num_classes: int) -> nn.Module:
    """A `Plain` of other channels."""
    return Plain(num_classes, 24)


def seeded(num_classes: int) -> nn.Module:
    """A `Plain` with the same weights each time, as of one checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Plain(num_classes)


class Pooled(Plain):
    """Without its logits, as a network of features alone."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"features": super().forward(images)}


class Tuple(Plain):
    """Its logits and something else, as of an auxiliary classifier."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(images)
        return logits, logits


def of_channels(num_classes: int, in_channels: int = 3) -> nn.Module:
    """A network for images of any number of channels."""
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def smooth(num_classes: int) -> nn.Module:
    """A chain without BatchNorm, which processes train as one does; `2` is where to look, and much is behind it."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Tanh(),
        nn.Sequential(nn.Conv2d(6, 5, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 25, num_classes)),
    )
