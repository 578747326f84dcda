"""One training step: forward, loss through Grad-CAM, backward, clipping, optimiser."""

import math

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD

from immunity_fast.losses import FusedImmunityLoss
from immunity_fast.model import ImmunityMoE

MEASURED = ("loss", "cross_entropy", "mutual_information_loss", "position_stability")


def train_step(
    model: ImmunityMoE,
    loss_fn: FusedImmunityLoss,
    optimizer: SGD,
    images: Tensor,
    labels: Tensor,
    clip_grad_norm: float | None = None,
) -> Tensor:
    """Update the model, in training mode, on images (B, 3, H, W) in [0, 1] and labels (B,).

    Returns:
        (4,) float64 on the model's device: what `MEASURED` names, of this batch, before the update.
    """
    logits, activations, gate = model.expert_outputs(images)
    loss, terms = loss_fn(logits, activations, labels, gate, return_terms=True)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip_grad_norm is not None:
        clip_grad_norm_(model.parameters(), clip_grad_norm)
    optimizer.step()
    return torch.stack([loss.detach(), *(term.detach() for term in terms)]).double()


def cosine_lr(lr: float, step: int, steps: int) -> float:
    """The learning rate of step 0..steps−1: half a cosine from `lr` to almost 0 (Loshchilov & Hutter, 1608.03983)."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / steps))
