"""Measures one case: checks every variant, times those that passed in turns, and describes each in a record."""

import functools
import gc
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, memory, timing
from benchmarks.cases import BACKWARD, BOTH, DEVICE, FORWARD, TRITON, VARIANTS, Case, Inputs, Operation, computes
from benchmarks.verify import Reference


@dataclass
class Measured:
    """What is known of a case: by mode and variant either a record and its rounds, or why there is none."""

    records: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)  # a wrong result, or an exception
    skipped: str = ""  # why nothing of the case was measured


def keys(case: Case) -> list[tuple[str, str]]:
    """Mode and variant of all that is measured of a case."""
    return [(mode, variant) for mode in case.modes for variant in VARIANTS]


@functools.cache
def measure(case: Case, rehearse: bool = False) -> Measured:
    """Once a process; all tensors are freed at its end.

    A rehearsal takes results as they are where the device computes nothing.
    """
    bandwidth = machine.copy_bandwidth()
    measured = Measured()
    needed = case.memory * torch.Size(case.largest).numel() * torch.float32.itemsize
    if DEVICE.type == "cuda" and needed > torch.cuda.mem_get_info()[0]:
        measured.skipped = f"needs about {needed / 2**30:.0f} GiB of the device's memory"
        return measured
    try:
        with timing.on_stream():
            _measure(case, bandwidth, measured, rehearse)
    except Exception as error:
        unknown = set(keys(case)) - set(measured.records)
        measured.failures |= dict.fromkeys(unknown, line(error)) | measured.failures
    finally:
        # Compiled code of one case is of no use to the next one, and graphs hold memory.
        torch.compiler.reset()
        gc.collect()
        if DEVICE.type == "cuda" and not timing.lost():
            torch.cuda.empty_cache()
    return measured


def _measure(case: Case, bandwidth: float, measured: Measured, rehearse: bool) -> None:
    inputs = [case.inputs(seed) for seed in range(timing.sets(case.traffic()[BOTH] // 2))]
    operations = {name: operation for name, operation in case.operations().items() if name in VARIANTS}
    reference = Reference(case, inputs[0]) if not rehearse or computes() else None
    for variant, operation in list(operations.items()):
        try:
            if reference is not None:
                reference.check(operation)
        except Exception as error:  # a baseline that fails must not take the others' numbers away
            measured.failures |= {(mode, variant): line(error) for mode in case.modes}
            del operations[variant]
    del reference
    for mode in case.modes:
        runs, peaks, pool = {}, {}, timing.pool()
        for variant, operation in operations.items():
            try:
                calls = [_call(mode, operation, each) for each in inputs]
                calls[0]()  # what is allocated at the first call only
                peaks[variant] = memory.peak(calls[0]) if DEVICE.type == "cuda" else None
                runs[variant] = timing.prepare(calls, pool)
            except Exception as error:
                measured.failures[mode, variant] = line(error)
        timings = timing.interleaved(runs)
        for variant, found in timings.items():
            measured.seconds[mode, variant] = found.seconds
            measured.records[mode, variant] = {
                **case.describe(),
                "mode": mode,
                "variant": variant,
                "backend": "triton" if variant == TRITON else "torch",
                **summary(found.seconds),
                "timed": found.timed,
                **_achieved(case.traffic()[mode], found.seconds, bandwidth),
                "peak_mib": peaks[variant],
                "speedup": {
                    other: ratio(theirs.seconds, found.seconds) for other, theirs in timings.items() if other != variant
                },
            }


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median, range between the quartiles, and number of rounds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median_us": round(median * 1e6, 3), "iqr_us": round((high - low) * 1e6, 3), "rounds": len(seconds)}


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round, in rotating order, after one call of each that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        names = list(calls)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            begin = time.perf_counter()
            calls[name]()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if index:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Median of the ratios within each round."""
    return round(statistics.median(a / b for a, b in zip(theirs, ours, strict=True)), 3)


def _achieved(count: int, seconds: list[float], bandwidth: float) -> dict[str, Any]:
    rate = count / statistics.median(seconds)
    return {"bytes": count, "gb_per_s": round(rate / 1e9, 3), "share_of_copy": round(rate / bandwidth, 4)}


def _call(mode: str, operation: Operation, inputs: Inputs) -> timing.Call:
    """What is timed. The backward pass is repeated on one forward pass, whose saved tensors it holds."""
    if mode == FORWARD:
        return lambda: operation(*inputs.arguments)
    if mode == BACKWARD:
        results = operation(*inputs.arguments)
        return lambda: torch.autograd.grad(results, inputs.wanted, inputs.upstream, retain_graph=True)
    return lambda: torch.autograd.grad(operation(*inputs.arguments), inputs.wanted, inputs.upstream)


def line(error: Exception) -> str:
    """What the error says and where it was raised, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} ({Path(frame.filename).name}:{frame.lineno}): {' '.join(str(error).split())}"[:500]
