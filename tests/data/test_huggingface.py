"""Hugging Face's data sets: what is read, which columns, and that nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from immunity_fast.data.datasets import ImageDataset, load
from tests.photos import CLASSES, photo, photos, write_folder

SIZE = 10
hub = pytest.importorskip("datasets", reason="of the extra streaming")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    return load("folder", write_folder(tmp_path_factory.mktemp("photos")), image_size=SIZE)


def _table(part: str, *, names: tuple[str, str] = ("image", "label"), label: str = "classes") -> Any:
    kind = {"classes": hub.ClassLabel(names=list(CLASSES)), "names": hub.Value("string")}.get(label, hub.Value("int64"))
    features = hub.Features({"id": hub.Value("int64"), names[0]: hub.Image(), names[1]: kind})
    rows = list(photos(part))
    values = [CLASSES[own] if label == "names" else own for own, _, _ in rows]
    images = [{"bytes": content, "path": None} for _, _, content in rows]
    return hub.Dataset.from_dict({"id": list(range(len(rows))), names[0]: images, names[1]: values}, features)


def _saved(place: Path, **options: Any) -> Path:
    parts = {"train": "train", "validation": "val", "test": "test"}
    hub.DatasetDict({name: _table(part, **options) for name, part in parts.items()}).save_to_disk(str(place))
    return place


def _check(dataset: ImageDataset, folder: ImageDataset) -> None:
    for one, other in zip(
        (dataset.train, dataset.validation, dataset.test), (folder.train, folder.validation, folder.test), strict=True
    ):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.read(slice(None)), other.read(slice(None)))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_save_to_disk_writes_is_what_a_folder_holds(workers: int, folder: ImageDataset, tmp_path: Path) -> None:
    place = _saved(tmp_path)
    streamed = load("huggingface", place, image_size=SIZE, stream="on", workers=workers)
    assert streamed.classes == CLASSES
    _check(streamed, folder)
    streamed.reader.close()  # type: ignore[union-attr]
    resident = load("huggingface", place, image_size=SIZE)
    _check(resident, folder)
    assert resident.listing == streamed.listing


@pytest.mark.parametrize(("label", "classes"), [("names", CLASSES), ("numbers", ("0", "1", "2"))])
def test_columns_are_found_by_kind_and_name(
    label: str, classes: tuple[str, ...], folder: ImageDataset, tmp_path: Path
) -> None:
    dataset = load("huggingface", _saved(tmp_path, names=("img", "target"), label=label), image_size=SIZE)
    assert dataset.classes == classes
    _check(dataset, folder)


def test_a_folder_of_parquet_files(folder: ImageDataset, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        _table(part).to_parquet(str(tmp_path / "data" / f"{name}-00000-of-00001.parquet"))
    _check(load("huggingface", tmp_path, image_size=SIZE), folder)


def test_one_table_alone_gives_up_both_splits(tmp_path: Path) -> None:
    _table("train").shuffle(seed=1).save_to_disk(str(tmp_path))
    dataset = load("huggingface", tmp_path, image_size=SIZE)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (22, 2, 6)
    expected = {photo_of: own for own, _, photo_of in photos("train")}
    assert len(expected) == 30


def test_hidden_labels_are_no_test_split(tmp_path: Path) -> None:
    table = _table("test", label="numbers").map(lambda row: {"label": -1})
    hub.DatasetDict({"train": _table("train", label="numbers"), "test": table}).save_to_disk(str(tmp_path))
    dataset = load("huggingface", tmp_path, image_size=SIZE)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (22, 2, 6)


def test_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^someone/pictures: there is no such folder, and no .* in the cache"):
        load("huggingface", "someone/pictures")
    assert not hub.config.HF_HUB_OFFLINE


def test_what_is_no_data_set_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(said: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=said) as raised:
            load("huggingface", tmp_path)
        assert "\n" not in str(raised.value)

    fails("expected what save_to_disk writes, or parquet files, got neither$")
    (tmp_path / "train.parquet").write_bytes(b"no table")
    fails("expected a data set, got that it cannot be read")
    (tmp_path / "train.parquet").unlink()
    hub.Dataset.from_dict({"text": ["a"], "label": [0]}).save_to_disk(str(tmp_path))
    fails(r"expected a column of images \(datasets\.Image\), got text \(string\), label \(int64\)$")
    features = hub.Features({"image": hub.Image(), "size": hub.Value("float32")})
    hub.Dataset.from_dict({"image": [{"bytes": photo(1), "path": None}], "size": [1.0]}, features).save_to_disk(
        str(tmp_path)
    )
    fails(r"expected a column of labels \(datasets\.ClassLabel, or one called label,")
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails("--dataset huggingface needs datasets: pip install datasets", ModuleNotFoundError)
