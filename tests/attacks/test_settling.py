"""Images that nobody who answers is right about are left, what attacks share is shared, and bfloat16 is checked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from immunity_fast.attacks import Attack, BoundAttack, pgd
from immunity_fast.attacks.batch import First
from immunity_fast.attacks.settling import ASKED_AT, Settling
from immunity_fast.permutations import nobody_right
from tests.attacked_models import Recorder, small_images, small_labels, small_network


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_nobody_is_right_where_no_permutation_and_no_expert_is(experts: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(experts, 400, 3, generator=generator, dtype=torch.float64)
    gate = (2 * torch.randn(400, experts, generator=generator, dtype=torch.float64)).softmax(-1)
    labels = torch.randint(3, (400,), generator=generator)
    shares = logits.softmax(-1)
    found = nobody_right(logits, gate, labels)
    slack = nobody_right(logits, gate, labels, 0.2)
    for b in range(400):
        label = int(labels[b])
        rivals, least = set(range(3)) - {label}, []
        for order in itertools.permutations(range(experts)):
            mixed = sum(gate[b, i] * shares[j, b] for i, j in enumerate(order))
            least.append([float(mixed[m] - mixed[label]) for m in rivals])
        always = max(min(column) for column in zip(*least, strict=True))
        alone = min(float(own.max() - own[label]) for own in shares[:, b])
        assert bool(found[b]) == (always > 0 and alone > 0)
        assert bool(slack[b]) == (always > 0.2 and alone > 0.2)
    assert 10 < int(slack.sum()) < int(found.sum()) < 390


def _wrong(outputs: Tensor, labels: Tensor) -> Tensor:
    return outputs.argmax(-1) != labels


class _Watched(Recorder):
    """A network that can be seen on the way, and says how often it is asked."""

    def __call__(self, images: Tensor, _labels: Tensor | None = None) -> Tensor:
        return super().__call__(images)

    def observed(self, images: Tensor, _labels: Tensor, _rows: Any = None) -> tuple[Tensor, Tensor]:
        outputs = self(images)
        return outputs, outputs.detach()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_settled_image_stays_and_the_others_go_on_as_before(norm: Any) -> None:
    settings = {"eps": 6 / 255, "alpha": 1 / 255} if norm == "Linf" else {"eps": 0.35, "alpha": 0.06}
    attack = Attack(**settings, steps=12, norm=norm)
    images, labels, network = small_images(), small_labels(), small_network()
    steps = [Attack(**settings, steps=taken, norm=norm)(network, images, labels) for taken in range(13)]
    model = _Watched(network)
    bound = BoundAttack(attack, model, settling=Settling(lambda *_: pytest.fail("a pass"), _wrong))
    actual = bound(images, labels)
    shown = 0
    for i in range(len(images)):
        first = next((t for t in range(12) if bool(_wrong(network(steps[t][i : i + 1]), labels[i : i + 1]))), 12)
        torch.testing.assert_close(actual[i], steps[first][i], rtol=0, atol=1e-12)
        shown += min(first + 1, 12)
    assert model.count == shown < 12 * len(images)


def test_who_is_not_seen_on_the_way_is_asked_now_and_then() -> None:
    images, labels, network = small_images(), small_labels(), small_network()
    asked: list[int] = []

    def look(shown: Tensor, own: Tensor) -> Tensor:
        asked.append(len(shown))
        return torch.ones_like(own, dtype=torch.bool)

    bound = BoundAttack(Attack(eps=0.2, steps=12), lambda x, _: network(x), settling=Settling(look))
    adversarial = bound(images, labels)
    assert 0 < len(asked) <= len(ASKED_AT)
    assert sum(asked) <= len(images), "who is settled is asked no more"
    assert bool(_wrong(network(adversarial), labels).all())


@pytest.mark.parametrize("options", [{"keep_best": True}, {"drop_fooled": True}, {"restarts": 2}])
def test_settling_is_of_attacks_whose_last_image_counts(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="settling: expected an eager attack whose last image counts"):
        BoundAttack(Attack(**options), lambda x, _: x.mean((2, 3)), settling=Settling(lambda x, y: y > 0))


def test_a_first_gradient_is_shared_bit_for_bit() -> None:
    images, labels, network = small_images(dtype=torch.float32), small_labels(), small_network(dtype=torch.float32)
    first, recorder = First(), Recorder(network)
    for settings in (Attack(steps=1), Attack(steps=3, decay=1.0), Attack(steps=3, norm="L2")):
        before = recorder.count
        shared = BoundAttack(settings, lambda x, _: recorder(x))(images, labels, first=first)
        new = settings.steps * len(images) - (recorder.count - before)
        assert new == (0 if before == 0 else len(images))
        assert torch.equal(shared, settings(network, images, labels))
    begun = BoundAttack(Attack(steps=1, random_start=True), lambda x, _: recorder(x))
    before = recorder.count
    begun(images, labels, first=first)
    assert recorder.count == before + len(images), "another start has another gradient"


class _Backward(TorchDispatchMode):
    """Which gradients convolutions are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        return function(*args, **(kwargs or {}))


def test_no_gradient_of_weights_is_computed() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(80, 5))
    with _Backward() as seen:
        pgd(network, small_images(dtype=torch.float32), small_labels(), steps=2)
    assert seen.masks == [[True, False, False]] * 4


# bfloat16


@pytest.mark.parametrize("options", [{"keep_best": True}, {"drop_fooled": True}, {"restarts": 2, "drop_fooled": True}])
def test_what_fools_in_bfloat16_alone_is_attacked_further(options: dict[str, Any]) -> None:
    """A model that is wrong about everything in bfloat16, and about nothing in float32, drops no image."""
    network, shown = small_network(dtype=torch.float32), list[int]()
    labels = torch.zeros(7, dtype=torch.int64)

    def model(images: Tensor) -> Tensor:
        cast = torch.is_autocast_enabled("cpu")
        shown.append(len(images) if cast else 0)
        wrong = torch.tensor([0.0, 1.0, 0, 0, 0]) if cast else torch.tensor([1.0, 0.0, 0, 0, 0])
        return 1e-3 * network(images) + wrong

    images = small_images(dtype=torch.float32)
    adversarial = pgd(model, images, labels, steps=4, amp="bf16", **options)
    assert sum(shown) == 28 * options.get("restarts", 1)
    assert not torch.equal(adversarial, images)


@pytest.mark.parametrize("options", [{}, {"keep_best": True}, {"drop_fooled": True}])
def test_in_bfloat16_attacks_are_as_strong_and_in_the_ball(options: dict[str, Any]) -> None:
    network, labels = small_network(dtype=torch.float32), small_labels(60)
    images = small_images(60, dtype=torch.float32)
    right = []
    for amp in ("off", "bf16"):
        generator = torch.Generator().manual_seed(1)
        x = pgd(network, images, labels, steps=6, generator=generator, amp=amp, **options)  # type: ignore[call-overload]
        assert float((x.double() - images.double()).abs().max()) <= 8 / 255
        right.append(int((network(x).argmax(-1) == labels).sum()))
    assert 0 < right[0] < 50
    assert abs(right[0] - right[1]) <= 3


@pytest.mark.parametrize("sure", [False, True])
def test_in_bfloat16_an_image_is_left_after_a_pass_without(sure: bool) -> None:
    images, labels, network = small_images(dtype=torch.float32), small_labels(), small_network(dtype=torch.float32)
    cast: list[bool] = []

    def asked(_: Tensor, own: Tensor) -> Tensor:
        cast.append(torch.is_autocast_enabled("cpu"))
        return torch.full_like(own, sure, dtype=torch.bool)

    settling = Settling(asked, lambda _, own: torch.ones_like(own, dtype=torch.bool))
    attack = Attack(steps=4, amp="bf16")
    adversarial = BoundAttack(attack, _Watched(network), settling=settling)(images, labels)
    expected = images if sure else BoundAttack(attack, _Watched(network))(images, labels)
    assert torch.equal(adversarial, expected)
    assert cast == [False] * (1 if sure else 3), "not before the last step, which nobody is spared"
