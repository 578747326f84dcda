"""BARRE: selection probabilities, what they are chosen by, and how they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast import ImmunityMoE, load
from immunity_fast.attacks import arc
from immunity_fast.models.gate import SelectionGate
from immunity_fast.peers import BARRELoss, boosting
from immunity_fast.peers.sequence import vote_
from immunity_fast.peers.simplex import least_error, project_to_simplex
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.state import TrainingState
from tests.adversarial_cases import chain, noisy_images
from tests.small_runs import CPU, arrays, dataset, go_on, interrupted, options, saved, trained, write_data

LABELS = torch.tensor([0, 2, 1, 1, 0])


def small_model(experts: int = 4) -> ImmunityMoE:
    torch.manual_seed(0)
    return ImmunityMoE.from_experts([chain() for _ in range(experts)], stage="2", gate=SelectionGate(experts))


# The simplex


@pytest.mark.parametrize("seed", range(6))
def test_the_projection_is_the_nearest_point_of_the_simplex(seed: int) -> None:
    count = 1 + seed
    point = 2 * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = project_to_simplex(point)
    nearest, distance = torch.zeros(0), torch.inf
    for subset in range(1, 2**count):  # of each face the foot of the perpendicular, where it lies inside
        face = torch.tensor([bool(subset >> index & 1) for index in range(count)])
        foot = torch.where(face, point + (1 - point[face].sum()) / face.sum(), 0)
        if bool((foot >= 0).all()) and float((foot - point).norm()) < distance:
            nearest, distance = foot, float((foot - point).norm())
    torch.testing.assert_close(found, nearest, rtol=0, atol=1e-12)
    assert float(found.sum()) == pytest.approx(1, abs=1e-15)


def test_probabilities_are_their_own_projection() -> None:
    given = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    assert torch.equal(project_to_simplex(given), given)


def test_what_is_no_point_is_no_projection() -> None:
    for point in (torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"point: expected shape \(N,\)"):
            project_to_simplex(point)


def test_the_least_error_of_a_game_is_found() -> None:
    # Who attacks chooses among three images, each of which fools some members: the least is 1/2, by (1/2, 1/2, 0).
    fooled = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    start = torch.full((3,), 1 / 3, dtype=torch.float64)
    found = least_error(lambda p: fooled[(fooled @ p).argmax()], start, 200, 0.5)
    assert float((fooled @ found).max()) == pytest.approx(0.5, abs=0.01)


def test_the_last_of_equally_good_probabilities_counts() -> None:
    start = torch.tensor([0.5, 0.5], dtype=torch.float64)
    asked: list[Tensor] = []

    def errors(shares: Tensor) -> Tensor:
        asked.append(shares)
        return torch.tensor([1.0, 0.0]) if len(asked) == 1 else torch.tensor([0.5, 0.5]).double()

    found = least_error(lambda p: errors(p).double(), start, 3, 0.2)
    # p − 0.2 · (1, 0) = (0.3, 0.5), whose projection is (0.4, 0.6); equal errors move nothing.
    torch.testing.assert_close(found, torch.tensor([0.4, 0.6], dtype=torch.float64))
    assert found is asked[-1]


# Members


def test_the_adversary_attacks_the_selected_mixture() -> None:
    model, loss = small_model().double().eval(), BARRELoss()
    loss.begin_epoch(model, 2, 4, 0)
    vote_(model.gate, [0.5, 0.2, 0.3, 0.0])
    images = noisy_images()
    with torch.no_grad():
        own = [network.eval()(images).softmax(-1) for network in model.unstack()]
        expected = (0.5 * own[0] + 0.2 * own[1] + 0.3 * own[2]).log()
        torch.testing.assert_close(loss.attacked(model)(images), expected, rtol=0, atol=1e-7)


def test_each_member_begins_from_the_one_before_it() -> None:
    model, loss = small_model(), BARRELoss()
    for stage in range(1, 4):
        loss.begin_epoch(model, stage, 4, 0)
        loss.begin_stage(model, stage, 4, 0)
        for value in model.experts.state_dict().values():
            assert torch.equal(value[stage], value[stage - 1])
        assert model.gate.probabilities.tolist() == pytest.approx([1 / (stage + 1)] * (stage + 1) + [0] * (3 - stage))


@pytest.mark.parametrize(
    ("length", "chosen"),
    [(100, [59, 69, 79, 89, 99]), (30, [17, 20, 23, 26, 29]), (7, [3, 4, 5, 6]), (1, [0])],
)
def test_probabilities_are_chosen_in_the_second_half(length: int, chosen: list[int]) -> None:
    loss, experts = BARRELoss(), 5
    found = [epoch for epoch in range(experts * length) if loss.chooses(epoch, experts * length, experts)]
    assert found == [member * length + within for member in (3, 4) for within in chosen]


def test_probabilities_are_chosen_by_what_arc_breaks() -> None:
    model, loss = small_model().eval(), BARRELoss(images=5, updates=2, rate=0.3)
    images = noisy_images(dtype=torch.float32)
    loss.begin_epoch(model, 3, 4, 0)
    found = loss.end_epoch(model, lambda count: (images[:count], LABELS[:count]), 3, 4, 7, 0.05)
    # By hand: ARC on the members as networks of their own, and one step.
    networks = [network.eval() for network in model.unstack()]
    generator, tried, errors = torch.Generator().manual_seed(7 + 3), torch.full((4,), 0.25, dtype=torch.float64), []
    points = [tried]
    for step in range(2):
        moved = arc(networks, images, LABELS, weights=points[-1], eps=0.05, steps=10, classes=2, generator=generator)
        with torch.no_grad():
            wrong = torch.stack([(network(moved).argmax(-1) != LABELS).double().mean() for network in networks])
        errors.append(float(wrong @ points[-1]))
        points.append(project_to_simplex(points[-1] - 0.3 / (step + 1) * wrong))
    best = points[1] if errors[1] <= errors[0] else points[0]
    assert found == pytest.approx(best.tolist(), abs=1e-12)
    assert len(set(best.tolist())) > 1 or errors[1] > errors[0]


def test_nothing_is_chosen_for_three_members() -> None:
    model, loss = small_model().eval(), BARRELoss()
    loss.begin_epoch(model, 2, 4, 0)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        raise AssertionError(count)

    assert loss.end_epoch(model, examples, 2, 4, 0, 0.05) is None


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz", **arrays(train=8))


@pytest.mark.parametrize("changes", [{}, {"ema": 0.5, "gate": "uniform"}])
def test_chosen_probabilities_are_kept_and_loaded(
    changes: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = torch.tensor([0.7, 0.3, 0.0, 0.0], dtype=torch.float64)
    monkeypatch.setattr(boosting, "least_error", lambda errors, start, updates, rate: (start + other) / 2)
    settings: dict[str, Any] = {"ensemble": "barre:images=4", "arch": "resnet8", "experts": 4, "epochs": 12}
    settings |= {"adversarial": "fgsm-rs", "checkpoint_every": 1, "check_images": 0}
    arguments = options(data, **settings | changes)  # a step an epoch, and two choices for the last member
    state, _ = trained([*arguments, "--out", str(tmp_path / "whole")])
    shares = state.model.gate.fixed_weights(torch.float64)
    assert shares is not None
    expected = [0.25 / 4 + 0.75 * 0.7, 0.25 / 4 + 0.75 * 0.3, 0.25 / 4, 0.25 / 4]
    assert shares.tolist() == pytest.approx(expected)
    if state.average is not None:
        assert torch.equal(state.average.tensors()["gate.network.logits"], state.model.gate.network.logits)
    folder = tmp_path / "run"
    interrupted((TrainingState, "advance"), 12, go_on(folder, arguments))
    trained(go_on(folder, arguments))
    assert saved(folder) == saved(tmp_path / "whole")
    again = load(folder, checkpoint="last").gate.fixed_weights(torch.float64)
    assert again is not None
    assert torch.equal(again, shares)


@pytest.mark.parametrize("text", ["images=0", "updates=0", "rate=-1", "weight=nan"])
def test_settings_out_of_range_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match=f"--ensemble: barre: {text.partition('=')[0]}: expected"):
        TrainConfig(experts=4, epochs=4, ensemble=f"barre:{text}")


def test_the_run_looks_at_training_images_unchanged() -> None:
    config = TrainConfig(experts=4, epochs=4, batch_size=10, check_images=0, arch="resnet8", ensemble="barre")
    state = TrainingState(config, dataset(), CPU)
    images, labels = state._examples(7)
    own = state.dataset.train
    assert images.shape == (7, 3, 12, 12)
    for image, label in zip(images, labels, strict=True):
        matches = [(own.images[i].float() / 255 - image).abs().max() < 1e-6 for i in range(len(own))]
        assert sum(map(bool, matches)) == 1
        assert int(own.labels[matches.index(True)]) == int(label)
    assert torch.equal(state._examples(7)[0], images)
    assert len(state._examples(1000)[0]) == len(own)
