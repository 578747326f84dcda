"""AutoAttack and Square Attack, of torchattacks' parts, on any callable from images to logits or log-probabilities.

torchattacks' own AutoAttack is not the published one: it takes 10 steps of APGD and FAB where that takes 100, all wrong
classes where that takes nine, and squares that shrink on another schedule. Its parts are run here with the settings of
the authors' code, https://github.com/fra31/auto-attack.

What they return has been judged as it is: inside the ball and the bounds, exactly, in the images' dtype. The attacks
compute in float32 and round to that dtype what they show the model.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast.attacks.checks import check_finite, check_images, check_range, not_finite
from immunity_fast.attacks.dependence import image_gradient
from immunity_fast.attacks.descent import Attack
from immunity_fast.attacks.losses import dlr
from immunity_fast.attacks.mixtures import Model, asked_modules, drawn
from immunity_fast.attacks.modes import attacked
from immunity_fast.attacks.preprocessing import Preprocessing, preprocessed
from immunity_fast.attacks.projections import (
    UNIT,
    Bounds,
    Norm,
    largest_magnitude,
    linf_bounds,
    project_l2,
    rounded_bounds,
)
from immunity_fast.attacks.radii import Given, for_each_image, one_or_each
from immunity_fast.runtime.checks import check_choice

Version = Literal["standard", "rand"]

TARGETS = 9  # classes that each targeted attack tries, the likeliest first
DRAWS = 20  # forward passes that a step averages over, if the model is random

_Part = Callable[[Tensor, Tensor], Tensor]  # float32 images and their labels to images that may fool the model


@overload
def autoattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    eps: Given | None = None,
    norm: Norm = "Linf",
    version: Version = "standard",
    seed: int = 0,
    steps: int = 100,
    queries: int = 5000,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> Tensor: ...


@overload
def autoattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    eps: Sequence[Given],
    norm: Norm = "Linf",
    version: Version = "standard",
    seed: int = 0,
    steps: int = 100,
    queries: int = 5000,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> list[Tensor]: ...


def autoattack(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    eps: Given | Sequence[Given] | None = None,
    norm: Norm = "Linf",
    version: Version = "standard",
    seed: int = 0,
    steps: int = 100,
    queries: int = 5000,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
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
        num_classes: K.
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

    Returns:
        (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds, exactly: an image that fools the
        model where one was found, and the image itself where the model is wrong without an attack or withstood it. So
        the accuracy on them is the robust accuracy. Of several radii a list.

    Raises:
        ModuleNotFoundError: torchattacks is missing.
        ValueError: images out of bounds or not 4-D; labels of another shape, not integers or out of range; an unknown
            norm or version; eps < 0, num_classes < 2, steps or queries < 1; outputs that are not (B, num_classes), that
            have no gradient with respect to the images, which `square` does not need, or that are NaN or infinite, as
            `NotFiniteError` where they are so for an image itself.
        TypeError: images or labels that are no tensors.

    Warns:
        MovedStatisticsWarning: the model is a function that asks a module in training mode, whose statistics moved.
    """
    check_choice("version", version, Version)
    _check_settings(images, labels, norm, bounds, steps=steps, queries=queries)
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    torchattacks = _torchattacks("autoattack")

    def order(parts: _Parts) -> list[_Part]:
        return _published(parts, version, num_classes, steps, queries)

    def one(radius: float, images: Tensor, labels: Tensor) -> Tensor:
        network = _Network(prepared, images, bounds, several=version == "rand")
        parts = _Parts(torchattacks, network, radius, norm)
        return _attack(parts, order(parts), images, labels, seed, num_classes)

    prepared = preprocessed(model, preprocessing)
    with attacked(model):
        return _at_radii(one, eps, norm, bounds, images, labels)


def _published(parts: _Parts, version: Version, num_classes: int, steps: int, queries: int) -> list[_Part]:
    """The attacks of a version in their order."""
    ranks = range(2, min(TARGETS, num_classes - 1) + 2)
    order: list[_Part] = [partial(parts.apgd, steps=steps, draws=DRAWS if version == "rand" else 1)]
    if version == "rand":
        if num_classes >= 3:
            order.append(partial(parts.apgd, steps=steps, draws=DRAWS, loss="dlr"))
    else:
        if num_classes >= 4:
            order.extend(partial(parts.apgd, steps=steps, rank=rank) for rank in ranks)
        order.extend(partial(parts.fab, steps=steps, rank=rank) for rank in ranks)
        order.append(partial(parts.square, queries=queries, rescale=False))
    return order


@overload
def square(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | None = None,
    norm: Norm = "Linf",
    queries: int = 5000,
    seed: int = 0,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> Tensor: ...


@overload
def square(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Sequence[Given],
    norm: Norm = "Linf",
    queries: int = 5000,
    seed: int = 0,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> list[Tensor]: ...


def square(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: Given | Sequence[Given] | None = None,
    norm: Norm = "Linf",
    queries: int = 5000,
    seed: int = 0,
    bounds: Bounds = UNIT,
    preprocessing: Preprocessing | None = None,
) -> Tensor | list[Tensor]:
    """Square Attack (Andriushchenko et al., arXiv 1912.00049): random search by forward passes alone.

    It needs no gradient: a model's output may be detached. The first squares cover 0.8 of the image, as in AutoAttack,
    and shrink on the paper's schedule, rescaled to `queries`. In L2, torchattacks fails on images that are not square,
    smaller than 5×5 or of some sides between 12 and 24; these are attacked with a margin of zeros that the model does
    not see, which takes a part of the perturbation.

    Args:
        model: images (B, C, H, W), of the images' dtype, to logits or log-probabilities (B, K). A module is in
            evaluation mode for as long as the attack takes; its outputs stay as they are.
        images: (B, C, H, W) floating-point, within the bounds.
        labels: (B,) integers in 0..K−1.
        eps: radius of the ball, in the images' units; None is 8/255 for Linf, 1 for L2, times the range of `bounds`. A
            tensor (B,) has a radius of each image's own: images of different radii are attacked one after the other. A
            list or tuple has several, for each of which there is a result: what a call with it alone gives.
        norm: "Linf" or "L2".
        queries: forward passes for each image, at most; one more is the start.
        seed: of all chance, see `autoattack`.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        preprocessing: what is done to images on their way to the model, `dict(mean=…, std=…)`: (images − mean) / std.

    Returns:
        (B, C, H, W) of the images' dtype, detached, inside the ball and the bounds, exactly: an image that fools the
        model where one was found, and the image itself where the model is wrong without an attack or withstood it. So
        the accuracy on them is the robust accuracy. Of several radii a list.

    Raises:
        ModuleNotFoundError: torchattacks is missing.
        ValueError: images out of bounds or not 4-D; labels of another shape, not integers or out of range; an unknown
            norm; eps < 0, queries < 1; outputs that are not (B, K), or that are NaN or infinite, as
            `NotFiniteError` where they are so for an image itself.
        TypeError: images or labels that are no tensors.

    Warns:
        MovedStatisticsWarning: the model is a function that asks a module in training mode, whose statistics moved.
    """
    _check_settings(images, labels, norm, bounds, queries=queries)
    torchattacks = _torchattacks("square")

    def one(radius: float, images: Tensor, labels: Tensor) -> Tensor:
        parts = _Parts(torchattacks, _Network(prepared, images, bounds), radius, norm)
        return _attack(parts, [partial(parts.square, queries=queries, rescale=True)], images, labels, seed, None)

    prepared = preprocessed(model, preprocessing)
    with attacked(model):
        return _at_radii(one, eps, norm, bounds, images, labels)


def _at_radii(
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


class _Network(nn.Module):
    """The model as torchattacks wants it: a module of images in [0, 1], whose device a parameter tells, in and out in
    float32.

    The model is no submodule: `train`, `eval` and `parameters` do not reach it.
    """

    def __init__(self, model: Model, images: Tensor, bounds: Bounds = UNIT, several: bool = False) -> None:
        super().__init__()
        self.bounds = rounded_bounds(bounds, images.dtype)
        self.several = several  # outputs may be (20, B, K)
        self.at_once = False  # and are
        self.call: Model = lambda images: model(images)  # assigned itself, a module would become a child
        self.dtype, self.size = images.dtype, images.shape[2:]
        self.passes = 1  # that a step averages
        self.gradients = 0  # that were taken
        self.largest = torch.ones(())
        self.draws: Tensor | None = None  # of the last pass, of a model that gives several
        self.device = nn.Parameter(torch.empty(0, device=images.device), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs (B, K): a copy, because Square writes on them. A margin around the images is cut off.

        Each image's gradient is brought to a largest magnitude of 1; those of the passes that a step averages, by the
        first one's. Of APGD it is the direction that counts, and it adds 10⁻¹² to a norm: it would not move an image
        whose gradient is smaller.
        """
        height, width = self.size
        inside = self.shown(images[..., :height, :width].contiguous())
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            if inside.requires_grad:
                inside = inside.view_as(inside)
                inside.register_hook(self.rescaled)  # type: ignore[no-untyped-call]
            return self.outputs(inside).float().clone()

    def shown(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the model is shown them: within its bounds, in its dtype."""
        if self.bounds == UNIT:
            return images.to(self.dtype)
        low, high = self.bounds
        shown = (low + (high - low) * images).to(self.dtype)
        return shown + (shown.clamp(low, high) - shown).detach()  # what rounding has carried outside has its gradient

    def hidden(self, images: Tensor) -> Tensor:
        """Images that are within the model's bounds, in [0, 1] and float32."""
        if self.bounds == UNIT:
            return images.float()
        low, high = self.bounds
        return ((images.double() - low) / (high - low)).clamp(0, 1).float()

    def rescaled(self, gradient: Tensor) -> Tensor:
        """The gradient (B, C, H, W) of a pass; the first of those that a step averages sets the scale."""
        if self.gradients % self.passes == 0:
            self.largest = largest_magnitude(gradient)
        self.gradients += 1
        return (gradient / self.largest).to(gradient.dtype)

    def outputs(self, images: Tensor) -> Tensor:
        """The model's outputs (B, K) for images of its dtype.

        Raises:
            ValueError: NaN or infinite ones.
        """
        outputs = self.last_draw(images)
        # An argmax takes NaN for the largest: a row of it is class 0, and an image of that class passed for robust.
        if bool(not_finite(outputs).any()):
            raise ValueError("model: expected finite outputs, got NaN or infinite ones for an image of the ball")
        return outputs

    def last_draw(self, images: Tensor) -> Tensor:
        """The model's outputs; of several draws the last, as after as many passes."""
        outputs = self.call(images)
        if not self.several or outputs.dim() != 3 or len(outputs) != DRAWS:
            return outputs
        self.draws, self.at_once = outputs.float(), True
        return outputs[-1]

    def averaged(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """A loss of the last pass: the value is its last draw's, as after as many passes, the gradient that of all."""

        def losses(outputs: Tensor, labels: Tensor) -> Tensor:
            assert self.draws is not None
            own = loss(outputs, labels)
            mean = torch.stack([loss(draw, labels) for draw in self.draws]).mean(0)
            return mean + (own - mean).detach()

        return losses


class _Parts:
    """torchattacks' attacks with the published settings, each for one run: float32 images and labels to images.

    `attack_single_run` is called, and not the attack: that would seed the global generators anew, those of all GPUs
    included, and set the model's mode.
    """

    def __init__(self, torchattacks: Any, network: _Network, eps: float, norm: Norm) -> None:
        self.torchattacks, self.network, self.radius, self.norm = torchattacks, network, eps, norm
        low, high = network.bounds
        self.eps = eps / (high - low)  # where images are in [0, 1]

    def apgd(
        self, images: Tensor, labels: Tensor, *, steps: int, draws: int = 1, loss: str = "ce", rank: int | None = None
    ) -> Tensor:
        """Auto-PGD from a random start; `rank`: on the targeted DLR loss, to the class of that rank.

        Not torchattacks' APGDT: in L2 that takes the first image's step size for all of them.
        """
        several = self.network.at_once
        attack = self.torchattacks.APGD(
            self.network,
            norm=self.norm,
            eps=self.eps,
            steps=steps,
            loss=loss if rank is None and not several else "dlr",
            eot_iter=1 if several else draws,
            rho=0.75,
        )
        self.network.passes, self.network.gradients = attack.eot_iter, 0
        if several:
            single = partial(F.cross_entropy, reduction="none") if loss == "ce" else attack.dlr_loss
            attack.dlr_loss = self.network.averaged(single)  # the only loss of it that can be replaced
        if rank is not None:
            attack.dlr_loss = partial(dlr, targets=self.network(images).sort(1).indices[:, -rank])
        _, withstood, _, adversarial = attack.attack_single_run(images, labels)
        return torch.where(withstood[:, None, None, None], images, adversarial)

    def fab(self, images: Tensor, labels: Tensor, *, steps: int, rank: int) -> Tensor:
        """Fast adaptive boundary attack (Croce & Hein, arXiv 1907.02044), to the class of that rank."""
        attack = self.torchattacks.FAB(
            self.network,
            norm=self.norm,
            eps=self.eps,
            steps=steps,
            alpha_max=0.1,
            eta=1.05,
            beta=0.9,
            multi_targeted=True,
        )
        attack.get_diff_logits_grads_batch_targeted = self._differences
        attack.target_class = rank
        with torch.no_grad():
            found: Tensor = attack.attack_single_run_targeted(images, labels)
        return found

    def square(self, images: Tensor, labels: Tensor, *, queries: int, rescale: bool) -> Tensor:
        """Square Attack; `rescale`: its squares shrink as fast as its queries run out, not as if there were 10000."""
        attack = self.torchattacks.Square(
            self.network,
            norm=self.norm,
            eps=self.eps,
            n_queries=queries,
            p_init=0.8,
            loss="margin",
            resc_schedule=rescale,
        )
        height, width = images.shape[2:]
        side = _tileable(max(height, width))
        if self.norm == "L2":
            images = F.pad(images, (0, side - width, 0, side - height))
        attack.init_hyperparam(images)
        found: Tensor = attack.attack_single_run(images, labels)[1]
        return found[..., :height, :width].contiguous()

    def _differences(self, images: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """z_target − z_label (B, 1) and its gradient (B, 1, C, H, W); torchattacks' leaves one in the parameters.

        Both are divided by the gradient's largest magnitude, which moves no boundary: FAB takes 10⁻⁸ for a slope of 0.
        """
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            outputs = self.network.outputs(self.network.shown(images)).float()
            differences = outputs.gather(1, targets[:, None]) - outputs.gather(1, labels[:, None])
            gradient = torch.autograd.grad(differences.sum(), images)[0]
        largest = largest_magnitude(gradient)
        differences = (differences.detach() / largest.view(-1, 1)).clamp(-1e12, 1e12)
        return differences, (gradient / largest).contiguous()[:, None]


def _attack(
    parts: _Parts, order: list[_Part], images: Tensor, labels: Tensor, seed: int, num_classes: int | None
) -> Tensor:
    """What the parts make of the images, one after the other; `num_classes`: None if no part needs gradients."""
    images, labels = images.detach(), labels.long()
    adversarial = images.clone()
    if not len(images):
        return adversarial
    with seeded(seed), ExitStack() as stack:
        outputs = _first_outputs(parts.network, images, num_classes, stack)
        check_range(labels, None, outputs.shape[1])
        survivors = (outputs.argmax(1) == labels).nonzero()[:, 0]
        for part in order:
            if not len(survivors):
                break
            clean, classes = images[survivors].contiguous(), labels[survivors]
            found = parts.network.shown(part(parts.network.hidden(clean), classes))
            found = _project(found, clean, parts)
            with torch.no_grad():
                fooled = parts.network.outputs(found).argmax(1) != classes
            adversarial[survivors[fooled]] = found[fooled]
            survivors = survivors[~fooled]
    return adversarial


def _first_outputs(network: _Network, images: Tensor, num_classes: int | None, stack: ExitStack) -> Tensor:
    """The outputs for the images themselves, detached, and all that can be said against a model by them.

    Where draws are averaged, gates that draw are told, until the stack is left, that this is meant.
    """
    gradients = num_classes is not None
    with torch.set_grad_enabled(gradients):
        inputs = images.detach().clone().requires_grad_(gradients)
        known = asked_modules(lambda gate: stack.enter_context(gate.switched(gate.switch)))
        with known if network.several else nullcontext() as asked:
            outputs = network.last_draw(inputs)
        if asked is not None and asked.random_gates and (mixture := asked.only(inputs, outputs)) is not None:
            network.call, network.at_once = drawn(mixture, DRAWS), True
        if outputs.dim() != 2 or len(outputs) != len(images) or num_classes not in (None, outputs.shape[1]):
            expected = f"({len(images)}, {'K' if num_classes is None else num_classes})"
            raise ValueError(f"model: expected outputs {expected}, got {tuple(outputs.shape)}")
        check_finite(not_finite(outputs))
        if gradients:
            gradient = image_gradient(outputs.sum(), inputs)
            check_finite(~gradient.isfinite().flatten(1).all(1))
    return outputs.detach()


def _project(found: Tensor, images: Tensor, parts: _Parts) -> Tensor:
    bounds = parts.network.bounds
    if parts.norm == "Linf":
        return found.detach().clamp(*linf_bounds(images, parts.radius, bounds))
    return project_l2(found, images, parts.radius, bounds)


def _tileable(side: int) -> int:
    """The least side, from `side` on, of a square that torchattacks' Square can begin in: it tiles it by side // 5."""
    side = max(side, 5)
    while (tile := side // 5) > 1 and (side - 5 * tile) // 2 + side // tile * tile > side:
        side += 1
    return side


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All global generators, of torch, NumPy and Python, seeded in a `with` block, and then as they were before."""
    import numpy as np  # as torchattacks does, and nothing else that the package needs

    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    # torch.manual_seed would also seed GPUs that this process has not begun to use, where nothing can be put back.
    begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = list(range(torch.cuda.device_count())) if begun else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


def check_installed(name: str) -> None:
    """Look for torchattacks, without importing it.

    Args:
        name: of what needs it.

    Raises:
        ModuleNotFoundError: it is missing.
    """
    if importlib.util.find_spec("torchattacks") is None:
        raise ModuleNotFoundError(f"{name} needs torchattacks: pip install torchattacks", name="torchattacks")


def _torchattacks(name: str) -> Any:
    check_installed(name)
    import torchattacks

    return torchattacks


def _check_settings(images: Tensor, labels: Tensor, norm: Norm, bounds: Bounds, **counts: int) -> None:
    bounds = Attack(norm=norm, bounds=bounds).bounds
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
    check_images(images, labels, None, bounds)
