"""What is wrong with a model that is attacked: no gradient, a constant output, numbers that are none."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast import attacks
from immunity_fast.attacks import BoundAttack, NotFiniteError, UnmovedWarning, bim
from tests import attacked_models, grids
from tests.attacked_models import (
    ATTACKS,
    Attack,
    Broken,
    Call,
    Recorder,
    assert_in_ball,
    each_attack,
    each_norm,
    marked_images,
    said_by,
    small_images,
    small_labels,
    small_network,
    trained_images,
    trained_labels,
    trained_mixture,
)
from tests.oracle import assert_matches

seeded = attacked_models.seeded
called = attacked_models.called


@each_attack
@pytest.mark.parametrize("model", [lambda x: 0 * x.flatten(1)[:, :4], lambda x: trained_mixture()(0 * x)])
def test_an_output_that_ignores_the_images_is_an_error(attack: Attack, model: Any) -> None:
    with pytest.raises(ValueError, match="model: expected outputs that depend on the images"):
        attack(model, trained_images(), trained_labels())


@pytest.mark.parametrize("after", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_of_a_compiled_model_a_detached_output_is_an_error(called: list[Call], after: bool) -> None:
    model = small_network()
    bound = BoundAttack(attacks.Attack(), lambda x, _: model(x).detach() if after else model(x.detach()), compile="on")
    with pytest.raises(ValueError, match="model: expected outputs"):
        bound(small_images(), small_labels())


def _saturated(images: Tensor) -> Tensor:
    return 1e6 * small_network(dtype=torch.float32)(images)


@each_attack
def test_a_saturated_loss_warns_and_a_margin_does_not(attack: Attack) -> None:
    images = small_images(dtype=torch.float32)
    labels = said_by(small_network(dtype=torch.float32), images)
    with pytest.warns(UserWarning, match="the attack cannot move: the gradient of loss 'ce' is exactly zero for all 7"):
        stuck = attack(_saturated, images, labels)
    if attack is not ATTACKS["pgd"]:  # which begins elsewhere
        assert torch.equal(stuck, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = attack(_saturated, images, labels, loss="cw")
    assert bool((moved != stuck).flatten(1).any(1).all())
    assert_in_ball(moved, images)


each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


@each_norm
@each_dtype
@pytest.mark.parametrize("decay", [None, 1.0])
def test_an_image_of_zero_gradient_stays_and_the_others_move(
    norm: Any, dtype: torch.dtype, decay: float | None
) -> None:
    """torchattacks' MIFGSM divides such a gradient by its own mean and returns NaN."""
    model, images = small_network(dtype=dtype), small_images(dtype=dtype)

    def dead(x: Tensor, trained_labels: Tensor) -> Tensor:
        return model(x) * (x[:, 0, 0, 0] < 2).to(dtype)[:, None] * alive[: len(x), None]

    alive = torch.tensor([1, 1, 0, 1, 1, 1, 1], dtype=dtype)
    bound = BoundAttack(attacks.Attack(norm=norm, decay=decay, steps=1), dead)
    with pytest.warns(UnmovedWarning, match="the gradient of loss 'ce' is exactly zero for 1 of 7 images"):
        adversarial = bound(images, small_labels())
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
    model, scale = small_network(dtype=dtype), torch.tensor(2.0).double().pow(power).to(dtype)
    attack = attacks.Attack(None, None, 4, norm, "cw", decay, random_start=random_start)
    results = [
        attack(network, small_images(dtype=dtype), small_labels(), generator=torch.Generator().manual_seed(1))
        for network in (model, lambda x: scale * model(x))
    ]
    same = ((results[0] - results[1]).abs() <= tolerance).double().mean()
    assert float(same) >= (0.98 if dtype == torch.float16 else 1), "the least gradients of float16 lose bits, or signs"
    moves = (results[1] - small_images(dtype=dtype)).double().flatten(1)
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
    model = small_network(dtype=images.dtype)
    bright = images.amax((1, 2, 3), keepdim=True)
    return model(images * (bright > 0.01)) * (bright > 0.01)[:, 0, 0]


def _some_blank(samples: int, blank: int) -> Tensor:
    images = small_images(samples)
    images[samples - blank :] = 0
    return images


@pytest.mark.parametrize(
    ("options", "norm"),
    grids.every(2, [{}, {"keep_best": True, "drop_fooled": True}, {"decay": 1.0}], ("Linf", "L2")),
)
def test_images_without_a_local_gradient_are_left_and_counted(norm: Any, options: dict[str, Any]) -> None:
    """Ten of sixty in one batch; in batches of ten, of which the last is nothing but blank; and one at a time."""
    images, attack = _some_blank(60, 10), attacks.Attack(None, None, 3, norm, **options)
    labels = said_by(_contrast, images)
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


def test_saturated_probabilities_of_one_image_are_not_constant() -> None:
    """Of a network that is sure of all: probabilities of exactly 0 and 1, one class for most images."""

    def sure(x: Tensor) -> Tensor:
        return (1e9 * small_network()(x)).softmax(-1)

    images = small_images(40)
    labels = said_by(sure, images)
    assert len(labels.unique()) > 1
    for i in range(40):
        with pytest.warns(UnmovedWarning, match="for all 1 images"):
            assert torch.equal(bim(sure, images[i : i + 1], labels[i : i + 1]), images[i : i + 1])


@pytest.mark.parametrize("samples", [1, 5])
@pytest.mark.parametrize("blank", [False, True])
def test_a_constant_output_is_an_error_of_any_batch(samples: int, blank: bool) -> None:
    images = _some_blank(samples, samples if blank else 0)
    with pytest.raises(ValueError, match="model: expected outputs that depend on the images"):
        bim(lambda x: 0 * x.flatten(1)[:, :4] + torch.arange(4), images, trained_labels(samples))


def test_other_images_decide_whether_an_output_is_constant() -> None:
    """A step that only images of the caller's cross."""
    far = small_images(2)
    far[0, 0, 0, 0], far[1, 0, 0, 0] = 0.123, 0.5

    def step(x: Tensor) -> Tensor:
        return 0 * x.flatten(1)[:, :4] + ((x[:, :1, 0, 0] - 0.123).abs() < 1e-9) * torch.arange(4)

    images, labels = _some_blank(3, 3), torch.zeros(3, dtype=torch.int64)
    attack = attacks.Attack(steps=1)
    with pytest.raises(ValueError, match="expected outputs that depend"):
        BoundAttack(attack, lambda x, _: step(x))(images, labels)
    with pytest.warns(UnmovedWarning):
        BoundAttack(attack, lambda x, _: step(x), elsewhere=far)(images, labels)


@pytest.mark.parametrize("sample", [0, 3, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("since", [0, 2])
@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"norm": "L2"}, {"restarts": 2}], ids=str)
def test_an_output_that_is_no_number_names_its_sample(
    sample: int, value: float, since: int, options: dict[str, Any]
) -> None:
    """Be it the first step or a later one that meets it."""
    model = Broken(sample, since, value)
    with pytest.raises(NotFiniteError, match=f"got NaN or infinite ones for image {sample}$") as caught:
        attacks.Attack(eps=0.01, steps=4, **options)(model, marked_images(), small_labels())
    assert caught.value.sample == sample
    assert isinstance(caught.value, ValueError)
    assert model.calls == 1 if since == 0 else model.calls >= 4


@pytest.mark.parametrize("since", [0, 2, 4])
def test_a_sample_is_named_by_its_place_in_the_whole_batch(since: int) -> None:
    """When those before it have left the batch; also by the last look at what is left."""
    images = marked_images()
    labels = said_by(small_network(), images)
    labels[:4] = (labels[:4] + 1) % 5  # fooled at once
    options: dict[str, Any] = {"eps": 1e-4, "alpha": 1e-5, "steps": 4, "drop_fooled": True}
    recorder = Recorder(small_network())
    bim(recorder, images, labels, **options)
    assert [len(shown) for shown in recorder.shown] == [7, 3, 3, 3, 3]
    with pytest.raises(NotFiniteError) as caught:
        bim(Broken(5, since), images, labels, **options)
    assert caught.value.sample == 5


@pytest.mark.parametrize("options", [{"keep_best": True}, {"drop_fooled": True}, {"restarts": 2}], ids=str)
def test_the_last_look_at_the_images_meets_what_is_no_number(options: dict[str, Any]) -> None:
    """Else the NaN's place would pass for a class, and the image for one that fools."""
    labels = said_by(small_network(), marked_images())
    with pytest.raises(NotFiniteError) as caught:
        attacks.Attack(eps=1e-4, steps=2, **options)(Broken(4, since=2), marked_images(), labels)
    assert caught.value.sample == 4


def test_a_gradient_that_is_no_number_is_an_error() -> None:
    """Of an output that is one: the root of 0."""
    images = small_images()
    images[2, 0] = 0.25

    def model(x: Tensor) -> Tensor:
        return small_network()(x) + (x[:, 0] - 0.25).square().sum((1, 2)).sqrt()[:, None] * torch.arange(5)

    with pytest.raises(NotFiniteError) as caught:
        bim(model, images, small_labels())
    assert caught.value.sample == 2


def test_a_probability_of_zero_is_a_number() -> None:
    """Log-probabilities may be −∞ for a class that is not the label."""

    def model(x: Tensor) -> Tensor:
        return F.pad(small_network()(x), (0, 1), value=-float("inf"))

    expected = bim(small_network(), small_images(), small_labels(), steps=3)
    assert_matches(bim(model, small_images(), small_labels(), steps=3), expected)


def test_of_a_compiled_model_errors_are_the_same(called: list[Call]) -> None:
    model = small_network()
    sick = torch.tensor(4.0, dtype=torch.float64)

    def broken(x: Tensor, trained_labels: Tensor) -> Tensor:
        return model(x) / ((x[:, :1, 0, 0] * 10).round() != sick)

    bound = BoundAttack(attacks.Attack(eps=0.01), broken, compile="on")
    with pytest.raises(NotFiniteError) as caught:
        bound(marked_images(), small_labels())
    assert caught.value.sample == 4
    with pytest.raises(ValueError, match="labels: expected 0 to 4, got 7 for image 0"):
        bound(marked_images(), torch.full((7,), 7))
    assert len(called) == 2
    assert bound.compiled
