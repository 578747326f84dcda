"""Image files as a model takes them, whatever their size and mode; needs Pillow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from immunity_fast.data import images


def find_pictures(places: Iterable[Path]) -> list[Path]:
    """The image files that are named, and of each folder those directly in it, sorted.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no place, or a folder without an image.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = [file for file in sorted(place.iterdir(), key=os.fsencode) if images.is_image_file(file)]
            if not inside:
                raise ValueError(f"{place}: expected images directly in this folder, got none")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise FileNotFoundError(f"{place}: there is no such image")
    if not found:
        raise ValueError("images: expected at least one, got none")
    return found


def read_picture(file: Path, size: tuple[int, int], channels: int = 3) -> tuple[Tensor, str]:
    """An image file as a model takes it, and what was done to it for that.

    As training does with `--image-size`, it is turned as its EXIF orientation says, what is transparent in it becomes
    white, of an animation the first picture is taken, and where its size is another, it is scaled until it covers
    `size`, by bilinear resampling, and cropped to its centre; see `data.images.read_image`.

    Args:
        file: of any format and mode that Pillow reads, 16 bits a channel included.
        size: (H, W) of the model's images.
        channels: theirs: 3, or 1 for grey ones.

    Returns:
        ((channels, H, W) in [0, 1], a phrase such as "640×480 pixels, scaled and cropped to 32×32").

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: see `read_image`.
    """
    import numpy as np

    height, width = size
    image, before = images.decode(file, size, channels)
    values = torch.from_numpy(np.array(image))
    pixels = values.clamp(0, 1) if image.mode == "F" else values.float() / 255
    pixels = pixels.expand(channels, *size) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    done = f"{before[1]}×{before[0]} pixels"
    return pixels.contiguous(), done if before == size else f"{done}, scaled and cropped to {width}×{height}"
