"""The loss of captured activations by plain code in float64: the layer's own output, and the oracle's formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss
from tests import oracle
from tests.tensors import noise
from tests.transformers_of import ViT

LABELS = torch.tensor([0, 3, 1, 2])
SIZE = (11, 9)
Passed = tuple[Tensor, Tensor]  # an expert's logits, and its layer's output in their graph


class Plain(nn.Module):
    """A network whose two halves can be called one by one."""

    def __init__(self, width: int = 4, inplace: str = "") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.layer = nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, width, 3))
        self.inplace = inplace
        self.last = nn.Conv2d(width, width, 3, stride=2)
        self.fc = nn.Linear(width, 4)

    def trunk(self, images: Tensor) -> Tensor:
        """The output of `layer`."""
        out: Tensor = self.layer(torch.tanh(self.conv(images)))
        return out

    def head(self, maps: Tensor) -> Tensor:
        """Logits of the output of `layer`."""
        if self.inplace == "relu":
            maps = torch.relu_(maps)
        elif self.inplace == "in training" and self.training:
            maps.add_(1)
        else:
            maps = maps.relu()
        out: Tensor = self.fc(torch.tanh(self.last(maps)).mean((-2, -1)))
        return out

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))


class ChannelsLast(Plain):
    """The same, whose layer returns (B, h, w, C)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.layer.append(Turned())

    def head(self, maps: Tensor) -> Tensor:
        return super().head(maps.permute(0, 3, 1, 2))


class Turned(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.permute(0, 2, 3, 1)


def of_plain(network: Any, images: Tensor) -> Passed:
    """The pass of a `Plain`, by its halves: what the head does in place, it does to a copy."""
    output = network.trunk(images)
    return network.head(output.clone() if network.inplace else output), output


def of_vit(block: int) -> Callable[[Any, Tensor], Passed]:
    """The pass of a `ViT`, whose layer is one of its blocks."""

    def run(network: ViT, images: Tensor) -> Passed:
        x = network.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([network.prefix.expand(len(x), -1, -1), x], 1) + network.positions
        output = x
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for index, part in enumerate(network.blocks):
                x = part(x)
                if index == block:
                    output = x
        return network.head(x[:, 0] if network.pool == "class" else x.mean(1)), output

    return run


def expected_gradients(
    networks: Sequence[nn.Module],
    images: Tensor,
    run: Callable[[Any, Tensor], Passed] | Sequence[Callable[[Any, Tensor], Passed]],
    to_maps: Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]] = lambda output: output,
) -> list[Tensor]:
    """Of the parameters that require one, of the oracle's loss, one network after another."""
    runs = [run] * len(networks) if callable(run) else run
    turns = [to_maps] * len(networks) if callable(to_maps) else to_maps
    passed = [each(network, images) for each, network in zip(runs, networks, strict=True)]
    maps, slopes = [], []
    for (logits, output), turn in zip(passed, turns, strict=True):
        of_samples = [
            torch.autograd.grad(logits[q, label], output, create_graph=True)[0][q] for q, label in enumerate(LABELS)
        ]
        slopes.append(turn(torch.stack(of_samples)))
        maps.append(turn(output))
    logits = torch.stack([logits for logits, _ in passed])
    gate = torch.full((len(images), len(networks)), 1 / len(networks), dtype=torch.float64)
    cross_entropies = oracle.cross_entropy(logits, gate, LABELS, 0.5)
    loss = oracle.total(cross_entropies, *oracle.heatmap_losses(maps, slopes, SIZE), len(networks), 1.3, 0.02)
    return gradients_of(loss, networks)


def gradients_of(loss: Tensor, networks: Sequence[nn.Module]) -> list[Tensor]:
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True))


def loss_fn() -> FusedImmunityLoss:
    return FusedImmunityLoss(0.5, 1.3, 0.02, size=SIZE)


def images() -> Tensor:
    return noise(4, 13)


def tokens_to_maps(prefix: int, height: int, width: int) -> Callable[[Tensor], Tensor]:
    """(B, T, C) to (B, C, h, w)."""
    return lambda tokens: tokens[:, prefix:].reshape(len(tokens), height, width, -1).permute(0, 3, 1, 2)


def assert_gradients(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert any(bool(gradient.any()) for gradient in expected)
    for mine, theirs in zip(actual, expected, strict=True):
        oracle.assert_matches(mine, theirs, 1e-8, 1e-3)
