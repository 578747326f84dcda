"""AutoAttack, of parts of this package, on any callable from images to logits or log-probabilities.

The parts and their settings are those of the authors' code, https://github.com/fra31/auto-attack. Two things make it
faster, without a change to what it finds: an image that fools the model is attacked no further, not even to the end of
a run; and where few images are left, the runs towards several classes are one batch.

What the parts return has been judged as it is: inside the ball and the bounds, exactly, in the images' dtype. They
compute in float32 at least and round to that dtype what they show the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from immunity_fast.attacks.apgd import Descent
from immunity_fast.attacks.batch import Worst
from immunity_fast.attacks.checks import NotFiniteError
from immunity_fast.attacks.fab import fab_targeted
from immunity_fast.attacks.losses import Loss
from immunity_fast.attacks.mixtures import Model
from immunity_fast.attacks.modes import attacked
from immunity_fast.attacks.parts import (
    NOT_FINITE,
    Aim,
    Network,
    Objective,
    Part,
    at_radii,
    check_seed,
    check_settings,
    in_turn,
)
from immunity_fast.attacks.preprocessing import Preprocessing, preprocessed
from immunity_fast.attacks.projections import UNIT, Bounds, Norm, rounded_bounds
from immunity_fast.attacks.radii import Given
from immunity_fast.attacks.square import square_search
from immunity_fast.runtime.checks import check_choice, check_whole
from immunity_fast.runtime.compilation import Compile
from immunity_fast.runtime.precision import at_least_float32

Version = Literal["standard", "rand"]

TARGETS = 9  # classes that each targeted attack tries, the likeliest first
DRAWS = 20  # forward passes that a step averages over, if the model is random


@overload
def autoattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    eps: Given | None = None,
    norm: Norm = "Linf",
    version: Version = "standard",
    seed: int = 0,
    steps: int = 100,
    queries: int = 5000,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    compile: Compile = "off",
) -> Tensor: ...


@overload
def autoattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    eps: Sequence[Given],
    norm: Norm = "Linf",
    version: Version = "standard",
    seed: int = 0,
    steps: int = 100,
    queries: int = 5000,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    compile: Compile = "off",
) -> list[Tensor]: ...


def autoattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    eps: Given | Sequence[Given] | None = None,
    norm: Norm = "Linf",
    version: Version = "standard",
    seed: int = 0,
    steps: int = 100,
    queries: int = 5000,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    compile: Compile = "off",
) -> Tensor | list[Tensor]:
    """AutoAttack (Croce & Hein, arXiv 2003.01690): several attacks, each on the images that survived those before.

    Each image that an attack hands back is judged by one forward pass of the model, as in the authors' code. For a
    random model that is one draw: an image counts as fooled if the model happened to be wrong then, and may be right
    when it is asked again. FAB looks beyond the ball, too; what it finds there is moved into the ball and judged.

    Args:
        model: images (B, C, H, W), of the images' dtype, to logits or log-probabilities (B, K); for "rand" it may give
            (20, B, K), the draws of a step by one pass over what is not random. A module is in evaluation mode for as
            long as the attack takes; its parameters' gradients and its outputs stay as they are.
        images: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers in 0..K−1.
        num_classes: K; None is as many as the model's outputs have.
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`. A
            tensor (B,) has a radius of each image's own: images of different radii are attacked one after the other. A
            list or tuple has several, for each of which there is a result: what a call with it alone gives.
        norm: "Linf" or "L2".
        version: "standard": APGD on the cross-entropy, APGD on the targeted DLR loss and FAB, targeted, each for the
            min(9, K − 1) likeliest wrong classes, and Square Attack. The targeted DLR loss needs four classes: with
            fewer its APGD is left out. "rand", for a random model: APGD on the cross-entropy and on the DLR loss, the
            gradient averaged over 20 draws: 20 forward passes; but one of a model that gives 20 draws, and one over
            the experts of an `ImmunityMoE` whose gate switches. The DLR loss needs three classes: with two, the first
            alone.
        seed: of all chance, that of a model that draws from the global generators of torch, NumPy or Python too; these
            are afterwards as they were before. A generator of the model's own is left alone.
        steps: of each run of APGD and of FAB; 100 as published.
        queries: of Square Attack; 5000 as published.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        preprocessing: what is done to images on their way to the model, `dict(mean=…, std=…)`: (images − mean) / std.
        compile: "on" compiles the passes of a model that is not random, with their gradients, for the whole batch, a
            half, a quarter and an eighth of it; where that fails, it says so and goes on without.

    Returns:
        (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds, exactly: an image that fools the
        model where one was found, and the image itself where the model is wrong without an attack or withstood it. So
        the accuracy on them is the robust accuracy. Of several radii a list.

    Raises:
        ValueError: images out of bounds or not 4-D; labels of another shape, not integers or out of range; an unknown
            norm or version; eps < 0, num_classes < 2, steps or queries < 1; outputs that are not (B, num_classes), that
            have no gradient with respect to the images, which `square` does not need, or that are NaN or infinite, as
            `NotFiniteError` where they are so for an image itself.
        TypeError: images or labels that are no tensors; a seed or a number of things that is not whole.

    Warns:
        MovedStatisticsWarning: the model is a function that asks a module in training mode, whose statistics moved.
    """
    check_choice("version", version, Version)
    check_choice("compile", compile, Compile)
    check_settings(images, labels, norm, bounds, steps=steps, queries=queries)
    check_seed(seed)
    if num_classes is not None:
        check_whole("num_classes", num_classes, 2)

    def one(radius: float, images: Tensor, labels: Tensor) -> Tensor:
        draws = DRAWS if version == "rand" else 1
        network = Network(prepared, images.dtype, draws, compile=compile, device=images.device)
        parts = _Parts(network, radius, norm, rounded_bounds(bounds, images.dtype), steps, queries)
        return in_turn(
            network,
            lambda classes: _published(parts, version, classes),
            images,
            labels,
            eps=radius,
            norm=norm,
            bounds=bounds,
            seed=seed,
            num_classes=num_classes,
            gradients=True,
        )

    prepared = preprocessed(model, preprocessing)
    with attacked(model):
        return at_radii(one, eps, norm, bounds, images, labels)


def _published(parts: _Parts, version: Version, num_classes: int) -> list[Part]:
    """The attacks of a version in their order."""
    order, targets = [Part(parts.apgd_ce)], min(TARGETS, num_classes - 1)
    if version == "rand":
        return [*order, Part(parts.apgd_dlr)] if num_classes >= 3 else order
    if num_classes >= 4:
        order.append(Part(parts.apgd_dlr, targets))
    return [*order, Part(parts.fab, targets), Part(parts.square)]


class _Parts:
    """The attacks with the published settings, each for one run: images and their labels to images."""

    def __init__(self, network: Network, eps: float, norm: Norm, bounds: Bounds, steps: int, queries: int) -> None:
        self.network, self.eps, self.norm, self.bounds = network, eps, norm, bounds
        self.steps, self.queries = steps, queries

    def apgd_ce(self, images: Tensor, labels: Tensor, aim: Aim | None) -> Tensor:
        """Auto-PGD on the cross-entropy."""
        return self._apgd(images, labels, aim, "ce")

    def apgd_dlr(self, images: Tensor, labels: Tensor, aim: Aim | None) -> Tensor:
        """Auto-PGD on the DLR loss; with an aim on the targeted one."""
        return self._apgd(images, labels, aim, "dlr")

    def _apgd(self, images: Tensor, labels: Tensor, aim: Aim | None, loss: Loss) -> Tensor:
        """What fools the model; images that withstood as they were."""
        descent = Descent(self.eps, self.norm, self.bounds, steps=self.steps, objective=Objective(loss))
        rows = torch.arange(len(images), device=images.device)
        targets, groups = (None, None) if aim is None else aim
        worst = Worst(images, needed=True)
        try:
            descent.run(self.network, images, labels, targets, rows, worst, groups=groups)
        except NotFiniteError:  # of an image that is no longer the one of that number
            raise ValueError(NOT_FINITE) from None
        return torch.where((worst.success > 0)[:, None, None, None], worst.images, images)

    def fab(self, images: Tensor, labels: Tensor, aim: Aim | None) -> Tensor:
        """Fast adaptive boundary attack (Croce & Hein, arXiv 1907.02044), targeted."""
        assert aim is not None
        return fab_targeted(
            self.network,
            at_least_float32(images),
            labels,
            aim.targets,
            eps=self.eps,
            norm=self.norm,
            bounds=self.bounds,
            groups=aim.places,
            steps=self.steps,
        )

    def square(self, images: Tensor, labels: Tensor, _: Aim | None) -> Tensor:
        """Square Attack, whose squares shrink as if there were 10,000 queries."""
        return square_search(
            self.network,
            images,
            labels,
            eps=self.eps,
            norm=self.norm,
            bounds=self.bounds,
            queries=self.queries,
            rescale=False,
            at_once=0 if self.network.random else self.network.whole,
        )
