"""Adversarial images in a file: bit for bit, with what they claim, which is checked; whatever is wrong is one line."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.attacks import Attack, load_adversarial, pgd, save_adversarial
from immunity_fast.evaluation import targets
from tests.attacked_models import small_images, small_labels, small_network

safetensors_torch = pytest.importorskip("safetensors.torch", reason="files of adversarial images are safetensors")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _own_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_images_come_back_bit_for_bit(dtype: torch.dtype, norm: Any, tmp_path: Path) -> None:
    model, images, labels = small_network(dtype=dtype), small_images(dtype=dtype), small_labels()
    attack = Attack(eps=0.1, norm=norm, steps=3, loss=_own_loss, keep_best=True)
    adversarial = attack(model, images, labels)
    save_adversarial(tmp_path / "a.safetensors", adversarial, labels, attack=attack, model=model, images=images)
    found = load_adversarial(str(tmp_path / "a.safetensors"), images=images, model=model)
    assert torch.equal(found.adversarial, adversarial)
    assert found.adversarial.dtype == dtype
    assert torch.equal(found.labels, labels)
    assert (found.eps, found.norm, found.bounds) == (0.1, norm, (0.0, 1.0))
    assert Attack(**found.attack | {"loss": _own_loss}) == attack
    assert found.attack["loss"] == "_own_loss"
    assert found.model_hash == targets.hash_of_weights(model)


def test_radii_bounds_and_words_come_back(tmp_path: Path) -> None:
    images, radii = 4 * small_images() - 1, torch.linspace(0, 0.3, 7)
    adversarial = pgd(small_network(), images, small_labels(), eps=radii, bounds=(-1, 3))
    path = tmp_path / "a"
    save_adversarial(
        path, adversarial, small_labels().to(torch.uint8), eps=radii, bounds=(-1, 3), attack={"by": "me", "n": [1, 2.5]}
    )
    found = load_adversarial(path, images=images)
    assert isinstance(found.eps, Tensor)
    assert torch.equal(found.eps, radii.double())
    assert (found.bounds, found.attack, found.model_hash) == ((-1.0, 3.0), {"by": "me", "n": [1, 2.5]}, "")
    assert found.labels.dtype == torch.int64
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert dataclasses.is_dataclass(found)


def test_an_empty_batch_is_kept(tmp_path: Path) -> None:
    save_adversarial(tmp_path / "a", small_images(7)[:0], small_labels()[:0], images=small_images()[:0])
    found = load_adversarial(tmp_path / "a", images=small_images()[:0])
    assert found.adversarial.shape == (0, 3, 9, 8)
    assert found.eps == 8 / 255


def test_a_claim_that_is_not_so_is_refused_on_both_ways(tmp_path: Path) -> None:
    """By one rounding of one pixel; in the ball of each image's own."""
    images = small_images(dtype=torch.float32).clamp(0.1, 0.8)
    radii = torch.full((7,), 0.0625)
    adversarial = images.clone()
    adversarial[4, 0, 0, 0] = torch.tensor(0.75)
    images[4, 0, 0, 0] = torch.tensor(0.6875)
    for eps in (0.0625, radii):
        save_adversarial(tmp_path / "a", adversarial, small_labels(), eps=eps, images=images)
        load_adversarial(tmp_path / "a", images=images)
        further = images.clone()
        further[4, 0, 0, 0] = torch.nextafter(images[4, 0, 0, 0], torch.tensor(0.0))
        text = r"adversarial: expected images within 0\.0625 \(Linf\) of `images`, got number 4 further away"
        with pytest.raises(ValueError, match=text):
            load_adversarial(tmp_path / "a", images=further)
        with pytest.raises(ValueError, match=text):
            save_adversarial(tmp_path / "b", adversarial, small_labels(), eps=eps, images=further)
    assert not (tmp_path / "b").exists()
    with pytest.raises(
        ValueError, match=r"images: expected torch.float32 \(7, 3, 9, 8\), as the adversarial ones, got"
    ):
        load_adversarial(tmp_path / "a", images=images[:6])
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 0.5\]"):
        save_adversarial(tmp_path / "a", adversarial, small_labels(), bounds=(0, 0.5))


def test_another_models_images_are_refused(tmp_path: Path) -> None:
    save_adversarial(tmp_path / "a", small_images(), small_labels(), model=small_network())
    with pytest.raises(ValueError, match=r"model: expected the weights that .*a was made with, hash [0-9a-f]{12}, got"):
        load_adversarial(tmp_path / "a", model=small_network(1))


def _spoilt(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "spoilt"
    info = {"format": 1, "eps": 0.1, "norm": "Linf", "bounds": [0, 1], "attack": {}, "model": ""} | changes
    tensors = {"adversarial": small_images(), "labels": small_labels()} | info.pop("tensors", {})
    path.write_bytes(safetensors_torch.save(tensors, {"adversarial_images": json.dumps(info)}))
    return path


SPOILT: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "not a file of adversarial images of format 1"),
    ({"eps": None}, "not a whole file of adversarial images: eps was None"),
    ({"eps": -1.0}, "eps: expected a finite number of at least 0, got -1.0"),
    ({"norm": "L1"}, "norm was L1"),
    ({"bounds": [1, 0]}, r"bounds: expected \(low, high\)"),
    ({"bounds": 3}, "bounds was 3"),
    ({"attack": 3}, "attack was 3"),
    ({"model": None}, "model was None"),
    ({"tensors": {"labels": torch.ones(7)}}, "labels: expected integers"),
    ({"tensors": {"eps": torch.ones(3)}}, "eps: expected a number, or one of each image"),
    ({"tensors": {"more": torch.ones(3)}}, "tensors was None"),
    ({"tensors": {"adversarial": small_images() + 1}}, r"images: expected values in \[0, 1\]"),
]


@pytest.mark.parametrize(("changes", "text"), SPOILT)
def test_a_spoilt_file_is_one_line(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    load_adversarial(_spoilt(tmp_path))
    with pytest.raises(ValueError, match=f"spoilt: .*{text}") as caught:
        load_adversarial(_spoilt(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 100])
def test_what_is_no_such_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(FileNotFoundError, match="there is no such file of adversarial images"):
        load_adversarial(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a file of adversarial images"):
        load_adversarial(path)
    path.write_bytes(safetensors_torch.save({"a": torch.ones(2)}))
    with pytest.raises(ValueError, match="not a file of adversarial images"):
        load_adversarial(path)


def test_without_safetensors_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match="save_adversarial needs safetensors: pip install safetensors"):
        save_adversarial(tmp_path / "a", small_images(), small_labels())
    with pytest.raises(ModuleNotFoundError, match="load_adversarial needs safetensors: pip install safetensors"):
        load_adversarial(tmp_path / "a")
