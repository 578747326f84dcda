"""Whether the package works on this GPU at all: what `benchmarks.gpu` runs first, in processes beside each other.

    python -m benchmarks.check device
    python -m benchmarks.check steps "vmap, bf16, forward, compiled" …

`device` says what the GPU is, and measures the bandwidth of a copy and the rate of matrix products. `steps` takes
training steps of two tiny experts, in every way that was named, and compares loss and gradient with the eager step in
float64 on the CPU. Both report by `outcomes`.
"""

import argparse
import importlib.util
import itertools
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks import machine, outcomes, timing
from benchmarks.cases import DEVICE, computes
from benchmarks.outcomes import FAILED, NOT_JUDGED, NOT_RUN, PASSED
from benchmarks.stages import Job
from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.data.augmentation import apply_affine, draw_affine
from immunity_fast.experts.staged import GlobalAveragePool
from immunity_fast.kernels import launch
from immunity_fast.runtime.compilation import keep_caches
from immunity_fast.runtime.precision import Amp, set_float32
from immunity_fast.runtime.strategies import Batching, DoubleBackprop
from immunity_fast.training.step import TrainStep

SIDE, SAMPLES, CLASSES, EXPERTS = 16, 8, 4, 2
CALLS = 3  # of a compiled step the first runs as it is, the second records CUDA graphs, the third replays them
MATRIX = 8192  # side of the matrices whose product is timed
SCALE = 2.0**8  # of float16's gradients, where the scaler would arrive: its first steps it skips
# Relative error of the loss, and cosine of the gradient: half precision moves the kinks of the heatmaps' ReLU.
CLOSE = {"off": (1e-4, 0.9999), "bf16": (0.02, 0.97), "fp16": (0.01, 0.98)}
NUMBERS = ("tests of kernels", "tests of steps", "determinism")  # jobs that make no sense without any
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or a read beyond a tensor is inside the allocator's block


class Combination(NamedTuple):
    """How a training step is taken: the experts' batching, and the precision."""

    batching: str
    amp: str
    double_backprop: str
    compile: str

    def __str__(self) -> str:
        return f"{self.batching}, {self.amp}, {self.double_backprop}, {'compiled' if self.compile == 'on' else 'eager'}"


class FellBackError(RuntimeError):
    """What was to be compiled runs in eager mode; says why."""


def _known(choice: Any) -> tuple[str, ...]:
    return tuple(name for name in get_args(choice) if name != "auto")


# Those first that the package would choose by itself.
COMBINATIONS = [
    Combination(*parts)
    for parts in itertools.product(
        sorted(_known(Batching), reverse=True), _known(Amp), _known(DoubleBackprop), ("off", "on")
    )
]


def jobs(python: Sequence[str], cores: int, rehearse: bool) -> list[Job]:
    """All that is checked: what says most in least time comes first."""
    here = [*python, "-m", "benchmarks.check", *(["--rehearse"] if rehearse else [])]
    # A process each keeps one core busy; with workers of its own to compile in, it would only wait for them.
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    compiled = [
        Job(str(way), [*here, "steps", str(way)], 150, alone, expected=(str(way),))
        for way in COMBINATIONS
        if way.compile == "on"
    ]
    batchings = dict.fromkeys(way.batching for way in COMBINATIONS)
    tests = [*python, "-m", "pytest", "-q", "-p", "benchmarks.pytest_outcomes", "-p", "no:cacheprovider", "-m", "gpu"]
    workers = min(cores, 4) if importlib.util.find_spec("xdist") and not rehearse else 0
    tests += ["-n", str(workers)] if workers else []
    chosen = ["-k", "channels_last"] if rehearse else []
    repeat = [*python, "-m", "benchmarks.repeat"]
    sanitizer = [sanitizer_path(), "--error-exitcode", "9", "--tool"]
    # What runs on the GPU at once comes after the device's numbers.
    return [
        Job("device", [*here, "device"], 60, alone, expected=("device", "copy", "bf16 products", "tf32 products")),
        *[
            Job(f"eager {kind}", [*here, "steps", *ways], 60, alone, after="device", expected=ways)
            for kind in batchings
            if (ways := tuple(str(way) for way in COMBINATIONS if (way.batching, way.compile) == (kind, "off")))
        ],
        Job("memcheck", [*sanitizer, "memcheck", *repeat, "--small"], 60, UNCACHED, after="device"),
        *compiled[: len(compiled) // 2],
        Job("tests of kernels", [*tests, "tests/kernels", *chosen], 150, cores=max(workers, 1), after="device"),
        *compiled[len(compiled) // 2 :],
        Job("tests of steps", [*tests, "tests/training/test_step_gpu.py", *chosen], 300, cores=max(workers, 1)),
        Job("determinism", [*repeat, *(["--small"] if rehearse else [])], 60),
        Job("racecheck", [*sanitizer, "racecheck", *repeat, "--small"], 60),
    ]


def sanitizer_path() -> str:
    """Of compute-sanitizer; its bare name where it is not to be found."""
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("compute-sanitizer", path=places) or "compute-sanitizer"


def expert() -> nn.Sequential:
    """Small enough to be compiled in seconds; with BatchNorm, a stride and channels on both sides of the cut."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        GlobalAveragePool(),
        nn.Linear(16, CLASSES),
    )


def mixture(batching: str = "loop") -> ImmunityMoE:
    """The same weights each time, on the CPU."""
    torch.manual_seed(0)
    return ImmunityMoE.from_experts([expert() for _ in range(EXPERTS)], stage="2", batching=batching)  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """uint8 images, labels and the numbers of their affine maps, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (SAMPLES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return images, torch.arange(SAMPLES) % CLASSES, draw_affine(SAMPLES, generator, flip=True)


def _step(model: ImmunityMoE, **options: Any) -> TrainStep:
    # A rate at which nothing moves: each call then takes the same step. By γ's default value a wrong PS would not show.
    return TrainStep(model, FusedImmunityLoss(gamma=5e-3, size=(SIDE, SIDE)), SGD(model.parameters(), 1e-12), **options)


def _gradient(model: nn.Module) -> Tensor:
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(parts).double().cpu()


def expected() -> tuple[float, Tensor]:
    """Loss and gradient of the eager step in float64 on the CPU."""
    model = mixture().double()
    images, labels, affine = batch()
    measured = _step(model, double_backprop="reverse")(apply_affine(images, affine).double(), labels)
    return float(measured[0]), _gradient(model)


def taken(way: Combination) -> tuple[float, Tensor]:
    """Loss and gradient of a step on the device.

    Raises:
        FellBackError: what was to be compiled runs in eager mode.
    """
    model = mixture(way.batching).to(DEVICE)
    refused: list[str] = []

    def log(text: str) -> None:
        error = sys.exc_info()[1]  # what compiling has raised
        refused.append(text if error is None else f"{outcomes.innermost_cause(error)} ({text})")

    step = _step(model, amp=way.amp, double_backprop=way.double_backprop, compile=way.compile, log=log)
    if way.amp == "fp16":
        step.scaler = torch.amp.GradScaler(DEVICE.type, init_scale=SCALE)
    arguments = [tensor.to(DEVICE) for tensor in batch()]
    for _ in range(CALLS if way.compile == "on" else 1):
        measured = step(*arguments)
        if refused or step.compiled != (way.compile == "on"):
            raise FellBackError(f"fell back to eager mode: {' '.join(refused)}")
    return float(measured[0]), _gradient(model)


def compared(way: Combination, found: tuple[float, Tensor], wanted: tuple[float, Tensor]) -> dict[str, float]:
    """How close they are.

    Raises:
        ValueError: that is not close.
    """
    (loss, gradient), (true_loss, true_gradient) = found, wanted
    error, closeness = CLOSE[way.amp]
    off = abs(loss - true_loss) / abs(true_loss)
    cosine = float(torch.cosine_similarity(gradient, true_gradient, 0))
    ratio = float(gradient.norm() / true_gradient.norm())
    said = {"loss_error": round(off, 6), "gradient_cosine": round(cosine, 6), "gradient_norm_ratio": round(ratio, 4)}
    if not (off <= error and cosine >= closeness and abs(ratio - 1) <= 1 - closeness + error):  # NaN is an error, too
        raise ValueError(f"loss {loss:.6g} for {true_loss:.6g}, gradient's cosine {cosine:.5f}, norm ratio {ratio:.3f}")
    return said


def check_steps(names: Sequence[str], rehearse: bool) -> None:
    """Take the steps of these names and report on each."""
    set_float32("ieee")
    ways = {str(way): way for way in COMBINATIONS}
    wanted, judged = expected(), not rehearse or computes()
    for name in names:
        way = ways[name]
        if way.compile == "on" and launch.INTERPRETED:
            outcomes.report(name, NOT_RUN, "compiled code does not run in Triton's interpreter")
            continue
        try:
            found = taken(way)
            if judged:
                outcomes.report(name, PASSED, **compared(way, found, wanted))
            else:
                outcomes.report(name, NOT_JUDGED)
        except FellBackError as error:
            outcomes.report(name, FAILED, outcomes.shortened(str(error)))
        except Exception as error:
            outcomes.report(name, FAILED, outcomes.innermost_cause(error))


def check_device(rehearse: bool) -> None:
    """What the GPU is, and how fast it copies and multiplies."""
    properties = torch.cuda.get_device_properties(DEVICE)
    outcomes.report(
        "device",
        PASSED,
        device=machine.device(),
        versions=machine.versions(),
        memory_gib=round(properties.total_memory / 2**30, 1),
        multiprocessors=properties.multi_processor_count,
    )
    side = 128 if rehearse else MATRIX
    if rehearse:
        timing.rehearse()
    judged = not rehearse or computes()
    rates = {"copy": lambda: {"gb_per_s": machine.copy_gb_per_s()}}
    for name, dtype in {"bf16": torch.bfloat16, "tf32": torch.float32}.items():
        rates[f"{name} products"] = lambda dtype=dtype: {"tflop_per_s": matrix_rate(side, dtype)}  # type: ignore[misc]
    for name, measured in rates.items():
        try:
            rate = measured()
            if judged and not min(rate.values()) > 0:
                raise ValueError(f"a rate that is none: {rate}")
            outcomes.report(name, PASSED if judged else NOT_JUDGED, **(rate if judged else {}))
        except Exception as error:
            outcomes.report(name, FAILED, outcomes.innermost_cause(error))


def matrix_rate(side: int, dtype: torch.dtype) -> float:
    """TFLOP/s of the product of two square matrices of random numbers; float32's are rounded to TF32."""
    set_float32("tf32")
    left, right, product = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(3))
    with timing.on_stream():
        run = timing.prepare([lambda: torch.mm(left, right, out=product)], timing.pool())
        seconds = timing.interleaved({"products": run})["products"].seconds
    return float(f"{2 * side**3 / statistics.median(seconds) / 1e12:.4g}")


def main() -> None:
    """The command `python -m benchmarks.check`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("device", "steps"))
    parser.add_argument("ways", nargs="*", help="of the steps")
    parser.add_argument("--rehearse", action="store_true", help="what needs numbers is not judged without any")
    options = parser.parse_intermixed_args()
    if DEVICE.type != "cuda":
        raise SystemExit("error: benchmarks.check needs a CUDA GPU, and torch finds none here")
    known = {str(way) for way in COMBINATIONS}
    if unknown := [name for name in options.ways if name not in known]:
        raise SystemExit(f"error: {unknown[0]}: expected one of {'; '.join(sorted(known))}")
    keep_caches()
    if options.what == "device":
        check_device(options.rehearse)
    else:
        check_steps(options.ways, options.rehearse)


if __name__ == "__main__":
    main()
