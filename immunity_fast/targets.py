"""Targets as people have them: labels or probabilities, smoothed, weighted by class, some of them ignored.

The conventions are those of `torch.nn.functional.cross_entropy`. Shapes: N experts, B samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from immunity_fast.arguments import check_targets
from immunity_fast.kernels.group import group_mean
from immunity_fast.runtime.checks import is_number, is_whole, kind_given

IGNORE_INDEX = -100  # PyTorch's
SUM_TOLERANCE = 0.01  # of a row's sum: half precision's rounding, and no more

ClassWeights = Tensor | Sequence[float] | None


@dataclass(frozen=True)
class TargetOptions:
    """How targets enter a cross-entropy.

    Args:
        label_smoothing: ε in [0, 1]: the target becomes (1 − ε)·t + ε/K.
        class_weights: (K,), ≥ 0; see `checked_class_weights`.
        ignore_index: the label of samples that count for nothing, or the value of all probabilities of theirs; None:
            every sample counts.

    Raises:
        ValueError: an option out of its range.
        TypeError: one of another type.
    """

    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    ignore_index: int | None = IGNORE_INDEX

    def __post_init__(self) -> None:
        check_label_smoothing(self.label_smoothing)
        check_ignore_index(self.ignore_index)


@dataclass(frozen=True)
class Targets:
    """The targets of a batch, once they are checked.

    Args:
        values: (B,) int64 labels in 0..K−1, or (B, K) probabilities, of at least float32; 0 of a sample that is
            ignored.
        counted: (B,) bool, False of samples that are ignored; None: all count.
    """

    values: Tensor
    counted: Tensor | None

    @property
    def soft(self) -> bool:
        """Whether they are probabilities."""
        return self.values.dim() == 2

    def masked(self, values: Tensor) -> Tensor:
        """One number of each sample, (…, B), with 0 in the place of those that are ignored."""
        return values if self.counted is None else torch.where(self.counted, values, 0)

    def samples(self, group_name: str = "") -> Tensor | int:
        """How many samples count, at least 1: what means are taken over.

        Args:
            group_name: of a process group, over whose processes the mean of that number is taken; see `group_mean`.
        """
        if self.counted is None:
            return max(len(self.values), 1)
        return _at_least_one(_group_mean(self.counted.sum(dtype=torch.float32), group_name))

    def weights(self, options: TargetOptions) -> Tensor | None:
        """Each sample's weight, its label's, (B,), 0 of ignored ones; None: all weigh 1, as with probabilities."""
        if self.soft or options.class_weights is None:
            return None
        return self.masked(options.class_weights.to(self.values.device)[self.values])

    def per_weight(self, options: TargetOptions, dtype: torch.dtype, group_name: str = "") -> Tensor | None:
        """How many samples count for each unit of their weights: PyTorch's mean of weighted losses is that of the
        losses times it. None: 1.

        Args:
            options: with the weights.
            dtype: of the result.
            group_name: see `samples`.
        """
        weights = self.weights(options)
        if weights is None:
            return None
        weights = weights.to(dtype)
        count = weights.new_full((), len(weights)) if self.counted is None else self.counted.sum(dtype=dtype)
        found = _group_mean(torch.stack([count, weights.sum()]), group_name)
        return torch.where(found[1] > 0, found[0] / torch.where(found[1] > 0, found[1], 1), 0)

    def coefficients(self, options: TargetOptions, classes: int, dtype: torch.dtype) -> Tensor:
        """c of the loss −Σ_k c_k log ŷ_k, (B, K): the smoothed target, times the weights of the classes.

        Args:
            options: smoothing and weights.
            classes: K.
            dtype: of the result.
        """
        if self.soft:
            target = self.values.to(dtype)
        else:
            target = (self.values[:, None] == torch.arange(classes, device=self.values.device)).to(dtype)
        if options.label_smoothing > 0:
            target = target * (1 - options.label_smoothing) + options.label_smoothing / classes
        if options.class_weights is not None:
            target = target * options.class_weights.to(target)
        return target if self.counted is None else torch.where(self.counted[:, None], target, 0)


def read_targets(
    targets: Tensor, samples: int, classes: int, options: TargetOptions, *, group_name: str = "", name: str = "targets"
) -> Targets:
    """Targets (B,) or (B, K) of a batch, once type, shape and (on a CPU, where looking is free) values are right.

    Args:
        targets: integer labels, or floating-point probabilities.
        samples: B.
        classes: K.
        options: `ignore_index`, and weights, whose number is checked.
        group_name: of processes that work together: then none can know that no sample of any is ignored.
        name: for messages.

    Raises:
        ValueError: another shape, a label that is no class, a row that is no distribution, weights of another number.
        TypeError: neither integers nor (B, K) floating-point numbers.
    """
    weights = options.class_weights
    if weights is not None and len(weights) != classes:
        raise ValueError(f"class_weights: expected {classes}, one for each class, got {len(weights)}")
    if not isinstance(targets, Tensor) or not targets.is_floating_point() or targets.dim() != 2:
        return _read_labels(targets, samples, classes, options.ignore_index, group_name, name)
    if targets.shape != (samples, classes):
        raise ValueError(
            f"{name}: expected labels of shape ({samples},) or probabilities of shape ({samples}, {classes}), got "
            f"shape {tuple(targets.shape)}"
        )
    targets = targets.to(torch.promote_types(targets.dtype, torch.float32))
    counted = None
    if options.ignore_index is not None:
        counted = _unless_all((targets != options.ignore_index).any(-1), group_name)
        if counted is not None:
            targets = torch.where(counted[:, None], targets, 0)
    check_probabilities(targets, counted, name)
    return Targets(targets, counted)


def _read_labels(
    targets: Tensor, samples: int, classes: int, ignore_index: int | None, group_name: str, name: str
) -> Targets:
    whole = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.dtype != torch.bool
    if ignore_index is None or not whole:
        return Targets(check_targets(targets, samples, classes, name), None)
    targets = targets.long()  # an ignore_index of -100 is no int8 or uint8
    counted = _unless_all(targets != ignore_index, group_name)
    if counted is not None:
        targets = torch.where(counted, targets, 0)
    return Targets(check_targets(targets, samples, classes, name), counted)


def _unless_all(counted: Tensor, group_name: str) -> Tensor | None:
    """Which samples count; None where a look is free and shows that all do."""
    return None if not group_name and _may_look(counted) and bool(counted.all()) else counted


def _may_look(tensor: Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def check_probabilities(targets: Tensor, counted: Tensor | None, name: str) -> None:
    """Check that rows are distributions, where a look at them is free.

    Args:
        targets: (B, K).
        counted: (B,), which rows are looked at; None is all.
        name: what errors call them.

    Raises:
        ValueError: one is negative, or does not sum to 1.
    """
    if not _may_look(targets) or not targets.numel():
        return
    rows = targets.detach() if counted is None else targets.detach()[counted]
    if not len(rows):
        return
    smallest = float(rows.min())
    if not smallest >= 0:  # NaN too
        raise ValueError(f"{name}: expected probabilities of at least 0, got {smallest:.4g}")
    sums = rows.sum(-1)
    furthest = float(sums[(sums - 1).abs().argmax()])
    if not abs(furthest - 1) <= SUM_TOLERANCE:
        raise ValueError(f"{name}: expected probabilities that sum to 1 over the classes, got a sum of {furthest:.4g}")


def _group_mean(value: Tensor, group_name: str) -> Tensor:
    return group_mean(value, group_name) if group_name else value


def _at_least_one(count: Tensor) -> Tensor:
    return torch.where(count > 0, count, 1)


def check_label_smoothing(value: Any) -> None:
    """Check that it is a number in [0, 1].

    Raises:
        ValueError: a number outside.
        TypeError: no number.
    """
    if not is_number(value) or isinstance(value, bool):
        raise TypeError(f"label_smoothing: expected a number in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"label_smoothing: expected a number in [0, 1], got {value}")


def check_ignore_index(value: Any) -> None:
    """Check that it is a whole number, or None.

    Raises:
        TypeError: something else.
    """
    if value is not None and (not is_whole(value) or isinstance(value, bool)):
        raise TypeError(f"ignore_index: expected a whole number or None, got {value!r}")


def checked_class_weights(weights: ClassWeights) -> Tensor | None:
    """Class weights as a floating-point tensor (K,), of a tensor or of numbers; None is None.

    Raises:
        ValueError: another shape, or (on a CPU) weights that are negative or not finite.
        TypeError: no numbers.
    """
    if weights is None:
        return None
    given: Any = weights
    if not isinstance(given, Tensor):
        try:
            given = torch.tensor([float(weight) for weight in given])
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"class_weights: expected a tensor (K,) or a list of numbers, got {kind_given(weights)}"
            ) from error
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"class_weights: expected a floating-point tensor (K,), got {given.dtype}")
    if given.dim() != 1 or not len(given):
        raise ValueError(f"class_weights: expected shape (K,), one for each class, got shape {tuple(given.shape)}")
    kept: Tensor = given.detach() if given.is_floating_point() else given.float()
    if _may_look(kept):
        for index, weight in enumerate(kept.tolist()):
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"class_weights: expected finite numbers of at least 0, got {weight:.4g} for class {index}"
                )
    return kept


def balanced_weights(labels: Tensor, classes: int, ignore_index: int | None = None) -> Tensor:
    """Class weights n / (K'·n_k), as scikit-learn's "balanced", with which each class weighs the same.

    Args:
        labels: (n,) integers, or (n, K) probabilities, whose sums are then n_k.
        classes: K.
        ignore_index: of samples that are left out.

    Returns:
        (K,) float32. K' is the number of classes that there are samples of; another has weight 0.
    """
    found = read_targets(labels, len(labels), classes, TargetOptions(ignore_index=ignore_index))
    if found.soft:
        counts = found.values.double().sum(0)
    else:
        kept = found.values if found.counted is None else found.values[found.counted]
        counts = torch.bincount(kept, minlength=classes).double()
    there = counts > 0
    weights = counts.sum() / (there.sum().clamp_min(1) * torch.where(there, counts, 1))
    return torch.where(there, weights, 0).float()


def hard_labels(targets: Tensor) -> Tensor:
    """(B,) labels: those given, or the likeliest of probabilities (B, K)."""
    return targets.argmax(-1) if targets.dim() == 2 else targets
