"""Checkpoints: what is saved comes back bit for bit, and nothing else is taken for one."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.optim import SGD

from immunity_fast import ImmunityMoE
from immunity_fast.models.stacking import channels_last_
from immunity_fast.training.checkpoint import (
    load_checkpoint,
    load_model,
    load_module,
    load_optimizer_tensors,
    module_tensors,
    optimizer_tensors,
    save_checkpoint,
    under,
    write_atomically,
)
from tests.small_runs import as_bytes

INFO = {"epoch": 3, "model": {"arch": "resnet8"}, "name": "größer"}
TENSORS = {
    "a/float": torch.tensor([1.0, -0.0, torch.inf, torch.nan]),
    "a/double": torch.tensor(0.1, dtype=torch.float64),
    "b/long": torch.tensor(2**62),
    "b/bytes": torch.arange(5, dtype=torch.uint8),
    "b/empty": torch.empty(0, dtype=torch.int64),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "expanded": torch.ones(1).expand(4),
}


def _model(experts: int = 2, seed: int = 0) -> ImmunityMoE:
    torch.manual_seed(seed)
    return ImmunityMoE("resnet8", experts, 3, image_size=12)


def test_tensors_and_info_come_back_bit_for_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", TENSORS, INFO)
    tensors, info = load_checkpoint(tmp_path / "c")
    assert info == INFO
    assert {name: as_bytes(t) for name, t in tensors.items()} == {name: as_bytes(t) for name, t in TENSORS.items()}


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    save_checkpoint(tmp_path / "c", {"whole": shared, "part": shared[:2]}, {})
    tensors, _ = load_checkpoint(tmp_path / "c")
    assert tensors["part"].tolist() == [0, 1]
    assert tensors["whole"].tolist() == [0, 1, 2, 3]


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a", TENSORS, INFO)
    save_checkpoint(tmp_path / "b", dict(reversed(TENSORS.items())), dict(reversed(INFO.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saving_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", TENSORS, INFO)
    save_checkpoint(tmp_path / "c", {"x": torch.zeros(1)}, {})
    assert load_checkpoint(tmp_path / "c")[0].keys() == {"x"}
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_checkpoint(tmp_path / "none.safetensors")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_the_beginning_of_a_checkpoint_is_no_checkpoint(tmp_path: Path, share: float) -> None:
    save_checkpoint(tmp_path / "c", TENSORS, INFO)
    content = (tmp_path / "c").read_bytes()
    (tmp_path / "cut").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="cut: not a whole checkpoint"):
        load_checkpoint(tmp_path / "cut")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_where_writing_fails_the_old_content_stays(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_atomically(tmp_path / "file", b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as failed:
        write_atomically(tmp_path / "file", b"new")
    assert failed.value.errno == errno.ENOSPC
    assert failed.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        write_atomically(tmp_path / "none" / "file", b"")


def test_names_are_found_under_their_prefix_alone() -> None:
    zero = torch.zeros(1)
    assert under("a", {"a/b/c": zero, "ab/c": zero, "b/a/c": zero}).keys() == {"b/c"}


def test_a_module_and_its_optimizer_go_on_alike() -> None:
    torch.manual_seed(0)
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizers = [SGD(m.parameters(), 0.1, 0.9, weight_decay=0.1, nesterov=True) for m in (model, twin)]

    def step(module: torch.nn.Module, optimizer: SGD) -> None:
        optimizer.zero_grad()
        module(torch.arange(3.0)).square().sum().backward()
        optimizer.step()

    assert optimizer_tensors("o", optimizers[0]) == {}
    step(model, optimizers[0])
    load_module(Path("c"), twin, under("m", module_tensors("m", model)))
    momentum = {name: tensor.clone() for name, tensor in optimizer_tensors("o", optimizers[0]).items()}
    load_optimizer_tensors(optimizers[1], under("o", momentum))
    step(model, optimizers[0])
    step(twin, optimizers[1])
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(model.bias, twin.bias)


@pytest.mark.parametrize(("experts", "arch"), [(3, "resnet8"), (2, "resnet18")])
def test_weights_of_another_architecture_are_refused(experts: int, arch: str) -> None:
    other = ImmunityMoE(arch, experts, 3, image_size=12)
    with pytest.raises(ValueError, match=r"c\.safetensors: of another architecture: \S+: expected shape .*, got "):
        load_module(Path("c.safetensors"), _model(), other.state_dict())


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_model_comes_back_evaluating_with_the_same_outputs(as_folder: bool, tmp_path: Path) -> None:
    model = _model()
    model(torch.rand(4, 3, 12, 12))  # moves the running statistics
    description = {"arch": "resnet8", "num_experts": 2, "num_classes": 3, "stage": None, "image_size": [12, 12]}
    file = tmp_path / "checkpoints" / "last.safetensors"
    file.parent.mkdir()
    save_checkpoint(file, module_tensors("model", model), {"model": description, "epoch": 1})
    loaded, info = load_model(tmp_path if as_folder else file)
    assert info == {"model": description, "epoch": 1}
    assert not loaded.training
    images = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    model.eval()
    model.gate.switch = loaded.gate.switch = "mean"
    assert torch.equal(loaded(images), model(images))


def test_momentum_is_taken_up_in_the_layout_of_its_parameter() -> None:
    """A fused optimiser refuses any other; weights are channels-last on a GPU, checkpoints are not."""

    def made() -> tuple[ImmunityMoE, torch.optim.SGD]:
        torch.manual_seed(0)
        model = ImmunityMoE("resnet8", 2, 3, image_size=12)
        channels_last_(model)
        return model, torch.optim.SGD(model.parameters(), 0.1, 0.9, fused=True)

    def step(model: ImmunityMoE, optimizer: torch.optim.SGD) -> None:
        optimizer.zero_grad()
        model(torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        optimizer.step()

    model, optimizer = made()
    step(model, optimizer)
    other, resumed = made()
    other.load_state_dict(model.state_dict())
    copies = {name: value.contiguous() for name, value in optimizer_tensors("o", optimizer).items()}
    load_optimizer_tensors(resumed, under("o", copies))
    for one, two in ((model, optimizer), (other, resumed)):
        step(one, two)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert resumed.state[mine]["momentum_buffer"].stride() == mine.stride()
