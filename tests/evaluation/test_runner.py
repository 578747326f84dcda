"""An evaluation in pieces: what there is to do, what is attacked and how, curves, chance, what cannot be attacked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast import ImmunityMoE, attacks
from immunity_fast.attacks.settling import Settling
from immunity_fast.data.sampling import sample
from immunity_fast.evaluation.metrics import heatmap_metrics
from immunity_fast.evaluation.results import results
from immunity_fast.evaluation.runner import ATTACKS, Evaluation, Plan, Row, attack_rows, bits, curve_rows, mean_loss
from immunity_fast.evaluation.targets import MixtureTarget, NetworkTarget
from tests import evaluations
from tests.evaluations import (
    LOSS,
    PLAN,
    SMALL,
    brightness,
    check_share,
    colored,
    evaluation_of,
    numbers_of,
    quadratic,
    run_to_end,
    trained_mixture,
)
from tests.small_runs import CLASSES, as_bytes

small_chunks_and_short_curves = evaluations.small_chunks_and_short_curves
whole = evaluations.whole


# What there is to do


def test_rows_are_every_attack_by_every_attacker_that_it_is_for() -> None:
    rows = attack_rows(MixtureTarget(trained_mixture(3), CLASSES, transfer=brightness), Plan(attacks=ATTACKS))
    everybody = ["off", "sample", "eot", "mean", "logits", "worst", "expert 1", "expert 2", "expert 3", "transfer"]
    expected = [("subset", "", ""), ("noise", "", "")]
    expected += [("attack", a, b) for a in ("fgsm", "bim", "mim", "pgd", "cw", "dlr") for b in everybody]
    expected += [("attack", a, b) for a in ("cw100", "dlr100") for b in ("off", "mean", "logits")]
    expected += [("attack", "pgd-sum", "sample"), ("attack", "arc", "sample")]
    expected += [("attack", "mora", b) for b in ("off", "mean")]
    expected += [("attack", "square", b) for b in ("sample", "mean")]
    expected += [("attack", "autoattack", b) for b in ("off", "sample", "mean")]
    assert [(row.kind, row.attack, row.attacker) for row in rows] == expected
    assert all((row.settings is None) == (row.attack in ("", "arc", "mora", "square", "autoattack")) for row in rows)


def test_a_network_is_attacked_by_output_and_if_random_by_eot() -> None:
    for draws, attackers in ((None, ["output"]), (4, ["output", "eot"])):
        rows = attack_rows(NetworkTarget(brightness, CLASSES, draws=draws), Plan(attacks=("fgsm", "square")))
        expected = [*(("fgsm", b) for b in attackers), ("square", "output")]
        assert [(row.attack, row.attacker) for row in rows[2:]] == expected


def test_attackers_and_curves_that_nobody_wants_are_left_out() -> None:
    target = MixtureTarget(trained_mixture(3), CLASSES)
    rows = attack_rows(target, Plan(attacks=("fgsm", "pgd"), attackers=("expert 3", "mean")))
    expected = [(a, b) for a in ("fgsm", "pgd") for b in ("mean", "expert 3")]
    assert [(row.attack, row.attacker) for row in rows[2:]] == expected
    curves = [("steps", "mean"), ("eps", "mean"), ("draws", "eot")]
    assert [(row.kind, row.attacker) for row in curve_rows(target, Plan())] == curves
    assert curve_rows(target, Plan(masking_images=0)) == []
    assert {row.attacker for row in curve_rows(NetworkTarget(brightness, CLASSES), Plan())} == {"output"}


def test_every_image_of_every_row_is_in_one_piece(whole: Evaluation) -> None:
    seen: dict[Row, list[int]] = {}
    for row, start, stop in whole.pieces():
        seen.setdefault(row, []).extend(range(start, stop))
    counts = {"clean": 23, "eps": 4, "steps": 4, "draws": 4}
    assert {row: sorted(images) for row, images in seen.items()} == {
        row: list(range(counts.get(row.kind, 7))) for row in seen
    }
    assert list(seen)[: len(whole.rows)] == whole.rows
    assert {row.kind for row in seen} == {"subset", "noise", "attack", "clean", "eps", "steps", "draws"}


# What is attacked, and how


class AttackedToTheEnd(NetworkTarget):
    def settling(self, name: str) -> Settling:
        return Settling(lambda images, labels: torch.zeros_like(labels, dtype=torch.bool))


def _mean(images: Tensor) -> Tensor:
    """The exact mean of the experts, from each of them alone."""
    return torch.stack([expert(images).softmax(-1) for expert in trained_mixture().unstack()]).mean(0).log()


@pytest.mark.parametrize("drop_fooled", [False, True])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ["fgsm", "bim", "mim", "pgd", "cw", "dlr"])
def test_an_attack_has_the_settings_of_its_name(tmp_path: Path, name: str, norm: Any, drop_fooled: bool) -> None:
    """The functions of `attacks`, on a float64 copy of what is attacked, to which no sign is a matter of rounding."""
    eps = 0.11 if norm == "Linf" else 1.3
    images, labels = colored().images[:5].double() / 255, colored().labels[:5]
    outputs = quadratic
    plan = replace(PLAN, attacks=(name,), attackers=None, norm=norm, eps=eps, drop_fooled=drop_fooled)
    evaluation = evaluation_of(tmp_path / "l", plan, AttackedToTheEnd(outputs, CLASSES))
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


def test_noise_is_random_in_the_ball_and_new_for_each_piece(tmp_path: Path) -> None:
    evaluation = evaluation_of(tmp_path / "l")
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

    class Looking(NetworkTarget):
        def judge(self, images: Tensor, labels: Tensor, generator: Any, **options: Any) -> Any:
            shown.append((images, labels))
            return super().judge(images, labels, generator, **options)

    plan = replace(PLAN, attacks=(), masking_images=0)
    evaluation = evaluation_of(tmp_path / "l", plan, Looking(brightness, CLASSES))
    run_to_end(evaluation)
    of = {"subset": [0, 2, 4], "clean": [6, 7, 8]}  # a chunk of the sample, its noise, the next one; then all images
    chosen = sample(colored(), 7)
    for kind, split in (("subset", chosen), ("clean", colored())):
        images, labels = (torch.cat([shown[i][part] for i in of[kind]]) for part in (0, 1))
        torch.testing.assert_close(images, split.images / 255, rtol=0, atol=1e-7)
        assert torch.equal(labels, split.labels)
    assert not torch.equal(chosen.labels, colored().labels[:7])


def test_what_is_written_is_what_experts_say_of_attacked_images(whole: Evaluation) -> None:
    chosen = sample(colored(), 7)
    images, labels = chosen.images / 255, chosen.labels
    attacked = {
        "subset": images,
        "fgsm": attacks.fgsm(_mean, images, labels, eps=0.09),
        "bim": attacks.bim(_mean, images, labels, eps=0.09, alpha=0.0225, steps=10),
    }
    model = trained_mixture()
    for row in whole.rows:
        if row.kind != "subset" and row.attacker != "mean":
            continue
        x = attacked[row.attack or row.kind]
        experts = torch.stack([expert(x).softmax(-1) for expert in model.unstack()])
        gate = model.gate.network((x - 0.4) / 0.25).softmax(-1)
        fixed = (gate.T[..., None] * experts).sum(0)
        turned = (gate.flip(-1).T[..., None] * experts).sum(0)
        right = {"mean": experts.mean(0), "off": fixed, "expert 1": experts[0], "expert 2": experts[1]}
        right = {name: (p.argmax(-1) == labels).tolist() for name, p in right.items()}
        right["worst"] = ((fixed.argmax(-1) == labels) & (turned.argmax(-1) == labels)).tolist()
        pieces = whole.results(row)
        for judge, expected in right.items():
            assert bits(pieces, judge) == expected, (row, judge)
        own = experts.mean(0)[range(7), labels].detach()
        if row.attack != "bim":  # which leaves an image that no judge is right about
            assert mean_loss(pieces) == pytest.approx(float(-own.log().mean()), rel=1e-3)
    assert 0 < sum(bits(pieces, "mean")) < 7


def test_heatmaps_are_measured_on_clean_and_on_attacked_images(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=("fgsm", "pgd"), attackers=("mean", "expert 1"), masking_images=0)
    evaluation = evaluation_of(tmp_path / "l", plan)
    run_to_end(evaluation)
    having = [
        (row.kind, row.attack, row.attacker)
        for (row, _, _), piece in numbers_of(evaluation).items()
        if "heatmaps" in piece
    ]
    assert having == [("subset", "", ""), ("attack", "pgd", "mean")] * 3
    clean = heatmap_metrics(trained_mixture(), LOSS, sample(colored(), 7), 7)
    assert results(evaluation)["heatmaps"]["clean"] == pytest.approx(clean, rel=1e-4)
    assert results(evaluation)["heatmaps"]["attacked"] != pytest.approx(clean, rel=1e-2)


def test_without_a_loss_there_are_no_heatmaps(tmp_path: Path) -> None:
    evaluation = evaluation_of(tmp_path / "l", replace(PLAN, attacks=(), masking_images=0), loss_fn=None)
    run_to_end(evaluation)
    assert "heatmaps" not in results(evaluation)


# Curves


def test_the_curve_of_steps_is_one_descent_looked_at_on_its_way(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=(), masking_images=3, curve_steps=(0, 1, 2, 6), curve_eps=(1,))
    evaluation = evaluation_of(tmp_path / "l", plan, NetworkTarget(quadratic, CLASSES))
    run_to_end(evaluation)
    points = results(evaluation)["curves"]["steps"]
    assert [point["steps"] for point in points] == [0, 1, 2, 6]
    assert len({point["loss"] for point in points}) == 4
    chosen, noise = sample(colored(), 3), []

    def remembered(attack: Any, *arguments: Any, start: Tensor | None = None, **others: Any) -> Tensor:
        if start is not None:
            noise.append(start)
        return original(attack, *arguments, start=start, **others)

    original = attacks.BoundAttack.__call__
    again = evaluation_of(tmp_path / "again", plan, NetworkTarget(quadratic, CLASSES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks.BoundAttack, "__call__", remembered)
        run_to_end(again)
    x, images = noise[0], chosen.images / 255
    for point, steps in zip(points, (0, 1, 1, 4), strict=True):
        for _ in range(steps):
            leaf = x.clone().requires_grad_()
            loss = F.cross_entropy(quadratic(leaf), chosen.labels, reduction="sum")
            x = x + 0.09 / 4 * torch.autograd.grad(loss, leaf)[0].sign()
            x = torch.minimum(torch.maximum(x, images - 0.09), images + 0.09).clamp(0, 1)
        expected = F.cross_entropy(quadratic(x), chosen.labels)
        assert point["loss"] == pytest.approx(float(expected), rel=1e-4)
        assert point["correct"] == int((quadratic(x).argmax(-1) == chosen.labels).sum())


def test_the_curve_of_eps_is_of_attacks_that_reach_its_end(tmp_path: Path) -> None:
    """Of a linear network the worst image of a ball is known: the label's colour darker, the others brighter."""
    factors = (0.5, 0.95, 1.05, 100)
    plan = replace(PLAN, attacks=(), eps=0.1, curve_eps=factors, curve_steps=(1,), masking_images=30, images=30)
    evaluation = evaluation_of(tmp_path / "l", plan, NetworkTarget(brightness, CLASSES), colored(30))
    run_to_end(evaluation)
    points = results(evaluation)["curves"]["eps"]
    assert [point["eps"] for point in points] == pytest.approx([0.05, 0.095, 0.105, 1])
    images, labels = colored(30).images.double() / 255, colored(30).labels
    for point in points:
        darkest = (images - point["eps"]).clamp(0, 1).mean((2, 3))
        brightest = (images + point["eps"]).clamp(0, 1).mean((2, 3))
        right = [
            all(darkest[q, label] > brightest[q, m] for m in range(3) if m != label)
            for q, label in enumerate(labels.tolist())
        ]
        check_share({name: point[name] for name in point if name != "loss"}, [int(r) for r in right])
    assert len({point["correct"] for point in points}) == 4


def test_a_radius_in_l2_may_exceed_1(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=(), norm="L2", eps=2, curve_eps=(0.5, 1, 10), curve_steps=(1,), masking_images=9)
    evaluation = evaluation_of(tmp_path / "l", plan, NetworkTarget(brightness, CLASSES))
    run_to_end(evaluation)
    points = results(evaluation)["curves"]["eps"]
    assert [(point["eps"], point["images"]) for point in points] == [(1, 7), (2, 7), (20, 7)], "no more than there are"
    assert points[-1]["accuracy"] == 0


# Chance


def _blurred(images: Tensor) -> Tensor:
    """A network that draws from PyTorch's global generator."""
    return brightness(images) + 3 * torch.randn(len(images), 1)


def test_a_random_network_repeats_itself_and_leaves_generators(tmp_path: Path) -> None:
    found, plan = [], replace(PLAN, attackers=None)
    for number in range(2):
        torch.manual_seed(number)
        state = torch.get_rng_state()
        evaluation = evaluation_of(tmp_path / str(number), plan, NetworkTarget(_blurred, CLASSES, draws=2))
        run_to_end(evaluation)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(numbers_of(evaluation))
    assert found[0] == found[1]
    assert any(row.attacker == "eot" for row, _, _ in found[0])


def test_pieces_of_other_rows_and_chunks_have_other_chances(tmp_path: Path) -> None:
    drawn: list[float] = []

    class Listening(NetworkTarget):
        def judge(self, images: Tensor, labels: Tensor, generator: torch.Generator, **options: Any) -> Any:
            drawn.append(float(torch.rand(1, generator=generator, dtype=torch.float64)))
            return super().judge(images, labels, generator, **options)

    plan = replace(PLAN, attackers=None, masking_images=0)
    run_to_end(evaluation_of(tmp_path / "l", plan, Listening(brightness, CLASSES)))
    run_to_end(evaluation_of(tmp_path / "l", replace(plan, seed=6), Listening(brightness, CLASSES)))
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
    model = copy.deepcopy(trained_mixture())
    model.gate.generator, model.gate.switch = torch.Generator().manual_seed(3), switch
    before = _states(model)
    plan = replace(SMALL, images=3, attackers=None)
    evaluation = evaluation_of(tmp_path / "l", plan, MixtureTarget(model, CLASSES, draws=2))
    run_to_end(evaluation)
    assert _states(model) == before
    # Its switch and generator are no part of what it is.
    numbers = numbers_of(whole)
    again = {place: piece for place, piece in numbers_of(evaluation).items() if place in numbers}
    assert len(again) == 11
    assert again.items() <= numbers.items()


@pytest.mark.parametrize("heatmaps", [False, True])
@pytest.mark.parametrize("switch", ["off", "call", "sample"])
@pytest.mark.parametrize("own", [False, True])
def test_generators_are_left_as_they_were(tmp_path: Path, heatmaps: bool, switch: Any, own: bool) -> None:
    model = copy.deepcopy(trained_mixture())
    model.gate.switch = switch
    generator = torch.Generator().manual_seed(3)
    model.gate.generator = generator if own else None
    before = [generator.get_state(), torch.get_rng_state()]
    plan = replace(SMALL, images=2, attackers=("sample", "eot", "off", "worst"), masking_images=0)
    run_to_end(
        evaluation_of(tmp_path / "l", plan, MixtureTarget(model, CLASSES, draws=2), loss_fn=LOSS if heatmaps else None)
    )
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


# What cannot be attacked


def _at(index: int) -> Callable[[Tensor], Tensor]:
    """(B, 1) bool: which images are the test split's of that index, or within 0.2 of it."""
    wanted = colored().images[index] / 255
    return lambda images: ((images - wanted).abs().amax((1, 2, 3)) < 0.2)[:, None]


def _nan_for(index: int) -> Callable[[Tensor], Tensor]:
    return lambda images: brightness(images).where(~_at(index)(images), torch.nan)


def _infinite_slope_for(index: int) -> Callable[[Tensor], Tensor]:
    """A finite output whose gradient is not: √0 in the branch that is not taken."""
    return lambda images: brightness(images) + (images[:, :1, 0, 0] * 0).where(_at(index)(images), 1).sqrt()


def _nan_when_moved(index: int) -> Callable[[Tensor], Tensor]:
    wanted = colored().images[index] / 255

    def network(images: Tensor) -> Tensor:
        moved = (images - wanted).abs().amax((1, 2, 3)) > 1e-6
        return brightness(images).where(~(moved[:, None] & _at(index)(images)), torch.nan)

    return network


@pytest.mark.parametrize("network", [_nan_for, _infinite_slope_for, _nan_when_moved])
@pytest.mark.parametrize("place", [0, 4, 6])
def test_nan_is_reported_with_its_image_s_number_in_the_split(
    tmp_path: Path, network: Callable[[int], Any], place: int
) -> None:
    index = int(evaluation_of(tmp_path / "l").order[place])
    evaluation = evaluation_of(tmp_path / "l", replace(PLAN, attackers=None), NetworkTarget(network(index), CLASSES))
    with pytest.raises(ValueError, match=rf"got NaN or infinite ones for test image {index}$"):
        run_to_end(evaluation)


def test_nan_of_an_image_that_is_not_attacked_is_reported_too(tmp_path: Path) -> None:
    order = evaluation_of(tmp_path / "l").order.tolist()
    index = next(i for i in range(10, 23) if i not in order)
    evaluation = evaluation_of(tmp_path / "l", replace(PLAN, attackers=None), NetworkTarget(_nan_for(index), CLASSES))
    with pytest.raises(ValueError, match=rf"got NaN or infinite ones for test image {index}$"):
        run_to_end(evaluation)


def test_nan_of_a_mixture_is_reported(tmp_path: Path) -> None:
    order = evaluation_of(tmp_path / "l").order.tolist()

    def logits(images: Tensor) -> Tensor:
        found = trained_mixture().expert_logits(images).clone()
        found[1, _at(order[5])(images)[:, 0]] = torch.nan
        return found

    evaluation = evaluation_of(
        tmp_path / "l", target=MixtureTarget(trained_mixture(), CLASSES, draws=3, expert_logits=logits)
    )
    with pytest.raises(ValueError, match=rf"got NaN or infinite ones for test image {order[5]}$"):
        run_to_end(evaluation)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda x: 0 * x.mean((2, 3)), "expected outputs that depend on the images"),
        (lambda x: brightness(x) * 0 + torch.tensor([1.0, 0, 0]), "expected outputs that depend on the images"),
        (lambda x: brightness(x).detach(), "expected outputs with a gradient"),
        (lambda x: torch.eye(3)[x.flatten(1).sum(1).long() % 3], "expected outputs with a gradient"),
        (lambda x: brightness(x)[:, :2], r"outputs \(B, 3\), as many as there are classes, got \(3, 2\)"),
        (lambda x: brightness(x).repeat(1, 2), r"outputs \(B, 3\), as many as there are classes, got \(3, 6\)"),
        (lambda x: {"scores": brightness(x)}, r"outputs \(B, 3\), as many as there are classes, got dict"),
        (lambda x: x, r"outputs \(B, 3\)"),
        (lambda x: brightness(x)[:1], "batch_size"),
    ],
)
def test_what_is_no_network_that_can_be_attacked_is_refused(
    tmp_path: Path, network: Callable[[Tensor], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_to_end(evaluation_of(tmp_path / "l", replace(PLAN, attackers=None), NetworkTarget(network, CLASSES)))


# Options


def test_dropping_the_fooled_never_helps_what_is_attacked(tmp_path: Path) -> None:
    correct = []
    for drop_fooled in (False, True):
        plan = replace(PLAN, attacks=("bim", "cw"), attackers=("mean", "worst", "expert 1"), masking_images=0)
        plan = replace(plan, images=8, chunk=8, eps=0.085, drop_fooled=drop_fooled)
        evaluation = evaluation_of(tmp_path / str(drop_fooled), plan, loss_fn=None)
        run_to_end(evaluation)
        entries = {(e["attack"], e["attacker"], e["judge"]): e["correct"] for e in results(evaluation)["accuracy"]}
        correct.append([entries[row.attack, row.attacker, row.attacker] for row in evaluation.rows if row.attacker])
    assert len(correct[0]) == 6
    assert 0 < sum(correct[0]) < 48
    assert all(dropped <= whole for whole, dropped in zip(*correct, strict=True))


@pytest.mark.parametrize("attacker", ["sample", "mean"])
def test_dropping_the_fooled_never_helps_a_gate_that_switches(tmp_path: Path, attacker: str) -> None:
    accuracies = []
    for drop_fooled in (False, True):
        plan = replace(PLAN, attacks=("bim",), attackers=(attacker,), masking_images=0, images=200, chunk=100)
        plan = replace(plan, eps=0.1, drop_fooled=drop_fooled)
        target = MixtureTarget(trained_mixture(3), CLASSES, draws=2)
        evaluation = evaluation_of(tmp_path / str(drop_fooled), plan, target, colored(200), loss_fn=None)
        run_to_end(evaluation)
        entries = [e for e in results(evaluation)["accuracy"] if e["attack"] == "bim"]
        accuracies.append({e["judge"]: e["accuracy"] for e in entries if e["judge"] in ("sample", "mean")})
    assert 0.02 < accuracies[0]["sample"] < 0.9
    assert all(accuracies[1][name] <= accuracies[0][name] + 0.02 for name in accuracies[0])


def test_a_random_network_of_unknown_mean_is_attacked_to_the_end(tmp_path: Path) -> None:
    """What a lucky draw would keep is not known to be worst."""
    found = []
    for drop_fooled in (False, True):
        plan = replace(PLAN, attacks=("bim",), attackers=None, masking_images=0, drop_fooled=drop_fooled)
        evaluation = evaluation_of(tmp_path / str(drop_fooled), plan, NetworkTarget(_blurred, CLASSES, draws=2))
        images, labels = colored().images[:5] / 255, colored().labels[:5]
        torch.manual_seed(0)
        found.append(evaluation.attacked(evaluation.rows[-2], images, labels, 3))
    assert torch.equal(*found)


def _written(folder: Path, plan: Plan, target: Any, **options: Any) -> dict[tuple[Row, str], list[bool]]:
    """Whom each judge gets right on each image of each row; and in how many passes over images."""
    evaluation = evaluation_of(folder, replace(plan, masking_images=0), target, colored(40), loss_fn=None, **options)
    run_to_end(evaluation)
    rows = [row for row in evaluation.rows if row.kind == "attack"]
    return {(row, judge): bits(evaluation.results(row), judge) for row in rows for judge in target.judges}


class MixtureAttackedToTheEnd(MixtureTarget):
    def settling(self, name: str) -> Settling:
        return Settling(lambda images, labels: torch.zeros_like(labels, dtype=torch.bool))


def test_leaving_whom_nobody_gets_right_changes_no_accuracy(tmp_path: Path) -> None:
    """Of small steps on smooth experts, who is fooled stays so; a permutation drawn for an image stays its own."""
    plan = replace(PLAN, attacks=("fgsm", "bim", "mim", "pgd"), attackers=None, images=12, chunk=12, eps=0.1)
    found, passes = [], []
    for kind in (MixtureAttackedToTheEnd, MixtureTarget):
        shown: list[int] = []

        def logits(images: Tensor, shown: list[int] = shown) -> Tensor:
            shown.append(len(images))
            return trained_mixture(3).expert_logits(images)

        target = kind(trained_mixture(3), CLASSES, draws=3, expert_logits=logits)
        found.append(_written(tmp_path / kind.__name__, plan, target))
        passes.append(sum(shown))
    assert passes[1] < 0.9 * passes[0]
    for place, right in found[1].items():
        assert all(before or not now for before, now in zip(found[0][place], right, strict=True)), place
        if not place[0].attacker.startswith("expert"):  # which may move another expert back to what is right
            assert right == found[0][place], place
    assert 0.05 < sum(map(sum, found[1].values())) / (12 * len(found[1])) < 0.95


@pytest.mark.parametrize("draws", [None, 2])
def test_a_network_that_draws_is_attacked_to_the_end(tmp_path: Path, draws: int | None) -> None:
    """Who happens to be wrong about an image may be right about it the next time; a switching gate draws, too."""
    switching = copy.deepcopy(trained_mixture())
    switching.gate.switch = "call"
    for number, network in enumerate((_blurred, lambda x: switching(x), brightness)):
        target = NetworkTarget(network, CLASSES, draws=draws)
        evaluation = evaluation_of(tmp_path / str(number), replace(PLAN, attackers=None, masking_images=0), target)
        assert target.repeats(colored().images[:16] / 255) == (network is brightness and draws is None)
        run_to_end(evaluation)
        shared = [row for row in evaluation.rows if evaluation._first(row, (0, 3), torch.zeros(1)) is not None]
        assert bool(shared) == (network is brightness and draws is None)


def test_a_first_gradient_is_shared_and_no_number_changes(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=("fgsm", "bim", "mim"), attackers=("off", "sample", "mean", "worst", "expert 2"))
    plan, found, passes = replace(plan, masking_images=0), [], []

    class Alone(Evaluation):
        def _first(self, *_: Any) -> None:
            return None

    for kind in (Evaluation, Alone):
        shown: list[int] = []

        def logits(images: Tensor, shown: list[int] = shown) -> Tensor:
            shown.append(len(images) if images.requires_grad else 0)
            return trained_mixture().expert_logits(images)

        target = MixtureTarget(trained_mixture(), CLASSES, draws=2, expert_logits=logits)
        evaluation = evaluation_of(tmp_path / kind.__name__, plan, target, kind=kind)
        run_to_end(evaluation)
        found.append(numbers_of(evaluation))
        passes.append(sum(shown))
    assert found[0] == found[1]
    assert passes[1] - passes[0] == 7 * 2 * 3, "of each image BIM's and MIM's first, of three attackers"


# Square Attack and AutoAttack


def test_square_and_autoattack_are_pieces_like_others(tmp_path: Path) -> None:
    plan = replace(PLAN, attacks=("square", "autoattack"), attackers=("off", "sample", "mean"), masking_images=0)
    plan = replace(plan, images=3, eps=0.12, queries=15)
    evaluation = evaluation_of(tmp_path / "l", plan, loss_fn=None)
    state = torch.get_rng_state()
    run_to_end(evaluation)
    assert torch.equal(torch.get_rng_state(), state)
    found = {(e["attack"], e["attacker"], e["judge"]): e["correct"] for e in results(evaluation)["accuracy"]}
    for attack, attacker in (("square", "mean"), ("autoattack", "mean"), ("autoattack", "off")):
        assert found[attack, attacker, attacker] <= found["subset", None, attacker]
    assert found["autoattack", "mean", "mean"] < found["subset", None, "mean"]
    plan = replace(plan, attacks=("autoattack",), attackers=("sample",))
    alone = evaluation_of(tmp_path / "alone", plan, loss_fn=None)
    run_to_end(alone)
    numbers = numbers_of(evaluation)
    assert all(piece == numbers[place] for place, piece in numbers_of(alone).items())


def test_autoattack_on_a_draw_passes_the_experts_once_a_step(tmp_path: Path) -> None:
    passes: list[int] = []

    def logits(images: Tensor) -> Tensor:
        passes.append(len(images))
        return trained_mixture(3).expert_logits(images)

    plan = replace(PLAN, attacks=("autoattack",), attackers=("sample",), images=3, eps=0.01, autoattack_steps=7)
    target = MixtureTarget(trained_mixture(3), CLASSES, expert_logits=logits)
    evaluation = evaluation_of(tmp_path / "l", plan, target, loss_fn=None)
    passes.clear()
    evaluation.attacked(evaluation.rows[-1], colored().images[:3] / 255, colored().labels[:3], 1)
    # For the images; and for each of two losses for the start, the steps, and to judge.
    assert len(passes) == 1 + 2 * (1 + 7 + 1)
