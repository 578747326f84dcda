"""How much memory a call takes beyond what was there before it."""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.cases import DEVICE

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(call: Callable[[], object]) -> float | None:
    """MiB; on a CPU of the process as the kernel sees it, and None where it does not say."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would be used again, unseen
        CLEAR.write_text("5", encoding="ascii")  # the highest mark becomes the present one
        start = _kib("VmRSS")
        call()
        return round((_kib("VmHWM") - start) / 2**10, 1)
    except (OSError, AttributeError):
        return None


def _kib(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if match is None:
        raise OSError(f"{STATUS} has no {field}")
    return int(match[1])
