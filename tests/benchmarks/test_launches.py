"""What is made of counted launches; counting itself needs a GPU, and `tests/training/test_step_gpu.py` has its part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import launches
from benchmarks.launches import Launches, of_events, table
from benchmarks.step_cases import NAIVE
from tests.places import REPOSITORY


def _record(arch: str, way: str, amp: str, total: int, graphs: int = 0, host: float | None = None) -> dict[str, Any]:
    phases = dict.fromkeys(launches.PHASES, 1) | {"forward, backward": total - len(launches.PHASES) + 1}
    return {
        "arch": arch,
        "way": way,
        "amp": amp,
        "launches": total,
        "graph_launches": graphs,
        "library_calls": 1234 if graphs == 0 else None,
        "host_ms": host,
        "launches_by_phase": phases,
    }


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()]


def test_the_table_has_shares_of_the_naive_loop_of_the_same_case() -> None:
    found = {
        "records": [
            _record("resnet8", NAIVE, "bf16", 4000),
            _record("resnet8", "eager vmap", "bf16", 1000, host=12.345),
            _record("resnet8", "eager vmap", "off", 900),
            _record("resnet18", "compiled vmap", "bf16", 12, graphs=2),
        ]
    }
    head, rule, *rows = _rows(table(found))
    assert head[-6:] == list(launches.PHASES)
    assert {len(row) for row in (head, rule, *rows)} == {len(head)}
    share, host = head.index("of the naive loop's"), head.index("host, ms")
    assert [row[share] for row in rows] == ["100.0 %", "25.0 %", "–", "–"]
    assert [row[host] for row in rows] == ["–", "12.35", "–", "–"]
    assert [row[head.index("library calls")] for row in rows] == ["1,234", "1,234", "1,234", "–"]
    assert [row[head.index("launches")] for row in rows] == ["4,000", "1,000", "900", "12"]
    assert [row[head.index("graphs")] for row in rows] == ["0", "0", "0", "2"]
    assert [row[-5] for row in rows] == ["3,995", "995", "895", "7"]


def test_of_a_profile_the_calls_of_the_host_count() -> None:
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cuLaunchKernel", "cudaGraphLaunch"]
    names += ["cudaMemcpyAsync", "cudaMemsetAsync", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaEventRecord"]
    names += ["void at::native::vectorized_elementwise_kernel", "Memcpy HtoD (Pinned -> Device)", "aten::launch"]
    assert of_events(names) == Launches(kernels=4, graphs=1, memory=3)


def test_of_a_difference_what_is_unknown_stays_so() -> None:
    assert Launches(5, 2, 3) - Launches(1, 0, 3) == Launches(4, 2, 0)
    assert Launches(5, 2, None) - Launches(1, 0, 3) == Launches(4, 2, None)


def test_records_of_the_same_machine_and_counter_are_kept(tmp_path: Path) -> None:
    found = {
        "machine": "A",
        "versions": {"torch": "2"},
        "counter": "x",
        "records": [_record("resnet8", NAIVE, "off", 9)],
    }
    path = tmp_path / "launches.json"
    assert launches._kept(path, found) == []
    path.write_text(json.dumps(found), encoding="utf-8")
    assert launches._kept(path, found) == found["records"]
    assert launches._kept(path, found | {"machine": "B"}) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to count on")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["launches", "--out", str(tmp_path / "launches.json")])
    with pytest.raises(SystemExit, match="on a GPU"):
        launches.main()


def test_the_committed_record_keeps_its_promises() -> None:
    path = REPOSITORY / "benchmarks" / "results" / "launches.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["counter"]
    assert found["counter_leaves_out"]
    naive = {(e["arch"], e["amp"]): e["launches"] for e in found["records"] if e["way"] == NAIVE}
    ours = [entry for entry in found["records"] if entry["way"] != NAIVE]
    assert {entry["way"] for entry in ours} == {"eager loop", "eager vmap", "compiled vmap"}
    for entry in ours:
        phases = entry["launches_by_phase"]
        assert all(phases[phase] <= 1 for phase in ("clipping", "optimiser", "average", "metrics")), entry
        assert sum(phases.values()) == entry["launches"], entry
        if entry["way"] == "compiled vmap":
            assert entry["launches"] <= 16, entry
            assert entry["graph_launches"] == 2, entry
        if entry["way"] == "eager vmap":
            assert entry["launches"] <= naive[entry["arch"], entry["amp"]] / 4, entry
