"""What an attack carries from step to step: the images that it still attacks, and the worst of each so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

FOR_GOOD = 2  # of an image that fools a model: it does, whatever a random model draws


class State(NamedTuple):
    """What a step needs of B images."""

    adversarial: Tensor  # (B, C, H, W) as they are now
    images: Tensor  # (B, C, H, W) as they were
    labels: Tensor  # (B,)
    targets: Tensor | None  # (B,)
    reference: Tensor | None  # (B, K) probabilities
    low: Tensor | None  # (B, C, H, W), of the Linf ball
    high: Tensor | None
    momentum: Tensor | None  # (B, C, H, W), of MIM
    eps: Tensor | None = None  # (B, 1, 1, 1), float64, where each image has a radius of its own
    alpha: Tensor | None = None  # likewise, of a step
    rows: Tensor | None = None  # (B,) which of the whole batch's images they are, for a model that wants to know

    def select(self, rows: Tensor) -> State:
        """Some of the images, by their indices (B′,)."""
        return State(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]


class Found(NamedTuple):
    """What one pass finds of B images, there and back."""

    gradient: Tensor  # (B, C, H, W) of the loss
    loss: Tensor  # (B,)
    fooled: Tensor  # (B,) bool: whether the attack has succeeded
    broken: Tensor  # (B,) bool: whether an output is no number
    classes: int  # K
    seen: Any = None  # what a model that can be observed has shown on the way


class Step(NamedTuple):
    """What a step makes of B images, and what it finds of them as they were."""

    adversarial: Tensor  # (B, C, H, W), moved
    momentum: Tensor | None  # (B, C, H, W)
    loss: Tensor  # (B,)
    fooled: Tensor  # (B,) bool: whether the attack has succeeded
    broken: Tensor  # (B,) bool: whether an output or the gradient is no number
    still: Tensor  # (B,) bool: whether the gradient is exactly zero
    classes: int  # K
    seen: Any = None  # as `Found` has it


class First:
    """What is found of clean images, kept for the next attack on the same objective that begins at them.

    Attributes:
        found: None as long as nobody has looked.
    """

    def __init__(self) -> None:
        self.found: Found | None = None


@dataclass
class Batch:
    """The images that are still attacked; `where` (B,) are their indices in the batch of `whole` images."""

    where: Tensor
    state: State
    whole: int

    def select(self, rows: Tensor) -> Batch:
        """Some of them, by their indices (B′,) in this batch."""
        if len(rows) == len(self.where):
            return self
        return Batch(self.where[rows], self.state.select(rows), self.whole)


class Worst:
    """The worst image so far of each: the most success (0, 1 or `FOR_GOOD`) before less; then the larger loss."""

    def __init__(self, images: Tensor, needed: bool) -> None:
        self.images = images.clone() if needed else images
        self.needed = needed
        self.loss = torch.full((len(images),), -math.inf, dtype=torch.float64, device=images.device)
        self.success = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def update(self, where: Tensor, images: Tensor, loss: Tensor, success: Tensor) -> None:
        """Take each image (B, C, H, W) that is worse than what is at its place `where` (B,)."""
        loss = loss.detach().double()
        before = self.success[where]
        worse = (success > before) | ((success == before) & (loss > self.loss[where]))
        self.images[where] = torch.where(worse[:, None, None, None], images, self.images[where])
        self.loss[where] = torch.where(worse, loss, self.loss[where])
        self.success[where] = torch.maximum(before, success)

    def survivors(self) -> Tensor:
        """Indices of the images that do not fool the model for good."""
        return (self.success < FOR_GOOD).nonzero()[:, 0]
