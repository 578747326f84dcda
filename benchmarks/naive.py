"""The losses as a reader of the paper would write them: a loop over experts, pairs of experts in two loops, no fusing.

The definitions are those of `immunity_fast.kernels.reference`, so that the results can be compared; half precision is
computed in float32 there and here. For speed alone: nothing guards against overflow or 0/0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def heatmap_losses(
    activations: Tensor, gradients: Tensor, size: tuple[int, int], smoothing: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Mutual information (B,), eq. (9), and position stability (), eq. (11), from A and ∂y/∂A, both (N, B, C, h, w)."""
    return losses_of_maps(list(activations), list(gradients), size, smoothing)


def losses_of_maps(
    activations: list[Tensor], gradients: list[Tensor], size: tuple[int, int], smoothing: float = 0.01
) -> tuple[Tensor, Tensor]:
    """The same from one (B, C, h, w) an expert."""
    distributions = [distribution(a, g, size, smoothing) for a, g in zip(activations, gradients, strict=True)]
    return mutual_information(distributions), position_stability([centre(p) for p in distributions])


def distribution(activations: Tensor, gradients: Tensor, size: tuple[int, int], smoothing: float) -> Tensor:
    """One expert's Grad-CAM heatmap, eq. (3), smoothed and scaled to a sum of 1, (B, H, W)."""
    weights = gradients.to(_precision(gradients)).sum((-2, -1), keepdim=True) / activations.shape[1]
    scores = (weights * activations.to(_precision(activations))).sum(1, keepdim=True)
    heatmap = F.interpolate(F.relu(scores), size=size, mode="bilinear", align_corners=False)
    heatmap = heatmap + smoothing * scores.abs().mean((-2, -1), keepdim=True)
    return (heatmap / heatmap.sum((-2, -1), keepdim=True))[:, 0]


def mutual_information(distributions: list[Tensor]) -> Tensor:
    """(9): −Σ_i Σ_ab p_i log(p_i / Σ_j p_j), (B,)."""
    total = sum(distributions[1:], distributions[0])
    loss = torch.zeros_like(total[:, 0, 0])
    for p in distributions:
        loss = loss - (p * torch.log(p / total)).sum((-2, -1))
    return loss


def centre(p: Tensor) -> Tensor:
    """(10): Σ_ab (a, b)·p(a, b), (B, 2)."""
    rows = torch.arange(p.shape[-2], device=p.device, dtype=p.dtype)
    columns = torch.arange(p.shape[-1], device=p.device, dtype=p.dtype)
    a, b = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([(p * a).sum((-2, -1)), (p * b).sum((-2, -1))], -1)


def position_stability(centres: list[Tensor]) -> Tensor:
    """(11): Σ_{i≠j} Σ_q (d²_qij − mean_q d²_qij)², ()."""
    loss = torch.zeros_like(centres[0][0, 0])
    for i in range(len(centres)):
        for j in range(len(centres)):
            if i != j:
                distances = (centres[i] - centres[j]).square().sum(-1)
                loss = loss + (distances - distances.mean()).square().sum()
    return loss


def mixture_cross_entropy(logits: Tensor, gate: Tensor, targets: Tensor, alpha: float) -> Tensor:
    """(2): −log Σ_i g_i softmax(f_i)[label] − α Σ_i log softmax(f_i)[label], (B,), from (N, B, K) and gate (B, N)."""
    mixture = torch.zeros_like(gate[:, 0])
    experts = torch.zeros_like(gate[:, 0])
    for i in range(len(logits)):
        likelihood = F.log_softmax(logits[i].to(_precision(logits)), -1).gather(-1, targets[:, None])[:, 0]
        mixture = mixture + gate[:, i] * likelihood.exp()
        experts = experts + likelihood
    return -torch.log(mixture) - alpha * experts


def immunity_loss(
    logits: list[Tensor],
    activations: list[Tensor],
    targets: Tensor,
    size: tuple[int, int],
    alpha: float,
    beta: float,
    gamma: float,
    gate: Tensor | None = None,
    detach_weights: bool = False,
) -> Tensor:
    """(12) of one (B, K) and one (B, C, h, w) an expert, ∂y/∂A taken expert by expert; without a gate 1/N each."""
    experts, samples = len(logits), len(targets)
    gradients = []
    for f, a in zip(logits, activations, strict=True):
        score = f.gather(-1, targets[:, None]).sum()
        gradients.append(torch.autograd.grad(score, a, create_graph=not detach_weights, retain_graph=True)[0])
    information, stability = losses_of_maps(activations, gradients, size)
    if gate is None:
        gate = torch.full_like(logits[0][:, :1], 1 / experts).expand(samples, experts)
    return (
        mixture_cross_entropy(torch.stack(logits), gate, targets, alpha).mean()
        + beta / experts * information.mean()
        + gamma / (experts * (experts - 1)) * stability / samples
    )


def _precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
