"""Features at a place of a pass: which places there are, and that a pass ends there."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from immunity_fast import ImmunityMoE
from immunity_fast.models.member_features import count_places, features, forget_places, members_of

IMAGES = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(0))


class Many(nn.Module):
    """Nonlinearities by every way to call one, and some that do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.prelu, self.leaky, self.gelu = nn.PReLU(), nn.LeakyReLU(0.1, inplace=True), nn.GELU()
        self.scale, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)
        self.seen: list[Tensor] = []

    def _see(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return x.sub(0.1) * 1.5

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        self.seen = []
        x = self._see(images) * torch.sigmoid(images)
        x = self._see(F.relu(input=x) - 0.2)
        x = self._see(self.prelu(x))
        x = self._see(self.leaky(x))
        x = self._see(self.gelu(self.scale(x)))
        x = self._see(torch.relu_(x.clone()))
        x = self._see(x.relu())
        x = self._see(F.relu6(x) + F.silu(x, inplace=True))
        return {"logits": self.head(torch.tanh(x).mean((2, 3)))}


def test_every_nonlinearity_is_a_place() -> None:
    networks = [Many(), Many()]
    assert count_places(networks, IMAGES) == [9, 9]
    for place in range(1, 9):
        (first, _) = features(networks, IMAGES, [place] * 2)
        assert first.shape == (3, 3, 6, 5)
        assert first.requires_grad == (place > 2)
    assert features(networks, IMAGES, [9, 9])[1].shape == (3, 2)
    for wrong in (10, 100):
        with pytest.raises(ValueError, match=f"layer: expected a number from 1 to 9, got {wrong}"):
            features(networks, IMAGES, [wrong] * 2)


def test_nothing_behind_a_place_runs() -> None:
    networks, ran = [Many(), Many()], []
    for network in networks:
        network.leaky.register_forward_hook(lambda *_: ran.append("leaky"))
        network.head.register_forward_hook(lambda *_: ran.append("head"))
    features(networks, IMAGES, [3, 3])
    features(networks, IMAGES, ["prelu", "prelu"])
    assert ran == []
    features(networks, IMAGES, [3, "leaky"])
    assert ran == ["leaky"]  # the second's; the first stops at what it does
    assert [len(module._forward_hooks) for network in networks for module in network.modules()].count(1) == 4


class Twice(nn.Module):
    """A layer that runs twice, returns more than a tensor, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.idle, self.text = nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Identity()
        self.lstm = nn.LSTM(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.lstm(self.both(self.both(images)).flatten(2).permute(2, 0, 1))[0]
        self.text("no tensor")
        return tokens.mean(0)


def test_named_layers_that_are_peculiar() -> None:
    networks = [Twice(), Twice()]
    first, second = features(networks, IMAGES, ["both", "lstm"])
    torch.testing.assert_close(first, networks[0].both(IMAGES))
    assert second.shape == (30, 3, 4)
    for name in ("idle", "text"):
        with pytest.raises(ValueError, match=f"layer: expected '{name}' to run in a pass and to return a tensor"):
            features(networks, IMAGES, [name] * 2)
    assert not any(module._forward_hooks for network in networks for module in network.modules())


def test_a_count_is_kept_until_it_is_forgotten() -> None:
    networks: list[Any] = [nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Flatten()) for _ in range(2)]
    assert count_places(networks, IMAGES) == [2, 2]
    networks[0][1] = nn.Sequential(nn.ReLU(), nn.ReLU())
    assert count_places(networks, IMAGES) == [2, 2]
    forget_places(networks)
    assert count_places(networks, IMAGES) == [3, 2]


def test_networks_inside_of_others() -> None:
    networks: list[nn.Module] = [Many(), Many()]
    compiled = [torch.compile(network, backend="eager") for network in networks]
    assert members_of(compiled) == networks
    model = ImmunityMoE("resnet8", 2)
    assert members_of(model) is model


@pytest.mark.parametrize("batching", ["loop", "vmap"])
@pytest.mark.parametrize("place", [2, 5, "layer2.0.bn1"])
def test_a_stack_has_the_features_of_its_experts(place: Any, batching: Any) -> None:
    """Each of its own images, or all of the same, normalised; with gradients of them alone."""
    model = ImmunityMoE("resnet8", 2, batching=batching).double().eval()
    experts = model.unstack()  # which normalise, too
    own = torch.stack([IMAGES, IMAGES.flip(0)]).double().requires_grad_()
    for seen in (own, own[0]):
        (found,) = features(model, seen, [place] * 2)
        expected = torch.stack(features(experts, seen, [place] * 2))
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(each.square().sum(), own)[0] for each in (found, expected)]
        torch.testing.assert_close(*gradients)


class Checkpointed(Many):
    """Whose activations are computed again."""

    def forward(self, images: Tensor) -> Any:
        return checkpoint(super().forward, images, use_reentrant=False)


def test_a_checkpointed_pass_may_end_early() -> None:
    one, other = Many(), Checkpointed()
    other.load_state_dict(one.state_dict())
    images = IMAGES.clone().requires_grad_()
    pair = features([one, other], images, [5, 5])
    gradients = [torch.autograd.grad(each.square().sum(), images)[0] for each in pair]
    torch.testing.assert_close(*gradients)


def test_another_thread_s_pass_is_not_ended() -> None:
    network, came, go = Many(), threading.Event(), threading.Event()
    network.prelu.register_forward_pre_hook(lambda *_: (came.set(), go.wait(10))[1] and None)
    made: list[Any] = []
    worker = threading.Thread(target=lambda: made.append(features([network, Many()], IMAGES, ["prelu", 1])))
    worker.start()
    assert came.wait(10)
    go.set()
    assert network(IMAGES)["logits"].shape == (3, 2)
    worker.join()
    assert made[0][0].shape == IMAGES.shape
