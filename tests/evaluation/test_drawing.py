"""What is random in an answer: exact expectation, ten draws, ten tries; and PGD on more and more draws."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast.attacks.mixtures import trained_gate
from immunity_fast.evaluation.drawing import drawn, drawn_table
from immunity_fast.evaluation.masking import masking
from immunity_fast.evaluation.results import results
from immunity_fast.evaluation.targets import TRIES, MixtureTarget, NetworkTarget
from immunity_fast.models.noise import MeanOfPasses
from tests import evaluations
from tests.evaluations import PLAN, SMALL, brightness, colored, evaluation_of, run_to_end, trained_mixture
from tests.small_runs import CLASSES

small_chunks_and_short_curves = evaluations.small_chunks_and_short_curves


def _piece(shares: list[float] | None, tries: list[str] | None) -> dict[str, Any]:
    given = {"shares": shares, "tries": tries}
    return {name: value for name, value in given.items() if value is not None}


FIRST = _piece([1.0, 0.5, 0.25], ["111"] * 5 + ["101"] * 4 + ["100"])
SECOND = _piece([0.75, 1.0, 0.0], ["110"] * 9 + ["011"])


def test_one_attack_is_its_own_mean_of_shares_and_draws() -> None:
    found = drawn("pgd", "mean", [[FIRST]], exact=True)
    assert found is not None
    assert found["accuracy"] == pytest.approx(1.75 / 3)
    assert found["draws"] == pytest.approx([1.0] * 5 + [2 / 3] * 4 + [1 / 3])
    assert found["mean"] == pytest.approx(statistics.fmean(found["draws"]))
    assert found["spread"] == pytest.approx(statistics.stdev(found["draws"]))
    assert (found["withstood"]["correct"], found["withstood"]["images"]) == (1, 3)
    assert found["exact"]


def test_the_worst_of_several_is_image_by_image() -> None:
    found = drawn("worst case", "all", [[FIRST], [SECOND]], exact=True)
    assert found is not None
    assert found["accuracy"] == pytest.approx((0.75 + 0.5 + 0.0) / 3)
    # The second attack is the worse one for the first and the last image, the first for the one between.
    pairs = zip(FIRST["tries"], SECOND["tries"], strict=True)
    expected = [(int(second[0]) + int(first[1]) + int(second[2])) / 3 for first, second in pairs]
    assert found["draws"] == pytest.approx(expected)
    assert found["withstood"]["correct"] == 0


def test_chunks_are_joined_and_unfinished_ones_cut_off() -> None:
    whole = drawn("pgd", "mean", [[FIRST, SECOND]], exact=True)
    assert whole is not None
    assert whole["images"] == 6
    both = drawn("worst case", "all", [[FIRST, SECOND], [SECOND]], exact=True)
    assert both is not None
    assert both["images"] == 3


def test_without_permutations_the_draws_are_the_expectation() -> None:
    found = drawn("pgd", "output", [[_piece(None, FIRST["tries"])]], exact=True)
    assert found is not None
    assert found["accuracy"] == pytest.approx(found["mean"])
    assert not found["exact"]
    assert drawn("pgd", "output", [[_piece(None, None)]], exact=True) is None


def test_a_mixture_s_shares_are_those_of_all_permutations() -> None:
    """Each of the N! answers, one after the other, in float64."""
    model = trained_mixture(3)
    target = MixtureTarget(model, CLASSES)
    images, labels = colored(200).images.float() / 255, colored(200).labels
    noisy = 0.52 * images + 0.48 * images.flip(0)  # between two classes, where experts do not agree
    verdict = target.judge(noisy, labels, torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, gate = model.expert_logits(noisy).double().softmax(-1), trained_gate(model, noisy).double()
    orders = list(itertools.permutations(range(3)))
    right = [torch.einsum("bn,nbk->bk", gate[:, list(order)], p).argmax(-1) == labels for order in orders]
    expected = torch.stack(right).double().mean(0)
    assert verdict.shares is not None
    torch.testing.assert_close(verdict.shares, expected, rtol=0, atol=1e-12)
    assert {0 < share < 1 for share in expected.tolist()} == {True, False}, "some are drawn, some are not"
    assert verdict.tries is not None
    assert verdict.tries.shape == (TRIES, len(labels))
    certain = (expected == 0) | (expected == 1)
    assert torch.equal(verdict.tries[:, certain], (expected[certain] == 1).expand(TRIES, -1))
    assert bool((verdict.tries.any(0) & ~verdict.tries.all(0))[~certain].any())


def test_noise_is_tried_with_shared_passes_and_says_so() -> None:
    calls = list[int]()

    class Noisy(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            calls.append(len(images))
            return brightness(images) + 30 * torch.randn(len(images), 3)

    images, labels = colored(20).images.float() / 255, colored(20).labels
    target = NetworkTarget(Noisy(), CLASSES, draws=2, answer=MeanOfPasses(Noisy(), 4))
    verdict = target.judge(images, labels, torch.Generator())
    assert len(calls) == 12
    assert verdict.tries is not None
    assert verdict.tries.shape == (TRIES, 20)
    assert torch.equal(verdict.tries[0], verdict.right["output"])
    assert not bool((verdict.tries == verdict.tries[0]).all())
    calls.clear()
    assert target.judge(images, labels, torch.Generator(), tries=False).tries is None
    assert len(calls) == 4


def test_a_network_that_draws_is_tried_ten_times() -> None:
    calls = list[int]()

    def noisy(images: Tensor) -> Tensor:
        calls.append(len(images))
        return brightness(images) + 3 * torch.randn(len(images), 3)

    images, labels = colored(20).images.float() / 255, colored(20).labels
    verdict = NetworkTarget(noisy, CLASSES, draws=2).judge(images, labels, torch.Generator())
    assert len(calls) == 1 + TRIES
    assert verdict.shares is None
    assert verdict.tries is not None
    assert not bool((verdict.tries == verdict.tries[0]).all())
    assert NetworkTarget(brightness, CLASSES).judge(images, labels, torch.Generator()).tries is None


def test_an_evaluation_says_what_is_drawn(tmp_path: Path) -> None:
    evaluation = evaluation_of(tmp_path / "l", SMALL)
    run_to_end(evaluation)
    found = results(evaluation)
    names = [(entry["attack"], entry["attacker"]) for entry in found["drawn"]]
    assert names == [
        ("subset", None),
        ("noise", None),
        ("fgsm", "eot"),
        ("fgsm", "mean"),
        ("worst case", "all"),
    ]
    assert all(entry["exact"] and len(entry["draws"]) == TRIES for entry in found["drawn"])
    (table,) = drawn_table(found)
    assert list(table.columns)[2:] == ["exact expectation", "ten draws: mean ± spread", "right in all ten tries"]
    assert len(table.rows) == 5
    assert [point["draws"] for point in found["curves"]["draws"]] == [1, 2]


@pytest.mark.parametrize(("last", "passed"), [(0.5, True), (0.495, True), (0.48, False)])
def test_an_average_that_is_not_saturated_is_a_sign(tmp_path: Path, last: float, passed: bool) -> None:
    evaluation = evaluation_of(tmp_path / "l", replace(PLAN, attacks=("fgsm",), images=3))
    run_to_end(evaluation)
    found = results(evaluation)
    found["curves"]["draws"] = [{"draws": k, "accuracy": a} for k, a in ((1, 0.7), (10, 0.5), (50, last))]
    (check,) = (each for each in masking(evaluation, found) if each["check"].startswith("averaging over more draws"))
    assert check["passed"] == passed
    assert check["finding"] == f"70.0 % by 1, 50.0 % by 10, {100 * last:.1f} % by 50"
