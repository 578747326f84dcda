"""Adaptive diversity promoting: experts that are to disagree about the classes that an image does not show."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.arguments import Experts, join_experts
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.peers.base import EnsembleLoss
from immunity_fast.runtime.checks import check_weight
from immunity_fast.runtime.precision import at_least_float32
from immunity_fast.targets import IGNORE_INDEX, ClassWeights, TargetOptions, hard_labels, read_targets

SMALLEST = 1e-6  # that is added to the Gram matrix's diagonal


class ADPLoss(EnsembleLoss):
    """Σ_i CE_i − α·H(p̄) − β·log det(MᵀM + 10⁻⁶·I), the mean over images: ADP (Pang et al., arXiv 1901.08846).

    H is the entropy of the mean p̄ of the experts' probabilities, in nats. Column i of M, (K − 1, N), is what expert i
    gives to the wrong classes, of unit length: the determinant is the squared volume that these columns span. They are
    taken from the softmax over the wrong classes, whose direction is the same and which does not vanish where the right
    class takes all; the determinant is computed in float64. Of probabilities as targets, the likeliest class counts as
    the right one here.

    In adversarial training the clean images are trained on beside the adversarial ones, as many of each.

    It is a defence against transferred attacks: its authors attack it in 10 steps, and longer attacks leave
    little of it, as MORA (arXiv 2211.08008) does; see `benchmarks/results/mixtures_cpu.json`.

    Args:
        alpha: of the entropy; 2 as in the paper (the authors' script has 1).
        beta: of the volume's logarithm.
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.

    `measured` are the loss, the mean of the experts' cross-entropies, and α·H + β·log det, which grows with diversity:
    the loss is N times the one, less the other.

    Raises:
        ValueError: a setting that is negative or not finite; of a batch, more experts than K − 1.
    """

    measured = ("loss", "cross_entropy", "diversity")
    own_images = False

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 0.5,
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
        check_weight("alpha", alpha)
        check_weight("beta", beta)
        self.alpha, self.beta = alpha, beta

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}"

    def forward(self, logits: Experts, targets: Tensor) -> Tensor:
        """The loss of a batch, 0-d.

        Args:
            logits: (N, B, K), or N tensors (B, K), of N ≤ K − 1 experts.
            targets: (B,) integers or (B, K) probabilities.

        Raises:
            ValueError, TypeError: a wrong shape or dtype, or too many experts.
        """
        return self._terms(logits, targets)[0]

    def loss_and_terms(
        self, model: ImmunityMoE, images: Tensor, targets: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if prepared is not None:
            images, targets = torch.cat([prepared, images]), torch.cat([targets, targets])
        loss, classification, diversity = self._terms(model.expert_logits(images), targets)
        return loss, (classification, diversity)

    def prepare(self, model: ImmunityMoE, images: Tensor, targets: Tensor) -> Tensor | None:
        return images if self.adversarial else None

    def check_experts(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ValueError(f"experts: expected at least 2, which are to disagree, got {num_experts}")

    def check_model(self, model: ImmunityMoE) -> None:
        _check_classes(model.num_experts, model.num_classes)
        super().check_model(model)

    def passes(self, num_experts: int, attack_steps: int) -> float:
        return float(num_experts * (1 + attack_steps + (attack_steps > 0)))

    def _terms(self, logits: Experts, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stacked = join_experts("logits", logits, 3, "(N, B, K)")
        experts, samples, classes = stacked.shape
        _check_classes(experts, classes)
        of = self._classes
        options = TargetOptions(of.label_smoothing, of.class_weights, of.ignore_index)
        labels = hard_labels(read_targets(targets, samples, classes, options, group_name=of.group_name).values)
        losses = self.expert_losses(stacked, targets).sum(0)
        diversity = self._diversity(at_least_float32(stacked), labels)
        return (
            self.mean(losses - diversity, targets, classes),
            self.mean(losses, targets, classes) / experts,
            self.mean(diversity, targets, classes),
        )

    def _diversity(self, logits: Tensor, labels: Tensor) -> Tensor:
        """α·H + β·log det of each image, (B,)."""
        experts, _, classes = logits.shape
        with torch.autocast(logits.device.type, enabled=False):
            mean = logits.softmax(-1).mean(0)
            entropy = -torch.special.xlogy(mean, mean.clamp_min(torch.finfo(mean.dtype).tiny)).sum(-1)
            wrong = torch.arange(classes - 1, device=labels.device).expand(len(labels), -1)
            wrong = wrong + (wrong >= labels[:, None])
            others = logits.gather(-1, wrong.expand(experts, -1, -1)).softmax(-1)
            directions = F.normalize(others.double(), dim=-1, eps=0).transpose(0, 1)
            gram = directions @ directions.mT
            gram = gram + SMALLEST * torch.eye(experts, dtype=torch.float64, device=logits.device)
            volume = log_determinant(gram).to(logits.dtype)
            found: Tensor = self.alpha * entropy + self.beta * volume
        return found


def log_determinant(matrices: Tensor) -> Tensor:
    """log det of symmetric positive definite matrices (…, N, N), N ≥ 1; (…), differentiable.

    By elimination, which needs no pivots here, and is made of operations that can be compiled and recorded in a CUDA
    graph; the linear-algebra libraries of a GPU may allocate memory, or wait for the device.

    Args:
        matrices: floating-point.
    """
    total = torch.zeros((), dtype=matrices.dtype, device=matrices.device)
    for _ in range(matrices.shape[-1]):
        pivot = matrices[..., :1, :1]
        total = total + pivot[..., 0, 0].log()
        matrices = matrices[..., 1:, 1:] - matrices[..., 1:, :1] * matrices[..., :1, 1:] / pivot
    return total


def _check_classes(experts: int, classes: int) -> None:
    if experts > classes - 1:
        raise ValueError(
            f"experts: expected at most {classes - 1} with {classes} classes, one fewer than these, of which ADP's "
            f"volume is made, got {experts}"
        )
