"""How much memory a device has: what cannot fit is better said than tried. And what becomes of freed memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

from immunity_fast.runtime.failures import in_units

_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_CGROUPS_USED = (Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"))


_KEPT = (-3, 1 << 30), (-1, (1 << 31) - 1)  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes
_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed() -> bool:
    """Have the process keep the memory that it frees, for what it allocates next; a process of a command's own.

    A step allocates what the one before has freed. What is given back in between the system clears anew, page by page.

    Returns:
        Whether that is so: of glibc alone, and not where the environment says otherwise.
    """
    if any(name in os.environ for name in _USERS):
        return False
    with suppress(OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return all(ctypes.CDLL(None).mallopt(*option) for option in _KEPT)
    return False


def total(device: torch.device) -> int | None:
    """Bytes that a device has; of a CPU what this process may have of them. None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    limits = []
    with suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in _CGROUPS:  # a container's
        with suppress(ValueError, OSError):
            limits.append(int(file.read_text()))  # "max" is no number
    with suppress(ImportError, OSError):
        import resource

        limits.append(resource.getrlimit(resource.RLIMIT_AS)[0])
    return min((limit for limit in limits if limit > 0), default=None)


def available(device: torch.device) -> int | None:
    """Bytes of a device that are free now; of a CPU what this process may still take. None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [limit for limit in (total(device),) if limit is not None]
    with suppress(ValueError, OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    for limit, used in zip(_CGROUPS, _CGROUPS_USED, strict=True):
        with suppress(ValueError, OSError):
            free.append(int(limit.read_text()) - int(used.read_text()) + _cached_files(used.parent))
    return max(0, min(free)) if free else None


def _cached_files(group: Path) -> int:
    """Bytes of files that a container keeps in memory as long as nothing else needs it, and counts as used."""
    found = 0
    with suppress(ValueError, OSError):
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        found = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
    return found


def peak() -> int | None:
    """The most bytes that this process has had in memory so far; None where that is not known."""
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    return None


def private(pids: Iterable[int]) -> int | None:
    """Bytes that processes have in memory now and share with no other; None where that is not known."""
    found = 0
    try:
        for pid in pids:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
            found += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))
    except (OSError, ValueError):
        return None
    return found


def check_fits(size: float, device: torch.device, what: str, instead: str) -> None:
    """Check that something of so many bytes can fit, with nothing else there.

    Args:
        size: an estimate from below.
        device: where it is to be.
        what: that it "would take" so much.
        instead: what to "try".

    Raises:
        ValueError: it cannot; one line.
    """
    available = total(device)
    if available is not None and size > available:
        raise ValueError(
            f"{what} would take at least {in_units(size)} of memory, and there are {in_units(available)} ({device}): "
            f"try {instead}"
        )
