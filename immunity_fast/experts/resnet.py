"""Residual networks: "Deep Residual Learning for Image Recognition" (arXiv 1512.03385)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from immunity_fast.experts.folding import Layers, normalised
from immunity_fast.experts.staged import StagedNetwork, classifier, initialise
from immunity_fast.experts.stems import Stem, imagenet_stem
from immunity_fast.experts.widths import scaled


class BasicBlock(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)): (B, C, h, w) to (B, C', ⌈h/stride⌉, ⌈w/stride⌉)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = Layers(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        between = normalised(self.conv1, self.bn1, x, relu=True)
        return normalised(self.conv2, self.bn2, between, plus=self.shortcut(x), relu=True)


def _resnet(
    widths: tuple[int, ...],
    blocks: int,
    num_classes: int,
    stem: Stem = "cifar",
    in_channels: int = 3,
    times: float = 1.0,
) -> StagedNetwork:
    """Stages `stem`, `layer1`, …: a layer of `blocks` basic blocks for each width, all but the first halving."""
    widths = tuple(scaled(width, times) for width in widths)
    channels = widths[0]
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    if stem == "imagenet":
        stages["stem"] = imagenet_stem(channels, in_channels)
    else:
        stages["stem"] = Layers(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
    for index, width in enumerate(widths, start=1):
        first = BasicBlock(channels, width, stride=1 if index == 1 else 2)
        stages[f"layer{index}"] = nn.Sequential(first, *(BasicBlock(width, width, stride=1) for _ in range(blocks - 1)))
        channels = width
    stages["classifier"] = classifier(channels, num_classes)
    return initialise(StagedNetwork(stages))


def resnet18(num_classes: int, stem: Stem = "cifar", in_channels: int = 3, times: float = 1.0) -> StagedNetwork:
    """ResNet-18: images (B, C, H, W) to logits (B, num_classes).

    With the stem for CIFAR, 3×3 without pooling, `stem` and `layer1` give maps of 32×32 on 32×32 images, `layer2`
    16×16, `layer3` 8×8, `layer4` 4×4. With that for ImageNet, as the paper has it, `stem` and `layer1` give maps of
    56×56 on 224×224 images, and the others halves of it likewise. `times` is the width: all numbers of channels are
    multiplied by it.
    """
    return _resnet((64, 128, 256, 512), 2, num_classes, stem, in_channels, times)


def resnet8(num_classes: int, in_channels: int = 3, times: float = 1.0) -> StagedNetwork:
    """The paper's CIFAR form with n = 1, small enough for a CPU: images (B, C, H, W) to logits (B, num_classes).

    Unlike there, a shortcut that changes the shape is a 1×1 convolution, as in `resnet18`. On 32×32 images
    `stem` and `layer1` give maps of 32×32, `layer2` 16×16, `layer3` 8×8. `times` is the width: all numbers of channels
    are multiplied by it.
    """
    return _resnet((16, 32, 64), blocks=1, num_classes=num_classes, in_channels=in_channels, times=times)
