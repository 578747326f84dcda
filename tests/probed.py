"""Networks that tests look into before they make a mixture of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast.models.stacking import Batching

BOTH: list[Batching] = ["loop", "vmap"]
TARGETS = torch.tensor([0, 3, 1, 2])


class Net(nn.Module):
    """A small network with whatever else is asked for in attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)
        usual = {"mean": 0.0, "temperature": 1.0, "act": torch.relu, "prepare": None, "p": 0.0}
        vars(self).update(usual | attributes)

    def forward(self, images: Tensor) -> Tensor:
        x = images if self.prepare is None else self.prepare(images)
        x = self.act(self.norm(self.conv(x - self.mean)))
        x = F.dropout(x, self.p, self.training)
        out: Tensor = self.fc(x.mean((-2, -1))) / self.temperature
        return out


class Attention(nn.Module):
    """Equal tensors, another number of heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, heads, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).flatten(2).transpose(1, 2)
        out: Tensor = self.fc(self.attention(x, x, x)[0].mean(1))
        return out


class Permuted(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


class Fixed(nn.Module):
    """A network for images of one size, whose maps do not grow with them."""

    def __init__(self, width: int, *axes: int) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.AdaptiveAvgPool2d(9), Permuted(*axes))
        self.fc = nn.Linear(width * 81, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc(self.stage(images).flatten(1))
        return out
