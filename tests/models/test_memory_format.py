"""How a mixture's images and maps lie in memory changes no value, and is what `strategies` says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.models.stacking import channels_last_
from immunity_fast.runtime import strategies
from immunity_fast.runtime.strategies import MemoryFormat, Strategy, Use
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.step import TrainStep
from tests import grids

LAST = torch.channels_last


def _model(arch: str = "resnet8", experts: int = 2) -> ImmunityMoE:
    torch.manual_seed(0)
    return ImmunityMoE(arch, experts, 5, image_size=16, stage="layer2").double()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 3, 16, 16, dtype=torch.float64, generator=generator), torch.tensor([0, 1, 2, 3, 4])


def _step(memory_format: MemoryFormat, batching: Any, way: Any) -> ImmunityMoE:
    model = _model().train()
    model.memory_format, model.batching = memory_format, batching
    optimizer = FusedSGD(model.parameters(), 0.1, 0.9, weight_decay=1e-3, nesterov=True)
    step = TrainStep(model, FusedImmunityLoss(size=(16, 16)), optimizer, double_backprop=way, clip_grad_norm=1.0)
    for _ in range(2):  # the second with momentum
        step(*_batch())
    return model


@pytest.mark.parametrize(
    ("batching", "way"),
    grids.grid(
        ["loop", "vmap"], ["reverse", "forward"], ordinary=lambda batching, way: (batching, way) == ("loop", "reverse")
    ),
)
def test_training_is_the_same_in_both(batching: Any, way: Any) -> None:
    contiguous, last = _step("contiguous", batching, way), _step("channels_last", batching, way)
    for (name, one), (_, two) in zip(contiguous.state_dict().items(), last.state_dict().items(), strict=True):
        assert float((one - two).abs().max()) <= 1e-9 * max(1.0, float(one.abs().max())), name
    # Saved as they are by safetensors, which wants them contiguous.
    assert all(parameter.is_contiguous() for model in (contiguous, last) for parameter in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_maps_lie_as_they_are_asked_to(training: bool) -> None:
    images, _ = _batch()
    for memory_format in ("contiguous", "channels_last"):
        model = _model().train(training)
        model.memory_format = memory_format  # type: ignore[assignment]
        maps, _ = model.trunk_outputs(images)
        assert maps[1].is_contiguous(memory_format=LAST) == (memory_format == "channels_last")
        assert maps[1].is_contiguous() == (memory_format == "contiguous")


def test_a_mixture_and_its_gradients_are_the_same_in_both() -> None:
    found = []
    for memory_format in ("contiguous", "channels_last"):
        model = _model().eval()
        model.memory_format = memory_format  # type: ignore[assignment]
        model.gate.switch = "mean"
        if memory_format == "channels_last":
            channels_last_(model)
        images = _batch()[0].requires_grad_()
        outputs = model(images)
        outputs[:, 0].sum().backward()
        heatmaps = model.heatmaps(images.detach())
        found.append([outputs, images.grad, heatmaps])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_the_gradient_of_images_is_contiguous() -> None:
    """Attacks of other libraries call `view` on it."""
    model = _model().eval()
    model.memory_format = "channels_last"
    for module in (model, ImmunityMoE.from_experts(model.unstack(), gate=model.gate, image_size=16)):
        module.memory_format = "channels_last"
        images = _batch()[0].requires_grad_()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(module(images).square().sum(), images)
            assert gradient.is_contiguous()
        assert not images._backward_hooks


def test_what_is_measured_is_asked_for_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step, an attack's gradient and a pass each by its own record."""
    asked: list[Use] = []

    def fastest(device: str, arch: str = "", use: Use = "training", **_: Any) -> Strategy:
        asked.append(use)
        last: dict[Use, Any] = {"training": "contiguous", "attack": "channels_last", "inference": "contiguous"}
        return Strategy("loop", "reverse", last[use])

    monkeypatch.setattr(strategies, "fastest", fastest)
    model, (images, _) = _model(), _batch()
    for use, training, gradient in (("training", True, False), ("attack", False, True), ("inference", False, False)):
        asked.clear()
        model.train(training)
        maps, _ = model.trunk_outputs(images.clone().requires_grad_(gradient))
        assert set(asked) == {use}
        assert maps[0].is_contiguous(memory_format=LAST) == (use == "attack")
    with torch.no_grad():
        asked.clear()
        model(images.clone().requires_grad_())
        assert set(asked) == {"inference"}


def test_networks_of_ones_own_are_left_contiguous() -> None:
    """On a CPU, where they may call `view`, which channels-last maps refuse."""
    model = ImmunityMoE.from_experts(_model().float().unstack(), image_size=16)
    assert model.memory_format == "auto"
    assert model.trunk_outputs(_batch()[0].float())[0].is_contiguous()
    TrainStep(model, FusedImmunityLoss(size=(16, 16)), FusedSGD(model.parameters(), 0.1))
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_an_unknown_format_is_refused_at_once() -> None:
    model = _model()
    with pytest.raises(ValueError, match="memory_format: expected one of auto, contiguous, channels_last, got 'NHWC'"):
        model.memory_format = "NHWC"  # type: ignore[assignment]
    assert model.memory_format == "auto"


def test_the_format_is_copied_and_one_network_has_it_too() -> None:
    model = SingleNetwork("resnet8", 5, image_size=16, stage="layer2").eval()
    model.memory_format = "channels_last"
    twin = copy.deepcopy(model)
    assert twin.memory_format == "channels_last"
    images = torch.rand(2, 3, 16, 16)
    assert twin.trunk_outputs(images)[0][0].is_contiguous(memory_format=LAST)
    torch.testing.assert_close(twin(images), _contiguous(model)(images), rtol=1e-5, atol=1e-5)


def _contiguous(model: ImmunityMoE) -> ImmunityMoE:
    model.memory_format = "contiguous"
    return model
