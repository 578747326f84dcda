"""The fused cross-entropy of targets that are distributions against the float64 reference, forward and backward."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from immunity_fast.functional import mixture_cross_entropy
from immunity_fast.kernels import launch
from immunity_fast.kernels import soft_cross_entropy as fused
from tests.kernels.cases import DEVICE, assert_as_exact_as, error, leaves, normal, seeded

pytestmark = pytest.mark.gpu


class Soft(NamedTuple):
    """A case: how logits and targets lie in memory, and what is asked besides."""

    shape: tuple[int, int, int]
    order: tuple[int, int, int]
    gate: bool
    shut: bool
    dtype: torch.dtype
    scale: float
    alpha: float
    targets: str  # "labels", "probabilities", "transposed" in memory, "differentiated"
    smoothing: float
    weighted: bool
    ignored: bool
    seed: int

    def inputs(self) -> tuple[list[Tensor], Tensor]:
        """[logits] or [logits, gate], and the targets."""
        experts, samples, classes = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        logits = (self.scale * normal(*self.shape, seed=self.seed)).to(self.dtype)
        back = [self.order.index(axis) for axis in range(3)]
        inputs = [logits.permute(self.order).contiguous().permute(back)]
        if self.gate:
            gate = normal(samples, experts, seed=self.seed + 1).softmax(-1)
            if self.shut:
                gate[..., 0] = 0
                gate = gate / gate.sum(-1, keepdim=True)
            inputs.append(gate)
        if self.targets == "labels":
            targets = torch.randint(classes, (samples,), generator=generator).to(DEVICE)
        else:
            targets = (3 * normal(samples, classes, seed=self.seed + 2)).softmax(-1)
            targets = targets.T.contiguous().T if self.targets == "transposed" else targets
        if self.ignored:
            targets[::2] = -100
        return inputs, targets

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of `mixture_cross_entropy`."""
        weights = normal(self.shape[2], seed=self.seed + 3).abs() if self.weighted else None
        return {"label_smoothing": self.smoothing, "class_weights": weights}


cases = st.builds(
    Soft,
    shape=st.tuples(st.integers(2, 8), st.integers(0, 4), st.sampled_from([1, 2, 10, 63, 65, 1100])),
    order=st.permutations([0, 1, 2]).map(tuple),
    gate=st.booleans(),
    shut=st.booleans(),
    dtype=st.sampled_from(launch.DTYPES),
    scale=st.sampled_from([0.1, 3.0, 20.0]),
    alpha=st.sampled_from([0.0, 0.3, 2.0]),
    targets=st.sampled_from(["labels", "probabilities", "transposed", "differentiated"]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
    ignored=st.booleans(),
    seed=st.integers(0, 10**6),
)


def _run(case: Soft, inputs: list[Tensor], targets: Tensor, backend: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    gate = inputs[1] if case.gate else None
    losses = mixture_cross_entropy(inputs[0], gate, targets, case.alpha, **case.options, backend=backend)
    upstream = normal(*losses.shape, seed=5).to(losses)
    differentiated = [*inputs, targets] if targets.requires_grad else inputs
    return losses, torch.autograd.grad(losses, differentiated, upstream, materialize_grads=True)


@seeded(12)
@given(cases)
def test_loss_and_gradients_are_as_exact_as_float32_can_be(case: Soft) -> None:
    inputs, targets = case.inputs()
    if case.targets == "differentiated":
        targets.requires_grad_()
    exact_targets = targets.detach().double().requires_grad_(targets.requires_grad) if targets.dim() == 2 else targets
    actual, derivatives = _run(case, leaves(inputs), targets, "triton")
    exact = _run(case, leaves(inputs, torch.float64), exact_targets, "torch")
    reference = _run(case, leaves(inputs, torch.float32), targets, "torch")
    size = 4 * (1 + case.alpha * case.shape[0]) * (case.shape[2] if case.weighted else 1) ** 0.5
    assert_as_exact_as(actual, reference[0], exact[0], torch.float32, floor=case.scale * size)
    dtypes = [*(leaf.dtype for leaf in inputs), torch.float32]
    for ours, theirs, wanted, dtype in zip(derivatives, reference[1], exact[1], dtypes, strict=False):
        assert_as_exact_as(ours, theirs, wanted, dtype, floor=case.scale * size)


@pytest.mark.parametrize("gate", [None, [0.7, 0.0, 0.3]])
def test_a_distribution_of_one_class_is_its_label(gate: list[float] | None) -> None:
    weights = None if gate is None else torch.tensor(gate, device=DEVICE)
    inputs = leaves([20 * normal(3, 5, 13), *([] if weights is None else [weights])])
    labels = torch.tensor([0, 12, 4, 4, 7], device=DEVICE)
    targets = torch.nn.functional.one_hot(labels, 13).float()
    found = []
    for each in (labels, targets):
        losses = mixture_cross_entropy(inputs[0], inputs[1] if len(inputs) > 1 else None, each, 0.5, backend="triton")
        found.append([losses, *torch.autograd.grad(losses.sum(), inputs)])
    for one, other in zip(*found, strict=True):
        assert error(one, other) <= 2e-5 * max(1.0, float(other.detach().abs().max()))


def test_impossible_classes_that_nothing_asks_for_are_left_out() -> None:
    """0·log 0 is 0, in the loss and in its gradient, though one expert, or all, give the class no probability."""
    logits = normal(2, 3, 5)
    logits[..., 4] = -torch.inf
    logits[0, :, 3] = -torch.inf
    targets = torch.tensor([[0.5, 0.25, 0.25, 0.0, 0.0]], device=DEVICE).expand(3, 5)
    found = []
    for backend, cut in (("triton", 5), ("torch", 5), ("torch", 4)):
        (leaf,) = leaves([logits[..., :cut]])
        losses = mixture_cross_entropy(leaf, None, targets[:, :cut], 1.0, backend=backend)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        assert gradient.isfinite().all()
        found.append((losses, gradient[..., :4]))
    for losses, gradient in found[:2]:
        assert error(losses, found[2][0]) <= 1e-5
        assert error(gradient, found[2][1]) <= 1e-5


def test_loss_where_every_probability_underflows() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, -1e4, 1e4]]], device=DEVICE, requires_grad=True)
    targets = torch.tensor([[0.0, 0.5, 0.5]], device=DEVICE)
    loss = mixture_cross_entropy(logits, None, targets, 0.25, backend="triton")
    loss.sum().backward()
    own = 0.5 * (2e4 + 1e4) + 0.5 * 2e4
    assert loss.tolist() == pytest.approx([0.5 * (2e4 + math.log(2)) + 0.25 * own], rel=1e-6)
    assert logits.grad is not None
    expected = torch.tensor([[[0.5, -0.375, -0.125]], [[0.0, -0.375, 0.375]]], device=DEVICE)
    torch.testing.assert_close(logits.grad, expected)


def test_a_shut_gate_whose_expert_is_far_likelier_stays_finite() -> None:
    inputs = leaves([torch.tensor([[[0.0, 1e4]], [[0.0, 0.0]]], device=DEVICE), torch.eye(2, device=DEVICE)[0]])
    targets = torch.tensor([[0.5, 0.5]], device=DEVICE)
    losses = mixture_cross_entropy(*inputs, targets, 0.0, backend="triton")
    assert losses.tolist() == [5e3]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses.sum(), inputs))


def test_a_second_derivative_raises() -> None:
    (logits,) = leaves([normal(2, 3, 5)])
    losses = mixture_cross_entropy(logits, None, normal(3, 5).softmax(-1), 1.0, backend="triton")
    (first,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="backend: expected 'torch' for a second derivative"):
        torch.autograd.grad(first.square().sum(), logits)


@pytest.mark.parametrize("samples", [0, 3])
def test_ops_are_what_the_compiler_takes_them_for(samples: int) -> None:
    logits, gate = leaves([normal(2, samples, 5), normal(samples, 2, seed=1).softmax(-1)])
    (coefficients,) = leaves([normal(samples, 5, seed=2).softmax(-1)])
    torch.library.opcheck(fused.soft_mixture_cross_entropy, (logits, gate, coefficients, 0.5))
    inputs = [leaf.detach() for leaf in (logits, gate, coefficients)]
    _, statistics = fused.soft_mixture_cross_entropy(*inputs, 0.5)
    for needs in (False, True):
        arguments = (normal(samples), *inputs, statistics, 0.5, needs)
        torch.library.opcheck(fused.soft_mixture_cross_entropy_backward, arguments)


def test_compiled_with_a_dynamic_batch_it_is_one_graph() -> None:
    def loss(logits: Tensor, gate: Tensor, targets: Tensor) -> Tensor:
        return 2 * mixture_cross_entropy(logits, gate, targets, 0.5, label_smoothing=0.1, backend="triton").sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (6, 4):
        inputs = leaves([normal(2, samples, 5), normal(samples, 2, seed=1).softmax(-1)])
        targets = normal(samples, 5, seed=2).softmax(-1)
        targets[0] = -100
        actual, expected = compiled(*inputs, targets), loss(*inputs, targets)
        torch.testing.assert_close(actual, expected)
        for one, other in zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(one, other)
