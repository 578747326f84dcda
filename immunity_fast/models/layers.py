"""Small parts of a mixture: normalisation and layout of images, and the axes of a stage's maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from immunity_fast.arguments import Layout, channels_back, channels_first


class Normalize(nn.Module):
    """(x − mean) / std per channel, for images (B, channels, H, W)."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean, std: expected as many, std positive, got {tuple(mean)} and {tuple(std)}")
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, of the same shape.

        Raises:
            ValueError: images of another number of channels.
        """
        if images.shape[-3] != self.mean.shape[0]:
            raise ValueError(f"images: expected shape (B, {self.mean.shape[0]}, H, W), got {tuple(images.shape)}")
        return (images - self.mean) / self.std


def channels_last(images: Tensor) -> Tensor:
    """Images (B, C, H, W) with their channels last in memory.

    Their gradient comes back contiguous, on which attacks of other libraries call `view`.
    """
    seen = torch.compiler.is_compiling() or is_functorch_wrapped_tensor(images)
    if images.requires_grad and torch.is_grad_enabled() and not seen:
        images = images.view_as(images)  # whose hook is nobody else's
        images.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
    return images.contiguous(memory_format=torch.channels_last)


class ToRead(nn.Module):
    """A stage's maps as (B, C, h, w)."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, maps: Tensor) -> Tensor:
        """A view of the maps as (B, C, h, w)."""
        return channels_first(maps, self.layout)


class FromRead(nn.Module):
    """The inverse of `ToRead`; a copy, where what follows would change the maps."""

    def __init__(self, layout: Layout, overwritten: bool) -> None:
        super().__init__()
        self.layout, self.overwritten = layout, overwritten

    def forward(self, maps: Tensor) -> Tensor:
        """Maps as the stage returned them."""
        back = channels_back(maps, self.layout)
        return back.clone() if self.overwritten else back


class NoChoice(nn.Module):
    """A gate's network where there is one expert alone."""

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1) of the only weight there is."""
        return images.new_zeros(len(images), 1)
