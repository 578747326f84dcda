"""Which way of running the experts is fastest where: a table that is measured, and written by what measures it.

`strategies.json` holds a record for each device, architecture and use that was measured: the fastest of the ways that
compute the same in float32 and, where steps are compiled, what each way takes to its first step and for each further
one. `python -m benchmarks.steps` writes those of training, `python -m benchmarks.uses` those of attacks and inference.
CPUs are told apart by the widest vectors that PyTorch computes with: what channels-last maps gain depends on them.
What the table does not hold is batched as another architecture on such a device, and else done as `unmeasured` says.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

Batching = Literal["auto", "loop", "vmap"]
DoubleBackprop = Literal["auto", "reverse", "forward"]
MemoryFormat = Literal["auto", "contiguous", "channels_last"]
Use = Literal["training", "attack", "inference"]

TABLE = Path(__file__).with_name("strategies.json")
CPU = "CPU"  # how the name of one begins


class Strategy(NamedTuple):
    """How N experts run at once, how Grad-CAM's weights are differentiated, and how maps lie in memory."""

    batching: Literal["loop", "vmap"]
    double_backprop: Literal["reverse", "forward"]
    memory_format: Literal["contiguous", "channels_last"]


def unmeasured(device_type: str, use: Use = "training") -> Strategy:
    """What is done where nothing was measured.

    On a CPU grouped convolutions lose to a plain loop; on a GPU the launches of a loop are what an eager step waits
    for. Networks that nobody has measured may ask for contiguous maps, by `view`, and small maps gain nothing by
    channels-last: on a CPU, and where a GPU does not train, they are left as they are.
    """
    if device_type == "cpu":
        return Strategy("loop", "reverse", "contiguous")
    return Strategy("vmap", "reverse", "channels_last" if use == "training" else "contiguous")


def fastest(device_type: str, arch: str = "", use: Use = "training", *, compiled_steps: int | None = None) -> Strategy:
    """The measured strategy for an architecture on this machine's device of a type.

    Args:
        device_type: "cpu", "cuda", ….
        arch: its name; "" where it has none.
        use: "training", a step of it; "attack", the gradient of images in evaluation mode; "inference", a pass in it.
        compiled_steps: of a run that compiles and takes so many: what counts is when it ends, the compiling included,
            which takes longest where a loop over the experts is unrolled. None counts the steps alone.
    """
    device = device_name(device_type)
    same = [record for record in _table() if record["device"] == device and record["use"] == use]
    for record in same:
        if record["arch"] == arch:
            if compiled_steps is not None and record.get("compiled"):
                record = min(record["compiled"], key=lambda way: way["first_step_s"] + compiled_steps * way["step_s"])
            return Strategy(record["batching"], record["double_backprop"], record["memory_format"])
    for record in same:
        return unmeasured(device_type, use)._replace(batching=record["batching"])
    return unmeasured(device_type, use)


# What `torch.compiler.assume_constant_result` does, which imports the compiler first: a second for whoever only wants a
# loss, and a folder that must be writable.
fastest._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(batching: Batching, device: torch.device, arch: str = "", use: Use = "training") -> Literal["loop", "vmap"]:
    """What "auto" means for a device, an architecture and a use."""
    return fastest(device.type, arch, use).batching if batching == "auto" else batching


def laid_out(
    memory_format: MemoryFormat, device: torch.device, arch: str = "", use: Use = "training"
) -> Literal["contiguous", "channels_last"]:
    """What "auto" means for a device, an architecture and a use."""
    return fastest(device.type, arch, use).memory_format if memory_format == "auto" else memory_format


@functools.cache
def device_name(device_type: str) -> str:
    """What the table calls this machine's device of a type: a GPU's name, or a CPU by its vectors, as "CPU, AVX2"."""
    if device_type == "cpu":
        return f"{CPU}, {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name() if device_type == "cuda" and torch.cuda.is_available() else device_type


@functools.cache
def _table() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))["records"]
    return records
