"""The training step on a GPU: no wait for the device, CUDA graphs, half precision, channels-last."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD

from benchmarks import launches
from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.attacks import Attack, BoundAttack
from immunity_fast.data.augmentation import draw_affine
from immunity_fast.kernels.multi_tensor import same_strides
from immunity_fast.training.adversarial import InnerAttack, InnerAttackSettings
from immunity_fast.training.ema import WeightAverage
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.step import TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SAMPLES = 16


def _step(**options: Any) -> TrainStep:
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 3, 4, image_size=16, batching=options.pop("batching", "vmap")).cuda()
    loss_fn = FusedImmunityLoss(0.5, 1.0, 1e-3, size=(16, 16))
    return TrainStep(model, loss_fn, SGD(model.parameters(), 0.01, 0.9, nesterov=True, fused=True), **options)


def _batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (SAMPLES, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return images.cuda(), (torch.arange(SAMPLES) % 4).cuda(), draw_affine(SAMPLES, generator).cuda()


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("double_backprop", ["reverse", "forward"])
def test_a_step_does_not_wait_for_the_device(amp: Any, double_backprop: Any) -> None:
    step, batch = _step(amp=amp, double_backprop=double_backprop, clip_grad_norm=1.0), _batch()
    step(*batch)  # the first one compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            measured = step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert measured.isfinite().all()


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("compile", ["on", "off"])
def test_clipping_update_and_average_are_a_launch_each_unwaited(amp: Any, compile: Any) -> None:
    torch.compiler.reset()
    step, batch = _step(amp=amp, compile=compile, clip_grad_norm=1.0), _batch()
    step.optimizer = FusedSGD(step.model.parameters(), 0.01, 0.9, weight_decay=1e-3, nesterov=True)
    average = WeightAverage(step.model, 0.99)
    for _ in range(3):
        step(*batch)
        average.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            measured = step(*batch)
            average.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert measured.isfinite().all()
    count = launches.counter().count
    assert count(average.update).kernels == 1
    if amp != "fp16":  # its scaler has launches of its own
        assert count(step.update).kernels == 2
        step.clip_grad_norm = None
        assert count(step.update).kernels == 1


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("compile", ["on", "off"])
def test_gradients_come_laid_out_as_weights_are(batching: Any, compile: Any) -> None:
    """Otherwise autograd copies them, a launch each, after the compiled backward pass."""
    torch.compiler.reset()
    step, seen = _step(amp="bf16", batching=batching, compile=compile), {}
    for _ in range(3):
        step(*_batch())
    for name, parameter in step.model.experts.named_parameters():
        parameter.register_hook(lambda gradient, name=name: seen.update({name: gradient.data_ptr()}))
    step(*_batch())
    assert seen == {name: p.grad.data_ptr() for name, p in step.model.experts.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("clip", [None, 1e-2])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_one_launch_does_what_torch_does_in_many(amp: Any, clip: float | None) -> None:
    """From the same gradients: those of two trainings part, since cuDNN adds in no fixed order."""
    made = []
    for make in (FusedSGD, partial(SGD, fused=True)):
        step = _step(amp=amp, clip_grad_norm=clip, batching="loop")
        step.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, enabled=amp == "fp16")
        step.scaler.scale(torch.ones((), device="cuda"))  # which is when it makes its scale
        step.optimizer = make(step.model.parameters(), 0.01, 0.9, weight_decay=1e-3, nesterov=True)
        made.append((step, WeightAverage(step.model, 0.9, backend="auto" if make is FusedSGD else "torch")))
    (ours, _), (theirs, _) = made
    for seed in range(3):
        ours._backward(*_batch(seed))
        for parameter, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            other.grad = None if parameter.grad is None else parameter.grad.clone()
        for buffer, other in zip(ours.model.buffers(), theirs.model.buffers(), strict=True):
            other.copy_(buffer)
        for step, average in made:
            step.update()
            average.update()
    found = []
    for step, average in made:
        momenta = [state["momentum_buffer"] for state in step.optimizer.state.values()]
        found.append([*step.model.state_dict().values(), *average.tensors().values(), *momenta])
    for one, other in zip(*found, strict=True):
        assert same_strides(one, other) or one.dim() < 5
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("double_backprop", ["reverse", "forward"])
def test_cuda_graphs_train_as_eager_does(batching: Any, double_backprop: Any) -> None:
    torch.compiler.reset()
    found = []
    for compile in ("on", "off"):
        step = _step(batching=batching, double_backprop=double_backprop, compile=compile)
        found.append(torch.stack([step(*_batch(seed)) for seed in range(8)]))
        assert step.compiled == (compile == "on")
    torch.testing.assert_close(*found, rtol=2e-2, atol=1e-3)


def test_weights_are_channels_last() -> None:
    step = _step()
    for parameter in step.model.experts.parameters():
        assert parameter.dim() != 5 or parameter[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("method", ["pgd", "trades", "fgsm-rs"])
@pytest.mark.parametrize("compile", ["on", "off"])
def test_adversarial_steps_train_and_do_not_wait_for_the_device(method: Any, compile: Any) -> None:
    torch.compiler.reset()
    step = _step()
    attack = InnerAttack(step.model, InnerAttackSettings(method, steps=3), compile=compile)
    step = TrainStep(step.model, step.objective.loss_fn, step.optimizer, compile=compile, attack=attack)
    for seed in range(3):  # the first ones compile, and record graphs
        step(*_batch(seed))
    torch.cuda.set_sync_debug_mode("error")
    try:
        measured = step(*_batch(3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert measured.isfinite().all()
    assert attack.compiled == (compile == "on")


def test_a_compiled_attack_is_the_eager_one() -> None:
    torch.compiler.reset()
    model = _step().model.eval()
    model.gate.switch = "mean"
    images, labels = _batch()[0].float() / 255, _batch()[1]
    found = []
    for compile in ("on", "off"):
        attack = BoundAttack(Attack(steps=4), lambda x, _: model(x), compile=compile, device=images.device)
        found.append(attack(images, labels))
        assert attack.compiled == (compile == "on")
    # A step is a sign: where a gradient is all but zero, rounding decides it.
    assert float(((found[0] - found[1]).abs() <= 1e-6).double().mean()) > 0.99
