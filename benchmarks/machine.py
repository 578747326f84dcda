"""What a record says about where it was made: device, versions, and the bandwidth of a copy."""

import functools
import os
import platform
import statistics
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.cases import DEVICE

COPIED = 1 << 30 if DEVICE.type == "cuda" else 1 << 28  # bytes


def device() -> str:
    """The GPU's name, or the processor's with its widest vectors."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} ({_processor()}, {torch.backends.cpu.get_cpu_capability()}), {cores} cores"


@functools.cache
def versions() -> dict[str, Any]:
    """Of what the numbers depend on."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found["triton"] = None
    if DEVICE.type == "cuda":
        found |= {"cuda": torch.version.cuda, "driver": _driver()}
    return found


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy that no cache holds.

    By a kernel, with a sign changed: as a CUDA graph has it, `copy_` runs on the GPU's copy engines, which are slower.
    """
    source = torch.empty(COPIED // torch.float32.itemsize, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    with timing.on_stream():
        run = timing.prepare([lambda: torch.neg(source, out=target)], timing.pool())
        seconds = timing.interleaved({"copy": run})["copy"].seconds
    return 2 * COPIED / statistics.median(seconds)


def copy_gb_per_s() -> float:
    """`copy_bandwidth` in GB/s, as records hold it."""
    return round(copy_bandwidth() / 1e9, 2)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
