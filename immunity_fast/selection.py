"""Gates whose weights are the same for all images: their exact mean, and what holds whichever expert is drawn.

Of a mixture that answers by one expert at random, drawn with fixed probabilities, everything is known without a draw.
Shapes: N experts, B images, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from immunity_fast.functional import log_mixture
from immunity_fast.runtime.precision import accumulation_dtype, at_least_float32


def fixed_weights(gate: Any, like: Tensor) -> Tensor | None:
    """The weights (N,) by which a gate mixes on average, where they are the same for all images; else None.

    Args:
        gate: a `RandomSwitchGate`; or any other, which is taken for one that permutes its weights.
        like: whose dtype the weights have, float32 at least.
    """
    found = getattr(gate, "fixed_weights", None)
    weights: Tensor | None = None if found is None else found(accumulation_dtype(like))
    return weights


def mean_mixture(gate: Any, logits: Tensor) -> Tensor:
    """A mixture's exact mean over all that its gate may draw, as log-probabilities (B, K).

    It is by 1/N each over all N! permutations, and by a gate's own weights where these are fixed: their average, or the
    expectation of one expert that is drawn.

    Args:
        gate: the mixture's.
        logits: (N, B, K) of the experts.
    """
    return log_mixture(logits, fixed_weights(gate, logits))


def mean_logits(gate: Any, logits: Tensor) -> Tensor:
    """The experts' logits, averaged as `mean_mixture` averages their probabilities: (B, K), float32 at least.

    Args:
        gate, logits: as of `mean_mixture`.
    """
    weights = fixed_weights(gate, logits)
    if weights is None:
        return at_least_float32(logits).mean(0)
    shares = weights[:, None, None]
    return torch.where(shares > 0, shares * at_least_float32(logits), 0).sum(0)


def selects(gate: Any) -> bool:
    """Whether a gate draws one expert with fixed probabilities, as a `SelectionGate` does."""
    return bool(getattr(gate, "selects", False))


def is_random(gate: Any) -> bool:
    """Whether a gate ever draws: all do but those of fixed weights that mix; of what does not say, it is assumed."""
    return bool(getattr(gate, "is_random", True))


def shares_selected(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """With which probability the expert that is drawn answers rightly: (B,) float64, exact for any N.

    Args:
        logits: (N, B, K) of the experts.
        weights: (B, N) probabilities, each row summing to 1.
        labels: (B,) integers in 0..K−1.
    """
    right = labels[:, None] == logits.argmax(-1).T
    share = torch.where(right, weights.double(), 0).sum(-1) / weights.double().sum(-1)
    # Sums are rounded: that all are right, or none, is not to depend on it.
    share = torch.where((right | (weights == 0)).all(-1), 1, share)
    return torch.where((right & (weights > 0)).any(-1), share, 0)


def all_right(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: images that every expert gets right that may be drawn. Arguments as of `shares_selected`."""
    return ((labels[:, None] == logits.argmax(-1).T) | (weights == 0)).all(-1)


def always_fooled_by_one(logits: Tensor, weights: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """(B,) bool: images that fool every expert that may be drawn; with targets: that each takes for the target.

    Args:
        logits, weights, labels: as of `shares_selected`.
        targets: (B,), or None.
    """
    wanted = labels if targets is None else targets
    said = wanted[:, None] == logits.argmax(-1).T
    return ((said if targets is not None else ~said) | (weights == 0)).all(-1)


def worst_selected(logits: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """Of each image the expert, of those that may be drawn, that is worst: whose margin of a wrong class is largest.

    Args:
        logits, weights, labels: as of `shares_selected`.

    Returns:
        (B, N), 1 of that expert and 0 of the others.
    """
    margins = _margins(logits.detach(), labels).masked_fill(weights == 0, -torch.inf)
    return torch.nn.functional.one_hot(margins.argmax(-1), len(logits)).to(weights.dtype)


def nobody_right_alone(logits: Tensor, weights: Tensor, labels: Tensor, slack: float = 0.0) -> Tensor:
    """(B,) bool: images that neither any expert alone gets right nor all together, mixed by fixed weights.

    Args:
        logits, labels: as of `shares_selected`.
        weights: (B, N).
        slack: by how much the probability of another class has to be larger than the label's, each time.
    """
    mixed = log_mixture(logits, weights)[None]
    return (_margins(logits, labels) > slack).all(-1) & (_margins(mixed, labels)[:, 0] > slack)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, N): by how much the likeliest wrong class' probability is larger than the label's."""
    probabilities = logits.softmax(-1, dtype=accumulation_dtype(logits))
    own = labels.expand(len(logits), -1)[..., None]
    others = probabilities.scatter(-1, own, -torch.inf).amax(-1)
    return (others - probabilities.gather(-1, own)[..., 0]).T
