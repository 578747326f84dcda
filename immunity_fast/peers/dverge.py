"""DVERGE (Yang et al., NeurIPS 2020): members learn to be right where the others are weak.

A distilled image x'_i looks like its source x, within eps of it, and to member i like another image: it has that one's
features at a layer. What of x a member relies on, and an attack may change, is in it exchanged. Each member learns the
source's label on the images that were distilled from the others:

    min_θ_i Σ_{j≠i} CE(f_i(x'_j), y),  x'_j = argmin_{‖z − x‖∞ ≤ eps} ‖h_j(z) − h_j(x_t)‖².

Shapes: N members, B images, K classes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from immunity_fast.models.capture import check_images
from immunity_fast.models.member_features import (
    Members,
    Place,
    check_places,
    count_places,
    features,
    forget_places,
    members_of,
)
from immunity_fast.models.moe import ImmunityMoE
from immunity_fast.peers.base import EnsembleLoss, each_experts
from immunity_fast.runtime.checks import check_choice, check_whole, is_number, is_whole
from immunity_fast.runtime.modes import batch_statistics, evaluating, frozen
from immunity_fast.runtime.outputs import check_logits
from immunity_fast.runtime.precision import at_least_float32
from immunity_fast.targets import IGNORE_INDEX, ClassWeights

BatchNormMode = Literal["train", "eval"]


class DVERGELoss(EnsembleLoss):
    """Σ_i Σ_{j≠i} CE(f_i(x'_j), y), where x'_j is distilled from member j; in adversarial training Σ_i CE_i besides.

    ::

        loss_fn = DVERGELoss()
        for epoch in range(epochs):
            loss_fn.begin_epoch(networks, epoch, epochs, seed=0)  # draws the layer
            for images, labels in batches:
                loss = loss_fn(networks, images, labels)

    The authors begin with members that plain training has made: `--weights` FILE of such a run does that. With
    adversarial training on each expert's own images, `--adversarial pgd --adversary each`, it is their DVERGE+AT.

    The layer is drawn once an epoch, each with the same probability: of the maps before each nonlinearity, and the
    logits, which are the authors' 20 layers of a ResNet-20. Members of different structures have the one at the same
    relative depth.

    Where this differs from the authors' code: their pass over the images of each other member, and over adversarial
    ones, has BatchNorm statistics of its own, and each, as each step of the distillation, is counted in the running
    ones; here a batch is one pass, which counts once, and distilling counts nothing. Their targets are another pass
    over the data set in another order; here they are the images of the same batch, each another's target.

    Args:
        eps: radius around the source, Linf, of images in [0, 1].
        step: size of a step of the distillation.
        steps: how many.
        layers: what is drawn from: numbers of nonlinearities, from 1, the logits being the one behind the last, and
            names of submodules, whose output is taken; as text joined by "+", such as "3+7+layer2.0.bn1". Empty is all
            numbers.
        batchnorm: of the distillation: "train" normalises by the batch, as the authors do, where BatchNorm is in
            training mode; "eval" by the running statistics. All else, such as dropout, is in evaluation mode.
        label_smoothing, class_weights, ignore_index, group_name: see `EnsembleLoss`.

    Raises:
        ValueError, TypeError: a setting that is out of its range, or of another type.
    """

    def __init__(
        self,
        eps: float = 0.07,
        step: float = 0.007,
        steps: int = 10,
        layers: str | Sequence[Place] = "",
        batchnorm: BatchNormMode = "train",
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
        _check_settings(eps, step, steps, batchnorm)
        self.eps, self.step, self.steps, self.batchnorm = eps, step, steps, batchnorm
        self.layers = _layers(layers)
        self.drawn = _drawn(0, 0)

    def check_experts(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ValueError(f"experts: expected at least 2, which learn from each other, got {num_experts}")

    def begin_epoch(self, model: Members, epoch: int, epochs: int, seed: int) -> bool:
        """Draw the layer of an epoch, 0-based: always the same of a seed and an epoch. Before, it is that of 0 and 0.

        Args:
            model: the members; a mixture, or a list of networks.
            epoch, epochs: which of how many.
            seed: of the draws.

        Raises:
            ValueError, TypeError: fewer than two members, or a layer that one of them does not have.
        """
        members = members_of(model)
        check_places(members, [layer for layer in self.layers if isinstance(layer, str)])
        forget_places(members)
        self.drawn = _drawn(seed, epoch)
        return False

    def prepare(self, model: Members, images: Tensor, targets: Tensor) -> Tensor:
        """Distilled images (N, B, C, H, W) of a batch; each image's target is another one of the batch, at random.

        Of one image alone, the target is itself, and it stays as it is.

        Args:
            model: the members, which are left as they were.
            images: (B, C, H, W) floating-point in [0, 1].
            targets: not looked at.

        Raises:
            ValueError, TypeError: images of another shape or type, fewer than two members, or a layer that one of them
                does not have.
        """
        _check_images(images)
        # Everyone is the next one's target in a random circle: nobody is his own.
        order = torch.randperm(len(images), device=images.device)
        others = torch.empty_like(images)
        others[order] = images[order.roll(1)]
        members = members_of(model)
        check_places(members, [layer for layer in self.layers if isinstance(layer, str)])
        with _distilling(members, self.batchnorm):
            if self.layers:
                chosen = self.layers[int(self.drawn * len(self.layers))]
                places = [chosen] * _count(members)
            else:
                places = [1 + int(self.drawn * count) for count in count_places(members, images[:2])]
            return _descend(members, images, others, places, self.eps, self.step, self.steps)

    def loss_and_terms(
        self, model: ImmunityMoE, images: Tensor, targets: Tensor, prepared: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `EnsembleLoss`; `images` count where they are adversarial training's alone."""
        if prepared is None:
            raise ValueError("prepared: expected the distilled images that `prepare` gives, got None")
        loss, terms = self._loss_of(model, prepared, images if self.adversarial else None, targets)
        return loss, (loss / terms,)

    def forward(self, members: Members, images: Tensor, targets: Tensor, adversarial: Tensor | None = None) -> Tensor:
        """The loss of a batch, 0-d: distils the images, and has each member learn those of the others.

        Args:
            members: an `ImmunityMoE` or a list of N networks from images (B, C, H, W) to logits (B, K), in training
                mode.
            images: (B, C, H, W) floating-point in [0, 1].
            targets: (B,) integers or (B, K) probabilities.
            adversarial: images that the members learn besides, (B, C, H, W), or (N, B, C, H, W), each member's own.

        Raises:
            ValueError, TypeError: what does not fit.
        """
        prepared = self.prepare(members, images, targets)
        return self._loss_of(members, prepared, adversarial, targets)[0]

    def passes(self, num_experts: int, attack_steps: int) -> float:
        """See `EnsembleLoss`: of each member N − 1 for the images that it learns; (steps + 1)/2 for distilling its own.

        A step goes on average through half of a member, as the layer is drawn; so does the target's pass, which is
        forward alone and counted as if it were not. Adversarial training adds that of plain members.
        """
        distilling = (self.steps + 1) / 2
        adversarial = 1 + attack_steps if attack_steps else 0
        return num_experts * (num_experts - 1 + distilling + adversarial)

    def _loss_of(
        self, members: Members, prepared: Tensor, adversarial: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, int]:
        """The loss, and of how many cross-entropies it is the sum."""
        experts, samples = prepared.shape[:2]
        # Each member's images in one pass, (N, M·B, C, H, W), so that BatchNorm counts them once.
        seen = torch.stack([torch.cat([prepared[:i], prepared[i + 1 :]]).flatten(0, 1) for i in range(experts)])
        if adversarial is not None:
            own = adversarial if adversarial.dim() == 5 else adversarial.expand(experts, *adversarial.shape)
            if own.shape != prepared.shape:
                raise ValueError(
                    f"adversarial: expected images {tuple(prepared.shape[1:])} or {tuple(prepared.shape)}, got "
                    f"{tuple(adversarial.shape)}"
                )
            seen = torch.cat([seen, own.to(seen.dtype)], dim=1)
        times = seen.shape[1] // samples
        logits = _logits(members, seen)
        labels = each_experts(targets, experts, samples)
        losses = self.expert_losses(logits, torch.cat([labels] * times, dim=1)).view(experts * times, samples)
        return self.mean(losses.sum(0), targets, logits.shape[-1]), experts * times


def distilled(
    members: Members,
    images: Tensor,
    others: Tensor,
    layer: Place,
    *,
    eps: float = 0.07,
    step: float = 0.007,
    steps: int = 10,
    batchnorm: BatchNormMode = "train",
) -> Tensor:
    """Images within eps of `images` that each member sees as `others`: it has features at a layer that are near theirs.

    ‖h(x') − h(others)‖² is descended by signs of the sum of all gradients so far, each divided by its l1 norm.

    Args:
        members: an `ImmunityMoE` or a list of N ≥ 2 networks, which are left as they were.
        images: the sources, (B, C, H, W) floating-point in [0, 1].
        others: their targets, of the same shape.
        layer: the number of a nonlinearity, from 1, whose input is taken, the logits being the one behind the last; or
            the name of a submodule, whose output is taken.
        eps: radius, Linf.
        step: size of a step.
        steps: how many.
        batchnorm: see `DVERGELoss`.

    Returns:
        (N, B, C, H, W) in [0, 1], member i's in place i, without a graph.

    Raises:
        ValueError, TypeError: what does not fit.
    """
    _check_settings(eps, step, steps, batchnorm)
    _check_images(images)
    if others.shape != images.shape:
        raise ValueError(f"others: expected shape {tuple(images.shape)}, as the images, got {tuple(others.shape)}")
    (place,) = _layers([layer])
    networks = members_of(members)
    check_places(networks, [place] if isinstance(place, str) else [])
    with _distilling(networks, batchnorm):
        return _descend(networks, images, others, [place] * _count(networks), eps, step, steps)


def _descend(
    members: Members, images: Tensor, others: Tensor, places: Sequence[Place], eps: float, step: float, steps: int
) -> Tensor:
    images = images.clone() if images.is_inference() else images.detach()
    with torch.no_grad():
        wanted = [at_least_float32(each) for each in features(members, others.detach(), places)]
    lower, upper = (images - eps).clamp_min_(0), (images + eps).clamp_max_(1)
    found = images.expand(_count(members), *images.shape)
    total = torch.zeros_like(at_least_float32(found))
    for _ in range(steps):
        found = found.detach().requires_grad_()
        near = features(members, found, places)
        # A sum, not the authors' mean, whose gradients would be nothing in half precision; signs are the same.
        distances = [(at_least_float32(each) - own).square().sum() for each, own in zip(near, wanted, strict=True)]
        (gradient,) = torch.autograd.grad(torch.stack(distances).sum(), found)
        gradient = at_least_float32(gradient)
        norm = gradient.abs().sum((-3, -2, -1), keepdim=True)
        total += gradient / torch.where(norm > 0, norm, 1)
        found = (found.detach() - step * total.sign().to(found.dtype)).clamp(lower, upper)
    return found.contiguous()


@contextmanager
def _distilling(members: ImmunityMoE | list[nn.Module], batchnorm: str) -> Iterator[None]:
    """The members' mode while images are made; nothing of theirs is differentiated, or counts what it sees."""
    model = members if isinstance(members, ImmunityMoE) else nn.ModuleList(members)
    by_batch = [part for part in model.modules() if part.training and batchnorm == "train"]
    with torch.inference_mode(False), torch.enable_grad(), frozen(model), evaluating(model), batch_statistics(by_batch):
        yield


def _logits(members: Members, images: Tensor) -> Tensor:
    """Logits (N, B, K) of each member's own images (N, B, C, H, W)."""
    if isinstance(members, ImmunityMoE):
        return members.expert_logits(images)
    outputs = [network(own) for network, own in zip(members, images, strict=True)]
    return torch.stack([check_logits("members", i, output, images.shape[1]) for i, output in enumerate(outputs)])


def _count(members: ImmunityMoE | Sequence[nn.Module]) -> int:
    return members.num_experts if isinstance(members, ImmunityMoE) else len(members)


def _drawn(seed: int, epoch: int) -> float:
    """Uniform in [0, 1): where among the layers that of an epoch is."""
    return random.Random(f"DVERGE {seed} {epoch}").random()


def _layers(layers: str | Sequence[Place]) -> tuple[Place, ...]:
    """Numbers and names; in a text, what is a number counts as one."""
    if isinstance(layers, str):
        parts = [part.strip() for part in layers.split("+")] if layers else []
        layers = [int(part) if part.isdecimal() else part for part in parts]
    for layer in layers:
        if isinstance(layer, str) and layer:
            continue
        if not is_whole(layer):
            raise TypeError(f"layers: expected numbers and names of submodules, got {layer!r}")
        if layer < 1:
            raise ValueError(f"layers: expected numbers from 1, got {layer}")
    return tuple(layers)


def _check_settings(eps: Any, step: Any, steps: Any, batchnorm: Any) -> None:
    for name, value in (("eps", eps), ("step", step)):
        if not is_number(value):
            raise TypeError(f"{name}: expected a number above 0 and at most 1, got {value!r}")
        if not 0 < value <= 1:
            raise ValueError(f"{name}: expected a number above 0 and at most 1, got {value}")
    check_whole("steps", steps, 1)
    check_choice("batchnorm", batchnorm, BatchNormMode)


def _check_images(images: Any) -> None:
    check_images(images)
    if not len(images):
        raise ValueError("images: expected at least one, got none")
