"""What images and radii an attack takes: other bounds, preprocessing, several radii, radii of images, own losses."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import attacks
from immunity_fast.attacks import BoundAttack, autoattack, bim, fgsm, mim, pgd, square
from immunity_fast.attacks.projections import rounded_bounds
from tests import attacked_models, grids
from tests.attacked_models import (
    ATTACKS,
    Attack,
    Call,
    Recorder,
    small_images,
    small_labels,
    small_network,
    some_targets,
)
from tests.oracle import assert_matches

seeded = attacked_models.seeded
called = attacked_models.called

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ["fgsm", "bim", "mim", "pgd", "autoattack", "square"]


def own_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


def _other_attacks() -> dict[str, Attack]:
    return {
        "autoattack": partial(autoattack, num_classes=5, steps=3, queries=10),
        "square": partial(square, queries=20),
    }


def _assert_inside(adversarial: Tensor, images: Tensor, eps: Any, norm: str, bounds: tuple[float, float]) -> None:
    """By fractions, which are exact; in L2 to 1e-12 of the radius."""
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    low, high = (float(torch.tensor(end, dtype=torch.float64).to(images.dtype)) for end in bounds)
    assert low <= float(adversarial.min()) <= float(adversarial.max()) <= high
    radii = eps.tolist() if isinstance(eps, Tensor) else [eps] * len(images)
    for found, image, radius in zip(adversarial.flatten(1).tolist(), images.flatten(1).tolist(), radii, strict=True):
        moves = [abs(Fraction(a) - Fraction(b)) for a, b in zip(found, image, strict=True)]
        if norm == "Linf":
            assert max(moves) <= Fraction(radius)
        else:
            assert sum(move * move for move in moves) <= Fraction(radius) ** 2 * (1 + Fraction(1, 10**12))


# Bounds


@pytest.mark.parametrize(
    ("bounds", "norm", "dtype"),
    grids.every(4, [(-1.0, 1.0), (0.0, 255.0), (-2.1, 2.7), (0.1, 0.9)], ("Linf", "L2"), DTYPES),
    ids=str,
)
def test_images_stay_in_their_own_bounds_and_balls(bounds: Any, norm: Any, dtype: torch.dtype) -> None:
    low, span = bounds[0], bounds[1] - bounds[0]
    model = small_network(dtype=dtype)
    images = (low + span * small_images()).to(dtype).clamp(*rounded_bounds(bounds, dtype))
    eps = span * (0.06 if norm == "Linf" else 0.9)
    options: dict[str, Any] = {"eps": eps, "alpha": eps / 2, "steps": 4, "norm": norm, "bounds": bounds}
    shown = Recorder(lambda x: model((x - low) / span))
    adversarial = pgd(shown, images, small_labels(), **options)
    for found in (*shown.shown, adversarial):
        _assert_inside(found, images, eps, norm, bounds)
    assert bool((adversarial != images).flatten(1).any(1).all())
    ends = torch.stack([images.min(), images.max()]).double()
    assert bool((ends == torch.tensor(rounded_bounds(bounds, dtype), dtype=torch.float64)).all())


@pytest.mark.parametrize(("name", "norm"), grids.every(2, NAMES, ("Linf", "L2")))
def test_an_attack_in_other_bounds_is_the_same_attack(name: str, norm: Any) -> None:
    """Of images in [0, 1] times 4, where every number is as exact; defaults are as much of the range."""
    attack = (ATTACKS | {"pgd": partial(pgd, steps=3, random_start=False)} | _other_attacks())[name]
    model, images = small_network(dtype=torch.float32), small_images(dtype=torch.float32)
    expected = attack(model, images, small_labels(), norm=norm)
    found = attack(lambda x: model(x / 4), 4 * images, small_labels(), norm=norm, bounds=(0, 4))
    assert not torch.equal(expected, images)
    same = ((found / 4 - expected).abs() <= 1e-5).float().mean()
    assert float(same) > 0.99


def test_preprocessing_is_between_the_images_and_the_model() -> None:
    """Images stay in [0, 1], the model sees them normalised; as a normalised first layer would."""
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    model, seen = small_network(), Recorder(small_network())
    shape = (3, 1, 1)
    middle, scale = (
        torch.tensor(mean, dtype=torch.float64).view(shape),
        torch.tensor(std, dtype=torch.float64).view(shape),
    )
    for attack in (*ATTACKS.values(), *_other_attacks().values()):
        torch.manual_seed(3)
        expected = attack(lambda x: model((x - middle) / scale), small_images(), small_labels())
        for values in ({"mean": mean, "std": std}, {"mean": middle.flatten(), "std": np.array(std)}):
            torch.manual_seed(3)
            actual = attack(model, small_images(), small_labels(), preprocessing=values | {"axis": -3})
            assert_matches(actual, expected, 1e-6)
    bim(seen, small_images(), small_labels(), steps=1, preprocessing={"mean": 0.5, "std": 0.5})
    assert_matches(seen.shown[0], (small_images() - 0.5) / 0.5)


BAD_PREPROCESSING: list[tuple[dict[str, Any], str]] = [
    ({"means": 0.5}, "preprocessing: expected mean, std and axis, got 'means'"),
    ({"std": [0.5, 0.0, 1.0]}, "preprocessing: expected a positive std"),
    ({"mean": [0.5] * 3, "std": [0.5] * 4}, "preprocessing: expected as many of mean and std, got 3 and 4"),
    ({"mean": [0.5] * 2}, "preprocessing: expected mean and std of 3 channels, got 2"),
    ({"mean": [float("nan")] * 3}, "preprocessing: expected a mean of finite numbers"),
    ({"axis": 1}, "preprocessing: expected an axis of -3, -2 or -1, got 1"),
]


@pytest.mark.parametrize(("values", "text"), BAD_PREPROCESSING)
def test_bad_preprocessing_is_named(values: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fgsm(small_network(), small_images(), small_labels(), preprocessing=values)


@pytest.mark.parametrize("bounds", [(1, 0), (0, 0), (0,), (0, float("inf")), 5, ("a", "b")], ids=str)
def test_bad_bounds_are_named(bounds: Any) -> None:
    for attack in (*ATTACKS.values(), *_other_attacks().values()):
        with pytest.raises(ValueError, match="bounds: expected \\(low, high\\)"):
            attack(small_network(), small_images(), small_labels(), bounds=bounds)


def test_images_that_are_out_of_their_bounds_are_named() -> None:
    for attack in (*ATTACKS.values(), *_other_attacks().values()):
        with pytest.raises(ValueError, match=r"images: expected values in \[0.2, 0.9\], got 0 to 1"):
            attack(small_network(), small_images(), small_labels(), bounds=(0.2, 0.9))


@pytest.mark.parametrize("name", ["images", "labels", "targets"])
def test_arrays_of_numpy_are_named(name: str) -> None:
    given: dict[str, Any] = {"images": small_images(), "labels": small_labels(), "targets": small_labels()}
    given[name] = given[name].numpy()
    with pytest.raises(
        TypeError, match=f"{name}: expected a tensor, got numpy.ndarray; torch.as_tensor makes one of it"
    ):
        bim(small_network(), **given)
    with pytest.raises(TypeError, match=r"labels: expected a tensor, got list"):
        bim(small_network(), small_images(), [0] * 7)  # type: ignore[arg-type]


class _Output:
    """Logits as a library's output object has them."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize(
    ("name", "held"),
    grids.every(3, NAMES, [_Output, lambda z: {"logits": z, "loss": None}, lambda z: (z, z.mean())]),
)
def test_logits_are_taken_of_what_a_model_returns(name: str, held: Callable[[Tensor], Any]) -> None:
    attack = (ATTACKS | _other_attacks())[name] if name in ("autoattack", "square") else ATTACKS[name]
    model, images, labels = small_network(), small_images(), small_labels()
    for options in ({}, {"preprocessing": {"mean": 0.1, "std": 0.9}}):
        results = []
        for attacked in (model, lambda x: held(model(x))):
            torch.manual_seed(0)
            results.append(attack(attacked, images, labels, **options))
        assert torch.equal(*results)


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda z: z[:, 0], r"a tensor \(7,\)"),
        (lambda z: z[:2], r"a tensor \(2, "),
        (lambda z: {"scores": z}, "dict of scores"),
        (lambda _z: None, "NoneType"),
    ],
)
def test_outputs_of_another_shape_are_named(returned: Callable[[Tensor], Any], text: str) -> None:
    model = small_network()
    expected = rf"model: expected outputs \(7, K\) or \(draws, 7, K\), got {text}"
    for attack in (*ATTACKS.values(), *_other_attacks().values()):
        with pytest.raises(ValueError, match=expected):
            attack(lambda x: returned(model(x)), small_images(), small_labels())
    with pytest.raises(ValueError, match=expected):
        BoundAttack(attacks.Attack(), lambda x, _: returned(model(x)))(small_images(), small_labels())


def test_an_attack_in_inference_mode_is_told_to_leave_it() -> None:
    for attack in (*ATTACKS.values(), _other_attacks()["autoattack"]):
        with torch.inference_mode(), pytest.raises(ValueError, match=r"model: .* of torch\.inference_mode, .*leave it"):
            attack(small_network(), small_images(), small_labels())
        with torch.no_grad():
            attack(small_network(), small_images(), small_labels())


@pytest.mark.parametrize("name", ["eps", "alpha", "decay"])
@pytest.mark.parametrize("given", ["8/255", [0.1, 0.2], torch.ones(7), np.ones(7)])
def test_a_setting_that_is_no_number_is_named(name: str, given: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected a finite number of at least 0, got "):
        attacks.Attack(**{name: given})


def test_counts_may_be_numbers_of_numpy() -> None:
    assert attacks.Attack(steps=np.int64(3)) == attacks.Attack(steps=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"steps: expected a whole number, got 3\.0"):
        attacks.Attack(steps=3.0)  # type: ignore[arg-type]


# Several radii


@pytest.mark.parametrize("name", NAMES)
def test_several_radii_give_what_each_gives_alone(name: str) -> None:
    attack = (ATTACKS | _other_attacks())[name]
    radii = [0.0, 2 / 255, 0.1]

    def random_model(images: Tensor) -> Tensor:
        return small_network(dtype=torch.float32)(images) + torch.rand(())

    images, labels = small_images(dtype=torch.float32), small_labels()
    for model, kind in ((small_network(dtype=torch.float32), list), (random_model, tuple)):
        torch.manual_seed(3)
        several = attack(model, images, labels, eps=kind(radii))
        after = torch.rand(())
        assert isinstance(several, list)
        for eps, found in zip(radii, several, strict=True):
            torch.manual_seed(3)
            assert torch.equal(found, attack(model, images, labels, eps=eps))
        assert torch.equal(torch.rand(()), after)
    assert attack(model, images, labels, eps=[]) == []


def test_several_radii_begin_where_one_generator_is() -> None:
    images, labels = small_images(), small_labels()

    def run(eps: Any) -> Any:
        generator = torch.Generator().manual_seed(5)
        return pgd(small_network(), images, labels, eps=eps, steps=2, generator=generator), generator.get_state()

    several, after = run([0.02, 0.1])
    for eps, found in zip([0.02, 0.1], several, strict=True):
        alone, state = run(eps)
        assert torch.equal(found, alone)
        assert torch.equal(after, state)


# A radius of each image's own


@pytest.mark.parametrize(
    ("name", "norm", "dtype", "options"),
    grids.every(4, NAMES[:4], ("Linf", "L2"), DTYPES, [{}, {"keep_best": True}, {"drop_fooled": True}]),
    ids=str,
)
def test_a_radius_of_each_image_is_that_of_its_own_attack(
    name: str, norm: Any, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    attack = (ATTACKS | {"pgd": partial(pgd, steps=3, random_start=False)})[name]
    options = {} if name == "fgsm" else options
    model, images, labels = small_network(dtype=dtype), small_images(dtype=dtype), small_labels()
    radii = torch.tensor([0.0, 1 / 255, 8 / 255, 0.05, 0.1, 0.5, 2.0], dtype=torch.float64)
    actual = attack(model, images, labels, eps=radii, norm=norm, **options)
    _assert_inside(actual, images, radii, norm, (0, 1))
    parts = [
        attack(model, images[i : i + 1], labels[i : i + 1], eps=float(radii[i]), norm=norm, **options) for i in range(7)
    ]
    exact = dtype in (torch.float64, torch.float32)
    same = (actual - torch.cat(parts)).abs() <= (1e-6 if exact else 0)
    assert float(same.float().mean()) > (0.99 if exact else 0.9)  # a batch may be rounded in another way than one image


def test_equal_radii_of_each_image_are_that_of_all() -> None:
    """Bit by bit, in every format; steps, too, and a random start."""
    for dtype in DTYPES:
        for norm, eps, alpha in (("Linf", 0.1, 0.03), ("L2", 0.7, 0.2)):
            results = []
            for radius, step in (
                (eps, alpha),
                (torch.full((7,), eps, dtype=torch.float64), torch.full((7,), alpha, dtype=torch.float64)),
            ):
                given: dict[str, Any] = {"eps": radius, "alpha": step, "norm": norm, "steps": 3, "restarts": 2}
                generator = torch.Generator().manual_seed(5)
                model, images = small_network(dtype=dtype), small_images(dtype=dtype)
                results.append(pgd(model, images, small_labels(), generator=generator, **given))
            assert torch.equal(*results)


@pytest.mark.parametrize("norm", ["Linf", pytest.param("L2", marks=pytest.mark.exhaustive)])
def test_a_compiled_attack_has_a_radius_of_each_image(called: list[Call], norm: Any) -> None:
    attack = attacks.Attack(steps=3, norm=norm, drop_fooled=True)
    radii, found, model = torch.linspace(0.01, 0.3, 7), [], small_network()
    for choice in ("on", "off"):
        bound = BoundAttack(attack, lambda x, _: model(x), compile=choice)  # type: ignore[arg-type]
        found.append(bound(small_images(), small_labels(), eps=radii, alpha=radii / 2))
        assert bound.compiled == (choice == "on")
    assert_matches(found[0], found[1], 1e-6)
    assert called


def test_other_attacks_take_a_radius_of_each_image() -> None:
    radii = torch.tensor([0.0, 0.1, 0.02, 0.02, 0.1, 0.1, 0.02])
    model, images, labels = small_network(dtype=torch.float32), small_images(dtype=torch.float32), small_labels()
    for attack in _other_attacks().values():
        found = attack(model, images, labels, eps=radii)
        _assert_inside(found, images, radii, "Linf", (0, 1))
        for value in radii.unique():
            rows = radii == value
            assert torch.equal(found[rows], attack(model, images[rows], labels[rows], eps=float(value)))


BAD_RADII: list[tuple[Any, str]] = [
    (torch.ones(6), r"eps: expected a number, or one of each image \(7,\), got \(6,\)"),
    (torch.ones(7, 1), r"eps: expected a number, or one of each image \(7,\), got \(7, 1\)"),
    (torch.tensor([0.1] * 6 + [-0.1]), r"eps: expected finite numbers of at least 0, got -0.1\d* for image 6"),
    (torch.tensor([float("nan")] * 7), r"eps: expected finite numbers of at least 0, got nan for image 0"),
    ([0.1, -1.0], r"eps: expected a finite number of at least 0, got -1.0"),
]


@pytest.mark.parametrize(("eps", "text"), BAD_RADII)
def test_bad_radii_are_named(eps: Any, text: str) -> None:
    for attack in (*ATTACKS.values(), *_other_attacks().values()):
        with pytest.raises(ValueError, match=text):
            attack(small_network(), small_images(), small_labels(), eps=eps)
    if isinstance(eps, Tensor):
        with pytest.raises(ValueError, match=text.replace("eps", "alpha")):
            pgd(small_network(), small_images(), small_labels(), alpha=eps)


def test_numbers_of_any_kind_are_numbers() -> None:
    expected = bim(small_network(), small_images(), small_labels(), eps=0.1, alpha=0.05)
    for kind in (np.float64, partial(torch.tensor, dtype=torch.float64), np.array):
        given: dict[str, Any] = {"eps": kind(0.1), "alpha": kind(0.05)}
        assert torch.equal(bim(small_network(), small_images(), small_labels(), **given), expected)


def test_an_empty_batch_has_no_radii() -> None:
    none = small_images()[:0], small_labels()[:0]
    for attack in (*ATTACKS.values(), *_other_attacks().values()):
        for eps in (torch.zeros(0), 0.1, None):
            assert attack(small_network(), *none, eps=eps, bounds=(-1, 3)).shape == (0, 3, 9, 8)
        assert [len(found) for found in attack(small_network(), *none, eps=[0.1, 0.2])] == [0, 0]


# Losses of one's own


def _draws(images: Tensor) -> Tensor:
    return torch.stack([small_network(seed)(images) for seed in (0, 1)])


@pytest.mark.parametrize(
    ("attack", "targeted", "model"),
    grids.every(
        2,
        [fgsm, bim, mim, partial(pgd, restarts=2, keep_best=True), partial(pgd, drop_fooled=True)],
        [False, True],
        [small_network(), _draws],
    ),
)
def test_cross_entropy_of_ones_own_is_cross_entropy(attack: Attack, targeted: bool, model: Any) -> None:
    results = []
    for loss in ("ce", own_loss):
        torch.manual_seed(3)
        results.append(attack(model, small_images(), small_labels(), loss=loss, targets=some_targets(targeted)))
    assert_matches(results[1], results[0])
    assert not torch.equal(results[0], small_images())


def test_a_loss_of_ones_own_is_what_goes_up() -> None:
    """Whatever it is: here, a logit that has nothing to do with the label. Half precision comes as float32."""
    kinds = set()

    def third(outputs: Tensor, labels: Tensor) -> Tensor:
        kinds.add(outputs.dtype)
        assert labels.shape == (7,)
        return outputs[:, 3]

    for dtype in (torch.float64, torch.float16):
        model, images = small_network(dtype=dtype), small_images(dtype=dtype)
        found = bim(model, images, small_labels(), loss=third)
        with torch.no_grad():
            assert bool((model(found)[:, 3] > model(images)[:, 3]).all())
    assert kinds == {torch.float64, torch.float32}


def test_a_compiled_attack_has_a_loss_of_ones_own(called: list[Call]) -> None:
    attack, model = attacks.Attack(loss=own_loss, steps=3, keep_best=True), small_network()
    bound = BoundAttack(attack, lambda x, _: model(x), compile="on")
    expected = bim(model, small_images(), small_labels(), steps=3, keep_best=True)
    assert_matches(bound(small_images(), small_labels()), expected)
    assert bound.compiled
    assert called


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (F.cross_entropy, r"loss: expected one of each image, \(7,\), got \(\); take reduction='none'"),
        (lambda outputs, labels: outputs, r"loss: expected one of each image, \(7,\), got \(7, 5\)"),
        (lambda outputs, labels: 3, r"loss: expected one of each image, \(7,\), got int"),
    ],
)
def test_a_loss_of_another_shape_is_named(loss: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bim(small_network(), small_images(), small_labels(), loss=loss)


def test_a_loss_that_is_no_number_is_named_by_its_image() -> None:
    def broken(outputs: Tensor, labels: Tensor) -> Tensor:
        return torch.where(torch.arange(7) == 4, float("nan"), outputs[:, 0])

    with pytest.raises(attacks.NotFiniteError, match="image 4"):
        bim(small_network(), small_images(), small_labels(), loss=broken, keep_best=True)


def test_a_module_may_be_a_loss() -> None:
    expected = bim(small_network(), small_images(), small_labels())
    found = bim(small_network(), small_images(), small_labels(), loss=nn.CrossEntropyLoss(reduction="none"))
    assert_matches(found, expected)


def test_every_function_has_the_same_new_arguments() -> None:
    import inspect

    functions: list[Callable[..., Any]] = [fgsm, bim, mim, pgd, autoattack, square]
    for function in functions:
        names = inspect.signature(function).parameters
        assert {"eps", "bounds", "preprocessing"} <= set(names)
