"""With what weights the experts of a run begin: from a file, and never equal to each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from immunity_fast.experts import split_names, title
from immunity_fast.experts.channels import adapted, is_stem
from immunity_fast.experts.registry import repeated
from immunity_fast.experts.symmetry import identical_tensors, perturb_tensors_
from immunity_fast.experts.weights import Fitted, WeightsFile, experts_of, fitted, read
from immunity_fast.models.expert_list import ExpertList
from immunity_fast.models.gate import kind_of_gate
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.training.config import TrainConfig


class Beginning(NamedTuple):
    """What was done to a new run's weights.

    Args:
        record: for the checkpoint, which JSON can hold; None if nothing was done.
        lines: the same for a person.
    """

    record: dict[str, Any] | None
    lines: list[str]


def begin(model: ImmunityMoE, config: TrainConfig) -> Beginning:
    """Give a new run's experts the weights of `config.weights`, and part those whose weights are equal.

    Args:
        model: with random weights, which are changed in place.
        config: the run's settings.

    Raises:
        ValueError: a file that cannot be read, or does not fit.
    """
    experts = expert_tensors(model)
    files: list[WeightsFile] = []
    lines: list[str] = []
    replaced: list[str] = []
    same = [[index] for index in range(len(experts))]  # which experts begin from one network's weights
    if config.weights is not None:
        files = read_all(config)
        if len(files) == 1 and files[0].mixture and len(experts_of(files[0])) > 1:
            lines, replaced = _load_mixture(model, files[0], config)
        else:
            lines, replaced, same = _load_networks(model, files, config)
    parameters = [_parameters(model, own, index) for index, own in enumerate(experts)]
    for earlier, later in identical_tensors(parameters):
        group = next(group for group in same if earlier in group)
        if later not in group:
            same = [each for each in same if later not in each]
            group.append(later)
    perturbed: list[int] = []
    for group in same:
        if len(group) > 1 and config.perturbation > 0:
            perturb_tensors_([parameters[index] for index in group], config.perturbation, config.seed + group[0])
            perturbed += group[1:]
    if perturbed:
        lines.append(
            f"expert{_plural(perturbed)} would begin as another does, and never part from it: noise of "
            f"{config.perturbation:g} of each weight's root mean square was added (seed {config.seed})"
        )
    for earlier, later in identical_tensors(parameters):
        lines.append(
            f"experts {earlier + 1} and {later + 1} begin with equal weights, and will never part: --perturbation "
            "above 0 parts them"
        )
    if not files and not perturbed:
        return Beginning(None, lines)
    record = {
        "files": [str(file.path) for file in files],
        "sha256": [file.sha256 for file in files],
        "replaced": replaced,
        "perturbed": perturbed,
        "perturbation": config.perturbation if perturbed else 0.0,
    }
    return Beginning(record, lines)


def expert_tensors(model: ImmunityMoE) -> list[dict[str, Tensor]]:
    """Each expert's parameters and buffers, by the names of a network alone; writing to them writes to the model."""
    if isinstance(model.experts, ExpertList):
        return [{name: value.detach() for name, value in expert.state_dict().items()} for expert in model.experts]
    state = model.experts.state_dict()
    return [{name: value.detach()[index] for name, value in state.items()} for index in range(model.num_experts)]


def read_all(config: TrainConfig) -> list[WeightsFile]:
    """The files of `config.weights`: one, or one for each architecture with commas between.

    Raises:
        ValueError: one cannot be read, or there are as many as fits nothing.
    """
    assert config.weights is not None
    names = split_names(config.arch)
    paths = [config.weights]
    if len(names) > 1 and "," in config.weights and not os.path.exists(os.path.expanduser(config.weights)):
        paths = [part.strip() for part in config.weights.split(",")]
    if len(paths) not in (1, len(names)):
        raise ValueError(
            f"--weights: expected one file or {len(names)}, one for each of {', '.join(names)}, got {len(paths)}"
        )
    try:
        return [read(path) for path in paths]
    except ValueError as error:
        raise ValueError(f"--weights: {error}") from error


def _load_mixture(model: ImmunityMoE, file: WeightsFile, config: TrainConfig) -> tuple[list[str], list[str]]:
    """All experts' and, where it fits, those that the gate has learned: votes that are fixed begin as equals."""
    given, own = experts_of(file), expert_tensors(model)
    if len(given) != len(own):
        raise ValueError(f"--weights: {file.path}: expected a mixture of {len(own)} experts, got {len(given)}")
    names, replaced = repeated(config.arch, len(own)), []
    head = None
    for name, tensors, expert in zip(names, given, own, strict=True):
        fits = _fitted(file._replace(tensors=tensors), name, expert, model)
        _write(expert, fits.tensors)
        replaced += [each for each in fits.replaced if each not in replaced]
        head = fits if fits.replaced or fits.adapted else head
    gate = {name.removeprefix("gate."): value for name, value in file.tensors.items() if name.startswith("gate.")}
    mine = model.gate.state_dict()
    for name, value in mine.items():
        if name in gate and is_stem(value, gate[name], model.channels):
            gate[name] = adapted(gate[name], model.channels)
    fitting = (
        kind_of_gate(model.gate) == "switch"
        and gate.keys() == mine.keys()
        and all(gate[name].shape == value.shape for name, value in mine.items())
    )
    if fitting:
        _write(mine, gate)
    what = "and the gate begin" if fitting else "begin"
    return [_line(f"the {len(own)} experts {what}", file, head, model)], replaced


def _load_networks(
    model: ImmunityMoE, files: list[WeightsFile], config: TrainConfig
) -> tuple[list[str], list[str], list[list[int]]]:
    """Each architecture's file into all experts of it."""
    own, names = expert_tensors(model), split_names(config.arch)
    lines, replaced, same = [], [], []
    for index, name in enumerate(names):
        file = files[min(index, len(files) - 1)]
        if file.mixture:
            alone = experts_of(file)
            if len(alone) != 1:
                raise ValueError(
                    f"--weights: {file.path}: expected the weights of one network, got a mixture of {len(alone)}"
                )
            file = file._replace(tensors=alone[0], mixture=False)
        group = list(range(index, len(own), len(names)))
        for number in group:
            fits = _fitted(file, name, own[number], model)
            _write(own[number], fits.tensors)
        replaced += [each for each in fits.replaced if each not in replaced]
        begins = f"{title(name, len(group))} begins" if len(group) == 1 else f"{title(name, len(group))} begin"
        lines.append(_line(begins, file, fits, model))
        same.append(group)
    return lines, replaced, same


def _fitted(file: WeightsFile, name: str, own: Mapping[str, Tensor], model: ImmunityMoE) -> Fitted:
    try:
        return fitted(file, title(name), own, model.num_classes, model.channels)
    except ValueError as error:
        raise ValueError(f"--weights: {error}") from error


@torch.no_grad()
def _write(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    for name, value in given.items():
        own[name].copy_(value)


def _parameters(model: ImmunityMoE, own: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    holder = model.experts[index] if isinstance(model.experts, ExpertList) else model.experts
    return {name: own[name] for name, _ in holder.named_parameters()}


def _line(who: str, file: WeightsFile, fits: Fitted | None, model: ImmunityMoE) -> str:
    line = f"{who} from {file.path} (sha256 {file.sha256[:12]}…)"
    if fits is not None and fits.replaced:
        had = f"of {fits.classes} classes" if fits.classes else "that it does not have"
        line += f"; its classifier head {had} is replaced by a fresh one of "
        line += f"{model.num_classes} ({', '.join(fits.replaced)})"
    if fits is not None and fits.adapted:
        how = "summed to" if model.channels == 1 else "spread over"
        line += f"; its first convolution, of {fits.channels} channels, is {how} {model.channels} ({fits.adapted})"
    return line


def _plural(indices: list[int]) -> str:
    """Numbers of experts from 1, after the word "expert"."""
    numbers = [str(index + 1) for index in indices]
    return f" {numbers[0]}" if len(numbers) == 1 else f"s {', '.join(numbers[:-1])} and {numbers[-1]}"
