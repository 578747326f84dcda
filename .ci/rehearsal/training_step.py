"""Takes three training steps of experts of an architecture; fails where one is not what it was to be, or waits.

    python .ci/rehearsal/training_step.py --arch NAME [--batching loop,vmap] [--double-backprop reverse,forward] …

For the mode `shapes` of an imitated GPU: Dynamo, AOTAutograd, Inductor, Triton and CUDA graphs are real there, numbers
are not. What is to be compiled must not fall back to eager mode, and the third step, which replays graphs, must not
wait for the device. With `--ensemble` the step is that of the last part of such a training, in which it has trained
what comes before. A line a combination, with the seconds of the first step and of the third.
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
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.peers import method_of
from immunity_fast.runtime.compilation import keep_caches
from immunity_fast.training.adversarial import InnerAttack, InnerAttackSettings
from immunity_fast.training.optimizer import FusedSGD
from immunity_fast.training.step import TrainStep


def take(
    arch: str,
    batching: str,
    double_backprop: str,
    amp: str,
    attack: str,
    compile: str,
    ensemble: str,
    experts: int,
    samples: int,
    adversary: str,
) -> str:
    """What happened."""
    torch.compiler.reset()
    said: list[str] = []
    method = method_of(ensemble)
    gate, noise = "switch" if method is None else method.gate, getattr(method, "noise", None)
    model = (
        SingleNetwork(arch, 10, batching=batching, noise=noise)
        if experts == 1
        else ImmunityMoE(arch, experts, 10, batching=batching, gate=gate, noise=noise)
    ).cuda()
    attacked = None
    if method is not None:
        if not method.compiles:
            compile = "off"
        attacked = method.attacked(model)
        for stage in range(stages := method.stages(experts)):  # to the last one, in which some experts stay
            if method.begin_epoch(model, stage, stages, 0):
                method.begin_stage(model, stage, stages, 0)
    options = {"amp": amp, "compile": compile, "log": said.append}
    settings = InnerAttackSettings(attack, steps=2, adversary=adversary)
    inner = None if attack == "off" else InnerAttack(model, settings, attacked=attacked, **options)
    optimizer = FusedSGD(model.parameters(), 0.01, 0.9, nesterov=True)
    options |= {"double_backprop": double_backprop, "attack": inner, "clip_grad_norm": 1.0, "method": method}
    step = TrainStep(model, FusedImmunityLoss(), optimizer, **options)
    generator = torch.Generator().manual_seed(0)
    batch = (
        torch.randint(256, (samples, 3, 32, 32), generator=generator, dtype=torch.uint8).cuda(),
        (torch.arange(samples) % 10).cuda(),
        draw_affine(samples, generator).cuda(),
    )
    seconds = []
    for number in range(3):  # the second records graphs, the third replays them
        if method is not None:
            method.begin_batch(model, number, 0)
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
    parser.add_argument("--ensemble", nargs="+", default=["immunity"], help="as training has it")
    parser.add_argument("--adversary", choices=["mixture", "each"], default="mixture")
    parser.add_argument("--cells", type=int, help="of a searched network, which has 20 of them; and 8 channels")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--samples", type=int, default=4)
    options = parser.parse_args()
    keep_caches()
    torch.randperm = lambda count, device: torch.arange(count, device=device)  # DVERGE's; the imitation cannot sort
    failed = False
    ways = itertools.product(
        options.arch,
        options.batching,
        options.double_backprop,
        options.amp,
        options.attack,
        options.compile,
        options.ensemble,
    )
    for way in ways:
        try:
            arch = way[0] if options.cells is None else reduced(way[0], options.cells, 8)
            outcome = take(arch, *way[1:], options.experts, options.samples, options.adversary)
        except Exception as error:
            outcome = f"FAILED: {type(error).__name__}: {error}"
        failed = failed or "FAILED" in outcome
        print(f"{' '.join(way)}: {outcome}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
