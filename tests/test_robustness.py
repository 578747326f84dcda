"""An evaluation in pieces: what a piece depends on, what a kill costs, what is made of the pieces; against loops."""

from __future__ import annotations

import copy
import csv
import io
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE, RandomSwitchGate, attacks, findings, robustness
from immunity_fast.data.datasets import Split, fingerprint
from immunity_fast.data.sampling import sample
from immunity_fast.experts.staged import GlobalAveragePool
from immunity_fast.findings import results, tables, to_csv
from immunity_fast.ledger import Ledger
from immunity_fast.metrics import heatmap_metrics
from immunity_fast.robustness import ATTACKS, Evaluation, Plan, Row, attack_rows, bits, curve_rows, mean_loss
from immunity_fast.subjects import Mixture, Network, Subject
from tests.small_runs import CLASSES, arrays, as_bytes

Numbers = dict[tuple[Row, int, int], dict[str, Any]]

PLAN = Plan(
    attacks=("fgsm", "bim"),
    attackers=("eot", "mean", "expert 2"),
    images=7,
    eps=0.09,
    masking_images=4,
    curve_eps=(0.5, 8),
    curve_steps=(1, 3),
    queries=2,
    autoattack_steps=1,
    seed=5,
    chunk=3,
)
LOSS = FusedImmunityLoss(0, 0.1, 0.1, size=(12, 12))


SMALL = replace(PLAN, attacks=("fgsm",), attackers=("eot", "mean"))


@pytest.fixture(autouse=True, scope="module")
def _small_chunks_and_short_curves() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robustness, "CLEAN_CHUNK", 9)
        patch.setattr(robustness, "CURVE_STEPS", 5)
        yield


@cache
def _split(count: int = 23, seed: int = 0) -> Split:
    made = arrays(seed=seed, test=count)
    images = torch.from_numpy(made["test_images"]).permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.from_numpy(made["test_labels"]))


@cache
def _model(experts: int = 2, seed: int = 0) -> ImmunityMoE:
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
    images, labels = _split(40, 1).images / 255, _split(40, 1).labels
    optimiser = torch.optim.SGD(model.experts.parameters(), lr=0.5, momentum=0.9)
    for _ in range(15):
        loss = sum(F.cross_entropy(logits, labels) for logits in model.expert_logits(images))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
    optimiser.zero_grad()
    return model.eval()


def _evaluation(
    file: Path,
    plan: Plan = PLAN,
    subject: Subject | None = None,
    test: Split | None = None,
    loss_fn: FusedImmunityLoss | None = LOSS,
    kind: type[Evaluation] = Evaluation,
) -> Evaluation:
    test = test or _split()
    subject = subject or Mixture(_model(), CLASSES, draws=2)
    return kind(subject, test, plan, Ledger(file), data=fingerprint(test), loss_fn=loss_fn)


def _run(evaluation: Evaluation) -> list[tuple[Row, int]]:
    """Run it to its end: what was new."""
    new: list[tuple[Row, int]] = []
    evaluation.run(lambda row, images, fresh: new.append((row, images)) if fresh else None)
    return new


def _numbers(evaluation: Evaluation) -> Numbers:
    """All pieces, but for the time they took."""
    return {
        (row, start, stop): {
            name: value
            for name, value in evaluation.ledger[evaluation.key(row, start, stop)].items()
            if name != "seconds"
        }
        for row, start, stop in evaluation.pieces()
    }


def _found(evaluation: Evaluation) -> dict[str, Any]:
    """The results, but for the time they took."""
    found = results(evaluation)
    return found | {"accuracy": [{k: v for k, v in row.items() if k != "seconds"} for row in found["accuracy"]]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The plan, carried out without an interruption."""
    evaluation = _evaluation(tmp_path_factory.mktemp("whole") / "ledger")
    assert len(_run(evaluation)) == len(list(evaluation.pieces()))
    return evaluation


# What there is to do


def test_rows_are_every_attack_by_every_attacker_that_it_is_for() -> None:
    rows = attack_rows(Mixture(_model(3), CLASSES, transfer=_brightness), Plan(attacks=ATTACKS))
    everybody = ["fixed", "single", "eot", "mean", "worst", "expert 1", "expert 2", "expert 3", "transfer"]
    expected = [("sample", "", ""), ("noise", "", "")]
    expected += [("attack", a, b) for a in ("fgsm", "bim", "mim", "pgd", "cw", "dlr") for b in everybody]
    expected += [("attack", "square", b) for b in ("single", "mean")]
    expected += [("attack", "autoattack", b) for b in ("fixed", "single", "mean")]
    assert [(row.kind, row.attack, row.attacker) for row in rows] == expected
    assert all((row.settings is None) == (row.attack in ("", "square", "autoattack")) for row in rows)


def test_a_network_is_attacked_by_its_output_and_by_eot_where_it_is_random() -> None:
    for draws, attackers in ((None, ["output"]), (4, ["output", "eot"])):
        rows = attack_rows(Network(_brightness, CLASSES, draws=draws), Plan(attacks=("fgsm", "square")))
        expected = [*(("fgsm", b) for b in attackers), ("square", "output")]
        assert [(row.attack, row.attacker) for row in rows[2:]] == expected


def test_attackers_that_are_not_wanted_are_left_out_and_curves_too() -> None:
    subject = Mixture(_model(3), CLASSES)
    rows = attack_rows(subject, Plan(attacks=("fgsm", "pgd"), attackers=("expert 3", "mean")))
    expected = [(a, b) for a in ("fgsm", "pgd") for b in ("mean", "expert 3")]
    assert [(row.attack, row.attacker) for row in rows[2:]] == expected
    assert [(row.kind, row.attacker) for row in curve_rows(subject, Plan())] == [("steps", "mean"), ("eps", "mean")]
    assert curve_rows(subject, Plan(masking_images=0)) == []
    assert {row.attacker for row in curve_rows(Network(_brightness, CLASSES), Plan())} == {"output"}


def test_every_image_of_every_row_is_in_one_piece(whole: Evaluation) -> None:
    seen: dict[Row, list[int]] = {}
    for row, start, stop in whole.pieces():
        seen.setdefault(row, []).extend(range(start, stop))
    counts = {"clean": 23, "eps": 4, "steps": 4}
    assert {row: sorted(images) for row, images in seen.items()} == {
        row: list(range(counts.get(row.kind, 7))) for row in seen
    }
    assert list(seen)[: len(whole.rows)] == whole.rows
    assert {row.kind for row in seen} == {"sample", "noise", "attack", "clean", "eps", "steps"}


# What is attacked, and how


def _mean(images: Tensor) -> Tensor:
    """The exact mean of the experts, from each of them alone."""
    return torch.stack([expert(images).softmax(-1) for expert in _model().unstack()]).mean(0).log()


@pytest.mark.parametrize("drop_fooled", [False, True])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ["fgsm", "bim", "mim", "pgd", "cw", "dlr"])
def test_an_attack_has_the_settings_of_its_name(tmp_path: Path, name: str, norm: Any, drop_fooled: bool) -> None:
    """The functions of `attacks`, on a float64 copy of what is attacked, to which no sign is a matter of rounding."""
    eps = 0.11 if norm == "Linf" else 1.3
    images, labels = _split().images[:5].double() / 255, _split().labels[:5]
    outputs = _quadratic
    plan = replace(PLAN, attacks=(name,), attackers=None, norm=norm, eps=eps, drop_fooled=drop_fooled)
    evaluation = _evaluation(tmp_path / "l", plan, Network(outputs, CLASSES))
    actual = evaluation.attacked(evaluation.rows[-1], images, labels, 8)
    step = eps / 4 if norm == "Linf" else eps / 5
    options: dict[str, Any] = {"eps": eps, "alpha": step, "norm": norm}
    options |= {"keep_best": drop_fooled, "drop_fooled": drop_fooled}
    if name == "fgsm":
        expected = attacks.bim(outputs, images, labels, **options | {"alpha": eps, "steps": 1})
    elif name in ("bim", "mim"):
        expected = getattr(attacks, name)(outputs, images, labels, steps=10, **options)
    else:
        options |= {"loss": "ce" if name == "pgd" else name, "generator": torch.Generator().manual_seed(8)}
        expected = attacks.pgd(outputs, images, labels, steps=20, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    move = (actual - images).flatten(1)
    assert float(move.abs().max() if norm == "Linf" else move.norm(dim=1).max()) <= eps
    assert float(move.abs().max()) > 0.05


def _quadratic(images: Tensor) -> Tensor:
    """A smooth network without weights, in the images' dtype."""
    column = torch.linspace(-1, 2, images.shape[-1], dtype=images.dtype)
    return 9 * torch.stack([(images[:, i] * (column + images[:, (i + 1) % 3])).mean((1, 2)) for i in range(3)], 1)


def test_noise_is_random_in_the_ball_and_differs_from_piece_to_piece(tmp_path: Path) -> None:
    evaluation = _evaluation(tmp_path / "l")
    images, labels = torch.full((4, 3, 12, 12), 0.5), torch.zeros(4, dtype=torch.int64)
    first, again, other = (evaluation.attacked(Row("noise"), images, labels, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    moves = (first - 0.5) / 0.09
    assert float(moves.abs().max()) <= 1 + 1e-6
    # Uniform on [−1, 1]: 1,728 values of variance 1/3.
    assert float(moves.mean()) == pytest.approx(0, abs=0.05)
    assert float(moves.var()) == pytest.approx(1 / 3, abs=0.03)


def test_images_are_the_test_split_s_in_its_fixed_random_order(tmp_path: Path) -> None:
    shown: list[tuple[Tensor, Tensor]] = []

    class Looking(Network):
        def judge(self, images: Tensor, labels: Tensor, generator: Any) -> Any:
            shown.append((images, labels))
            return super().judge(images, labels, generator)

    plan = replace(PLAN, attacks=(), masking_images=0)
    evaluation = _evaluation(tmp_path / "l", plan, Looking(_brightness, CLASSES))
    _run(evaluation)
    of = {"sample": [0, 2, 4], "clean": [6, 7, 8]}  # a chunk of the sample, its noise, the next one; then all images
    chosen = sample(_split(), 7)
    for kind, split in (("sample", chosen), ("clean", _split())):
        images, labels = (torch.cat([shown[i][part] for i in of[kind]]) for part in (0, 1))
        torch.testing.assert_close(images, split.images / 255, rtol=0, atol=1e-7)
        assert torch.equal(labels, split.labels)
    assert not torch.equal(chosen.labels, _split().labels[:7])


def test_what_was_written_down_is_what_the_experts_say_of_the_attacked_images(whole: Evaluation) -> None:
    chosen = sample(_split(), 7)
    images, labels = chosen.images / 255, chosen.labels
    attacked = {
        "sample": images,
        "fgsm": attacks.fgsm(_mean, images, labels, eps=0.09),
        "bim": attacks.bim(_mean, images, labels, eps=0.09, alpha=0.0225, steps=10),
    }
    model = _model()
    for row in whole.rows:
        if row.kind != "sample" and row.attacker != "mean":
            continue
        x = attacked[row.attack or row.kind]
        experts = torch.stack([expert(x).softmax(-1) for expert in model.unstack()])
        gate = model.gate.network((x - 0.4) / 0.25).softmax(-1)
        fixed = (gate.T[..., None] * experts).sum(0)
        turned = (gate.flip(-1).T[..., None] * experts).sum(0)
        right = {"mean": experts.mean(0), "fixed": fixed, "expert 1": experts[0], "expert 2": experts[1]}
        right = {name: (p.argmax(-1) == labels).tolist() for name, p in right.items()}
        right["worst"] = ((fixed.argmax(-1) == labels) & (turned.argmax(-1) == labels)).tolist()
        pieces = whole.results(row)
        for judge, expected in right.items():
            assert bits(pieces, judge) == expected, (row, judge)
        own = experts.mean(0)[range(7), labels].detach()
        assert mean_loss(pieces) == pytest.approx(float(-own.log().mean()), rel=1e-3)
    assert 0 < sum(bits(pieces, "mean")) < 7


def test_heatmaps_are_measured_on_the_clean_images_and_on_those_of_pgd_on_the_mean(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=("fgsm", "pgd"), attackers=("mean", "expert 1"), masking_images=0)
    evaluation = _evaluation(tmp_path / "l", plan)
    _run(evaluation)
    having = [
        (row.kind, row.attack, row.attacker)
        for (row, _, _), piece in _numbers(evaluation).items()
        if "heatmaps" in piece
    ]
    assert having == [("sample", "", ""), ("attack", "pgd", "mean")] * 3
    clean = heatmap_metrics(_model(), LOSS, sample(_split(), 7), 7)
    assert results(evaluation)["heatmaps"]["clean"] == pytest.approx(clean, rel=1e-4)
    assert results(evaluation)["heatmaps"]["attacked"] != pytest.approx(clean, rel=1e-2)


def test_without_a_loss_there_are_no_heatmaps(tmp_path: Path) -> None:
    evaluation = _evaluation(tmp_path / "l", replace(PLAN, attacks=(), masking_images=0), loss_fn=None)
    _run(evaluation)
    assert "heatmaps" not in results(evaluation)


# Curves


def test_the_curve_of_steps_is_one_descent_looked_at_on_its_way(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=(), masking_images=3, curve_steps=(0, 1, 2, 6), curve_eps=(1,))
    evaluation = _evaluation(tmp_path / "l", plan, Network(_quadratic, CLASSES))
    _run(evaluation)
    points = results(evaluation)["curves"]["steps"]
    assert [point["steps"] for point in points] == [0, 1, 2, 6]
    assert len({point["loss"] for point in points}) == 4
    chosen, noise = sample(_split(), 3), []

    def remembered(attack: Any, *arguments: Any, start: Tensor | None = None, **others: Any) -> Tensor:
        if start is not None:
            noise.append(start)
        return original(attack, *arguments, start=start, **others)

    original = attacks.BoundAttack.__call__
    again = _evaluation(tmp_path / "again", plan, Network(_quadratic, CLASSES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks.BoundAttack, "__call__", remembered)
        _run(again)
    x, images = noise[0], chosen.images / 255
    for point, steps in zip(points, (0, 1, 1, 4), strict=True):
        for _ in range(steps):
            leaf = x.clone().requires_grad_()
            loss = F.cross_entropy(_quadratic(leaf), chosen.labels, reduction="sum")
            x = x + 0.09 / 4 * torch.autograd.grad(loss, leaf)[0].sign()
            x = torch.minimum(torch.maximum(x, images - 0.09), images + 0.09).clamp(0, 1)
        expected = F.cross_entropy(_quadratic(x), chosen.labels)
        assert point["loss"] == pytest.approx(float(expected), rel=1e-4)
        assert point["correct"] == int((_quadratic(x).argmax(-1) == chosen.labels).sum())


def test_the_curve_of_eps_is_of_attacks_that_reach_the_end_of_the_ball(tmp_path: Path) -> None:
    """Of a linear network the worst image of a ball is known: the label's colour darker, the others brighter."""
    factors = (0.5, 0.95, 1.05, 100)
    plan = replace(PLAN, attacks=(), eps=0.1, curve_eps=factors, curve_steps=(1,), masking_images=30, images=30)
    evaluation = _evaluation(tmp_path / "l", plan, Network(_brightness, CLASSES), _split(30))
    _run(evaluation)
    points = results(evaluation)["curves"]["eps"]
    assert [point["eps"] for point in points] == pytest.approx([0.05, 0.095, 0.105, 1])
    images, labels = _split(30).images.double() / 255, _split(30).labels
    for point in points:
        darkest = (images - point["eps"]).clamp(0, 1).mean((2, 3))
        brightest = (images + point["eps"]).clamp(0, 1).mean((2, 3))
        right = [
            all(darkest[q, label] > brightest[q, m] for m in range(3) if m != label)
            for q, label in enumerate(labels.tolist())
        ]
        _check_share({name: point[name] for name in point if name != "loss"}, [int(r) for r in right])
    assert len({point["correct"] for point in points}) == 4


def test_a_radius_in_l2_may_exceed_1(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=(), norm="L2", eps=2, curve_eps=(0.5, 1, 10), curve_steps=(1,), masking_images=9)
    evaluation = _evaluation(tmp_path / "l", plan, Network(_brightness, CLASSES))
    _run(evaluation)
    points = results(evaluation)["curves"]["eps"]
    assert [(point["eps"], point["images"]) for point in points] == [(1, 7), (2, 7), (20, 7)], "no more than there are"
    assert points[-1]["accuracy"] == 0


# A killed evaluation


class Killed(Exception):
    pass


def test_an_evaluation_killed_after_every_piece_ends_bit_for_bit_as_one_that_was_not(
    whole: Evaluation, tmp_path: Path
) -> None:
    def kill(_row: Row, _images: int, new: bool) -> None:
        if new:
            raise Killed

    for attempt in itertools.count():
        evaluation = _evaluation(tmp_path / "l")
        assert len(evaluation.ledger.pieces) == attempt
        try:
            evaluation.run(kill)
        except Killed:
            continue
        break
    assert attempt == len(list(whole.pieces()))
    assert _numbers(evaluation) == _numbers(whole)
    assert _found(evaluation) == _found(whole)


@pytest.mark.parametrize("call", [2, 15])
def test_an_evaluation_killed_within_a_piece_loses_that_piece(whole: Evaluation, tmp_path: Path, call: int) -> None:
    class Dying(Mixture):
        left = call

        def judge(self, images: Tensor, labels: Tensor, generator: Any) -> Any:
            self.left -= 1
            if not self.left:
                raise Killed
            return super().judge(images, labels, generator)

    with pytest.raises(Killed):
        _run(_evaluation(tmp_path / "l", SMALL, Dying(_model(), CLASSES, draws=2)))
    evaluation = _evaluation(tmp_path / "l", SMALL)
    before = len(evaluation.ledger.pieces)
    assert 0 < before < call
    assert len(_run(evaluation)) == len(list(evaluation.pieces())) - before
    assert _numbers(evaluation).items() <= _numbers(whole).items()


def test_a_piece_does_not_depend_on_what_was_computed_before_it(whole: Evaluation, tmp_path: Path) -> None:
    class Backwards(Evaluation):
        def pieces(self) -> Iterator[tuple[Row, int, int]]:
            return reversed(list(super().pieces()))

    torch.manual_seed(99)
    evaluation = _evaluation(tmp_path / "l", kind=Backwards)
    _run(evaluation)
    assert _numbers(evaluation) == _numbers(whole)


def test_what_is_finished_is_not_attacked_again(whole: Evaluation) -> None:
    class Untouchable(Mixture):
        def attacker(self, name: str, generator: Any) -> Any:
            raise AssertionError(name)

        def judge(self, images: Tensor, labels: Tensor, generator: Any) -> Any:
            raise AssertionError(images)

    evaluation = _evaluation(whole.ledger.path, subject=Untouchable(_model(), CLASSES, draws=2))
    told: list[tuple[Row, int, bool]] = []
    evaluation.run(lambda *arguments: told.append(arguments))
    assert told == [(row, stop - start, False) for row, start, stop in evaluation.pieces()]
    assert results(evaluation) == results(whole), "the times, too"


# More of the same


def test_more_attacks_and_attackers_take_over_what_is_finished(whole: Evaluation, tmp_path: Path) -> None:
    few = _evaluation(tmp_path / "l", replace(PLAN, attacks=("bim",), attackers=("eot", "mean"), masking_images=0))
    done = {row for row, _ in _run(few)}
    assert {(row.attack, row.attacker) for row in done if row.attack} == {("bim", "eot"), ("bim", "mean")}
    more = _evaluation(tmp_path / "l")
    new = _run(more)
    assert len(new) == len(list(more.pieces())) - len(list(few.pieces()))
    assert {row for row, _ in new} == {row for row, _, _ in more.pieces()} - done
    assert _numbers(more) == _numbers(whole)
    assert _found(more) == _found(whole)


@pytest.mark.parametrize(("before", "kept"), [(5, {(0, 3)}), (6, {(0, 3), (3, 6)})])
def test_more_images_take_over_the_whole_chunks(
    whole: Evaluation, tmp_path: Path, before: int, kept: set[tuple[int, int]]
) -> None:
    few = _evaluation(tmp_path / "l", replace(SMALL, images=before, masking_images=0))
    _run(few)
    more = _evaluation(tmp_path / "l", SMALL)
    new: list[tuple[Row, int, int]] = []
    pieces = list(more.pieces())
    taken = {piece for piece in pieces if more.key(*piece) in more.ledger}
    assert taken == {
        piece for piece in pieces if piece[0].kind == "clean" or (piece[1:] in kept and piece[0] in few.rows)
    }
    told = iter(pieces)
    more.run(lambda row, images, fresh: new.append(next(told)) if fresh else next(told) and None)
    assert set(new) == set(pieces) - taken
    assert _numbers(more).items() <= _numbers(whole).items()


def test_fewer_images_and_attacks_are_there_already(whole: Evaluation) -> None:
    plan = replace(PLAN, images=6, attacks=("bim",), attackers=("mean",), masking_images=3)
    evaluation = _evaluation(whole.ledger.path, plan)
    assert _run(evaluation) == []
    found = _found(evaluation)
    assert {entry["images"] for entry in found["accuracy"] if entry["attack"] != "clean"} == {6}


# What is something else


def _with_another_gate() -> ImmunityMoE:
    other = copy.deepcopy(_model())
    with torch.no_grad():
        next(iter(other.gate.parameters()))[0, 0, 0, 0] += 1e-6
    return other


OTHERS: dict[str, Callable[[Path], Evaluation]] = {
    "seed": lambda file: _evaluation(file, replace(PLAN, seed=6)),
    "model": lambda file: _evaluation(file, subject=Mixture(_model(2, 1), CLASSES, draws=2)),
    "a weight of the gate": lambda file: _evaluation(file, subject=Mixture(_with_another_gate(), CLASSES, draws=2)),
    "draws": lambda file: _evaluation(file, subject=Mixture(_model(), CLASSES, draws=3)),
    "labels": lambda file: _evaluation(file, test=Split(_split().images, (_split().labels + 1) % 3)),
    "images": lambda file: _evaluation(file, test=Split(_split().images ^ 1, _split().labels)),
    "fewer images": lambda file: _evaluation(file, test=Split(_split().images[:22], _split().labels[:22])),
    "how heatmaps are looked at": lambda file: _evaluation(file, loss_fn=FusedImmunityLoss(0, 0.1, 0.1, size=(9, 9))),
    "no heatmaps": lambda file: _evaluation(file, loss_fn=None),
    "a network": lambda file: _evaluation(file, replace(PLAN, attackers=None), Network(_model(), CLASSES)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_piece_is_taken_over_from_another(whole: Evaluation, name: str) -> None:
    other = OTHERS[name](whole.ledger.path)
    assert not {other.key(*piece) for piece in other.pieces()} & {whole.key(*piece) for piece in whole.pieces()}


CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    # what changes → of which kinds or attacks the pieces are other ones
    "eps": ({"eps": 0.08}, {"noise", "fgsm", "pgd", "square", "autoattack", "eps", "steps"}),
    "norm": ({"norm": "L2"}, {"noise", "fgsm", "pgd", "square", "autoattack", "eps", "steps"}),
    "drop_fooled": ({"drop_fooled": True}, {"fgsm", "pgd"}),
    "queries": ({"queries": 3}, {"square", "autoattack"}),
    "curve_eps": ({"curve_eps": (0.5, 7)}, {"eps", "steps"}),
    "curve_steps": ({"curve_steps": (1, 2)}, {"eps", "steps"}),
    "images": ({"images": 12}, set()),
    "attacks": ({"attacks": ("pgd", "square", "autoattack", "fgsm", "cw")}, set()),
    "attackers": ({"attackers": ("mean", "worst")}, set()),
    "masking_images": ({"masking_images": 6}, set()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_changes_with_what_its_piece_depends_on_and_with_nothing_else(tmp_path: Path, name: str) -> None:
    plan = replace(PLAN, attacks=("fgsm", "pgd", "square", "autoattack"), attackers=("mean",))
    changes, expected = CHANGES[name]
    keys = []
    for each in (plan, replace(plan, **changes)):
        evaluation = _evaluation(tmp_path / "l", each)
        first = [(row, start, stop) for row, start, stop in evaluation.pieces() if start == 0]
        known = [piece for piece in first if piece[0].attacker in ("", "mean")]
        keys.append({piece[0].attack or piece[0].kind: evaluation.key(*piece) for piece in known})
    assert {name for name in keys[0].keys() & keys[1].keys() if keys[0][name] != keys[1][name]} == expected
    steps = _evaluation(tmp_path / "l", replace(plan, autoattack_steps=2))
    assert steps.key(steps.rows[-1], 0, 3) != keys[0]["autoattack"]


def test_no_two_pieces_share_a_key(whole: Evaluation, tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=ATTACKS, attackers=None)
    subject = Mixture(_model(3), CLASSES, transfer=_brightness)
    for evaluation in (whole, _evaluation(tmp_path / "l", plan, subject)):
        pieces = list(evaluation.pieces())
        assert len({evaluation.key(*piece) for piece in pieces}) == len(pieces)


def test_another_radius_is_attacked_anew_and_leaves_the_first_one_s_pieces(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=("fgsm",), attackers=("mean",), masking_images=0)
    first = _evaluation(tmp_path / "l", plan)
    _run(first)
    numbers, found = _numbers(first), _found(first)
    second = _evaluation(tmp_path / "l", replace(plan, eps=0.2))
    assert {row.kind for row, _ in _run(second)} == {"noise", "attack"}
    fresh = _evaluation(tmp_path / "fresh", replace(plan, eps=0.2))
    _run(fresh)
    assert _found(second) == _found(fresh) != found
    back = _evaluation(tmp_path / "l", plan)
    assert _run(back) == []
    assert _numbers(back) == numbers


# Chance


def _blurred(images: Tensor) -> Tensor:
    """A network that draws from PyTorch's global generator."""
    return _brightness(images) + 3 * torch.randn(len(images), 1)


def test_a_random_network_gives_the_same_numbers_again_and_leaves_the_global_generator(tmp_path: Path) -> None:
    found, plan = [], replace(PLAN, attackers=None)
    for number in range(2):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        evaluation = _evaluation(tmp_path / str(number), plan, Network(_blurred, CLASSES, draws=2))
        _run(evaluation)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(_numbers(evaluation))
    assert found[0] == found[1]
    assert any(row.attacker == "eot" for row, _, _ in found[0])


def test_pieces_of_different_rows_and_chunks_have_chances_of_their_own(tmp_path: Path) -> None:
    drawn: list[float] = []

    class Listening(Network):
        def judge(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Any:
            drawn.append(float(torch.rand(1, generator=generator, dtype=torch.float64)))
            return super().judge(images, labels, generator)

    plan = replace(PLAN, attackers=None, masking_images=0)
    _run(_evaluation(tmp_path / "l", plan, Listening(_brightness, CLASSES)))
    _run(_evaluation(tmp_path / "l", replace(plan, seed=6), Listening(_brightness, CLASSES)))
    assert len(set(drawn)) == len(drawn) == 30


def _states(model: ImmunityMoE) -> dict[str, Any]:
    """All that an evaluation is to leave alone, but for the states of generators."""
    return {
        "modes": [module.training for module in model.modules()],
        "switch": model.gate.switch,
        "generator": model.gate.generator,
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "tensors": {name: as_bytes(value) for name, value in model.state_dict().items()},
    }


@pytest.mark.parametrize("switch", ["off", "call"])
def test_the_mixture_is_left_as_it_was(whole: Evaluation, tmp_path: Path, switch: Any) -> None:
    model = copy.deepcopy(_model())
    model.gate.generator, model.gate.switch = torch.Generator().manual_seed(3), switch
    before = _states(model)
    plan = replace(SMALL, images=3, attackers=None)
    evaluation = _evaluation(tmp_path / "l", plan, Mixture(model, CLASSES, draws=2))
    _run(evaluation)
    assert _states(model) == before
    # Its switch and generator are no part of what it is.
    numbers = _numbers(whole)
    again = {place: piece for place, piece in _numbers(evaluation).items() if place in numbers}
    assert len(again) == 10
    assert again.items() <= numbers.items()


@pytest.mark.parametrize("heatmaps", [False, True])
@pytest.mark.parametrize("switch", ["off", "call", "sample"])
@pytest.mark.parametrize("own", [False, True])
def test_generators_are_left_as_they_were(tmp_path: Path, heatmaps: bool, switch: Any, own: bool) -> None:
    model = copy.deepcopy(_model())
    model.gate.switch = switch
    generator = torch.Generator().manual_seed(3)
    model.gate.generator = generator if own else None
    before = [generator.get_state(), torch.get_rng_state()]
    plan = replace(SMALL, images=2, attackers=("single", "eot", "fixed", "worst"), masking_images=0)
    _run(_evaluation(tmp_path / "l", plan, Mixture(model, CLASSES, draws=2), loss_fn=LOSS if heatmaps else None))
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


# What cannot be attacked


def _at(index: int) -> Callable[[Tensor], Tensor]:
    """(B, 1) bool: which images are the test split's of that index, or within 0.2 of it."""
    wanted = _split().images[index] / 255
    return lambda images: ((images - wanted).abs().amax((1, 2, 3)) < 0.2)[:, None]


def _nan_for(index: int) -> Callable[[Tensor], Tensor]:
    return lambda images: _brightness(images).where(~_at(index)(images), torch.nan)


def _infinite_slope_for(index: int) -> Callable[[Tensor], Tensor]:
    """A finite output whose gradient is not: √0 in the branch that is not taken."""
    return lambda images: _brightness(images) + (images[:, :1, 0, 0] * 0).where(_at(index)(images), 1).sqrt()


def _nan_when_moved(index: int) -> Callable[[Tensor], Tensor]:
    wanted = _split().images[index] / 255

    def network(images: Tensor) -> Tensor:
        moved = (images - wanted).abs().amax((1, 2, 3)) > 1e-6
        return _brightness(images).where(~(moved[:, None] & _at(index)(images)), torch.nan)

    return network


@pytest.mark.parametrize("network", [_nan_for, _infinite_slope_for, _nan_when_moved])
@pytest.mark.parametrize("place", [0, 4, 6])
def test_nan_is_reported_with_the_number_of_the_image_in_the_test_split(
    tmp_path: Path, network: Callable[[int], Any], place: int
) -> None:
    index = int(_evaluation(tmp_path / "l").order[place])
    evaluation = _evaluation(tmp_path / "l", replace(PLAN, attackers=None), Network(network(index), CLASSES))
    with pytest.raises(ValueError, match=rf"for test image {index} is NaN or infinite"):
        _run(evaluation)


def test_nan_of_an_image_that_is_not_attacked_is_reported_too(tmp_path: Path) -> None:
    order = _evaluation(tmp_path / "l").order.tolist()
    index = next(i for i in range(10, 23) if i not in order)
    evaluation = _evaluation(tmp_path / "l", replace(PLAN, attackers=None), Network(_nan_for(index), CLASSES))
    with pytest.raises(ValueError, match=rf"for test image {index} is NaN or infinite"):
        _run(evaluation)


def test_nan_of_a_mixture_is_reported(tmp_path: Path) -> None:
    order = _evaluation(tmp_path / "l").order.tolist()

    def logits(images: Tensor) -> Tensor:
        found = _model().expert_logits(images).clone()
        found[1, _at(order[5])(images)[:, 0]] = torch.nan
        return found

    evaluation = _evaluation(tmp_path / "l", subject=Mixture(_model(), CLASSES, draws=3, expert_logits=logits))
    with pytest.raises(ValueError, match=rf"for test image {order[5]} is NaN or infinite"):
        _run(evaluation)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: 0 * x.mean((2, 3)), "does not depend on the images"),
        (lambda x: _brightness(x) * 0 + torch.tensor([1.0, 0, 0]), "does not depend on the images"),
        (lambda x: _brightness(x).detach(), "no gradient"),
        (lambda x: torch.eye(3)[x.flatten(1).sum(1).long() % 3], "no gradient"),
        (lambda x: _brightness(x)[:, :2], r"outputs \(B, 3\), as many as there are classes, got \(3, 2\)"),
        (lambda x: _brightness(x).repeat(1, 2), r"outputs \(B, 3\), as many as there are classes, got \(3, 6\)"),
        (lambda x: (_brightness(x),), r"outputs \(B, 3\), as many as there are classes, got tuple"),
        (lambda x: x, r"outputs \(B, 3\)"),
        (lambda x: _brightness(x)[:1], "batch_size"),
    ],
)
def test_what_is_no_network_that_can_be_attacked_is_refused(
    tmp_path: Path, network: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _run(_evaluation(tmp_path / "l", replace(PLAN, attackers=None), Network(network, CLASSES)))


# What is made of the pieces


def _made_up(path: Path, seed: int = 0, *, images: int = 11, plan: Plan | None = None) -> Evaluation:
    """An evaluation of random bits, without an attack."""
    plan = plan or Plan(attacks=ATTACKS, images=images, chunk=4, masking_images=6, curve_eps=(0.5, 4), eps=0.05)
    subject = Mixture(_model(3), CLASSES, transfer=_brightness)
    evaluation = _evaluation(path, plan, subject, loss_fn=None)
    generator = torch.Generator().manual_seed(seed)

    def judged(row: Row, start: int, stop: int) -> dict[str, Any]:
        # Likelier right than wrong, so that something is left of the worst case.
        drawn = torch.rand(len(subject.judges), stop - start, generator=generator) < 0.97
        right = {
            judge: "".join("01"[int(bit)] for bit in row) for judge, row in zip(subject.judges, drawn, strict=True)
        }
        return {"right": right, "loss": float(torch.rand(1, generator=generator)) * (stop - start)}

    for row, start, stop in evaluation.pieces():
        if row.kind in ("eps", "steps"):
            values = plan.curve_eps if row.kind == "eps" else plan.curve_steps
            piece: dict[str, Any] = {"points": [{row.kind: v} | judged(row, start, stop) for v in values]}
        else:
            piece = judged(row, start, stop) | {"seconds": 0.25}
        evaluation.ledger.pieces[evaluation.key(row, start, stop)] = piece
    return evaluation


def _bits(evaluation: Evaluation, row: Row, judge: str) -> list[int]:
    """The bits of a row, piece by piece from the ledger."""
    found = []
    for other, start, stop in evaluation.pieces():
        if other == row:
            found += [int(bit) for bit in evaluation.ledger[evaluation.key(row, start, stop)]["right"][judge]]
    return found


def _check_share(entry: dict[str, Any], right: list[int]) -> None:
    z, n, p = 1.959963984540054, len(right), sum(right) / len(right)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (entry["correct"], entry["images"], entry["accuracy"]) == (sum(right), n, p)
    assert entry["interval"] == pytest.approx([max(0, centre - half), min(1, centre + half)], abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_results_are_sums_over_the_bits(tmp_path: Path, seed: int) -> None:
    evaluation = _made_up(tmp_path / "l", seed)
    found, judges = results(evaluation), evaluation.subject.judges
    entries = {(e["attack"], e["attacker"], e["judge"]): e for e in found["accuracy"]}
    rows = [Row("clean"), *evaluation.rows]
    assert list(entries) == [(r.attack or r.kind, r.attacker or None, judge) for r in rows for judge in judges]
    assert len(found["accuracy"]) == len(entries)
    for row, judge in itertools.product(rows, judges):
        entry = entries[row.attack or row.kind, row.attacker or None, judge]
        _check_share(entry, _bits(evaluation, row, judge))
        assert entry["images"] == (23 if row.kind == "clean" else 11)
        assert entry["seconds"] == 0.25 * 3
    assert [entry["judge"] for entry in found["worst_case"]] == list(judges)
    for entry in found["worst_case"]:
        columns = [_bits(evaluation, row, entry["judge"]) for row in evaluation.rows]
        _check_share(entry, [int(all(column[i] for column in columns)) for i in range(11)])
        assert findings.worst_case(evaluation, entry["judge"]).items() <= entry.items()
    assert 0 < sum(entry["correct"] for entry in found["worst_case"]) < 11 * len(judges)


def test_an_image_withstands_transfer_if_it_does_from_every_expert(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    found = results(evaluation)["transfer_from_experts"]
    names = ("fgsm", "bim", "mim", "pgd", "cw", "dlr")
    expected = [(attack, judge) for attack in names for judge in evaluation.subject.judges]
    assert [(entry["attack"], entry["judge"]) for entry in found] == expected
    for entry in found:
        assert entry["attacker"] == "any expert"
        rows = [row for row in evaluation.rows if row.attack == entry["attack"] and row.attacker[:6] == "expert"]
        assert len(rows) == 3
        columns = [_bits(evaluation, row, entry["judge"]) for row in rows]
        _check_share(entry, [int(all(column[i] for column in columns)) for i in range(11)])


def test_curves_are_of_what_the_exact_attacker_attacks(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    found = results(evaluation)["curves"]
    for row in evaluation.curves:
        values = {"eps": (0.5, 4), "steps": evaluation.plan.curve_steps}[row.kind]
        assert [point[row.kind] for point in found[row.kind]] == list(values)
        pieces = [evaluation.ledger[evaluation.key(row, *chunk)]["points"] for chunk in ((0, 4), (4, 6))]
        for i, point in enumerate(found[row.kind]):
            _check_share(point, [int(bit) for piece in pieces for bit in piece[i]["right"]["mean"]])
            assert point["loss"] == pytest.approx(sum(piece[i]["loss"] for piece in pieces) / 6)


def test_the_worst_case_so_far_is_that_of_the_chunks_that_are_finished(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    whole = {row: _bits(evaluation, row, "worst") for row in evaluation.rows}
    last = evaluation.rows[-1]
    for start, stop in ((8, 11), (4, 8)):
        del evaluation.ledger.pieces[evaluation.key(last, start, stop)]
        right = [int(all(column[i] for column in whole.values())) for i in range(start)]
        _check_share(findings.worst_case(evaluation, "worst"), right)
    del evaluation.ledger.pieces[evaluation.key(last, 0, 4)]
    assert findings.worst_case(evaluation, "worst")["images"] == 0


def test_results_are_json(whole: Evaluation, tmp_path: Path) -> None:
    for evaluation in (whole, _made_up(tmp_path / "l")):
        found = results(evaluation)
        back = json.loads(json.dumps(found, allow_nan=False))
        assert back["accuracy"] == found["accuracy"]
        assert Plan(**{k: tuple(v) if isinstance(v, list) else v for k, v in back["plan"].items()}) == evaluation.plan


def test_no_images_have_no_mean_loss() -> None:
    assert math.isnan(mean_loss([]))
    assert bits([], "mean") == []


# Tables


def test_the_csv_has_every_number(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    found = results(evaluation)
    lines = list(csv.DictReader(io.StringIO(to_csv(found))))
    assert list(lines[0]) == ["attack", "attacker", "judge", "correct", "images", "accuracy", "low", "high"]
    expected = [*found["accuracy"], *found["transfer_from_experts"]]
    expected += [{"attack": "worst case", "attacker": "all", **entry} for entry in found["worst_case"]]
    assert len(lines) == len(expected)
    for line, entry in zip(lines, expected, strict=True):
        assert (line["attack"], line["attacker"], line["judge"]) == (
            entry["attack"],
            entry["attacker"] or "",
            entry["judge"],
        )
        assert (int(line["correct"]), int(line["images"])) == (entry["correct"], entry["images"])
        assert [float(line[name]) for name in ("accuracy", "low", "high")] == [entry["accuracy"], *entry["interval"]]


def _cell(right: list[int]) -> str:
    """An accuracy with half its interval, in percent."""
    z, n, p = 1.959964, len(right), sum(right) / len(right)
    low, high = ((p + z**2 / (2 * n) + s * z * math.sqrt(p * (1 - p) / n + (z / n) ** 2 / 4)) for s in (-1, 1))
    low, high = max(0, low / (1 + z**2 / n)), min(1, high / (1 + z**2 / n))
    return f"{100 * p:.1f} ± {100 * (high - low) / 2:.1f}"


def test_the_table_has_a_row_for_each_attack_and_the_worst_case_and_a_column_for_each_judge(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    table = tables(results(evaluation))[0]
    judges = {
        "gate switching": "switching",
        "exact mean": "mean",
        "trained gate": "fixed",
        "worst permutation": "worst",
    }
    assert list(table.columns) == ["attack", "what the attacker differentiates", "images", *judges]
    clean, *rows = [Row("clean"), *evaluation.rows]
    shown = [clean, *(row for row in rows if not row.attacker.startswith("expert "))]
    assert len(table.rows) == len(shown) + 6 + 1
    own = [row for row in table.rows if row[1] != "an expert alone, transferred; the worst of them"][:-1]
    for row, line in zip(shown, own, strict=True):
        assert line[0] == findings.NAMES[row.attack or row.kind]
        assert (line[1] == "—") == (not row.attacker)
        assert line[2] == ("23" if row.kind == "clean" else "11")
        assert list(line[3:]) == [_cell(_bits(evaluation, row, judge)) for judge in judges.values()]
    transferred = [row for row in table.rows if row not in own][:-1]
    for attack, line in zip(("fgsm", "bim", "mim", "pgd", "cw", "dlr"), transferred, strict=True):
        columns = [row for row in evaluation.rows if row.attack == attack and row.attacker.startswith("expert ")]
        assert line[0] == findings.NAMES[attack]
        for cell, judge in zip(line[3:], judges.values(), strict=True):
            right = [_bits(evaluation, row, judge) for row in columns]
            assert cell == _cell([int(all(column)) for column in zip(*right, strict=True)])
    assert table.rows[-1][:3] == ["worst case for each image", "all of the above", "11"]
    for cell, judge in zip(table.rows[-1][3:], judges.values(), strict=True):
        right = [_bits(evaluation, row, judge) for row in evaluation.rows]
        assert cell == _cell([int(all(column)) for column in zip(*right, strict=True)])
    names = [row[0] for row in table.rows[:-1]]
    assert [name for name, _ in itertools.groupby(names)] == list(findings.NAMES.values())


def test_the_experts_table_has_each_expert_under_the_mean_s_attack_and_its_own(tmp_path: Path) -> None:
    evaluation = _made_up(tmp_path / "l")
    table = tables(results(evaluation))[1]
    assert list(table.columns[2:]) == ["expert 1", "expert 2", "expert 3"]
    found = {(row[0], row[1]): list(row[2:]) for row in table.rows}
    assert len(found) == len(table.rows) == 3 + 8 + 6
    for row in [Row("clean"), *evaluation.rows]:
        name = findings.NAMES[row.attack or row.kind]
        if not row.attacker or row.attacker == "mean":
            knows = "—" if not row.attacker else "the exact mean of all permutations (closed-form EOT)"
            assert found[name, knows] == [_cell(_bits(evaluation, row, f"expert {i}")) for i in (1, 2, 3)]
        elif row.attacker.startswith("expert "):
            cell = found[name, "this expert alone"][int(row.attacker[-1]) - 1]
            assert cell == _cell(_bits(evaluation, row, row.attacker))


def test_tables_as_markdown_have_every_cell(whole: Evaluation) -> None:
    for table in tables(results(whole)):
        lines = table.to_markdown().split("\n")
        assert lines[0] == f"**{table.caption}**"
        for row in table.rows:
            assert any(all(cell in line for cell in row) for line in lines)


def test_a_network_has_one_column(tmp_path: Path) -> None:
    evaluation = _evaluation(tmp_path / "l", replace(PLAN, attackers=None, masking_images=0), Network(_brightness, 3))
    _run(evaluation)
    (accuracy,) = tables(results(evaluation))
    assert list(accuracy.columns) == ["attack", "what the attacker differentiates", "images", "accuracy"]
    assert [row[0] for row in accuracy.rows] == [
        "clean",
        "clean, the attacked images",
        "random noise of the same size",
        "FGSM",
        "BIM-10",
        "worst case for each image",
    ]
    assert "transfer_from_experts" not in results(evaluation)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eps": None}, "Linf, ε = 8/255."),
        ({"eps": None, "norm": "L2"}, "L2, ε = 1."),
        ({"eps": 0.125}, "Linf, ε = 0.125."),
        ({"eps": 0.5, "norm": "L2"}, "L2, ε = 0.5."),
        ({"eps": 0.0}, "Linf, ε = 0."),
        ({"eps": 8 / 255}, "Linf, ε = 8/255."),
    ],
)
def test_the_table_says_what_the_radius_is(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    plan = replace(Plan(attacks=("fgsm",), images=3, chunk=3, masking_images=0), **changes)
    assert tables(results(_made_up(tmp_path / "l", plan=plan)))[0].note.startswith(expected)


# Signs of masking

UNMOVED = "every image has a gradient that an attack can follow"
CHECKS = {
    "noise": "random noise of the same size is weaker than gradients",
    "steps": "many steps are at least as strong as one",
    "transfer": "the model's own gradients are stronger than transfer and black boxes",
    "loss": "loss rises with the number of steps",
    "success": "success rises with ε, to 100 %",
}


def _brightness(images: Tensor) -> Tensor:
    """An honest network: its gradient is the same everywhere."""
    return 30 * images.mean((2, 3))


class _Masked(torch.autograd.Function):
    """The images as they are; their gradient multiplied by a number for each."""

    @staticmethod
    def forward(context: Any, images: Tensor, factors: Tensor) -> Tensor:
        context.save_for_backward(factors)
        return images.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factors,) = context.saved_tensors
        return gradient * factors, None


def _flipped(images: Tensor) -> Tensor:
    """Its gradient points the wrong way."""
    return _brightness(_Masked.apply(images, -torch.ones(1)))


def _right_at_stored_images(images: Tensor) -> Tensor:
    """Its gradient is right where all pixels are whole numbers of 255ths, and points the wrong way elsewhere."""
    stored = ((255 * images - (255 * images).round()).abs() < 1e-3).flatten(1).all(1)
    return _brightness(_Masked.apply(images, torch.where(stored, 1.0, -1.0)[:, None, None, None]))


def _set_in_its_ways(images: Tensor) -> Tensor:
    """Class 0 wins, whatever an attack does."""
    return _brightness(images) + torch.tensor([100.0, 0, 0])


def _masking(
    tmp_path: Path, network: Any, *, transfer: Any = None, attacks: tuple[str, ...] = ("fgsm", "pgd")
) -> dict[str, bool]:
    """Which of the checks were passed, on images of which every fifth has a wrong label."""
    labels = torch.where(torch.arange(30) % 5 == 0, (_split(30).labels + 1) % 3, _split(30).labels)
    plan = replace(
        PLAN,
        attacks=attacks,
        attackers=None,
        eps=0.15,
        masking_images=30,
        images=30,
        chunk=30,
        curve_steps=(1, 5, 10),
        curve_eps=(0.5, 1, 2, 10),
        queries=40,
    )
    test = Split(_split(30).images, labels)
    subject = Network(network, CLASSES, name=network.__name__, transfer=transfer)
    evaluation = _evaluation(tmp_path / "l", plan, subject, test)
    _run(evaluation)
    found = results(evaluation)
    names = {text: name for name, text in CHECKS.items()} | {UNMOVED: "gradient"}
    checks = {names[check["check"]]: check for check in found["masking"]}
    assert len(checks) == len(found["masking"])
    table = tables(found)[-1]
    assert [list(row) for row in table.rows] == [
        [c["check"], "passed" if c["passed"] else "NOT PASSED", c["finding"]] for c in found["masking"]
    ]
    percents = {
        name: f"{100 * entry['accuracy']:.1f} %"
        for name in ("noise", "fgsm", "pgd")
        for entry in found["accuracy"]
        if entry["attack"] == name and entry["attacker"] in (None, "output")
    }
    if "pgd" in percents:
        assert checks["noise"]["finding"] == f"{percents['noise']} under noise, {percents['pgd']} under PGD-20"
    return {name: check["passed"] for name, check in checks.items()}


def test_an_honest_network_passes_every_check(tmp_path: Path) -> None:
    other = lambda x: _quadratic(x) + _brightness(x)  # noqa: E731
    assert _masking(tmp_path, _brightness, transfer=other) == dict.fromkeys(CHECKS, True)


def test_a_gradient_that_points_the_wrong_way_passes_no_check_but_that_of_steps(tmp_path: Path) -> None:
    found = _masking(tmp_path, _flipped, transfer=_brightness)
    assert found == dict.fromkeys(CHECKS, False) | {"steps": True}


def test_one_step_that_is_stronger_than_many_does_not_pass(tmp_path: Path) -> None:
    found = _masking(tmp_path, _right_at_stored_images)
    assert not found["steps"]
    assert not found["success"]
    assert "transfer" not in found


def test_images_that_no_radius_fools_do_not_pass(tmp_path: Path) -> None:
    """Class 0 is so sure that its cross-entropy has no gradient."""
    honest = {"noise": True, "steps": True, "loss": True, "success": False}
    assert _masking(tmp_path, _set_in_its_ways) == honest | {"gradient": False}


def test_a_black_box_that_is_stronger_does_not_pass(tmp_path: Path) -> None:
    pytest.importorskip("torchattacks")
    honest = _masking(tmp_path, _brightness, attacks=("pgd", "square"))
    assert honest == {"noise": True, "transfer": True, "loss": True, "success": True}
    assert not _masking(tmp_path, _flipped, attacks=("pgd", "square"))["transfer"]


def test_checks_whose_attacks_were_not_made_are_left_out(tmp_path: Path) -> None:
    assert _masking(tmp_path, _brightness, attacks=("fgsm",)).keys() == {"loss", "success"}
    assert _masking(tmp_path, _brightness, attacks=("pgd",)).keys() == {"noise", "loss", "success"}


@pytest.mark.parametrize(
    ("which", "accuracies", "losses", "passed"),
    [
        ("noise", {"noise": 101, "pgd": 100}, None, True),
        ("noise", {"noise": 100, "pgd": 100}, None, True),
        ("noise", {"noise": 99, "pgd": 100}, None, False),
        ("steps", {"fgsm": 99, "pgd": 100}, None, True),
        ("steps", {"fgsm": 96, "pgd": 100}, None, False),
        ("transfer", {"transfer": 99, "pgd": 100, "square": 150}, None, True),
        ("transfer", {"transfer": 150, "pgd": 100, "square": 96}, None, False),
        ("transfer", {"transfer": 96, "pgd": 100, "square": 150}, None, False),
        ("loss", {}, [1, 2, 2, 3], True),
        ("loss", {}, [1, 3, 2.95, 3], True),
        ("loss", {}, [1, 3, 2.9, 4], False),
        ("loss", {}, [1, 1, 1, 1], False),
        ("loss", {}, [1, 2, 3, math.nan], False),
        ("success", {"eps": [200, 100, 0]}, None, True),
        ("success", {"eps": [100, 101, 0]}, None, True),
        ("success", {"eps": [100, 104, 0]}, None, False),
        ("success", {"eps": [200, 100, 1]}, None, False),
        ("success", {"eps": [0, 0, 0]}, None, True),
    ],
)
def test_each_check_is_passed_and_not_passed_where_it_should(
    tmp_path: Path, which: str, accuracies: dict[str, Any], losses: list[float] | None, passed: bool
) -> None:
    """Of 200 images, so many right; an image is half a percent."""
    plan = Plan(attacks=("fgsm", "pgd", "square"), images=200, chunk=200, masking_images=200, eps=0.1)
    plan = replace(plan, curve_eps=(1, 2, 3), curve_steps=(1, 2, 3, 4))
    subject = Network(_brightness, CLASSES, transfer=_quadratic)
    evaluation = _evaluation(tmp_path / "l", plan, subject, _split(200))
    default = {"noise": 180, "fgsm": 150, "pgd": 100, "square": 140, "transfer": 160, "eps": [150, 100, 0]} | accuracies

    def piece(right: int, loss: float = 1.0) -> dict[str, Any]:
        return {"right": {"output": "1" * right + "0" * (200 - right)}, "loss": 200 * loss, "seconds": 0.0}

    for row, start, stop in evaluation.pieces():
        if row.kind == "steps":
            values = zip((1, 2, 3, 4), losses or [1, 2, 3, 4], strict=True)
            made: dict[str, Any] = {"points": [{"steps": s} | piece(9, loss) for s, loss in values]}
        elif row.kind == "eps":
            made = {"points": [{"eps": e} | piece(n) for e, n in zip((1, 2, 3), default["eps"], strict=True)]}
        elif row.attacker == "transfer":
            made = piece(default["transfer"])
        else:
            made = piece(default.get(row.attack or row.kind, 200 if start == 0 else 0))
            made["right"]["output"] = made["right"]["output"][: stop - start]
        evaluation.ledger.pieces[evaluation.key(row, start, stop)] = made
    checks = {check["check"]: check["passed"] for check in results(evaluation)["masking"]}
    expected = dict.fromkeys(CHECKS.values(), True) | {CHECKS[which]: passed}
    assert checks == expected


# Images that cannot be moved


def _knows_no_dark_ones(images: Tensor) -> Tensor:
    """`_brightness`, but of a dark image it has no gradient: it takes it for class 0."""
    dark = images.amax((1, 2, 3)) < 0.3
    return torch.where(dark[:, None], torch.tensor([1.0, 0, 0]) + 0 * images.mean((2, 3)), _brightness(images))


@pytest.mark.parametrize("chunk", [30, 10, 1])
@pytest.mark.parametrize("drop_fooled", [False, True])
def test_images_without_a_gradient_are_counted_and_end_nothing(tmp_path: Path, chunk: int, drop_fooled: bool) -> None:
    """Ten of thirty; whole chunks of nothing else; and one at a time."""
    order = robustness.sample_order(_split(30), 30)
    images, labels = _split(30).images.clone(), _split(30).labels.clone()
    images[order[20:]] = 30
    labels[order[20:]] = 0
    labels[order[20]] = 1
    plan = replace(PLAN, attacks=("fgsm", "pgd"), attackers=None, images=30, chunk=chunk, masking_images=30, eps=0.05)
    plan = replace(plan, drop_fooled=drop_fooled)
    subject = Network(_knows_no_dark_ones, CLASSES)
    evaluation = _evaluation(tmp_path / "l", plan, subject, Split(images, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _run(evaluation)
    found = results(evaluation)
    assert found["unmoved"] == [
        {"attack": attack, "attacker": "output", "unmoved": 10, "right": 9, "images": 30} for attack in ("fgsm", "pgd")
    ]
    (check,) = (check for check in found["masking"] if check["check"] == UNMOVED)
    assert not check["passed"]
    assert check["finding"] == "10 of 30 images (33.3 %) under FGSM (the model's own output)"
    (table,) = (table for table in tables(found) if "exactly zero" in table.caption)
    assert [list(row) for row in table.rows] == [
        [name, "the model's own output", "10 of 30 images (33.3 %)", "9"] for name in ("FGSM", "PGD-20")
    ]


def test_of_saturated_probabilities_of_mostly_one_class_an_image_at_a_time_is_no_constant_model(tmp_path: Path) -> None:
    """39 of 40 images have the same output, to the last bit, and so have images that are made up."""
    rare = _split(40).images[robustness.sample_order(_split(40), 40)[-1]] / 255

    def sure(images: Tensor) -> Tensor:
        near = (images - rare).square().mean((1, 2, 3))
        return (1e6 * torch.stack([near - 0.005, 0.005 - near, 0 * near - 1], 1)).softmax(-1)

    plan = replace(PLAN, attacks=("fgsm",), attackers=None, images=3, chunk=1, masking_images=2)
    evaluation = _evaluation(tmp_path / "l", plan, Network(sure, CLASSES), _split(40))
    _run(evaluation)
    assert results(evaluation)["unmoved"][0]["unmoved"] == 3


def test_where_every_image_can_be_moved_nothing_is_said_of_it(whole: Evaluation) -> None:
    found = results(whole)
    assert found["unmoved"] == []
    assert UNMOVED not in {check["check"] for check in found["masking"]}
    assert not [table for table in tables(found) if "exactly zero" in table.caption]


# What is left out


def test_what_is_asked_for_and_not_attacked_is_listed_and_in_no_worst_case(tmp_path: Path) -> None:
    pytest.importorskip("torchattacks")
    plan = replace(PLAN, attacks=("square", "fgsm"), attackers=("worst", "mean"), images=3, masking_images=0)
    evaluation = _evaluation(tmp_path / "l", plan, loss_fn=None)
    _run(evaluation)
    found = results(evaluation)
    assert [(pair["attack"], pair["attacker"]) for pair in found["left_out"]] == [("square", "worst")]
    rows = {(entry["attack"], entry["attacker"]) for entry in found["accuracy"]}
    assert ("square", "worst") not in rows
    assert ("square", "mean") in rows
    (table,) = (table for table in tables(found) if table.caption.startswith("Left out"))
    assert list(table.rows[0][:2]) == ["Square (no gradients)", "worst"]
    assert "asks what answers" in table.rows[0][2]


@pytest.mark.parametrize(
    ("attacks", "attackers", "pair"),
    [
        (("square",), ("worst",), "square by worst"),
        (("square", "autoattack"), ("eot", "expert 1"), "autoattack by expert 1"),
        (("fgsm",), ("nobody",), "no such attacker"),
    ],
)
def test_an_evaluation_without_an_attack_is_an_error(
    tmp_path: Path, attacks: tuple[str, ...], attackers: tuple[str, ...], pair: str
) -> None:
    with pytest.raises(ValueError, match=f"nothing is left to attack with .*{pair}"):
        _evaluation(tmp_path / "l", replace(PLAN, attacks=attacks, attackers=attackers))
    two = Network(lambda x: _brightness(x)[:, :2], 2)
    with pytest.raises(ValueError, match="dlr by output: its ratio is not defined for fewer than 3 classes"):
        _evaluation(tmp_path / "l", replace(PLAN, attacks=("dlr",), attackers=None), two)


def test_without_an_attack_there_is_no_worst_case(tmp_path: Path) -> None:
    evaluation = _evaluation(tmp_path / "l", replace(PLAN, attacks=()))
    _run(evaluation)
    assert results(evaluation)["worst_case"] == []
    assert "worst case" not in to_csv(results(evaluation))


# What is the same model


def _linear_of(weights: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: 30 * x.mean((2, 3)) @ weights


class Tempered(nn.Module):
    """What it answers depends on an attribute that is in no state and no `repr`."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        return _brightness(images) / self.temperature


@pytest.mark.parametrize("kind", ["function", "module", "transfer"])
def test_weights_replaced_behind_a_name_give_new_numbers(tmp_path: Path, kind: str) -> None:
    """A function's name, and a module's repr and tensors, do not say which model it is."""
    weights = torch.eye(3)
    turned = weights[[1, 2, 0]]

    def evaluation(file: Path, first: bool) -> Evaluation:
        own = _linear_of(weights if first else turned)
        if kind == "module":
            own = Tempered(1.0 if first else -1.0)
        elif kind == "transfer":
            return _evaluation(file, plan, Network(_brightness, CLASSES, name="f", transfer=own))
        return _evaluation(file, plan, Network(own, CLASSES, name="f"))

    plan = replace(PLAN, attacks=("fgsm",), attackers=None, masking_images=0)
    found = []
    for first in (True, False, True):
        again = evaluation(tmp_path / "l", first)
        assert len(_run(again)) == (len(list(again.pieces())) if len(found) < 2 else 0)
        fresh = evaluation(tmp_path / f"{len(found)}", first)
        _run(fresh)
        assert _found(again) == _found(fresh)
        found.append(_found(again))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("switch", ["call", "sample"])
def test_a_gate_that_switches_inside_a_function_is_the_same_model_each_time(switch: Any, own: bool) -> None:
    model = copy.deepcopy(_model())
    model.gate.switch = switch
    model.gate.generator = torch.Generator().manual_seed(1) if own else None
    images = _split().images[:9] / 255
    for network in (model, lambda x: model(x) * 1.0):
        states = []
        for seed in (1, 2, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            states.append(Network(network, CLASSES).answers(images))
            assert torch.equal(torch.get_rng_state(), before)
        assert len(set(states)) == 1
    assert model.gate.switch == switch
    assert not own or torch.equal(model.gate.generator.get_state(), torch.Generator().manual_seed(1).get_state())
    assert len({Mixture(model, CLASSES).answers(images) for _ in range(3)}) == 1


def test_who_does_not_take_images_is_named() -> None:
    def fails(_images: Tensor) -> Tensor:
        raise RuntimeError("two\nlines")

    images = torch.rand(2, 3, 5, 6)
    for name, subject in (("model", Network(fails, 3)), ("transfer", Network(_brightness, 3, transfer=fails))):
        with pytest.raises(ValueError, match=rf"^{name}: it does not take images \(B, 3, 5, 6\) .*two lines\)$"):
            subject.answers(images)


def test_the_last_bits_of_an_output_do_not_make_another_model() -> None:
    images = _split().images[:9] / 255
    same = [Network(lambda x, f=f: _brightness(x) * f, CLASSES).answers(images) for f in (1.0, 1 + 1e-7, 1.01)]
    assert same[0] == same[1] != same[2]


# Options


def test_attacking_an_image_no_further_once_it_fools_never_helps_what_is_attacked(tmp_path: Path) -> None:
    correct = []
    for drop_fooled in (False, True):
        plan = replace(PLAN, attacks=("bim", "cw"), attackers=("mean", "worst", "expert 1"), masking_images=0)
        plan = replace(plan, images=8, chunk=8, eps=0.085, drop_fooled=drop_fooled)
        evaluation = _evaluation(tmp_path / str(drop_fooled), plan, loss_fn=None)
        _run(evaluation)
        entries = {(e["attack"], e["attacker"], e["judge"]): e["correct"] for e in results(evaluation)["accuracy"]}
        correct.append([entries[row.attack, row.attacker, row.attacker] for row in evaluation.rows if row.attacker])
    assert len(correct[0]) == 6
    assert 0 < sum(correct[0]) < 48
    assert all(dropped <= whole for whole, dropped in zip(*correct, strict=True))


@pytest.mark.parametrize("attacker", ["single", "mean"])
def test_dropping_the_fooled_never_helps_a_gate_that_switches(tmp_path: Path, attacker: str) -> None:
    accuracies = []
    for drop_fooled in (False, True):
        plan = replace(PLAN, attacks=("bim",), attackers=(attacker,), masking_images=0, images=200, chunk=100)
        plan = replace(plan, eps=0.1, drop_fooled=drop_fooled)
        subject = Mixture(_model(3), CLASSES, draws=2)
        evaluation = _evaluation(tmp_path / str(drop_fooled), plan, subject, _split(200), loss_fn=None)
        _run(evaluation)
        entries = [e for e in results(evaluation)["accuracy"] if e["attack"] == "bim"]
        accuracies.append({e["judge"]: e["accuracy"] for e in entries if e["judge"] in ("switching", "mean")})
    assert 0.02 < accuracies[0]["switching"] < 0.9
    assert all(accuracies[1][name] <= accuracies[0][name] + 0.02 for name in accuracies[0])


def test_a_random_network_of_unknown_mean_is_attacked_to_the_end(tmp_path: Path) -> None:
    """What a lucky draw would keep is not known to be worst."""
    found = []
    for drop_fooled in (False, True):
        plan = replace(PLAN, attacks=("bim",), attackers=None, masking_images=0, drop_fooled=drop_fooled)
        evaluation = _evaluation(tmp_path / str(drop_fooled), plan, Network(_blurred, CLASSES, draws=2))
        images, labels = _split().images[:5] / 255, _split().labels[:5]
        torch.manual_seed(0)
        found.append(evaluation.attacked(evaluation.rows[-2], images, labels, 3))
    assert torch.equal(*found)


# Attacks of torchattacks


def test_attacks_without_gradients_and_autoattack_are_pieces_like_others(tmp_path: Path) -> None:
    pytest.importorskip("torchattacks")
    plan = replace(PLAN, attacks=("square", "autoattack"), attackers=("fixed", "single", "mean"), masking_images=0)
    plan = replace(plan, images=3, eps=0.12, queries=15)
    evaluation = _evaluation(tmp_path / "l", plan, loss_fn=None)
    state = torch.get_rng_state()
    _run(evaluation)
    assert torch.equal(torch.get_rng_state(), state)
    found = {(e["attack"], e["attacker"], e["judge"]): e["correct"] for e in results(evaluation)["accuracy"]}
    for attack, attacker in (("square", "mean"), ("autoattack", "mean"), ("autoattack", "fixed")):
        assert found[attack, attacker, attacker] <= found["sample", None, attacker]
    assert found["autoattack", "mean", "mean"] < found["sample", None, "mean"]
    plan = replace(plan, attacks=("autoattack",), attackers=("single",))
    alone = _evaluation(tmp_path / "alone", plan, loss_fn=None)
    _run(alone)
    numbers = _numbers(evaluation)
    assert all(piece == numbers[place] for place, piece in _numbers(alone).items())


def test_autoattack_on_a_draw_of_the_gate_passes_the_experts_once_a_step(tmp_path: Path) -> None:
    pytest.importorskip("torchattacks")
    passes: list[int] = []

    def logits(images: Tensor) -> Tensor:
        passes.append(len(images))
        return _model(3).expert_logits(images)

    plan = replace(PLAN, attacks=("autoattack",), attackers=("single",), images=3, eps=0.01, autoattack_steps=7)
    subject = Mixture(_model(3), CLASSES, expert_logits=logits)
    evaluation = _evaluation(tmp_path / "l", plan, subject, loss_fn=None)
    passes.clear()
    evaluation.attacked(evaluation.rows[-1], _split().images[:3] / 255, _split().labels[:3], 1)
    # For the images; and for each of two losses for the start, the steps, and to judge.
    assert len(passes) == 1 + 2 * (1 + 7 + 1)
