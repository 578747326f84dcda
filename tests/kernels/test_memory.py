"""What the kernels read and write: everything large once, in place, and at offsets beyond 2³¹ elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import traffic
from immunity_fast.functional import gradcam_heatmaps, heatmap_losses, mixture_cross_entropy
from immunity_fast.kernels import heatmap_losses as heatmap_losses_op
from immunity_fast.kernels import scores
from tests import grids
from tests.kernels.cases import DENSE, DEVICE, LAYOUTS, error, leaves, normal

if DEVICE.type == "cuda":
    pytest.skip(
        "memory is watched in Triton's interpreter, which is for machines without a GPU", allow_module_level=True
    )

from tests.kernels import memory


def _counts(launches: list[memory.Launch], kind: str, tensor: Tensor) -> Tensor:
    """How often each element was loaded or stored, over all launches."""
    return torch.stack([each.counts(kind, tensor) for each in launches]).sum(0)


@pytest.mark.parametrize(
    ("function", "shape", "layout"),
    grids.every(
        4, [heatmap_losses, gradcam_heatmaps], [(2, 2, 37, 5, 6), (2, 1, 3, 33, 40), (2, 1, 40, 17, 17)], LAYOUTS
    ),
)
def test_each_activation_and_gradient_is_read_once_in_place(function: Any, shape: Any, layout: Any) -> None:
    inputs = leaves([layout(normal(*shape, seed=seed)) for seed in (0, 1)])
    with memory.watched() as launches:
        found = function(*inputs, backend="triton")
    assert all((_counts(launches, "loads", leaf) == 1).all() for leaf in inputs)
    with memory.watched() as launches:
        total = found.sum() if isinstance(found, Tensor) else found[0].sum() + found[1]
        grad_activations, _ = torch.autograd.grad(total, inputs)
    assert (_counts(launches, "loads", inputs[0]) == 1).all()
    assert (_counts(launches, "loads", inputs[1]) == 0).all()
    assert (_counts(launches, "stores", grad_activations) == 1).all()


@pytest.mark.parametrize(("dtype", "summed"), grids.every(2, (torch.float32, torch.float16), (False, True)))
def test_bytes_are_those_that_the_design_allows(dtype: torch.dtype, summed: bool) -> None:
    """Large tensors move what `benchmarks.traffic` counts from shapes; what else is written has a heatmap's."""
    shape, size = (3, 2, 40, 5, 6), (8, 9)
    activations = normal(*shape).to(dtype)
    gradients = normal(*(shape[:3] if summed else shape), seed=1).to(dtype)
    inputs = leaves([activations, gradients])
    with memory.watched() as launches:
        losses = heatmap_losses(*inputs, size=size, backend="triton")
    moved = sum(int(_counts(launches, "loads", leaf).sum()) * leaf.element_size() for leaf in inputs)
    assert moved == traffic.heatmap_losses_forward(shape, dtype.itemsize, summed)
    splits = len({access.program for access in launches[0].loads}) // 6
    heatmaps = 6 * ((splits + 1) * 30 + 72)
    assert _stored(launches) <= heatmaps + 6 * 40 + (7 + splits) * 6 + 9 + 2 + 1

    with memory.watched() as launches:
        grad_activations, _ = torch.autograd.grad(losses[0].sum() + losses[1], inputs)
    moved = sum(
        int(_counts(launches, kind, tensor).sum()) * tensor.element_size()
        for kind, tensor in (("loads", inputs[0]), ("stores", grad_activations))
    )
    assert moved == traffic.heatmap_losses_backward(shape, dtype.itemsize)
    assert _stored(launches) <= grad_activations.numel() + 6 * 30 + 6 * 40


def _stored(launches: list[memory.Launch]) -> int:
    """Elements that were written, each time that they were."""
    return sum(len(access.addresses) for each in launches for access in each.stores)


@pytest.mark.parametrize("layout", DENSE)
def test_detached_weights_do_not_read_activations_again(layout: Any) -> None:
    """`detach_weights`: ∂L/∂A is w·∂L/∂R, which takes the weights and small maps alone."""
    activations, gradients = leaves([layout(normal(2, 2, 37, 5, 6, seed=seed)) for seed in (0, 1)])
    information, stability = heatmap_losses(activations, gradients.detach(), backend="triton")
    with memory.watched() as launches:
        (grad_activations,) = torch.autograd.grad(information.sum() + stability, activations)
    assert (_counts(launches, "loads", activations) == 0).all()
    assert (_counts(launches, "stores", grad_activations) == 1).all()


def test_a_list_is_read_where_its_tensors_lie() -> None:
    activations = [normal(2, 5, 4, 4, seed=i).requires_grad_() for i in range(3)]
    gradients = [normal(2, 5, 4, 4, seed=5 + i) for i in range(3)]
    with memory.watched() as launches:
        heatmap_losses(activations, gradients, backend="triton")
    assert all((_counts(launches, "loads", part) == 1).all() for part in [*activations, *gradients])


def test_logits_are_read_once_forward_and_once_backward() -> None:
    (logits,) = leaves([normal(3, 4, 7)])
    with memory.watched() as launches:
        losses = mixture_cross_entropy(logits, None, torch.tensor([0, 1, 2, 3]), 1.0, backend="triton")
    labels = torch.zeros(3, 4, 7, dtype=torch.int64)
    labels[:, torch.arange(4), torch.arange(4)] = 1  # the label's own logit is read a second time
    assert torch.equal(_counts(launches, "loads", logits), 1 + labels)
    with memory.watched() as launches:
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert (_counts(launches, "loads", logits) == 1).all()
    assert (_counts(launches, "stores", gradient) == 1).all()
    moved = sum(int(_counts(launches, kind, x).sum()) * 4 for kind, x in (("loads", logits), ("stores", gradient)))
    assert moved == traffic.cross_entropy_backward(logits.shape, 4)
    assert traffic.cross_entropy_forward(logits.shape, 4) == 4 * logits.numel()


def _far_apart(values: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The values at strides of billions of elements, in memory of which only their pages are ever touched."""
    length = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
    memory = torch.from_numpy(np.empty(length, np.float16))
    apart = memory.as_strided(values.shape, strides)
    apart.copy_(values)
    return apart


@pytest.mark.parametrize(
    "strides",
    [(2**31 + 16, 64, 16, 4, 1), (64, 2**31 + 16, 16, 4, 1), (128, 64, 2**31 + 16, 4, 1), (128, 64, 16, 4, 2**29 + 1)],
    ids=["expert", "sample", "channel", "column"],
)
def test_offsets_beyond_two_to_the_31_elements(strides: tuple[int, ...]) -> None:
    near = [normal(2, 2, 2, 3, 4, seed=seed, dtype=torch.float16) for seed in (0, 1)]
    if strides[-1] > 1:
        strides = (*strides[:3], 1, strides[-1])
    far = leaves([_far_apart(values, strides) for values in near])
    near = leaves(near)
    found = [heatmap_losses(*inputs, size=(5, 5), backend="triton") for inputs in (far, near)]
    for one, other in zip(*found, strict=True):
        assert error(one, other) <= 1e-5 * (1 + float(other.detach().abs().max()))
    gradients = [
        torch.autograd.grad(losses[0].sum() + losses[1], inputs)
        for losses, inputs in zip(found, (far, near), strict=True)
    ]
    for one, other in zip(*gradients, strict=True):
        assert error(one, other) <= 2e-3 * float(other.abs().max())


def test_results_are_written_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """∂L/∂A lies as A does if that has no gaps. 2³¹ elements are more than a test has, so one with gaps is forced."""
    inputs = [normal(2, 2, 2, 3, 4, seed=seed, dtype=torch.float16) for seed in (0, 1)]
    saved = heatmap_losses_op.heatmap_losses([inputs[0]], [inputs[1]], [5, 5], True, 0.01, 0.5, "", None)
    options = (None, True, 0.01, 0.5, torch.float32, True, True)
    arguments = (torch.ones(2), torch.ones(()), [inputs[0]], *saved[2:], *options)
    expected = heatmap_losses_op.heatmap_losses_backward(*arguments)[0][0]
    far = _far_apart(torch.full_like(inputs[0], torch.nan), (2**31 + 16, 64, 2**30 + 16, 4, 1))
    monkeypatch.setattr(scores, "empty_grads", lambda _parts, sums, *_: ([far], torch.empty_like(sums)))
    heatmap_losses_op.heatmap_losses_backward(*arguments)
    assert torch.equal(far, expected)


@pytest.mark.parametrize(
    ("bug", "message"),
    [("bounds", "reaches beyond"), ("race", "two programs write"), ("read", "reads what another one writes")],
)
def test_the_watch_itself_notices(bug: str, message: str) -> None:
    """Three kernels with the mistakes that the interpreter lets pass."""
    import triton
    import triton.language as tl

    @triton.jit
    def beyond(source, target):  # type: ignore[no-untyped-def]
        tl.store(target + tl.program_id(0), tl.load(source + tl.program_id(0) + 3))

    @triton.jit
    def collide(source, target):  # type: ignore[no-untyped-def]
        tl.store(target, tl.load(source + tl.program_id(0)))

    @triton.jit
    def peek(source, target):  # type: ignore[no-untyped-def]
        tl.store(target + 1 + tl.program_id(0), tl.load(target + tl.program_id(0)))

    kernel = {"bounds": beyond, "race": collide, "read": peek}[bug]
    with pytest.raises(AssertionError, match=message):
        kernel[(4,)](torch.ones(6), torch.ones(6))
