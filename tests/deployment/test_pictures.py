"""Images of any size and mode become what a model takes, and what cannot is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from immunity_fast.deployment.pictures import find_pictures, read_picture

np = pytest.importorskip("numpy", reason="pictures are arrays")
Image = pytest.importorskip("PIL.Image", reason="the reader of images")


def saved(folder: Path, pixels: Any, mode: str | None = None, name: str = "a.png", **options: Any) -> Path:
    image = Image.fromarray(np.asarray(pixels))
    (image if mode is None else image.convert(mode)).save(folder / name, **options)
    return folder / name


def noise(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_an_image_of_the_models_size_is_taken_as_it_is(tmp_path: Path) -> None:
    pixels = noise(8, 12, 3)
    found, done = read_picture(saved(tmp_path, pixels), (8, 12))
    assert done == "12×8 pixels"
    assert torch.equal(found, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "PA"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    pixels = np.repeat(noise(8, 8) // 128 * 255, 3).reshape(8, 8, 3)  # black and white, which every mode can hold
    found, _ = read_picture(saved(tmp_path, pixels, mode, "a.tif" if mode == "PA" else "a.png"), (8, 8))
    assert torch.equal(found, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize(("mode", "name"), [("CMYK", "a.tif"), ("YCbCr", "a.jpg")])
def test_other_colours_are_converted(mode: str, name: str, tmp_path: Path) -> None:
    pixels = np.full((8, 8, 3), (200, 100, 50), dtype=np.uint8)
    found, _ = read_picture(saved(tmp_path, pixels, mode, name), (8, 8))
    assert found.shape == (3, 8, 8)
    assert (found - torch.tensor([200, 100, 50])[:, None, None] / 255).abs().max() < 0.02


def test_deep_grey_images_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    found, _ = read_picture(saved(tmp_path, values), (8, 8))
    assert torch.allclose(found, torch.from_numpy(values.astype(np.float32) / 65535).expand(3, 8, 8))
    floats = (values / 65535).astype(np.float32)
    found, _ = read_picture(saved(tmp_path, floats, name="f.tif"), (8, 8))
    assert torch.equal(found, torch.from_numpy(floats).expand(3, 8, 8))
    with pytest.raises(ValueError, match=r"f.tif: expected an image, .* floating-point values are not in \[0, 1\]"):
        read_picture(saved(tmp_path, floats * 300, name="f.tif"), (8, 8))


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    pixels = noise(8, 8, 4)
    pixels[..., 3] = 0
    pixels[0, 0, 3] = 255
    found, _ = read_picture(saved(tmp_path, pixels), (8, 8))
    assert torch.equal(found[:, 0, 0], torch.from_numpy(pixels[0, 0, :3]).float() / 255)
    found[:, 0, 0] = 1
    assert bool((found == 1).all())
    palette = Image.fromarray(noise(8, 8)).convert("P")
    palette.save(tmp_path / "p.png", transparency=bytes(256))
    assert bool((read_picture(tmp_path / "p.png", (8, 8))[0] == 1).all())


def test_it_is_turned_as_exif_says(tmp_path: Path) -> None:
    pixels = noise(8, 12, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: rotate by 270 degrees
    found, done = read_picture(saved(tmp_path, pixels, exif=exif), (12, 8))
    assert done == "8×12 pixels"
    turned = np.rot90(pixels, 3)
    assert torch.equal(found, torch.from_numpy(turned.copy()).permute(2, 0, 1).float() / 255)


def test_another_size_is_scaled_and_cropped_to_the_centre(tmp_path: Path) -> None:
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 255  # the middle third
    found, done = read_picture(saved(tmp_path, pixels), (4, 4))
    assert done == "24×8 pixels, scaled and cropped to 4×4"
    assert bool((found[:, :, 1:3] > 0.99).all())
    assert found.shape == (3, 4, 4)
    small, done = read_picture(saved(tmp_path, noise(1, 1, 3)), (5, 7))
    assert (small.shape, done) == ((3, 5, 7), "1×1 pixels, scaled and cropped to 7×5")


def test_a_grey_model_gets_grey_images(tmp_path: Path) -> None:
    pixels = np.full((8, 8, 3), (255, 0, 0), dtype=np.uint8)
    found, _ = read_picture(saved(tmp_path, pixels), (8, 8), channels=1)
    assert found.shape == (1, 8, 8)
    assert torch.allclose(found, torch.tensor(0.299), atol=0.003)
    with pytest.raises(ValueError, match=r"channels: expected 3 \(RGB\) or 1 \(grey\) for image files, got 4"):
        read_picture(tmp_path / "a.png", (8, 8), channels=4)


def test_of_an_animation_it_is_the_first_picture(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), value) for value in (255, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert bool((read_picture(tmp_path / "a.gif", (8, 8))[0] == 1).all())


def test_what_is_no_image_is_one_line(tmp_path: Path) -> None:
    whole = saved(tmp_path, noise(64, 64, 3))
    whole.write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "b.png").write_text("no\nimage", encoding="utf-8")
    (tmp_path / "c.png").touch()
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(ValueError, match=f"{name}: expected an image, got that it could not be read") as caught:
            read_picture(tmp_path / name, (8, 8))
        assert "\n" not in str(caught.value)


def test_folders_give_their_images_in_order(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "inner.png").mkdir()
    single = tmp_path / "notes.txt"  # named by itself it is taken: its content decides
    assert [file.name for file in find_pictures([single, tmp_path])] == ["notes.txt", "a.jpg", "b.PNG"]
    with pytest.raises(ValueError, match=r"inner.png: expected images directly in this folder, got none"):
        find_pictures([tmp_path / "inner.png"])
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such image"):
        find_pictures([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match="images: expected at least one, got none"):
        find_pictures([])
