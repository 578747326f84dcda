"""What captured networks are put through, and come out of with the gradients of plain code."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from immunity_fast import FusedImmunityLoss, ImmunityMoE, capture_activations
from immunity_fast.models.capture import CapturedNetworks
from tests.captured import LABELS, Plain, assert_gradients, expected_gradients, gradients_of, images, loss_fn, of_plain
from tests.processes import launch
from tests.tensors import noise


def _networks(count: int = 2, **options: Any) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Plain(**options).double() for _ in range(count)]


def _check(captured: Any, networks: list[nn.Module]) -> None:
    """The captured pass gives these networks the gradients of plain code."""
    expected = expected_gradients(networks, images(), of_plain)
    logits, activations = captured(images())
    assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)


def _pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, _pickled, _saved])
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_captures_its_own(again: Any, used: bool) -> None:
    captured = capture_activations(_networks(), "layer")
    if used:
        captured(images())
    twin = again(captured)
    assert isinstance(twin, CapturedNetworks)
    _check(twin, list(twin.networks))
    _check(captured, list(captured.networks))
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not twin(images())[1][0].any()
    assert captured(images())[1][0].any()


def test_a_copy_made_inside_of_a_pass_hears_nothing() -> None:
    networks = _networks(1)
    captured = capture_activations(networks, "layer")
    captured(images())
    copies: list[Any] = []
    networks[0].get_submodule("last").register_forward_hook(lambda *_: copies.append(copy.deepcopy(captured)))
    _, activations = captured(images())
    before = activations[0].clone()
    twin = copies[0]
    for hook in list(twin.networks[0].last._forward_hooks):
        del twin.networks[0].last._forward_hooks[hook]
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not twin(images())[1][0].any()
    assert torch.equal(activations[0], before)


def test_an_averaged_model_captures_its_own() -> None:
    captured = capture_activations(_networks(), "layer")
    averaged = AveragedModel(captured, avg_fn=lambda mean, value, _: mean + value)
    averaged.update_parameters(captured)
    averaged.update_parameters(captured)
    of_average = list(averaged.module.networks)
    assert torch.equal(of_average[0].fc.weight, 2 * captured.networks[0].fc.weight)
    _check(averaged, of_average)


WORKER = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from immunity_fast import FusedImmunityLoss, capture_activations
from tests.captured import LABELS, SIZE, Plain, images

def main():
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    captured = capture_activations([Plain().double().eval() for _ in range(2)], "layer")
    wrapped = DistributedDataParallel(captured)
    group = distributed.group.WORLD.group_name
    loss_fn = FusedImmunityLoss(0.5, 1.3, 0.02, size=SIZE, group_name=group)
    rank = distributed.get_rank()
    mine = slice(2 * rank, 2 * rank + 2)
    for _ in range(2):
        wrapped.zero_grad()
        logits, activations = wrapped(images()[mine])
        loss_fn(logits, activations, LABELS[mine]).backward()
    if rank == 0:
        torch.save([p.grad for p in captured.parameters()], sys.argv[1])
    distributed.barrier()
    distributed.destroy_process_group()

main()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    launch("-c", WORKER, str(tmp_path / "gradients.pt"))
    networks = [network.eval() for network in _networks()]
    expected = expected_gradients(networks, images(), of_plain)
    assert_gradients(torch.load(tmp_path / "gradients.pt"), expected)


# A step is compiled in the next test, too.
@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.exhaustive), False], ids=["step", "module"])
def test_compiling_leaves_second_derivatives_as_they_are(whole: bool) -> None:
    torch.compiler.reset()
    networks = _networks()
    captured = capture_activations(networks, "layer")
    if not whole:
        _check(torch.compile(captured, backend="aot_eager"), networks)
        return

    def step(x: Tensor) -> Any:
        logits, activations = captured(2 * x / 2)
        return [scores + 0 for scores in logits], activations

    _check(torch.compile(step, backend="aot_eager"), networks)


def test_a_compiled_step_with_the_loss_has_its_gradients() -> None:
    torch.compiler.reset()
    networks, loss_fn, labels = _networks(), FusedImmunityLoss(size=(7, 7)), torch.arange(3) % 2
    captured = capture_activations(networks, "layer")
    parameters = list(captured.parameters())

    def step(x: Tensor) -> Tensor:
        loss: Tensor = 2 * loss_fn(*captured(x), labels)
        return loss

    x = images()[:3]
    found = torch.autograd.grad(torch.compile(step, backend="aot_eager")(x), parameters)
    for own, expected in zip(found, torch.autograd.grad(step(x), parameters), strict=True):
        torch.testing.assert_close(own, expected)


def test_compiled_networks_are_captured_uncompiled() -> None:
    torch.compiler.reset()
    networks = _networks()
    compiled: list[Any] = [torch.compile(network, backend="aot_eager") for network in networks]
    _check(capture_activations(compiled, "layer"), networks)


def test_compiled_parts_in_front_of_the_layer_stay_compiled() -> None:
    torch.compiler.reset()
    networks = _networks()
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for network in networks:
        network.get_submodule("conv").compile(backend=backend)
    expected = expected_gradients(copy.deepcopy(networks), images(), of_plain)
    logits, activations = capture_activations(networks, "layer")(images())
    assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), networks), expected)
    assert graphs


THREADS = 4


def test_each_thread_captures_its_own_pass() -> None:
    captured = capture_activations([network.eval() for network in _networks()], "layer")
    expected = [captured(noise(4, 13, seed=seed))[1] for seed in range(THREADS)]
    barrier = threading.Barrier(THREADS)

    def work(number: int) -> None:
        barrier.wait(timeout=60)
        for turn in range(20):
            x = noise(4, 13, seed=number)
            if turn % 2:
                _, activations = captured(x)
            else:
                with captured as activations:
                    for network in captured.networks:
                        network(x)
            for mine, theirs in zip(activations, expected[number], strict=True):
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(THREADS), timeout=300))
    finally:
        sys.setswitchinterval(before)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in captured.modules())


def test_dtype_and_device_are_converted_as_of_any_module() -> None:
    captured = capture_activations(_networks(), "layer")
    captured(images())
    captured.float()
    logits, activations = captured(images().float())
    assert {part.dtype for part in (*logits, *activations)} == {torch.float32}
    captured.to(memory_format=torch.channels_last)
    assert captured.networks[0].get_parameter("last.weight").is_contiguous(memory_format=torch.channels_last)
    names = {name.split(".")[0] for name in captured.state_dict()}
    assert names == {"networks"}


def test_autocast_reaches_the_networks() -> None:
    captured = capture_activations([network.float() for network in _networks()], "layer")
    with torch.autocast("cpu", torch.bfloat16):
        logits, activations = captured(images().float())
        loss = loss_fn()(logits, activations, LABELS)
    assert activations[0].dtype == torch.bfloat16
    assert all(gradient.isfinite().all() for gradient in gradients_of(loss, list(captured.networks)))


def test_the_mixture_catches_as_captured_networks_do() -> None:
    """Of different networks, and of a chain that is cut: one loss, and the same gradients."""
    networks = [*_networks(1), *_networks(1, width=6)]
    model = ImmunityMoE.from_experts(networks, stage="layer", image_size=13).double()
    expected = gradients_of(loss_fn()(*capture_activations(networks, "layer")(images()), LABELS), networks)
    logits, activations, _ = model.expert_outputs(images())
    assert_gradients(gradients_of(loss_fn()(logits, activations, LABELS), [model.experts]), expected)


def test_steps_of_sgd_lower_the_loss() -> None:
    captured = capture_activations([network.float() for network in _networks()], "layer")
    optimizer = torch.optim.SGD(captured.parameters(), lr=0.1, momentum=0.9)
    loss_fn = FusedImmunityLoss(1.0, 1.0, 1e-4, size=(13, 13))
    losses = []
    for _ in range(12):
        logits, activations = captured(images().float())
        loss = loss_fn(logits, activations, LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
