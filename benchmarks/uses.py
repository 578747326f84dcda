"""A mixture's forward pass, and its gradient by the images, in every way that computes the same; writes one record.

    python -m benchmarks.uses --out benchmarks/results/uses_cpu.json [--write-strategies] [--arch resnet8,resnet18]

In evaluation mode, five experts: batched by a loop or by `vmap`, maps contiguous or channels-last, each in turns with
the others; and in bf16, which is another result and has to be asked for, where the device multiplies in it.
`--write-strategies` has "auto" choose the fastest float32 way.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import strategies_file
from benchmarks.cases import DEVICE, EXPERTS
from benchmarks.measure import in_turns, ratio, summary
from benchmarks.outcomes import write
from benchmarks.record import header
from immunity_fast import ImmunityMoE
from immunity_fast.runtime.precision import autocast, chosen_amp
from immunity_fast.runtime.strategies import device_name

IMAGES = {"resnet8": 64, "resnet18": 16, "googlenet": 8, "densenet121": 8}
USES = ("attack", "inference")
ROUNDS = 9
TIE = 0.02  # by which a way has to be faster than a loop with contiguous maps to be chosen
PLAIN = "loop, contiguous"
WAYS: dict[str, tuple[str, str, Any]] = {
    f"{batching}, {memory_format.replace('_', '-')}{', bf16' if amp == 'bf16' else ''}": (batching, memory_format, amp)
    for amp in ("off", "bf16")
    for batching in ("loop", "vmap")
    for memory_format in ("contiguous", "channels_last")
}
CLOSE = {"off": 0.999, "bf16": 0.9}  # cosine of what a way computes and what the plain one does, at least


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description="Attacks and inference in every way of running the experts.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", default=",".join(IMAGES), help="with commas between")
    parser.add_argument("--write-strategies", action="store_true", help='have "auto" choose what was fastest')
    given = parser.parse_args()
    record = header(f"python -m benchmarks.uses --arch {given.arch}") | {"cases": list[dict[str, Any]]()}
    for arch in given.arch.split(","):
        for use in USES:
            record["cases"].append(case(arch, use))
            write(given.out, record)
            print(table(record["cases"][-1:]), flush=True)
    if given.write_strategies:
        strategies_file.replace(fastest(record["cases"], f"benchmarks/results/{given.out.name}"))


def case(arch: str, use: str) -> dict[str, Any]:
    """Times of each way, and how many times as fast as the plain one it is."""
    torch.manual_seed(0)
    model = ImmunityMoE(arch, EXPERTS).to(DEVICE).eval()
    images = torch.rand(IMAGES[arch], 3, 32, 32, device=DEVICE)
    formats = ("off", chosen_amp("auto", DEVICE))
    calls = {name: _call(model, images, way, use) for name, way in WAYS.items() if way[2] in formats}
    expected = calls[PLAIN]()
    for name, call in calls.items():
        closeness = float(torch.cosine_similarity(call().flatten(), expected.flatten(), 0))
        if not closeness > CLOSE[WAYS[name][2]]:
            raise ValueError(f"{arch}, {use}, {name}: not what a loop computes: cosine {closeness:.4f}")
    seconds = in_turns(calls, ROUNDS)
    ways = {name: summary(times) | {"times_as_fast": ratio(seconds[PLAIN], times)} for name, times in seconds.items()}
    return {"arch": arch, "use": use, "experts": EXPERTS, "images": len(images), "ways": ways}


def _call(model: ImmunityMoE, images: Tensor, way: tuple[str, str, Any], use: str) -> Callable[[], Tensor]:
    batching, memory_format, amp = way

    def call() -> Tensor:
        model.batching, model.memory_format = batching, memory_format  # type: ignore[assignment]
        x = images.clone().requires_grad_(use == "attack")
        with torch.set_grad_enabled(use == "attack"), autocast(amp, DEVICE):
            logits = model.expert_logits(x)
        if use == "inference":
            return logits.float()
        (gradient,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), x)
        return gradient

    return call


def fastest(cases: list[dict[str, Any]], record: str, device: str | None = None) -> list[dict[str, Any]]:
    """What `strategies.json` says of a device: for each architecture and use the fastest way in float32.

    Args:
        cases: of a record.
        record: where it is kept.
        device: where it was measured, by its name in the table; None is this machine's.
    """
    device = device or device_name(DEVICE.type)
    found = []
    for each in cases:
        exact = {name: way["median_us"] for name, way in each["ways"].items() if WAYS[name][2] == "off"}
        best = min(exact, key=lambda name: exact[name] * (1 if name == PLAIN else 1 + TIE))
        batching, memory_format, _ = WAYS[best]
        found.append(
            {
                "device": device,
                "arch": each["arch"],
                "use": each["use"],
                "batching": batching,
                "double_backprop": "reverse",
                "memory_format": memory_format,
                "samples": each["images"],
                "record": record,
            }
        )
    return found


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown: a row a case, a column a way."""
    rows = [f"| 5 experts, images | {' | '.join(WAYS)} |", f"|---|{'---:|' * len(WAYS)}"]
    for each in cases:
        numbers = [f"{each['ways'][name]['median_us'] / 1e3:,.1f}" if name in each["ways"] else "" for name in WAYS]
        rows.append(f"| {each['arch']}, {each['use']}; {each['images']} | {' | '.join(numbers)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
