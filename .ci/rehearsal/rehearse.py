"""Runs what takes a device on an imitated GPU, and says of each command whether it came to its end.

    python .ci/rehearsal/rehearse.py --imitated FOLDER [--python PYTHON] [--all | --only WORD …] [--jobs N] \
        [--table FILE]

FOLDER holds `run.py`, which runs a Python program on the imitated GPU: in its mode `values` all is computed on the CPU,
eager, with Triton's kernels in the interpreter; in `shapes` nothing is, but it compiles and records graphs as on a GPU.
Without `--all` it is the subset that `.ci/run` has minutes for. Data are a few images, in a folder that is removed at
the end. Exit status 1 where a command failed.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT = 1800  # seconds a command
FOLDER = re.compile(r"\{folder\}/([\w.-]+)")  # that a command reads or writes
RUNNING: set[subprocess.Popen[bytes]] = set()
SEARCHED = ("pdarts", "advrush", "robnet_free", "robnet_large")
ARCHS = ("resnet18", "googlenet", "densenet121", *SEARCHED)
SMALL = "--experts 2 --batch-size 4 --check-images 4 --attack-images 4 --device cuda"
TRAIN = f"-m immunity_fast.train --dataset npz --data {{folder}}/data.npz {SMALL} --epochs 1 --limit-train 8"
TARGETS = "--mixup 0.4 --cutmix 1 --label-smoothing 0.1 --class-weights balanced"
DIGITS = f"-m immunity_fast.train {SMALL} --epochs 1 --limit-train 64"
TESTS = "-m pytest -q -p no:cacheprovider -m gpu"
EACH = "--adversarial n-fgsm --adversary each"
ADVERSARIAL = "--arch resnet8 --attack pgd,trades,fgsm-rs"
DEFAULT = "--batching vmap --double-backprop reverse"
ATTACK_EACH = "--attack n-fgsm --adversary each"
OTHERS = f"--arch resnet8 {DEFAULT} --ensemble"
GPU = "-m benchmarks.gpu --rehearse --budget 1200 --data {folder}/data.npz --python '{python} {imitated}/run.py values'"
EVALUATE = "-m immunity_fast.evaluate"
FEW = "--limit 4 --masking-images 4 --device cuda --compile off"
SCRIPT = """
import sys, numpy as np
from pathlib import Path
from PIL import Image
random = np.random.default_rng(0)
arrays = {}
for part, count in (("train", 16), ("val", 6), ("test", 8)):
    arrays[f"{part}_images"] = random.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    arrays[f"{part}_labels"] = np.arange(count) % 3
np.savez(sys.argv[1], **arrays)
for index, image in enumerate(arrays["train_images"]):
    file = Path(sys.argv[1]).parent / "images" / str(index % 2) / f"{index}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)
"""


class Case(NamedTuple):
    """A command, the mode it is rehearsed in, and whether CI has time for it."""

    name: str
    mode: str
    command: str
    ci: bool = False


def cases() -> list[Case]:
    """In an order in which each finds the runs that it needs."""

    def train(name: str, options: str = "", *, ci: bool = False) -> Case:
        out = name.replace(" ", "-")
        return Case(f"train, {name}", "values", f"{TRAIN} --compile off {options} --out {{folder}}/{out}", ci)

    def step(name: str, options: str, *, ci: bool = False) -> Case:
        return Case(f"step, {name}", "shapes", f"{{here}}/training_step.py {options}", ci)

    pgd, trades = "--adversarial pgd --attack-steps 2", "--adversarial trades --attack-steps 2"
    return [
        train("float32", ci=True),
        train("bf16", "--amp bf16"),
        train("fp16", "--amp fp16"),
        train("loop", "--batching loop"),
        train("loop bf16", "--batching loop --amp bf16"),
        train("forward mode", "--double-backprop forward"),
        train("forward mode loop", "--batching loop --double-backprop forward"),
        train("forward mode bf16", "--double-backprop forward --amp bf16"),
        train("detached", "--detach-weights"),
        train("recomputed", "--checkpoint-activations"),
        train("recomputed loop bf16", "--checkpoint-activations --batching loop --amp bf16"),
        train("probability", "--score probability"),
        train("clipped", "--clip-grad-norm 1 --float32 ieee"),
        train("one network", "--experts 1"),
        train("another network", "--experts 1 --seed 1"),
        train("pgd", pgd, ci=True),
        train("pgd batch statistics", f"{pgd} --attack-batchnorm train --attack-gate sample"),
        train("trades", trades),
        train("trades bf16", f"{trades} --amp bf16"),
        train("fgsm-rs", "--adversarial fgsm-rs"),
        train("average", "--ema 0.9 --clip-grad-norm 1"),
        train("targets", f"{TARGETS} --optimizer adamw --warmup-epochs 0.5 --accumulate 2 --decay weights", ci=True),
        train("targets bf16", f"{TARGETS} --amp bf16 --adversarial pgd --attack-steps 2"),
        train("grey", "--channels 1"),
        train("adp bf16 n-fgsm", "--ensemble adp --amp bf16 --adversarial n-fgsm"),
        train("gal", "--ensemble gal"),
        train("trs", "--ensemble trs:steps=1"),
        train("dverge, each n-fgsm", f"--ensemble dverge:steps=2 {EACH}"),
        train("plain bf16, each n-fgsm", f"--ensemble plain --amp bf16 {EACH}"),
        train("mrboost", "--ensemble mrboost:warm_start=true --adversarial n-fgsm --epochs 2"),
        train("barre", "--ensemble barre:images=8,updates=2 --experts 4 --epochs 4"),
        train("hrs", "--ensemble hrs --experts 4 --epochs 4"),
        train("rse", "--ensemble rse --experts 1"),
        Case(
            "train, streamed", "values",
            f"-m immunity_fast.train --dataset folder --data {{folder}}/images --stream on --workers 1 {SMALL} "
            "--epochs 1 --compile off --out {folder}/streamed", True,
        ),
        *[train(arch, f"--arch {arch}") for arch in ARCHS],
        *[train(f"{arch} loop", f"--arch {arch} --batching loop") for arch in ("googlenet", "densenet121", "pdarts")],
        Case("train --resume", "values", "{here}/interrupted.py {folder}/interrupted " + f"{TRAIN} --compile off"),
        Case("train, digits", "values", f"{DIGITS} --compile off --out {{folder}}/digits"),
        Case("train, digits bf16", "values", f"{DIGITS} --compile off --amp bf16 --out {{folder}}/digits-bf16"),
        Case(
            "evaluate, all attacks", "values",
            f"{EVALUATE} {{folder}}/float32 --attacks all --queries 20 --autoattack-steps 2 "
            f"--mora-steps 2 --arc-steps 1 --eps 2/255,8/255 {FEW}",
        ),
        Case(
            "evaluate, every attacker", "values",
            f"{EVALUATE} {{folder}}/bf16 --draws 2 --transfer-from {{folder}}/float32 --drop-fooled "
            f"--mora-steps 2 --arc-steps 1 {FEW}",
        ),
        Case("evaluate, L2", "values", f"{EVALUATE} {{folder}}/float32 --norm L2 --attacks pgd --again {FEW}", True),
        Case("evaluate, one network", "values", f"{EVALUATE} {{folder}}/one-network --attacks paper {FEW}"),
        Case(
            "ensemble", "values",
            "-m immunity_fast.ensemble {folder}/one-network {folder}/another-network --out {folder}/joined",
        ),
        Case("reproduce, smoke", "values", "-m immunity_fast.reproduce all --scale smoke --out {folder}/smoke"),
        Case("networks of one's own", "values", "{here}/own_networks.py", True),
        Case("examples/drop_in.py", "values", "{root}/examples/drop_in.py --steps 3 --batch-size 4"),
        Case("examples/lightning_module.py", "values", "{root}/examples/lightning_module.py --steps 3"),
        Case(
            "tests/training/test_step_gpu.py, what needs no compiler", "values",
            f"{TESTS} tests/training/test_step_gpu.py -k 'channels_last or torch_does or laid_out and off'",
        ),
        Case("benchmarks.record", "values", "-m benchmarks.record --rehearse --out {folder}/record.json"),
        Case("benchmarks.steps", "values", "-m benchmarks.steps --rehearse --out {folder}/steps.json"),
        Case("benchmarks.gpu", "values", f"{GPU} --out {{folder}}/gpu"),
        step("compiled resnet8", f"--arch resnet8 {DEFAULT}", ci=True),
        step("eager resnet8, all ways", "--arch resnet8 --compile off --amp off,bf16,fp16", ci=True),
        step("eager resnet8, pgd, trades, fgsm-rs", f"{ADVERSARIAL} {DEFAULT} --compile off", ci=True),
        step("eager resnet8, adp, gal", f"{OTHERS} adp gal --compile off", ci=True),
        step("eager resnet8, trs, dverge", f"{OTHERS} trs:steps=1 dverge:steps=2 --compile off"),
        step("eager resnet8, in turn", f"{OTHERS} hrs barre mrboost --experts 4 --attack n-fgsm --compile off"),
        step("eager resnet8, each n-fgsm", f"{OTHERS} plain dverge:steps=2 {ATTACK_EACH} --amp off,bf16 --compile off"),
        step("eager resnet8, rse", f"{OTHERS} rse --experts 1 --attack n-fgsm --compile off"),
        step("compiled resnet8, other ensembles", f"{OTHERS} plain adp gal trs:steps=1 dverge:steps=2"),
        step("compiled resnet8, all ways", "--arch resnet8"),
        step("compiled resnet8, half precision", "--arch resnet8 --amp bf16,fp16 --batching vmap"),
        step("compiled resnet8, pgd, trades, fgsm-rs", f"{ADVERSARIAL} {DEFAULT}"),
        *[step(f"compiled {arch}, all ways", f"--arch {arch}") for arch in ARCHS if arch not in SEARCHED],
        *[step(f"compiled {arch}, 20 cells", f"--arch {arch} {DEFAULT}") for arch in SEARCHED],
        step("compiled, 5 cells of searched networks, all ways", "--arch pdarts,advrush,robnet_large --cells 5"),
        Case(
            "train compiled", "shapes",
            f"{{here}}/without_numbers.py {TRAIN} --compile on --out {{folder}}/compiled",
        ),
        Case(
            "train compiled, targets", "shapes",
            f"{{here}}/without_numbers.py {TRAIN} --compile on {TARGETS} --out {{folder}}/compiled-3",
        ),
        Case(
            "train compiled, bf16, pgd", "shapes",
            f"{{here}}/without_numbers.py {TRAIN} --compile on --amp bf16 {pgd} --ema 0.9 --out {{folder}}/compiled-2",
        ),
    ]  # fmt: skip


def rehearse(case: Case, python: str, imitated: Path, folder: Path) -> str:
    """What became of a case: "passed", or a line on why not."""
    places = {"folder": folder, "here": HERE, "root": ROOT, "python": python, "imitated": imitated}
    words = [word.format(**places) for word in shlex.split(case.command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if case.mode == "values":
        environment |= {
            "TRITON_INTERPRET": "1",
            "TORCH_COMPILE_DISABLE": "1",
        }  # where a command cannot be told --compile
    log = folder / f"log of {case.name.replace('/', ' ')}"
    with log.open("wb") as output:
        command = [python, str(imitated / "run.py"), case.mode, *words]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        RUNNING.add(process)
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return f"stopped after {LIMIT} s"
        finally:
            RUNNING.discard(process)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    # What compiles by default goes on in eager mode in `values`, which is all that it can do there.
    telling = [line for line in lines if "FAILED" in line or ("compiling failed" in line and case.mode == "shapes")]
    if status == 0 and not telling:
        return "passed"
    print("\n".join(lines[-40:]), flush=True)
    return (telling or lines or ["nothing was printed"])[-1][:300] + f" (status {status})"


def rehearse_all(cases: Sequence[Case], jobs: int, rehearsed: Callable[[Case], str]) -> Iterator[tuple[Case, str]]:
    """What became of each case, as they end; so many at once, and none before those whose folders it reads."""
    with ThreadPoolExecutor(jobs) as pool:
        made: dict[str, Future[str]] = {}
        ended: dict[Future[str], Case] = {}

        def after(earlier: list[Future[str]], case: Case) -> str:
            wait(earlier)
            return rehearsed(case)

        for case in cases:
            before, _, out = case.command.partition("--out ")
            future = pool.submit(after, [made[folder] for folder in FOLDER.findall(before) if folder in made], case)
            made |= dict.fromkeys(FOLDER.findall(out or before), future)
            ended[future] = case
        try:
            for future in as_completed(ended):
                yield ended[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--imitated", type=Path, required=True, help="folder of run.py")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment under test")
    parser.add_argument("--all", action="store_true", help="everything: an hour or more")
    parser.add_argument("--only", nargs="+", help="cases whose name holds one of these")
    parser.add_argument("--jobs", type=int, default=1, help="so many at once")
    parser.add_argument("--table", type=Path, help="Markdown file to append outcomes to")
    options = parser.parse_args()
    for word in options.only or []:
        if not any(word in case.name for case in cases()):
            raise SystemExit(f"error: --only {word}: no case has that in its name")
    failed = []
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as place:
        folder = Path(place)
        subprocess.run([options.python, "-c", SCRIPT, str(folder / "data.npz")], check=True)
        chosen = [
            case
            for case in cases()
            if (any(word in case.name for word in options.only) if options.only else options.all or case.ci)
        ]

        def rehearsed(case: Case) -> str:
            begin = time.monotonic()
            outcome = rehearse(case, options.python, options.imitated.resolve(), folder).replace(place, "FOLDER")
            print(f"{case.name} ({case.mode}): {outcome}, {time.monotonic() - begin:.0f} s", flush=True)
            return outcome

        for case, outcome in rehearse_all(chosen, options.jobs, rehearsed):
            if options.table:
                with options.table.open("a", encoding="utf-8") as table:
                    table.write(f"| {case.name} | {case.mode} | {outcome} |\n")
            if outcome != "passed":
                failed.append(case.name)
    if failed:
        raise SystemExit(f"error: failed in the rehearsal: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
