"""What follows a backward pass, in one launch each: clipping, SGD, moving averages; against PyTorch's in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.kernels import multi_tensor
from immunity_fast.training.checkpoint import load_optimizer_tensors, optimizer_tensors
from immunity_fast.training.ema import WeightAverage
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.step import TrainStep
from tests import grids
from tests.kernels.cases import DEVICE, assert_as_exact_as, channels_last, normal

if DEVICE.type == "cpu":
    from tests.kernels import memory

OPTIONS = [
    {},
    {"momentum": 0.9},
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 5e-4},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
]
CHUNK = multi_tensor.CHUNK
SHAPES = [(), (1,), (0,), (3, 0, 2), (5, 7), (2, 8, 3, 3), (2, 6, 4, 3, 3), (CHUNK,), (CHUNK + 1,), (2, CHUNK - 1)]


def _weights_channels_last(tensor: Tensor) -> Tensor:
    """Channels last, as memory formats lay out the weights of convolutions alone."""
    return channels_last(tensor) if tensor.dim() >= 4 else tensor


def _unaligned(tensor: Tensor) -> Tensor:
    """The same values in memory that begins between two multiples of 16 bytes."""
    whole = torch.full((tensor.numel() + 3,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    whole[1:-2] = tensor.flatten()
    return whole[1:-2].view(tensor.shape)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [lambda tensor: tensor, _weights_channels_last, _unaligned]


def _parameters(layout: Callable[[Tensor], Tensor] = LAYOUTS[0], shapes: Any = tuple(SHAPES)) -> list[nn.Parameter]:
    return [nn.Parameter(layout(normal(*shape, seed=seed))) for seed, shape in enumerate(shapes)]


def _set_gradients(parameters: list[nn.Parameter], step: int, layout: Callable[[Tensor], Tensor] = LAYOUTS[0]) -> None:
    for seed, parameter in enumerate(parameters):
        gradient = layout(normal(*parameter.shape, seed=100 * (step + 1) + seed))
        parameter.grad = gradient.to(parameter.dtype)


def _twin(parameters: list[nn.Parameter], dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().clone().to(dtype)) for parameter in parameters]


@pytest.fixture(autouse=True)
def reach_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches may reach the tensors whose addresses an optimiser or an average writes into its table."""
    if DEVICE.type == "cuda":
        return
    rows = FusedSGD._rows

    def seen_rows(self: FusedSGD, *arguments: Any) -> Any:
        found = rows(self, *arguments)
        memory.reach([*self._parameters(), *(state["momentum_buffer"] for state in self.state.values()), *found[1]])
        return found

    monkeypatch.setattr(FusedSGD, "_rows", seen_rows)


# SGD


@pytest.mark.parametrize(("layout", "options", "max_norm"), grids.every(5, LAYOUTS, OPTIONS, (None, 1.0, 1e4)))
def test_steps_are_those_of_torch(layout: Any, options: dict[str, Any], max_norm: float | None) -> None:
    parameters = _parameters(layout)
    ours = FusedSGD(parameters, 0.1, **options, backend="triton")
    assert ours.clips
    twins = {dtype: _twin(parameters, dtype) for dtype in (torch.float32, torch.float64)}
    theirs = {dtype: torch.optim.SGD(twin, 0.1, **options, foreach=False) for dtype, twin in twins.items()}
    for step in range(3):
        rate = 0.1 / (step + 1)
        ours.param_groups[0]["lr"] = rate
        _set_gradients(parameters, step, layout)
        ours.step(max_norm=max_norm)
        for dtype, twin in twins.items():
            theirs[dtype].param_groups[0]["lr"] = rate
            _set_gradients(twin, step)
            if max_norm is not None:
                nn.utils.clip_grad_norm_(twin, max_norm)
            theirs[dtype].step()
    for parameter, single, double in zip(parameters, twins[torch.float32], twins[torch.float64], strict=True):
        assert_as_exact_as(parameter.detach(), single.detach(), double.detach(), torch.float32, floor=1.0)
    if "momentum" in options:
        found, single_state, double_state = (o.state_dict()["state"] for o in (ours, *theirs.values()))
        assert found.keys() == double_state.keys()
        for index, values in found.items():
            assert values.keys() == double_state[index].keys()
            expected = double_state[index]["momentum_buffer"], single_state[index]["momentum_buffer"]
            assert_as_exact_as(values["momentum_buffer"], expected[1], expected[0], torch.float32, floor=1.0)
    else:
        assert not ours.state_dict()["state"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a compiler may fuse products and sums, as PyTorch's does elsewhere")
@pytest.mark.parametrize("options", OPTIONS)
def test_without_clipping_a_step_has_the_bits_of_torch(options: dict[str, Any]) -> None:
    """The bits of its plain implementation, operator by operator, where nothing is fused to one rounding."""
    parameters = _parameters()
    twins = _twin(parameters, torch.float32)
    ours = FusedSGD(parameters, 0.125, **_exact(options), backend="triton")
    theirs = torch.optim.SGD(twins, 0.125, **_exact(options), foreach=False)
    for step in range(2):
        _set_gradients(parameters, step)
        _set_gradients(twins, step)
        ours.step()
        theirs.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        assert torch.equal(parameter, twin)


def _exact(options: dict[str, Any]) -> dict[str, Any]:
    """Factors whose products are exact, since PyTorch's vectorised code fuses some of its sums."""
    exact = {"momentum": 0.5, "weight_decay": 0.25}
    return {name: exact.get(name, value) for name, value in options.items()}


def test_gradients_of_another_layout_are_laid_out() -> None:
    shape = (2, 6, 4, 3, 3)
    parameter = nn.Parameter(_weights_channels_last(normal(*shape)))
    twin = nn.Parameter(parameter.detach().contiguous())
    for optimizer in (FusedSGD([parameter], 0.5, backend="triton"), torch.optim.SGD([twin], 0.5)):
        for owner in (parameter, twin):
            owner.grad = normal(*shape, seed=1).transpose(1, 2).contiguous().transpose(1, 2)
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), twin.detach(), rtol=1e-6, atol=1e-6)
    assert parameter.stride() != twin.stride()


def test_parameters_without_a_gradient_stay_and_have_no_momentum() -> None:
    parameters = _parameters(shapes=[(5,), (6,), (7,)])
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = FusedSGD(parameters, 0.1, 0.9, weight_decay=0.1, backend="triton")
    optimizer.step()  # none has one
    _set_gradients(parameters, 0)
    parameters[1].grad = None
    optimizer.step(max_norm=1.0)
    assert [torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True)] == [0, 1, 0]
    assert set(optimizer.state_dict()["state"]) == {0, 2}
    _set_gradients(parameters, 1)
    optimizer.step(max_norm=1.0)  # the table grows
    assert not torch.equal(parameters[1], before[1])


def test_gradients_stay_as_they_are() -> None:
    parameters = _parameters(shapes=[(5, 7)])
    _set_gradients(parameters, 0)
    assert parameters[0].grad is not None
    before = parameters[0].grad.clone()
    FusedSGD(parameters, 0.1, backend="triton").step(max_norm=0.1)
    assert torch.equal(parameters[0].grad, before)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_gradient_breaks_what_clipping_with_it_gives(broken: float) -> None:
    """Nothing hides it, as in PyTorch."""
    parameters, twins = _parameters(shapes=[(5,), (6,)]), _parameters(shapes=[(5,), (6,)])
    for optimizer, owners in (
        (FusedSGD(parameters, 0.1, backend="triton"), parameters),
        (torch.optim.SGD(twins, 0.1), twins),
    ):
        _set_gradients(owners, 0)
        assert owners[1].grad is not None
        owners[1].grad[2] = broken
        if isinstance(optimizer, FusedSGD):
            optimizer.step(max_norm=1.0)
        else:
            nn.utils.clip_grad_norm_(twins, 1.0)
            optimizer.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, equal_nan=True)


@pytest.mark.parametrize(("overflow", "moved"), [(0.0, True), (1.0, False)])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_the_scaler_of_float16_divides_and_skips(overflow: float, moved: bool, max_norm: float | None) -> None:
    parameters = _parameters(shapes=[(5,), (CHUNK + 3,)])
    twins = _twin(parameters, torch.float32)
    optimizer = FusedSGD(parameters, 0.25, 0.5, backend="triton")
    _set_gradients(parameters, 0)
    _set_gradients(twins, 0)
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.mul_(1024)
    optimizer.grad_scale = torch.tensor(1024.0, device=DEVICE)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(overflow, device=DEVICE)  # type: ignore[attr-defined]
    optimizer.step(max_norm=max_norm)
    if moved:
        if max_norm is not None:
            nn.utils.clip_grad_norm_(twins, max_norm)
        torch.optim.SGD(twins, 0.25, 0.5).step()
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin)


def test_a_scaler_may_take_the_step() -> None:
    parameters = _parameters(shapes=[(5, 7)])
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=8.0)
    optimizer = FusedSGD(parameters, 0.5, backend="triton")
    before = parameters[0].detach().clone()
    for factor in (8.0, math.inf):
        scaler.scale(torch.ones((), device=DEVICE))
        parameters[0].grad = torch.full_like(before, factor)
        scaler.step(optimizer, max_norm=1e6)
        scaler.update()
    torch.testing.assert_close(parameters[0].detach(), before - 0.5)
    assert scaler.get_scale() == 4.0


def test_momentum_comes_from_a_checkpoint() -> None:
    parameters = _parameters(_weights_channels_last)
    optimizer = FusedSGD(parameters, 0.1, 0.9, nesterov=True, backend="triton")
    _set_gradients(parameters, 0, _weights_channels_last)
    optimizer.step()
    twins = _twin(parameters, torch.float32)
    kept = {name.removeprefix("optimizer/"): value for name, value in optimizer_tensors("optimizer", optimizer).items()}
    kept = copy.deepcopy({name: value.contiguous() for name, value in kept.items()})
    other = FusedSGD(twins, 0.1, 0.9, nesterov=True, backend="triton")
    load_optimizer_tensors(other, kept)
    for owners, each in ((parameters, optimizer), (twins, other)):
        _set_gradients(owners, 1, _weights_channels_last)
        each.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        assert torch.equal(parameter, twin)


def test_weights_may_be_laid_out_anew_behind_the_optimiser() -> None:
    parameter, twin = (nn.Parameter(normal(2, 6, 4, 3, 3)) for _ in "ab")
    ours, theirs = FusedSGD([parameter], 0.1, 0.9, backend="triton"), torch.optim.SGD([twin], 0.1, 0.9)
    for step in range(3):
        _set_gradients([parameter], step, _weights_channels_last if step else LAYOUTS[0])
        _set_gradients([twin], step)
        ours.step()
        theirs.step()
        if not step:
            parameter.grad = None
            parameter.data = _weights_channels_last(parameter.data)
    torch.testing.assert_close(parameter, twin, rtol=1e-6, atol=1e-6)


def test_autograd_learns_of_the_update() -> None:
    parameter = nn.Parameter(normal(4))
    result = parameter.square().sum()
    parameter.grad = torch.ones_like(parameter)
    FusedSGD([parameter], 0.1, backend="triton").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def _sliced() -> list[nn.Parameter]:
    return [nn.Parameter(normal(4, 6)[:, ::2])]


def _double() -> list[nn.Parameter]:
    return [nn.Parameter(normal(4, dtype=torch.float64))]


@pytest.mark.parametrize("make", [_sliced, _double])
def test_what_kernels_do_not_take_is_left_to_torch(make: Callable[[], list[nn.Parameter]]) -> None:
    with pytest.raises(ValueError, match="float32 parameters"):
        FusedSGD(make(), 0.1, backend="triton")
    parameters, twins = make(), make()
    optimizer = FusedSGD(parameters, 0.1, 0.9)
    assert not optimizer.clips
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.step(max_norm=1.0)
    for owners, each in ((parameters, optimizer), (twins, torch.optim.SGD(twins, 0.1, 0.9))):
        owners[0].grad = torch.ones_like(owners[0])
        each.step()
    torch.testing.assert_close(parameters[0], twins[0])


@pytest.mark.parametrize("change", ["double", "gaps"])
def test_parameters_may_change_after_the_optimiser_was_made(change: str) -> None:
    """As by `model.double()`: kernels that took them for what they were would write over other tensors."""
    whole = normal(16)
    ours, theirs = nn.Parameter(whole[:8]), nn.Parameter(whole[:8].clone())
    optimizer = FusedSGD([ours], 0.1, 0.9, backend="triton")
    assert optimizer.clips
    beside = normal(32, seed=1)
    ours.data, theirs.data = (
        (whole[:8].double(), whole[:8].double()) if change == "double" else (beside[:16:2], beside[:16:2].clone())
    )
    before = beside.clone()
    reference = torch.optim.SGD([theirs], 0.1, 0.9)
    assert not optimizer.clips
    for step in range(2):
        for parameter in (ours, theirs):
            parameter.grad = normal(8, seed=step).to(parameter.dtype)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.data, theirs.data)
    assert torch.equal(beside[1::2], before[1::2])
    assert torch.equal(beside[16:], before[16:])
    assert torch.equal(whole, normal(16))


def test_a_skipped_first_step_leaves_momentum_at_zero_on_torch() -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = FusedSGD(parameters, 0.1, 0.9, backend="torch")
    parameters[0].grad = torch.ones(3)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert parameters[0].tolist() == [1, 1, 1]
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    parameters[1].grad = torch.ones(2)  # whose first gradient comes later
    optimizer.step()
    torch.testing.assert_close(parameters[0].data, torch.full((3,), 0.9))
    torch.testing.assert_close(parameters[1].data, torch.full((2,), 0.9))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hooks_of_a_step_are_called_once(backend: Any) -> None:
    torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)  # which gives the class of all of them its hooks
    parameter = nn.Parameter(normal(3))
    parameter.grad = normal(3, seed=1)
    optimizer, called = FusedSGD([parameter], 0.1, backend=backend), []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    optimizer.step()
    assert called == [1]


def test_anything_but_tensors_is_refused() -> None:
    for params, got in (([3], "int"), ([{"lr": 0.1}], "dict"), ([{"params": ["x"]}], "dict"), ([], "")):
        with pytest.raises(TypeError, match=rf"params: expected tensors, or groups of them, got \['?{got}'?\]"):
            FusedSGD(params, 0.1)  # type: ignore[arg-type]


def test_clipping_looks_at_all_gradients_whatever_is_updated() -> None:
    """The norm is the model's, as without the kernels; an optimiser of a part knows that part's gradients alone."""
    torch.manual_seed(0)
    model = ImmunityMoE("resnet8", 2, 3, image_size=12).to(DEVICE)
    optimizer = FusedSGD(model.gate.parameters(), 1.0, backend="triton")
    step = TrainStep(model, FusedImmunityLoss(size=(12, 12)), optimizer, clip_grad_norm=1e-3)
    before = [parameter.detach().clone() for parameter in model.gate.parameters()]
    step(torch.rand(4, 3, 12, 12, device=DEVICE), torch.tensor([0, 1, 2, 0], device=DEVICE))
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.gate.parameters(), before, strict=True)])
    assert 0 < float(moved.detach().norm()) < 5e-4


@pytest.mark.parametrize("change", [{"dampening": 0.5}, {"maximize": True}, {"lr": torch.tensor(0.1)}])
def test_settings_that_kernels_do_not_know_are_left_to_torch(change: dict[str, Any]) -> None:
    optimizer = FusedSGD(_parameters(), 0.1, 0.9, backend="triton")
    optimizer.param_groups[0].update(change)
    assert not optimizer.clips


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_groups_are_what_torch_makes_of_them(max_norm: float | None) -> None:
    """Each with a rate and a decay of its own; the norm is of all gradients together."""
    parameters = _parameters(shapes=[(5, 3), (7,), (2, 2), (4,)])
    twins = _twin(parameters, torch.float64)

    def groups(own: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": own[:2], "weight_decay": 0.1}, {"params": own[2:3], "lr": 0.3}, {"params": own[3]}]

    ours = FusedSGD(groups(parameters), 0.1, 0.9, nesterov=True, backend="triton")
    theirs = torch.optim.SGD(groups(twins), 0.1, 0.9, nesterov=True)
    for seed in range(3):
        if seed == 2:  # one that comes later
            for own, optimizer in ((parameters, ours), (twins, theirs)):
                own.append(nn.Parameter(normal(3, seed=9).to(own[0].dtype)))
                optimizer.add_param_group({"params": [own[-1]], "lr": 0.2})
        _set_gradients(parameters, seed)
        _set_gradients(twins, seed)
        assert ours.clips
        ours.step(max_norm=max_norm)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(twins, max_norm)
        theirs.step()
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter.double(), twin, rtol=1e-5, atol=1e-6)
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()


def test_the_norm_is_the_same_in_every_run_and_exact() -> None:
    parameters = _parameters(shapes=[(7,), (3 * CHUNK + 5,), (2, 9)])
    _set_gradients(parameters, 0)
    table = multi_tensor.Table(DEVICE)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    table.set([(0, 0, gradient.data_ptr(), gradient.numel()) for gradient in gradients])
    if DEVICE.type == "cpu":
        memory.reach(gradients)
    found = [multi_tensor.squares(table) for _ in range(2)]
    assert torch.equal(*found)
    assert len(found[0]) == 6
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).square().sum()
    torch.testing.assert_close(found[0].double().sum(), expected, rtol=1e-6, atol=0)


def test_more_chunks_than_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "PARTIALS", 2)
    parameters = _parameters(shapes=[(7,), (3 * CHUNK + 5,), (2, 9)])
    twins = _twin(parameters, torch.float32)
    _set_gradients(parameters, 0)
    _set_gradients(twins, 0)
    FusedSGD(parameters, 0.1, backend="triton").step(max_norm=1.0)
    nn.utils.clip_grad_norm_(twins, 1.0)
    torch.optim.SGD(twins, 0.1).step()
    for parameter, twin in zip(parameters, twins, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-6, atol=1e-6)


def test_a_table_is_written_again_only_when_something_moved() -> None:
    table = multi_tensor.Table(DEVICE)
    table.set([(16, 32, 48, 5), (64, 80, 96, CHUNK + 1)])
    first, chunks = table.addresses, table.chunks
    assert chunks.tolist() == [[0, 0], [1, 0], [1, CHUNK]]
    assert table.aligned
    table.set([(16, 32, 48, 5), (64, 80, 96, CHUNK + 1)])
    assert table.addresses is first
    table.set([(16, 32, 52, 5), (64, 80, 96, CHUNK + 1)])
    assert table.addresses is not first
    assert table.chunks is chunks
    assert not table.aligned
    table.set([(16, 32, 52, 5)])
    assert table.programs == 1
    table.set([])
    assert table.programs == 0
    assert table.addresses.shape == (0, 4)


# Averages


class _Everything(nn.Module):
    """Weights of two layouts, running statistics, integers of several widths, and what the kernel does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(_weights_channels_last(normal(2, 6, 4, 3, 3)))
        self.bias = nn.Parameter(normal(CHUNK + 5, seed=1))
        self.scalar = nn.Parameter(normal(seed=2))
        self.empty = nn.Parameter(normal(0))
        self.register_buffer("statistics", normal(3, 5, seed=3))
        self.register_buffer("count", torch.tensor([2**40 + 1, -7], device=DEVICE))
        self.register_buffer("narrow", torch.tensor([3, -4], dtype=torch.int32, device=DEVICE))
        self.register_buffer("byte", torch.tensor([3], dtype=torch.uint8, device=DEVICE))
        self.register_buffer("low", normal(4, seed=4).bfloat16())
        self.register_buffer("high", normal(4, seed=5).double())
        self.register_buffer("sliced", normal(4, 6, seed=6)[:, ::2])

    @torch.no_grad()
    def change(self, seed: int) -> None:
        """New values everywhere."""
        for index, value in enumerate(self.state_dict().values()):
            if value.is_floating_point():
                value.copy_(normal(*value.shape, seed=10 * seed + index))
            else:
                value.add_(2**35 + 3 if value.dtype == torch.int64 else 3)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_averages_are_those_of_torch(decay: float) -> None:
    module = _Everything()
    ours, theirs = WeightAverage(module, decay, backend="triton"), WeightAverage(module, decay, backend="torch")
    exact = {name: value.double() for name, value in module.state_dict().items()}
    for step in range(1, 4):
        module.change(step)
        if DEVICE.type == "cpu":
            memory.reach([*ours.average.values(), *module.state_dict().values()])
        ours.update()
        theirs.update()
        weight = 1 - min(decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            averaged = value.is_floating_point()
            exact[name] = exact[name] + weight * (value.double() - exact[name]) if averaged else value.double()
    for name, average in ours.tensors().items():
        if average.dtype == torch.float32:
            assert_as_exact_as(average, theirs.tensors()[name], exact[name], torch.float32)
        else:
            assert torch.equal(average, theirs.tensors()[name])
    assert torch.equal(ours.tensors()["count"], module.count)
    assert ours.tensors()["weight"].stride() == module.weight.stride()


def test_an_average_follows_weights_that_are_laid_out_anew() -> None:
    module = nn.Conv2d(4, 6, 3, device=DEVICE)
    ours, theirs = WeightAverage(module, 0.5, backend="triton"), WeightAverage(module, 0.5, backend="torch")
    for step in range(3):
        module.weight.data = normal(6, 4, 3, 3, seed=step)
        if step == 1:
            module.weight.data = _weights_channels_last(module.weight.data)
        if DEVICE.type == "cpu":
            # The average itself is laid out anew inside.
            ours._fitting = ours._lay_out(module.state_dict())
            memory.reach([*ours.average.values(), *module.state_dict().values()])
        ours.update()
        theirs.update()
    for name, average in ours.tensors().items():
        torch.testing.assert_close(average, theirs.tensors()[name], rtol=1e-6, atol=1e-6)


# Memory


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_dtype_than_their_average_are_refused(dtype: torch.dtype, when: str) -> None:
    """By PyTorch's error, which names the dtypes; nothing is written."""
    module = nn.Linear(3, 2).to(DEVICE)
    average = WeightAverage(module, 0.5, backend="triton")
    if when == "after":
        if DEVICE.type == "cpu":
            memory.reach([*average.average.values(), *module.state_dict().values()])
        average.update()
    held = copy.deepcopy(average.average)
    module.to(dtype)
    with pytest.raises(RuntimeError, match="dtype"):
        average.update()
    for name, value in average.average.items():
        assert torch.equal(value, held[name])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter sees what is read and written")
def test_everything_is_read_and_written_once() -> None:
    parameters = _parameters(_unaligned, shapes=[(5, 7), (CHUNK + 1,)])
    optimizer = FusedSGD(parameters, 0.1, 0.9, backend="triton")
    _set_gradients(parameters, 0)
    optimizer.step()
    with memory.watched() as launches:
        optimizer.step(max_norm=1.0)
    squares, update = launches
    for parameter in parameters:
        assert parameter.grad is not None
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert (squares.counts("loads", parameter.grad) == 1).all()
        for tensor in (parameter.detach(), momentum):
            assert (update.counts("loads", tensor) == 1).all()
            assert (update.counts("stores", tensor) == 1).all()
        assert (update.counts("loads", parameter.grad) == 1).all()
        assert (update.counts("stores", parameter.grad) == 0).all()
