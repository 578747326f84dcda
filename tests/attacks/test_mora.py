"""MORA against loops over images and members, ensembles whose optimum is known, and what it must leave alone."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, RandomSwitchGate
from immunity_fast.attacks import MovedStatisticsWarning, NotFiniteError, UnmovedWarning, pgd, reweighing
from immunity_fast.attacks.members import MixtureMembers, NetworkMembers
from immunity_fast.attacks.mora import MoraSettings, attack_members, mora
from immunity_fast.attacks.projections import outside
from immunity_fast.functional import log_mixture
from tests import attacked_models
from tests.adversarial_cases import noisy_images, small_mixture
from tests.attacked_models import Recorder, each_norm
from tests.oracle import assert_matches

seeded = attacked_models.seeded
SHAPE = (3, 5, 4)
AVERAGES: list[reweighing.Average] = ["softmax", "logits", "vote"]
each_average = pytest.mark.parametrize("average", AVERAGES)
each_formula = pytest.mark.parametrize("formula", ["intended", "released"])
quick: Callable[..., Any] = partial(mora, steps=4, mixing=(0.5, 1.0), targeted=1, eps=0.1)


@cache
def _network(seed: int, classes: int = 4, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Bent, and steep enough to be fooled by steps of a few 1/255."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, 8), nn.Tanh(), nn.Linear(8, classes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        model[1].weight *= 0.3
    return model.to(dtype).eval()


def _networks(count: int = 3, classes: int = 4, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    return [_network(seed, classes, dtype) for seed in range(count)]


def _images(samples: int = 6, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Some pixels are 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return (1.2 * torch.rand(samples, *SHAPE, generator=generator, dtype=torch.float64) - 0.1).clamp(0, 1).to(dtype)


def _said(networks: Any, images: Tensor, average: str = "softmax", weights: list[float] | None = None) -> Tensor:
    """The class that the ensemble answers, from its definition; of classes that are as good the lowest."""
    shares = [1 / len(networks)] * len(networks) if weights is None else weights
    with torch.no_grad():
        logits = [network(images).double() for network in networks]
    found = []
    for sample in range(len(images)):
        total = torch.zeros(logits[0].shape[1], dtype=torch.float64)
        for share, member in zip(shares, logits, strict=True):
            if average == "vote":
                total[int(member[sample].argmax())] += share
            else:
                total += share * (member[sample].softmax(-1) if average == "softmax" else member[sample])
        found.append(next(k for k in range(len(total)) if total[k] >= total.max() - 1e-9))
    return torch.tensor(found, dtype=torch.int64)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# The loss


def _some_logits(scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Of 3 members for 9 images and 5 classes, some of whose gaps exceed 10; and labels, that most have right."""
    logits = scale * torch.randn(3, 9, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits[0, 2, 4] += 25
    logits[:, 5, 1] += 40
    labels = logits.sum(0).argmax(-1)
    labels[7] = (labels[7] + 1) % 5
    return logits, labels


WEIGHTS = {"equal": [1 / 3] * 3, "unequal": [0.5, 0.2, 0.3]}
each_weights = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


@each_weights
def test_members_weights_are_a_gradient(weights: list[float]) -> None:
    """∂(log p[a] − log p[label]) / ∂z_i[a], by autograd."""
    logits, labels = _some_logits(1.0)
    logits.requires_grad_()
    gate = torch.tensor(weights, dtype=torch.float64)
    mixture = (gate[:, None, None] * logits.softmax(-1)).sum(0).log()
    actual = reweighing.log_member_weights(
        logits.detach(), gate[:, None].expand(3, 9), mixture.detach(), labels, 1.0, "intended"
    ).exp()
    for sample, label in enumerate(labels.tolist()):
        rival = max((k for k in range(5) if k != label), key=mixture[sample].tolist().__getitem__)
        total = mixture[sample, rival] - mixture[sample, label]
        gradient = torch.autograd.grad(total, logits, retain_graph=True)[0]
        assert_matches(actual[:, sample], gradient[:, sample, rival], 1e-9)


def _gap(values: Tensor) -> float:
    first, second = sorted(values.tolist(), reverse=True)[:2]
    return first - second


def _loss_of_one(z: list[Tensor], v: list[float], label: int, average: str, mixing: float, formula: str) -> Tensor:
    """The loss of one image, from the formulas; z are the members' logits (K,)."""
    beta = {"softmax": 0.2, "logits": 0.0, "vote": 0.8}[average]
    classes = range(len(z[0]))
    if average == "logits":
        output = sum(share * member for share, member in zip(v, z, strict=True))
    else:
        soft = [member / _gap(member) for member in z] if average == "vote" else z
        output = sum(share * member.softmax(0) for share, member in zip(v, soft, strict=True)).log()  # type: ignore[union-attr]
    assert isinstance(output, Tensor)
    mixed = (1 - mixing) * output / _gap(output)
    if mixing:
        members, shares = list(z), list(v)
        if formula == "released":
            members, shares = [*members, output], [*shares, 1 / len(z)]
        temperature = max(1.0, max(_gap(member) for member in members) / 10)
        p = sum(share * (member / temperature).softmax(0) for share, member in zip(v, z, strict=True))
        assert isinstance(p, Tensor)
        a = max((k for k in classes if k != label), key=p.tolist().__getitem__)
        right = int(p.argmax()) == label
        top, below = torch.zeros(len(classes), dtype=torch.float64), 0.0
        for share, member in zip(shares, members, strict=True):
            q = (beta * member).softmax(0)
            if formula == "released" and right:
                w = q[a] * (1 + q[a]) / p[a] - q[a] * q[label] / p[label]
            else:
                w = q[a] * (q[label] / p[label] + (1 - q[a]) / p[a])
            assert w >= 0
            mask = 1.0 if average == "logits" or int(member.argmax()) == label else 0.0
            weight = share * float(w.detach()) * mask
            top, below = top + weight * member / temperature, below + weight
        if below:
            mixed = mixed + mixing * top / below
    return mixed.logsumexp(0) - mixed[label]


@each_average
@each_formula
@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_the_formulas(average: Any, formula: Any, mixing: float) -> None:
    """And its gradient; of one image no member is right."""
    logits, labels = _some_logits()
    logits[:, 8] = torch.tensor([[9.0, 8, 0, 0, 0], [0, 8, 9, 0, 0], [0, 8, 0, 9, 0]])
    labels[8] = 1
    for weights in WEIGHTS.values():
        z = logits.clone().requires_grad_()
        gate = torch.tensor(weights, dtype=torch.float64).expand(9, -1)
        actual = reweighing.mixed_loss(z, gate, labels, average, mixing, formula)
        gradient = torch.autograd.grad(actual.sum(), z)[0]
        for sample, label in enumerate(labels.tolist()):
            own = [member[sample].clone().requires_grad_() for member in logits]
            expected = _loss_of_one(own, weights, label, average, mixing, formula)
            assert_matches(actual[sample], expected.detach(), 1e-9)
            assert_matches(gradient[:, sample], torch.stack(torch.autograd.grad(expected, own)), 1e-9)


def test_the_formulas_differ_where_the_ensemble_is_right() -> None:
    logits, labels = _some_logits()
    gate = torch.full((9, 3), 1 / 3, dtype=torch.float64)
    losses = [reweighing.mixed_loss(logits, gate, labels, "softmax", 1.0, name) for name in ("intended", "released")]
    assert int((losses[0] - losses[1]).abs().gt(1e-6).sum()) >= 6


@each_average
@each_formula
def test_the_loss_has_a_gradient_where_all_is_saturated(average: Any, formula: Any) -> None:
    """In float32, also where logits are −∞, and where two classes are exactly as good."""
    logits, labels = _some_logits()
    logits = (500 * logits).float()
    logits[:, 0, 1:3] = -torch.inf
    logits[0, 1] = 0
    logits[1, 3] = torch.tensor([0, -torch.inf, -torch.inf, -torch.inf, -torch.inf])
    for mixing in (0.0, 0.5, 1.0):
        z = logits.clone().requires_grad_()
        gate = torch.tensor([0.0, 0.5, 0.5]).expand(9, -1)
        loss = reweighing.mixed_loss(reweighing.finite_logits(z), gate, labels, average, mixing, formula)
        gradient = torch.autograd.grad(loss.sum(), z)[0]
        assert bool(loss.isfinite().all())
        assert bool(gradient.isfinite().all())
        # The ensemble's output has none where two sure members are at odds, and as a member may be all that counts.
        if mixing > 0 and formula == "intended":
            right = (z.argmax(-1) == labels)[1:].any(0)
            assert bool((gradient.abs().amax((0, 2)) > 0)[right].all())
            assert int(right.sum()) >= 5


# The descent


@each_norm
@each_average
def test_a_descent_is_a_loop_over_images(norm: Any, average: Any) -> None:
    """Of one image each, from the first that was shown after the image itself: all that its members were shown."""
    networks, eps, steps = _networks(), {"Linf": 0.03, "L2": 0.2}[norm], 5
    images = _images()
    labels = _said(networks, images, average)
    fooled = 0
    for image, label in zip(images, labels.tolist(), strict=True):
        seen = Recorder(networks[0])
        options: dict[str, Any] = {"eps": eps, "steps": steps, "norm": norm, "average": average}
        options |= {"mixing": (0.5,), "targeted": 0, "formula": "intended", "generator": _seeded()}
        mora([seen, *networks[1:]], image[None], torch.tensor([label]), **options)
        x = before = seen.shown[1][0]
        shown = [image, x]
        for t in range(steps):
            if int(_said(networks, x[None], average)[0]) != label:
                fooled += 1
                break
            point = x.clone().requires_grad_()
            z = [network(point[None])[0] for network in networks]
            loss = _loss_of_one(z, [1 / 3] * 3, label, average, 0.5, "intended")
            direction = torch.autograd.grad(loss, point)[0]
            direction = direction.sign() if norm == "Linf" else direction / direction.norm()
            target = _projected(x + 2 * eps * (1 + math.cos(math.pi * t / steps)) / 2 * direction, image, eps, norm)
            kept = 0.75 if t else 1.0
            x, before = _projected(x + kept * (target - x) + (1 - kept) * (x - before), image, eps, norm), x
            shown.append(x)
        assert len(seen.shown) == len(shown)
        assert_matches(torch.cat(seen.shown), torch.stack(shown), 1e-6)
    assert 0 < fooled < len(images)


def _projected(x: Tensor, image: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "Linf":
        return torch.min(torch.max(x, image - eps), image + eps).clamp(0, 1)
    return (image + (x - image) * min(1.0, eps / float((x - image).norm().clamp_min(1e-9)))).clamp(0, 1)


def test_who_is_fooled_leaves_and_who_was_wrong_never_enters() -> None:
    networks, images = _networks(), _images(12)
    labels = _said(networks, images)
    labels[3] = (labels[3] + 1) % 4
    seen = Recorder(networks[0])
    adversarial = mora([seen, *networks[1:]], images, labels, eps=0.04, steps=6, targeted=2, generator=_seeded())
    assert torch.equal(adversarial[3], images[3])
    assert 0 < int((_said(networks, adversarial) != labels).sum()) - 1 < 11
    near = [(shown[:, None] - images).abs().flatten(2).amax(2) <= 0.04 + 1e-12 for shown in seen.shown]
    left = set(range(12)) - {3}
    for shown, who in zip(seen.shown[1:], near[1:], strict=True):
        assert bool((who.sum(1) == 1).all())
        rows = who.int().argmax(1)
        assert set(rows.tolist()) <= left
        left -= set(rows[_said(networks, shown) != labels[rows]].tolist())
    assert left == set((_said(networks, adversarial) == labels).nonzero()[:, 0].tolist())


def test_who_withstands_is_returned_with_the_largest_loss() -> None:
    networks, images = _networks(), _images(5)
    labels = _said(networks, images)
    seen = Recorder(networks[0])
    adversarial = mora([seen, *networks[1:]], images[:1], labels[:1], eps=0.003, steps=4, targeted=3)
    with torch.no_grad():
        losses = [
            -float(torch.stack([n(x).softmax(-1) for n in networks]).mean(0).log()[0, labels[0]]) for x in seen.shown
        ]
    assert losses[0] < max(losses)
    assert torch.equal(adversarial, seen.shown[losses.index(max(losses))])


def test_descents_are_as_many_as_were_asked_for() -> None:
    """Two for each share but 0, one for each wrong class; each with a pass more than it has steps."""
    networks, images = _networks(), _images(1)
    labels = _said(networks, images)
    for options, descents in (
        ({}, 9 + 3),
        ({"formula": "released"}, 5 + 3),
        ({"mixing": (0, 1), "targeted": 2}, 3 + 2),
        ({"mixing": (), "targeted": 0}, 0),
    ):
        seen = Recorder(networks[0])
        mora([seen, *networks[1:]], images, labels, eps=1e-4, steps=2, **options)
        assert len(seen.shown) == 1 + 3 * descents


def test_both_formulas_begin_at_the_same_random_point() -> None:
    networks, images = _networks(), _images(1)
    seen = Recorder(networks[0])
    attack = partial(mora, [seen, *networks[1:]], images, _said(networks, images), eps=1e-3, steps=1)
    attack(mixing=(0.5, 1.0), targeted=1)
    starts = seen.shown[1::2]
    assert [torch.equal(start, starts[0]) for start in starts] == [True, True, False, False, False]
    assert torch.equal(starts[2], starts[3])
    assert not torch.equal(starts[3], starts[4])


@each_average
def test_targets_are_the_likeliest_wrong_classes(average: Any) -> None:
    """Of a linear network, which each step of an aimed descent takes in the same direction."""
    weight = torch.randn(4, 60, generator=_seeded(), dtype=torch.float64)
    bias = torch.tensor([40.0, 10, 0, 20], dtype=torch.float64)
    seen = Recorder(lambda x: x.flatten(1) @ weight.T + bias)
    images = 0.2 + 0.6 * _images(1)
    mora([seen], images, torch.tensor([0]), eps=0.01, steps=1, mixing=(), targeted=2, average=average, formula="both")
    for rank, target in enumerate((3, 1)):
        start, end = seen.shown[1 + 2 * rank : 3 + 2 * rank]
        assert not torch.equal(start, end)
        z = (start.flatten(1) @ weight.T + bias)[0]
        z = z * 10 / _gap(z) if average == "vote" else z
        towards = weight[target] - z.softmax(0) @ weight
        assert_matches(end, images + 0.01 * towards.sign().view(1, *SHAPE), 1e-9)


# Strength


@each_average
def test_the_worst_of_both_formulas_counts(average: Any) -> None:
    networks, images = _networks(5), _images(24)
    labels = _said(networks, images, average)
    fooled = {}
    for formula in ("intended", "released", "both"):
        adversarial = mora(
            networks,
            images,
            labels,
            average=average,
            formula=formula,
            eps=0.02,
            steps=3,
            targeted=1,
            mixing=(1.0, 0.5),
            generator=_seeded(),
        )  # type: ignore[call-overload]
        fooled[formula] = _said(networks, adversarial, average) != labels
    assert bool((fooled["both"] >= (fooled["intended"] | fooled["released"])).all())
    assert 0 < int(fooled["both"].sum()) < 24


def test_members_that_saturate_are_fooled_where_pgd_stands_still() -> None:
    """Of logits times 50 the ensemble's cross-entropy has a gradient of 0 in float32, or next to none."""
    networks = [lambda x, n=network: 50 * n(x) for network in _networks(dtype=torch.float32)]
    images = _images(24, torch.float32)
    labels = _said(networks, images)

    def ensemble(x: Tensor) -> Tensor:
        return torch.stack([network(x).softmax(-1) for network in networks]).mean(0).clamp_min(1e-38).log()

    other = pgd(ensemble, images, labels, eps=0.1, alpha=0.02, steps=20, generator=_seeded(), keep_best=True)
    adversarial = mora(networks, images, labels, eps=0.1, steps=10, targeted=3, generator=_seeded())
    left, ours = (int((_said(networks, found) == labels).sum()) for found in (other, adversarial))
    assert left >= 10
    assert ours <= left // 2


def _linear(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    """Two classes, whose logits differ by ⟨w, x⟩ + b."""

    def logits(x: Tensor) -> Tensor:
        difference = x.flatten(1) @ weight + bias
        return torch.stack([difference, torch.zeros_like(difference)], 1)

    return logits


@each_norm
@pytest.mark.parametrize("members", [1, 3])
def test_linear_ensembles_are_fooled_just_beyond_their_margin(norm: Any, members: int) -> None:
    """Of averaged logits it is |⟨w, x⟩ + b| / ‖w‖, in the dual norm; the images are far from their bounds."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(members, 60, generator=generator, dtype=torch.float64)
    images = torch.randn(8, *SHAPE, generator=generator, dtype=torch.float64)
    networks = [_linear(weight, torch.tensor(0.5, dtype=torch.float64)) for weight in weights]
    mean = weights.mean(0)
    margins = (images.flatten(1) @ mean + 0.5).abs() / (mean.abs().sum() if norm == "Linf" else mean.norm())
    labels = _said(networks, images, "logits")
    beyond = torch.arange(8) % 2 == 0
    adversarial = mora(
        networks, images, labels, average="logits", norm=norm, bounds=(-50, 50), steps=12,
        eps=margins * torch.where(beyond, 1.001, 0.999),
    )  # fmt: skip
    assert torch.equal(_said(networks, adversarial, "logits") != labels, beyond)


def test_a_vote_is_fooled_where_its_second_member_can_be() -> None:
    """Three linear members, each of pixels of its own: the vote falls with the second of them."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.zeros(3, 60, dtype=torch.float64)
    for i in range(3):
        weights[i, 20 * i : 20 * i + 20] = torch.randn(20, generator=generator, dtype=torch.float64)
    images = torch.randn(12, *SHAPE, generator=generator, dtype=torch.float64)
    networks = [_linear(weight, torch.tensor(0.0, dtype=torch.float64)) for weight in weights]
    signed = (images.flatten(1) @ weights.T) / weights.abs().sum(1)
    labels = _said(networks, images, "vote")
    # How far each member is on the label's side: of those that are already wrong less than nothing.
    margins = torch.where(labels[:, None] == 0, signed, -signed).sort(1).values[:, 1]
    beyond = torch.arange(12) % 2 == 0
    adversarial = mora(
        networks, images, labels, average="vote", bounds=(-50, 50), steps=20,
        mixing=(0.5, 0),
        eps=margins * torch.where(beyond, 1.02, 0.98), generator=_seeded(),
    )  # fmt: skip
    assert torch.equal(_said(networks, adversarial, "vote") != labels, beyond)


# Whom it takes for fooled


def _constant(*logits: float) -> Callable[[Tensor], Tensor]:
    """The same for all images, but for their first pixel, which says nothing of note."""
    return lambda x: torch.tensor(logits).to(x).expand(len(x), -1) + 1e-3 * x[:, 0, 0, :1]


def test_a_vote_is_judged_by_votes() -> None:
    """Of an image that two of three members are narrowly wrong about, but which the average has right; and of ties."""
    images, labels = _images(1, torch.float32), torch.tensor([1])
    networks = [_constant(0.1, 0), _constant(0.1, 0), _constant(0, 9)]
    count = {}
    for average in AVERAGES:
        seen = Recorder(networks[0])
        adversarial = mora([seen, *networks[1:]], images, labels, average=average, steps=2, mixing=(0,), targeted=0)
        count[average] = len(seen.shown)
        assert average != "vote" or torch.equal(adversarial, images)
    assert count == {"softmax": 4, "logits": 4, "vote": 1}
    logits = torch.tensor([[[0.0, 2, 1]], [[1, 0, 0]], [[0, 0, 3]], [[1, 3, 2]]])
    said = partial(reweighing.predicted, logits, average="vote")
    assert int(said(torch.full((1, 4), 0.25))) == 1
    assert int(said(torch.tensor([[0.1, 0.4, 0.4, 0.1]]))) == 0
    assert int(said(torch.tensor([[0.3, 0.2, 0.4, 0.1]]))) == 1
    assert int(said(torch.tensor([[0.0, 0.3, 0.7, 0.0]]))) == 2


@pytest.mark.parametrize("average", ["softmax", "logits"])
def test_members_count_by_their_weight(average: Any) -> None:
    networks, images = _networks(), _images(12)
    weights = [3.0, 1.0, 0.0]
    shares = [0.75, 0.25, 0.0]
    labels = _said(networks, images, average, shares)
    options: dict[str, Any] = {"average": average, "eps": 0.03, "steps": 5, "generator": _seeded()}
    options |= {"mixing": (0.5,), "targeted": 1}
    adversarial = mora(networks, images, labels, weights=weights, **options)
    alone = mora(networks[:2], images, labels, weights=torch.tensor(weights[:2]), formula="intended", **options)
    assert 2 <= int((_said(networks, adversarial, average, shares) != labels).sum()) < 12
    assert 2 <= int((_said(networks[:2], alone, average, shares[:2]) != labels).sum()) < 12


def _mixture(switch: Any) -> ImmunityMoE:
    """Of three experts, its gate sure of one."""
    model = small_mixture().eval()
    model.gate.switch = switch
    with torch.no_grad():
        for name, parameter in model.gate.named_parameters():
            if name.endswith("bias"):
                parameter.add_(2 * torch.arange(len(parameter)).to(parameter))
    return model


def _mixed_images(samples: int) -> Tensor:
    return noisy_images()[:samples]


def test_a_mixture_is_weighed_as_its_switch_says() -> None:
    images = _mixed_images(2)
    options: dict[str, Any] = {"eps": 0.01, "steps": 2, "mixing": (0.5,), "targeted": 0, "formula": "intended"}
    with torch.no_grad():
        labels = _mixture("off")(images).argmax(-1)
    members = [MixtureMembers(_mixture("call"), weighing) for weighing in ("off", "mean")]
    off, mean = (attack_members(part, MoraSettings(**options), images, labels, _seeded()) for part in members)
    assert not torch.equal(off, mean)
    for model, weighing, expected in (
        (_mixture("off"), None, off),
        (_mixture("call"), None, mean),
        (_mixture("mean"), None, mean),
        (_mixture("call"), "off", off),
        (_mixture("off"), "mean", mean),
        (_mixture("off").deterministic(), None, mean),
    ):
        actual = mora(model, images, labels, weighing=weighing, generator=_seeded(), **options)
        assert torch.equal(actual, expected)
    alone = mora(_mixture("off").unstack(), images, labels, generator=_seeded(), **options)
    assert_matches(alone, mean, 1e-9)


@pytest.mark.parametrize("switch", ["off", "mean"])
def test_a_mixture_that_is_fooled_says_so_itself(switch: Any) -> None:
    model, images = _mixture(switch), noisy_images()
    with torch.no_grad():
        labels = model(images).argmax(-1)
        adversarial = mora(model, images, labels, eps=0.3, steps=5, mixing=(0.5,), targeted=2, generator=_seeded())
        assert int((model(adversarial).argmax(-1) != labels).sum()) >= 3


def test_the_gradient_leads_through_the_trained_gate() -> None:
    """Experts that say the same of all images, of which the gate chooses."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = RandomSwitchGate(2)
            self.gate.switch = "off"

        def gate_weights(self, images: Tensor) -> Tensor:
            return (9 * (images.flatten(1).mean(1, keepdim=True) - 0.5) * torch.tensor([1.0, -1.0])).softmax(-1)

        def expert_logits(self, images: Tensor) -> Tensor:
            said = torch.tensor([[2.0, 0, 0], [0, 2, 0]])[:, None].expand(-1, len(images), -1)
            return said + 0 * images.flatten(1).sum(1)[:, None]

    images = torch.full((2, *SHAPE), 0.52)
    adversarial = mora(Chosen(), images, torch.tensor([0, 0]), eps=0.05, steps=4, mixing=(0,), targeted=0)
    assert float(adversarial.flatten(1).mean(1).max()) < 0.5


# Numbers


@each_norm
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_images_stay_in_their_balls_exactly(norm: Any, dtype: torch.dtype) -> None:
    networks = [lambda x, n=network: n(x.float()).to(x.dtype) for network in _networks(dtype=torch.float32)]
    images = (_images(dtype=torch.float64) * 2 - 0.5).clamp(-0.3, 1.4).to(dtype)
    labels = _said(networks, images)
    eps = torch.tensor([0.1, 0.0, 0.03, 0.01, 0.2, 8 / 255], dtype=torch.float64)
    for average in AVERAGES:
        options: dict[str, Any] = {"average": average, "eps": eps, "norm": norm, "bounds": (-0.5, 1.5)}
        adversarial = mora(networks, images, labels, steps=3, mixing=(0.5,), targeted=0, formula="intended", **options)
        assert adversarial.dtype == dtype
        assert not adversarial.requires_grad
        assert not bool(outside(adversarial, images, eps, norm).any())
        assert float(adversarial.min()) >= -0.5
        assert float(adversarial.max()) <= 1.5
        assert not torch.equal(adversarial, images)


@each_norm
def test_gradients_of_next_to_nothing_are_followed(norm: Any) -> None:
    """Members whose logits are far apart, and which images move by 10⁻³⁰."""
    weights = torch.randn(2, 2, 60, generator=_seeded())
    bias = torch.tensor([3.0, 0.0])
    seen = Recorder(lambda x: 1e-30 * (x.flatten(1) @ weights[0].T) + bias)
    networks = [seen, lambda x: 1e-30 * (x.flatten(1) @ weights[1].T) + bias]
    images = 0.3 + 0.4 * _images(1, torch.float32)
    for mixing in (0.0, 0.5, 1.0):
        seen.shown.clear()
        mora(networks, images, torch.tensor([0]), eps=0.1, steps=3, mixing=(mixing,), targeted=1, norm=norm)
        for last in (seen.shown[4], seen.shown[-1]):
            length = (last - images).abs().max() if norm == "Linf" else (last - images).norm()
            assert float(length) == pytest.approx(0.1, rel=1e-3)


def test_half_precision_holds_the_gradient_of_a_tie() -> None:
    """Two members that are at odds, exactly: the loss's own gradient is more than float16 has."""

    def member(own: int) -> Callable[[Tensor], Tensor]:
        def logits(x: Tensor) -> Tensor:
            sure = (1 + 1e-6 * (own + 1) * x.flatten(1).sum(1)).half()
            both = torch.stack([sure, torch.zeros_like(sure)], 1)
            return both if own == 0 else both.flip(1)

        return logits

    seen = Recorder(member(0))
    image = 0.3 + 0.4 * _images(1, torch.float32)
    mora([seen, member(1)], image, torch.tensor([0]), eps=0.1, steps=3, mixing=(0,), targeted=0)
    assert float((seen.shown[-1] - image).abs().min()) == pytest.approx(0.1, rel=1e-3)


def test_logarithms_of_zero_are_no_obstacle() -> None:
    """Members that are sure: log-probabilities of −∞."""

    def sure(network: nn.Module, x: Tensor) -> Tensor:
        logits = network(x)
        lowest = logits.detach().argmin(-1, keepdim=True)
        return logits.log_softmax(-1).scatter(-1, lowest, -torch.inf)

    networks = [partial(sure, network) for network in _networks(dtype=torch.float32)]
    images = _images(12, torch.float32)
    for average in AVERAGES:
        labels = _said(networks, images, average)
        adversarial = mora(networks, images, labels, average=average, eps=0.1, steps=4, mixing=(0.5, 0), targeted=1)
        assert bool(adversarial.isfinite().all())
        assert int((_said(networks, adversarial, average) != labels).sum()) >= 3


@each_average
@pytest.mark.parametrize(("members", "classes"), [(1, 2), (1, 3), (2, 2), (3, 3), (4, 12)])
def test_any_number_of_members_and_classes(average: Any, members: int, classes: int) -> None:
    networks, images = _networks(members, classes), _images(10)
    labels = _said(networks, images, average)
    adversarial = quick(networks, images, labels, average=average, targeted=9, eps=0.2, generator=_seeded())
    assert int((_said(networks, adversarial, average) != labels).sum()) >= 3


def test_no_images_and_no_steps() -> None:
    networks = _networks()
    for norm in ("Linf", "L2"):
        empty = quick(networks, _images(0), torch.zeros(0, dtype=torch.int64), norm=norm)
        assert empty.shape == (0, *SHAPE)
    images = _images(3)
    labels = _said(networks, images)
    assert quick(networks, images, labels, steps=0, eps=1e-3).shape == images.shape


def test_several_radii_begin_at_the_same_random_state() -> None:
    networks, images = _networks(), _images(4)
    labels = _said(networks, images)
    radii: list[Any] = [0.01, torch.full((4,), 0.02), 0.05]
    attack = partial(mora, networks, images, labels, steps=2, mixing=(0.5,), targeted=0)
    found = attack(eps=radii, generator=_seeded())
    for radius, adversarial in zip(radii, found, strict=True):
        assert torch.equal(adversarial, attack(eps=radius, generator=_seeded()))


def test_preprocessing_is_a_layer_before_the_members() -> None:
    images, about = _images(5), {"mean": [0.4, 0.5, 0.6], "std": 0.8}
    mean = torch.tensor(about["mean"], dtype=torch.float64).view(3, 1, 1)
    inside = [lambda x, n=network: n((x - mean) / 0.8) for network in _networks()]
    labels = _said(inside, images)
    actual = quick(_networks(), images, labels, preprocessing=about, generator=_seeded())
    assert_matches(actual, quick(inside, images, labels, generator=_seeded()), 1e-9)
    mixture = _mixture("off")
    shown = _mixed_images(2)
    with torch.no_grad():
        labels = mixture(shown).argmax(-1)
    attack = partial(mora, mixture, labels=labels, steps=2, mixing=(1.0,), targeted=0, formula="intended")
    scaled = attack(images=0.5 * shown, eps=0.005, bounds=(0, 0.5), preprocessing={"std": 0.5}, generator=_seeded())
    assert_matches(2 * scaled, attack(images=shown, eps=0.01, generator=_seeded()), 1e-9)


# What is left alone


class _Counted(nn.Module):
    """Has a statistic that moves in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return logits


def test_a_generator_of_ones_own_is_all_that_is_drawn_from() -> None:
    networks, images = _networks(), _images(4)
    labels = _said(networks, images)
    before = torch.get_rng_state()
    once = quick(networks, images, labels, eps=0.01, generator=_seeded())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert torch.equal(quick(networks, images, labels, eps=0.01), once)
    assert not torch.equal(torch.get_rng_state(), before)


def test_modes_gradients_and_labels_stay_as_they_were() -> None:
    networks = copy.deepcopy(_networks())
    for network in networks:
        network.append(_Counted())
    networks[0].train()
    networks[1].train()[2].eval()
    state = copy.deepcopy([network.state_dict() for network in networks])
    modes = [[module.training for module in network.modules()] for network in networks]
    images = _images(4)
    kept = images.clone()
    with torch.no_grad():
        quick(nn.ModuleList(networks), images, torch.tensor([0, 1, 2, 3]))
        assert not torch.is_grad_enabled()
    assert torch.equal(images, kept)
    assert modes == [[module.training for module in network.modules()] for network in networks]
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())
    for network, before in zip(networks, state, strict=True):
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    networks[2].train()
    with pytest.warns(MovedStatisticsWarning):
        quick([lambda x: networks[2](x)], images, torch.tensor([0, 1, 2, 3]))


# Errors


def test_a_model_without_members_is_refused() -> None:
    images, labels = _images(2), torch.tensor([0, 1])
    for model in (_network(0), lambda x: x.flatten(1)):
        with pytest.raises(ValueError, match="model: expected a list of networks, or a mixture with `expert_logits`"):
            mora(model, images, labels)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"average": "mean"}, ValueError, "average: expected one of softmax, logits, vote, got 'mean'"),
        ({"formula": "paper"}, ValueError, "formula: expected one of both, intended, released, got 'paper'"),
        ({"norm": "L1"}, ValueError, "norm: expected one of Linf, L2, got 'L1'"),
        ({"weighing": "on"}, ValueError, "weighing: expected one of mean, off, got 'on'"),
        ({"weighing": "off"}, ValueError, "weighing: expected None"),
        ({"weights": [1, 2]}, ValueError, "weights: expected one of each network (3,), got (2,)"),
        ({"weights": [1, -2, 1]}, ValueError, "weights: expected finite numbers of at least 0"),
        ({"mixing": (0.5, 1.5)}, ValueError, "mixing: expected numbers from 0 to 1, got 1.5"),
        ({"mixing": (-1,)}, ValueError, "mixing: expected a finite number of at least 0, got -1"),
        ({"steps": -1}, ValueError, "steps: expected at least 0, got -1"),
        ({"targeted": 1.5}, TypeError, "targeted: expected a whole number, got 1.5"),
        ({"mixing": 0.5}, TypeError, "mixing: expected several numbers from 0 to 1, got 0.5"),
        ({"eps": -0.1}, ValueError, "eps: expected a finite number of at least 0, got -0.1"),
        ({"eps": torch.zeros(2)}, ValueError, "eps: expected a number, or one of each image (3,), got (2,)"),
        ({"bounds": (1, 0)}, ValueError, "bounds: expected (low, high)"),
        ({"labels": torch.tensor([0, 1, 4])}, ValueError, "labels: expected 0 to 3, got 4 for image 2"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, "labels: expected integers (3,)"),
        ({"images": _images(3) + 1}, ValueError, "images: expected values in [0, 1]"),
        ({"images": [0.5]}, TypeError, "images: expected a tensor, got list"),
        ({"model": []}, ValueError, "model: expected at least one network, got none"),
        ({"model": [3]}, TypeError, "model: expected networks that can be called, got int"),
        ({"model": [_network(0), _network(0, 3)]}, ValueError, "model: expected 4 classes of network 1, got 3"),
        ({"model": [lambda x: x]}, ValueError, "model: expected outputs (3, K)"),
        ({"model": [lambda x: x.flatten(1)[:, :1]]}, ValueError, "model: expected members' logits (N, 3, K)"),
        ({"model": [lambda x: _network(0)(x.detach())]}, ValueError, "model: expected outputs with a gradient"),
        ({"model": [lambda x: 0 * _network(0)(x)], "labels": torch.zeros(3).long()}, ValueError, "depend on the"),
        ({"preprocessing": {"median": 1}}, ValueError, "preprocessing: expected mean, std and axis, got 'median'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    images = _images(3)
    given = {"model": _networks(), "images": images, "labels": _said(_networks(), images), "steps": 1} | options
    with pytest.raises(error, match=re.escape(message)):
        mora(**given)


def test_a_mixture_has_its_own_weights() -> None:
    with pytest.raises(ValueError, match="weights: expected None, as a mixture has its own"):
        mora(_mixture("off"), _mixed_images(2), torch.tensor([0, 1]), weights=[1, 2, 3])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("since", [0, 1, 3])
def test_outputs_that_are_no_numbers_are_named(since: int, value: float) -> None:
    """From the image itself on, or from a later pass."""
    images = _images(4)
    images[:, 0, 0, 0] = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    calls = 0

    def broken(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        sick = (x[:, 0, 0, 0] - 0.5).abs() < 0.1
        return torch.where((sick & (calls > since))[:, None], value, _network(0)(x))

    labels = _said(_networks(), images)
    with pytest.raises(NotFiniteError, match="for image 2"):
        mora([broken, *_networks()[1:]], images, labels, eps=1e-3, steps=3)


def test_images_that_cannot_be_moved_are_told_of() -> None:
    """Of one image the members' outputs have a gradient of exactly 0."""

    def flat(x: Tensor) -> Tensor:
        return torch.where((x[:, 0, 0, 0] > 0.5)[:, None], _network(0)(x).round() + 0 * _network(0)(x), _network(0)(x))

    images = 0.2 * _images(3)
    images[1] = 0.9
    labels = _said([flat], images)
    with pytest.warns(UnmovedWarning, match="exactly zero for 1 of 3 images"):
        mora([flat], images, labels, eps=1e-3, steps=2)


def test_settings_are_a_value() -> None:
    assert MoraSettings() == MoraSettings(eps=8 / 255, steps=100, mixing=(0.5, 0, 0.25, 0.75, 1), targeted=9)
    assert MoraSettings(norm="L2", bounds=(-1, 1)).radius == 2
    images, networks = _images(3), _networks()
    labels = _said(networks, images)
    settings = MoraSettings(eps=0.1, steps=4, mixing=(0.5, 1.0), targeted=1)
    actual = attack_members(NetworkMembers(networks), settings, images, labels, _seeded())
    assert torch.equal(actual, quick(networks, images, labels, generator=_seeded()))
    assert log_mixture(NetworkMembers(networks).logits(images)).shape == (3, 4)
