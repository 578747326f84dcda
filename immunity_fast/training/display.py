"""What a person sees of a training: a progress bar, a line now and then where there is none, epochs."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from immunity_fast.runtime import cli, distributed
from immunity_fast.runtime.compilation import keep_caches
from immunity_fast.runtime.failures import in_units
from immunity_fast.training.state import TrainingState

CHECKS = {
    "accuracy": "accuracy",
    "pgd10": "accuracy under PGD-10",
    "fgsm": "accuracy under FGSM",
    "heatmaps": "the heatmaps",
}
logger = logging.getLogger("immunity_fast")


class Display:
    """The display of a training for the length of a `with` block; of several processes only the first shows anything.

    Args:
        state: where it stands is where the bar begins.
        shown: whether a person sees it; otherwise its lines go to the logger "immunity_fast".
    """

    def __init__(self, state: TrainingState, *, shown: bool = True) -> None:
        self.state = state
        self.shown = shown
        self.first = distributed.rank() == 0 and shown
        self._progress = cli.progress_bar(enabled=self.first)
        self._began = time.perf_counter()
        self._stepped = False
        self._open = ExitStack()

    def __enter__(self) -> "Display":
        with ExitStack() as opened:
            opened.enter_context(self._progress)
            opened.enter_context(cli.status_lines(self._status, enabled=self.first))
            self._task = self._progress.add_task(
                "training",
                total=self.state.steps,
                completed=self.state.step,
                status=waiting_for(self.state, self.first),
            )
            self._open = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def step_taken(self) -> None:
        """The bar moves on by a step; of the first one the time is told, where it was compiled."""
        if not self._stepped:
            self._stepped = True
            synchronize(self.state.device)
            self._set_status("")
            if self.first and self.state.train_step.compiled:
                self._progress.console.print(f"first step after {time.perf_counter() - self._began:.1f} s")
        self._progress.advance(self._task)

    def begun_again(self) -> None:
        """The bar stands at the beginning, for as many steps as the run has now."""
        self._progress.update(self._task, total=self.state.steps, completed=self.state.step)

    def checking(self) -> None:
        """The bar says what is done after an epoch's steps."""
        self._set_status("checking on the validation split")

    def epoch_checked(self, record: Mapping[str, Any], doubts: Mapping[str, str]) -> None:
        """An epoch's record in a line, and a line on each check that failed or that is in doubt.

        Args:
            record: as metrics.jsonl has it.
            doubts: of what check which warning.
        """
        self._set_status("")
        self.line(summary(record, self.state.config.epochs))
        for name, reason in record.get("val_not_measured", {}).items():
            self.line(not_measured_line(record["epoch"], name, reason))
        for name, doubt in doubts.items():
            self.line(f"epoch {record['epoch']}: {CHECKS[name]} on validation images: {doubt}")

    def line(self, text: str) -> None:
        """Print a line; the bar stays beneath it."""
        if self.first:
            self._progress.console.print(text)
        elif not self.shown:
            logger.info(text)

    def warn(self, text: str) -> None:
        """Print a line on what has gone wrong; where nobody sees it, the logger has it as a warning."""
        if self.shown:
            self.line(text)
        else:
            logger.warning(text)

    def _set_status(self, text: str) -> None:
        self._progress.update(self._task, status=text)

    def _status(self) -> str:
        """The line for a log that is no terminal."""
        state = self.state
        minutes = (time.perf_counter() - self._began) / 60
        epoch = min(state.epoch + 1, state.config.epochs)
        return f"epoch {epoch}/{state.config.epochs}: step {state.step:,} of {state.steps:,} after {minutes:.0f} min"


def summary(record: Mapping[str, float], epochs: int) -> str:
    """An epoch's loss, accuracies and speed in one line.

    Args:
        record: as metrics.jsonl has it.
        epochs: of the whole run.
    """
    attacked = record.get("val_pgd10_accuracy_mean")
    several = record.get("mutual_information_loss", 0) > 0  # neither a single network nor a peer has one
    validation = "not measured"
    if "val_accuracy_mean" in record:
        sampled, mean = (100 * record[f"val_accuracy_{name}"] for name in ("sample", "mean"))
        validation = f"{sampled:.1f} % gate sample, {mean:.1f} % gate mean"
    return (
        f"epoch {record['epoch']:>3}/{epochs}  loss {record['loss']:.3f}  validation {validation}"
        + ("" if attacked is None else f", {100 * attacked:.1f} % under PGD-10")
        + (f"  mutual information {record['mutual_information']:.2f} nats" if several else "")
        + f"  {record['images_per_second']:.0f} images/s"
        + _reading(record)
    )


def _reading(record: Mapping[str, float]) -> str:
    """How much of an epoch's time was spent waiting for images, where they are streamed, and the most memory so far."""
    if "images_waited_share" not in record:
        return ""
    waited = f", {100 * record['images_waited_share']:.0f} % of the time waiting for images"
    peak = record.get("memory_peak_bytes")
    return waited + ("" if peak is None else f"  {in_units(peak)} of memory at most")


def not_measured_line(epoch: int, name: str, reason: str) -> str:
    """What to say of a check that could not be made."""
    option = "--check-images" if reason.startswith("out of memory") else "--lr"
    return (
        f"epoch {epoch}: {CHECKS[name]} on validation images was not measured: {reason}; training goes on, but where "
        f"this stays, try a smaller {option}"
    )


def waiting_for(state: TrainingState, shown: bool) -> str:
    """What the first step will take its time for; where it is shown, with a line on it."""
    if not state.train_step.compiled or state.epoch == state.config.epochs:
        return ""
    if shown:
        cli.console.print(
            f"compiling the training step: minutes, or seconds where {keep_caches()} has it from an earlier run; "
            "--compile off does without"
        )
    return "compiling the training step"


def synchronize(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
