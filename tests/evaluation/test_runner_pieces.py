"""Pieces of an evaluation: what a kill costs, what is taken over, and on what a piece's key depends."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.data.datasets import Split
from immunity_fast.evaluation.results import results
from immunity_fast.evaluation.runner import ATTACKS, Evaluation, Plan, Row
from immunity_fast.evaluation.targets import MixtureTarget, NetworkTarget
from tests import evaluations
from tests.evaluations import PLAN, SMALL, brightness, colored, evaluation_of, numbers_of, run_to_end, trained_mixture
from tests.small_runs import CLASSES

small_chunks_and_short_curves = evaluations.small_chunks_and_short_curves
whole = evaluations.whole


def _found(evaluation: Evaluation) -> dict[str, Any]:
    """The results, but for the time they took."""
    found = results(evaluation)
    return found | {"accuracy": [{k: v for k, v in row.items() if k != "seconds"} for row in found["accuracy"]]}


# A killed evaluation


class Killed(Exception):
    pass


def test_killed_after_every_piece_an_evaluation_ends_bit_for_bit(whole: Evaluation, tmp_path: Path) -> None:
    def kill(_row: Row, _images: int, new: bool) -> None:
        if new:
            raise Killed

    for attempt in itertools.count():
        evaluation = evaluation_of(tmp_path / "l")
        assert len(evaluation.ledger.pieces) == attempt
        try:
            evaluation.run(kill)
        except Killed:
            continue
        break
    assert attempt == len(list(whole.pieces()))
    assert numbers_of(evaluation) == numbers_of(whole)
    assert _found(evaluation) == _found(whole)


@pytest.mark.parametrize("call", [2, 15])
def test_an_evaluation_killed_within_a_piece_loses_that_piece(whole: Evaluation, tmp_path: Path, call: int) -> None:
    class Dying(MixtureTarget):
        left = call

        def judge(self, images: Tensor, labels: Tensor, generator: Any, **options: Any) -> Any:
            self.left -= 1
            if not self.left:
                raise Killed
            return super().judge(images, labels, generator, **options)

    with pytest.raises(Killed):
        run_to_end(evaluation_of(tmp_path / "l", SMALL, Dying(trained_mixture(), CLASSES, draws=2)))
    evaluation = evaluation_of(tmp_path / "l", SMALL)
    before = len(evaluation.ledger.pieces)
    assert 0 < before < call
    assert len(run_to_end(evaluation)) == len(list(evaluation.pieces())) - before
    assert numbers_of(evaluation).items() <= numbers_of(whole).items()


def test_a_piece_does_not_depend_on_what_was_computed_before_it(whole: Evaluation, tmp_path: Path) -> None:
    class Backwards(Evaluation):
        def pieces(self) -> Iterator[tuple[Row, int, int]]:
            return reversed(list(super().pieces()))

    torch.manual_seed(99)
    evaluation = evaluation_of(tmp_path / "l", kind=Backwards)
    run_to_end(evaluation)
    assert numbers_of(evaluation) == numbers_of(whole)


def test_what_is_finished_is_not_attacked_again(whole: Evaluation) -> None:
    class Untouchable(MixtureTarget):
        def attacker(self, name: str, generator: Any) -> Any:
            raise AssertionError(name)

        def judge(self, images: Tensor, labels: Tensor, generator: Any, **options: Any) -> Any:
            raise AssertionError(images)

    evaluation = evaluation_of(whole.ledger.path, target=Untouchable(trained_mixture(), CLASSES, draws=2))
    told: list[tuple[Row, int, bool]] = []
    evaluation.run(lambda *arguments: told.append(arguments))
    assert told == [(row, stop - start, False) for row, start, stop in evaluation.pieces()]
    assert results(evaluation) == results(whole), "the times, too"


# More of the same


def test_more_attacks_and_attackers_take_over_what_is_finished(whole: Evaluation, tmp_path: Path) -> None:
    few = evaluation_of(tmp_path / "l", replace(PLAN, attacks=("bim",), attackers=("eot", "mean"), masking_images=0))
    done = {row for row, _ in run_to_end(few)}
    assert {(row.attack, row.attacker) for row in done if row.attack} == {("bim", "eot"), ("bim", "mean")}
    more = evaluation_of(tmp_path / "l")
    new = run_to_end(more)
    assert len(new) == len(list(more.pieces())) - len(list(few.pieces()))
    assert {row for row, _ in new} == {row for row, _, _ in more.pieces()} - done
    assert numbers_of(more) == numbers_of(whole)
    assert _found(more) == _found(whole)


@pytest.mark.parametrize(("before", "kept"), [(5, {(0, 3)}), (6, {(0, 3), (3, 6)})])
def test_more_images_take_over_the_whole_chunks(
    whole: Evaluation, tmp_path: Path, before: int, kept: set[tuple[int, int]]
) -> None:
    few = evaluation_of(tmp_path / "l", replace(SMALL, images=before, masking_images=0))
    run_to_end(few)
    more = evaluation_of(tmp_path / "l", SMALL)
    new: list[tuple[Row, int, int]] = []
    pieces = list(more.pieces())
    taken = {piece for piece in pieces if more.key(*piece) in more.ledger}
    assert taken == {
        piece for piece in pieces if piece[0].kind == "clean" or (piece[1:] in kept and piece[0] in few.rows)
    }
    told = iter(pieces)
    more.run(lambda row, images, fresh: new.append(next(told)) if fresh else next(told) and None)
    assert set(new) == set(pieces) - taken
    assert numbers_of(more).items() <= numbers_of(whole).items()


def test_fewer_images_and_attacks_are_there_already(whole: Evaluation) -> None:
    plan = replace(PLAN, images=6, attacks=("bim",), attackers=("mean",), masking_images=3)
    evaluation = evaluation_of(whole.ledger.path, plan)
    assert run_to_end(evaluation) == []
    found = _found(evaluation)
    assert {entry["images"] for entry in found["accuracy"] if entry["attack"] != "clean"} == {6}


# What is something else


def _with_another_gate() -> ImmunityMoE:
    other = copy.deepcopy(trained_mixture())
    with torch.no_grad():
        next(iter(other.gate.parameters()))[0, 0, 0, 0] += 1e-6
    return other


OTHERS: dict[str, Callable[[Path], Evaluation]] = {
    "seed": lambda file: evaluation_of(file, replace(PLAN, seed=6)),
    "model": lambda file: evaluation_of(file, target=MixtureTarget(trained_mixture(2, 1), CLASSES, draws=2)),
    "a weight of the gate": lambda file: evaluation_of(
        file, target=MixtureTarget(_with_another_gate(), CLASSES, draws=2)
    ),
    "draws": lambda file: evaluation_of(file, target=MixtureTarget(trained_mixture(), CLASSES, draws=3)),
    "labels": lambda file: evaluation_of(file, test=Split(colored().images, (colored().labels + 1) % 3)),
    "images": lambda file: evaluation_of(file, test=Split(colored().images ^ 1, colored().labels)),
    "fewer images": lambda file: evaluation_of(file, test=Split(colored().images[:22], colored().labels[:22])),
    "how heatmaps are looked at": lambda file: evaluation_of(file, loss_fn=FusedImmunityLoss(0, 0.1, 0.1, size=(9, 9))),
    "no heatmaps": lambda file: evaluation_of(file, loss_fn=None),
    "a network": lambda file: evaluation_of(
        file, replace(PLAN, attackers=None), NetworkTarget(trained_mixture(), CLASSES)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_no_piece_is_taken_over_from_another(whole: Evaluation, name: str) -> None:
    other = OTHERS[name](whole.ledger.path)
    assert not {other.key(*piece) for piece in other.pieces()} & {whole.key(*piece) for piece in whole.pieces()}


MADE = ("fgsm", "pgd", "pgd-sum", "arc", "mora", "square", "autoattack")
ATTACKED = {"noise", *MADE, "eps", "steps", "draws"}
CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    # what changes → of which kinds or attacks the pieces are other ones
    "eps": ({"eps": 0.08}, ATTACKED),
    "norm": ({"norm": "L2"}, ATTACKED),
    "drop_fooled": ({"drop_fooled": True}, {"fgsm", "pgd", "pgd-sum"}),
    "amp": ({"amp": "bf16"}, {"fgsm", "pgd", "pgd-sum", "eps", "steps", "draws"}),
    "queries": ({"queries": 3}, {"square", "autoattack"}),
    "other_eps": ({"other_eps": (0.05,)}, set()),
    "curve_eps": ({"curve_eps": (0.5, 7)}, {"eps"}),
    "curve_steps": ({"curve_steps": (1, 2)}, {"steps"}),
    "curve_draws": ({"curve_draws": (1, 3)}, {"draws"}),
    "images": ({"images": 12}, set()),
    "attacks": ({"attacks": ("pgd", "square", "autoattack", "fgsm", "cw")}, set()),
    "attackers": ({"attackers": ("mean", "worst", "sample")}, set()),
    "masking_images": ({"masking_images": 6}, set()),
    "autoattack_steps": ({"autoattack_steps": 2}, {"autoattack"}),
    "mora_steps": ({"mora_steps": 2}, {"mora"}),
    "arc_steps": ({"arc_steps": 2}, {"arc"}),
    "seed": ({"seed": 6}, {"clean", "subset", *ATTACKED}),
    "chunk": ({"chunk": 2}, {"subset", *ATTACKED}),
}


def test_every_setting_of_a_plan_is_tried_here() -> None:
    assert CHANGES.keys() == {field.name for field in fields(Plan)}


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_changes_with_what_its_piece_depends_on_alone(tmp_path: Path, name: str) -> None:
    plan = replace(PLAN, attacks=MADE, attackers=("mean", "sample"))
    changes, expected = CHANGES[name]
    keys = []
    for each in (plan, replace(plan, **changes)):
        evaluation = evaluation_of(tmp_path / "l", each)
        first = [(row, start, stop) for row, start, stop in evaluation.pieces() if start == 0]
        who = {"pgd-sum": "sample", "arc": "sample", "draws": "eot", "clean": "", "subset": "", "noise": ""}
        named = {(piece[0].attack or piece[0].kind, piece[0].attacker): piece for piece in first if not piece[0].eps}
        known = {name: piece for (name, attacker), piece in named.items() if attacker == who.get(name, "mean")}
        keys.append({name: evaluation.key(*piece) for name, piece in known.items()})
    assert {name for name in keys[0].keys() & keys[1].keys() if keys[0][name] != keys[1][name]} == expected


def test_no_two_pieces_share_a_key(whole: Evaluation, tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=ATTACKS, attackers=None)
    target = MixtureTarget(trained_mixture(3), CLASSES, transfer=brightness)
    for evaluation in (whole, evaluation_of(tmp_path / "l", plan, target)):
        pieces = list(evaluation.pieces())
        assert len({evaluation.key(*piece) for piece in pieces}) == len(pieces)


def test_another_radius_is_attacked_anew_beside_the_first(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=("fgsm",), attackers=("mean",), masking_images=0)
    first = evaluation_of(tmp_path / "l", plan)
    run_to_end(first)
    numbers, found = numbers_of(first), _found(first)
    second = evaluation_of(tmp_path / "l", replace(plan, eps=0.2))
    assert {row.kind for row, _ in run_to_end(second)} == {"noise", "attack"}
    fresh = evaluation_of(tmp_path / "fresh", replace(plan, eps=0.2))
    run_to_end(fresh)
    assert _found(second) == _found(fresh) != found
    back = evaluation_of(tmp_path / "l", plan)
    assert run_to_end(back) == []
    assert numbers_of(back) == numbers


# What is the same model


def _linear_of(weights: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: 30 * x.mean((2, 3)) @ weights


class Tempered(nn.Module):
    """What it answers depends on an attribute that is in no state and no `repr`."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        return brightness(images) / self.temperature


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
            return evaluation_of(file, plan, NetworkTarget(brightness, CLASSES, name="f", transfer=own))
        return evaluation_of(file, plan, NetworkTarget(own, CLASSES, name="f"))

    plan = replace(PLAN, attacks=("fgsm",), attackers=None, masking_images=0)
    found = []
    for first in (True, False, True):
        again = evaluation(tmp_path / "l", first)
        assert len(run_to_end(again)) == (len(list(again.pieces())) if len(found) < 2 else 0)
        fresh = evaluation(tmp_path / f"{len(found)}", first)
        run_to_end(fresh)
        assert _found(again) == _found(fresh)
        found.append(_found(again))
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("switch", ["call", "sample"])
def test_a_switching_gate_in_a_function_stays_the_same_model(switch: Any, own: bool) -> None:
    model = copy.deepcopy(trained_mixture())
    model.gate.switch = switch
    model.gate.generator = torch.Generator().manual_seed(1) if own else None
    images = colored().images[:9] / 255
    for network in (model, lambda x: model(x) * 1.0):
        states = []
        for seed in (1, 2, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            states.append(NetworkTarget(network, CLASSES).answers_hash(images))
            assert torch.equal(torch.get_rng_state(), before)
        assert len(set(states)) == 1
    assert model.gate.switch == switch
    assert not own or torch.equal(model.gate.generator.get_state(), torch.Generator().manual_seed(1).get_state())
    assert len({MixtureTarget(model, CLASSES).answers_hash(images) for _ in range(3)}) == 1


def test_who_does_not_take_images_is_named() -> None:
    def fails(_images: Tensor) -> Tensor:
        raise RuntimeError("two\nlines")

    images = torch.rand(2, 3, 5, 6)
    for name, target in (
        ("model", NetworkTarget(fails, 3)),
        ("transfer", NetworkTarget(brightness, 3, transfer=fails)),
    ):
        message = rf"^{name}: expected a network that takes images \(B, 3, 5, 6\) .*two lines; "
        with pytest.raises(ValueError, match=message):
            target.answers_hash(images)


def test_the_last_bits_of_an_output_do_not_make_another_model() -> None:
    images = colored().images[:9] / 255
    same = [
        NetworkTarget(lambda x, f=f: brightness(x) * f, CLASSES).answers_hash(images) for f in (1.0, 1 + 1e-7, 1.01)
    ]
    assert same[0] == same[1] != same[2]
