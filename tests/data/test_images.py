"""Image files become the same values whatever they are stored as, and what cannot be read is one line."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from immunity_fast.data.images import IMAGE_EXTENSIONS, read_image, to_grey

np = pytest.importorskip("numpy", reason="images are arrays")
Image = pytest.importorskip("PIL.Image", reason="the reader of images")

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: Any, kind: str = "png", mode: str | None = None, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    stream = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(stream, kind, **options)
    return stream.getvalue()


def with_orientation(value: Any) -> Any:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


# What each orientation of EXIF stores, of a picture that is upright: how its rows and columns lie.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[::-1],  # row 0 is the visual right-hand side, column 0 the visual top
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", STORED)
def test_it_is_turned_as_exif_says(orientation: int, kind: str) -> None:
    upright = noise(5, 8, 3)
    stored = np.ascontiguousarray(STORED[orientation](upright))
    options = {"lossless": True} if kind == "webp" else {}
    content = encoded(stored, kind, exif=with_orientation(orientation), **options)
    found = read_image(content)
    assert found.dtype == np.uint8
    assert np.array_equal(found, upright)
    assert found.flags.writeable


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_there_is_not_leaves_it_as_it_lies(orientation: int) -> None:
    pixels = noise(5, 8, 3)
    assert np.array_equal(read_image(encoded(pixels, exif=with_orientation(orientation))), pixels)


def test_damaged_exif_of_a_whole_picture_is_passed_over() -> None:
    pixels = noise(5, 8, 3)
    assert np.array_equal(read_image(encoded(pixels, exif=b"Exif\x00\x00MM\x00*\x00\x00")), pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P with bytes", "P with an index", "RGB with a colour"])
def test_what_is_transparent_is_composited_over_white(mode: str, channels: int) -> None:
    grey = noise(8, 8) // 16 * 16
    alpha = np.array([0, 255, 128, 1] * 16, dtype=np.uint8).reshape(8, 8)
    options: dict[str, Any] = {}
    kind = "png"
    if mode == "RGBA":
        image = Image.fromarray(np.dstack([grey, grey, grey, alpha]))
    elif mode in ("LA", "PA"):
        image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).convert(mode)
        kind = "png" if mode == "LA" else "tiff"
        if mode == "PA":
            kind, alpha = "tiff", np.asarray(image.getchannel("A"))
    else:
        alpha = np.where(grey == grey[0, 0], 0, 255).astype(np.uint8)
        if mode.startswith("P"):
            image = Image.frombytes("P", (8, 8), (grey // 16).tobytes())
            image.putpalette([16 * value for value in range(16) for _ in range(3)])
            index = int(grey[0, 0]) // 16
            entries = bytes(0 if value == index else 255 for value in range(16))
            options = {"transparency": entries if mode.endswith("bytes") else index}
        else:
            image = Image.fromarray(np.dstack([grey] * 3))
            options = {"transparency": (int(grey[0, 0]),) * 3}
    expected = np.rint(255 + (grey - 255.0) * (alpha / 255.0))
    found = read_image(encoded(image, kind, **options), channels=channels)
    assert found.shape == (8, 8, channels)
    assert np.abs(found - expected[..., None]).max() <= 1, "8-bit compositing rounds once more"
    assert np.array_equal(found[alpha == 0], np.full_like(found[alpha == 0], 255))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_the_channels_that_are_wanted(mode: str, channels: int) -> None:
    black_and_white = np.repeat(noise(8, 8) // 128 * 255, 3).reshape(8, 8, 3)
    options = {"quality": 100, "subsampling": 0} if mode == "YCbCr" else {}
    content = encoded(black_and_white, "jpeg" if options else "tiff", mode, **options)
    error = read_image(content, channels=channels).astype(int) - black_and_white[..., :channels]
    assert np.abs(error).max() <= (3 if options else 1)


def test_grey_is_itu_r_601_in_a_file_and_in_memory() -> None:
    pixels = noise(31, 17, 3)
    expected = pixels.astype(np.float64) @ np.array(LUMA)
    found = read_image(encoded(pixels), channels=1)
    assert found.shape == (31, 17, 1)
    assert np.abs(found[..., 0] - expected).max() <= 0.5 + 1e-2
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    in_memory = to_grey(tensor[None].expand(2, -1, -1, -1))
    assert in_memory.shape == (2, 1, 31, 17)
    assert torch.equal(in_memory[1, 0], torch.from_numpy(found[..., 0]))
    assert to_grey(in_memory) is in_memory
    every = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert torch.equal(to_grey(every)[0], every[0]), "what is grey keeps its values"


def test_deep_greys_are_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    expected = np.rint(values / 65535 * 255)
    for channels in (1, 3):
        found = read_image(encoded(values), channels=channels)
        assert np.array_equal(found, np.repeat(expected[..., None], channels, axis=-1))
    floats = (values / 65535).astype(np.float32)
    assert np.array_equal(read_image(encoded(floats, "tiff"), channels=1)[..., 0], expected)
    assert read_image(encoded(floats, "tiff"), 4).shape == (4, 4, 3)
    with pytest.raises(ValueError, match=r"floating-point values are not in \[0, 1\], but from 0 to 300"):
        read_image(encoded(floats * 300, "tiff"))
    with pytest.raises(ValueError, match="could not be read"):
        read_image(encoded(np.full((2, 2), np.nan, np.float32), "tiff"))


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_of_several_pictures_it_is_the_first(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (value,) * 3) for value in (255, 0, 100)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert bool((read_image(content) == 255).all())
    opened = Image.open(io.BytesIO(content))
    opened.seek(1)
    assert bool((read_image(opened) == 255).all())


def test_size_covers_and_crops_the_centre() -> None:
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 255  # the middle third
    found = read_image(encoded(pixels), 4)
    assert found.shape == (4, 4, 3)
    assert found[:, 1:3].min() > 252
    assert read_image(encoded(noise(1, 1, 3)), (5, 7)).shape == (5, 7, 3)
    turned = encoded(pixels, exif=with_orientation(6))
    assert read_image(turned, (24, 8)).shape == (24, 8, 3)
    assert np.array_equal(read_image(turned, (24, 8)), read_image(turned)), "of that size it is left as it is"
    for wrong in (0, (4, -1)):
        with pytest.raises(ValueError, match="image_size: expected at least 1 pixel"):
            read_image(encoded(pixels), wrong)
    with pytest.raises(ValueError, match=r"channels: expected 3 \(RGB\) or 1 \(grey\)"):
        read_image(encoded(pixels), channels=4)
    array: Any = pixels
    with pytest.raises(TypeError, match=r"image: expected a file, .*, got ndarray; of an array PIL\.Image\.fromarray"):
        read_image(array)


def test_names_bytes_streams_and_pictures_are_the_same(tmp_path: Path) -> None:
    pixels = noise(8, 12, 3)
    content = encoded(pixels)
    file = tmp_path / "a.png"
    file.write_bytes(content)
    kept = Image.fromarray(pixels)
    with file.open("rb") as stream:
        for source in (file, str(file), content, bytearray(content), io.BytesIO(content), stream, kept):
            assert np.array_equal(read_image(source), pixels)
        assert not stream.closed
    assert kept.getpixel((0, 0)) == tuple(pixels[0, 0]), "a picture that was given stays open"


def test_what_cannot_be_read_is_one_line_with_its_name(tmp_path: Path) -> None:
    whole = encoded(noise(64, 64, 3))
    jpeg = encoded(noise(64, 64, 3), "jpeg")
    cases = (b"", b"no\nimage", whole[:2000], whole[:20], jpeg[: len(jpeg) // 2])
    for content in cases:
        (tmp_path / "a.png").write_bytes(content)
        for source, name in ((tmp_path / "a.png", str(tmp_path / "a.png")), (content, "image")):
            with pytest.raises(ValueError, match="could not be read") as caught:
                read_image(source)
            assert str(caught.value).startswith(f"{name}: expected an image, got that it could not be read (")
            assert "\n" not in str(caught.value)
            assert "object at" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^shard.tar/7.jpg: expected an image"):
        read_image(b"", name="shard.tar/7.jpg")
    with pytest.raises(FileNotFoundError, match=r"nowhere.png: there is no such image"):
        read_image(tmp_path / "nowhere.png")


def test_a_decompression_bomb_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"^bomb.png: .*exceeds limit of 200 pixels"):
        read_image(encoded(noise(16, 16, 3)), name="bomb.png")


def test_a_format_that_this_pillow_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import features

    (tmp_path / "a.webp").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="its content is of no format that Pillow knows"):
        read_image(tmp_path / "a.webp")
    monkeypatch.setattr(features, "check", lambda name: False)
    with pytest.raises(ValueError, match=r"this Pillow, .*, reads no .webp"):
        read_image(tmp_path / "a.webp")
    assert all(
        extension == extension.lower() and os.path.splitext("a" + extension)[1] for extension in IMAGE_EXTENSIONS
    )
