"""Which of an epoch's numbers is to be watched, and what of it is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from immunity_fast.runtime.files import is_number

Mode = Literal["auto", "min", "max"]

# What the entries of a record that a training can be judged by are better for.
DIRECTIONS: dict[str, Literal["min", "max"]] = {
    "loss": "min",
    "cross_entropy": "min",
    "mutual_information_loss": "min",
    "position_stability": "min",
    "mutual_information": "max",
    "val_accuracy_mean": "max",
    "val_accuracy_sample": "max",
    "val_pgd10_accuracy_mean": "max",
    "val_fgsm_accuracy_mean": "max",
    "val_mutual_information": "max",
    "val_dead_heatmaps": "min",
    "val_iscore": "max",
    "val_cscore": "min",
}
# What the same are called elsewhere.
SHORT = {"val_accuracy": "val_accuracy_mean", "accuracy": "val_accuracy_mean", "val_pgd10": "val_pgd10_accuracy_mean"}


class Monitor:
    """A number of each epoch's record, of which more or less is better.

    Args:
        name: of the record's entry.
        mode: "min" or "max" is better; "auto" knows it of the package's own.
        min_delta: by how much it has to be better to count.

    Raises:
        ValueError: a mode that is none, or that is not known of this name; a negative or infinite `min_delta`.
    """

    def __init__(self, name: str, mode: Mode = "auto", min_delta: float = 0.0) -> None:
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"mode: expected auto, min or max, got {mode!r}")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta: expected a finite number of at least 0, got {min_delta}")
        self.name = SHORT.get(name, name)
        known = DIRECTIONS.get(self.name)
        if mode == "auto":
            if known is None:
                raise ValueError(f"mode: expected min or max for {name!r}, whose better side is not known, got auto")
            mode = known
        self.mode: Mode = mode
        self.min_delta = min_delta

    def value(self, record: Mapping[str, Any]) -> float | None:
        """What a record says; None where it does not, or that is no finite number."""
        value = record.get(self.name)
        if value is None or not is_number(value) or not math.isfinite(value):
            return None
        return float(value)

    def check_measurable(self, trainer: Any) -> None:
        """Check before the first epoch that there is what the number is measured on.

        Args:
            trainer: the `Trainer` whose records are watched.

        Raises:
            ValueError: it is of validation images, of which there are none.
        """
        if self.name in DIRECTIONS and self.name.startswith("val_") and not len(trainer.dataset.validation):
            raise ValueError(
                f"monitor: expected validation images to watch {self.name} of, or a number of training such as loss, "
                "got no validation"
            )

    def check_measured(self, record: Mapping[str, Any]) -> None:
        """Check that what is watched is among what a run measures, be it that it could not be in this epoch.

        Raises:
            ValueError: it is not.
        """
        if self.name not in record and not record.get("val_not_measured"):
            known = ", ".join(each for each, value in record.items() if is_number(value) and each != "epoch")
            raise ValueError(f"monitor: expected one of {known}, which the record has, got {self.name!r}")

    def better(self, value: float, than: float | None) -> bool:
        """Whether a value is better than another, by more than `min_delta`; any is better than none."""
        if than is None:
            return True
        return value < than - self.min_delta if self.mode == "min" else value > than + self.min_delta


def best_epoch(monitor: Monitor, records: Sequence[Mapping[str, Any]]) -> int | None:
    """The index of the first of the best records; None where none says what is monitored."""
    best: int | None = None
    value: float | None = None
    for index, record in enumerate(records):
        found = monitor.value(record)
        if found is not None and monitor.better(found, value):
            best, value = index, found
    return best
