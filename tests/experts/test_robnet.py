"""RobNets against a plain forward pass, their published sizes, and what a cell may say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import torch

from immunity_fast.experts.cells import Zero
from immunity_fast.experts.robnet import (
    ROBNET_FREE,
    ROBNET_LARGE,
    robnet_free,
    robnet_large,
    robnet_large_v2,
    robnet_network,
)
from immunity_fast.experts.staged import StagedNetwork
from tests import grids
from tests.cell_reference import Reference, images, stir

# A node of zeros alone in any cell, and one that reads it.
WITH_ZEROS = "11 10 00 00 00 10 11 01 00 01 00 11 00 00"
CELLS: dict[str, tuple[Sequence[str], int]] = {
    "large": (ROBNET_LARGE, 6),
    "free": (ROBNET_FREE[:5], 5),
    "free, later cells": (ROBNET_FREE[9:15], 6),
    "zeros": ((WITH_ZEROS,), 6),
}


@pytest.mark.parametrize(
    ("build", "expected"),
    grids.sampled(
        [(robnet_free, 5_439_790), (robnet_large, 6_842_710), (robnet_large_v2, 33_326_666)],
        ordinary=lambda build, _: build is not robnet_large,  # whose cell the second version has, too
    ),
)
def test_parameter_count(build: Callable[[int], StagedNetwork], expected: int) -> None:
    """The authors' networks have 5.440 M, 6.843 M and 33.327 M."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build(10).parameters() if p.requires_grad) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CELLS)
def test_against_a_plain_forward_pass(name: str, training: bool) -> None:
    codes, layers = CELLS[name]
    network = stir(robnet_network(codes, 3, 4, layers)).train(training)
    reference = Reference(network, affine=False)
    before_last = last = reference.stem(images(8, 12))
    for number in range(layers):
        behind_reduction = number - 1 in (layers // 3, 2 * layers // 3)
        maps = [reference.reduce(before_last) if behind_reduction else reference.pointwise(before_last)]
        maps.append(reference.pointwise(last))
        edges = iter(codes[0 if len(codes) == 1 else number].split(" "))
        for node in range(4):
            total = torch.zeros((), dtype=torch.float64)
            for index in range(node + 2):
                stride = 2 if number in (layers // 3, 2 * layers // 3) and index < 2 else 1
                code = next(edges)
                result = 0 * maps[index][:, :, ::stride, ::stride]
                if code in ("01", "11"):
                    result = result + reference.separable(maps[index], 3, stride)
                if code in ("10", "11"):
                    result = result + reference.skip(maps[index], stride)
                total = total + result
            maps.append(total)
        before_last, last = last, torch.cat(maps[2:], 1)
    assert last.shape == (2, 64, 2, 3)
    expected = reference.classify(last)
    assert expected.std() > 0.1
    torch.testing.assert_close(network(images(8, 12)), expected, rtol=1e-10, atol=1e-10)


def test_zeros_are_computed_only_where_a_node_has_nothing_else() -> None:
    assert sum(isinstance(module, Zero) for module in robnet_network([WITH_ZEROS], 3, 4, 6).modules()) == 6


def test_one_cell_is_shared_as_codes_not_as_weights() -> None:
    network = robnet_network(ROBNET_LARGE, 3, 4, 6)
    assert repr(network) == repr(robnet_network(ROBNET_LARGE * 6, 3, 4, 6))
    assert len(list(network.parameters())) == len(list(network.named_parameters(remove_duplicate=False)))


GOOD = ROBNET_LARGE[0]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([], "cells: expected 1 or one for each of the 6 layers, got 0"),
        ([GOOD] * 5, "cells: expected 1 or one for each of the 6 layers, got 5"),
        ([GOOD[:-3]], "cells[0]: expected 14 codes, got 13"),
        ([GOOD] * 5 + [GOOD + " 11"], "cells[5]: expected 14 codes, got 15"),
        ([GOOD[:-2] + "12"], "cells[0]: code 13: expected 00, 01, 10 or 11, got '12'"),
        (["0" + GOOD], "cells[0]: code 0: expected 00, 01, 10 or 11, got '011'"),
        (["1" + GOOD[2:]], "cells[0]: code 0: expected 00, 01, 10 or 11, got '1'"),
        (
            [" ".join(["00"] * 14)],
            "cells[0]: expected an output that depends on the inputs, got 00 codes that cut it off",
        ),
        (
            ["00 00 00 00 11 00 00 11 11 00 00 01 10 11"],
            "cells[0]: expected an output that depends on the inputs, got 00 codes that cut it off",
        ),
    ],
)
def test_wrong_cells(codes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        robnet_network(codes, 3, 4, 6)
