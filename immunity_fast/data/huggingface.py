"""Hugging Face's `datasets`: what `save_to_disk` has written, a folder of parquet files, or what lies in its cache.

Nothing is downloaded. Rows stay in Arrow's files, which processes map into memory and share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from immunity_fast.data.folders import split_of
from immunity_fast.data.shards import part_of
from immunity_fast.data.sources import Indices, Labelled, Listed, Source
from immunity_fast.runtime.failures import one_line, readable

LABELS = ("label", "labels", "fine_label", "class", "target", "category", "cls", "coarse_label")
IMAGES = ("image", "img", "picture", "pixel_values")


class Rows(Source):
    """The images of a table.

    Args:
        table: a `Dataset` of that library, of one column of images, not decoded.
        called: what errors call it.
    """

    def __init__(self, table: Any, called: str) -> None:
        self._table, self._called = table, called
        (self._column,) = table.column_names

    def __len__(self) -> int:
        return len(self._table)

    def encoded(self, index: int) -> str | bytes:
        image = self._table[index][self._column]
        if image is None or (image["bytes"] is None and image["path"] is None):
            raise ValueError(f"{self.name(index)}: expected an image, got none")
        content: str | bytes = image["bytes"] if image["bytes"] is not None else image["path"]
        return content

    def name(self, index: int) -> str:
        return f"{self._called}, row {index}"

    def key(self, index: int) -> bytes:
        return b"%d" % index

    def sizes(self) -> Indices:
        import pyarrow.compute as compute

        found = []
        for batch in self._table.with_format("arrow").iter(1000):
            content = compute.struct_field(batch[self._column].combine_chunks(), "bytes")
            found.append(compute.fill_null(compute.binary_length(content), 0).to_numpy(zero_copy_only=False))
        return np.concatenate([np.empty(0, np.int64), *found]).astype(np.int64)


def list_huggingface(given: str) -> Listed:
    """The rows of a data set, by its splits.

    Args:
        given: a folder that `save_to_disk` has written, a folder of parquet files with their split's name in theirs,
            or the name of a data set that lies in the cache of `datasets`.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
        FileNotFoundError: there is no such data set on this machine.
        ValueError: wrong content, with the split and the column.
    """
    try:
        import datasets
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--dataset huggingface needs datasets: pip install datasets ({one_line(error)})"
        ) from error
    loaded = _loaded(given, datasets)
    tables = _by_part(given, loaded if isinstance(loaded, Mapping) else {"train": loaded})
    image, label = _columns(given, tables["train"], datasets)
    classes, numbers = _classes(given, tables["train"], label, datasets)
    parts = {}
    for part, table in tables.items():
        labels = _labels(f"{given}: {part}", table, image, label, numbers, len(classes))
        if labels is not None:
            images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
            parts[part] = Labelled(Rows(images, f"{readable(given)}: {part}"), labels)
    if "train" not in parts:
        raise ValueError(f"{given}: train: expected labels, got -1 in all rows, which hides them")
    return Listed(parts["train"], parts.get("validation"), parts.get("test"), classes)


def _loaded(given: str, datasets: Any) -> Any:
    """A `Dataset` or a `DatasetDict`."""
    place = Path(given).expanduser()
    with _offline(datasets):
        try:
            if not place.exists():
                return datasets.load_dataset(given)
            if place.is_dir() and ((place / "dataset_dict.json").is_file() or (place / "state.json").is_file()):
                return datasets.load_from_disk(str(place))
            files = _parquet_files(place)
            if files:
                return datasets.load_dataset("parquet", data_files=files)
        except Exception as error:
            if place.exists():
                raise ValueError(
                    f"{given}: expected a data set, got that it cannot be read ({one_line(error)})"
                ) from error
            raise FileNotFoundError(
                f"{given}: there is no such folder, and no data set of that name in the cache of datasets; nothing is "
                "downloaded here: fetch it with datasets.load_dataset, and save_to_disk"
            ) from error
    raise ValueError(f"{given}: expected what save_to_disk writes, or parquet files, got neither")


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Nothing is asked of the network in a `with` block, and no bar is drawn."""
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    bars = datasets.is_progress_bar_enabled()
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before
        if bars:
            datasets.enable_progress_bars()


def _parquet_files(place: Path) -> dict[str, list[str]]:
    """The parquet files of each split, see `shards.part_of`; those that do not say are of training."""
    if place.is_file():
        return {"train": [str(place)]} if place.suffix == ".parquet" else {}
    files: dict[str, list[str]] = {}
    for file in sorted(place.rglob("*.parquet"), key=os.fsencode):
        files.setdefault(part_of(str(file)) or "train", []).append(str(file))
    return files


def _by_part(given: str, splits: Mapping[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for name, table in splits.items():
        part = "validation" if name.lower() == "dev" else split_of(name)
        if part is not None and part not in tables:
            tables[part] = table
    if "train" not in tables:
        raise ValueError(f"{given}: expected a split train, got {', '.join(map(str, splits)) or 'none'}")
    return tables


def _columns(given: str, table: Any, datasets: Any) -> tuple[str, str]:
    """The columns of images and of labels, by their features, or else by their names."""
    features = table.features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images.sort(key=lambda name: IMAGES.index(name) if name in IMAGES else len(IMAGES))
    if not images:
        raise ValueError(f"{given}: expected a column of images (datasets.Image), got {_described(features)}")
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels:
        kinds = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "string", "large_string")
        labels = [name for name in LABELS if getattr(features.get(name), "dtype", None) in kinds]
    labels.sort(key=lambda name: LABELS.index(name) if name in LABELS else len(LABELS))
    if not labels:
        raise ValueError(
            f"{given}: expected a column of labels (datasets.ClassLabel, or one called {', '.join(LABELS[:5])}), "
            f"got {_described(features)}"
        )
    return images[0], labels[0]


def _described(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({getattr(each, 'dtype', type(each).__name__)})" for name, each in features.items())


def _values(table: Any, label: str) -> Any:
    return table.select_columns([label]).with_format("arrow")[:][label].to_pylist()


def _classes(given: str, table: Any, label: str, datasets: Any) -> tuple[tuple[str, ...], dict[Any, int] | None]:
    """The classes' names, and the number of each value; None where values are the numbers."""
    feature = table.features[label]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(map(readable, feature.names)), None
    values = set(_values(table, label))
    if None in values:
        raise ValueError(f"{given}: train: expected a label in each row, got none in some")
    if all(isinstance(value, str) for value in values):
        names = sorted(values)
        return tuple(map(readable, names)), {name: number for number, name in enumerate(names)}
    low, high = min(values), max(values)
    if low < 0 or high >= max(len(table), 2):
        raise ValueError(
            f"{given}: {label}: expected labels from 0, no more classes than rows ({len(table)}), got {low} to {high}"
        )
    return tuple(str(number) for number in range(high + 1)), None


def _labels(
    where: str, table: Any, image: str, label: str, numbers: dict[Any, int] | None, classes: int
) -> torch.Tensor | None:
    """The labels of a split, int64; None where they are hidden."""
    for column in (image, label):
        if column not in table.column_names:
            raise ValueError(
                f"{where}: expected a column {column!r}, as train has, got {', '.join(table.column_names)}"
            )
    if not len(table):
        raise ValueError(f"{where}: expected at least one row, got none")
    values = _values(table, label)
    found = [-1 if value is None else (value if numbers is None else numbers.get(value, -2)) for value in values]
    if all(value == -1 for value in found):
        return None
    wrong = next((row for row, value in enumerate(found) if not 0 <= value < classes), None)
    if wrong is not None:
        raise ValueError(f"{where}, row {wrong}: {label}: expected a label of {classes} classes, got {values[wrong]!r}")
    if classes < 2:
        raise ValueError(f"{where}: {label}: expected at least 2 classes, got {classes}")
    return torch.tensor(found, dtype=torch.int64)
