"""What attacks made for mixtures find that those made for one network do not.

    python -m benchmarks.mixtures --data cifar10.npz --models DIR --out FILE [--images 200] [--parts pair,adp]

* `pair`: two networks, one of which is drawn with probability 1/2 for each question: adversarially trained apart; and
  the second trained on what fools the first (Pinot et al., arXiv 2002.11565). At 8/255, PGD-20 on each network, on the
  expected cross-entropy and on the mean of the probabilities, beside ARC (Dbouk & Shanbhag, arXiv 2206.06737). What is
  told is the expected accuracy, exactly: for each image the probability that the network drawn is right.
* `adp`: the mean of three networks' probabilities, trained together with ADP's loss or without, at 0.01. ADP's own
  evaluation, PGD-10 with steps of eps/10, beside longer attacks and MORA (arXiv 2211.08008), each way of whose weights
  is taken, and its first 100 iterations alone.

Images are the first of the test split in its fixed order. PGD-100 and MORA leave an image when it is fooled. Networks
are trained when they are first asked for, see `benchmarks.mixtures_training`. The record is written after each attack;
the same command goes on with it.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.mixtures_training import EPS, Zoo, add_options, zoo_of
from benchmarks.outcomes import write
from benchmarks.record import header
from immunity_fast.attacks import pgd
from immunity_fast.attacks.arc import arc, every_member, expected_loss
from immunity_fast.attacks.mora import mora
from immunity_fast.data.augmentation import as_float
from immunity_fast.data.sampling import sample
from immunity_fast.functional import log_mixture
from immunity_fast.reporting.html import Table

ADP_EPS = 0.01
BATCH = 100  # images that are attacked at once
LOWEST = "the lowest of all for each image"
FORMULAS = ("intended", "released", "both")

Attacker = Callable[[Tensor, Tensor, torch.Generator], Tensor]
Judge = Callable[[Tensor, Tensor], Tensor]
Keep = Callable[[dict[str, Any]], None]  # is told a row of the record


@dataclass(frozen=True)
class Lengths:
    """Steps of the attacks: those on a pair, ADP's own evaluation, and those that are to show more."""

    pair: int = 20
    short: int = 10
    long: int = 100


REHEARSED = Lengths(1, 1, 1)


class Named(NamedTuple):
    """An attack on some networks."""

    name: str
    attack: Attacker
    random: bool = True  # whether another seed gives other images


class Case(NamedTuple):
    """What is run on some networks, and what judges it: as right as `most` at best."""

    attacks: list[Named]
    judge: Judge
    most: int = 1


def logits_of(members: nn.ModuleList, images: Tensor) -> Tensor:
    """Logits (N, B, K) of all networks."""
    return torch.stack([member(images) for member in members])


def mixed(members: nn.ModuleList, images: Tensor) -> Tensor:
    """Log of the mean of the networks' probabilities (B, K)."""
    return log_mixture(logits_of(members, images))


def drawn_right(members: nn.ModuleList, images: Tensor, labels: Tensor) -> Tensor:
    """(B,): how many networks are right, of which one is drawn."""
    return (logits_of(members, images).argmax(-1) == labels).sum(0)


def mixed_right(members: nn.ModuleList, images: Tensor, labels: Tensor) -> Tensor:
    """(B,): 1 where the mean of the probabilities is right, and 0."""
    return (mixed(members, images).argmax(-1) == labels).long()


def pair_attacks(members: nn.ModuleList, names: Sequence[str], lengths: Lengths) -> list[Named]:
    """The attacks on networks of which one is drawn."""
    settings: dict[str, Any] = {"eps": EPS, "alpha": EPS / 4, "steps": lengths.pair}

    def by_pgd(model: Callable[[Tensor], Tensor], **more: Any) -> Attacker:
        return lambda images, labels, generator: pgd(model, images, labels, generator=generator, **settings, **more)

    found = [Named(f"PGD-20 on {name}", by_pgd(member)) for name, member in zip(names, members, strict=True)]
    return [
        *found,
        Named("PGD-20 on the mean probabilities", by_pgd(partial(mixed, members))),
        Named("PGD-20 on the expected cross-entropy", by_pgd(every_member(members), loss=expected_loss)),
        Named("ARC-20", lambda x, y, _: arc(members, x, y, eps=EPS, steps=lengths.pair), random=False),
    ]


def adp_attacks(members: nn.ModuleList, lengths: Lengths) -> list[Named]:
    """The attacks on the mean of three networks' probabilities."""
    step = ADP_EPS / 10

    def by_pgd(steps: int, **settings: Any) -> Attacker:
        return lambda images, labels, generator: pgd(
            partial(mixed, members),
            images,
            labels,
            eps=ADP_EPS,
            alpha=step,
            steps=steps,
            generator=generator,
            **settings,
        )

    def by_mora(**settings: Any) -> Attacker:
        return lambda images, labels, generator: mora(
            members, images, labels, eps=ADP_EPS, steps=lengths.long, generator=generator, **settings
        )

    return [
        Named("PGD-10", by_pgd(lengths.short)),
        Named("PGD-100", by_pgd(lengths.long, drop_fooled=True)),
        Named("PGD-100, CW margin", by_pgd(lengths.long, drop_fooled=True, loss="cw")),
        Named("MORA, first 100", by_mora(formula="intended", mixing=(0.5,), targeted=0)),
        *(Named(f"MORA, {formula}", by_mora(formula=formula)) for formula in FORMULAS),
    ]


def measure(case: Case, images: Tensor, labels: Tensor, seeds: int, known: list[dict[str, Any]], keep: Keep) -> None:
    """Tell of each attack's accuracy, by seed, and last of the lowest of all for each image.

    Args:
        case: what is run on what.
        images: (n, C, H, W) in [0, 1].
        labels: (n,).
        seeds: how often what is random is run.
        known: rows that are there already.
        keep: is told one row after the other, but for those that are known.
    """
    before = {row["attack"]: row for row in known}
    lowest = torch.full_like(labels, case.most)
    for name, attack, random in (Named("none", lambda x, _y, _g: x, random=False), *case.attacks):
        if name in before:
            lowest = torch.minimum(lowest, torch.tensor([int(digit) for digit in before[name]["right"]]))
            continue
        found, worst = [], torch.full_like(labels, case.most)
        for seed in range(seeds if random else 1):
            generator = torch.Generator().manual_seed(seed)
            pairs = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
            adversarial = torch.cat([attack(x, y, generator) for x, y in pairs])
            with torch.no_grad():
                right = case.judge(adversarial, labels)
            found.append(right)
            worst = torch.minimum(worst, right)
        lowest = torch.minimum(lowest, worst)
        keep(_row(name, found, worst, case.most))
    if LOWEST not in before:
        keep(_row(LOWEST, [lowest], lowest, case.most))


def _row(name: str, found: list[Tensor], worst: Tensor, most: int) -> dict[str, Any]:
    """Accuracies, and for each image, as a digit, how many networks are right after the worst of the runs."""
    by_seed = [round(float(right.double().mean()) / most, 4) for right in found]
    digits = "".join(map(str, worst.tolist()))
    return {"attack": name, "accuracy": round(statistics.mean(by_seed), 4), "by_seed": by_seed, "right": digits}


def pair(zoo: Zoo, names: Sequence[str], lengths: Lengths) -> Case:
    """One network of each of these groups, of which one is drawn."""
    members = nn.ModuleList([zoo[name][0] for name in names])
    attacks = pair_attacks(members, names, lengths)[: 1 if len(names) == 1 else None]
    return Case(attacks, partial(drawn_right, members), len(members))


def mean(zoo: Zoo, names: Sequence[str], lengths: Lengths) -> Case:
    """The mean of a group's networks; and its members alone, `adp 1`, which are not attacked."""
    group, _, number = names[0].partition(" ")
    members = zoo[group]
    if number:
        return Case([], partial(drawn_right, nn.ModuleList([members[int(number) - 1]])))
    return Case(adp_attacks(members, lengths), partial(mixed_right, members))


def table(rows: list[dict[str, Any]]) -> Table:
    """A part of the record, for people: accuracies in percent."""
    lines = [
        [
            row["networks"],
            row["attack"],
            f"{100 * row['accuracy']:.1f}",
            ", ".join(f"{100 * each:.1f}" for each in row.get("by_seed", [])),
        ]
        for row in rows
    ]
    return Table("", ["networks", "attack", "accuracy, %", "by seed"], lines)


PARTS = {
    "pair": (pair, (("first",), ("second",), ("boosted",), ("first", "second"), ("first", "boosted"))),
    "adp": (mean, tuple((f"{group}{number}",) for group in ("plain", "adp") for number in ("", " 1", " 2", " 3"))),
}


def begun(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The record in `out`, if it is of the same settings and machine, or a new one."""
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    same = all(found.get(name) == value for name, value in about.items())
    return found if same else about | {name: [] for name in PARTS}


def main(arguments: list[str] | None = None) -> None:
    """The command `python -m benchmarks.mixtures`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--images", type=int, default=200, help="test images (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of what is random (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="a step of each attack: no number means anything")
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas between (default: %(default)s)")
    parser.add_argument(
        "--networks", help="of these parts only those, with commas between: 'first or second,adp,adp 1'"
    )
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    known = [" or ".join(names) for part in parts for names in PARTS[part][1]]
    wanted = known if options.networks is None else options.networks.split(",")
    if unknown := set(wanted) - set(known):
        parser.error(f"--networks: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    zoo = zoo_of(options)
    chosen = sample(zoo.dataset.test, options.images)
    images, labels = as_float(chosen.images), chosen.labels
    lengths = REHEARSED if options.rehearse else Lengths()
    command = (
        f"python -m benchmarks.mixtures --data cifar10.npz --models DIR --images {options.images} --seeds "
        f"{options.seeds} --train-images {options.train_images} --epochs {options.epochs}"
        + (" --rehearse" if options.rehearse else "")
    )
    about = {"images": len(labels), "training": asdict(zoo.budget), "steps": asdict(lengths)}
    found = begun(options.out, header(command) | about)
    for part in parts:
        made, groups = PARTS[part]
        for names in groups:
            networks = " or ".join(names)
            if networks not in wanted:
                continue
            known = [row for row in found[part] if row["networks"] == networks]

            def keep(row: dict[str, Any], rows: list[dict[str, Any]] = found[part], networks: str = networks) -> None:
                rows.append({"networks": networks} | row)
                print({name: value for name, value in rows[-1].items() if name != "right"}, flush=True)
                write(options.out, found)

            measure(made(zoo, names, lengths), images, labels, options.seeds, known, keep)
    print("\n\n".join(table(found[name]).to_markdown() for name in parts))


if __name__ == "__main__":
    main()
