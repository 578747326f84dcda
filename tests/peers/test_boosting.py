"""Boosting: the loss, whose turn it is, what stays as it is, and whom the adversary attacks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.attacks import pgd
from immunity_fast.models.gate import gate_of
from immunity_fast.peers import MRBoostLoss
from immunity_fast.peers.sequence import NO_VOTE, vote_
from immunity_fast.training import Checkpoint, EarlyStopping, Trainer, loop
from immunity_fast.training.checkpoint import load_checkpoint
from immunity_fast.training.config import TrainConfig
from immunity_fast.training.loop import train
from immunity_fast.training.run_folder import Run
from immunity_fast.training.state import TrainingState
from immunity_fast.training.validation import validate
from tests.adversarial_cases import chain, noisy_images
from tests.small_runs import CPU, as_bytes, dataset, go_on, interrupted, options, saved, trained, write_data

LABELS = torch.tensor([0, 2, 1, 1, 0])
BASE: dict[str, Any] = {"experts": 3, "batch_size": 10, "epochs": 3, "check_images": 0, "arch": "resnet8"}


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_mce(logits: list[float], target: list[float]) -> float:
    """Σ_k (1 − t_k) / (K − 1) · −log softmax(−f)_k, by Python's floats."""
    total = sum(math.exp(-value) for value in logits)
    pairs = zip(logits, target, strict=True)
    return sum((1 - t) / (len(logits) - 1) * (value + math.log(total)) for value, t in pairs)


def small_model(*, listed: bool = False, gate: Any = "uniform") -> ImmunityMoE:
    """Three experts with BatchNorm; a list where their stages differ."""
    torch.manual_seed(0)
    stage = ("2", "1", "2") if listed else "2"
    experts = [chain() for _ in range(3)]
    return ImmunityMoE.from_experts(experts, stage=stage, gate=gate_of(gate, 3), batching="auto")


def tensors_of(model: ImmunityMoE, expert: int) -> dict[str, Any]:
    """One expert's parameters and buffers, as bits."""
    if isinstance(model.experts, nn.ModuleList):
        return {name: as_bytes(value) for name, value in model.experts[expert].state_dict().items()}
    return {name: as_bytes(value[expert]) for name, value in model.experts.state_dict().items()}


def run_of(**changes: Any) -> TrainingState:
    return TrainingState(TrainConfig(**{**BASE, "ensemble": "mrboost", **changes}), dataset(), CPU)


def epoch_of(state: TrainingState) -> None:
    """The steps of an epoch, without checks."""
    state.begin_epoch()
    state.model.train()
    for batch in state.loader:
        state.advance(batch)
    state.end_epoch()
    state.epoch += 1


@pytest.mark.parametrize("method", ["mrboost:warm_start=true", "barre"])
def test_members_that_cannot_begin_from_the_last_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"experts: expected experts of one architecture, .* experts 1 and 2 of other"):
        run_of(ensemble=method, arch="resnet8,resnet8x0.5,resnet8")
    run_of(ensemble="mrboost", arch="resnet8,resnet8x0.5,resnet8")


# The loss


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_loss_is_cross_entropy_and_weighted_mce(weight: float) -> None:
    logits = random_logits(5, 4)
    expected = 0.0
    for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True):
        entropy = math.log(sum(math.exp(value) for value in row)) - row[label]
        expected += entropy + weight * naive_mce(row, [float(k == label) for k in range(4)])
    found = MRBoostLoss(weight)(logits, LABELS)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected / 5, dtype=torch.float64), rtol=1e-12, atol=0)


def test_of_probabilities_a_class_is_wrong_by_the_rest() -> None:
    logits, targets = random_logits(5, 4), random_logits(5, 4, seed=1).softmax(-1)
    found = MRBoostLoss().margin_losses(logits, targets)
    expected = [naive_mce(row, target) for row, target in zip(logits.tolist(), targets.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_ignored_images_cost_nothing() -> None:
    logits, labels = random_logits(5, 4), torch.tensor([0, -100, 1, -100, 3])
    loss = MRBoostLoss()
    losses = loss.margin_losses(logits, labels)
    assert losses[[1, 3]].tolist() == [0, 0]
    kept = labels >= 0
    torch.testing.assert_close(losses[kept], loss.margin_losses(logits[kept], labels[kept]))
    torch.testing.assert_close(loss(logits, labels), loss(logits[kept], labels[kept]))


def test_the_gradient_of_the_loss_is_right() -> None:
    logits = random_logits(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: MRBoostLoss(0.7)(x, LABELS), logits)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_a_weight_out_of_range_is_an_error(weight: float) -> None:
    with pytest.raises(ValueError, match="weight: expected a finite number of at least 0"):
        MRBoostLoss(weight)


# Whose turn it is


@pytest.mark.parametrize("listed", [False, True])
def test_only_the_member_whose_turn_it_is_runs(listed: bool) -> None:
    model, loss = small_model(listed=listed), MRBoostLoss()
    assert isinstance(model.experts, nn.ModuleList) == listed
    assert loss.begin_epoch(model, 1, 3, 0)
    before = [tensors_of(model, index) for index in range(3)]
    model.train()
    images = noisy_images(dtype=torch.float32)
    value, terms = loss.loss_and_terms(model, images, LABELS)
    value.backward()
    after = [tensors_of(model, index) for index in range(3)]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]  # BatchNorm's statistics
    torch.testing.assert_close(value, terms[0] + terms[1])
    gradients = [
        any(bool((p.grad if listed else p.grad[index]).any()) for p in parameters if p.grad is not None)
        for index in range(3)
        for parameters in [list((model.experts[index] if listed else model.experts).parameters())]
    ]
    assert gradients == [False, True, False]


def test_the_adversary_attacks_the_mean_logits_so_far() -> None:
    model, loss = small_model().double(), MRBoostLoss()
    loss.begin_epoch(model, 3, 6, 0)
    model.eval()
    images = noisy_images()
    alone = model.unstack()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = pgd(loss.attacked(model), images, LABELS, eps=0.05, alpha=0.05, steps=1, random_start=False)
    moved = images.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip((alone[0].eval()(moved) + alone[1].eval()(moved)) / 2, LABELS, strict=True):
        total = total - row.log_softmax(-1)[label]
    slope = torch.autograd.grad(total, moved)[0]
    expected = (images + 0.05 * slope.sign()).clamp(0, 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_members_not_yet_trained_have_no_vote() -> None:
    model, loss = small_model().eval(), MRBoostLoss()
    images = noisy_images(dtype=torch.float32)
    for stage in range(3):
        loss.begin_epoch(model, stage, 3, 0)
        loss.begin_stage(model, stage, 3, 0)
        with torch.no_grad():
            mean = model.expert_logits(images)[: stage + 1].softmax(-1).mean(0).log()
            torch.testing.assert_close(model(images), mean)
            torch.testing.assert_close(model.deterministic()(images), mean)


@pytest.mark.parametrize("gate", ["uniform", "selection"])
def test_a_validation_asks_who_has_a_vote(gate: Any) -> None:
    state = run_of(gate=gate, adversarial="fgsm-rs", check_images=6)
    state.epoch = 1
    state.begin_epoch()
    with torch.no_grad():  # who is not trained yet has the loudest answer
        list(state.model.experts.parameters())[-1][2] += torch.tensor([0.0, 0.0, 1e3])
    found = validate(state)
    split = state.dataset.validation
    images = split.read(torch.arange(len(split))).float() / 255
    state.model.eval()
    with torch.no_grad():
        answers = state.model.expert_logits(images)[:2].softmax(-1).mean(0).argmax(-1)
    assert found["val_accuracy_mean"] == pytest.approx(float((answers == split.labels).double().mean()))
    assert "val_not_measured" not in found
    assert bool((answers != 2).any())


@pytest.mark.parametrize("kind", ["uniform", "selection"])
def test_votes_are_given_to_gates_of_fixed_weights(kind: Any) -> None:
    gate = gate_of(kind, 4)
    vote_(gate, [0.5, 0.125, 0.375, 0.0])
    with gate.switched("off"):
        weights = gate(torch.rand(2, 3, 5, 5))
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.125, 0.375, 0.0]] * 2))
    assert (weights[:, 3] == 0).all()
    assert all(bool(value.isfinite().all()) for value in gate.state_dict().values())
    assert kind == "selection" or gate.state_dict()["network.logits"][3] == NO_VOTE
    with pytest.raises(ValueError, match="weights: expected 4"):
        vote_(gate, [1.0])


def test_learned_gates_cannot_be_given_votes() -> None:
    with pytest.raises(ValueError, match="gate: expected fixed weights or a selection"):
        vote_(gate_of("switch", 2), [0.5, 0.5])


# What stays as it is


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "weight_decay": 0.05},
        {"optimizer": "adamw", "weight_decay": 0.5, "ema": 0.5},
        {"optimizer": "sgd", "ema": 0.9, "adversarial": "n-fgsm", "ensemble": "mrboost:warm_start=true"},
        {"optimizer": "adam", "stage": "layer1,layer2,layer1", "arch": "resnet8,resnet8,resnet8"},
    ],
    ids=["sgd", "adamw-ema", "warm-ema-adversarial", "list"],
)
def test_frozen_members_stay_bit_for_bit(changes: dict[str, Any]) -> None:
    state = run_of(**changes)
    before = [tensors_of(state.model, index) for index in range(3)]
    for stage in range(3):
        epoch_of(state)
        ends = before if stage == 2 else [tensors_of(state.model, index) for index in range(3)]
        for other in range(stage + 1, 3):
            assert ends[other] == before[other]
        if stage == 0:
            first = tensors_of(state.model, 0)
            assert first != before[0]
    finished = tensors_of(state.model, 0)
    if "ema" not in changes:
        assert finished == first
        return
    assert state.average is not None  # whose first member is the same, and was handed over
    average = state.average.tensors()
    for name, bits in finished.items():
        assert as_bytes(average[f"experts.{name}"][0]) == bits


def test_a_warm_start_begins_where_the_last_member_ended() -> None:
    model, loss = small_model(), MRBoostLoss(warm_start=True)
    loss.begin_epoch(model, 1, 3, 0)
    loss.begin_stage(model, 1, 3, 0)
    assert tensors_of(model, 1) == tensors_of(model, 0) != tensors_of(model, 2)
    loss.after_update(model)
    assert tensors_of(model, 1) == tensors_of(model, 0)


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "ensemble": "mrboost:warm_start=true", "optimizer": "adamw"}])
def test_a_run_that_is_interrupted_ends_the_same(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    settings = {"ensemble": "mrboost", "arch": "resnet8", "adversarial": "fgsm-rs", "checkpoint_every": 1} | changes
    arguments = options(data, **settings)  # 5 steps a stage
    trained([*arguments, "--out", str(tmp_path / "whole")])
    folder = tmp_path / "run"
    for stop in (3, 6):  # in the first stage's middle and in the second's
        interrupted((TrainingState, "advance"), stop, go_on(folder, arguments))
    trained(go_on(folder, arguments))
    assert saved(folder) == saved(tmp_path / "whole")


def test_the_best_model_is_of_the_last_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ("val_accuracy_mean", "val_accuracy_sample")
    values = iter([0.9, 0.8, 0.3, 0.5, 0.2, 0.4])
    monkeypatch.setattr(loop, "validate", lambda state: dict.fromkeys(measured, next(values)))
    config = TrainConfig(**{**BASE, "experts": 2, "epochs": 6, "ensemble": "mrboost", "monitor": "val_accuracy_mean"})
    run = Run.create(tmp_path / "run", config)
    train(TrainingState(config, dataset(), CPU), run)
    info = load_checkpoint(run.best_checkpoint)[1]
    assert (info["epoch"], info["monitored"]) == (4, {"val_accuracy_mean": 0.5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 1}, "--experts: expected at least 2, which are trained one after another, got 1"),
        ({"epochs": 4}, "--epochs: expected a multiple of 3"),
        ({"gate": "switch"}, "--gate: expected auto, uniform or selection"),
        ({"early_stopping": 3}, "--early-stopping: expected none"),
        ({"warmup_epochs": 2.0}, "--warmup-epochs: expected 0 to 1, the epochs of each part"),
        ({"checkpoint_activations": True}, "--checkpoint-activations: expected none"),
        ({"adversarial": "pgd", "attack_batchnorm": "train"}, "--attack-batchnorm: expected eval"),
        ({"adversarial": "pgd", "adversary": "each"}, "--adversary: expected mixture"),
        ({"ensemble": "mrboost:weight=-1"}, "--ensemble: mrboost: weight: expected a finite number of at least 0"),
        ({"ensemble": "mrboost:warm=true"}, "--ensemble: expected mrboost with weight=…, warm_start=…, got warm=true"),
    ],
)
def test_settings_that_do_not_go_together_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{**BASE, "ensemble": "mrboost", **changes})


def test_a_pass_costs_one_member_and_attacks_on_half_of_them() -> None:
    # N epochs, one a member: N for learning, and 1 + 2 + … + N for each step of the attack.
    assert 5 * MRBoostLoss().passes(5, 10) == 5 + 10 * (1 + 2 + 3 + 4 + 5)
    assert MRBoostLoss().passes(5, 0) == 1


@pytest.mark.exhaustive  # a compiler takes seconds to be imported
def test_compiled_code_knows_whose_turn_it_is() -> None:
    model, loss = small_model().eval(), MRBoostLoss()
    images = noisy_images(dtype=torch.float32)
    ways = (loss.attacked(model), lambda x: loss.loss_and_terms(model, x, LABELS)[0])
    for plain in ways:
        compiled = torch.compile(plain, fullgraph=True, dynamic=False, backend="eager")
        found = []
        for stage in range(3):
            loss.begin_epoch(model, stage, 3, 0)
            with torch.no_grad():
                found.append(compiled(images))
                torch.testing.assert_close(found[-1], plain(images))
        assert not torch.allclose(found[0], found[1])


def test_callbacks_look_at_the_last_stage_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = ("val_accuracy_mean", "val_accuracy_sample")
    values = iter([0.9, 0.8, 0.3, 0.5])
    monkeypatch.setattr(loop, "validate", lambda state: dict.fromkeys(measured, next(values)))
    config = TrainConfig(**{**BASE, "experts": 2, "epochs": 4, "ensemble": "mrboost"})
    kept = Checkpoint(tmp_path / "kept", monitor="val_accuracy_mean", best=3)
    stopping = EarlyStopping("val_accuracy_mean", patience=1)
    trainer = Trainer(config, dataset(), callbacks=[kept, stopping])
    assert len(trainer.fit()) == 4
    assert [path.name[:10] for path in kept.paths] == ["epoch-0004", "epoch-0003"]
    assert stopping.best_epoch == 4


def test_beginning_again_with_smaller_batches_is_that_run() -> None:
    state = run_of(ensemble="mrboost:warm_start=true", weight_decay=0.05, ema=0.9)
    kept = state.untouched()
    state.begin_epoch()
    state.model.train()
    for batch, _ in zip(state.loader, range(2), strict=False):
        state.advance(batch)
    other = run_of(ensemble="mrboost:warm_start=true", weight_decay=0.05, ema=0.9, batch_size=5, accumulate=2)
    state.begin_again(other.config, kept)
    for _ in range(2):
        for each in (state, other):
            epoch_of(each)
    assert {n: as_bytes(v) for n, v in state.model.state_dict().items()} == {
        n: as_bytes(v) for n, v in other.model.state_dict().items()
    }


@pytest.mark.parametrize("gate", ["uniform", "selection"])
def test_votes_of_an_earlier_run_are_not_begun_with(gate: str, data: Path, tmp_path: Path) -> None:
    folder, settings = tmp_path / "first", {"arch": "resnet8", "gate": gate}
    arguments = options(data, **settings, ensemble="mrboost", checkpoint_every=1)
    interrupted((TrainingState, "advance"), 3, go_on(folder, arguments))  # where the second member has no vote
    assert load_checkpoint(Run(folder).checkpoint)[1]["epoch"] == 0
    arguments = options(data, **settings, ensemble="plain", epochs=1, weights=Run(folder).checkpoint)
    state, _ = trained([*arguments, "--out", str(tmp_path / "second")])
    weights = state.model.gate.fixed_weights(torch.float64)
    assert weights is not None
    assert weights.tolist() == [0.5, 0.5]
