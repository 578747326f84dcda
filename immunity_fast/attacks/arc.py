"""ARC, the attack on a model of several members one of which answers: networks of one's own, or a gate's permutations.

An attack that follows the gradient of a loss over all members stands still where their gradients point against each
other. ARC goes from member to member, each time just far enough to cross that member's boundary and stay across those
already crossed, and keeps what lowers the exact share of members that are right. The method is Dbouk & Shanbhag's
(ICML 2022, arXiv 2206.06737), the settings are those of the authors' code, https://github.com/hsndbk4/ARC. Three things
are done otherwise, each of which finds more on networks whose optimum is known:

* The code takes a member's distance at the point that the walk has reached for one from where the walk began, and goes
  too far or not far enough. Here what the walk has covered is counted once.
* The code leads a member that is wrong already back across its boundary. Here it is held where it is.
* The members' order is drawn anew from the second walk on, as in the authors' later https://github.com/hsndbk4/BARRE.

`every_member` and `expected_loss` are the objective that it is compared with.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor, nn

from immunity_fast.attacks.checks import check_finite, check_images, check_range, not_finite
from immunity_fast.attacks.dependence import image_gradient
from immunity_fast.attacks.descent import Attack, UnmovedWarning
from immunity_fast.attacks.members import (
    EnsembleMembers,
    MixtureMembers,
    NetworkMembers,
    all_attacked,
    mixture_in,
    networks_in,
)
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
    scaled,
)
from immunity_fast.attacks.radii import Given, for_each_image, of_each, one_or_each
from immunity_fast.functional import log_mixture
from immunity_fast.permutations import orders_tried, random_orders, share_is_exact, shares_right
from immunity_fast.runtime.checks import check_weight, check_whole
from immunity_fast.runtime.outputs import kind_of
from immunity_fast.runtime.precision import accumulation_dtype, at_least_float32
from immunity_fast.selection import is_random, selects

BEYOND = 0.05  # by how much of the ball's radius a step goes beyond a boundary: ρ
LOCAL: dict[Norm, float] = {"Linf": 1.0, "L2": 0.25}  # part of the ball's radius that one walk over the members covers
FEW_CLASSES = 10  # up to so many the next likeliest class alone is looked at
LOOKED_AT = 4  # of more classes
AVERAGED = 120  # permutations that `every_member` takes: all of up to 5 experts


class Judged(NamedTuple):
    """What is said of B images."""

    share: Tensor  # (B,) float64: the probability that whoever answers is right
    broken: Tensor  # (B,) bool: whether an output is no number
    classes: int  # K


class Answering(Protocol):
    """Members one of which answers."""

    def judged(self, images: Tensor, labels: Tensor) -> Judged:
        """The exact objective for images (B, C, H, W) with labels (B,), by one pass over all networks."""

    def order(self, anew: bool, generator: torch.Generator) -> Sequence[Any]:
        """The members of one walk, in its order; `anew`: a random one."""

    def outputs(self, member: Any, images: Tensor) -> Tensor:
        """What one member answers, (B, K), up to what is the same for all classes."""


class OneDrawn(Answering):
    """One of N networks answers, with its weight for probability.

    Args:
        members: the networks.
        images: (B, C, H, W), at least one; members are walked by their mean weight for these, the largest first, and
            those that never answer are not.
    """

    def __init__(self, members: EnsembleMembers, images: Tensor) -> None:
        self.members = members
        mean = members.weights(images).double().mean(0)
        self.by_weight = [i for i in mean.argsort(descending=True, stable=True).tolist() if mean[i] > 0]

    def judged(self, images: Tensor, labels: Tensor) -> Judged:
        logits = self.members.logits(images)
        right = logits.argmax(-1) == labels
        share = (self.members.weights(images).double().T * right).sum(0)
        return Judged(share, not_finite(logits), logits.shape[-1])

    def order(self, anew: bool, generator: torch.Generator) -> Sequence[int]:
        if not anew:
            return self.by_weight
        shuffled = torch.randperm(len(self.by_weight), generator=generator, device=generator.device).tolist()
        return [self.by_weight[i] for i in shuffled]

    def outputs(self, member: int, images: Tensor) -> Tensor:
        return self.members.one(member, images)


class OnePermutation(Answering):
    """The experts' probabilities are mixed by a random permutation of a gate's weights.

    Args:
        members: the experts, and the gate's weights as they were trained.
        images: (B, C, H, W), at least one.
        most: permutations of one walk, drawn for each.
    """

    def __init__(self, members: EnsembleMembers, images: Tensor, most: int) -> None:
        self.members, self.most, self.device = members, most, images.device
        self.num_experts = members.weights(images[:1]).shape[-1]

    def judged(self, images: Tensor, labels: Tensor) -> Judged:
        logits, gate = self.members.logits(images), self.members.weights(images)
        broken = not_finite(logits) | ~gate.isfinite().all(-1)
        known = labels.clamp(0, logits.shape[-1] - 1)  # a label out of range is said in a sentence, later
        return Judged(shares_right(logits, gate, known), broken, logits.shape[-1])

    def order(self, anew: bool, generator: torch.Generator) -> Sequence[Tensor]:
        if not share_is_exact(self.num_experts):
            return random_orders(self.most, self.num_experts, generator, self.device).unbind()
        orders = orders_tried(self.num_experts).to(generator.device)
        shuffled = torch.randperm(len(orders), generator=generator, device=generator.device)
        return orders[shuffled[: self.most]].to(self.device).unbind()

    def outputs(self, member: Tensor, images: Tensor) -> Tensor:
        # Differences of log-probabilities are zero where those of probabilities are, and do not saturate.
        return log_mixture(self.members.logits(images), self.members.weights(images)[:, member])


class _Walk(NamedTuple):
    """The images that are still attacked, and where the walk over the members has led."""

    where: Tensor  # (B,) which of the whole batch they are
    images: Tensor  # (B, C, H, W) as they were
    labels: Tensor  # (B,)
    eps: Tensor  # (B, 1, 1, 1) float64, the ball's radius
    eta: Tensor  # (B, 1, 1, 1) float64, that of the walk
    low: Tensor | None  # (B, C, H, W), of the Linf ball
    high: Tensor | None
    here: Tensor  # (B, C, H, W) where the walk began
    local: Tensor  # (B, C, H, W) from there, not yet projected
    at: Tensor  # (B, C, H, W) where it is
    share: Tensor  # (B,) float64: the objective there

    def select(self, rows: Tensor) -> _Walk:
        """Some of the images, by their indices (B′,)."""
        if len(rows) == len(self.where):
            return self
        return _Walk(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Arc:
    """The settings of ARC, to be kept; called, it attacks.

    Args:
        eps, steps, local_eps, norm, classes, members, restarts, random_start, bounds: see `arc`; `eps` and `local_eps`
            are numbers here.

    Raises:
        ValueError, TypeError: a setting out of its range.
    """

    eps: float | None = None
    steps: int = 20
    local_eps: float | None = None
    norm: Norm = "Linf"
    classes: int | None = None
    members: int = 24
    restarts: int = 1
    random_start: bool = False
    bounds: Bounds = UNIT

    def __post_init__(self) -> None:
        for name in ("eps", "steps", "restarts", "bounds"):
            object.__setattr__(self, name, getattr(self._ball, name))
        check_whole("members", self.members, 1)
        if self.classes is not None:
            check_whole("classes", self.classes, 1)
        if self.local_eps is not None:
            check_weight("local_eps", self.local_eps)

    @property
    def _ball(self) -> Attack:
        """What other attacks check in the same way."""
        return Attack(
            eps=self.eps,
            alpha=0.0,
            steps=self.steps,
            norm=self.norm,
            restarts=self.restarts,
            random_start=self.random_start,
            bounds=self.bounds,
        )

    def __call__(
        self,
        model: Any,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        weights: Sequence[float] | Tensor | None = None,
        eps: Tensor | None = None,
        local_eps: Tensor | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> Tensor:
        """Attack some images; arguments, results and errors are those of `arc`.

        Args:
            model: a mixture, or a list of networks.
            images: (B, C, H, W) floating-point, within the bounds.
            labels: (B,) integers in 0..K−1.
            generator: of all chance; None is a new one, seeded with 0.
            weights: of the networks.
            eps: (B,) radii of each image's own; None is the settings' one of all.
            local_eps: the same of the walks.
            preprocessing: of images on their way to the model.

        Returns:
            Adversarial images (B, C, H, W).
        """
        members, permuted = _members_of(model, weights, preprocessing)
        mixture = mixture_in(model)
        if mixture is not None and not is_random(mixture.gate):
            raise ValueError(
                "model: expected members one of which answers, got a mixture whose gate has fixed weights, by which "
                "all answer together: `mora` and `pgd` attack it"
            )
        with all_attacked(model):
            return self.attack_members(
                members, images, labels, generator, permuted=permuted, eps=eps, local_eps=local_eps
            )

    def attack_members(
        self,
        members: EnsembleMembers,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        *,
        permuted: bool,
        eps: Tensor | None = None,
        local_eps: Tensor | None = None,
    ) -> Tensor:
        """Attack members that are known already, in the mode that they are in.

        Args:
            members: of which one answers, see `permuted`.
            images, labels, generator, eps, local_eps: as for a call.
            permuted: whether a random permutation of the members' weights answers; else one member does, with its
                weight for probability.

        Returns:
            Adversarial images (B, C, H, W).

        Raises:
            ValueError, TypeError: see `arc`.
        """
        check_images(images, labels, None, self.bounds)
        box = rounded_bounds(self.bounds, images.dtype)
        radii, walks = self._radii(images, eps, local_eps)
        images, labels = images.detach(), labels.long()
        if not len(images):
            return images.clone()
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        with torch.no_grad():
            answering: Answering = (
                OnePermutation(members, images, self.members) if permuted else OneDrawn(members, images)
            )
            search = _Search(self, answering, box, images, labels, radii, walks, generator)
            found = search.run()
        if search.unmoved:
            warnings.warn(
                f"the attack cannot move: every member's gradient is exactly zero for {search.unmoved} of "
                f"{len(images)} images; the members may be saturated",
                UnmovedWarning,
                stacklevel=3,
            )
        return found

    def _radii(self, images: Tensor, eps: Tensor | None, local_eps: Tensor | None) -> tuple[Tensor, Tensor]:
        """The radii of each image's ball and of its walks, (B, 1, 1, 1) float64."""
        radii, walks = for_each_image("eps", eps, images), for_each_image("local_eps", local_eps, images)
        if radii is None:
            radii = images.new_full((len(images), 1, 1, 1), self._ball.radius, dtype=torch.float64)
        if walks is None and self.local_eps is not None:
            walks = torch.full_like(radii, self.local_eps)
        return radii, LOCAL[self.norm] * radii if walks is None else walks


class _Search:
    """One attack on a batch."""

    def __init__(
        self,
        settings: Arc,
        answering: Answering,
        box: Bounds,
        images: Tensor,
        labels: Tensor,
        eps: Tensor,
        eta: Tensor,
        generator: torch.Generator,
    ) -> None:
        self.settings, self.answering, self.box, self.generator = settings, answering, box, generator
        self.images, self.labels, self.eps, self.eta = images, labels, eps, eta
        self.best = images.clone()
        self.broken = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        self.still = torch.full_like(self.broken, settings.steps > 0)
        self.unmoved = 0

    def run(self) -> Tensor:
        """The images of the lowest share found."""
        judged = self.answering.judged(self.images, self.labels)
        check_range(self.labels, None, judged.classes)
        check_finite(judged.broken)
        self.lowest = judged.share.clone()
        looked_at = 1 if judged.classes <= FEW_CLASSES else LOOKED_AT
        self.rivals = min(self.settings.classes or looked_at, judged.classes - 1)
        if self.rivals < 1:
            raise ValueError(f"model: expected outputs of at least 2 classes, got {judged.classes}")
        self.still &= self.lowest > 0
        for restart in range(self.settings.restarts):
            walk = self._begin(judged.share).select((self.lowest > 0).nonzero()[:, 0])
            for step in range(self.settings.steps):
                walk = self._over_members(walk, anew=restart + step > 0)
        check_finite(self.broken)
        self.unmoved = int(self.still.sum())
        return self.best

    def _begin(self, share: Tensor) -> _Walk:
        """All images where a restart finds them; `share`: (B,) of the clean ones."""
        low, high, start = None, None, self.images
        if self.settings.norm == "Linf":
            low, high = linf_bounds(self.images, self.eps, self.box)
        local = torch.zeros_like(start, dtype=accumulation_dtype(start))
        where = torch.arange(len(start), device=start.device)
        walk = _Walk(where, start, self.labels, self.eps, self.eta, low, high, start, local, start, share)
        if self.settings.random_start:
            start = random_start(self.images, self.eps, self.settings.norm, self.generator)
            at = self._projected(walk, start)
            walk = walk._replace(at=at, share=self._judged(walk, at))
            self._keep(walk)
        return walk

    def _over_members(self, walk: _Walk, anew: bool) -> _Walk:
        """One walk over the members, from where the last one has led; images that nobody is right about leave it."""
        walk = walk._replace(here=walk.at, local=torch.zeros_like(walk.local))
        for place, member in enumerate(self.answering.order(anew, self.generator)):
            walk = walk.select((walk.share > 0).nonzero()[:, 0])
            if not len(walk.where):
                break
            local = self._towards(walk, member, first=place == 0)
            at = self._projected(walk, walk.here + local)
            share = self._judged(walk, at)
            taken = share <= walk.share  # as low is low enough: the walk would stand still
            pixels = taken[:, None, None, None]
            walk = walk._replace(
                local=torch.where(pixels, local, walk.local),
                at=torch.where(pixels, at, walk.at),
                share=torch.where(taken, share, walk.share),
            )
            self._keep(walk)
        return walk

    def _keep(self, walk: _Walk) -> None:
        """Keep images whose share is lower than that of any before."""
        lower = walk.share < self.lowest[walk.where]
        self.best[walk.where] = torch.where(lower[:, None, None, None], walk.at, self.best[walk.where])
        self.lowest[walk.where] = torch.where(lower, walk.share, self.lowest[walk.where])

    def _judged(self, walk: _Walk, at: Tensor) -> Tensor:
        judged = self.answering.judged(at, walk.labels)
        self.broken[walk.where] |= judged.broken
        return judged.share

    def _projected(self, walk: _Walk, moved: Tensor) -> Tensor:
        """The nearest images in the balls and the box, exactly."""
        if walk.low is None or walk.high is None:
            return project_l2(moved, walk.images, walk.eps, self.box)
        return moved.to(walk.images.dtype).clamp(walk.low, walk.high)

    def _towards(self, walk: _Walk, member: Any, first: bool) -> Tensor:
        """The local perturbation that crosses one member's boundary, too: u′ = η (u + b g) / ‖u + b g‖_p."""
        gradient, distance = self._nearest(walk, member)
        size = _dual_length(gradient, self.settings.norm)
        linf = self.settings.norm == "Linf"
        along = -(gradient.sign() if linf else gradient / size)  # g, of length 1
        covered = -(gradient / size * walk.local).sum((1, 2, 3), keepdim=True).double()  # ⟨h, u⟩
        step = walk.eta
        if not first:
            there = distance + covered  # from where the walk began
            reach = there < walk.eta
            room = torch.where(reach, walk.eta - there, 1)
            across = walk.eta / room * distance.clamp_min(0) + BEYOND * walk.eps
            step = torch.where(reach, across, walk.eta)
        moved = walk.local + step.to(along) * along
        length = moved.abs().amax((1, 2, 3), keepdim=True) if linf else _dual_length(moved, "L2")
        return moved * (walk.eta.to(along) / torch.where(length > 0, length, 1))

    def _nearest(self, walk: _Walk, member: Any) -> tuple[Tensor, Tensor]:
        """Of the label's nearest boundary: the difference's gradient, scaled; the distance ζ, (B, 1, 1, 1) float64.

        A member that is wrong has crossed it: ζ < 0.
        """
        gradient = torch.zeros_like(walk.local)
        distance = torch.full_like(walk.eta, math.inf)
        still = torch.ones_like(walk.where, dtype=torch.bool)
        broken = torch.zeros_like(still)
        with torch.enable_grad():
            x = walk.at.detach().requires_grad_()
            outputs = at_least_float32(self.answering.outputs(member, x))
            own = torch.zeros_like(outputs, dtype=torch.bool).scatter(-1, walk.labels[:, None], True)
            others = outputs.masked_fill(own, -torch.inf).topk(self.rivals, -1).values
            differences = outputs.gather(-1, walk.labels[:, None]) - others
        for rival in range(self.rivals):
            known = differences[:, rival].detach().isfinite()  # not where a rival's probability is 0
            with torch.enable_grad():
                total = torch.where(known, differences[:, rival], 0).sum()
            found = image_gradient(total, x, keep_graph=rival + 1 < self.rivals)
            found = torch.where(known[:, None, None, None], found, 0)
            broken |= ~found.isfinite().flatten(1).all(1)
            largest, found = largest_magnitude(found), scaled(found).to(gradient)
            apart = torch.where(known, differences[:, rival].detach(), math.inf).view(-1, 1, 1, 1).double()
            size = largest.double() * _dual_length(found, self.settings.norm).double()
            moves = (found != 0).flatten(1).any(1)
            zeta = torch.where(moves.view(-1, 1, 1, 1), apart / size, math.inf)
            nearer = zeta < distance
            gradient = torch.where(nearer, found, gradient)
            distance = torch.where(nearer, zeta, distance)
            still &= ~moves
        self.still[walk.where] &= still
        self.broken[walk.where] |= broken
        return gradient, distance


def _dual_length(x: Tensor, norm: Norm) -> Tensor:
    """The norm of (B, C, H, W) that is dual to a ball's, L1 of Linf, (B, 1, 1, 1); 1 where it would be 0."""
    flat = x.flatten(1)
    length = flat.abs().sum(1) if norm == "Linf" else torch.linalg.vector_norm(flat, dim=1)
    return torch.where(length > 0, length, 1).view(-1, 1, 1, 1)


@overload
def arc(
    model: Any,
    images: Tensor,
    labels: Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    eps: Given | None = None,
    steps: int = 20,
    local_eps: Given | None = None,
    norm: Norm = "Linf",
    classes: int | None = None,
    members: int = 24,
    restarts: int = 1,
    random_start: bool = False,
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> Tensor: ...


@overload
def arc(
    model: Any,
    images: Tensor,
    labels: Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    eps: Sequence[Given],
    steps: int = 20,
    local_eps: Given | None = None,
    norm: Norm = "Linf",
    classes: int | None = None,
    members: int = 24,
    restarts: int = 1,
    random_start: bool = False,
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> list[Tensor]: ...


def arc(
    model: Any,
    images: Tensor,
    labels: Tensor,
    *,
    weights: Sequence[float] | Tensor | None = None,
    eps: Given | Sequence[Given] | None = None,
    steps: int = 20,
    local_eps: Given | None = None,
    norm: Norm = "Linf",
    classes: int | None = None,
    members: int = 24,
    restarts: int = 1,
    random_start: bool = False,
    generator: torch.Generator | None = None,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> Tensor | list[Tensor]:
    """ARC (Dbouk & Shanbhag, arXiv 2206.06737): lowers the probability that a random member of an ensemble is right.

    The members are asked for their exact verdicts, nothing is sampled: of networks A = Σ a_i [f_i is right], of a
    mixture the share of the N! permutations of its gate's weights that is right, see `permutations.shares_right`. A
    step of `steps` walks over the members. For each it takes the nearest boundary as the gradient has it, goes just
    beyond it, so that what was fooled before stays fooled, and goes back where that raises A; the first of a walk is
    left as far behind as may be. Images that no member is
    right about are left as they are.

    A step costs M members a pass over all networks each, to judge, and a forward and `classes` backward passes: of one
    network for a list's member, and of all experts for a permutation. With N networks, M is N.

    Args:
        model: a list, a tuple or an `nn.ModuleList` of networks, images (B, C, H, W) to logits or log-probabilities
            (B, K), one of which answers each time; or a mixture whose gate draws a permutation, such as `ImmunityMoE`,
            also behind `deterministic()`. Of one whose gate does not switch the permutations are attacked all the
            same, which is not what answers then. Of one whose gate draws an expert, a `SelectionGate`, the experts are
            the members. Modules are in evaluation mode for as long as the attack takes.
        images: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers in 0..K−1.
        weights: N numbers ≥ 0, how often each network of a list answers; they are divided by their sum. None is 1/N
            each, and all that a mixture allows.
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`. A
            tensor (B,) has a radius of each image's own. A list or tuple has several, for each of which there is a
            result: what a call with it alone gives, from the same random state.
        steps: how often the members are walked over.
        local_eps: η, the radius of a walk, in the same units; None is that of the ball for Linf, and a quarter of it
            for L2, as published. Members with opposite gradients that are all further than that make a walk stand
            still. A tensor (B,) has one of each image's own.
        norm: "Linf" or "L2".
        classes: how many of the next likeliest classes' boundaries are compared, G; None is 1 of up to 10 classes and 4
            of more, as published.
        members: most permutations of a walk. Which they are is drawn anew for each.
        restarts: how often, the best counting. Networks are walked over by their weights at first, the largest first,
            and from the second walk of a call on in a random order.
        random_start: begin at a random point of the ball, which counts like all that are reached.
        generator: of random starts, orders and permutations; None is a new one seeded with 0, so that a call is
            reproducible. PyTorch's default generator is left alone.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        preprocessing: what is done to images on their way to the model, `dict(mean=…, std=…)`: (images − mean) / std.

    Returns:
        Adversarial images (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds, exactly: of each
        the first that was found of the lowest A ever seen, which is the image itself where nothing lowered it. Of
        several radii a list.

    Raises:
        ValueError: a model that is neither, or averages with fixed weights; images out of bounds or not 4-D; labels of
            another shape, not integers or out of range; weights of another number, negative or all zero; a setting out
            of its range; outputs without a gradient, of one class, or of other shapes; as `NotFiniteError`, an output
            or gradient that is NaN or infinite.
        TypeError: images or labels that are no tensors, a number of things that is not whole.

    Warns:
        UnmovedWarning: so many of the images have a gradient of exactly zero from every member that was asked, so that
            the attack cannot move them.
        MovedStatisticsWarning: a network is a function that asks a module in training mode, whose statistics moved.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator

    def one(given: Given | None) -> Tensor:
        (radius, radii), (walk, walks) = one_or_each(given), one_or_each(local_eps)
        settings = Arc(radius, steps, walk, norm, classes, members, restarts, random_start, bounds)
        return settings(
            model, images, labels, generator, weights=weights, eps=radii, local_eps=walks, preprocessing=preprocessing
        )

    return of_each(eps, one, images, generator) if isinstance(eps, Sequence) else one(eps)


def _members_of(model: Any, weights: Any, preprocessing: Preprocessing | None) -> tuple[EnsembleMembers, bool]:
    """(The members of a model; whether it is a permutation of their weights that answers)."""
    networks = networks_in(model)
    if networks is not None:
        return NetworkMembers(networks, weights, preprocessing), False
    mixture = mixture_in(model)
    if mixture is None:
        raise ValueError(
            f"model: expected a mixture of experts or a list of networks, got {kind_of(model)}; each member has to be "
            "asked alone"
        )
    if weights is not None:
        raise ValueError("weights: expected None of a mixture, whose gate has its own, got some; they are of a list")
    permuted = is_random(mixture.gate) and not selects(mixture.gate)
    return MixtureMembers(mixture, preprocessing=preprocessing), permuted


class EveryMember(nn.Module):
    """What `every_member` makes."""

    def __init__(self, model: Any, weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        self.members, self.permuted = _members_of(model, weights, None)
        # As submodules they are in the mode that an attack puts this in.
        self.parts = nn.ModuleList(part for part in networks_in(model) or [model] if isinstance(part, nn.Module))

    def forward(self, images: Tensor) -> Tensor:
        """Expected log-probabilities (B, K) of images (B, C, H, W)."""
        logits, weights = self.members.logits(images), self.members.weights(images)
        if not self.permuted:
            return expected_outputs(logits, weights)
        return every_permutation(logits, weights).mean(0)


def expected_outputs(logits: Tensor, weights: Tensor) -> Tensor:
    """Expected log-probabilities (B, K) of members one of which answers: Σ a_i log p_i.

    Args:
        logits: (N, B, K) of the members.
        weights: (B, N) a_i, each row summing to 1.
    """
    shares = weights.T[..., None]
    # A member that never answers may have a probability of 0.
    return torch.where(shares > 0, shares * at_least_float32(logits).log_softmax(-1), 0).sum(0)


def every_permutation(logits: Tensor, weights: Tensor) -> Tensor:
    """What a mixture answers under each permutation of its weights: log-probabilities (P, B, K).

    Args:
        logits: (N, B, K) of the experts.
        weights: (B, N) of the gate.

    Returns:
        All P = N! permutations of up to 5 experts; of more 120, the same each time.
    """
    count, samples, classes = logits.shape
    if math.factorial(count) <= AVERAGED:
        orders = orders_tried(count)
    else:
        orders = random_orders(AVERAGED, count, torch.Generator().manual_seed(0), torch.device("cpu"))
    gates = weights[:, orders.to(logits.device)].transpose(0, 1).reshape(-1, count)
    mixtures = log_mixture(logits[:, None].expand(-1, len(orders), -1, -1).reshape(count, -1, classes), gates)
    return mixtures.view(len(orders), samples, classes)


def every_member(model: Any, weights: Sequence[float] | Tensor | None = None) -> EveryMember:
    """The weak attacker that `arc` is compared with: expected log-probabilities, Σ a_i log p_i, over all members.

    They are no distribution. With `expected_loss` the objective is Σ a_i CE_i, exactly:
    ``pgd(every_member(networks), images, labels, loss=expected_loss, steps=20)``.

    Args:
        model: as for `arc`: a list of networks; or a mixture, of which the permutations are averaged, all of up to 5
            experts, and 120 of more, the same each time. Of a gate whose weights are fixed these are the a_i.
        weights: of the networks, as for `arc`.

    Returns:
        A module from images (B, C, H, W) to (B, K).

    Raises:
        ValueError: a model that is neither; weights of another number, negative or all zero.
    """
    return EveryMember(model, weights)


def expected_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """The expected cross-entropy of members one of which answers, of what `every_member` says.

    Args:
        outputs: (B, K) expected log-probabilities.
        labels: (B,) integers in 0..K−1.

    Returns:
        (B,).
    """
    return -outputs.gather(-1, labels[:, None])[:, 0]
