"""What is called in a training: the hooks that a callback has, and a list of callbacks that belong to a trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from immunity_fast.runtime.failures import one_line
from immunity_fast.training.step import MEASURED


class Callback:
    """What a training calls; each method does nothing until a subclass says what.

    `trainer` is the `Trainer` that trains: `trainer.model`, `trainer.optimizer`, `trainer.history`, `trainer.epoch`,
    `trainer.stop(reason)`. Of several processes each calls its own callbacks, with the same records.
    """

    def on_fit_start(self, trainer: Any) -> None:
        """Before the first step, once data, network and checkpoint are there."""

    def on_epoch_start(self, trainer: Any) -> None:
        """Before the steps of an epoch, or before the rest of them where a run goes on in the middle of one."""

    def on_step_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """After a step of the optimiser.

        Args:
            trainer: the `Trainer`.
            metrics: of the batch, before its update: "loss", "cross_entropy", "mutual_information_loss" and
                "position_stability". To read them is to wait for the device.
        """

    def on_epoch_end(self, trainer: Any, record: dict[str, Any]) -> None:
        """After an epoch's checks, before its checkpoint is written.

        Args:
            trainer: the `Trainer`.
            record: what metrics.jsonl has of the epoch; see docs/training.md.
        """

    def on_fit_end(self, trainer: Any) -> None:
        """After the last epoch; not where an error or an interrupt ends the training."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint is to keep of it: numbers, texts, lists and dictionaries of such, and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`, before `on_fit_start`, where a run goes on."""


class CallbackError(RuntimeError):
    """A callback has failed; the text names it, the cause is its own exception."""


class StepMetrics(Mapping[str, float]):
    """What `MEASURED` names, of one step, read from the device at the first look.

    Args:
        measured: (4,) float64.
    """

    def __init__(self, measured: Tensor) -> None:
        self._measured = measured
        self._values: dict[str, float] | None = None

    def __getitem__(self, name: str) -> float:
        if self._values is None:
            self._values = dict(zip(MEASURED, self._measured.tolist(), strict=True))
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(MEASURED)

    def __len__(self) -> int:
        return len(MEASURED)


class Callbacks:
    """Callbacks and the trainer that they are told of.

    Args:
        callbacks: in the order in which they are called.
        trainer: what each hook gets first.
    """

    def __init__(self, callbacks: Sequence[Callback] = (), trainer: Any = None) -> None:
        self.callbacks, self.trainer = tuple(callbacks), trainer
        # Of most trainings nobody looks at single steps.
        self.sees_steps = any(type(each).on_step_end is not Callback.on_step_end for each in self.callbacks)

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all of them.

        Raises:
            CallbackError: one has failed.
        """
        for callback in self.callbacks:
            try:
                getattr(callback, hook)(self.trainer, *arguments)
            except Exception as error:  # whatever a user's code raises
                raise CallbackError(f"callback {type(callback).__name__}: {hook} failed: {one_line(error)}") from error
