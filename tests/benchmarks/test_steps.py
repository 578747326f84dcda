"""The benchmark of training steps: all ways take the same step, and what is concluded follows from the numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory, steps, strategies_file, timing, uses
from benchmarks.step_cases import CROSS_ENTROPY, DETACHED, FULL, NAIVE, WAYS, StepCase, cases, rehearsed_cases
from immunity_fast.runtime import precision, strategies
from tests.places import REPOSITORY

CASE = StepCase("resnet8", None, 4, amp="off")


@pytest.mark.parametrize(
    "loss", [FULL, *(pytest.param(loss, marks=pytest.mark.exhaustive) for loss in (DETACHED, CROSS_ENTROPY))]
)
def test_every_way_takes_the_naive_step(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled ways take minutes, and are checked when they are measured."""
    step, naive = CASE.naive_step(loss)
    step()
    expected = steps.gradient(naive)
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    for way in CASE.ways(loss):
        step, model = CASE.step(way, loss)
        step()
        if way.amp is not None:
            assert torch.cosine_similarity(steps.gradient(model), expected, 0) > steps.CLOSE[way.amp]
            continue
        torch.testing.assert_close(steps.gradient(model), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_measured_where_the_processor_has_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is emulated a step takes many times as long, which nobody waits for."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: has)
    assert any(way.amp == "bf16" for way in CASE.ways(FULL)) == (has and not steps.CUDA)


def test_losses_differ() -> None:
    found = []
    for loss in (FULL, DETACHED, CROSS_ENTROPY):
        step, model = CASE.naive_step(loss)
        step()
        found.append(steps.gradient(model))
    assert all(torch.cosine_similarity(found[i], found[j], 0) < 0.999 for i in range(3) for j in range(i))


@pytest.mark.parametrize(
    ("arch", "stage", "floor"),
    [("resnet8", "layer2", 1.3), pytest.param("resnet8", "layer3", 1.0, marks=pytest.mark.exhaustive)],
)
def test_the_floor_of_the_overhead_is_counted(arch: str, stage: str, floor: float) -> None:
    case = StepCase(arch, stage, 8)
    full, detached, plain = (case.flops(loss) for loss in (FULL, DETACHED, CROSS_ENTROPY))
    assert full / plain == pytest.approx(floor, abs=0.01)
    assert plain <= detached <= full
    # ResNet8's multiplications for an image of 32×32, three times (forward, and by inputs and weights backward).
    assert plain / 8 == pytest.approx(2 * 3 * 5 * 12.4e6, rel=0.05)


def test_a_case_that_is_measured_can_be_built() -> None:
    for quick in (True, False):
        assert len({str(case) for case in cases(quick)}) == len(cases(quick)) > 0


LOOP = {"batching": "loop", "double_backprop": "reverse", "memory_format": "channels_last"}


def _record(arch: str, way: str, median: float, *, samples: int = 32, stage: str = "layer2") -> dict[str, Any]:
    beside = {"speedup_over_naive": 1.0, "overhead": 1.4, "flop_floor": 1.3, "peak_mib": 10.0, "iqr_ms": 0.2}
    return beside | {
        "arch": arch,
        "stage": stage,
        "samples": samples,
        "way": way,
        "loss": FULL,
        "median_ms": median,
    }


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ({"eager loop": 10.0, "eager vmap": 9.0, "compiled loop": 1.0}, ("vmap", "reverse", "contiguous")),
        ({"eager loop": 10.0, "eager vmap": 9.9, "eager loop, forward mode": 11.0}, ("loop", "reverse", "contiguous")),
        ({"eager loop": 10.0, "eager vmap, forward mode": 8.0}, ("vmap", "forward", "contiguous")),
        ({"eager loop": 10.0, "eager loop, channels-last": 8.0}, ("loop", "reverse", "channels_last")),
        (
            {"eager loop": 10.0, "eager loop, bf16": 4.0, "eager loop, channels-last, bf16": 3.0},
            ("loop", "reverse", "contiguous"),
        ),
        ({NAIVE: 5.0, "eager loop": 10.0}, ("loop", "reverse", "contiguous")),
    ],
)
def test_the_fastest_way_that_auto_would_run_is_chosen(
    medians: dict[str, float], expected: tuple[str, str, str]
) -> None:
    """bfloat16 is another result, and is never chosen."""
    records = [_record("resnet8", way, median) for way, median in medians.items()]
    records += [_record("resnet8", "eager vmap", 1.0, samples=8), _record("resnet8", "eager vmap", 1.0, stage="layer3")]
    (chosen,) = steps.fastest(records, "somewhere.json")
    assert (chosen["batching"], chosen["double_backprop"], chosen["memory_format"]) == expected
    assert (chosen["device"], chosen["samples"], chosen["stage"]) == (strategies.device_name("cpu"), 32, "layer2")


def test_of_compiled_ways_the_table_says_what_each_takes() -> None:
    """Of a GPU, on whatever machine it is looked at."""
    records = [
        _record("resnet8", way, median) | {"first_step_s": first}
        for way, median, first in [("compiled vmap", 4.0, 20.0), ("compiled loop", 2.0, 90.5), ("eager vmap", 1.0, 0.1)]
    ]
    (found,) = steps.fastest(records, "somewhere.json", "a GPU")
    assert (found["device"], found["batching"], found["double_backprop"]) == ("a GPU", "loop", "reverse")
    same = {"double_backprop": "reverse", "memory_format": "channels_last"}
    assert found["compiled"] == [
        {**same, "batching": "vmap", "first_step_s": 20.0, "step_s": 0.004},
        {**same, "batching": "loop", "first_step_s": 90.5, "step_s": 0.002},
    ]


def test_the_table_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "strategies.json"
    old = {"device": strategies.device_name("cpu"), "arch": "googlenet", "use": "training"} | LOOP
    others = [old | {"device": device, "arch": "resnet8"} for device in ("another GPU", "CPU, of another kind")]
    file.write_text(json.dumps({"records": [old | {"arch": "resnet8"}, old, *others]}), encoding="utf-8")
    for module in (strategies_file, strategies):
        monkeypatch.setattr(module, "TABLE", file)
    found = {"records": [_record("resnet8", "eager loop", 10.0), _record("resnet8", "eager vmap, forward mode", 8.0)]}
    steps.write_strategies(found, tmp_path / "record.json")
    strategies._table.cache_clear()
    try:
        assert strategies.fastest("cpu", "resnet8") == ("vmap", "forward", "contiguous")
        assert strategies.fastest("cpu", "googlenet") == tuple(LOOP.values())
        # Batched as the device's first record says; laid out as what is measured alone would be.
        assert strategies.fastest("cpu", "unknown") == ("loop", "reverse", "contiguous")
        assert strategies.fastest("cpu", "resnet8", "attack") == strategies.unmeasured("cpu", "attack")
        assert strategies.laid_out("auto", torch.device("cpu"), "googlenet") == "channels_last"
        assert strategies.laid_out("contiguous", torch.device("cpu"), "googlenet") == "contiguous"
        assert strategies.choose("auto", torch.device("cpu"), "resnet8") == "vmap"
        assert strategies.choose("loop", torch.device("cpu"), "resnet8") == "loop"
        assert strategies.fastest("cuda", "resnet8") == ("vmap", "reverse", "channels_last")
        assert len(strategies._table()) == 4
    finally:
        strategies._table.cache_clear()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, ("loop", "reverse", "channels_last")),
        (100, ("vmap", "forward", "contiguous")),
        (100_000, ("loop", "reverse", "channels_last")),
    ],
)
def test_a_run_that_compiles_takes_what_ends_first(
    steps: int | None, expected: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop over five experts compiles five times as much code: a short run is over before that pays."""
    ways = [
        LOOP | {"first_step_s": 500.0, "step_s": 0.010},
        {"batching": "vmap", "double_backprop": "forward", "memory_format": "contiguous"}
        | {"first_step_s": 170.0, "step_s": 0.014},
    ]
    record = {"device": "a GPU", "arch": "resnet18", "use": "training", "compiled": ways} | LOOP
    file = tmp_path / "strategies.json"
    file.write_text(json.dumps({"records": [record]}), encoding="utf-8")
    monkeypatch.setattr(strategies, "TABLE", file)
    monkeypatch.setattr(strategies, "device_name", lambda _: "a GPU")
    strategies._table.cache_clear()
    try:
        assert strategies.fastest("cuda", "resnet18", compiled_steps=steps) == expected
        assert strategies.fastest("cuda", "densenet121", compiled_steps=steps) == tuple(LOOP.values())
    finally:
        strategies._table.cache_clear()


def test_the_table_of_the_package_is_what_was_measured() -> None:
    """Each entry names a committed record, and is the fastest way in it."""
    root = REPOSITORY
    for entry in strategies._table():
        record = json.loads((root / entry["record"]).read_text(encoding="utf-8"))
        measured = steps.fastest if entry["use"] == "training" else uses.fastest
        assert entry in measured(
            record["records" if "records" in record else "cases"], entry["record"], entry["device"]
        )


@pytest.mark.parametrize(("capability", "suffix", "noise"), [("AVX512", "", 1.02), ("AVX2", "_avx2", 1.03)])
def test_on_a_cpu_auto_is_nowhere_slower_than_the_naive_loop(
    capability: str, suffix: str, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it was measured: round by round but for 2 % of noise, and in medians but for the machine's."""

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return all(one[name] == other[name] for name in ("arch", "stage", "samples", "loss"))

    monkeypatch.setattr(strategies, "device_name", lambda _: f"CPU, {capability}")
    record = json.loads((REPOSITORY / f"benchmarks/results/steps_cpu{suffix}.json").read_text(encoding="utf-8"))
    assert {"resnet8", "resnet18", "googlenet", "densenet121"} <= {entry["arch"] for entry in record["records"]}
    for entry in record["records"]:
        strategy = strategies.fastest("cpu", entry["arch"])
        wanted = (*strategy[:2], "off", strategy.memory_format, None)
        way = next(way.name for way in WAYS if way[1:] == wanted)
        if entry["way"] == way and entry["loss"] == FULL:
            naive = next(e for e in record["records"] if e["way"] == NAIVE and same(e, entry))
            assert entry["median_ms"] <= noise * naive["median_ms"]
            assert entry["speedup_over_naive"] >= 0.98


def test_cpus_are_told_apart_by_their_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody has measured is not taken for another."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "SVE256")
    strategies.device_name.cache_clear()
    try:
        assert strategies.device_name("cpu") == "CPU, SVE256"
        assert strategies.fastest("cpu", "resnet8") == strategies.unmeasured("cpu")
    finally:
        strategies.device_name.cache_clear()


def test_the_markdown_has_a_row_a_way() -> None:
    text = steps.table({"records": [_record("resnet8", "eager loop", 10.0), _record("resnet8", NAIVE, 1234.5)]})
    assert text.count("\n") == 3
    assert "1,234.5 ± 0.1" in text


def test_the_peak_of_memory_is_seen() -> None:
    def call() -> None:
        held.append(torch.ones(1 << 24).sum())

    held: list[torch.Tensor] = []
    found = memory.peak(call)
    assert found is None or 55 < found < 200


def test_a_way_is_recorded_once_measured_and_failing_stops_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No number is looked at; time is over before the last way."""
    monkeypatch.setattr(timing, "_rehearsing", True)
    case = StepCase("resnet8", None, 2, amp="off", experts=2, side=16)
    ways = [(way, loss) for way, loss in case.order() if loss == FULL][:2]
    ways += [(way, loss) for way, loss in case.order() if loss == CROSS_ENTROPY][:2]
    order = [(way.name, loss) for way, loss in ways]
    monkeypatch.setattr(StepCase, "order", lambda _case: ways)
    measured, seen, step = steps.Measured(case), list[int](), StepCase.step

    def failing(self: StepCase, way: Any, loss: str) -> Any:
        if (way.name, loss) == order[1]:
            raise ValueError("of this way alone")
        return step(self, way, loss)

    monkeypatch.setattr(StepCase, "step", failing)
    measured.run(lambda: len(seen) >= len(order) - 1, lambda: seen.append(len(measured.records)))
    assert seen == sorted(seen)
    assert len(seen) == len(order) - 1
    assert [(failure["way"], failure["loss"]) for failure in measured.failures] == [order[1]]
    assert measured.left_out == [", ".join(order[-1])]
    found = [(record["way"], record["loss"]) for record in measured.records]
    assert set(found) == {order[0], order[2], (NAIVE, FULL), (NAIVE, CROSS_ENTROPY)}
    assert all(json.loads(json.dumps(record)) == record for record in measured.records)
    assert found[0] == (NAIVE, FULL)


@pytest.mark.exhaustive
def test_after_a_way_that_costs_the_device_a_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way is in the record once, measured or failed."""
    case = StepCase("resnet8", None, 2, amp="off", experts=2, side=16)
    ways = case.order()[:3]
    order, gone, step = [(way.name, loss) for way, loss in ways], list[str](), StepCase.step
    monkeypatch.setattr(StepCase, "order", lambda _case: ways)

    def failing(self: StepCase, way: Any, loss: str) -> Any:
        if (way.name, loss) == order[1]:
            gone.append(way.name)
            raise RuntimeError("an illegal memory access was encountered")
        return step(self, way, loss)

    out = tmp_path / "steps.json"

    def call(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["steps", "--rehearse", "--out", str(out), *options])
        with pytest.raises(SystemExit) as ended:
            steps.main()
        return str(ended.value)

    monkeypatch.setattr(StepCase, "step", failing)
    monkeypatch.setattr(timing, "lost", lambda: bool(gone))
    monkeypatch.setattr(timing, "_rehearsing", True)
    monkeypatch.setattr(steps, "rehearsed_cases", lambda: [case])
    assert "illegal memory access" in call()
    found = json.loads(out.read_text())
    assert found["device_lost"]
    assert {(one["way"], one["loss"]) for one in found["records"]} == {order[0], (NAIVE, order[0][1])}
    gone.clear()
    assert "illegal memory access" in call("--go-on")
    found = json.loads(out.read_text())
    assert not found["device_lost"]
    assert [(one["way"], one["loss"]) for one in found["failures"]] == [order[1]]
    seen = [(one["way"], one["loss"]) for one in found["records"]]
    assert len(seen) == len(set(seen))
    measured = [order[0], *order[2:]]
    assert set(seen) == {*measured, *((NAIVE, loss) for _, loss in measured)}


def test_a_rehearsal_takes_the_smallest_case() -> None:
    (case,) = rehearsed_cases()
    assert (case.experts, case.side, case.samples, case.arch) == (2, 16, 4, "resnet8")
    assert case.step(case.ways(FULL)[0], FULL)[1].num_experts == 2
