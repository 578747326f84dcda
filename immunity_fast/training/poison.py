"""The poisons of a run: put into its training images as its settings say, and the same ones when it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from immunity_fast.data.datasets import ImageDataset
from immunity_fast.data.poison_file import Poisons
from immunity_fast.data.poisoning import Poison, digest, poison_of, poisoned
from immunity_fast.runtime import distributed
from immunity_fast.training.config import TrainConfig


def with_poison(
    config: TrainConfig, dataset: ImageDataset
) -> tuple[Poison | None, dict[str, Any] | None, ImageDataset]:
    """The poisons of some settings, if there are any, what a checkpoint says of them, and the data with them.

    Args:
        config: the settings.
        dataset: without poisons.

    Raises:
        ValueError: these data cannot be poisoned so, or the file is none of poisons for them.
        FileNotFoundError: there is no such file.
    """
    if config.poison is None:
        return None, None, dataset
    with distributed.together():  # a file may be missing on one machine
        try:
            poison = poison_of(config.poison)
            found = poisoned(dataset, poison, config.seed)
        except (ValueError, FileNotFoundError) as error:
            raise _as_option(error) from error
    return poison, found.record, found.dataset


def check_poison(path: Path, info: Mapping[str, Any], record: dict[str, Any] | None) -> None:
    """Check that a checkpoint was trained with the same poisons.

    Args:
        path: of the checkpoint.
        info: what it says.
        record: `Poisoned.record` of the poisons that there are now, if any.

    Raises:
        ValueError: it was not.
    """
    if info.get("poison") != record:
        raise ValueError(f"{path}: trained with other poisons than --poison gives now")


def poison_of_run(config: TrainConfig, path: Path, info: Mapping[str, Any]) -> Poison | None:
    """What the training images of a run were poisoned with, for an evaluation; None of clean ones.

    Args:
        config: the run's settings.
        path: of its checkpoint.
        info: what that says.

    Raises:
        ValueError: the file holds other poisons now.
        FileNotFoundError: it is no longer there.
    """
    if config.poison is None:
        return None
    try:
        found = poison_of(config.poison)
    except (ValueError, FileNotFoundError) as error:
        raise _as_option(error) from error
    if isinstance(found, Poisons):
        same = digest(found.indices, found.images, found.labels)
        check_poison(path, info, {"images": len(found.indices), "digest": same})
    return found


def _as_option(error: ValueError | FileNotFoundError) -> ValueError | FileNotFoundError:
    """The error of a setting that a person gave as an option."""
    text = str(error)
    return type(error)(f"--{text}" if text.startswith("poison: ") else f"--poison: {text}")
