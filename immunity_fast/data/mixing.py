"""MixUp and CutMix of a batch (arXiv 1710.09412 and 1905.04899), drawn and applied as torchvision's `transforms.v2` do.

Each image is mixed with the one before it in the batch, the first with the last. How is six numbers, drawn on the CPU:
applying them is part of a compiled step, and waits for nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from immunity_fast.runtime.checks import check_weight
from immunity_fast.targets import check_ignore_index

NUMBERS = 6  # of a batch: the image's weight in the box, the box (top, bottom, left, right), λ of the targets


class Mixer:
    """Draws how batches are mixed, from a generator of its own.

    Args:
        mixup: α of MixUp's Beta(α, α); 0 is none.
        cutmix: α of CutMix's; 0 is none. With both each batch has one of them, as likely as the other.
        image_size: (H, W).
        seed: of the numbers, which are the same in all processes.

    Raises:
        ValueError: an α that is negative or not finite.
        TypeError: no number.
    """

    def __init__(self, mixup: float, cutmix: float, image_size: tuple[int, int], seed: int) -> None:
        check_weight("mixup", mixup)
        check_weight("cutmix", cutmix)
        self.mixup, self.cutmix, self.image_size = float(mixup), float(cutmix), image_size
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def active(self) -> bool:
        """Whether anything is mixed."""
        return self.mixup > 0 or self.cutmix > 0

    def draw(self) -> Tensor | None:
        """How the next batch is mixed, as `apply_mixing` takes it; None where nothing is."""
        return draw_mixing(self._generator, self.image_size, mixup=self.mixup, cutmix=self.cutmix)

    def state(self) -> Tensor:
        """Everything that the batches to come depend on."""
        return self._generator.get_state()

    def load_state(self, state: Tensor) -> None:
        """Take up where `state` was taken."""
        self._generator.set_state(state)


def draw_mixing(
    generator: torch.Generator, image_size: tuple[int, int], *, mixup: float = 0.0, cutmix: float = 0.0
) -> Tensor | None:
    """What `MixUp(alpha=mixup)`, `CutMix(alpha=cutmix)`, or a `RandomChoice` of both, of torchvision would draw.

    Args:
        generator: of the numbers, on the CPU.
        image_size: (H, W).
        mixup, cutmix: see `Mixer`.

    Returns:
        (6,) float32 on the CPU; None where nothing is mixed.
    """
    kinds = [kind for kind, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha > 0]
    if not kinds:
        return None
    # PyTorch's Beta takes no generator: it draws from the default one, which gets its state back.
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        kind = kinds[int(torch.multinomial(torch.tensor([0.5, 0.5]), 1))] if len(kinds) > 1 else kinds[0]
        alpha = torch.tensor([mixup if kind == "mixup" else cutmix])
        share = float(torch.distributions.Beta(alpha, alpha).sample(()))
        height, width = image_size
        if kind == "mixup":
            numbers = [share, 0, height, 0, width, share]
        else:
            numbers = [0.0, *_box(share, height, width)]
            numbers.append(1 - (numbers[2] - numbers[1]) * (numbers[4] - numbers[3]) / (height * width))
        generator.set_state(torch.get_rng_state())
    finally:
        torch.set_rng_state(before)
    return torch.tensor(numbers, dtype=torch.float32)


def _box(share: float, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of the area 1 − λ about a random pixel, where the image ends cut off."""
    column, row = int(torch.randint(width, size=(1,))), int(torch.randint(height, size=(1,)))
    half = 0.5 * math.sqrt(1 - share)
    down, across = int(half * height), int(half * width)
    return max(row - down, 0), min(row + down, height), max(column - across, 0), min(column + across, width)


def apply_mixing(
    images: Tensor, targets: Tensor, mixing: Tensor, classes: int, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mix each image and its target with those before it in the batch.

    Args:
        images: (B, C, H, W) floating-point.
        targets: (B,) integers or (B, K) probabilities.
        mixing: (6,), of `draw_mixing`, on the images' device.
        classes: K.
        ignore_index: of samples without a target. What is mixed with one has none, too, unless nothing of it is seen.

    Returns:
        Images (B, C, H, W) and probabilities (B, K), of which rows without a target are all `ignore_index`.
    """
    check_ignore_index(ignore_index)
    weight, top, bottom, left, right, share = mixing.unbind()
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    own = torch.where(inside, weight, 1).to(images.dtype)
    mixed = own * images + (1 - own) * images.roll(1, 0)
    soft = targets.dim() == 2
    if soft:
        target = targets.to(torch.promote_types(targets.dtype, torch.float32))
    else:
        target = (targets[:, None] == torch.arange(classes, device=targets.device)).to(mixing.dtype)
    share = share.to(target.dtype)
    if ignore_index is None:
        return mixed, share * target + (1 - share) * target.roll(1, 0)
    unknown = (targets == ignore_index).all(-1) if soft else targets == ignore_index
    target = torch.where(unknown[:, None], 0, target)
    hidden = (unknown & (share > 0)) | (unknown.roll(1, 0) & (share < 1))
    mixed_target = share * target + (1 - share) * target.roll(1, 0)
    return mixed, torch.where(hidden[:, None], float(ignore_index), mixed_target)
