"""Where the experts look in some images: what Figure 2 of arXiv 2402.18787 is drawn from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from immunity_fast.data.datasets import AnySplit, Split
from immunity_fast.data.sampling import EVALUATION_BATCH, batches, sample_order
from immunity_fast.evaluation.metrics import expert_maps
from immunity_fast.losses import FusedImmunityLoss
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.reporting.overlay import as_rgb
from immunity_fast.runtime.modes import evaluating


@dataclass(frozen=True, eq=False)
class Gallery:
    """Some images, and where the experts of one model look in them; all on the CPU.

    Args:
        title: what the model is, such as "Immunity"; "" for no heading.
        images: uint8 (n, C, H, W).
        labels: integers (n,), each in 0..K−1.
        classes: K names.
        heatmaps: floats (N, n, H, W), ≥ 0, Grad-CAM of each expert for the label, eq. (3), not normalised; one that has
            a NaN or an infinity is marked so.
        probabilities: floats (N, n, K), of each expert.
        mixture: floats (n, K), the mean of the experts' probabilities, which is the exact mean over the gate's draws.

    Raises:
        ValueError: if a shape, a type or a value does not fit.
    """

    title: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    heatmaps: Tensor
    probabilities: Tensor
    mixture: Tensor

    def __post_init__(self) -> None:
        images, labels, classes = self.images, self.labels, len(self.classes)
        if images.ndim != 4 or 0 in images.shape or images.dtype != torch.uint8:
            raise ValueError(f"images: expected uint8 of shape (n, C, H, W), none of them 0, got {_kind(images)}")
        count, _, height, width = images.shape
        if labels.shape != (count,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(f"labels: expected integers of shape ({count},), got {_kind(labels)}")
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"labels: expected each in [0, {classes}), for {classes} class names, got {found}")
        if self.heatmaps.ndim != 4 or len(self.heatmaps) == 0:
            raise ValueError(f"heatmaps: expected shape (N, n, H, W), N ≥ 1, got {_kind(self.heatmaps)}")
        experts = len(self.heatmaps)
        for name, tensor, shape in (
            ("heatmaps", self.heatmaps, (experts, count, height, width)),
            ("probabilities", self.probabilities, (experts, count, classes)),
            ("mixture", self.mixture, (count, classes)),
        ):
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(f"{name}: expected floats of shape {shape}, got {_kind(tensor)}")
        if bool((self.heatmaps < 0).any()):
            raise ValueError(f"heatmaps: expected no value below 0, got {float(self.heatmaps.nan_to_num().min()):g}")

    @property
    def experts(self) -> int:
        """N, how many experts the model has."""
        return len(self.heatmaps)


def collect(
    model: ImmunityMoE | Sequence[ImmunityMoE],
    split: AnySplit,
    classes: Sequence[str],
    count: int,
    loss: FusedImmunityLoss,
    *,
    title: str = "",
) -> Gallery:
    """The gallery of a model: a fixed choice of images, whose heatmaps are computed in evaluation mode.

    The images are the first of each class in the order of `data.sampling.sample`, then the second of each, and so on;
    they are shown in the order of the classes. The choice depends on the split's labels and on `count` alone, so that
    several models' galleries go side by side.

    Args:
        model: 1 expert or more, or several models, whose experts then stand for the experts of one: networks that were
            trained independently. Its mode is left as it is, and no random number is drawn.
        split: at least one image.
        classes: K names.
        count: of images, ≥ 1; all there are, where there are fewer.
        loss: how Grad-CAM is to be computed (`score`, `weight_scale`), as in training; its `size` does not matter here,
            the heatmaps have the images'.
        title: see `Gallery`.

    Raises:
        ValueError: no model, an empty split, a count below 1, or models and classes that do not fit.
    """
    models = [model] if isinstance(model, ImmunityMoE) else list(model)
    if not models:
        raise ValueError("model: expected at least 1, got an empty sequence")
    if len(split) == 0:
        raise ValueError("split: expected at least 1 image, got an empty split")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    chosen = choose(split, count)
    height, width = split.image_size
    seen = copy.copy(loss)  # a module's copy has attributes of its own, and the caller's keeps its size
    seen.size = (height, width)
    parts = [_measure(each, chosen, seen) for each in models]
    shapes = {tuple(probabilities.shape[1:]) for _, probabilities in parts}
    if shapes != {(len(chosen), len(classes))}:
        numbers = ", ".join(str(shape[1]) for shape in sorted(shapes))
        raise ValueError(f"classes: expected as many names as the models have classes ({numbers}), got {len(classes)}")
    probabilities = torch.cat([probabilities for _, probabilities in parts])
    return Gallery(
        title=title,
        images=chosen.images.cpu(),
        labels=chosen.labels.cpu(),
        classes=tuple(classes),
        heatmaps=torch.cat([heatmaps for heatmaps, _ in parts]),
        probabilities=probabilities,
        mixture=probabilities.mean(0),
    )


def choose(split: AnySplit, count: int) -> Split:
    """At most `count` images, as many of each class as can be, in the order of the classes; see `collect`."""
    order = sample_order(split, len(split))
    labels = split.labels.cpu()[order].numpy()
    ranks = np.zeros_like(labels)  # 0 for the first image of its class, 1 for the second, …
    for label in np.unique(labels):
        ranks[labels == label] = np.arange((labels == label).sum())
    first = np.argsort(ranks, kind="stable")[:count]
    shown = order[first[np.argsort(labels[first], kind="stable")]].to(split.labels.device)
    return Split(split.read(shown), split.labels[shown])


def _measure(model: ImmunityMoE, split: Split, loss: FusedImmunityLoss) -> tuple[Tensor, Tensor]:
    """Heatmaps (N, n, H, W) and probabilities (N, n, K), on the CPU."""
    device = next(model.parameters()).device
    heatmaps, probabilities = [], []
    with evaluating(model):
        for images, labels in batches(split.to(device), EVALUATION_BATCH):
            heatmaps.append(expert_maps(model, loss, images, labels)[0].cpu())
            with torch.no_grad():
                logits = model.expert_logits(images)
            probabilities.append(logits.to(heatmaps[-1].dtype).softmax(-1).cpu())
    return torch.cat(heatmaps, 1), torch.cat(probabilities, 1)


def check_same(galleries: Sequence[Gallery]) -> None:
    """Check that there is a gallery, and all are of the same images.

    Raises:
        ValueError: there is none, or they are not.
    """
    if len(galleries) == 0:
        raise ValueError("galleries: expected at least 1, got none")
    first = galleries[0]
    for i, other in enumerate(galleries[1:], 2):
        for name in ("images", "labels"):
            if not torch.equal(getattr(first, name), getattr(other, name)):
                raise ValueError(f"galleries: expected the same {name} in all, those of number {i} differ")
        if first.classes != other.classes:
            raise ValueError(f"galleries: expected the same classes in all, those of number {i} differ")


def to_array(heatmap: Tensor) -> np.ndarray:
    """A heatmap (H, W) as a NumPy array of float64."""
    array: np.ndarray = heatmap.detach().double().numpy()
    return array


def picture_of(image: Tensor) -> np.ndarray:
    """uint8 (C, H, W) → floats in [0, 1], (H, W, 3); see `overlay.as_rgb`."""
    return as_rgb(image.permute(1, 2, 0).numpy() / 255)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
