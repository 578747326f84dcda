"""`capture_activations`: the maps of every kind of layer, in the graph of their logits, and what is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from immunity_fast import FusedImmunityLoss, ImmunityMoE, capture_activations
from tests.captured import (
    LABELS,
    ChannelsLast,
    Plain,
    assert_gradients,
    expected_gradients,
    gradients_of,
    images,
    loss_fn,
    of_plain,
    of_vit,
    tokens_to_maps,
)
from tests.tensors import noise
from tests.transformers_of import ViT


def _networks(make: Callable[[], nn.Module], count: int = 2, *, training: bool = True) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make().double().train(training) for _ in range(count)]


def _both_ways(captured: Any, x: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Logits and activations by the module, and by its context."""
    yield captured(x)
    with captured as activations:
        logits = [network(x) for network in captured.networks]
    yield logits, activations


def _hooks(networks: list[nn.Module]) -> int:
    return sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks) for network in networks for part in network.modules()
    )


CASES: dict[str, tuple[Any, Any, Any, Any]] = {
    "channels first": (Plain, "layer", of_plain, lambda maps: maps),
    "channels last": (ChannelsLast, "layer", of_plain, lambda maps: maps.permute(0, 3, 1, 2)),
    "nested": (Plain, "layer.1", of_plain, lambda maps: maps),
    "in place behind": (lambda: Plain(inplace="relu"), "layer", of_plain, lambda maps: maps),
    "in place in training": (lambda: Plain(inplace="in training"), "layer", of_plain, lambda maps: maps),
}


@pytest.mark.parametrize("kind", CASES)
def test_gradients_are_those_of_plain_code(kind: str) -> None:
    make, layer, run, to_maps = CASES[kind]
    networks = _networks(make)
    expected = expected_gradients(copy.deepcopy(networks), images(), run, to_maps)
    for logits, activations in _both_ways(capture_activations(networks, layer), images()):
        assert [tuple(maps.shape) for maps in activations] == [(4, 4, 11, 11)] * 2
        assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)
        assert _hooks(networks) == 0


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("reshape", [None, "tokens"])
def test_tokens_are_maps_of_their_grid(prefix: int, reshape: Any) -> None:
    networks = _networks(lambda: ViT(prefix, "mean" if prefix == 0 else "class", width=6, depth=2, side=12))
    x = noise(4, 12)
    expected = expected_gradients(networks, x, of_vit(0), tokens_to_maps(prefix, 3, 3))
    with pytest.warns(UserWarning, match=r"attention behind 'blocks\.0' runs PyTorch's math kernel"):
        found = list(_both_ways(capture_activations(networks, "blocks.0", reshape=reshape), x))
    for logits, activations in found:
        assert [tuple(maps.shape) for maps in activations] == [(4, 6, 3, 3)] * 2
        assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)


def test_a_function_reshapes_as_pytorch_grad_cams_does() -> None:
    networks = _networks(lambda: ViT(1, width=6, depth=2, side=12))
    expected = expected_gradients(networks, noise(4, 12), of_vit(0), tokens_to_maps(1, 3, 3))
    captured = capture_activations(networks, "blocks.0", reshape=tokens_to_maps(1, 3, 3))
    for logits, activations in _both_ways(captured, noise(4, 12)):
        assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)
        plain = torch.stack([network(noise(4, 12)) for network in networks])
        torch.testing.assert_close(torch.stack(logits), plain, rtol=1e-12, atol=1e-12)


def test_a_function_that_averages_is_differentiated_by_the_same() -> None:
    networks = _networks(Plain)
    pool = nn.AvgPool2d(3)
    expected = expected_gradients(networks, images(), of_plain, pool)
    captured = capture_activations(networks, "layer", reshape=pool)
    logits, activations = captured(images())
    assert activations[0].shape == (4, 4, 3, 3)
    assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)


def test_different_networks_have_layers_and_layouts_of_their_own() -> None:
    torch.manual_seed(0)
    networks = [Plain(4).double(), ChannelsLast(3).double(), ViT(1, side=12, width=6, depth=2).double()]
    turns = [lambda maps: maps, lambda maps: maps.permute(0, 3, 1, 2), tokens_to_maps(1, 3, 3)]
    x = noise(4, 12)
    expected = expected_gradients(networks, x, [of_plain, of_plain, of_vit(0)], turns)
    captured = capture_activations(networks, ["layer", "layer", "blocks.0"], reshape=["NCHW", None, "tokens"])
    for logits, activations in _both_ways(captured, x):
        assert [tuple(maps.shape[1:]) for maps in activations] == [(4, 10, 10), (3, 10, 10), (6, 3, 3)]
        loss = loss_fn()(logits, activations, LABELS)
        assert_gradients(gradients_of(loss, networks), expected)


def test_the_default_layer_is_found_at_the_first_pass() -> None:
    networks = _networks(lambda: ViT(1)) + _networks(Plain, 1)
    captured = capture_activations(networks)
    assert captured.layers == [None] * 3
    _, activations = captured(noise(2, 40))
    assert captured.layers == ["blocks.1", "blocks.1", "last"]
    assert [tuple(maps.shape[1:]) for maps in activations] == [(8, 10, 10)] * 2 + [(4, 18, 18)]


def test_the_first_look_leaves_networks_as_they_are() -> None:
    networks = _networks(Plain)
    before = copy.deepcopy(networks)
    state = torch.get_rng_state()
    capture_activations(networks, "layer").eval()(images())
    for network, other in zip(networks, before, strict=True):
        torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


# Layers that run twice, return more than a tensor, or are hooked and checkpointed by others


class Twice(Plain):
    """A layer that runs on its own output; `of_call` is the plain pass whose map is that of one of the calls."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.tanh(self.last(torch.tanh(self.last(self.trunk(images))))))

    def head(self, maps: Tensor) -> Tensor:
        out: Tensor = self.fc(maps.mean((-2, -1)))
        return out


def _of_call(call: int) -> Any:
    def run(network: Twice, x: Tensor) -> tuple[Tensor, Tensor]:
        first = network.last(network.trunk(x))
        second = network.last(torch.tanh(first))
        return network.head(torch.tanh(second)), (first, second)[call]

    return run


def test_a_layer_that_runs_twice_is_refused_or_asked_for() -> None:
    networks = _networks(Twice)
    with pytest.raises(ValueError, match="layer: expected 'last' to run once in a forward pass, got 2 times"):
        capture_activations(networks, "last")(images())
    for call in range(2):
        expected = expected_gradients(networks, images(), _of_call(call))
        for logits, activations in _both_ways(capture_activations(networks, "last", call=call), images()):
            assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)
    with pytest.raises(
        ValueError, match=r"layer: expected 'last' to run more than 2 times in a pass .* 0, got 2 times"
    ):
        capture_activations(networks, "last", call=2)(images())


def test_one_that_runs_twice_later_is_refused() -> None:
    networks = _networks(Plain)
    captured = capture_activations(networks, "layer")
    captured(images())
    networks[1].trunk = lambda x: networks[1].layer(networks[1].layer(torch.tanh(networks[1].conv(x))))  # type: ignore[assignment,operator]
    with pytest.raises(
        ValueError, match="layer: expected 'layer' to run once in a pass of number 1, got 2 times; call=1"
    ):
        captured(images())


class Tuples(Plain):
    """A layer that returns its map beside other things."""

    kind: Any = tuple

    def __init__(self) -> None:
        super().__init__()
        self.layer = Beside(self.layer, self.kind)  # type: ignore[assignment]

    def trunk(self, images: Tensor) -> Tensor:
        found: Any = self.layer(torch.tanh(self.conv(images)))
        out: Tensor = found["maps"] if isinstance(found, dict) else found[1]
        return out


class Beside(nn.Module):
    def __init__(self, inner: nn.Module, kind: Any) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: Tensor) -> Any:
        maps = self.inner(x)
        return {"size": 3, "maps": maps} if self.kind is dict else self.kind((3, maps, None))


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_a_map_in_a_tuple_or_dictionary_is_found(kind: Any) -> None:
    networks = _networks(type("Kind", (Tuples,), {"kind": kind}))
    expected = expected_gradients(networks, images(), of_plain)
    for logits, activations in _both_ways(capture_activations(networks, "layer"), images()):
        assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)


def test_what_another_hook_makes_of_the_output_is_what_is_seen() -> None:
    networks = _networks(Plain)
    for network in networks:
        network.get_submodule("layer").register_forward_hook(lambda _m, _i, output: 2 * output)
    expected = expected_gradients(networks, images(), of_plain)
    for logits, activations in _both_ways(capture_activations(networks, "layer"), images()):
        assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)
    assert all(len(network.get_submodule("layer")._forward_hooks) == 1 for network in networks)


class Checkpointed(Plain):
    """The layer, or what is behind it, runs again in the backward pass."""

    def __init__(self, where: str, reentrant: bool = False) -> None:
        super().__init__()
        self.where, self.reentrant = where, reentrant

    def forward(self, images: Tensor) -> Tensor:
        if self.where == "head":
            out: Tensor = checkpoint(self.head, self.trunk(images), use_reentrant=self.reentrant)
            return out
        maps = checkpoint(self.layer, torch.tanh(self.conv(images)), use_reentrant=self.reentrant)
        assert isinstance(maps, Tensor)
        return self.head(maps)


@pytest.mark.parametrize("where", ["layer", "head"])
def test_checkpointed_layers_are_differentiated_as_others(where: str) -> None:
    networks = _networks(lambda: Checkpointed(where), training=False)
    expected = expected_gradients(networks, images(), of_plain)
    for logits, activations in _both_ways(capture_activations(networks, "layer"), images()):
        assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)


def test_a_layer_in_a_reentrant_checkpoint_is_named() -> None:
    captured = capture_activations(_networks(lambda: Checkpointed("layer", reentrant=True)), "layer")
    with pytest.raises(ValueError, match=r"layer: expected 'layer' to run where gradients are enabled.*use_reentrant"):
        captured(images())


# What the maps belong to


def test_each_map_is_in_the_graph_of_its_own_logits_alone() -> None:
    logits, activations = capture_activations(_networks(Plain, 3), "layer")(images())
    for index, scores in enumerate(logits):
        for other, maps in enumerate(activations):
            (slope,) = torch.autograd.grad(scores.sum(), maps, allow_unused=True, retain_graph=True)
            assert (slope is not None) == (index == other)


def test_a_shuffled_list_is_refused() -> None:
    logits, activations = capture_activations(_networks(Plain, 3), "layer")(images())
    with pytest.raises(ValueError, match=r"activations: .* at its place, got logits of number 0 .* of number 2"):
        loss_fn()(logits, [activations[1], activations[2], activations[0]], LABELS)
    with pytest.raises(ValueError, match="activations: expected each expert's own"):
        loss_fn()(logits, [activations[0]] * 3, LABELS)


def test_two_captures_of_the_same_networks_do_not_meet() -> None:
    networks = _networks(Plain)
    one, other = capture_activations(networks, "layer"), capture_activations(networks, "conv")
    with one as of_one, other as of_other:
        logits = [network(images()) for network in networks]
    assert [tuple(maps.shape[2:]) for maps in of_one] == [(11, 11)] * 2
    assert [tuple(maps.shape[2:]) for maps in of_other] == [(13, 13)] * 2
    assert all(len(found) == 2 for found in (one(images())[1], other(images())[1]))
    expected = expected_gradients(networks, images(), of_plain)
    assert_gradients(gradients_of(loss_fn()(logits, of_one, LABELS), networks), expected)
    assert _hooks(networks) == 0


def test_networks_that_share_their_layer_are_called_one_by_one() -> None:
    networks = _networks(Plain)
    networks[1].layer = networks[0].layer
    captured = capture_activations(networks, "layer")
    logits, activations = captured(images())
    assert activations[0] is not activations[1]
    loss_fn()(logits, activations, LABELS).backward()
    with (
        pytest.raises(ValueError, match="networks: expected a layer of its own in each, got 'layer' of number 1"),
        captured,
    ):
        pass
    assert _hooks(networks) == 0


def test_an_exception_in_a_pass_leaves_nothing_behind() -> None:
    networks = _networks(Plain)
    captured = capture_activations(networks, "layer")
    captured(images())
    networks[1].head = lambda maps: 1 / 0  # type: ignore[assignment]
    with pytest.raises(ZeroDivisionError):
        captured(images())
    with pytest.raises(ZeroDivisionError), captured:
        networks[1](images())
    assert _hooks(networks) == 0
    with captured as activations:
        for network in networks:
            try:
                network(images())
            except ZeroDivisionError:
                network.head = Plain.head.__get__(network)
                network(images())
    assert [tuple(maps.shape) for maps in activations] == [(4, 4, 11, 11)] * 2
    assert _hooks(networks) == 0


def test_a_block_in_which_a_network_did_not_run_is_named() -> None:
    networks = _networks(Plain)
    with (
        pytest.raises(ValueError, match="networks: expected number 1 to run inside of the block"),
        capture_activations(networks, "layer"),
    ):
        networks[0](images())
    assert _hooks(networks) == 0


def test_the_last_of_several_passes_in_a_block_counts() -> None:
    networks = _networks(Plain)
    expected = loss_fn()(*capture_activations(networks, "layer")(images()), LABELS)
    with capture_activations(networks, "layer") as activations:
        for x in (images().flip(0), images()):
            logits = [network(x) for network in networks]
            loss_fn()(logits, activations, LABELS)
        torch.testing.assert_close(loss_fn()(logits, activations, LABELS), expected)


# Where there is no graph


def test_a_frozen_trunk_is_no_obstacle() -> None:
    """Grad-CAM differentiates what follows on the maps alone."""
    networks = _networks(Plain, training=False)
    twins = copy.deepcopy(networks)
    for network in networks:
        network.get_submodule("conv").requires_grad_(False)
        network.get_submodule("layer").requires_grad_(False)

    def run(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = network.trunk(x).detach().requires_grad_()
        return network.head(maps), maps

    expected = expected_gradients(networks, images(), run)
    for logits, activations in _both_ways(capture_activations(networks, "layer"), images()):
        assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)
    for network, twin in zip(networks, twins, strict=True):
        torch.testing.assert_close(network(images()), twin(images()), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_passes_without_a_graph_are_named_by_the_loss(mode: str) -> None:
    captured = capture_activations(_networks(Plain), "layer")
    with getattr(torch, mode)():
        logits, activations = captured(images())
        with pytest.raises(ValueError, match=rf"logits: expected activations .*, got logits of torch\.{mode}"):
            loss_fn()(logits, activations, LABELS)
    assert logits[0].shape == (4, 4)


def test_hooked_layers_behind_frozen_ones_are_told_what_to_do() -> None:
    networks = _networks(Plain)
    for network in networks:
        network.get_submodule("conv").requires_grad_(False)
        network.get_submodule("layer").requires_grad_(False)
    maps = [network.trunk(images()) for network in networks]  # type: ignore[operator]
    logits = [network.head(part) for network, part in zip(networks, maps, strict=True)]  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"activations: .* require no gradient; .*images\.requires_grad_\(\)"):
        loss_fn()(logits, maps, LABELS)


# Attention


@pytest.mark.parametrize("kind", ["functional", "multihead"])
def test_attention_behind_the_layer_is_differentiated_twice(kind: str) -> None:
    class Multihead(ViT):
        def __init__(self) -> None:
            super().__init__(1, side=12, width=6, depth=1)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, images: Tensor) -> Tensor:
            x = self.blocks[0](self.patches(images).flatten(2).transpose(1, 2))
            out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))
            return out

    networks = _networks(Multihead if kind == "multihead" else lambda: ViT(1, side=12, width=6, depth=2))
    captured = capture_activations(networks, "blocks.0")
    with pytest.warns(UserWarning, match="math kernel"):
        logits, activations = captured(noise(4, 12))
    found = gradients_of(loss_fn()(logits, activations, LABELS), networks)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = gradients_of(loss_fn()(*captured(noise(4, 12)), LABELS), networks)
    assert_gradients(found, expected)


def test_constant_weights_keep_attentions_fast_kernels(recwarn: Any) -> None:
    networks = _networks(lambda: ViT(1, side=12, width=6, depth=2))
    captured = capture_activations(networks, "blocks.0", detach_weights=True)
    logits, activations = captured(noise(4, 12))
    assert not [warning for warning in recwarn if "attention" in str(warning.message)]
    with pytest.raises(ValueError, match=r"differentiated twice, got .* \(ScaledDotProduct.*detach_weights=True"):
        loss_fn()(logits, activations, LABELS)
    loss = FusedImmunityLoss(0.5, 1.3, 0.02, size=(11, 9), detach_weights=True)(logits, activations, LABELS)
    assert any(gradient.any() for gradient in gradients_of(loss, networks))


def test_heatmaps_of_a_mixture_need_one_derivative_alone(recwarn: Any) -> None:
    networks = _networks(lambda: ViT(1, side=12, width=6, depth=2))
    model = ImmunityMoE.from_experts(networks, stage="blocks.0", image_size=12).double()
    x = noise(4, 12)
    assert model.heatmaps(x).shape == (2, 4, 12, 12)
    logits, activations, gate = model.expert_outputs(x, detach_weights=True)
    with pytest.raises(ValueError, match="differentiated twice"):
        loss_fn()(logits, activations, LABELS, gate)
    assert not [warning for warning in recwarn if "attention" in str(warning.message)]
    with pytest.warns(UserWarning, match=r"attention behind 'blocks\.0' runs PyTorch's math kernel"):
        logits, activations, gate = model.expert_outputs(x)
    loss_fn()(logits, activations, LABELS, gate).backward()


# What networks return


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits, self.loss = logits, None


class Returning(Plain):
    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, images: Tensor) -> Any:
        logits = super().forward(images)
        return {
            "object": Output(logits),
            "dictionary": {"loss": None, "logits": logits},
            "tuple": (logits, images),
            "nothing": None,
            "map": logits[..., None],
            "other": {"scores": logits},
        }[self.kind]


@pytest.mark.parametrize("kind", ["object", "dictionary", "tuple"])
def test_logits_are_taken_out_of_what_a_network_returns(kind: str) -> None:
    networks = _networks(lambda: Returning(kind))
    expected = expected_gradients(networks, images(), of_plain)
    logits, activations = capture_activations(networks, "layer")(images())
    assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)


@pytest.mark.parametrize(
    ("kind", "got"),
    [("nothing", "NoneType"), ("map", r"a tensor \(4, 4, 1\)"), ("other", "dict of scores")],
)
def test_a_network_without_logits_is_named(kind: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"networks: expected logits \(4, K\) of number 0, got {got}$"):
        capture_activations(_networks(lambda: Returning(kind)), "layer")(images())


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("ab", "layer"), TypeError, "networks: expected a list of modules, got str"),
        (([1], "layer"), TypeError, "networks: expected modules, got int as number 0"),
        (([], "layer"), ValueError, "networks: expected at least one module, got none"),
        (
            ([Plain()], "layr"),
            ValueError,
            "layer: expected the name of a submodule of number 0, got 'layr'; did you mean",
        ),
        (([Plain()], ["layer", "fc"]), ValueError, "layer: expected one for all or 1, one a network, got 2"),
        (([Plain()], 3), TypeError, "layer: expected one for all or 1, one a network, got int"),
        (([Plain()], [nn.Conv2d(3, 4, 3)]), TypeError, "layer: expected the name of a submodule .*, got Conv2d$"),
        (([Plain()], nn.ReLU()), TypeError, "layer: expected the name of a submodule of number 0, got ReLU$"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        capture_activations(*arguments)


def test_wrong_options_are_named() -> None:
    network = Plain()
    with pytest.raises(ValueError, match="networks: expected each another one, got number 1 that is number 0"):
        capture_activations([network, network], "layer")
    with pytest.raises(ValueError, match="reshape: expected one of NCHW, NHWC, tokens, got 'NCWH'"):
        capture_activations([network], "layer", reshape="NCWH")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="call: expected a number from 0 or None, got -1"):
        capture_activations([network], "layer", call=-1)


@pytest.mark.parametrize(
    ("layer", "reshape", "text"),
    [
        ("fc", None, r"layer: expected a map .* of 'fc', got a tensor \(2, 4\)"),
        ("layer", "tokens", r"layer: expected tokens \(B, T, C\) of 'layer', .* got a tensor \(2, 4, 11, 11\)"),
        ("layer", lambda maps: maps.sum(1), r"reshape: expected maps \(B, C, h, w\) .* got a tensor \(2, 11, 11\)"),
    ],
)
def test_a_layer_that_returns_something_else_is_named(layer: str, reshape: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        capture_activations(_networks(Plain), layer, reshape=reshape)(images())


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.rand(3, 13, 13), ValueError, r"images: expected shape \(B, C, H, W\), got \(3, 13, 13\)"),
        (torch.zeros(2, 3, 13, 13, dtype=torch.uint8), TypeError, r"images: .*torch\.uint8"),
        (torch.rand(2, 3, 13, 13).numpy(), TypeError, "images: .*got numpy.ndarray; torch.as_tensor makes one"),
    ],
)
def test_wrong_images_are_named(x: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        capture_activations(_networks(Plain), "layer")(x)


def test_a_change_in_place_that_was_not_seen_is_refused() -> None:
    networks = _networks(Plain)
    captured = capture_activations(networks, "layer")
    captured(images())
    networks[0].inplace = "relu"
    with pytest.raises(ValueError, match="layer: expected the output of 'layer' to stay as it is"):
        captured(images())
