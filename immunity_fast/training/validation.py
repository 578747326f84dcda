"""What is measured after an epoch: the training's own means, and accuracies and heatmaps on the validation split."""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from immunity_fast.attacks import Attack
from immunity_fast.attacks.checks import check_finite, not_finite
from immunity_fast.data.datasets import AnySplit, Split
from immunity_fast.data.sampling import EVALUATION_BATCH, batches, sample
from immunity_fast.evaluation.metrics import correct, heatmap_metrics
from immunity_fast.runtime.failures import one_line
from immunity_fast.runtime.modes import frozen
from immunity_fast.selection import mean_mixture
from immunity_fast.training.state import TrainingState


def training_means(state: TrainingState) -> dict[str, float]:
    """Means over the finished epoch's batches of what `train_step` measures, and the mutual information they mean."""
    means = dict(zip(state.train_step.measured, (state.sums / len(state.loader)).tolist(), strict=True))
    experts = state.config.experts
    if state.method is not None:
        return means
    return means | {"mutual_information": math.log(experts) - means["mutual_information_loss"] / experts}


def validate(state: TrainingState, split: AnySplit | None = None) -> dict[str, Any]:
    """Accuracies and heatmap measures on the validation split; attacks are on the exact mean and judged on it.

    Of the averaged weights, where there are such. A check that cannot be made, of a network that has died, say, ends
    no training: what it measures is left out, and `val_not_measured` names it and the reason. `val_doubts` has what was
    warned of in one that can.

    Args:
        state: what is trained.
        split: what is looked at, on its device; None is the validation split. Of no images nothing is measured.
    """
    split = state.dataset.validation if split is None else split
    gate, epoch = state.model.gate, state.epoch
    drawn_from = gate.generator
    # Not what a training step may draw from: how much is checked changes no training.
    gate.generator = torch.Generator().manual_seed(state.config.seed + epoch)
    try:
        with state.average.applied() if state.average else nullcontext():
            return _validate(state, split)
    finally:
        gate.generator = drawn_from


def _validate(state: TrainingState, split: AnySplit) -> dict[str, Any]:
    state.model.eval()
    measured: dict[str, Any] = {}
    missing: dict[str, str] = {}
    doubts: dict[str, str] = {}
    for name, measure in _checks(state, split).items():
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                found = measure()
            wrong = [key for key, value in found.items() if not math.isfinite(value)]
            if wrong:
                raise ValueError(f"{', '.join(wrong)}: expected finite numbers, got NaN or infinite ones")
            measured |= found
            # Of an attack that cannot move, which a person has to know of who reads how much withstands it.
            said = [" ".join(str(each.message).split()) for each in caught if issubclass(each.category, UserWarning)]
            if said:
                doubts[name] = "; ".join(dict.fromkeys(said))
        except Exception as error:  # hours of training are worth more than any check
            missing[name] = one_line(error)
    state.model.train()
    notes = {"val_not_measured": missing, "val_doubts": doubts}
    return measured | {name: note for name, note in notes.items() if note}


def _checks(state: TrainingState, split: AnySplit) -> dict[str, Callable[[], dict[str, float]]]:
    """What is measured after an epoch, in order, each independent of whether the others can be."""
    config = state.config
    if not len(split):
        return {}
    # Read by the first check that needs them: an image that cannot be read costs that check alone.
    checked = cache(lambda: sample(split, config.check_images))
    checks: dict[str, Callable[[], dict[str, float]]] = {"accuracy": lambda: _accuracies(state, split)}
    if config.check_images:
        starts = torch.Generator().manual_seed(config.seed)
        attacks = {"pgd10": Attack(config.eps, config.eps / 4, steps=10, random_start=True)}
        if config.adversarial != "off":  # against both, the collapse of single-step training shows
            attacks["fgsm"] = Attack(config.eps, config.eps, steps=1)
        for name, attack in attacks.items():
            checks[name] = partial(_attacked_accuracy, state, name, attack, checked, starts)
        if state.model.num_experts > 1:
            checks["heatmaps"] = lambda: _heatmaps(state, checked())
    return checks


def _accuracies(state: TrainingState, validation: AnySplit) -> dict[str, float]:
    def expert_logits(images: Tensor) -> Tensor:
        logits = state.expert_logits(images)
        check_finite(not_finite(logits))  # the largest of such numbers would pass for an answer
        return logits

    right = [
        correct(state.model, images, labels, expert_logits) for images, labels in batches(validation, EVALUATION_BATCH)
    ]
    return {
        "val_accuracy_sample": sum(count["sample"] for count in right) / len(validation),
        "val_accuracy_mean": sum(count["mean"] for count in right) / len(validation),
    }


def _attacked_accuracy(
    state: TrainingState, name: str, attack: Attack, images_of: Callable[[], Split], starts: torch.Generator
) -> dict[str, float]:
    model, survived, checked = state.model, 0, images_of()

    def mean_of_gate(images: Tensor) -> Tensor:
        return mean_mixture(model.gate, state.expert_logits(images))

    for images, labels in batches(checked, EVALUATION_BATCH):
        with frozen(model):
            attacked = attack(mean_of_gate, images, labels, generator=starts)
        survived += correct(model, attacked, labels, state.expert_logits)["mean"]
    return {f"val_{name}_accuracy_mean": survived / len(checked)}


def _heatmaps(state: TrainingState, checked: Split) -> dict[str, float]:
    heatmaps = heatmap_metrics(state.model, state.loss_fn, checked, EVALUATION_BATCH)
    return {f"val_{name}": value for name, value in heatmaps.items()}
