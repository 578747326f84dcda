"""Gradient attacks on any callable from images to logits or log-probabilities; conventions are torchattacks'.

`fgsm`, `bim`, `mim` and `pgd` are functions; `Attack` holds the same settings, to be kept, listed or compiled. Each
takes the model as it is: the caller chooses evaluation mode and the gate's switch. Attackers who know the gate are in
`adversaries`.

Shared arguments:
    model: images (B, C, H, W) in [0, 1] to logits or log-probabilities (B, K); or (draws, B, K), several draws of a
        random output, whose losses are averaged: expectation over transformation (EOT, arXiv 1707.07397).
    images: (B, C, H, W) floating-point, in [0, 1].
    labels: (B,) integers in 0..K−1.
    eps: radius of the ball, in units of the images' range; None is 8/255 for Linf, 1 for L2.
    alpha: size of a step; None is 2/255 for Linf, 0.2 for L2. steps: number of steps.
    norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
    loss: "ce", "dlr" or "cw", see `attack_losses`; it is maximised.
    targets: (B,) classes that the attack is to reach; None is any but the label.
    random_start: begin at a random point of the ball, not at the image. restarts: how often, the worst counting.
    keep_best: the worst of all images on the way counts, not the last.
    drop_fooled: an image that fools the model leaves the batch as it then is, and costs nothing more.
    generator: of random starts; None is PyTorch's default generator.

`keep_best`, `drop_fooled` and more restarts can only lower the accuracy of a model that is not random. Where a
mixture's gate switches at random, they do not judge by a draw, whose luck would pass for strength: the exact mean of
the gate's permutations says what is worst, and an image is dropped when it fools the mixture whatever the gate draws.
Of other random models they know nothing: there they may raise the accuracy.

Each returns adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and inside [0, 1]: exactly,
in bfloat16, too. `ValueError`: images outside [0, 1] or not 4-D, labels or targets of another shape, not integers or
out of range, eps or alpha < 0, steps < 0, restarts < 1, or an output that is the same for different images and has no
gradient for any; `NotFiniteError`, which is one: an output or gradient that is no number. `UnmovedWarning`: so many of
the images have a gradient of exactly zero, so that the attack cannot move them; they are returned as they began.
"""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.attacks.checks import check_finite, check_images, check_range
from immunity_fast.attacks.losses import Loss, loss_of
from immunity_fast.attacks.mixtures import Judge, LabelledModel, Model, asked_modules, exact_means, judge_of
from immunity_fast.attacks.projections import Norm, linf_bounds, project_l2, random_start, scaled, unit
from immunity_fast.runtime.checks import check_choice
from immunity_fast.runtime.compilation import Compile, Compiled, Log

EPS: dict[Norm, float] = {"Linf": 8 / 255, "L2": 1.0}
ALPHA: dict[Norm, float] = {"Linf": 2 / 255, "L2": 0.2}
FOR_GOOD = 2  # of an image that fools a model: it does, whatever a random model draws
AT_ONCE = 32  # images, where outputs are compared
BUCKETS = 4  # a compiled step is compiled for the whole batch, for a half, a quarter and an eighth of it


class UnmovedWarning(UserWarning):
    """An attack could not move some images, because the gradient of what it maximises is exactly zero for them."""


def fgsm(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    norm: Norm = "Linf",
    loss: Loss = "ce",
    targets: Tensor | None = None,
) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., arXiv 1412.6572): one step of size eps."""
    radius = Attack(eps, norm=norm).radius
    return Attack(radius, radius, steps=1, norm=norm, loss=loss)(model, images, labels, targets)


def bim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    alpha: float | None = None,
    steps: int = 10,
    norm: Norm = "Linf",
    loss: Loss = "ce",
    targets: Tensor | None = None,
    keep_best: bool = False,
    drop_fooled: bool = False,
) -> Tensor:
    """Basic iterative method (Kurakin et al., arXiv 1607.02533): steps from the image itself."""
    attack = Attack(eps, alpha, steps, norm, loss, keep_best=keep_best, drop_fooled=drop_fooled)
    return attack(model, images, labels, targets)


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    alpha: float | None = None,
    steps: int = 10,
    norm: Norm = "Linf",
    loss: Loss = "ce",
    targets: Tensor | None = None,
    random_start: bool = True,
    restarts: int = 1,
    keep_best: bool = False,
    drop_fooled: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al., arXiv 1706.06083): BIM from a random point of the ball."""
    attack = Attack(
        eps,
        alpha,
        steps,
        norm,
        loss,
        random_start=random_start,
        restarts=restarts,
        keep_best=keep_best,
        drop_fooled=drop_fooled,
    )
    return attack(model, images, labels, targets, generator)


def mim(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | None = None,
    alpha: float | None = None,
    steps: int = 10,
    decay: float = 1.0,
    norm: Norm = "Linf",
    loss: Loss = "ce",
    targets: Tensor | None = None,
    keep_best: bool = False,
    drop_fooled: bool = False,
) -> Tensor:
    """Momentum iterative method (Dong et al., arXiv 1710.06081): steps along a decaying sum of scaled gradients."""
    attack = Attack(eps, alpha, steps, norm, loss, decay=decay, keep_best=keep_best, drop_fooled=drop_fooled)
    return attack(model, images, labels, targets)


@dataclass(frozen=True)
class Attack:
    """The settings of one of these attacks, under the names above; `decay`: of MIM's momentum, None is none.

    Raises:
        ValueError: a setting out of its range.
    """

    eps: float | None = None
    alpha: float | None = None
    steps: int = 10
    norm: Norm = "Linf"
    loss: Loss = "ce"
    decay: float | None = None
    random_start: bool = False
    restarts: int = 1
    keep_best: bool = False
    drop_fooled: bool = False

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, Norm)
        check_choice("loss", self.loss, Loss)
        for name in ("eps", "alpha"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, {"eps": EPS, "alpha": ALPHA}[name][self.norm])
        for name, least in (("eps", 0), ("alpha", 0), ("decay", 0), ("steps", 0), ("restarts", 1)):
            value = getattr(self, name)
            if name in ("steps", "restarts") and not isinstance(value, int):
                raise ValueError(f"{name}: expected a whole number, got {value}")
            if value is not None and not least <= value < math.inf:  # NaN too
                raise ValueError(f"{name}: expected a finite number of at least {least}, got {value}")

    @property
    def radius(self) -> float:
        """`eps`, its default filled in."""
        assert self.eps is not None
        return self.eps

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Adversarial images, see the top of this file."""
        return BoundAttack(self, lambda x, _: model(x))(images, labels, targets, generator)


class BoundAttack:
    """An attack on one model, whose step is compiled once and replayed for every batch of that size.

    Args:
        attack: the settings.
        model: (images, labels) to outputs: the labels are for attackers whose objective depends on them.
        compile: "on" and "max" compile the step: the model, its gradient and the projection in one graph, without
            gradients of parameters. Where that fails, the step is eager, and says so.
        judge: by what `keep_best`, `drop_fooled` and restarts judge a random model, see `adversaries.Judge`; "outputs":
            the model's are not random. None is the model's `exact_judge`, see `adversaries.attacker`, or finds out
            whether a gate switches while the model is asked.
        elsewhere: (M, C, H, W) images on which the model's outputs are compared, besides made-up ones, where none of a
            batch has a gradient: if they agree on all, the model does not depend on its input.
        device: where the images will be; only compiling asks for it.
        log, traceback_file: what takes such a line, and the whole traceback; see `Compiled`.

    Attributes:
        unmoved: (B,) bool, which images of the last call had a gradient of exactly zero at every step.
    """

    def __init__(
        self,
        attack: Attack,
        model: LabelledModel,
        *,
        judge: Judge | Literal["outputs"] | None = None,
        elsewhere: Tensor | None = None,
        compile: Compile = "off",
        device: torch.device | None = None,
        log: Log | None = None,
        traceback_file: Path | None = None,
    ) -> None:
        self.attack, self.model, self.elsewhere = attack, model, elsewhere
        self.judge = getattr(model, "exact_judge", None) if judge is None else judge
        self.unmoved = torch.zeros(0, dtype=torch.bool)
        self._step_function = Compiled(self._step, compile, device or torch.device("cpu"), log, traceback_file)

    @property
    def compiled(self) -> bool:
        """Whether the step is compiled, or will be at its first call."""
        return self._step_function.active

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        start: Tensor | None = None,
        reference: Tensor | None = None,
        trusted: bool = False,
    ) -> Tensor:
        """Adversarial images.

        Args:
            images, labels, targets, generator: see the top of this file.
            start: (B, C, H, W) where to begin, once projected; None is as the settings say.
            reference: (B, K) probabilities: instead of `loss`, the KL divergence of the model's from them is maximised.
            trusted: skip all checks, each of which waits for the device.
        """
        if not trusted:
            check_images(images, labels, targets)
        images, labels = images.detach(), labels.long()
        targets = None if targets is None else targets.long()
        attack = self.attack
        self.unmoved = torch.full((len(images),), attack.steps > 0, device=images.device)
        result = _Result(images, needed=attack.keep_best or attack.drop_fooled or attack.restarts > 1)
        for restart in range(attack.restarts if len(images) else 0):
            if start is not None:
                begin = self._project(start.detach(), images)
            elif attack.random_start:
                begin = self._project(random_start(images, attack.radius, attack.norm, generator), images)
            else:
                begin = images
            batch = _Batch(torch.arange(len(images), device=images.device), begin, images, labels, targets, reference)
            if attack.norm == "Linf":
                batch.low, batch.high = linf_bounds(images, attack.radius)
            if attack.decay is not None:
                batch.momentum = torch.zeros_like(images, dtype=torch.promote_types(images.dtype, torch.float32))
            if attack.drop_fooled and restart:
                batch = batch.select(result.survivors())
            self._run(batch, result, trusted)
        if not trusted and bool(self.unmoved.any()):
            self._warn_of_the_unmoved()
        return result.images.clone()

    def _run(self, batch: _Batch, result: _Result, trusted: bool) -> None:
        """One descent of the images in the batch."""
        attack = self.attack
        broken = torch.zeros(batch.whole, dtype=torch.bool, device=batch.where.device)
        judge = self.judge if result.needed else "outputs"
        if judge is None and (self.compiled or not attack.steps):  # else the first step finds out
            judge = judge_of(self.model, batch.adversarial[:1], batch.labels[:1])
        for step in range(attack.steps):
            if not len(batch.where):
                break
            with asked_modules() if judge is None else nullcontext() as asked:
                moved, momentum, loss, fooled, bad, classes, still = self._call(batch)
            if asked is not None:
                judge = judge_of(self.model, batch.adversarial, batch.labels) if asked.switching else "outputs"
            broken[batch.where] |= bad
            self.unmoved[batch.where] &= still
            if not trusted and step == 0:
                check_range(batch.labels, batch.targets, classes)
                check_finite(broken)
                if bool(still.all()):
                    self._check_that_it_depends(batch)
            success = FOR_GOOD * fooled
            if attack.keep_best or attack.drop_fooled:
                if judge != "outputs":
                    loss, success, _ = self._look(batch, judge)
                result.take(batch.where, batch.adversarial, loss, success)
            batch.adversarial, batch.momentum = moved, momentum
            if attack.drop_fooled:
                batch = batch.select((success < FOR_GOOD).nonzero()[:, 0])
        if not result.needed:
            result.images = batch.adversarial
        elif len(batch.where):
            loss, success, bad = self._look(batch, judge)
            broken[batch.where] |= bad
            result.take(batch.where, batch.adversarial, loss, success)
        if not trusted:
            check_finite(broken)

    def _look(self, batch: _Batch, judge: Judge | Literal["outputs"] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, success: 0, 1, or 2 where it is `FOR_GOOD`, whether not finite) of the batch as it is, each (B,)."""
        with torch.no_grad():
            if callable(judge):
                outputs, always = judge(batch.adversarial, batch.labels, batch.targets)
            else:
                outputs, always = self.model(batch.adversarial, batch.labels), None
            loss, fooled, bad = self._judge(outputs, batch.labels, batch.targets, batch.reference)
        return loss, FOR_GOOD * fooled if always is None else fooled.int() + (fooled & always), bad

    def _call(self, batch: _Batch) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, int, Tensor]:
        """The step of a batch; a compiled one of a size that it is compiled for."""
        arguments = batch.tensors()
        if not self._step_function.active:
            return self._step(*arguments)  # type: ignore[arg-type]
        size = len(batch.where)
        padded = _bucket(size, batch.whole)
        if padded > size:
            rows = torch.arange(padded, device=batch.where.device).clamp_max(size - 1)
            arguments = [None if tensor is None else tensor[rows] for tensor in arguments]
        results = self._step_function(*arguments)
        # CUDA graphs write the next step's results over this one's.
        cut = [value[:size].clone() if isinstance(value, Tensor) else value for value in results]
        return tuple(cut)  # type: ignore[return-value]

    def _step(
        self,
        adversarial: Tensor,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        reference: Tensor | None,
        low: Tensor | None,
        high: Tensor | None,
        momentum: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, int, Tensor]:
        """(moved images, momentum, loss, whether fooled, whether not finite, K, whether the gradient is 0)."""
        gradient, loss, fooled, bad, classes = self._differentiate(adversarial, labels, targets, reference)
        bad = bad | ~gradient.isfinite().flatten(1).all(1)
        still = (gradient == 0).flatten(1).all(1)
        attack = self.attack
        if attack.loss == "dlr":  # which is 1, whatever the logits are, where the label is the third likeliest
            still = still & ~fooled
        assert attack.alpha is not None
        if attack.decay is not None and momentum is not None:
            gradient = scaled(gradient)
            magnitude = gradient.abs().mean((1, 2, 3), keepdim=True)
            # A gradient of exactly zero stays zero; torchattacks divides 0 by 0 here and returns NaN images.
            momentum = attack.decay * momentum + gradient / torch.where(magnitude > 0, magnitude, 1)
            gradient = momentum
        if attack.norm == "Linf" and low is not None and high is not None:
            moved = (adversarial + attack.alpha * gradient.sign().to(adversarial.dtype)).clamp(low, high)
        else:
            moved = project_l2(adversarial + attack.alpha * unit(gradient), images, attack.radius)
        return moved, momentum, loss, fooled, bad, classes, still

    def _differentiate(
        self, adversarial: Tensor, labels: Tensor, targets: Tensor | None, reference: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        def objective(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
            outputs = self.model(x, labels)
            loss, fooled, bad = self._judge(outputs, labels, targets, reference)
            # The sum, not the mean: an image's gradient then does not shrink with the size of its batch.
            return loss.sum(), (loss.detach(), fooled, bad, outputs.detach())

        if torch.compiler.is_compiling():
            with torch.no_grad():  # of parameters; the images' is torch.func's
                gradient, (loss, fooled, bad, outputs) = torch.func.grad(objective, has_aux=True)(adversarial)
            return gradient, loss, fooled, bad, outputs.shape[-1]
        with torch.enable_grad():
            x = adversarial.detach().requires_grad_()
            total, (loss, fooled, bad, outputs) = objective(x)
            return _gradient(total, x), loss, fooled, bad, outputs.shape[-1]

    def _judge(
        self, outputs: Tensor, labels: Tensor, targets: Tensor | None, reference: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, whether the attack has succeeded, whether an output is no number), each (B,)."""
        last = outputs.shape[-1] - 1
        # On a GPU a label that is out of range would end the process; `check_range` says it in a sentence.
        labels = labels.clamp(0, last)
        targets = None if targets is None else targets.clamp(0, last)
        draws = outputs if outputs.dim() == 3 else outputs[None]
        size = (len(draws), *labels.shape)
        if reference is not None:
            loss = F.kl_div(draws.log_softmax(-1), reference.expand(draws.shape), reduction="none").sum(-1).mean(0)
        else:
            wanted = None if targets is None else targets.expand(size)
            loss = loss_of(self.attack.loss, draws, labels.expand(size), wanted).mean(0)
        predicted = (draws[0] if len(draws) == 1 else draws.detach().softmax(-1).mean(0)).argmax(-1)
        fooled = predicted != labels if targets is None else predicted == targets
        bad = (draws.isnan() | (draws == math.inf)).any(-1).any(0)
        return loss, fooled, bad

    def _project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        if self.attack.norm == "Linf":
            return adversarial.clamp(*linf_bounds(images, self.attack.radius))
        return project_l2(adversarial, images, self.attack.radius)

    def _check_that_it_depends(self, batch: _Batch) -> None:
        """ValueError if outputs agree on different images, or are detached; no gradient here alone is no proof."""
        shown = batch.adversarial
        others = [_made_up(shown[0])]
        if self.elsewhere is not None:
            others += torch.split(self.elsewhere.to(shown), AT_ONCE)
        with torch.enable_grad():  # compiled code takes what is detached for constant
            x = shown.detach().requires_grad_()
            _gradient(self.model(x, batch.labels).sum(), x)
        said = None
        for images in (shown, *others):
            with torch.no_grad(), exact_means():  # one label for all: the outputs of some attackers depend on it
                outputs = self.model(images, batch.labels[:1].expand(len(images))).movedim(-2, 0)
            said = outputs[:1] if said is None else said
            if bool((outputs != said).any()):
                return
        raise ValueError(
            "model: its output does not depend on the images (it is the same for all of them, and its gradient with "
            "respect to them is zero), so it cannot be attacked by one"
        )

    def _warn_of_the_unmoved(self) -> None:
        stuck, whole = int(self.unmoved.sum()), len(self.unmoved)
        which = f"for all {whole} images" if stuck == whole else f"for {stuck} of {whole} images"
        warnings.warn(
            f"the attack cannot move: the gradient of loss {self.attack.loss!r} is exactly zero {which} although the "
            "model's output depends on them; it may be saturated: try loss='cw' or 'dlr', or an attack without "
            "gradients",
            UnmovedWarning,
            stacklevel=3,
        )


@dataclass
class _Batch:
    """What a step needs of the images that are still attacked; `where` are their indices in the whole batch."""

    where: Tensor
    adversarial: Tensor
    images: Tensor
    labels: Tensor
    targets: Tensor | None
    reference: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    momentum: Tensor | None = None
    whole: int = 0

    def __post_init__(self) -> None:
        self.whole = self.whole or len(self.where)

    def tensors(self) -> list[Tensor | None]:
        return [
            self.adversarial,
            self.images,
            self.labels,
            self.targets,
            self.reference,
            self.low,
            self.high,
            self.momentum,
        ]

    def select(self, rows: Tensor) -> _Batch:
        if len(rows) == len(self.where):
            return self
        chosen = [None if tensor is None else tensor[rows] for tensor in self.tensors()]
        selected = _Batch(self.where[rows], *chosen)  # type: ignore[arg-type]
        selected.whole = self.whole
        return selected


class _Result:
    """The worst image so far of each: the most success (0, 1 or `FOR_GOOD`) before less; then the larger loss."""

    def __init__(self, images: Tensor, needed: bool) -> None:
        self.images = images.clone() if needed else images
        self.needed = needed
        self.loss = torch.full((len(images),), -math.inf, dtype=torch.float64, device=images.device)
        self.success = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def take(self, where: Tensor, images: Tensor, loss: Tensor, success: Tensor) -> None:
        loss = loss.detach().double()
        before = self.success[where]
        worse = (success > before) | ((success == before) & (loss > self.loss[where]))
        self.images[where] = torch.where(worse[:, None, None, None], images, self.images[where])
        self.loss[where] = torch.where(worse, loss, self.loss[where])
        self.success[where] = torch.maximum(before, success)

    def survivors(self) -> Tensor:
        return (self.success < FOR_GOOD).nonzero()[:, 0]


def _gradient(total: Tensor, images: Tensor) -> Tensor:
    """ValueError where there is none."""
    taken = torch.autograd.grad(total, images, allow_unused=True)[0] if total.requires_grad else None
    if taken is None:
        raise ValueError(
            "model: its output has no gradient with respect to the images, so it cannot be attacked by one"
        )
    return taken


def _made_up(like: Tensor) -> Tensor:
    """Images (16, C, H, W) as unlike each other, and `like` (C, H, W), as can be: any network knows some apart."""
    generator = torch.Generator().manual_seed(0)
    channels, *size = like.shape

    def patches(count: int, side: int) -> Tensor:
        return F.interpolate(torch.rand(count, channels, side, side, generator=generator), size)

    plain = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, *like.shape)
    noise = torch.rand(4, *like.shape, generator=generator)
    made = torch.cat([plain, noise, noise[:2].round(), patches(4, 1), patches(3, 4)])
    return torch.cat([1 - like[None], made.to(like)])


def _bucket(size: int, whole: int) -> int:
    """The smallest of whole, whole/2, whole/4, … that holds `size`."""
    sizes = [-(-whole // (1 << power)) for power in range(BUCKETS)]
    return min(candidate for candidate in sizes if candidate >= size)
