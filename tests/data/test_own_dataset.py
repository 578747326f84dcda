"""Images to measure on, of a user's data sets and loaders: in memory where they fit, read item by item elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from immunity_fast.data import own_dataset
from immunity_fast.data.datasets import Split, fingerprint
from immunity_fast.data.own import as_split
from immunity_fast.data.own_dataset import ReadSplit, held
from immunity_fast.data.sampling import batches, sample
from immunity_fast.runtime import memory
from immunity_fast.training import TrainConfig, Trainer
from tests.own_networks import Plain

COUNT = 21
IMAGES = torch.randint(256, (COUNT, 3, 17, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(COUNT) % 3
IGNORED = torch.where(torch.arange(COUNT) % 4 == 0, -1, LABELS)
SOFT = torch.eye(3)[LABELS] * 0.8 + 0.2 / 3


class Items(Dataset[Any]):
    """Images and targets that are counted as they are read, and listed nowhere."""

    def __init__(self, targets: Tensor = LABELS, change: Callable[[Tensor], Tensor] = lambda image: image) -> None:
        self.targets_of_items, self.change, self.read = targets, change, 0

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.read += 1
        return self.change(IMAGES[index]), self.targets_of_items[index]


def joined(batch: list[Any]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batch, strict=True)
    return torch.stack(images), torch.stack(labels)


class Endless:
    """A loader that does not know how many batches it has."""

    def __iter__(self) -> Any:
        return iter([(IMAGES[:10], LABELS[:10]), (IMAGES[10:], LABELS[10:])])


WHOLE: dict[str, Callable[[Any], Any]] = {
    "a data set": lambda items: items,
    "a loader": lambda items: DataLoader(items, 4),
    "a loader in another order, with workers": lambda items: DataLoader(items, 4, shuffle=True, num_workers=1),
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "batches of its own": lambda items: DataLoader(items, 4, collate_fn=joined),
    "some of the items": lambda items: DataLoader(items, 4, sampler=SubsetRandomSampler(range(10))),
    "items again": lambda items: DataLoader(items, 4, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT)),
    "without the last": lambda items: DataLoader(items, 4, drop_last=True),
    "a sampler of batches": lambda items: DataLoader(items, batch_sampler=BatchSampler(range(COUNT), 4, False)),  # type: ignore[arg-type]
    "a list of batches": lambda _: [(IMAGES[:10], LABELS[:10]), (IMAGES[10:], LABELS[10:])],
}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory has room for nothing."""
    monkeypatch.setattr(own_dataset, "fits_in_memory", lambda *_: False)


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("form", WHOLE)
def test_what_does_not_fit_is_read_and_is_the_same(form: str) -> None:
    found, expected = held(as_split(WHOLE[form](Items()), "validation")), Split(IMAGES, LABELS)
    assert isinstance(found, ReadSplit)
    found = found.to("cpu")
    assert (len(found), found.channels, found.image_size) == (COUNT, 3, (17, 16))
    assert torch.equal(found.labels, LABELS)
    for rows in (torch.tensor([4, 0, 19]), slice(3, 9), [2], slice(0, 0)):
        assert torch.equal(found.read(rows), IMAGES[rows])
    for (images, labels), (wanted, known) in zip(batches(found, 8), batches(expected, 8), strict=True):
        assert torch.equal(images, wanted)
        assert torch.equal(labels, known)
    assert torch.equal(sample(found, 5).images, sample(expected, 5).images)
    assert torch.equal(sample(found, 5).labels, sample(expected, 5).labels)
    assert fingerprint(found) == fingerprint(held(as_split(WHOLE[form](Items()), "validation")))
    assert fingerprint(found) != fingerprint(held(as_split(WHOLE[form](Items(LABELS.flip(0))), "validation")))


@pytest.mark.parametrize("form", WHOLE)
def test_what_fits_is_read_once_and_held(form: str) -> None:
    found = held(as_split(WHOLE[form](Items()), "validation"))
    assert isinstance(found, Split)
    order = found.labels.argsort(stable=True), LABELS.argsort(stable=True)
    assert found.images[order[0]].sort(0).values.equal(IMAGES[order[1]].sort(0).values)


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("form", OTHERS)
def test_a_loader_that_tells_no_items_is_held_or_refused(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(held(as_split(OTHERS[form](Items()), "validation")), Split)
    monkeypatch.setattr(memory, "total", lambda _: 100)
    with pytest.raises(
        ValueError, match=r"^validation: \d+ images of shape \(3, 17, 16\) would take at least"
    ) as raised:
        held(as_split(OTHERS[form](Items()), "validation"))
    assert "a data set instead of the loader" in str(raised.value)


class Stream(IterableDataset[Any]):
    """Items one after another, nobody knows how many: their loader has a length that cannot be asked for."""

    def __iter__(self) -> Any:
        return iter(zip(IMAGES, LABELS, strict=True))


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("loader", [Endless(), DataLoader(Stream(), 4)], ids=["without", "not known"])
def test_a_loader_without_a_length_is_held(loader: Any) -> None:
    found = held(as_split(loader, "validation"))
    assert isinstance(found, Split)
    assert torch.equal(found.images, IMAGES)


@pytest.mark.usefixtures("full")
def test_ignored_images_are_left_out_and_probabilities_hardened() -> None:
    found = held(as_split(Items(IGNORED), "validation"), ignore_index=-1)
    kept = IGNORED != -1
    assert torch.equal(found.labels, LABELS[kept])
    assert torch.equal(found.read(slice(None)), IMAGES[kept])
    assert torch.equal(held(as_split(Items(SOFT), "validation")).labels, LABELS)
    with pytest.raises(ValueError, match=r"^validation: expected images with labels, got 21 of 1 alone$"):
        held(as_split(Items(torch.ones_like(LABELS)), "validation"), ignore_index=1)


@pytest.mark.parametrize("change", [lambda image: image, lambda image: image / 255], ids=["bytes", "floats"])
def test_a_training_measures_the_same_on_both(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(epochs=1, batch_size=7, check_images=6, attack_images=4, device="cpu")

    def trained() -> tuple[Trainer, Any]:
        torch.manual_seed(0)
        items = Items(change=change)
        trainer = Trainer(config, items, items, test=DataLoader(items, 5), model=[Plain(3), Plain(3)])
        trainer.fit()
        return trainer, trainer.evaluate()

    expected, results = trained()
    monkeypatch.setattr(own_dataset, "fits_in_memory", lambda *_: False)
    found, same = trained()
    assert isinstance(found.dataset.validation, ReadSplit)
    assert isinstance(found.dataset.test, ReadSplit)
    assert isinstance(expected.dataset.test, Split)
    for name, value in expected.history[-1].items():
        if name.startswith("val_"):
            assert found.history[-1][name] == value, name
    assert found.validate(Items(change=change)) == expected.validate(Items(change=change))
    assert found.test() == expected.test()
    for name in ("accuracy", "worst_case", "heatmaps"):
        assert _without_seconds(same[name]) == _without_seconds(results[name]) != []


def _without_seconds(found: Any) -> Any:
    return [{**entry, "seconds": 0} for entry in found] if isinstance(found, list) else found


@pytest.mark.usefixtures("full")
def test_sizes_and_labels_of_what_is_read_are_checked() -> None:
    smaller = TensorDataset(IMAGES[..., :12], LABELS)
    with pytest.raises(ValueError, match=r"^validation: expected images of shape \(3, 17, 16\) as those of train, got"):
        own_dataset.own_dataset(Items(), DataLoader(smaller, 4))
    with pytest.raises(ValueError, match=r"^validation: expected class numbers from 0 to 2, got 5 to 7$"):
        own_dataset.own_dataset(Items(), DataLoader(Items(LABELS + 5), 4), classes=3)
