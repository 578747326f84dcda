"""The attacks against a loop over images; the best of its images, restarts, draws, starts, and the settings as a value.

`_descent` is that loop: one image at a time, in float64, from the formulas and with plain clamps.
"""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any, NamedTuple, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import attacks
from immunity_fast.attacks import BoundAttack, bim, fgsm, mim, pgd
from tests import attacked_models
from tests.attacked_models import (
    EPS,
    SETTINGS,
    Attack,
    Recorder,
    each_norm,
    said_by,
    small_images,
    small_labels,
    small_network,
    some_targets,
)
from tests.oracle import assert_matches, attack_loss

seeded = attacked_models.seeded


# A loop over images


class Visit(NamedTuple):
    """One image on the way of one descent."""

    image: Tensor
    loss: float
    fooled: bool


def _descent(
    model: nn.Module,
    image: Tensor,
    label: int,
    target: int | None = None,
    *,
    start: Tensor | None = None,
    eps: float,
    alpha: float,
    steps: int,
    norm: str = "Linf",
    loss: str = "ce",
    decay: float | None = None,
) -> list[Visit]:
    """All that one image (C, H, W) becomes, from where it starts to the last."""
    x = image if start is None else start
    momentum = torch.zeros_like(image)
    visits = []
    for _ in range(steps + 1):
        x = x.detach().requires_grad_()
        logits = model(x[None])[0]
        value = attack_loss(logits, label, target, loss)
        best = max(range(len(logits)), key=logits.tolist().__getitem__)
        visits.append(Visit(x.detach(), value.item(), best != label if target is None else best == target))
        direction = torch.autograd.grad(value, x)[0]
        if decay is not None:
            scaled = direction / direction.abs().mean() if direction.any() else direction
            momentum = direction = decay * momentum + scaled
        if not direction.any():
            continue
        if norm == "Linf":
            x = x + alpha * direction.sign()
            x = torch.min(torch.max(x, image - eps), image + eps).clamp(0, 1)
        else:
            x = x + alpha * direction / direction.square().sum().sqrt()
            length = (x - image).square().sum().sqrt()
            x = (image + (x - image) * min(1.0, eps / length.item())).clamp(0, 1)
    return visits


def _descents(model: nn.Module, targets: Tensor | None = None, start: Tensor | None = None, **options: Any) -> Any:
    """`_descent` of each of the small images."""
    images, labels = small_images(), small_labels()
    goals = [None] * len(images) if targets is None else targets.tolist()
    starts = [None] * len(images) if start is None else start
    cases = zip(images, labels.tolist(), goals, starts, strict=True)
    return [_descent(model, *case[:3], start=case[3], **options) for case in cases]


@cache
def _reference(name: str, targeted: bool, loss: str | None = None) -> list[list[Visit]]:
    """Of one of the settings, with its own loss or another."""
    options = SETTINGS[name] | ({} if loss is None else {"loss": loss})
    return _descents(small_network(), some_targets(targeted), **options)


def _assert_images(actual: Tensor, expected: list[Visit], norm: str) -> None:
    """The length of an L2 step is computed in float32."""
    assert_matches(actual, torch.stack([visit.image for visit in expected]), 1e-10 if norm == "Linf" else 1e-6)


def _worst(visits: list[Visit]) -> Visit:
    """The first of those that no other exceeds."""
    return max(visits, key=lambda visit: (visit.fooled, visit.loss))


def _fooled_at(visits: list[Visit]) -> int | None:
    """The step at which the image first fools the model."""
    return next((step for step, visit in enumerate(visits) if visit.fooled), None)


each_setting = pytest.mark.parametrize("name", SETTINGS)
each_aim = pytest.mark.parametrize("targeted", [False, True], ids=["any", "target"])


def _norm(name: str) -> str:
    return str(SETTINGS[name].get("norm", "Linf"))


@each_setting
@each_aim
@pytest.mark.parametrize("loss", ["ce", "dlr", "cw"])
def test_the_last_image_is_the_loops(name: str, targeted: bool, loss: Any) -> None:
    attack = attacks.Attack(**(SETTINGS[name] | {"loss": loss}))
    actual = attack(small_network(), small_images(), small_labels(), some_targets(targeted))
    _assert_images(actual, [visits[-1] for visits in _reference(name, targeted, loss)], _norm(name))


@each_setting
@each_aim
def test_keep_best_keeps_the_worst_image_of_the_loops(name: str, targeted: bool) -> None:
    attack = attacks.Attack(**SETTINGS[name], keep_best=True)
    actual = attack(small_network(), small_images(), small_labels(), some_targets(targeted))
    _assert_images(actual, [_worst(visits) for visits in _reference(name, targeted)], _norm(name))


def test_the_loops_tell_apart_what_those_tests_are_about() -> None:
    """The worst image is not always the last, nor is it always at the same step, or at all, that one is fooled."""
    descents = [visits for name in SETTINGS for visits in _reference(name, False)]
    assert sum(_worst(visits) is not visits[-1] for visits in descents) >= 3
    assert len({_fooled_at(visits) for visits in descents}) >= 5
    assert None in {_fooled_at(visits) for visits in descents}


@each_setting
@each_aim
@pytest.mark.parametrize("keep_best", [False, True])
def test_drop_fooled_stops_an_image_where_it_first_fools(name: str, targeted: bool, keep_best: bool) -> None:
    """And shows the model each image no longer than that."""
    model, descents = Recorder(small_network()), _reference(name, targeted)
    attack = attacks.Attack(**SETTINGS[name], drop_fooled=True, keep_best=keep_best)
    actual = attack(model, small_images(), small_labels(), some_targets(targeted))
    for image, visits in zip(actual, descents, strict=True):
        step = _fooled_at(visits)
        if step is not None:
            _assert_images(image[None], [visits[step]], _norm(name))
        elif keep_best:
            _assert_images(image[None], [_worst(visits)], _norm(name))
    steps = [_fooled_at(visits) for visits in descents]
    assert model.count == sum(SETTINGS[name]["steps"] + 1 if step is None else step + 1 for step in steps)
    everything = Recorder(small_network())
    attacks.Attack(**SETTINGS[name], keep_best=True)(everything, small_images(), small_labels(), some_targets(targeted))
    assert model.count < everything.count == len(actual) * (SETTINGS[name]["steps"] + 1)


@each_setting
def test_restarts_begin_elsewhere_and_the_worst_counts(name: str) -> None:
    model, options = Recorder(small_network()), SETTINGS[name]
    results = []
    for keep_best in (False, True):
        model.shown.clear()
        attack = attacks.Attack(**options, random_start=True, restarts=3, keep_best=keep_best)
        generator = torch.Generator().manual_seed(5)
        results.append(attack(model, small_images(), small_labels(), generator=generator))
    starts = model.shown[:: options["steps"] + 1]
    assert len(starts) == 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert bool((starts[one] != starts[other]).flatten(1).any(1).all())
    runs = [_descents(small_network(), start=start, **options) for start in starts]
    for last, worst, *restarts in zip(*results, *runs, strict=True):
        _assert_images(last[None], [_worst([visits[-1] for visits in restarts])], _norm(name))
        _assert_images(worst[None], [_worst([visit for visits in restarts for visit in visits])], _norm(name))


@each_setting
def test_restarts_leave_alone_what_has_fooled(name: str) -> None:
    """The model is shown only the images that are left, and the others' results are those of the first run."""
    once, often = Recorder(small_network()), Recorder(small_network())
    results = []
    for restarts, model in ((1, once), (3, often)):
        attack = attacks.Attack(**SETTINGS[name], random_start=True, restarts=restarts, drop_fooled=True)
        results.append(attack(model, small_images(), small_labels(), generator=torch.Generator().manual_seed(5)))
    fooled = said_by(small_network(), results[0]) != small_labels()
    assert 0 < int(fooled.sum()) < len(fooled)
    assert torch.equal(results[0][fooled], results[1][fooled])
    assert all(torch.equal(a, b) for a, b in zip(once.shown, often.shown, strict=False))
    assert len(often.shown[len(once.shown)]) == int((~fooled).sum())


def test_restarts_end_when_all_images_have_fooled() -> None:
    model = Recorder(small_network())
    wrong = (said_by(small_network(), small_images()) + 1) % 5
    assert torch.equal(pgd(model, small_images(), wrong, eps=0.0, restarts=3, drop_fooled=True), small_images())
    assert [len(images) for images in model.shown] == [7]


def _accuracy(seed: int, **options: Any) -> float:
    model, labels = small_network(seed), small_labels(40, seed)
    generator = torch.Generator().manual_seed(seed)
    adversarial = pgd(model, small_images(40), labels, steps=4, generator=generator, **options)
    return float((said_by(model, adversarial) == labels).double().mean())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [{"eps": 0.02, "alpha": 0.01}, {"eps": 0.2, "alpha": 0.1, "norm": "L2"}], ids=str)
def test_keeping_dropping_and_restarting_only_lower_accuracy(seed: int, size: dict[str, Any]) -> None:
    plain = _accuracy(seed, **size)
    assert 0 < plain < 1
    kept = _accuracy(seed, **size, keep_best=True)
    assert kept <= plain
    assert _accuracy(seed, **size, drop_fooled=True) == kept
    assert _accuracy(seed, **size, restarts=2) <= plain
    assert _accuracy(seed, **size, restarts=2, keep_best=True) <= kept
    assert _accuracy(seed, **size, restarts=2, drop_fooled=True) <= kept


def test_a_kept_images_loss_is_at_least_the_last_ones() -> None:
    """Of the margin: only an image that fools has a positive one. In float32, with steps too long for the ball."""
    model, images = small_network(dtype=torch.float32), small_images(dtype=torch.float32)
    options: dict[str, Any] = {"eps": 0.2, "alpha": 0.3, "steps": 6, "loss": "cw"}
    results = [bim(model, images, small_labels(), keep_best=keep_best, **options) for keep_best in (False, True)]
    with torch.no_grad():
        last, kept = (
            torch.stack([attack_loss(z, label, None, "cw") for z, label in zip(model(x), small_labels(), strict=True)])
            for x in results
        )
    assert bool((kept >= last - 1e-5).all())
    assert bool((kept > last + 1e-3).any())


# Several draws


def _draws(images: Tensor) -> Tensor:
    return torch.stack([small_network(seed)(images) for seed in (0, 1, 2)])


@each_aim
@pytest.mark.parametrize("loss", ["ce", "dlr", "cw"])
def test_of_several_draws_it_is_the_losses_that_are_averaged(targeted: bool, loss: Any) -> None:
    """An L2 step of the size of the ball shows the gradient's direction."""
    images, labels, targets = small_images(), small_labels(), some_targets(targeted)
    images = 0.5 + 0.2 * images  # no pixel meets the box
    actual = fgsm(_draws, images, labels, eps=0.1, norm="L2", loss=loss, targets=targets)
    for i, label in enumerate(labels.tolist()):
        total = torch.zeros_like(images[i])
        for seed in (0, 1, 2):
            x = images[i].clone().requires_grad_()
            value = attack_loss(
                small_network(seed)(x[None])[0], label, None if targets is None else int(targets[i]), loss
            )
            total += torch.autograd.grad(value, x)[0] / 3
        assert_matches((actual[i] - images[i]) / 0.1, total / total.norm().clamp_min(1e-99), 1e-6)


def test_a_single_draw_is_none() -> None:
    expected = bim(small_network(), small_images(), small_labels(), steps=3, keep_best=True)
    drawn = bim(lambda x: small_network()(x)[None], small_images(), small_labels(), steps=3, keep_best=True)
    assert torch.equal(drawn, expected)


def test_draws_are_fooled_where_their_mean_probabilities_are() -> None:
    """Neither the mean of the logits nor that of the labels' ranks: 0 has probability (1 + .1 + .1)/3 here."""
    logits = torch.tensor([[100.0, 0.0], [-2.2, 0.0], [-2.2, 0.0]], dtype=torch.float64)

    def model(images: Tensor) -> Tensor:
        return logits[:, None] + images.mean((1, 2, 3))[:, None] * torch.tensor([1e-3, 0.0])

    for label, shown in ((0, 1), (1, 4)):
        recorder = Recorder(model)
        bim(recorder, small_images(2), torch.tensor([label] * 2), steps=3, drop_fooled=True)
        assert len(recorder.shown) == shown


# Where to begin, and what to move away from


@each_norm
def test_a_start_is_projected_and_then_begun_from(norm: Any) -> None:
    images, far = small_images(), small_images().roll(1, 0)
    options: dict[str, Any] = {"eps": 0.05, "alpha": 0.01, "norm": norm}
    begun = BoundAttack(attacks.Attack(**options, steps=0, random_start=True), lambda x, _: small_network()(x))
    start = begun(images, small_labels(), start=far)
    length = (far - images).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    inside = (far - images).clamp(-0.05, 0.05) if norm == "Linf" else (far - images) * (0.05 / length)
    assert_matches(start, images + inside)
    moved = BoundAttack(attacks.Attack(**options, steps=3), lambda x, _: small_network()(x))(
        images, small_labels(), start=far
    )
    descents = _descents(small_network(), start=start, steps=3, **options)
    _assert_images(moved, [visits[-1] for visits in descents], norm)


def test_a_reference_is_what_the_model_is_moved_away_from() -> None:
    """KL(reference ‖ model), whose direction an L2 step of the size of the ball shows."""
    images = 0.5 + 0.2 * small_images()
    reference = torch.softmax(torch.randn(7, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64), -1)
    reference[0] = torch.tensor([0.0, 1, 0, 0, 0])
    bound = BoundAttack(attacks.Attack(eps=0.1, alpha=0.1, steps=1, norm="L2"), lambda x, _: small_network()(x))
    actual = bound(images, small_labels(), reference=reference)
    for i in range(7):
        x = images[i].clone().requires_grad_()
        model = torch.log_softmax(small_network()(x[None])[0], -1)
        value = sum(p * (torch.log(p) - model[k]) for k, p in enumerate(reference[i]) if p > 0)
        gradient = torch.autograd.grad(value, x)[0]
        assert_matches((actual[i] - images[i]) / 0.1, gradient / gradient.norm(), 1e-6)


# The settings as one thing


SAME: list[tuple[Attack, dict[str, Any], dict[str, Any]]] = [
    (fgsm, {"eps": 0.02}, {"eps": 0.02, "alpha": 0.02, "steps": 1}),
    (fgsm, {"norm": "L2"}, {"alpha": 1.0, "steps": 1, "norm": "L2"}),
    (fgsm, {}, {"alpha": EPS, "steps": 1}),
    (bim, {}, {"eps": EPS, "alpha": 2 / 255, "steps": 10}),
    (bim, {"norm": "L2", "loss": "cw"}, {"eps": 1.0, "alpha": 0.2, "norm": "L2", "loss": "cw"}),
    (mim, {"steps": 3, "keep_best": True}, {"steps": 3, "decay": 1.0, "keep_best": True}),
    (mim, {"steps": 3, "decay": 0.0, "norm": "L2"}, {"steps": 3, "decay": 0.0, "norm": "L2"}),
    (pgd, {"steps": 3}, {"steps": 3, "random_start": True}),
    (pgd, {"steps": 3, "restarts": 2, "drop_fooled": True, "loss": "dlr"}, {"random_start": True, "steps": 3}),
    (bim, {"bounds": (-1.0, 1.0)}, {"eps": 16 / 255, "alpha": 4 / 255, "bounds": (-1.0, 1.0)}),
    (bim, {"steps": 3, "amp": "bf16"}, {"steps": 3, "amp": "bf16"}),
]


def test_every_setting_of_an_attack_is_tried_here() -> None:
    kinds = get_type_hints(attacks.Attack)
    assert {name for _, options, settings in SAME for name in options | settings} == kinds.keys()
    assert {name for name, _ in BAD} == {name for name, kind in kinds.items() if kind is not bool}


@pytest.mark.parametrize(("function", "options", "settings"), SAME)
@each_aim
def test_an_attack_is_its_function(
    function: Attack, options: dict[str, Any], settings: dict[str, Any], targeted: bool
) -> None:
    results = []
    settings = settings | {name: options[name] for name in options if name not in settings}
    for run in (partial(function, **options), attacks.Attack(**settings)):
        torch.manual_seed(5)
        results.append(run(small_network(), small_images(), small_labels(), targets=some_targets(targeted)))
    assert torch.equal(*results)
    assert not torch.equal(results[0], small_images())


def test_an_attack_is_a_value() -> None:
    attack = attacks.Attack()
    assert attack == attacks.Attack(eps=EPS, alpha=2 / 255)
    assert hash(attack) == hash(attacks.Attack(eps=EPS))
    assert (attacks.Attack(norm="L2").eps, attacks.Attack(norm="L2").alpha) == (1.0, 0.2)
    assert attacks.Attack(norm="L2").radius == 1.0
    with pytest.raises(AttributeError):
        attack.eps = 0.5  # type: ignore[misc]


BAD: list[tuple[str, Any]] = [
    *((name, value) for name in ("eps", "alpha", "decay") for value in (-0.1, float("nan"), float("inf"))),
    ("steps", -1),
    ("restarts", 0),
    ("restarts", -2),
    ("norm", "l2"),
    ("norm", 2),
    ("loss", "nll"),
    ("amp", "fp16"),
    ("bounds", (1.0, 0.0)),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_setting_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*{re.escape(str(value))}"):
        attacks.Attack(**{name: value})


@pytest.mark.parametrize("name", ["steps", "restarts"])
def test_a_fraction_of_a_step_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*2.5"):
        attacks.Attack(**{name: 2.5})


@pytest.mark.parametrize(
    "function",
    [
        bim,
        mim,
        pgd,
        pytest.param(fgsm),
    ],
)
def test_a_norm_that_is_none_is_named(function: Attack) -> None:
    with pytest.raises(ValueError, match=r"norm: expected .*l2"):
        function(small_network(), small_images(), small_labels(), norm="l2")
