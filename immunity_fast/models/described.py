"""The tensors that the experts of a described mixture have, found before a wrong number of them fills memory."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from immunity_fast.experts import create
from immunity_fast.experts.registry import is_ours, repeated
from immunity_fast.experts.stems import Stem


def expert_tensors(
    arch: str,
    num_experts: int,
    stored: Collection[str],
    *,
    num_classes: int,
    image_size: tuple[int, int],
    stem: Stem,
    channels: int = 3,
) -> dict[str, Tensor]:
    """Name, shape and dtype of each tensor of a mixture's experts; next to no memory is taken, whatever is described.

    Args:
        arch: names with commas between, which take turns.
        num_experts: N, any number.
        stored: the names in the file, which tell whether the experts are one stack, (N, …) each, or a list, `0.…`.
        num_classes: K.
        image_size: (H, W).
        stem: of the architectures that have several.
        channels: of the images.

    Raises:
        ValueError, RuntimeError: such experts cannot be made, or are more than the file has tensors.
    """
    names = repeated(arch, min(num_experts, len(stored) + 1))
    made = {name: outline(name, num_classes, image_size, stem, channels).state_dict() for name in dict.fromkeys(names)}
    first = made[names[0]]
    if f"0.{next(iter(first), '')}" not in stored:
        return {key: value.new_empty(num_experts, *value.shape) for key, value in first.items()}
    if num_experts > len(stored):
        raise ValueError(
            f"num_experts: expected at most {len(stored)}, as many as there are tensors, got {num_experts}"
        )
    return {f"{index}.{key}": value for index, name in enumerate(names) for key, value in made[name].items()}


def outline(name: str, num_classes: int, image_size: tuple[int, int], stem: Stem, channels: int = 3) -> nn.Module:
    """A network without memory for its weights, or with, where its code needs that.

    Args:
        name: of its architecture.
        num_classes: K.
        image_size: (H, W).
        stem: of an architecture that has several.
        channels: of the images.

    Raises:
        ValueError, RuntimeError: it cannot be made.
    """
    try:
        with torch.device("meta"):
            return create(name, num_classes, stem=stem, image_size=image_size, channels=channels)
    except Exception:  # whatever it makes of a device that computes nothing
        if is_ours(name):
            raise
    return create(name, num_classes, stem=stem, image_size=image_size, channels=channels)
