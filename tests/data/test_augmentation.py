"""Augmentation against per-image references that share nothing with it: NumPy's slices, SciPy and torchvision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from immunity_fast.data.augmentation import augment, to_float, warp

SIZES = [(32, 32), (28, 28), (9, 14), (17, 8), (1, 1)]


def random_images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pad_crop(image: Tensor, down: int, right: int, padding: int) -> np.ndarray:
    """The image, zero-padded, cropped at (down, right) from where the image lies."""
    padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)))
    height, width = image.shape[1:]
    top, left = padding + down, padding + right
    return padded[:, top : top + height, left : left + width].astype(np.float32) / 255


def test_to_float() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_float(images), torch.tensor([0.0, 0.2, 1.0]), rtol=0, atol=1e-7)
    with pytest.raises(TypeError, match=r"expected dtype torch\.uint8, got torch\.float32"):
        to_float(torch.zeros(2))


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("mirror", [False, True])
def test_warp_without_rotation_is_pad_and_crop(height: int, width: int, mirror: bool) -> None:
    shifts = torch.tensor([(0, 0), (4, -4), (-3, 1), (0, 4), (-4, 0), (2, 3)])
    images = random_images(len(shifts), height, width)
    moved = warp(images, shifts, torch.zeros(len(shifts)), torch.full((len(shifts),), mirror))
    for image, (down, right), got in zip(images, shifts.tolist(), moved.numpy(), strict=True):
        expected = pad_crop(image, down, right, padding=4)
        np.testing.assert_allclose(got, expected[..., ::-1] if mirror else expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_warp_matches_scipy(height: int, width: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    shifts = torch.tensor([(0, 0), (4, -4), (-3, 1), (0, 2), (1, 1)])
    degrees = torch.tensor([15.0, -7.5, 3.0, 90.0, -180.0])
    mirrored = torch.tensor([False, True, True, False, True])
    images = random_images(len(shifts), height, width)
    moved = warp(images, shifts, degrees, mirrored)
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    for index, image in enumerate(images.numpy()):
        angle = math.radians(degrees[index])
        # In (row, column): from a place in the output back to the place in the input that it shows.
        rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        matrix = rotation @ np.diag([1.0, -1.0 if mirrored[index] else 1.0])
        offset = centre + shifts[index].numpy() - matrix @ centre
        for channel in range(3):
            expected = ndimage.affine_transform(
                image[channel] / 255.0, matrix, offset, order=1, mode="grid-constant", cval=0.0
            )
            np.testing.assert_allclose(moved[index, channel].numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 33)])
def test_warp_rotates_as_torchvision_does(height: int, width: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms.functional")
    degrees = torch.tensor([15.0, -11.0, 0.5, 45.0])
    images = random_images(len(degrees), height, width)
    moved = warp(images, torch.zeros(len(degrees), 2), degrees, torch.zeros(len(degrees), dtype=torch.bool))
    for image, angle, got in zip(images, degrees.tolist(), moved, strict=True):
        expected = transforms.rotate(image.float() / 255, angle, transforms.InterpolationMode.BILINEAR)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("flip", [False, True])
def test_augment_draws_every_crop_of_the_padded_image(flip: bool) -> None:
    image = random_images(1, 8, 11)
    moved = augment(image.expand(2000, -1, -1, -1), generator(), padding=2, degrees=0, flip=flip).numpy()
    mirrors = (False, True) if flip else (False,)
    candidates = {
        (down, right, mirror): crop[..., ::-1] if mirror else crop
        for down in range(-2, 3)
        for right in range(-2, 3)
        for crop in [pad_crop(image[0], down, right, padding=2)]
        for mirror in mirrors
    }
    counts = dict.fromkeys(candidates, 0)
    for got in moved:
        fitting = [key for key, crop in candidates.items() if np.abs(got - crop).max() < 1e-5]
        assert len(fitting) == 1
        counts[fitting[0]] += 1
    expected = len(moved) / len(candidates)
    assert min(counts.values()) > expected - 4 * math.sqrt(expected)
    assert max(counts.values()) < expected + 4 * math.sqrt(expected)


def test_augment_turns_by_angles_uniform_in_the_range() -> None:
    # A dot right of the centre of a wide image: its centre of mass tells the angle, in pixels whatever the aspect.
    images = torch.zeros(400, 3, 21, 61, dtype=torch.uint8)
    images[:, :, 9:12, 48:51] = 255
    moved = augment(images, generator(), padding=0, degrees=20)[:, 0]
    mass = moved.sum((1, 2))
    x = (moved.sum(1) * (torch.arange(61) - 30)).sum(1) / mass
    y = (moved.sum(2) * (torch.arange(21) - 10)).sum(1) / mass
    torch.testing.assert_close(torch.hypot(x, y), torch.full((400,), 19.0), rtol=0, atol=0.2)
    angles = torch.rad2deg(torch.atan2(y, x))
    assert angles.min() > -20.5
    assert angles.max() < 20.5
    quarters = torch.histc(angles, bins=4, min=-20.5, max=20.5)
    assert quarters.min() > 60
    assert abs(angles.mean()) < 2.5


def test_augment_depends_on_its_generator_alone() -> None:
    images = random_images(5, 12, 12)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = augment(images, generator(3), flip=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(augment(images, generator(3), flip=True), first)
    assert not torch.equal(augment(images, generator(4), flip=True), first)
    shared = generator(3)
    augment(images, shared, flip=True)
    assert not torch.equal(augment(images, shared, flip=True), first)


def test_augment_takes_each_image_by_itself() -> None:
    image = random_images(1, 12, 12)
    moved = augment(image.expand(4, -1, -1, -1), generator())
    assert len({row.numpy().tobytes() for row in moved}) == 4


def test_augment_returns_floats_in_the_unit_range() -> None:
    images = torch.full((16, 3, 13, 10), 255, dtype=torch.uint8)
    kept = images.clone()
    moved = augment(images, generator(), degrees=180, flip=True)
    assert moved.dtype == torch.float32
    assert moved.shape == images.shape
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert torch.equal(images, kept)


def test_augment_reads_any_memory_order() -> None:
    images = random_images(3, 10, 7)
    expected = augment(images, generator())
    assert torch.equal(augment(images.to(memory_format=torch.channels_last), generator()), expected)
    assert torch.equal(augment(images.repeat_interleave(2, 0)[::2], generator()), expected)


def test_augment_of_no_images_is_no_images() -> None:
    moved = augment(torch.zeros(0, 3, 8, 9, dtype=torch.uint8), generator(), flip=True)
    assert moved.shape == (0, 3, 8, 9)
    assert moved.dtype == torch.float32


def test_augment_ignores_autocast() -> None:
    images = random_images(4, 32, 32)
    expected = augment(images, generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, generator()), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_augment_on_a_gpu_takes_a_generator_of_either_device(device: str) -> None:
    images = random_images(6, 32, 32)
    moved = augment(images.cuda(), torch.Generator(device).manual_seed(0), flip=True)
    assert moved.device.type == "cuda"
    if device == "cpu":
        torch.testing.assert_close(moved.cpu(), augment(images, generator(), flip=True), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (torch.zeros(2, 3, 8, 8), {}, TypeError, "expected dtype torch.uint8, got torch.float32"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), {}, ValueError, r"expected shape \(B, C, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), {}, ValueError, r"expected shape .*, got \(2, 8, 8, 3\)"),
        (random_images(2, 8, 8), {"padding": -1}, ValueError, "padding: expected at least 0 pixels, got -1"),
        (random_images(2, 8, 8), {"degrees": -1.0}, ValueError, "degrees: expected 0 to 180, got -1.0"),
        (random_images(2, 8, 8), {"degrees": math.nan}, ValueError, "degrees: expected 0 to 180, got nan"),
    ],
)
def test_augment_names_a_wrong_argument(
    images: Tensor, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        augment(images, generator(), **options)
