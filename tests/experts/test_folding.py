"""A BatchNorm folded in passing is the two layers, with all derivatives, and nobody else can tell."""

from __future__ import annotations

import copy
import io
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.modules import module as of_all_modules
from torch.overrides import TorchFunctionMode

from immunity_fast.channelwise import ExpertsAsChannels
from immunity_fast.experts import create, folding
from immunity_fast.experts.folding import Layers, normalised
from immunity_fast.forward_mode import ExactTangents
from tests.oracle import assert_matches
from tests.tensors import normal

NEVER = 2**62


@pytest.fixture(autouse=True)
def _folding_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "LEAST_SPARED", -NEVER)


class Calls(TorchFunctionMode):
    """How often each function is called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def stirred(network: nn.Module, seed: int = 3) -> Any:
    """In float64 and evaluation mode, with statistics, weights and biases that are not the first ones."""
    network.double().eval()
    for index, (name, tensor) in enumerate(network.state_dict().items()):
        if tensor.is_floating_point():
            values = normal(*tensor.shape, seed=seed + index)
            tensor.copy_(values.abs() + 0.3 if name.endswith("running_var") else values / 2)
    return network


def pair(bias: bool = True, affine: bool = True, **options: Any) -> Any:
    return stirred(Layers(nn.Conv2d(4, 6, 3, bias=bias, **options), nn.BatchNorm2d(6, eps=1e-2, affine=affine)))


def apart(layers: Any, x: Tensor, relu: bool = False) -> Tensor:
    """The equation, one layer after another."""
    convolution, normalisation = layers[0], layers[1]
    shape = (1, -1, 1, 1)
    made = convolution(x) - normalisation.running_mean.view(shape)
    made = made / (normalisation.running_var.view(shape) + normalisation.eps).sqrt()
    if normalisation.affine:
        made = made * normalisation.weight.view(shape) + normalisation.bias.view(shape)
    return made * (made > 0) if relu else made


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"affine": False, "stride": (2, 1)},
        {"bias": False, "affine": False, "padding": "same"},
        {"groups": 2, "dilation": (1, 2), "padding": (2, 0)},
    ],
)
def test_values_and_two_derivatives_are_the_layers(options: dict[str, Any], relu: bool) -> None:
    layers = pair(**options)
    x = normal(3, 4, 7, 9).requires_grad_()
    leaves = [x, *layers.parameters()]
    results = []
    for run in (lambda: normalised(layers[0], layers[1], x, relu=relu), lambda: apart(layers, x, relu)):
        with Calls() as calls:
            maps = run()
        assert calls.counts[F.batch_norm] == 0
        first = torch.autograd.grad(maps, leaves, normal(*maps.shape, seed=1) + maps**2, create_graph=True)
        scalar = sum((g * normal(*g.shape, seed=2 + i)).sum() for i, g in enumerate(first))
        assert isinstance(scalar, Tensor)
        second = torch.autograd.grad(scalar, leaves)
        results.append([maps, *first, *second])
    for folded, expected in zip(*results, strict=True):
        assert_matches(folded, expected)


@pytest.mark.parametrize("relu", [False, True])
def test_tangents_and_their_gradients_are_the_layers(relu: bool) -> None:
    layers = pair()
    x, tangent = normal(2, 4, 6, 5).requires_grad_(), normal(2, 4, 6, 5, seed=1)
    leaves = [x, *layers.parameters()]
    with ExactTangents():
        maps, along = jvp(lambda y: normalised(layers[0], layers[1], y, relu=relu), (x,), (tangent,))
    expected, expected_along = jvp(lambda y: apart(layers, y, relu), (x,), (tangent,))
    assert_matches(maps, expected)
    assert_matches(along, expected_along)
    for one, other in zip(
        torch.autograd.grad((along**2).sum(), leaves, allow_unused=True, materialize_grads=True),
        torch.autograd.grad((expected_along**2).sum(), leaves, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert_matches(one, other)


def test_what_is_added_keeps_its_type_its_derivatives_and_itself() -> None:
    layers, x, plus = pair(), normal(2, 4, 6, 5), normal(2, 6, 4, 3, seed=1)
    kept = plus.clone().requires_grad_()
    found = normalised(layers[0], layers[1], x, plus=kept, relu=True)
    expected = apart(layers, x) + plus
    assert_matches(found, expected.relu())
    assert torch.equal(kept, plus)
    weight = normal(*found.shape, seed=2)
    assert torch.equal(torch.autograd.grad((found * weight).sum(), kept)[0], weight * (expected > 0))
    assert_matches(vmap(lambda p: normalised(layers[0], layers[1], x, plus=p))(plus[None]), expected[None])
    layers.float()
    with torch.no_grad():
        assert normalised(layers[0], layers[1], x.float(), plus=plus).dtype == torch.float64


@pytest.mark.parametrize("shared", [True, False])
def test_stacked_experts_under_vmap_are_each_alone(shared: bool) -> None:
    experts = [stirred(Layers(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), seed) for seed in (5, 50, 500)]
    stack = {name: torch.stack([e.state_dict()[name] for e in experts]) for name in experts[0].state_dict()}
    learned = [name for name, _ in experts[0].named_parameters()]
    for name in learned:
        stack[name].requires_grad_()
    x = normal(2, 4, 6, 5) if shared else normal(3, 2, 4, 6, 5)
    x.requires_grad_()

    def run(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        with ExpertsAsChannels():
            return functional_call(experts[0], tensors, (x,))  # type: ignore[no-any-return]

    with Calls() as calls:
        maps = vmap(run, in_dims=(0, None if shared else 0))(stack, x)
    assert calls.counts[F.batch_norm] == 0
    alone = [apart(e, y, relu=True) for e, y in zip(experts, [x] * 3 if shared else x.unbind(), strict=True)]
    assert_matches(maps, torch.stack(alone))
    weight = normal(*maps.shape, seed=4)
    found = torch.autograd.grad((maps * weight).sum(), [x, *(stack[name] for name in learned)])
    leaves = [x, *(dict(e.named_parameters())[name] for name in learned for e in experts)]
    expected = torch.autograd.grad((torch.stack(alone) * weight).sum(), leaves)
    assert_matches(found[0], expected[0])
    for index, gradient in enumerate(found[1:]):
        assert_matches(gradient, torch.stack(expected[1 + 3 * index : 4 + 3 * index]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "converted"])
def test_in_half_precision_it_rounds_as_little(dtype: torch.dtype, how: str) -> None:
    layers = pair().float()
    x = normal(3, 4, 7, 9).float()
    if how == "converted":
        layers[0].to(dtype)  # of a model in half precision the statistics are often left as they are
        x = x.to(dtype)
    expected = apart(copy.deepcopy(layers).double(), x.double())
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        folded = layers(x)
        plain = layers[1](layers[0](x))
    assert folded.dtype == plain.dtype == dtype
    assert (folded - expected).norm() <= 1.2 * (plain - expected).norm()
    assert (folded - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda layer: layer.register_forward_hook(lambda _layer, _inputs, output: 2 * output),
    "forward_pre": lambda layer: layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0] + 1,)),
    "backward": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "backward_pre": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
}
FOR_ALL: dict[str, Callable[[], Any]] = {
    "forward": lambda: of_all_modules.register_module_forward_hook(lambda *_: None),
    "forward_pre": lambda: of_all_modules.register_module_forward_pre_hook(lambda *_: None),
    "backward": lambda: of_all_modules.register_module_full_backward_hook(lambda *_: None),
    "backward_pre": lambda: of_all_modules.register_module_full_backward_pre_hook(lambda *_: None),
}


def normalisations(network: nn.Module, x: Tensor) -> int:
    """How many BatchNorm run as such in a pass."""
    with Calls() as calls:
        network(x)
    return calls.counts[F.batch_norm]


@pytest.mark.parametrize("kind", HOOKS)
def test_layers_with_hooks_are_called(kind: str) -> None:
    x = normal(2, 4, 6, 5).requires_grad_()
    for place in (0, 1):
        layers = pair()
        assert normalisations(layers, x) == 0
        hook = HOOKS[kind](layers[place])
        assert normalisations(layers, x) == 1
        assert_matches(layers(x), layers[1](layers[0](x)))
        hook.remove()
        hook = FOR_ALL[kind]()
        try:
            assert normalisations(layers, x) == 1
        finally:
            hook.remove()
        assert normalisations(layers, x) == 0


def test_a_relu_that_is_watched_sees_what_was_before() -> None:
    layers = stirred(Layers(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)))
    x = normal(2, 4, 8, 8)
    before: list[Tensor] = []
    layers[2].register_forward_pre_hook(lambda _layer, inputs: before.append(inputs[0]))
    assert_matches(layers(x), F.max_pool2d(apart(layers, x, relu=True), 2))
    assert_matches(before[0], apart(layers, x))


def _with_a_forward_of_its_own(layers: Any) -> None:
    own = layers[0].forward
    layers[0].forward = lambda x: 2 * own(x)


def _parametrised(layers: Any) -> None:
    nn.utils.parametrizations.weight_norm(layers[0])


def _without_statistics(layers: Any) -> None:
    layers[1] = stirred(nn.BatchNorm2d(6, track_running_stats=False))


def _reflecting(layers: Any) -> None:
    layers[0] = stirred(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"))


def _in_training(layers: Any) -> None:
    layers[1].train()


@pytest.mark.parametrize(
    "change", [_with_a_forward_of_its_own, _parametrised, _without_statistics, _reflecting, _in_training]
)
def test_other_layers_are_called(change: Callable[[Any], None]) -> None:
    layers = pair()
    change(layers)
    twin = copy.deepcopy(layers)
    x = normal(2, 4, 6, 5)
    with Calls() as calls:
        found = layers(x)
    assert calls.counts[F.batch_norm] == 1
    if change is _with_a_forward_of_its_own:
        twin = layers
    assert torch.equal(found, twin[1](twin[0](x)))
    assert torch.equal(layers[1].state_dict().get("running_mean", x), twin[1].state_dict().get("running_mean", x))


def test_only_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = stirred(Layers(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6)))
    maps, weight = 2 * 6 * 4 * 3, 6 * 4 * 9
    for least, count in ((maps - weight, 0), (maps - weight + 1, 1)):
        monkeypatch.setattr(folding, "LEAST_SPARED", least)
        assert normalisations(layers, normal(2, 4, 8, 6)) == count
    with pytest.raises(ValueError, match="expected 4D input"):
        layers(normal(4, 8, 6))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_compilers_and_recorders_get_the_layers() -> None:
    layers, x = pair(), normal(2, 4, 6, 5)
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    for found in (torch.compile(layers, backend=keep, fullgraph=True)(x), fx.symbolic_trace(layers)(x)):
        assert_matches(found, apart(layers, x))
    assert any("batch_norm" in str(node.target) for node in graphs[0].graph.nodes)
    assert [node.target for node in fx.symbolic_trace(layers).graph.nodes if node.op == "call_module"] == ["0", "1"]
    assert "batch_norm" in str(torch.jit.trace(layers, x).inlined_graph)  # type: ignore[no-untyped-call]
    assert "batch_norm" in str(torch.export.export(layers, (x,)).graph)


@pytest.mark.parametrize(
    ("arch", "left", "side"), [("resnet8", 0, 12), ("googlenet", 0, 9), ("densenet121", 62, 17), ("advrush", 8, 8)]
)
def test_networks_answer_as_their_layers(arch: str, left: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network = stirred(create(arch, 4))
    x = normal(2, 3, side, side + 1).requires_grad_()
    counts, results = [], []
    for least in (-NEVER, NEVER):
        monkeypatch.setattr(folding, "LEAST_SPARED", least)
        counts.append(normalisations(network, x))
        logits = network(x)
        results.append((logits, *torch.autograd.grad(logits[:, 1].sum(), x)))
    assert counts[0] == left < counts[1]
    for folded, expected in zip(*results, strict=True):
        assert_matches(folded, expected, tolerance=1e-9)


def test_a_network_from_before_is_taken_over() -> None:
    """Names in a state dict are what they were, and so are networks that were pickled whole."""
    network = stirred(create("resnet8", 4))
    assert [name for name in network.state_dict() if name.startswith("stem")] == [
        "stem.0.weight",
        *(f"stem.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    ]
    old = copy.deepcopy(network)
    old.stem = nn.Sequential(*old.stem)
    file = io.BytesIO()
    torch.save(old, file)
    file.seek(0)
    x = normal(1, 3, 9, 8)
    assert_matches(torch.load(file, weights_only=False)(x), network(x))
