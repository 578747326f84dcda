"""With what a network begins: a stride of 1 for small images, as CIFAR has them, of 4 for large ones, as ImageNet."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from immunity_fast.experts.folding import Layers

Stem = Literal["cifar", "imagenet"]
StemChoice = Literal["auto", "cifar", "imagenet"]
LARGEST_SMALL = 64  # pixels: of images whose smaller side exceeds it, "auto" is the ImageNet form


def chosen_stem(stem: StemChoice, image_size: int | tuple[int, int]) -> Stem:
    """What "auto" means for images of a size: the ImageNet form if their smaller side exceeds 64 pixels."""
    if stem != "auto":
        return stem
    smaller = image_size if isinstance(image_size, int) else min(image_size)
    return "imagenet" if smaller > LARGEST_SMALL else "cifar"


def imagenet_stem(channels: int, in_channels: int = 3) -> nn.Sequential:
    """Convolution 7×7 and max-pooling, each of stride 2: images (B, C, H, W) to maps (B, channels, ⌈H/4⌉, ⌈W/4⌉).

    As ResNets and DenseNets have it (arXiv 1512.03385, 1608.06993).
    """
    return Layers(
        OrderedDict(
            conv=nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, bias=False),
            bn=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(3, stride=2, padding=1),
        )
    )
