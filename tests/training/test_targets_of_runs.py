"""Runs on mixed, smoothed, weighted, soft and missing labels: what a step makes of them, and that a run goes on."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

from immunity_fast import FusedImmunityLoss, ImmunityMoE, train
from immunity_fast.data.datasets import Split, load
from immunity_fast.data.mixing import apply_mixing
from immunity_fast.functional import mixture_cross_entropy, mixture_log_probabilities
from immunity_fast.training.adversarial import InnerAttack, InnerAttackSettings, divergence
from immunity_fast.training.state import TrainingState
from immunity_fast.training.step import TrainStep
from immunity_fast.training.trainer import Trainer
from tests.small_runs import (
    CONFIG,
    CPU,
    arrays,
    dataset,
    error_line,
    interrupted,
    options,
    saved,
    split,
    trained,
    write_data,
)

IMAGES = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 0, -100, 2])
KNOWN = LABELS.clamp_min(0)
SOFT = torch.rand(6, 3, generator=torch.Generator().manual_seed(2)).softmax(-1)
MIXING = torch.tensor([0.3, 0, 12, 0, 12, 0.3])


def _model() -> ImmunityMoE:
    torch.manual_seed(0)
    return ImmunityMoE("resnet8", 2, 3, image_size=12, switch="off").eval()


def _loss(**options: Any) -> FusedImmunityLoss:
    return FusedImmunityLoss(0.5, 0.7, 1e-3, 12, **options)


def test_a_step_mixes_and_then_learns() -> None:
    """What is measured is the loss of the mixed batch, its label that is missing and the one mixed with it left out."""
    options: dict[str, Any] = {"label_smoothing": 0.1, "class_weights": [1.0, 2.0, 0.5]}
    model = _model()
    measured = TrainStep(model, _loss(**options), SGD(model.parameters(), 0.0))(IMAGES, LABELS, None, MIXING)
    images = 0.3 * IMAGES + 0.7 * IMAGES.roll(1, 0)
    known = F.one_hot(KNOWN, 3).float()
    targets = 0.3 * known + 0.7 * known.roll(1, 0)
    kept = [0, 1, 2, 3]
    logits, maps, gate = _model().expert_outputs(images[kept])
    loss, terms = _loss(**options)(logits, maps, targets[kept], gate, return_terms=True)
    torch.testing.assert_close(measured.float(), torch.stack([loss, *terms]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["pgd", "fgsm-rs"])
def test_an_inner_attack_follows_soft_targets(method: Any) -> None:
    """One step from the image along the sign of the gradient of −Σ_k t_k log ŷ_k."""
    model = _model()
    attack = InnerAttack(model, InnerAttackSettings(method, eps=0.05, alpha=0.01, steps=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("immunity_fast.attacks.descent.random_start", lambda images, *_: images)
        found = attack(IMAGES, SOFT)
        hard, one_hot = attack(IMAGES, KNOWN), attack(IMAGES, F.one_hot(KNOWN, 3).float())
    x = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-(SOFT * model(x)).sum(), x)
    step = 0.01 if method == "pgd" else 1.25 * 0.05
    expected = (IMAGES + step * gradient.sign()).clamp(0, 1).clamp(IMAGES - 0.05, IMAGES + 0.05)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(one_hot, hard)
    assert not torch.equal(found, hard)


def test_trades_takes_soft_and_weighted_targets() -> None:
    """Cross-entropy of the clean images by the loss's options, λ times the divergence, and no word on the ignored."""
    options: dict[str, Any] = {"label_smoothing": 0.1, "class_weights": torch.tensor([1.0, 2.0, 0.5])}
    for targets in (LABELS, torch.where(LABELS[:, None] < 0, -100.0, SOFT)):
        model = _model()
        attack = InnerAttack(model, InnerAttackSettings("trades", steps=2))
        step = TrainStep(model, _loss(**options), SGD(model.parameters(), 0.0), attack=attack, trades_weight=3.0)
        torch.manual_seed(4)
        measured = step(IMAGES, targets)
        kept = [0, 1, 2, 3, 5]
        torch.manual_seed(4)
        adversarial = attack(IMAGES, targets)[kept]
        clean = (model.expert_logits(IMAGES[kept]), model.gate_weights(IMAGES[kept]))
        attacked = (model.expert_logits(adversarial), model.gate_weights(adversarial))
        losses = mixture_cross_entropy(*clean, targets[kept], 0.5, **options)
        weight = options["class_weights"][targets[kept]].sum() if targets.dim() == 1 else torch.tensor(5.0)
        drift = divergence(mixture_log_probabilities(*clean), mixture_log_probabilities(*attacked))
        own = divergence(*(logits.log_softmax(-1) for logits in (clean[0], attacked[0]))).sum(0)
        expected = losses.sum() / weight + 3.0 * (drift + 0.5 * own).mean()
        assert float(measured[1]) == pytest.approx(expected.item(), rel=1e-5)


def test_a_mixed_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data.npz", train_labels=_with_missing(arrays()["train_labels"]))
    settings: dict[str, Any] = {
        "mixup": 0.4,
        "cutmix": 1,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
        "ignore_index": 255,
        "checkpoint_every": 1,
        "epochs": 1,
    }
    trained([*options(data, **settings), "--out", str(tmp_path / "whole")])
    interrupted((TrainingState, "advance"), 4, [*options(data, **settings), "--out", str(tmp_path / "killed")])
    trained(["--resume", str(tmp_path / "killed")])
    whole = saved(tmp_path / "whole")
    assert "random/mixing" in whole["tensors"]
    assert saved(tmp_path / "killed") == whole


def _with_missing(labels: Any) -> Any:
    return np.where(np.arange(len(labels)) % 7 == 3, 255, labels).astype(np.uint8)


def test_balanced_weights_are_those_of_the_training_labels() -> None:
    labels = torch.tensor([0] * 12 + [1] * 6 + [2] * 2)
    images = dataset(train=Split(split(20).images, labels))
    found = []
    for given in ("balanced", [20 / 36, 20 / 18, 20 / 6]):
        config = dataclasses.replace(CONFIG, class_weights=given)  # type: ignore[arg-type]
        found.append(TrainingState(config, images, CPU).loss_fn.class_weights)
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="--class-weights: expected 3, one for each class, or balanced, got 2, 1,2"):
        TrainingState(dataclasses.replace(CONFIG, class_weights="1,2"), images, CPU)


def test_validation_and_test_are_of_images_with_one_class() -> None:
    missing = split(10, seed=1)
    missing.labels[[0, 3, 4]] = -1
    soft = Split(missing.images, F.one_hot(missing.labels.clamp_min(0), 3).float())
    state = TrainingState(dataclasses.replace(CONFIG, ignore_index=-1), dataset(validation=missing, test=soft), CPU)
    kept = [1, 2, 5, 6, 7, 8, 9]
    assert torch.equal(state.dataset.validation.images, missing.images[kept])
    assert torch.equal(state.dataset.validation.labels, missing.labels[kept])
    assert torch.equal(state.dataset.test.labels, missing.labels.clamp_min(0))
    missing.labels[:] = -1
    with pytest.raises(ValueError, match="validation: expected images with labels, got 10 of -1 alone"):
        dataset(validation=missing).labelled(-1)


def test_probabilities_in_a_file_are_trained_on(tmp_path: Path) -> None:
    """Those of one class are what its label is; without a validation split they are judged by the likeliest."""
    made = arrays()
    one_hot = np.eye(3, dtype=np.float32)[made["train_labels"]]
    found = []
    for labels in (made["train_labels"], one_hot):
        images = load("npz", write_data(tmp_path / "data.npz", train_labels=labels))
        assert images.train.labels.dim() == labels.ndim
        state = TrainingState(CONFIG, images, CPU)
        found.append(state.advance(next(iter(state.loader))))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    without = {name: value for name, value in (made | {"train_labels": one_hot}).items() if "val" not in name}
    np.savez(tmp_path / "without.npz", **without)
    assert load("npz", tmp_path / "without.npz").validation.labels.dtype == torch.int64


WRONG: list[tuple[str, Any, dict[str, Any], str]] = [
    ("no distribution", np.full((40, 3), 0.5), {}, "train_labels: expected probabilities that sum to 1"),
    (
        "negative",
        np.tile([1.5, -0.5, 0.0], (40, 1)),
        {},
        r"train_labels: expected probabilities of at least 0, got -0\.5",
    ),
    (
        "fractions",
        np.full(40, 0.5),
        {},
        r"train_labels: expected integers, or probabilities \(n, K\), got dtype float64",
    ),
    ("another number of classes", np.full((40, 2), 0.5), {}, "val_labels: expected values 0 to 1 for 2 classes"),
    ("missing labels", np.arange(40) % 4 - 1, {}, "train_labels: expected values 0 to 2 for 3 classes, got from -1"),
    ("too few weights", np.arange(40) % 3, {"class_weights": "1,2"}, "--class-weights: expected 3, .*got 2, 1,2"),
    ("no label at all", np.full(40, 9), {"ignore_index": 9}, "expected at least 2 classes"),
]


@pytest.mark.parametrize(("labels", "settings", "text"), [pytest.param(*c[1:], id=c[0]) for c in WRONG])
def test_wrong_labels_are_one_line(
    labels: Any, settings: dict[str, Any], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data.npz", train_labels=labels)
    line = error_line(capsys, train.main, [*options(data, **settings), "--out", str(tmp_path / "run")])
    assert re.search(text, line), line


def test_mixing_is_one_graph_for_all_draws() -> None:
    torch.compiler.reset()
    compiled = torch.compile(apply_mixing, fullgraph=True, backend="aot_eager")
    for mixing in (MIXING, torch.tensor([0.0, 2, 9, 0, 4, 0.75])):
        pairs = zip(
            compiled(IMAGES, LABELS, mixing, 3, -100), apply_mixing(IMAGES, LABELS, mixing, 3, -100), strict=True
        )
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("soft", [False, True])
def test_a_trainer_takes_them_from_tensors(soft: bool) -> None:
    """Without a validation split, and labels that are missing."""
    images, targets = IMAGES, torch.where(LABELS[:, None] < 0, -100.0, SOFT) if soft else LABELS
    settings: dict[str, Any] = {"mixup": 0.4, "ignore_index": -100, "class_weights": [1.0, 2.0, 0.5]}
    trainer = Trainer(dataclasses.replace(CONFIG, batch_size=6, **settings), (images, targets), classes=3, device="cpu")
    (record,) = trainer.fit()
    assert np.isfinite(record["loss"])
    assert trainer.state is not None
    assert trainer.state.loss_fn.class_weights.tolist() == [1, 2, 0.5]  # type: ignore[union-attr]
