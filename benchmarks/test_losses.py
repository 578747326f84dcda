"""Time of the losses on this machine, on whatever kernels it has; `pytest benchmarks --benchmark-only`."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.functional import heatmap_losses, mixture_cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXPERTS, CLASSES = 5, 10
MAPS = [(32, 16, 16), (128, 16, 16), (256, 8, 8)]


def synchronised(function: Callable[[], object]) -> Callable[[], None]:
    """The function and whatever it has queued on the device."""

    def run() -> None:
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


def describe(benchmark: BenchmarkFixture) -> None:
    """Where the record was made."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    benchmark.extra_info |= {"device": name, "torch": torch.__version__, "backend": "torch"}


@pytest.mark.benchmark(group="heatmap losses")
@pytest.mark.parametrize("maps", MAPS, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_heatmap_losses(benchmark: BenchmarkFixture, maps: tuple[int, int, int], backward: bool) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    activations, gradients = (
        torch.randn(EXPERTS, 32, *maps, generator=generator, device=DEVICE).requires_grad_() for _ in range(2)
    )

    def run() -> None:
        information, stability = heatmap_losses(activations, gradients, size=(32, 32))
        if backward:
            torch.autograd.grad(information.sum() + 1e-5 * stability, (activations, gradients))

    describe(benchmark)
    benchmark(synchronised(run))


@pytest.mark.benchmark(group="mixture cross-entropy")
@pytest.mark.parametrize("samples", [32, 512])
def test_mixture_cross_entropy(benchmark: BenchmarkFixture, samples: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(EXPERTS, samples, CLASSES, generator=generator, device=DEVICE).requires_grad_()
    gate = torch.randn(samples, EXPERTS, generator=generator, device=DEVICE).softmax(-1).requires_grad_()
    targets = torch.zeros(samples, dtype=torch.int64, device=DEVICE)
    describe(benchmark)
    benchmark(
        synchronised(
            lambda: torch.autograd.grad(mixture_cross_entropy(logits, gate, targets, 1.0).sum(), (logits, gate))
        )
    )


@pytest.mark.benchmark(group="forward and backward, 5 × ResNet8, 32 images")
@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("loss", ["cross-entropy", "full", "detached"])
def test_training_pass(benchmark: BenchmarkFixture, batching: str, loss: str) -> None:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", EXPERTS, CLASSES, batching="vmap" if batching == "vmap" else "loop").to(DEVICE)
    weights = {"beta": 0.0, "gamma": 0.0} if loss == "cross-entropy" else {}
    loss_fn = FusedImmunityLoss(**weights, detach_weights=loss == "detached")
    images: Tensor = torch.rand(32, 3, 32, 32, device=DEVICE)
    targets = torch.arange(32, device=DEVICE) % CLASSES

    def run() -> None:
        logits, activations, gate = model.expert_outputs(images)
        loss_fn(logits, activations, targets, gate).backward()
        model.zero_grad()

    describe(benchmark)
    benchmark(synchronised(run))
