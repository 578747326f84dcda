"""GoogLeNet for small images: "Going Deeper with Convolutions" (arXiv 1409.4842)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from immunity_fast.experts.staged import StagedNetwork, classifier, initialise


def _conv(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    # Batch normalisation takes a convolution's bias out again; it stays for the parameters to be the known network's.
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2), nn.BatchNorm2d(out_channels), nn.ReLU()
    )


class Inception(nn.Module):
    """Four branches side by side: (B, C, h, w) to (B, n1 + n3 + n5 + pool, h, w).

    The widths are those of the paper's table 1, in its order: `n1` the 1×1 branch, `reduce3` and `n3` the 3×3
    branch, `reduce5` and `n5` the 5×5 branch (here two 3×3 convolutions, which see as far), `pool` the
    pooled one.
    """

    def __init__(self, channels: int, n1: int, reduce3: int, n3: int, reduce5: int, n5: int, pool: int) -> None:
        super().__init__()
        self.branch1 = _conv(channels, n1, 1)
        self.branch3 = nn.Sequential(_conv(channels, reduce3, 1), _conv(reduce3, n3, 3))
        self.branch5 = nn.Sequential(_conv(channels, reduce5, 1), _conv(reduce5, n5, 3), _conv(n5, n5, 3))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv(channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)], dim=1)


def googlenet(num_classes: int) -> StagedNetwork:
    """GoogLeNet with one 3×3 stem convolution, as usual for CIFAR: images (B, 3, H, W) to logits (B, num_classes).

    Batch normalisation follows each convolution; there are no auxiliary classifiers. On 32×32 images `stem` and
    `inception3` give maps of 32×32, `inception4` 16×16, `inception5` 8×8.
    """
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    stages["stem"] = _conv(3, 192, 3)
    stages["inception3"] = nn.Sequential(
        Inception(192, 64, 96, 128, 16, 32, 32),
        Inception(256, 128, 128, 192, 32, 96, 64),
    )
    stages["inception4"] = nn.Sequential(
        nn.MaxPool2d(3, stride=2, padding=1),
        Inception(480, 192, 96, 208, 16, 48, 64),
        Inception(512, 160, 112, 224, 24, 64, 64),
        Inception(512, 128, 128, 256, 24, 64, 64),
        Inception(512, 112, 144, 288, 32, 64, 64),
        Inception(528, 256, 160, 320, 32, 128, 128),
    )
    stages["inception5"] = nn.Sequential(
        nn.MaxPool2d(3, stride=2, padding=1),
        Inception(832, 256, 160, 320, 32, 128, 128),
        Inception(832, 384, 192, 384, 48, 128, 128),
    )
    stages["classifier"] = classifier(1024, num_classes)
    return initialise(StagedNetwork(stages))
