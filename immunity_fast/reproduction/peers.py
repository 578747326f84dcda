"""The comparison of ways to train an ensemble: its rows, their runs, and what each run costs.

Every row is trained on the same images for as many epochs, with the same optimiser, by standard and by adversarial
training, and attacked alike; what it costs beside the plain ensemble is a column.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from immunity_fast.evaluation.settings import EvaluationSettings
from immunity_fast.experts import NAMES, wider
from immunity_fast.peers.methods import IMMUNITY, method_of
from immunity_fast.reproduction.experiments import Entry, Experiments
from immunity_fast.reproduction.jobs import Job
from immunity_fast.training.config import TrainConfig

SOURCE_SEED = 1000  # how far the seed of the ensemble that is transferred from is from the first one: no row's own
HEATMAPS = 0.5  # of a pass: what Immunity's losses cost an expert, rounded up (`docs/step.md`: 0.1 to 0.5)
PLAIN = "plain ensemble"
STANDARD, ADVERSARIAL = "standard", "adversarial"
TRAININGS = (STANDARD, ADVERSARIAL)


@dataclass(frozen=True)
class Way:
    """A row: a way to train what answers.

    Args:
        label: what tables call it.
        settings: of `TrainConfig`, that make it what it is.
        judge: whose answers are shown of a run that has several; None: what answers in use.
        trainings: of `TRAININGS`, those that there are of it.
        square: whether the experts have to be a square number: the least one that is no fewer than the others'.
        widened: whether it is one network with as many operations as all the experts.
        begins_from_plain: whether it begins with the weights of the trained plain ensemble.
    """

    label: str
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    judge: str | None = None
    trainings: tuple[str, ...] = TRAININGS
    square: bool = False
    widened: bool = False
    begins_from_plain: bool = False


_wider = functools.cache(wider)  # which takes a while, as it counts operations of many widths
_NO_HEATMAPS = {"beta": 0.0, "gamma": 0.0, "detach_weights": False}


def _way(label: str, ensemble: str, **given: Any) -> Way:
    """A row of an ensemble's loss, with its own gate."""
    names = {option.name for option in dataclasses.fields(Way)}
    settings = {name: value for name, value in given.items() if name not in names}
    own = {name: value for name, value in given.items() if name in names}
    return Way(label, _NO_HEATMAPS | {"ensemble": ensemble, "gate": "auto"} | settings, **own)


WAYS: tuple[Way, ...] = (
    _way("one network", IMMUNITY, experts=1),
    _way("one wider network", IMMUNITY, experts=1, widened=True),
    _way(PLAIN, "plain"),
    _way("plain, own adversaries", "plain", adversary="each", trainings=(ADVERSARIAL,)),
    Way("Immunity", {"ensemble": IMMUNITY, "gate": "switch"}),
    Way("Immunity, its mean", {"ensemble": IMMUNITY, "gate": "switch"}, judge="mean"),
    Way("Immunity, uniform gate", {"ensemble": IMMUNITY, "gate": "uniform"}),
    _way("ADP", "adp"),
    _way("GAL", "gal"),
    _way("TRS", "trs"),
    _way("DVERGE", "dverge", begins_from_plain=True),
    _way("MRBoost", "mrboost"),
    _way("BARRE", "barre"),
    _way("HRS", "hrs:blocks=2", square=True),
    _way("RSE", "rse", experts=1),
)


@dataclass(frozen=True)
class Comparison:
    """The rows of a scale, and the order in which their runs are made.

    Args:
        experiments: the scale, and what of its settings is changed.
    """

    experiments: Experiments

    def rows(self, training: str) -> list[tuple[Way, Entry]]:
        """The rows of a training, of `TRAININGS`, in a table's order; the same run may be in two."""
        common = self.config(training)
        ways = [way for way in WAYS if training in way.trainings and (not way.widened or common.arch in NAMES)]
        return [(way, self._entry(way, training)) for way in ways]

    def config(self, training: str) -> TrainConfig:
        """What all runs of a training have in common."""
        scale = self.experiments.scale.comparison
        given = {name: value for name, value in scale.settings.items() if name not in self.experiments.changes}
        config = dataclasses.replace(self.experiments.config(), **given, adversary="mixture")
        if training == STANDARD:
            return dataclasses.replace(config, adversarial="off")
        return config if config.adversarial != "off" else dataclasses.replace(config, adversarial=scale.adversarial)

    def queue(self) -> list[Entry]:
        """All runs as rows of one each: the first seed's first, of each the cheapest first."""
        rows = [row for training in TRAININGS for row in self.rows(training)]
        runs = [(job.config.seed, cost(job), way.label, job) for way, entry in rows for job in entry.jobs]
        runs.sort(key=lambda run: run[:2])
        return [Entry((label,), (job,)) for _, _, label, job in runs]

    def _entry(self, way: Way, training: str) -> Entry:
        first = self.config(training)
        jobs = []
        for seed in self.experiments.seed_range:
            config = dataclasses.replace(first, seed=seed)
            source = Job(dataclasses.replace(_plain(first), seed=first.seed + SOURCE_SEED))
            base = Job(_plain(config)) if way.begins_from_plain else None
            own = _settings(way, config)
            jobs.append(Job(own, self._evaluation(own), begins_from=base, transfer_from=source))
        return Entry((training, way.label), tuple(jobs))

    def _evaluation(self, config: TrainConfig) -> EvaluationSettings:
        attackers = attackers_of(config)
        return dataclasses.replace(self.experiments.scale.comparison.evaluation, attackers=attackers)


def attackers_of(config: TrainConfig) -> tuple[str, ...]:
    """What is known of a run by those who attack it: everything that can be, of what answers it has."""
    if config.experts == 1:
        return ("output", "eot", "transfer") if config.ensemble.startswith("rse") else ("output", "transfer")
    if config.gate_kind == "uniform":  # nothing is drawn, and what is averaged can be the logits as well
        return ("mean", "logits", "transfer")
    return ("sample", "mean", "worst", "transfer")


def cost(job: Job) -> float:
    """What a run's training costs, in passes of a training image, forward and backward, through one expert.

    With that of what it begins from. One pass is what `TrainConfig.arch` costs: a wider network's are its own.
    """
    return sum(_passes(each.config) * each.config.epochs for each in job.trained)


def _passes(config: TrainConfig) -> float:
    steps = 0 if config.inner_attack is None else config.inner_attack.attack().steps
    method = config.method()
    if method is not None:
        return method.passes(config.experts, steps)
    heatmaps = HEATMAPS if config.experts > 1 and (config.beta or config.gamma) else 0.0
    return config.experts * (1 + steps + heatmaps)


def relative_cost(way: Way, job: Job, plain: Job) -> float:
    """What a row's run costs in passes, of plain standard training's.

    Args:
        way: the row's.
        job: the run.
        plain: the plain ensemble by standard training.
    """
    own = cost(job) * (plain.config.experts if way.widened else 1)  # a wider network has the operations of all experts
    return own / cost(plain)


def _plain(config: TrainConfig) -> TrainConfig:
    return _settings(next(way for way in WAYS if way.label == PLAIN), config)


def _settings(way: Way, config: TrainConfig) -> TrainConfig:
    """A row's settings, of those that all have in common."""
    given: dict[str, Any] = dict(way.settings)
    if way.square:
        given["experts"] = (math.isqrt(config.experts - 1) + 1) ** 2
    if way.widened:
        given["arch"] = _wider(config.arch, config.experts)
    if way.settings.get("experts") == 1:
        given["gate"] = "auto"
    # Each part of a training has as many epochs as the whole of another: so every member sees as many.
    method = method_of(given["ensemble"])
    stages = 1 if method is None else method.stages(given.get("experts", config.experts))
    return dataclasses.replace(config, **given, epochs=config.epochs * stages)
