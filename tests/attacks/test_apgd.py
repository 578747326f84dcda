"""Auto-PGD: its steps are the published ones, it fools whom torchattacks' fools, and it stops where nothing is left."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, RandomSwitchGate
from immunity_fast.attacks import NotFiniteError, UnmovedWarning, apgd
from immunity_fast.attacks.apgd import Descent, _checkpoints
from immunity_fast.attacks.batch import Worst
from immunity_fast.attacks.mixtures import ExactJudge
from immunity_fast.attacks.parts import Network, Objective
from immunity_fast.attacks.projections import UNIT, Norm
from immunity_fast.models.gate import SwitchingGateWarning
from tests import attacked_classifiers, grids
from tests.attacked_classifiers import CLASSES, EPS, assert_in_ball, classifier, correct, data, distances, linear
from tests.attacked_models import Recorder, small_images, small_network

one_thread = attacked_classifiers.one_thread

each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])


def _seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _starts(images: Tensor, eps: float, norm: Norm, seed: int = 3) -> Tensor:
    """Where the authors' code begins, from the same draws."""
    draw = torch.rand if norm == "Linf" else torch.randn
    move = draw(images.shape, generator=_seeded(seed))
    if norm == "Linf":
        move = 2 * move - 1
    length = torch.linalg.vector_norm(move.flatten(1), ord=math.inf if norm == "Linf" else 2, dim=1)
    return (images + eps * move.to(images) / length.view(-1, 1, 1, 1).to(images)).clamp(0, 1)


CHECKPOINTS = [22, 41, 57, 70, 80, 87, 93, 99]  # of 100 steps, as the paper's formula has them


def _reference(
    loss: Callable[[Tensor], Tensor], image: Tensor, start: Tensor, eps: float, norm: Norm
) -> tuple[list[Tensor], list[float]]:
    """(the points of 100 steps, the step sizes) of Algorithm 1 for one image, in plain float64."""

    def projected(x: Tensor) -> Tensor:
        if norm == "Linf":
            return torch.minimum(torch.maximum(x, image - eps), image + eps).clamp(0, 1)
        length = float((x - image).norm())
        return (image + (x - image) * min(1.0, eps / length)).clamp(0, 1)

    def asked(x: Tensor) -> tuple[float, Tensor]:
        x = x.clone().requires_grad_()
        value = loss(x)
        return float(value.detach()), torch.autograd.grad(value, x)[0]

    size, sizes = 2 * eps, [2 * eps]
    value, slope = asked(start)
    point, before, points, losses = start, start, [start], [value]
    best, best_loss, best_slope = point, value, slope
    checked, checked_size, since = value, 0.0, 0
    for step in range(1, 101):
        along = slope.sign() if norm == "Linf" else slope / slope.norm()
        moved = projected(point + size * along)
        a = 1.0 if step == 1 else 0.75
        moved = projected(point + a * (moved - point) + (1 - a) * (point - before))
        before, point = point, moved
        value, slope = asked(point)
        points.append(point)
        losses.append(value)
        if value > best_loss:
            best, best_loss, best_slope = point, value, slope
        if step in CHECKPOINTS:
            raised = sum(losses[i] > losses[i - 1] for i in range(since + 1, step + 1))
            halve = raised <= 0.75 * (step - since) or (checked_size == size and best_loss <= checked)
            checked, checked_size, since = best_loss, size, step
            if halve:
                size /= 2
                point, slope = best, best_slope
            sizes.append(size)
    return points, sizes


@each_norm
def test_steps_are_those_of_the_paper(norm: Norm) -> None:
    """Every point that the model is shown. The label is a sixth class, so large that nothing fools the model."""
    network, images = small_network(), small_images(3)

    def model(x: Tensor) -> Tensor:
        return F.pad(network(x), (0, 1), value=1e3)

    def margin(outputs: Tensor, _: Tensor) -> Tensor:
        return outputs[:, 1:5].amax(1) - outputs[:, 0]

    recorder, eps = Recorder(model), {"Linf": 0.06, "L2": 0.8}[norm]
    adversarial = apgd(recorder, images, torch.full((3,), 5), eps=eps, norm=norm, loss=margin, generator=_seeded())
    assert [len(shown) for shown in recorder.shown] == [1] + [3] * 101

    def loss(x: Tensor) -> Tensor:
        return margin(network(x[None]), x)[0]

    starts, every = _starts(images, eps, norm), list[float]()
    for index, (image, start) in enumerate(zip(images, starts, strict=True)):
        points, sizes = _reference(loss, image, start, eps, norm)
        for expected, shown in zip(points, recorder.shown[1:], strict=True):
            torch.testing.assert_close(shown[index], expected, rtol=0, atol=1e-7)
        with torch.no_grad():
            worst = max(points, key=lambda x: float(loss(x)))
        torch.testing.assert_close(adversarial[index], worst, rtol=0, atol=1e-7)
        every += [size / eps for size in sizes]
    assert len(set(every)) > 3, "steps of several sizes"


def test_checkpoints_come_faster_and_faster() -> None:
    assert list(_checkpoints(100)) == CHECKPOINTS
    assert list(_checkpoints(100).values()) == [22, 19, 16, 13, 10, 7, 6, 6]
    assert _checkpoints(3) == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize(("loss", "norm"), grids.every(1, ("ce", "dlr"), ("Linf", "L2")))
def test_the_fooled_are_those_of_torchattacks(loss: Any, norm: Norm) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model, (images, labels) = classifier(), data()
    right = correct(model, images, labels)
    images, labels, eps = images[right], labels[right], EPS[norm]
    theirs = torchattacks.APGD(model, norm=norm, eps=eps, steps=20, loss=loss, seed=3)(images, labels)
    ours = apgd(model, images, labels, norm=norm, eps=eps, steps=20, loss=loss, generator=_seeded())
    assert_in_ball(ours, images, eps, norm)
    expected, actual = (correct(model, found, labels) for found in (theirs, ours))
    assert 5 < int(actual.sum()) < len(images) - 5
    assert int((actual != expected).sum()) <= 1


@each_norm
def test_the_fooled_are_those_of_torchattacks_with_a_target(norm: Norm) -> None:
    """On the targeted DLR loss, success being any wrong class; in L2 theirs takes the first image's step for all."""
    torchattacks = pytest.importorskip("torchattacks")
    model, (images, labels) = classifier(), data()
    right = correct(model, images, labels)
    images, labels, eps = images[right], labels[right], EPS[norm]
    with torch.no_grad():
        targets = model(images).argsort(1)[:, -2]
    theirs = torchattacks.APGDT(model, norm=norm, eps=eps, steps=20, n_classes=CLASSES)
    theirs.target_class = 2
    torch.manual_seed(3)
    expected = theirs.attack_single_run(images, labels)[1]
    worst = Worst(images, needed=True)
    descent = Descent(eps, norm, UNIT, steps=20, objective=Objective("dlr"), generator=_seeded())
    descent.run(Network(model, images.dtype), images, labels, targets, torch.arange(len(images)), worst)
    assert torch.equal(worst.success == 0, correct(model, worst.images, labels))
    assert 5 < int((worst.success == 0).sum()) < len(images) - 5
    assert int(((worst.success == 0) != expected).sum()) <= (1 if norm == "Linf" else 3)


@pytest.mark.parametrize(("loss", "norm"), grids.every(2, ("ce", "dlr", "cw"), ("Linf", "L2")))
def test_a_linear_model_is_attacked_optimally(loss: Any, norm: Norm) -> None:
    """Of two classes, or of three to one of which each image is closest: whoever can be fooled is, and nobody else."""
    model, images, labels = linear(3 if loss == "dlr" else 2)
    far = distances(model, images, labels, norm)
    eps = float(far.median()) * 1.001
    adversarial = apgd(model, images, labels, eps=eps, norm=norm, loss=loss, steps=40, restarts=2)
    assert_in_ball(adversarial, images, eps, norm)
    left = correct(model, adversarial, labels)
    assert not bool((~left & (far > eps)).any())
    assert int((left & (far <= eps)).sum()) <= (3 if loss == "dlr" else 0)


@pytest.mark.parametrize("power", [0, -60, -100])
@each_norm
def test_gradients_of_any_size_are_followed(norm: Norm, power: int) -> None:
    model, images, labels = linear(2)
    far = distances(model, images, labels, norm)
    eps = float(far.median()) * 1.01
    adversarial = apgd(lambda x: model(x) * 2.0**power, images, labels, eps=eps, norm=norm, steps=20)
    assert torch.equal(correct(model, adversarial, labels), far > eps)


def test_who_is_fooled_leaves_at_once() -> None:
    model, (images, labels) = classifier(), data()
    recorder, eps = Recorder(model), EPS["Linf"]
    adversarial = apgd(recorder, images, labels, eps=eps, steps=10, generator=_seeded())
    shown = recorder.shown[1:]  # after one image, to see what the model is
    left = labels
    for before, after in pairwise(shown):
        left = left[correct(model, before, left)]
        assert len(after) == len(left)
    assert len(shown[-1]) < len(images) - 10
    fooled = ~correct(model, adversarial, labels)
    assert int(fooled.sum()) > 10


def test_rows_of_one_group_leave_together() -> None:
    model, images, labels = linear(4)
    far = distances(model, images, labels, "Linf")
    images, labels = images[:6], labels[:6]
    rows = torch.arange(6).repeat(3)
    with torch.no_grad():
        targets = model(images).argsort(1, descending=True)[:, 1:].T.flatten()
    eps, recorder = float(far[:6].median()) * 1.001, Recorder(model)
    worst = Worst(images[rows], needed=True)
    descent = Descent(eps, "Linf", UNIT, steps=10, objective=Objective("dlr"), generator=_seeded())
    network = Network(recorder, images.dtype)
    descent.run(network, images[rows], labels[rows], targets, torch.arange(18), worst, groups=rows)
    fooled = (worst.success > 0).view(3, 6).any(0)
    assert torch.equal(fooled, far[:6] <= eps)
    assert 0 < int(fooled.sum()) < 6
    assert len(recorder.shown[-1]) == 3 * int((~fooled).sum())
    assert torch.equal(worst.success > 0, ~correct(model, worst.images, labels[rows]))


def test_restarts_are_for_those_who_survive() -> None:
    model, (images, labels) = classifier(), data()
    settings: dict[str, Any] = {"eps": EPS["Linf"], "steps": 5}
    once = correct(model, apgd(model, images, labels, **settings, generator=_seeded()), labels)
    recorder = Recorder(model)
    again = apgd(recorder, images, labels, **settings, restarts=3, generator=_seeded())
    assert len(recorder.shown[1]) == len(images)
    assert len(recorder.shown[7]) == int(once.sum())
    left = correct(model, again, labels)
    assert not bool((left & ~once).any())


@pytest.mark.parametrize(("loss", "norm"), grids.every(2, ("ce", "dlr", "cw"), ("Linf", "L2")))
def test_targets_are_reached(loss: Any, norm: Norm) -> None:
    model, (images, labels) = classifier(), data(16)
    targets = (labels + 1) % CLASSES
    options: dict[str, Any] = {"eps": 4 * EPS[norm], "norm": norm, "loss": loss, "steps": 20, "targets": targets}
    adversarial = apgd(model, images, labels, **options)
    assert_in_ball(adversarial, images, 4 * EPS[norm], norm)
    assert float(correct(model, adversarial, targets).float().mean()) > 0.9
    assert float(correct(model, images, targets).float().mean()) < 0.1


def test_a_loss_of_ones_own() -> None:
    model, (images, labels) = classifier(), data(16)

    def own(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="none")

    found = [apgd(model, images, labels, loss=loss, steps=8, generator=_seeded()) for loss in ("ce", own)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"^loss: expected one of each image"):
        apgd(model, images, labels, loss=F.cross_entropy, steps=2)


@pytest.mark.parametrize(
    ("dtype", "norm"), grids.every(1, (torch.float16, torch.bfloat16, torch.float64), ("Linf", "L2"))
)
def test_any_dtype_and_bounds(dtype: torch.dtype, norm: Norm) -> None:
    model, (images, labels), eps = classifier().to(dtype), data(24), 2 * EPS[norm]
    images = images.to(dtype)
    adversarial = apgd(model, images, labels, eps=eps, norm=norm, steps=8)
    assert_in_ball(adversarial, images, eps, norm)
    assert correct(model, adversarial, labels).sum() < correct(model, images, labels).sum() - 5
    found = apgd(lambda x: model((x + 1) / 2), images * 2 - 1, labels, eps=2 * eps, norm=norm, steps=8, bounds=(-1, 1))
    assert float(found.min()) >= -1
    assert float(found.max()) <= 1
    assert bool((found < -0.1).any())
    move = (found.double() - (images * 2 - 1).double()).flatten(1)
    assert float(torch.linalg.vector_norm(move, ord=math.inf if norm == "Linf" else 2, dim=1).max()) <= 2 * eps


@each_norm
def test_radii_of_each_image_and_several(norm: Norm) -> None:
    model, (images, labels) = classifier(), data(12)
    radii = torch.linspace(0, 2 * EPS[norm], 12, dtype=torch.float64)
    adversarial = apgd(model, images, labels, eps=radii, norm=norm, steps=6, restarts=2)
    for row, eps in enumerate(radii.tolist()):
        assert_in_ball(adversarial[row : row + 1], images[row : row + 1], eps, norm)
    assert bool((adversarial[-1] != images[-1]).any())
    several = apgd(model, images, labels, eps=[0.01, radii], norm=norm, steps=3, generator=_seeded())
    for found, eps in zip(several, (0.01, radii), strict=True):
        alone = apgd(model, images, labels, eps=eps, norm=norm, steps=3, generator=_seeded())
        torch.testing.assert_close(found, alone, rtol=0, atol=0)


def _noisy(seed: int) -> Callable[[Tensor], Tensor]:
    """Eight linear models in turn, as if one was drawn."""
    weights = torch.randn(8, 12, 3, generator=_seeded(seed))
    calls = [0]

    def model(x: Tensor) -> Tensor:
        calls[0] += 1
        return x.flatten(1) @ weights[(calls[0] - 1) % 8]

    return model


@each_norm
def test_draws_are_averaged(norm: Norm) -> None:
    """By passes, or by a model that gives several: the same, from the same draws; and nobody leaves."""
    images = torch.rand(5, 3, 2, 2, generator=_seeded())
    labels = torch.tensor([0, 1, 2, 0, 1])
    options: dict[str, Any] = {"eps": 0.2, "norm": norm, "steps": 6}
    one = _noisy(0)
    one(images), one(images), one(images)  # so that both begin with the first after a look at one image
    apart = Recorder(one)
    by_passes = apgd(apart, images, labels, draws=4, generator=_seeded(), **options)
    each = _noisy(0)
    together = Recorder(lambda x: torch.stack([each(x) for _ in range(4)]))
    at_once = apgd(together, images, labels, generator=_seeded(), **options)
    assert [len(shown) for shown in apart.shown] == [1] + [5] * 28
    assert [len(shown) for shown in together.shown] == [1] + [5] * 7
    torch.testing.assert_close(by_passes, at_once, rtol=0, atol=1e-5)
    assert_in_ball(at_once, images, 0.2, norm)


def _mixture(switch: Any) -> ImmunityMoE:
    torch.manual_seed(1)
    experts = [classifier() for _ in range(3)]
    with torch.no_grad():
        for expert in experts[1:]:
            expert[0].weight += 0.3 * torch.randn_like(expert[0].weight)
    gate = RandomSwitchGate(3, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), switch)
    with torch.no_grad():
        gate.network[1].weight *= 20
    return ImmunityMoE.from_experts(experts, gate=gate, stage="0", mean=(0.0,) * 3, std=(1.0,) * 3).eval()


@pytest.mark.parametrize(("switch", "draws"), grids.every(1, ("sample", "call"), (1, 5)))
def test_a_gate_that_switches_drops_nobody_for_luck(switch: Any, draws: int) -> None:
    """Images leave when they fool the mixture under every permutation; a step is one pass over the experts."""
    model, (images, labels) = _mixture(switch), data(24)
    sizes, whole = list[int](), model.expert_logits
    model.expert_logits = lambda x: sizes.append(len(x)) or whole(x)  # type: ignore[method-assign, assignment, func-returns-value]
    with warnings.catch_warnings():
        warnings.simplefilter("error" if draws > 1 else "ignore", SwitchingGateWarning)
        adversarial = apgd(model, images, labels, eps=2 * EPS["Linf"], steps=6, draws=draws, generator=_seeded())
    assert_in_ball(adversarial, images, 2 * EPS["Linf"])
    with torch.no_grad():
        means, always = ExactJudge(model, whole)(adversarial, labels, None)
    assert sizes[-7] == 24
    assert len(sizes) <= 3 + 7, "one pass over the experts for each look"
    assert int((~always).sum()) <= sizes[-1] < 24
    assert int((means.argmax(1) != labels).sum()) >= int(always.sum()) > 0


def test_nobody_is_fooled_by_luck_alone() -> None:
    """A ball of one point, where a draw is wrong for half of the images, and nobody always."""
    model, (images, labels) = _mixture("sample"), data(16)
    seen = Recorder(lambda x: model(x))
    labels = model.deterministic()(images).argmax(1).detach()
    adversarial = apgd(seen, images, labels, eps=0.0, steps=4, draws=2, generator=_seeded())
    assert torch.equal(adversarial, images)


@pytest.mark.parametrize("draws", [1, 3])
def test_the_seed_decides_and_nothing_is_left_behind(draws: int) -> None:
    model, (images, labels) = classifier(), data(8)
    model.train()
    model[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    state = torch.get_rng_state()
    with torch.no_grad():
        first = apgd(model, images, labels, steps=3, draws=draws, generator=_seeded(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(apgd(model, images, labels, steps=3, draws=draws, generator=_seeded(5)), first)
    assert not torch.equal(apgd(model, images, labels, steps=3, draws=draws, generator=_seeded(6)), first)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert all(bool((parameter.grad == 7).all()) for parameter in model.parameters())


def test_odd_sizes_and_none() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 3))
    images = torch.rand(3, 1, 5, 3, generator=_seeded())
    assert_in_ball(apgd(model, images, torch.tensor([0, 1, 2]), steps=3), images, 8 / 255)
    empty = apgd(lambda x: pytest.fail("nothing to ask"), images[:0], torch.zeros(0, dtype=torch.long))
    assert empty.shape == (0, 1, 5, 3)


def test_what_is_wrong_with_a_model() -> None:
    model, (images, labels) = classifier(), data(8)

    def ill(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x))[:, None] == 3, torch.nan, model(x))

    with pytest.raises(NotFiniteError, match="image 3"):
        apgd(ill, images, labels, steps=2)
    with pytest.raises(ValueError, match="with a gradient with respect to the images"):
        apgd(lambda x: model(x).detach(), images, labels, steps=2)
    with pytest.raises(ValueError, match="expected outputs that depend on the images"):
        apgd(lambda x: 0 * x.flatten(1)[:, :4] + torch.arange(4.0), images, labels % 4, steps=2)
    with pytest.warns(UnmovedWarning, match="for all 8 images"):
        apgd(lambda x: model(x).round() + 0 * model(x), images, labels, steps=2)


def test_a_probability_of_zero_is_no_error() -> None:
    """Log-probabilities of −∞, for a class that is never meant, and for the label of an image that is fooled."""
    model, (images, labels) = classifier(), data(8)
    never = torch.tensor([0.0, 0.0, 0.0, 0.0, -torch.inf])
    adversarial = apgd(lambda x: F.log_softmax(model(x), -1) + never, images, labels, eps=EPS["Linf"], steps=3)
    assert_in_ball(adversarial, images, EPS["Linf"])


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"norm": "L1"}, "norm"),
        ({"loss": "mse"}, "loss"),
        ({"eps": -1.0}, "eps"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"draws": 0}, "draws"),
        ({"restarts": 0}, "restarts"),
        ({"rho": 1.5}, "rho"),
        ({"bounds": (1, 0)}, "bounds"),
        ({"targets": torch.tensor([0])}, "targets"),
        ({"targets": torch.full((8,), 5)}, "targets"),
        ({"eps": torch.ones(3)}, "eps"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        apgd(classifier(), *data(8), **options)


def test_a_share_of_steps_that_is_no_number() -> None:
    with pytest.raises(TypeError, match="rho: expected a number from 0 to 1"):
        apgd(classifier(), *data(8), rho="a")  # type: ignore[call-overload]


def test_a_number_of_steps_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    seeds = (torch.Generator().manual_seed(0) for _ in range(2))
    found, expected = (
        apgd(classifier(), *data(8), steps=steps, generator=next(seeds)) for steps in (numpy.int64(3), 3)
    )
    assert torch.equal(found, expected)


def test_errors_of_images_and_labels() -> None:
    model, (images, labels) = classifier(), data(8)
    with pytest.raises(ValueError, match=r"^images: "):
        apgd(model, images + 1, labels)
    with pytest.raises(ValueError, match=r"^labels: expected 0 to 4"):
        apgd(model, images, labels + 1)
    with pytest.raises(TypeError, match=r"^labels: "):
        apgd(model, images, [0] * 8)  # type: ignore[call-overload]
