"""Activations that are computed again in the backward pass: the same loss, gradients and statistics, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.models.recomputing import composed_parts, segments
from immunity_fast.training.adversarial import InnerAttack, InnerAttackSettings
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.step import TrainStep
from tests.small_runs import half_trained, options, saved, trained, write_data

SIDE, CLASSES = 9, 3


class Part(nn.Module):
    """What a second computation may get wrong: BatchNorm of both kinds, dropout, a buffer that a pass changes."""

    scale: Tensor

    def __init__(self, before: int, after: int, log: list[str] | None = None, name: str = "") -> None:
        super().__init__()
        self.convolution = nn.Conv2d(before, after, 3, padding=1)
        self.norm = nn.BatchNorm2d(after)
        self.mean = nn.BatchNorm2d(after, momentum=None)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("scale", torch.ones(()))
        self.log, self.name = log, name

    def forward(self, x: Tensor) -> Tensor:
        if self.log is not None:
            self.log.append(self.name)
        if self.training:
            self.scale.mul_(1.25)
        return self.dropout(torch.tanh(self.mean(torch.relu(self.norm(self.convolution(x)))))) * self.scale.clone()


def _head(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten())


def _chain(log: list[str] | None = None) -> nn.Sequential:
    parts = [nn.Conv2d(3, 4, 1), Part(4, 5, log, "a"), nn.ReLU(), Part(5, 4, log, "b"), _head(4)]
    return nn.Sequential(*parts, nn.Linear(4 * 16, CLASSES))


class Whole(nn.Module):
    """A network that cannot be cut: something goes around the stage."""

    def __init__(self, width: int, log: list[str] | None = None) -> None:
        super().__init__()
        self.stem = Part(3, width, log, "a")
        self.blocks = nn.ModuleList([Part(width, width, log, "b"), Part(width, 4, log, "c")])
        self.around = nn.Conv2d(3, 4, 1)
        self.head, self.classifier = _head(4), nn.Linear(4 * 16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        for block in self.blocks:
            maps = block(maps)
        logits: Tensor = self.classifier(self.head(maps + self.around(images)))
        return logits


def _mixture(experts: list[nn.Module], stage: str, **options: Any) -> ImmunityMoE:
    kind = ImmunityMoE if len(experts) > 1 else SingleNetwork
    return kind.from_experts(experts, stage=stage, image_size=SIDE, mean=[0.5] * 3, std=[0.3] * 3, **options)


MADE: dict[str, Callable[[], ImmunityMoE]] = {
    "loop": lambda: _mixture([_chain(), _chain()], "3", batching="loop"),
    "vmap": lambda: _mixture([_chain(), _chain()], "3", batching="vmap"),
    "whole": lambda: _mixture([Whole(5), Whole(5)], "blocks.1"),
    "list": lambda: _mixture([Whole(5), Whole(4)], "blocks.0"),
    "single": lambda: _mixture([_chain()], "3"),
    "single whole": lambda: _mixture([Whole(5)], "blocks.1"),
    "resnet8": lambda: ImmunityMoE("resnet8", 3, CLASSES, image_size=SIDE, batching="loop"),
}


def _made(kind: str) -> ImmunityMoE:
    torch.manual_seed(0)
    return MADE[kind]().double().train()


def _batch() -> tuple[Tensor, Tensor]:
    images = torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images, torch.tensor([0, 1, 2, 0, 1])


def _stepped(model: ImmunityMoE, checkpoint: bool, steps: int = 1, **options: Any) -> dict[str, Any]:
    """What steps leave: the loss, gradients, weights and statistics, and the random state."""
    model = copy.deepcopy(model)
    for module in model.modules():  # a copy writes into the same list
        assert getattr(module, "log", None) is None
    torch.manual_seed(3)
    loss_fn = FusedImmunityLoss(0.5, 0.7, 1e-2, size=(6, 7))
    if method := options.pop("adversarial", None):
        options["attack"] = InnerAttack(model, InnerAttackSettings(method, steps=2))
    step = TrainStep(model, loss_fn, SGD(model.parameters(), 0.1), checkpoint_activations=checkpoint, **options)
    measured = [step(*_batch()) for _ in range(steps)]
    gradients = {f"∂ {name}": value.grad for name, value in model.named_parameters()}
    return {"measured": torch.stack(measured), "random": torch.get_rng_state(), **gradients, **model.state_dict()}


def _assert_same(found: dict[str, Any], expected: dict[str, Any], *, exact: bool = True) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        elif exact:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("kind", MADE)
def test_steps_are_the_same_bits(kind: str) -> None:
    """Of two steps: weights, gradients, BatchNorm's statistics and counters, a network's own buffer, random numbers."""
    model = _made(kind)
    expected = _stepped(model, False, steps=2)
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    assert counters
    assert all(bool((value == 2).all()) for value in counters.values())
    _assert_same(_stepped(model, True, steps=2), expected)


@pytest.mark.parametrize("kind", ["loop", "vmap"])
def test_a_tangent_of_the_head_is_the_same_too(kind: str) -> None:
    model = _made(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ways = {"double_backprop": "forward"}
    _assert_same(_stepped(model, True, **ways), _stepped(model, False, **ways))


@pytest.mark.parametrize("kind", ["loop", "vmap", "whole"])
@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_adversarial_steps_are_the_same(kind: str, method: str) -> None:
    model = _made(kind)
    _assert_same(_stepped(model, True, adversarial=method), _stepped(model, False, adversarial=method), exact=False)


def test_half_precision_is_the_same() -> None:
    model = _made("loop").float()
    found = [_half(model, checkpoint) for checkpoint in (False, True)]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def _half(model: ImmunityMoE, checkpoint: bool) -> list[Tensor]:
    model = copy.deepcopy(model)
    model.checkpoint_activations = checkpoint
    torch.manual_seed(0)
    images, labels = _batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images.float(), labels)
    loss.backward()  # behind the block, as it should be
    return [loss, *(value.grad for value in model.parameters() if value.grad is not None), *model.buffers()]


@pytest.mark.parametrize(
    ("made", "stage", "again", "once"),
    [
        (lambda log: [_chain(log), _chain(log)], "3", ["a", "b"], []),
        (lambda log: [_chain(log), _chain(log)], "1", ["a"], ["b"]),
        (lambda log: [Whole(5, log), Whole(5, log)], "blocks.0", ["a", "b"], ["c"]),
        (lambda log: [Whole(5, log), Whole(4, log)], "blocks.0", ["a", "b"], ["c"]),
    ],
    ids=["chain", "chain cut early", "whole", "list"],
)
def test_what_lies_before_the_stage_is_computed_again(
    made: Callable[[list[str]], list[nn.Module]], stage: str, again: list[str], once: list[str]
) -> None:
    """And in the reverse order, an expert after the other."""
    log: list[str] = []
    model = _mixture(made(log), stage, batching="loop").double().train()
    for module in model.modules():
        if isinstance(module, Part):
            module.log = log
    model.checkpoint_activations = True
    log.clear()
    loss = model(*_batch())
    assert sorted(log) == sorted(2 * (again + once))
    log.clear()
    loss.backward()
    assert log == 2 * again[::-1]


def test_logits_alone_are_computed_again_to_the_end() -> None:
    model = _made("loop")
    expected, images = _made("loop"), _batch()[0].requires_grad_()
    model.checkpoint_activations = True
    torch.manual_seed(1)
    found = torch.autograd.grad(model.expert_logits(images).sum(), images)[0]
    torch.manual_seed(1)
    assert torch.equal(found, torch.autograd.grad(expected.expert_logits(images).sum(), images)[0])
    for one, other in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(one, other)


def test_second_derivatives_through_it_are_right() -> None:
    """A gradient penalty on the images."""
    found = []
    for checkpoint in (False, True):
        model, images = _made("loop"), _batch()[0].requires_grad_()
        model.checkpoint_activations = checkpoint
        torch.manual_seed(1)
        slopes = torch.autograd.grad(model.expert_logits(images).square().sum(), images, create_graph=True)[0]
        slopes.square().sum().backward()
        found.append([images.grad, *(value.grad for value in model.experts.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_without_gradients_nothing_is_kept_to_compute_again() -> None:
    model, twin = _made("loop"), _made("loop")
    model.checkpoint_activations = True
    for each in (model, twin):
        torch.manual_seed(2)
        with torch.no_grad():
            each.expert_outputs(_batch()[0])
    for one, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_less_is_kept_for_the_backward_pass() -> None:
    """Bytes of distinct memory that the graph holds between the passes."""
    kept = {}
    for checkpoint in (False, True):
        model = ImmunityMoE("resnet8", 2, CLASSES, image_size=16, batching="loop").train()
        model.checkpoint_activations = checkpoint
        memory: dict[int, int] = {}

        def note(value: Tensor, memory: dict[int, int] = memory) -> Tensor:
            memory[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            model.trunk_outputs(torch.rand(8, 3, 16, 16))
        kept[checkpoint] = sum(memory.values())
    assert kept[True] < 0.3 * kept[False]


class Inplace(nn.Sequential):
    """Changes its input, which PyTorch would not see: nothing else keeps that."""

    def __init__(self) -> None:
        super().__init__(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1))


def test_a_part_that_changes_its_input_is_refused() -> None:
    networks = [nn.Sequential(Part(3, 4), Inplace(), _head(4), nn.Linear(64, CLASSES)) for _ in range(2)]
    model = _mixture(networks, "1").double().train()
    model(*_batch()).backward()
    model.checkpoint_activations = True
    with pytest.raises(
        ValueError, match=r"checkpoint_activations: expected inputs .* got one that was changed in place"
    ):
        model(*_batch())


@pytest.mark.parametrize("kind", ["loop", "whole"])
def test_an_input_that_was_changed_is_no_input(kind: str) -> None:
    model = _made(kind)
    model.checkpoint_activations = True
    images, labels = _batch()
    model.normalize = nn.Identity()
    model.gate.requires_grad_(False)  # which keeps the images as well, and sees it by itself
    loss = model(images, labels)
    images.mul_(2)
    with pytest.raises((ValueError, RuntimeError), match=r"changed in place|modified by an inplace"):
        loss.backward()


def test_weights_that_were_changed_are_no_weights() -> None:
    model = _made("vmap")
    model.checkpoint_activations = True
    loss = model(*_batch())
    with torch.no_grad():
        next(model.experts.parameters()).mul_(2)
    with pytest.raises(ValueError, match=r"checkpoint_activations: .* weights .* stay as they are"):
        loss.backward()


def test_a_chain_s_layers_belong_to_the_part_before_them() -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU(), Part(4, 4), nn.ReLU(inplace=True), Part(4, 4), nn.Flatten()]
    assert [list(part._modules) for part in segments(nn.Sequential(*layers))] == [["0", "1", "2", "3"], ["4", "5"]]
    flat = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert [list(part._modules) for part in segments(flat)] == [["0", "1", "2"]]


def test_parts_of_a_network_lie_around_the_stage() -> None:
    network = Whole(5)
    assert composed_parts(network, "blocks.0.norm") == [network.stem, network.blocks[1], network.head]
    assert composed_parts(network, "blocks.0") == [network.stem, *network.blocks, network.head]


def test_networks_without_parts_are_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, CLASSES, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(images))).mean((2, 3))

    model = _mixture([Flat(), Flat()], "first")
    with pytest.raises(ValueError, match="checkpoint_activations: expected experts with parts of several layers"):
        TrainStep(model, model.loss_fn, SGD(model.parameters(), 0.1), checkpoint_activations=True)


@pytest.mark.exhaustive  # half a minute of tracing
@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_compiled_steps_are_the_same_in_one_graph(batching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and by the compiler's own rules for what is computed again, but for kernels."""
    compiler = torch.compile
    whole = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiler(function, **whole))
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 2, CLASSES, image_size=SIDE, batching=batching).double().train()
    model.gate.switch = "off"

    def refuse(line: str) -> None:
        raise AssertionError(line)

    found = _stepped(model, True, steps=2, compile="on", log=refuse)
    _assert_same(found, _stepped(model, False, steps=2), exact=False)


@pytest.mark.slow
def test_buffers_that_a_pass_depends_on_are_not_compiled() -> None:
    """Compiled code would compute again with what the first pass has made of them."""
    model, said = _made("loop"), list[str]()
    found = _stepped(model, True, compile="on", log=said.append)
    _assert_same(found, _stepped(model, False))
    assert len(said) == 1
    assert "going on in eager mode" in said[0]


def test_a_single_layer_s_chain_is_one_part() -> None:
    """Of which nothing but the input is kept."""

    def chain() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(196, CLASSES))

    model = _mixture([chain(), chain()], "2").double().train()
    _assert_same(_stepped(model, True), _stepped(model, False))


def test_a_run_goes_on_with_it_to_the_same_bits(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.npz")
    trained([*options(data), "--out", str(tmp_path / "whole")])
    half = half_trained(data, tmp_path / "half")
    trained(["--resume", str(half), "--checkpoint-activations"])
    assert saved(half)["tensors"] == saved(tmp_path / "whole")["tensors"]


@pytest.mark.parametrize("name", ["checkpoint_activations", "auto_batch"])
def test_weights_in_shards_have_none_of_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: expected none with --shard, got True"):
        TrainConfig(shard=True, **{name: True})
