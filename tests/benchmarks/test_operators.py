"""The profile of what the losses add to a step: each operator is of one kind."""

from __future__ import annotations

import pytest

from benchmarks import operators
from benchmarks.step_cases import CROSS_ENTROPY, FULL, WAYS, rehearsed_cases


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::native_batch_norm_backward", "batch normalisation"),
        ("aten::threshold_backward", "ReLU, concatenation, pooling"),
        ("aten::empty_like", "memory: allocated, cleared, copied"),
        ("aten::addcmul_", "sums and products of maps and statistics"),
        ("_ConvolutionInputGradientBackward", operators.PYTHON),
        ("aten::bmm", operators.REST),
    ],
)
def test_an_operator_is_of_a_kind(name: str, kind: str) -> None:
    assert operators.kind_of(name) == kind


def test_the_losses_add_a_convolution_s_second_derivatives() -> None:
    (case,) = rehearsed_cases()
    found = operators.measured(case, WAYS[0])
    named = {each["name"]: each for each in found["operators"]}
    second = named["_ConvolutionInputGradientBackward"]
    assert second[FULL] > second[CROSS_ENTROPY] == 0
    convolutions = found["kinds"]["convolutions"]
    assert convolutions[FULL] > 0 < convolutions[CROSS_ENTROPY]
    assert operators.table(found).count("\n") == 1 + len(found["kinds"])
