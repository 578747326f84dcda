"""Networks for images of other channels than three: what becomes of their first convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def adapted(weight: Tensor, channels: int) -> Tensor:
    """The weight of a first convolution for images of another number of channels, as timm has it.

    For grey images the weights of all channels are summed: the network then answers to a grey picture what it answered
    to that picture repeated in each channel. From grey to C channels each gets the weight's C-th part, which answers
    the same. From 3 to another number C the three are repeated, and multiplied by 3/C.

    Args:
        weight: (O, C', h, w).
        channels: C.

    Raises:
        ValueError: C' is neither 1 nor 3.
    """
    had = weight.shape[1]
    if channels == had:
        return weight
    if had not in (1, 3):
        raise ValueError(f"weight: expected one for images of 1 or 3 channels, got {had}")
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, math.ceil(channels / had), 1, 1)[:, :channels]
    return repeated * (had / channels)


def adapt_(network: nn.Module, channels: int) -> nn.Module:
    """Make a network for images of 3 channels one for another number, in place; returns it.

    Its first convolution that takes 3 channels gets the weight that `adapted` gives.

    Args:
        network: any.
        channels: C.

    Raises:
        ValueError: it has no such convolution.
    """
    first = next((part for part in network.modules() if isinstance(part, nn.Conv2d) and part.in_channels == 3), None)
    if first is None or first.groups != 1:
        raise ValueError(f"channels: expected 3 for a network without a convolution of 3 channels, got {channels}")
    with torch.no_grad():
        weight = adapted(first.weight, channels).contiguous()
    first.in_channels = channels
    first.weight = nn.Parameter(weight, requires_grad=first.weight.requires_grad)
    return network


def is_stem(own: Tensor, given: Tensor, channels: int) -> bool:
    """Whether a weight of a file differs from a network's in the channels of the images alone, and can be adapted.

    Args:
        own: the network's, of images of `channels` channels.
        given: the file's.
        channels: C.
    """
    return (
        own.dim() == given.dim() == 4
        and own.shape[1] == channels != given.shape[1]
        and given.shape[1] in (1, 3)
        and (own.shape[0], *own.shape[2:]) == (given.shape[0], *given.shape[2:])
    )
