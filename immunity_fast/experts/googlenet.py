"""GoogLeNet: "Going Deeper with Convolutions" (arXiv 1409.4842)."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

from immunity_fast.experts.folding import Layers
from immunity_fast.experts.staged import StagedNetwork, classifier, initialise
from immunity_fast.experts.stems import Stem
from immunity_fast.experts.widths import scaled

IMAGENET_EPS = 1e-3  # of torchvision's batch normalisation in this network


def _conv(in_channels: int, out_channels: int, kernel: int, *, stem: Stem, stride: int = 1) -> Layers:
    # Batch normalisation takes a convolution's bias out again; it stays for the parameters to be the known network's.
    small = stem == "cifar"
    return Layers(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=small),
        nn.BatchNorm2d(out_channels, eps=1e-5 if small else IMAGENET_EPS),
        nn.ReLU(),
    )


class Inception(nn.Module):
    """Four branches side by side: (B, C, h, w) to (B, n1 + n3 + n5 + pool, h, w).

    The widths are those of the paper's table 1, in its order: `n1` the 1×1 branch, `reduce3` and `n3` the 3×3
    branch, `reduce5` and `n5` the 5×5 branch (in the CIFAR form two 3×3 convolutions, which see as far; in the ImageNet
    form one, as torchvision has it), `pool` the pooled one.
    """

    def __init__(
        self, channels: int, n1: int, reduce3: int, n3: int, reduce5: int, n5: int, pool: int, *, stem: Stem
    ) -> None:
        super().__init__()
        conv = partial(_conv, stem=stem)
        self.branch1 = conv(channels, n1, 1)
        self.branch3 = nn.Sequential(conv(channels, reduce3, 1), conv(reduce3, n3, 3))
        self.branch5 = nn.Sequential(conv(channels, reduce5, 1), conv(reduce5, n5, 3))
        if stem == "cifar":
            self.branch5.append(conv(n5, n5, 3))
        self.branch_pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch3(x), self.branch5(x), self.branch_pool(x)], dim=1)


# Of each block the widths n1, reduce3, n3, reduce5, n5 and pool.
_BLOCKS: dict[str, tuple[tuple[int, int, int, int, int, int], ...]] = {
    "inception3": ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    "inception4": (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    "inception5": ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
}


def googlenet(num_classes: int, stem: Stem = "cifar", in_channels: int = 3, times: float = 1.0) -> StagedNetwork:
    """GoogLeNet: images (B, C, H, W) to logits (B, num_classes).

    Batch normalisation follows each convolution; there are no auxiliary classifiers. With the stem for CIFAR, one 3×3
    convolution, `stem` and `inception3` give maps of 32×32 on 32×32 images, `inception4` 16×16, `inception5` 8×8. With
    that for ImageNet, and all else as torchvision has it but for dropout, `stem` and `inception3` give maps of 28×28
    on 224×224 images, `inception4` 14×14, `inception5` 7×7. `times` is the width: all numbers of channels are
    multiplied by it.
    """
    conv = partial(_conv, stem=stem)
    small = stem == "cifar"
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    begin, channels = scaled(64, times), scaled(192, times)
    if small:
        stages["stem"] = conv(in_channels, channels, 3)
    else:
        stages["stem"] = nn.Sequential(
            conv(in_channels, begin, 7, stride=2), _halved(), conv(begin, begin, 1), conv(begin, channels, 3), _halved()
        )
    for name, blocks in _BLOCKS.items():
        layers: list[nn.Module] = []
        if name != "inception3":
            large = _halved() if name == "inception4" else nn.MaxPool2d(2, stride=2, ceil_mode=True)
            layers.append(nn.MaxPool2d(3, stride=2, padding=1) if small else large)
        for published in blocks:
            n1, reduce3, n3, reduce5, n5, pool = (scaled(width, times) for width in published)
            layers.append(Inception(channels, n1, reduce3, n3, reduce5, n5, pool, stem=stem))
            channels = n1 + n3 + n5 + pool
        stages[name] = nn.Sequential(*layers)
    stages["classifier"] = classifier(channels, num_classes)
    return initialise(StagedNetwork(stages))


def _halved() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
