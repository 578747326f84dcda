"""A mixture whose weights lie in shards, one in each process: experts that are too large for one device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from immunity_fast.experts.registry import repeated
from immunity_fast.models.expert_list import ExpertList
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.runtime import sharding
from immunity_fast.runtime.failures import in_units
from immunity_fast.runtime.memory import total
from immunity_fast.training.checkpoint import LAST, load_model, module_tensors, save_checkpoint, under
from immunity_fast.training.shards import newest, outline

Model = TypeVar("Model", bound=ImmunityMoE)


def shard(model: Model, *, device: torch.device | str | None = None) -> Model:
    """Shard a mixture's weights over all processes by FSDP2, in place: each keeps 1/n of every weight.

    Each expert is a module of its own then (see `ImmunityMoE.list_experts_`), and so are its larger children: their
    weights are gathered where they are needed, and freed again. What the model is asked, `model(images)`,
    `model(images, labels)`, `model.expert_outputs`, it answers as before; all processes have to ask it the same, each
    with images of its own. A backward pass leaves the mean of the processes' gradients, in shards. The optimiser is to
    be made afterwards, of `model.parameters()`, one of PyTorch's own. BatchNorm's statistics stay whole, and each
    process' own: `runtime.distributed.average_buffers` makes them one.

    Args:
        model: with the same weights in each process; on the CPU, where its device has no room for all of it.
        device: where it is to be; None is where it is.

    Returns:
        The model.

    Raises:
        ValueError: there is no process group of `torch.distributed`, or it is sharded already.
        TypeError: it is no mixture of this package.
    """
    if not isinstance(model, ImmunityMoE):
        raise TypeError(f"model: expected an ImmunityMoE, got {type(model).__name__}")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError(
            "model: expected a process group to shard it over, got none; start the processes with torchrun, and call "
            "torch.distributed.init_process_group first"
        )
    if sharding.is_sharded(model):
        raise ValueError("model: expected whole weights, got a model that is in shards already")
    from torch.distributed.device_mesh import init_device_mesh

    place = next(model.parameters()).device if device is None else torch.device(device)
    model.list_experts_()
    mesh = init_device_mesh(place.type, (torch.distributed.get_world_size(),))
    assert isinstance(model.experts, ExpertList)
    for expert in model.experts:
        sharding.shard_network(expert, mesh)
    if any(True for _ in model.gate.parameters()):
        sharding.shard_network(model.gate, mesh)
    return model.to(place)


def join(run_folder: Path) -> str:
    """Write the model of a run whose weights are in shards as an ordinary checkpoint, checkpoints/last.safetensors.

    What reads runs reads the shards as well, each time anew. This process alone does it, and trusts the run's code.

    Args:
        run_folder: of the run.

    Returns:
        A line on what was done, or that the weights do not fit into this machine's memory and stay in shards.

    Raises:
        FileNotFoundError: there is no checkpoint in shards.
        ValueError, OSError: it cannot be read, or the file cannot be written.
    """
    folder = newest(run_folder)
    if folder is None:
        raise FileNotFoundError(f"{run_folder}: there is no checkpoint in shards")
    found = outline(folder)
    stored = under("ema", found) or under("model", found)
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    available = total(torch.device("cpu"))
    if available is not None and 2 * size > available:  # what is read, and the file's bytes
        return (
            f"the weights stay in shards, {folder}: to join them takes {in_units(2 * size)} of memory, and there are "
            f"{in_units(available)}"
        )
    model, info = load_model(folder, trust_code=True)
    save_checkpoint(run_folder / LAST, module_tensors("model", model), info)
    return f"the weights are joined in {run_folder / LAST} ({in_units(size)})"


def whole_tensors(model: ImmunityMoE, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All of a sharded model's tensors, on the CPU of the first process; all processes have to ask for them.

    Args:
        model: whose `state_dict` they are.
        tensors: others by the same names, such as an average; None is the model's own.

    Returns:
        By name, one after another gathered; in the other processes none.
    """
    found = {}
    for name, value in (model.state_dict() if tensors is None else tensors).items():
        gathered = sharding.whole(value)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            found[name] = gathered.cpu()
    return found


def as_ordinary(tensors: Mapping[str, Tensor], arch: str, stage: str | None, num_experts: int) -> dict[str, Tensor]:
    """A model's tensors by the names that they have where it is not in shards: experts of one structure are one stack.

    Args:
        tensors: whole ones, of each expert under `experts.0.…`, `experts.1.…`.
        arch, stage, num_experts: what the model is made of, see `TrainConfig`.
    """
    several = len(set(repeated(arch, num_experts))) > 1 or (stage is not None and len(set(stage.split(","))) > 1)
    if several:
        return dict(tensors)
    stacked = {name: value for name, value in tensors.items() if not name.startswith("experts.")}
    for name in tensors:
        if name.startswith("experts.0."):
            own = name.removeprefix("experts.0.")
            stacked[f"experts.{own}"] = torch.stack([tensors[f"experts.{i}.{own}"] for i in range(num_experts)])
    return stacked
