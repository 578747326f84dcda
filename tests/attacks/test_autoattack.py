"""AutoAttack and Square Attack: as strong as can be where that is known, exactly in the ball, and leaving no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE, RandomSwitchGate
from immunity_fast.attacks import NotFiniteError, pgd
from immunity_fast.attacks.autoattack import autoattack
from immunity_fast.attacks.projections import Norm
from immunity_fast.attacks.square import square
from tests import grids

torchattacks = pytest.importorskip("torchattacks")

CLASSES = 5
EPS: dict[Norm, float] = {"Linf": 16 / 255, "L2": 0.6}  # about half of the images withstand it
Model = Callable[[Tensor], Tensor]

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


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Thousands of tiny operations: several threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def _data(samples: int = 48) -> tuple[Tensor, Tensor]:
    """Four faint patches of colour for each class, and noise; some pixels are 0 and 1, where the box cuts the ball."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(CLASSES, 3, 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.randint(CLASSES, (48,), generator=generator)
    noise = torch.rand(48, 3, 8, 8, generator=generator)
    images = (1.2 * (0.2 * patterns[labels] + 0.8 * noise) - 0.1).clamp(0, 1)
    return images[:samples], labels[:samples]


@cache
def _trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(288, CLASSES)
    )
    images, labels = _data()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(20):
        optimiser.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimiser.step()
    optimiser.zero_grad()
    return model.eval()


def _model() -> nn.Sequential:
    return copy.deepcopy(_trained())


def _correct(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1) == labels


def _assert_in_ball(adversarial: Tensor, images: Tensor, eps: float, norm: Norm = "Linf") -> None:
    """Exactly: the difference of two stored numbers, in float64."""
    assert adversarial.shape == images.shape
    assert adversarial.dtype == images.dtype
    assert not adversarial.requires_grad
    move = (adversarial.double() - images.double()).flatten(1)
    assert float(move.abs().max() if norm == "Linf" else torch.linalg.vector_norm(move, dim=1).max()) <= eps
    assert float(adversarial.min()) >= 0
    assert float(adversarial.max()) <= 1


def _linear(classes: int = CLASSES, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A linear model, images far enough from the edge of the box, and the labels it gives them."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, classes))
    images = 0.2 + 0.6 * torch.rand(40, 3, 6, 6)
    return model, images, model(images).argmax(1)


def _distances(model: nn.Sequential, images: Tensor, labels: Tensor, norm: Norm) -> Tensor:
    """From each image to the nearest that a linear model takes for another class: min_m (z_y − z_m) / ‖w_y − w_m‖."""
    weight, bias = model[1].weight.double(), model[1].bias.double()
    distances = []
    for image, label in zip(images.flatten(1).double(), labels, strict=True):
        others = [m for m in range(len(weight)) if m != label]
        gaps = [weight[label] @ image + bias[label] - weight[m] @ image - bias[m] for m in others]
        slopes = [torch.linalg.vector_norm(weight[label] - weight[m], ord=1 if norm == "Linf" else 2) for m in others]
        distances.append(min(gap / slope for gap, slope in zip(gaps, slopes, strict=True)))
    return torch.stack(distances).detach()


@pytest.mark.parametrize(("classes", "norm"), grids.every(2, (2, 3, 11), ("Linf", "L2")))
def test_a_linear_model_is_attacked_optimally(classes: int, norm: Norm) -> None:
    """Whichever images can be fooled at all are, and no others."""
    model, images, labels = _linear(classes)
    distances = _distances(model, images, labels, norm)
    eps = float(distances.median()) * 1.0001
    adversarial = autoattack(model, images, labels, num_classes=classes, eps=eps, norm=norm, steps=8, queries=5)
    _assert_in_ball(adversarial, images, eps, norm)
    assert torch.equal(_correct(model, adversarial, labels), distances > eps)


@each_norm
def test_stronger_than_pgd_and_exactly_in_the_ball(norm: Norm) -> None:
    model, (images, labels), eps = _model(), _data(), EPS[norm]
    clean = _correct(model, images, labels)
    generator = torch.Generator().manual_seed(0)
    weaker = pgd(model, images, labels, eps=eps, alpha=eps / 3, norm=norm, steps=6, generator=generator)
    adversarial = quick(model, images, labels, eps=eps, norm=norm)
    _assert_in_ball(adversarial, images, eps, norm)
    left = _correct(model, adversarial, labels)
    assert float(clean.float().mean()) > 0.9
    assert left.sum() <= _correct(model, weaker, labels).sum()
    assert 0 < left.sum() < clean.sum() - 10
    # Images that withstood, and those that needed no attack, come back as they were.
    assert torch.equal(adversarial[left | ~clean], images[left | ~clean])
    assert bool((adversarial != images)[clean & ~left].flatten(1).any(1).all())


@each_norm
def test_square_gets_better_with_queries(norm: Norm) -> None:
    model, (images, labels), eps = _model(), _data(), 3 * EPS[norm]
    correct = [int(_correct(model, images, labels).sum())]
    for queries in (5, 80):
        adversarial = square(model, images, labels, eps=eps, norm=norm, queries=queries)
        _assert_in_ball(adversarial, images, eps, norm)
        correct.append(int(_correct(model, adversarial, labels).sum()))
    assert correct[2] < correct[1] - 5
    assert correct[2] < correct[0] / 2


@pytest.mark.parametrize(
    ("name", "norm", "dtype"),
    grids.every(3, ATTACKS, ("Linf", "L2"), (torch.float16, torch.bfloat16, torch.float64)),
)
def test_any_dtype(name: str, norm: Norm, dtype: torch.dtype) -> None:
    attack, model, (images, labels), eps = ATTACKS[name], _model().to(dtype), _data(6), 4 * EPS[norm]
    images = images.to(dtype)
    adversarial = attack(model, images, labels, eps=eps, norm=norm)
    _assert_in_ball(adversarial, images, eps, norm)
    assert _correct(model, adversarial, labels).sum() < _correct(model, images, labels).sum()


def test_log_probabilities_are_as_good_as_logits() -> None:
    model, (images, labels) = _model(), _data(24)
    adversarial = quick(model, images, labels)
    again = quick(lambda x: F.log_softmax(model(x), -1), images, labels)
    difference = _correct(model, adversarial, labels).sum() - _correct(model, again, labels).sum()
    assert abs(int(difference)) <= 2


def test_the_first_part_is_torchattacks_on_what_is_right() -> None:
    """With two classes "rand" is APGD on the cross-entropy alone."""
    model, images, labels = _linear(2)
    labels[:7] = 1 - labels[:7]
    eps = 1.01 * float(_distances(model, images[7:], labels[7:], "Linf").median())
    actual = autoattack(model, images, labels, num_classes=2, eps=eps, version="rand", steps=12, seed=3)
    expected = torchattacks.APGD(model, eps=eps, steps=12, eot_iter=20, seed=3)(images, labels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)
    assert torch.equal(actual[:7], images[:7])
    assert int((actual != images).flatten(1).any(1).sum()) > 5


STANDARD = ["apgd", *["apgd"] * 4, *["fab"] * 4, "square"]


def _experts() -> list[nn.Sequential]:
    """Three networks that are not quite alike."""
    torch.manual_seed(1)
    experts = [_model() for _ in range(3)]
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
    images, labels = _data(8)
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
    experts, (images, labels), steps = _experts(), _data(24), 5
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


def _state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.mark.parametrize("name", ["standard", pytest.param("rand", marks=pytest.mark.exhaustive), "square"])
def test_the_seed_decides_and_global_generators_stay(name: str) -> None:
    attack = ATTACKS[name] if name == "square" else partial(ATTACKS[name], steps=3)
    model, (images, labels) = _model(), _data(16)

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
        quick(_raising(after=4), *_data(8))
    assert _state() == before


def _raising(after: int) -> Model:
    model, calls = _model(), []

    def call(x: Tensor) -> Tensor:
        calls.append(x)
        if len(calls) > after:
            raise RuntimeError("broken")
        return model(x)

    return call


@each_attack
def test_the_model_is_left_as_it_was(attack: Callable[..., Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    """torchattacks would put all of it in training mode at the end, and FAB leaves gradients in the parameters."""
    model, (images, labels) = _model(), _data(8)
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
    model, (images, labels) = _model(), _data()
    kept: list[tuple[Tensor, Tensor]] = []

    def detached(x: Tensor) -> Tensor:
        with torch.inference_mode():
            outputs = model(x)
        kept.append((outputs, outputs.clone()))
        return outputs

    adversarial = square(detached, images, labels, eps=48 / 255, queries=60)
    assert _correct(model, adversarial, labels).sum() < _correct(model, images, labels).sum() - 20
    assert all(torch.equal(outputs, before) for outputs, before in kept)
    with pytest.raises(ValueError, match="expected outputs with a gradient with respect to the images"):
        quick(detached, images, labels)
    with pytest.raises(ValueError, match="expected outputs with a gradient with respect to the images"):
        quick(lambda x: model(torch.ones_like(x)), images, labels)


@each_attack
@each_norm
def test_one_image_and_none(attack: Callable[..., Tensor], norm: Norm) -> None:
    model, (images, labels), eps = _model(), _data(1), 6 * EPS[norm]
    alone = attack(model, images[:1], labels[:1], eps=eps, norm=norm)
    _assert_in_ball(alone, images[:1], eps, norm)
    assert not bool(_correct(model, alone, labels[:1]))
    empty = attack(lambda x: pytest.fail("nothing to ask"), images[:0], labels[:0], norm=norm)
    assert empty.shape == (0, 3, 8, 8)


@each_attack
def test_images_that_are_wrong_already_cost_nothing(attack: Callable[..., Tensor]) -> None:
    model, (images, labels) = _model(), _data(8)
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
    assert set(sizes[2:]) <= {1, CLASSES - 1}, "one image, or it with each wrong class as a target"


def test_channels_last_models_and_images() -> None:
    """torchattacks' FAB takes views that such gradients have not."""
    model, (images, labels) = _model(), _data(24)
    expected = _correct(model, quick(model, images, labels), labels)
    model = model.to(memory_format=torch.channels_last)
    adversarial = quick(model, images.to(memory_format=torch.channels_last), labels)
    assert abs(int(_correct(model, adversarial, labels).sum() - expected.sum())) <= 2


@pytest.mark.parametrize("attack", [quick, quick_square])
def test_outputs_that_are_no_numbers(attack: Callable[..., Tensor]) -> None:
    """An argmax over NaN is class 0, so that images of class 0 would pass for robust."""
    model, (images, labels) = _model(), _data(24)

    def from_the_start(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x))[:, None] == 3, torch.nan, model(x))

    def on_the_way(x: Tensor) -> Tensor:
        known = (x.detach()[:, None] == images).flatten(2).all(2).any(1)
        return torch.where(known[:, None], model(x), torch.nan)

    with pytest.raises(NotFiniteError, match="image 3"):
        attack(from_the_start, images, labels)
    with pytest.raises(ValueError, match="NaN or infinite"):
        attack(on_the_way, images[labels == 0], labels[labels == 0])


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
        quick(_model(), *_data(8), **options)
    if argument in ("norm", "eps", "queries"):
        with pytest.raises(ValueError, match=f"^{argument}: "):
            square(_model(), *_data(8), **options)


@each_attack
def test_errors_of_images_and_labels(attack: Callable[..., Tensor]) -> None:
    model, (images, labels) = _model(), _data(8)
    with pytest.raises(ValueError, match=r"^images: "):
        attack(model, images + 1, labels)
    with pytest.raises(ValueError, match=r"^labels: "):
        attack(model, images, labels[:-1])
    with pytest.raises(ValueError, match=r"^labels: expected 0 to 4"):
        attack(model, images, labels + 1)
    with pytest.raises(ValueError, match=r"^model: expected outputs"):
        attack(lambda x: model(x)[None], images, labels)
