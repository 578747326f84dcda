"""The public Trainer: any data, the command's bits, a run that goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from immunity_fast import ImmunityMoE, load, train
from immunity_fast.data.datasets import ImageDataset, Split
from immunity_fast.data.datasets import load as load_dataset
from immunity_fast.training import Callback, CallbackError, TrainConfig, Trainer, session
from tests import grids
from tests.small_runs import CLASSES, CONFIG, dataset, options, saved, split, weights, write_data

SETTINGS = dataclasses.replace(CONFIG, epochs=2, device="cpu", crop_padding=2)


def network(channels: int = 3) -> nn.Sequential:
    """A network of two stages, which runs in a moment."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)),
    )


def mixture(seed: int = 0, image_size: int = 12) -> ImmunityMoE:
    torch.manual_seed(seed)
    return ImmunityMoE.from_experts([network(), network()], stage="0", image_size=image_size)


class Drawn(Dataset[Any]):
    """Items whose brightness is drawn anew each time, as a transform's is."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels_of_items = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] / 255 * torch.rand(()), int(self.labels_of_items[index])


class Killed(Callback):
    """Ends the process behind a step, as far as an exception can."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(self, trainer: Any, metrics: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def state_of(trainer: Trainer) -> dict[str, Any]:
    return weights(trainer)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images() -> ImageDataset:
    return dataset()


@pytest.fixture(scope="module")
def plain(images: ImageDataset) -> dict[str, Any]:
    trainer = Trainer(SETTINGS, images, model=mixture())
    assert [record["epoch"] for record in trainer.fit()] == [1, 2]
    return state_of(trainer)


def _as_list(part: Split) -> list[tuple[Any, int]]:
    return [(image.permute(1, 2, 0).numpy(), int(label)) for image, label in zip(part.images, part.labels, strict=True)]


def _as_dictionaries(part: Split) -> list[dict[str, Any]]:
    return [{"image": image, "label": label} for image, label in zip(part.images, part.labels, strict=True)]


FORMS: dict[str, Callable[[Split], Any]] = {
    "a split": lambda part: part,
    "tensors": lambda part: (part.images, part.labels),
    "NumPy's arrays": lambda part: (part.images.numpy(), part.labels.numpy()),
    "a TensorDataset": lambda part: TensorDataset(part.images, part.labels),
    "a list of items, channels last": _as_list,
    "dictionaries": _as_dictionaries,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_trains_to_the_same_bits(form: str, images: ImageDataset, plain: dict[str, Any]) -> None:
    made = FORMS[form]
    trainer = Trainer(SETTINGS, made(images.train), made(images.validation), test=made(images.test), model=mixture())
    record = trainer.fit()[-1]
    assert state_of(trainer) == plain
    assert 0 <= record["val_accuracy_mean"] <= 1
    assert 0 <= trainer.test()["test_accuracy_mean"] <= 1


def test_the_command_and_the_trainer_give_the_same_bits(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.npz")
    arguments = [*options(data), "--out", str(tmp_path / "command")]
    session.fit(train.parse(arguments))
    config = train.parse([*options(data), "--out", str(tmp_path / "free")]).config
    Trainer(config, out=tmp_path / "trainer").fit()
    assert saved(tmp_path / "trainer") == saved(tmp_path / "command")
    read = load_dataset("npz", data)
    trainer = Trainer(config, (read.train.images, read.train.labels), read.validation, flip="off")
    trainer.fit()
    tensors = saved(tmp_path / "command")["tensors"]
    assert state_of(trainer) == {name[6:]: value for name, value in tensors.items() if name.startswith("model/")}


def test_nothing_is_written_or_printed(
    images: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Trainer(SETTINGS, images, model=mixture()).fit()
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_seed_fixes_everything_and_another_one_does_not(images: ImageDataset) -> None:
    found = []
    for seed in (3, 3, 4):
        trainer = Trainer(SETTINGS, images, seed=seed, epochs=1)
        trainer.fit()
        found.append(state_of(trainer))
    assert found[0] == found[1] != found[2]


LOADERS: dict[str, Callable[[Drawn], Any]] = {
    "a data set": lambda data: data,
    "a loader": lambda data: DataLoader(data, batch_size=4, shuffle=True),
    "a loader with a generator": lambda data: DataLoader(
        data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "a stateful loader": lambda data: _stateful(data),
}


def _stateful(data: Drawn) -> Any:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata's loader")
    return stateful.StatefulDataLoader(data, batch_size=4, shuffle=True)


@pytest.mark.parametrize(("name", "step"), grids.every(2, LOADERS, (3, 6)))
@pytest.mark.filterwarnings("ignore:.*set_vital.*")
def test_a_killed_run_goes_on_to_the_same_bits(name: str, step: int, images: ImageDataset, tmp_path: Path) -> None:
    def given(seed: int = 0) -> dict[str, Any]:
        model = mixture()
        torch.manual_seed(seed)  # torchdata draws a loader's order when it is made
        data = LOADERS[name](Drawn(images.train.images, images.train.labels))
        return {"train": data, "validation": images.validation, "model": model, "classes": CLASSES}

    config = dataclasses.replace(SETTINGS, checkpoint_every=1)
    whole = Trainer(config, out=tmp_path / "whole", **given())
    whole.fit()
    killed = Trainer(config, out=tmp_path / "killed", callbacks=[Killed(step)], **given())
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    again = Trainer.from_run(tmp_path / "killed", **given(99))
    assert again.step < step + 1
    assert len(again.fit()) == 2
    found, expected = saved(tmp_path / "killed"), saved(tmp_path / "whole")
    assert found["tensors"] == expected["tensors"]
    assert found["records"] == expected["records"]


def test_the_number_of_workers_changes_nothing(images: ImageDataset) -> None:
    found = []
    for workers in (0, 2):
        data = Drawn(images.train.images, images.train.labels)
        trainer = Trainer(SETTINGS, data, model=mixture(), classes=CLASSES, workers=workers, epochs=1)
        trainer.fit()
        found.append(state_of(trainer))
    assert found[0] == found[1]


def test_a_trainer_of_a_run_has_its_model_and_history(images: ImageDataset, tmp_path: Path) -> None:
    first = Trainer(SETTINGS, images, out=tmp_path / "run")
    first.fit()
    again = Trainer.from_run(tmp_path / "run", images)
    assert again.history == first.history
    assert state_of(again) == state_of(first)
    before = again.fit()
    assert before == first.history, "it has ended"
    model = load(tmp_path / "run")
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in first.model.state_dict().items()
    }
    with pytest.raises(ValueError, match=r"^lr=0\.3: the run in .* was begun with lr=0\.05$"):
        Trainer(dataclasses.replace(SETTINGS, lr=0.3), images, out=tmp_path / "run").fit(resume=True)
    with pytest.raises(FileExistsError, match="exists already"):
        Trainer(SETTINGS, images, out=tmp_path / "run").fit()
    assert len(Trainer(SETTINGS, images, out=tmp_path / "run").fit(resume="auto")) == 2


def test_data_sets_say_what_their_classes_are_called() -> None:
    library = pytest.importorskip("datasets", reason="a data set whose features name its classes")
    names = ["ant", "bee", "cat"]
    features = {"img": library.Image(), "fine_label": library.ClassLabel(names=names)}
    rows = {"img": list(IMAGES.movedim(1, -1).numpy()), "fine_label": LABELS.tolist()}
    items = library.Dataset.from_dict(rows, features=library.Features(features))
    for model in (None, mixture()):
        assert Trainer(SETTINGS, Subset(items, range(6)), model=model).dataset.classes == tuple(names)


def test_single_settings_are_changed_as_by_the_command() -> None:
    assert Trainer(SETTINGS, optimizer="adamw").config == SETTINGS.changed(optimizer="adamw")
    assert Trainer(optimizer="adamw").config.lr == 1e-3  # not SGD's
    assert Trainer(preset="paper", epochs=9).config == TrainConfig.from_preset("paper", epochs=9)


def test_a_folder_that_is_there_is_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"^out: .* exists already; .* fit\(resume=True\)$"):
        Trainer(SETTINGS, (IMAGES, LABELS), model=network(), out=tmp_path).fit()


def test_grey_images_need_no_axis_of_channels() -> None:
    data = Trainer(SETTINGS, (IMAGES[:, 0], LABELS), experts=1).dataset
    assert (data.channels, data.image_size) == (1, (12, 12))


def test_soft_targets_of_a_loader(images: ImageDataset) -> None:
    soft = torch.eye(CLASSES)[images.train.labels] * 0.8 + 0.2 / CLASSES
    loader = DataLoader(TensorDataset(images.train.images / 255, soft), batch_size=5)
    trainer = Trainer(SETTINGS, loader, images.validation, model=mixture(), epochs=1)
    assert trainer.fit()[0]["loss"] > 0


def test_a_network_and_a_list_of_them_are_trained(images: ImageDataset) -> None:
    single = Trainer(SETTINGS, images, model=network(), epochs=1)
    single.fit()
    assert single.model.num_experts == 1
    several = Trainer(SETTINGS, images, model=[network(), network()], epochs=1)
    several.fit()
    assert several.model.num_experts == 2
    # By the images' size: of 32 pixels, which none has here, the pool's map would do for both.
    large = [nn.Sequential(*network()[:1], nn.MaxPool2d(3), *network()[1:]) for _ in range(2)]
    for size, stage in (("12", "0"), ("30", "1")):
        part = torch.zeros(4, 3, int(size), int(size), dtype=torch.uint8), torch.arange(4) % CLASSES
        assert Trainer(SETTINGS, part, model=large).model.stage == stage
    assert Trainer(SETTINGS, part, model=large, stage="0").model.stage == "0"


def test_models_of_ones_own_are_evaluated(images: ImageDataset, tmp_path: Path) -> None:
    config = dataclasses.replace(SETTINGS, epochs=1, attack_images=4)
    trainer = Trainer(config, images, model=mixture(), out=tmp_path / "run")
    trainer.fit()
    assert trainer.evaluate()["accuracy"]
    assert (tmp_path / "run" / "report.html").is_file()
    with pytest.raises(ValueError, match=r"Trainer\.from_run"):
        load(tmp_path / "run")


class Broken(Callback):
    def on_epoch_end(self, trainer: Any, record: Any) -> None:
        raise KeyError("mine")


def test_a_callback_that_fails_is_named(images: ImageDataset) -> None:
    with pytest.raises(CallbackError, match=r"callback Broken: on_epoch_end failed: KeyError: 'mine'"):
        Trainer(SETTINGS, images, model=mixture(), callbacks=[Broken()]).fit()


def test_a_loss_that_is_no_number_ends_it(images: ImageDataset) -> None:
    with pytest.raises(FloatingPointError, match="infinite or NaN in epoch 1"):
        Trainer(SETTINGS, images, lr=1e30, optimizer="sgd").fit()


IMAGES, LABELS = split(8).images, split(8).labels
NORMALISED = (IMAGES / 255 - 0.5) / 0.25


class Short(Dataset[Any]):
    """Items whose targets nothing lists."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return IMAGES[index], int(LABELS[index])


class Stream(IterableDataset[Any]):
    """Items one after another, of which no batches are made."""

    def __iter__(self) -> Iterator[Any]:
        yield IMAGES[0], 0


WRONG: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("normalised", {"train": (NORMALISED, LABELS)}, ValueError, "leave the normalisation out"),
    ("normalised batches", {"train": DataLoader(TensorDataset(NORMALISED, LABELS), 4)}, ValueError, "normalisation"),
    ("0 to 255", {"train": (IMAGES.float(), LABELS)}, ValueError, "divide them by 255"),
    ("lengths", {"train": (IMAGES, LABELS[:5])}, ValueError, "expected as many targets as images, got 5 for 8"),
    ("channels", {"train": (torch.zeros(8, 2, 9, 9, dtype=torch.uint8), LABELS)}, ValueError, "1 or 3 channels"),
    ("labels", {"train": (IMAGES, LABELS + 3), "classes": 3}, ValueError, "class numbers from 0 to 2"),
    ("a name", {"train": "photos"}, TypeError, 'dataset="folder"'),
    ("nothing", {"train": 5}, TypeError, "expected an ImageDataset"),
    ("no images", {"train": (IMAGES[:0], LABELS[:0])}, ValueError, "at least 1 image"),
    ("keys", {"train": [{"x": 1, "y": 2}]}, ValueError, "expected one of pixel_values"),
    ("a config", {"config": {"lr": 1}}, TypeError, "expected a TrainConfig"),
    ("a setting", {"epoch": 3}, TypeError, "epoch: expected an argument of Trainer"),
    ("a model", {"train": (IMAGES, LABELS), "model": "resnet18"}, TypeError, "expected an ImmunityMoE"),
    ("validation alone", {"validation": (IMAGES, LABELS)}, ValueError, "train: expected data"),
    ("a class", {"train": (IMAGES, LABELS), "callbacks": [Callback]}, TypeError, "parentheses"),
    ("a function", {"train": (IMAGES, LABELS), "callbacks": print}, TypeError, "LambdaCallback(on_epoch_end=…) makes"),
    ("no batch", {"train": DataLoader(Short(), 9, drop_last=True)}, ValueError, "train: expected at least 1 batch"),
    ("no batches", {"train": DataLoader(Short(), None)}, TypeError, "DataLoader(…, batch_size=32) makes batches"),
    ("splits", {"train": {"train": Short(), "test": Short()}}, TypeError, "expected one split, such as data['train']"),
    ("channels last", {"train": (IMAGES.movedim(1, -1), LABELS)}, ValueError, "channels come first"),
    ("sums", {"train": (IMAGES, torch.ones(8, 3))}, ValueError, "train: expected probabilities that sum to 1"),
    (
        "no steps",
        {"train": DataLoader(Short(), 4), "steps_per_epoch": -1, "model": network()},
        ValueError,
        "steps_per_epoch: expected at",
    ),
    ("steps", {"train": (IMAGES, LABELS), "steps_per_epoch": 2}, ValueError, "steps_per_epoch: expected None but"),
    ("crops", {"train": (IMAGES, LABELS), "crop_padding": 12, "model": mixture()}, ValueError, "--crop-padding"),
    ("a size", {"train": (IMAGES, LABELS), "image_size": 16}, ValueError, "image_size: expected None beside data of"),
    ("a limit", {"train": (IMAGES, LABELS), "limit_train": 4}, ValueError, "(torch.utils.data.Subset can change them)"),
    ("a stage", {"train": (IMAGES, LABELS), "stage": "7", "model": network()}, ValueError, "'7'"),
    ("a stream", {"train": Stream()}, TypeError, "expected a DataLoader of it"),
    ("a text", {"train": (IMAGES, LABELS), "classes": "ab"}, TypeError, "classes: expected several names"),
    ("a logger", {"train": (IMAGES, LABELS), "loggers": "excel"}, ValueError, "expected none, or of tensorboard"),
    ("no place", {"train": (IMAGES, LABELS), "loggers": "csv"}, ValueError, "expected a Trainer with out="),
]


@pytest.mark.parametrize(("arguments", "kind", "said"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_one_line(arguments: dict[str, Any], kind: type[Exception], said: str) -> None:
    given = {"config": SETTINGS} | arguments
    with pytest.raises(kind, match=re.escape(said)) as raised:
        Trainer(**given).fit()
    assert "\n" not in str(raised.value)
