"""Poisons in a file: what is written is read, and what is wrong is said by name."""

import numpy as np
import pytest
import torch

from immunity_fast.data.poison_file import Poisons, read, write

WHOLE = Poisons(
    torch.tensor([4, 0, 7]),
    torch.randint(0, 256, (3, 1, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([1, 1, 0]),
    "abc",
    torch.rand(1, 5, 6, generator=torch.Generator().manual_seed(1)),
    2,
    0,
    8 / 255,
)


def same(one, other):
    for name, left, right in zip(Poisons._fields, one, other, strict=True):
        if isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype, name
            assert torch.equal(left, right), name
        else:
            assert left == right, name


def test_what_is_written_is_read(tmp_path):
    write(tmp_path / "a.npz", WHOLE)
    same(read(tmp_path / "a.npz"), WHOLE)
    least = Poisons(WHOLE.indices, WHOLE.images.float() / 255)
    write(tmp_path / "b.npz", least)
    same(read(tmp_path / "b.npz"), least)


def test_anybodys_file_is_read(tmp_path):
    images = np.zeros((2, 3, 4, 4), np.float32)
    np.savez(tmp_path / "a.npz", indices=np.array([3, 1], np.uint16), images=images, comment=np.array("mine"))
    found = read(tmp_path / "a.npz")
    assert found.indices.tolist() == [3, 1]
    assert found.indices.dtype == torch.int64
    assert found.labels is None
    assert found.target_image is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": None}, "expected indices and images, got no indices"),
        ({"indices": np.array([0, 1])}, "indices: expected 3 integers"),
        ({"indices": np.array([0, 1, 1])}, "indices: expected each row once"),
        ({"indices": np.array([0, -1, 1])}, "indices: expected at least 0, got from -1"),
        ({"indices": np.array([0.0, 1.0, 2.0])}, "indices: expected 3 integers"),
        ({"images": np.zeros((3, 1, 5, 6))}, "images: expected uint8 or float32 images"),
        ({"images": np.zeros((3, 5, 6), np.uint8)}, "images: expected uint8 or float32 images"),
        ({"images": np.full((3, 1, 5, 6), 1.5, np.float32)}, "images: expected float32 in"),
        ({"images": np.full((3, 1, 5, 6), np.nan, np.float32)}, "images: expected float32 in"),
        ({"labels": np.array([0, 1])}, "labels: expected 3 integers"),
        ({"target_image": np.zeros((3, 5, 6), np.uint8)}, r"target_image: expected \(1, 5, 6\)"),
        ({"target_class": None}, "target_class: expected the class"),
        ({"target_class": np.array(-1)}, "target_class: expected a class number"),
        ({"target_label": np.array([1])}, "target_label: expected a class number"),
        ({"fingerprint": np.array(3)}, "fingerprint: expected a string"),
        ({"eps": np.array(8.0)}, "eps: expected a number of 0 to 1"),
        ({"eps": np.array("8")}, "eps: expected a number of 0 to 1"),
        ({"labels": np.array([object(), 1, 2])}, "it has Python objects"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, changes, message):
    arrays = {name: np.asarray(value) for name, value in WHOLE._asdict().items()} | changes
    np.savez(tmp_path / "a.npz", **{name: value for name, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=f"a.npz: .*{message}"):
        read(tmp_path / "a.npz")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="indices: expected each row once"):
        write(tmp_path / "b.npz", WHOLE._replace(indices=torch.tensor([1, 1, 2])))
    assert not (tmp_path / "b.npz").exists()
