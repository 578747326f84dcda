"""What MORA maximises: an ensemble's answer together with its members', so weighed that nobody's gradient vanishes.

Yu, Gao & Xu, "MORA: Improving Ensemble Robustness Evaluation with Model-Reweighing Attack", NeurIPS 2022, arXiv
2211.08008; the settings are those of the authors' code, https://github.com/lafeat/mora.

Shapes: N members, B images, K classes. z are the members' logits (N, B, K), finite, in float32 at least; v are their
weights (B, N), at least 0, each row summing to 1.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.functional import log_mixture

Average = Literal["softmax", "logits", "vote"]  # what of the members is averaged
Formula = Literal["intended", "released"]  # of the members' weights in the loss

BETA: dict[Average, float] = {"softmax": 0.2, "vote": 0.8, "logits": 0.0}  # q_i = softmax(β z_i)
LARGEST_GAP = 10.0  # that a member has, once its logits are divided by the temperature
SHARP, SOFT = 10.0, 1.0  # gaps to which a vote's logits are brought: to be told from others, and to be followed
LOWEST_LOGARITHM = 104.0  # of a probability that float32 has, below that of 1


def finite_logits(logits: Tensor) -> Tensor:
    """Logits (…, K) whose −∞, logarithms of 0, are as low as float32's lowest logarithm, and as low as any other."""
    lowest = torch.where(logits.isfinite(), logits, torch.inf).amin(-1, keepdim=True)
    floor = torch.minimum(lowest, logits.amax(-1, keepdim=True) - LOWEST_LOGARITHM).detach()
    return torch.where(logits == -torch.inf, floor, logits)


def gaps(outputs: Tensor) -> Tensor:
    """By how much the largest of (…, K) exceeds the second largest: (…), without a graph."""
    top = outputs.detach().topk(2, -1).values
    return top[..., 0] - top[..., 1]


def answer(logits: Tensor, weights: Tensor, average: Average, sharpness: float = SHARP) -> Tensor:
    """The ensemble's output (B, K): logarithms of what is averaged, or the average of logits.

    Args:
        logits: z.
        weights: v.
        average: "softmax": log Σ_i v_i softmax(z_i). "logits": Σ_i v_i z_i. "vote", which has no gradient: the averaged
            softmax of logits whose gaps are all brought to the same.
        sharpness: that gap.
    """
    if average == "logits":
        return (weights.T[..., None].to(logits.dtype) * logits).sum(0)
    if average == "vote":
        logits = logits * (sharpness / _not_zero(gaps(logits)))[..., None]
    return log_mixture(logits, weights)


def predicted(logits: Tensor, weights: Tensor, average: Average) -> Tensor:
    """The class that the ensemble answers, (B,): of several that are as good the lowest.

    Args:
        logits: z, which may be −∞.
        weights: v.
        average: of "vote", the class with most weight behind it.
    """
    if average == "vote":
        # In float64 the order in which float32 weights are added does not matter to who is first.
        votes = torch.zeros(logits.shape[1:], dtype=torch.float64, device=logits.device)
        return votes.scatter_add(1, logits.argmax(-1).T, weights.double()).argmax(-1)
    if average == "logits":
        share = weights.T[..., None].to(logits.dtype)
        return torch.where(share > 0, share * logits, 0).sum(0).argmax(-1)  # 0·(−∞) is no number
    return log_mixture(logits, weights).argmax(-1)


def mixed_loss(
    logits: Tensor, weights: Tensor, labels: Tensor, average: Average, mixing: float, formula: Formula
) -> Tensor:
    """Cross-entropy (B,) of (1 − s)·e + s·Σ_i c_i z_i / T, of which neither part saturates.

    e is the ensemble's output, its gap brought to 1; c_i are w_i of `log_member_weights` divided by their sum, of those
    members alone that are still right, unless logits are averaged. Where no member is right, only e is left. The
    authors' code adds 10⁻⁸ to that sum, so that members that are very sure do not count: here they do.

    In the formula as "released", the ensemble's output is one member more, of a weight of 1/N.

    Args:
        logits: z.
        weights: v.
        labels: (B,).
        average: what is averaged.
        mixing: s.
        formula: of the weights w.
    """
    output = answer(logits, weights, average, SOFT)
    mixed = output / _not_zero(gaps(output))[:, None]
    if mixing > 0:
        members, shares = logits, weights.detach().T.to(logits.dtype)
        if formula == "released":
            members = torch.cat([members, output[None]])
            shares = torch.cat([shares, torch.full_like(shares[:1], 1 / len(logits))])
        cooled = members / temperature(members, shares)[:, None]
        counted = _shares_of_members(members, shares, cooled[: len(logits)], weights, labels, average, formula)
        mixed = (1 - mixing) * mixed + mixing * (counted[..., None] * cooled).sum(0)
    return F.cross_entropy(mixed, labels, reduction="none")


def targeted_loss(logits: Tensor, weights: Tensor, targets: Tensor, average: Average) -> Tensor:
    """Minus the cross-entropy (B,) of the ensemble's output and the targets (B,)."""
    return -F.cross_entropy(answer(logits, weights, average), targets, reduction="none")


def temperature(members: Tensor, shares: Tensor) -> Tensor:
    """T (B,): a tenth of the largest gap of (N, B, K) outputs, at least 1, of those whose share (N, B) is not 0."""
    return (torch.where(shares > 0, gaps(members), 0).amax(0) / LARGEST_GAP).clamp_min(1)


def log_member_weights(
    members: Tensor, shares: Tensor, mixture: Tensor, labels: Tensor, beta: float, formula: Formula
) -> Tensor:
    """Logarithms of w_i (N, B), with which members count in the loss.

    With q_i = softmax(β z_i), p the mixture and a its likeliest wrong class,

        w_i = v_i q_i[a] (q_i[label] / p[label] + (1 − q_i[a]) / p[a]).

    That is ∂(log p[a] − log p[label]) / ∂z_i[a] where p = Σ_i v_i q_i. In the formula as "released", while the mixture
    is right, signs are mistaken: w_i = v_i q_i[a] ((1 + q_i[a]) / p[a] − q_i[label] / p[label]), which is not negative.

    Args:
        members: z.
        shares: v, (N, B).
        mixture: log p, (B, K).
        labels: (B,).
        beta: β.
        formula: which.
    """
    rivals = mixture.scatter(-1, labels[:, None], -torch.inf).argmax(-1)
    log_q = (beta * members).log_softmax(-1)
    of_rival, of_label = (log_q.gather(-1, of.expand(len(members), -1)[..., None])[..., 0] for of in (rivals, labels))
    mixed_rival, mixed_label = (mixture.gather(-1, of[:, None])[:, 0] for of in (rivals, labels))
    others = (-of_rival.expm1()).log()  # log (1 − q_i[a])
    inner = torch.logaddexp(of_label - mixed_label, others - mixed_rival)
    if formula == "released":
        ratio = (of_label + mixed_rival - mixed_label).exp()
        slipped = (1 + of_rival.exp() - ratio).clamp_min(0).log() - mixed_rival
        inner = torch.where(mixture.argmax(-1) == labels, slipped, inner)
    return shares.log() + of_rival + inner


@torch.no_grad()
def _shares_of_members(
    members: Tensor,
    shares: Tensor,
    cooled: Tensor,
    weights: Tensor,
    labels: Tensor,
    average: Average,
    formula: Formula,
) -> Tensor:
    """c_i of `mixed_loss`, (N, B): they sum to 1, or are all 0."""
    mixture = log_mixture(cooled, weights)
    logarithms = log_member_weights(members, shares, mixture, labels, BETA[average], formula)
    if average != "logits":
        logarithms = logarithms.masked_fill(members.argmax(-1) != labels, -torch.inf)
    return logarithms.softmax(0).nan_to_num(0)


def _not_zero(gap: Tensor) -> Tensor:
    """A gap to divide by: two classes that are as good are taken as almost so."""
    return gap.clamp_min(torch.finfo(torch.float32).eps)
