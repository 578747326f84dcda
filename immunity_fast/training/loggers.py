"""Where the numbers of a training go besides its run folder: TensorBoard, CSV, Weights & Biases, MLflow.

A logger never ends a training: where it fails, a line says so once, and the training goes on without it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from immunity_fast.runtime.failures import one_line
from immunity_fast.runtime.files import is_number, parse_json, write_atomically

PROJECT = "immunity-fast"  # what Weights & Biases and MLflow call all runs of whoever names none
IDS = "loggers.json"  # in a run's folder: under which names others know the run


class NoPlaceError(ValueError):
    """A logger writes into a run's folder, and there is no such folder."""


class Logger:
    """What takes the numbers of a training; a subclass says where to.

    `open` comes first, then `log_config`, once, then `log` after each epoch, then `close`.
    """

    def open(self, folder: Path | None, epoch: int) -> None:
        """Before the first number.

        Args:
            folder: of the run; None of a training that is not saved.
            epoch: so many epochs are there already: what a run that goes on has logged of later ones is void.
        """

    def log_config(self, config: Mapping[str, Any]) -> None:
        """The settings of the run, by name."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of an epoch.

        Args:
            metrics: by the names that they have in metrics.jsonl.
            step: the epoch, from 1.
        """

    def close(self) -> None:
        """After the last number, or where the training has stopped."""


class TensorBoardLogger(Logger):
    """Writes TensorBoard's files.

    Args:
        folder: where; None is `tensorboard/` in the run's folder.

    Raises:
        ModuleNotFoundError: TensorBoard is not installed.
    """

    title = "TensorBoard"

    def __init__(self, folder: str | Path | None = None) -> None:
        check_installed("tensorboard")
        self._folder = folder
        self._writer: Any = None

    def open(self, folder: Path | None, epoch: int) -> None:
        """Begin a file that has readers drop what there is of epochs after `epoch`, which are trained again."""
        from torch.utils.tensorboard import SummaryWriter

        place = _place(self._folder, folder, "tensorboard")
        self._writer = SummaryWriter(str(place), purge_step=epoch + 1)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """A point of each number's curve."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class CSVLogger(Logger):
    """Writes a table: a row an epoch, a column a number, "epoch" first; whole at any moment.

    Args:
        file: which; None is `metrics.csv` in the run's folder.
    """

    title = "CSV"

    def __init__(self, file: str | Path | None = None) -> None:
        self._given, self._rows = file, list[dict[str, Any]]()

    def open(self, folder: Path | None, epoch: int) -> None:
        """Read the rows that are there, where a run goes on."""
        self.file = _place(self._given, folder, "metrics.csv")
        self._rows = []
        if epoch and self.file.is_file():
            with self.file.open(encoding="utf-8", newline="") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= epoch]
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add a row; a number that is new gets a column."""
        self._rows.append({"epoch": step} | {name: value for name, value in metrics.items() if name != "epoch"})
        table = io.StringIO()
        columns = dict.fromkeys(name for row in self._rows for name in row)
        writer = csv.DictWriter(table, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self.file, table.getvalue().encode())


class WandbLogger(Logger):
    """A run of Weights & Biases; `WANDB_MODE=offline` keeps it here, for `wandb sync`, `disabled` does nothing.

    A run that goes on is the same one there, by its id in loggers.json.

    Args:
        project, entity, name: of the run there; `WANDB_PROJECT` and `WANDB_ENTITY` are where none is given.
        mode: "online", "offline" or "disabled"; None is what `WANDB_MODE` says.
        options: more that `wandb.init` takes.

    Raises:
        ModuleNotFoundError: wandb is not installed.
    """

    title = "Weights & Biases"

    def __init__(
        self,
        project: str | None = None,
        *,
        entity: str | None = None,
        name: str | None = None,
        mode: str | None = None,
        **options: Any,
    ) -> None:
        check_installed("wandb")
        self._options = {"project": project or os.environ.get("WANDB_PROJECT") or PROJECT, "entity": entity} | options
        self._name, self._mode = name, mode
        self.run: Any = None

    def open(self, folder: Path | None, epoch: int) -> None:
        """Begin the run there, or go on with it."""
        import wandb

        known = read_ids(folder).get("wandb")
        options = self._options | {"name": self._name or (None if folder is None else folder.name), "mode": self._mode}
        if known is not None:
            options |= {"id": known, "resume": "allow"}
        if folder is not None:
            options.setdefault("dir", str(folder))
        # Its lines would go through the progress bar, and its capture of the terminal changes what that is.
        options.setdefault("settings", wandb.Settings(silent=True, console="off"))
        self.run = wandb.init(**options)
        write_id(folder, "wandb", self.run.id)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """The settings, in the run's table."""
        self.run.config.update(dict(config), allow_val_change=True)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of a step there, which is the epoch."""
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        """End the run there; it waits until all is sent."""
        if self.run is not None:
            self.run.finish()


class MLflowLogger(Logger):
    """A run of MLflow; without `MLFLOW_TRACKING_URI` it is a folder `mlruns` in the run's.

    A run that goes on is the same one there, by its id in loggers.json.

    Args:
        experiment: of the run; `MLFLOW_EXPERIMENT_NAME` where none is given.
        name: of the run; None is that of its folder.
        tracking_uri: of the server or folder.

    Raises:
        ModuleNotFoundError: neither mlflow nor mlflow-skinny is installed.
    """

    title = "MLflow"

    def __init__(
        self, experiment: str | None = None, *, name: str | None = None, tracking_uri: str | None = None
    ) -> None:
        check_installed("mlflow")
        self._experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        self._name, self._uri = name, tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self.client: Any = None
        self.run_id: str | None = None

    def open(self, folder: Path | None, epoch: int) -> None:
        """Begin the run there, or go on with it."""
        from mlflow import MlflowClient

        uri = self._uri or _place(None, folder, "mlruns").resolve().as_uri()
        with _file_store_allowed():
            self.client = MlflowClient(tracking_uri=uri)
        known = read_ids(folder).get("mlflow")
        if known is not None:
            with suppress(Exception):  # another server, or it was deleted there: then a new one
                self.run_id = self.client.get_run(known).info.run_id
                self.client.set_terminated(self.run_id, status="RUNNING")
        if self.run_id is None:
            found = self.client.get_experiment_by_name(self._experiment)
            experiment = self.client.create_experiment(self._experiment) if found is None else found.experiment_id
            name = self._name or (None if folder is None else folder.name)
            self.run_id = self.client.create_run(experiment, run_name=name).info.run_id
            write_id(folder, "mlflow", str(self.run_id))

    def log_config(self, config: Mapping[str, Any]) -> None:
        """The settings, as parameters; those that a run has already cannot change there."""
        from mlflow.entities import Param

        there = self.client.get_run(self.run_id).data.params
        new = [Param(name, str(value)) for name, value in config.items() if name not in there]
        self.client.log_batch(self.run_id, params=new)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of a step there, which is the epoch."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run_id, metrics=[Metric(name, v, now, step) for name, v in metrics.items()])

    def close(self) -> None:
        """End the run there."""
        if self.run_id is not None:
            self.client.set_terminated(self.run_id)


LOGGERS: dict[str, Callable[[], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "csv": CSVLogger,
    "wandb": WandbLogger,
    "mlflow": MLflowLogger,
}
# What is to be installed for each that needs anything.
PACKAGES = {
    "tensorboard": ("tensorboard", "train"),
    "wandb": ("wandb", "loggers"),
    "mlflow": ("mlflow-skinny", "loggers"),
}


class _Function(Logger):
    """A function of metrics and step, as a logger."""

    def __init__(self, function: Callable[[Mapping[str, float], int], Any]) -> None:
        self.title = getattr(function, "__name__", type(function).__name__)
        self._function = function

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Call it."""
        self._function(metrics, step)


def names_of(text: str) -> list[str]:
    """The loggers that a setting names, with commas between; "none" and "" are none.

    Raises:
        ValueError: there is no such logger.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return []
    for name in names:
        if name not in LOGGERS:
            raise ValueError(
                f"--loggers: expected none, or of {', '.join(LOGGERS)} some with commas between, got {text}"
            )
    return list(dict.fromkeys(names))


def made(loggers: str | Logger | Callable[..., Any] | Sequence[Any]) -> list[Logger]:
    """Loggers of what names or is one, or of a list of such.

    Raises:
        ValueError: there is no such logger.
        TypeError: something that is none.
        ModuleNotFoundError: what one needs is not installed.
    """
    if isinstance(loggers, str):
        return [LOGGERS[name]() for name in names_of(loggers)]
    if isinstance(loggers, Sequence):
        return [logger for each in loggers for logger in made(each)]
    if isinstance(loggers, type):
        raise TypeError(f"loggers: expected instances, got the class {loggers.__name__}: write it with parentheses")
    if callable(getattr(loggers, "log", None)):
        return [loggers]  # type: ignore[list-item]
    if callable(loggers):
        return [_Function(loggers)]
    raise TypeError(f"loggers: expected names, Loggers, or functions of (metrics, step), got {type(loggers).__name__}")


def is_installed(name: str) -> bool:
    """Whether what a logger needs is installed."""
    try:
        check_installed(name)
    except ModuleNotFoundError:
        return False
    return True


def check_installed(name: str) -> None:
    """Check that what a logger needs is installed.

    Raises:
        ModuleNotFoundError: it is not; what to install.
    """
    if name in PACKAGES and find_spec(name) is None:
        package, extra = PACKAGES[name]
        raise ModuleNotFoundError(
            f"--loggers {name}: needs {package}, which is not installed: pip install {package}; or, in a checkout of "
            f"immunity_fast, pip install '.[{extra}]'",
            name=name,
        )


class Loggers:
    """The loggers of a training; one that fails is told of once, and left out from then on.

    Args:
        loggers: see `made`.
        warn: takes the line.
    """

    def __init__(self, loggers: Sequence[Logger] = (), warn: Callable[[str], Any] = lambda _: None) -> None:
        self._loggers, self._warn = list(loggers), warn

    def open(self, folder: Path | None, epoch: int, config: Mapping[str, Any]) -> None:
        """See `Logger.open` and `Logger.log_config`.

        Raises:
            NoPlaceError: a logger that needs a folder where there is none.
        """
        for logger in list(self._loggers):
            with self._kept(logger):
                _call(logger, "open", folder, epoch)
            if logger in self._loggers:
                with self._kept(logger):
                    _call(logger, "log_config", config)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Give each the numbers of a record."""
        numbers = {name: value for name, value in record.items() if is_number(value)}
        for logger in list(self._loggers):
            with self._kept(logger):
                _call(logger, "log", numbers, step)

    def close(self) -> None:
        """Close each; what fails in that is nobody's concern any more."""
        for logger in self._loggers:
            with suppress(Exception):
                _call(logger, "close")

    @contextmanager
    def _kept(self, logger: Logger) -> Iterator[None]:
        """A logger that fails in a `with` block is not one of them any more."""
        try:
            yield
        except NoPlaceError:
            raise
        except Exception as error:  # of a network, a disk, somebody else's package
            title = getattr(logger, "title", type(logger).__name__)
            self._loggers.remove(logger)
            self._warn(f"going on without {title}: {one_line(error)}")


def _call(logger: Logger, name: str, *arguments: Any) -> None:
    method = getattr(logger, name, None)  # who only logs needs no other method
    if method is not None:
        method(*arguments)


def _place(given: str | Path | None, folder: Path | None, name: str) -> Path:
    if given is not None:
        return Path(given)
    if folder is None:
        raise NoPlaceError(
            f"loggers: expected a Trainer with out=, or a logger with a place of its own for {name}, got none"
        )
    return folder / name


def read_ids(folder: Path | None) -> dict[str, str]:
    """Under which names others know a run."""
    if folder is None:
        return {}
    with suppress(OSError, ValueError):
        found = parse_json((folder / IDS).read_bytes())
        if isinstance(found, dict):
            return {name: value for name, value in found.items() if isinstance(value, str)}
    return {}


def write_id(folder: Path | None, name: str, value: str) -> None:
    """Write down under which name somebody else knows a run."""
    if folder is not None and read_ids(folder).get(name) != value:
        write_atomically(folder / IDS, json.dumps(read_ids(folder) | {name: value}, indent=1).encode())


@contextmanager
def _file_store_allowed() -> Iterator[None]:
    """Newer versions of MLflow keep runs in files only where this variable says so."""
    before = os.environ.get("MLFLOW_ALLOW_FILE_STORE")
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_ALLOW_FILE_STORE"]
