"""MORA, the model-reweighing attack: the strongest known on ensembles whose softmax, logits or votes are averaged.

`mora` attacks networks or a mixture, `attack_members` what is known by its members alone; `reweighing` has the losses.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast.attacks import reweighing
from immunity_fast.attacks.batch import FOR_GOOD, Batch, State, Worst
from immunity_fast.attacks.checks import check_finite, check_images, check_range, not_finite, outputs_of
from immunity_fast.attacks.dependence import check_dependence, image_gradient
from immunity_fast.attacks.descent import UnmovedWarning, checked_bounds, radius_of
from immunity_fast.attacks.members import (
    EnsembleMembers,
    MixtureMembers,
    NetworkMembers,
    Weighing,
    all_attacked,
    mixture_in,
    networks_in,
)
from immunity_fast.attacks.mixtures import Model
from immunity_fast.attacks.preprocessing import Preprocessing
from immunity_fast.attacks.projections import (
    UNIT,
    Bounds,
    Norm,
    largest_magnitude,
    linf_bounds,
    project_l2,
    random_start,
    rounded_bounds,
    unit,
)
from immunity_fast.attacks.radii import Given, for_each_image, of_each, one_or_each
from immunity_fast.attacks.reweighing import Average, Formula
from immunity_fast.runtime.checks import check_choice, check_weight, check_whole
from immunity_fast.runtime.outputs import kind_of
from immunity_fast.runtime.precision import accumulation_dtype, at_least_float32

Formulas = Literal["both", "intended", "released"]
Networks = Sequence[Model] | nn.ModuleList

STEPS = 100
MIXING = (0.5, 0.0, 0.25, 0.75, 1.0)
TARGETS = 9
KEPT = 0.75  # of each step but the first; the rest is the last move


@overload
def mora(
    model: Networks | nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    weighing: Weighing | None = None,
    average: Average = "softmax",
    formula: Formulas = "both",
    eps: Given | None = None,
    steps: int = STEPS,
    mixing: Sequence[float] = MIXING,
    targeted: int = TARGETS,
    norm: Norm = "Linf",
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> Tensor: ...


@overload
def mora(
    model: Networks | nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    weighing: Weighing | None = None,
    average: Average = "softmax",
    formula: Formulas = "both",
    eps: Sequence[Given],
    steps: int = STEPS,
    mixing: Sequence[float] = MIXING,
    targeted: int = TARGETS,
    norm: Norm = "Linf",
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> list[Tensor]: ...


def mora(
    model: Networks | nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    weighing: Weighing | None = None,
    average: Average = "softmax",
    formula: Formulas = "both",
    eps: Given | Sequence[Given] | None = None,
    steps: int = STEPS,
    mixing: Sequence[float] = MIXING,
    targeted: int = TARGETS,
    norm: Norm = "Linf",
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> Tensor | list[Tensor]:
    """Model-reweighing attack (Yu et al., arXiv 2211.08008) on an ensemble whose members' answers are averaged.

    One descent for each share of the members in the loss, one for each class that is aimed at, each from a random point
    of the ball and on those images alone that withstood the ones before. Steps shrink from 2 eps to 0 on a cosine and
    keep a quarter of the last move. An image leaves as soon as it fools the ensemble.

    Args:
        model: a list, a tuple or an `nn.ModuleList` of N networks from images (B, C, H, W) to logits or
            log-probabilities (B, K); or a mixture, `ImmunityMoE` or another that can do what `mixtures.Mixture` says,
            also as `.deterministic()`. Modules are in evaluation mode for as long as the attack takes.
        images: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers in 0..K−1.
        weights: N numbers of at least 0, which are divided by their sum; None is 1/N each. Of networks only.
        weighing: of a mixture only: "mean", 1/N each, which is the exact mean over all permutations of its gate; "off",
            the gate as it was trained. None is "off" where the mixture's switch is, else "mean". Of a gate whose
            weights are fixed all are these.
        average: what is averaged: "softmax", probabilities; "logits"; or "vote", the members' classes. A vote is
            attacked through softmax of steep logits; whether it is fooled the votes themselves say, by weight, and of
            classes that have as many the lowest wins.
        formula: by which members are weighed: "intended", the paper's; "released", that of the authors' code, whose
            signs are mistaken and in which the ensemble is a member, too; "both", one after the other from the same
            random point, so that it fools whom either does.
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`. A
            tensor (B,) has a radius of each image's own. A list or tuple has several, for each of which there is a
            result: what a call with it alone gives, from the same random state.
        steps: of each descent.
        mixing: the members' share in the loss, in [0, 1], of one descent after the other.
        targeted: how many wrong classes are aimed at, the likeliest first; all if there are no more. 0 is none.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        generator: of random starts; None is PyTorch's default generator.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        preprocessing: what is done to images on their way to the model, `dict(mean=…, std=…)`: (images − mean) / std.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds, exactly: one
        that fools the ensemble where one was found; where none was, the one with the largest cross-entropy of all that
        were seen, the image itself among them. An image that the ensemble is wrong about already is returned as it is.
        Of several radii a list.

    Raises:
        ValueError: a model that is neither; weights that do not fit, or of a mixture; `weighing` of networks; images
            out of bounds or not 4-D; labels of another shape, not integers or out of range; an unknown word; eps,
            steps or targeted < 0; a share outside [0, 1]; an output without a gradient, or one that is the same for
            different images and has no gradient for any; as `NotFiniteError`, an output or gradient that is NaN or
            infinite.
        TypeError: images or labels that are no tensors, networks that cannot be called.

    Warns:
        UnmovedWarning: of some images every gradient was exactly zero, so that the attack could not move them.
        MovedStatisticsWarning: a network is a function that asks a module in training mode, whose statistics moved.
    """
    members = _members_of(model, weights, weighing, preprocessing)
    if not isinstance(mixing, Iterable):
        raise TypeError(f"mixing: expected several numbers from 0 to 1, got {mixing!r}")
    settings = partial(MoraSettings, steps=steps, average=average, formula=formula, mixing=tuple(mixing))
    settings = partial(settings, targeted=targeted, norm=norm, bounds=bounds)

    def one(given: Given | None) -> Tensor:
        radius, radii = one_or_each(given)
        with all_attacked(model):
            return attack_members(members, settings(eps=radius), images, labels, generator, eps=radii)

    return of_each(eps, one, images, generator) if isinstance(eps, Sequence) else one(eps)


@dataclass(frozen=True)
class MoraSettings:
    """The settings of MORA, to be kept, listed or used on `EnsembleMembers`.

    Args:
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`.
        steps: of each descent.
        mixing: the members' share in the loss, in [0, 1], of one descent after the other.
        targeted: how many wrong classes are aimed at, the likeliest first.
        average: what is averaged, "softmax", "logits" or "vote"; see `mora`.
        formula: by which members are weighed, "intended", "released" or "both"; see `mora`.
        norm: "Linf" or "L2".
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.

    Raises:
        ValueError: a setting out of its range.
        TypeError: no number where one is expected.
    """

    eps: float | None = None
    steps: int = STEPS
    mixing: tuple[float, ...] = MIXING
    targeted: int = TARGETS
    average: Average = "softmax"
    formula: Formulas = "both"
    norm: Norm = "Linf"
    bounds: Bounds = UNIT

    def __post_init__(self) -> None:
        check_choice("average", self.average, Average)
        check_choice("formula", self.formula, Formulas)
        check_choice("norm", self.norm, Norm)
        object.__setattr__(self, "bounds", checked_bounds(self.bounds))
        object.__setattr__(self, "eps", radius_of(self.eps, self.norm, self.bounds))
        check_weight("eps", self.eps)
        for name in ("steps", "targeted"):
            check_whole(name, getattr(self, name), 0)
            object.__setattr__(self, name, operator.index(getattr(self, name)))  # NumPy's are no numbers for JSON
        for share in self.mixing:
            check_weight("mixing", share)
            if share > 1:
                raise ValueError(f"mixing: expected numbers from 0 to 1, got {share}")
        object.__setattr__(self, "mixing", tuple(float(share) for share in self.mixing))

    @property
    def radius(self) -> float:
        """The ball's radius: `eps`, its default filled in."""
        return radius_of(self.eps, self.norm)

    def formulas(self, mixing: float) -> tuple[Formula, ...]:
        """Those by which the members are weighed, one after the other; where they have no share, one will do."""
        if self.formula == "both":
            return get_args(Formula) if mixing > 0 else ("intended",)
        return (self.formula,)


def attack_members(
    members: EnsembleMembers,
    settings: MoraSettings,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    *,
    eps: Tensor | None = None,
) -> Tensor:
    """`mora` on members, in the mode that they are in.

    No output of theirs is used once they are asked again, so they may be compiled. Batches become smaller while images
    leave.

    Args:
        members: N networks and their weights.
        settings: what is done.
        images: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers in 0..K−1.
        generator: of random starts; None is PyTorch's default generator.
        eps: (B,) radii of each image's own; None is the settings' one of all.

    Returns:
        Adversarial images (B, C, H, W), as `mora` returns them.

    Raises:
        ValueError, TypeError: see `mora`.
    """
    check_images(images, labels, None, settings.bounds)
    radii = for_each_image("eps", eps, images)
    images, labels = images.detach(), labels.long()
    if not len(images):
        return images.clone()
    return _Descents(members, settings, images, labels, generator, radii).run()


class _Answers(NamedTuple):
    """What members say of B images."""

    logits: Tensor  # (N, B, K), finite
    weights: Tensor  # (B, N)
    loss: Tensor  # (B,) cross-entropy of the ensemble
    fooled: Tensor  # (B,) bool
    broken: Tensor  # (B,) bool: whether an output is no number
    said: tuple[Tensor, Tensor]  # logits and weights as the members gave them, in float32 at least


_Objective = Callable[[_Answers, State], Tensor]  # what is maximised, (B,)


class _Descents:
    """All descents of one batch, and the worst image of each so far."""

    def __init__(
        self,
        members: EnsembleMembers,
        settings: MoraSettings,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
        radii: Tensor | None,
    ) -> None:
        self.members, self.settings, self.generator, self.radii = members, settings, generator, radii
        self.box = rounded_bounds(settings.bounds, images.dtype)
        low, high = None, None
        if settings.norm == "Linf":
            low, high = linf_bounds(images, settings.radius if radii is None else radii, self.box)
        self.clean = State(images, images, labels, None, None, low, high, _zeros(images), radii)
        self.worst = Worst(images, needed=True)
        self.unmoved = torch.ones(len(images), dtype=torch.bool, device=images.device)
        self.first = True  # no gradient was taken yet

    def run(self) -> Tensor:
        """The worst image of each, (B, C, H, W)."""
        settings, targets = self.settings, self._begin_at_clean()
        for mixing in settings.mixing:
            start = self._start()
            for formula in settings.formulas(mixing):
                self._descend(start, self._mixed(mixing, formula))
        for aimed_at in targets:
            self._descend(self._start()._replace(targets=aimed_at), self._targeted)
        stuck = 0 if self.first else int((self.unmoved & (self.worst.success < FOR_GOOD)).sum())
        if stuck:
            warnings.warn(
                f"the attack cannot move: the gradient is exactly zero for {stuck} of {len(self.unmoved)} images "
                "although the members' outputs depend on them; try an attack without gradients",
                UnmovedWarning,
                stacklevel=5,
            )
        return self.worst.images

    def _begin_at_clean(self) -> list[Tensor]:
        """Judge the images as they are; the classes to aim at, the likeliest first, each (B,)."""
        with torch.no_grad():
            found = self._asked(self.clean)
        check_range(self.clean.labels, None, found.logits.shape[-1])
        check_finite(found.broken)
        self.worst.update(self._everybody(), self.clean.images, found.loss, FOR_GOOD * found.fooled)
        output = reweighing.answer(found.logits, found.weights, self.settings.average)
        count = min(self.settings.targeted, output.shape[-1] - 1)
        wrong = output.scatter(-1, self.clean.labels[:, None], -torch.inf)
        return list(wrong.topk(count, -1).indices.T)

    def _everybody(self) -> Tensor:
        return torch.arange(len(self.clean.labels), device=self.clean.labels.device)

    def _start(self) -> State:
        """All images at random points: those of a descent do not depend on who has withstood the ones before."""
        state = self.clean
        if not len(self.worst.survivors()):
            return state
        radius = self.settings.radius if self.radii is None else self.radii
        start = random_start(state.images, radius, self.settings.norm, self.generator)
        return state._replace(adversarial=self._inside(state, start))

    def _mixed(self, mixing: float, formula: Formula) -> _Objective:
        average = self.settings.average

        def objective(found: _Answers, state: State) -> Tensor:
            return reweighing.mixed_loss(found.logits, found.weights, state.labels, average, mixing, formula)

        return objective

    def _targeted(self, found: _Answers, state: State) -> Tensor:
        assert state.targets is not None
        return reweighing.targeted_loss(found.logits, found.weights, state.targets, self.settings.average)

    def _descend(self, start: State, objective: _Objective) -> None:
        """One descent of all who have withstood the attack so far."""
        batch = Batch(self._everybody(), start, len(start.labels)).select(self.worst.survivors())
        broken = torch.zeros_like(self.unmoved)
        for step in range(self.settings.steps):
            if not len(batch.where):
                break
            gradient, found = self._differentiate(batch.state, objective)
            broken[batch.where] |= found.broken | ~gradient.isfinite().flatten(1).all(1)
            still = (gradient == 0).flatten(1).all(1)
            self.unmoved[batch.where] &= still
            if self.first:
                self._check_first(broken, still, batch.state)
            self._keep(batch, found)
            batch.state = self._moved(batch.state, gradient, step)
            batch = batch.select((~found.fooled).nonzero()[:, 0])
        if len(batch.where):
            with torch.no_grad():
                found = self._asked(batch.state)
            broken[batch.where] |= found.broken
            self._keep(batch, found)
        check_finite(broken)

    def _check_first(self, broken: Tensor, still: Tensor, state: State) -> None:
        self.first = False
        check_finite(broken)
        if bool(still.all()):
            check_dependence(lambda x, _: self.members.logits(x), state.adversarial, state.labels, None, self.box)

    def _differentiate(self, state: State, objective: _Objective) -> tuple[Tensor, _Answers]:
        """(the objective's gradient (B, C, H, W), scaled; what the members say).

        What is sent back through the members is each image's gradient with a largest magnitude of 1. The loss divides
        by gaps: where they are next to nothing, its own is more than float16 has.
        """
        with torch.enable_grad():
            x = state.adversarial.detach().requires_grad_()
            found = self._asked(state._replace(adversarial=x))
            total = objective(found, state).sum()
            said = [value for value in found.said if value.requires_grad]
            if not said:
                return image_gradient(total, x), found
            gradients = torch.autograd.grad(total, said, allow_unused=True, materialize_grads=True)
            # Images first: logits are (N, B, K), weights (B, N).
            by_image = [value.movedim(-2, 0).flatten(1) for value in gradients]
            largest = largest_magnitude(torch.cat(by_image, 1))
            scaled = [value / largest for value in gradients]
            gradient = torch.autograd.grad(said, x, scaled, allow_unused=True)[0]
            return image_gradient(total.detach(), x) if gradient is None else gradient, found

    def _asked(self, state: State) -> _Answers:
        """One pass over all members, and the verdict on what they say."""
        average = self.settings.average
        returned = self.members.logits(state.adversarial)
        logits = at_least_float32(outputs_of(returned, len(state.labels)))
        if logits.dim() != 3 or logits.shape[-1] < 2:
            raise ValueError(
                f"model: expected members' logits (N, {len(state.labels)}, K) of at least 2 classes, got "
                f"{kind_of(returned)}"
            )
        weights = self.members.weights(state.adversarial).to(logits.dtype)
        broken = not_finite(logits) | ~weights.detach().isfinite().all(-1)
        labels = state.labels.clamp(0, logits.shape[-1] - 1)  # on a GPU one out of range would end the process
        with torch.no_grad():
            fooled = reweighing.predicted(logits, weights, average) != labels
        said = logits, weights
        logits = reweighing.finite_logits(logits)
        with torch.no_grad():
            output = reweighing.answer(logits, weights, average)
            loss = F.cross_entropy(output, labels, reduction="none")
        return _Answers(logits, weights, loss, fooled, broken, said)

    def _keep(self, batch: Batch, found: _Answers) -> None:
        self.worst.update(batch.where, batch.state.adversarial, found.loss, FOR_GOOD * found.fooled)

    def _moved(self, state: State, gradient: Tensor, step: int) -> State:
        """Where a step leads."""
        settings = self.settings
        radius = settings.radius if state.eps is None else state.eps
        direction = gradient.sign() if settings.norm == "Linf" else unit(gradient)
        dtype = accumulation_dtype(state.images)
        at, move = state.adversarial.to(dtype), direction.to(dtype)
        size = radius * (1 + math.cos(math.pi * step / settings.steps))
        target = self._inside(state, at + (size.to(dtype) if isinstance(size, Tensor) else size) * move).to(dtype)
        assert state.momentum is not None
        kept = KEPT if step else 1.0
        moved = self._inside(state, at + kept * (target - at) + (1 - kept) * state.momentum)
        return state._replace(adversarial=moved, momentum=moved.to(dtype) - at)

    def _inside(self, state: State, images: Tensor) -> Tensor:
        """The nearest images of the balls and the box, in the images' dtype."""
        if state.low is not None and state.high is not None:
            return images.to(state.images.dtype).clamp(state.low, state.high)
        radius = self.settings.radius if state.eps is None else state.eps
        return project_l2(images, state.images, radius, self.box)


def _zeros(images: Tensor) -> Tensor:
    return torch.zeros_like(images, dtype=accumulation_dtype(images))


def _members_of(
    model: Any,
    weights: Sequence[float] | Tensor | None,
    weighing: Weighing | None,
    preprocessing: Preprocessing | None,
) -> EnsembleMembers:
    """The members of a model, behind their preprocessing.

    Raises:
        ValueError, TypeError: see `mora`.
    """
    if weighing is not None:
        check_choice("weighing", weighing, Weighing)
    networks = networks_in(model)
    if networks is not None:
        if weighing is not None:
            raise ValueError(f"weighing: expected None, as of networks there are `weights`, got {weighing!r}")
        return NetworkMembers(networks, weights, preprocessing)
    mixture = mixture_in(model)
    if mixture is None:
        raise ValueError(
            "model: expected a list of networks, or a mixture with `expert_logits`, `gate_weights` and a `gate`: the "
            f"members are attacked, got {type(model).__name__}"
        )
    if weights is not None:
        raise ValueError("weights: expected None, as a mixture has its own, see `weighing`, got some")
    if weighing is None:
        itself = mixture is getattr(model, "_orig_mod", model)
        weighing = "off" if itself and mixture.gate.switch == "off" else "mean"
    return MixtureMembers(mixture, weighing, preprocessing=preprocessing)
