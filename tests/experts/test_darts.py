"""Networks of DARTS-style cells against a plain forward pass, their published sizes, and what a genotype may say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from immunity_fast.experts.cells import Zero
from immunity_fast.experts.darts import (
    ADVRUSH,
    OPERATIONS,
    PDARTS,
    Genotype,
    Pairs,
    advrush,
    darts_network,
    pdarts,
)
from immunity_fast.experts.staged import StagedNetwork
from tests.cell_reference import Reference, images, stir

# All operations in either cell, with a node of zeros alone and one that reads them.
EVERYTHING = Genotype(
    normal=(
        ("none", 0),
        ("none", 1),
        ("sep_conv_7x7", 0),
        ("conv_7x1_1x7", 1),
        ("max_pool_3x3", 3),
        ("none", 0),
        ("sep_conv_5x5", 2),
        ("avg_pool_3x3", 4),
    ),
    reduce=(
        ("conv_7x1_1x7", 1),
        ("max_pool_3x3", 0),
        ("none", 1),
        ("none", 0),
        ("sep_conv_7x7", 1),
        ("dil_conv_5x5", 3),
        ("none", 1),
        ("dil_conv_3x3", 0),
    ),
)
GENOTYPES = {"pdarts": PDARTS, "advrush": ADVRUSH, "everything": EVERYTHING}


@pytest.mark.parametrize(("build", "expected"), [(pdarts, 3_433_798), (advrush, 4_158_046)])
def test_parameter_count(build: Callable[[int], StagedNetwork], expected: int) -> None:
    """The authors' networks have 3.434 M and 4.158 M without the auxiliary head."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build(10).parameters() if p.requires_grad) == expected


def _operation(reference: Reference, name: str, x: Tensor, stride: int) -> Tensor:
    if name == "none":
        return 0 * x[:, :, ::stride, ::stride]
    if name == "skip_connect":
        return reference.skip(x, stride)
    if name == "max_pool_3x3":
        x = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
        return x.unfold(2, 3, stride).unfold(3, 3, stride).amax((-2, -1))
    if name == "avg_pool_3x3":
        windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)
        inside = F.pad(torch.ones_like(x), (1, 1, 1, 1)).unfold(2, 3, stride).unfold(3, 3, stride)
        return windows.sum((-2, -1)) / inside.sum((-2, -1))
    if name == "conv_7x1_1x7":
        x = reference.conv(x.clamp(min=0), (1, stride), (0, 3))
        return reference.norm(reference.conv(x, (stride, 1), (3, 0)))
    kernel = int(name[-1])
    if name.startswith("sep_conv"):
        return reference.separable(x, kernel, stride)
    assert name.startswith("dil_conv")
    return reference.norm(reference.conv(reference.depthwise(x.clamp(min=0), stride, kernel - 1, dilation=2)))


def _cell(reference: Reference, genotype: Genotype, maps: list[Tensor], reduction: bool) -> Tensor:
    for i in range(4):
        addends = []
        for name, index in (genotype.reduce if reduction else genotype.normal)[2 * i : 2 * i + 2]:
            addends.append(_operation(reference, name, maps[index], 2 if reduction and index < 2 else 1))
        maps.append(addends[0] + addends[1])
    return torch.cat(maps[2:], 1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cells", [5, 6])
@pytest.mark.parametrize("name", GENOTYPES)
def test_against_a_plain_forward_pass(name: str, cells: int, training: bool) -> None:
    genotype = GENOTYPES[name]
    network = stir(darts_network(genotype, 3, 4, cells)).train(training)
    reference = Reference(network, affine=True)
    before_last = last = reference.stem(images(8, 12))
    for number in range(cells):
        behind_reduction = number - 1 in (cells // 3, 2 * cells // 3)
        maps = [reference.reduce(before_last) if behind_reduction else reference.pointwise(before_last)]
        maps.append(reference.pointwise(last))
        reduction = number in (cells // 3, 2 * cells // 3)
        before_last, last = last, _cell(reference, genotype, maps, reduction)
    assert last.shape == (2, 64, 2, 3)
    expected = reference.classify(last)
    assert expected.std() > 0.1
    torch.testing.assert_close(network(images(8, 12)), expected, rtol=1e-10, atol=1e-10)


def test_zeros_are_computed_only_where_a_node_has_nothing_else() -> None:
    network = darts_network(EVERYTHING, 3, 4, 6)
    # One node of that kind in each cell.
    assert sum(isinstance(module, Zero) for module in network.modules()) == 6


def _with(pairs: Pairs, number: int, pair: Any) -> Pairs:
    return (*pairs[:number], pair, *pairs[number + 1 :])


@pytest.mark.parametrize(
    ("number", "pair", "message"),
    [
        (3, ("sep_conv", 0), "[3]: got operation 'sep_conv', expected one of none, skip_connect, max_pool_3x3, "),
        (0, ("none", 2), "[0]: got input 2, expected 0 to 1"),
        (1, ("none", -1), "[1]: got input -1, expected 0 to 1"),
        (5, ("skip_connect", 4), "[5]: got input 4, expected 0 to 3"),
        (7, ("skip_connect", 5), "[7]: got input 5, expected 0 to 4"),
        (7, ("skip_connect", True), "[7]: got input True, expected 0 to 4"),
        (7, ("skip_connect", 1.0), "[7]: got input 1.0, expected 0 to 4"),
    ],
)
def test_wrong_pairs(number: int, pair: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^normal{re.escape(message)}") as raised:
        Genotype(_with(PDARTS.normal, number, pair), PDARTS.reduce)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=f"^reduce{re.escape(message)}"):
        Genotype(PDARTS.normal, _with(PDARTS.reduce, number, pair))


@pytest.mark.parametrize("count", [0, 7, 9])
def test_wrong_number_of_pairs(count: int) -> None:
    with pytest.raises(ValueError, match=f"^reduce: got {count} pairs, expected 8$"):
        Genotype(PDARTS.normal, (*PDARTS.reduce, ("none", 0))[:count])


def test_a_cell_that_ignores_its_inputs() -> None:
    dead: Pairs = (("none", 0), ("none", 1)) * 3
    message = "^normal: with these none operations, the output does not depend on the inputs$"
    with pytest.raises(ValueError, match=message):
        Genotype((*dead, ("none", 0), ("none", 1)), PDARTS.reduce)
    with pytest.raises(ValueError, match=message):
        Genotype((*dead, ("sep_conv_3x3", 2), ("skip_connect", 4)), PDARTS.reduce)
    darts_network(Genotype((*dead, ("sep_conv_3x3", 2), ("skip_connect", 1)), PDARTS.reduce), 3, 4, 6)


def test_all_operations_are_tested() -> None:
    used = {operation for g in GENOTYPES.values() for operation, _ in (*g.normal, *g.reduce)}
    assert used == set(OPERATIONS)
    assert len(OPERATIONS) == 10
