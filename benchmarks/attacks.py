"""Attacks on a trained run beside torchattacks': the same adversarial images, and time; a step of adversarial training.

    python -m benchmarks.attacks RUN --out benchmarks/results/attacks_cpu.json [--data cifar10.npz] [--images 100]

The model is the run's, by the exact mean of its gate, in evaluation mode; images are validation images, contiguous, in
float32. All attacks begin at the same random start: torchattacks' on this module, as a user calls it, and on the same
experts as plain modules, one after another; ours eager and compiled, with gradients in float32 and, where the device
multiplies in it, in bfloat16. What is timed is timed in turns, in one process; accuracy is judged in float32. Then
PGD-20 with `keep_best` and `drop_fooled`, and a training step with PGD-10 inside: this package's, and torchattacks' PGD
in a naive training loop.
"""

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchattacks
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks import naive
from benchmarks.cases import DEVICE
from benchmarks.measure import in_turns, ratio, summary
from benchmarks.outcomes import write
from benchmarks.record import header
from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.attacks import Attack, BoundAttack
from immunity_fast.data.augmentation import to_float
from immunity_fast.data.datasets import load
from immunity_fast.data.sampling import sample
from immunity_fast.losses import ALPHA, BETA, GAMMA
from immunity_fast.reporting.html import Table
from immunity_fast.runtime.precision import chosen_amp
from immunity_fast.training.adversarial import InnerAttack, InnerAttackSettings
from immunity_fast.training.checkpoint import load_model
from immunity_fast.training.run_folder import Run
from immunity_fast.training.step import TrainStep

EPS, STEP = 8 / 255, 2 / 255
PAIRS: dict[str, tuple[Callable[[nn.Module], Any], Attack]] = {
    "FGSM": (lambda m: torchattacks.FGSM(m, eps=EPS), Attack(EPS, EPS, 1)),
    "BIM-10": (lambda m: torchattacks.BIM(m, eps=EPS, alpha=STEP, steps=10), Attack(EPS, STEP, 10)),
    "MIM-10": (lambda m: torchattacks.MIFGSM(m, eps=EPS, alpha=STEP, steps=10), Attack(EPS, STEP, 10, decay=1.0)),
    "PGD-20": (
        lambda m: torchattacks.PGD(m, eps=EPS, alpha=STEP, steps=20),
        Attack(EPS, STEP, 20, random_start=True),
    ),
}
OPTIONS: dict[str, dict[str, bool]] = {
    "last iterate": {},
    "keep_best": {"keep_best": True},
    "drop_fooled": {"drop_fooled": True},
    "both": {"keep_best": True, "drop_fooled": True},
}
TRAINING_BATCH = 32
PLAIN = "torchattacks, plain modules"

Attacker = Callable[[Tensor, Tensor], Tensor]


def ways(model: ImmunityMoE, name: str, compile: Any) -> dict[str, Attacker]:
    """All that makes an attack: torchattacks, over this module and over plain ones; ours, eager and compiled, with
    gradients in float32 and, where the device multiplies in it, in bfloat16.
    """
    theirs, ours = PAIRS[name]
    found: dict[str, Attacker] = {
        "torchattacks": theirs(model),
        PLAIN: theirs(Plain(model)),
    }
    for mode in ("off",) if compile == "off" else ("off", compile):
        for amp in dict.fromkeys(("off", chosen_amp("auto", DEVICE))):
            way = ("eager" if mode == "off" else "compiled") + (", bf16" if amp == "bf16" else "")
            attack = dataclasses.replace(ours, amp=amp)
            found[way] = BoundAttack(attack, lambda x, _: model(x), compile=mode, device=DEVICE, log=_refuse)
    return found


class Plain(nn.Module):
    """The exact mean of a mixture as one writes it: ordinary experts, one after another."""

    def __init__(self, model: ImmunityMoE) -> None:
        super().__init__()
        self.experts = nn.ModuleList(model.unstack()).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, K)."""
        return torch.stack([expert(images).softmax(-1) for expert in self.experts]).mean(0).log()


def parity(model: ImmunityMoE, images: Tensor, labels: Tensor, compile: Any) -> list[dict[str, Any]]:
    """How far each way's images are torchattacks', from the same random start, and the accuracy, judged in float32."""
    found = []
    for name in PAIRS:
        expected = None
        for way, attack in ways(model, name, compile).items():
            torch.manual_seed(0)
            actual = attack(images, labels)
            expected = actual if expected is None else expected
            difference = (actual - expected).abs()
            found.append(
                {
                    "attack": name,
                    "way": way,
                    "pixels_equal": round(float((difference <= 1e-6).double().mean()), 6),
                    "images_equal": round(float((difference.flatten(1).amax(1) <= 1e-6).double().mean()), 4),
                    "accuracy": accuracy(model, actual, labels),
                }
            )
    return found


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share that is right."""
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).double().mean())


def speed(model: ImmunityMoE, images: Tensor, labels: Tensor, rounds: int, compile: Any) -> list[dict[str, Any]]:
    """Each way of each attack, in turns, against torchattacks over the same module and over plain ones."""
    found = []
    for name in PAIRS:
        calls = {way: _bound(attack, images, labels) for way, attack in ways(model, name, compile).items()}
        seconds = in_turns(calls, rounds)
        for way, measured in seconds.items():
            found.append(
                {
                    "attack": name,
                    "way": way,
                    **summary(measured),
                    "speedup": ratio(seconds["torchattacks"], measured),
                    "speedup_plain": ratio(seconds[PLAIN], measured),
                    "images_per_second": round(len(images) / statistics.median(measured), 2),
                }
            )
    return found


def options(model: nn.Module, images: Tensor, labels: Tensor, rounds: int) -> list[dict[str, Any]]:
    """PGD-20 with what makes it stronger or cheaper; the same random starts."""
    attacks = {
        name: Attack(EPS, STEP, 20, random_start=True, **chosen)  # type: ignore[arg-type]
        for name, chosen in OPTIONS.items()
    }

    def run(attack: Attack) -> Tensor:
        return attack(model, images, labels, generator=torch.Generator().manual_seed(0))

    seconds = in_turns({name: lambda a=attack: run(a) for name, attack in attacks.items()}, rounds)  # type: ignore[misc]
    return [
        {
            "option": name,
            "accuracy": accuracy(model, run(attack), labels),
            **summary(seconds[name]),
            "speedup": ratio(seconds["last iterate"], seconds[name]),
        }
        for name, attack in attacks.items()
    ]


def training(model: ImmunityMoE, images: Tensor, labels: Tensor, rounds: int, compile: Any) -> list[dict[str, Any]]:
    """A step of PGD-10 adversarial training with the whole loss: ours, and as one writes it with torchattacks."""
    size = (images.shape[-2], images.shape[-1])
    images, labels = images[:TRAINING_BATCH], labels[:TRAINING_BATCH]
    ours = copy.deepcopy(model).train()
    step = TrainStep(
        ours,
        FusedImmunityLoss(size=size),
        SGD(ours.parameters(), 1e-3, 0.9, nesterov=True, fused=True),
        compile=compile,
        log=_refuse,
        attack=InnerAttack(ours, InnerAttackSettings("pgd"), compile=compile, log=_refuse),
    )
    seconds = in_turns(
        {
            "torchattacks in a naive loop": _naive_training(model, images, labels, size),
            "this step": lambda: step(images, labels),
        },
        rounds,
    )
    theirs = seconds["torchattacks in a naive loop"]
    return [
        {"way": way, "compile": "off" if "naive" in way else compile, **summary(found), "speedup": ratio(theirs, found)}
        for way, found in seconds.items()
    ]


def _naive_training(model: ImmunityMoE, images: Tensor, labels: Tensor, size: tuple[int, int]) -> Callable[[], object]:
    """Experts one after another, hooks, `autograd.grad(create_graph=True)`, and torchattacks' PGD on the mixture."""
    experts = nn.ModuleList(model.unstack()).train()
    gate, normalize = copy.deepcopy(model.gate), copy.deepcopy(model.normalize)
    activations: list[Tensor] = []
    for expert in experts:
        expert.get_submodule(model.stage).register_forward_hook(lambda _m, _i, output: activations.append(output))

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.gate = experts, gate

        def forward(self, x: Tensor) -> Tensor:
            shares = [expert(x).softmax(-1) for expert in self.experts]
            weights = self.gate(normalize(x))
            return sum(weights[:, i : i + 1] * share for i, share in enumerate(shares)).log()  # type: ignore[union-attr]

    mixture = Mixture()
    mixture.gate.switch = "off"
    optimizer = SGD(mixture.parameters(), 1e-3, 0.9, nesterov=True)
    attack = torchattacks.PGD(mixture, eps=EPS, alpha=STEP, steps=10)

    def step() -> None:
        mixture.train()
        adversarial = attack(images, labels)
        mixture.train()
        activations.clear()
        logits = [expert(adversarial) for expert in experts]
        loss = naive.immunity_loss(logits, activations, labels, size, ALPHA, BETA, GAMMA, gate(normalize(adversarial)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _bound(attack: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Callable[[], object]:
    return lambda: attack(images, labels)


def _refuse(line: str) -> None:
    """A compiled way that goes on in eager mode would be measured as what it is not."""
    raise RuntimeError(line)


def tables(found: dict[str, Any]) -> list[Table]:
    """What the record says, for people."""
    same = {(entry["attack"], entry["way"]): entry for entry in found["parity"]}
    rows = []
    for entry in found["speed"]:
        pair = same[entry["attack"], entry["way"]]
        rows.append(
            [
                entry["attack"],
                entry["way"],
                f"{entry['median_us'] / 1e6:.3f} ± {entry['iqr_us'] / 2e6:.3f}",
                f"{entry['speedup']:.2f}",
                f"{entry['speedup_plain']:.2f}",
                f"{100 * pair['pixels_equal']:.3f}",
                f"{100 * pair['accuracy']:.1f}",
            ]
        )
    compared = Table(
        "", ["attack", "way", "seconds", "speed-up", "of plain modules", "equal pixels, %", "accuracy, %"], rows
    )
    chosen = Table(
        "",
        ["PGD-20", "accuracy, %", "seconds", "speed-up"],
        [
            [
                e["option"],
                f"{100 * e['accuracy']:.1f}",
                f"{e['median_us'] / 1e6:.3f} ± {e['iqr_us'] / 2e6:.3f}",
                f"{e['speedup']:.2f}",
            ]
            for e in found["options"]
        ],
    )
    trained = Table(
        "",
        ["a step of PGD-10 training", "seconds", "speed-up"],
        [
            [e["way"], f"{e['median_us'] / 1e6:.3f} ± {e['iqr_us'] / 2e6:.3f}", f"{e['speedup']:.2f}"]
            for e in found["training"]
        ],
    )
    return [compared, chosen, trained]


def main() -> None:
    """The command `python -m benchmarks.attacks`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that immunity_fast.train wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--data", help="where its data lie now")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", choices=("off", "on"), default="on" if DEVICE.type == "cuda" else "off")
    given = parser.parse_args()
    config = Run.open(given.run).config()
    form = {"image_size": config.image_size, "channels": config.channels}
    dataset = load(config.dataset, given.data or config.data, **form).to(DEVICE)
    model, _ = load_model(given.run, DEVICE)
    model.gate.switch = "mean"
    chosen = sample(dataset.validation, given.images)
    images, labels = to_float(chosen.images), chosen.labels
    command = (
        f"python -m benchmarks.attacks RUN --images {given.images} --rounds {given.rounds} --compile {given.compile}"
    )
    about = {"arch": config.arch, "experts": config.experts, "adversarial": config.adversarial}
    found = header(command) | {"model": about, "images": len(labels)}
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "parity": lambda: parity(model, images, labels, given.compile),
        "speed": lambda: speed(model, images, labels, given.rounds, given.compile),
        "options": lambda: options(model, images, labels, given.rounds),
        "training": lambda: training(model, images, labels, given.rounds, given.compile),
    }
    for name, part in parts.items():
        found[name] = part()
        write(given.out, found)
    print("\n\n".join(table.to_markdown() for table in tables(found)))


if __name__ == "__main__":
    main()
