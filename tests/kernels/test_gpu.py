"""What only a GPU can show: CUDA graphs, other streams, the default backend, real bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from immunity_fast.functional import gradcam_heatmaps, heatmap_losses, mixture_cross_entropy
from immunity_fast.kernels import launch
from tests.kernels.cases import channels_last, contiguous, error, leaves, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and streams need a GPU"),
]


def _losses(activations: Tensor, gradients: Tensor) -> tuple[Tensor, ...]:
    information, stability = heatmap_losses(activations, gradients, size=(32, 32))
    derivatives = torch.autograd.grad(information.sum() + 1e-4 * stability, (activations, gradients))
    return (information, stability, *derivatives)


@pytest.mark.parametrize("dtype", launch.DTYPES)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("shape", [(5, 32, 256, 8, 8), (5, 33, 128, 16, 16), (3, 1100, 24, 7, 7), (2, 3, 17, 56, 56)])
def test_sizes_of_real_networks_against_float64(shape: tuple[int, ...], layout: object, dtype: torch.dtype) -> None:
    inputs = leaves([layout(normal(*shape, seed=seed)).to(dtype) for seed in (0, 1)])  # type: ignore[operator]
    exact = leaves([leaf.cpu() for leaf in inputs], torch.float64)
    for ours, theirs in zip(_losses(*inputs), _losses(*exact), strict=True):
        tolerance = 1e-4 + (torch.finfo(dtype).eps if ours.dim() > 1 else 0)
        assert error(ours, theirs) <= tolerance * float(theirs.detach().abs().max())


def test_captured_in_a_cuda_graph_it_follows_its_inputs() -> None:
    """Nothing synchronises or copies from the host, and replays see the values that lie in the inputs by then."""
    inputs = leaves([normal(3, 4, 64, 8, 8), normal(3, 4, 64, 8, 8, seed=1)])
    logits, labels = leaves([normal(3, 4, 10)])[0], torch.arange(4, device="cuda")

    def step() -> list[Tensor]:
        cross_entropy = mixture_cross_entropy(logits, None, labels, 1.0)
        maps = gradcam_heatmaps(*inputs, size=(16, 16))
        return [*_losses(*inputs), maps, cross_entropy, *torch.autograd.grad(cross_entropy.sum(), logits)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for seed, leaf in enumerate([*inputs, logits]):
            leaf.copy_(normal(*leaf.shape, seed=10 + seed))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))


def test_a_thousand_runs_give_the_same_bits() -> None:
    """Races move; a fixed order of additions does not."""
    inputs = leaves([normal(5, 64, 128, 16, 16, dtype=torch.bfloat16), normal(5, 64, 128, 16, 16, seed=1)])
    expected = _losses(*inputs)
    for _ in range(1000):
        assert all(torch.equal(one, other) for one, other in zip(_losses(*inputs), expected, strict=True))


def test_another_stream_is_used_where_it_is_the_current_one() -> None:
    inputs = leaves([normal(3, 4, 64, 8, 8), normal(3, 4, 64, 8, 8, seed=1)])
    expected = _losses(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = _losses(*inputs)
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_float64_takes_the_reference_by_itself() -> None:
    inputs = leaves([normal(3, 4, 6, 5, 5, dtype=torch.float64), normal(3, 4, 6, 5, 5, seed=1, dtype=torch.float64)])
    found = _losses(*inputs)
    exact = _losses(*leaves([leaf.cpu() for leaf in inputs]))
    for ours, theirs in zip(found, exact, strict=True):
        assert error(ours, theirs) <= 1e-10 * float(theirs.detach().abs().max())
