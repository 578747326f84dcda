"""The benchmarks' own machinery: baselines that are right, a check that can fail, records and what is made of them."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, machine, naive, plots, record, report, timing
from benchmarks.cases import BOTH, COMPILED, EAGER, NAIVE, TRITON, VARIANTS, CrossEntropyCase, HeatmapCase, LossCase
from benchmarks.measure import Measured, keys, measure
from benchmarks.outcomes import write
from benchmarks.verify import Reference
from tests import oracle
from tests.oracle import assert_matches
from tests.tensors import normal

SMALL = HeatmapCase(2, (3, 4, 5), "fp32")


def test_the_naive_loop_is_the_same_loss() -> None:
    activations, gradients = normal(3, 4, 5, 4, 6), normal(3, 4, 5, 4, 6, seed=1)
    expected = oracle.heatmap_losses(activations, gradients, (7, 9))
    for ours, theirs in zip(naive.heatmap_losses(activations, gradients, (7, 9)), expected, strict=True):
        assert_matches(ours, theirs)
    logits, gate, labels = normal(3, 4, 5), normal(4, 3, seed=1).softmax(-1), torch.tensor([0, 4, 2, 1])
    found = naive.mixture_cross_entropy(logits, gate, labels, 0.7)
    assert_matches(found, oracle.cross_entropy(logits, gate, labels, 0.7))


@pytest.mark.parametrize("case", [SMALL, CrossEntropyCase(3, (7,), "fp32"), LossCase(2, (3, 4, 4), "fp32")], ids=str)
def test_what_is_compared_computes_the_same(case: Any) -> None:
    """The kernels included, in Triton's interpreter or on the GPU; what is compiled takes minutes and is left out."""
    reference, operations = Reference(case, case.inputs(0)), case.operations()
    for variant in (NAIVE, EAGER, TRITON):
        reference.check(operations[variant])


@pytest.mark.parametrize("wrong", ["value", "gradient", "nan"])
def test_the_check_rejects_what_is_wrong(wrong: str) -> None:
    right = SMALL.operations()[EAGER]

    def operation(activations: Tensor, gradients: Tensor) -> tuple[Tensor, ...]:
        information, stability = right(activations, gradients)
        if wrong == "value":
            return information * 1.0001, stability
        if wrong == "nan":
            return information * torch.nan, stability
        return information + 1e-3 * (activations - activations.detach()).sum(), stability

    with pytest.raises(AssertionError, match="is off by"):
        Reference(SMALL, SMALL.inputs(0)).check(operation)


def _row(variant: str, samples: int, seconds: float) -> dict[str, Any]:
    return {
        **HeatmapCase(samples, (128, 16, 16), "bf16").describe(),
        "mode": BOTH,
        "variant": variant,
        "median_us": 1e6 * seconds,
        "iqr_us": 0.5,
        "rounds": 9,
        "timed": "events" if variant == COMPILED else "cuda graph",
        "bytes": 10**6 * samples,
        "gb_per_s": 1e-3 * samples / seconds,
        "share_of_copy": min(1.0, 1e-6 * samples / seconds),
        "peak_mib": None,
        "speedup": {other: 2.5 for other in (NAIVE, EAGER, COMPILED, TRITON) if other != variant},
    }


@pytest.fixture
def record_file(tmp_path: Path) -> Path:
    path = tmp_path / "made-up.json"
    rows = [_row(variant, b, 1e-4) for b in (32, 128) for variant in (NAIVE, EAGER, COMPILED, TRITON)]
    content = {"machine": "a GPU", "versions": {"torch": "1.2.3"}, "copy_gb_per_s": 1000.0, "records": rows}
    write(path, content | {"steps": [{"name": "memcheck", "outcome": "passed", "seconds": 7.5}]})
    return path


def test_a_report_has_tables_and_both_plots(
    record_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", str(record_file), "--out", str(tmp_path / "out")])
    report.main()
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert text.strip() == capsys.readouterr().out.strip()
    assert "a GPU; torch 1.2.3. A copy moves 1,000 GB/s." in text
    assert "* memcheck: passed, 7.5 s" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| 32 | 128×16×16 | bf16 | contiguous | both |")]
    assert row.count("2.50") == 3
    assert "100\\*" in row  # what a graph could not hold is marked
    for quantity in plots.QUANTITIES:
        assert (tmp_path / "out" / f"made-up_{quantity}.png").read_bytes().startswith(b"\x89PNG")
        assert f"made-up_{quantity}.png" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[1]", "not a record of benchmarks"),
        ("{}", "holds no measurement"),
        ('{"records": [{}], "versions": {}}', "not a record of benchmarks"),
    ],
)
def test_a_file_that_is_no_record_is_named_in_one_line(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["report", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert str(ended.value.code).startswith(f"error: {path}: ")
    assert message in str(ended.value.code)
    assert "\n" not in str(ended.value.code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_the_gpu_script_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--budget", "60", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == "error: benchmarks.gpu needs a CUDA GPU, and torch finds none here"
    assert not (tmp_path / "out").exists()


def test_a_measured_case_says_how_and_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a record must have; no number is looked at."""
    monkeypatch.setattr("benchmarks.measure.machine.copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr("benchmarks.measure.VARIANTS", tuple(v for v in VARIANTS if v != COMPILED))
    monkeypatch.setattr("benchmarks.timing.BUDGET", 0.01)
    case = CrossEntropyCase(2, (3,), "fp32")
    measured = measure(case)
    assert not measured.failures
    assert set(measured.records) == set(keys(case))
    for (mode, variant), row in measured.records.items():
        assert json.loads(json.dumps(row)) == row
        assert (row["mode"], row["variant"], row["shape"], row["samples"]) == (mode, variant, [3], 2)
        assert row["bytes"] == case.traffic()[mode]
        assert row["backend"] == ("triton" if variant == TRITON else "torch")
        assert set(row["speedup"]) == {v for m, v in measured.records if m == mode} - {variant}
        assert len(measured.seconds[mode, variant]) == row["rounds"] >= 7


def test_what_a_cuda_graph_reads_lives_as_long_as_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass that is timed alone reads what its forward pass saved, which only the call holds."""

    class Graph:
        def replay(self) -> None:
            """Nothing."""

    saved = torch.ones(1)
    alive = weakref.ref(saved)

    def call(held: torch.Tensor = saved) -> torch.Tensor:
        return held

    monkeypatch.setattr("benchmarks.timing.CUDA", True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_args, **_options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    run = timing.prepare([call], None)
    assert run.timed == "cuda graph"
    del call, saved
    gc.collect()
    assert alive() is not None
    del run
    gc.collect()
    assert alive() is None


def test_after_a_lost_device_another_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [CrossEntropyCase(samples, (3,), "fp32") for samples in (1, 2, 3)]
    gone, made = list[Any](), list[Any]()

    def measured(case: Any, _rehearse: bool) -> Measured:
        if case == cases[1]:
            gone.append(case)
            return Measured(failures={("forward", "triton"): "illegal memory access"})
        made.append(case)
        return Measured(records={("forward", "triton"): {**case.describe(), "mode": "forward", "variant": "triton"}})

    monkeypatch.setattr(record, "all_cases", lambda: cases)
    monkeypatch.setattr(record, "measure", measured)
    monkeypatch.setattr(machine, "copy_gb_per_s", lambda: 1.0)
    monkeypatch.setattr(timing, "lost", lambda: bool(gone))
    out = tmp_path / "kernels.json"
    assert record.record(60, out)["device_lost"]
    assert made == cases[:1]
    gone.clear()
    found = record.record(60, out, go_on=True)
    assert made == [cases[0], cases[2]]
    assert not found["device_lost"]
    assert [one["samples"] for one in found["records"]] == [1, 3]
    assert [one["case"] for one in found["failures"]] == [str(cases[1])]
    assert json.loads(out.read_text()) == found
