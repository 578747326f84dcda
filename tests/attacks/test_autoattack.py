"""AutoAttack and Square Attack: as strong as can be where that is known, exactly in the ball, and leaving no trace."""

from __future__ import annotations

import copy
import inspect
import random
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, RandomSwitchGate
from immunity_fast.attacks import NotFiniteError, pgd
from immunity_fast.attacks.apgd import Descent
from immunity_fast.attacks.autoattack import _Parts, autoattack
from immunity_fast.attacks.fab import fab_targeted
from immunity_fast.attacks.projections import Norm
from immunity_fast.attacks.square import square, square_search
from immunity_fast.models.gate import SwitchingGateWarning
from tests import attacked_classifiers, grids
from tests.attacked_classifiers import (
    CLASSES,
    EPS,
    Model,
    assert_in_ball,
    classifier,
    correct,
    data,
    distances,
    linear,
)

torchattacks = pytest.importorskip("torchattacks")

autoattack_module: Any = sys.modules[autoattack.__module__]  # whose name is a function's in the package
one_thread = attacked_classifiers.one_thread

# Few steps and queries, for speed.
quick = partial(autoattack, num_classes=CLASSES, eps=EPS["Linf"], steps=6, queries=20)
quick_square = partial(square, eps=32 / 255, queries=30)
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "standard": quick,
    "rand": partial(quick, version="rand", steps=3),
    "square": quick_square,
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])


@pytest.mark.parametrize(("classes", "norm"), grids.every(2, (2, 3, 11), ("Linf", "L2")))
def test_a_linear_model_is_attacked_optimally(classes: int, norm: Norm) -> None:
    """Whichever images can be fooled at all are, and no others."""
    model, images, labels = linear(classes)
    far = distances(model, images, labels, norm)
    eps = float(far.median()) * 1.0001
    adversarial = autoattack(model, images, labels, num_classes=classes, eps=eps, norm=norm, steps=8, queries=5)
    assert_in_ball(adversarial, images, eps, norm)
    assert torch.equal(correct(model, adversarial, labels), far > eps)


@each_norm
def test_stronger_than_pgd_and_exactly_in_the_ball(norm: Norm) -> None:
    model, (images, labels), eps = classifier(), data(), EPS[norm]
    clean = correct(model, images, labels)
    generator = torch.Generator().manual_seed(0)
    weaker = pgd(model, images, labels, eps=eps, alpha=eps / 3, norm=norm, steps=6, generator=generator)
    adversarial = quick(model, images, labels, eps=eps, norm=norm)
    assert_in_ball(adversarial, images, eps, norm)
    left = correct(model, adversarial, labels)
    assert float(clean.float().mean()) > 0.9
    assert left.sum() <= correct(model, weaker, labels).sum()
    assert 0 < left.sum() < clean.sum() - 10
    # Images that withstood, and those that needed no attack, come back as they were.
    assert torch.equal(adversarial[left | ~clean], images[left | ~clean])
    assert bool((adversarial != images)[clean & ~left].flatten(1).any(1).all())


@each_norm
def test_square_gets_better_with_queries(norm: Norm) -> None:
    model, (images, labels), eps = classifier(), data(), 3 * EPS[norm]
    right = [int(correct(model, images, labels).sum())]
    for queries in (5, 80):
        adversarial = square(model, images, labels, eps=eps, norm=norm, queries=queries)
        assert_in_ball(adversarial, images, eps, norm)
        right.append(int(correct(model, adversarial, labels).sum()))
    assert right[2] < right[1] - 5
    assert right[2] < right[0] / 2


@pytest.mark.parametrize(
    ("name", "norm", "dtype"),
    grids.every(3, ATTACKS, ("Linf", "L2"), (torch.float16, torch.bfloat16, torch.float64)),
)
def test_any_dtype(name: str, norm: Norm, dtype: torch.dtype) -> None:
    attack, model, (images, labels), eps = ATTACKS[name], classifier().to(dtype), data(6), 4 * EPS[norm]
    images = images.to(dtype)
    adversarial = attack(model, images, labels, eps=eps, norm=norm)
    assert_in_ball(adversarial, images, eps, norm)
    assert correct(model, adversarial, labels).sum() < correct(model, images, labels).sum()


def test_log_probabilities_are_as_good_as_logits() -> None:
    model, (images, labels) = classifier(), data(24)
    adversarial = quick(model, images, labels)
    again = quick(lambda x: F.log_softmax(model(x), -1), images, labels)
    difference = correct(model, adversarial, labels).sum() - correct(model, again, labels).sum()
    assert abs(int(difference)) <= 2


def test_the_first_part_is_torchattacks_on_what_is_right() -> None:
    """With two classes "rand" is APGD on the cross-entropy alone."""
    model, images, labels = linear(2)
    labels[:7] = 1 - labels[:7]
    eps = 1.01 * float(distances(model, images[7:], labels[7:], "Linf").median())
    actual = autoattack(model, images, labels, num_classes=2, eps=eps, version="rand", steps=12, seed=3)
    expected = torchattacks.APGD(model, eps=eps, steps=12, eot_iter=20, seed=3)(images, labels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)
    assert torch.equal(actual[:7], images[:7])
    assert int((actual != images).flatten(1).any(1).sum()) > 5


class Run(NamedTuple):
    """What a part was given, and what it handed back."""

    part: str
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    found: Tensor


STANDARD = ["apgd_ce", "apgd_dlr", "fab", "square"]


def _watch(monkeypatch: pytest.MonkeyPatch, idle: tuple[str, ...] = ()) -> list[Run]:
    """Filled as the parts run; idle ones hand back what they were given."""
    seen: list[Run] = []

    def watched(name: str) -> Callable[..., Tensor]:
        method = getattr(_Parts, name)

        def run(self: Any, images: Tensor, labels: Tensor, aim: Any) -> Tensor:
            found = images if name in idle else method(self, images, labels, aim)
            seen.append(Run(name, images, labels, None if aim is None else aim.targets, found))
            return found

        return run

    for name in STANDARD:
        monkeypatch.setattr(_Parts, name, watched(name))
    return seen


def test_each_part_gets_the_survivors_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several times where it is targeted, the likeliest class first; as one batch where that is no larger."""
    seen = _watch(monkeypatch)
    model, (images, labels) = classifier(), data()
    eps = EPS["Linf"]
    adversarial = quick(model, images, labels)
    left = correct(model, images, labels)
    with torch.no_grad():
        order = model(images).scatter(1, labels[:, None], torch.inf).argsort(1, descending=True)
    tried = dict.fromkeys(STANDARD, 0)
    for run in seen:
        survivors, count = images[left], len(run.images) // int(left.sum())
        assert torch.equal(run.images, survivors.repeat(count, 1, 1, 1))
        assert len(run.images) <= len(images)
        if run.targets is None:
            assert count == 1
        else:
            first = tried[run.part] + 1
            assert torch.equal(run.targets, order[left][:, first : first + count].T.flatten())
        tried[run.part] += count
        inside = torch.maximum(torch.minimum(run.found, run.images + eps), run.images - eps)
        fooled = ~correct(model, inside, run.labels).view(count, -1)
        left[left.clone()] = ~fooled.any(0)
    assert list(dict.fromkeys(run.part for run in seen)) == STANDARD
    assert tried == {"apgd_ce": 1, "apgd_dlr": 4, "fab": 4, "square": 1}
    assert max(len(run.images) // len(run.images.unique(dim=0)) for run in seen) > 1, "no batch of several targets"
    assert torch.equal(left, correct(model, adversarial, labels))
    assert 0 < int(left.sum()) < len(seen[1].images) < len(images)


@pytest.mark.parametrize("version", ["standard", "rand"])
def test_the_settings_are_the_published_ones(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the authors' `set_version`; nothing is run."""
    seen = list[Any]()

    def descent(self: Descent, network: Any, images: Tensor, _labels: Tensor, targets: Any, *_: Any, **__: Any) -> None:
        count = 0 if targets is None else len(targets) // len(images.unique(dim=0))
        seen.append((self.objective.loss, self.steps, self.rho, network.draws, count))

    def fab(_: Any, images: Tensor, *__: Any, steps: int, **options: Any) -> Tensor:
        assert not {"alpha_max", "eta", "beta"} & set(options)
        seen.append(("fab", steps))
        return images

    def search(_: Any, images: Tensor, *__: Any, queries: int, rescale: bool, **___: Any) -> Tensor:
        seen.append(("square", queries, rescale))
        return images

    monkeypatch.setattr(Descent, "run", descent)
    monkeypatch.setattr(autoattack_module, "fab_targeted", fab)
    monkeypatch.setattr(autoattack_module, "square_search", search)
    model, images, labels = linear(12)
    assert torch.equal(autoattack(model, images, labels, num_classes=12, version=version), images)
    if version == "rand":
        assert seen == [("ce", 100, 0.75, 20, 0), ("dlr", 100, 0.75, 20, 0)]
    else:
        targeted = [("dlr", 100, 0.75, 1, 1)] * 9 + [("fab", 100)] * 9
        assert seen == [("ce", 100, 0.75, 1, 0), *targeted, ("square", 5000, False)]
    defaults = {name: value.default for name, value in inspect.signature(fab_targeted).parameters.items()}
    assert (defaults["alpha_max"], defaults["eta"], defaults["beta"]) == (0.1, 1.05, 0.9)
    assert inspect.signature(square_search).parameters["p_init"].default == 0.8


def _survivors_of_torchattacks(model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, steps: int) -> Tensor:
    """Who withstands its parts, with the settings and in the order of the authors' code: (B,) bool."""
    eps, left = EPS[norm], correct(model, images, labels)
    each = {"norm": norm, "eps": eps, "steps": steps}
    parts = [
        torchattacks.APGD(model, **each),
        torchattacks.APGDT(model, **each, n_classes=CLASSES),
        torchattacks.FAB(model, **each, multi_targeted=True, n_classes=CLASSES),
        torchattacks.Square(model, norm=norm, eps=eps, n_queries=100, p_init=0.8),
    ]
    for part in parts:
        rows = left.nonzero()[:, 0]
        found = part(images[rows], labels[rows])
        inside = (found - images[rows]).clamp(-eps, eps)
        if norm == "L2":
            inside = (found - images[rows]).renorm(2, 0, eps)
        left[rows] = correct(model, images[rows] + inside, labels[rows])
    return left


@each_norm
def test_as_many_survive_as_survive_torchattacks(norm: Norm) -> None:
    model, (images, labels) = classifier(), data()
    theirs = _survivors_of_torchattacks(model, images, labels, norm, steps=15)
    adversarial = autoattack(
        model, images, labels, num_classes=CLASSES, eps=EPS[norm], norm=norm, steps=20, queries=100
    )
    ours = correct(model, adversarial, labels)
    assert 5 < int(theirs.sum()) < 40
    assert int((ours & ~theirs).sum()) <= 1, "an image withstands ours alone"
    assert int((ours != theirs).sum()) <= 1


@each_norm
def test_gates_that_switch_are_not_dropped_for_luck(norm: Norm) -> None:
    """The standard version on a random model: images stay for whole runs, though a draw of theirs was wrong."""
    gate = RandomSwitchGate(3, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), "sample")
    model = ImmunityMoE.from_experts(_experts(), gate=gate, stage="0", mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    images, labels = data(8)
    sizes = list[int]()

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return model(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SwitchingGateWarning)
        autoattack(counted, images, labels, num_classes=CLASSES, eps=2 * EPS[norm], norm=norm, steps=4, queries=1)
    assert len(set(sizes[1:7])) == 1, "the start, four steps, and the judging of all"


def _experts() -> list[nn.Sequential]:
    """Three networks that are not quite alike."""
    torch.manual_seed(1)
    experts = [classifier() for _ in range(3)]
    with torch.no_grad():
        for expert in experts[1:]:
            expert[0].weight += 0.3 * torch.randn_like(expert[0].weight)
    return experts


@pytest.mark.parametrize(("switch", "norm"), grids.every(2, ("sample", "call"), ("Linf", "L2")))
def test_a_step_on_random_draws_passes_the_experts_once(switch: Any, norm: Norm) -> None:
    gate = RandomSwitchGate(3, nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), switch)
    model = ImmunityMoE.from_experts(_experts(), gate=gate, stage="0", mean=(0.0,) * 3, std=(1.0,) * 3).eval()
    passes, counts, whole = list[int](), list[int](), model._logits
    model._logits = lambda x: passes.append(len(x)) or whole(x)  # type: ignore[method-assign, assignment, func-returns-value]
    images, labels = data(8)
    options: dict[str, Any] = {"num_classes": CLASSES, "norm": norm, "eps": EPS[norm] / 2, "version": "rand"}
    for attacked in (model, lambda x: model(x), lambda x: model(x) * 1):
        passes.clear()
        autoattack(attacked, images, labels, steps=2, **options)
        counts.append(len(passes))
    # For the images; and for each of two losses for the start, the steps, and to judge.
    assert counts[0] == counts[1] == 1 + 2 * (1 + 2 + 1)
    assert counts[2] == 1 + 2 * (20 * (1 + 2) + 1), "of what is no mixture nothing is known"


@pytest.mark.parametrize("norm", ["Linf", pytest.param("L2", marks=pytest.mark.exhaustive)])
def test_twenty_draws_by_one_pass_are_as_good_as_by_twenty(norm: Norm) -> None:
    """From the same draws, in the order in which APGD asks for them."""
    experts, (images, labels), steps = _experts(), data(24), 5
    weights = torch.rand(100, 20, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    order = [(0, 19)]
    for loss in range(2):
        first = 1 + loss * (steps + 2)
        order += [(number, draw) for number in range(first, first + steps + 1) for draw in range(20)]
        order.append((first + steps + 1, 19))
    calls = iter(order)

    def mixed(x: Tensor, own: Tensor) -> Tensor:
        return torch.stack([w * expert(x).softmax(-1) for w, expert in zip(own, experts, strict=True)]).sum(0).log()

    def once(x: Tensor) -> Tensor:
        return torch.stack([mixed(x, own) for own in weights[next(numbers)]])

    numbers = iter(range(100))
    options: dict[str, Any] = {"num_classes": CLASSES, "norm": norm, "eps": EPS[norm] / 2, "version": "rand"}
    together = autoattack(once, images, labels, steps=steps, **options)
    apart = autoattack(lambda x: mixed(x, weights[next(calls)]), images, labels, steps=steps, **options)
    assert next(calls, None) is None
    assert next(numbers) == 1 + 2 * (steps + 2)
    assert 3 < int((apart != images).flatten(1).any(1).sum()) < 20
    assert float(((together - apart).abs() < 1e-5).double().mean()) > 0.999, "a sign may hang on the last bit"


@pytest.mark.parametrize(("part", "norm", "power"), grids.every(2, ("apgd_ce", "fab"), ("Linf", "L2"), (0, -60, -100)))
def test_attacks_do_not_depend_on_the_size_of_the_gradient(
    part: str, norm: Norm, power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of others add 1e-12 to a norm, and take slopes below 1e-8 for zero.

    Of a model whose logits hardly differ the cross-entropy has a gradient of their size. Two classes: the worst
    image is the end of a straight line.
    """
    model, images, labels = linear(2)
    far = distances(model, images, labels, norm)
    eps = float(far.median()) * 1.01
    _watch(monkeypatch, idle=tuple({"apgd_ce", "fab", "square"} - {part}))
    options: dict[str, Any] = {"num_classes": 2, "eps": eps, "norm": norm, "steps": 20}
    adversarial = autoattack(lambda x: model(x) * 2.0**power, images, labels, **options)
    assert torch.equal(correct(model, adversarial, labels), far > eps)


@pytest.mark.parametrize(
    ("classes", "version", "expected"),
    [
        (2, "standard", {"apgd_ce": None, "fab": 1, "square": None}),
        (3, "standard", {"apgd_ce": None, "fab": 2, "square": None}),
        (4, "standard", {"apgd_ce": None, "apgd_dlr": 3, "fab": 3, "square": None}),
        (2, "rand", {"apgd_ce": None}),
        (3, "rand", {"apgd_ce": None, "apgd_dlr": None}),
    ],
)
def test_few_classes(
    classes: int, version: Any, expected: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which parts run, and for how many targets."""
    model, images, labels = linear(classes)
    eps = float(distances(model, images, labels, "Linf").median())
    seen = _watch(monkeypatch)
    adversarial = autoattack(model, images, labels, num_classes=classes, version=version, eps=eps, steps=3, queries=5)
    found = dict[str, int | None]()
    for run in seen:
        count = None if run.targets is None else len(run.images) // len(run.images.unique(dim=0))
        found[run.part] = count if count is None else count + (found.get(run.part) or 0)
    assert found == expected
    assert 0.3 < float(correct(model, adversarial, labels).float().mean()) < 0.7


def _state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.mark.parametrize("name", ["standard", pytest.param("rand", marks=pytest.mark.exhaustive), "square"])
def test_the_seed_decides_and_global_generators_stay(name: str) -> None:
    attack = ATTACKS[name] if name == "square" else partial(ATTACKS[name], steps=3)
    model, (images, labels) = classifier(), data(16)

    def noisy(x: Tensor) -> Tensor:
        """All three global generators have a say."""
        scale = 0.02 * (random.random() + np.random.rand())  # noqa: NPY002
        return model(x + scale * torch.randn_like(x))

    for chosen in (model, noisy):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        before = _state()
        first = attack(chosen, images, labels, seed=5)
        assert _state() == before
        torch.rand(3)
        random.random()
        assert torch.equal(attack(chosen, images, labels, seed=5), first)
        assert not torch.equal(attack(chosen, images, labels, seed=6), first)


def test_generators_stay_after_an_error() -> None:
    before = _state()
    with pytest.raises(RuntimeError, match="broken"):
        quick(_raising(after=4), *data(8))
    assert _state() == before


def _raising(after: int) -> Model:
    model, calls = classifier(), []

    def call(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) > after:
            raise RuntimeError("broken")
        return model(x)

    return call


@each_attack
def test_the_model_is_left_as_it_was(attack: Callable[..., Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """torchattacks would put all of it in training mode at the end, and FAB leaves gradients in the parameters."""
    model, (images, labels) = classifier(), data(8)
    model.train()
    model[1].eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    inputs = images.clone().requires_grad_()
    given = labels.clone()
    attack(model, inputs, labels)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [module.training for module in model.modules()] == modes
    assert all(bool((parameter.grad == 7).all()) for parameter in model.parameters())
    assert inputs.grad is None
    assert torch.equal(inputs, images)
    assert torch.equal(labels, given)
    assert capsys.readouterr().out == ""


def test_square_needs_no_gradient_and_leaves_the_output_alone() -> None:
    """torchattacks writes −∞ on what the model returns; what was made in inference mode could not be written on."""
    model, (images, labels) = classifier(), data()
    kept: list[tuple[Tensor, Tensor]] = []

    def detached(x: Tensor) -> Tensor:
        with torch.inference_mode():
            outputs = model(x)
        kept.append((outputs, outputs.clone()))
        return outputs

    adversarial = square(detached, images, labels, eps=48 / 255, queries=60)
    assert correct(model, adversarial, labels).sum() < correct(model, images, labels).sum() - 20
    assert all(torch.equal(outputs, before) for outputs, before in kept)
    with pytest.raises(ValueError, match="expected outputs with a gradient with respect to the images"):
        quick(detached, images, labels)
    with pytest.raises(ValueError, match="expected outputs with a gradient with respect to the images"):
        quick(lambda x: model(torch.ones_like(x)), images, labels)


@each_attack
@each_norm
def test_one_image_and_none(attack: Callable[..., Tensor], norm: Norm) -> None:
    model, (images, labels), eps = classifier(), data(1), 6 * EPS[norm]
    alone = attack(model, images[:1], labels[:1], eps=eps, norm=norm)
    assert_in_ball(alone, images[:1], eps, norm)
    assert not bool(correct(model, alone, labels[:1]))
    empty = attack(lambda x: pytest.fail("nothing to ask"), images[:0], labels[:0], norm=norm)
    assert empty.shape == (0, 3, 8, 8)


@each_attack
def test_images_that_are_wrong_already_cost_nothing(attack: Callable[..., Tensor]) -> None:
    model, (images, labels) = classifier(), data(8)
    sizes: list[int] = []

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return model(x)

    with torch.no_grad():
        wrong = (model(images).argmax(1) + 1) % CLASSES
    assert torch.equal(attack(counted, images, wrong), images)
    assert sizes == [len(images)]
    wrong[5] = labels[5]
    attack(counted, images, wrong)
    assert max(sizes[2:]) <= (1 if attack is quick_square else CLASSES - 1), "one image, or it for each wrong class"


def test_channels_last_models_and_images() -> None:
    """torchattacks' FAB takes views that such gradients have not."""
    model, (images, labels) = classifier(), data(24)
    expected = correct(model, quick(model, images, labels), labels)
    model = model.to(memory_format=torch.channels_last)
    adversarial = quick(model, images.to(memory_format=torch.channels_last), labels)
    assert abs(int(correct(model, adversarial, labels).sum() - expected.sum())) <= 2


@pytest.mark.parametrize("attack", [quick, quick_square])
def test_outputs_that_are_no_numbers(attack: Callable[..., Tensor]) -> None:
    """An argmax over NaN is class 0, so that images of class 0 would pass for robust."""
    model, (images, labels) = classifier(), data(24)

    def from_the_start(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x))[:, None] == 3, torch.nan, model(x))

    def on_the_way(x: Tensor) -> Tensor:
        known = (x.detach()[:, None] == images).flatten(2).all(2).any(1)
        return torch.where(known[:, None], model(x), torch.nan)

    with pytest.raises(NotFiniteError, match="image 3"):
        attack(from_the_start, images, labels)
    with pytest.raises(ValueError, match="NaN or infinite"):
        attack(on_the_way, images[labels == 0], labels[labels == 0])
    with pytest.raises(NotFiniteError, match="image 0"):  # nor can the probability of each class be 0
        attack(lambda x: model(x) - torch.inf, images, labels)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"version": "plus"}, "version"),
        ({"norm": "L1"}, "norm"),
        ({"eps": -1.0}, "eps"),
        ({"steps": 0}, "steps"),
        ({"queries": 0}, "queries"),
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 4}, "model"),
    ],
)
def test_errors_name_the_argument(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: "):
        quick(classifier(), *data(8), **options)
    if argument in ("norm", "eps", "queries"):
        with pytest.raises(ValueError, match=f"^{argument}: "):
            square(classifier(), *data(8), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1.5}, "steps: expected a whole number, got 1.5"),
        ({"queries": "5"}, "queries: expected a whole number, got '5'"),
        ({"seed": 1.5}, "seed: expected a whole number, got 1.5"),
        ({"preprocessing": 3}, "preprocessing: expected dict(mean=…, std=…), got int"),
        ({"preprocessing": {"std": "a"}}, "preprocessing: expected a std of numbers, got 'a'"),
        ({"model": [classifier()]}, "model: expected one that can be called with images, got list"),
        ({"model": nn.ModuleList()}, "model: expected one that can be called with images, got torch.nn"),
    ],
)
def test_errors_of_kinds_name_the_argument(options: dict[str, Any], message: str) -> None:
    images, labels = data(8)
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        quick(**{"model": classifier(), "images": images, "labels": labels, **options})
    if not options.keys() & {"steps", "num_classes"}:
        with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
            square(**{"model": classifier(), "images": images, "labels": labels, **options})


def test_a_seed_of_more_than_64_bits_is_an_error() -> None:
    with pytest.raises(ValueError, match="seed: expected a whole number of 64 bits"):
        quick_square(classifier(), *data(8), seed=1 << 64)


@pytest.mark.parametrize(("attack", "name", "count"), [(quick, "steps", 2), (quick_square, "queries", 30)])
def test_numbers_of_numpy(attack: Callable[..., Tensor], name: str, count: int) -> None:
    model, (images, labels) = classifier(), data(8)
    expected = attack(model, images, labels, seed=3, **{name: count})
    found = attack(model, images, labels, seed=np.int64(3), **{name: np.int64(count)})
    assert torch.equal(found, expected)
    assert not torch.equal(found, images)


@each_attack
def test_errors_of_images_and_labels(attack: Callable[..., Tensor]) -> None:
    model, (images, labels) = classifier(), data(8)
    with pytest.raises(ValueError, match=r"^images: "):
        attack(model, images + 1, labels)
    with pytest.raises(ValueError, match=r"^labels: "):
        attack(model, images, labels[:-1])
    with pytest.raises(ValueError, match=r"^labels: expected 0 to 4"):
        attack(model, images, labels + 1)
    with pytest.raises(ValueError, match=r"^model: expected outputs"):
        attack(lambda x: model(x)[None], images, labels)


def test_torchattacks_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    for attack in ATTACKS.values():
        assert attack(classifier(), *data(4)).shape == (4, 3, 8, 8)


@pytest.mark.parametrize("version", ["standard", "rand"])
def test_the_number_of_classes_is_that_of_the_outputs(version: Any) -> None:
    model, (images, labels) = classifier(), data(8)
    options: dict[str, Any] = {"version": version, "eps": EPS["Linf"], "steps": 2, "queries": 3}
    expected = autoattack(model, images, labels, num_classes=CLASSES, **options)
    assert torch.equal(autoattack(model, images, labels, **options), expected)
    with pytest.raises(ValueError, match=r"^model: expected outputs of at least 2 classes, got 1"):
        autoattack(lambda x: model(x)[:, :1], images, labels * 0, **options)
