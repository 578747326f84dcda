"""What is called in a training: the hooks that a callback has, ready callbacks, and those that belong to a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from immunity_fast.runtime import distributed
from immunity_fast.runtime.checks import check_whole
from immunity_fast.runtime.failures import one_line
from immunity_fast.runtime.nested import put_together, taken_apart
from immunity_fast.training.monitoring import Mode, Monitor
from immunity_fast.training.step import MEASURED

HOOKS = ("on_fit_start", "on_epoch_start", "on_step_end", "on_epoch_end", "on_fit_end")


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
    """What one step has measured, by name, read from the device at the first look.

    Args:
        measured: float64, as many as there are names.
        names: as `TrainStep.measured` has them.
    """

    def __init__(self, measured: Tensor, names: Sequence[str] = MEASURED) -> None:
        self._measured, self._names = measured, tuple(names)
        self._values: dict[str, float] | None = None

    def __getitem__(self, name: str) -> float:
        if self._values is None:
            self._values = dict(zip(self._names, self._measured.tolist(), strict=True))
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Callbacks:
    """Callbacks and the trainer that they are told of.

    Args:
        callbacks: in the order in which they are called.
        trainer: what each hook gets first.

    Raises:
        TypeError: something that is no callback.
    """

    def __init__(self, callbacks: Sequence[Callback] = (), trainer: Any = None) -> None:
        given: Sequence[Any] = callbacks
        for each in given:
            if not isinstance(each, Callback):
                made = " (a class: write its name with parentheses)" if isinstance(each, type) else ""
                raise TypeError(f"callbacks: expected instances of Callback, got {_name(each)}{made}")
        self.callbacks, self.trainer = tuple(callbacks), trainer
        # Of most trainings nobody looks at single steps.
        self.sees_steps = any(_looks_at_steps(each) for each in self.callbacks)

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all of them.

        Raises:
            CallbackError: one has failed.
        """
        for callback in self.callbacks:
            with _named(callback, hook):
                getattr(callback, hook)(self.trainer, *arguments)

    def state(self) -> tuple[list[Any], dict[str, Tensor]]:
        """What a checkpoint keeps of them: a list for JSON, and tensors.

        Raises:
            CallbackError: one has a state that no checkpoint can hold.
        """
        listed: list[Any] = []
        tensors: dict[str, Tensor] = {}
        for number, callback in enumerate(self.callbacks):
            with _named(callback, "state_dict"):
                plain, own = taken_apart(callback.state_dict())
            listed.append([_name(callback), plain])
            tensors |= {f"{number}/{name}": tensor for name, tensor in own.items()}
        return listed, tensors

    def load(self, listed: Sequence[Any], tensors: Mapping[str, Tensor]) -> None:
        """Give each callback the state that a checkpoint has of the next of its class; what has none stays as it is.

        Raises:
            CallbackError: one does not take its state.
        """
        left = list(enumerate(listed))
        for callback in self.callbacks:
            found = next((each for each in left if each[1][0] == _name(callback)), None)
            if found is None:
                continue
            left.remove(found)
            number, (_, plain) = found
            start = f"{number}/"
            own = {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}
            with _named(callback, "load_state_dict"):
                callback.load_state_dict(put_together(plain, own))


class LambdaCallback(Callback):
    """Functions as a callback: `LambdaCallback(on_epoch_end=lambda trainer, record: …)`.

    Args:
        hooks: functions by the name of their hook, each with its arguments.

    Raises:
        TypeError: no such hook, or no function.
    """

    def __init__(self, **hooks: Callable[..., Any]) -> None:
        for name, function in hooks.items():
            if name not in HOOKS:
                raise TypeError(f"{name}: expected one of {', '.join(HOOKS)}, got a hook that there is not")
            if not callable(function):
                raise TypeError(f"{name}: expected a function, got {_name(function)}")
            setattr(self, name, function)


class EarlyStopping(Callback):
    """Ends the training once a number of the records has not become better for some epochs.

    Of a training in stages, whose experts are trained one after another, the last stage's epochs alone are looked at.

    Args:
        monitor: which number; see `monitoring.DIRECTIONS`, or what a record has.
        patience: so many epochs in a row without a better one end it.
        mode: whether "min" or "max" is better; "auto" knows it of the package's own numbers.
        min_delta: by how much it has to be better to count.
        restore_best: at the end the model gets the weights of the best epoch, and a run folder a best checkpoint of
            them; until then they are kept in memory, and in the run's checkpoint.

    Attributes:
        best, best_epoch: the best value so far and its epoch; None before there is one.
        wait: how many epochs in a row had no better one.
        stopped_epoch: the epoch after which it ended the training; None if it has not.

    Raises:
        ValueError: a patience below 1, or see `Monitor`.
    """

    def __init__(
        self,
        monitor: str = "val_accuracy_mean",
        patience: int = 5,
        *,
        mode: Mode = "auto",
        min_delta: float = 0.0,
        restore_best: bool = False,
    ) -> None:
        check_whole("patience", patience, 1)
        self._monitor = Monitor(monitor, mode, min_delta)
        self.monitor, self.mode = self._monitor.name, self._monitor.mode
        self.patience, self.min_delta, self.restore_best = patience, min_delta, restore_best
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.wait = 0
        self.stopped_epoch: int | None = None
        self._weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Any) -> None:
        """Check that what it watches will be measured; where a training begins, it begins anew itself."""
        self._monitor.check_measurable(trainer)
        if not trainer.step:  # it may have been in another training
            self.best = self.best_epoch = self.stopped_epoch = None
            self.wait, self._weights = 0, {}

    def on_epoch_end(self, trainer: Any, record: dict[str, Any]) -> None:
        """Compare the epoch with the best one."""
        self._monitor.check_measured(record)
        if not getattr(trainer, "in_last_stage", True):
            return
        value = self._monitor.value(record)
        if value is not None and self._monitor.better(value, self.best):
            self.best, self.best_epoch, self.wait = value, record["epoch"], 0
            if self.restore_best:
                self._weights = {name: tensor.detach().clone() for name, tensor in trainer.weights().items()}
            return
        self.wait += 1
        if self.wait >= self.patience:
            self.stopped_epoch = record["epoch"]
            epochs = "epoch" if self.wait == 1 else "epochs"
            best = "" if self.best is None else f" (best: {self.best:.4g} in epoch {self.best_epoch})"
            trainer.stop(f"{self.monitor} has not improved for {self.wait} {epochs}{best}")

    def on_fit_end(self, trainer: Any) -> None:
        """Give the model the weights of the best epoch, if that was asked for, and the run its best checkpoint."""
        if self.restore_best and self._weights:
            trainer.load_weights(self._weights)
            if trainer.run is not None:
                trainer.save_model(trainer.run.best_checkpoint)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, with the best weights, if it keeps them."""
        names = ("best", "best_epoch", "wait", "stopped_epoch")
        return {name: getattr(self, name) for name in names} | {"weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name in ("best", "best_epoch", "wait", "stopped_epoch"):
            setattr(self, name, state[name])
        self._weights = dict(state["weights"])


class Checkpoint(Callback):
    """Keeps models of single epochs as files, which `immunity_fast.load` takes; the run's own checkpoint is another.

    Of averaged weights (`ema`) a file has the average. The best epochs of a training in stages are of the last one.

    Args:
        folder: where the files are; None is `checkpoints/` in the run's folder.
        monitor: the best epochs are those where this number is; None keeps each epoch.
        mode: whether "min" or "max" is better; "auto" knows it of the package's own numbers.
        best: so many of the best epochs are kept.
        every: look at each n-th epoch only.

    Raises:
        ValueError: numbers below 1, or see `Monitor`.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        monitor: str | None = None,
        mode: Mode = "auto",
        best: int = 1,
        every: int = 1,
    ) -> None:
        check_whole("best", best, 1)
        check_whole("every", every, 1)
        self._monitor = None if monitor is None else Monitor(monitor, mode)
        self.monitor = None if self._monitor is None else self._monitor.name
        self.best, self.every = best, every
        self._given = self._folder = None if folder is None else Path(folder)
        self._kept: list[tuple[float | None, Path]] = []

    @property
    def paths(self) -> list[Path]:
        """The files that are kept, of the best first; without a monitor in the order of the epochs."""
        return [path for _, path in self._kept]

    @property
    def best_path(self) -> Path | None:
        """The file of the best epoch; without a monitor of the last."""
        return None if not self._kept else self._kept[0 if self._monitor else -1][1]

    @property
    def best_value(self) -> float | None:
        """What was monitored, of the best epoch."""
        return self._kept[0][0] if self._kept else None

    def on_fit_start(self, trainer: Any) -> None:
        """Find the folder, and check that what it watches will be measured; a training that begins has no files."""
        if self._monitor is not None:
            self._monitor.check_measurable(trainer)
        if self._given is None and trainer.run is None:
            raise ValueError("folder: expected a folder for the models, or a Trainer with out=, got neither")
        self._folder = trainer.run.checkpoint.parent if self._given is None else self._given
        if not trainer.step:
            self._kept = []

    def on_epoch_end(self, trainer: Any, record: dict[str, Any]) -> None:
        """Write the epoch's model, and remove what it has beaten."""
        epoch = record["epoch"]
        if epoch % self.every:
            return
        assert self._folder is not None
        value = None
        name = f"epoch-{epoch:04}"
        if self._monitor is not None:
            self._monitor.check_measured(record)
            if not getattr(trainer, "in_last_stage", True):
                return
            value = self._monitor.value(record)
            if value is None or (len(self._kept) >= self.best and not self._better(value, self._kept[-1][0])):
                return
            name = f"{name}-{self.monitor}-{value:.4f}"
        path = self._folder / f"{name}.safetensors"
        trainer.save_model(path)
        place = len(self._kept)
        if self._monitor is not None:  # behind those that are as good: the first of them stays the best
            place = next((at for at, (kept, _) in enumerate(self._kept) if self._better(value, kept)), place)
        self._kept.insert(place, (value, path))
        while self._monitor is not None and len(self._kept) > self.best:
            _, beaten = self._kept.pop()
            if distributed.rank() == 0:
                beaten.unlink(missing_ok=True)

    def _better(self, value: float | None, than: float | None) -> bool:
        assert self._monitor is not None
        return value is not None and self._monitor.better(value, than)

    def state_dict(self) -> dict[str, Any]:
        """Which files there are."""
        return {"kept": [[value, str(path)] for value, path in self._kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`; files that are gone are forgotten."""
        self._kept = [(value, Path(path)) for value, path in state["kept"] if Path(path).is_file()]


@contextmanager
def _named(callback: Callback, hook: str) -> Iterator[None]:
    """Whatever a callback's code raises in a `with` block names it."""
    try:
        yield
    except Exception as error:
        raise CallbackError(f"callback {_name(callback)}: {hook} failed: {one_line(error)}") from error


def _name(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


def _looks_at_steps(callback: Callback) -> bool:
    return getattr(callback.on_step_end, "__func__", None) is not Callback.on_step_end
