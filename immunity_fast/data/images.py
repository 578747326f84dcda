"""Image files, and pictures that somebody has in memory, as arrays of the channels that are wanted; needs Pillow.

What a picture is read as depends on it alone, so a training that holds all images, one whose worker processes read them
as they are needed, and a model in use see the same values.
"""

from __future__ import annotations

import io
import os
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from immunity_fast.runtime.failures import readable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

# What is read: a file's name, its content, an open binary file, or a picture of Pillow's.
Source: TypeAlias = "str | os.PathLike[str] | bytes | IO[bytes] | Image.Image"
Size: TypeAlias = "int | tuple[int, int]"

CHANNELS = (1, 3)  # grey, and red, green and blue
IMAGE_EXTENSIONS = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"}
    | {".tga", ".tif", ".tiff", ".webp"}
)
_ORIENTATION = 0x0112  # EXIF's tag
_WITH_ORIENTATION = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow looks for it
# How a picture that is stored so is brought upright: members of Pillow's Transpose. 1 is upright.
_UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# ITU-R 601-2: 0.299 R + 0.587 G + 0.114 B in 16 bits after the point, as Pillow has it, so that the bits are the same.
_LUMA = (19595, 38470, 7471)


class Picture(NamedTuple):
    """A picture that was read.

    Args:
        image: of mode RGB or L, or F for values in [0, 1] of what is deeper than 8 bits.
        stored: (H, W) that it had, upright, before it was scaled and cropped.
    """

    image: Image.Image
    stored: tuple[int, int]


def read_image(
    source: Source, image_size: Size | None = None, channels: int = 3, *, name: str | None = None
) -> NDArray[np.uint8]:
    """A picture as 8-bit values, upright and opaque.

    * It is turned as its EXIF orientation says.
    * What is transparent in it is composited over white, as a page shows it.
    * Of an animation, and of a file of several pages, the first picture is taken.
    * With `channels=1` it becomes grey by ITU-R 601: 0.299 R + 0.587 G + 0.114 B.
    * Grey values of 16 bits, and floating-point ones in [0, 1], are scaled to 8 bits and not clipped.

    Args:
        source: a file's name, its content as bytes, an open binary file, or a picture of Pillow's.
        image_size: pixels, of a square's side or (H, W): the picture is scaled until it just covers them, by bilinear
            resampling, and cropped to its centre. None keeps its size.
        channels: 3 (RGB) or 1 (grey).
        name: what errors call it; by default the file's name, or "image".

    Returns:
        (H, W, channels), uint8, its own memory.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: Pillow is not installed.
        ValueError: it cannot be read, or a wrong argument; one line that names it.
    """
    import numpy as np

    image = decode(source, image_size, channels, name=name).image
    values = np.array(image)
    if image.mode == "F":
        values = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    pixels: NDArray[np.uint8] = values if values.ndim == 3 else values[..., None]
    return pixels if pixels.shape[-1] == channels else pixels.repeat(channels, axis=-1)


def decode(source: Source, image_size: Size | None = None, channels: int = 3, *, name: str | None = None) -> Picture:
    """As `read_image`, before its values become 8-bit ones.

    Args:
        source, image_size, channels, name: see `read_image`.

    Raises:
        FileNotFoundError, ModuleNotFoundError, ValueError: see `read_image`.
    """
    check_channels(channels)
    size = _checked_size(image_size)
    pillow, operations = _pillow()
    called = name if name is not None else _name(source)
    given: Any = source
    if not isinstance(given, (str, os.PathLike, bytes, bytearray, memoryview, pillow.Image)) and not hasattr(
        given, "read"
    ):
        raise TypeError(
            f"{called}: expected a file, its content or a picture of Pillow's, got {type(given).__name__}; of an array "
            "PIL.Image.fromarray makes a picture"
        )
    try:
        opened = _opened(source, pillow)
        with nullcontext() if opened is source else opened:  # which closes the file that Pillow opened, no other
            image = _converted(_upright(opened, pillow), channels, pillow)
        stored = (image.height, image.width)
        if size is not None and stored != size:
            image = operations.fit(image, (size[1], size[0]), method=pillow.Resampling.BILINEAR)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{called}: there is no such image") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise ValueError(
            f"{called}: expected an image, got that it could not be read ({_reason(error, source, pillow)})"
        ) from error
    return Picture(image, stored)


def check_channels(channels: int, what: str = "image files") -> None:
    """Check that pictures can have so many channels.

    Args:
        channels: C.
        what: is read, for the message.

    Raises:
        ValueError: they cannot.
    """
    if channels not in CHANNELS:
        raise ValueError(f"channels: expected 3 (RGB) or 1 (grey) for {what}, got {channels}")


def is_image_file(file: Path) -> bool:
    """Whether a file is taken for an image: by its extension, in any case; none whose name begins with a dot."""
    return file.suffix.lower() in IMAGE_EXTENSIONS and not file.name.startswith(".") and file.is_file()


def to_grey(images: Tensor) -> Tensor:
    """Grey images of coloured ones, by ITU-R 601: 0.299 R + 0.587 G + 0.114 B, the very bits that Pillow gives.

    Args:
        images: (..., 3, H, W), uint8; of one channel they are returned as they are.

    Returns:
        (..., 1, H, W), uint8.
    """
    if images.shape[-3] == 1:
        return images
    red, green, blue = (channel.int() * weight for channel, weight in zip(images.unbind(-3), _LUMA, strict=True))
    return ((red + green + blue + 0x8000) >> 16).to(torch.uint8).unsqueeze(-3)


def _pillow() -> tuple[Any, Any]:
    """Pillow's `Image` and `ImageOps`."""
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise ModuleNotFoundError(f"reading images needs pillow: pip install pillow ({error})") from error
    return PIL.Image, PIL.ImageOps


def _checked_size(size: Size | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {size}")
    return height, width


def _name(source: Source) -> str:
    """What errors call it."""
    if isinstance(source, (str, os.PathLike)):
        return readable(os.fspath(source))
    named = getattr(source, "name", None) or getattr(source, "filename", None)
    return readable(named) if isinstance(named, str) else "image"


def _opened(source: Source, pillow: Any) -> Any:
    if isinstance(source, pillow.Image):
        return source
    return pillow.open(io.BytesIO(source) if isinstance(source, (bytes, bytearray, memoryview)) else source)


def _upright(image: Any, pillow: Any) -> Any:
    """Its first picture, turned as its EXIF orientation says; as it lies, where that says nothing that can be read."""
    if getattr(image, "is_animated", False):
        image.seek(0)
    image.load()
    if image.format == "TIFF":  # which Pillow has turned while it loaded, as an old one forgets to say
        return image
    if image.info.keys().isdisjoint(_WITH_ORIENTATION) and not getattr(image, "_exif", None):  # saves some microseconds
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF, of a picture that is whole
        return image
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if method is None:
        return image
    return image.transpose(pillow.Transpose[method])


def _converted(image: Any, channels: int, pillow: Any) -> Any:
    """Of mode RGB or L, on white; or of mode F, for what is deeper than 8 bits, which Pillow would clip at 255."""
    if image.mode[0] in "IF":
        return _deep(image, pillow)
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert(image.mode.replace("a", "A"))
    if "A" in image.mode or "transparency" in image.info:
        # A grey one by way of RGBA, too: it comes back as the greys that it had.
        image = image.convert("RGBA")
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image)
    if channels == 1 and image.mode not in ("1", "L", "RGB", "RGBA"):
        image = image.convert("RGB")  # palettes, CMYK and others have no shorter way that is exact
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _deep(image: Any, pillow: Any) -> Any:
    """A grey image of more than 8 bits as float32, in [0, 1]."""
    import numpy as np

    values = np.asarray(image).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not 0 <= low <= high <= 1:
            raise ValueError(f"its floating-point values are not in [0, 1], but from {low:g} to {high:g}")
        return pillow.fromarray(values)
    if not 0 <= low <= high <= 65535:
        raise ValueError(f"its values are not of 16 bits, but from {low:g} to {high:g}")
    return pillow.fromarray(values / 65535)


def _reason(error: Exception, source: Source, pillow: Any) -> str:
    """Why it could not be read, in one short line."""
    # Pillow's words for what it does not know are an object's representation.
    unknown = type(error).__name__ == "UnidentifiedImageError"
    extension = os.path.splitext(_name(source))[1].lower()
    if unknown and extension in IMAGE_EXTENSIONS and not _readable(extension, pillow):
        return f"this Pillow, {pillow.__version__}, reads no {extension}"
    if unknown:
        return "its content is of no format that Pillow knows"
    return shorten(str(error), 200, placeholder=" …") or type(error).__name__


def _readable(extension: str, pillow: Any) -> bool:
    """Whether this Pillow reads files of one of `IMAGE_EXTENSIONS`: some formats are built into it or not."""
    from PIL import features

    pillow.init()
    optional = extension[1:]
    return extension in pillow.EXTENSION and (optional not in features.modules or bool(features.check(optional)))
