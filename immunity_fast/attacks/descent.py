"""The loop behind all attacks that follow gradients: its settings, `Attack`, and it on one model, `BoundAttack`.

`gradient` has the attacks that are known by a name, as functions. Those of `keep_best`, `drop_fooled` and more restarts
can only lower the accuracy of a model that is not random. Where a mixture's gate switches at random, they do not judge
by a draw, whose luck would pass for strength: the exact mean of the gate's permutations says what is worst, and an
image is dropped when it fools the mixture whatever the gate draws. Of other random models they know nothing: there they
may raise the accuracy.
"""

from __future__ import annotations

import math
import operator
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast.attacks.batch import FOR_GOOD, Batch, First, Found, State, Step, Worst
from immunity_fast.attacks.checks import check_finite, check_images, check_range, not_finite, outputs_of
from immunity_fast.attacks.dependence import check_dependence, image_gradient
from immunity_fast.attacks.losses import Loss, OwnLoss, loss_of
from immunity_fast.attacks.mixtures import (
    ExactJudge,
    Judge,
    LabelledModel,
    Model,
    Observed,
    Rows,
    asked_modules,
    judge_of,
)
from immunity_fast.attacks.modes import attacked
from immunity_fast.attacks.preprocessing import Preprocessing, preprocessed
from immunity_fast.attacks.projections import (
    UNIT,
    Bounds,
    Norm,
    linf_bounds,
    project_l2,
    random_start,
    rounded_bounds,
    scaled,
    unit,
)
from immunity_fast.attacks.radii import for_each_image
from immunity_fast.attacks.settling import ASKED_AT, Settling
from immunity_fast.runtime.checks import check_choice, is_number, is_whole
from immunity_fast.runtime.compilation import Compile, Compiled, Log
from immunity_fast.runtime.outputs import kind_of
from immunity_fast.runtime.precision import AttackAmp, accumulation_dtype, at_least_float32, autocast

EPS: dict[Norm, float] = {"Linf": 8 / 255, "L2": 1.0}
ALPHA: dict[Norm, float] = {"Linf": 2 / 255, "L2": 0.2}
COMPILED_SIZES = 4  # a compiled step is compiled for the whole batch, for a half, a quarter and an eighth of it


class UnmovedWarning(UserWarning):
    """An attack could not move some images, because the gradient of what it maximises is exactly zero for them."""


def radius_of(eps: float | None, norm: Norm, bounds: Bounds = UNIT) -> float:
    """The radius of a ball, in the images' units: `eps`, or 8/255 for Linf and 1 for L2, of the bounds' range."""
    return EPS[norm] * (bounds[1] - bounds[0]) if eps is None else eps


@dataclass(frozen=True)
class Attack:
    """The settings of an attack, to be kept, listed or compiled; called, it attacks.

    Args:
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`.
        alpha: size of a step, in the same units; None is 2/255 for Linf, 0.2 for L2, times that range.
        steps: number of steps.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        loss: what is maximised: "ce", cross-entropy, "dlr" or "cw", two margins; or a function, see `pgd`.
        decay: of MIM's momentum; None is without momentum.
        random_start: begin at a random point of the ball, not at the image.
        restarts: how often, the worst of them counting.
        keep_best: the worst of all images on the way counts, not the last.
        drop_fooled: an image that fools the model leaves the batch as it then is, and costs nothing more.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        amp: "bf16" takes gradients under autocast, convolutions and products in bfloat16, which is faster where a
            processor can; what fools the model is found out in the model's own format.

    Raises:
        ValueError: a setting out of its range.
    """

    eps: float | None = None
    alpha: float | None = None
    steps: int = 10
    norm: Norm = "Linf"
    loss: Loss | OwnLoss = "ce"
    decay: float | None = None
    random_start: bool = False
    restarts: int = 1
    keep_best: bool = False
    drop_fooled: bool = False
    bounds: Bounds = UNIT
    amp: AttackAmp = "off"

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, Norm)
        check_choice("amp", self.amp, AttackAmp)
        if not callable(self.loss):
            check_choice("loss", self.loss, Loss)
        object.__setattr__(self, "bounds", checked_bounds(self.bounds))
        object.__setattr__(self, "eps", radius_of(self.eps, self.norm, self.bounds))
        span = self.bounds[1] - self.bounds[0]
        object.__setattr__(self, "alpha", ALPHA[self.norm] * span if self.alpha is None else self.alpha)
        for name, least in (("eps", 0), ("alpha", 0), ("decay", 0), ("steps", 0), ("restarts", 1)):
            value: Any = getattr(self, name)
            if name in ("steps", "restarts"):
                if not is_whole(value):
                    raise ValueError(f"{name}: expected a whole number, got {value}")
                object.__setattr__(self, name, operator.index(value))  # NumPy's are no numbers for JSON
            elif value is not None and (not is_number(value) or getattr(value, "ndim", 0) > 0):
                raise TypeError(f"{name}: expected a finite number of at least {least}, got {kind_of(value)}")
            if value is not None and not least <= value < math.inf:  # NaN too
                raise ValueError(f"{name}: expected a finite number of at least {least}, got {value}")

    @property
    def radius(self) -> float:
        """The ball's radius: `eps`, its default filled in."""
        return radius_of(self.eps, self.norm)

    def __call__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
        *,
        eps: Tensor | None = None,
        alpha: Tensor | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> Tensor:
        """Attack some images; arguments, results and errors are those of `pgd`.

        Args:
            model: images (B, C, H, W) to logits or log-probabilities (B, K), or (draws, B, K).
            images: (B, C, H, W) floating-point, within the bounds.
            labels: (B,) integers in 0..K−1.
            targets: (B,) classes that the attack is to reach; None is any but the label.
            generator: of random starts; None is PyTorch's default generator.
            eps: (B,) radii of each image's own; None is the settings' one of all.
            alpha: (B,) sizes of each image's step, likewise.
            preprocessing: of images on their way to the model.

        Returns:
            Adversarial images (B, C, H, W).
        """
        prepared = preprocessed(model, preprocessing)
        with attacked(model):
            return BoundAttack(self, lambda x, _: prepared(x))(images, labels, targets, generator, eps=eps, alpha=alpha)


class BoundAttack:
    """An attack on one model, whose step is compiled once and replayed for every batch of that size.

    Args:
        attack: the settings.
        model: (images, labels) to outputs: the labels are for attackers whose objective depends on them.
        judge: by what `keep_best`, `drop_fooled` and restarts judge a random model, see `mixtures.Judge`; "outputs":
            the model's are not random. None is the model's attribute `exact_judge`, where it has one, or finds out
            whether a gate switches while the model is asked.
        elsewhere: (M, C, H, W) images on which the model's outputs are compared, besides made-up ones, where none of a
            batch has a gradient: if they agree on all, the model does not depend on its input.
        compile: "on" and "max" compile the step: the model, its gradient and the projection in one graph, without
            gradients of parameters. Where that fails, the step is eager, and says so.
        device: where the images will be; only compiling asks for it.
        log, traceback_file: what takes such a line, and the whole traceback; see `Compiled`.
        settling: says which images are attacked no further, as nobody who answers is right about them: they stay as
            they then are. Of an attack whose last image counts, without `keep_best`, `drop_fooled` and restarts.

    Attributes:
        unmoved: (B,) bool, which images of the last call had a gradient of exactly zero at every step that they took.

    Raises:
        ValueError: `settling` with `keep_best`, `drop_fooled` or restarts, or compiled.
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
        settling: Settling | None = None,
    ) -> None:
        self.attack, self.model, self.elsewhere, self.settling = attack, model, elsewhere, settling
        self.judge = getattr(model, "exact_judge", None) if judge is None else judge
        self._whole = 0  # images of the batch that is under way
        self.unmoved = torch.zeros(0, dtype=torch.bool)
        self._box = attack.bounds
        self._step_function = Compiled(self._step, compile, device or torch.device("cpu"), log, traceback_file)
        last_counts = not (attack.keep_best or attack.drop_fooled or attack.restarts > 1)
        if settling is not None and (self.compiled or not last_counts):
            raise ValueError("settling: expected an eager attack whose last image counts, got another")
        exact = isinstance(self.judge, ExactJudge) and not last_counts
        self._observing = hasattr(model, "observed") and not self.compiled and (settling is not None or exact)

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
        eps: Tensor | None = None,
        alpha: Tensor | None = None,
        start: Tensor | None = None,
        reference: Tensor | None = None,
        trusted: bool = False,
        first: First | None = None,
    ) -> Tensor:
        """Adversarial images for a batch of images. The model is asked in the mode that it is in.

        Args:
            images: (B, C, H, W) floating-point, within the attack's bounds.
            labels: (B,) integers in 0..K−1.
            targets: (B,) classes that the attack is to reach; None is any but the label.
            generator: of random starts; None is PyTorch's default generator.
            eps, alpha: (B,) radii and sizes of steps of each image's own; None is the attack's one of all.
            start: (B, C, H, W) where to begin, once projected; None is as the settings say.
            reference: (B, K) probabilities: instead of `loss`, the KL divergence of the model's from them is maximised.
            trusted: skip all checks, each of which waits for the device.
            first: what another attack on the same model, images and labels by the same loss has found of the images
                themselves, where this one begins at them, too; filled in where nothing is in it yet.

        Returns:
            Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds, exactly.

        Raises:
            ValueError, TypeError: see `pgd`; never where `trusted`.
        """
        if not trusted:
            check_images(images, labels, targets, self.attack.bounds)
        self._box = rounded_bounds(self.attack.bounds, images.dtype)
        own = [for_each_image("eps", eps, images), for_each_image("alpha", alpha, images)]
        images, labels = images.detach(), labels.long()
        targets = None if targets is None else targets.long()
        attack = self.attack
        self.unmoved = torch.full((len(images),), attack.steps > 0, device=images.device)
        worst = Worst(images, needed=attack.keep_best or attack.drop_fooled or attack.restarts > 1)
        if self.settling is not None:
            worst.images = images.clone()
        for restart in range(attack.restarts if len(images) else 0):
            begin = self._begin(images, generator, start, own[0])
            batch = self._whole_batch(begin, images, labels, targets, reference, own)
            if attack.drop_fooled and restart:
                batch = batch.select(worst.survivors())
            shared = first if begin is images and not restart and not self.compiled else None
            self._descend(batch, worst, trusted, shared)
        if not trusted and bool(self.unmoved.any()):
            warn_of_the_unmoved(self.unmoved, self.attack.loss)
        return worst.images.clone()

    def _begin(
        self, images: Tensor, generator: torch.Generator | None, start: Tensor | None, own: Tensor | None
    ) -> Tensor:
        """Where a descent begins, (B, C, H, W)."""
        attack, radius = self.attack, self.attack.radius if own is None else own
        if start is None and not attack.random_start:
            return images
        if start is None:
            start = random_start(images, radius, attack.norm, generator)
        if attack.norm == "Linf":
            return start.detach().clamp(*linf_bounds(images, radius, self._box))
        return project_l2(start.detach(), images, radius, self._box)

    def _whole_batch(
        self,
        begin: Tensor,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        reference: Tensor | None,
        own: list[Tensor | None],
    ) -> Batch:
        """All images, with what a step of these settings needs; `own`: radii and steps of their own."""
        attack, low, high, momentum = self.attack, None, None, None
        if attack.norm == "Linf":
            low, high = linf_bounds(images, attack.radius if own[0] is None else own[0], self._box)
        if attack.decay is not None:
            momentum = torch.zeros_like(images, dtype=accumulation_dtype(images))
        self._whole, rows = len(images), torch.arange(len(images), device=images.device)
        shown = rows if self._observing else None
        eps, alpha = own
        state = State(begin, images, labels, targets, reference, low, high, momentum, eps, alpha, shown)
        return Batch(rows, state, len(images))

    def _descend(self, batch: Batch, worst: Worst, trusted: bool, first: First | None) -> None:
        """One descent of the images in the batch, into `worst`; `first`: where what its first step finds is shared."""
        attack = self.attack
        broken = torch.zeros(batch.whole, dtype=torch.bool, device=batch.where.device)
        judge = self.judge if worst.needed else "outputs"
        if judge is None and (self.compiled or not attack.steps):  # else the first step finds out
            judge = judge_of(self.model, batch.state.adversarial[:1], batch.state.labels[:1])
        for step in range(attack.steps):
            if not len(batch.where):
                break
            with asked_modules() if judge is None else nullcontext() as asked:
                result = self._take_step(batch, None if step else first)
            state = batch.state
            if asked is not None:
                judge = judge_of(self.model, state.adversarial, state.labels) if asked.random_gates else "outputs"
            broken[batch.where] |= result.broken
            self.unmoved[batch.where] &= result.still
            if not trusted and step == 0:
                check_range(state.labels, state.targets, result.classes)
                check_finite(broken)
                if bool(result.still.all()):
                    check_dependence(self.model, state.adversarial, state.labels, self.elsewhere, self._box)
            left = None  # who is attacked further
            if attack.keep_best or attack.drop_fooled:
                loss, success = self._success(state, result, judge)
                worst.update(batch.where, state.adversarial, loss, success)
                left = success < FOR_GOOD if attack.drop_fooled else None
            elif self.settling is not None:
                left = ~self._settled(state, result, step)
                worst.images[batch.where] = state.adversarial
            batch.state = state._replace(adversarial=result.adversarial, momentum=result.momentum)
            if left is not None:
                batch = batch.select(left.nonzero()[:, 0])
        if self.settling is not None:
            worst.images[batch.where] = batch.state.adversarial
        elif not worst.needed:
            worst.images = batch.state.adversarial
        elif len(batch.where):
            loss, success, bad = self._standing(batch.state, judge)
            broken[batch.where] |= bad
            worst.update(batch.where, batch.state.adversarial, loss, success)
        if not trusted:
            check_finite(broken)

    def _success(self, state: State, result: Step, judge: Judge | Literal["outputs"] | None) -> tuple[Tensor, Tensor]:
        """(loss; success) of the images that a step has begun with, as `_standing` has them, each (B,)."""
        if judge == "outputs":
            loss, success = result.loss, FOR_GOOD * result.fooled
        elif result.seen is not None and isinstance(judge, ExactJudge):
            outputs, always = judge.of_answers(result.seen, state.labels, state.targets)
            loss, success, _ = self._judged(outputs, always, state)
        else:
            return self._standing(state, judge)[:2]
        if self.attack.amp != "off":  # what fools a model in another format need not fool it
            rows = (success > 0).nonzero()[:, 0]
            if len(rows):
                sure, certain, _ = self._standing(state.select(rows), judge)
                loss, success = loss.index_copy(0, rows, sure), success.index_copy(0, rows, certain.to(success))
        return loss, success

    def _settled(self, state: State, result: Step, step: int) -> Tensor:
        """Which of the images that a step has begun with are settled, (B,) bool."""
        settling, last = self.settling, step + 1 == self.attack.steps
        assert settling is not None
        settled = torch.zeros_like(result.fooled)
        if result.seen is not None and settling.seen is not None:
            maybe = settling.seen(result.seen, state.labels)
            if self.attack.amp == "off":
                return maybe
        elif step in ASKED_AT:
            maybe = result.fooled
        else:
            return settled
        rows = maybe.nonzero()[:, 0]
        if len(rows) and not last:  # whose pass would spare nobody anything
            settled[rows] = settling.asked(state.adversarial[rows], state.labels[rows])
        return settled

    def _take_step(self, batch: Batch, first: First | None) -> Step:
        """The step of a batch; a compiled one of a size that it is compiled for."""
        if not self._step_function.active:
            if first is None:
                return self._step(batch.state)
            first.found = first.found or self._differentiate(batch.state)
            return self._move(batch.state, first.found)
        state, size = batch.state, len(batch.where)
        padded = compiled_size(size, batch.whole)
        if padded > size:
            state = state.select(torch.arange(padded, device=batch.where.device).clamp_max(size - 1))
        result: Step = self._step_function(state)
        # CUDA graphs write the next step's results over this one's.
        cut = [value[:size].clone() if isinstance(value, Tensor) else value for value in result]
        return Step(*cut)  # type: ignore[arg-type]

    def _step(self, state: State) -> Step:
        """What an attack does over and over, and all that is compiled of it."""
        return self._move(state, self._differentiate(state))

    def _move(self, state: State, found: Found) -> Step:
        """A step along what was found."""
        attack, adversarial, momentum = self.attack, state.adversarial, state.momentum
        gradient, loss, fooled, broken, classes, seen = found
        broken = broken | ~gradient.isfinite().flatten(1).all(1)
        still = (gradient == 0).flatten(1).all(1)
        if attack.loss == "dlr":  # which is 1, whatever the logits are, where the label is the third likeliest
            still = still & ~fooled
        assert attack.alpha is not None
        if attack.decay is not None and momentum is not None:
            gradient = scaled(gradient)
            magnitude = gradient.abs().mean((1, 2, 3), keepdim=True)
            # A gradient of exactly zero stays zero; torchattacks divides 0 by 0 here and returns NaN images.
            momentum = attack.decay * momentum + gradient / torch.where(magnitude > 0, magnitude, 1)
            gradient = momentum
        if attack.norm == "Linf" and state.low is not None and state.high is not None:
            signs = gradient.sign()
            if state.alpha is None:
                move = attack.alpha * signs.to(adversarial.dtype)
            else:  # rounded as a number is: in float32 at least, then to the images' dtype
                dtype = accumulation_dtype(adversarial)
                move = (state.alpha.to(dtype) * signs.to(dtype)).to(adversarial.dtype)
            moved = (adversarial + move).clamp(state.low, state.high)
        else:
            along = unit(gradient)
            move = attack.alpha * along if state.alpha is None else state.alpha.to(along.dtype) * along
            radius = attack.radius if state.eps is None else state.eps
            moved = project_l2(adversarial + move, state.images, radius, self._box)
        return Step(moved, momentum, loss, fooled, broken, still, classes, seen)

    def _differentiate(self, state: State) -> Found:
        """The loss's gradient, and the verdict on the outputs.

        PyTorch computes no gradients of weights: it is asked for the images' alone.
        """
        seen: Any = None

        def objective(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
            nonlocal seen
            with self._number_format(x):
                if self._observing:
                    assert state.rows is not None
                    rows = Rows(state.rows, self._whole)
                    returned, seen = cast(Observed, self.model).observed(x, state.labels, rows)
                else:
                    returned = self.model(x, state.labels)
            outputs = outputs_of(returned, len(x))
            if self.attack.amp != "off":
                outputs = at_least_float32(outputs)
            loss, fooled, broken = self._verdict(outputs, state)
            # The sum, not the mean: an image's gradient then does not shrink with the size of its batch.
            return loss.sum(), (loss.detach(), fooled, broken, outputs.detach())

        if torch.compiler.is_compiling():
            with torch.no_grad():  # of parameters; the images' is torch.func's
                gradient, (loss, fooled, broken, outputs) = torch.func.grad(objective, has_aux=True)(state.adversarial)
            return Found(gradient, loss, fooled, broken, outputs.shape[-1])
        with torch.enable_grad():
            x = state.adversarial.detach().requires_grad_()
            total, (loss, fooled, broken, outputs) = objective(x)
            return Found(image_gradient(total, x), loss, fooled, broken, outputs.shape[-1], seen)

    def _number_format(self, x: Tensor) -> AbstractContextManager[object]:
        """What the model runs in for its gradient; without `amp` what the caller runs in."""
        return nullcontext() if self.attack.amp == "off" else autocast(self.attack.amp, x.device)

    def _standing(self, state: State, judge: Judge | Literal["outputs"] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(loss; success: 0, 1, or 2 where it is `FOR_GOOD`; whether not finite) of images as they are, each (B,)."""
        with torch.no_grad():
            if callable(judge):
                outputs, always = judge(state.adversarial, state.labels, state.targets)
            else:
                outputs, always = outputs_of(self.model(state.adversarial, state.labels), len(state.labels)), None
            return self._judged(outputs, always, state)

    def _judged(self, outputs: Tensor, always: Tensor | None, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """`_standing` of outputs; `always`: who is fooled whatever a random model draws; None: it is not random."""
        loss, fooled, broken = self._verdict(outputs, state)
        return loss, FOR_GOOD * fooled if always is None else fooled.int() + (fooled & always), broken

    def _verdict(self, outputs: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, whether the attack has succeeded, whether an output is no number), each (B,)."""
        last = outputs.shape[-1] - 1
        # On a GPU a label that is out of range would end the process; `check_range` says it in a sentence.
        labels = state.labels.clamp(0, last)
        targets = None if state.targets is None else state.targets.clamp(0, last)
        draws = outputs if outputs.dim() == 3 else outputs[None]
        size, broken = (len(draws), *labels.shape), not_finite(draws)
        if state.reference is not None:
            reference = state.reference.expand(draws.shape)
            loss = F.kl_div(draws.log_softmax(-1), reference, reduction="none").sum(-1).mean(0)
        else:
            wanted = None if targets is None else targets.expand(size)
            loss = loss_of(self.attack.loss, draws, labels.expand(size), wanted).mean(0)
            if callable(self.attack.loss):  # of outputs that are numbers its value need not be one
                broken = broken | loss.isnan()
        predicted = (draws[0] if len(draws) == 1 else draws.detach().softmax(-1).mean(0)).argmax(-1)
        fooled = predicted != labels if targets is None else predicted == targets
        return loss, fooled, broken


def warn_of_the_unmoved(unmoved: Tensor, loss: Loss | OwnLoss) -> None:
    """Warn of images whose gradient was exactly zero at every step.

    Args:
        unmoved: (B,) bool, which they are.
        loss: whose gradient.
    """
    stuck, whole = int(unmoved.sum()), len(unmoved)
    which = f"for all {whole} images" if stuck == whole else f"for {stuck} of {whole} images"
    name = loss if isinstance(loss, str) else "of your own"
    warnings.warn(
        f"the attack cannot move: the gradient of loss {name!r} is exactly zero {which} although the "
        "model's output depends on them; it may be saturated: try loss='cw' or 'dlr', or an attack without "
        "gradients",
        UnmovedWarning,
        stacklevel=3,
    )


def checked_bounds(bounds: Bounds) -> Bounds:
    """Bounds as two floats.

    Raises:
        ValueError: not two finite numbers, the first of which is the smaller.
    """
    try:
        low, high = (float(end) for end in bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"bounds: expected (low, high), two finite numbers, low < high, got {bounds}")
    return low, high


def compiled_size(size: int, whole: int) -> int:
    """The smallest of whole, whole/2, whole/4, … that holds `size`, so that little is compiled and little padded."""
    sizes = [-(-whole // (1 << power)) for power in range(COMPILED_SIZES)]
    return min(candidate for candidate in sizes if candidate >= size)
