"""Which runs each table and figure of arXiv 2402.18787 needs, and how much a comparison trains, at three scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from immunity_fast.evaluation.settings import EvaluationSettings
from immunity_fast.experts import title
from immunity_fast.experts.genotypes import reduced
from immunity_fast.reproduction.jobs import Job
from immunity_fast.training.adversarial import Adversarial
from immunity_fast.training.config import PRESETS, TrainConfig

NAMES = {"resnet8": "ResNet8", "resnet18": "ResNet18", "densenet121": "DenseNet121", "googlenet": "GoogLeNet"}
INDEPENDENT = "trained independently"
IMMUNITY = "Immunity"
BASELINES = {"P-DARTS": "pdarts", "RobNet": "robnet_large", "AdvRush": "advrush"}


@dataclass(frozen=True)
class ComparisonScale:
    """How much of ways to train an ensemble is compared: see `peers.Comparison`.

    Args:
        settings: of every run, that are not those of the other tables.
        adversarial: how adversarial training makes its images.
        evaluation: what is found out of every run; who attacks it depends on what it is.
    """

    settings: Mapping[str, Any]
    adversarial: Adversarial
    evaluation: EvaluationSettings


@dataclass(frozen=True)
class Scale:
    """How much is trained, and how much of it attacked.

    Args:
        base: settings of every run; of Immunity's, of Tables 2 and 3 and Figure 2.
        datasets: of Table 2; of the rest the first.
        architectures: of Table 1.
        cells: (cells, channels) of the baselines; None is as published.
        seeds: how many.
        limit, masking: test images that are attacked, and that curves are made of.
        autoattack: settings of an evaluation that make AutoAttack smaller than it is.
        betas, gammas: of Table 3's sweeps.
        images: rows of Figure 2.
        comparison: of ways to train an ensemble.
    """

    base: TrainConfig
    datasets: tuple[str, ...]
    architectures: tuple[str, ...]
    cells: tuple[int, int] | None
    seeds: int
    limit: int
    masking: int
    autoattack: Mapping[str, Any]
    betas: tuple[float, ...]
    gammas: tuple[float, ...]
    images: int
    comparison: ComparisonScale

    @property
    def evaluation(self) -> EvaluationSettings:
        """What is found out of every run."""
        return EvaluationSettings(attacks=("paper",), limit=self.limit, masking_images=self.masking)


COMPARED = EvaluationSettings(
    attacks=("pgd", "cw", "pgd-sum", "arc", "mora"), eps=(2 / 255, 4 / 255, 8 / 255), masking_images=0
)
SCALES = {
    # Minutes on two CPU cores: whether everything works, not what anything is worth.
    "smoke": Scale(
        base=dataclasses.replace(
            PRESETS["quickstart"],
            experts=2,
            epochs=1,
            limit_train=40,
            batch_size=20,
            check_images=4,
        ),
        datasets=("digits",),
        architectures=("resnet8",),
        cells=(5, 4),
        seeds=1,
        limit=4,
        masking=0,
        autoattack={"autoattack_steps": 2, "queries": 5},
        betas=(0.0, 3.0),
        gammas=(0.0, 2e-4),
        images=3,
        comparison=ComparisonScale(
            settings={"check_images": 0},
            adversarial="n-fgsm",
            evaluation=dataclasses.replace(COMPARED, limit=4, draws=2, arc_steps=1, mora_steps=1),
        ),
    ),
    # An experiment for a CPU, or for a small GPU.
    "small": Scale(
        base=dataclasses.replace(PRESETS["quickstart"], epochs=8, limit_train=2500, check_images=200),
        datasets=("cifar10",),
        architectures=("resnet8",),
        cells=(8, 8),
        seeds=2,
        limit=100,
        masking=50,
        autoattack={},
        betas=(0.0, 0.3, 1.0, 3.0, 10.0),
        gammas=(0.0, 2e-5, 2e-4, 2e-3),
        images=8,
        comparison=ComparisonScale(
            settings={"experts": 3, "limit_train": 2000, "epochs": 8, "check_images": 0},
            adversarial="n-fgsm",
            evaluation=dataclasses.replace(COMPARED, limit=100, draws=5, arc_steps=5, mora_steps=10),
        ),
    ),
    # The paper's recipe, as far as it is public.
    "paper": Scale(
        base=dataclasses.replace(PRESETS["paper"], check_images=500),
        datasets=("cifar10", "cifar100"),
        architectures=("resnet18", "densenet121", "googlenet"),
        cells=None,
        seeds=3,
        limit=1000,
        masking=64,
        autoattack={},
        betas=(0.0, 0.3, 1.0, 3.0, 10.0),
        gammas=(0.0, 2e-5, 2e-4, 2e-3),
        images=10,
        comparison=ComparisonScale(
            settings={"arch": "resnet18"},
            adversarial="pgd",
            evaluation=dataclasses.replace(COMPARED, attacks=(*COMPARED.attacks, "autoattack"), limit=1000),
        ),
    ),
}


@dataclass(frozen=True)
class Entry:
    """A row of a table: what its first columns say, and its runs, one a seed."""

    labels: tuple[str, ...]
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Experiments:
    """The runs of a scale, some of its settings changed.

    Args:
        scale: see `Scale`.
        changes: settings of `TrainConfig` that differ in every run, unless they are what a table compares.
        seeds: how many, the first being the settings'; None is the scale's.
        dataset: instead of the scale's; None is the scale's.
    """

    scale: Scale
    changes: dict[str, Any]
    seeds: int | None = None
    dataset: str | None = None

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets of Table 2; all else is on the first of them."""
        return self.scale.datasets if self.dataset is None else (self.dataset,)

    def table1(self) -> list[Entry]:
        """Networks that were trained independently, against the same trained as Immunity."""
        entries = []
        default = self.config().arch
        archs = (default,) if "arch" in self.changes else self.scale.architectures
        for arch in archs:
            evaluation = dataclasses.replace(self.scale.evaluation, attacks=("pgd",), attackers=("mean",))
            experts = self.config().experts
            name = NAMES.get(arch, title(arch))
            alone = self._entry((name, INDEPENDENT), evaluation, members=experts, arch=arch, experts=1)
            entries += [alone, self._entry((name, IMMUNITY), evaluation, arch=arch)]
        return entries

    def table2(self) -> list[Entry]:
        """The baselines, single networks, and Immunity; standard and adversarial training."""
        entries = []
        evaluation = dataclasses.replace(
            self.scale.evaluation, attacks=("paper", "autoattack"), **self.scale.autoattack
        )
        for dataset in self.datasets:
            for training, adversarial in (("standard", "off"), ("PGD", "pgd")):
                chosen: dict[str, Any] = {"dataset": dataset, "adversarial": adversarial}
                for name, arch in self.baselines().items():
                    labels = (dataset, training, name)
                    entries.append(self._entry(labels, evaluation, arch=arch, experts=1, **chosen))
                mixture = dataclasses.replace(evaluation, attackers=("sample", "mean"))
                entries.append(self._entry((dataset, training, IMMUNITY), mixture, **chosen))
        return entries

    def table3(self) -> list[Entry]:
        """The rows of Table 3: each of the two losses alone, both, and both with detached weights."""
        config = self.config()
        return [
            self._ablation("MoE", beta=0.0, gamma=0.0),
            self._ablation("MoE + MI", beta=config.beta, gamma=0.0),
            self._ablation("MoE + PS", beta=0.0, gamma=config.gamma),
            self._ablation("full", beta=config.beta, gamma=config.gamma),
            self._ablation("full, detached weights", beta=config.beta, gamma=config.gamma, detach_weights=True),
        ]

    def sweep(self, coefficient: str) -> list[tuple[float, Entry]]:
        """Values of "beta" or "gamma", the other being the default, and their runs."""
        config = self.config()
        values = {"beta": self.scale.betas, "gamma": self.scale.gammas}[coefficient]
        values = tuple(sorted({*values, getattr(config, coefficient)}))
        fixed = {"beta": config.beta, "gamma": config.gamma}
        return [
            (value, self._ablation(f"{coefficient} = {value:g}", **fixed | {coefficient: value})) for value in values
        ]

    def figure2(self) -> list[Entry]:
        """What looks at the images: networks that were trained independently, and Immunity; of one seed."""
        evaluation = dataclasses.replace(self.scale.evaluation, attacks=("pgd",), attackers=("mean",))
        config = self.config()
        alone = self._entry((INDEPENDENT,), evaluation, members=config.experts, experts=1)
        return [Entry(entry.labels, entry.jobs[:1]) for entry in (alone, self._entry((IMMUNITY,), evaluation))]

    def baselines(self) -> dict[str, str]:
        """The baselines of Table 2: name → architecture, at the scale's size."""
        if self.scale.cells is None:
            return BASELINES
        cells, channels = self.scale.cells
        return {f"{name}, {cells} cells": reduced(arch, cells, channels) for name, arch in BASELINES.items()}

    def _ablation(self, label: str, **settings: Any) -> Entry:
        attackers = ("off", "sample", "eot", "mean", "worst")
        return self._entry((label,), dataclasses.replace(self.scale.evaluation, attackers=attackers), **settings)

    def _entry(
        self, labels: tuple[str, ...], evaluation: EvaluationSettings, members: int = 1, **settings: Any
    ) -> Entry:
        config = self.config()
        jobs = []
        for seed in self.seed_range:
            own = dataclasses.replace(config, **{"seed": seed} | settings)
            if own.experts == 1:  # it has no use for them: the same network whatever they are
                own = dataclasses.replace(own, beta=0.0, gamma=0.0, detach_weights=False)
            jobs.append(Job(own, evaluation, members))
        return Entry(labels, tuple(jobs))

    @property
    def seed_range(self) -> range:
        """The seeds of a row's runs."""
        first = self.config().seed
        return range(first, first + (self.scale.seeds if self.seeds is None else self.seeds))

    def config(self) -> TrainConfig:
        """The settings of every run, but for what a table compares."""
        config = dataclasses.replace(self.scale.base, dataset=self.datasets[0], attack_images=self.scale.limit)
        return dataclasses.replace(config, **self.changes)


def jobs_of(entries: Sequence[Entry]) -> list[Job]:
    """All runs that some rows of a table need, in their order."""
    return [job for entry in entries for job in entry.jobs]
