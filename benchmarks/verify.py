"""No number without a check: results and gradients of an operation against the reference in float64, on its own inputs.

The rule needs no tolerance chosen by hand: an error may be twice that of the PyTorch reference in the inputs' own
precision, and a few units of rounding beside, because the reference may be lucky.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.cases import EAGER, Case, Inputs, Operation

ROUNDINGS = 32  # of float32 arithmetic, each in units of the largest number; storing the result is one of its dtype
ELEMENTS_AT_ONCE = 1 << 26  # what is compared in float64 takes memory


class Reference:
    """What a case's operations must give for `inputs`, and how far from it they may be."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        eager = case.operations()[EAGER]
        self.inputs = inputs
        self.expected = results(eager, in_float64(inputs))
        self.errors = largest_errors(results(eager, inputs), self.expected)

    def check(self, operation: Operation) -> None:
        """AssertionError, which says what is wrong and by how much."""
        found = results(operation, self.inputs)
        errors = largest_errors(found, self.expected)
        for index, (tensor, expected, error, usual) in enumerate(
            zip(found, self.expected, errors, self.errors, strict=True)
        ):
            first = len(self.inputs.upstream)
            name = f"result {index}" if index < first else f"gradient {index - first}"
            rounding = ROUNDINGS * torch.finfo(torch.float32).eps + torch.finfo(tensor.dtype).eps
            allowed = 2 * usual + rounding * float(expected.abs().max())
            if not error <= allowed:  # NaN is an error, too
                raise AssertionError(
                    f"{name} is off by {error:.3g}; the reference in its own precision by {usual:.3g}; "
                    f"allowed {allowed:.3g}"
                )


def results(operation: Operation, inputs: Inputs) -> list[Tensor]:
    """What the operation returns, and after that ∂L/∂(each argument that is wanted)."""
    found = operation(*inputs.arguments)
    gradients = torch.autograd.grad(found, inputs.wanted, inputs.upstream)
    return [*(tensor.detach() for tensor in found), *gradients]


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers, and the same of them wanted."""
    arguments = [
        argument.detach().double().requires_grad_(argument.requires_grad) if argument.is_floating_point() else argument
        for argument in inputs.arguments
    ]
    return Inputs(tuple(arguments), tuple(tensor.double() for tensor in inputs.upstream))


def largest_errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Largest |found − expected| of each tensor."""
    return [_largest_error(*pair) for pair in zip(found, expected, strict=True)]


def _largest_error(found: Tensor, expected: Tensor) -> float:
    """By slices of the second axis, which holds the samples of all that is large."""
    assert found.shape == expected.shape
    if found.dim() < 2:
        return float((found.double() - expected).abs().max())
    rows = max(1, ELEMENTS_AT_ONCE * found.shape[1] // found.numel())
    slices = zip(torch.split(found, rows, 1), torch.split(expected, rows, 1), strict=True)
    return float(torch.stack([(f.double() - e).abs().max() for f, e in slices]).max())
