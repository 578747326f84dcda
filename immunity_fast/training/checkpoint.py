"""Checkpoints: one safetensors file with weights, optimiser, random states and place in the run; nothing is unpickled.

Whoever kills the process leaves either the old checkpoint or the new one. What is read is checked by name, shape and
dtype before anything is made of it.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from immunity_fast.data import OWN
from immunity_fast.experts import split_names
from immunity_fast.experts.registry import check_trusted, repeated
from immunity_fast.models.described import expert_tensors
from immunity_fast.models.expert_list import ExpertList
from immunity_fast.models.moe import ImmunityMoE, SingleNetwork
from immunity_fast.models.noise import is_noise
from immunity_fast.runtime.files import abbreviated, is_number, parse_json, write_atomically
from immunity_fast.runtime.sharding import local
from immunity_fast.training.optimizers import NUMBERS, number, parameters_of
from immunity_fast.training.shards import REST, load_shards, newest, outline

FORMAT = 2
LAST = Path("checkpoints") / "last.safetensors"  # in a run folder
BEST = Path("checkpoints") / "best.safetensors"  # the model alone, as it did best under attack on validation images


def save_checkpoint(path: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Save tensors under their names, and `info`, which JSON can hold."""
    metadata = {"immunity_fast": json.dumps({"format": FORMAT} | info, sort_keys=True)}
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_atomically(path, save(copies, metadata))


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_checkpoint` saved, on the CPU.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        ValueError: it is not a whole checkpoint of this package, or `info` is not what `INFO` says.
    """
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        metadata = file.metadata()
    return tensors, _info(path, metadata)


def load_info(path: Path) -> dict[str, Any]:
    """`load_checkpoint`'s `info` of a run's checkpoint, without its tensors; errors are the same."""
    with _opened(path) as file:
        metadata = file.metadata()
    return checked_info(path, _info(path, metadata), "model", "data", "epoch", "step")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    with path.open("rb"):
        pass  # what cannot be opened is "no such file" to safetensors
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # safetensors' own and, of a strange dtype or size, nearly any of PyTorch's
        raise ValueError(f"{path}: not a whole checkpoint ({' '.join(str(error).split())})") from error


def _info(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        info = parse_json((metadata or {}).get("immunity_fast", ""))
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise ValueError(f"{path}: not a checkpoint of immunity_fast")
    if info.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: written by another version of immunity_fast; expected format {FORMAT}")
    return info


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_model(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() - {"stem", "channels", "gate", "noise"}
        == {"arch", "num_experts", "num_classes", "stage", "image_size"}
        and isinstance(value["arch"], str)
        and (value["stage"] is None or isinstance(value["stage"], str))
        and _is_count(value["num_experts"], 1)
        and _is_count(value["num_classes"], 2)
        and isinstance(value["image_size"], list)
        and len(value["image_size"]) == 2
        and all(_is_count(side, 1) for side in value["image_size"])
        and value.get("stem", "cifar") in ("cifar", "imagenet")
        and _is_count(value.get("channels", 3), 1)
        and value.get("gate", "switch") in ("switch", "uniform", "selection")
        and ("noise" not in value or is_noise(value["noise"]))
    )


def _is_weights(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"files", "sha256", "replaced", "perturbed", "perturbation"}
        and all(isinstance(value[name], list) for name in ("files", "sha256", "replaced", "perturbed"))
        and all(isinstance(text, str) for name in ("files", "sha256", "replaced") for text in value[name])
        and all(_is_count(index) for index in value["perturbed"])
        and is_number(value["perturbation"])
    )


def _is_monitored(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_number, value.values()))


# What a checkpoint says of its run, and whether a value can be that. Earlier versions wrote no "classes", "momenta" and
# "weights"; of a model they did not write "stem", which was "cifar", and "channels" is written where they are not 3.
# "stopped" is why a run ended before its last epoch.
INFO: dict[str, Callable[[Any], bool]] = {
    "model": _is_model,
    "data": lambda value: isinstance(value, str),
    "epoch": _is_count,
    "step": _is_count,
    "momenta": _is_count,
    "classes": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "weights": _is_weights,
    "stopped": lambda value: isinstance(value, str),
    "val_pgd10_accuracy_mean": lambda value: type(value) is float and 0 <= value <= 1,  # one of "monitored", too
    "monitored": _is_monitored,
    "callbacks": lambda value: isinstance(value, list) and all(isinstance(each, list) for each in value),
}


def checked_info(path: Path, info: dict[str, Any], *names: str) -> dict[str, Any]:
    """`info`, if these are in it and all in it is what `INFO` says.

    Raises:
        ValueError: it is not; by file and name.
    """
    for name in (*names, *(name for name in info if name in INFO)):
        if name not in info:
            raise ValueError(f"{path}: not a whole checkpoint: {name} is missing")
        if not INFO[name](info[name]):
            raise ValueError(f"{path}: not a whole checkpoint: {name} was {abbreviated(info[name])}")
    if "classes" in info and "model" in info and len(info["classes"]) != info["model"]["num_classes"]:
        raise ValueError(f"{path}: names {len(info['classes'])} of {info['model']['num_classes']} classes")
    return info


def check_classes(path: Path, info: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Check that a checkpoint names the classes of the data that it was trained on.

    Raises:
        ValueError: it names others; by file.
    """
    if "classes" in info and info["classes"] != list(classes):
        raise ValueError(
            f"{path}: names other classes than the data: {abbreviated(info['classes'])}, {abbreviated(list(classes))}"
        )


def check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str = "") -> None:
    """Check that two sets of tensors have the same names, each with the same shape and dtype.

    Raises:
        ValueError: they have not; by file and entry.
    """
    for name in sorted(expected.keys() | tensors.keys()):
        had, wanted = (f"{tuple(t[name].shape)}" if name in t else "none" for t in (tensors, expected))
        if had != wanted:
            raise ValueError(f"{path}: of another architecture: {prefix}{name}: expected shape {wanted}, got {had}")
        types = [str(t[name].dtype).removeprefix("torch.") for t in (tensors, expected)]
        if types[0] != types[1]:
            raise ValueError(f"{path}: {prefix}{name}: expected dtype {types[1]}, got {types[0]}")


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first of the tensors that holds NaN or an infinite number, if one does."""
    return next((name for name, tensor in tensors.items() if not bool(local(tensor).isfinite().all())), None)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same tensors by name, shape and value; both on one device."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        mine[name].shape == theirs[name].shape and bool((mine[name] == theirs[name]).all()) for name in mine
    )


def under(prefix: str, tensors: Mapping[str, Tensor], separator: str = "/") -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix/`, without it."""
    start = f"{prefix}{separator}"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers, each under `prefix/` and its name."""
    return {f"{prefix}/{name}": tensor for name, tensor in module.state_dict().items()}


def optimizer_tensors(
    prefix: str, optimizer: Optimizer, parameters: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """An optimiser's tensors, such as momentum, under `prefix/index/name`; its settings are the run's.

    Args:
        prefix: what their names begin with.
        optimizer: whose.
        parameters: its parameters, in the order in which they are numbered: a model's, since groups have another. None
            is the optimiser's own order.
    """
    return {
        f"{prefix}/{index}/{name}": value
        for index, parameter in enumerate(parameters_of(optimizer) if parameters is None else parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], parameters: Sequence[Tensor] | None = None
) -> None:
    """The inverse of `optimizer_tensors`, without its prefix.

    Raises:
        ValueError: a tensor of no parameter, or of another shape or dtype than its parameter: a fused optimiser would
            write beyond it. Or one that is to be a number of steps, and is none.
    """
    own = parameters_of(optimizer)
    parameters = own if parameters is None else parameters
    place = {id(parameter): index for index, parameter in enumerate(own)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition("/")
        if not (index.isdecimal() and str(int(index)) == index and int(index) < len(parameters)):
            raise ValueError(f"optimizer/{name}: expected a parameter's number below {len(parameters)}")
        parameter = parameters[int(index)]
        like = number() if key in NUMBERS else parameter
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            raise ValueError(
                f"optimizer/{name}: expected {like.dtype} of shape {tuple(like.shape)}, "
                f"got {value.dtype} of {tuple(value.shape)}"
            )
        if key == "step" and not 0 <= float(value) < math.inf:
            raise ValueError(f"optimizer/{name}: expected a number of steps, got {float(value)}")
        # A fused optimiser wants what belongs to a parameter in its layout, which may be channels-last.
        kept = value.clone() if key in NUMBERS else torch.empty_like(parameter).copy_(value)
        state.setdefault(place[id(parameter)], {})[key] = kept
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def load_module(path: Path, module: nn.Module, tensors: dict[str, Tensor], prefix: str = "") -> None:
    """Fill a module from a checkpoint's tensors.

    Raises:
        ValueError: names, shapes or dtypes are another's.
    """
    check_tensors(path, tensors, module.state_dict(), prefix)
    module.load_state_dict(tensors)


def model_file(path: str | os.PathLike[str]) -> Path:
    """What `load_model` takes: a file itself; of a run folder the best checkpoint, where there is one, or the last.

    Of a run whose weights are in shards, and have not been joined yet, the last is a folder.
    """
    path = Path(path)
    if path.is_dir() and path.name not in (BEST.name, LAST.name) and not (path / REST).is_file():  # no run folders
        joined = path / (BEST if (path / BEST).is_file() else LAST)
        path = joined if joined.is_file() else newest(path) or joined
    return path


def load_model(
    path: str | Path, device: torch.device | str = "cpu", *, trust_code: bool = False
) -> tuple[ImmunityMoE, dict[str, Any]]:
    """The model of a checkpoint (a file, or a run folder) in evaluation mode, and the run's information.

    Of a run folder that is the best checkpoint, where there is one, or else the last. Where weights were averaged, it
    has the average.

    Args:
        path: a checkpoint, or a run's folder.
        device: where the model is to be.
        trust_code: import what an architecture `module.path:callable` names, which runs that module's code.

    Raises:
        FileNotFoundError, ValueError: see `load_checkpoint`; or it would run code that is not trusted.
        ModuleNotFoundError: its architecture's library is not installed.
    """
    path = model_file(path)
    if (path / REST).is_file():
        return _load_joined(path, device, trust_code=trust_code)
    tensors, info = load_checkpoint(path)
    model, group, stored = _model_of(path, checked_info(path, info, "model")["model"], tensors, trust_code)
    load_module(path, model, stored, f"{group}/")
    return model.to(device).eval(), info


def _model_of(
    path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor], trust_code: bool
) -> tuple[ImmunityMoE, str, dict[str, Tensor]]:
    """The described model, with random weights; which of a checkpoint's groups it takes, the average's if there is one;
    and that group's tensors.

    Raises:
        ValueError: it cannot be made, would run code that is not trusted, or is not what the tensors are of.
    """
    if description["arch"] == OWN:
        raise ValueError(
            f"{path}: expected an architecture that has a name, got a network that only Python code has: "
            "Trainer.from_run(…, model=…) has it, or Trainer.load_weights"
        )
    check_trusted(path, description["arch"], trust_code)
    group = "ema" if under("ema", tensors) else "model"
    stored = under(group, tensors)
    check_experts(path, description, stored, f"{group}/")
    try:
        model = described_model(description)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: describes a model that cannot be made ({error})") from error
    return model, group, stored


def _load_joined(folder: Path, device: torch.device | str, *, trust_code: bool) -> tuple[ImmunityMoE, dict[str, Any]]:
    """`load_model` of a checkpoint in shards, which this process reads for itself."""
    info = load_info(folder / REST)
    model, group, stored = _model_of(folder, info["model"], outline(folder), trust_code)
    state = model.state_dict()
    if not isinstance(model.experts, ExpertList):  # each expert's part of the stack
        stack = under("experts", state, ".")
        state = {name: value for name, value in state.items() if not name.startswith("experts.")}
        state |= {f"experts.{i}.{name}": value[i] for name, value in stack.items() for i in range(model.num_experts)}
    check_tensors(folder, stored, state, f"{group}/")
    load_shards(folder, {f"{group}/{name}": value for name, value in state.items()}, alone=True)
    return model.to(device).eval(), info


def described_model(description: Mapping[str, Any], **options: Any) -> ImmunityMoE:
    """A model with random weights of what `info["model"]` says, checked: a mixture, or one network alone.

    Args:
        description: `info["model"]`.
        options: more of the model's.

    Raises:
        ValueError: it cannot be made.
    """
    arch, experts, classes = (description[name] for name in ("arch", "num_experts", "num_classes"))
    options |= {
        "stage": stages_of(description["stage"], arch, experts),
        "image_size": tuple(description["image_size"]),
        "stem": description.get("stem", "cifar"),
        "channels": description.get("channels", 3),
        "noise": description.get("noise"),
    }
    if experts == 1:
        return SingleNetwork(arch, classes, **options)
    return ImmunityMoE(arch, experts, classes, gate=description.get("gate", "switch"), **options)


def stages_of(stage: str | None, arch: str, num_experts: int) -> str | tuple[str, ...] | None:
    """The stage of each expert, where `stage` names several with commas between; else what it is.

    Args:
        stage: one for all experts, or one for each name of `arch`.
        arch: names with commas between.
        num_experts: N.

    Raises:
        ValueError: as many as there are names are neither one nor that.
    """
    if stage is None or "," not in stage:
        return stage
    stages, names = [part.strip() for part in stage.split(",")], split_names(arch)
    if len(stages) != len(names):
        raise ValueError(
            f"stage: expected one for all or {len(names)}, one for each of {', '.join(names)}, got {len(stages)}"
        )
    return repeated(stages, num_experts)


def check_experts(path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Check that the experts' tensors are the described model's: looked at before a wrong number of them fills memory.

    Args:
        description: `info["model"]`, checked.
        tensors: of the module, which are under `prefix` in the file.

    Raises:
        ValueError: they are not; by file.
    """
    stored = under("experts", tensors, ".")
    try:
        expected = expert_tensors(
            description["arch"],
            description["num_experts"],
            stored,
            num_classes=description["num_classes"],
            image_size=tuple(description["image_size"]),
            stem=description.get("stem", "cifar"),
            channels=description.get("channels", 3),
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: describes a model that cannot be made ({error})") from error
    check_tensors(path, stored, expected, f"{prefix}experts.")
