"""Where the time of a few training steps goes: a Chrome trace and a table of operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from immunity_fast.runtime.files import write_atomically

SKIPPED, RECORDED = 5, 5  # steps; the first ones compile and warm up
ROWS = 40  # of the table


@contextmanager
def profiled(folder: Path, device: torch.device) -> Iterator[profile]:
    """Profiles some steps of the `with` block, each of which ends with a call of ``.step()``.

    When they are over, or the block is, `folder` holds trace.json, for chrome://tracing or ui.perfetto.dev, and
    operators.txt, the operators that took the most time.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"

    def write(finished: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(folder / "trace.json"))
        table = finished.key_averages().table(sort_by=key, row_limit=ROWS, max_name_column_width=60)
        write_atomically(folder / "operators.txt", f"{table}\n".encode())

    steps = schedule(wait=SKIPPED - 1, warmup=1, active=RECORDED, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as running:
        yield running
