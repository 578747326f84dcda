"""DenseNet-BC: "Densely Connected Convolutional Networks" (arXiv 1608.06993)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from immunity_fast.experts.folding import Layers
from immunity_fast.experts.staged import StagedNetwork, classifier, initialise
from immunity_fast.experts.stems import Stem, imagenet_stem
from immunity_fast.experts.widths import scaled

GROWTH = 32


class DenseLayer(nn.Module):
    """BN-ReLU-conv 1×1-BN-ReLU-conv 3×3, its output appended to its input: (B, C, h, w) to (B, C + growth, h, w)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.features = Layers(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 4 * growth, 1, bias=False),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.features(x)], dim=1)


def _transition(channels: int) -> Layers:
    """Halves channels and sides: (B, C, h, w) to (B, ⌊C/2⌋, ⌊h/2⌋, ⌊w/2⌋)."""
    return Layers(
        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)
    )


def densenet121(num_classes: int, stem: Stem = "cifar", in_channels: int = 3, times: float = 1.0) -> StagedNetwork:
    """DenseNet-121: images (B, C, H, W) to logits (B, num_classes).

    With the stem for CIFAR, 3×3 without pooling, images have sides of at least 8 pixels: three transitions halve them.
    On 32×32 images `stem` and `block1` give maps of 32×32, `block2` 16×16, `block3` 8×8, `block4` 4×4. With that for
    ImageNet, as the paper has it, sides are at least 29 pixels; on 224×224 images `stem` and `block1` give maps of
    56×56, and the others halves of it likewise. `times` is the width: the growth rate and the stem's channels are
    multiplied by it, and with them all others.
    """
    growth = scaled(GROWTH, times)
    channels = scaled(2 * GROWTH, times)
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "imagenet":
        stages["stem"] = imagenet_stem(channels, in_channels)
    else:
        stages["stem"] = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    for index, num_layers in enumerate((6, 12, 24, 16), start=1):
        layers: list[nn.Module] = []
        if index > 1:
            layers.append(_transition(channels))
            channels //= 2
        for _ in range(num_layers):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        stages[f"block{index}"] = nn.Sequential(*layers)
    stages["classifier"] = Layers(nn.BatchNorm2d(channels), nn.ReLU(), *classifier(channels, num_classes))
    return initialise(StagedNetwork(stages))
