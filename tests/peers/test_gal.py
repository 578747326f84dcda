"""GAL's loss against its formula in a loop; gradients that are zero; what it refuses; runs that train by it."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import GALLoss
from immunity_fast.peers import method_of
from immunity_fast.training import Trainer
from immunity_fast.training.config import TrainConfig
from tests.naive_ensembles import CLASSES, LABELS, batch, gal, gradients_of, losses_and_gradients, mixture
from tests.small_runs import CONFIG, dataset


def _networks(count: int = 3, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    return mixture(count, dtype).unstack()


@pytest.mark.parametrize("form", ["shared", "stacked", "listed"])
@pytest.mark.parametrize(("count", "samples", "weight"), [(3, 5, 0.5), (2, 3, 2.0), (4, 2, 0.0)])
def test_it_is_that_of_a_loop(form: str, count: int, samples: int, weight: float) -> None:
    networks, (images, labels) = _networks(count), batch(samples)
    expected = gal(*losses_and_gradients(networks, images, labels), weight).mean()
    expected.backward()
    wanted = gradients_of(networks)
    for member in networks:
        member.zero_grad()
    if form == "shared":
        given: Any = images.requires_grad_()
        logits: Any = [member(given) for member in networks]
    else:
        given = images.expand(count, *images.shape).clone().requires_grad_()
        given = given if form == "stacked" else [part.detach().requires_grad_() for part in given]
        logits = torch.stack([member(own) for member, own in zip(networks, given, strict=True)])
    loss = GALLoss(weight)(logits, given, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for found, gradient in zip(gradients_of(networks), wanted, strict=True):
        torch.testing.assert_close(found, gradient)


def test_the_gradient_is_that_of_finite_differences() -> None:
    images = torch.rand(2, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def loss(weights: Tensor, images: Tensor) -> Tensor:
        return GALLoss()(torch.tanh(images.flatten(1) @ weights), images, torch.tensor([1, 3]))

    assert torch.autograd.gradcheck(loss, (weights, images))


@pytest.mark.parametrize("soft", [False, True])
def test_targets_are_as_cross_entropy_has_them(soft: bool) -> None:
    """Smoothed, weighted by class, and some ignored, in the losses and in their gradients."""
    networks, (images, labels) = _networks(), batch(4)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64)
    plain = partial(F.cross_entropy, weight=weights, label_smoothing=0.2, reduction="none")
    targets = torch.eye(CLASSES, dtype=torch.float64)[labels] * 0.7 + 0.06 if soft else labels.clone()
    expected_losses, gradients = losses_and_gradients([m.eval() for m in networks], images, targets, plain)
    factor = 1 if soft else 3 / float(weights[labels[:3]].sum())  # PyTorch's mean is the weighted one
    expected = gal(factor * expected_losses, gradients)[:3].mean()
    targets[3] = -100
    loss_fn = GALLoss(label_smoothing=0.2, class_weights=weights)
    images.requires_grad_()
    torch.testing.assert_close(loss_fn([m(images) for m in networks], images, targets), expected)


def test_a_gradient_of_zero_has_no_direction() -> None:
    """One expert answers the same to all images; its cosines are 0, and so is what they add to any gradient."""
    networks, (images, labels) = _networks(3, torch.float32), batch(4, torch.float32)
    last: Any = networks[0][3][1]  # type: ignore[index]
    with torch.no_grad():
        last.weight.zero_()
    images.requires_grad_()
    logits = [member(images) for member in networks]
    _, gradients = losses_and_gradients(networks, images, labels)
    other = F.cosine_similarity(gradients[1], gradients[2])
    expected = torch.stack([F.cross_entropy(z, labels) for z in logits]).mean() + 0.5 * (2 + other.exp()).log().mean()
    loss = GALLoss()(logits, images, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for member in networks for p in member.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_that_are_sure_have_finite_gradients(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 12, 4, generator=generator).mul_(50).to(dtype).requires_grad_()
    images = torch.rand(5, 1, 3, 4, generator=generator).to(dtype).requires_grad_()
    logits = torch.stack([images.flatten(1) @ own for own in weights])
    loss = GALLoss()(logits, images, logits[0].argmax(-1))
    (gradient,) = torch.autograd.grad(loss, weights)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert gradient.isfinite().all()


def test_experts_of_one_mind_are_punished_most() -> None:
    networks, (images, labels) = _networks(2), batch(3)
    networks = [networks[0]] * 2
    images.requires_grad_()
    logits = [member(images) for member in networks]
    alike = GALLoss(1.0)(logits, images, labels) - GALLoss(0.0)(logits, images, labels)
    torch.testing.assert_close(alike, torch.tensor(1.0, dtype=torch.float64))  # log exp cos 0


def _given(*, grad: bool = True) -> tuple[Tensor, Tensor]:
    images = torch.rand(3, 1, 2, 2).requires_grad_(grad)
    return torch.stack([images.flatten(1).sin(), images.flatten(1).cos()]), images


def test_one_expert_is_refused() -> None:
    logits, images = _given()
    with pytest.raises(ValueError, match="logits: expected at least 2 experts, whose gradients GAL compares, got 1"):
        GALLoss()(logits[:1], images, LABELS[:3] % 4)
    with pytest.raises(ValueError, match="experts: expected at least 2"):
        TrainConfig(ensemble="gal", experts=1)


def test_images_have_to_lead_to_the_logits() -> None:
    logits, images = _given()
    labels = LABELS[:3] % 4
    with pytest.raises(ValueError, match="got some that require no gradient"):
        GALLoss()(logits, images.detach(), labels)
    with pytest.raises(ValueError, match="got some that logits do not depend on"):
        GALLoss()(logits, torch.rand(3, 1, 2, 2, requires_grad=True), labels)
    with pytest.raises(ValueError, match="got logits without a graph"):
        GALLoss()(logits.detach(), images, labels)
    with torch.no_grad(), pytest.raises(ValueError, match="with gradients enabled"):
        GALLoss()(_given()[0], images, labels)


def test_other_shapes_are_refused() -> None:
    logits, images = _given()
    labels = LABELS[:3] % 4
    for given in (images[:2], [images], torch.rand(3, 3, 1, 2, 2, requires_grad=True), [images[:1], images[:2]]):
        with pytest.raises(
            ValueError, match=r"images: expected shape \(3, C, H, W\), \(2, 3, C, H, W\) or a list of 2"
        ):
            GALLoss()(logits, given, labels)
    with pytest.raises(ValueError, match="images: expected a copy for each expert, or the one tensor itself"):
        GALLoss()(logits, [images] * 2, labels)
    with pytest.raises(TypeError, match="images: expected a tensor or a list of tensors"):
        GALLoss()(logits, ["images"] * 2, labels)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="targets"):
        GALLoss()(logits, images, labels[:2])


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_its_weight_is_finite_and_not_negative(weight: float) -> None:
    with pytest.raises(ValueError, match="weight: expected a finite number of at least 0"):
        GALLoss(weight)


def test_text_names_it_and_its_setting() -> None:
    method = method_of("gal:weight=1/4")
    assert isinstance(method, GALLoss)
    assert method.weight == 0.25
    assert method.passes(3, 0) == 6
    with pytest.raises(ValueError, match="expected gal with weight=…, got alpha=1"):
        method_of("gal:alpha=1")


def test_a_run_trains_by_it() -> None:
    trainer = Trainer(dataclasses.replace(CONFIG, ensemble="gal", device="cpu", limit_train=12), dataset())
    trainer.fit()
    for name in ("loss", "cross_entropy", "diversity"):
        assert math.isfinite(trainer.history[-1][name])
