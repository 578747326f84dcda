"""Several threads with one model or one loss: each gets what it would alone, and nothing is left behind."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate
from immunity_fast.models.gate import Switch
from immunity_fast.models.stacking import Batching
from tests import grids
from tests.tensors import noise

THREADS = 4
TARGETS = torch.tensor([0, 3, 1, 2])


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Threads take turns as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _together(work: Callable[[int], None]) -> None:
    """`work` of each thread's number, all begun at once; the first exception of any."""
    barrier = threading.Barrier(THREADS)

    def begin(number: int) -> None:
        barrier.wait(timeout=60)
        work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(begin, number) for number in range(THREADS)]:
            future.result(timeout=300)


def _model(batching: Batching = "loop") -> ImmunityMoE:
    torch.manual_seed(0)
    return ImmunityMoE("resnet8", 2, 4, image_size=12, switch="off", batching=batching).double().eval()


class Branching(nn.Module):
    """No chain: its activations are caught by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.stage, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc(self.stage(images).tanh().mean((-2, -1)))
        return out


def test_each_thread_has_the_switch_that_it_asked_for() -> None:
    torch.manual_seed(0)
    gate = RandomSwitchGate(4, switch="off").double().eval()
    with torch.no_grad():
        trained = gate(noise())
    uniform = torch.full_like(trained, 0.25)

    def work(number: int) -> None:
        switches: tuple[Switch, Switch] = ("mean", "off") if number % 2 else ("off", "mean")
        for _ in range(150):
            with gate.switched(switches[0]):
                assert gate.switch == switches[0]
                with torch.no_grad(), gate.switched(switches[1]):
                    weights = gate(noise()[:, :, :3, :3]) if switches[1] == "mean" else gate(noise())
                    assert torch.equal(weights, uniform if switches[1] == "mean" else trained)
                assert gate.switch == switches[0]
            assert gate.switch == "off"

    _together(work)
    assert gate.switch == "off"


def test_blocks_that_overlap_in_time_leave_the_switch_as_it_was() -> None:
    gate = RandomSwitchGate(2, switch="call")
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with gate.switched("mean"):
            entered.set()
            left.wait(timeout=60)
            assert gate.switch == "mean"

    thread = threading.Thread(target=other)
    with gate.switched("off"):
        thread.start()
        entered.wait(timeout=60)
        assert gate.switch == "off"
    left.set()
    thread.join(timeout=60)
    assert gate.switch == "call"


def test_a_switch_turned_in_a_block_lasts_as_long_as_the_block() -> None:
    gate = RandomSwitchGate(2, switch="call")
    with gate.switched("off"):
        gate.switch = "mean"
        assert gate.switch == "mean"
        assert copy.deepcopy(gate).switch == "mean"
    assert gate.switch == "call"
    with pytest.raises(ValueError, match=r"switch: .*'no'"), gate.switched("no"):  # type: ignore[arg-type]
        pass
    assert gate.switch == "call"


@pytest.mark.parametrize(("batching", "double_backprop"), grids.every(2, ("loop", "vmap"), ("forward", "reverse")))
def test_each_thread_has_its_own_derivatives(batching: Batching, double_backprop: str) -> None:
    model = _model(batching)
    loss_fn = FusedImmunityLoss(0.5, 1.3, 0.01, size=(12, 12))

    def gradient(number: int) -> list[Tensor]:
        maps, gate = model.trunk_outputs(noise() * (1 + number))
        loss, _ = loss_fn.from_head(
            model.head_outputs,
            maps,
            TARGETS,
            gate,
            has_aux=True,
            double_backprop=double_backprop,  # type: ignore[arg-type]
        )
        return list(
            torch.autograd.grad(loss, [p for name, p in model.named_parameters() if name.startswith("experts")])
        )

    expected = [gradient(number) for number in range(THREADS)]

    def work(number: int) -> None:
        for _ in range(2):
            for mine, theirs in zip(gradient(number), expected[number], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)

    _together(work)


@pytest.mark.parametrize(("batching", "chain"), grids.every(2, ("loop", "vmap"), (True, False)))
def test_each_thread_has_its_own_outputs(batching: Batching, chain: bool) -> None:
    """While an expert runs, its tensors are in the place of the stacked ones."""
    torch.manual_seed(0)
    experts = [Branching().double() for _ in range(2)]
    whole = ImmunityMoE.from_experts(experts, image_size=12, switch="off", batching=batching).double().eval()
    model = _model(batching) if chain else whole
    before = copy.deepcopy(model.state_dict())
    expected = [model.expert_outputs(noise() * (1 + number)) for number in range(THREADS)]

    def work(number: int) -> None:
        for _ in range(5):
            logits, maps, weights = model.expert_outputs(noise() * (1 + number))
            assert torch.equal(logits, expected[number][0])
            assert len(maps) == 2
            assert all(torch.equal(a, b) for a, b in zip(maps, expected[number][1], strict=True))
            assert torch.equal(weights, expected[number][2])
            again = model.expert_logits(noise() * (1 + number))
            torch.testing.assert_close(again, expected[number][0], rtol=1e-10, atol=1e-12)
            mine = model.state_dict()
            assert all(torch.equal(mine[name], value) for name, value in before.items())
            twin = model.unstack()[1].state_dict()
            assert chain or torch.equal(twin["fc.weight"], before["experts.fc.weight"][1])

    _together(work)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_copying_loading_and_converting_wait_for_a_pass(batching: Batching) -> None:
    model, images = _model(batching), noise()
    expected, state = model.expert_logits(images), copy.deepcopy(model.state_dict())

    def work(number: int) -> None:
        for _ in range(5):
            if number == 0:
                torch.testing.assert_close(copy.deepcopy(model).expert_logits(images), expected)
            elif number == 1:
                model.load_state_dict(state)
                model.to(torch.float64)
            else:
                torch.testing.assert_close(model.expert_logits(images), expected)

    _together(work)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }
