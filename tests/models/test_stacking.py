"""Stacked experts: a loop and `vmap` agree with each other and with every expert alone, step after step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.experts import create
from immunity_fast.models.stacking import (
    _as_laid_out,
    channels_last_,
    run_stacked,
    slices,
    stack_modules,
    unstack_modules,
)
from immunity_fast.runtime.strategies import Batching, choose
from tests import grids
from tests.tensors import assert_same_state, noise

BOTH: list[Batching] = ["loop", "vmap"]


def _experts(count: int = 3, *, training: bool = True) -> list[nn.Module]:
    torch.manual_seed(0)
    return [create("resnet8", 4).double().train(training) for _ in range(count)]


def _images(samples: int = 4, seed: int = 1) -> Tensor:
    return noise(samples, 10, 12, seed)


@pytest.mark.parametrize(("batching", "training", "shared"), grids.every(2, BOTH, [True, False], [True, False]))
def test_stacked_experts_are_each_expert_alone(batching: Batching, training: bool, shared: bool) -> None:
    experts = _experts(training=training)
    stacked = stack_modules(experts)
    x = _images() if shared else torch.stack([_images(seed=seed) for seed in range(3)])
    expected = torch.stack([expert(x if shared else x[i]) for i, expert in enumerate(experts)])
    actual = run_stacked(stacked, x, 3, shared=shared, batching=batching)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for mine, alone in zip(unstack_modules(stacked, 3), experts, strict=True):
        assert_same_state(mine, alone, 1e-10)


def test_loop_and_vmap_train_alike() -> None:
    """Parameters, running statistics and num_batches_tracked after some steps of SGD, and then evaluation mode."""
    models = {batching: stack_modules(_experts()) for batching in BOTH}
    outputs = {}
    for batching, model in models.items():
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            loss = run_stacked(model, _images(seed=step), 3, shared=True, batching=batching).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        outputs[batching] = run_stacked(model.eval(), _images(), 3, shared=True, batching=batching)
    torch.testing.assert_close(outputs["loop"], outputs["vmap"], rtol=1e-9, atol=1e-9)
    assert_same_state(models["loop"], models["vmap"], 1e-9)
    tracked = models["vmap"].state_dict()["stem.1.num_batches_tracked"]
    assert tracked.tolist() == [3, 3, 3]


@pytest.mark.parametrize("batching", BOTH)
def test_evaluation_mode_leaves_the_statistics_alone(batching: Batching) -> None:
    stacked = stack_modules(_experts(training=False))
    before = copy.deepcopy(stacked)
    run_stacked(stacked, _images(), 3, shared=True, batching=batching)
    assert_same_state(stacked, before)


@pytest.mark.parametrize("batching", BOTH)
def test_each_expert_has_statistics_of_its_own(batching: Batching) -> None:
    stacked = stack_modules(_experts())
    run_stacked(stacked, _images(), 3, shared=True, batching=batching)
    means = stacked.state_dict()["stem.1.running_mean"]
    assert means.shape == (3, 16)
    assert all(not torch.equal(means[i], means[j]) for i in range(3) for j in range(i))


@pytest.mark.parametrize("batching", BOTH)
def test_gradients_are_those_of_each_expert_alone(batching: Batching) -> None:
    experts = _experts()
    stacked = stack_modules(experts)
    run_stacked(stacked, _images(), 3, shared=True, batching=batching)[..., 0].sum().backward()
    for i, expert in enumerate(experts):
        expert(_images())[..., 0].sum().backward()
        for (name, mine), alone in zip(stacked.named_parameters(), expert.parameters(), strict=True):
            assert mine.grad is not None, name
            torch.testing.assert_close(mine.grad[i], alone.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batching", BOTH)
def test_an_empty_batch_passes(batching: Batching) -> None:
    stacked = stack_modules(_experts(training=False))
    assert run_stacked(stacked, _images(0), 3, shared=True, batching=batching).shape == (3, 0, 4)


def test_stacking_and_unstacking_is_lossless() -> None:
    experts = _experts()
    for expert in experts:
        expert(_images())
    for twin, expert in zip(unstack_modules(stack_modules(experts), 3), experts, strict=True):
        assert type(twin) is type(expert)
        assert repr(twin) == repr(expert)
        assert_same_state(twin, expert)


def test_stacking_copies() -> None:
    experts = _experts()
    before = copy.deepcopy(experts[0])
    stacked = stack_modules(experts)
    twins = unstack_modules(stacked, 3)
    pointers = {tensor.data_ptr() for module in (*experts, stacked, *twins) for tensor in module.state_dict().values()}
    assert len(pointers) == sum(len(module.state_dict()) for module in (*experts, stacked, *twins))
    run_stacked(stacked, _images(), 3, shared=True)
    assert_same_state(experts[0], before)
    assert_same_state(twins[0], before)


def test_one_slice_holds_one_experts_tensors_as_views() -> None:
    stacked = stack_modules(_experts())
    for i, own in enumerate(slices(stacked, 3)):
        assert own.keys() == stacked.state_dict().keys()
        for name, value in stacked.state_dict().items():
            assert own[name].data_ptr() == value[i].data_ptr()


@pytest.mark.parametrize("batching", BOTH)
def test_frozen_parameters_stay_frozen(batching: Batching) -> None:
    experts = _experts()
    for expert in experts:
        expert.get_submodule("stem").requires_grad_(False)
    stacked = stack_modules(experts)
    run_stacked(stacked, _images(), 3, shared=True, batching=batching).sum().backward()
    for module in (stacked, *unstack_modules(stacked, 3)):
        assert {name for name, p in module.named_parameters() if not p.requires_grad} == {
            "stem.0.weight",
            "stem.1.weight",
            "stem.1.bias",
        }
    assert all((p.grad is None) == (not p.requires_grad) for p in stacked.parameters())


@pytest.mark.parametrize("batching", BOTH)
def test_dropout_differs_between_experts(batching: Batching) -> None:
    torch.manual_seed(0)
    expert = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    stacked = stack_modules([copy.deepcopy(expert) for _ in range(3)])
    outputs = run_stacked(stacked, torch.ones(50, 3), 3, shared=True, batching=batching)
    assert all(not torch.equal(outputs[i], outputs[j]) for i in range(3) for j in range(i))


@pytest.mark.parametrize("batching", BOTH)
def test_tied_parameters_stay_tied(batching: Batching) -> None:
    def tied() -> nn.Module:
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
        return nn.Sequential(first, nn.Tanh(), second).double()

    torch.manual_seed(0)
    experts = [tied() for _ in range(2)]
    stacked = stack_modules(experts)
    x = _images(2).flatten(1)[:, :3]
    expected = torch.stack([expert(x) for expert in experts])
    torch.testing.assert_close(run_stacked(stacked, x, 2, shared=True, batching=batching), expected)
    for module in (stacked, *unstack_modules(stacked, 2)):
        assert module.get_submodule("0").weight is module.get_submodule("2").weight


@pytest.mark.parametrize(
    ("batching", "device", "expected"),
    [
        ("auto", "cpu", "loop"),
        ("auto", "cuda", "vmap"),
        ("loop", "cuda", "loop"),
        ("vmap", "cpu", "vmap"),
    ],
)
def test_auto_loops_on_a_cpu_only(batching: Batching, device: str, expected: str) -> None:
    assert choose(batching, torch.device(device)) == expected


OTHERS: dict[str, Any] = {
    "width": lambda: nn.Sequential(nn.Linear(3, 5)),
    "dtype": lambda: nn.Sequential(nn.Linear(3, 4)).double(),
    "depth": lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU()),
    "type": lambda: nn.Linear(3, 4),
    "bias": lambda: nn.Sequential(nn.Linear(3, 4, bias=False)),
    "mode": lambda: nn.Sequential(nn.Linear(3, 4)).eval(),
    "device": lambda: nn.Sequential(nn.Linear(3, 4)).to("meta"),
    "frozen": lambda: nn.Sequential(nn.Linear(3, 4)).requires_grad_(False),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_experts_of_different_structure_are_an_error(kind: str) -> None:
    with pytest.raises(ValueError, match="experts: expected number 2 to be like number 0"):
        stack_modules([nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4)), OTHERS[kind]()])


def test_no_experts_are_an_error() -> None:
    with pytest.raises(ValueError, match="experts: expected at least one"):
        stack_modules([])


# Layout


class _Convolutions(TorchDispatchMode):
    """Whether everything that convolutions read and write is channels-last, and nothing large is copied for it."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest = smallest  # elements of what counts as large
        self.seen = 0
        self.wrong: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        results = result if isinstance(result, (tuple, list)) else (result,)
        if "convolution" in name:
            self.seen += 1
            for tensor in (*args, *results):
                if isinstance(tensor, Tensor) and tensor.dim() == 4 and not channels_last(tensor):
                    self.wrong.append(f"{name}: {tuple(tensor.shape)} {tensor.stride()}")
        elif name in ("clone", "copy_", "_to_copy", "contiguous"):
            copied = [t for t in results if isinstance(t, Tensor) and t.numel() >= self.smallest]
            self.wrong += [f"{name}: {tuple(tensor.shape)}" for tensor in copied]
        return result


def channels_last(tensor: Tensor) -> bool:
    """Whether a 4-D tensor lies channels-last; a gradient that is the same for all places lies in any way."""
    return tensor.is_contiguous(memory_format=torch.channels_last) or 0 in tensor.stride()


@pytest.mark.parametrize(("batching", "double_backprop"), grids.every(2, BOTH, ("reverse", "forward")))
def test_channels_last_goes_all_the_way_without_copies(batching: Batching, double_backprop: Any) -> None:
    """Forward pass, inner gradient, tangent and its backward pass; PyTorch's own double backward transposes."""
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 2, 4, image_size=12, batching=batching)
    channels_last_(model)
    images = torch.rand(4, 3, 12, 14).contiguous(memory_format=torch.channels_last)
    # The kernels read activations where they lie; their reference does not.
    loss_fn = FusedImmunityLoss(0.5, 1.0, 0.01, size=(12, 14), backend="triton")
    with _Convolutions(smallest=4 * 16 * 12 * 14) as watched:
        maps, gate = model.trunk_outputs(images)
        loss, _ = loss_fn.from_head(
            model.head_outputs, maps, torch.arange(4), gate, has_aux=True, double_backprop=double_backprop
        )
        if double_backprop == "forward":
            loss.backward()
    # The tangent's start is a number a channel; a convolution needs it in memory, once.
    assert watched.wrong == (["copy_: (2, 4, 16, 12, 14)"] if double_backprop == "forward" else [])
    assert watched.seen > 15


def test_channels_last_changes_no_value() -> None:
    stacked = stack_modules(_experts())
    other = copy.deepcopy(stacked)
    channels_last_(stacked)
    assert_same_state(stacked, other)
    for parameter in stacked.parameters():
        assert parameter.dim() != 5 or channels_last(parameter[0])


@pytest.mark.parametrize("shape", [(2, 6, 4, 3, 3), (2, 6, 4, 1, 1), (6, 4, 3, 3), (2, 5, 4), (5, 4), (3,)])
def test_a_transposed_gradient_comes_laid_out_as_its_weight(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    convolution = len(shape) >= 4
    if convolution:
        values = values.movedim(-3, -1).contiguous().movedim(-1, -3)
    weight = values.requires_grad_()
    seen: list[Tensor] = []
    weight.register_hook(seen.append)  # what autograd is about to lay out as it should be
    view = _as_laid_out(weight)
    assert torch.equal(view, weight)
    assert view.data_ptr() == weight.data_ptr()
    upstream = torch.randn(shape[::-1], generator=torch.Generator().manual_seed(1)).permute(*range(len(shape))[::-1])
    (view * upstream).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)
    order = seen[0].movedim(-3, -1) if convolution else seen[0]
    assert order.is_contiguous()


def test_weights_in_another_order_are_left_alone() -> None:
    weight = torch.randn(4, 5).T
    assert _as_laid_out(weight) is weight
