"""The attacks: torchattacks' results, inside the ball, the model left as it was; whatever batch they are given."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, attacks
from immunity_fast.attacks import BoundAttack, bim, fgsm, mim, pgd
from immunity_fast.models.gate import Switch
from tests import attacked_models, grids
from tests.attacked_models import (
    ATTACKS,
    EPS,
    Attack,
    Broken,
    assert_in_ball,
    each_attack,
    each_norm,
    marked_images,
    small_images,
    small_labels,
    small_network,
    some_targets,
    trained_images,
    trained_labels,
    trained_mixture,
)

seeded = attacked_models.seeded
FIXED = ATTACKS | {"pgd": partial(pgd, steps=3, random_start=False)}
each_fixed_attack = pytest.mark.parametrize("attack", FIXED.values(), ids=FIXED)


def _model(switch: Switch = "mean", seed: int = 0) -> ImmunityMoE:
    model = copy.deepcopy(trained_mixture())
    model.gate.switch = switch
    model.gate.generator = torch.Generator().manual_seed(seed)
    return model


def _loss(model: ImmunityMoE, images: Tensor) -> float:
    with torch.no_grad():
        return float(F.nll_loss(model(images), trained_labels(len(images))))


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


@pytest.mark.parametrize(("name", "options"), grids.each(2, PARITY))
def test_results_are_torchattacks(name: str, options: dict[str, Any]) -> None:
    """The random start included: both draw the same numbers from the same global generator.

    A step is the sign of a gradient. Where that is all but zero, the last bit of an image, or of a loss that is a mean
    here and a sum there, may decide it; such a pixel is off by a whole step, hence the thousandth that may differ.
    """
    expected, actual = _theirs_and_ours(name, options, _model(), trained_images(), trained_labels())
    tolerance = 1e-5 if name == "PGDL2" else 1e-6
    assert float(((actual - expected).abs() <= tolerance).float().mean()) >= 0.999


@pytest.mark.parametrize("targeted", [False, True], ids=["any", "target"])
@pytest.mark.parametrize(("name", "options"), PARITY + DEFAULTS)
def test_results_are_torchattacks_with_targets_and_defaults(name: str, options: dict[str, Any], targeted: bool) -> None:
    """In float64, to which no sign is a matter of rounding; but in float32, whose draws are the same, at random."""
    random = name.startswith("PGD") and options.get("random_start", True)
    dtype = torch.float32 if random else torch.float64
    inputs = (small_network(dtype=dtype), small_images(dtype=dtype), small_labels())
    expected, actual = _theirs_and_ours(name, options, *inputs, some_targets(targeted))
    same = (actual - expected).abs() <= (1e-5 if name == "PGDL2" else 1e-6)
    assert float(same.double().mean()) >= (0.99 if random else 1)


@pytest.mark.parametrize(("name", "switch"), grids.every(2, ("FGSM", "PGD"), ("call", "sample")))
def test_torchattacks_run_on_the_model_unchanged(name: str, switch: Switch) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    model = _model(switch)
    before = copy.deepcopy(model.state_dict())
    adversarial = getattr(torchattacks, name)(model)(trained_images(), trained_labels())
    assert_in_ball(adversarial, trained_images(), slack=1e-6)
    assert _loss(_model(), adversarial) > _loss(_model(), trained_images())
    assert not model.training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "switch"), grids.every(2, ATTACKS, get_args(Switch)))
def test_results_are_in_the_ball_and_raise_the_loss(name: str, switch: Switch) -> None:
    adversarial = ATTACKS[name](_model(switch), trained_images(), trained_labels())
    assert_in_ball(adversarial, trained_images())
    assert _loss(_model(), adversarial) > _loss(_model(), trained_images()) + 0.04


@pytest.mark.parametrize(("name", "eps"), grids.every(2, ATTACKS, (0.0, 1 / 255, 0.5, 2.0)))
def test_any_radius_is_kept(name: str, eps: float) -> None:
    assert_in_ball(ATTACKS[name](_model(), trained_images(), trained_labels(), eps=eps), trained_images(), eps)


def test_a_single_step_of_bim_the_size_of_the_ball_is_fgsm() -> None:
    expected = fgsm(_model(), trained_images(), trained_labels(), eps=EPS)
    assert torch.equal(bim(_model(), trained_images(), trained_labels(), eps=EPS, alpha=EPS, steps=1), expected)
    assert torch.equal(mim(_model(), trained_images(), trained_labels(), eps=EPS, alpha=EPS, steps=1), expected)


def test_pgd_without_a_random_start_is_bim() -> None:
    expected = bim(_model(), trained_images(), trained_labels(), steps=3)
    assert torch.equal(pgd(_model(), trained_images(), trained_labels(), steps=3, random_start=False), expected)


def test_pgd_raises_the_loss_at_least_as_much_as_fgsm() -> None:
    model = _model()
    assert _loss(model, pgd(model, trained_images(), trained_labels(), steps=8)) >= _loss(
        model, fgsm(model, trained_images(), trained_labels())
    )


def test_pgd_starts_where_its_generator_says() -> None:
    def run(seed: int) -> Tensor:
        return pgd(_model(), trained_images(), trained_labels(), steps=0, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert_in_ball(run(0), trained_images())
    assert float((run(0) - trained_images()).abs().max()) > 0.9 * EPS


def test_a_step_does_not_depend_on_the_size_of_the_batch() -> None:
    together = bim(_model(), trained_images(), trained_labels(), steps=2)
    alone = torch.cat(
        [
            bim(_model(), trained_images()[i : i + 1], trained_labels()[i : i + 1], steps=2)
            for i in range(len(trained_images()))
        ]
    )
    assert float(((together - alone).abs() <= 1e-6).float().mean()) >= 0.999


@pytest.mark.parametrize(("name", "switch"), grids.every(2, ATTACKS, ("call", "mean")))
def test_the_model_and_the_images_are_left_as_they_were(name: str, switch: Switch) -> None:
    attack, model, images = ATTACKS[name], _model(switch), trained_images().requires_grad_()
    twin = copy.deepcopy(model)
    attack(model, images, trained_labels())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert images.grad is None
    assert torch.equal(images, trained_images())
    assert [part.training for part in model.modules()] == [part.training for part in twin.modules()]
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


@each_attack
def test_gradients_already_there_are_kept(attack: Attack) -> None:
    model = _model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    attack(model, trained_images(), trained_labels())
    assert all(p.grad is not None and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


@each_fixed_attack
def test_attacks_work_where_gradients_are_disabled(attack: Attack) -> None:
    expected = attack(_model(), trained_images(), trained_labels())
    with torch.no_grad():
        actual = attack(_model(), trained_images(), trained_labels())
    assert torch.equal(actual, expected)


@each_attack
def test_attacks_work_on_frozen_models_and_plain_functions(attack: Attack) -> None:
    assert_in_ball(attack(_model().requires_grad_(False), trained_images(), trained_labels()), trained_images())
    assert_in_ball(attack(lambda x: x.flatten(1)[:, :4], trained_images(), trained_labels()), trained_images())


@each_attack
def test_an_empty_batch_gives_an_empty_result(attack: Attack) -> None:
    assert attack(_model(), trained_images(0), trained_labels(0)).shape == (0, 3, 12, 12)


@pytest.mark.parametrize("name", ["bim", "mim", "pgd"])
def test_no_steps_give_detached_images(name: str) -> None:
    adversarial = FIXED[name](_model(), trained_images().requires_grad_(), trained_labels(), steps=0)
    assert torch.equal(adversarial, trained_images())
    assert not adversarial.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_are_welcome(dtype: torch.dtype) -> None:
    assert torch.equal(
        fgsm(_model(), trained_images(), trained_labels().to(dtype)), fgsm(_model(), trained_images(), trained_labels())
    )


@each_attack
@pytest.mark.parametrize(
    "model", [lambda x: trained_mixture()(x).detach(), lambda x: trained_mixture()(0 * x.detach())]
)
def test_a_model_without_a_gradient_for_the_images_is_an_error(attack: Attack, model: Any) -> None:
    with pytest.raises(ValueError, match="model: expected outputs with a gradient with respect to the images"):
        attack(model, trained_images(), trained_labels())


WRONG: list[tuple[str, tuple[Any, Any], dict[str, Any], str]] = [
    ("images exceed 1", (trained_images() + 0.5, trained_labels()), {}, r"images: .*\[0, 1\].* to 1\.5"),
    ("images are negative", (trained_images() - 0.5, trained_labels()), {}, r"images: .*\[0, 1\].*-0\.5"),
    ("images are not numbers", (trained_images() * float("nan"), trained_labels()), {}, r"images: .*\[0, 1\].*nan"),
    ("images are bytes", (trained_images().byte(), trained_labels()), {}, r"images: .*torch\.uint8"),
    ("images lack the batch", (trained_images()[0], trained_labels()[:1]), {}, r"images: .*\(3, 12, 12\)"),
    ("labels are too few", (trained_images(), trained_labels()[:3]), {}, r"labels: .*\(8,\).*\(3,\)"),
    ("labels are one-hot", (trained_images(), F.one_hot(trained_labels())), {}, r"labels: .*\(8,\).*\(8, 4\)"),
    ("labels are fractions", (trained_images(), trained_labels().float()), {}, r"labels: .*integers.*torch\.float32"),
    ("eps is negative", (trained_images(), trained_labels()), {"eps": -0.1}, r"eps: .*-0\.1"),
    ("eps is not a number", (trained_images(), trained_labels()), {"eps": float("nan")}, "eps: .*nan"),
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
        attack(_model(), trained_images(), trained_labels(), **{name: -1})


# What is wrong with the batch


@each_attack
@pytest.mark.parametrize("wrong", [-1, 5, 1000])
@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_classes_that_the_model_does_not_know_are_named(attack: Attack, wrong: int, loss: Any) -> None:
    bad = small_labels()
    bad[5] = wrong
    with pytest.raises(ValueError, match=f"labels: expected 0 to 4, got {wrong} for image 5"):
        attack(small_network(), small_images(), bad, loss=loss)
    with pytest.raises(ValueError, match=f"targets: expected 0 to 4, got {wrong} for image 5"):
        attack(small_network(), small_images(), small_labels(), targets=bad, loss=loss)


@each_attack
def test_targets_of_another_shape_or_type_are_named(attack: Attack) -> None:
    with pytest.raises(ValueError, match=r"targets: expected integers \(8,\), got torch.int64 \(3,\)"):
        attack(_model(), trained_images(), trained_labels(), targets=trained_labels()[:3])
    with pytest.raises(ValueError, match=r"targets: expected integers \(8,\), got torch.float32 \(8,\)"):
        attack(_model(), trained_images(), trained_labels(), targets=trained_labels().float())


def test_dlr_of_too_few_classes_is_an_error_of_the_attack() -> None:
    with pytest.raises(ValueError, match="loss: expected at least 3 classes for dlr, got 2"):
        bim(lambda x: small_network()(x)[:, :2], small_images(), torch.zeros(7, dtype=torch.long), loss="dlr")


@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"drop_fooled": True, "restarts": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@each_norm
def test_what_is_given_is_not_written_to(options: dict[str, Any], dtype: torch.dtype, norm: Any) -> None:
    images, labels, targets = small_images(dtype=dtype), small_labels(), small_labels().flip(0)
    copies = [tensor.clone() for tensor in (images, labels, targets)]
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    attack = attacks.Attack(norm=norm, steps=3, random_start=True, **options)
    adversarial = attack(small_network(dtype=dtype), images, labels, targets, generator)
    assert adversarial.dtype == dtype
    assert adversarial.data_ptr() != images.data_ptr()
    assert not torch.equal(adversarial, images)
    assert all(torch.equal(a, b) for a, b in zip((images, labels, targets), copies, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())


def test_who_is_trusted_is_not_checked() -> None:
    """Of what is right the results are the same; of what is wrong there are some."""
    attack = attacks.Attack(steps=2)
    bound = BoundAttack(attack, lambda x, _: small_network()(x))
    expected = attack(small_network(), small_images(), small_labels())
    assert torch.equal(bound(small_images(), small_labels(), trusted=True), expected)
    assert bound(small_images() + 0.5, small_labels() + 9, trusted=True).shape == expected.shape
    broken = BoundAttack(attack, lambda x, _: Broken(3)(x))
    healthy = torch.arange(7) != 3
    assert torch.equal(
        broken(marked_images(), small_labels(), trusted=True)[healthy],
        attack(small_network(), marked_images(), small_labels())[healthy],
    )


@pytest.mark.parametrize("steps", [0, 2])
def test_a_result_is_no_view_of_the_images(steps: int) -> None:
    images = small_images()
    bim(small_network(), images, small_labels(), steps=steps, eps=0.0).zero_()
    assert torch.equal(images, small_images())
