"""Evaluations of mixtures whose gate has fixed weights: one expert at random, or the average of all."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from immunity_fast.evaluation.gate_attackers import attacker
from immunity_fast.evaluation.metrics import correct
from immunity_fast.evaluation.plan import attack_rows, left_out
from immunity_fast.evaluation.results import results, tables
from immunity_fast.evaluation.selection_target import SelectionTarget, UniformTarget, mixture_target
from immunity_fast.evaluation.targets import MixtureTarget
from immunity_fast.models.gate import GateKind, gate_of
from immunity_fast.models.moe import ImmunityMoE
from tests.evaluations import CLASSES, PLAN, colored, evaluation_of, run_to_end, trained_mixture

A = [0.6, 0.0, 0.4]
IMAGES, LABELS = colored(9, 2).images / 255, colored(9, 2).labels
TINY = replace(
    PLAN, attacks=("pgd", "pgd-sum", "arc", "mora"), images=4, masking_images=0, mora_steps=2, arc_steps=1, chunk=4
)


def _model(kind: GateKind) -> ImmunityMoE:
    model = copy.deepcopy(trained_mixture(3))
    model.gate = gate_of(kind, 3).eval()
    if kind == "selection":
        model.gate.probabilities.copy_(torch.tensor(A))
    return model


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_target_is_what_the_gate_makes_of_it() -> None:
    kinds = {"switch": MixtureTarget, "selection": SelectionTarget, "uniform": UniformTarget}
    for kind, target in kinds.items():
        assert type(mixture_target(_model(kind), CLASSES)) is target  # type: ignore[arg-type]


def test_a_selection_is_judged_by_its_members() -> None:
    model = _model("selection")
    verdict = SelectionTarget(model, CLASSES).judge(IMAGES, LABELS, _generator())
    p = model.expert_logits(IMAGES).detach().double().softmax(-1)
    right = p.argmax(-1) == LABELS
    mean = torch.einsum("n,nbk->bk", torch.tensor(A).double(), p)
    assert verdict.right["worst"].equal(right[0] & right[2])
    assert verdict.right["mean"].equal(mean.argmax(-1) == LABELS)
    for i in range(3):
        assert verdict.right[f"expert {i + 1}"].equal(right[i])
    assert verdict.shares is not None
    torch.testing.assert_close(verdict.shares, 0.6 * right[0] + 0.4 * right[2].double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        verdict.loss.double(), F.nll_loss(mean.log(), LABELS, reduction="none"), atol=1e-5, rtol=1e-4
    )
    assert verdict.tries is not None
    sure = (verdict.shares == 0) | (verdict.shares == 1)
    assert (verdict.tries[:, sure] == verdict.shares[sure].bool()).all()


def test_the_expected_loss_has_the_expected_gradient() -> None:
    target = SelectionTarget(_model("selection"), CLASSES)
    images = IMAGES.clone().requires_grad_()
    losses = target.loss_of_expected(target.expected_loss()(images, LABELS), LABELS)
    members = [F.cross_entropy(each, LABELS, reduction="none") for each in target.model.expert_logits(images)]
    wanted = sum(a * each for a, each in zip(A, members, strict=True))
    torch.testing.assert_close(losses, wanted)
    found, by_hand = (torch.autograd.grad(each.sum(), images)[0] for each in (losses, wanted))
    torch.testing.assert_close(found, by_hand)


def test_attackers_of_a_selection_follow_who_is_drawn() -> None:
    model = _model("selection")
    alone = model.expert_logits(IMAGES).detach().log_softmax(-1)
    sample = attacker(model, "sample", generator=_generator())(IMAGES, LABELS)
    eot = attacker(model, "eot", draws=4, generator=_generator())(IMAGES, LABELS)
    for outputs in (sample, *eot, attacker(model, "worst")(IMAGES, LABELS)):
        off = (outputs[None] - alone).abs().amax(-1)  # from each expert
        assert (off[[0, 2]].amin(0) < 1e-5).all()
    mean = torch.einsum("n,nbk->bk", torch.tensor(A), alone.exp()).log()
    torch.testing.assert_close(attacker(model, "mean")(IMAGES, LABELS), mean)
    torch.testing.assert_close(attacker(model, "off")(IMAGES, LABELS), mean)


def test_settled_images_are_those_nobody_is_right_about() -> None:
    for kind in ("selection", "uniform"):
        target = mixture_target(_model(kind), CLASSES)  # type: ignore[arg-type]
        wrong = (LABELS + 1) % CLASSES
        for labels in (LABELS, wrong):
            settled = target.settling("mean").asked(IMAGES, labels)
            right = target.judge(IMAGES, labels, _generator()).right
            assert not (settled & torch.stack(list(right.values())).any(0)).any()
        assert settled.any()


def test_correct_counts_what_the_gate_answers() -> None:
    model = _model("uniform")
    counts = correct(model, IMAGES, LABELS)
    assert counts["sample"] == counts["mean"] == int((model(IMAGES).argmax(-1) == LABELS).sum())
    model = _model("selection")
    model.gate.probabilities.copy_(torch.tensor([0.0, 1, 0]))
    alone = int((model.expert_logits(IMAGES)[1].argmax(-1) == LABELS).sum())
    assert correct(model, IMAGES, LABELS) == {"sample": alone, "mean": alone}


def test_nothing_is_asked_twice_of_a_uniform_gate() -> None:
    target = UniformTarget(_model("uniform"), CLASSES)
    assert target.attackers == ("mean", "logits", "expert 1", "expert 2", "expert 3")
    assert target.judges == ("mean", "expert 1", "expert 2", "expert 3")
    rows = {(row.attack, row.attacker) for row in attack_rows(target, TINY) if row.kind == "attack"}
    assert {("pgd-sum", "mean"), ("mora", "mean")} <= rows
    assert not any(attack == "arc" for attack, _ in rows)
    assert [(pair["attack"], "nothing is drawn" in pair["why"]) for pair in left_out(target, TINY)] == [("arc", True)]
    verdict = target.judge(IMAGES, LABELS, _generator())
    assert verdict.shares is None
    assert verdict.tries is None


@pytest.mark.parametrize("kind", ["selection", "uniform"])
def test_an_evaluation_says_nothing_of_permutations(kind: GateKind, tmp_path: Path) -> None:
    evaluation = evaluation_of(tmp_path / "l", TINY, mixture_target(_model(kind), CLASSES, draws=2))
    run_to_end(evaluation)
    found = results(evaluation)
    text = "\n".join(table.to_markdown() for table in tables(found))
    assert "ermutation" not in text
    assert found["gate"] == kind
    assert "heatmaps" in found
    assert bool(found["drawn"]) == (kind == "selection")
    assert all(entry["exact"] for entry in found["drawn"])
    assert ("one random expert" in text) == (kind == "selection")
    again = evaluation_of(tmp_path / "l", TINY, evaluation.target)
    assert run_to_end(again) == []
