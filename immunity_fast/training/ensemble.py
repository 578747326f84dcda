"""Networks that were trained alone, as one mixture in a run folder of its own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from immunity_fast.experts.registry import has_stems
from immunity_fast.models.gate import kind_of_gate
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.training.beginning import expert_tensors
from immunity_fast.training.checkpoint import (
    described_model,
    load_model,
    module_tensors,
    same_weights,
    save_checkpoint,
)
from immunity_fast.training.run_folder import Run


def join(folders: Sequence[Path], out: Path, *, trust_code: bool = False) -> Run:
    """A run folder of the mixture of single networks, with equal weights, and the gate of the first run's settings.

    Args:
        folders: at least 2 runs of one network each, of any architectures, trained to their end on the same data.
        out: a new folder.
        trust_code: import what an architecture `module.path:callable` names, which runs that module's code.

    Raises:
        ValueError, OSError: runs that do not go together or have not ended, a name that is taken, code that is not
            trusted.
    """
    if len(folders) < 2:
        raise ValueError(f"runs: expected at least 2, got {len(folders)}")
    Run.check_free(out)
    models: list[ImmunityMoE] = []
    infos: list[dict[str, Any]] = []
    first = Run.open(folders[0]).config()
    for folder in folders:
        run = Run.open(folder)
        config = run.config()
        model, info = load_model(folder, trust_code=trust_code)
        trained = run.epochs_trained()
        if config.experts != 1:
            raise ValueError(f"{folder}: expected a run of one network, got {config.experts} experts")
        run.check_ended(trained)
        if model.noise is not None:
            raise ValueError(f"{folder}: expected a run of a network without noise, got noise={model.noise}")
        if infos:
            _check_alike(folder, info, folders[0], infos[0])
        for earlier, other in zip(folders, models, strict=False):
            if same_weights(model, other):
                raise ValueError(f"{folder}: the same network as {earlier}; a mixture of one network twice is no other")
        models.append(model)
        infos.append(info)
    description = _description(folders, models, [info["model"] for info in infos])
    config = dataclasses.replace(
        first,
        arch=description["arch"],
        experts=len(models),
        stage=description["stage"],
        stem=description.get("stem", first.stem),
        weights=None,
    )
    if config.gate_kind != "switch":
        description["gate"] = config.gate_kind
    mixture = described_model(description)
    with torch.no_grad():
        for own, model in zip(expert_tensors(mixture), models, strict=True):
            for name, tensor in expert_tensors(model)[0].items():
                own[name].copy_(tensor)
        for name, tensor in mixture.normalize.state_dict().items():
            tensor.copy_(models[0].normalize.state_dict()[name])
        if kind_of_gate(mixture.gate) == "switch":  # of the others' weights each is 1/N from the beginning
            last_layer = list(mixture.gate.network.children())[-1]
            assert isinstance(last_layer, nn.Linear)
            last_layer.weight.zero_()  # softmax of zeros: each expert counts 1/N
            last_layer.bias.zero_()
    run = Run.create(out, config)
    try:
        info = {name: value for name, value in infos[0].items() if name != "weights"}
        info |= {"model": description, "epoch": config.epochs}
        save_checkpoint(run.checkpoint, module_tensors("model", mixture), info)
    except BaseException:  # without its checkpoint it would only be in the way
        shutil.rmtree(run.folder, ignore_errors=True)
        raise
    return run


def _description(
    folders: Sequence[Path], models: Sequence[ImmunityMoE], alone: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """`info["model"]` of the mixture.

    Raises:
        ValueError: two networks that would need stems of two forms.
    """
    archs, stages = [each["arch"] for each in alone], [each["stage"] for each in alone]
    stems = [each.get("stem", "cifar") if has_stems(each["arch"]) else None for each in alone]
    known = [stem for stem in stems if stem is not None]
    for folder, stem in zip(folders, stems, strict=True):
        if stem is not None and stem != known[0]:
            raise ValueError(f"{folder}: --stem: expected that of the networks before, {known[0]}, got {stem}")
    description = dict(alone[0]) | {"num_experts": len(models)}
    description.pop("stem", None)
    if "imagenet" in known:
        description["stem"] = "imagenet"
    if len(set(archs)) > 1 or len(set(stages)) > 1:
        description["arch"] = ",".join(archs)
        description["stage"] = ",".join(str(model.stage) for model in models) if len(set(stages)) > 1 else stages[0]
    return description


def _check_alike(folder: Path, info: dict[str, Any], first: Path, wanted: dict[str, Any]) -> None:
    """Check that two networks can be experts of one mixture.

    Raises:
        ValueError: they cannot; by what differs.
    """
    for name, words in (
        ("num_classes", "number of classes"),
        ("image_size", "image size"),
        ("channels", "channels of the images"),
    ):
        had, expected = (str(each["model"].get(name, 3)) for each in (info, wanted))
        if had != expected:
            raise ValueError(f"{folder}: {words}: expected that of {first}, {expected}, got {had}")
    if info.get("classes") != wanted.get("classes"):
        raise ValueError(f"{folder}: trained on other classes than {first}")
    if info.get("data") != wanted.get("data"):
        raise ValueError(f"{folder}: trained on other data than {first}")
