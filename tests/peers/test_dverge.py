"""DVERGE: what is distilled from whom, what each member learns of it, and when the layer changes."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import immunity_fast
from immunity_fast import DVERGELoss, ImmunityMoE
from immunity_fast.models.member_features import count_places
from immunity_fast.peers import distilled, dverge, method_of
from immunity_fast.training.state import TrainingState
from tests.adversarial_cases import state_of
from tests.small_runs import interrupted, options, saved, trained

CLASSES, EPS, STEP, STEPS = 4, 0.06, 0.011, 4


class Block(nn.Module):
    """BatchNorms before ReLUs in place, one behind a sum; a function, a method and a module."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.second, self.two = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.third, self.three = nn.Conv2d(width, 6, 3, stride=2), nn.BatchNorm2d(6)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(6, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.one(self.first(images)), inplace=True)
        maps = self.two(self.second(maps)).add_(maps).relu_()
        logits: Tensor = self.head(self.relu(self.three(self.third(maps))).mean((2, 3)))
        return logits

    def place(self, images: Tensor, layer: int) -> Tensor:
        """What the places are, without anything in place."""
        maps = self.one(self.first(images))
        if layer > 1:
            kept = F.relu(maps)
            maps = self.two(self.second(kept)) + kept
        if layer > 2:
            maps = self.three(self.third(F.relu(maps)))
        return self.head(F.relu(maps).mean((2, 3))) if layer == 4 else maps


def _networks(count: int = 3, *, widths: Sequence[int] = (5, 5, 5)) -> list[Block]:
    """In training mode, in float64, with statistics that are no batch's."""
    torch.manual_seed(0)
    networks = [Block(widths[i]).double() for i in range(count)]
    with torch.no_grad():
        for network in networks:
            network(torch.rand(9, 3, 7, 9).double() ** 2)
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return networks


def _mixture(networks: Sequence[nn.Module], **options: Any) -> ImmunityMoE:
    return ImmunityMoE.from_experts(networks, stage="second", image_size=(9, 7), **options).double().train()


def _batch(count: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Some pixels are 0 and 1: their range ends before eps does."""
    source = torch.Generator().manual_seed(seed)
    images = (1.2 * torch.rand(count, 3, 9, 7, generator=source, dtype=torch.float64) - 0.1).clamp(0, 1)
    return images, torch.randint(CLASSES, (count,), generator=source)


def _naive(features: Callable[[Tensor], Tensor], images: Tensor, others: Tensor, steps: int = STEPS) -> Tensor:
    """The authors' loop, of one member, by a mean where ours has a sum."""
    with torch.no_grad():
        wanted = features(others)
    x, momentum = images.clone(), torch.zeros_like(images)
    for _ in range(steps):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.mse_loss(features(x), wanted), x)
        for i, own in enumerate(gradient):
            momentum[i] = momentum[i] + own / own.abs().sum()
        x = x.detach() - STEP * momentum.sign()
        x = torch.minimum(torch.maximum(x, images - EPS), images + EPS).clamp(0, 1)
    return x


@pytest.mark.parametrize("batchnorm", ["train", "eval"])
@pytest.mark.parametrize("layer", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["list", "loop", "vmap"])
def test_distilling_is_the_loop_over_members(kind: str, layer: int, batchnorm: Any) -> None:
    networks, (images, _), (others, _) = _networks(), _batch(), _batch(seed=2)
    members: Any = networks if kind == "list" else _mixture(networks, batching=kind)
    found = distilled(members, images, others, layer, eps=EPS, step=STEP, steps=STEPS, batchnorm=batchnorm)
    assert found.shape == (3, *images.shape)
    assert not found.requires_grad
    for network, own in zip(networks, found, strict=True):
        twin = copy.deepcopy(network).train(batchnorm == "train")
        expected = _naive(lambda x, twin=twin: twin.place(x, layer), images, others)
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["list", "loop", "vmap"])
def test_a_named_layer_is_what_it_returns(kind: str) -> None:
    networks, (images, _), (others, _) = _networks(), _batch(), _batch(seed=2)
    members: Any = networks if kind == "list" else _mixture(networks, batching=kind)
    found = distilled(members, images, others, "two", eps=EPS, step=STEP, steps=STEPS)
    for network, own in zip(networks, found, strict=True):
        twin, caught = copy.deepcopy(network), []
        twin.two.register_forward_hook(lambda _m, _i, output, caught=caught: caught.append(output.clone()))

        def features(x: Tensor, twin: nn.Module = twin, caught: list[Tensor] = caught) -> Tensor:
            twin(x)
            return caught.pop()

        torch.testing.assert_close(own, _naive(features, images, others), rtol=0, atol=1e-9)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_features_come_nearer_within_eps(layer: int) -> None:
    networks, (images, _), (others, _) = _networks(), _batch(), _batch(seed=2)
    found = distilled(networks, images, others, layer, batchnorm="eval")
    assert float((found - images).abs().max()) <= 0.07 + 1e-12
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    for network, own in zip(networks, found, strict=True):
        wanted, before, after = (network.eval().place(x, layer).flatten(1) for x in (others, images, own))
        assert bool(((after - wanted).square().sum(1) < (before - wanted).square().sum(1)).all())


@pytest.mark.parametrize("whole", [False, True], ids=["mixture", "list"])
def test_making_images_leaves_no_trace(whole: bool) -> None:
    networks, (images, labels) = _networks(), _batch()
    networks[1].three.eval()
    networks[0].head.bias.requires_grad_(False)
    networks[2].head.bias.grad = torch.ones(CLASSES).double()
    model = _mixture(_networks())
    members: Any = networks if whole else model

    def state() -> Any:
        if not whole:
            return state_of(model)
        return [
            (
                [module.training for module in network.modules()],
                [len(module._forward_hooks) for module in network.modules()],
                network.one.track_running_stats,
                [(p.requires_grad, p.grad is None, p.detach().sum().item()) for p in network.parameters()],
                [buffer.sum().item() for buffer in network.buffers()],
            )
            for network in networks
        ]

    before = state()
    for layers in ("", "two", "4"):
        DVERGELoss(layers=layers).prepare(members, images, labels)
    with pytest.raises(ValueError, match="from 1 to 4"):
        DVERGELoss(layers="5").prepare(members, images, labels)
    assert state() == before


def test_a_batchnorm_that_is_frozen_stays_so() -> None:
    networks, (images, _), (others, _) = _networks(2), _batch(), _batch(seed=2)
    networks[0].one.eval()
    found = distilled(networks, images, others, 3, eps=EPS, step=STEP, steps=STEPS)
    twin = copy.deepcopy(networks[0])
    torch.testing.assert_close(found[0], _naive(lambda x: twin.place(x, 3), images, others), rtol=0, atol=1e-9)
    twin.train()
    assert not torch.equal(found[0], _naive(lambda x: twin.place(x, 3), images, others))


def test_an_epoch_counts_layers_anew() -> None:
    networks: list[Any] = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten()) for _ in range(2)]
    images, _ = _batch()
    assert count_places(networks, images.float()) == [2, 2]
    for network in networks:
        network.append(nn.GELU())
    DVERGELoss().begin_epoch(networks, 1, 2, seed=0)
    assert count_places(networks, images.float()) == [3, 3]


def test_each_image_is_anothers_target(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, (images, labels), seen = _networks(2), _batch(6), []
    real = dverge._descend
    monkeypatch.setattr(dverge, "_descend", lambda *args: (seen.append(args[2]), real(*args))[1])
    for _ in range(20):
        DVERGELoss(steps=1).prepare(networks, images, labels)
    orders = [[int((images - own).abs().sum((1, 2, 3)).argmin()) for own in others] for others in seen]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert all(own != place for order in orders for place, own in enumerate(order))
    assert len({tuple(order) for order in orders}) > 10
    alone = DVERGELoss(steps=1).prepare(networks, images[:1], labels[:1])
    torch.testing.assert_close(alone, images[:1].expand(2, 1, 3, 9, 7))


def _expected_loss(networks: Sequence[nn.Module], made: Tensor, labels: Tensor, own: Sequence[Tensor] = ()) -> Tensor:
    """By one pass a member, as we do it."""
    total = torch.zeros((), dtype=torch.float64)
    for i, network in enumerate(networks):
        seen = [made[j] for j in range(len(networks)) if j != i] + ([own[i]] if len(own) else [])
        for logits in network(torch.cat(seen)).split(len(labels)):
            total = total - logits.log_softmax(-1)[range(len(labels)), labels].mean()
    return total


@pytest.mark.parametrize("adversarial", ["off", "shared", "own"])
@pytest.mark.parametrize("kind", ["list", "mixture"])
def test_a_step_is_the_naive_loop_s(kind: str, adversarial: str) -> None:
    networks, (images, labels) = _networks(), _batch()
    twins = copy.deepcopy(networks)
    members: Any = networks if kind == "list" else _mixture(networks)
    loss_fn = DVERGELoss(EPS, STEP, STEPS, layers=(2,))
    extra = {"off": None, "shared": _batch(seed=5)[0], "own": torch.stack([_batch(seed=i)[0] for i in (6, 7, 8)])}
    given = extra[adversarial]
    parameters = members.parameters() if kind == "mixture" else [p for n in networks for p in n.parameters()]
    torch.manual_seed(3)
    made = loss_fn.prepare(members, images, labels)
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(parameters, 0.1)
    if kind == "list":
        loss = loss_fn(members, images, labels, given)
    else:  # as a training does
        loss_fn.adversarial = given is not None
        prepared = loss_fn.prepare(members, images, labels)
        loss, (each,) = loss_fn.loss_and_terms(members, images if given is None else given, labels, prepared)
        torch.testing.assert_close(each * (6 if given is None else 9), loss)
    loss.backward()
    optimizer.step()

    naive = torch.optim.SGD([p for twin in twins for p in twin.parameters()], 0.1)
    own = [] if given is None else given if given.dim() == 5 else [given] * 3
    expected = _expected_loss(twins, made, labels, own)
    expected.backward()
    naive.step()
    torch.testing.assert_close(loss, expected)
    trained_ = networks if kind == "list" else members.unstack()
    for network, twin in zip(trained_, twins, strict=True):
        assert int(network.one.num_batches_tracked) == 2  # one before the test
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-8, atol=1e-10)


def test_probabilities_and_ignored_images() -> None:
    networks, (images, labels) = _networks(), _batch()
    loss_fn = DVERGELoss(steps=1, label_smoothing=0.1, layers=(1,))
    torch.manual_seed(0)
    hard = loss_fn(networks, images, labels)
    torch.manual_seed(0)
    soft = loss_fn(networks, images, F.one_hot(labels, CLASSES).double())
    torch.testing.assert_close(hard, soft)
    labels[1:] = -100
    torch.manual_seed(0)
    made = loss_fn.prepare(networks, images, labels)
    expected = torch.zeros(()).double()
    for i, network in enumerate(copy.deepcopy(networks)):
        logits = network(torch.cat([made[j] for j in range(3) if j != i]))
        expected += sum(F.cross_entropy(logits[k], labels[0], label_smoothing=0.1) for k in (0, 5))
    torch.manual_seed(0)
    torch.testing.assert_close(loss_fn(networks, images, labels), expected)


def test_layers_are_drawn_evenly_and_reproducibly(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, (images, labels), seen = _networks(2, widths=(5, 4)), _batch(2), []
    monkeypatch.setattr(dverge, "_descend", lambda _m, images, _o, places, *_: (seen.append(places), images)[1])
    loss_fn = DVERGELoss()
    state = random.getstate()
    for epoch in range(400):
        assert loss_fn.begin_epoch(networks, epoch, 400, seed=7) is False
        loss_fn.prepare(networks, images, labels)
    assert random.getstate() == state
    assert all(one == other for one, other in seen)
    counts = Counter(place for place, _ in seen)
    assert sorted(counts) == [1, 2, 3, 4]
    assert all(60 < count < 140 for count in counts.values())  # 100, and 4.6 standard deviations
    again, drawn = DVERGELoss(), seen.copy()
    for epoch in (399, 17, 17):
        again.begin_epoch(networks, epoch, 1000, seed=7)
        again.prepare(networks, images, labels)
    assert seen[-3:] == [drawn[399], drawn[17], drawn[17]]
    other = []
    for epoch in range(40):
        again.begin_epoch(networks, epoch, 400, seed=8)
        other.append(again.drawn)
    assert len(set(other)) == 40
    named = DVERGELoss(layers=["one", 3])
    for epoch in range(40):
        named.begin_epoch(networks, epoch, 40, seed=0)
        named.prepare(networks, images, labels)
    assert {place for place, _ in seen[-40:]} == {"one", 3}


def test_members_may_differ() -> None:
    """In a mixture that is a list, and with another number of layers."""
    shallow = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
    networks: list[nn.Module] = [*_networks(2, widths=(5, 4)), shallow.double()]
    model = ImmunityMoE.from_experts(networks, stage=["second", "second", "1"], image_size=(9, 7)).double().train()
    images, labels = _batch()
    assert count_places(model, images) == [4, 4, 2]
    loss_fn = DVERGELoss(steps=2)
    for drawn, places in ((0.1, (1, 1)), (0.6, (3, 2)), (0.99, (4, 2))):
        loss_fn.drawn = drawn
        torch.manual_seed(0)
        made = loss_fn.prepare(model, images, labels)
        torch.manual_seed(0)
        for i, place in ((0, places[0]), (2, places[1])):
            order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
            others = torch.empty_like(images)
            others[order] = images[order.roll(1)]
            alone = distilled([networks[i], copy.deepcopy(networks[i])], images, others, place, steps=2)
            torch.testing.assert_close(made[i], alone[0])


@pytest.mark.parametrize(("arch", "count"), [("resnet8", 8), ("resnet18", 18)])
def test_our_networks_have_the_authors_layers(arch: str, count: int) -> None:
    """Of depth ResNets one before each ReLU, and the logits."""
    model = ImmunityMoE(arch, 2)
    with torch.no_grad():
        assert count_places(model.eval(), torch.rand(1, 3, 16, 16)) == [count] * 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": 0}, "eps: expected a number above 0 and at most 1, got 0"),
        ({"eps": float("nan")}, "eps: expected"),
        ({"eps": "much"}, "eps: expected a number above 0 and at most 1, got 'much'"),
        ({"step": 2}, "step: expected"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"steps": 1.5}, "steps: expected a whole number"),
        ({"batchnorm": "off"}, "batchnorm: expected one of train, eval"),
        ({"layers": (0,)}, "layers: expected numbers from 1, got 0"),
        ({"layers": (1.5,)}, "layers: expected numbers and names"),
        ({"layers": "3++4"}, "layers: expected numbers and names"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        DVERGELoss(**settings)
    assert str(caught.value).startswith(words)


def test_members_and_images_are_checked() -> None:
    networks, (images, labels) = _networks(), _batch()
    loss_fn = DVERGELoss(steps=1)
    single: Any = immunity_fast.models.moe.SingleNetwork("resnet8")
    for members in (networks[:1], [], single, [networks[0]] * 2):
        for ask in (lambda m: loss_fn(m, images, labels), lambda m: loss_fn.begin_epoch(m, 0, 1, 0)):
            with pytest.raises(ValueError, match="members: expected"):
                ask(members)
    for wrong in (3, "networks", [networks[0], len]):
        with pytest.raises(TypeError, match="members: expected"):
            loss_fn(wrong, images, labels)
    with pytest.raises(ValueError, match="images: expected shape"):
        loss_fn(networks, images[0], labels)
    with pytest.raises(ValueError, match="images: expected at least one"):
        loss_fn(networks, images[:0], labels[:0])
    with pytest.raises(TypeError, match="images: expected a floating-point"):
        loss_fn(networks, (255 * images).byte(), labels)
    with pytest.raises(ValueError, match="targets: expected"):
        loss_fn(networks, images, labels[1:])
    with pytest.raises(ValueError, match="adversarial: expected"):
        loss_fn(networks, images, labels, images[1:])
    with pytest.raises(ValueError, match="prepared: expected"):
        loss_fn.loss_and_terms(_mixture(networks), images, labels)
    with pytest.raises(ValueError, match="others: expected"):
        distilled(networks, images, images[1:], 1)
    for ask in (lambda m: m.begin_epoch(networks, 0, 1, 0), lambda m: m(networks, images, labels)):
        with pytest.raises(ValueError, match="did you mean 'two'"):
            ask(DVERGELoss(layers="twoo"))


def test_of_data_parallel_the_network_inside_is_looked_at() -> None:
    networks, (images, labels) = _networks(), _batch()
    losses = []
    for members in (networks, [nn.DataParallel(network) for network in networks]):
        torch.manual_seed(0)
        losses.append(DVERGELoss(steps=1, layers="two")(members, images, labels))
    torch.testing.assert_close(*losses)


def test_a_text_names_it_with_its_settings() -> None:
    loss_fn = method_of("dverge:eps=8/255,steps=5,layers=3+body.one,batchnorm=eval", label_smoothing=0.1)
    assert isinstance(loss_fn, DVERGELoss)
    assert (loss_fn.eps, loss_fn.step, loss_fn.steps, loss_fn.batchnorm) == (8 / 255, 0.007, 5, "eval")
    assert loss_fn.layers == (3, "body.one")
    plain = method_of("dverge")
    assert isinstance(plain, DVERGELoss)
    assert (plain.eps, plain.step, plain.steps, plain.layers) == (0.07, 0.007, 10, ())


def test_what_a_training_image_costs() -> None:
    assert DVERGELoss(steps=9).passes(3, 0) == 3 * (2 + 5)
    assert DVERGELoss(steps=9).passes(3, 10) == 3 * (2 + 5 + 11)


def test_a_training_killed_in_an_epoch_goes_on(data: Path, tmp_path: Path) -> None:
    """To the same bits: the epoch's layer is drawn again, and the same."""
    method = {"ensemble": "dverge:steps=2", "adversarial": "pgd", "adversary": "each", "attack_steps": 1}
    arguments = options(data, arch="tests.own_networks:Plain", checkpoint_every=1, **method)
    state, run = trained([*arguments, "--out", str(tmp_path / "whole")])
    assert isinstance(state.method, DVERGELoss)
    assert all(record["loss"] > 0 for record in run.metrics())
    interrupted((TrainingState, "advance"), 8, [*arguments, "--out", str(tmp_path / "killed")])
    trained(["--resume", str(tmp_path / "killed"), "--trust-code"])
    assert saved(tmp_path / "killed") == saved(tmp_path / "whole")
