"""Takes three training steps of experts of an architecture; fails where one is not what it was to be, or waits.

    python .ci/rehearsal/training_step.py --arch NAME [--batching loop,vmap] [--double-backprop reverse,forward] …

For the mode `shapes` of an imitated GPU: Dynamo, AOTAutograd, Inductor, Triton and CUDA graphs are real there, numbers
are not. What is to be compiled must not fall back to eager mode, and the third step, which replays graphs, must not
wait for the device. A line a combination, with the seconds of the first step and of the third.
"""

import argparse
import gc
import itertools
import time
from collections.abc import Sequence

import torch

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.data.augmentation import draw_affine
from immunity_fast.experts.genotypes import reduced
from immunity_fast.runtime.compilation import keep_caches
from immunity_fast.training.adversarial import InnerAttack, InnerAttackSettings
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.step import TrainStep


def take(
    arch: str, batching: str, double_backprop: str, amp: str, attack: str, compile: str, experts: int, samples: int
) -> str:
    """What happened."""
    torch.compiler.reset()
    said: list[str] = []
    model = ImmunityMoE(arch, experts, 10, batching=batching).cuda()
    options = {"amp": amp, "compile": compile, "log": said.append}
    inner = None if attack == "off" else InnerAttack(model, InnerAttackSettings(attack, steps=2), **options)
    optimizer = FusedSGD(model.parameters(), 0.01, 0.9, nesterov=True)
    options |= {"double_backprop": double_backprop, "attack": inner, "clip_grad_norm": 1.0}
    step = TrainStep(model, FusedImmunityLoss(), optimizer, **options)
    generator = torch.Generator().manual_seed(0)
    batch = (
        torch.randint(256, (samples, 3, 32, 32), generator=generator, dtype=torch.uint8).cuda(),
        (torch.arange(samples) % 10).cuda(),
        draw_affine(samples, generator).cuda(),
    )
    seconds = []
    for number in range(3):  # the second records graphs, the third replays them
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")
        begin = time.perf_counter()
        try:
            step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    compiled = step.compiled and (inner is None or inner.compiled)
    outcome = "passed" if compiled == (compile == "on") and not said else f"FAILED: {' '.join(said) or 'eager'}"
    return f"{outcome}, first step {seconds[0]:.0f} s, third {seconds[2]:.3f} s"


def words(text: str) -> Sequence[str]:
    """Of a list with commas."""
    return text.split(",")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=words, required=True)
    parser.add_argument("--batching", type=words, default=["vmap", "loop"])
    parser.add_argument("--double-backprop", type=words, default=["reverse", "forward"])
    parser.add_argument("--amp", type=words, default=["off"])
    parser.add_argument("--attack", type=words, default=["off"])
    parser.add_argument("--compile", type=words, default=["on"])
    parser.add_argument("--cells", type=int, help="of a searched network, which has 20 of them; and 8 channels")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    keep_caches()
    failed = False
    ways = itertools.product(
        options.arch, options.batching, options.double_backprop, options.amp, options.attack, options.compile
    )
    for way in ways:
        try:
            arch = way[0] if options.cells is None else reduced(way[0], options.cells, 8)
            outcome = take(arch, *way[1:], options.experts, options.samples)
        except Exception as error:
            outcome = f"FAILED: {type(error).__name__}: {error}"
        failed = failed or "FAILED" in outcome
        print(f"{' '.join(way)}: {outcome}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
