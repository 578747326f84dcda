"""The run folder: what lies where, and how it is begun and read."""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from immunity_fast.checkpoint import BEST, LAST, write_atomically
from immunity_fast.compilation import TRACEBACKS
from immunity_fast.config import TrainConfig


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
    def resume_command(self) -> str:
        """What goes on with this run, for a shell."""
        return f"python -m immunity_fast.train --resume {shlex.quote(str(self.folder))}{self._remedy()}"

    def _remedy(self) -> str:
        """The option without which a run that has diverged would do so again."""
        with suppress(OSError, ValueError, TypeError, KeyError):
            return f" --lr {float(json.loads(self.diverged.read_text(encoding='utf-8'))['lr']) / 10:g}"
        return ""

    @property
    def evaluate_command(self) -> str:
        """What evaluates this run again, for a shell."""
        return f"python -m immunity_fast.evaluate {shlex.quote(str(self.folder))}"

    @classmethod
    def create(cls, folder: Path, config: TrainConfig) -> "Run":
        """A new folder with its settings, complete from the moment it has its name.

        Raises:
            FileExistsError: there is a file or folder of that name.
        """
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
            raise
        return cls(folder)

    @staticmethod
    def check_free(folder: Path) -> None:
        """FileExistsError if the name is taken."""
        if folder.exists() or folder.is_symlink():
            raise FileExistsError(f"--out {folder}: exists already; name a new folder, or go on with --resume {folder}")

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """An existing run; FileNotFoundError where there is none."""
        run = cls(folder)
        if not run.config_file.is_file():
            raise FileNotFoundError(f"{folder}: there is no run (no config.json) in this folder")
        return run

    def config(self) -> TrainConfig:
        """The run's settings; ValueError where config.json does not hold them."""
        try:
            return TrainConfig.from_json(json.loads(self.config_file.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{self.config_file}: {error}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The records of the epochs that were finished; a last line that was cut off is left out.

        Raises:
            ValueError: a line is no record.
        """
        records: list[dict[str, Any]] = []
        if self.metrics_file.is_file():
            for number, line in enumerate(self.metrics_file.read_text(encoding="utf-8").split("\n")[:-1], start=1):
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict) or "epoch" not in record:
                    raise ValueError(f"{self.metrics_file}: line {number} is no record of an epoch")
                records.append(record)
        return records

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one epoch's record."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that follows takes this record for written

    def forget_metrics_after(self, epoch: int) -> None:
        """Drop the records of epochs after `epoch`: a resumed run will write them again."""
        kept = [json.dumps(record) + "\n" for record in self.metrics() if record["epoch"] <= epoch]
        write_atomically(self.metrics_file, "".join(kept).encode())
