"""One training of `benchmarks.science` and its attacks, by the package's own means.

    python -m benchmarks.training --run NAME --data FILE.npz --scratch DIR

It takes one step, which compiles, says that it is ready, and waits for a number on standard input: the seconds that it
may have the GPU from then on. In these it measures what a step costs, trains for as many of the epochs it was meant for
as fit beside the attacks, and is then attacked: the test split is looked at only here.
"""

import argparse
import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, outcomes
from benchmarks.cases import DEVICE, computes
from benchmarks.outcomes import FAILED, NOT_FINISHED, NOT_JUDGED, NOT_RUN, PASSED
from benchmarks.science import READY, RUNS
from immunity_fast.attacks import Attack, BoundAttack, LabelledModel, autoattack
from immunity_fast.data.datasets import ImageDataset, Split, load
from immunity_fast.data.loader import Batch
from immunity_fast.data.sampling import batches, sample
from immunity_fast.evaluation import gate_attackers
from immunity_fast.evaluation.metrics import wilson_interval
from immunity_fast.kernels import launch
from immunity_fast.runtime import cli
from immunity_fast.runtime.compilation import Compiled, keep_caches
from immunity_fast.runtime.modes import frozen
from immunity_fast.runtime.precision import set_float32
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.loop import check_finite, synchronize, train
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState

EPOCHS = {"standard": 16, "fgsm-rs": 15}
BATCH, LR = 512, 0.2  # 0.05 for 128 images, as the preset "fast" has it, in proportion
PGD = Attack(8 / 255, 2 / 255, steps=50, random_start=True, drop_fooled=True)
ATTACKED, AUTOATTACKED = 2000, 500  # test images, at most
FEWEST = 100  # test images that PGD attacks at least
ATTACKS_SHARE = 0.35  # of a turn, for the clean accuracy and PGD
ATTACK_BATCH, AUTOATTACK_BATCH = 500, 100
# Of gradients and forward passes that AutoAttack takes for an image that withstands them all: APGD and 9 targets, FAB
# and 9 targets, Square.
AUTOATTACK_GRADIENTS, AUTOATTACK_PASSES = 100 * (1 + 9 + 9), 5000
PROBED = 6  # steps that are timed
FIRST = 3  # steps until CUDA graphs are recorded, and replayed for the first time
SLACK = 1.15  # by which what is estimated may take longer
FOOLED_EARLY = 0.2  # share of PGD's gradients that are taken of a network that was trained on clean images
KNOWN = "the exact mean of the gate, which is also what answers"


class OutOfTimeError(Exception):
    """A training that has reached its limit."""


class LimitedTraining(TrainingState):
    """A trainer that stops at a time."""

    until = math.inf  # of `time.monotonic`

    def advance(self, batch: Batch) -> None:
        if time.monotonic() > self.until:
            raise OutOfTimeError
        super().advance(batch)


class ToldRun(Run):
    """A run that reports each epoch's record."""

    name = ""

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        super().append_metrics(record)
        outcomes.report(self.name, "training", epoch=rounded(record))


def config_of(name: str, data: str, rehearse: bool) -> TrainConfig:
    """The settings of a run, a key of `science.RUNS`."""
    how, what = name.split(", ")
    settings: dict[str, Any] = {"experts": 1} if what == "single" else {}
    if what == "plain":
        settings |= {"beta": 0.0, "gamma": 0.0}
    if how != "standard":
        settings["adversarial"] = how
    if rehearse:
        settings |= {"arch": "resnet8", "experts": min(settings.get("experts", 2), 2), "batch_size": 4, "epochs": 1}
    defaults: dict[str, Any] = {
        "preset": "fast",
        "dataset": "npz",
        "data": data,
        "flip": "on",  # CIFAR-10's images
        "arch": "resnet18",
        "epochs": EPOCHS[how],
        "batch_size": BATCH,
        "lr": LR,
        "amp": "bf16",
        "compile": "off" if launch.INTERPRETED else "on",
        "device": DEVICE.type,
        "check_images": 0,  # no attacks after each epoch: they take more time than it
        "checkpoint_every": 10**9,
    }
    return TrainConfig(**(defaults | settings))


def pgd(rehearse: bool) -> Attack:
    """What the network is attacked with: PGD-50; a few steps of it in a rehearsal."""
    return dataclasses.replace(PGD, steps=3) if rehearse else PGD


def data_of(path: str, rehearse: bool) -> ImageDataset:
    """The images; a few dozens of each split in a rehearsal."""
    if not rehearse:
        return load("npz", path)
    dataset, few = load("npz", path), {"train": 24, "validation": 8, "test": 8}
    parts: dict[str, Any] = {part: sample(getattr(dataset, part), n) for part, n in few.items()}
    return dataclasses.replace(dataset, **parts)


def fitting(asked: int, left: float, epoch: float, reserved: float) -> int:
    """How many of the epochs fit into `left` seconds, of which some are reserved; one takes `epoch`."""
    return max(0, min(asked, math.floor((left - reserved) / (SLACK * epoch))))


def attackable(seconds: float, every: float, each: float, images: int) -> int:
    """How many of the test images PGD can attack, where all of them take `every` and an attacked one `each` besides."""
    return min(images, ATTACKED, max(FEWEST, math.floor((seconds - every) / each)))


def take_steps(trainer: TrainingState, count: int) -> float:
    """Take steps of the present epoch, as the training goes on from them; the seconds of one."""
    synchronize(trainer.device)
    begin = time.perf_counter()
    for taken, batch in enumerate(trainer.loader, start=1):
        trainer.advance(batch)
        if taken == count:
            break
    synchronize(trainer.device)
    return (time.perf_counter() - begin) / count


def exact_mean(trainer: TrainingState) -> LabelledModel:
    """What is attacked, and what judges: the exact expectation of the gate's permutations, or the single network."""
    return gate_attackers.attacker(trainer.model, "mean")


def gradient_seconds(trainer: TrainingState, images: Tensor, labels: Tensor) -> float:
    """Of one step of an attack on a batch, as it will be taken: in evaluation mode and in float32."""
    set_float32("ieee")
    trainer.model.eval()
    attack = BoundAttack(dataclasses.replace(PGD, steps=1, drop_fooled=False), exact_mean(trainer))
    with frozen(trainer.model):
        for _ in range(2):  # the first one chooses algorithms
            synchronize(trainer.device)
            begin = time.perf_counter()
            attack(images, labels, generator=torch.Generator().manual_seed(0))
            synchronize(trainer.device)
            seconds = time.perf_counter() - begin
    trainer.model.train()
    set_float32(trainer.config.float32)
    return seconds


def share(right: int, images: int) -> dict[str, Any]:
    """An accuracy and its 95 % interval."""
    low, high = wilson_interval(right, images)
    return {"images": images, "right": right, "accuracy": round(right / images, 4), "interval": rounded([low, high])}


def answered(outputs: LabelledModel, images: Tensor, labels: Tensor) -> int:
    """How many images are answered rightly."""
    with torch.no_grad():
        return int((outputs(images, labels).argmax(-1) == labels).sum())


def clean(outputs: LabelledModel, test: Split) -> dict[str, Any]:
    """Accuracy on all test images."""
    return share(sum(answered(outputs, *batch) for batch in batches(test, ATTACK_BATCH)), len(test))


def attacked(
    name: str, attack: Attack, outputs: LabelledModel, test: Split, count: int, until: float
) -> dict[str, Any]:
    """Accuracy under PGD of so many test images, reported after each batch."""
    settings = {"known": KNOWN, **rounded(dataclasses.asdict(attack)), "float32": "ieee"}
    bound, chosen, right, seen = BoundAttack(attack, outputs), sample(test, count), 0, 0
    generator, begin, found = torch.Generator().manual_seed(0), time.perf_counter(), dict[str, Any]()
    for images, labels in batches(chosen, ATTACK_BATCH):
        if time.monotonic() > until:
            return found | {"not_run": f"no time was left for {len(chosen) - seen} images"}
        right += answered(outputs, bound(images, labels, generator=generator), labels)
        seen += len(labels)
        found = share(right, seen) | {"seconds": round(time.perf_counter() - begin, 1), "settings": settings}
        outcomes.report(name, "being attacked", pgd50=found)
    return found


def autoattacked(
    name: str, outputs: LabelledModel, test: Split, classes: int, until: float, gradient: float, rehearse: bool
) -> Any:
    """Accuracy under AutoAttack, or a line that says why there is none; `gradient`: seconds of one of a whole batch."""
    passes = AUTOATTACK_GRADIENTS + AUTOATTACK_PASSES / 3  # a gradient costs about three forward passes
    needed = SLACK * passes * gradient * AUTOATTACK_BATCH / ATTACK_BATCH
    options: dict[str, Any] = {"steps": 2, "queries": 10} if rehearse else {}
    if rehearse:
        needed = 0.0
    right, seen, found = 0, 0, dict[str, Any]()
    for images, labels in batches(sample(test, AUTOATTACKED), AUTOATTACK_BATCH):
        if time.monotonic() + needed > until:
            late = f"not run: {AUTOATTACK_BATCH} images would take {needed:.0f} s"
            return found | {"rest": late} if found else late
        begin = time.monotonic()
        adversarial = autoattack(lambda x: outputs(x, x), images, labels, num_classes=classes, **options)
        needed = SLACK * (time.monotonic() - begin)
        right += answered(outputs, adversarial, labels)
        seen += len(labels)
        found = share(right, seen) | {"known": KNOWN, "version": "standard", "eps": rounded(8 / 255)}
        outcomes.report(name, "being attacked", autoattack=found)
    return found


def rounded(value: Any) -> Any:
    """Floats to six digits, in whatever holds them."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def prepared(name: str, options: argparse.Namespace) -> LimitedTraining:
    """A trainer that has taken its first step; what is known of it by then is reported."""
    config = config_of(name, options.data, options.rehearse)
    set_float32(config.float32)
    begin = time.perf_counter()
    said: list[str] = []

    def log(text: str) -> None:
        error = sys.exc_info()[1]
        said.append(outcomes.shortened(text if error is None else f"{outcomes.innermost_cause(error)} ({text})"))

    trainer = LimitedTraining(config, data_of(options.data, options.rehearse), DEVICE, log)
    # A few passes an epoch: compiling them takes longer than they do.
    trainer._expert_logits = Compiled(trainer.model.expert_logits, "off", trainer.device)
    loaded = time.perf_counter()
    take_steps(trainer, 1)
    torch.cuda.empty_cache()  # whoever has the GPU needs what this one does not hold
    outcomes.report(
        name,
        READY,
        settings=rounded({key: value for key, value in config.to_json().items() if key != "data"}),
        device=machine.device(),
        versions=machine.versions(),
        images={part: len(getattr(trainer.dataset, part)) for part in ("train", "validation", "test")},
        loading_seconds=rounded(loaded - begin),
        first_step_seconds=rounded(time.perf_counter() - loaded),
        compiled=trainer.train_step.compiled,
        announced=said,
    )
    return trainer


def trained(
    name: str, trainer: LimitedTraining, scratch: Path, deadline: float, rehearse: bool
) -> tuple[float, int] | None:
    """Train within the time; the seconds of an attack's gradient and how many images to attack, or None for nothing."""
    begin = time.monotonic()
    config, steps = trainer.config, len(trainer.loader)
    take_steps(trainer, min(FIRST, steps - 3))
    step = take_steps(trainer, min(PROBED, steps - trainer.loader.position - 1))
    known: dict[str, Any] = {"step_seconds": rounded(step), "asked_epochs": config.epochs}
    if rehearse and not computes():
        outcomes.report(name, NOT_JUDGED, "the device computes nothing: no training, no attacks", **known)
        return None
    images, labels = next(batches(trainer.dataset.validation, ATTACK_BATCH))
    gradient = gradient_seconds(trainer, images, labels)
    # A forward pass costs about a third of a gradient.
    of_validation = len(trainer.dataset.validation) / len(images) * gradient / 3
    survivors = 1.0 if config.adversarial != "off" else FOOLED_EARLY
    tested = len(trainer.dataset.test)
    epoch, left = steps * step + of_validation, deadline - time.monotonic()
    every, each = (SLACK * passes * gradient / len(images) for passes in (tested / 3, pgd(rehearse).steps * survivors))
    count = attackable(ATTACKS_SHARE * left, every, each, tested)
    of_attacks = every + count * each
    # A rehearsal is to see that it runs, on a machine that may be slow.
    epochs = config.epochs if rehearse else fitting(config.epochs, left, epoch, of_attacks)
    known |= {"gradient_seconds": rounded(gradient), "epoch_estimate": rounded(epoch), "planned_epochs": epochs}
    known |= {"attacks_estimate": rounded(of_attacks), "planned_attacked_images": count}
    if epochs == 0:
        why = f"{left:.0f} s were left, of which an epoch takes {epoch:.0f} and the attacks {of_attacks:.0f}"
        outcomes.report(name, NOT_RUN, why, **known)
        return None
    outcomes.report(name, "training", **known)
    trainer.config = dataclasses.replace(config, epochs=epochs)  # the learning rate falls over these
    trainer.until = math.inf if rehearse else deadline - of_attacks / SLACK
    run = ToldRun(ToldRun.create(scratch / name.replace(", ", "-"), trainer.config).folder)
    run.name = name
    try:
        train(trainer, run)
        check_finite(trainer, run)
    except OutOfTimeError:
        outcomes.report(name, NOT_FINISHED, "the training reached its limit", done_epochs=trainer.epoch)
        return None
    finally:
        shutil.rmtree(run.folder, ignore_errors=True)
    seconds = rounded(time.monotonic() - begin)
    outcomes.report(name, "trained", done_epochs=trainer.epoch, training_seconds=seconds)
    return gradient, count


def evaluated(name: str, trainer: TrainingState, deadline: float, gradient: float, count: int, rehearse: bool) -> None:
    """Accuracies on the test split, clean and attacked."""
    set_float32("ieee")
    trainer.model.eval()
    test, outputs = trainer.dataset.test, exact_mean(trainer)
    outcomes.report(name, "being attacked", clean=clean(outputs, test))
    with frozen(trainer.model):
        attacks: dict[str, Any] = {"pgd50": attacked(name, pgd(rehearse), outputs, test, count, deadline)}
        classes = trainer.dataset.num_classes
        attacks["autoattack"] = autoattacked(name, outputs, test, classes, deadline, gradient, rehearse)
    outcomes.report(name, PASSED, **attacks)


def main() -> None:
    """The command `python -m benchmarks.training`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", required=True, choices=RUNS, help="which")
    parser.add_argument("--data", required=True, help=".npz file in MedMNIST's layout")
    parser.add_argument("--scratch", type=Path, required=True, metavar="DIR", help="for checkpoints")
    parser.add_argument("--rehearse", action="store_true", help="few images and a small network")
    options = parser.parse_args()
    name = options.run
    keep_caches()
    try:
        trainer = prepared(name, options)
        if not (turn := sys.stdin.readline().strip()):
            raise SystemExit(f"error: {name} has had no turn")
        deadline = time.monotonic() + float(turn)
        found = trained(name, trainer, options.scratch, deadline, options.rehearse)
        if found is not None:
            evaluated(name, trainer, deadline, *found, options.rehearse)
    except (Exception, cli.InputError) as error:
        outcomes.report(name, FAILED, outcomes.innermost_cause(error))
        raise


if __name__ == "__main__":
    main()
