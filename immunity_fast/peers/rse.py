"""Random self-ensembles, RSE (arXiv 1712.00673): one network that is many, by noise before every convolution."""

from __future__ import annotations

from immunity_fast.models.noise import check_noise
from immunity_fast.peers.plain import PlainLoss
from immunity_fast.targets import IGNORE_INDEX, ClassWeights


class RSELoss(PlainLoss):
    """CE: the cross-entropy of one noisy pass.

    The noise is the model's, not the loss's: `ImmunityMoE` and `SingleNetwork` take it as `noise=loss.noise`. The
    authors' code for CIFAR-10 has deviations of 0.4 and 0.1, a later repository of theirs 0.2 and 0.1.

    Args:
        first: standard deviation of the noise before the first convolution, in units of the normalised images.
        inner: before each of the others.
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.

    Attributes:
        noise: both deviations.

    Raises:
        ValueError: a negative or infinite deviation.
    """

    def __init__(
        self,
        first: float = 0.2,
        inner: float = 0.1,
        *,
        label_smoothing: float = 0.0,
        class_weights: ClassWeights = None,
        ignore_index: int | None = IGNORE_INDEX,
        group_name: str = "",
    ) -> None:
        super().__init__(
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            ignore_index=ignore_index,
            group_name=group_name,
        )
        self.noise = check_noise((first, inner))
