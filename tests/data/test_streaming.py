"""Streamed splits: the same images as those in memory, in the same order, whoever reads them; bounds and failures."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from immunity_fast.data import datasets, streaming
from immunity_fast.data.datasets import ImageDataset, Split, fingerprint, load
from immunity_fast.data.loader import Batch, TrainLoader
from immunity_fast.data.sampling import batches, sample
from immunity_fast.data.streaming import Decoder, Reader, StreamedSplit
from immunity_fast.runtime import distributed
from immunity_fast.training.state import channel_statistics
from tests.photos import write_folder

SIZE = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def resident(folder: Path) -> ImageDataset:
    return load("folder", folder, image_size=SIZE)


@pytest.fixture(params=[0, 1, 3])
def streamed(request: pytest.FixtureRequest, folder: Path) -> Iterator[ImageDataset]:
    yield from _streamed(folder, request.param)


@pytest.fixture
def by_two(folder: Path) -> Iterator[ImageDataset]:
    yield from _streamed(folder, 2)


def _streamed(folder: Path, workers: int, **options: Any) -> Iterator[ImageDataset]:
    dataset = load("folder", folder, image_size=SIZE, stream="on", workers=workers, **options)
    yield dataset
    assert dataset.reader is not None
    dataset.reader.close()


def _splits(dataset: ImageDataset) -> list[Any]:
    return [dataset.train, dataset.validation, dataset.test]


def _loader(split: Any, batch_size: int = 4, **options: Any) -> TrainLoader:
    return TrainLoader(split, batch_size, 5, padding=2, degrees=10, flip=True, **options)


def _equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# The same as in memory


def test_a_streamed_split_is_the_one_in_memory(streamed: ImageDataset, resident: ImageDataset) -> None:
    assert (streamed.classes, streamed.image_size, streamed.channels) == (resident.classes, (SIZE, SIZE), 3)
    for one, other in zip(_splits(streamed), _splits(resident), strict=True):
        assert isinstance(one, StreamedSplit)
        assert isinstance(other, Split)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.read(slice(None)), other.images)
        chosen = torch.tensor([2, 0, 2])
        assert torch.equal(one.read(chosen), other.read(chosen))
        assert torch.equal(one.read([1]), other.images[1:2])
        assert one.read(torch.tensor([], dtype=torch.int64)).shape == (0, 3, SIZE, SIZE)
        assert one.read(slice(None)).is_contiguous()


def test_evaluation_and_samples_see_the_same(streamed: ImageDataset, resident: ImageDataset) -> None:
    for one, other in zip(batches(streamed.test, 5), batches(resident.test, 5), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    for count in (4, 100):
        assert torch.equal(sample(streamed.train, count).images, sample(resident.train, count).images)
        assert torch.equal(sample(streamed.train, count).labels, sample(resident.train, count).labels)


def test_training_batches_are_the_same_bits(streamed: ImageDataset, resident: ImageDataset) -> None:
    one, other = _loader(streamed.train), _loader(resident.train)
    for _ in range(2):
        assert all(_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_epoch_is_taken_up_by_any_number_of_workers(workers: int, folder: Path, by_two: ImageDataset) -> None:
    begun = _loader(by_two.train)
    rest = iter(begun)
    for _ in range(3):
        next(rest)
    state = {name: value.clone() for name, value in begun.state().items()}
    expected = [*rest, *begun]
    for dataset in _streamed(folder, workers):
        other = _loader(dataset.train)
        other.load_state(state)
        found = [*other, *other]
        assert len(found) == len(expected)
        assert all(_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_each_process_of_several_reads_its_part_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    own = Decoder.read

    def noted(self: Decoder, source: int, index: int) -> Any:
        read.append(index)
        return own(self, source, index)

    monkeypatch.setattr(Decoder, "read", noted)
    for dataset in _streamed(folder, 0):
        parts = []
        for rank in range(2):
            read.clear()
            parts.append(list(_loader(dataset.train, rank=rank, processes=2)))
            assert len(read) == 2 * len(parts[0])
        for whole, *halves in zip(_loader(dataset.train), *parts, strict=True):
            assert torch.equal(torch.cat([half.images for half in halves]), whole.images)


def test_runs_within_each_other_do_not_mix(by_two: ImageDataset, resident: ImageDataset) -> None:
    """A callback may look at validation images in the middle of an epoch."""
    for one, other in zip(_loader(by_two.train), _loader(resident.train), strict=True):
        assert torch.equal(by_two.validation.read(slice(None)), resident.validation.read(slice(None)))
        assert _equal(one, other)


def test_a_streamed_split_is_copied_and_pickled(by_two: ImageDataset, resident: ImageDataset) -> None:
    by_two.train.read(slice(3))
    for other in (copy.deepcopy(by_two.train), pickle.loads(pickle.dumps(by_two.train))):
        assert torch.equal(other.read(slice(3)), resident.train.read(slice(3)))
        other.reader.close()


def test_a_streamed_split_brings_images_to_a_device(by_two: ImageDataset) -> None:
    moved = by_two.to("meta")
    assert moved.train.labels.device.type == moved.train.read(slice(2)).device.type == "meta"
    assert moved.image_size == (SIZE, SIZE)


def test_statistics_are_those_of_the_split_in_memory(
    by_two: ImageDataset, resident: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(resident.train, Split)
    expected = channel_statistics(resident.train)
    assert channel_statistics(by_two.train) == channel_statistics(resident.train.images) == expected
    values = resident.train.images.double() / 255
    torch.testing.assert_close(torch.tensor(expected[0]).double(), values.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(expected[1]).double(), values.std((0, 2, 3), correction=0))
    monkeypatch.setattr("immunity_fast.training.state.STATISTICS_IMAGES", 7)
    assert channel_statistics(by_two.train) == channel_statistics(sample(resident.train, 7))


# What tells data from others


def test_a_listing_is_the_same_streamed_or_not_and_when_moved(
    folder: Path, by_two: ImageDataset, resident: ImageDataset, tmp_path: Path
) -> None:
    moved = load("folder", shutil.copytree(folder, tmp_path / "moved"), image_size=SIZE, stream="on", workers=0)
    assert by_two.listing == resident.listing == moved.listing
    assert moved.fingerprint() == by_two.fingerprint() != resident.fingerprint()
    assert fingerprint(by_two.test) == fingerprint(moved.test) != fingerprint(moved.train)
    assert resident.is_of(by_two.fingerprint(), by_two.listing)
    assert not resident.is_of("other")
    assert not dataclasses.replace(resident, listing=None).is_of("other", None)
    others = [load("folder", folder, image_size=SIZE + 1)]
    (tmp_path / "moved" / "train" / "ant" / "00.png").rename(tmp_path / "moved" / "train" / "ant" / "00b.png")
    others.append(load("folder", tmp_path / "moved", image_size=SIZE))
    assert len({resident.listing, *(other.listing for other in others)}) == 3


# What is chosen, and said


@pytest.mark.parametrize(("free", "kept"), [(None, True), (10**9, True), (36000, True), (30000, False)])
def test_what_fits_into_half_of_free_memory_is_kept_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free: int | None, kept: bool
) -> None:
    monkeypatch.setattr(datasets, "available", lambda device: free)
    dataset = load("folder", folder, image_size=SIZE, workers=2)
    assert (dataset.reader is None) == kept
    where = "kept in memory" if kept else "streamed by 2 workers"
    assert dataset.notes[-1] == f"51 images of 10×10 take 14.9 KiB decoded: {where}"


def test_processes_of_one_machine_share_its_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "available", lambda device: 36000)
    monkeypatch.setattr(distributed, "count_here", lambda: 2)
    assert load("folder", folder, image_size=SIZE, workers=1).reader is not None


def test_a_device_s_memory_counts_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "available", lambda device: 1000 if device.type == "cuda" else 10**9)
    assert datasets.fits_in_memory(600, torch.device("cpu"))
    assert datasets.fits_in_memory(500, torch.device("cuda"))
    assert not datasets.fits_in_memory(600, torch.device("cuda"))


@pytest.mark.parametrize(("workers", "said"), [(0, "by this process"), (1, "by 1 worker"), (3, "by 3 workers")])
def test_who_reads_is_said(workers: int, said: str, folder: Path) -> None:
    dataset = load("folder", folder, image_size=SIZE, stream="on", workers=workers)
    assert dataset.notes[-1] == f"51 images of 10×10 take 14.9 KiB decoded: streamed {said}"


def test_auto_is_a_worker_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes, expected in ((8, 1, 8), (8, 2, 4), (1, 4, 1), (100, 1, streaming.MOST_WORKERS)):
        monkeypatch.setattr(streaming, "usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr(distributed, "count_here", lambda processes=processes: processes)
        assert streaming.resolved("auto") == expected


@pytest.mark.parametrize("workers", [-1, "many", True, 1.5])
def test_a_wrong_number_of_workers_is_refused(workers: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^workers: expected auto or a number of processes from 0, got "):
        load("folder", folder, image_size=SIZE, stream="on", workers=workers)


def test_what_is_read_whole_is_not_streamed() -> None:
    with pytest.raises(ValueError, match=r"^stream: expected auto or off for 'digits', which is read whole, got 'on'$"):
        load("digits", stream="on")


def test_what_waits_is_bounded_whatever_the_number_of_images(by_two: ImageDataset) -> None:
    reader = by_two.reader
    assert reader is not None
    image = 3 * SIZE * SIZE
    assert reader.waiting_bytes(8) == 4 * reader.chunk * image  # two tasks for each worker
    large = Reader(dataclasses.replace(reader.decoder, shape=(3, 224, 224)), 4)
    assert large.waiting_bytes(1) <= 2 * 4 * streaming.SLOT_BYTES
    batch = 256 * 3 * 224 * 224
    assert batch <= large.waiting_bytes(256) <= batch + 5 * streaming.SLOT_BYTES
    assert Reader(reader.decoder, 0).waiting_bytes(256) == 0


def test_what_is_measured_of_an_epoch(by_two: ImageDataset) -> None:
    reader = by_two.reader
    assert reader is not None
    list(_loader(by_two.train))
    assert reader.waited > 0
    found = reader.measured(2 * reader.waited)
    assert found["images_waited_share"] == pytest.approx(0.5)
    assert 0 < found["workers_bytes"] < found["memory_peak_bytes"]


# What goes wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_where_its_turn_comes(workers: int, folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "photos")
    broken = copied / "train" / "bee" / "04.png"
    broken.write_bytes(b"no image")
    for dataset in _streamed(copied, workers):
        loader = _loader(dataset.train)
        seen = 0
        with pytest.raises(ValueError, match="could not be read") as raised:  # noqa: PT012
            for _ in loader:
                seen += 1
        assert str(raised.value).startswith(str(broken))
        assert "\n" not in str(raised.value)
        other = _loader(load("folder", folder, image_size=SIZE).train)
        next(iter(other))
        place = next(row for row, indices in enumerate(other._order) if _is_of(dataset, indices, broken))
        assert seen == place


def _is_of(dataset: ImageDataset, indices: torch.Tensor, file: Path) -> bool:
    assert dataset.reader is not None
    return any(dataset.reader.decoder.sources[0].name(index) == str(file) for index in indices.tolist())


def test_an_image_of_another_size_is_named(folder: Path) -> None:
    """They differ, and nothing was said of scaling them."""
    dataset = load("folder", folder, stream="on", workers=0)
    with pytest.raises(ValueError, match=r"\.png: expected 13×12 pixels as .*00\.png has, got 14×12; image_size"):
        dataset.train.read(slice(None))


def test_a_file_that_has_gone_is_named(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "photos")
    for dataset in _streamed(copied, 1):
        shutil.rmtree(copied / "test")
        with pytest.raises(FileNotFoundError, match=str(copied / "test")):
            dataset.test.read(np.arange(3))


def test_grey_images_are_streamed_as_such(folder: Path) -> None:
    resident = load("folder", folder, image_size=SIZE, channels=1)
    for dataset in _streamed(folder, 2, channels=1):
        assert dataset.channels == 1
        assert torch.equal(dataset.train.read(slice(None)), resident.train.read(slice(None)))
        assert dataset.train.read(slice(3)).shape == (3, 1, SIZE, SIZE)
