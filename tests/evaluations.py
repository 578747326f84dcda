"""Evaluations that take a moment: a small mixture, a plan of few attacks, and what of an evaluation can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate
from immunity_fast.data.datasets import Split, fingerprint
from immunity_fast.evaluation import runner
from immunity_fast.evaluation.ledger import Ledger
from immunity_fast.evaluation.runner import Evaluation, Plan, Row
from immunity_fast.evaluation.targets import MixtureTarget, TargetModel
from immunity_fast.experts.staged import GlobalAveragePool
from tests.small_runs import CLASSES, arrays

Numbers = dict[tuple[Row, int, int], dict[str, Any]]
PLAN = Plan(
    attacks=("fgsm", "bim"),
    attackers=("eot", "mean", "expert 2"),
    images=7,
    eps=0.09,
    masking_images=4,
    curve_eps=(0.5, 8),
    curve_steps=(1, 3),
    curve_draws=(1, 2),
    queries=2,
    autoattack_steps=1,
    mora_steps=1,
    arc_steps=1,
    seed=5,
    chunk=3,
)


LOSS = FusedImmunityLoss(0, 0.1, 0.1, size=(12, 12))
SMALL = replace(PLAN, attacks=("fgsm",), attackers=("eot", "mean"))


@pytest.fixture(autouse=True, scope="module")
def small_chunks_and_short_curves() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "EVALUATION_BATCH", 9)
        patch.setattr(runner, "CURVE_STEPS", 5)
        yield


@cache
def colored(count: int = 23, seed: int = 0) -> Split:
    made = arrays(seed=seed, test=count)
    images = torch.from_numpy(made["test_images"]).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.from_numpy(made["test_labels"]))


@cache
def trained_mixture(experts: int = 2, seed: int = 0) -> ImmunityMoE:
    """Small networks that have learnt to tell the colours, and a gate that prefers some of them."""
    torch.manual_seed(seed)
    networks = [
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), GlobalAveragePool(), nn.Linear(6, CLASSES))
        for _ in range(experts)
    ]
    gate = RandomSwitchGate(
        experts, nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), GlobalAveragePool(), nn.Linear(4, experts))
    )
    with torch.no_grad():
        gate.network[-1].weight.mul_(8)  # type: ignore[union-attr, index, operator]
    model = ImmunityMoE.from_experts(networks, gate=gate, stage="0", mean=(0.4,) * 3, std=(0.25,) * 3)
    images, labels = colored(40, 1).images / 255, colored(40, 1).labels
    optimiser = torch.optim.SGD(model.experts.parameters(), lr=0.5, momentum=0.9)
    for _ in range(15):
        loss = sum(F.cross_entropy(logits, labels) for logits in model.expert_logits(images))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
    optimiser.zero_grad()
    return model.eval()


def evaluation_of(
    file: Path,
    plan: Plan = PLAN,
    target: TargetModel | None = None,
    test: Split | None = None,
    loss_fn: FusedImmunityLoss | None = LOSS,
    kind: type[Evaluation] = Evaluation,
) -> Evaluation:
    test = test or colored()
    target = target or MixtureTarget(trained_mixture(), CLASSES, draws=2)
    return kind(target, test, plan, Ledger(file), data=fingerprint(test), loss_fn=loss_fn)


def run_to_end(evaluation: Evaluation) -> list[tuple[Row, int]]:
    """Run it to its end: what was new."""
    new: list[tuple[Row, int]] = []
    evaluation.run(lambda row, images, fresh: new.append((row, images)) if fresh else None)
    return new


def numbers_of(evaluation: Evaluation) -> Numbers:
    """All pieces, but for the time they took."""
    return {
        (row, start, stop): {
            name: value
            for name, value in evaluation.ledger[evaluation.key(row, start, stop)].items()
            if name != "seconds"
        }
        for row, start, stop in evaluation.pieces()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The plan, carried out without an interruption."""
    evaluation = evaluation_of(tmp_path_factory.mktemp("whole") / "ledger")
    assert len(run_to_end(evaluation)) == len(list(evaluation.pieces()))
    return evaluation


def quadratic(images: Tensor) -> Tensor:
    """A smooth network without weights, in the images' dtype."""
    column = torch.linspace(-1, 2, images.shape[-1], dtype=images.dtype)
    return 9 * torch.stack([(images[:, i] * (column + images[:, (i + 1) % 3])).mean((1, 2)) for i in range(3)], 1)


def check_share(entry: dict[str, Any], right: list[int]) -> None:
    z, n, p = 1.959963984540054, len(right), sum(right) / len(right)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (entry["correct"], entry["images"], entry["accuracy"]) == (sum(right), n, p)
    assert entry["interval"] == pytest.approx([max(0, centre - half), min(1, centre + half)], abs=1e-6)


def brightness(images: Tensor) -> Tensor:
    """An honest network: its gradient is the same everywhere."""
    return 30 * images.mean((2, 3))
