"""The training of a mixture from Python: what the command `train` does, on any data, with callbacks of one's own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from immunity_fast.data import OWN
from immunity_fast.data.datasets import ImageDataset, Split
from immunity_fast.data.own import as_split, check_labels
from immunity_fast.data.own_dataset import OwnDataset, held, own_dataset
from immunity_fast.evaluation.results import Results
from immunity_fast.models.moe import ImmunityMoE, SingleNetwork
from immunity_fast.runtime import cli, distributed
from immunity_fast.targets import hard_labels
from immunity_fast.training import loggers as logging_places
from immunity_fast.training.callbacks import Callback, Callbacks, EarlyStopping
from immunity_fast.training.checkpoint import load_checkpoint, load_module, model_file, under
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.config_file import suggestion
from immunity_fast.training.loggers import Logger
from immunity_fast.training.loop import save_model, train
from immunity_fast.training.preparation import check_changes, is_default, prepare
from immunity_fast.training.records import Records
from immunity_fast.training.run_evaluation import evaluate_trained
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from immunity_fast.training.validation import validate


class Trainer:
    """Trains a mixture, or a single network, on a device or, under `torchrun`, on several.

    With the same settings and data it takes the steps of the command `train`, bit for bit. Nothing is written without
    `out`, and nothing printed without `progress`.

    Args:
        config: the settings; None are the defaults of `TrainConfig`, or those of the run that is in `out` and goes on.
        train: what is trained on, see `immunity_fast.data.own`; an `ImageDataset` brings its other splits along. None
            is what `config.dataset` and `config.data` name.
        validation: what is measured on after each epoch; None is nothing, but for an `ImageDataset`'s.
        test: what `test` and `evaluate` look at.
        model: what is trained, in place: an `ImmunityMoE`; a list of networks is made one by `from_experts`, and one
            network a mixture of itself, of copies. None is a new one of what `config` names.
        callbacks: are called in turn, see `Callback`. With `config.early_stopping` there is an `EarlyStopping`.
        loggers: names, `Logger`s, or functions of (metrics, step); None is what `config.loggers` names, where `out` is.
        out: the folder of the run, with its settings, records and checkpoints; None writes nothing.
        classes: the classes' names, or how many there are; None is what the data say.
        device: instead of `config.device`.
        progress: show a bar and a line an epoch; otherwise such lines go to the logger "immunity_fast".
        augment: whether the settings' crops, rotations and mirroring are applied; None does but to the batches of a
            loader, which come as its owner wants them.
        steps_per_epoch: batches of an epoch, where `train` is a loader; None is its length.
        settings: single settings by name, in the place of `config`'s; another optimiser or schedule comes with its own
            numbers, see `TrainConfig.changed`.

    Attributes:
        config: the settings.
        state: the training in memory, once it has been prepared.
        run: the run's folder, if there is one.

    Raises:
        ValueError, TypeError: arguments that do not go together; one line that names it.
        ModuleNotFoundError: a logger's package is not installed.
    """

    def __init__(
        self,
        config: TrainConfig | None = None,
        train: Any = None,
        validation: Any = None,
        *,
        test: Any = None,
        model: ImmunityMoE | nn.Module | Sequence[nn.Module] | None = None,
        callbacks: Callback | Iterable[Callback] | None = (),
        loggers: str | Logger | Callable[..., Any] | Sequence[Any] | None = None,
        out: str | os.PathLike[str] | None = None,
        classes: Sequence[str] | int | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        augment: bool | None = None,
        steps_per_epoch: int | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and not isinstance(config, TrainConfig):
            raise TypeError(f"config: expected a TrainConfig, got {type(config).__name__}; data is train=")
        known = {option.name for option in dataclasses.fields(TrainConfig)}
        for name in settings:
            if name not in known:
                near = suggestion(name, sorted(known)).replace(
                    "--help lists them", "help(TrainConfig) lists the settings"
                )
                raise TypeError(
                    f"{name}: expected an argument of Trainer, or a setting of TrainConfig, got another name{near}"
                )
        if train is None and (validation is not None or test is not None):
            raise ValueError("train: expected data to train on beside validation or test, got None")
        self._given_config = config is not None or bool(settings)
        self._out = None if out is None else Path(out).expanduser()
        self._data, self._classes, self._steps = (train, validation, test), classes, steps_per_epoch
        self._augment = augment
        wanted = (config or TrainConfig()).changed(**settings) if model is not None else TrainConfig()
        self._model = _as_mixture(model, wanted, train, steps_per_epoch)
        if device is not None:
            settings["device"] = str(device)
        if augment is False:
            settings |= {"crop_padding": 0, "rotation": 0.0, "flip": "off"}
        if config is None and "preset" in settings:
            config = TrainConfig.from_preset(settings["preset"])
        self.config = self._settled((config or TrainConfig()).changed(**settings))
        self.state: TrainingState | None = None
        self.run: Run | None = None
        self.progress = progress
        self._given = _as_callbacks(callbacks)
        self._resume: bool | Literal["auto"] = False
        self._callbacks = self._all_callbacks()
        self._loggers = self._all_loggers(loggers)
        self._unlocked = True
        self._loaded = False

    @classmethod
    def from_run(
        cls, folder: str | os.PathLike[str], train: Any = None, validation: Any = None, **options: Any
    ) -> Trainer:
        """The trainer of a run, as it stands: `fit()` goes on with it, `model` and `history` are what it has so far.

        Args:
            folder: the run's.
            train, validation: the data that it was begun with, where its settings do not name them.
            options: see the class; a model of the user's own has to be given again.

        Raises:
            FileNotFoundError: there is no run in the folder.
            ValueError: it does not go with what is given.
        """
        run = Run.open(Path(folder).expanduser())
        trainer = cls(options.pop("config", None) or run.config(), train, validation, out=folder, **options)
        trainer._resume = True
        return trainer

    def fit(self, *, resume: bool | Literal["auto"] | str | os.PathLike[str] | None = None) -> Records:
        """Train to the end, or until somebody calls `stop`.

        Args:
            resume: whether to go on with the run in the folder `out`; "auto" does where there is one; a folder is that
                run's. None is False, but for a trainer that was interrupted, or is `from_run`.

        Returns:
            The epochs' records, as metrics.jsonl has them.

        Raises:
            ValueError, OSError, ModuleNotFoundError: what was given is wrong; one line.
            FloatingPointError: the loss is no longer a number.
            CallbackError: a callback has failed.
        """
        if resume is not None and not isinstance(resume, bool) and resume != "auto":
            self._out, resume = Path(resume).expanduser(), True
        if resume is not None:
            if resume and self._out is None:
                raise ValueError("resume: expected out=, the folder of the run that goes on, got no folder")
            self._resume = resume  # type: ignore[assignment]
        with self._processes(), ExitStack() as held:
            try:
                self.prepare(held)
            except FileExistsError:  # in the words of Python, not of the command
                raise FileExistsError(
                    f"out: {self._out} exists already; name a new folder, or go on with it: fit(resume=True)"
                ) from None
            self.train()
        return self.history

    def prepare(self, held: ExitStack | None = None, *, resume: bool | None = None) -> tuple[TrainingState, Run | None]:
        """Everything before the first step: data, network, folder, checkpoint.

        Args:
            held: the run stays locked until it ends; None does not lock it.
            resume: as `fit` has it.
        """
        if resume is not None:
            self._resume = resume
        folder, main_process = self._out, distributed.rank() == 0
        goes_on = bool(self._resume)
        if folder is not None and self._resume == "auto":
            goes_on = distributed.of_first(Run(folder).config_file.is_file())
        if self.state is None:
            with distributed.together():  # the first process alone has to see the folder
                if folder is not None and goes_on and main_process:
                    self._take_settings(Run.open(folder))
                elif folder is not None and main_process and not is_default(folder, self.config):
                    Run.check_free(folder)
                if held is not None and goes_on and folder is not None and main_process:
                    held.enter_context(Run(folder).locked())
            begun = distributed.of_first(self.config) if folder is not None and goes_on else None
            if begun is not None and not main_process and not self._given_config:
                self._go_on_with(begun)
            self.state, self.run = prepare(
                folder,
                goes_on,
                self.config,
                dataset=self._dataset(),
                model=self._model,
                log=cli.console.print if self.progress else None,
            )
            goes_on = goes_on and held is not None
        else:
            goes_on = False
        with distributed.together():
            if held is not None and self.run is not None and not goes_on and main_process:
                held.enter_context(self.run.locked())
        if not self._loaded:
            self._callbacks.load(*self.state.saved_callbacks)
            self._loaded = True
        return self.state, self.run

    def train(self) -> None:
        """Train what has been prepared to the end."""
        state = self._ready()
        try:
            train(state, self.run, self._callbacks, self._loggers, progress=self.progress)
        finally:  # it may have found smaller batches
            found = state.config
            self.config = dataclasses.replace(self.config, batch_size=found.batch_size, accumulate=found.accumulate)

    def stop(self, reason: str = "a callback has asked for it") -> None:
        """End the training after the present epoch, as if it were the last one.

        Args:
            reason: is shown and kept.
        """
        state = self._ready()
        state.stopped = state.stopped or reason

    def validate(self, data: Any = None) -> dict[str, Any]:
        """What is measured after an epoch: accuracies, attacked and not, and the heatmaps; see `training.validation`.

        Args:
            data: what is looked at; None is the validation split.

        Returns:
            Numbers by their names in a record, `val_…`.
        """
        return self._measured("validation", data)

    def test(self, data: Any = None) -> dict[str, Any]:
        """`validate` of the test split, whose numbers are called `test_…`.

        Args:
            data: what is looked at; None is the test split.
        """
        found = self._measured("test", data)
        return {name.replace("val_", "test_", 1): value for name, value in found.items()}

    def evaluate(self) -> Results:
        """What the command ends with: attacks on the test split; in a run's folder the tables, figures and the report.

        Returns:
            What was found, which a notebook shows as tables; with a run's folder `report` is the file for a browser.

        Raises:
            ValueError: there are no test images, or the training has not ended.
        """
        state = self._ready()
        if not len(state.dataset.test):
            raise ValueError("test: expected images to evaluate on, got none")
        return evaluate_trained(state, self.run, printed=False)

    def save_model(self, path: str | os.PathLike[str]) -> Path:
        """Write the model alone, which `immunity_fast.load` takes; of averaged weights their average.

        Args:
            path: the file, `….safetensors`.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_model(self._ready(), Path(path))
        return Path(path)

    def load_weights(self, weights: Mapping[str, Tensor] | str | os.PathLike[str]) -> None:
        """Give the model, and the average of its weights, other ones.

        Args:
            weights: by name, as `weights` has them; or the file, or run, that has them.
        """
        state = self._ready()
        if not isinstance(weights, Mapping):
            file = model_file(weights)
            tensors, _ = load_checkpoint(file)
            weights = under("ema", tensors) or under("model", tensors)
            load_module(file, state.model, weights, "model/")
        state.model.load_state_dict(weights)
        if state.average is not None:
            state.average.load(dict(weights), state.average.steps)

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name, or the average of them, where there is one: what is evaluated."""
        return self._ready().weights()

    @property
    def model(self) -> ImmunityMoE:
        """What is trained."""
        return self._ready().model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What updates it."""
        return self._ready().optimizer

    @property
    def device(self) -> torch.device:
        """Where."""
        return self._ready().device

    @property
    def dataset(self) -> ImageDataset:
        """What it is trained and measured on."""
        return self._ready().dataset

    @property
    def callbacks(self) -> tuple[Callback, ...]:
        """All callbacks, in the order in which they are called."""
        return self._callbacks.callbacks

    @property
    def history(self) -> Records:
        """The records of the epochs so far, as metrics.jsonl has them; a notebook shows them as a table."""
        return Records() if self.state is None and not self._resume else Records(self._ready().history)

    @property
    def epoch(self) -> int:
        """Epochs that have ended."""
        return 0 if self.state is None and not self._resume else self._ready().epoch

    @property
    def step(self) -> int:
        """Steps of the optimiser that were taken."""
        return 0 if self.state is None and not self._resume else self._ready().step

    @property
    def in_last_stage(self) -> bool:
        """Whether the epoch that ended last is one in whose stage the last experts are trained, as all are mostly."""
        return self.state is None or self.state.in_last_stage

    @property
    def stopped(self) -> str | None:
        """Why the training ended before its last epoch, if it did."""
        return None if self.state is None and not self._resume else self._ready().stopped

    @property
    def should_stop(self) -> bool:
        """Whether the training ends after the present epoch; to set it is to `stop`."""
        return self.stopped is not None

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        if value:
            self.stop()
        elif self.state is not None:
            self.state.stopped = None

    def _ready(self) -> TrainingState:
        """The training in memory, which is prepared where it is not."""
        if self.state is None:
            distributed.check_alone("fit")
            self.prepare()
        assert self.state is not None
        return self.state

    @contextmanager
    def _processes(self) -> Iterator[None]:
        with distributed.processes(cli.pick_device(self.config.device)):
            yield

    def _settled(self, config: TrainConfig) -> TrainConfig:
        """The settings with what the model and the data that were given say instead."""
        changes: dict[str, Any] = {}
        if self._model is not None:
            if config.weights is not None:
                raise ValueError(f"weights: expected None beside a model, which has its own, got {config.weights}")
            changes |= {"arch": self._model.arch or OWN, "experts": self._model.num_experts}
        if self._data[0] is not None and not isinstance(self._data[0], ImageDataset):
            for name, instead in (("image_size", "a transform"), ("limit_train", "torch.utils.data.Subset")):
                if getattr(config, name) is not None:
                    raise ValueError(
                        f"{name}: expected None beside data of your own, which are taken as they are ({instead} can "
                        f"change them), got {getattr(config, name)}"
                    )
            changes |= {"dataset": OWN, "data": None}
        return dataclasses.replace(config, **changes)

    def _take_settings(self, run: Run) -> None:
        """Of a run that goes on: its settings, where none were given; else they have to be its."""
        begun = run.config()
        if self._given_config:
            check_changes(run, begun, dataclasses.asdict(self.config), option=False)
        else:
            self._go_on_with(begun)

    def _go_on_with(self, begun: TrainConfig) -> None:
        self.config = dataclasses.replace(begun, device=self.config.device)
        self._callbacks = self._all_callbacks()

    def _all_callbacks(self) -> Callbacks:
        callbacks = Callbacks(self._given, self)  # which checks them
        patience = self.config.early_stopping
        if patience is not None and not any(isinstance(each, EarlyStopping) for each in self._given):
            assert self.config.monitored is not None
            callbacks = Callbacks((*self._given, EarlyStopping(self.config.monitored, patience)), self)
        return callbacks

    def _all_loggers(self, loggers: Any) -> list[Logger]:
        if loggers is None:
            if self._out is None and self.config.loggers == TrainConfig().loggers:
                return []
            loggers = self.config.loggers
            if loggers == TrainConfig().loggers and not logging_places.is_installed(loggers):
                return []  # nobody has asked for it
        return logging_places.made(loggers) if distributed.in_first() else []

    def _dataset(self) -> ImageDataset | None:
        train, validation, test = self._data
        classes = None if self._model is None else self._model.num_classes
        if train is None:
            return None
        workers = self.config.worker_processes
        dataset = own_dataset(
            train,
            validation,
            test,
            classes=self._classes,
            num_classes=classes,
            steps=self._steps,
            ignore_index=self.config.ignore_index,
            workers=0 if workers == "auto" else workers,  # most data sets are in memory
            device=cli.pick_device(self.config.device),
        )
        if classes is not None and dataset.num_classes != classes:
            raise ValueError(f"model: expected {dataset.num_classes} classes, as the data have, got {classes}")
        if isinstance(dataset, OwnDataset) and self._augment:
            dataset = dataclasses.replace(dataset, augment=True)
        return dataset

    def _measured(self, part: str, data: Any) -> dict[str, Any]:
        state = self._ready()
        split = getattr(state.dataset, part)
        if data is not None:
            split = held(as_split(data, "data"), state.device)
            if isinstance(split, Split):
                split = Split(split.images, hard_labels(split.labels))
            check_labels(split.labels, state.dataset.num_classes, "data")
            split = split.to(state.device)
        if not len(split):
            raise ValueError(f"{part}: expected images to look at, got none")
        found = validate(state, split)
        found.pop("val_doubts", None)
        return found


def _as_callbacks(callbacks: Any) -> tuple[Callback, ...]:
    """One callback, several, or none.

    Raises:
        TypeError: it is something else.
    """
    if callbacks is None:
        return ()
    if isinstance(callbacks, Callback):
        return (callbacks,)
    if not isinstance(callbacks, Iterable):
        raise TypeError(
            f"callbacks: expected Callbacks, got a {type(callbacks).__name__}; LambdaCallback(on_epoch_end=…) makes "
            "one of a function"
        )
    return tuple(callbacks)


def _as_mixture(model: Any, config: TrainConfig, train: Any, steps: int | None) -> ImmunityMoE | None:
    """A model of the user's as a mixture, whose stage is the setting's, or suits the images.

    Raises:
        TypeError: it is no network.
        ValueError: it cannot be one.
    """
    if model is None or isinstance(model, ImmunityMoE):
        return model
    several = isinstance(model, (Sequence, nn.ModuleList)) and not isinstance(model, str)
    if (not several and not isinstance(model, nn.Module)) or isinstance(model, type):
        raise TypeError(f"model: expected an ImmunityMoE, a network or a list of networks, got {type(model).__name__}")
    alone = isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList)
    stage = config.stage if config.stage is None or "," not in config.stage else config.stage.split(",")
    options: dict[str, Any] = {"stage": stage, "image_size": _image_size(config, train, steps), "noise": config.noise}
    if alone:
        return SingleNetwork.from_experts([model], **options)
    return ImmunityMoE.from_experts(list(model), **options)


def _image_size(config: TrainConfig, train: Any, steps: int | None) -> tuple[int, int]:
    """(H, W) of what a network will be trained on, as far as it is known before it is read."""
    if train is None:
        return (config.image_size or 32,) * 2
    if isinstance(train, ImageDataset):
        return train.image_size
    split = as_split(train, "train", steps=steps)
    height, width = split.image_size
    return height, width
