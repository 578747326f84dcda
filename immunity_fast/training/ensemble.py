"""Networks that were trained alone, as one mixture in a run folder of its own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from immunity_fast.experts import title
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.training.checkpoint import load_model, module_tensors, same_weights, save_checkpoint
from immunity_fast.training.run_folder import Run


def join(folders: Sequence[Path], out: Path) -> Run:
    """A run folder of the mixture of single networks, with equal weights.

    Args:
        folders: at least 2 runs of one network each, of one architecture, trained to their end on the same data.
        out: a new folder.

    Raises:
        ValueError, OSError: runs that do not go together or have not ended, a name that is taken.
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
        model, info = load_model(folder)
        trained = run.epochs_trained()
        if config.experts != 1:
            raise ValueError(f"{folder}: expected a run of one network, got {config.experts} experts")
        run.check_ended(trained)
        if infos:
            _check_alike(folder, info, folders[0], infos[0])
        for earlier, other in zip(folders, models, strict=False):
            if same_weights(model, other):
                raise ValueError(f"{folder}: the same network as {earlier}; a mixture of one network twice is no other")
        models.append(model)
        infos.append(info)
    description = infos[0]["model"] | {"num_experts": len(models)}
    mixture = ImmunityMoE(**description | {"image_size": tuple(description["image_size"])})
    with torch.no_grad():
        for name, tensor in mixture.state_dict().items():
            if name.startswith("experts."):
                tensor.copy_(torch.cat([model.state_dict()[name] for model in models]))
            elif name.startswith("normalize."):
                tensor.copy_(models[0].state_dict()[name])
        last_layer = list(mixture.gate.network.children())[-1]
        assert isinstance(last_layer, nn.Linear)
        last_layer.weight.zero_()  # softmax of zeros: each expert counts 1/N
        last_layer.bias.zero_()
    config = dataclasses.replace(first, experts=len(models))
    run = Run.create(out, config)
    try:
        info = infos[0] | {"model": description, "epoch": config.epochs}
        save_checkpoint(run.checkpoint, module_tensors("model", mixture), info)
    except BaseException:  # without its checkpoint it would only be in the way
        shutil.rmtree(run.folder, ignore_errors=True)
        raise
    return run


def _check_alike(folder: Path, info: dict[str, Any], first: Path, wanted: dict[str, Any]) -> None:
    """Check that two networks can be experts of one mixture.

    Raises:
        ValueError: they cannot; by what differs.
    """
    for name, words in (
        ("arch", "architecture"),
        ("num_classes", "number of classes"),
        ("image_size", "image size"),
        ("stage", "--stage"),
    ):
        if info["model"][name] != wanted["model"][name]:
            had, expected = (title(str(each["model"][name])) for each in (info, wanted))
            raise ValueError(f"{folder}: {words}: expected that of {first}, {expected}, got {had}")
    if info.get("classes") != wanted.get("classes"):
        raise ValueError(f"{folder}: trained on other classes than {first}")
    if info.get("data") != wanted.get("data"):
        raise ValueError(f"{folder}: trained on other data than {first}")
