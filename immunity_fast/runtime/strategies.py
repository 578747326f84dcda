"""Which way of running the experts is fastest where: a table that `python -m benchmarks.steps` measures and writes.

`strategies.json` holds a record for each device and architecture that was measured: the way whose steps are fastest
and, where steps are compiled, what each way takes to its first step and for each further one. What it does not hold is
batched as another architecture on such a device, or else as `UNMEASURED` says.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

Batching = Literal["auto", "loop", "vmap"]
DoubleBackprop = Literal["auto", "reverse", "forward"]

TABLE = Path(__file__).with_name("strategies.json")


class Strategy(NamedTuple):
    """How N experts run at once, and how Grad-CAM's weights are differentiated."""

    batching: Literal["loop", "vmap"]
    double_backprop: Literal["reverse", "forward"]


# On a CPU grouped convolutions lose to a plain loop; on a GPU the launches of a loop are what an eager step waits for.
UNMEASURED = {"cpu": Strategy("loop", "reverse"), "other": Strategy("vmap", "reverse")}


def fastest(device_type: str, arch: str = "", compiled_steps: int | None = None) -> Strategy:
    """The measured strategy for an architecture on this machine's device of a type.

    Args:
        device_type: "cpu", "cuda", ….
        arch: its name; "" where it has none.
        compiled_steps: of a run that compiles and takes so many: what counts is when it ends, the compiling included,
            which takes longest where a loop over the experts is unrolled. None counts the steps alone.
    """
    device = "cpu" if device_type == "cpu" else _device_name(device_type)
    table = _table()
    same = [record for record in table if record["device"] == device]
    for record in same:
        if record["arch"] == arch:
            if compiled_steps is not None and record.get("compiled"):
                record = min(record["compiled"], key=lambda way: way["first_step_s"] + compiled_steps * way["step_s"])
            return Strategy(record["batching"], record["double_backprop"])
    for record in same:
        return Strategy(record["batching"], "reverse")  # which can differentiate any head
    return UNMEASURED.get(device_type, UNMEASURED["other"])


# What `torch.compiler.assume_constant_result` does, which imports the compiler first: a second for whoever only wants a
# loss, and a folder that must be writable.
fastest._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose(batching: Batching, device: torch.device, arch: str = "") -> Literal["loop", "vmap"]:
    """What "auto" means for a device and an architecture."""
    return fastest(device.type, arch).batching if batching == "auto" else batching


@functools.cache
def _device_name(device_type: str) -> str:
    return torch.cuda.get_device_name() if device_type == "cuda" and torch.cuda.is_available() else device_type


@functools.cache
def _table() -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))["records"]
    return records
