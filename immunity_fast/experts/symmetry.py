"""Experts with equal weights never part: each gets the same images, the same gradient and the same step, for ever.

Where several begin from one checkpoint, something has to tell them apart: fresh heads, or a little noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

PERTURBATION = 0.01  # of each tensor's root mean square; chosen in docs/networks.md


def identical(networks: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """Which of some networks have equal weights: pairs (earlier, later) of their numbers, one for each later one.

    Two networks are compared by their parameters' names, shapes and values. Networks without parameters count as
    different.
    """
    return identical_tensors([dict(network.named_parameters()) for network in networks])


def identical_tensors(parameters: Sequence[Mapping[str, Tensor]]) -> list[tuple[int, int]]:
    """`identical` of the networks that these are the parameters of, by name."""
    pairs = []
    for later, own in enumerate(parameters):
        for earlier in range(later):
            if _are_equal(parameters[earlier], own):
                pairs.append((earlier, later))
                break
    return pairs


def perturb_(networks: Sequence[nn.Module], scale: float = PERTURBATION, seed: int = 0) -> None:
    """Add random noise to the parameters of all networks but the first, in place, so that equal ones part.

    Each value gets a normal deviate times `scale` and its tensor's root mean square: what is zero throughout stays so.

    Args:
        networks: whose weights may be equal.
        scale: how much, ≥ 0.
        seed: of the noise, which is drawn on the CPU: equal on all devices.

    Raises:
        ValueError: a negative scale.
    """
    perturb_tensors_([dict(network.named_parameters()) for network in networks], scale, seed)


@torch.no_grad()
def perturb_tensors_(parameters: Sequence[Mapping[str, Tensor]], scale: float, seed: int) -> None:
    """`perturb_` of the networks that these are the parameters of, by name.

    Raises:
        ValueError: a negative scale.
    """
    if not scale >= 0:
        raise ValueError(f"scale: expected a number of at least 0, got {scale}")
    generator = torch.Generator().manual_seed(seed)
    for own in parameters[1:]:
        for value in own.values():
            if value.is_floating_point() and value.numel():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                size = value.double().square().mean().sqrt()
                value.add_((scale * size * noise.to(value.device)).to(value.dtype))


def _are_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return (
        bool(one)
        and one.keys() == other.keys()
        and all(value.shape == other[name].shape and not value.is_meta for name, value in one.items())
        and all(bool((value == other[name]).all()) for name, value in one.items())
    )
