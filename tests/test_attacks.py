"""The attacks: torchattacks' results, and those of a loop over images; inside the ball; whatever they are given.

`_descent` is that loop: one image at a time, in float64, from the formulas and with plain clamps.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, attacks
from immunity_fast.attacks import BoundAttack, NotFiniteError, UnmovedWarning, bim, fgsm, mim, pgd
from immunity_fast.attacks.gradient import _bucket
from immunity_fast.models.gate import Switch
from tests.oracle import assert_matches
from tests.test_attack_losses import loss_of

Attack = Callable[..., Tensor]
Call = tuple[Any, ...]
EPS = 8 / 255

# Few steps, for speed; and the same where the result must not depend on chance.
ATTACKS: dict[str, Attack] = {name: partial(f, steps=3) for name, f in (("bim", bim), ("mim", mim), ("pgd", pgd))}
ATTACKS["fgsm"] = fgsm
FIXED = ATTACKS | {"pgd": partial(pgd, steps=3, random_start=False)}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
each_fixed_attack = pytest.mark.parametrize("attack", FIXED.values(), ids=FIXED)


@cache
def _trained() -> ImmunityMoE:
    """A few steps of training, so that gradients are those of a model that has learnt something."""
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 3, 4, image_size=12)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        loss = F.nll_loss(model(_images()), _labels())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(4)


def _model(switch: Switch = "mean", seed: int = 0) -> ImmunityMoE:
    model = copy.deepcopy(_trained())
    model.gate.switch = switch
    model.gate.generator = torch.Generator().manual_seed(seed)
    return model


def _images(samples: int = 8) -> Tensor:
    """Some pixels are 0 and 1, where the box cuts the ball."""
    images = torch.rand(samples, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return (1.2 * images - 0.1).clamp(0, 1)


def _labels(samples: int = 8) -> Tensor:
    return torch.randint(4, (samples,), generator=torch.Generator().manual_seed(2))


def _assert_in_ball(adversarial: Tensor, images: Tensor, eps: float = EPS, slack: float = 0.0) -> None:
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert not adversarial.requires_grad
    assert float((adversarial.double() - images.double()).abs().max()) <= eps + slack
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1


def _loss(model: ImmunityMoE, images: Tensor) -> float:
    with torch.no_grad():
        return float(F.nll_loss(model(images), _labels(len(images))))


OURS: dict[str, Attack] = {"FGSM": fgsm, "BIM": bim, "MIFGSM": mim, "PGD": pgd, "PGDL2": partial(pgd, norm="L2")}
PARITY: list[tuple[str, dict[str, Any]]] = [
    ("FGSM", {"eps": EPS}),
    ("BIM", {"eps": EPS, "steps": 4}),
    ("MIFGSM", {"eps": EPS, "steps": 4}),
    ("MIFGSM", {"eps": EPS, "steps": 4, "decay": 0.5}),
    ("PGD", {"eps": EPS, "steps": 4, "random_start": False}),
    ("PGD", {"eps": EPS, "steps": 4, "random_start": True}),
    ("PGDL2", {"eps": 1.0, "alpha": 0.2, "steps": 7, "random_start": False}),
    ("PGDL2", {"eps": 1.0, "alpha": 0.2, "steps": 7, "random_start": True}),
]
DEFAULTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in OURS]


def _theirs_and_ours(
    name: str, options: dict[str, Any], model: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """From the same global generator. That something happened is checked."""
    torchattacks = pytest.importorskip("torchattacks")
    theirs = getattr(torchattacks, name)(model, **options)
    if targets is not None:
        theirs.set_mode_targeted_by_label(quiet=True)
    torch.manual_seed(3)
    expected = theirs(images, labels if targets is None else targets)
    torch.manual_seed(3)
    actual = OURS[name](model, images, labels, targets=targets, **options)
    moved = (actual - images).flatten(1)
    if name == "PGDL2":
        assert bool((moved.norm(dim=1) > 0.7).all())
    else:
        assert float(moved.abs().mean()) > EPS / 2
    return expected, actual


@pytest.mark.parametrize(("name", "options"), PARITY)
def test_results_are_torchattacks(name: str, options: dict[str, Any]) -> None:
    """The random start included: both draw the same numbers from the same global generator.

    A step is the sign of a gradient. Where that is all but zero, the last bit of an image, or of a loss that is a mean
    here and a sum there, may decide it; such a pixel is off by a whole step, hence the thousandth that may differ.
    """
    expected, actual = _theirs_and_ours(name, options, _model(), _images(), _labels())
    tolerance = 1e-5 if name == "PGDL2" else 1e-6
    assert float(((actual - expected).abs() <= tolerance).float().mean()) >= 0.999


@pytest.mark.parametrize("targeted", [False, True], ids=["any", "target"])
@pytest.mark.parametrize(("name", "options"), PARITY + DEFAULTS)
def test_results_are_torchattacks_with_targets_and_defaults(name: str, options: dict[str, Any], targeted: bool) -> None:
    """In float64, to which no sign is a matter of rounding; but in float32, whose draws are the same, at random."""
    random = name.startswith("PGD") and options.get("random_start", True)
    dtype = torch.float32 if random else torch.float64
    inputs = (_small(dtype=dtype), _small_images(dtype=dtype), _small_labels())
    expected, actual = _theirs_and_ours(name, options, *inputs, _targets(targeted))
    same = (actual - expected).abs() <= (1e-5 if name == "PGDL2" else 1e-6)
    assert float(same.double().mean()) >= (0.99 if random else 1)


@pytest.mark.parametrize("switch", ["call", "sample"])
@pytest.mark.parametrize("name", ["FGSM", "PGD"])
def test_torchattacks_run_on_the_model_unchanged(name: str, switch: Switch) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model = _model(switch)
    before = copy.deepcopy(model.state_dict())
    adversarial = getattr(torchattacks, name)(model)(_images(), _labels())
    _assert_in_ball(adversarial, _images(), slack=1e-6)
    assert _loss(_model(), adversarial) > _loss(_model(), _images())
    assert not model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@each_attack
@pytest.mark.parametrize("switch", ["call", "sample", "off", "mean"])
def test_results_are_in_the_ball_and_raise_the_loss(attack: Attack, switch: Switch) -> None:
    adversarial = attack(_model(switch), _images(), _labels())
    _assert_in_ball(adversarial, _images())
    assert _loss(_model(), adversarial) > _loss(_model(), _images()) + 0.04


@each_attack
@pytest.mark.parametrize("eps", [0.0, 1 / 255, 0.5, 2.0])
def test_any_radius_is_kept(attack: Attack, eps: float) -> None:
    _assert_in_ball(attack(_model(), _images(), _labels(), eps=eps), _images(), eps)


def test_a_single_step_of_bim_the_size_of_the_ball_is_fgsm() -> None:
    expected = fgsm(_model(), _images(), _labels(), eps=EPS)
    assert torch.equal(bim(_model(), _images(), _labels(), eps=EPS, alpha=EPS, steps=1), expected)
    assert torch.equal(mim(_model(), _images(), _labels(), eps=EPS, alpha=EPS, steps=1), expected)


def test_pgd_without_a_random_start_is_bim() -> None:
    expected = bim(_model(), _images(), _labels(), steps=3)
    assert torch.equal(pgd(_model(), _images(), _labels(), steps=3, random_start=False), expected)


def test_pgd_raises_the_loss_at_least_as_much_as_fgsm() -> None:
    model = _model()
    assert _loss(model, pgd(model, _images(), _labels(), steps=8)) >= _loss(model, fgsm(model, _images(), _labels()))


def test_pgd_starts_where_its_generator_says() -> None:
    def run(seed: int) -> Tensor:
        return pgd(_model(), _images(), _labels(), steps=0, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(torch.get_rng_state(), before)
    _assert_in_ball(run(0), _images())
    assert float((run(0) - _images()).abs().max()) > 0.9 * EPS


def test_a_step_does_not_depend_on_the_size_of_the_batch() -> None:
    together = bim(_model(), _images(), _labels(), steps=2)
    alone = torch.cat(
        [bim(_model(), _images()[i : i + 1], _labels()[i : i + 1], steps=2) for i in range(len(_images()))]
    )
    assert float(((together - alone).abs() <= 1e-6).float().mean()) >= 0.999


@each_attack
@pytest.mark.parametrize("switch", ["call", "mean"])
def test_the_model_and_the_images_are_left_as_they_were(attack: Attack, switch: Switch) -> None:
    model, images = _model(switch), _images().requires_grad_()
    twin = copy.deepcopy(model)
    attack(model, images, _labels())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert images.grad is None
    assert torch.equal(images, _images())
    assert [part.training for part in model.modules()] == [part.training for part in twin.modules()]
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


@each_attack
def test_gradients_already_there_are_kept(attack: Attack) -> None:
    model = _model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    attack(model, _images(), _labels())
    assert all(p.grad is not None and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


@each_fixed_attack
def test_attacks_work_where_gradients_are_disabled(attack: Attack) -> None:
    expected = attack(_model(), _images(), _labels())
    with torch.no_grad():
        actual = attack(_model(), _images(), _labels())
    assert torch.equal(actual, expected)


@each_attack
def test_attacks_work_on_frozen_models_and_plain_functions(attack: Attack) -> None:
    _assert_in_ball(attack(_model().requires_grad_(False), _images(), _labels()), _images())
    _assert_in_ball(attack(lambda x: x.flatten(1)[:, :4], _images(), _labels()), _images())


@each_attack
def test_an_empty_batch_gives_an_empty_result(attack: Attack) -> None:
    assert attack(_model(), _images(0), _labels(0)).shape == (0, 3, 12, 12)


@pytest.mark.parametrize("name", ["bim", "mim", "pgd"])
def test_no_steps_give_detached_images(name: str) -> None:
    adversarial = FIXED[name](_model(), _images().requires_grad_(), _labels(), steps=0)
    assert torch.equal(adversarial, _images())
    assert not adversarial.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_are_welcome(dtype: torch.dtype) -> None:
    assert torch.equal(fgsm(_model(), _images(), _labels().to(dtype)), fgsm(_model(), _images(), _labels()))


@each_attack
@pytest.mark.parametrize("model", [lambda x: _trained()(x).detach(), lambda x: _trained()(0 * x.detach())])
def test_a_model_without_a_gradient_for_the_images_is_an_error(attack: Attack, model: Any) -> None:
    with pytest.raises(ValueError, match="model: its output has no gradient with respect to the images"):
        attack(model, _images(), _labels())


WRONG: list[tuple[str, tuple[Any, Any], dict[str, Any], str]] = [
    ("images exceed 1", (_images() + 0.5, _labels()), {}, r"images: .*\[0, 1\].* to 1\.5"),
    ("images are negative", (_images() - 0.5, _labels()), {}, r"images: .*\[0, 1\].*-0\.5"),
    ("images are not numbers", (_images() * float("nan"), _labels()), {}, r"images: .*\[0, 1\].*nan"),
    ("images are bytes", (_images().byte(), _labels()), {}, r"images: .*torch\.uint8"),
    ("images lack the batch", (_images()[0], _labels()[:1]), {}, r"images: .*\(3, 12, 12\)"),
    ("labels are too few", (_images(), _labels()[:3]), {}, r"labels: .*\(8,\).*\(3,\)"),
    ("labels are one-hot", (_images(), F.one_hot(_labels())), {}, r"labels: .*\(8,\).*\(8, 4\)"),
    ("labels are fractions", (_images(), _labels().float()), {}, r"labels: .*integers.*torch\.float32"),
    ("eps is negative", (_images(), _labels()), {"eps": -0.1}, r"eps: .*-0\.1"),
    ("eps is not a number", (_images(), _labels()), {"eps": float("nan")}, "eps: .*nan"),
]


@pytest.mark.parametrize(("inputs", "options", "text"), [pytest.param(*case[1:], id=case[0]) for case in WRONG])
@each_attack
def test_wrong_arguments_are_named(attack: Attack, inputs: tuple[Any, Any], options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        attack(_model(), *inputs, **options)


@pytest.mark.parametrize("attack", [bim, mim, pgd])
@pytest.mark.parametrize("name", ["alpha", "steps"])
def test_negative_steps_are_named(attack: Attack, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*-1"):
        attack(_model(), _images(), _labels(), **{name: -1})


# A loop over images


@cache
def _small(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Smooth, of 5 classes, steep enough that steps of 1/255 change what it says of some images, and bent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5))
    with torch.no_grad():
        model[0].weight *= 5
        model[3].weight *= 4
    return model.to(dtype).eval()


def _small_images(samples: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    """Some pixels are 0 and 1."""
    images = torch.rand(samples, 3, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (1.2 * images - 0.1).clamp(0, 1).to(dtype)


def _said(model: Attack, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(-1)


def _small_labels(samples: int = 7, seed: int = 0) -> Tensor:
    """What the model says: but of the second image, which fools it from the start."""
    labels = _said(_small(seed), _small_images(samples))
    labels[1:2] = (labels[1:2] + 1) % 5
    return labels


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
        value = loss_of(logits, label, target, loss)
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
    images, labels = _small_images(), _small_labels()
    goals = [None] * len(images) if targets is None else targets.tolist()
    starts = [None] * len(images) if start is None else start
    cases = zip(images, labels.tolist(), goals, starts, strict=True)
    return [_descent(model, *case[:3], start=case[3], **options) for case in cases]


@cache
def _reference(name: str, targeted: bool, loss: str | None = None) -> list[list[Visit]]:
    """Of one of the settings, with its own loss or another."""
    options = SETTINGS[name] | ({} if loss is None else {"loss": loss})
    return _descents(_small(), _targets(targeted), **options)


def _assert_images(actual: Tensor, expected: list[Visit], norm: str) -> None:
    """The length of an L2 step is computed in float32."""
    assert_matches(actual, torch.stack([visit.image for visit in expected]), 1e-10 if norm == "Linf" else 1e-6)


def _worst(visits: list[Visit]) -> Visit:
    """The first of those that no other exceeds."""
    return max(visits, key=lambda visit: (visit.fooled, visit.loss))


def _fooled_at(visits: list[Visit]) -> int | None:
    """The step at which the image first fools the model."""
    return next((step for step, visit in enumerate(visits) if visit.fooled), None)


class Recorder:
    """A model that remembers what it was shown."""

    def __init__(self, model: Attack) -> None:
        self.model, self.shown = model, list[Tensor]()

    def __call__(self, images: Tensor) -> Tensor:
        self.shown.append(images.detach().clone())
        return self.model(images)

    @property
    def count(self) -> int:
        """Of images."""
        return sum(len(images) for images in self.shown)


SETTINGS: dict[str, dict[str, Any]] = {
    "Linf": {"eps": 6 / 255, "alpha": 1 / 255, "steps": 8},
    "Linf, momentum": {"eps": 6 / 255, "alpha": 1.5 / 255, "steps": 6, "decay": 0.7},
    "Linf, past the ball": {"eps": 0.04, "alpha": 0.07, "steps": 6, "loss": "cw"},
    "L2": {"eps": 0.35, "alpha": 0.06, "steps": 8, "norm": "L2", "loss": "dlr"},
    "L2, momentum": {"eps": 0.3, "alpha": 0.5, "steps": 5, "norm": "L2", "decay": 0.3},
}
each_setting = pytest.mark.parametrize("name", SETTINGS)
each_norm = pytest.mark.parametrize("norm", ["Linf", "L2"])
each_aim = pytest.mark.parametrize("targeted", [False, True], ids=["any", "target"])


def _targets(targeted: bool) -> Tensor | None:
    """Of the third image, what it already is."""
    targets = (_small_labels() + torch.tensor([1, 2, 0, 3, 4, 1, 2])) % 5
    return targets if targeted else None


def _norm(name: str) -> str:
    return str(SETTINGS[name].get("norm", "Linf"))


@each_setting
@each_aim
@pytest.mark.parametrize("loss", ["ce", "dlr", "cw"])
def test_the_last_image_is_the_loops(name: str, targeted: bool, loss: Any) -> None:
    attack = attacks.Attack(**(SETTINGS[name] | {"loss": loss}))
    actual = attack(_small(), _small_images(), _small_labels(), _targets(targeted))
    _assert_images(actual, [visits[-1] for visits in _reference(name, targeted, loss)], _norm(name))


@each_setting
@each_aim
def test_keep_best_keeps_the_worst_image_of_the_loops(name: str, targeted: bool) -> None:
    attack = attacks.Attack(**SETTINGS[name], keep_best=True)
    actual = attack(_small(), _small_images(), _small_labels(), _targets(targeted))
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
    model, descents = Recorder(_small()), _reference(name, targeted)
    attack = attacks.Attack(**SETTINGS[name], drop_fooled=True, keep_best=keep_best)
    actual = attack(model, _small_images(), _small_labels(), _targets(targeted))
    for image, visits in zip(actual, descents, strict=True):
        step = _fooled_at(visits)
        if step is not None:
            _assert_images(image[None], [visits[step]], _norm(name))
        elif keep_best:
            _assert_images(image[None], [_worst(visits)], _norm(name))
    steps = [_fooled_at(visits) for visits in descents]
    assert model.count == sum(SETTINGS[name]["steps"] + 1 if step is None else step + 1 for step in steps)
    everything = Recorder(_small())
    attacks.Attack(**SETTINGS[name], keep_best=True)(everything, _small_images(), _small_labels(), _targets(targeted))
    assert model.count < everything.count == len(actual) * (SETTINGS[name]["steps"] + 1)


@each_setting
def test_restarts_begin_elsewhere_and_the_worst_counts(name: str) -> None:
    model, options = Recorder(_small()), SETTINGS[name]
    results = []
    for keep_best in (False, True):
        model.shown.clear()
        attack = attacks.Attack(**options, random_start=True, restarts=3, keep_best=keep_best)
        generator = torch.Generator().manual_seed(5)
        results.append(attack(model, _small_images(), _small_labels(), generator=generator))
    starts = model.shown[:: options["steps"] + 1]
    assert len(starts) == 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert bool((starts[one] != starts[other]).flatten(1).any(1).all())
    runs = [_descents(_small(), start=start, **options) for start in starts]
    for last, worst, *restarts in zip(*results, *runs, strict=True):
        _assert_images(last[None], [_worst([visits[-1] for visits in restarts])], _norm(name))
        _assert_images(worst[None], [_worst([visit for visits in restarts for visit in visits])], _norm(name))


@each_setting
def test_restarts_leave_alone_what_has_fooled(name: str) -> None:
    """The model is shown only the images that are left, and the others' results are those of the first run."""
    once, often = Recorder(_small()), Recorder(_small())
    results = []
    for restarts, model in ((1, once), (3, often)):
        attack = attacks.Attack(**SETTINGS[name], random_start=True, restarts=restarts, drop_fooled=True)
        results.append(attack(model, _small_images(), _small_labels(), generator=torch.Generator().manual_seed(5)))
    fooled = _said(_small(), results[0]) != _small_labels()
    assert 0 < int(fooled.sum()) < len(fooled)
    assert torch.equal(results[0][fooled], results[1][fooled])
    assert all(torch.equal(a, b) for a, b in zip(once.shown, often.shown, strict=False))
    assert len(often.shown[len(once.shown)]) == int((~fooled).sum())


def test_restarts_end_when_all_images_have_fooled() -> None:
    model = Recorder(_small())
    wrong = (_said(_small(), _small_images()) + 1) % 5
    assert torch.equal(pgd(model, _small_images(), wrong, eps=0.0, restarts=3, drop_fooled=True), _small_images())
    assert [len(images) for images in model.shown] == [7]


def _accuracy(seed: int, **options: Any) -> float:
    model, labels = _small(seed), _small_labels(40, seed)
    generator = torch.Generator().manual_seed(seed)
    adversarial = pgd(model, _small_images(40), labels, steps=4, generator=generator, **options)
    return float((_said(model, adversarial) == labels).double().mean())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [{"eps": 0.02, "alpha": 0.01}, {"eps": 0.2, "alpha": 0.1, "norm": "L2"}], ids=str)
def test_keeping_dropping_and_restarting_can_only_lower_the_accuracy(seed: int, size: dict[str, Any]) -> None:
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
    model, images = _small(dtype=torch.float32), _small_images(dtype=torch.float32)
    options: dict[str, Any] = {"eps": 0.2, "alpha": 0.3, "steps": 6, "loss": "cw"}
    results = [bim(model, images, _small_labels(), keep_best=keep_best, **options) for keep_best in (False, True)]
    with torch.no_grad():
        last, kept = (
            torch.stack([loss_of(z, label, None, "cw") for z, label in zip(model(x), _small_labels(), strict=True)])
            for x in results
        )
    assert bool((kept >= last - 1e-5).all())
    assert bool((kept > last + 1e-3).any())


# Several draws


def _draws(images: Tensor) -> Tensor:
    return torch.stack([_small(seed)(images) for seed in (0, 1, 2)])


@each_aim
@pytest.mark.parametrize("loss", ["ce", "dlr", "cw"])
def test_of_several_draws_it_is_the_losses_that_are_averaged(targeted: bool, loss: Any) -> None:
    """An L2 step of the size of the ball shows the gradient's direction."""
    images, labels, targets = _small_images(), _small_labels(), _targets(targeted)
    images = 0.5 + 0.2 * images  # no pixel meets the box
    actual = fgsm(_draws, images, labels, eps=0.1, norm="L2", loss=loss, targets=targets)
    for i, label in enumerate(labels.tolist()):
        total = torch.zeros_like(images[i])
        for seed in (0, 1, 2):
            x = images[i].clone().requires_grad_()
            value = loss_of(_small(seed)(x[None])[0], label, None if targets is None else int(targets[i]), loss)
            total += torch.autograd.grad(value, x)[0] / 3
        assert_matches((actual[i] - images[i]) / 0.1, total / total.norm().clamp_min(1e-99), 1e-6)


def test_a_single_draw_is_none() -> None:
    expected = bim(_small(), _small_images(), _small_labels(), steps=3, keep_best=True)
    drawn = bim(lambda x: _small()(x)[None], _small_images(), _small_labels(), steps=3, keep_best=True)
    assert torch.equal(drawn, expected)


def test_several_draws_are_fooled_where_their_mean_probabilities_are() -> None:
    """Neither the mean of the logits nor that of the labels' ranks: 0 has probability (1 + .1 + .1)/3 here."""
    logits = torch.tensor([[100.0, 0.0], [-2.2, 0.0], [-2.2, 0.0]], dtype=torch.float64)

    def model(images: Tensor) -> Tensor:
        return logits[:, None] + images.mean((1, 2, 3))[:, None] * torch.tensor([1e-3, 0.0])

    for label, shown in ((0, 1), (1, 4)):
        recorder = Recorder(model)
        bim(recorder, _small_images(2), torch.tensor([label] * 2), steps=3, drop_fooled=True)
        assert len(recorder.shown) == shown


# Where to begin, and what to move away from


@each_norm
def test_a_start_is_projected_and_then_begun_from(norm: Any) -> None:
    images, far = _small_images(), _small_images().roll(1, 0)
    options: dict[str, Any] = {"eps": 0.05, "alpha": 0.01, "norm": norm}
    begun = BoundAttack(attacks.Attack(**options, steps=0, random_start=True), lambda x, _: _small()(x))
    start = begun(images, _small_labels(), start=far)
    length = (far - images).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    inside = (far - images).clamp(-0.05, 0.05) if norm == "Linf" else (far - images) * (0.05 / length)
    assert_matches(start, images + inside)
    moved = BoundAttack(attacks.Attack(**options, steps=3), lambda x, _: _small()(x))(
        images, _small_labels(), start=far
    )
    descents = _descents(_small(), start=start, steps=3, **options)
    _assert_images(moved, [visits[-1] for visits in descents], norm)


def test_a_reference_is_what_the_model_is_moved_away_from() -> None:
    """KL(reference ‖ model), whose direction an L2 step of the size of the ball shows."""
    images = 0.5 + 0.2 * _small_images()
    reference = torch.softmax(torch.randn(7, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64), -1)
    reference[0] = torch.tensor([0.0, 1, 0, 0, 0])
    bound = BoundAttack(attacks.Attack(eps=0.1, alpha=0.1, steps=1, norm="L2"), lambda x, _: _small()(x))
    actual = bound(images, _small_labels(), reference=reference)
    for i in range(7):
        x = images[i].clone().requires_grad_()
        model = torch.log_softmax(_small()(x[None])[0], -1)
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
]


@pytest.mark.parametrize(("function", "options", "settings"), SAME)
@each_aim
def test_an_attack_is_its_function(
    function: Attack, options: dict[str, Any], settings: dict[str, Any], targeted: bool
) -> None:
    results = []
    settings = settings | {name: options[name] for name in options if name not in settings}
    for run in (partial(function, **options), attacks.Attack(**settings)):
        torch.manual_seed(5)
        results.append(run(_small(), _small_images(), _small_labels(), targets=_targets(targeted)))
    assert torch.equal(*results)
    assert not torch.equal(results[0], _small_images())


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
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_setting_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*{value}"):
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
        function(_small(), _small_images(), _small_labels(), norm="l2")


# Compiled


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """(inputs, outputs) of each call of a compiled step, which is captured as it would be, but run by PyTorch's own
    kernels."""
    compile_ = torch.compile
    calls: list[Call] = []

    def quickly(function: Any, **options: Any) -> Any:
        assert options["fullgraph"]
        assert not options["dynamic"]
        compiled = compile_(function, fullgraph=True, dynamic=False, backend="aot_eager")

        def call(*arguments: Any) -> Any:
            results = compiled(*arguments)
            calls.append((arguments, results))
            return results

        return call

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", quickly)
    yield calls
    torch.compiler.reset()


def _both(attack: attacks.Attack, model: Any, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor, BoundAttack]:
    """Results compiled and eager, and what is compiled."""
    said: list[str] = []
    compiled = BoundAttack(attack, model, compile="on", announce=said.append)
    found = []
    for bound in (compiled, BoundAttack(attack, model)):
        found.append(bound(*inputs, generator=torch.Generator().manual_seed(5), **options))
    assert said == []
    return found[0], found[1], compiled


@pytest.mark.parametrize(
    ("name", "targeted"), [("Linf, momentum", False), ("Linf, past the ball", True), ("L2, momentum", True)]
)
def test_a_compiled_attack_is_the_eager_one(called: list[Call], name: str, targeted: bool) -> None:
    """And leaves no gradients of parameters, nor makes what would have some."""
    model = _small()
    before = copy.deepcopy(model.state_dict())
    inputs = (_small_images(), _small_labels(), _targets(targeted))
    attack = attacks.Attack(**SETTINGS[name], random_start=True, keep_best=True)
    actual, expected, bound = _both(attack, lambda x, _: model(x), *inputs)
    assert_matches(actual, expected)
    assert bound.compiled
    assert len(called) == attack.steps
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    tensors = [tensor for call in called for part in call for tensor in part if isinstance(tensor, Tensor)]
    assert not any(tensor.requires_grad for tensor in (actual, *tensors))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_compiled_attack_on_labels_and_draws_is_the_eager_one(called: list[Call]) -> None:
    """A model that itself looks at the labels, of several outputs."""
    first, second = _small(0), _small(1)

    def model(images: Tensor, labels: Tensor) -> Tensor:
        own = labels[:, None] == torch.arange(5)  # not F.one_hot, which torch 2.11 does not compile
        shift = own * images.mean((1, 2, 3))[:, None]
        return torch.stack([first(images) + shift, second(images)])

    actual, expected, bound = _both(attacks.Attack(steps=3, loss="dlr"), model, _small_images(), _small_labels())
    assert_matches(actual, expected)
    assert bound.compiled
    assert len(called) == 3


def test_a_compiled_attack_is_called_with_few_sizes(called: list[Call]) -> None:
    """The images that are left, filled up to a half, a quarter or an eighth of the batch."""
    model, images, labels = _small(), _small_images(19), _small_labels(19)
    options: dict[str, Any] = {"random_start": True, "restarts": 2, "drop_fooled": True, "decay": 1.0}
    attack = attacks.Attack(eps=0.1, alpha=0.01, steps=9, **options)
    reference = torch.softmax(model(images).detach(), -1)
    actual, expected, bound = _both(attack, lambda x, _: model(x), images, labels, reference=reference)
    assert_matches(actual, expected)
    assert bound.compiled
    left = Recorder(model)
    eager, generator = BoundAttack(attack, lambda x, _: left(x)), torch.Generator().manual_seed(5)
    eager(images, labels, generator=generator, reference=reference)
    assert len({len(shown) for shown in left.shown}) > 4
    sizes = [len(inputs[0]) for inputs, _ in called]
    assert set(sizes) == {19, 10, 5, 3}
    for inputs, outputs in called:
        assert {len(tensor) for tensor in (*inputs, *outputs) if isinstance(tensor, Tensor)} == {len(inputs[0])}


@pytest.mark.parametrize(("whole", "sizes"), [(1, {1}), (2, {1, 2}), (7, {1, 2, 4, 7}), (64, {8, 16, 32, 64})])
def test_what_is_left_fits_and_fills_more_than_half_of_its_size(whole: int, sizes: set[int]) -> None:
    found = {left: _bucket(left, whole) for left in range(1, whole + 1)}
    assert set(found.values()) == sizes
    for left, size in found.items():
        assert left <= size
        assert size == min(sizes) or size <= 2 * left


def test_compiled_attacks_do_not_take_each_other_for_themselves(called: list[Call]) -> None:
    """They share the code of a step: other weights and other settings must not meet an earlier one's graph."""
    for seed, alpha in ((0, 0.01), (1, 0.01), (1, 0.02)):
        model = _small(seed)
        bound = BoundAttack(
            attacks.Attack(eps=0.1, alpha=alpha, steps=3), lambda x, _, model=model: model(x), compile="on"
        )
        expected = bim(model, _small_images(), _small_labels(), eps=0.1, alpha=alpha, steps=3)
        assert_matches(bound(_small_images(), _small_labels()), expected)
        assert bound.compiled
    assert len(called) == 9


def test_any_number_of_sizes_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of two attacks that drop what is fooled, on whole batches and on a last one: four sizes each."""
    compile_, said = torch.compile, list[str]()
    torch.compiler.reset()
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: compile_(function, fullgraph=True, dynamic=False, backend="eager")
    )
    bound = BoundAttack(attacks.Attack(steps=1), lambda x, _: x.flatten(1), compile="on", announce=said.append)
    for samples in range(2, 11):
        bound(torch.rand(samples, 1, 1, 17), torch.arange(samples))
    assert said == []


def test_a_failure_to_compile_is_announced_and_the_attack_goes_on_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_function: Any, **_options: Any) -> Any:
        def call(*_arguments: Any) -> Any:
            raise RuntimeError("no compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", failing)
    model, said = _small(), list[str]()
    attack = attacks.Attack(steps=3, drop_fooled=True)
    bound = BoundAttack(attack, lambda x, _: model(x), compile="on", announce=said.append)
    expected = attack(model, _small_images(), _small_labels())
    for _ in range(2):
        assert torch.equal(bound(_small_images(), _small_labels()), expected)
    assert said == ["compiling failed, going on in eager mode: RuntimeError: no compiler"]
    assert not bound.compiled
    with pytest.warns(UserWarning, match="compiling failed, going on in eager mode: RuntimeError: no compiler"):
        BoundAttack(attack, lambda x, _: model(x), compile="on")(_small_images(), _small_labels())


# What is wrong with a model


@each_attack
@pytest.mark.parametrize("model", [lambda x: 0 * x.flatten(1)[:, :4], lambda x: _trained()(0 * x)])
def test_an_output_that_does_not_depend_on_the_images_is_an_error(attack: Attack, model: Any) -> None:
    with pytest.raises(ValueError, match="model: its output does not depend on the images"):
        attack(model, _images(), _labels())


@pytest.mark.parametrize("after", [False, True])
def test_of_a_compiled_model_a_detached_output_is_an_error(called: list[Call], after: bool) -> None:
    model = _small()
    bound = BoundAttack(attacks.Attack(), lambda x, _: model(x).detach() if after else model(x.detach()), compile="on")
    with pytest.raises(ValueError, match="model: its output"):
        bound(_small_images(), _small_labels())


def _saturated(images: Tensor) -> Tensor:
    return 1e6 * _small(dtype=torch.float32)(images)


@each_attack
def test_a_saturated_loss_warns_and_a_margin_does_not(attack: Attack) -> None:
    images = _small_images(dtype=torch.float32)
    labels = _said(_small(dtype=torch.float32), images)
    with pytest.warns(UserWarning, match="the attack cannot move: the gradient of loss 'ce' is exactly zero for all 7"):
        stuck = attack(_saturated, images, labels)
    if attack is not ATTACKS["pgd"]:  # which begins elsewhere
        assert torch.equal(stuck, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = attack(_saturated, images, labels, loss="cw")
    assert bool((moved != stuck).flatten(1).any(1).all())
    _assert_in_ball(moved, images)


each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


@each_norm
@each_dtype
@pytest.mark.parametrize("decay", [None, 1.0])
def test_one_image_whose_gradient_is_zero_stays_and_the_others_move(
    norm: Any, dtype: torch.dtype, decay: float | None
) -> None:
    """torchattacks' MIFGSM divides such a gradient by its own mean and returns NaN."""
    model, images = _small(dtype=dtype), _small_images(dtype=dtype)

    def dead(x: Tensor, _labels: Tensor) -> Tensor:
        return model(x) * (x[:, 0, 0, 0] < 2).to(dtype)[:, None] * alive[: len(x), None]

    alive = torch.tensor([1, 1, 0, 1, 1, 1, 1], dtype=dtype)
    bound = BoundAttack(attacks.Attack(norm=norm, decay=decay, steps=1), dead)
    with pytest.warns(UnmovedWarning, match="the gradient of loss 'ce' is exactly zero for 1 of 7 images"):
        adversarial = bound(images, _small_labels())
    moved = (adversarial != images).flatten(1).any(1)
    assert adversarial.isfinite().all()
    assert torch.equal(moved, alive.bool())
    assert torch.equal(bound.unmoved, ~alive.bool())


@each_norm
@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize(
    ("dtype", "power", "tolerance"),
    [(torch.float64, -600, 0), (torch.float32, -100, 0), (torch.bfloat16, -100, 0), (torch.float16, -12, 2e-3)],
    ids=str,
)
def test_a_step_does_not_depend_on_the_size_of_the_gradient(
    norm: Any, decay: float | None, random_start: bool, dtype: torch.dtype, power: int, tolerance: float
) -> None:
    """Outputs of a power of two, exact but in float16: gradients are 1e-30 (1e-180 in float64), and directions equal.

    The squares of such gradients are 0, and beside any constant that is added to their norm they are nothing.
    """
    model, scale = _small(dtype=dtype), torch.tensor(2.0).double().pow(power).to(dtype)
    attack = attacks.Attack(None, None, 4, norm, "cw", decay, random_start=random_start)
    results = [
        attack(network, _small_images(dtype=dtype), _small_labels(), generator=torch.Generator().manual_seed(1))
        for network in (model, lambda x: scale * model(x))
    ]
    same = ((results[0] - results[1]).abs() <= tolerance).double().mean()
    assert float(same) >= (0.98 if dtype == torch.float16 else 1), "the least gradients of float16 lose bits, or signs"
    moves = (results[1] - _small_images(dtype=dtype)).double().flatten(1)
    assert bool((moves.norm(dim=1) > (0.6 if norm == "L2" else 0.2)).all())


@each_dtype
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_an_l2_step_is_a_unit_direction(dtype: torch.dtype, size: float) -> None:
    """Of a linear model the direction is known; and where one pixel of many has all of a half's smallest gradient."""
    if dtype == torch.float16 and size != 1:
        size = {1e-30: 2e-7, 1e30: 3e4}[size]
    weights = torch.linspace(-1, 1, 3 * 9 * 8, dtype=torch.float64).view(3, 9, 8)
    images = torch.full((2, 3, 9, 8), 0.5, dtype=dtype)

    def model(x: Tensor) -> Tensor:
        margin = (x[:1] * (weights * size).to(dtype)).sum((1, 2, 3)), x[1:, 0, 0, 0] * torch.tensor(size, dtype=dtype)
        return torch.stack([torch.cat(margin), torch.zeros(len(x), dtype=dtype)], 1)

    actual = attacks.Attack(0.5, 0.25, 1, "L2", "cw")(model, images, torch.ones(2, dtype=torch.int64))
    slopes = (weights * size).to(dtype).double()
    expected = 0.5 + 0.25 * torch.stack([slopes / slopes.norm(), torch.eye(216).double()[0].view(3, 9, 8)])
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-7)
    assert float((actual.double() - expected).abs().max()) <= tolerance
    moment = attacks.Attack(0.5, 0.25, 1, "L2", "cw", decay=1.0)(model, images, torch.ones(2, dtype=torch.int64))
    assert float((moment.double() - expected).abs().max()) <= tolerance


def _contrast(images: Tensor) -> Tensor:
    """Knows an image by what differs in it: of a blank one it has no gradient."""
    model = _small(dtype=images.dtype)
    bright = images.amax((1, 2, 3), keepdim=True)
    return model(images * (bright > 0.01)) * (bright > 0.01)[:, 0, 0]


def _some_blank(samples: int, blank: int) -> Tensor:
    images = _small_images(samples)
    images[samples - blank :] = 0
    return images


@each_norm
@pytest.mark.parametrize("options", [{}, {"keep_best": True, "drop_fooled": True}, {"decay": 1.0}], ids=str)
def test_images_without_a_local_gradient_are_left_and_counted(norm: Any, options: dict[str, Any]) -> None:
    """Ten of sixty in one batch; in batches of ten, of which the last is nothing but blank; and one at a time."""
    images, attack = _some_blank(60, 10), attacks.Attack(None, None, 3, norm, **options)
    labels = _said(_contrast, images)
    with pytest.warns(UnmovedWarning, match="exactly zero for 10 of 60 images"):
        whole = attack(_contrast, images, labels)
    assert torch.equal((whole != images).flatten(1).any(1), torch.arange(60) < 50)
    for size in (10, 1):
        bound, parts, unmoved = BoundAttack(attack, lambda x, _: _contrast(x)), [], 0
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for part in range(0, 60, size):
                parts.append(bound(images[part : part + size], labels[part : part + size]))
                unmoved += int(bound.unmoved.sum())
        assert unmoved == 10
        assert len(said) == 10 // size
        assert_matches(torch.cat(parts), whole, 1e-6)


def test_saturated_probabilities_are_no_constant_output_even_one_at_a_time() -> None:
    """Of a network that is sure of all: probabilities of exactly 0 and 1, one class for most images."""

    def sure(x: Tensor) -> Tensor:
        return (1e9 * _small()(x)).softmax(-1)

    images = _small_images(40)
    labels = _said(sure, images)
    assert len(labels.unique()) > 1
    for i in range(40):
        with pytest.warns(UnmovedWarning, match="for all 1 images"):
            assert torch.equal(bim(sure, images[i : i + 1], labels[i : i + 1]), images[i : i + 1])


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("blank", [False, True])
def test_a_constant_output_is_an_error_of_any_batch(samples: int, blank: bool) -> None:
    images = _some_blank(samples, samples if blank else 0)
    with pytest.raises(ValueError, match="model: its output does not depend on the images"):
        bim(lambda x: 0 * x.flatten(1)[:, :4] + torch.arange(4), images, _labels(samples))


def test_what_else_there_is_decides_whether_an_output_is_constant() -> None:
    """A step that only images of the caller's cross."""
    far = _small_images(2)
    far[0, 0, 0, 0], far[1, 0, 0, 0] = 0.123, 0.5

    def step(x: Tensor) -> Tensor:
        return 0 * x.flatten(1)[:, :4] + ((x[:, :1, 0, 0] - 0.123).abs() < 1e-9) * torch.arange(4)

    images, labels = _some_blank(3, 3), torch.zeros(3, dtype=torch.int64)
    attack = attacks.Attack(steps=1)
    with pytest.raises(ValueError, match="does not depend"):
        BoundAttack(attack, lambda x, _: step(x))(images, labels)
    with pytest.warns(UnmovedWarning):
        BoundAttack(attack, lambda x, _: step(x), elsewhere=far)(images, labels)


class Broken:
    """A model whose output for one image, known by its first pixel, is NaN (or else) from one call on."""

    def __init__(self, sample: int, since: int = 0, value: float = float("nan")) -> None:
        self.sample, self.since, self.value, self.calls = sample, since, value, 0

    def __call__(self, images: Tensor) -> Tensor:
        outputs = _small()(images)
        sick = (images[:, 0, 0, 0] * 10).round() == self.sample
        if self.calls >= self.since:
            outputs = torch.where(sick[:, None] & (torch.arange(5) == 2), self.value, outputs)
        self.calls += 1
        return outputs


def _marked_images() -> Tensor:
    """The first pixels are .0, .1, .2, …"""
    images = _small_images()
    images[:, 0, 0, 0] = torch.arange(len(images)) / 10
    return images


@pytest.mark.parametrize("sample", [0, 3, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("since", [0, 2])
@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"norm": "L2"}, {"restarts": 2}], ids=str)
def test_an_output_that_is_no_number_is_an_error_that_names_the_sample(
    sample: int, value: float, since: int, options: dict[str, Any]
) -> None:
    """Be it the first step or a later one that meets it."""
    model = Broken(sample, since, value)
    with pytest.raises(NotFiniteError, match=f"for sample {sample} is NaN or infinite") as caught:
        attacks.Attack(eps=0.01, steps=4, **options)(model, _marked_images(), _small_labels())
    assert caught.value.sample == sample
    assert isinstance(caught.value, ValueError)
    assert model.calls == 1 if since == 0 else model.calls >= 4


@pytest.mark.parametrize("since", [0, 2, 4])
def test_a_sample_is_named_by_its_place_in_the_whole_batch(since: int) -> None:
    """When those before it have left the batch; also by the last look at what is left."""
    images = _marked_images()
    labels = _said(_small(), images)
    labels[:4] = (labels[:4] + 1) % 5  # fooled at once
    options: dict[str, Any] = {"eps": 1e-4, "alpha": 1e-5, "steps": 4, "drop_fooled": True}
    recorder = Recorder(_small())
    bim(recorder, images, labels, **options)
    assert [len(shown) for shown in recorder.shown] == [7, 3, 3, 3, 3]
    with pytest.raises(NotFiniteError) as caught:
        bim(Broken(5, since), images, labels, **options)
    assert caught.value.sample == 5


@pytest.mark.parametrize("options", [{"keep_best": True}, {"drop_fooled": True}, {"restarts": 2}], ids=str)
def test_the_last_look_at_the_images_meets_what_is_no_number(options: dict[str, Any]) -> None:
    """Else the NaN's place would pass for a class, and the image for one that fools."""
    labels = _said(_small(), _marked_images())
    with pytest.raises(NotFiniteError) as caught:
        attacks.Attack(eps=1e-4, steps=2, **options)(Broken(4, since=2), _marked_images(), labels)
    assert caught.value.sample == 4


def test_a_gradient_that_is_no_number_is_an_error() -> None:
    """Of an output that is one: the root of 0."""
    images = _small_images()
    images[2, 0] = 0.25

    def model(x: Tensor) -> Tensor:
        return _small()(x) + (x[:, 0] - 0.25).square().sum((1, 2)).sqrt()[:, None] * torch.arange(5)

    with pytest.raises(NotFiniteError) as caught:
        bim(model, images, _small_labels())
    assert caught.value.sample == 2


def test_a_probability_of_zero_is_a_number() -> None:
    """Log-probabilities may be −∞ for a class that is not the label."""

    def model(x: Tensor) -> Tensor:
        return F.pad(_small()(x), (0, 1), value=-float("inf"))

    expected = bim(_small(), _small_images(), _small_labels(), steps=3)
    assert_matches(bim(model, _small_images(), _small_labels(), steps=3), expected)


def test_of_a_compiled_model_errors_are_the_same(called: list[Call]) -> None:
    model = _small()
    sick = torch.tensor(4.0, dtype=torch.float64)

    def broken(x: Tensor, _labels: Tensor) -> Tensor:
        return model(x) / ((x[:, :1, 0, 0] * 10).round() != sick)

    bound = BoundAttack(attacks.Attack(eps=0.01), broken, compile="on")
    with pytest.raises(NotFiniteError) as caught:
        bound(_marked_images(), _small_labels())
    assert caught.value.sample == 4
    with pytest.raises(ValueError, match="labels: expected 0 to 4, got 7 for sample 0"):
        bound(_marked_images(), torch.full((7,), 7))
    assert len(called) == 2
    assert bound.compiled


# What is wrong with the batch


@each_attack
@pytest.mark.parametrize("wrong", [-1, 5, 1000])
@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_classes_that_the_model_does_not_know_are_named(attack: Attack, wrong: int, loss: Any) -> None:
    bad = _small_labels()
    bad[5] = wrong
    with pytest.raises(ValueError, match=f"labels: expected 0 to 4, got {wrong} for sample 5"):
        attack(_small(), _small_images(), bad, loss=loss)
    with pytest.raises(ValueError, match=f"targets: expected 0 to 4, got {wrong} for sample 5"):
        attack(_small(), _small_images(), _small_labels(), targets=bad, loss=loss)


@each_attack
def test_targets_of_another_shape_or_type_are_named(attack: Attack) -> None:
    with pytest.raises(ValueError, match=r"targets: expected integers \(8,\), got torch.int64 \(3,\)"):
        attack(_model(), _images(), _labels(), targets=_labels()[:3])
    with pytest.raises(ValueError, match=r"targets: expected integers \(8,\), got torch.float32 \(8,\)"):
        attack(_model(), _images(), _labels(), targets=_labels().float())


def test_dlr_of_too_few_classes_is_an_error_of_the_attack() -> None:
    with pytest.raises(ValueError, match="loss: dlr needs at least 3 classes, got 2"):
        bim(lambda x: _small()(x)[:, :2], _small_images(), torch.zeros(7, dtype=torch.long), loss="dlr")


@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"drop_fooled": True, "restarts": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_norm
def test_what_is_given_is_not_written_to(options: dict[str, Any], dtype: torch.dtype, norm: Any) -> None:
    images, labels, targets = _small_images(dtype=dtype), _small_labels(), _small_labels().flip(0)
    copies = [tensor.clone() for tensor in (images, labels, targets)]
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    attack = attacks.Attack(norm=norm, steps=3, random_start=True, **options)
    adversarial = attack(_small(dtype=dtype), images, labels, targets, generator)
    assert adversarial.dtype == dtype
    assert adversarial.data_ptr() != images.data_ptr()
    assert not torch.equal(adversarial, images)
    assert all(torch.equal(a, b) for a, b in zip((images, labels, targets), copies, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())


def test_who_is_trusted_is_not_checked() -> None:
    """Of what is right the results are the same; of what is wrong there are some."""
    attack = attacks.Attack(steps=2)
    bound = BoundAttack(attack, lambda x, _: _small()(x))
    expected = attack(_small(), _small_images(), _small_labels())
    assert torch.equal(bound(_small_images(), _small_labels(), trusted=True), expected)
    assert bound(_small_images() + 0.5, _small_labels() + 9, trusted=True).shape == expected.shape
    broken = BoundAttack(attack, lambda x, _: Broken(3)(x))
    healthy = torch.arange(7) != 3
    assert torch.equal(
        broken(_marked_images(), _small_labels(), trusted=True)[healthy],
        attack(_small(), _marked_images(), _small_labels())[healthy],
    )


@pytest.mark.parametrize("steps", [0, 2])
def test_a_result_is_no_view_of_the_images(steps: int) -> None:
    images = _small_images()
    bim(_small(), images, _small_labels(), steps=steps, eps=0.0).zero_()
    assert torch.equal(images, _small_images())
