"""What the command that reproduces the paper trains: each run's settings, and which tables share runs."""

from __future__ import annotations

import pytest

from immunity_fast.reproduction.experiments import SCALES, Experiments, jobs_of
from immunity_fast.train import parse
from immunity_fast.training.config import PRESETS, TrainConfig
from tests import grids


@pytest.mark.parametrize("scale", grids.sampled(SCALES, ordinary=lambda scale: scale == "small"))
def test_every_run_is_one_that_the_train_command_accepts(scale: str) -> None:
    experiments = Experiments(SCALES[scale], {})
    entries = [*experiments.table1(), *experiments.table2(), *experiments.table3(), *experiments.figure2()]
    entries += [entry for name in ("beta", "gamma") for _, entry in experiments.sweep(name)]
    for job in jobs_of(entries):
        _, _, config = parse([*job.config.options(), "--out", "nowhere"])
        assert config == job.config


def test_the_paper_scale_is_the_papers_recipe() -> None:
    experiments = Experiments(SCALES["paper"], {})
    table1 = {entry.labels: entry for entry in experiments.table1()}
    assert {labels[0] for labels in table1} == {"ResNet18", "DenseNet121", "GoogLeNet"}
    job = table1["GoogLeNet", "Immunity"].jobs[0]
    assert job.config == TrainConfig(
        **{**PRESETS["paper"].to_json(), "check_images": job.config.check_images, "attack_images": 1000}
    )
    alone = table1["GoogLeNet", "trained independently"].jobs[1]
    assert alone.members == 5
    assert [member.config.seed for member in alone.alone()] == [5, 6, 7, 8, 9]
    assert alone.config.experts == 1
    table2 = {entry.labels: entry.jobs[0].config for entry in experiments.table2()}
    assert {labels[0] for labels in table2} == {"cifar10", "cifar100"}
    assert table2["cifar100", "PGD", "AdvRush"].arch == "advrush"
    assert table2["cifar100", "PGD", "AdvRush"].adversarial == "pgd"
    assert all("autoattack" in job.evaluation.attacks for entry in experiments.table2() for job in entry.jobs)


def test_tables_share_their_runs() -> None:
    experiments = Experiments(SCALES["small"], {})
    full = next(entry for entry in experiments.table3() if entry.labels == ("full",))
    immunity = next(e for e in experiments.table1() if e.labels[1] == "Immunity")
    standard = next(e for e in experiments.table2() if e.labels[1:] == ("standard", "Immunity"))
    names = {tuple(job.name for job in entry.jobs) for entry in (full, immunity, standard)}
    assert len(names) == 1
    swept = {job.name for name in ("beta", "gamma") for _, e in experiments.sweep(name) for job in e.jobs}
    assert {job.name for job in full.jobs} <= swept


def test_options_change_every_run_but_not_what_is_compared() -> None:
    experiments = Experiments(SCALES["small"], {"epochs": 3, "beta": 0.7, "arch": "resnet18", "seed": 4}, 2, "cifar100")
    for entry in (*experiments.table1(), *experiments.table3()):
        assert [job.config.seed for job in entry.jobs] == [4, 5]
        assert {(job.config.epochs, job.config.dataset) for job in entry.jobs} == {(3, "cifar100")}
        assert {job.config.arch for job in entry.jobs} == {"resnet18"}
    betas = {entry.labels[0]: entry.jobs[0].config.beta for entry in experiments.table3()}
    assert betas == {"MoE": 0, "MoE + MI": 0.7, "MoE + PS": 0, "full": 0.7, "full, detached weights": 0.7}
    assert 0.7 in [value for value, _ in experiments.sweep("beta")]
