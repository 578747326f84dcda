"""Measures training steps: the naive loop, and this package's step in each of its ways; writes one record.

    python -m benchmarks.steps --out FILE [--quick] [--time-limit SECONDS] [--write-strategies]

All ways of a case are checked against the naive one, then timed in turns. Written after each case: an interruption
costs what had not been measured by then.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import memory, timing
from benchmarks.cases import DEVICE
from benchmarks.measure import line, ratio
from benchmarks.record import header, write
from benchmarks.step_cases import CROSS_ENTROPY, CUDA, FULL, LOSSES, NAIVE, StepCase, cases
from immunity_fast.compilation import keep_caches, resolve
from immunity_fast.precision import set_float32
from immunity_fast.strategies import TABLE

# Dense bfloat16 with float32 accumulation, FLOP/s, from NVIDIA's data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
TIE = 0.02  # by which a way has to be faster than a loop in reverse mode to be chosen
CLOSE = {"off": 0.999, "bf16": 0.95}  # cosine of a way's gradient and the naive loop's, at least


def measure(case: StepCase) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records and failures of a case."""
    flops = {loss: case.flops(loss) for loss in LOSSES}
    steps: dict[tuple[str, str], timing.Run] = {}
    peaks: dict[tuple[str, str], float | None] = {}
    first: dict[tuple[str, str], float] = {}
    failures = []
    for loss in LOSSES:
        step, model = case.naive_step(loss)
        step()
        expected = gradient(model)
        steps[NAIVE, loss] = timing.Run("events" if CUDA else "wall clock", 1, step)
        for way in case.ways(loss):
            try:
                step, model = case.step(way, loss)
                begin = time.perf_counter()
                step()
                closeness = float(torch.cosine_similarity(gradient(model), expected, 0))
                first[way.name, loss] = time.perf_counter() - begin
                if not closeness > CLOSE[case.amp]:
                    raise ValueError(f"the gradient is not the naive loop's: cosine {closeness:.4f}")
                steps[way.name, loss] = timing.Run("events" if CUDA else "wall clock", 1, step)
            except Exception as error:
                failures.append({"case": str(case), "way": way.name, "loss": loss, "error": line(error)})
    for key, run in steps.items():
        run.start()
        peaks[key] = memory.peak(run.start)
    timings = timing.interleaved({" / ".join(key): run for key, run in steps.items()})
    seconds = {key: timings[" / ".join(key)].seconds for key in steps}
    medians = {key: statistics.median(rounds) for key, rounds in seconds.items()}
    records = []
    for (way_name, loss), rounds in seconds.items():
        low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
        records.append(
            {
                "arch": case.arch,
                "stage": case.model().stage,
                "samples": case.samples,
                "amp": case.amp,
                "way": way_name,
                "loss": loss,
                "median_ms": round(median * 1e3, 3),
                "iqr_ms": round((high - low) * 1e3, 3),
                "rounds": len(rounds),
                "speedup_over_naive": ratio(seconds[NAIVE, loss], rounds),
                "overhead": round(median / medians[way_name.split(",")[0], CROSS_ENTROPY], 3)
                if (way_name.split(",")[0], CROSS_ENTROPY) in medians
                else None,
                "flop_floor": round(flops[loss] / flops[CROSS_ENTROPY], 3),
                "gflop": round(flops[loss] / 1e9, 2),
                "flops_utilisation": utilisation(flops[loss], median),
                "peak_mib": peaks[way_name, loss],
                "first_step_s": round(first[way_name, loss], 2) if (way_name, loss) in first else None,
            }
        )
    return records, failures


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


def fastest(records: list[dict[str, Any]], record: str) -> list[dict[str, Any]]:
    """What `strategies.json` says of this machine: for each architecture the fastest way that "auto" would compile.

    Of an architecture's cases it is the one with the most images and the earliest stage, where Grad-CAM costs most.
    """
    prefix = "eager" if resolve("auto", DEVICE) == "off" else "compiled"
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    found = []
    for arch in dict.fromkeys(entry["arch"] for entry in records):
        full = [e for e in records if e["arch"] == arch and e["loss"] == FULL and e["way"].startswith(prefix)]
        if not full:
            continue
        most = max(entry["samples"] for entry in full)
        stage = next(entry["stage"] for entry in full if entry["samples"] == most)
        same = {e["way"]: e for e in full if e["samples"] == most and e["stage"] == stage}
        best = min(same, key=lambda way: same[way]["median_ms"] * (1 if way == f"{prefix} loop" else 1 + TIE))
        found.append(
            {
                "device": device,
                "arch": arch,
                "batching": "vmap" if "vmap" in best else "loop",
                "double_backprop": "forward" if "forward" in best else "reverse",
                "stage": stage,
                "samples": most,
                "record": record,
            }
        )
    return found


def write_strategies(found: dict[str, Any], out: Path) -> None:
    """Put what was found to be fastest into the package's table, in place of what it held of this device."""
    chosen = fastest(found["records"], f"benchmarks/results/{out.name}")
    replaced = {(entry["device"], entry["arch"]) for entry in chosen}
    table = json.loads(TABLE.read_text(encoding="utf-8"))["records"]
    kept = [entry for entry in table if (entry["device"], entry["arch"]) not in replaced]
    write(TABLE, {"records": kept + chosen})


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
        beside = plain.get((e["arch"], e["stage"], e["samples"], e["way"].split(",")[0]))
        rows.append(
            f"| {e['arch']}, {e['stage']} | {e['samples']} | {e['way']} | {_ms(beside)} | {_ms(e)} | "
            f"{e['speedup_over_naive']:.2f} | {'' if e['overhead'] is None else format(e['overhead'], '.2f')} | "
            f"{e['flop_floor']:.2f} | {'' if e['peak_mib'] is None else format(e['peak_mib'], ',.0f')} |"
        )
    return "\n".join(rows)


def _ms(entry: dict[str, Any] | None) -> str:
    return "" if entry is None else f"{entry['median_ms']:,.1f} ± {entry['iqr_ms'] / 2:.1f}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="the most important cases only: minutes on two cores")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="begin no case after")
    parser.add_argument("--write-strategies", action="store_true", help="have --batching auto choose what was fastest")
    options = parser.parse_args()
    keep_caches()
    set_float32("tf32")
    begin = time.monotonic()
    command = "python -m benchmarks.steps" + (" --quick" if options.quick else "")
    found: dict[str, Any] = header(command) | {"records": [], "failures": [], "not_measured": []}
    write(options.out, found)  # where that is not possible, it is better known now
    for case in cases(options.quick):
        if time.monotonic() - begin > options.time_limit:
            found["not_measured"].append({"case": str(case), "reason": f"{options.time_limit:.0f} s were over"})
            continue
        try:
            records, failures = measure(case)
        except torch.cuda.OutOfMemoryError as error:
            records, failures = [], [{"case": str(case), "error": line(error)}]
        found["records"] += records
        found["failures"] += failures
        print(f"[{time.monotonic() - begin:.0f} s] {case}: {len(failures)} failed", flush=True)
        write(options.out, found)
        torch.compiler.reset()
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
    write(options.out, found)
    if options.write_strategies:
        write_strategies(found, options.out)
    print(table(found))
    if found["failures"]:
        raise SystemExit(f"error: {len(found['failures'])} ways failed: {found['failures'][0]['error']}")


if __name__ == "__main__":
    main()
