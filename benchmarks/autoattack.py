"""AutoAttack as published: this package's, and torchattacks' parts with the same settings, batch by batch in turns.

    python -m benchmarks.autoattack RUN --data cifar10.npz --out FILE [--images 200] [--batch 100] [--limit-batches N]

The model is the run's mixture, answered by the exact mean of its gate. Three ways attack the same images, the first of
the test split in its fixed order:

* `immunity_fast`: `attacks.autoattack` on the mixture;
* `torchattacks`: APGD, APGDT, FAB and Square on the mixture, each on what survived those before, as MultiAttack does;
* `torchattacks, plain modules`: the same on the same experts as ordinary networks, one after another.

The record has, of each batch and way, the seconds of each part, how many images survived it, and which survived all. It
is written after each way of each batch, and the same command takes it up where it was, also after `--limit-batches`.
Accuracies are of all images, seconds of all batches that every way has attacked.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torchattacks
from torch import Tensor, nn

import immunity_fast
from benchmarks.attacks import Plain
from benchmarks.cases import DEVICE
from benchmarks.outcomes import write
from benchmarks.record import header
from immunity_fast import ImmunityMoE
from immunity_fast.attacks import autoattack
from immunity_fast.attacks.parts import Aim, Part
from immunity_fast.data.augmentation import as_float
from immunity_fast.data.datasets import load
from immunity_fast.data.sampling import sample
from immunity_fast.reporting.html import Table
from immunity_fast.training.run_folder import Run

EPS = 8 / 255
ROUNDING = 1e-6  # by which float32 may carry torchattacks' images out of the ball
OURS, THEIRS, PLAIN = "immunity_fast", "torchattacks", "torchattacks, plain modules"
REST = "all else"
PARTS = ("APGD", "APGDT", "FAB", "Square")
MODULE = importlib.import_module("immunity_fast.attacks.autoattack")  # as an attribute that is the function
FRAME = "in_turn"  # of it: runs the `parts.Part`s that its second argument, a function of K, names, one after the other


@dataclass(frozen=True)
class Settings:
    """Of AutoAttack on a network of so many classes: as published, unless steps or queries are fewer."""

    classes: int
    steps: int = 100
    queries: int = 5000


@dataclass
class Outcome:
    """What a way has made of a batch: the seconds of each part, the images that were left when it began, and all."""

    seconds: dict[str, float]
    entered: dict[str, int]
    adversarial: Tensor


def ours(model: nn.Module, settings: Settings, images: Tensor, labels: Tensor) -> Outcome:
    """This package's AutoAttack, whose parts are watched on their way through the frame that runs them."""
    seconds: dict[str, float] = {}
    entered: dict[str, int] = {}

    def watched(name: str, attack: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(images: Tensor, labels: Tensor, aim: Aim | None) -> Tensor:
            # Towards several classes at once an image is there several times.
            entered.setdefault(name, len(images) if aim is None else len(aim.places.unique()))
            begin = now()
            found = attack(images, labels, aim)
            seconds[name] = seconds.get(name, 0.0) + now() - begin
            return found

        return run

    frame = getattr(MODULE, FRAME)

    def watching(network: Any, order: Callable[[int], list[Part]], *rest: Any, **settings: Any) -> Tensor:
        def seen(classes: int) -> list[Part]:
            parts = order(classes)
            names = names_of([part.attack for part in parts])
            return [part._replace(attack=watched(name, part.attack)) for name, part in zip(names, parts, strict=True)]

        found: Tensor = frame(network, seen, *rest, **settings)
        return found

    begin = now()
    with patch.object(MODULE, FRAME, watching):
        adversarial = autoattack(
            model,
            images,
            labels,
            num_classes=settings.classes,
            eps=EPS,
            steps=settings.steps,
            queries=settings.queries,
        )
    seconds[REST] = now() - begin - sum(seconds.values())
    return Outcome(seconds, entered, adversarial)


def names_of(attacks: Sequence[Callable[..., Tensor]]) -> list[str]:
    """torchattacks' names of this package's parts: the first APGD is on the cross-entropy, the other has targets.

    Raises:
        ValueError: a function is not called after one of them.
    """
    found: list[str] = []
    for attack in attacks:
        called = getattr(attack, "__name__", repr(attack))
        for name in ("APGD", "FAB", "Square"):
            if called.startswith(name.lower()):
                found.append("APGDT" if name in found else name)
                break
        else:
            raise ValueError(f"parts: expected {', '.join(PARTS)}, got {called}")
    return found


def theirs(model: nn.Module, settings: Settings, images: Tensor, labels: Tensor) -> Outcome:
    """torchattacks' parts one after the other, each on the survivors of those before, as its MultiAttack does."""
    shared = {"norm": "Linf", "eps": EPS, "seed": 0}
    steps, classes = settings.steps, settings.classes
    attacks = {
        "APGD": torchattacks.APGD(model, steps=steps, loss="ce", **shared),
        "APGDT": torchattacks.APGDT(model, steps=steps, n_classes=classes, **shared),
        "FAB": torchattacks.FAB(model, steps=steps, multi_targeted=True, n_classes=classes, **shared),
        "Square": torchattacks.Square(
            model, n_queries=settings.queries, p_init=0.8, loss="margin", resc_schedule=False, **shared
        ),
    }
    outcome = Outcome({}, {}, images.clone())
    left = torch.arange(len(images), device=images.device)
    for name, attack in attacks.items():
        if not len(left):
            break
        begin = now()
        outcome.entered[name] = len(left)
        found = attack(images[left], labels[left]).detach()
        fooled = ~right(model, found, labels[left])
        outcome.adversarial[left[fooled]] = found[fooled]
        left = left[~fooled]
        outcome.seconds[name] = now() - begin
    return outcome


def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images a model gets right: (B,) bool."""
    with torch.no_grad():
        found: Tensor = model(images).argmax(-1) == labels
    return found


def now() -> float:
    """Seconds on the clock, the device having done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def entry(way: str, start: int, outcome: Outcome, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """What the record has of a batch: of images their numbers in the whole sample."""
    clean = right(model, images, labels)
    robust = right(model, outcome.adversarial, labels)
    moved = (outcome.adversarial - images).abs().flatten(1).amax(1)
    survived, survivors = {}, int(robust.sum())
    for name in reversed(PARTS):  # of one that found nobody left it is what the one before has left
        survived[name] = survivors
        survivors = outcome.entered.get(name, survivors)
    return {
        "way": way,
        "start": start,
        "images": len(images),
        "clean": int(clean.sum()),
        "survived": {name: survived[name] for name in PARTS},
        "seconds": {name: round(value, 3) for name, value in outcome.seconds.items()},
        "robust": (robust.nonzero()[:, 0] + start).tolist(),
        "outside": int((moved > EPS + ROUNDING).sum()),
    }


def summary(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Each way's accuracies and seconds, of the batches that all have attacked, and images on which they differ."""
    ways = (OURS, THEIRS, PLAIN)
    counted = [{each["start"] for each in batches if each["way"] == way} for way in ways]
    common = set.intersection(*counted)
    found: dict[str, Any] = {"ways": {}, "robust by one alone": []}
    robust = {}
    for way in ways:
        mine = [each for each in batches if each["way"] == way and each["start"] in common]
        images = sum(each["images"] for each in mine)
        seconds = {name: round(sum(each["seconds"].get(name, 0.0) for each in mine), 2) for name in (*PARTS, REST)}
        found["ways"][way] = {
            "images": images,
            "clean": share(sum(each["clean"] for each in mine), images),
            "accuracy": {name: share(sum(each["survived"][name] for each in mine), images) for name in PARTS},
            "seconds": seconds | {"all": round(sum(seconds.values()), 2)},
            "outside": sum(each["outside"] for each in mine),
        }
        robust[way] = {index for each in mine for index in each["robust"]}
    for one, other in combinations(ways, 2):
        for first, second in ((one, other), (other, one)):
            found["robust by one alone"].append(
                {"by": first, "not by": second, "images": sorted(robust[first] - robust[second])}
            )
    return found


def share(count: int, of: int) -> float | None:
    """A share as records have it; None of nothing."""
    return round(count / of, 4) if of else None


def table(found: dict[str, Any]) -> Table:
    """A summary, for people."""
    rows = []
    for way, each in found["ways"].items():
        for name in PARTS:
            accuracy = each["accuracy"][name]
            rows.append(
                [way, name, "" if accuracy is None else f"{100 * accuracy:.1f}", f"{each['seconds'][name]:.1f}"]
            )
        rows.append([way, "all", "", f"{each['seconds']['all']:.1f}"])
    return Table("", ["way", "after", "accuracy, %", "seconds"], rows)


def begun(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """A new record, or the one in `out`.

    Raises:
        ValueError: that is of other settings, or of another machine.
    """
    if not out.exists():
        return about | {"batches": []}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if changed := [name for name, value in about.items() if found.get(name) != value]:
        raise ValueError(f"{out.name}: expected the record of this command on this machine, got another {changed[0]}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m benchmarks.autoattack`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a folder that immunity_fast.train wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--data", help="where its data lie now")
    parser.add_argument("--images", type=int, default=200, help="test images (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=100, help="images at once (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of APGD and FAB (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=Settings.queries, help="of Square (default: %(default)s)")
    parser.add_argument("--experts", type=int, help="the run's first so many alone (default: all)")
    parser.add_argument("--limit-batches", type=int, help="stop after so many more batches")
    given = parser.parse_args(arguments)
    config = Run.open(given.run).config()
    form = {"image_size": config.image_size, "channels": config.channels}
    dataset = load(config.dataset, given.data or config.data, **form)
    chosen = sample(dataset.test, given.images)
    images, labels = as_float(chosen.images).to(DEVICE), chosen.labels.to(DEVICE)
    mixture = immunity_fast.load(given.run, device=DEVICE)
    if given.experts is not None:
        experts = mixture.unstack()[: given.experts]  # which normalise their images themselves
        nothing = {"mean": (0.0,) * config.channels, "std": (1.0,) * config.channels}
        mixture = ImmunityMoE.from_experts(experts, **nothing).to(DEVICE).eval()
    models = {OURS: mixture.deterministic(), THEIRS: mixture.deterministic(), PLAIN: Plain(mixture)}
    models = {way: model.eval() for way, model in models.items()}
    settings = Settings(dataset.num_classes, given.steps, given.queries)
    command = (
        f"python -m benchmarks.autoattack RUN --data cifar10.npz --images {given.images} --batch {given.batch} "
        f"--steps {given.steps} --queries {given.queries}"
    )
    command += "" if given.experts is None else f" --experts {given.experts}"
    about = {"arch": config.arch, "experts": mixture.num_experts}
    about |= {"adversarial": config.adversarial, "seed": config.seed}
    try:
        found = begun(given.out, header(command) | {"model": about, "eps": EPS})
    except ValueError as error:
        parser.error(f"--out: {error}")
    done = {(each["way"], each["start"]) for each in found["batches"]}
    attacks = {OURS: ours, THEIRS: theirs, PLAIN: theirs}
    names, begun_now = list(attacks), 0
    for number, start in enumerate(range(0, len(images), given.batch)):
        turn = number % len(names)
        todo = [way for way in names[turn:] + names[:turn] if (way, start) not in done]
        if not todo:
            continue
        if given.limit_batches is not None and begun_now >= given.limit_batches:
            break
        begun_now += 1
        rows = slice(start, start + given.batch)
        for way in todo:
            model = models[way]
            outcome = attacks[way](model, settings, images[rows], labels[rows])
            found["batches"].append(entry(way, start, outcome, model, images[rows], labels[rows]))
            found["summary"] = summary(found["batches"])
            write(given.out, found)
            print(found["batches"][-1], flush=True)
    print(table(summary(found["batches"])).to_markdown())


if __name__ == "__main__":
    main()
