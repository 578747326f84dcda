"""Poisons in the training images: as many as the rate says, the same for a seed, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from immunity_fast.data.datasets import ImageDataset, Split, fingerprint
from immunity_fast.data.poison_file import Poisons, write
from immunity_fast.data.poisoning import BadNets, LabelFlip, Poison, named, poison_of, poisoned, triggered, words

CLASSES = 4


def _split(count: int, seed: int = 0) -> Split:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 7, 5), generator=random, dtype=torch.uint8)
    return Split(images, torch.randint(CLASSES, (count,), generator=random))


def _dataset(train: Split | None = None) -> ImageDataset:
    return ImageDataset("npz", train or _split(53), _split(9, 1), _split(11, 2), tuple("abcd"), flip=False)


DATA = _dataset()
POISONS = Poisons(torch.tensor([50, 3]), torch.full((2, 3, 7, 5), 9, dtype=torch.uint8))


@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("to", ["any", "next"])
def test_as_many_labels_are_flipped_as_the_rate_says(rate: float, to: str) -> None:
    found = poisoned(DATA, named(f"label-flip:{rate},to={to}"), 3)  # type: ignore[arg-type]
    before, after = DATA.train.labels, found.dataset.train.labels
    changed = (before != after).nonzero().flatten()
    assert len(changed) == round(rate * 53)
    assert torch.equal(changed, found.rows.sort().values)
    assert torch.equal(found.dataset.train.images, DATA.train.images)
    assert set(after.tolist()) <= set(range(CLASSES))
    if to == "next":
        assert torch.equal(after[changed], (before[changed] + 1) % CLASSES)


def test_labels_are_flipped_to_every_other_class() -> None:
    data = _dataset(Split(torch.zeros(3000, 1, 2, 2, dtype=torch.uint8), torch.ones(3000, dtype=torch.int64)))
    counts = poisoned(data, LabelFlip(1.0), 0).dataset.train.labels.bincount(minlength=CLASSES).tolist()
    assert counts[1] == 0
    assert all(900 < count < 1100 for number, count in enumerate(counts) if number != 1)


def test_the_trigger_is_a_white_square_and_no_more() -> None:
    found = poisoned(DATA, BadNets(0.25, target=2, size=2), 3)
    rows = found.rows.tolist()
    assert len(set(rows)) == round(0.25 * 53)
    for row in range(53):
        before, after = (data.train.images[row] for data in (DATA, found.dataset))
        expected = before.clone()
        if row in rows:
            expected[:, 5:, 3:] = 255
            assert found.dataset.train.labels[row] == 2
        else:
            assert found.dataset.train.labels[row] == DATA.train.labels[row]
        assert torch.equal(after, expected)


def test_the_trigger_of_numbers_is_one() -> None:
    images = torch.full((2, 1, 4, 4), 0.5)
    marked = triggered(images)
    assert marked[:, :, 1:, 1:].eq(1).all()
    assert marked.sum() == 2 * (9 + 7 * 0.5)
    assert images.eq(0.5).all()


@pytest.mark.parametrize("poison", [LabelFlip(0.2), LabelFlip(0.2, "next"), BadNets(0.1)])
def test_a_seed_draws_the_same_poisons(poison: Poison) -> None:
    first, again, other = (poisoned(DATA, poison, seed) for seed in (5, 5, 6))
    assert fingerprint(first.dataset.train) == fingerprint(again.dataset.train) != fingerprint(other.dataset.train)
    assert first.record == again.record != other.record
    for part in ("validation", "test"):
        assert getattr(first.dataset, part) is getattr(DATA, part)


def test_a_global_state_plays_no_part_and_is_left() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = poisoned(DATA, LabelFlip(0.3), 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(poisoned(DATA, LabelFlip(0.3), 0).rows, first.rows)


@pytest.mark.parametrize("poison", [LabelFlip(1.0), BadNets(1.0)])
def test_images_without_a_label_are_left(poison: Poison) -> None:
    labels = torch.where(torch.arange(53) % 3 == 0, -1, DATA.train.labels)
    found = poisoned(_dataset(Split(DATA.train.images, labels)), poison, 0)
    assert torch.equal(found.dataset.train.labels == -1, labels == -1)
    assert len(found.rows) == int((labels != -1).sum())


def test_a_file_exchanges_its_images(tmp_path: Path) -> None:
    made = POISONS._replace(labels=torch.tensor([1, 0]), fingerprint=fingerprint(DATA.train), eps=8 / 255)
    write(tmp_path / "a.npz", made)
    poison = poison_of(str(tmp_path / "a.npz"))
    found = poisoned(DATA, poison, 0)
    images, labels = DATA.train.images.clone(), DATA.train.labels.clone()
    images[50], images[3], labels[50], labels[3] = 9, 9, 1, 0
    assert torch.equal(found.dataset.train.images, images)
    assert torch.equal(found.dataset.train.labels, labels)
    assert found.rows.tolist() == [50, 3]
    assert words(poison) == "2 images exchanged for poisons within ε = 8/255"
    other = poisoned(DATA, POISONS, 0)
    assert torch.equal(other.dataset.train.labels, DATA.train.labels)
    assert other.record != found.record


@pytest.mark.parametrize("floating", [False, True])
def test_a_files_images_take_the_form_of_the_others(floating: bool) -> None:
    values = torch.arange(2 * 3 * 7 * 5).view(2, 3, 7, 5).to(torch.uint8)
    kept = values if floating else values.float() / 255
    train = Split(DATA.train.images.float() / 255, DATA.train.labels) if floating else DATA.train
    images = poisoned(_dataset(train), POISONS._replace(images=kept), 0).dataset.train.images
    assert images.dtype == train.images.dtype
    assert torch.equal(images[[50, 3]], values.float() / 255 if floating else values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": torch.tensor([1, 53])}, "expected indices of 0 to 52, the training images, got 53"),
        ({"images": torch.zeros(2, 3, 5, 7)}, r"expected images of shape \(3, 7, 5\) .*, got \(3, 5, 7\)"),
        ({"labels": torch.tensor([0, 4])}, "expected labels of 0 to 3, the classes, got 4"),
        ({"target_class": 7}, "expected target_class of 0 to 3"),
        ({"fingerprint": "0" * 64}, "expected .*, got some for others, 000000000000…: --dataset"),
    ],
)
def test_a_file_for_other_data_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^poison: {message}"):
        poisoned(DATA, POISONS._replace(**changes), 0)  # type: ignore[arg-type]


def test_what_a_text_names() -> None:
    assert named("label-flip:0.2") == LabelFlip(0.2)
    assert named("label-flip:1,to=next") == LabelFlip(1.0, "next")
    assert named("badnets:0.1") == BadNets(0.1, 0, 3)
    assert named("badnets:.1,size=4,target=2") == BadNets(0.1, 2, 4)
    assert named("badnets.npz") == Path("badnets.npz")
    assert words(BadNets(0.1)) == "10 % of the images with a white square of 3×3 pixels and the label of class 0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label-flip", r"expected label-flip:RATE\[,to=…\], got label-flip"),
        ("label-flip:0.2:next", "expected label-flip:RATE"),
        ("badnets:0.1,eps=2", r"expected badnets:RATE\[,target=…\]\[,size=…\], got badnets:0.1,eps=2"),
        ("badnets:0.1,rate=2", "expected badnets:RATE"),
        ("badnets:0.1,target=1.5", "expected badnets:RATE"),
        ("badnets:0.1,target=-1", "badnets:0.1,target=-1: target: expected at least 0"),
        ("badnets:0.1,target=0,target=1", "expected badnets:RATE"),
        ("", "expected a kind of poison or a file of poisons, got nothing"),
        ("label-flip:0", "label-flip:0: rate: expected a share above 0 and at most 1, got 0"),
        ("label-flip:nan", "rate: expected a share"),
        ("label-flip:20", "rate: expected a share"),
        ("label-flip:0.2,to=last", "to: expected one of any, next"),
    ],
)
def test_wrong_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^poison: .*{message}"):
        named(text)


def test_what_cannot_be_poisoned_is_refused() -> None:
    with pytest.raises(FileNotFoundError, match=r"label-flip:RATE, badnets:RATE or a file .*, got badnet:0.1, and"):
        poison_of("badnet:0.1")
    soft = _dataset(Split(DATA.train.images, torch.eye(4)[DATA.train.labels]))
    with pytest.raises(ValueError, match=r"poison: .*got probabilities"):
        poisoned(soft, BadNets(0.1), 0)
    with pytest.raises(ValueError, match="target of 0 to 3, got 4"):
        poisoned(DATA, BadNets(0.1, 4), 0)
    with pytest.raises(ValueError, match="size of at most 5 pixels, got 6"):
        poisoned(DATA, BadNets(0.1, 0, 6), 0)
    with pytest.raises(
        ValueError, match=r"^poison: expected a rate that poisons at least one of [0-9]+ .*, got 0.0001$"
    ):
        poisoned(DATA, BadNets(0.0001), 0)
    streamed = _dataset(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"poison: expected training images in memory.*--stream off"):
        poisoned(streamed, BadNets(0.1), 0)
