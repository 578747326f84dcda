"""The fused cross-entropy of the mixture against the float64 reference, forward and backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from immunity_fast.functional import mixture_cross_entropy
from immunity_fast.kernels import cross_entropy as fused
from immunity_fast.kernels import launch
from tests.kernels.cases import DEVICE, assert_as_exact_as, error, leaves, normal, seeded

pytestmark = pytest.mark.gpu


class Mixture(NamedTuple):
    """A case: how the logits lie in memory, and what kind of gate there is."""

    shape: tuple[int, int, int]
    order: tuple[int, int, int]
    gate: str
    shut: bool
    dtype: torch.dtype
    scale: float
    alpha: float
    seed: int

    def inputs(self) -> tuple[list[Tensor], Tensor]:
        """[logits] or [logits, gate], and the labels."""
        experts, samples, classes = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        logits = (self.scale * normal(*self.shape, seed=self.seed)).to(self.dtype)
        back = [self.order.index(axis) for axis in range(3)]
        logits = logits.permute(self.order).contiguous().permute(back)
        labels = torch.randint(classes, (samples,), generator=generator).to(DEVICE)
        if self.gate == "none":
            return [logits], labels
        gate = normal(*([experts] if self.gate == "row" else [samples, experts]), seed=self.seed + 1).softmax(-1)
        if self.shut:
            gate[..., 0] = 0
            gate = gate / gate.sum(-1, keepdim=True)
        return [logits, gate], labels


mixtures = st.builds(
    Mixture,
    shape=st.tuples(st.integers(2, 8), st.integers(0, 9), st.integers(1, 70) | st.just(1100)),
    order=st.permutations([0, 1, 2]).map(tuple),
    gate=st.sampled_from(["none", "row", "rows"]),
    shut=st.booleans(),
    dtype=st.sampled_from(launch.DTYPES),
    scale=st.sampled_from([0.1, 3.0, 20.0]),
    alpha=st.sampled_from([0.0, 0.3, 2.0]),
    seed=st.integers(0, 10**6),
)


def _run(case: Mixture, inputs: list[Tensor], labels: Tensor, backend: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    losses = mixture_cross_entropy(
        inputs[0], inputs[1] if len(inputs) > 1 else None, labels, case.alpha, backend=backend
    )
    upstream = normal(*losses.shape, seed=5).to(losses)
    return losses, torch.autograd.grad(losses, inputs, upstream, materialize_grads=True)


@seeded(12)
@given(mixtures)
def test_loss_and_gradients_are_as_exact_as_float32_can_be(case: Mixture) -> None:
    inputs, labels = case.inputs()
    actual, derivatives = _run(case, leaves(inputs), labels, "triton")
    exact = _run(case, leaves(inputs, torch.float64), labels, "torch")
    reference = _run(case, leaves(inputs, torch.float32), labels, "torch")
    assert_as_exact_as(actual, reference[0], exact[0], torch.float32, floor=case.scale)
    floor = 1.0 + case.alpha
    for ours, theirs, wanted, leaf in zip(derivatives, reference[1], exact[1], inputs, strict=True):
        assert_as_exact_as(ours, theirs, wanted, leaf.dtype, floor)


def test_loss_where_every_probability_underflows() -> None:
    """Labels 2e4 below the largest logit: −log ŷ = 2e4 + log 2 − …, and each gradient is the expert's share of it."""
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, -1e4, 1e4]]], device=DEVICE, requires_grad=True)
    loss = mixture_cross_entropy(logits, None, torch.tensor([1], device=DEVICE), 0.25, backend="triton")
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([2e4 + 0.25 * 4e4], rel=1e-6)
    assert logits.grad is not None
    expected = torch.tensor([[[0.75, -0.75, 0.0]], [[0.0, -0.75, 0.75]]], device=DEVICE)
    torch.testing.assert_close(logits.grad, expected)


def test_impossible_classes_have_no_gradient() -> None:
    logits = normal(2, 3, 5)
    logits[..., 4] = -torch.inf
    (logits,) = leaves([logits])
    labels = torch.tensor([0, 1, 2], device=DEVICE)
    losses = mixture_cross_entropy(logits, None, labels, 1.0, backend="triton")
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert error(losses, mixture_cross_entropy(logits[..., :4].double(), None, labels, 1.0)) <= 1e-5
    assert gradient.isfinite().all()
    assert not gradient[..., 4].any()


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_one_hot_gate_is_the_chosen_expert_with_all_slopes(chosen: int) -> None:
    gate = torch.eye(3, device=DEVICE)[chosen]
    inputs, labels = leaves([normal(3, 4, 5), gate]), torch.tensor([0, 1, 2, 3], device=DEVICE)
    losses = mixture_cross_entropy(*inputs, labels, 0.0, backend="triton")
    expected = torch.nn.functional.cross_entropy(inputs[0][chosen], labels, reduction="none")
    assert error(losses, expected) <= 1e-6
    grad_logits, grad_gate = torch.autograd.grad(losses.sum(), inputs)
    likelihoods = inputs[0].detach().softmax(-1)[:, torch.arange(4, device=DEVICE), labels]
    assert error(grad_gate, -(likelihoods / likelihoods[chosen]).sum(-1)) <= 1e-5
    assert [bool(gradient.any()) for gradient in grad_logits] == [i == chosen for i in range(3)]


def test_a_shut_gate_whose_expert_is_far_likelier_stays_finite() -> None:
    inputs = leaves([torch.tensor([[[0.0, 1e4]], [[0.0, 0.0]]], device=DEVICE), torch.eye(2, device=DEVICE)[0]])
    losses = mixture_cross_entropy(*inputs, torch.tensor([0], device=DEVICE), 0.0, backend="triton")
    assert losses.tolist() == [1e4]
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses.sum(), inputs))


@pytest.mark.parametrize("label", [-1, 5, 2**40])
def test_a_label_out_of_range_gives_nan_and_reads_nothing(label: int) -> None:
    """On a CPU the public function refuses it; on a GPU looking would stop the device."""
    labels = torch.tensor([1, label], device=DEVICE)
    losses, _ = fused.mixture_cross_entropy(normal(2, 2, 5), torch.full((2, 2), 0.5, device=DEVICE), labels, 1.0)
    assert losses.isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_labels_of_any_integer_type_and_stride(dtype: torch.dtype) -> None:
    logits, labels = normal(2, 3, 5), torch.tensor([0, 9, 4, 9, 2, 9], dtype=dtype, device=DEVICE)[::2]
    expected = mixture_cross_entropy(logits, None, labels, 0.5, backend="torch")
    assert error(mixture_cross_entropy(logits, None, labels, 0.5, backend="triton"), expected) <= 1e-5


def test_lists_of_logits_give_what_a_tensor_gives() -> None:
    logits, labels = normal(3, 4, 5), torch.tensor([0, 1, 2, 3], device=DEVICE)
    expected = mixture_cross_entropy(logits, None, labels, 0.5, backend="triton")
    assert torch.equal(mixture_cross_entropy(list(logits), None, labels, 0.5, backend="triton"), expected)


def test_a_second_derivative_raises() -> None:
    (logits,) = leaves([normal(2, 3, 5)])
    losses = mixture_cross_entropy(logits, None, torch.tensor([0, 1, 2], device=DEVICE), 1.0, backend="triton")
    (first,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="backend: expected 'torch' for a second derivative"):
        torch.autograd.grad(first.square().sum(), logits)


@pytest.mark.parametrize("samples", [0, 3])
def test_ops_are_what_the_compiler_takes_them_for(samples: int) -> None:
    logits, gate = leaves([normal(2, samples, 5), normal(samples, 2, seed=1).softmax(-1)])
    labels = torch.arange(samples, device=DEVICE)
    torch.library.opcheck(fused.mixture_cross_entropy, (logits, gate, labels, 0.5))
    _, statistics = fused.mixture_cross_entropy(logits.detach(), gate.detach(), labels, 0.5)
    arguments = (normal(samples), logits.detach(), gate.detach(), labels, statistics, 0.5)
    torch.library.opcheck(fused.mixture_cross_entropy_backward, arguments)


def test_compiled_with_a_dynamic_batch_it_is_one_graph() -> None:
    def loss(logits: Tensor, gate: Tensor, labels: Tensor) -> Tensor:
        return 2 * mixture_cross_entropy(logits, gate, labels, 0.5, backend="triton").sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for samples in (6, 4, 7):
        inputs = leaves([normal(2, samples, 5), normal(samples, 2, seed=1).softmax(-1)])
        labels = torch.arange(samples, device=DEVICE) % 5
        actual, expected = compiled(*inputs, labels), loss(*inputs, labels)
        assert torch.equal(actual, expected)
        pairs = zip(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
