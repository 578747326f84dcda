"""RobNets (arXiv 1911.10695, "When NAS Meets Robustness").

The cells are those of the authors' repository, gmh14/RobNets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from immunity_fast.experts.cells import NODES, Edge, Zero, cell_network, reaches_output, separable, skip
from immunity_fast.experts.staged import StagedNetwork
from immunity_fast.experts.widths import scaled

# One for each pair of a node and what it can read: node 0's two inputs, node 1's three, …
EDGES = sum(range(2, NODES + 2))

ROBNET_LARGE: tuple[str, ...] = ("11 11 11 11 11 01 11 01 10 11 01 01 01 11",)
"""The cell of RobNet-large, which all its layers share."""

ROBNET_FREE: tuple[str, ...] = (
    "11 10 11 11 10 11 01 01 10 11 11 00 11 01",
    "11 00 01 10 01 00 10 10 00 01 11 10 11 00",
    "11 11 11 01 01 11 01 00 10 00 10 10 00 11",
    "10 11 10 01 01 10 10 01 10 11 00 00 01 10",
    "11 11 01 00 10 10 10 01 10 01 00 10 01 11",
    "11 10 11 11 11 01 10 11 00 10 01 11 01 11",
    "11 11 11 10 10 01 11 10 01 10 10 10 01 10",
    "01 11 11 11 01 11 11 11 01 11 01 11 10 00",
    "11 11 11 11 11 01 01 11 10 01 00 10 01 11",
    "10 11 01 00 11 11 10 11 01 11 11 11 11 00",
    "11 10 11 00 00 00 11 00 01 10 00 01 10 11",
    "01 11 01 11 11 10 10 11 10 11 01 11 10 00",
    "11 11 10 10 01 00 10 11 11 01 10 10 00 01",
    "01 11 11 11 01 01 11 01 01 11 11 01 10 10",
    "01 11 11 11 11 01 00 01 10 10 11 10 10 11",
    "11 11 00 11 11 01 00 01 10 00 11 01 11 11",
    "11 11 01 11 11 10 11 10 10 10 10 10 11 11",
    "10 11 01 11 11 01 11 00 11 11 00 10 00 01",
    "11 10 11 11 11 11 11 10 11 00 11 01 11 11",
    "11 11 01 01 11 11 01 00 00 10 00 01 01 11",
)
"""The 20 cells of RobNet-free, each of its own."""


def robnet_network(
    cells_codes: Sequence[str], num_classes: int, channels: int, layers: int, in_channels: int = 3
) -> StagedNetwork:
    """The network of RobNet cells: images (B, in_channels, H, W) to logits (B, num_classes).

    A cell is 14 codes of two bits, one for each edge, separated by spaces: node by node, and for node k what it reads
    from input 0 to input k + 1, of which 0 and 1 are the outputs of the two cells before and the others the nodes
    before. The first bit is a skip connection (where the stride is 2, a factorised reduction), the second a separable
    3×3 convolution; with both the edge is their sum, with none it is not there. A node is the sum of its edges.

    The cells' BatchNorm has no weights and biases. Stages `stem`, `cells1`, `cells2`, `cells3`; sizes and what Grad-CAM
    sees: `cells.cell_network`.

    Args:
        cells_codes: a cell for each layer, or one that all layers share.
        num_classes: K.
        channels: of each node of the first cells.
        layers: how many cells.
        in_channels: of the images.

    Raises:
        ValueError: the codes are wrong, see `parse_cells`; `channels` or `layers` are too few, see
            `cells.cell_network`.
    """
    cells = parse_cells(cells_codes, layers)

    def nodes(number: int, channels: int, reduction: bool) -> Iterator[Sequence[Edge]]:
        for codes in cells[number % len(cells)]:
            edges: list[Edge] = []
            for index, code in enumerate(codes):
                stride = 2 if reduction and index < 2 else 1
                if code[1] == "1":
                    edges.append((index, separable(channels, 3, stride, affine=False)))
                if code[0] == "1":
                    edges.append((index, skip(channels, stride, affine=False)))
            yield edges or [(0, Zero(2 if reduction else 1))]

    return cell_network(nodes, num_classes, channels, layers, affine=False, in_channels=in_channels)


def parse_cells(cells_codes: Sequence[str], layers: int) -> list[list[list[str]]]:
    """The codes of each cell's nodes: one cell, or one for each layer; see `robnet_network`.

    Raises:
        ValueError: another number of cells, a cell that is not 14 codes of two bits, or one whose output does not
            depend on its inputs.
    """
    if len(cells_codes) not in (1, layers):
        raise ValueError(f"cells: expected 1 or one for each of the {layers} layers, got {len(cells_codes)}")
    return [_parse(number, codes) for number, codes in enumerate(cells_codes)]


def _parse(number: int, codes: str) -> list[list[str]]:
    found = codes.split()
    if len(found) != EDGES:
        raise ValueError(f"cells[{number}]: expected {EDGES} codes, got {len(found)}")
    for place, code in enumerate(found):
        if not re.fullmatch("[01]{2}", code):
            raise ValueError(f"cells[{number}]: code {place}: expected 00, 01, 10 or 11, got {code!r}")
    rest = iter(found)
    nodes = [[next(rest) for _ in range(node + 2)] for node in range(NODES)]
    if not reaches_output([index for index, code in enumerate(node) if code != "00"] for node in nodes):
        raise ValueError(
            f"cells[{number}]: expected an output that depends on the inputs, got 00 codes that cut it off"
        )
    return nodes


def robnet_large(num_classes: int, in_channels: int = 3, times: float = 1.0) -> StagedNetwork:
    """RobNet-large-v1, 36 channels and 20 layers, the channels times a width: see `robnet_network`."""
    return robnet_network(ROBNET_LARGE, num_classes, channels=scaled(36, times), layers=20, in_channels=in_channels)


def robnet_large_v2(num_classes: int, in_channels: int = 3, times: float = 1.0) -> StagedNetwork:
    """RobNet-large-v2, 64 channels and 33 layers, the channels times a width: see `robnet_network`."""
    return robnet_network(ROBNET_LARGE, num_classes, channels=scaled(64, times), layers=33, in_channels=in_channels)


def robnet_free(num_classes: int, in_channels: int = 3, times: float = 1.0) -> StagedNetwork:
    """RobNet-free, 36 channels and 20 layers, the channels times a width: see `robnet_network`."""
    return robnet_network(ROBNET_FREE, num_classes, channels=scaled(36, times), layers=20, in_channels=in_channels)
