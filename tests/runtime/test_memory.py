"""How much memory there is, is free, and is used."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from immunity_fast.runtime import memory

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says")


def test_what_is_free_is_less_than_there_is() -> None:
    total, free = memory.total(CPU), memory.available(CPU)
    assert total is not None
    assert free is not None
    assert 0 < free < total


def test_a_container_s_files_in_memory_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has read of a large data set would else let the next one seem not to fit."""
    for name, text in (("memory.max", "5000000"), ("memory.current", "4000000")):
        (tmp_path / name).write_text(text, encoding="ascii")
    monkeypatch.setattr(memory, "_CGROUPS", (tmp_path / "memory.max",))
    monkeypatch.setattr(memory, "_CGROUPS_USED", (tmp_path / "memory.current",))
    assert memory.available(CPU) == 1000000
    stat = "anon 1000000\nactive_file 500000\ninactive_file 2500000\nshmem 7\n"
    (tmp_path / "memory.stat").write_text(stat, encoding="ascii")
    assert memory.available(CPU) == 4000000
    (tmp_path / "memory.max").write_text("max", encoding="ascii")
    free = memory.available(CPU)
    assert free is None or free > 4000000


def test_what_processes_have_is_counted() -> None:
    peak, own = memory.peak(), memory.private([os.getpid()])
    assert peak is not None
    assert own is not None
    assert 0 < own < peak
    # Pages of their own: an allocator may have some left, which are counted already.
    with mmap.mmap(-1, 1 << 25, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        block.write(b"1" * len(block))
        assert memory.private([os.getpid()]) > own + len(block) // 2
    assert memory.private([]) == 0
    assert memory.private([0]) is None


_TOUCHED = """
import resource, sys
from immunity_fast.runtime.memory import keep_freed
import torch

kept = keep_freed()
faults = []
for _ in range(4):
    for _ in range(20):
        torch.ones(1 << 20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(kept, faults[-1] - faults[0])
"""


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"), reason="of glibc")
@pytest.mark.parametrize("own", [False, True])
def test_freed_memory_is_kept_unless_the_environment_decides(own: bool) -> None:
    """60 tensors of 1,024 pages each: kept, none of their pages is new."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"} if own else {}
    clean = {name: value for name, value in os.environ.items() if name not in memory._USERS}
    done = subprocess.run(
        [sys.executable, "-c", _TOUCHED], env=clean | environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    assert kept == str(not own)
    assert (int(faults) > 50_000) == own
    assert (int(faults) < 3_000) != own


def test_without_glibc_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: object) -> object:
        raise TypeError("an integer is required")  # what Windows says

    for name in memory._USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    assert not memory.keep_freed()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _name: object())  # musl has no mallopt
    assert not memory.keep_freed()
