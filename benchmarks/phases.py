"""Runs the command train and writes down how many seconds each part of it took, on the clock and of processors.

    python -c "$(cat benchmarks/phases.py)" FILE OPTION …

is for `first_result`: the package is the one that Python finds, which may be an older one, and so nothing is imported
here but the standard library before the clock runs.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# What a part is made of: functions by the modules that call them. One within another is not counted twice.
PARTS = {
    "data": ["immunity_fast.training.preparation.load_data"],
    "preparation": ["immunity_fast.training.trainer.prepare"],
    "steps": ["immunity_fast.training.loop.take_steps"],
    "checks after epochs": ["immunity_fast.training.loop.check"],
    "checkpoints": ["immunity_fast.training.loop.write_checkpoint"],
    "attacks at the end": ["immunity_fast.training.session.evaluate_trained"],
    "report": ["immunity_fast.evaluation.pipeline.write"],
}
REST = "all else"


class Stopwatch:
    """Adds up what passes in parts of a program; where one begins within another, the other waits.

    Args:
        now: the clocks' readings.
    """

    def __init__(self, now: Callable[[], tuple[float, ...]]) -> None:
        self.now, self.open, self.read = now, [REST], now()
        self.parts: dict[str, tuple[float, ...]] = {}

    def switch(self) -> None:
        """Add what has passed to the part that is running."""
        before, self.read = self.read, self.now()
        passed = [after - earlier for after, earlier in zip(self.read, before, strict=True)]
        so_far = self.parts.get(self.open[-1], (0.0,) * len(passed))
        self.parts[self.open[-1]] = tuple(old + new for old, new in zip(so_far, passed, strict=True))

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time is a part's."""

        def run(*given: Any, **keywords: Any) -> Any:
            self.switch()
            self.open.append(part)
            try:
                return function(*given, **keywords)
            finally:
                self.switch()
                self.open.pop()

        return run


def main(file: str, *options: str) -> None:
    """Run the command train with some options, and write {part: [seconds, of processors]} into a file."""
    watch = Stopwatch(lambda: (time.perf_counter(), time.process_time()))
    watch.timed("import of torch", importlib.import_module)("torch")
    train = watch.timed("import", importlib.import_module)("immunity_fast.train")
    for part, places in PARTS.items():
        for place in places:
            module, _, name = place.rpartition(".")
            called = importlib.import_module(module)
            setattr(called, name, watch.timed(part, getattr(called, name)))
    with suppress(SystemExit):
        train.main(list(options))
    watch.switch()
    Path(file).write_text(json.dumps(watch.parts), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
