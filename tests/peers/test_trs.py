"""TRS' loss against its formula in a loop, the ascent, and what both leave alone; runs that train by it."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import TRSLoss
from immunity_fast.peers import method_of
from immunity_fast.training import Trainer
from immunity_fast.training.config import TrainConfig
from tests.naive_ensembles import CLASSES, batch, gradients_of, losses_and_gradients, mixture, network, trs
from tests.small_runs import CONFIG, dataset


def _ascended(networks: list[nn.Module], images: Tensor, labels: Tensor, radius: float, steps: int = 6) -> Tensor:
    """The scripts' ascent on the second half of a batch, in evaluation mode, from numbers that PyTorch draws."""
    clean = images[len(images) // 2 :]
    points = (clean + radius * (2 * torch.rand_like(clean) - 1)).clamp(0, 1)
    for _ in range(steps):
        points = points.detach().requires_grad_()
        total = torch.zeros((), dtype=points.dtype)
        for member in networks:
            loss = F.cross_entropy(member(points), labels[len(images) // 2 :])
            total = total + torch.autograd.grad(loss, points, create_graph=True)[0].pow(2).sum()
        (uphill,) = torch.autograd.grad(total, points)
        points = points.detach() + radius / 3 * uphill.sign()
        points = torch.max(torch.min(points, clean + radius), clean - radius).clamp(0, 1)
    return torch.cat([images[: len(images) // 2], points.detach()])


def _settled(networks: list[nn.Module]) -> list[nn.Module]:
    return [copy.deepcopy(member).eval() for member in networks]


@pytest.mark.parametrize("form", ["mixture", "list", "module list"])
@pytest.mark.parametrize(("count", "samples"), [(3, 5), (2, 4), (4, 1)])
def test_it_is_that_of_a_loop(form: str, count: int, samples: int) -> None:
    model = mixture(count)
    images, labels = batch(samples)
    networks = model.unstack()
    loss_fn = TRSLoss(similarity=3.0, smoothness=1e4, scale=0.7, steps=2)
    torch.manual_seed(7)
    points = _ascended(_settled(networks), images, labels, 0.01, steps=2)
    counted = copy.deepcopy(networks)
    losses, gradients = losses_and_gradients(counted, images, labels)
    other = [copy.deepcopy(member) for member in networks]
    _, at_points = losses_and_gradients(other, points, labels)
    expected = trs(losses, gradients, at_points, 3.0, 1e4, 0.7).mean()
    expected.backward()
    wanted = [a + b for a, b in zip(gradients_of(counted), gradients_of(other), strict=True)]
    torch.manual_seed(7)
    members: Any = {"mixture": model, "list": networks, "module list": nn.ModuleList(networks)}[form]
    loss = loss_fn(members, images, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    of_members = members.unstack() if form == "mixture" else networks
    found = [p.grad for p in model.experts.parameters()] if form == "mixture" else gradients_of(networks)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    for member, once in zip(of_members, counted, strict=True):  # BatchNorm has counted the batch, once
        torch.testing.assert_close(dict(member.named_buffers()), dict(once.named_buffers()))
        assert member.training


def test_the_ascent_is_that_of_the_scripts() -> None:
    model, (images, labels) = mixture(), batch()
    loss_fn = TRSLoss()
    loss_fn.begin_epoch(model, 3, 6, 0)
    assert loss_fn.radius == pytest.approx(0.02)
    torch.manual_seed(7)
    expected = _ascended(_settled(model.unstack()), images, labels, 0.02)
    torch.manual_seed(7)
    found = loss_fn.prepare(model, images, labels)
    assert found is not None
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[:2], images[:2])
    assert (found - images).abs().max() <= 0.02 + 1e-12
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_ascent_leaves_the_model_as_it_was() -> None:
    model, (images, labels) = mixture(), batch()
    model.experts[1].eval()  # type: ignore[index]
    frozen = next(model.experts.parameters())
    frozen.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        TRSLoss().prepare(model, images, labels)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.experts.parameters()][:2] == [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert not images.requires_grad


def test_the_ascent_finds_larger_gradients() -> None:
    model, (images, labels) = mixture(), batch()
    model.eval()
    squares = []
    for steps in (0, 6):
        torch.manual_seed(1)
        points = TRSLoss(start_eps=0.1, steps=steps).prepare(model, images, labels)
        assert points is not None
        _, gradients = losses_and_gradients(model.unstack(), points[2:], labels[2:])
        squares.append(float(gradients.detach().square().sum()))
    assert squares[1] > squares[0]


@pytest.mark.parametrize("listed", [False, True])
def test_the_radius_grows_by_epochs(listed: bool) -> None:
    loss_fn, radii = TRSLoss(start_eps=0.01, eps=0.05), []
    model: Any = [network(), network()] if listed else mixture(2)
    for epoch in range(4):
        assert not loss_fn.begin_epoch(model, epoch, 4, 0)
        radii.append(loss_fn.radius)
    assert radii == pytest.approx([0.01, 0.02, 0.03, 0.04])


def test_targets_are_as_cross_entropy_has_them() -> None:
    model, (images, labels) = mixture(), batch(4)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    plain = partial(F.cross_entropy, weight=weights, label_smoothing=0.2, reduction="none")
    networks = [member.eval() for member in model.eval().unstack()]
    factor = 3 / float(weights[labels[:3]].sum())  # PyTorch's mean is the weighted one
    losses, gradients = losses_and_gradients(networks, images, labels, lambda z, y: factor * plain(z, y))
    expected = trs(losses, gradients, gradients)[:3].mean()
    loss_fn = TRSLoss(label_smoothing=0.2, class_weights=weights)
    targets = labels.clone()
    targets[3] = -100
    torch.testing.assert_close(loss_fn.loss_and_terms(model, images, targets, images)[0], expected)
    shares = torch.eye(CLASSES, dtype=torch.float64)[labels]
    losses, gradients = losses_and_gradients(networks, images, labels, plain)
    found = loss_fn.loss_and_terms(model, images, shares, images)[0]
    torch.testing.assert_close(found, trs(losses, gradients, gradients).mean())


def test_the_terms_add_up_to_the_loss() -> None:
    model, (images, labels) = mixture(), batch()
    loss, (classification, alike, squares) = TRSLoss().loss_and_terms(model, images, labels, images)
    expected = 3 * classification + 5 * (2 * alike + 2 * 2 / 128**2 * squares)
    torch.testing.assert_close(loss, expected)


def test_experts_that_answer_the_same_to_all_are_finite() -> None:
    model, (images, labels) = mixture(2, torch.float32), batch(4, torch.float32)
    with torch.no_grad():
        list(model.experts.parameters())[4].zero_()  # the last kernels
    loss = TRSLoss()(model, images, labels)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.experts.parameters() if p.grad is not None)


@pytest.mark.parametrize("members", ["networks", [1, 2], nn.Linear(2, 2)])
def test_other_members_are_refused(members: Any) -> None:
    with pytest.raises(TypeError, match="members: expected an ImmunityMoE or a list of networks, got"):
        TRSLoss(steps=0)(members, *batch())


def test_data_parallel_networks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"members: expected networks as they are, its .module, got DataParallel"):
        TRSLoss(steps=0)([network().double(), nn.DataParallel(network().double())], *batch())


def test_images_and_targets_are_checked_before_they_are_halved() -> None:
    networks, (images, labels) = [network().double(), network().double()], batch(4)
    with pytest.raises(TypeError, match="images: expected a floating-point tensor"):
        TRSLoss()(networks, (255 * images).byte(), labels)
    with pytest.raises(ValueError, match="images: expected shape"):
        TRSLoss()(networks, images[0], labels)
    with pytest.raises(ValueError, match=r"targets: expected labels \(4,\) or \(2, 4\).*, got shape \(2,\)"):
        TRSLoss()(networks, images, labels[:2])


def test_one_expert_is_refused() -> None:
    with pytest.raises(ValueError, match="experts: expected at least 2 experts, whose gradients TRS compares, got 1"):
        TRSLoss()([network().double()], *batch())
    with pytest.raises(ValueError, match="--experts: expected at least 2 experts"):
        TrainConfig(ensemble="trs", experts=1)


def test_a_batch_is_prepared_first() -> None:
    with pytest.raises(ValueError, match="prepared: expected what prepare gives of the batch, got None"):
        TRSLoss().loss_and_terms(mixture(2), *batch())


@pytest.mark.parametrize("name", ["similarity", "smoothness", "scale", "start_eps", "eps"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_settings_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a finite number of at least 0"):
        TRSLoss(**{name: value})  # type: ignore[arg-type]


def test_text_names_it_and_its_settings() -> None:
    method = method_of("trs:similarity=40,smoothness=2.5,scale=1,steps=3,eps=8/255")
    assert isinstance(method, TRSLoss)
    assert (method.similarity, method.smoothness, method.scale, method.steps) == (40, 2.5, 1, 3)
    assert method.eps == 8 / 255
    assert method.passes(3, 0) == 21
    with pytest.raises(ValueError, match="steps: expected at least 0, got -1"):
        method_of("trs:steps=-1")


def test_a_run_trains_by_it() -> None:
    trainer = Trainer(dataclasses.replace(CONFIG, ensemble="trs:steps=1", device="cpu", limit_train=12), dataset())
    trainer.fit()
    for name in ("loss", "cross_entropy", "diversity", "smoothness"):
        assert math.isfinite(trainer.history[-1][name])
