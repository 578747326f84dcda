"""Measures training steps: the naive loop, and this package's step in each of its ways; writes one record.

    python -m benchmarks.steps --out FILE [--quick | --rehearse] [--eager] [--time-limit SECONDS] [--write-strategies]
                               [--go-on]

Each way of a case is checked against the naive one and timed in turns with it, and the record written: an interruption
costs one way. Once all ways of a case have been seen they are timed again, all of them in turns. A fault of the device
leaves the process without one: it ends, and `--go-on` takes up FILE with the ways that come after.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import memory, strategies_file, timing
from benchmarks.cases import DEVICE, computes
from benchmarks.measure import line, ratio
from benchmarks.outcomes import write
from benchmarks.record import begun
from benchmarks.step_cases import (
    CHANNELS_LAST,
    CPU_WAYS,
    CROSS_ENTROPY,
    CUDA,
    FORWARD_MODE,
    FULL,
    LOSSES,
    NAIVE,
    WAYS,
    StepCase,
    Way,
    cases,
    rehearsed_cases,
)
from immunity_fast.runtime import strategies
from immunity_fast.runtime.compilation import keep_caches, resolve
from immunity_fast.runtime.precision import set_float32

# Dense bfloat16 with float32 accumulation, FLOP/s, from NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
PROVISIONAL = 2  # rounds of a way by itself, before all are timed together
TIE = 0.02  # by which a way has to be faster than a loop in reverse mode to be chosen
CLOSE = {"off": 0.999, "bf16": 0.95}  # cosine of a way's gradient and the naive loop's, at least


class Measured:
    """What is known of a case: records and failures, which grow way by way.

    Args:
        case: what is measured.
        judged: whether a way has to take the naive one's step.
        known: ways and losses that are not to be measured.
    """

    def __init__(
        self, case: StepCase, judged: bool = True, known: Collection[tuple[str | None, str | None]] = ()
    ) -> None:
        self.case, self.judged, self.known = case, judged, known
        self.lost = False  # the device, with all that is there
        self.failures: list[dict[str, Any]] = []
        self.left_out: list[str] = []  # ways for which no time was left
        self._records: dict[tuple[str, str], dict[str, Any]] = {}
        self._flops: dict[str, float] = {}
        self._steps: dict[tuple[str, str], timing.Run] = {}
        self._peaks: dict[tuple[str, str], float | None] = {}
        self._first: dict[tuple[str, str], float] = {}
        self._expected: dict[str, Tensor] = {}

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of what has been measured: loss by loss, the naive loop first, then the ways in their order."""
        names = [NAIVE, *(way.name for way in WAYS)]
        keys = [(name, loss) for loss in LOSSES for name in names if (name, loss) in self._records]
        return [self._records[key] for key in keys]

    def run(self, over: Callable[[], bool], write: Callable[[], None]) -> None:
        """Measure the case, calling `write` after each way; what is not begun before time is `over` is left out."""
        todo = [(way, loss) for way, loss in self.case.order() if (way.name, loss) not in self.known]
        if not todo:
            return
        self._flops = {loss: self.case.flops(loss) for loss in LOSSES}
        for way, loss in todo:
            if over() or self.lost:
                self.left_out.append(f"{way.name}, {loss}")
                continue
            if loss not in self._expected:
                self._naive(loss)
            try:
                self._add(way, loss)
                # A CPU is not lost on the way: what is timed again at the end is only looked at here.
                self._time([(NAIVE, loss), (way.name, loss)], None if CUDA else PROVISIONAL)
            except Exception as error:
                self._steps.pop((way.name, loss), None)
                self.failures.append({**self._named(way.name, loss), "error": line(error)})
                self.lost = timing.lost()
            write()
        if not over() and not self.lost:
            self._time(list(self._steps))
            write()

    def _naive(self, loss: str) -> None:
        step, model = self.case.naive_step(loss)
        step()
        self._expected[loss] = gradient(model)
        self._steps[NAIVE, loss] = _run(step)

    def _add(self, way: Way, loss: str) -> None:
        step, model = self.case.step(way, loss)
        begin = time.perf_counter()
        step()
        closeness = float(torch.cosine_similarity(gradient(model), self._expected[loss], 0))
        self._first[way.name, loss] = time.perf_counter() - begin
        if self.judged and not closeness > CLOSE[self.case.amp if way.amp is None else way.amp]:
            raise ValueError(f"the gradient is not the naive loop's: cosine {closeness:.4f}")
        self._steps[way.name, loss] = _run(step)
        if CUDA and way.compile != "off":
            # The call that records CUDA graphs is the one that allocates their memory: a replay allocates nothing.
            self._peaks[way.name, loss] = memory.peak(step)

    def _time(self, keys: list[tuple[str, str]], most: int | None = None) -> None:
        """Time these in turns, at `most` so many rounds, and put what was found in the place of what was known."""
        for key in keys:
            if key not in self._peaks:
                self._steps[key].start()
                self._peaks[key] = memory.peak(self._steps[key].start)
        timings = timing.interleaved({" / ".join(key): self._steps[key] for key in keys}, most)
        seconds = {key: timings[" / ".join(key)].seconds for key in keys}
        for way_name, loss in keys:
            self._records[way_name, loss] = self._record(way_name, loss, seconds)
        for (way_name, _), record in self._records.items():
            plain = self._records.get((way_name.removesuffix(FORWARD_MODE), CROSS_ENTROPY))
            record["overhead"] = None if plain is None else round(record["median_ms"] / plain["median_ms"], 3)

    def _record(self, way_name: str, loss: str, seconds: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
        rounds, flops = seconds[way_name, loss], self._flops
        low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
        return {
            **self._named(way_name, loss),
            "median_ms": round(median * 1e3, 3),
            "iqr_ms": round((high - low) * 1e3, 3),
            "rounds": len(rounds),
            "speedup_over_naive": ratio(seconds[NAIVE, loss], rounds),
            "overhead": None,  # filled in where the cross-entropy alone has been measured
            "flop_floor": round(flops[loss] / flops[CROSS_ENTROPY], 3),
            "gflop": round(flops[loss] / 1e9, 2),
            "flops_utilisation": utilisation(flops[loss], median),
            "peak_mib": self._peaks[way_name, loss],
            "first_step_s": round(self._first[way_name, loss], 2) if (way_name, loss) in self._first else None,
        }

    def _named(self, way_name: str, loss: str) -> dict[str, Any]:
        case = self.case
        named = {"arch": case.arch, "stage": case.cut, "samples": case.samples, "amp": case.amp}
        return {**named, "way": way_name, "loss": loss}


def known_of(case: StepCase, found: dict[str, Any]) -> set[tuple[str | None, str | None]]:
    """The ways and losses of a case that a record has, or in which they failed."""
    of_case = {"arch": case.arch, "stage": case.cut, "samples": case.samples, "amp": case.amp}
    return {
        (one.get("way"), one.get("loss"))
        for one in found["records"] + found["failures"]
        if of_case.items() <= one.items()
    }


def _run(step: Callable[[], object]) -> timing.Run:
    return timing.Run("events" if CUDA else "wall clock", 1, step)


def gradient(model: nn.Module) -> Tensor:
    """All of the experts' weights' gradients in one vector, expert by expert, whether they are stacked or not."""
    experts = model.get_submodule("experts") if hasattr(model, "experts") else model[0]  # type: ignore[index]
    if isinstance(experts, nn.ModuleList):
        parts = [torch.stack(same) for same in zip(*[_gradients(expert) for expert in experts], strict=True)]
    else:
        parts = _gradients(experts)
    return torch.cat([part.float().flatten() for part in parts])


def _gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def utilisation(flops: float, seconds: float) -> float | None:
    """Share of the device's peak; None where that is not known."""
    if not CUDA:
        return None
    name = torch.cuda.get_device_name(DEVICE)
    peak = next((peak for part, peak in PEAKS.items() if part in name), None)
    return None if peak is None else round(flops / seconds / peak, 4)


def fastest(records: list[dict[str, Any]], record: str, device: str | None = None) -> list[dict[str, Any]]:
    """What `strategies.json` says of a device: for each architecture the fastest way that "auto" would compile there,
    and of all ways that were compiled what the first step and each further one takes.

    Of an architecture's cases it is the one with the most images and the earliest stage, where Grad-CAM costs most.

    Args:
        records: of steps.
        record: where they are kept.
        device: where they were measured, by its name in the table; None is this machine's.
    """
    device = device or strategies.device_name(DEVICE.type)
    kind = torch.device("cpu" if device.startswith(strategies.CPU) else "cuda")
    prefix = "eager" if resolve("auto", kind) == "off" else "compiled"
    found = []
    for arch in dict.fromkeys(entry["arch"] for entry in records):
        full = [e for e in records if e["arch"] == arch and e["loss"] == FULL and e["way"].startswith(prefix)]
        full = [e for e in full if not e["way"].endswith("bf16")]  # which has to be asked for
        if not full:
            continue
        most = max(entry["samples"] for entry in full)
        stage = next(entry["stage"] for entry in full if entry["samples"] == most)
        same = {e["way"]: e for e in full if e["samples"] == most and e["stage"] == stage}
        compiled = [
            {**_ways(way, device), "first_step_s": e["first_step_s"], "step_s": round(e["median_ms"] / 1e3, 6)}
            for way, e in same.items()
            if prefix == "compiled" and e["first_step_s"] is not None
        ]
        best = min(same, key=lambda way: same[way]["median_ms"] * (1 if way == f"{prefix} loop" else 1 + TIE))
        found.append(
            {
                "device": device,
                "arch": arch,
                "use": "training",
                **_ways(best, device),
                "stage": stage,
                "samples": most,
                "record": record,
                **({"compiled": compiled} if compiled else {}),
            }
        )
    return found


def _ways(name: str, device: str) -> dict[str, str]:
    """What a way means on a device of that name."""
    way = next(way for way in (*WAYS, *CPU_WAYS) if way.name == name)
    memory_format = way.memory_format if device.startswith(strategies.CPU) else CHANNELS_LAST
    return {"batching": way.batching, "double_backprop": way.double_backprop, "memory_format": memory_format}


def write_strategies(found: dict[str, Any], out: Path) -> None:
    """Put what was found to be fastest into the package's table, in place of what it held of this device."""
    chosen = fastest(found["records"], f"benchmarks/results/{out.name}")
    strategies_file.replace(chosen)


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a case and way."""
    rows = [
        "| experts, cut after | images | step | cross-entropy, ms | full, ms | speed-up | overhead | floor | MiB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    plain = {(e["arch"], e["stage"], e["samples"], e["way"]): e for e in found["records"] if e["loss"] == CROSS_ENTROPY}
    for e in found["records"]:
        if e["loss"] != FULL:
            continue
        beside = plain.get((e["arch"], e["stage"], e["samples"], e["way"].removesuffix(FORWARD_MODE)))
        rows.append(
            f"| {e['arch']}, {e['stage']} | {e['samples']} | {e['way']} | {_ms(beside)} | {_ms(e)} | "
            f"{e['speedup_over_naive']:.2f} | {'' if e['overhead'] is None else format(e['overhead'], '.2f')} | "
            f"{e['flop_floor']:.2f} | {'' if e['peak_mib'] is None else format(e['peak_mib'], ',.0f')} |"
        )
    return "\n".join(rows)


def _ms(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{entry['median_ms']:,.1f} ± {entry['iqr_ms'] / 2:.1f}"


def main() -> None:
    """The command `python -m benchmarks.steps`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the most important cases only: minutes on two cores")
    size.add_argument("--rehearse", action="store_true", help="one small case, to see that all of it runs")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled, which takes minutes a way")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="begin no way after")
    parser.add_argument("--go-on", action="store_true", help="with FILE, behind a way that cost the device")
    parser.add_argument("--write-strategies", action="store_true", help="have --batching auto choose what was fastest")
    options = parser.parse_args()
    keep_caches()
    set_float32("tf32")
    begin = time.monotonic()
    chosen = [f"--{name}" for name in ("quick", "rehearse", "eager") if getattr(options, name)]
    found = begun(options.out, " ".join(["python -m benchmarks.steps", *chosen]), options.go_on)
    write(options.out, found)  # where that is not possible, it is better known now
    judged = not options.rehearse or computes()
    if options.rehearse:
        timing.rehearse()

    def over() -> bool:
        return bool(time.monotonic() - begin > options.time_limit)

    chosen_cases = rehearsed_cases() if options.rehearse else cases(options.quick)
    if options.eager:
        chosen_cases = [replace(case, compiled=()) for case in chosen_cases if case.eager]
    for case in chosen_cases:
        if over():
            found["not_measured"].append({"case": str(case), "reason": f"{options.time_limit:.0f} s were over"})
            continue
        records, failures = found["records"], found["failures"]
        known = known_of(case, found)
        if {(way.name, loss) for way, loss in case.order()} <= known:
            continue
        measured = Measured(case, judged, known)

        def keep(measured: Measured = measured, records: Any = records, failures: Any = failures) -> None:
            new = [one for one in measured.records if (one["way"], one["loss"]) not in measured.known]
            found["records"], found["failures"] = records + new, failures + measured.failures
            write(options.out, found)
            seen = len(measured.records)
            print(f"[{time.monotonic() - begin:.0f} s] {measured.case}: {seen} measured", flush=True)
            if options.write_strategies:
                write_strategies(found, options.out)

        try:
            measured.run(over, keep)
        except Exception as error:  # of the naive loop, to which all is compared: the next case may do
            measured.failures.append({"case": str(case), "error": line(error)})
            measured.lost = timing.lost()
        keep()
        if measured.left_out and not measured.lost:
            reason = f"{options.time_limit:.0f} s were over"
            found["not_measured"] += [{"case": f"{case}: {name}", "reason": reason} for name in measured.left_out]
        if measured.lost:
            found["device_lost"] = True
            write(options.out, found)
            break
        del measured, keep  # models and graphs hold memory
        torch.compiler.reset()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    write(options.out, found)
    print(table(found))
    if found["failures"]:
        raise SystemExit(f"error: {len(found['failures'])} ways failed: {found['failures'][0]['error']}")


if __name__ == "__main__":
    main()
