"""Compiles every kernel, as the launchers launch it, for GPUs that need not be there, and lists what the code needs.

    python -m benchmarks.kernel_resources [--targets 80 90 100] [--few] [--out benchmarks/results/kernel_resources.json]

The public ops are called on tensors of the benchmarks' sizes; a stand-in for Triton's driver names the target, and each
launch stops once the kernel is compiled. So specialisation, tiles and warps are those of a real launch. Listed are
registers a thread, bytes of stack (more than 0: registers were spilled), shared memory, the global loads and stores in
the PTX, as width in bits: number of instructions, and the products that were fused into a sum over threads, for which
copies of that sum differ from thread to thread in their last bit.
"""

import argparse
import functools
import itertools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.outcomes import write
from immunity_fast.kernels import cross_entropy, heatmap_losses, heatmaps, multi_tensor, soft_cross_entropy

TARGETS = (80, 90, 100)
SHARED_MEMORY = {80: 163, 90: 227, 100: 227}  # KiB that a block can have; CUDA programming guide, compute capabilities
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
EXPERTS = 5
MAPS = ((128, 16, 16), (256, 8, 8), (512, 16, 16))
LARGE_MAPS = (64, 56, 56)  # larger than a tile
ODD_MAPS = ((70, 7, 7), (64, 14, 14), (1, 1, 1))  # rows of cells are no multiple of 16 bytes
SAMPLES = (32, 2048)
CLASSES = (10, 1000)
# Calls that lead to every kernel: maps of one tile and of many, slopes summed already, weights.
FEW = (
    "(128, 16, 16) bf16 contiguous B=32",
    "(128, 16, 16) bf16 summed",
    "(64, 56, 56) bf16 channels-last",
    "K=10 fp32 B=32",
    "aligned tensors, scaled",
)


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels by this number, so it must tell targets apart."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """The GPU to compile for."""
        return GPUTarget("cuda", self.capability, 32)


def untouched(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """Memory that is asked for and never read: its size costs nothing."""
    if channels_last:
        return torch.empty((*shape[:2], *shape[3:], shape[2]), dtype=dtype).permute(0, 1, 4, 2, 3)
    return torch.empty(shape, dtype=dtype)


def calls() -> Iterator[tuple[str, Any]]:
    """What is compiled, and the call that compiles it."""
    layouts = {"contiguous": False, "channels-last": True}
    for samples, shape, dtype, layout in itertools.product(SAMPLES, MAPS, DTYPES, layouts):
        if dtype == "fp16" and (samples, shape) != (SAMPLES[0], MAPS[0]):  # as wide as bf16: the same code
            continue
        if dtype == "fp32" and samples != SAMPLES[0]:  # a batch's size decides on the number of splits alone
            continue
        name = f"{shape} {dtype} {layout} B={samples}"
        yield name, functools.partial(losses, samples, shape, DTYPES[dtype], layouts[layout], "maps")
    for shape in MAPS[:2]:
        yield f"{shape} bf16 summed", functools.partial(losses, 32, shape, torch.bfloat16, False, "sums")
        yield f"{shape} bf16 list", functools.partial(losses, 32, shape, torch.bfloat16, False, "list")
        yield f"{shape} bf16 masked", functools.partial(losses, 32, shape, torch.bfloat16, False, "masked")
    for shape, layout in itertools.product((LARGE_MAPS, *ODD_MAPS), layouts):
        yield f"{shape} bf16 {layout}", functools.partial(losses, 1, shape, torch.bfloat16, layouts[layout], "maps")
    yield f"{LARGE_MAPS} fp32 sliced", functools.partial(losses, 3, LARGE_MAPS, torch.float32, False, "sliced")
    for samples, classes, dtype in itertools.product(SAMPLES, CLASSES, ("bf16", "fp32")):
        name = f"K={classes} {dtype} B={samples}"
        yield name, functools.partial(mixture, samples, classes, DTYPES[dtype])
    for aligned, scaled in itertools.product((True, False), (False, True)):
        name = f"{'aligned' if aligned else 'unaligned'} tensors{', scaled' if scaled else ''}"
        yield name, functools.partial(update, aligned, scaled)


def losses(samples: int, shape: tuple[int, int, int], dtype: torch.dtype, channels_last: bool, form: str) -> None:
    """Both heatmap ops, forward and backward."""
    size = [32, 32] if shape[1] < 32 else [224, 224]
    activations = [untouched((EXPERTS, samples, *shape), dtype, channels_last)]
    if form == "list":
        activations = [untouched((1, samples, *shape), dtype, channels_last)] * EXPERTS
    if form == "sliced":  # no axis is contiguous, rows do not follow each other
        activations = [part[..., 1::2] for part in activations]
    gradients = [part[..., 0, 0].contiguous() if form == "sums" else part for part in activations]
    counted = untouched((samples,), torch.float32) if form == "masked" else None
    information, stability, *saved = heatmap_losses.heatmap_losses(
        activations, gradients, size, True, 0.01, 0.5, "", counted
    )
    heatmap_losses.heatmap_losses_backward(
        information, stability, activations, *saved, counted, True, 0.01, 0.5, dtype, True, True
    )
    maps, *saved = heatmaps.gradcam_heatmaps(activations, gradients, size, 0.5)
    heatmaps.gradcam_heatmaps_backward(maps, activations, *saved, 0.5, dtype, True, True)


def mixture(samples: int, classes: int, dtype: torch.dtype) -> None:
    """The mixture's cross-entropy, forward and backward."""
    logits, gate = untouched((EXPERTS, samples, classes), dtype), untouched((samples, EXPERTS), torch.float32)
    targets = untouched((samples,), torch.int64)
    found, statistics = cross_entropy.mixture_cross_entropy(logits, gate, targets, 1.0)
    cross_entropy.mixture_cross_entropy_backward(found, logits, gate, targets, statistics, 1.0)
    coefficients = untouched((samples, classes), torch.float32)
    found, statistics = soft_cross_entropy.soft_mixture_cross_entropy(logits, gate, coefficients, 1.0)
    for needs in (False, True):
        soft_cross_entropy.soft_mixture_cross_entropy_backward(
            found, logits, gate, coefficients, statistics, 1.0, needs
        )


def update(aligned: bool, scaled: bool) -> None:
    """What follows a backward pass: clipping, SGD with momentum, an average of weights and integers."""
    table = multi_tensor.Table(torch.device("cpu"))
    first = 0 if aligned else 1
    parts = [untouched((5000 + first,), torch.float32)[first:] for _ in range(3)]
    table.set([(*(part.data_ptr() for part in parts), len(parts[0]))])
    partials = multi_tensor.squares(table)
    scalar = untouched((), torch.float32) if scaled else None
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    multi_tensor.sgd(table, 0.1)
    for clipped in (None, partials):
        multi_tensor.sgd(table, 0.1, partials=clipped, max_norm=1.0, scale=scalar, skip=scalar, **options)
    multi_tensor.lerp(table, 0.1)


def compile_all(capability: int, few: bool = False) -> list[dict[str, Any]]:
    """A record for each kernel and specialisation that the calls, or `FEW` of them, lead to, in their order."""
    triton.runtime.driver.set_active(Driver(capability))
    found: dict[str, dict[str, Any]] = {}
    run = JITFunction.run
    name = ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in found:
            constants = {key: value for key, value in kwargs.items() if key.isupper()}
            found[compiled.hash] = {
                "kernel": compiled.name,
                "first_used_by": name,
                "capability": capability,
                "num_warps": kwargs["num_warps"],
                "constants": constants,
                **describe(compiled, capability),
            }

    JITFunction.run = compile_only
    try:
        for name, call in calls():
            if not few or name in FEW:
                call()
    finally:
        JITFunction.run = run
        triton.runtime.driver.set_active(None)
    return list(found.values())


def describe(compiled: Any, capability: int) -> dict[str, Any]:
    """Registers, stack and shared memory of the machine code, and the widths of loads and stores in its PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(value) for value in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    return {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "loads": widths(compiled.asm["ptx"], "ld"),
        "stores": widths(compiled.asm["ptx"], "st"),
        "fused_into_sums": fused_into_sums(compiled.asm["ptx"]),
    }


def widths(ptx: str, instruction: str) -> dict[int, int]:
    """Bits moved by a thread in one global load ("ld") or store ("st") → number of such instructions, widest first."""
    counts: Counter[int] = Counter()
    for suffixes in re.findall(rf"\b{instruction}\.global((?:\.[\w:]+)+)", ptx):
        vector, bits = re.search(r"\.v(\d)", suffixes), re.search(r"\.[bfus](\d+)$", suffixes)
        counts[(int(vector[1]) if vector else 1) * int(bits[1])] += 1  # type: ignore[index]
    return dict(sorted(counts.items(), reverse=True))


def fused_into_sums(ptx: str) -> int:
    """Number of instructions that multiply a thread's own numbers and add the product of another thread, rounded."""
    shuffled = set(re.findall(r"shfl\.sync\.\w+\.b32\s+(%\w+)", ptx))
    fused = re.findall(r"fma\.rn\.f32\s+%\w+, (\S+), (\S+), (\S+);", ptx)
    return sum(not shuffled.isdisjoint(operands) for operands in fused)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, choices=TARGETS, help="compute capabilities")
    parser.add_argument("--few", action="store_true", help="every kernel once or twice, not every size and layout")
    parser.add_argument("--out", type=Path, help="write the records to this JSON file")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("error: TRITON_INTERPRET is set, and what is interpreted is not compiled: unset it")
    with ProcessPoolExecutor(min(len(arguments.targets), os.cpu_count() or 1)) as pool:
        records = list(itertools.chain(*pool.map(functools.partial(compile_all, few=arguments.few), arguments.targets)))
    print(
        f"{'kernel':32} {'sm':>4} {'warps':>5} {'regs':>5} {'stack':>5} {'shared':>6}  loads; stores  (first used by)"
    )
    for record in records:
        print(
            f"{record['kernel']:32} {record['capability']:4} {record['num_warps']:5} {record['registers']:5} "
            f"{record['stack_bytes']:5} {record['shared_bytes']:6}  {record['loads']}; {record['stores']}  "
            f"({record['first_used_by']})"
        )
    if arguments.out:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        write(arguments.out, {"versions": versions, "records": records})


if __name__ == "__main__":
    main()
