"""Checkpoints: one safetensors file with weights, optimiser, random states and place in the run; nothing is unpickled.

A file is written beside its name, flushed to the disk and then renamed: whoever kills the process leaves either the old
checkpoint or the new one.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from immunity_fast.model import ImmunityMoE, SingleNetwork

FORMAT = 2
LAST = Path("checkpoints") / "last.safetensors"  # in a run folder
BEST = Path("checkpoints") / "best.safetensors"  # the model alone, as it did best under attack on validation images


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` only ever holds all of it; OSError, and `path` as it was, where that fails."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name its file


def save_checkpoint(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Save tensors under their names, and `info`, which JSON can hold."""
    metadata = {"immunity_fast": json.dumps({"format": FORMAT} | info, sort_keys=True)}
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(copies, metadata))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_checkpoint` saved, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a whole checkpoint of this package.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get("immunity_fast")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole checkpoint ({error})") from error
    try:
        info = json.loads(metadata or "")
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise ValueError(f"{path}: not a checkpoint of immunity_fast")
    if info.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: written by another version of immunity_fast; expected format {FORMAT}")
    return tensors, info


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, without it."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's state under `prefix/`."""
    return {f"{prefix}/{name}": tensor for name, tensor in module.state_dict().items()}


def optimizer_tensors(prefix: str, optimizer: Optimizer) -> dict[str, Tensor]:
    """An optimiser's tensors, such as momentum, under `prefix/index/name`; its numbers are the run's settings."""
    return {
        f"{prefix}/{index}/{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, without its prefix."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split("/")
        parameter = parameters[int(index)]
        # A fused optimiser wants what belongs to a parameter in its layout, which may be channels-last.
        laid_out = torch.empty_like(parameter, dtype=value.dtype) if value.shape == parameter.shape else value
        state.setdefault(int(index), {})[key] = laid_out.copy_(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_module(path: Path, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fill a module from a checkpoint's tensors; ValueError where names or shapes are another architecture's."""
    own = module.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        had, wanted = (f"{tuple(t[name].shape)}" if name in t else "none" for t in (tensors, own))
        if had != wanted:
            raise ValueError(f"{path}: of another architecture: {name} has shape {had}, expected {wanted}")
    module.load_state_dict(tensors)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[ImmunityMoE, dict[str, Any]]:
    """The model of a checkpoint (a file, or a run folder) in evaluation mode, and the run's information.

    Of a run folder that is the best checkpoint, where there is one, or else the last. Where weights were averaged, it
    has the average.

    Raises:
        FileNotFoundError, ValueError: see `load_checkpoint`.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (BEST if (path / BEST).is_file() else LAST)
    tensors, info = load_checkpoint(path)
    description = info["model"] | {"image_size": tuple(info["model"]["image_size"])}
    if description["num_experts"] == 1:
        del description["num_experts"]
        model: ImmunityMoE = SingleNetwork(**description)
    else:
        model = ImmunityMoE(**description)
    load_module(path, model, under("ema", tensors) or under("model", tensors))
    return model.to(device).eval(), info
