"""The losses a second time, in float64, one expert and one sample after the other, with none of the package's code.

Numbers in brackets are the equations of arXiv 2402.18787. Autograd through these functions is the oracle of gradients.
Every function takes maps (N, B, C, h, w), logits (N, B, K), a gate (B, N) and labels (B,). Where a parameter is called
`Maps`, it may be a list of N maps (B, C, h, w), whose C, h and w differ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int] | None
Maps = Tensor | list[Tensor]


def mixture_log_probabilities(logits: Tensor, gate: Tensor) -> Tensor:
    """(1): log Σ_i g_i softmax(f_i), (B, K)."""
    experts, samples, classes = logits.shape
    rows = []
    for q in range(samples):
        mixture = torch.zeros(classes, dtype=torch.float64)
        for i in range(experts):
            exponentials = torch.exp(logits[i, q] - logits[i, q].max().detach())
            mixture = mixture + gate[q, i] * exponentials / exponentials.sum()
        rows.append(torch.log(mixture))
    return torch.stack(rows) if rows else logits.sum(0)


def cross_entropy(logits: Tensor, gate: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """(2), (B,)."""
    experts, samples, _ = logits.shape
    mixture = mixture_log_probabilities(logits, gate)
    losses = []
    for q in range(samples):
        label = int(labels[q])
        loss = -mixture[q, label]
        for i in range(experts):
            loss = loss - alpha * torch.log_softmax(logits[i, q], 0)[label]
        losses.append(loss)
    return torch.stack(losses) if losses else logits.sum((0, 2))


def scores(activations: Tensor, gradients: Tensor, weight_scale: str) -> Tensor:
    """(3) before the ReLU for one expert and sample, (h, w) from twice (C, h, w)."""
    channels, height, width = activations.shape
    scale = 1 / channels if weight_scale == "channels" else 1 / (height * width)
    total = torch.zeros(height, width, dtype=torch.float64)
    for k in range(channels):
        total = total + scale * gradients[k].sum() * activations[k]
    return total


def resample(small: Tensor, size: Size) -> Tensor:
    """Bilinear, align_corners=False, of one (h, w) map; None leaves it alone."""
    if size is None:
        return small
    return F.interpolate(small[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]


def heatmap(activations: Tensor, gradients: Tensor, size: Size, weight_scale: str) -> Tensor:
    """(3) for one expert and sample, (H, W)."""
    return resample(torch.relu(scores(activations, gradients, weight_scale)), size)


def heatmaps(activations: Maps, gradients: Maps, size: Size, weight_scale: str) -> Tensor:
    """(3), (N, B, H, W)."""
    experts, samples = len(activations), len(activations[0])
    if samples == 0:
        empty = torch.stack([maps.sum((1, 2, 3)) for maps in activations])
        return empty[..., None, None].expand(-1, -1, *(size or activations[0].shape[2:]))
    rows = [
        [heatmap(activations[i][q], gradients[i][q], size, weight_scale) for q in range(samples)]
        for i in range(experts)
    ]
    return torch.stack([torch.stack(row) for row in rows])


def distribution(activations: Tensor, gradients: Tensor, size: Size, weight_scale: str, smoothing: float) -> Tensor:
    """p for one expert and sample, (H, W): heatmap + ε·m over its sum, m the mean magnitude before the ReLU."""
    before = scores(activations, gradients, weight_scale)
    smoothed = resample(torch.relu(before), size) + smoothing * before.abs().mean()
    if float(smoothed.detach().sum()) == 0:
        return torch.full_like(smoothed, 1 / smoothed.numel())
    return smoothed / smoothed.sum()


def mutual_information_of(maps: list[Tensor]) -> Tensor:
    """(9) for one sample, from N maps (H, W); 0·log 0 = 0."""
    total = maps[0]
    for p in maps[1:]:
        total = total + p
    loss = torch.zeros((), dtype=torch.float64)
    for p in maps:
        loss = loss - (p[p > 0] * torch.log(p[p > 0] / total[p > 0])).sum()
    return loss


def centre_of(p: Tensor) -> tuple[Tensor, Tensor]:
    """(10) for one map: its mean row and mean column."""
    row = torch.zeros((), dtype=torch.float64)
    column = torch.zeros((), dtype=torch.float64)
    for a in range(p.shape[0]):
        row = row + a * p[a].sum()
    for b in range(p.shape[1]):
        column = column + b * p[:, b].sum()
    return row, column


def position_stability_of(centres: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """(11), from [expert][sample] centres."""
    loss = torch.zeros((), dtype=torch.float64)
    for i, ours in enumerate(centres):
        for j, theirs in enumerate(centres):
            if i == j or not ours:
                continue
            distances = [(a - c) ** 2 + (b - d) ** 2 for (a, b), (c, d) in zip(ours, theirs, strict=True)]
            mean = sum(distances[1:], distances[0]) / len(distances)
            for distance in distances:
                loss = loss + (distance - mean) ** 2
    return loss


def heatmap_losses(
    activations: Maps,
    gradients: Maps,
    size: Size = None,
    normalize: bool = True,
    smoothing: float = 0.01,
    weight_scale: str = "channels",
) -> tuple[Tensor, Tensor]:
    """(9) for each sample, (B,), and (11), ()."""
    experts, samples = len(activations), len(activations[0])
    information = []
    centres: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(experts)]
    for q in range(samples):
        pairs = [(activations[i][q], gradients[i][q]) for i in range(experts)]
        distributions = [distribution(*pair, size, weight_scale, smoothing) for pair in pairs]
        for i, p in enumerate(distributions):
            centres[i].append(centre_of(p))
        maps = distributions if normalize else [heatmap(*pair, size, weight_scale) for pair in pairs]
        information.append(mutual_information_of(maps))
    empty = sum(((a * g).sum((1, 2, 3)) for a, g in zip(activations, gradients, strict=True)), torch.zeros(samples))
    return (torch.stack(information) if information else empty), position_stability_of(centres)


def label_gradients(logits: Tensor, activations: list[Tensor], labels: Tensor, score: str) -> Tensor:
    """∂y_qi/∂A_qi, (N, B, C, h, w), one sample of one expert at a time, in the graph, from N (B, C, h, w)."""
    experts = []
    for i, maps in enumerate(activations):
        samples = []
        for q, label in enumerate(labels.tolist()):
            y = logits[i, q, label] if score == "logit" else torch.softmax(logits[i, q], 0)[label]
            samples.append(torch.autograd.grad(y, maps, create_graph=True)[0][q])
        experts.append(torch.stack(samples))
    return torch.stack(experts)


def total(
    cross_entropies: Tensor, information: Tensor, stability: Tensor, experts: int, beta: float, gamma: float
) -> Tensor:
    """(12)."""
    samples = len(cross_entropies)
    return (
        cross_entropies.sum() + beta / experts * information.sum() + gamma / (experts * (experts - 1)) * stability
    ) / samples


def assert_matches(actual: Tensor, expected: Tensor, tolerance: float = 1e-10, floor: float = 1e-3) -> None:
    """Equal to `tolerance` of the largest expected magnitude, or of `floor` where all of them are smaller."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if expected.numel():
        error = float((actual.detach().double() - expected.detach().double()).abs().max())
        assert error <= tolerance * max(float(expected.detach().abs().max()), floor)


def attack_loss(z: Tensor, label: int, target: int | None, loss: str) -> Tensor:
    """The loss of one sample's logits (K,), in the graph, from the papers' formulas, with Python's max and sorted."""
    values = z.tolist()
    if loss == "ce":
        chosen = label if target is None else target
        highest = max(values)
        cross_entropy = torch.log(sum(torch.exp(z[k] - highest) for k in range(len(z)))) + highest - z[chosen]
        return cross_entropy if target is None else -cross_entropy
    if loss == "cw":
        chosen = label if target is None else target
        other = max((k for k in range(len(z)) if k != chosen), key=values.__getitem__)
        return z[other] - z[label] if target is None else z[target] - z[other]
    p = sorted(range(len(z)), key=values.__getitem__, reverse=True)  # π of the paper, from 0
    if target is None:
        other = p[1] if p[0] == label else p[0]
        return -(z[label] - z[other]) / (z[p[0]] - z[p[2]] + 1e-12)
    return -(z[label] - z[target]) / (z[p[0]] - (z[p[2]] + z[p[3]]) / 2 + 1e-12)
