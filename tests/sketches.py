"""Short ends of runs: what training ends with is most of a small run's time, and most of that is drawing."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from immunity_fast.evaluation import report, runner
from immunity_fast.runtime.files import write_atomically
from immunity_fast.training import run_evaluation

DRAWING = ("heatmap_figure", "attacked_heatmap_figure", "robustness_figure", "training_curves")
# A picture of one pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
WHOLE = {(report, name): getattr(report, name) for name in (*DRAWING, "FIGURE_ROWS")} | {
    (runner, "CURVE_STEPS"): runner.CURVE_STEPS,
    (run_evaluation, "AFTER_TRAINING"): run_evaluation.AFTER_TRAINING,
}
SHORT: dict[tuple[Any, str], Any] = {
    (report, "FIGURE_ROWS"): 1,
    (runner, "CURVE_STEPS"): 4,
    (run_evaluation, "AFTER_TRAINING"): replace(
        run_evaluation.AFTER_TRAINING, masking_images=4, curve_eps=(0.25, 4), curve_steps=(1, 3)
    ),
}


def sketch(*arguments: Any, **_: Any) -> None:
    """In place of a figure: a picture at the path that comes last, written as figures are."""
    path = arguments[-1]
    assert isinstance(path, Path)
    write_atomically(path, PNG)


@contextmanager
def short() -> Iterator[None]:
    """Reports have sketches for figures, and a trained run is attacked with little."""
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWING:
            patch.setattr(report, name, sketch)
        for place, value in SHORT.items():
            patch.setattr(*place, value)
        yield


@contextmanager
def whole() -> Iterator[None]:
    """As the package has it."""
    with pytest.MonkeyPatch.context() as patch:
        for place, value in WHOLE.items():
            patch.setattr(*place, value)
        yield
