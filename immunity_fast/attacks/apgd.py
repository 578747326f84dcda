"""Auto-PGD (Croce & Hein, arXiv 2003.01690): steps of a size that finds itself, for each image, and momentum."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from immunity_fast.attacks.batch import FOR_GOOD, Worst
from immunity_fast.attacks.checks import NotFiniteError, check_images, check_range
from immunity_fast.attacks.dependence import check_dependence
from immunity_fast.attacks.descent import Attack, warn_of_the_unmoved
from immunity_fast.attacks.losses import Loss, OwnLoss
from immunity_fast.attacks.mixtures import LabelledModel, Model, asked_modules, judge_of
from immunity_fast.attacks.modes import attacked
from immunity_fast.attacks.parts import Look, Network, Objective
from immunity_fast.attacks.preprocessing import Preprocessing, preprocessed
from immunity_fast.attacks.projections import (
    UNIT,
    Bounds,
    Norm,
    Radius,
    largest_magnitude,
    linf_bounds,
    project_l2,
    rounded_bounds,
    unit,
)
from immunity_fast.attacks.radii import Given, for_each_image, of_each, one_or_each
from immunity_fast.runtime.checks import check_choice, is_number, is_whole
from immunity_fast.runtime.compilation import Compile
from immunity_fast.runtime.precision import accumulation_dtype

MOMENTUM = 0.75  # how much of a step is the gradient's; the rest is the step before
FIRST, FEWER, LEAST = 0.22, 0.03, 0.06  # of the steps: until the first checkpoint, how many fewer until each next


@overload
def apgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | None = None,
    steps: int = 100,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    restarts: int = 1,
    draws: int = 1,
    rho: float = 0.75,
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    compile: Compile = "off",
) -> Tensor: ...


@overload
def apgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[Given],
    steps: int = 100,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    restarts: int = 1,
    draws: int = 1,
    rho: float = 0.75,
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    compile: Compile = "off",
) -> list[Tensor]: ...


def apgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | Sequence[Given] | None = None,
    steps: int = 100,
    norm: Norm = "Linf",
    loss: Loss | OwnLoss = "ce",
    targets: Tensor | None = None,
    restarts: int = 1,
    draws: int = 1,
    rho: float = 0.75,
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
    compile: Compile = "off",
) -> Tensor | list[Tensor]:
    """Auto-PGD (Croce & Hein, arXiv 2003.01690): PGD with momentum whose step size needs no choosing.

    It begins with steps of 2·eps from a random point of the ball's surface. At checkpoints, which come faster and
    faster, the step is halved for each image whose loss has not risen at more than `rho` of the steps since the last,
    or whose step size and best loss have both stayed as they were; that image then goes on from its best point.

    An image that fools the model leaves the batch at once, as it then is, and costs nothing more. Where success is a
    matter of luck none does: that is a model that draws, by `draws`, by several outputs or by a gate that switches. A
    mixture whose gate does is judged by the exact mean over its permutations, as in `pgd`, and its images leave when
    they fool it whatever the gate draws; any other is judged by its last draw. Of randomness that shows in none of
    these ways nothing is known.

    Args:
        model: images (B, C, H, W) to logits or log-probabilities (B, K); or (draws, B, K), several draws of a random
            output by one pass, whose losses are averaged. A module is in evaluation mode for as long as the attack
            takes.
        images: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers in 0..K−1.
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`. A
            tensor (B,) has a radius of each image's own. A list or tuple has several, for each of which there is a
            result: what a call with it alone gives, from the same random state.
        steps: number of steps.
        norm: "Linf", steps along the gradient's sign; or "L2", along the gradient.
        loss: what is maximised: "ce", "dlr" or "cw", or a function, see `pgd`.
        targets: (B,) classes that the attack is to reach; None is any but the label.
        restarts: how often, each on the images that survived those before.
        draws: outputs that the gradient of a step is averaged over (EOT, arXiv 1707.07397): so many passes, but one
            over the experts of a mixture whose gate switches. A model that returns several draws has its own.
        rho: the share of steps that have to raise the loss.
        generator: of random starts; None is PyTorch's default generator.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        preprocessing: what is done to images on their way to the model, `dict(mean=…, std=…)`: (images − mean) / std.
        compile: "on" compiles the passes of a model that is not random, with their gradients, for the whole batch, a
            half, a quarter and an eighth of it; where that fails, it says so and goes on without.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds, exactly: an
        image that fools the model where one was found, else that of the largest loss. Of several radii a list.

    Raises:
        ValueError: images out of bounds or not 4-D; labels or targets of another shape, not integers or out of range;
            eps < 0, steps, restarts or draws < 1, rho not in [0, 1]; an output without a gradient, or one that is the
            same for different images and has no gradient for any; as `NotFiniteError`, an output or gradient that is
            NaN or infinite.
        TypeError: images, labels or targets that are no tensors.

    Warns:
        UnmovedWarning: so many of the images have a gradient of exactly zero, so that the attack cannot move them; they
            are returned as they began.
        MovedStatisticsWarning: the model is a function that asks a module in training mode, whose statistics moved.
    """
    _check_counts(steps, draws, rho)
    check_choice("compile", compile, Compile)
    settings = Attack(steps=steps, norm=norm, loss=loss, restarts=restarts, bounds=bounds)
    check_images(images, labels, targets, settings.bounds)
    prepared = preprocessed(model, preprocessing)

    def one(given: Given | None) -> Tensor:
        radius, each = one_or_each(given)
        own = for_each_image("eps", each, images)
        ball: Radius = Attack(eps=radius, norm=norm, bounds=bounds).radius if own is None else own
        descent = Descent(ball, norm, settings.bounds, steps=steps, rho=rho, objective=objective, generator=generator)
        wanted = None if targets is None else targets.long()
        return _attack(prepared, descent, images.detach(), labels.long(), wanted, restarts, draws, compile)

    objective = Objective(loss, reach=targets is not None)
    with attacked(model):
        return of_each(eps, one, images, generator) if isinstance(eps, Sequence) else one(eps)


def _check_counts(steps: int, draws: int, rho: float) -> None:
    for name, count in (("steps", steps), ("draws", draws)):
        if not is_whole(count) or count < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {count}")
    if not is_number(rho):
        raise TypeError(f"rho: expected a number from 0 to 1, got {rho!r}")
    if not 0 <= rho <= 1:
        raise ValueError(f"rho: expected a number from 0 to 1, got {rho}")


def _attack(
    model: Model,
    descent: Descent,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    restarts: int,
    draws: int,
    compile: Compile,
) -> Tensor:
    """The worst of some runs of all images, or of those that survive."""
    worst = Worst(images, needed=True)
    if not len(images):
        return worst.images
    unmoved = torch.ones_like(labels, dtype=torch.bool)
    looks = 0

    def labelled(images: Tensor, _: Tensor) -> Tensor:
        return model(images)

    def watch(where: Tensor, look: Look) -> None:
        nonlocal looks
        assert look.gradient is not None
        still = (look.gradient == 0).flatten(1).all(1)
        if descent.objective.loss == "dlr":  # which is 1, whatever the logits are, where the label is the third
            still &= look.success == 0
        if not looks and bool(still.all()):
            check_dependence(labelled, images, labels, None, rounded_bounds(descent.bounds, images.dtype))
        looks += 1
        unmoved[where] &= still

    with ExitStack() as stack:
        network, classes = _network(model, labelled, images, labels, draws, compile, stack)
        check_range(labels, targets, classes)
        for restart in range(restarts):
            where = worst.survivors() if restart else torch.arange(len(images), device=images.device)
            if len(where):
                aims = None if targets is None else targets[where]
                descent.run(network, images[where], labels[where], aims, where, worst, watch=watch)
    if bool(unmoved.any()):
        warn_of_the_unmoved(unmoved, descent.objective.loss)
    return worst.images


def _network(
    model: Model,
    labelled: LabelledModel,
    images: Tensor,
    labels: Tensor,
    draws: int,
    compile: Compile,
    stack: ExitStack,
) -> tuple[Network, int]:
    """(the model as it is asked; K), found out by a pass of one image."""
    network, few = Network(model, images.dtype, draws, compile=compile, device=images.device), images[:1]
    network.whole = len(images)

    def meant(gate: Any) -> None:
        if draws > 1:
            stack.enter_context(gate.switched(gate.switch))

    with torch.no_grad(), asked_modules(meant) as asked:
        outputs = model(few)
    if outputs.dim() == 3:
        network.gives_draws()
    if asked.random_gates:
        network.random = True
        judge = judge_of(labelled, few, labels[:1])
        network.judge = None if judge == "outputs" else judge
        mixture = asked.only(few, outputs)
        if mixture is not None:
            network.draws_of(mixture)
    return network, outputs.shape[-1]


class _Rows(NamedTuple):
    """What is known of R images on their way; pictures (R, C, H, W) in float32 at least."""

    where: Tensor  # (R,) their places in the whole batch
    groups: Tensor | None  # (R,) which of them leave together
    images: Tensor  # as they were, in their own dtype
    labels: Tensor  # (R,)
    targets: Tensor | None  # (R,)
    eps: Tensor | None  # (R, 1, 1, 1) float64, where each has a radius of its own
    low: Tensor | None  # of the Linf ball
    high: Tensor | None
    points: Tensor  # as they are now
    before: Tensor  # as they were a step before
    slopes: Tensor  # the loss's gradient at the points
    best: Tensor  # the points of the largest loss so far
    best_slopes: Tensor
    size: Tensor  # (R, 1, 1, 1) of a step
    loss: Tensor  # (R,) at the last step
    best_loss: Tensor  # (R,)
    checked_loss: Tensor  # (R,) the best at the last checkpoint
    raised: Tensor  # (R,) how many steps have raised the loss since
    halved: Tensor  # (R,) bool: whether the step was halved there

    def select(self, rows: Tensor) -> _Rows:
        return _Rows(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Descent:
    """Auto-PGD with its settings.

    Args:
        ball: the radius of all balls; or of each, (B, 1, 1, 1) float64.
        norm: "Linf" or "L2".
        bounds: the lowest and the highest value of a pixel.
        steps: their number.
        objective: what is maximised.
        rho: the share of steps that have to raise the loss.
        generator: of random starts; None is PyTorch's default generator.
    """

    ball: Radius
    norm: Norm
    bounds: Bounds
    steps: int
    objective: Objective
    rho: float = 0.75
    generator: torch.Generator | None = None

    def run(
        self,
        network: Network,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        where: Tensor,
        worst: Worst,
        *,
        groups: Tensor | None = None,
        watch: Callable[[Tensor, Look], None] | None = None,
    ) -> None:
        """One run from a random start, into `worst`.

        Args:
            network: what is attacked.
            images: (R, C, H, W) of the network's dtype.
            labels: (R,).
            targets: (R,), or None.
            where: (R,) their places in `worst`, and in a ball of each.
            worst: of each place the image that fools the network, or else that of the largest loss.
            groups: (R,) integers ≥ 0: rows of one number leave as soon as one of them fools the network, such as an
                image that is given once for each target. None: each on its own.
            watch: is called with the places of what was looked at, and the look, wherever it has a gradient.

        Raises:
            ValueError: as `NotFiniteError`, of the place whose outputs or gradient are NaN or infinite.
        """
        steps = operator.index(self.steps)  # NumPy's compare to no bool of Python's
        objective, checkpoints = self.objective, _checkpoints(steps)
        box = rounded_bounds(self.bounds, images.dtype)
        radius = self.ball[where] if isinstance(self.ball, Tensor) else None
        rows, shown = _started(images, labels, targets, where, groups, self, radius, box)
        for step in range(steps + 1):
            if step:
                points = _moved(rows, self, box, 1.0 if step == 1 else MOMENTUM)
                rows, shown = rows._replace(points=points, before=rows.points), _shown(points, rows, self, box)
            look = network.look(shown, rows.labels, rows.targets, objective, gradient=step < steps)
            if watch is not None and look.gradient is not None:
                watch(rows.where, look)
            rows = _updated(rows, look)
            gone = look.success >= FOR_GOOD
            broken, some = torch.stack([look.broken.any(), gone.any()]).tolist()  # waits for the device, once
            if broken:
                raise NotFiniteError(int(rows.where[look.broken][0]))
            if network.random:
                worst.update(rows.where, shown, look.loss, look.success)
            elif some:
                done = gone.nonzero()[:, 0]
                worst.update(rows.where[done], shown[done], look.loss[done], look.success[done])
            if some:
                together = gone if rows.groups is None else torch.isin(rows.groups, rows.groups[gone])
                rows = rows.select((~together).nonzero()[:, 0])
                if not len(rows.where):
                    break
            if step in checkpoints and step < self.steps:
                rows = _checked(rows, self.rho * checkpoints[step])
        if len(rows.where) and not network.random:
            best = _shown(rows.best, rows, self, box)
            worst.update(rows.where, best, rows.best_loss, torch.zeros_like(rows.where))


def _checkpoints(steps: int) -> dict[int, int]:
    """After which steps, counted from 1, step sizes are checked, and how many steps there were since the last time."""
    since, fewer, least = (max(int(share * steps), 1) for share in (FIRST, FEWER, LEAST))
    found, step = dict[int, int](), since
    while step <= steps:
        found[step] = since
        since = max(since - fewer, least)
        step += since
    return found


def _started(
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    where: Tensor,
    groups: Tensor | None,
    descent: Descent,
    radius: Tensor | None,
    box: Bounds,
) -> tuple[_Rows, Tensor]:
    """(rows at a random point of each ball's surface, cut to the box; the images that these are)."""
    working = accumulation_dtype(images)
    eps: Radius = descent.ball if radius is None else radius
    assert not isinstance(eps, Tensor) or radius is not None
    points = images.to(working) + _on_the_surface(images, eps, descent.norm, descent.generator)
    low = high = None
    if descent.norm == "Linf":
        # Of the images' own dtype: rounding to it then leads nowhere else.
        low, high = (end.to(working) for end in linf_bounds(images, eps, box))
        points = points.clamp(low, high)
    else:
        points = project_l2(points, images.to(working), eps, box)
    size = torch.ones(len(images), 1, 1, 1, dtype=working, device=images.device) * 2 * _number(eps, working)
    lowest = torch.full((len(images),), -torch.inf, device=images.device)
    count = torch.zeros_like(labels)
    rows = _Rows(
        where,
        groups,
        images,
        labels,
        targets,
        radius,
        low,
        high,
        points=points,
        before=points,
        slopes=points,
        best=points,
        best_slopes=points,
        size=size,
        loss=-lowest,  # which the first look does not raise
        best_loss=lowest,
        checked_loss=lowest,
        raised=count,
        halved=torch.ones_like(labels, dtype=torch.bool),
    )
    return rows, _shown(points, rows, descent, box)


def _number(eps: Radius, dtype: torch.dtype) -> Radius:
    return eps.to(dtype) if isinstance(eps, Tensor) else eps


def _on_the_surface(images: Tensor, eps: Radius, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """A random move to the surface of each ball, (R, C, H, W) in float32 at least, drawn as the authors' code does."""
    device = images.device if generator is None else generator.device
    options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.float32}
    if norm == "Linf":
        move = 2 * torch.rand(images.shape, **options) - 1
        length = largest_magnitude(move)
    else:
        move = torch.randn(images.shape, **options)
        length = torch.linalg.vector_norm(move.flatten(1), dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    working = accumulation_dtype(images)
    move, length = (drawn.to(images.device, working) for drawn in (move, length))
    moved: Tensor = _number(eps, working) * move / length
    return moved


def _eps(rows: _Rows, descent: Descent) -> Radius:
    if rows.eps is not None:
        return rows.eps
    assert not isinstance(descent.ball, Tensor)
    return descent.ball


def _moved(rows: _Rows, descent: Descent, box: Bounds, share: float) -> Tensor:
    """The points a step further; `share`: of the gradient's step, the rest being the step before."""
    points = rows.points
    if rows.low is not None and rows.high is not None:
        moved = (points + rows.size * rows.slopes.sign()).clamp(rows.low, rows.high)
        mixed = points + share * (moved - points) + (1 - share) * (points - rows.before)
        return mixed.clamp(rows.low, rows.high)
    eps, images = _eps(rows, descent), rows.images.to(points)
    moved = _near(points + rows.size * unit(rows.slopes), images, eps, box)
    mixed = points + share * (moved - points) + (1 - share) * (points - rows.before)
    if rows.images.dtype != points.dtype:  # what is shown is projected in its own dtype
        return _near(mixed, images, eps, box)
    return project_l2(mixed, images, eps, box)


def _near(points: Tensor, images: Tensor, eps: Radius, box: Bounds) -> Tensor:
    """The projection onto the L2 balls that rounding may lead out of."""
    move = points - images
    length = torch.linalg.vector_norm(move.flatten(1), dim=1).view(-1, 1, 1, 1)
    moved: Tensor = images + move * (_number(eps, points.dtype) / length.clamp_min(1e-30)).clamp_max(1)
    return moved.clamp(*box)


def _shown(points: Tensor, rows: _Rows, descent: Descent, box: Bounds) -> Tensor:
    """The points as images of the balls, exactly, in the images' dtype."""
    if descent.norm == "Linf" or points.dtype == rows.images.dtype:
        return points.to(rows.images.dtype)
    return project_l2(points, rows.images, _eps(rows, descent), box)


def _updated(rows: _Rows, look: Look) -> _Rows:
    """The rows with what a look at their points has found."""
    slopes = rows.slopes if look.gradient is None else look.gradient
    better = look.loss > rows.best_loss
    here = better[:, None, None, None]
    return rows._replace(
        slopes=slopes,
        best=torch.where(here, rows.points, rows.best),
        best_slopes=torch.where(here, slopes, rows.best_slopes),
        loss=look.loss,
        best_loss=torch.where(better, look.loss, rows.best_loss),
        raised=rows.raised + (look.loss > rows.loss),
    )


def _checked(rows: _Rows, enough: float) -> _Rows:
    """The rows after a checkpoint; `enough`: steps that have raised a loss, if there are no more, are too few."""
    halved = (rows.raised <= enough) | (~rows.halved & (rows.checked_loss >= rows.best_loss))
    back = halved[:, None, None, None]
    return rows._replace(
        size=torch.where(back, rows.size / 2, rows.size),
        points=torch.where(back, rows.best, rows.points),
        slopes=torch.where(back, rows.best_slopes, rows.slopes),
        checked_loss=rows.best_loss,
        raised=torch.zeros_like(rows.raised),
        halved=halved,
    )
