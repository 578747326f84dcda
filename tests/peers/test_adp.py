"""ADP's loss against its formula, number by number; what it refuses; a step and a run that train by it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

import immunity_fast
from immunity_fast import ADPLoss, FusedImmunityLoss
from immunity_fast.peers import PlainLoss, method_of
from immunity_fast.peers.adp import log_determinant
from immunity_fast.training import Trainer
from immunity_fast.training.step import TrainStep
from tests.naive_ensembles import batch, gradients_of, mixture
from tests.small_runs import CONFIG, dataset
from tests.tensors import normal


def _determinant(matrix: list[list[float]]) -> float:
    if not matrix:
        return 1.0
    minors = ([row[:column] + row[column + 1 :] for row in matrix[1:]] for column in range(len(matrix)))
    return sum((-1) ** c * matrix[0][c] * _determinant(minor) for c, minor in enumerate(minors))


def _adp(logits: Sequence[Sequence[float]], label: int, entropy: float, diversity: float) -> float:
    """ADP's loss of one image, number by number, of the probabilities themselves."""
    shares = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits]
    mean = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    columns = []
    for row in shares:
        wrong = [p for index, p in enumerate(row) if index != label]
        columns.append([p / math.sqrt(sum(q * q for q in wrong)) for p in wrong])
    gram = [
        [sum(p * q for p, q in zip(a, b, strict=True)) + 1e-6 * (i == j) for j, b in enumerate(columns)]
        for i, a in enumerate(columns)
    ]
    losses = sum(-math.log(row[label]) for row in shares)
    return losses + entropy * sum(p * math.log(p) for p in mean) - diversity * math.log(_determinant(gram))


@pytest.mark.parametrize(("members", "classes"), [(3, 5), (2, 4), (1, 3)])
@pytest.mark.parametrize("terms", [(2.0, 0.5), (0.0, 0.0), (0.0, 1.5), (3.0, 0.0)])
def test_it_is_that_of_the_paper(members: int, classes: int, terms: tuple[float, float]) -> None:
    logits = 2 * normal(members, 4, classes)
    labels = torch.arange(4) % classes
    expected = sum(_adp(logits[:, i].tolist(), int(labels[i]), *terms) for i in range(4)) / 4
    for given in (logits, list(logits)):
        found = ADPLoss(*terms)(given, labels)
        torch.testing.assert_close(found.item(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_the_determinant_is_that_of_a_library(size: int) -> None:
    columns = F.normalize(normal(3, size, 11).abs() ** 4, dim=-1)
    columns[0, -1] = columns[0, 0]  # as near to singular as they may be
    gram = (columns @ columns.mT + 1e-6 * torch.eye(size, dtype=torch.float64)).requires_grad_()
    found, expected = log_determinant(gram), torch.linalg.slogdet(gram).logabsdet
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    slopes = [torch.autograd.grad(each.sum(), gram)[0] for each in (found, expected)]
    torch.testing.assert_close(*((slope + slope.mT) / 2 for slope in slopes), rtol=1e-8, atol=1e-8)


def test_it_has_the_gradient_that_it_should() -> None:
    logits = normal(3, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ADPLoss()(z, torch.tensor([4, 0])), logits)


def test_it_is_finite_of_members_that_are_sure() -> None:
    """In float32 the right class then has all of the probability, and the wrong ones nothing."""
    logits = normal(3, 2, 5, dtype=torch.float32)
    logits[:, 0, 1] += 300
    logits.requires_grad_()
    loss = ADPLoss()(logits, torch.tensor([1, 2]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.dtype == loss.dtype == torch.float32


def test_members_that_are_alike_have_finite_gradients() -> None:
    logits = normal(1, 3, 6).expand(4, 3, 6).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ADPLoss()(logits, torch.tensor([1, 2, 0])), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, labels = normal(3, 4, 5).to(dtype), torch.tensor([0, 1, 4, 2])
    expected = ADPLoss()(logits.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ADPLoss()(logits, labels), expected)


def test_ignored_images_count_for_nothing() -> None:
    logits, labels = normal(3, 4, 5).requires_grad_(), torch.tensor([0, -100, 4, 2])
    found = ADPLoss()(logits, labels)
    kept = [0, 2, 3]
    torch.testing.assert_close(found, ADPLoss()(logits[:, kept], labels[kept]))
    assert not torch.autograd.grad(found, logits)[0][:, 1].any()
    assert ADPLoss()(logits, torch.full((4,), -100)).item() == 0


def test_targets_are_as_cross_entropy_has_them() -> None:
    logits, labels, weights = normal(3, 4, 5), torch.tensor([0, 1, 4, 2]), torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    plain = sum(F.cross_entropy(z, labels, weights.double(), label_smoothing=0.2) for z in logits)
    found = ADPLoss(class_weights=weights, label_smoothing=0.2)(logits, labels)
    torch.testing.assert_close(found - plain, ADPLoss()(logits, labels) - PlainLoss()(logits, labels))


def test_of_probabilities_the_likeliest_class_is_right() -> None:
    logits, shares = normal(3, 2, 4), torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.0, 0.1, 0.2, 0.7]]).double()
    labels = torch.tensor([1, 3])
    diversity = ADPLoss()(logits, labels) - PlainLoss()(logits, labels)
    torch.testing.assert_close(ADPLoss()(logits, shares), PlainLoss()(logits, shares) + diversity)


@pytest.mark.parametrize("experts", [4, 5])
def test_there_are_fewer_experts_than_classes(experts: int) -> None:
    with pytest.raises(ValueError, match=rf"experts: expected at most 3 with 4 classes.*, got {experts}"):
        ADPLoss()(normal(experts, 2, 4), torch.tensor([0, 1]))


def test_too_many_experts_are_found_before_the_first_step() -> None:
    with pytest.raises(ValueError, match="experts: expected at most 4 with 5 classes"):
        ADPLoss().check_model(mixture(5))


@pytest.mark.parametrize("settings", [{"alpha": -1.0}, {"beta": math.inf}, {"beta": math.nan}])
def test_settings_are_finite_and_not_negative(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}: expected a finite number of at least 0"):
        ADPLoss(**settings)


@pytest.mark.parametrize("given", [(torch.zeros(3, 2), [0, 1]), (torch.zeros(3, 2, 5), [0, 1, 2])])
def test_other_shapes_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        ADPLoss()(given[0], torch.tensor(given[1]))


def test_text_names_it_and_its_settings() -> None:
    method = method_of("adp:alpha=1,beta=1/5", label_smoothing=0.1)
    assert isinstance(method, immunity_fast.ADPLoss)
    assert (method.alpha, method.beta) == (1, 0.2)
    with pytest.raises(ValueError, match="expected adp with alpha=…, beta=…, got gamma=1"):
        method_of("adp:gamma=1")


def _update(adversarial: bool) -> None:
    """A step by SGD, beside that of networks in a loop."""
    model, (images, labels) = mixture(), batch()
    networks, loss_fn = model.unstack(), ADPLoss()
    before = [parameter.detach().clone() for parameter in model.experts.parameters()]
    step = TrainStep(model, FusedImmunityLoss(), SGD(model.parameters(), 0.5), method=loss_fn)
    seen, targets = images, labels
    if adversarial:
        step.attack = lambda images, labels: (images + 0.1).clamp(0, 1)  # type: ignore[assignment]
        loss_fn.adversarial = True
        seen, targets = torch.cat([images, (images + 0.1).clamp(0, 1)]), labels.repeat(2)
    measured = step(images, labels)
    logits = [member(seen) for member in networks]
    samples = [[z[i].tolist() for z in logits] for i in range(len(seen))]
    expected = sum(_adp(sample, int(label), 2.0, 0.5) for sample, label in zip(samples, targets, strict=True))
    torch.testing.assert_close(measured[0].item(), expected / len(seen), rtol=1e-9, atol=1e-9)
    loss, classification, diversity = measured.tolist()
    assert loss == pytest.approx(3 * classification - diversity)
    ADPLoss()(logits, targets).backward()
    for old, new, gradient in zip(before, model.experts.parameters(), gradients_of(networks), strict=True):
        torch.testing.assert_close(new, old - 0.5 * gradient)
    for name, buffer in model.experts.named_buffers():
        alike = torch.stack([dict(member.named_buffers())[name] for member in networks])
        torch.testing.assert_close(buffer, alike)
    assert set(dict(model.named_buffers())["experts.1.num_batches_tracked"].tolist()) == {1}


def test_a_step_is_that_of_a_loop() -> None:
    _update(adversarial=False)


def test_clean_images_are_trained_on_beside_adversarial_ones() -> None:
    _update(adversarial=True)


def test_images_cost_what_they_cost() -> None:
    assert ADPLoss().passes(3, 0) == 3
    assert ADPLoss().passes(3, 10) == 36  # the clean images are trained on, too


def test_a_run_trains_by_it() -> None:
    config = dataclasses.replace(CONFIG, ensemble="adp:beta=0.1", device="cpu", limit_train=12)
    trainer = Trainer(config, dataset())
    trainer.fit()
    assert trainer.history
    for name in ("loss", "cross_entropy", "diversity"):
        assert math.isfinite(trainer.history[-1][f"{name}"])
