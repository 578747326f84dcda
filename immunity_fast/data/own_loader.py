"""Training batches of a user's data sets and loaders, whose place in an epoch can be taken up again, bit for bit."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from immunity_fast.data.augmentation import as_float, draw_affine
from immunity_fast.data.loader import Batch, TrainLoader
from immunity_fast.data.own import Batches, Items, as_batch, check_labels, generators_of
from immunity_fast.runtime import distributed
from immunity_fast.runtime.nested import put_together, taken_apart


class ItemLoader(TrainLoader):
    """The batches of a data set whose items are read as they are needed, in `TrainLoader`'s order.

    Args:
        split: the items.
        batch_size, seed, padding, degrees, flip, rank, processes: see `TrainLoader`.
        classes: K.
        ignore_index: the label of images that have none.
    """

    split: Any

    def __init__(
        self, split: Items, batch_size: int, seed: int, *, classes: int, ignore_index: int | None = None, **options: Any
    ) -> None:
        super().__init__(split, batch_size, seed, **options)  # type: ignore[arg-type]
        self._labels_allowed = classes, self.split.called, ignore_index

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch, or a whole new one where none has begun."""
        if self.position == 0:
            self._draw_epoch()
        digest = hashlib.sha256(self._at_start.numpy().tobytes()).digest()
        rows = self._order[self.position :].tolist()
        for images, targets in self.split.batches(rows, seed=int.from_bytes(digest[:7], "big")):
            check_labels(targets, *self._labels_allowed)
            index, device = self.position, self.split.device
            self.position += 1
            yield _on(device, images, targets, self._affine[index])
        self.position = 0

    def _labels_of(self, order: Tensor) -> Tensor:
        return order  # they come with the images

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.split.device
        return device


class BatchLoader:
    """The batches of a user's loader, in its own order.

    A place in an epoch is taken up again in torchdata's `StatefulDataLoader` by its own state; in any other loader by
    reading the batches before it once more, from the states that the generators had when the epoch began: to the same
    bits, where all that is random in the loader is drawn from torch's generators.

    Args:
        batches: the loader, and how many batches an epoch has.
        seed: of the augmentation, if there is any.
        classes: K.
        ignore_index: the label of images that have none.
        augment: what `draw_affine` is given; None leaves the images as they are.
        rank: of the process.
    """

    def __init__(
        self,
        batches: Batches,
        seed: int,
        *,
        classes: int,
        ignore_index: int | None = None,
        augment: dict[str, Any] | None = None,
        rank: int = 0,
    ) -> None:
        self.batches, self.loader, self.called = batches, batches.loader, batches.called
        self._seed, self._augment, self._rank = seed, augment, rank
        self._labels_allowed = classes, batches.called, ignore_index
        self._stateful = callable(getattr(self.loader, "state_dict", None)) and callable(
            getattr(self.loader, "load_state_dict", None)
        )
        self._count = batches.count
        self.position = 0  # batches of the present epoch that were given
        self.epoch = 0  # that is present
        self._at_start = self._states()  # of the generators, when it began
        self._pending: tuple[dict[str, Any] | None] | None = None  # the loader's own state, where it is to be taken up

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the present epoch, or a whole new one where none has begun."""
        batches = self._begun() if self._pending is None else self._taken_up()
        while self.position < self._count:
            batch = next(batches, None)
            if batch is None:
                if self.batches.steps is None:
                    raise ValueError(
                        f"{self.called}: expected {self._count} batches an epoch, which is the loader's length, got "
                        f"{self.position}"
                    )
                batches = iter(self.loader)  # shorter than the epoch that was asked for
                batch = next(batches)
            index = self.position
            self.position += 1
            images, targets = as_batch(batch, self.called)
            if self.position == 1 or not targets.is_cuda:  # without waiting for the device at each step
                check_labels(targets, *self._labels_allowed)
            yield _on(self.batches.device, images, targets, self._affine(index, len(targets)))
        self.position = 0
        self.epoch += 1

    def _begun(self) -> Iterator[Any]:
        for holder in (self.loader, getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)):
            set_epoch = getattr(holder, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self.epoch)  # a distributed sampler's order depends on it
                break
        self._at_start = self._states()
        return iter(self.loader)

    def _taken_up(self) -> Iterator[Any]:
        """The batches from where a checkpoint was written."""
        assert self._pending is not None
        (state,) = self._pending
        self._pending = None
        now = torch.get_rng_state()
        if not self.position:  # at an epoch's end
            if state is not None:
                next(self._loaded(state), None)  # which is the end of the epoch before
                torch.set_rng_state(now)
            return self._begun()
        start = self._at_start
        self._set_states(start)
        batches = self._begun() if state is None else self._loaded(state)
        self._at_start = start
        if state is None:
            for _ in range(self.position):
                if next(batches, None) is None:
                    batches = iter(self.loader)
                    next(batches)
        torch.set_rng_state(now)
        return batches

    def _loaded(self, state: dict[str, Any]) -> Iterator[Any]:
        self.loader.load_state_dict(state)
        return iter(self.loader)

    def _affine(self, index: int, count: int) -> Tensor | None:
        if self._augment is None:
            return None
        text = f"{self._seed} {self.epoch} {index} {self._rank}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:7], "big")
        return draw_affine(count, torch.Generator().manual_seed(seed), **self._augment)

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(generator.get_state() for generator in generators_of(self.loader))]

    def _set_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for generator, state in zip(generators_of(self.loader), states[1:], strict=True):
            generator.set_state(state)

    def state(self) -> dict[str, Tensor]:
        """Everything that the batches to come depend on, as far as the loader tells it."""
        states = self._at_start if self.position or self._pending else self._states()
        found = {"position": torch.tensor(self.position), "epoch": torch.tensor(self.epoch)}
        found |= {f"generator{number}": state for number, state in enumerate(states)}
        own = None
        if self._pending is not None:
            (own,) = self._pending
        elif self._stateful and (self.position or self.epoch):
            own = self.loader.state_dict()
        if own is not None:
            plain, tensors = taken_apart(own, f"{self.called}: state of the loader")
            found["own"] = torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)
            found |= {f"own/{name}": tensor for name, tensor in tensors.items()}
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take up where `state` was taken."""
        self.position, self.epoch = int(state["position"]), int(state["epoch"])
        self._at_start = [state[f"generator{number}"] for number in range(len(self._states()))]
        own = None
        if "own" in state:
            tensors = {name[4:]: tensor for name, tensor in state.items() if name.startswith("own/")}
            own = put_together(json.loads(bytes(state["own"].tolist())), tensors)
        self._pending = (own,)
        if not self.position:
            for generator, begun in zip(generators_of(self.loader), self._at_start[1:], strict=True):
                generator.set_state(begun)


class SameBatchesWarning(UserWarning):
    """Processes that train together were given loaders of the same batches."""


def warn_of_same_batches(batches: Batches) -> None:
    """Say it where processes train on the same images, as loaders without a distributed sampler give them.

    All processes call this at the same point; the first one warns.
    """
    if distributed.count() == 1:
        return
    images, targets = batches.first
    digest = hashlib.sha256()
    for tensor in (images, targets):
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    firsts = distributed.every(digest.hexdigest())
    if len(set(firsts)) < len(firsts) and distributed.rank() == 0:
        warnings.warn(
            f"{batches.called}: expected other batches in each of {len(firsts)} processes, got the same first one in "
            "several; give the loader sampler=torch.utils.data.DistributedSampler(data set)",
            SameBatchesWarning,
            stacklevel=2,
        )


def _on(device: torch.device, images: Tensor, targets: Tensor, affine: Tensor | None) -> Batch:
    images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
    return Batch(as_float(images) if affine is None else images, targets, affine)
