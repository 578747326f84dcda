"""Steps by losses of input gradients: a loop's updates, however the experts run; one graph; BatchNorm counts once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.optim import SGD

from immunity_fast import ADPLoss, FusedImmunityLoss, GALLoss, ImmunityMoE, TRSLoss
from immunity_fast.peers import EnsembleLoss
from immunity_fast.peers.input_gradients import InputGradientLoss, cosines
from immunity_fast.training.step import TrainStep
from tests.naive_ensembles import LABELS, batch, gal, gradients_of, losses_and_gradients, mixture, network, plain, trs
from tests.tensors import normal


def _step(model: ImmunityMoE, method: EnsembleLoss, **options: Any) -> TrainStep:
    return TrainStep(model, FusedImmunityLoss(), SGD(model.parameters(), 0.5), method=method, **options)


def _naive(networks: list[nn.Module], method: EnsembleLoss, images: Tensor, points: Tensor | None) -> Tensor:
    """The loss of a loop, whose gradient the networks then have."""
    found = losses_and_gradients(networks, images, LABELS)
    if points is None:
        loss = gal(*found).mean()
    else:  # behind the other pass, so that statistics are counted twice: they are looked at before
        loss = trs(*found, losses_and_gradients(networks, points, LABELS)[1]).mean()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("way", ["loop", "vmap", "list"])
@pytest.mark.parametrize("make", [GALLoss, TRSLoss])
def test_a_step_is_that_of_a_loop(make: type[EnsembleLoss], way: Any) -> None:
    model, (images, labels), method = mixture(), batch(), make()
    if way == "list":
        model.list_experts_()
    else:
        model.batching = way
    networks = model.unstack()
    once = copy.deepcopy(networks)
    for member in once:
        member(images)
    before = copy.deepcopy(networks)
    torch.manual_seed(5)
    points = method.prepare(model, images, labels)
    loss = _naive(networks, method, images, points)
    torch.manual_seed(5)
    measured = _step(model, method)(images, labels)
    assert len(measured) == len(method.measured)
    torch.testing.assert_close(measured[0], loss)
    after = [list(member.parameters()) for member in model.unstack()]
    for index, gradient in enumerate(gradients_of(networks)):
        for new, old, own in zip(after, before, gradient, strict=True):
            torch.testing.assert_close(new[index], list(old.parameters())[index] - 0.5 * own)
    for member, counted in zip(model.unstack(), once, strict=True):
        torch.testing.assert_close(dict(member.named_buffers()), dict(counted.named_buffers()))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "batching"), [(ADPLoss, "loop"), (GALLoss, "vmap"), (TRSLoss, "loop")])
def test_a_step_is_one_graph(
    make: type[EnsembleLoss], batching: Any, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, fullgraph=True, dynamic=False, backend="eager"))
    found = []
    for choice in ("off", "on"):
        model, said = mixture(2), []
        model.batching = batching
        step = _step(model, make(), compile=choice, log=said.append)
        torch.manual_seed(5)
        measured = step(*batch())
        assert (step.compiled, said) == (choice == "on", [])
        found.append((measured, dict(model.state_dict())))
    torch.testing.assert_close(found[1], found[0])


def test_several_batches_make_one_step() -> None:
    model, method = mixture(2), GALLoss()
    images, labels = batch()
    networks = model.unstack()
    step = _step(model, method)
    for index, part in enumerate((slice(0, 2), slice(2, 5))):
        step(images[part], labels[part], index=index, count=2)
    losses = [
        gal(*losses_and_gradients(networks, images[part], labels[part])).mean() for part in (slice(2), slice(2, 5))
    ]
    (sum(losses) / 2).backward()  # type: ignore[union-attr]
    for parameter, gradient in zip(model.experts.parameters(), gradients_of(networks), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("make", [GALLoss, TRSLoss])
def test_in_half_precision_it_is_nearly_the_same(make: type[EnsembleLoss]) -> None:
    found = []
    for amp in ("off", "bf16"):
        torch.manual_seed(5)
        found.append(_step(mixture(2, torch.float32), make(), amp=amp)(*batch(5, torch.float32)))
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05)
    assert not torch.equal(found[1], found[0])


def test_slopes_of_images_that_are_learned_are_exact() -> None:
    """In float32 the right class has all of the probability."""
    logits = normal(2, 1, 4, dtype=torch.float32)
    logits[..., 0] += 20
    slopes = InputGradientLoss().expert_slopes(logits, torch.tensor([0]))
    assert slopes.dtype == torch.float32
    wide = logits.double().flatten(0, 1).requires_grad_()
    (expected,) = torch.autograd.grad(plain(wide, torch.tensor([0, 0])).sum(), wide)
    torch.testing.assert_close(slopes.flatten(0, 1).double(), expected, rtol=1e-6, atol=0)


def test_cosines_are_of_directions_alone() -> None:
    gradients = normal(3, 2, 7)
    expected = torch.stack(list(cosines(gradients, gradients)))
    tiny = gradients.clone()
    tiny[1] *= 1e-18
    torch.testing.assert_close(torch.stack(list(cosines(tiny, gradients))), expected)
    tiny[1] *= 1e-9
    found = torch.stack(list(cosines(tiny, gradients)))
    torch.testing.assert_close(found[1], expected[1])
    assert not found[[0, 2]].any()


class _Attending(nn.Module):
    """Attention whose fast kernels cannot be differentiated twice."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).mT[:, None]
        return scaled_dot_product_attention(tokens, tokens, tokens).flatten(1)


def test_attention_is_differentiated_twice() -> None:
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Conv2d(3, 8, 3), _Attending(), nn.Linear(128, 5)) for _ in range(2)]
    images, labels = batch(3, torch.float32)
    loss = TRSLoss(steps=1)(networks, images, labels)
    loss.backward()
    model = ImmunityMoE.from_experts(networks, stage="0", image_size=6)
    GALLoss().loss_and_terms(model, images, labels)[0].backward()
    assert all(p.grad is not None for member in networks for p in member.parameters())


def test_networks_of_different_structures_can_be_trained() -> None:
    torch.manual_seed(0)
    other = nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.Tanh(), nn.Linear(5, 5))
    networks = [network().double(), other.double()]
    images, labels = batch()
    loss = TRSLoss(steps=0, similarity=1.0, smoothness=0.0, scale=1.0)(networks, images, labels)
    losses, gradients = losses_and_gradients(networks, images, labels)
    torch.testing.assert_close(loss, trs(losses, gradients, gradients, 1.0, 0.0, 1.0).mean())
