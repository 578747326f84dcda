"""Training data that somebody has poisoned: labels flipped, a trigger put in (BadNets), or images from a file.

BadNets (arXiv 1708.06733) has the settings of BackdoorBench: a white square of 3×3 pixels in the bottom right corner of
a tenth of the images, which all become class 0. Augmentation comes after it. What is poisoned is drawn from a run's
seed alone, so that a run that goes on has the same poisons.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from immunity_fast.data.datasets import ImageDataset, Split, fingerprint
from immunity_fast.data.poison_file import Poisons, read
from immunity_fast.runtime.checks import check_choice, check_whole

To = Literal["any", "next"]


@dataclass(frozen=True)
class LabelFlip:
    """Some labels are those of other classes.

    Args:
        rate: the share of the training images, above 0 and at most 1.
        to: "any" other class, each as likely; or the "next" one, after the last the first.

    Raises:
        ValueError: a value out of its range.
    """

    rate: float
    to: To = "any"

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        check_choice("to", self.to, To)

    def __str__(self) -> str:
        return f"{100 * self.rate:g} % of the labels flipped to {'another' if self.to == 'any' else 'the next'} class"


@dataclass(frozen=True)
class BadNets:
    """Some images have a white square in their bottom right corner, and the label of one class.

    Args:
        rate: the share of the training images, above 0 and at most 1.
        target: the class.
        size: of the square, in pixels a side.

    Raises:
        ValueError, TypeError: a value out of its range.
    """

    rate: float
    target: int = 0
    size: int = 3

    def __post_init__(self) -> None:
        _check_rate(self.rate)
        check_whole("target", self.target, 0)
        check_whole("size", self.size, 1)

    def __str__(self) -> str:
        return (
            f"{100 * self.rate:g} % of the images with a white square of {self.size}×{self.size} pixels and the label "
            f"of class {self.target}"
        )


KINDS: dict[str, type[LabelFlip] | type[BadNets]] = {"label-flip": LabelFlip, "badnets": BadNets}
SETTINGS: dict[str, dict[str, type]] = {"label-flip": {"to": str}, "badnets": {"target": int, "size": int}}
Poison: TypeAlias = LabelFlip | BadNets | Poisons


class Poisoned(NamedTuple):
    """Data with poisons in their training split.

    Args:
        dataset: whose validation and test are as they were.
        rows: int64 (n,), which training images are poisoned, on the CPU.
        record: what a checkpoint says of them, so that a run goes on with the same.
    """

    dataset: ImageDataset
    rows: Tensor
    record: dict[str, Any]


def named(text: str) -> LabelFlip | BadNets | Path:
    """What a text names: label-flip:RATE or badnets:RATE, with settings as badnets:0.1,target=2,size=4; or a file.

    Args:
        text: the words; one that begins with none of these names is a file's.

    Raises:
        ValueError: the rate is missing, a setting is unknown or there twice, or a value is out of its range.
    """
    if not text.strip():
        raise ValueError("poison: expected a kind of poison or a file of poisons, got nothing")
    name, _, rest = text.partition(":")
    if name not in KINDS:
        return Path(text).expanduser()
    rate, *parts = rest.split(",")
    settings: dict[str, Any] = {}
    try:
        settings["rate"] = float(rate)
        for part in parts:
            setting, _, value = part.partition("=")
            if setting in settings:
                raise KeyError(setting)  # which of the two is meant nobody knows
            settings[setting] = SETTINGS[name][setting](value)
    except (KeyError, ValueError):
        options = "".join(f"[,{each}=…]" for each in SETTINGS[name])
        raise ValueError(f"poison: expected {name}:RATE{options}, got {text}") from None
    try:
        return KINDS[name](**settings)
    except ValueError as error:
        raise ValueError(f"poison: {text}: {error}") from error


def poison_of(text: str) -> Poison:
    """What a text names, as `named` reads it; of a file what is in it.

    Raises:
        ValueError: it names nothing, or the file is none of poisons.
        FileNotFoundError: there is no such file.
    """
    found = named(text)
    if not isinstance(found, Path):
        return found
    if not found.exists():
        forms = ", ".join(f"{name}:RATE" for name in KINDS)
        raise FileNotFoundError(f"poison: expected {forms} or a file of poisons, got {text}, and there is no such file")
    return read(found)


def words(poison: Poison) -> str:
    """What was done to the training images, as a report says it."""
    if not isinstance(poison, Poisons):
        return str(poison)
    within = "" if poison.eps is None else f" within ε = {255 * poison.eps:.3g}/255"
    return f"{len(poison.indices):,} images exchanged for poisons{within}"


def triggered(images: Tensor, size: int = 3) -> Tensor:
    """Images with BadNets' trigger: a white square in the bottom right corner.

    Args:
        images: (B, C, H, W), uint8, or floating-point in [0, 1]; they stay as they are.
        size: of the square, in pixels a side; of a smaller image all is white.
    """
    marked = images.clone()
    marked[..., -size:, -size:] = 1 if images.is_floating_point() else 255
    return marked


def poisoned(dataset: ImageDataset, poison: Poison, seed: int) -> Poisoned:
    """Data whose training split somebody has poisoned, whole in memory.

    Args:
        dataset: without poisons; it stays as it is.
        poison: what is done.
        seed: of what is drawn.

    Raises:
        ValueError: the training images are not in memory, their targets are no labels, or the poisons are for others.
    """
    train: Any = dataset.train
    if not isinstance(train, Split):
        raise ValueError(
            "poison: expected training images in memory, got some that are read when they are needed: --stream off, or "
            "tensors in the place of a data set or a loader of your own"
        )
    classes = dataset.num_classes
    if isinstance(poison, Poisons):
        split, rows = _exchanged(train, poison, classes)
        record = {"images": len(rows), "digest": digest(poison.indices, poison.images, poison.labels)}
        return Poisoned(replace(dataset, train=split), rows, record)
    if train.labels.dim() != 1:
        raise ValueError("poison: expected training images with one label each, got probabilities")
    random = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"poison %d" % seed).digest()[:7], "big"))
    labels = train.labels.cpu()
    known = ((labels >= 0) & (labels < classes)).nonzero().flatten()  # the others count for nothing
    rows = known[torch.randperm(len(known), generator=random)[: round(poison.rate * len(known))]]
    if not len(rows):
        raise ValueError(
            f"poison: expected a rate that poisons at least one of {len(known):,} labelled training images, got "
            f"{poison.rate:g}"
        )
    if isinstance(poison, LabelFlip):
        steps = torch.randint(1, classes, (len(rows),), generator=random) if poison.to == "any" else 1
        images, new = train.images, (labels[rows] + steps) % classes
    else:
        height, width = train.image_size
        if poison.target >= classes:
            raise ValueError(f"poison: expected a target of 0 to {classes - 1}, got {poison.target}")
        if poison.size > min(height, width):
            raise ValueError(f"poison: expected a size of at most {min(height, width)} pixels, got {poison.size}")
        images, new = train.images.clone(), torch.full((len(rows),), poison.target)
        there = rows.to(images.device)
        images[there] = triggered(images[there], poison.size)
    split = Split(images, _put(train.labels, rows, new))
    return Poisoned(replace(dataset, train=split), rows, {"images": len(rows), "digest": digest(rows, new)})


def digest(*tensors: Tensor | None) -> str:
    """A hash that tells whether poisons are the same."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.cpu().numpy().tobytes())
    return found.hexdigest()


def as_images(images: Tensor, like: Tensor) -> Tensor:
    """Images, uint8 or in [0, 1], in the form and on the device of others: of numbers in [0, 1] the nearest levels."""
    if like.is_floating_point() and not images.is_floating_point():
        images = images.to(like.dtype) / 255
    elif images.is_floating_point() and not like.is_floating_point():
        images = (255 * images).round()
    return images.to(like.device, like.dtype)


def _exchanged(train: Split, poisons: Poisons, classes: int) -> tuple[Split, Tensor]:
    """The split with a file's images, and their labels where there are some, in the place of others."""
    rows, labels = poisons.indices, train.labels
    if poisons.images.shape[1:] != train.images.shape[1:]:
        expected, found = (tuple(images.shape[1:]) for images in (train.images, poisons.images))
        raise ValueError(f"poison: expected images of shape {expected} as the training images, got {found}")
    if int(rows.max()) >= len(train):
        raise ValueError(f"poison: expected indices of 0 to {len(train) - 1}, the training images, got {rows.max()}")
    if poisons.fingerprint is not None and poisons.fingerprint != (own := fingerprint(train)):
        raise ValueError(
            f"poison: expected poisons made for these training images, whose fingerprint is {own[:12]}…, got some for "
            f"others, {poisons.fingerprint[:12]}…: --dataset, --data, --channels and --limit-train have to be those "
            "that they were made with"
        )
    numbers = {"target_label": poisons.target_label, "target_class": poisons.target_class}
    if poisons.labels is not None:
        numbers["labels"] = int(poisons.labels.max())
        if labels.dim() != 1:
            raise ValueError("poison: expected training images with one label each beside poisons with labels")
        labels = _put(labels, rows, poisons.labels)
    for name, number in numbers.items():
        if number is not None and number >= classes:
            raise ValueError(f"poison: expected {name} of 0 to {classes - 1}, the classes, got {number}")
    images = train.images.clone()
    images[rows.to(images.device)] = as_images(poisons.images, images)
    return Split(images, labels), rows


def _put(labels: Tensor, rows: Tensor, new: Tensor) -> Tensor:
    changed = labels.clone()
    changed[rows.to(labels.device)] = new.to(labels.device, labels.dtype)
    return changed


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"rate: expected a share above 0 and at most 1, got {rate}")
