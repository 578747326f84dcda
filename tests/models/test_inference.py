"""`ImmunityMoE.for_inference`: the model's answers from ordinary networks, BatchNorm folded where that is right."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from immunity_fast import ImmunityMoE
from immunity_fast.experts import packed
from immunity_fast.experts.packed import PackedConv2d
from immunity_fast.models.inference import InferenceMixture, folded
from immunity_fast.models.moe import SingleNetwork
from tests import grids
from tests.adversarial_cases import small_mixture
from tests.oracle import assert_matches

NORMS = nn.modules.batchnorm._NormBase


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """With statistics, weights and biases of BatchNorm that are not the first ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, NORMS):
                for tensor in (layer.running_var, layer.weight):
                    if tensor is not None:
                        tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
                for tensor in (layer.running_mean, layer.bias):
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):  # a gate that weighs, and experts that differ
                layer.weight.mul_(3)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(layer, _BatchNorm) for layer in model.modules())


def images(count: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize(("arch", "gate"), grids.every(2, ["resnet8,resnet18", "resnet8"], ["mean", "off"]))
def test_it_answers_as_the_model(arch: str, gate: Literal["mean", "off"]) -> None:
    torch.manual_seed(0)
    model = ImmunityMoE(arch, 3, 5, switch="call")
    stirred(model).double().train()
    plain = model.for_inference(gate)
    assert model.training
    assert not plain.train().training
    model.eval()
    x = images()
    with torch.no_grad(), model.gate.switched(gate):
        expected = model(x)
    assert_matches(plain(x), expected)
    other = "off" if gate == "mean" else "mean"
    with torch.no_grad(), model.gate.switched(other):
        assert not torch.allclose(model(x), expected, rtol=1e-3)
    assert norms(plain) == 0


def test_in_float32_its_convolutions_are_packed() -> None:
    model = ImmunityMoE("resnet8,densenet121", 2, 5, image_size=16, stage="stem")
    stirred(model).eval()
    plain = model.for_inference()
    kinds = Counter(type(layer) for layer in plain.modules() if isinstance(layer, nn.Conv2d))
    assert kinds == ({PackedConv2d: 129} if packed._is_there() else {nn.Conv2d: 129})
    x = images(2, (16, 16))
    answers = [plain(x.float()), plain(x[:1].float())]
    state = plain.state_dict()
    model.double()
    with torch.no_grad(), model.gate.switched("mean"):
        expected = model(x)
    for answer in answers:
        assert_matches(answer, expected[: len(answer)], tolerance=1e-4)
    plain.double()
    assert_matches(plain(x), expected, tolerance=1e-4)  # by weights that were rounded once
    assert list(plain.state_dict()) == list(state)


def test_a_single_network_has_no_gate() -> None:
    model = SingleNetwork("resnet8", 4, image_size=(20, 24), stage="layer1")
    stirred(model).double().eval()
    x = images(size=(20, 24))
    for gate in ("mean", "off"):
        plain = model.for_inference(gate)  # type: ignore[arg-type]
        assert plain.gate is None
        assert_matches(plain(x), model(x).detach())


@pytest.mark.parametrize(("arch", "left"), [("densenet121", 62), ("googlenet", 0)])
def test_of_larger_networks_what_can_be_folded_is(arch: str, left: int) -> None:
    """In a DenseNet half of the normalisation stands before its convolution: what it reads is read by others, too."""
    model = SingleNetwork(arch, 4, image_size=16, stage=("block1" if arch == "densenet121" else None) or "stem")
    stirred(model).double().eval()
    plain = model.for_inference()
    assert norms(plain) == left < norms(model)
    x = images(2, (16, 16))
    assert_matches(plain(x), model(x).detach())


@pytest.mark.parametrize("switch", ["call", "sample", "worst", None])
def test_a_gate_that_draws_is_refused(switch: Any) -> None:
    with pytest.raises(ValueError, match=f"gate: expected 'mean' or 'off', got {switch!r}; no fixed graph draws"):
        ImmunityMoE("resnet8", 2).for_inference(switch)


def test_it_shares_nothing_and_leaves_the_model_alone() -> None:
    model = ImmunityMoE("resnet8", 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    plain = model.for_inference("off")
    assert torch.equal(state, torch.get_rng_state())
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    with torch.no_grad():
        for tensor in plain.state_dict().values():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_images_have_gradients_and_halves_are_close() -> None:
    model = ImmunityMoE("resnet8", 2)
    stirred(model).eval()
    model.gate.switch = "mean"
    x = images().float().requires_grad_()
    (one,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    (other,) = torch.autograd.grad(model.for_inference()(x)[:, 1].sum(), x)
    assert_matches(other, one, tolerance=1e-4)
    half = model.for_inference().bfloat16()(x.bfloat16())
    assert half.dtype == torch.float32
    assert (half - model(x)).abs().max() < 0.2


def test_it_compiles_to_one_graph() -> None:
    model = small_mixture(2).eval()
    plain = model.for_inference("off")
    torch._dynamo.reset()
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    for count in (2, 5):
        x = images(count, (12, 13))
        assert_matches(compiled(x), plain(x))


def test_no_gate_of_the_users_is_forgotten() -> None:
    networks = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3)) for _ in range(2)]
    model = ImmunityMoE.from_experts(networks, stage="1", image_size=16)
    model.double().eval()
    x = images(size=(16, 16))
    with model.gate.switched("off"):
        assert_matches(model.for_inference("off")(x), model(x).detach())
    assert isinstance(model.for_inference().normalize, nn.Identity)


class Block(nn.Module):
    """A convolution and its normalisation, between which something else may look."""

    def __init__(self, between: Callable[..., Any] | None = None, *, twice: bool = False) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.between, self.twice = between, twice

    def forward(self, x: Tensor) -> Any:
        made = self.conv(x)
        if made.shape[-1] % 2 and made.dim() == 4 and made.is_contiguous():  # what asks for a shape reads no values
            made = self.conv(x) if self.twice else made
        out = self.bn(made)
        return out if self.between is None else self.between(made, out)


@pytest.mark.parametrize(
    ("between", "count"),
    [
        (None, 0),
        (lambda made, out: out.relu(), 0),
        (lambda made, out: out + made, 1),
        (lambda made, out: out + made[:, :1].mean(), 1),
        (lambda made, out: out.relu_() * made.mT.mT.sigmoid(), 1),
        (lambda made, out: (out, made), 1),
        (lambda made, out: out * float(made.detach().max()), 1),
    ],
)
def test_it_is_folded_only_where_nothing_else_reads(between: Callable[..., Any] | None, count: int) -> None:
    block = Block(between)
    stirred(block).double().eval()
    x = images(size=(8, 8))
    found = folded(block, x)
    assert norms(found) == count
    assert norms(block) == 1
    expected, answer = block(x), found(x)
    for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (expected, answer)), strict=True):
        assert_matches(other, one.detach())


def _hooked(block: Block) -> None:
    block.conv.register_forward_hook(lambda _module, _inputs, output: 2 * output)


def _watched(block: Block) -> None:
    block.bn.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1,))


def _shadowed(block: Block) -> None:
    block.conv.forward = lambda x: nn.Conv2d.forward(block.conv, x) + 1  # type: ignore[method-assign]


def _without_statistics(block: Block) -> None:
    block.bn = nn.BatchNorm2d(4, track_running_stats=False)


def _of_another_class(block: Block) -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block.bn = Doubled(4)


def _weight_normed(block: Block) -> None:
    nn.utils.parametrizations.weight_norm(block.conv)


@pytest.mark.parametrize(
    "change", [_hooked, _watched, _shadowed, _without_statistics, _of_another_class, _weight_normed]
)
def test_what_does_more_than_its_class_says_is_left_alone(change: Callable[[Block], None]) -> None:
    block = Block()
    change(block)
    stirred(block).double().eval()
    x = images(size=(8, 8))
    found = folded(block, x)
    assert norms(found) == 1
    assert_matches(found(x), block(x).detach())


def test_what_runs_twice_is_left_alone() -> None:
    block = Block(twice=True)
    stirred(block).double().eval()
    odd = images(size=(9, 9))
    assert norms(folded(block, odd)) == 1
    assert_matches(folded(block, odd)(odd), block(odd).detach())
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    both = nn.Sequential(shared, nn.ReLU(), shared)
    stirred(both).double().eval()
    x = images(size=(8, 8))
    assert norms(folded(both, x)) == 1
    assert_matches(folded(both, x)(x), both(x).detach())


def test_a_layer_of_two_names_is_replaced_under_both() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.bn(self.second(x))
            return out

    network = Named()
    stirred(network).double().eval()
    x = images(size=(8, 8))
    found = folded(network, x)
    assert norms(found) == 0
    assert_matches(found(x), network(x).detach())


def test_one_dimension_and_no_bias_are_folded_too() -> None:
    for conv, bn, x in (
        (nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), images(size=(8, 8))),
        (nn.Conv1d(3, 4, 3, groups=1), nn.BatchNorm1d(4), images(size=(1, 9))[:, :, 0]),
    ):
        network = nn.Sequential(conv, bn)
        stirred(network).double().eval()
        found = folded(network, x)
        assert norms(found) == 0
        assert_matches(found(x), network(x).detach())


def test_of_an_output_object_the_logits_are_taken() -> None:
    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            maps = self.bn(self.conv(x)).relu()
            return {"maps": maps, "logits": self.fc(maps.mean((-2, -1)))}

    model = ImmunityMoE.from_experts([Answering(), Answering()], stage="bn", image_size=16)
    stirred(model).double().eval()
    model.gate.switch = "mean"
    x = images(size=(16, 16))
    plain = model.for_inference()
    assert norms(plain) == 0
    assert_matches(plain(x), model(x).detach())


def test_it_can_be_copied() -> None:
    plain = ImmunityMoE("resnet8", 2).double().for_inference()
    twin = copy.deepcopy(plain)
    assert isinstance(twin, InferenceMixture)
    assert torch.equal(twin(images()), plain(images()))
