"""What the losses add to a training pass of five small experts; `pytest benchmarks --benchmark-only`."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import machine
from benchmarks.cases import DEVICE, EXPERTS
from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.losses import BETA, GAMMA

CLASSES = 10


@pytest.mark.benchmark(group="forward and backward, 5 × ResNet8, 32 images")
@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("loss", ["cross-entropy", "full", "detached"])
def test_training_pass(benchmark: BenchmarkFixture, batching: str, loss: str) -> None:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", EXPERTS, CLASSES, batching="vmap" if batching == "vmap" else "loop").to(DEVICE)
    beta, gamma = (0.0, 0.0) if loss == "cross-entropy" else (BETA, GAMMA)
    loss_fn = FusedImmunityLoss(beta=beta, gamma=gamma, detach_weights=loss == "detached")
    images: Tensor = torch.rand(32, 3, 32, 32, device=DEVICE)
    targets = torch.arange(32, device=DEVICE) % CLASSES

    def run() -> None:
        logits, activations, gate = model.expert_outputs(images)
        loss_fn(logits, activations, targets, gate).backward()
        model.zero_grad()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info |= {
        "device": machine.device(),
        "versions": machine.versions(),
        "backend": "triton" if DEVICE.type == "cuda" else "torch",
        "timed": "wall clock",
    }
    benchmark(run)
