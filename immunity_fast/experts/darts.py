"""Networks of DARTS-style cells (arXiv 1806.09055), among them P-DARTS (1904.12760) and AdvRush (2108.01289).

The cells are those of the authors' repositories, chenxin061/pdarts and nutellamok/advrush.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from immunity_fast.experts.cells import NODES, Edge, Zero, cell_network, reaches_output, separable, skip
from immunity_fast.experts.folding import Layers
from immunity_fast.experts.staged import StagedNetwork
from immunity_fast.experts.widths import scaled

Pairs = tuple[tuple[str, int], ...]
CHANNELS = 36  # of each node of the first cells, as published


def _dilated(channels: int, kernel: int, stride: int) -> nn.Sequential:
    return Layers(
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, kernel - 1, dilation=2, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    )


def _crossed(channels: int, stride: int) -> nn.Sequential:
    return Layers(
        nn.ReLU(),
        nn.Conv2d(channels, channels, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(channels, channels, (7, 1), (stride, 1), (3, 0), bias=False),
        nn.BatchNorm2d(channels),
    )


# (channels, stride) to a module from (B, C, h, w) to (B, C, ⌈h/stride⌉, ⌈w/stride⌉).
_OPERATIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "none": lambda _, stride: Zero(stride),
    "skip_connect": lambda channels, stride: skip(channels, stride, affine=True),
    "max_pool_3x3": lambda _, stride: nn.MaxPool2d(3, stride, padding=1),
    "avg_pool_3x3": lambda _, stride: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
    "sep_conv_3x3": lambda channels, stride: separable(channels, 3, stride, affine=True),
    "sep_conv_5x5": lambda channels, stride: separable(channels, 5, stride, affine=True),
    "sep_conv_7x7": lambda channels, stride: separable(channels, 7, stride, affine=True),
    "dil_conv_3x3": lambda channels, stride: _dilated(channels, 3, stride),
    "dil_conv_5x5": lambda channels, stride: _dilated(channels, 5, stride),
    "conv_7x1_1x7": _crossed,
}

OPERATIONS: tuple[str, ...] = tuple(_OPERATIONS)
"""The operations that a `Genotype` may name."""


@dataclass(frozen=True)
class Genotype:
    """The two cells of a network, as DARTS writes them: for each, 8 pairs (operation, input).

    Pairs 2k and 2k + 1 are the two addends of node k. Inputs 0 and 1 are the outputs of the two cells before, inputs 2
    to k + 1 the nodes before. The cell's output is the concatenation of its four nodes.

    Args:
        normal: the pairs of the cells that keep their input's height and width.
        reduce: of the two that halve it.

    Raises:
        ValueError: another number of pairs, an operation that is not one of `OPERATIONS`, an input that is out of a
            node's range, or a cell whose output does not depend on its inputs.
    """

    normal: Pairs
    reduce: Pairs

    def __post_init__(self) -> None:
        _check("normal", self.normal)
        _check("reduce", self.reduce)


def _check(cell: str, pairs: Pairs) -> None:
    if len(pairs) != 2 * NODES:
        raise ValueError(f"{cell}: expected {2 * NODES} pairs, got {len(pairs)}")
    for number, (operation, index) in enumerate(pairs):
        if operation not in _OPERATIONS:
            raise ValueError(f"{cell}[{number}]: expected an operation of {', '.join(OPERATIONS)}, got {operation!r}")
        highest = number // 2 + 1
        # To Python true is a number, to a reader of the file it is not.
        if type(index) is not int or not 0 <= index <= highest:
            raise ValueError(f"{cell}[{number}]: expected an input of 0 to {highest}, got {index!r}")
    if not reaches_output([index for operation, index in node if operation != "none"] for node in _nodes(pairs)):
        raise ValueError(f"{cell}: expected an output that depends on the inputs, got none operations that cut it off")


def _nodes(pairs: Pairs) -> Iterator[Pairs]:
    return (pairs[number : number + 2] for number in range(0, len(pairs), 2))


PDARTS = Genotype(
    normal=(
        ("skip_connect", 0),
        ("dil_conv_3x3", 1),
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 3),
        ("sep_conv_3x3", 0),
        ("dil_conv_5x5", 4),
    ),
    reduce=(
        ("avg_pool_3x3", 0),
        ("sep_conv_5x5", 1),
        ("sep_conv_3x3", 0),
        ("dil_conv_5x5", 2),
        ("max_pool_3x3", 0),
        ("dil_conv_3x3", 1),
        ("dil_conv_3x3", 1),
        ("dil_conv_5x5", 3),
    ),
)
"""The cells that P-DARTS found on CIFAR-10."""

ADVRUSH = Genotype(
    normal=(
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_5x5", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
    ),
    reduce=(
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("dil_conv_3x3", 2),
        ("skip_connect", 0),
        ("avg_pool_3x3", 1),
        ("skip_connect", 0),
        ("skip_connect", 2),
    ),
)
"""The cells that AdvRush found on CIFAR-10."""


def darts_network(
    genotype: Genotype, num_classes: int, channels: int = CHANNELS, cells: int = 20, in_channels: int = 3
) -> StagedNetwork:
    """The evaluation network of a genotype: images (B, in_channels, H, W) to logits (B, num_classes).

    Without what only its training has, the auxiliary head and drop-path. Stages `stem`, `cells1`, `cells2`, `cells3`;
    sizes and what Grad-CAM sees: `cells.cell_network`.

    Args:
        genotype: its cells.
        num_classes: K.
        channels: of each node of the first cells.
        cells: how many.
        in_channels: of the images.

    Raises:
        ValueError: `channels` or `cells` are too few, see `cells.cell_network`.
    """

    def nodes(_: int, channels: int, reduction: bool) -> Iterator[Sequence[Edge]]:
        for pairs in _nodes(genotype.reduce if reduction else genotype.normal):
            edges = [
                (index, _OPERATIONS[operation](channels, 2 if reduction and index < 2 else 1))
                for operation, index in pairs
            ]
            # Zeros are computed only where there is nothing that they could be left out beside of.
            yield [edge for edge in edges if not isinstance(edge[1], Zero)] or edges[:1]

    return cell_network(nodes, num_classes, channels, cells, affine=True, in_channels=in_channels)


def pdarts(num_classes: int, in_channels: int = 3, times: float = 1.0) -> StagedNetwork:
    """P-DARTS, 36 channels and 20 cells, the channels times a width: see `darts_network`."""
    return darts_network(PDARTS, num_classes, scaled(CHANNELS, times), in_channels=in_channels)


def advrush(num_classes: int, in_channels: int = 3, times: float = 1.0) -> StagedNetwork:
    """AdvRush, 36 channels and 20 cells, the channels times a width: see `darts_network`."""
    return darts_network(ADVRUSH, num_classes, scaled(CHANNELS, times), in_channels=in_channels)
