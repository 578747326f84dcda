"""Random crop, rotation and mirroring of a batch of images in one pass, on the device where the images are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample


def check_uint8(images: Tensor) -> None:
    """Check that images are stored as such are.

    Raises:
        TypeError: they are not.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected dtype torch.uint8, got {images.dtype}")


def to_float(images: Tensor) -> Tensor:
    """uint8 images of any shape as float32 in [0, 1].

    Raises:
        TypeError: images of another dtype.
    """
    check_uint8(images)
    return images.to(torch.float32) / 255


def as_float(images: Tensor) -> Tensor:
    """uint8 images as `to_float` has them, floating-point ones, which are in [0, 1] already, as float32."""
    return images.to(torch.float32) if images.is_floating_point() else to_float(images)


def augment(
    images: Tensor, generator: torch.Generator, *, padding: int = 4, degrees: float = 15.0, flip: bool = False
) -> Tensor:
    """Crop, rotate and perhaps mirror each image at random, by numbers of its own.

    Args:
        images: uint8 (B, C, H, W), on any device.
        generator: of the numbers, which are drawn on its device and from it alone.
        padding: pixels; each image is shifted by whole pixels, uniform in [−padding, padding] along each axis.
        degrees: each image is rotated about its centre by an angle uniform in [−degrees, degrees].
        flip: mirror half the images, left to right.

    Returns:
        float32 (B, C, H, W) in [0, 1], zero where a pixel comes from outside the image.

    Raises:
        TypeError: images that are not uint8.
        ValueError: images of another shape, a negative padding, or degrees outside [0, 180].
    """
    check_uint8(images)
    return apply_affine(images, draw_affine(len(images), generator, padding=padding, degrees=degrees, flip=flip))


def draw_affine(
    count: int, generator: torch.Generator, *, padding: int = 4, degrees: float = 15.0, flip: bool = False
) -> Tensor:
    """What `augment` does to `count` images, as `apply_affine` takes it.

    Args:
        count: images.
        generator, padding, degrees, flip: see `augment`.

    Returns:
        (5, count) float32 on the generator's device.

    Raises:
        ValueError: a negative padding, or degrees outside [0, 180].
    """
    if padding < 0:
        raise ValueError(f"padding: expected at least 0 pixels, got {padding}")
    if not 0 <= degrees <= 180:
        raise ValueError(f"degrees: expected 0 to 180, got {degrees}")
    device = generator.device
    shifts = torch.randint(-padding, padding + 1, (count, 2), generator=generator, device=device)
    angles = (2 * torch.rand(count, generator=generator, device=device) - 1) * degrees
    mirrored = torch.rand(count, generator=generator, device=device) < 0.5
    return _affine(shifts, angles, mirrored & flip)


def warp(images: Tensor, shifts: Tensor, degrees: Tensor, mirrored: Tensor) -> Tensor:
    """Move each image by given numbers: output(p) = input(c + shift + R(angle)·M·(p − c)), bilinear, zero outside.

    p and c, the image's centre, are in pixels, so that a rotation keeps its angles whatever the image's aspect. With
    an angle of 0 this is a crop of the padded image, mirrored where M asks for it, to float32's rounding of positions.

    Args:
        images: uint8 (B, C, H, W).
        shifts: whole pixels (B, 2), (down, right) of the crop's corner.
        degrees: (B,), counter-clockwise.
        mirrored: bool (B,).

    Returns:
        float32 (B, C, H, W) in [0, 1].

    Raises:
        TypeError: images that are not uint8.
        ValueError: images of another shape.
    """
    check_uint8(images)
    return apply_affine(images, _affine(shifts, degrees, mirrored))


def _affine(shifts: Tensor, degrees: Tensor, mirrored: Tensor) -> Tensor:
    """cos, sin, ±1, right and down, (5, B): one small tensor, which crosses to the images' device at once."""
    radians = torch.deg2rad(degrees.to(torch.float32))
    sign = 1 - 2 * mirrored.to(torch.float32)
    return torch.stack([radians.cos(), radians.sin(), sign, shifts[:, 1], shifts[:, 0]])


def apply_affine(images: Tensor, affine: Tensor) -> Tensor:
    """`warp` by numbers that `draw_affine` has drawn.

    Args:
        images: uint8 (B, C, H, W), or floating-point in [0, 1].
        affine: (5, B), on any device.

    Returns:
        float32 (B, C, H, W) in [0, 1], on the images' device.

    Raises:
        TypeError: images of another dtype.
        ValueError: images or numbers of another shape.
    """
    if images.ndim != 4 or (images.shape[3] in (1, 3) and images.shape[1] > 3):  # or with their channels last
        raise ValueError(f"images: expected shape (B, C, H, W), got {tuple(images.shape)}")
    if affine.shape != (5, len(images)):
        raise ValueError(f"affine: expected shape (5, {len(images)}), got {tuple(affine.shape)}")
    height, width = images.shape[2:]
    cos, sin, sign, right, down = affine.to(images.device, torch.float32)[:, :, None, None]
    # Offsets from the centre, in pixels. Not affine_grid: its matrix product would round them under autocast or TF32.
    x = (torch.arange(width, device=images.device, dtype=torch.float32) - (width - 1) / 2) * sign
    y = (torch.arange(height, device=images.device, dtype=torch.float32) - (height - 1) / 2)[:, None]
    grid = torch.stack([(cos * x - sin * y + right) * (2 / width), (sin * x + cos * y + down) * (2 / height)], dim=-1)
    moved = grid_sample(as_float(images), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved.clamp_(0, 1)  # bilinear weights may add up to a rounding error more than 1
