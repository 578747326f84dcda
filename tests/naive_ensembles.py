"""Losses of ensembles as one would write them down: a loop over networks, autograd twice, `cosine_similarity`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from tests.tensors import noise

CLASSES = 5
LABELS = torch.tensor([1, 4, 0, 2, 3])
CrossEntropy = Callable[[Tensor, Tensor], Tensor]  # logits (B, K) and targets to (B,)


def network() -> nn.Sequential:
    """A smooth network with BatchNorm, of images 6×6."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Sequential(nn.Flatten(), nn.Linear(4 * 16, CLASSES))
    )


def mixture(experts: int = 3, dtype: torch.dtype = torch.float64) -> ImmunityMoE:
    """Such networks in a mixture that is in training mode."""
    torch.manual_seed(0)
    model = ImmunityMoE.from_experts([network() for _ in range(experts)], stage="2", image_size=6)
    return model.to(dtype).train()


def batch(samples: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images (samples, 3, 6, 6) and labels."""
    return noise(samples, 6).to(dtype), LABELS[:samples]


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (B,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def losses_and_gradients(
    networks: Sequence[nn.Module], images: Tensor, targets: Tensor, cross_entropy: CrossEntropy = plain
) -> tuple[Tensor, Tensor]:
    """Each network's losses (N, B), and their gradients by the images, (N, B, C·H·W)."""
    losses, gradients = [], []
    for member in networks:
        seen = images.detach().clone().requires_grad_()
        losses.append(cross_entropy(member(seen), targets))
        gradients.append(torch.autograd.grad(losses[-1].sum(), seen, create_graph=True)[0].flatten(1))
    return torch.stack(losses), torch.stack(gradients)


def cosines(gradients: Tensor) -> Tensor:
    """(pairs, B) of gradients (N, B, D)."""
    pairs = [(i, j) for i in range(len(gradients)) for j in range(i)]
    return torch.stack([F.cosine_similarity(gradients[i], gradients[j]) for i, j in pairs])


def gal(losses: Tensor, gradients: Tensor, weight: float = 0.5) -> Tensor:
    """GAL's loss of each image, (B,)."""
    return losses.mean(0) + weight * cosines(gradients).exp().sum(0).log()


def trs(losses: Tensor, gradients: Tensor, at_points: Tensor, c: float = 2.0, k: float = 2.0, s: float = 5.0) -> Tensor:
    """TRS' loss of each image, (B,)."""
    squares = at_points.pow(2).sum(-1).mean(0)
    return losses.sum(0) + s * (c * cosines(gradients).abs().mean(0) + k * 2 * squares / 128**2)


def gradients_of(networks: Sequence[nn.Module]) -> list[Tensor]:
    """What is in `grad` of the networks' parameters, stacked, (N, …) each."""
    each = [list(member.parameters()) for member in networks]
    return [torch.stack([p.grad for p in alike if p.grad is not None]) for alike in zip(*each, strict=True)]
