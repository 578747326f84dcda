"""The tables of the comparison of ways to train an ensemble: what is left of each under attack, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from immunity_fast.evaluation.settings import EvaluationSettings
from immunity_fast.evaluation.words import NAMES, radius_words
from immunity_fast.reporting.html import Table
from immunity_fast.reproduction.experiments import NAMES as ARCHITECTURES
from immunity_fast.reproduction.experiments import Entry
from immunity_fast.reproduction.peers import ADVERSARIAL, PLAIN, STANDARD, TRAININGS, Comparison, Way, relative_cost
from immunity_fast.reproduction.tables import NOT_DONE, Found, cell, number, summarised
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.run_evaluation import DRAWS

WORST = "worst case"  # of `results`' entries: the least over all white-box attacks for each image
Sample = tuple[float, float]


@dataclass(frozen=True)
class Published:
    """A figure that others have published, and of what: beside ours it stands where all of that is the same.

    Args:
        label: of `peers.Way`.
        arch, experts, dataset, adversarial, eps: of the run.
        figure: in %, and the attack.
        source: where it says so.
    """

    label: str
    arch: str
    experts: int
    dataset: str
    adversarial: str
    eps: float
    figure: str
    source: str


# Only what was read in the authors' paper or logs. Of most papers the networks or the radii are others than ours.
PUBLISHED = (
    Published(
        "one network",
        "resnet18",
        1,
        "cifar10",
        "pgd",
        8 / 255,
        "51.7 (ARC)",
        "Dbouk and Shanbhag, Adversarial Vulnerability of Randomized Ensembles, ICML 2022",
    ),
)


def answer(results: dict[str, Any], eps: float, attack: str, attacker: str | None, judge: str | None) -> Any:
    """The accuracy of what answers, under an attack of a radius: {accuracy, interval, …}; None if it was not made.

    Of what draws it is the exact expectation of the draw, or the mean of ten draws where nobody knows that; of what
    does not, the accuracy of its output.

    Args:
        results: as `evaluation.results.results` gives them.
        eps: the radius.
        attack, attacker: as they are called there; "worst case" by "all" is that of the attacks that know the model.
        judge: somebody else's answers than those that are given in use.
    """
    found = next((each for each in results.get("radii", ()) if math.isclose(each["eps"], eps)), None)
    if found is None:
        return None
    if attack == WORST:
        white = found.get("white_box")
        if white is None:
            return None
        found = {"worst_case": white["worst_case"], "drawn": [white["drawn"]] if white["drawn"] else []}
    if judge is None:
        for entry in found["drawn"]:
            if (entry["attack"], entry["attacker"]) == (attack, attacker):
                return entry
    entries = found["worst_case"] if attack == WORST else found["accuracy"]
    named = [each for each in entries if attack == WORST or (each["attack"], each["attacker"]) == (attack, attacker)]
    by_judge = {each["judge"]: each for each in named}
    return next((by_judge[name] for name in (judge, "output", "mean") if name in by_judge), None)


def clean(judge: str | None) -> Callable[[dict[str, Any]], Any]:
    """The accuracy on all test images; of what draws by one draw for each of them."""

    def value(results: dict[str, Any]) -> Any:
        entries = {each["judge"]: each for each in results["accuracy"] if each["attack"] == "clean"}
        return next((entries[name] for name in (judge, "sample", "output", "mean") if name in entries), None)

    return value


def worst(eps: float, judge: str | None) -> Callable[[dict[str, Any]], Any]:
    """What is left under the worst of all white-box attacks for each image, at a radius."""
    return lambda results: answer(results, eps, WORST, "all", judge)


def transferred(eps: float, judge: str | None) -> Callable[[dict[str, Any]], Any]:
    """What the best of the attacks leaves that were made on another ensemble, at a radius."""

    def value(results: dict[str, Any]) -> Any:
        attacks = dict.fromkeys(each["attack"] for each in results["accuracy"] if each["attacker"] == "transfer")
        found = [answer(results, eps, attack, "transfer", judge) for attack in attacks]
        return min((each for each in found if each is not None), key=lambda each: each["accuracy"], default=None)

    return value


def published(label: str, config: TrainConfig, eps: float) -> str:
    """What others have published of the same network, data, training and radius; else nothing."""
    own = (label, config.arch, config.experts, config.dataset, config.adversarial)
    whole = config.limit_train is None and config.eps == 8 / 255
    for each in PUBLISHED:
        same = own == (each.label, each.arch, each.experts, each.dataset, each.adversarial)
        if whole and same and math.isclose(each.eps, eps):
            return each.figure
    return ""


def seconds(entry: Entry, plain: Entry, found: Found) -> str:
    """How long training took, of plain standard training on the same machine; nothing where that is not known."""
    base = {job.config.seed: found[job] for job in plain.jobs if job in found}
    ratios = []
    for job in entry.jobs:
        own, other = found.get(job), base.get(job.config.seed)
        if own is not None and other is not None and own.device == other.device and other.training_seconds > 0:
            ratios.append(own.training_seconds / other.training_seconds)
    got = summarised(ratios)
    if got is None:
        return "—" if any(job in found for job in entry.jobs) else NOT_DONE
    return f"{got[0]:.1f}" + (f" ± {got[1]:.1f}" if len(ratios) > 1 else "")


def comparison_table(comparison: Comparison, training: str, found: Found) -> Table:
    """The table of a training, of `peers.TRAININGS`: a row for each way to train."""
    plain = plain_entry(comparison)
    rows = comparison.rows(training)
    config = comparison.config(training)
    radii = _radii(comparison)
    last = radii[-1]
    lines = []
    for way, entry in rows:
        judge = way.judge
        values = [clean(judge), *(worst(eps, judge) for eps in radii), transferred(last, judge)]
        lines.append(
            [
                way.label,
                *(cell(entry, found, value) for value in values),
                f"{relative_cost(way, entry.jobs[0], plain.jobs[0]):.1f}",
                seconds(entry, plain, found),
                published(way.label, entry.jobs[0].config, last),
            ]
        )
    words = [radius_words(eps, "Linf") for eps in radii]
    columns = ["trained as", "clean", *(f"white box, ε = {each}" for each in words), f"transfer, ε = {words[-1]}"]
    columns += ["passes", "seconds", f"published, ε = {words[-1]}"]
    if not any(line[-1] for line in lines):
        columns, lines = columns[:-1], [line[:-1] for line in lines]
    caption = "Standard training" if training == STANDARD else f"Adversarial training, {config.adversarial}"
    return Table(caption, columns, lines, _note(comparison, rows, training))


def attacks_table(comparison: Comparison, training: str, found: Found) -> Table:
    """What each attack leaves of each row at the largest radius, by whatever attacker is best at it."""
    rows = comparison.rows(training)
    eps = _radii(comparison)[-1]
    seen = [each for _, entry in rows for job in entry.jobs if job in found for each in found[job].results["accuracy"]]
    attacks = [name for name in NAMES if any(each["attack"] == name and each["attacker"] for each in seen)]

    def least(attack: str, judge: str | None) -> Callable[[dict[str, Any]], Any]:
        def value(results: dict[str, Any]) -> Any:
            who = dict.fromkeys(
                each["attacker"]
                for each in results["accuracy"]
                if each["attack"] == attack and each["attacker"] not in (None, "transfer")
            )
            made = [answer(results, eps, attack, attacker, judge) for attacker in who]
            return min((each for each in made if each is not None), key=lambda each: each["accuracy"], default=None)

        return value

    lines = [[way.label, *(cell(entry, found, least(attack, way.judge)) for attack in attacks)] for way, entry in rows]
    columns = ["trained as", *(NAMES[attack] for attack in attacks)]
    words = radius_words(eps, "Linf")
    note = f"Accuracy in % at ε = {words}, of the attacker against whom it is least; without what is transferred. A "
    note += "dash: the attack is not for this one."
    return Table(f"{training.capitalize()} training, attack by attack", columns, lines, note)


def plain_entry(comparison: Comparison) -> Entry:
    """The plain ensemble by standard training, of which costs are told."""
    return next(entry for way, entry in comparison.rows(STANDARD) if way.label == PLAIN)


def samples(comparison: Comparison, found: Found, eps: float) -> dict[str, dict[str, Sample]]:
    """Of a chart: training → row → (what is left under the worst of all white-box attacks in %, its spread)."""
    values: dict[str, dict[str, Sample]] = {}
    for training in TRAININGS:
        for way, entry in comparison.rows(training):
            got = number(entry, found, worst(eps, way.judge))
            if got is not None:
                values.setdefault(f"{training} training", {})[way.label] = got
    return values


def tables(comparison: Comparison, found: Found) -> list[Table]:
    """All of them: what is left and the costs, by training; then attack by attack."""
    made = [comparison_table(comparison, training, found) for training in TRAININGS]
    if found:
        made += [attacks_table(comparison, training, found) for training in TRAININGS]
    return made


def _radii(comparison: Comparison) -> list[float]:
    return sorted(comparison.experiments.scale.comparison.evaluation.radii())


def _note(comparison: Comparison, rows: Sequence[tuple[Way, Entry]], training: str) -> str:
    config = comparison.config(training)
    evaluation = comparison.experiments.scale.comparison.evaluation
    experts = f"{config.experts} × {ARCHITECTURES.get(config.arch, config.arch)}"
    seeds = list(comparison.experiments.seed_range)
    several = len(seeds) > 1
    limited = "" if config.limit_train is None else f"{config.limit_train:,} images, "
    own = [
        f"{way.label} of {job.config.experts}"
        for way, entry in rows
        for job in entry.jobs[:1]
        if job.config.experts not in (1, config.experts)
    ]
    epochs = _count(config.epochs, "epoch")
    text = f"Accuracy in %; {experts} on {config.dataset}, {limited}{epochs} of each member, the same optimiser for all"
    text += (f"; {', '.join(own)}" if own else "") + ". "
    if training == ADVERSARIAL:
        text += f"Trained at ε = {radius_words(config.eps, 'Linf')}. "
    text += (
        f"White box: each image under the worst of {_attacks(evaluation)}, by whoever knows everything of the gate and "
    )
    text += "the weights (its mean, a draw of it, the worst that it may draw). Of a "
    text += "gate that draws, the exact expectation; of RSE, which answers by the mean of ten passes, the mean of ten "
    text += "answers; clean, one draw for each of all test images. Transfer: PGD and CW, whichever leaves less, on a "
    text += "plain ensemble of another seed, trained likewise. Passes: forward and backward, of the plain ensemble's "
    text += "standard training; seconds: of the same, on the same machine. “Immunity, its mean” is the same run as "
    text += "Immunity, answered by the mean of all permutations: a uniform gate on the same weights. "
    spread = "half the range over the seeds" if several else "half the 95 % Wilson interval"
    text += f"Seeds: {', '.join(map(str, seeds))}; ± is {spread}. Published figures stand beside ours where network, "
    text += "data, training and radius are the same, and nowhere else"
    shown = [
        each for each in PUBLISHED if any(published(each.label, entry.jobs[0].config, each.eps) for _, entry in rows)
    ]
    return text + "".join(f"; {each.label}: {each.source}" for each in dict.fromkeys(shown)) + "."


def _attacks(evaluation: EvaluationSettings) -> str:
    names = []
    for attack in evaluation.attacks:
        steps, usual = {"arc": (evaluation.arc_steps, 20), "mora": (evaluation.mora_steps, 100)}.get(attack, (0, 0))
        names.append(NAMES[attack] + (f" ({_count(steps, 'step')}, not {usual})" if steps < usual else ""))
    draws = evaluation.draws or DRAWS
    return ", ".join(names) + (f" (averages of RSE's passes are of {draws}, not {DRAWS})" if draws < DRAWS else "")


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 's'}"
