"""What an attack maximises, for each image: cross-entropy, and two margins that do not saturate where it does.

Each takes outputs (…, K), logits or log-probabilities, labels (…,), and targets: the class to reach, or None where any
wrong one will do. It gives (…,); the attack has succeeded where a margin is positive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.runtime.precision import at_least_float32

Loss = Literal["ce", "dlr", "cw"]
OwnLoss = Callable[[Tensor, Tensor], Tensor]  # outputs (B, K) and labels (B,) to (B,)


def cross_entropy(outputs: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Cross-entropy of the label, −log p_label; with targets log p_target, minus the target's."""
    log_probabilities = F.log_softmax(outputs, -1)
    return -_at(log_probabilities, labels) if targets is None else _at(log_probabilities, targets)


def cw_margin(outputs: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """max_{m≠label} z_m − z_label; z_target − max_{m≠target} z_m (Carlini & Wagner, arXiv 1608.04644, κ = 0)."""
    if targets is None:
        return _best_other(outputs, labels) - _at(outputs, labels)
    return _at(outputs, targets) - _best_other(outputs, targets)


def dlr(outputs: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """Difference of logits ratio (Croce & Hein, arXiv 2003.01690, eq. 6 and 7): free of the logits' scale.

    Without targets (max_{m≠label} z_m − z_label) / (z_(1) − z_(3)), z_(i) being the i-th largest; with targets
    (z_target − z_label) / (z_(1) − (z_(3) + z_(4)) / 2).

    Raises:
        ValueError: fewer than 3 classes, or 4 with targets: the ratio's denominator is then 0.
    """
    needed = 3 if targets is None else 4
    if outputs.shape[-1] < needed:
        raise ValueError(f"loss: expected at least {needed} classes for dlr, got {outputs.shape[-1]}; take cw")
    top = outputs.topk(needed, -1).values
    if targets is None:
        return cw_margin(outputs, labels, None) / (top[..., 0] - top[..., 2] + 1e-12)
    spread = top[..., 0] - (top[..., 2] + top[..., 3]) / 2
    return (_at(outputs, targets) - _at(outputs, labels)) / (spread + 1e-12)


def loss_of(loss: Loss | OwnLoss, outputs: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
    """A loss, by its name or one's own, computed in float32 at least: in float16, 1e-12 is 0.

    Args:
        loss: of `LOSSES`; or a function of outputs (B, K) and labels (B,) to (B,), which is given each draw. With
            targets it is given these in the labels' place, and its negative is the loss.
        outputs: (draws, B, K) logits or log-probabilities.
        labels: (draws, B) integers in 0..K−1.
        targets: (draws, B) classes to reach; None is any but the label.

    Returns:
        (draws, B).

    Raises:
        ValueError: one's own gives another shape.
    """
    outputs = at_least_float32(outputs)
    if not callable(loss):
        return LOSSES[loss](outputs, labels, targets)
    classes = labels if targets is None else targets
    found = torch.stack([_own(loss, *draw) for draw in zip(outputs, classes, strict=True)])
    return found if targets is None else -found


def _own(loss: OwnLoss, outputs: Tensor, classes: Tensor) -> Tensor:
    found = loss(outputs, classes)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != tuple(classes.shape):
        raise ValueError(f"loss: expected one of each image, ({len(classes)},), got {shape}; take reduction='none'")
    return found


LOSSES: dict[Loss, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "ce": cross_entropy,
    "dlr": dlr,
    "cw": cw_margin,
}


def _at(outputs: Tensor, classes: Tensor) -> Tensor:
    return outputs.gather(-1, classes[..., None])[..., 0]


def _best_other(outputs: Tensor, classes: Tensor) -> Tensor:
    # Not F.one_hot: on torch 2.11 it reads its classes' values under torch.compile, and nothing is compiled.
    own = classes[..., None] == torch.arange(outputs.shape[-1], device=classes.device)
    return outputs.masked_fill(own, -float("inf")).amax(-1)
