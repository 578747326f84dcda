"""What is measured on a trained mixture: accuracies, mutual information, IScore, CScore, dead heatmaps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from immunity_fast.attacks.mixtures import trained_gate
from immunity_fast.data.datasets import AnySplit
from immunity_fast.data.sampling import batches
from immunity_fast.evaluation.gate_attackers import answered_rightly, averaged_rightly, selected_rightly
from immunity_fast.functional import label_scores
from immunity_fast.kernels import reference
from immunity_fast.losses import FusedImmunityLoss
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.runtime.precision import at_least_float32
from immunity_fast.selection import is_random, selects


def correct(
    model: ImmunityMoE, images: Tensor, labels: Tensor, expert_logits: Callable[[Tensor], Tensor] | None = None
) -> dict[str, int]:
    """How many of the images the model gets right, by the gate's sample and by its exact mean; see `answered_rightly`.

    Of a gate that draws nothing both are the same.

    Args:
        model: in evaluation mode. Its switch does not matter.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) integers in 0..K−1.
        expert_logits: what computes the model's, if compiled code is to; None is `model.expert_logits`.

    Returns:
        0..B under "sample" and "mean". The sample is drawn from the gate's generator.
    """
    with torch.no_grad():
        logits = (expert_logits or model.expert_logits)(images)
        weights = trained_gate(model, images)
        if not is_random(model.gate):
            mean = averaged_rightly(logits, weights, labels)["mean"]
            right = {"sample": mean, "mean": mean}
        else:
            judged = selected_rightly if selects(model.gate) else answered_rightly
            right = judged(logits, weights, labels, model.gate.generator)
    return {name: int(right[name].sum()) for name in ("sample", "mean")}


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927); for 0 trials (0, 1)."""
    if trials == 0:
        return 0.0, 1.0
    z = 1.959964
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def expert_maps(model: ImmunityMoE, loss: FusedImmunityLoss, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where each expert looks, as a loss sees it.

    Args:
        model: whose mode stays as it is.
        loss: its options of heatmaps are taken.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) the classes that the heatmaps are for.

    Returns:
        (Grad-CAM heatmaps, their distributions), both (N, B, H, W) and detached.
    """
    with torch.enable_grad():
        # Of the images, too: the model's own tensors may be frozen. A switching gate would draw.
        with model.gate.switched("mean"):
            logits, activations, _ = model.expert_outputs(images.detach().requires_grad_(), detach_weights=True)
        parts = [activations] if isinstance(activations, Tensor) else list(activations)
        gradients = torch.autograd.grad(label_scores(logits, labels, loss.score), parts)
    stacked = isinstance(activations, Tensor)
    heatmaps, distributions = [], []
    # One part of all experts, or one an expert, whose C, h and w are its own.
    for part, slopes in zip(parts, gradients, strict=True):
        maps, slopes = (at_least_float32(each if stacked else each[None]) for each in (part.detach(), slopes))
        weights = reference.channel_weights(slopes, loss.weight_scale)
        heatmaps.append(reference.heatmaps(reference.score_maps(maps, weights), loss.size))
        distributions.append(reference.distributions(maps, weights, loss.size, loss.smoothing))
    return torch.cat(heatmaps), torch.cat(distributions)


@dataclass
class HeatmapSums:
    """What `heatmap_metrics` needs of B images, so that parts can be measured apart.

    Attributes:
        information: Σ over images of the mutual information of expert and position, in nats.
        dead: Σ over images of the share of experts whose heatmap is zero everywhere.
        iscore: Σ over images of IScore.
        centres: (N, B, 2) of the heatmaps' distributions, in pixels.
    """

    information: float
    dead: float
    iscore: float
    centres: Tensor

    def to_json(self) -> dict[str, Any]:
        """Its values as a JSON object."""
        return asdict(self) | {"centres": self.centres.tolist()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HeatmapSums:
        """The sums that `to_json` has made an object of."""
        return cls(**{**values, "centres": torch.tensor(values["centres"], dtype=torch.float64)})


def heatmap_sums(model: ImmunityMoE, loss: FusedImmunityLoss, images: Tensor, labels: Tensor) -> HeatmapSums:
    """The sums of a batch, in the mode the model is in.

    Args:
        model: of N ≥ 2 experts.
        loss: see `expert_maps`.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true classes.
    """
    experts = model.num_experts
    heatmaps, p = expert_maps(model, loss, images, labels)
    peaks = heatmaps.amax((-2, -1), keepdim=True)
    scaled = heatmaps / torch.where(peaks > 0, peaks, 1)
    # Σ_ij Σ_ab (h_i − h_j)² = 2N Σ_i Σ_ab h_i² − 2 Σ_ab (Σ_i h_i)²: no N×N heatmaps
    spread = 2 * experts * scaled.square().sum() - 2 * scaled.sum(0).square().sum()
    return HeatmapSums(
        information=float((math.log(experts) - reference.mutual_information_loss(p) / experts).sum()),
        dead=float((peaks == 0).sum()) / experts,
        iscore=float(spread) / (experts * (experts - 1)),
        centres=reference.centres(p).double().cpu(),
    )


def combined(parts: Sequence[HeatmapSums]) -> dict[str, float]:
    """The measures of heatmaps over all images of some parts (section 4 of arXiv 2402.18787):

    * mutual_information: of expert and position, log N − MI/N, in nats, mean over images;
    * dead_heatmaps: share of heatmaps that are zero everywhere;
    * iscore: mean over images of 1/(N(N−1)) Σ_ij Σ_ab (h_i − h_j)², heatmaps scaled to a maximum of 1;
    * cscore: Σ_{i≠j} Σ_q (d²_qij − mean_q d²_qij)² over the number of images, in pixels⁴.
    """
    centres = torch.cat([part.centres for part in parts], 1)
    count = max(centres.shape[1], 1)
    return {
        "mutual_information": sum(part.information for part in parts) / count,
        "dead_heatmaps": sum(part.dead for part in parts) / count,
        "iscore": sum(part.iscore for part in parts) / count,
        "cscore": float(reference.position_stability(centres)) / count,
    }


def heatmap_metrics(model: ImmunityMoE, loss: FusedImmunityLoss, split: AnySplit, batch_size: int) -> dict[str, float]:
    """What `combined` measures, over a split, for its true labels, in the mode the model is in.

    Args:
        model: of N ≥ 2 experts.
        loss: see `expert_maps`.
        split: of images.
        batch_size: images at once.
    """
    return combined([heatmap_sums(model, loss, *batch) for batch in batches(split, batch_size)])
