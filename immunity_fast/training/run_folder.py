"""The run folder: what lies where, and how it is begun and read."""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from immunity_fast.experts.registry import imports_code
from immunity_fast.runtime.commands import shell_command
from immunity_fast.runtime.compilation import TRACEBACKS
from immunity_fast.runtime.files import append_line, is_number, locked_folder, parse_json, write_atomically
from immunity_fast.training.checkpoint import BEST, LAST, load_info
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.optimizers import KINDS
from immunity_fast.training.shards import REST, newest

# What entries of a record were called in earlier versions, and are now.
RENAMED = {"val_accuracy_switching": "val_accuracy_sample"}
NOTES = "val_not_measured"  # what of a record is no number, but texts by name


class Run:
    """Paths of a run folder; `create` begins one, `open` goes on with one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "config.json"
        self.metrics_file = folder / "metrics.jsonl"
        self.checkpoint = folder / LAST
        self.best_checkpoint = folder / BEST
        self.results_file = folder / "results.json"
        self.figures = folder / "figures"
        self.report = folder / "report.html"
        self.tensorboard = folder / "tensorboard"
        self.profile = folder / "profile"
        self.diverged = folder / "diverged.json"  # where a run's loss is no number, which then is no record's
        self.tracebacks = folder / TRACEBACKS

    @property
    def last_checkpoint(self) -> Path | None:
        """What a training goes on from: a file, or a folder of shards; None where there is none yet."""
        shards = newest(self.folder)
        return shards if shards is not None else self.checkpoint if self.checkpoint.is_file() else None

    def _last_info(self) -> dict[str, Any]:
        """What the last checkpoint says of the run.

        Raises:
            ValueError, OSError: it cannot be read, or there is none.
        """
        last = self.last_checkpoint
        return load_info(last / REST if last is not None and last.is_dir() else self.checkpoint)

    @property
    def resume_command(self) -> str:
        """What goes on with this run, for a shell."""
        return shell_command("train", ["--resume", str(self.folder), *self._smaller_lr(), *self._trust()])

    def _smaller_lr(self) -> list[str]:
        """The option without which a run that has diverged would do so again."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            diverged = float(json.loads(self.diverged.read_text(encoding="utf-8"))["lr"])
            usual = KINDS[self.config().optimizer].lr
            return ["--lr", f"{min(diverged / 10, usual):g}"]  # far off, a tenth would diverge as well
        return []

    @property
    def evaluate_command(self) -> str:
        """What evaluates this run again, for a shell."""
        return shell_command("evaluate", [str(self.folder), *self._trust()])

    def _trust(self) -> list[str]:
        """The option without which an architecture of the user's own module would be refused."""
        with suppress(OSError, ValueError):
            return ["--trust-code"] if imports_code(self.config().arch) else []
        return []

    @classmethod
    def create(cls, folder: Path, config: TrainConfig, *, numbered: bool = False) -> "Run":
        """A new folder with its settings, complete from the moment it has its name.

        Args:
            numbered: where the name is taken, `free_name` takes its place.

        Raises:
            FileExistsError: there is a file or folder of that name.
        """
        while True:
            try:
                return cls._create(folder, config)
            except FileExistsError:
                if not numbered or not folder.exists():
                    raise
            folder = cls.free_name(folder)

    @staticmethod
    def free_name(folder: Path) -> Path:
        """FOLDER, or the first of FOLDER-2, FOLDER-3, … that is not taken."""
        names = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
        return next(path for path in itertools.chain([folder], names) if not path.exists())

    @classmethod
    def _create(cls, folder: Path, config: TrainConfig) -> "Run":
        cls.check_free(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            unfinished.chmod(0o755)  # mkdtemp's is for the user alone
            run = cls(unfinished)
            run.checkpoint.parent.mkdir()
            run.figures.mkdir()
            write_atomically(run.config_file, json.dumps(config.to_json(), indent=2).encode())
            # Where the name has been taken meanwhile by an empty folder, rename would take its place.
            cls.check_free(folder)
            os.rename(unfinished, folder)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            cls.check_free(folder)  # or by another run
            raise
        return cls(folder)

    @staticmethod
    def check_free(folder: Path) -> None:
        """FileExistsError where there is a file, a folder or a link of a new run's name."""
        if folder.exists() or folder.is_symlink():
            raise FileExistsError(f"--out {folder}: exists already; name a new folder, or go on with --resume {folder}")

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """An existing run; FileNotFoundError where there is none."""
        run = cls(folder)
        if not run.config_file.is_file():
            raise FileNotFoundError(f"{folder}: there is no run (no config.json) in this folder")
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process trains this run, for the length of a `with` block; the lock ends with its process.

        Raises:
            BlockingIOError: another process is training it.
        """
        with locked_folder(self.folder) as held:
            if not held:
                raise BlockingIOError(f"{self.folder}: another process is training this run; wait for it or end it")
            yield

    def config(self) -> TrainConfig:
        """The run's settings.

        Raises:
            ValueError: config.json does not hold them.
        """
        try:
            return TrainConfig.from_json(parse_json(self.config_file.read_bytes()))
        except ValueError as error:
            raise ValueError(f"{self.config_file}: {error}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the epochs that were finished, in order; a last line that was cut off is left out.

        Raises:
            ValueError: a line is no record of the epoch whose turn it is.
        """
        if not self.metrics_file.is_file():
            return []
        records = []
        for number, line in enumerate(self.metrics_file.read_bytes().split(b"\n")[:-1], start=1):
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            if not _is_record(record):
                raise ValueError(f"{self.metrics_file}: line {number} is no record of an epoch")
            if record["epoch"] != number:
                raise ValueError(f"{self.metrics_file}: line {number} is of epoch {record['epoch']}")
            records.append({RENAMED.get(name, name): value for name, value in record.items()})
        return records

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one epoch's record; it is on the disk when this returns."""
        append_line(self.metrics_file, json.dumps(record).encode())

    def forget_metrics_after(self, epoch: int) -> None:
        """Drop the records of epochs after `epoch`: a resumed run will write them again."""
        content = "".join(json.dumps(record) + "\n" for record in self.metrics()[:epoch]).encode()
        if not self.metrics_file.is_file() or content != self.metrics_file.read_bytes():
            write_atomically(self.metrics_file, content)

    def check_goes_on(self, epoch: int) -> None:
        """Check that a training can go on here after `epoch`.

        Without a last checkpoint it would begin anew, and what was trained would be lost.

        Raises:
            ValueError: it cannot.
        """
        records = len(self.metrics())
        trained = [self.metrics_file] * bool(records)
        trained += [file for file in (self.best_checkpoint, self.results_file, self.report) if file.exists()]
        if self.last_checkpoint is None and trained:
            left = trained[0]
            raise ValueError(
                f"{self.checkpoint}: there is no such checkpoint, although {left} shows that the run was trained; "
                "put it back, or begin a new run with --out"
            )
        if records < epoch:
            raise ValueError(
                f"{self.metrics_file}: has {records} records where {epoch} epochs were trained; "
                "put back what is missing, or begin a new run with --out"
            )

    def has_ended(self, epochs: int) -> bool:
        """Whether so many epochs are all of the run's: as many as it was to have, or it was stopped early."""
        return epochs >= self.config().epochs or "stopped" in self._last_info()

    def check_ended(self, epochs: int, place: object = None) -> None:
        """Check that so many epochs are all of the run's.

        Raises:
            ValueError: they are not; by the run's folder or `place`.
        """
        if not self.has_ended(epochs):
            raise ValueError(
                f"{place or self.folder}: stopped after {epochs} of {self.config().epochs} epochs; "
                f"go on with: {self.resume_command}"
            )

    def epochs_trained(self) -> int:
        """Epochs behind the last checkpoint.

        Raises:
            ValueError, OSError: settings or checkpoint cannot be read, or do not go together.
        """
        config, info = self.config(), self._last_info()
        if (info["model"]["arch"], info["model"]["num_experts"]) != (config.arch, config.experts):
            raise ValueError(f"{self.checkpoint}: of another run: {info['model']}")
        if not info["epoch"] <= min(config.epochs, info["step"]):
            raise ValueError(
                f"{self.checkpoint}: stands at epoch {info['epoch']}, step {info['step']}, which is no place in a run "
                f"of {config.epochs} epochs"
            )
        return int(info["epoch"])


def _is_record(record: Any) -> bool:
    """Whether this is what a line of metrics.jsonl can say."""
    if not isinstance(record, dict) or type(record.get("epoch")) is not int:
        return False
    notes = record.get(NOTES, {})
    return (
        isinstance(notes, dict)
        and all(isinstance(note, str) for note in notes.values())
        and all(is_number(value) for name, value in record.items() if name != NOTES)
    )
