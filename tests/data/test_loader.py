"""Training batches: every epoch a new order, labels with their images, and a place that can be taken up again."""

from __future__ import annotations

import pytest
import torch

from immunity_fast.data.augmentation import apply_affine
from immunity_fast.data.datasets import Split
from immunity_fast.data.loader import Batch, TrainLoader


def _split(count: int) -> Split:
    """Image i is all of the value i, and so is its label."""
    labels = torch.arange(count)
    return Split(labels.to(torch.uint8)[:, None, None, None].expand(count, 3, 4, 4).contiguous(), labels)


def _loader(
    count: int = 10, batch_size: int = 3, seed: int = 0, *, padding: int = 0, degrees: float = 0
) -> TrainLoader:
    return TrainLoader(_split(count), batch_size, seed, padding=padding, degrees=degrees, flip=padding > 0)


def _epoch(loader: TrainLoader) -> list[Batch]:
    return list(loader)


def _same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) for batch, other in zip(a, b, strict=True) for x, y in zip(batch, other, strict=True)
    )


def _labels(epoch: list[Batch]) -> list[int]:
    return torch.cat([batch.labels for batch in epoch]).tolist()


@pytest.mark.parametrize(("count", "batch_size"), [(10, 3), (12, 3), (10, 10), (7, 1), (10, 6)])
def test_an_epoch_repeats_no_image_and_fills_every_batch(count: int, batch_size: int) -> None:
    loader = _loader(count, batch_size)
    for _ in range(3):
        epoch = _epoch(loader)
        assert len(epoch) == len(loader) == count // batch_size
        assert all(len(part) == batch_size for batch in epoch for part in (batch.images, batch.labels, batch.affine.T))
        assert len(set(_labels(epoch))) == len(loader) * batch_size


def test_an_epoch_that_batches_divide_is_a_permutation() -> None:
    assert sorted(_labels(_epoch(_loader(12, 3)))) == list(range(12))


def test_every_image_comes_up_in_the_end() -> None:
    loader = _loader(10, 6)
    assert {label for _ in range(20) for label in _labels(_epoch(loader))} == set(range(10))


def test_a_split_smaller_than_a_batch_is_one_batch() -> None:
    loader = _loader(5, 32)
    assert len(loader) == 1
    assert sorted(_labels(_epoch(loader))) == list(range(5))


def test_each_epoch_has_an_order_of_its_own() -> None:
    loader = _loader(30, 3)
    orders = [tuple(_labels(_epoch(loader))) for _ in range(4)]
    assert len(set(orders)) == 4


def test_labels_stay_with_their_images() -> None:
    loader = _loader(200, 7)
    for images, labels, _ in (batch for _ in range(2) for batch in loader):
        assert torch.equal(images, labels[:, None, None, None].expand(-1, 3, 4, 4).to(torch.uint8))


def test_images_are_bytes_and_come_with_their_augmentation() -> None:
    for images, labels, affine in _loader(255, 5, padding=2, degrees=30):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert images.shape == (5, 3, 4, 4)
        assert affine.shape == (5, 5)
        moved = apply_affine(images, affine)
        assert moved.min() >= 0
        assert moved.max() <= 1


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_each_batch_of_one(processes: int) -> None:
    """Images, labels and augmentation, in the order of the ranks; also of a split smaller than the batch."""
    for count in (20, 10):
        alone = TrainLoader(_split(count), 6 if count == 20 else 12, 3, padding=2, degrees=30, flip=True)
        alone.batch_size -= alone.batch_size % processes
        ranks = [
            TrainLoader(
                _split(count), alone.batch_size, 3, padding=2, degrees=30, flip=True, rank=rank, processes=processes
            )
            for rank in range(processes)
        ]
        for expected, *parts in zip(alone, *ranks, strict=True):
            assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
            assert torch.equal(torch.cat([part.labels for part in parts]), expected.labels)
            assert torch.equal(torch.cat([part.affine for part in parts], 1), expected.affine)


def test_a_state_is_taken_up_by_another_number_of_processes() -> None:
    alone = _loader(20, 6, padding=2, degrees=30)
    rest = iter(alone)
    next(rest)
    other = TrainLoader(_split(20), 6, 99, padding=2, degrees=30, flip=True, rank=1, processes=2)
    other.load_state(alone.state())
    for batch, expected in zip(other, rest, strict=True):
        assert torch.equal(batch.labels, expected.labels[3:])
        assert torch.equal(batch.affine, expected.affine[:, 3:])


@pytest.mark.parametrize(("count", "batch_size", "processes"), [(20, 5, 2), (1, 2, 2)])
def test_a_batch_that_cannot_be_divided_is_an_error(count: int, batch_size: int, processes: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of the {processes} processes"):
        TrainLoader(_split(count), batch_size, 0, padding=0, degrees=0, flip=False, processes=processes)


def test_a_seed_fixes_order_and_augmentation() -> None:
    same, other = _loader(seed=4, padding=2, degrees=30), _loader(seed=5, padding=2, degrees=30)
    expected = _epoch(_loader(seed=4, padding=2, degrees=30))
    assert _same(_epoch(same), expected)
    assert not _same(_epoch(other), expected)


def test_the_global_random_state_plays_no_part() -> None:
    torch.manual_seed(1)
    expected = _epoch(_loader(padding=2, degrees=30))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert _same(_epoch(_loader(padding=2, degrees=30)), expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("drawn", [0, 1, 2, 3, 4, 5])
def test_a_state_is_taken_up_bit_for_bit(drawn: int) -> None:
    loader = _loader(10, 3, padding=2, degrees=30)
    for _ in range(drawn // 3):
        _epoch(loader)
    rest = iter(loader)
    for _ in range(drawn % 3):
        next(rest)
    state = {name: value.clone() for name, value in loader.state().items()}
    other = _loader(10, 3, seed=99, padding=2, degrees=30)
    other.load_state(state)
    assert other.position == loader.position == drawn % 3
    # `rest` first: it goes on with the epoch that it has begun.
    expected = list(rest)
    assert _same(_epoch(other), expected)
    for _ in range(2):
        assert _same(_epoch(other), _epoch(loader))


def test_the_position_counts_the_batches_drawn() -> None:
    loader = _loader(10, 3)
    positions = [loader.position for _ in loader]
    assert positions == [1, 2, 3]
    assert loader.position == 0


# Parts of the images, whose batches have as many of each


def _in_parts(count: int, batch_size: int, parts: int, seed: int = 0, **options: int) -> TrainLoader:
    return TrainLoader(_split(count), batch_size, seed, padding=0, degrees=9, flip=True, parts=parts, **options)


@pytest.mark.parametrize(("count", "batch_size", "parts"), [(12, 6, 3), (23, 7, 3), (9, 2, 2), (5, 40, 2)])
def test_each_part_of_a_batch_is_of_one_part_of_the_images(count: int, batch_size: int, parts: int) -> None:
    loader = _in_parts(count, batch_size, parts)
    assert loader.parts is not None
    own = [set(part) for part in loader.parts.tolist()]
    assert len(set.union(*own)) == parts * (count // parts) == sum(map(len, own))
    share = min(batch_size // parts, count // parts)
    for _ in range(3):
        seen: list[list[int]] = [[] for _ in range(parts)]
        epoch = _epoch(loader)
        assert len(epoch) == len(loader) == count // parts // share
        for batch in epoch:
            assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels)
            assert batch.affine is not None
            assert batch.affine.shape == (5, parts * share)
            for index, labels in enumerate(batch.labels.view(parts, share).tolist()):
                seen[index] += labels
        for labels, images in zip(seen, own, strict=True):
            assert len(set(labels)) == len(labels) == len(epoch) * share
            assert set(labels) <= images


def test_an_epoch_has_all_images_of_parts_that_batches_divide() -> None:
    loader = _in_parts(24, 6, 3)
    first, second = (sorted(_labels(_epoch(loader))) for _ in range(2))
    assert first == second == list(range(24))


def test_parts_are_the_seed_s_and_orders_the_epoch_s() -> None:
    first, again, other = (_in_parts(30, 6, 3, seed) for seed in (1, 1, 2))
    assert torch.equal(first.parts, again.parts)
    assert not torch.equal(first.parts, other.parts)
    assert _labels(_epoch(first)) != _labels(_epoch(first))


@pytest.mark.parametrize("begun", [0, 1, 3])
def test_a_place_in_parts_is_taken_up_again(begun: int) -> None:
    whole = _in_parts(26, 6, 2)
    rest, loader = iter(whole), _in_parts(26, 6, 2)
    for _ in range(begun):
        next(rest)
    loader.load_state(whole.state())
    assert _same(list(rest) + _epoch(whole), _epoch(loader) + _epoch(loader))


def test_processes_share_each_part() -> None:
    whole = _epoch(_in_parts(25, 8, 2))
    shares = [_epoch(_in_parts(25, 8, 2, rank=rank, processes=2)) for rank in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        joined = torch.stack([part.labels.view(2, 2) for part in parts], 1).flatten()
        assert torch.equal(joined, batch.labels)
        assert all(part.affine is not None for part in parts)
        affine = torch.stack([part.affine.view(5, 2, 2) for part in parts], 2).flatten(1)
        assert torch.equal(affine, batch.affine)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 2), (2, 10)])
def test_a_batch_without_an_image_of_each_part_is_refused(count: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match=r"^batch_size: expected at least 3, an image of each of 3 parts, got"):
        _in_parts(count, batch_size, 3)
