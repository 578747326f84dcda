"""Data sets: what each reader returns, how splits are cut, and that wrong input becomes one clear line."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from immunity_fast.data.cuts import cut_as_sklearn
from immunity_fast.data.datasets import NAMES, ImageDataset, Split, load
from immunity_fast.data.folders import SPLIT_SEED, TEST_SHARE

Arrays = dict[str, Any]


def arrays(train: int = 40, test: int = 9, val: int = 0, *, classes: int = 3, seed: int = 0) -> Arrays:
    """MedMNIST's layout with images of 6×5 pixels, all different."""
    random = np.random.default_rng(seed)
    found: Arrays = {}
    for part, count in (("train", train), ("test", test), ("val", val)):
        if count:
            found[f"{part}_images"] = random.integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
            found[f"{part}_labels"] = (np.arange(count) % classes)[:, None].astype(np.uint8)
    return found


def write_npz(path: Path, content: Arrays) -> Path:
    file = path / "set.npz"
    np.savez_compressed(file, **content)
    return file


def rows(images: Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


def check_dataset(dataset: ImageDataset) -> None:
    """What every data set promises."""
    for split in (dataset.train, dataset.validation, dataset.test):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.shape == (len(split), 3, *dataset.image_size)
        assert split.images.is_contiguous()
        assert len(split) >= 1
        assert int(split.labels.min()) >= 0
        assert int(split.labels.max()) < dataset.num_classes
    assert dataset.num_classes == len(dataset.classes) >= 2
    assert all(type(name) is str for name in dataset.classes)


def check_error(error: type[Exception], fragments: list[str], call: Callable[[], object]) -> None:
    """`call` raises one short line that holds each fragment."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    for fragment in fragments:
        assert fragment in message


# Splits


def test_a_dataset_moves_whole(tmp_path: Path) -> None:
    dataset = load("npz", write_npz(tmp_path, arrays()))
    moved = dataset.to("meta")
    assert {part.images.device.type for part in (moved.train, moved.validation, moved.test)} == {"meta"}
    assert {part.labels.device.type for part in (moved.train, moved.validation, moved.test)} == {"meta"}
    assert (moved.name, moved.classes, moved.flip, moved.image_size) == ("npz", dataset.classes, False, (6, 5))


def test_splits_are_disjoint_and_complete(tmp_path: Path) -> None:
    content = arrays(train=100, test=20)
    dataset = load("npz", write_npz(tmp_path, content))
    check_dataset(dataset)
    train, validation, test = (rows(part.images) for part in (dataset.train, dataset.validation, dataset.test))
    assert (len(train), len(validation), len(test)) == (90, 10, 20)
    assert len({*train, *validation, *test}) == 120
    assert {*train, *validation} == {image.transpose(2, 0, 1).tobytes() for image in content["train_images"]}
    assert test == [image.transpose(2, 0, 1).tobytes() for image in content["test_images"]]


def test_labels_stay_with_their_images(tmp_path: Path) -> None:
    content = arrays(train=50, test=9, val=7)
    dataset = load("npz", write_npz(tmp_path, content))
    for part, split in (("train", dataset.train), ("val", dataset.validation), ("test", dataset.test)):
        stored = {
            image.transpose(2, 0, 1).tobytes(): int(label)
            for image, label in zip(content[f"{part}_images"], content[f"{part}_labels"][:, 0], strict=True)
        }
        assert dict(zip(rows(split.images), split.labels.tolist(), strict=True)) == stored


def test_given_validation_split_is_kept(tmp_path: Path) -> None:
    content = arrays(train=50, val=7)
    dataset = load("npz", write_npz(tmp_path, content))
    assert (len(dataset.train), len(dataset.validation)) == (50, 7)
    assert rows(dataset.validation.images) == [image.transpose(2, 0, 1).tobytes() for image in content["val_images"]]


@pytest.mark.parametrize("val", [0, 5])
def test_training_images_are_shuffled(tmp_path: Path, val: int) -> None:
    content = arrays(train=60, val=val)
    content["train_labels"] = np.sort(content["train_labels"], axis=0)
    labels = load("npz", write_npz(tmp_path, content), limit_train=20).train.labels
    assert len(set(labels.tolist())) == 3


def test_limit_train_changes_neither_order_nor_validation(tmp_path: Path) -> None:
    file = write_npz(tmp_path, arrays(train=60))
    torch.manual_seed(1)
    whole = load("npz", file)
    torch.manual_seed(2)
    few = load("npz", file, limit_train=7)
    assert len(few.train) == 7
    assert torch.equal(few.train.images, whole.train.images[:7])
    assert torch.equal(few.train.labels, whole.train.labels[:7])
    assert torch.equal(few.validation.images, whole.validation.images)
    assert torch.equal(few.test.images, whole.test.images)
    assert len(load("npz", file, limit_train=54).train) == 54


def test_validation_split_is_the_same_for_good(tmp_path: Path) -> None:
    content = arrays(train=40)
    content["train_images"][:] = np.arange(40, dtype=np.uint8)[:, None, None, None]
    dataset = load("npz", write_npz(tmp_path, content))
    assert dataset.validation.images[:, 0, 0, 0].tolist() == [12, 27, 23, 21]


def test_validation_split_is_at_most_5000_images(tmp_path: Path) -> None:
    labels = np.arange(50_020) % 2
    content = {
        "train_images": np.zeros((50_020, 1, 1), np.uint8),
        "train_labels": labels,
        "test_images": np.zeros((2, 1, 1), np.uint8),
        "test_labels": labels[:2],
    }
    dataset = load("npz", write_npz(tmp_path, content))
    assert (len(dataset.train), len(dataset.validation)) == (45_020, 5_000)


def test_smallest_set(tmp_path: Path) -> None:
    dataset = load("npz", write_npz(tmp_path, arrays(train=2, test=1, classes=2)))
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1, 1, 1)
    content = {**arrays(train=1, test=1, classes=2), "classes": np.array(["a", "b"])}
    file = write_npz(tmp_path, content)
    check_error(ValueError, ["at least 2 training images", "got 1"], lambda: load("npz", file))


# Arguments


@pytest.mark.parametrize("limit", [0, -1, 37])
def test_limit_train_out_of_range(tmp_path: Path, limit: int) -> None:
    file = write_npz(tmp_path, arrays(train=40))
    check_error(
        ValueError, ["limit_train: expected 1 to 36", f"got {limit}"], lambda: load("npz", file, limit_train=limit)
    )


def test_wrong_arguments(tmp_path: Path) -> None:
    check_error(ValueError, ["'mnist'", *NAMES], lambda: load("mnist"))
    check_error(ValueError, ["path: expected None", "got 'x'"], lambda: load("digits", "x"))
    check_error(ValueError, ["path: expected the file", "got None"], lambda: load("npz"))
    check_error(ValueError, ["path: expected the folder", "got None"], lambda: load("folder"))
    check_error(ValueError, ["image_size: expected None for 'digits'", "got 8"], lambda: load("digits", image_size=8))
    check_error(
        ValueError, ["image_size: expected at least 1 pixel", "got 0"], lambda: load("folder", tmp_path, image_size=0)
    )
    wrong: Any = "12"
    check_error(
        TypeError, ["image_size: expected a whole number", "'12'"], lambda: load("folder", tmp_path, image_size=wrong)
    )
    check_error(
        ValueError, ["stream: expected one of auto, on, off", "'12'"], lambda: load("folder", tmp_path, stream=wrong)
    )


def test_import_needs_torch_and_numpy_only() -> None:
    code = (
        "import sys; import immunity_fast.data.datasets; print(*{'sklearn', 'torchvision', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("digits", "sklearn", "scikit-learn"),
        ("cifar10", "torchvision", "torchvision"),
        ("folder", "PIL.Image", "pillow"),
    ],
)
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, package: str) -> None:
    if name == "folder":
        write_images(tmp_path)
    for loaded in [loaded for loaded in sys.modules if loaded == module or loaded.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)
    path = None if name == "digits" else tmp_path
    check_error(ModuleNotFoundError, [f"needs {package}", f"pip install {package} "], lambda: load(name, path))


# digits and CIFAR


def test_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    dataset = load("digits")
    check_dataset(dataset)
    assert dataset.classes == tuple("0123456789")
    assert dataset.image_size == (32, 32)
    assert not dataset.flip
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (1294, 143, 360)
    share = torch.bincount(dataset.test.labels, minlength=10)
    assert 34 <= int(share.min()) <= int(share.max()) <= 38
    assert int(dataset.train.images.max()) == 255
    images = torch.cat([dataset.train.images, dataset.validation.images, dataset.test.images])
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    # The mean over each 4×4 block is near the 8×8 original: every digit is there once, with its label.
    digits = datasets.load_digits()
    labels = torch.cat([dataset.train.labels, dataset.validation.labels, dataset.test.labels])
    blocks = torch.nn.functional.avg_pool2d(images[:, 0].float(), 4).flatten(1)
    originals = torch.from_numpy(digits.images).float().flatten(1) * (255 / 16)
    nearest = torch.cdist(blocks, originals).argmin(dim=1)
    assert len(set(nearest.tolist())) > 0.99 * len(digits.target)
    assert torch.equal(torch.from_numpy(digits.target)[nearest], labels)


def test_digits_are_read_without_scikit_learn_s_import() -> None:
    pytest.importorskip("sklearn")
    code = "import sys; from immunity_fast.data.datasets import load; load('digits'); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("counts", [(5, 5), (7, 4, 11, 3, 8), (60, 61, 62, 61, 60, 2)], ids=str)
def test_digits_are_cut_as_scikit_learn_cuts(counts: tuple[int, ...]) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    labels = np.random.RandomState(1).permutation(np.repeat(np.arange(len(counts)), counts))
    expected = selection.train_test_split(
        np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=SPLIT_SEED
    )
    for part, of_sklearn in zip(cut_as_sklearn(labels), expected, strict=True):
        assert part.tolist() == of_sklearn.tolist()


def test_digits_are_the_same_every_time() -> None:
    pytest.importorskip("sklearn")
    first, second = load("digits", limit_train=50), load("digits", limit_train=50)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(first, part).images, getattr(second, part).images)


@pytest.mark.parametrize(
    "failure",
    [URLError("Name or service not known"), RuntimeError("File not found\nor corrupted."), PermissionError(13, "no")],
)
@pytest.mark.parametrize(("name", "archive"), [("cifar10", "cifar-10-python"), ("cifar100", "cifar-100-python")])
def test_cifar_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, archive: str, failure: Exception
) -> None:
    datasets = pytest.importorskip("torchvision.datasets")

    def download(self: object) -> None:
        raise failure

    monkeypatch.setattr(datasets.CIFAR10, "download", download)
    fragments = [name, f"{archive}.tar.gz", f"by hand and put the file into {tmp_path}", str(failure).split()[0]]
    check_error(OSError, fragments, lambda: load(name, tmp_path))


@pytest.mark.parametrize(("path", "expected"), [(None, "data"), ("elsewhere", "elsewhere")])
def test_cifar(monkeypatch: pytest.MonkeyPatch, path: str | None, expected: str) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    images = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)

    def source(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        assert root == Path(expected)
        assert download
        part = slice(0, 50) if train else slice(50, 60)
        return SimpleNamespace(data=images[part], targets=[i % 2 for i in range(60)][part], classes=["cat", "dog"])

    monkeypatch.setattr(datasets, "CIFAR10", source)
    dataset = load("cifar10", path)
    check_dataset(dataset)
    assert dataset.flip
    assert dataset.classes == ("cat", "dog")
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (45, 5, 10)
    assert torch.equal(dataset.test.images, torch.from_numpy(images[50:]).permute(0, 3, 1, 2))


# npz


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1)])
def test_npz_grey_images_become_rgb(tmp_path: Path, shape: tuple[int, ...]) -> None:
    content = arrays()
    for part in ("train", "test"):
        grey = content[f"{part}_images"][..., 0]
        content[f"{part}_images"] = grey.reshape(len(grey), *shape)
    dataset = load("npz", str(write_npz(tmp_path, content)))
    check_dataset(dataset)
    expected = torch.from_numpy(content["test_images"].reshape(-1, 1, 6, 5)).expand(-1, 3, -1, -1)
    assert torch.equal(dataset.test.images, expected)


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i4", "u8", "i8"])
@pytest.mark.parametrize("column", [False, True])
def test_npz_labels_of_any_integer_dtype(tmp_path: Path, dtype: str, column: bool) -> None:
    content = arrays()
    for key in ("train_labels", "test_labels"):
        content[key] = content[key].astype(dtype) if column else content[key][:, 0].astype(dtype)
    dataset = load("npz", write_npz(tmp_path, content))
    check_dataset(dataset)
    assert dataset.test.labels.tolist() == [0, 1, 2] * 3


def test_npz_class_names(tmp_path: Path) -> None:
    assert load("npz", write_npz(tmp_path, arrays())).classes == ("0", "1", "2")
    content = {**arrays(), "classes": np.array(["rot", "grün", "blau", "unseen"])}
    assert load("npz", write_npz(tmp_path, content)).classes == ("rot", "grün", "blau", "unseen")


def test_npz_other_arrays_are_ignored(tmp_path: Path) -> None:
    check_dataset(load("npz", write_npz(tmp_path, {**arrays(), "notes": np.array([{}], dtype=object)})))


def changed(key: str, value: object) -> Callable[[Arrays], None]:
    def change(content: Arrays) -> None:
        content[key] = np.asarray(value)

    return change


def without(*keys: str) -> Callable[[Arrays], None]:
    def change(content: Arrays) -> None:
        for key in keys:
            del content[key]

    return change


def zeros(*shape: int) -> NDArray[np.uint8]:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (without("train_images"), ["lacks train_images", "got test_images, test_labels, train_labels"]),
        (without("train_images", "train_labels", "test_images", "test_labels"), ["lacks train_images", "got nothing"]),
        (changed("val_images", zeros(4, 6, 5, 3)), ["lacks val_labels"]),
        (changed("val_labels", zeros(4)), ["lacks val_images"]),
        (changed("train_images", np.zeros((40, 6, 5, 3))), ["train_images", "dtype float64", "expected uint8"]),
        (changed("test_images", np.zeros((9, 6, 5), np.int64)), ["test_images", "dtype int64", "expected uint8"]),
        (changed("train_images", zeros(40, 30)), ["train_images", "shape (40, 30)", "(n, H, W)"]),
        (changed("train_images", zeros(40, 6, 6, 6)), ["train_images", "shape (40, 6, 6, 6)", "2-D images"]),
        (changed("train_images", zeros(40, 6, 6, 6, 1)), ["train_images", "shape (40, 6, 6, 6, 1)", "2-D images"]),
        (changed("train_images", zeros(40, 3, 6, 5)), ["train_images", "shape (40, 3, 6, 5)", "(n, H, W, 3)"]),
        (changed("test_images", zeros(0, 6, 5, 3)), ["test_images", "shape (0, 6, 5, 3)", "at least one image"]),
        (changed("train_images", zeros(40, 0, 5, 3)), ["train_images", "shape (40, 0, 5, 3)", "one pixel"]),
        (changed("train_labels", np.zeros(40)), ["train_labels", "dtype float64", "expected integers"]),
        (changed("train_labels", np.zeros(40, bool)), ["train_labels", "dtype bool", "expected integers"]),
        (changed("train_labels", ["a"] * 40), ["train_labels", "dtype <U1", "expected integers"]),
        (changed("train_labels", zeros(40, 14)), ["train_labels", "shape (40, 14)", "one class for each image"]),
        (changed("train_labels", zeros(40, 1, 1)), ["train_labels", "shape (40, 1, 1)"]),
        (changed("train_labels", np.uint8(1)), ["train_labels", "shape ()"]),
        (changed("train_labels", zeros(39)), ["train_labels", "got 39", "expected 40 labels"]),
        (changed("test_labels", zeros(10, 1)), ["test_labels", "got 10", "expected 9 labels"]),
        (changed("train_labels", zeros(40)), ["at least 2 classes", "got 1"]),
        (changed("train_labels", np.full(40, -1)), ["at least 2 classes", "got 0"]),
        (changed("train_labels", np.arange(40) - 1), ["train_labels", "from -1 to 38", "0 to 38"]),
        (changed("train_labels", np.arange(40) * 10**12), ["train_labels", "40 images", "no more classes"]),
        (changed("test_labels", np.full(9, 3)), ["test_labels", "from 3 to 3", "0 to 2 for 3 classes"]),
        (changed("test_labels", np.full(9, 2**64 - 1, np.uint64)), ["test_labels", "18446744073709551615"]),
        (changed("test_labels", np.full(9, -2, np.int8)), ["test_labels", "from -2 to -2"]),
        (changed("classes", ["a", "b"]), ["train_labels", "from 0 to 2", "0 to 1 for 2 classes"]),
        (changed("classes", ["a"]), ["at least 2 classes", "got 1"]),
        (changed("classes", [1, 2, 3]), ["classes", "dtype int64", "expected strings (K,)"]),
        (changed("classes", [["a", "b", "c"]]), ["classes", "shape (1, 3)", "expected strings (K,)"]),
        (changed("classes", np.array([None, "b", "c"], object)), ["classes could not be read", "pickle"]),
        (changed("train_images", np.array([None], object)), ["train_images could not be read", "pickle"]),
        (changed("test_images", zeros(9, 5, 6, 3)), ["test_images", "got (5, 6)", "train_images' (H, W) = (6, 5)"]),
    ],
)
def test_npz_wrong_content(tmp_path: Path, change: Callable[[Arrays], None], fragments: list[str]) -> None:
    content = arrays()
    change(content)
    file = write_npz(tmp_path, content)
    check_error(ValueError, [str(file), *fragments], lambda: load("npz", file))


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_npz_validation_part_by_another_name(name: str, tmp_path: Path) -> None:
    content = arrays(val=5)
    expected = content["val_labels"][:, 0].tolist()
    renamed = {key.replace("val_", f"{name}_"): value for key, value in content.items()}
    dataset = load("npz", write_npz(tmp_path, renamed))
    assert dataset.validation.labels.tolist() == expected
    assert len(dataset.train) == 40
    check_error(
        ValueError, ["val_…", f"{name}_…", "one is enough"], lambda: load("npz", write_npz(tmp_path, content | renamed))
    )
    del renamed[f"{name}_labels"]
    check_error(ValueError, ["lacks val_labels"], lambda: load("npz", write_npz(tmp_path, renamed)))


@pytest.mark.parametrize("key", ["train_images", "test_labels", "classes"])
def test_npz_objects_are_refused_without_advice_to_unpickle(key: str, tmp_path: Path) -> None:
    file = write_npz(tmp_path, arrays() | {key: np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match=rf"{key} could not be read \(it is an array of Python objects") as raised:
        load("npz", file)
    assert "allow_pickle" not in str(raised.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_channels_that_come_first_are_said_to(channels: int, tmp_path: Path) -> None:
    file = write_npz(tmp_path, arrays() | {"train_images": zeros(40, channels, 6, 5)})
    check_error(ValueError, [f"(40, {channels}, 6, 5)", "transpose(0, 2, 3, 1)"], lambda: load("npz", file))


def test_npz_wrong_validation_part(tmp_path: Path) -> None:
    content = {**arrays(val=5), "val_images": zeros(5, 7, 5, 3)}
    file = write_npz(tmp_path, content)
    check_error(ValueError, ["val_images", "(7, 5)", "(6, 5)"], lambda: load("npz", file))
    content = {**arrays(val=5), "val_labels": np.full(5, 9)}
    file = write_npz(tmp_path, content)
    check_error(ValueError, ["val_labels", "from 9 to 9"], lambda: load("npz", file))


def test_npz_missing_file(tmp_path: Path) -> None:
    check_error(FileNotFoundError, [str(tmp_path / "no.npz"), "no such file"], lambda: load("npz", tmp_path / "no.npz"))
    check_error(FileNotFoundError, [str(tmp_path), "no such file"], lambda: load("npz", tmp_path))


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_truncated_anywhere(tmp_path: Path, save: Callable[..., None]) -> None:
    file = tmp_path / "set.npz"
    save(file, **arrays())
    whole = file.read_bytes()
    for length in [0, 1, 4, 30, 128, *range(200, len(whole), 397), len(whole) - 23, len(whole) - 1]:
        file.write_bytes(whole[:length])
        check_error(ValueError, [str(file), "could not be read"], lambda: load("npz", file))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_damaged_inside_a_member(tmp_path: Path, save: Callable[..., None]) -> None:
    file = tmp_path / "set.npz"
    save(file, **arrays())
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        offsets = {info.filename.removesuffix(".npy"): info.header_offset for info in archive.infolist()}
        sizes = {info.filename.removesuffix(".npy"): info.compress_size for info in archive.infolist()}
    for key, offset in offsets.items():
        for place in (26, 40, 60 + sizes[key] // 2):  # length of the name, name, contents
            damaged = bytearray(whole)
            damaged[offset + place] ^= 0xFF
            file.write_bytes(damaged)
            check_error(ValueError, [str(file), f"{key} could not be read"], lambda: load("npz", file))


@pytest.mark.parametrize("kept", [0, 3, 8, 40, 127, 128, 129, 1000])
def test_npz_member_that_stops_early(tmp_path: Path, kept: int) -> None:
    """The archive is sound but one array in it was cut short before it was packed."""
    file, cut = write_npz(tmp_path, arrays()), tmp_path / "cut.npz"
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(cut, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[:kept] if name == "train_images.npy" else data)
    check_error(ValueError, [str(cut), "train_images"], lambda: load("npz", cut))


def test_npz_other_formats(tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    for content in (b"", b"hello", b"\x80\x04K\x01.", b"PK\x03\x04", b"\x93NUMPY"):
        file.write_bytes(content)
        check_error(ValueError, [str(file), "the archive could not be read"], lambda: load("npz", file))
    with file.open("wb") as stream:
        np.save(stream, np.zeros(3))
    check_error(ValueError, [str(file), "no zip archive"], lambda: load("npz", file))


# folder


def write_image(file: Path, size: tuple[int, int] = (6, 4), value: int = 0) -> None:
    """A lossless RGB image of (width, height) pixels whose first channel is `value`."""
    image = pytest.importorskip("PIL.Image")
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 0] = value
    pixels[..., 1] = np.arange(size[0])
    image.fromarray(pixels).save(file)


def write_images(root: Path, classes: str = "ab", count: int = 10) -> None:
    for label, name in enumerate(classes):
        for index in range(count):
            write_image(root / name / f"{index}.png", value=100 * label + index)


def first_channel(split: Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def test_folder_of_classes(tmp_path: Path) -> None:
    write_images(tmp_path, "ba")
    dataset = load("folder", tmp_path)
    check_dataset(dataset)
    assert dataset.classes == ("a", "b")
    assert dataset.image_size == (4, 6)
    assert not dataset.flip
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (15, 1, 4)
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]
    everything = [first_channel(part) for part in (dataset.train, dataset.validation, dataset.test)]
    assert sorted(value for values in everything for value in values) == [*range(10), *range(100, 110)]
    for part in (dataset.train, dataset.validation, dataset.test):
        assert [int(value < 100) for value in first_channel(part)] == part.labels.tolist()
    assert dataset.train.images[0, 1].tolist() == [list(range(6))] * 4
    assert first_channel(load("folder", tmp_path).test) == everything[2]


@pytest.mark.parametrize("validation", [None, "val", "valid", "validation", "Valid"])
def test_folder_of_parts(tmp_path: Path, validation: str | None) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", count=3)
    if validation:
        write_images(tmp_path / validation, count=4)
    dataset = load("folder", tmp_path)
    check_dataset(dataset)
    assert first_channel(dataset.test) == [0, 1, 2, 100, 101, 102]
    assert (len(dataset.train), len(dataset.validation)) == ((20, 8) if validation else (18, 2))


def test_folder_validation_is_the_one_that_is_there(tmp_path: Path) -> None:
    """In the order in which it is stored, and never a part of the training images."""
    for part, count in (("train", 10), ("test", 3), ("valid", 4)):
        write_images(tmp_path / part, count=count)
    dataset = load("folder", tmp_path)
    assert first_channel(dataset.validation) == [0, 1, 2, 3, 100, 101, 102, 103]
    assert dataset.validation.labels.tolist() == [0] * 4 + [1] * 4
    assert sorted(first_channel(dataset.train)) == [*range(10), *range(100, 110)]
    write_images(tmp_path / "valid", "c")
    check_error(
        ValueError, [str(tmp_path / "valid"), "also the class 'c'", "2 classes"], lambda: load("folder", tmp_path)
    )
    write_images(tmp_path / "val", count=1)
    check_error(ValueError, [str(tmp_path), "got val and valid"], lambda: load("folder", tmp_path))


def test_npz_names_in_any_capitalisation(tmp_path: Path) -> None:
    content = arrays(val=4)
    names = {"train": "Training", "val": "VALID", "test": "Test"}
    renamed = {
        f"{names[key[: key.index('_')]]}{key[key.index('_') :].title()}": value for key, value in content.items()
    }
    same, found = load("npz", write_npz(tmp_path, content)), load("npz", write_npz(tmp_path, renamed))
    assert found.fingerprint() == same.fingerprint()
    check_error(
        ValueError,
        ["it has Test_… and test_…, and one is enough"],
        lambda: load("npz", write_npz(tmp_path, renamed | {"test_images": content["test_images"]})),
    )


NOT_UTF8 = pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere take UTF-8 alone")


@NOT_UTF8
def test_folder_names_that_are_no_text_are_shown_and_told_apart(tmp_path: Path) -> None:
    for index, name in enumerate((b"a\xff", b"a\xfe", "ż".encode(), b"b")):
        write_image(tmp_path / os.fsdecode(name) / os.fsdecode(b"0\xff.png"), value=10 * index)
        write_image(tmp_path / os.fsdecode(name) / "1.png", value=10 * index)
    dataset = load("folder", tmp_path)
    assert dataset.classes == ("a\\xfe", "a\\xff", "b", "ż"), "by their bytes"
    assert sorted(first_channel(dataset.test)) == [0, 10, 20, 30]
    by_class = dict(zip(dataset.test.labels.tolist(), first_channel(dataset.test), strict=True))
    assert by_class == {0: 10, 1: 0, 2: 30, 3: 20}


@NOT_UTF8
def test_folder_is_read_alike_in_any_locale(tmp_path: Path) -> None:
    for index, name in enumerate((b"b", "ż".encode(), "日本".encode(), b"\xff", "é".encode())):
        for number in range(4):
            write_image(tmp_path / os.fsdecode(name) / f"{number}.png", value=40 * index + number)
    program = (
        "import sys; from immunity_fast.data.datasets import load; found = load('folder', sys.argv[1])\n"
        "print(ascii(found.classes), found.fingerprint())"
    )
    other = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if sys.getfilesystemencoding() != "utf-8":
        other = {"PYTHONUTF8": "1"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, env=os.environ | other, capture_output=True, text=True, check=True)
    found = load("folder", tmp_path)
    assert ended.stdout == f"{found.classes!a} {found.fingerprint()}\n"


def test_npz_class_names_that_are_no_text_are_shown(tmp_path: Path) -> None:
    content = {**arrays(), "classes": np.array(["\udcff", "\ud800", "plain"])}
    classes = load("npz", write_npz(tmp_path, content)).classes
    assert classes == ("\\xff", "\\ud800", "plain")
    "".join(classes).encode()


@pytest.mark.parametrize("name", ["npz", "folder", "cifar10"])
def test_a_home_that_there_is_not_is_one_line(name: str) -> None:
    check_error(ValueError, ["~nobody-of-that-name/x"], lambda: load(name, "~nobody-of-that-name/x"))


def test_folder_passes_over_what_is_no_image(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_image(tmp_path / "a" / "LOUD.PNG")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / ".hidden.png").write_text("not an image")
    (tmp_path / "a" / "deeper.png").mkdir()
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README").write_text("not a class")
    dataset = load("folder", tmp_path)
    assert dataset.classes == ("a", "b")
    assert len(dataset.train) + len(dataset.validation) + len(dataset.test) == 21


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "gif"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "bmp")]
)
def test_folder_turns_any_8_bit_image_into_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    image = pytest.importorskip("PIL.Image")
    write_images(tmp_path)
    image.new("RGB", (6, 4), "white").convert(mode).save(tmp_path / "a" / f"white.{suffix}")
    dataset = load("folder", tmp_path)
    images = torch.cat([dataset.train.images, dataset.validation.images, dataset.test.images])
    assert int((images.flatten(1).amin(1) == 255).sum()) == 1


def test_image_size_scales_the_short_side_and_crops_the_centre(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in "ab":
        for index, size in enumerate([(12, 6), (6, 18), (7, 7)]):
            write_image(tmp_path / name / f"{index}.png", size)
    wide = np.zeros((6, 24, 3), np.uint8)
    wide[:, 7:17] = 255  # the central square and what the filter reads beside it
    image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    dataset = load("folder", tmp_path, image_size=3)
    check_dataset(dataset)
    assert dataset.image_size == (3, 3)
    images = torch.cat([dataset.train.images, dataset.validation.images, dataset.test.images])
    assert int((images.flatten(1).amin(1) == 255).sum()) == 1


def test_folder_images_of_different_sizes(tmp_path: Path) -> None:
    write_images(tmp_path / "train")
    write_images(tmp_path / "test")
    write_image(tmp_path / "test" / "b" / "odd.png", (7, 4))
    check_error(
        ValueError,
        [str(tmp_path / "test" / "b" / "odd.png"), "7×4", "6×4", str(tmp_path / "train" / "a" / "0.png"), "image_size"],
        lambda: load("folder", tmp_path),
    )


def test_folder_unreadable_image(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    write_images(tmp_path)
    broken = tmp_path / "b" / "broken.png"
    whole = (tmp_path / "b" / "0.png").read_bytes()
    for content in (b"", b"hello", whole[:20], whole[: len(whole) // 2], whole[:-22]):
        broken.write_bytes(content)
        check_error(ValueError, [str(broken), "could not be read"], lambda: load("folder", tmp_path))
    broken = tmp_path / "b" / "broken.tif"
    (tmp_path / "b" / "broken.png").unlink()
    image.fromarray(np.full((4, 6), 1000, np.float32)).save(broken)
    check_error(ValueError, [str(broken), "not in [0, 1]"], lambda: load("folder", tmp_path))


def test_folder_wrong_tree(tmp_path: Path) -> None:
    def fails(error: type[Exception], *fragments: str) -> None:
        check_error(error, list(fragments), lambda: load("folder", root))

    root = tmp_path / "absent"
    fails(FileNotFoundError, str(root), "no such folder")
    root.mkdir()
    fails(ValueError, str(root), "at least 2 class folders", "got 0")
    write_images(root, "a")
    fails(ValueError, str(root), "at least 2 class folders", "got 1")
    (root / "b").mkdir()
    fails(ValueError, str(root / "b"), "expected at least one image")
    write_image(root / "b" / "only.png")
    fails(ValueError, str(root / "b"), "at least 2 images", "got 1")


def test_folder_wrong_parts(tmp_path: Path) -> None:
    def fails(error: type[Exception], *fragments: str) -> None:
        check_error(error, list(fragments), lambda: load("folder", tmp_path))

    write_images(tmp_path / "train")
    write_images(tmp_path / "test", "a")
    fails(ValueError, str(tmp_path / "test"), "none of the class 'b'")
    write_images(tmp_path / "test", "abc")
    fails(ValueError, str(tmp_path / "test"), "also the class 'c'")
    write_images(tmp_path / "train", "c")
    (tmp_path / "val").mkdir()
    fails(ValueError, str(tmp_path / "val"), "none of the class 'a'")
    for name in "abc":
        (tmp_path / "val" / name).mkdir()
    fails(ValueError, str(tmp_path / "val" / "a"), "expected at least one image")
