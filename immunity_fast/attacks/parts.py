"""A model as the parts of AutoAttack ask it, and the frame in which they run, each on the survivors of those before.

`autoattack`, `apgd` and `square` share it.
"""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from immunity_fast.attacks.batch import FOR_GOOD
from immunity_fast.attacks.checks import check_finite, check_images, check_range, not_finite
from immunity_fast.attacks.dependence import image_gradient
from immunity_fast.attacks.descent import Attack, compiled_size
from immunity_fast.attacks.losses import Loss, OwnLoss, loss_of
from immunity_fast.attacks.mixtures import (
    Answers,
    ExactJudge,
    Judge,
    Mixture,
    Model,
    asked_modules,
    drawn,
    trained_gate,
)
from immunity_fast.attacks.projections import UNIT, Bounds, Norm, linf_bounds, project_l2, rounded_bounds
from immunity_fast.attacks.radii import Given, for_each_image, one_or_each
from immunity_fast.functional import log_mixture
from immunity_fast.runtime.checks import check_choice, check_whole, is_whole
from immunity_fast.runtime.compilation import Compile, Compiled
from immunity_fast.runtime.precision import at_least_float32

NOT_FINITE = "model: expected finite outputs, got NaN or infinite ones for an image of the ball"


@dataclass(frozen=True)
class Objective:
    """What an attack maximises, and when it has succeeded.

    Args:
        loss: of `losses`, or one's own.
        reach: success is to reach the target; else any wrong class is, and a target is the loss's alone.
    """

    loss: Loss | OwnLoss = "ce"
    reach: bool = False


class Look(NamedTuple):
    """What a look at B images finds of them."""

    gradient: Tensor | None  # (B, C, H, W) of the loss, in float32 at least
    loss: Tensor  # (B,)
    success: Tensor  # (B,) int64: 0, 1, or 2 where it is `FOR_GOOD`
    broken: Tensor  # (B,) bool: whether an output or the gradient is no number


class Network:
    """A model that is asked for images of any floating-point dtype, and shown them in its own.

    Args:
        model: images (B, C, H, W) to outputs (B, K); or (draws, B, K), several draws of a random output by one pass.
        dtype: of the images that it is shown.
        draws: how many of a random model's outputs a step averages over.
        judge: by what success of a random model is judged, see `mixtures.Judge`; None is by its last draw.
        compile: "on" and "max" compile looks at a model that is not random, and outputs without a gradient.
        device: where the images are; only compiling asks for it.

    Attributes:
        whole: how many images a compiled pass is for, at most; more are looked at in eager mode.
        random: whether two passes may differ: success is then not for good, unless a judge says that it is.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype,
        draws: int = 1,
        judge: Judge | None = None,
        *,
        compile: Compile = "off",
        device: torch.device | None = None,
    ) -> None:
        check_choice("compile", compile, Compile)
        self.whole = 0
        self._compile, self._device = compile, device or torch.device("cpu")
        self._outputs = Compiled(lambda images: self.model(images), compile, self._device)
        self._found: dict[tuple[Objective, bool], Compiled] = {}  # by what is maximised, and whether there are targets
        self._differences = Compiled(_differences_of(lambda images: self.model(images)), compile, self._device)
        self.model, self.dtype, self.draws, self.judge = model, dtype, draws, judge
        self.random = draws > 1
        self._mixture: Mixture | None = None  # whose draws are taken by one pass over its experts
        self._at_once = False  # the model gives all draws by one pass

    def __call__(self, images: Tensor) -> Tensor:
        """Outputs (B, K), float32 at least; of several draws the last. They are not to be written on.

        Raises:
            ValueError: NaN or infinite ones. −∞ is the logarithm of 0.
        """
        images = images.to(self.dtype)
        plain = images.requires_grad or self.random
        said = self.model(images) if plain else self._padded(self._outputs, images)[0]
        outputs = at_least_float32(self._last(said))
        # An argmax takes NaN for the largest: a row of it is class 0, and an image of that class passed for robust.
        if bool(not_finite(outputs).any()):
            raise ValueError(NOT_FINITE)
        return outputs

    def differences(self, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """z_target − z_label (B,), its gradient (B, C, H, W) and outputs (B, K), by compiled code; None without any.

        Raises:
            ValueError: NaN or infinite outputs.
        """
        if self.random or not self._differences.active or len(images) > self.whole:
            return None
        with torch.no_grad():
            found = self._padded(self._differences, images.detach().to(self.dtype), labels, targets)
        differences, gradients, outputs = (at_least_float32(each) for each in found)
        if bool(not_finite(outputs).any()):
            raise ValueError(NOT_FINITE)
        return differences, gradients, outputs

    def gives_draws(self) -> None:
        """Take the model's outputs (draws, B, K) for the draws of a step."""
        self._at_once = self.random = True

    def draws_of(self, mixture: Mixture) -> None:
        """Take the draws of a mixture, which is all of the model, by one pass over its experts."""
        self._mixture = mixture
        self.gives_draws()
        self.model = drawn(mixture, self.draws)

    def look(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, objective: Objective, gradient: bool = True
    ) -> Look:
        """What the model says of images (B, C, H, W), labels (B,) and targets (B,), or None.

        Args:
            gradient: leave the gradient out where nobody follows it.

        Raises:
            ValueError: outputs without a gradient.
        """
        if self._compile != "off" and not self.random:
            return self._compiled_look(images, labels, targets, objective, gradient)
        passes = 1 if self._at_once else self.draws
        slope: Tensor | None = None
        loss, broken = torch.zeros(()), torch.zeros_like(labels, dtype=torch.bool)
        for number in range(passes):
            with torch.set_grad_enabled(gradient):
                x = images.detach().to(self.dtype).requires_grad_(gradient)
                outputs, answers = self._said(x)
                losses = self._losses(outputs, labels, targets, objective)
                along = at_least_float32(image_gradient(losses.sum(), x)) if gradient else None
            losses, outputs = losses.detach(), outputs.detach()
            broken |= not_finite(outputs) | losses.isnan()
            loss = losses if number == 0 else loss + losses
            slope = along if slope is None or along is None else slope + along
        if self.judge is None:
            fooled = _succeeded(outputs[-1], labels, targets, objective)
            found = Look(slope, loss / passes, (1 if self.random else FOR_GOOD) * fooled.long(), broken)
        else:
            found = self._judged(slope, broken, answers, images, labels, targets, objective)
        if slope is None:
            return found
        # An output of −∞ may have no slope: where it is the label's, the image is done.
        return found._replace(broken=found.broken | (~slope.isfinite().flatten(1).all(1) & (found.success < FOR_GOOD)))

    def _compiled_look(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, objective: Objective, gradient: bool
    ) -> Look:
        """`look` at a model that is not random."""
        slope, x = None, images.detach().to(self.dtype)
        with torch.no_grad():
            if gradient:
                key = (objective, targets is not None)
                if key not in self._found:
                    self._found[key] = Compiled(self._differentiated(objective), self._compile, self._device)
                aims = () if targets is None else (targets,)
                slope, losses, outputs = self._padded(self._found[key], x, labels, *aims)
                slope = at_least_float32(slope)
            else:
                outputs = at_least_float32(self._padded(self._outputs, x)[0])
                losses = self._losses(outputs[None], labels, targets, objective)
        success = FOR_GOOD * _succeeded(outputs, labels, targets, objective).long()
        broken = not_finite(outputs) | losses.isnan()
        if slope is not None:
            broken |= ~slope.isfinite().flatten(1).all(1) & (success < FOR_GOOD)
        return Look(slope, losses, success, broken)

    def _differentiated(self, objective: Objective) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, targets or nothing) to (gradient, loss, outputs), to be compiled."""

        def found(images: Tensor, labels: Tensor, *targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            def total(images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
                outputs = at_least_float32(self.model(images))
                losses = self._losses(outputs[None], labels, targets[0] if targets else None, objective)
                return losses.sum(), (losses.detach(), outputs.detach())

            with torch.no_grad():  # of parameters; the images' is torch.func's
                gradient, (losses, outputs) = torch.func.grad(total, has_aux=True)(images)
            return gradient, losses, outputs

        return found

    def _padded(self, function: Compiled, *inputs: Tensor) -> list[Tensor]:
        """What a function gives for tensors (B, …), called with a number of images that it is compiled for."""
        size = len(inputs[0])
        if not function.active or size > self.whole:
            found = function.plain(*inputs)
            return [found] if isinstance(found, Tensor) else list(found)
        padded = compiled_size(size, self.whole)
        if padded > size:
            rows = torch.arange(padded, device=inputs[0].device).clamp_max(size - 1)
            inputs = tuple(tensor[rows] for tensor in inputs)
        found = function(*inputs)
        # CUDA graphs write the next results over these.
        return [tensor[:size].clone() for tensor in ([found] if isinstance(found, Tensor) else found)]

    def _said(self, images: Tensor) -> tuple[Tensor, Answers | None]:
        """(outputs (draws, B, K), what a mixture said on the way, where its judge wants to know)."""
        if self._mixture is not None and isinstance(self.judge, ExactJudge):
            logits = self.judge.expert_logits(images)
            outputs = torch.stack([log_mixture(logits, self._mixture.gate_weights(images)) for _ in range(self.draws)])
            with torch.no_grad():
                answers = Answers(logits.detach(), trained_gate(self._mixture, images))
            return at_least_float32(outputs), answers
        outputs = at_least_float32(self.model(images))
        return (outputs if outputs.dim() == 3 else outputs[None]), None

    def _losses(self, outputs: Tensor, labels: Tensor, targets: Tensor | None, objective: Objective) -> Tensor:
        """The mean loss (B,) of outputs (draws, B, K)."""
        size = (len(outputs), *labels.shape)
        wanted = None if targets is None else targets.expand(size)
        losses = loss_of(objective.loss, outputs, labels.expand(size), wanted)
        return losses[0] if len(losses) == 1 else losses.mean(0)

    def _judged(
        self,
        gradient: Tensor | None,
        broken: Tensor,
        answers: Answers | None,
        images: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        objective: Objective,
    ) -> Look:
        """A look whose loss and success are the judge's."""
        reached = targets if objective.reach else None
        with torch.no_grad():
            if answers is not None and isinstance(self.judge, ExactJudge):
                outputs, always = self.judge.of_answers(answers, labels, reached)
            else:
                assert self.judge is not None
                outputs, always = self.judge(images.to(self.dtype), labels, reached)
            outputs = at_least_float32(self._last(outputs))
            loss = self._losses(outputs[None], labels, targets, objective)
            fooled = _succeeded(outputs, labels, targets, objective)
        return Look(gradient, loss, fooled.long() + (fooled & always), broken | not_finite(outputs) | loss.isnan())

    def _last(self, outputs: Tensor) -> Tensor:
        return outputs[-1] if outputs.dim() == 3 and self._at_once else outputs

    def begin(self, images: Tensor, num_classes: int | None, stack: ExitStack, *, gradients: bool) -> Tensor:
        """The outputs (B, K) for the images themselves, detached, and all that can be said against a model by them.

        It is found out, too, whether gates switch, and whether the model gives all draws by one pass. Where draws are
        averaged, gates that draw are told, until the stack is left, that this is meant.

        Args:
            images: (B, C, H, W) of the model's dtype.
            num_classes: K; None is as many as there are, two at least where gradients are needed.
            gradients: whether an attack will need them.

        Raises:
            ValueError: outputs of another shape or without a gradient; as `NotFiniteError`, an output or gradient that
                is NaN or infinite.
        """
        self.whole = len(images)

        def meant(gate: Any) -> None:
            if self.draws > 1:
                stack.enter_context(gate.switched(gate.switch))

        with torch.set_grad_enabled(gradients):
            inputs = images.detach().clone().requires_grad_(gradients)
            with asked_modules(meant) as asked:
                outputs = self.model(inputs)
            if outputs.dim() == 3 and len(outputs) == self.draws > 1:
                self.gives_draws()
                outputs = outputs[-1]
            elif asked.random_gates:
                self.random = True
                mixture = asked.only(inputs, outputs)
                if mixture is not None and self.draws > 1:
                    self.draws_of(mixture)
            if outputs.dim() != 2 or len(outputs) != len(images) or num_classes not in (None, outputs.shape[1]):
                expected = f"({len(images)}, {'K' if num_classes is None else num_classes})"
                raise ValueError(f"model: expected outputs {expected}, got {tuple(outputs.shape)}")
            if gradients and outputs.shape[1] < 2:
                raise ValueError(f"model: expected outputs of at least 2 classes, got {outputs.shape[1]}")
            check_finite(not_finite(outputs))
            if gradients:
                gradient = image_gradient(outputs.sum(), inputs)
                check_finite(~gradient.isfinite().flatten(1).all(1))
        return at_least_float32(outputs.detach())


class Aim(NamedTuple):
    """What the rows of a targeted attack aim at."""

    targets: Tensor  # (B,)
    places: Tensor  # (B,) of their images: rows of one place are done as soon as one of them fools the model


class Part(NamedTuple):
    """An attack of AutoAttack's, from images (B, C, H, W) and labels (B,) to images that may fool the model."""

    attack: Callable[[Tensor, Tensor, Aim | None], Tensor]  # a targeted one has an aim, another none
    targets: int = 0  # for how many classes a targeted one runs, the likeliest wrong ones


def in_turn(
    network: Network,
    order: Callable[[int], Sequence[Part]],
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm,
    bounds: Bounds,
    seed: int,
    num_classes: int | None,
    gradients: bool,
) -> Tensor:
    """What several attacks make of images, one after the other, each on the images that survived those before.

    What a part hands back is moved into the ball and the bounds, exactly in the images' dtype, and judged by a pass.
    Where few images are left, several targets are one batch, which is no larger than the one that was given.

    Args:
        network: asked in the images' dtype.
        order: from K to the attacks. Images that one hands back unchanged have withstood it.
        images: (B, C, H, W) within the bounds.
        labels: (B,).
        eps: radius of the ball.
        norm: of the ball.
        bounds: the lowest and the highest value of a pixel.
        seed: of all chance.
        num_classes: K; None is as many as the model's outputs have.
        gradients: whether a part needs them.

    Returns:
        (B, C, H, W): an image that fools the model where one was found, else the image itself.
    """
    images, labels, box = images.detach(), labels.long(), rounded_bounds(bounds, images.dtype)
    adversarial = images.clone()
    if not len(images):
        return adversarial
    with seeded(seed), ExitStack() as stack:
        outputs = network.begin(images, num_classes, stack, gradients=gradients)
        check_range(labels, None, outputs.shape[1])
        likeliest = _wrong_classes(outputs, labels)
        survivors = (outputs.argmax(1) == labels).nonzero()[:, 0]
        for part in order(outputs.shape[1]):
            tried = 0
            while len(survivors) and tried < max(part.targets, 1):
                at_once = 1 if network.random else max(len(images) // len(survivors), 1)
                places, aim = survivors, None
                if part.targets:
                    columns = likeliest[survivors, tried : min(tried + at_once, part.targets)]
                    places = survivors.repeat(columns.shape[1])
                    aim = Aim(columns.T.flatten(), places)
                clean, classes = images[places], labels[places]
                found = _inside(part.attack(clean, classes, aim), clean, eps, norm, box)
                fooled = _fools(network, found, clean, classes)
                fooled = fooled[first_of_each(places[fooled], len(images))]
                adversarial[places[fooled]] = found[fooled]
                fallen = torch.zeros(len(images), dtype=torch.bool, device=images.device)
                fallen[places[fooled]] = True
                survivors = survivors[~fallen[survivors]]
                tried += at_once
    return adversarial


def _wrong_classes(outputs: Tensor, labels: Tensor) -> Tensor:
    """All classes but the labels (B, K − 1), the likeliest by the outputs (B, K) first."""
    first = outputs.scatter(1, labels[:, None], torch.inf)
    return torch.sort(first, dim=1, descending=True, stable=True).indices[:, 1:]


def _fools(network: Network, found: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Indices of the images that fool the model at a pass."""
    if network.random:
        rows = torch.arange(len(found), device=found.device)
    else:  # what is as it was is right, as was seen at the beginning
        rows = (found != images).flatten(1).any(1).nonzero()[:, 0]
    if not len(rows):
        return rows
    with torch.no_grad():
        return rows[network(found[rows]).argmax(1) != labels[rows]]


def first_of_each(places: Tensor, whole: int) -> Tensor:
    """Indices of the first row of each place among rows' places (B,), of which there are `whole`."""
    rows = torch.arange(len(places), device=places.device)
    first = torch.full((whole,), len(places), device=places.device).scatter_reduce(0, places, rows, "amin")
    return first[first < len(places)]


def _inside(found: Tensor, images: Tensor, eps: float, norm: Norm, box: Bounds) -> Tensor:
    if norm == "Linf":
        return found.detach().to(images.dtype).clamp(*linf_bounds(images, eps, box))
    return project_l2(found, images, eps, box)


def _differences_of(model: Model) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """(images, labels, targets) to what `Network.differences` gives, to be compiled."""

    def found(images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def total(images: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            outputs = at_least_float32(model(images))
            differences = (outputs.gather(1, targets[:, None]) - outputs.gather(1, labels[:, None]))[:, 0]
            return differences.sum(), (differences.detach(), outputs.detach())

        with torch.no_grad():  # of parameters; the images' is torch.func's
            gradient, (differences, outputs) = torch.func.grad(total, has_aux=True)(images)
        return differences, gradient, outputs

    return found


def _succeeded(outputs: Tensor, labels: Tensor, targets: Tensor | None, objective: Objective) -> Tensor:
    predicted = outputs.argmax(-1)
    return predicted == targets if objective.reach and targets is not None else predicted != labels


def at_radii(
    attack: Callable[[float, Tensor, Tensor], Tensor],
    eps: Given | Sequence[Given] | None,
    norm: Norm,
    bounds: Bounds,
    images: Tensor,
    labels: Tensor,
) -> Tensor | list[Tensor]:
    """What an attack of one radius makes of the images, for all that `eps` may be."""

    def one(given: Given | None) -> Tensor:
        radius, each = one_or_each(given)
        if each is None:
            return attack(Attack(eps=radius, norm=norm, bounds=bounds).radius, images, labels)
        radii = for_each_image("eps", each, images)
        assert radii is not None
        found = images.detach().clone()
        for value in sorted(set(radii.flatten().tolist())):
            rows = (radii.flatten() == value).nonzero()[:, 0]
            found[rows] = attack(value, images[rows], labels[rows])
        return found

    return [one(given) for given in eps] if isinstance(eps, Sequence) else one(eps)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All global generators, of torch, Python and NumPy, seeded in a `with` block, and then as they were before.

    NumPy's where the process has imported it: what has not cannot draw from it.
    """
    seed = operator.index(seed)  # Python's own generator would take the hash of one of NumPy's
    of_python, numpy = random.getstate(), sys.modules.get("numpy")
    of_numpy = None if numpy is None else numpy.random.get_state()
    # torch.manual_seed would also seed GPUs that this process has not begun to use, where nothing can be put back.
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = list(range(torch.cuda.device_count())) if begun else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(of_python)
            if numpy is not None:
                numpy.random.set_state(of_numpy)


def check_seed(seed: int) -> None:
    """Check that a seed is one that torch takes.

    Raises:
        ValueError: it has more than 64 bits.
        TypeError: no whole number.
    """
    if not is_whole(seed):
        raise TypeError(f"seed: expected a whole number, got {seed!r}")
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed: expected a whole number of 64 bits, got {seed}")


def check_settings(images: Tensor, labels: Tensor, norm: Norm, bounds: Bounds = UNIT, **counts: int) -> None:
    """Check what AutoAttack or a part of it is given.

    Args:
        counts: whole numbers of at least 1, by their names.

    Raises:
        ValueError, TypeError: see `autoattack`.
    """
    bounds = Attack(norm=norm, bounds=bounds).bounds
    for name, count in counts.items():
        check_whole(name, count, 1)
    check_images(images, labels, None, bounds)
