"""Adversarial training against each expert on its own, and N-FGSM: what is made, and what a step then learns from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from immunity_fast.attacks import pgd
from immunity_fast.peers import PlainLoss
from immunity_fast.training.adversarial import InnerAttack
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.step import TrainStep
from immunity_fast.training.trainer import Trainer
from tests.adversarial_cases import (
    ALPHA,
    EPS,
    LABELS,
    STEPS,
    attacked,
    inner_settings,
    noisy_images,
    small_mixture,
    state_of,
)


def _noise(shape: torch.Size, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(3)
    return 2 * torch.rand(shape, dtype=dtype) - 1


def test_n_fgsm_is_a_step_of_eps_from_noise_of_2_eps() -> None:
    model, images = small_mixture(), noisy_images()
    found = attacked(InnerAttack(model, inner_settings("n-fgsm", alpha=0.5, steps=7)), images)
    start = (images + 2 * EPS * _noise(images.shape)).clamp(0, 1).requires_grad_()
    twin = copy.deepcopy(model).eval()
    twin.gate.switch = "off"
    (gradient,) = torch.autograd.grad(F.nll_loss(twin(start), LABELS, reduction="sum"), start)
    expected = (start.detach() + EPS * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    distance = float((found - images).abs().max())
    assert EPS < distance <= 3 * EPS + 1e-12  # not brought back into the ball


@pytest.mark.parametrize("eps", [0.0, 0.5, 1.0])
def test_n_fgsm_stays_among_images(eps: float) -> None:
    images = noisy_images(dtype=torch.float32)
    found = attacked(InnerAttack(small_mixture(dtype=torch.float32), inner_settings("n-fgsm", eps=eps)), images)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert eps > 0 or torch.equal(found, images)


@pytest.mark.parametrize("whole", [False, True], ids=["chain", "list"])
def test_each_expert_is_attacked_alone(whole: bool) -> None:
    model, images = small_mixture(whole=whole), noisy_images()
    before = state_of(model)
    found = attacked(InnerAttack(model, inner_settings("pgd", adversary="each")), images)
    assert found.shape == (3, *images.shape)
    shape = torch.Size((3 * len(images), *images.shape[1:]))
    noise = (_noise(shape, torch.float32) * EPS).double().view(found.shape)
    for index, expert in enumerate(model.unstack()):
        start = (images + noise[index]).clamp(0, 1)
        x = start
        for _ in range(STEPS):
            x = x.detach().requires_grad_()
            loss = F.cross_entropy(expert.eval()(x), LABELS, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            x = torch.minimum(torch.maximum(x.detach() + ALPHA * gradient.sign(), images - EPS), images + EPS)
            x = x.clamp(0, 1)
        torch.testing.assert_close(found[index], x, rtol=0, atol=1e-12)
    assert state_of(model) == before


def test_own_images_and_labels_are_attacked_as_they_are() -> None:
    model = small_mixture()
    images = torch.stack([noisy_images(seed) for seed in (1, 2, 4)])
    labels = torch.stack([LABELS, LABELS.flip(0), LABELS.roll(1)])
    attack = InnerAttack(model, inner_settings("pgd", adversary="each", steps=1))
    torch.manual_seed(3)
    found = attack(images, labels)
    assert float((found - images).abs().max()) <= EPS + 1e-12
    shared = attacked(attack, images[0])
    torch.testing.assert_close(found[0], shared[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("targets", ["labels", "probabilities"])
@pytest.mark.parametrize("method", ["pgd", "n-fgsm"])
def test_a_step_learns_from_each_expert_s_own_images(method: Any, targets: str) -> None:
    model, images = small_mixture(), noisy_images()
    labels = LABELS if targets == "labels" else torch.rand(5, 3, dtype=torch.float64).softmax(-1)
    attack = InnerAttack(model, inner_settings(method, adversary="each"))
    torch.manual_seed(3)
    own = attack(images, labels)
    networks = [expert.train() for expert in model.unstack()]
    for index, network in enumerate(networks):
        optimizer = SGD(network.parameters(), 0.1)
        F.cross_entropy(network(own[index]), labels).backward()
        optimizer.step()
    step = TrainStep(model, model.loss_fn, SGD(model.parameters(), 0.1), attack=attack, method=PlainLoss())
    torch.manual_seed(3)
    measured = dict(zip(step.measured, step(images, labels).tolist(), strict=True))
    assert measured["loss"] == pytest.approx(3 * measured["cross_entropy"])
    for network, found in zip(networks, model.unstack(), strict=True):
        for (name, expected), value in zip(network.named_parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12, msg=name)
        for (name, expected), value in zip(network.named_buffers(), found.buffers(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12, msg=name)


def test_own_images_give_each_expert_s_logits() -> None:
    for model in (small_mixture().eval(), small_mixture(whole=True).eval(), small_mixture(batching="vmap").eval()):
        images = torch.stack([noisy_images(seed) for seed in (1, 2, 4)])
        found = model.expert_logits(images)
        copied = model.expert_logits_with_copied_buffers(images)
        for index, expert in enumerate(model.unstack()):
            torch.testing.assert_close(found[index], expert(images[index]), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(copied[index], expert(images[index]), rtol=1e-10, atol=1e-12)
        with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, H, W\) or \(3, B, 3, H, W\), got"):
            model.expert_logits(images[:2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adversary": "each"}, "--adversary: expected mixture without --adversarial, got each"),
        ({"adversary": "each", "adversarial": "pgd"}, "--adversary: expected mixture with --ensemble immunity"),
        ({"adversary": "each", "adversarial": "trades", "ensemble": "plain"}, "--adversary: expected mixture with"),
        ({"adversarial": "trades", "ensemble": "plain"}, "--adversarial: expected another with --ensemble plain"),
        ({"shards": True}, "--shards: expected none without --ensemble plain, got True"),
        ({"shards": True, "ensemble": "plain", "experts": 1}, "--shards: expected none of one network"),
        ({"shard": True, "ensemble": "plain"}, "--shard: expected none with --ensemble plain"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        TrainConfig(**changes)


def test_a_run_of_each_expert_s_own_adversary_trains() -> None:
    config = TrainConfig(
        ensemble="plain", adversarial="n-fgsm", adversary="each", experts=2, epochs=1, limit_train=24, check_images=4
    )
    trainer = Trainer(config=config, progress=False)
    trainer.fit()
    (record,) = trainer.history
    assert record["loss"] == pytest.approx(2 * record["cross_entropy"])
    assert "mutual_information_loss" not in record
    assert trainer.state is not None
    assert trainer.state.description["gate"] == "uniform"


def test_pgd_of_the_mixture_is_what_it_was() -> None:
    model, images = small_mixture(), noisy_images()
    twin = copy.deepcopy(model).eval()
    twin.gate.switch = "off"
    found = attacked(InnerAttack(model, inner_settings("pgd")), images)
    torch.manual_seed(3)
    torch.testing.assert_close(found, pgd(twin, images, LABELS, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=True))
