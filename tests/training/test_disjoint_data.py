"""Experts that learn from parts of the images of their own: no image of another part ever reaches one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from immunity_fast.data.datasets import Split
from immunity_fast.data.loader import TrainLoader
from immunity_fast.peers import PlainLoss
from immunity_fast.runtime import distributed
from immunity_fast.training import Trainer
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.state import TrainingState
from tests.small_runs import CONFIG, CPU, dataset, interrupted, options, saved, split, trained

COUNT, EXPERTS = 26, 3
STILL = {"crop_padding": 0, "rotation": 0.0, "flip": "off"}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images (N, B/N, C, H, W) of all steps."""
    found: list[Tensor] = []
    learn = PlainLoss.loss_and_terms

    def recorded(self: PlainLoss, model: Any, images: Tensor, targets: Tensor, prepared: Any = None) -> Any:
        found.append(images.detach().clone())
        return learn(self, model, images, targets, prepared)

    monkeypatch.setattr(PlainLoss, "loss_and_terms", recorded)
    return found


def _numbered() -> Split:
    """Image i is all of the value i."""
    values = torch.arange(COUNT, dtype=torch.uint8)[:, None, None, None]
    return Split(values.expand(COUNT, 3, 12, 12).contiguous(), torch.arange(COUNT) % 3)


def _state(**changes: Any) -> TrainingState:
    settings = {"ensemble": "plain", "shards": True, "experts": EXPERTS, "batch_size": 7} | STILL | changes
    return TrainingState(dataclasses.replace(CONFIG, **settings), dataset(train=_numbered()), CPU)


def _epochs(state: TrainingState, count: int = 2) -> None:
    for _ in range(count):
        for batch in state.loader:
            state.advance(batch)
        state.epoch += 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_expert_sees_an_image_of_another(seen: list[Tensor], accumulate: int) -> None:
    state = _state(accumulate=accumulate, epochs=2)
    assert isinstance(state.loader, TrainLoader)
    assert state.loader.parts is not None
    _epochs(state)
    assert len(seen) == 2 * 4
    for expert, part in enumerate(state.loader.parts.tolist()):
        numbers = [round(255 * float(image[0, 0, 0])) for images in seen for image in images[expert]]
        assert set(numbers[:8]) == set(numbers[8:]) == set(part)
    assert len(set(state.loader.parts.flatten().tolist())) == COUNT - COUNT % EXPERTS


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_stays_in_an_expert_s_part(seen: list[Tensor], kind: str) -> None:
    state = _state(**{kind: 1.0, "batch_size": 6})
    assert isinstance(state.loader, TrainLoader)
    _epochs(state, 1)
    batches = state.loader._order.view(-1, EXPERTS, 2)
    blended = 0
    for images, numbers in zip(seen, batches.tolist(), strict=True):
        for expert, own in enumerate(numbers):
            pixels = 255 * images[expert]
            assert min(own) - 1e-3 <= float(pixels.min()) <= float(pixels.max()) <= max(own) + 1e-3
            blended += int((pixels[0] - own[0]).abs().max() > 1e-3)
    assert blended


def test_a_run_in_parts_goes_on_in_the_middle_of_an_epoch(data: Path, tmp_path: Path) -> None:
    arguments = [*options(data, ensemble="plain", checkpoint_every=1, mixup=0.5), "--shards", "--out"]
    trained([*arguments, str(tmp_path / "whole")])
    interrupted((TrainingState, "advance"), 8, [*arguments, str(tmp_path / "half")])
    trained(["--resume", str(tmp_path / "half")])
    assert saved(tmp_path / "half") == saved(tmp_path / "whole")


def test_parts_of_a_users_data_set(seen: list[Tensor]) -> None:
    images = _numbered()
    items = TensorDataset(images.images, images.labels)

    class Listed(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, index: int) -> Any:
            return items[index]

    settings: dict[str, Any] = {"ensemble": "plain", "shards": True, "experts": 2, "batch_size": 26, **STILL}
    trainer = Trainer(train=Listed(), classes=3, epochs=1, check_images=0, device="cpu", arch="resnet8", **settings)
    trainer.fit()
    assert trainer.state is not None
    own = [{round(255 * float(image[0, 0, 0])) for batch in seen for image in batch[expert]} for expert in range(2)]
    assert not own[0] & own[1]
    assert [set(part) for part in trainer.state.loader.parts.tolist()] == own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2}, "--batch-size: expected at least 3, an image an expert, got 2"),
        ({"auto_batch": True}, "--auto-batch: expected none with --shards"),
        ({"adversarial": "pgd"}, "--adversary: expected each with --shards"),
        ({"experts": 1}, "--shards: expected none of one network"),
        ({"ensemble": "immunity"}, "--shards: expected none without --ensemble plain"),
    ],
)
def test_settings_that_parts_do_not_go_with_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        TrainConfig(**{"ensemble": "plain", "shards": True, "experts": 3} | changes)


def test_data_that_cannot_be_cut_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(CONFIG, ensemble="plain", shards=True, experts=3)
    with pytest.raises(ValueError, match=r"^--shards: expected at least 3 training images, one an expert, got 2"):
        TrainingState(config, dataset(train=split(2)), CPU)
    images = _numbered()
    loader = DataLoader(TensorDataset(images.images.float() / 255, images.labels), 6)
    with pytest.raises(ValueError, match=r"^shards: expected False beside a loader"):
        Trainer(config, train=loader, classes=3, device="cpu").fit()
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(ValueError, match=r"^--shards: expected one process, got 2"):
        TrainingState(config, dataset(), CPU)
