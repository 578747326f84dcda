"""Counts what a training step launches, and how long the host takes to do so, phase by phase; writes one record.

    python -m benchmarks.launches --out FILE [--arch NAME …] [--way NAME …] [--amp bf16 off]

Each step augments 32 images of 32×32, takes the whole loss, clips, updates, averages the weights and adds up what it
measured. The naive loop does that with PyTorch's own tools: `clip_grad_norm_`, `SGD`, `AveragedModel`. The record is
written after each way; what FILE holds of other ways on the same machine is kept. Needs a GPU.

What an imitated GPU (a CUDA runtime that launches nothing, and counts) can tell are launches, but not those inside of
cuDNN and cuBLAS, and no times: the record says so.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import DEVICE
from benchmarks.measure import line
from benchmarks.record import header, write
from benchmarks.step_cases import CLASSES, FULL, NAIVE, SIDE, StepCase
from immunity_fast import FusedImmunityLoss
from immunity_fast.data.augmentation import apply_affine
from immunity_fast.data.datasets import Split
from immunity_fast.data.loader import Batch, TrainLoader
from immunity_fast.runtime.compilation import keep_caches
from immunity_fast.runtime.precision import set_float32
from immunity_fast.training.ema import WeightAverage
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.step import MEASURED, TrainStep

ARCHS = ("resnet8", "resnet18", "googlenet", "densenet121")
SAMPLES = 32
MAX_NORM = 1.0
DECAY = 0.999
EAGER_WARM_UP, COMPILED_WARM_UP = 1, 3  # steps after the first; compiled code records its graphs in two of them
TIMED = 20
PHASES = ("batch", "forward, backward", "clipping", "optimiser", "average", "metrics")
WAYS: dict[str, tuple[Any, Any] | None] = {  # batching and compile
    NAIVE: None,
    "eager loop": ("loop", "off"),
    "eager vmap": ("vmap", "off"),
    "compiled vmap": ("vmap", "on"),
}
# Operators that call cuDNN or cuBLAS.
LIBRARY = {"convolution", "convolution_backward", "cudnn_convolution", "cudnn_batch_norm", "cudnn_batch_norm_backward"}
LIBRARY |= {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}


class Launches(NamedTuple):
    """What the host has asked the device to do."""

    kernels: int
    graphs: int
    memory: int | None  # copies and fills that are no kernels; None where they are not counted

    def __sub__(self, other: "Launches") -> "Launches":  # type: ignore[override]
        memory = None if self.memory is None or other.memory is None else self.memory - other.memory
        return Launches(self.kernels - other.kernels, self.graphs - other.graphs, memory)


class Count(NamedTuple):
    """A way of counting, and what it leaves out."""

    name: str
    leaves_out: str
    count: Callable[[Callable[[], object]], Launches]
    imitated: bool


def counter() -> Count:
    """The imitated GPU's counters where this process has them, PyTorch's profiler elsewhere."""
    try:
        runtime, driver = ctypes.CDLL(None), ctypes.CDLL("libcuda.so.1")
        symbols = [
            ctypes.c_long.in_dll(library, name)
            for library, name in (
                (runtime, "imitated_launches"),
                (driver, "imitated_triton_launches"),
                (runtime, "imitated_graph_launches"),
            )
        ]
    except (OSError, ValueError):
        return Count("torch.profiler: calls of the CUDA runtime and driver", "nothing", _profiled, imitated=False)

    def count(call: Callable[[], object]) -> Launches:
        before = [symbol.value for symbol in symbols]
        call()
        kernels, triton, graphs = (symbol.value - old for symbol, old in zip(symbols, before, strict=True))
        return Launches(kernels + triton, graphs, None)

    return Count(
        "calls of an imitated CUDA runtime and driver",
        "what cuDNN and cuBLAS launch (see library_calls; in compiled code that is in the graphs), and copies and "
        "fills of memory that are no kernels",
        count,
        imitated=True,
    )


def _profiled(call: Callable[[], object]) -> Launches:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return of_events(event.name for event in profiler.events() or [])


def of_events(names: Iterable[str]) -> Launches:
    """Launches among the names of a profile's events: the host's calls, since a graph's kernels are no launches."""
    kinds = Counter(
        "graphs" if "GraphLaunch" in name else "kernels" if "LaunchKernel" in name else "memory"
        for name in names
        if name.startswith(("cuda", "cu")) and any(part in name for part in ("Launch", "Memcpy", "Memset"))
    )
    return Launches(kinds["kernels"], kinds["graphs"], kinds["memory"])


class Phases(NamedTuple):
    """A step, and those of its parts that can be taken alone, as often as wanted."""

    step: Callable[[], object]
    batch: Callable[[], object]
    clipped_update: Callable[[], object]
    update: Callable[[], object]
    average: Callable[[], object]
    metrics: Callable[[], object]


def prepare(arch: str, way: str, amp: str) -> Phases:
    """A way's step and its parts."""
    case = StepCase(arch, None, SAMPLES, amp)
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (64 * SAMPLES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(len(images)) % CLASSES).to(DEVICE)
    batches = _endless(TrainLoader(split, SAMPLES, 0, padding=4, degrees=15.0, flip=True))
    sums = torch.zeros(len(MEASURED), dtype=torch.float64, device=DEVICE)
    choices = WAYS[way]
    return _naive(case, batches, sums) if choices is None else _ours(case, choices, amp, batches, sums)


def _endless(loader: TrainLoader) -> Iterator[Batch]:
    while True:
        yield from loader


def _naive(case: StepCase, batches: Iterator[Batch], sums: Tensor) -> Phases:
    step, together = case.naive_step(FULL)
    # As the one that the naive step has inside.
    optimizer = SGD(together.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True)
    average = AveragedModel(copy.deepcopy(together), multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    measured = torch.zeros_like(sums)

    def clipped() -> None:
        clip_grad_norm_(together.parameters(), MAX_NORM)
        optimizer.step()

    def whole() -> None:
        batch = next(batches)
        apply_affine(batch.images, batch.affine)
        step()  # of images of its own
        clip_grad_norm_(together.parameters(), MAX_NORM)
        average.update_parameters(together)
        sums.add_(measured)

    return Phases(
        step=whole,
        batch=lambda: next(batches),
        clipped_update=clipped,
        update=optimizer.step,
        average=lambda: average.update_parameters(together),
        metrics=lambda: sums.add_(measured),
    )


def _ours(case: StepCase, choices: tuple[Any, Any], amp: Any, batches: Iterator[Batch], sums: Tensor) -> Phases:
    batching, compile = choices
    model = case.model().to(DEVICE)
    model.batching = batching
    average = WeightAverage(model, DECAY)
    step = TrainStep(
        model,
        FusedImmunityLoss(size=(SIDE, SIDE), ignore_index=None),  # as a run has it
        FusedSGD(model.parameters(), 1e-3, 0.9, weight_decay=5e-4, nesterov=True),
        clip_grad_norm=MAX_NORM,
        amp=amp,
        double_backprop="reverse",
        compile=compile,
        log=_refuse,
    )
    measured = torch.zeros_like(sums)

    def update() -> None:
        step.clip_grad_norm = None
        step.update()
        step.clip_grad_norm = MAX_NORM

    def whole() -> None:
        sums.add_(step(*next(batches)))
        average.update()

    return Phases(
        step=whole,
        batch=lambda: next(batches),
        clipped_update=step.update,
        update=update,
        average=average.update,
        metrics=lambda: sums.add_(measured),
    )


def _refuse(announcement: str) -> None:
    """A compiled way that goes on in eager mode would be counted as what it is not."""
    raise RuntimeError(announcement)


def count(arch: str, way: str, amp: str, by: Count) -> dict[str, Any]:
    """The record of a way; RuntimeError where two steps launch different numbers."""
    phases = prepare(arch, way, amp)
    compiled = way.startswith("compiled")
    begin = time.perf_counter()
    phases.step()
    first = time.perf_counter() - begin
    for _ in range(COMPILED_WARM_UP if compiled else EAGER_WARM_UP):
        phases.step()
    for part in phases[1:]:
        part()
    whole, again = by.count(phases.step), by.count(phases.step)
    if whole != again:
        raise RuntimeError(f"two steps launched different numbers: {whole}, {again}")
    batch, clipped, bare, average, metrics = (by.count(part) for part in phases[1:])
    parts = {
        "batch": batch,
        "forward, backward": whole - batch - clipped - average - metrics,
        "clipping": clipped - bare,
        "optimiser": bare,
        "average": average,
        "metrics": metrics,
    }
    return {
        "arch": arch,
        "way": way,
        "amp": amp,
        "launches": whole.kernels,
        "graph_launches": whole.graphs,
        "memory_operations": whole.memory,
        "library_calls": None if compiled else _library_calls(phases.step),  # in a graph there are none
        "host_ms": None if by.imitated else _host_ms(phases.step),
        "first_step_s": None if by.imitated else round(first, 1),
        "launches_by_phase": {name: part.kernels for name, part in parts.items()},
    }


def _library_calls(step: Callable[[], object]) -> int:
    """How often an eager step calls cuDNN and cuBLAS, which launch at least a kernel each time."""
    with _Calls() as calls:
        step()
    return calls.count


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in LIBRARY
        return func(*args, **(kwargs or {}))


def _host_ms(step: Callable[[], object]) -> float:
    """Median time until the host has issued a step; the device may work on it for longer."""
    times = []
    for _ in range(TIMED):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return round(statistics.median(times) * 1e3, 3)


def table(found: dict[str, Any]) -> str:
    """Markdown of a record: a line for each architecture and way."""
    lines = [
        f"| 5 ×, {SAMPLES} images | way | launches | graphs | of the naive loop's | library calls | host, ms "
        f"| {' | '.join(PHASES)} |",
        "|---|---|" + "---:|" * (5 + len(PHASES)),
    ]
    for entry in found["records"]:
        naive = next(
            (e["launches"] for e in found["records"] if (e["arch"], e["amp"], e["way"]) == (*_key(entry)[:2], NAIVE)),
            None,
        )
        share = "–" if naive is None else f"{100 * entry['launches'] / naive:.1f} %"
        host = "–" if entry["host_ms"] is None else f"{entry['host_ms']:.2f}"
        calls = "–" if entry["library_calls"] is None else f"{entry['library_calls']:,}"
        parts = " | ".join(f"{entry['launches_by_phase'][phase]:,}" for phase in PHASES)
        lines.append(
            f"| {entry['arch']}, {entry['amp']} | {entry['way']} | {entry['launches']:,} | {entry['graph_launches']} "
            f"| {share} | {calls} | {host} | {parts} |"
        )
    return "\n".join(lines)


def _key(entry: dict[str, Any]) -> tuple[str, str, str]:
    return entry["arch"], entry["amp"], entry["way"]


def _kept(path: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Records in `path` that were made as these are."""
    if not path.is_file():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    same = all(old.get(name) == found[name] for name in ("machine", "versions", "counter"))
    return list(old["records"]) if same else []


def place() -> dict[str, Any]:
    """Where a record is made, and what counted."""
    by = counter()
    found = header("python -m benchmarks.launches")
    if by.imitated:
        found["machine"] = f"imitated GPU, mode {os.environ.get('IMITATED_GPU', 'unknown')}; no times are taken on it"
    return found | {"counter": by.name, "counter_leaves_out": by.leaves_out, "samples": SAMPLES, "experts": 5}


def main() -> None:
    """The command `python -m benchmarks.launches`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS, help="default: all")
    parser.add_argument("--way", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), help="default: all")
    parser.add_argument("--amp", nargs="+", choices=("bf16", "off"), default=("bf16",), help="default: bf16")
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        raise SystemExit("error: launches are counted on a GPU, and there is none")
    keep_caches()
    set_float32("tf32")
    by = counter()
    found: dict[str, Any] = place() | {"records": [], "failures": []}
    found["records"] = _kept(options.out, found)
    write(options.out, found)
    for arch in options.arch:
        for amp in options.amp:
            for way in options.way:
                torch.compiler.reset()
                try:
                    record = count(arch, way, amp, by)
                except Exception as error:
                    found["failures"].append({"arch": arch, "way": way, "amp": amp, "error": line(error)})
                    print(f"{arch}, {amp}, {way}: {line(error)}", flush=True)
                else:
                    others = [entry for entry in found["records"] if _key(entry) != _key(record)]
                    found["records"] = sorted([*others, record], key=_place_in_table)
                    print(f"{arch}, {amp}, {way}: {record['launches']} launches", flush=True)
                gc.collect()
                torch.cuda.empty_cache()
                write(options.out, found)
    print(table(found))
    if found["failures"]:
        raise SystemExit(f"error: {len(found['failures'])} failed: {found['failures'][0]['error']}")


def _place_in_table(entry: dict[str, Any]) -> tuple[int, str, int]:
    return ARCHS.index(entry["arch"]), entry["amp"], list(WAYS).index(entry["way"])


if __name__ == "__main__":
    main()
