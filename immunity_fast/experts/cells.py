"""What networks of searched cells share: operations, cells, and the chain of cells cut into stages.

The frame is that of "DARTS: Differentiable Architecture Search" (arXiv 1806.09055): each cell takes the outputs of the
two cells before it, and two reduction cells, at a third and two thirds of the depth, halve the sides and double the
channels.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunity_fast.experts.folding import Layers
from immunity_fast.experts.staged import StagedNetwork, classifier

NODES = 4
"""Nodes of a cell: number k can read 0 and 1, the outputs of the two cells before, and 2 to k + 1, the nodes before."""

MIN_CELLS = 5
"""With fewer, a stage would end right behind a reduction cell, where the two outputs that cross differ in size."""

Edge = tuple[int, nn.Module]
"""What a node reads, and the operation on it."""


class Zero(nn.Module):
    """Zeros without a gradient: (B, C, h, w) to (B, C, ⌈h/stride⌉, ⌈w/stride⌉)."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class FactorizedReduce(nn.Module):
    """Halves the sides: (B, C, h, w) to (B, C', ⌈h/2⌉, ⌈w/2⌉), C' even.

    BN of two strided 1×1 convolutions of relu(x) side by side, the second of which sees the pixels that lie one further
    down and to the right. An odd side has one pixel too few for the second, and gets a row or column of zeros more.
    """

    def __init__(self, in_channels: int, out_channels: int, *, affine: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.conv2 = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        height, width = x.shape[-2:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, width % 2, 0, height % 2))
        halves = torch.cat([self.conv1(x), self.conv2(x[:, :, 1:, 1:])], dim=1)
        reduced: Tensor = self.bn(halves)
        return reduced


def skip(channels: int, stride: int, *, affine: bool) -> nn.Module:
    """The identity, or where the stride is 2 its nearest: (B, C, h, w) to (B, C, ⌈h/stride⌉, ⌈w/stride⌉)."""
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine=affine)


def separable(channels: int, kernel: int, stride: int, *, affine: bool) -> nn.Sequential:
    """ReLU-depthwise-pointwise-BN twice: (B, C, h, w) to (B, C, ⌈h/stride⌉, ⌈w/stride⌉)."""
    layers: list[nn.Module] = []
    for step in (stride, 1):
        layers += [
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel, step, kernel // 2, groups=channels, bias=False),
            nn.Conv2d(channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels, affine=affine),
        ]
    return Layers(*layers)


class Node(nn.Module):
    """The sum of its edges: a list of maps, of which each edge reads one, to a map (B, C, h, w)."""

    def __init__(self, edges: Sequence[Edge]) -> None:
        super().__init__()
        self.inputs = [index for index, _ in edges]
        self.operations = nn.ModuleList(operation for _, operation in edges)

    def forward(self, maps: list[Tensor]) -> Tensor:
        results = [operation(maps[index]) for index, operation in zip(self.inputs, self.operations, strict=True)]
        total: Tensor = functools.reduce(torch.add, results)
        return total

    def extra_repr(self) -> str:
        # Experts are stacked if their descriptions agree; without this, two wirings of the same operations would.
        return f"inputs={self.inputs}"


class Cell(nn.Module):
    """Two maps (B, C0, h0, w0) and (B, C1, h, w) to the concatenation of the nodes (B, 4·channels, h', w').

    h0 = h and h' = h, but for h' = ⌈h/2⌉ in a reduction cell, whose operations on inputs 0 and 1 have stride 2, and
    h = ⌈h0/2⌉ right behind one.

    Args:
        before: C0 and C1.
        channels: of each node.
        nodes: the edges of each.
        behind_reduction: whether the cell before the last is twice as high and wide as the last.
        affine: whether BatchNorm has weights and biases.
    """

    def __init__(
        self,
        before: tuple[int, int],
        channels: int,
        nodes: Iterable[Sequence[Edge]],
        *,
        behind_reduction: bool,
        affine: bool,
    ) -> None:
        super().__init__()
        self.preprocess0 = (
            FactorizedReduce(before[0], channels, affine=affine)
            if behind_reduction
            else _pointwise(before[0], channels, affine)
        )
        self.preprocess1 = _pointwise(before[1], channels, affine)
        self.nodes = nn.ModuleList(Node(edges) for edges in nodes)

    def forward(self, before_last: Tensor, last: Tensor) -> Tensor:
        maps = [self.preprocess0(before_last), self.preprocess1(last)]
        for node in self.nodes:
            maps.append(node(maps))
        return torch.cat(maps[2:], dim=1)


class Cells(nn.Module):
    """A stage of cells, each of which takes the outputs of the two before it: side by side, (B, C0 + C1, h, w).

    Args:
        cells: in their order.
        channels: C0; None takes one map as both, which is the stem's.
        is_last: returns the last cell's output alone, which is what the classifier sees.
    """

    def __init__(self, cells: Iterable[Cell], channels: int | None, *, is_last: bool) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.channels = channels
        self.is_last = is_last

    def forward(self, x: Tensor) -> Tensor:
        before_last, last = (x, x) if self.channels is None else (x[:, : self.channels], x[:, self.channels :])
        for cell in self.cells:
            before_last, last = last, cell(before_last, last)
        return last if self.is_last else torch.cat([before_last, last], dim=1)


def cell_network(
    nodes: Callable[[int, int, bool], Iterable[Sequence[Edge]]],
    num_classes: int,
    channels: int,
    cells: int,
    *,
    affine: bool,
    in_channels: int = 3,
) -> StagedNetwork:
    """A network of cells: images (B, in_channels, H, W) to logits (B, num_classes).

    Stages: `stem`, a convolution to 3·channels; `cells1`, `cells2` and `cells3`, the cells before the first
    reduction cell, from there to before the second, and the rest. On 32×32 images their maps are 32×32, 32×32, 16×16
    and 8×8. What leaves `cells1` and `cells2` are the last two cells' outputs side by side, because the next cell
    reads both: Grad-CAM's activations there are those of two cells.

    Weights start as PyTorch draws them, as in the authors' code: no call of `staged.initialise`, which takes a
    depthwise convolution's fan-out for that of a full one.

    Args:
        nodes: the edges of each node of a cell, from the cell's number, its channels, and whether it reduces.
        num_classes: K.
        channels: of each node of the first cells, C; their output has 4·C.
        cells: how many.
        affine: whether the cells' BatchNorm has weights and biases; the stem's has.
        in_channels: of the images.

    Raises:
        ValueError: `channels` is below 1 or `cells` below `MIN_CELLS`.
    """
    if channels < 1:
        raise ValueError(f"channels: expected at least 1, got {channels}")
    if cells < MIN_CELLS:
        raise ValueError(f"number of cells: expected at least {MIN_CELLS}, got {cells}")
    reductions = (cells // 3, 2 * cells // 3)
    starts = (0, *reductions)
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    width = 3 * channels
    stages["stem"] = Layers(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
    before = (width, width)
    for stage, (start, end) in enumerate(zip(starts, (*reductions, cells), strict=True)):
        crossing = None if stage == 0 else before[0]
        members: list[Cell] = []
        for number in range(start, end):
            reduction = number in reductions
            edges = nodes(number, channels << stage, reduction)
            cell = Cell(before, channels << stage, edges, behind_reduction=number - 1 in reductions, affine=affine)
            members.append(cell)
            before = (before[1], NODES * (channels << stage))
        stages[f"cells{stage + 1}"] = Cells(members, crossing, is_last=end == cells)
    stages["classifier"] = classifier(before[1], num_classes)
    return StagedNetwork(stages)


def reaches_output(edges: Iterable[Iterable[int]]) -> bool:
    """Whether a cell's output depends on its inputs, from what each node reads other than through zeros."""
    alive = {0, 1}
    for number, inputs in enumerate(edges, start=2):
        if not alive.isdisjoint(inputs):
            alive.add(number)
    return len(alive) > 2


def _pointwise(in_channels: int, out_channels: int, affine: bool) -> nn.Sequential:
    return Layers(
        nn.ReLU(), nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels, affine=affine)
    )
