"""Image files as a model takes them, whatever their size and mode; needs Pillow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from immunity_fast.data.readers import IMAGE_EXTENSIONS


def find_pictures(places: Iterable[Path]) -> list[Path]:
    """The image files that are named, and of each folder those directly in it, sorted.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: no place, or a folder without an image.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = [
                file
                for file in sorted(place.iterdir(), key=os.fsencode)
                if file.suffix.lower() in IMAGE_EXTENSIONS and file.is_file() and not file.name.startswith(".")
            ]
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

    It is turned as its EXIF orientation says, what is transparent in it becomes white, and of an animation the first
    picture is taken. Where its size is another, it is scaled until it covers `size`, by bilinear resampling, and
    cropped to its centre, as training does with `--image-size`.

    Args:
        file: of any format and mode that Pillow reads, 16 bits a channel included.
        size: (H, W) of the model's images.
        channels: theirs: 3, or 1 for grey ones.

    Returns:
        ((channels, H, W) in [0, 1], a phrase such as "640×480 pixels, scaled and cropped to 32×32").

    Raises:
        ModuleNotFoundError: Pillow is not installed.
        ValueError: it cannot be read; by its name.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ModuleNotFoundError(f"reading images needs pillow: pip install pillow ({error})") from error
    if channels not in (1, 3):
        raise ValueError(f"channels: expected a model of images of 1 or 3 channels, got {channels}")
    height, width = size
    try:
        with Image.open(file) as opened:
            image = _upright_and_opaque(opened, Image, ImageOps)
            before = image.size
            if before != (width, height):
                image = ImageOps.fit(image, (width, height), method=Image.Resampling.BILINEAR)
            pixels = _pixels(image, channels)
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{file}: expected an image, got that it could not be read ({reason})") from error
    done = f"{before[0]}×{before[1]} pixels"
    return pixels, done if before == (width, height) else f"{done}, scaled and cropped to {width}×{height}"


def _upright_and_opaque(image: Any, pillow: Any, operations: Any) -> Any:
    """As it is to be looked at, on white, of mode RGB, or F for values in [0, 1] of what is deeper than 8 bits."""
    image.seek(0)
    image = operations.exif_transpose(image)
    if image.mode[0] in "IF":
        return pillow.fromarray(_deep(image))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        return pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _deep(image: Any) -> Any:
    """A grey image of more than 8 bits as float32 (H, W) in [0, 1]."""
    import numpy as np

    values = np.asarray(image).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not 0 <= low <= high <= 1:
            raise ValueError(f"its floating-point values are not in [0, 1], but from {low:g} to {high:g}")
        return values
    if not 0 <= low <= high <= 65535:
        raise ValueError(f"its values are not of 16 bits, but from {low:g} to {high:g}")
    return values / 65535


def _pixels(image: Any, channels: int) -> Tensor:
    import numpy as np

    if image.mode == "F":
        grey = torch.from_numpy(np.array(image)).clamp(0, 1)
        return grey.expand(channels, *grey.shape).contiguous()
    values = torch.from_numpy(np.array(image if channels == 3 else image.convert("L"))).float() / 255
    return values.permute(2, 0, 1).contiguous() if channels == 3 else values[None]
