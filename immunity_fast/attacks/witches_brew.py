"""Witches' Brew (Geiping et al., ICLR 2021, arXiv 2009.02276): training images, hardly changed, that teach a mistake.

A network that is trained on the poisons, whose labels are right, takes one image, the target, for another class. They
are made so that training on them pulls the weights of a surrogate to where training on the target with the wrong label
would. Shapes: n base images of (C, H, W), K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, pad

from immunity_fast.attacks.checks import check_images
from immunity_fast.attacks.projections import linf_bounds
from immunity_fast.runtime.checks import check_whole, is_number, kind_given
from immunity_fast.runtime.modes import evaluating
from immunity_fast.runtime.outputs import check_logits

BatchLoss = Callable[[Tensor, Tensor], Tensor]  # images (B, C, H, W), labels (B,) to their mean loss, 0-d
Networks = nn.Module | Sequence[nn.Module]

BATCH = 512  # bases whose graphs are held at once, as published
UNIT = 0.25  # of a step: what a standard deviation of images in [0, 1] is taken to be
DECAY = 0.1  # of the step, after each of these parts of all steps
PARTS = (1 / 2.667, 1 / 1.6, 1 / 1.142)


class _Surrogate(NamedTuple):
    """A loss, the parameters by which it is differentiated, and the target's gradient by them, of length 1."""

    loss: BatchLoss
    parameters: list[nn.Parameter]
    target: list[Tensor]


class _Moves(NamedTuple):
    """How images are moved: rows and columns of the padded images, (n, H) and (n, W)."""

    rows: Tensor
    columns: Tensor


def witches_brew(
    model: Networks,
    target_image: Tensor,
    target_class: int,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    steps: int = 250,
    restarts: int = 8,
    step: float = 0.1,
    augment: bool = True,
    padding: int = 4,
    flip: bool = True,
    loss: BatchLoss | None = None,
    batch_size: int = BATCH,
    generator: torch.Generator | None = None,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Poisons of clean labels: `gradient_matching` of the base images, made small within a ball by signed Adam.

    As published: in evaluation mode; from normal noise of standard deviation eps, cut to the ball; a step that falls to
    a tenth after 3/8, 5/8 and 7/8 of the steps; the best of several restarts. The cosine is that of the sum over all
    bases, however they are cut into batches, where the published code takes each batch of 512 for itself; and the
    restarts are compared by the images as they are returned, where it takes the augmented ones of the last step.

    Args:
        model: the surrogate: a module from images (B, C, H, W) to logits (B, K), or several, whose similarities are
            averaged, as published. Of a mixture: its experts, `model.unstack()`.
        target_image: (C, H, W), what is to be mistaken.
        target_class: in 0..K−1, for what.
        images: (n, C, H, W) in [0, 1], the bases.
        labels: (n,), all `target_class`.
        eps: Linf radius around the bases, in the images' units.
        steps: in a restart.
        restarts: how often it begins anew; the smallest matching loss is kept.
        step: of Adam, in standard deviations of images, which are taken to be 1/4: 0.1 is 0.025 in [0, 1].
        augment: bases are moved, and mirrored, at random in each step, as training will do it.
        padding: whole pixels by which they are moved at most, along each axis.
        flip: half of them are mirrored.
        loss: of images and labels, in the place of cross-entropy: a batch's mean, differentiable twice, of which the
            gradient by all parameters of `model` is matched as one.
        batch_size: bases whose graphs are held at once; each batch costs one backward pass of a backward pass, and
            where there are several one gradient more.
        generator: of all that is random, on any device; None is PyTorch's default one of the images' device.
        on_step: called after each step.

    Returns:
        (n, C, H, W), detached, within eps of the bases and in [0, 1], exactly. The model's modes, statistics and
        gradients are as they were.

    Raises:
        ValueError: no base, one of another class, images out of [0, 1] or of other shapes, a number out of its range;
            a gradient of the target that is zero or not finite.
        TypeError: what is no tensor or no module.
    """
    _check(target_image, target_class, images, labels, eps=eps, step=step)
    for name, value, least in (("steps", steps, 1), ("restarts", restarts, 1), ("padding", padding, 0)):
        check_whole(name, value, least)
    check_whole("batch_size", batch_size, 1)
    images, labels = images.detach(), labels.long()
    low, high = linf_bounds(images, eps)
    best, least_loss = images, math.inf
    with _surrogates(model, loss, target_image, target_class) as surrogates:
        for _ in range(restarts):
            noise = _drawn(torch.randn, images.shape, generator, images.device).to(images)
            poisons = (images + (eps * noise).clamp(-eps, eps)).clamp(low, high).requires_grad_()
            optimizer = torch.optim.Adam([poisons], lr=step * UNIT)
            for done in range(steps):
                optimizer.param_groups[0]["lr"] = step * UNIT * rate_factor(done, steps)
                moves = _moves(images, padding, flip, generator) if augment else None
                poisons.grad = _matched(surrogates, poisons, labels, moves, padding, batch_size)[1].sign_()
                optimizer.step()
                with torch.no_grad():
                    poisons.copy_(poisons.clamp(low, high))
                if on_step is not None:
                    on_step()
            found = float(_matched(surrogates, poisons, labels, None, padding, batch_size, gradient=False)[0])
            if not math.isfinite(found):
                raise ValueError("model: expected finite gradients of the base images, got NaN or infinite ones")
            if found < least_loss:
                best, least_loss = poisons.detach(), found
    return best


def gradient_matching(
    model: Networks,
    target_image: Tensor,
    target_class: int,
    images: Tensor,
    labels: Tensor,
    *,
    loss: BatchLoss | None = None,
    batch_size: int = BATCH,
) -> tuple[Tensor, Tensor]:
    """What poisons minimise, in 0..2: 1 − cos(∇θ L(x_target, y_target), Σ_k ∇θ L(x_k, y_k)); and its gradient.

    Args:
        model, target_image, target_class, images, labels, loss, batch_size: see `witches_brew`; labels may be any.

    Returns:
        (0-d, of several networks their mean; its gradient by the images, (n, C, H, W)), both detached.

    Raises:
        ValueError, TypeError: as `witches_brew`.
    """
    _check(target_image, target_class, images, None)
    check_whole("batch_size", batch_size, 1)
    with _surrogates(model, loss, target_image, target_class) as surrogates:
        given = images.detach().clone().requires_grad_()
        return _matched(surrogates, given, labels.long(), None, 0, batch_size)


def rate_factor(done: int, steps: int) -> float:
    """What the step is multiplied by after so many of all steps: a tenth from each milestone on."""
    return DECAY ** sum(done >= max(1, math.floor(steps * part)) for part in PARTS)


@contextmanager
def _surrogates(
    model: Networks, loss: BatchLoss | None, target_image: Tensor, target_class: int
) -> Iterator[list[_Surrogate]]:
    """What is matched, the networks in evaluation mode and all their parameters with gradients in a `with` block."""
    networks = [model] if isinstance(model, nn.Module) else list(model)
    if not networks:
        raise ValueError("model: expected at least one network, got none")
    for network in networks:
        if not isinstance(network, nn.Module):
            raise TypeError(f"model: expected modules, whose parameters are matched, got {kind_given(network)}")
    own = [[value for value in network.parameters() if value.is_floating_point()] for network in networks]
    if not any(own):
        raise ValueError("model: expected networks with parameters, got none")
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(evaluating(network))
        frozen = [value for values in own for value in values if not value.requires_grad]
        for value in frozen:
            value.requires_grad_(True)
            stack.callback(value.requires_grad_, False)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # attention's fast kernels are not differentiable twice
        image, label = target_image.detach()[None], torch.tensor([target_class], device=target_image.device)
        if loss is not None:
            joined = list(dict.fromkeys(value for values in own for value in values))
            yield [_surrogate(loss, joined, image, label)]
            return
        for number, network in enumerate(networks):
            classes = check_logits("model", number, network(image), 1).shape[1]
            if target_class >= classes:
                raise ValueError(f"target_class: expected 0 to {classes - 1}, got {target_class}")
        pairs = zip(networks, own, strict=True)
        yield [_surrogate(_cross_entropy(network), values, image, label) for network, values in pairs]


def _cross_entropy(network: nn.Module) -> BatchLoss:
    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(check_logits("model", 0, network(images), len(images)), labels)

    return loss


def _surrogate(loss: BatchLoss, parameters: list[nn.Parameter], image: Tensor, label: Tensor) -> _Surrogate:
    gradient = _gradient(loss(image, label), parameters)
    length = _length(gradient)
    if not 0 < float(length) < math.inf:
        raise ValueError(
            f"target_image: expected a loss for target_class with a finite gradient above 0, got one of {length:.3g}"
        )
    return _Surrogate(loss, parameters, [part / length for part in gradient])


def _matched(
    surrogates: Sequence[_Surrogate],
    poisons: Tensor,
    labels: Tensor,
    moves: _Moves | None,
    padding: int,
    batch_size: int,
    *,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """(the matching loss, its gradient by the poisons or zeros).

    The cosine's derivative v by the sum of the gradients is known once that sum is, so that each batch's part,
    v · ∇θ L, is differentiated by itself: the exact gradient, and no graph but a batch's.
    """
    value, found = torch.zeros((), device=poisons.device), torch.zeros_like(poisons)
    batches = [slice(start, start + batch_size) for start in range(0, len(poisons), batch_size)]

    def of(surrogate: _Surrogate, rows: slice, graph: bool) -> tuple[Tensor, list[Tensor]]:
        """(a batch, the gradient of the sum of its losses over n)."""
        batch = poisons[rows].detach().requires_grad_(graph)
        seen = batch if moves is None else _moved(batch, moves, rows, padding)
        loss = surrogate.loss(seen, labels[rows]) * (len(batch) / len(poisons))
        return batch, _gradient(loss, surrogate.parameters, graph=graph)

    for surrogate in surrogates:
        first = of(surrogate, batches[0], gradient and len(batches) == 1)
        total = [part.detach() for part in first[1]]
        for rows in batches[1:]:
            total = [one + more for one, more in zip(total, of(surrogate, rows, False)[1], strict=True)]
        length = _length(total).clamp_min(1e-20)
        direction = [part / length for part in total]
        cosine = _product(surrogate.target, direction)
        value = value + (1 - cosine) / len(surrogates)
        if not gradient:
            continue
        slope = [(cosine * own - wanted) / length for own, wanted in zip(direction, surrogate.target, strict=True)]
        for rows in batches:
            batch, own_part = first if len(batches) == 1 else of(surrogate, rows, True)
            (moved,) = torch.autograd.grad(_product(slope, own_part), batch, materialize_grads=True)
            found[rows] += moved / len(surrogates)
    return value.detach(), found


def _gradient(loss: Tensor, parameters: Sequence[Tensor], *, graph: bool = False) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters, create_graph=graph, materialize_grads=True))


def _product(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def _length(parts: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all, which does not underflow where the squares of a confident network's gradients would."""
    lengths = torch.stack([torch.linalg.vector_norm(part.double()) for part in parts])
    length: Tensor = torch.linalg.vector_norm(lengths).to(parts[0].dtype)
    return length


def _drawn(
    draw: Callable[..., Tensor], shape: Sequence[int], generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """Random numbers of a generator, on its own device."""
    drawn: Tensor = draw(tuple(shape), generator=generator, device=device if generator is None else generator.device)
    return drawn


def _moves(images: Tensor, padding: int, flip: bool, generator: torch.Generator | None) -> _Moves:
    """Random shifts by whole pixels, and mirrors."""
    count, _, height, width = images.shape
    drawn = _drawn(torch.rand, (3, count), generator, images.device).to(images.device)
    down, right = (drawn[:2] * (2 * padding + 1)).long().clamp_max(2 * padding)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where((drawn[2] < 0.5)[:, None] & flip, columns.flip(1), columns)
    return _Moves(torch.arange(height, device=images.device) + down[:, None], columns + right[:, None])


def _moved(batch: Tensor, moves: _Moves, rows: slice, padding: int) -> Tensor:
    """A batch as the moves have it, zero where a pixel comes from outside; `rows` of all images are in it."""
    _, channels, height, _ = batch.shape
    padded = pad(batch, (padding,) * 4)
    down = moves.rows[rows, None, :, None].expand(-1, channels, -1, padded.shape[3])
    right = moves.columns[rows, None, None, :].expand(-1, channels, height, -1)
    return padded.gather(2, down).gather(3, right)


def _check(target_image: Tensor, target_class: int, images: Tensor, labels: Tensor | None, **numbers: float) -> None:
    """Check the target, the bases, their labels, if they have to be the target's class, and numbers above 0."""
    for name, given in (("target_image", target_image), ("images", images)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {kind_given(given)}")
    check_whole("target_class", target_class, 0)
    check_images(images, torch.zeros(len(images), dtype=torch.int64) if labels is None else labels, None)
    if not len(images):
        raise ValueError("images: expected at least one base image, got none")
    if target_image.shape != images.shape[1:] or not target_image.is_floating_point():
        raise ValueError(
            f"target_image: expected floating-point {tuple(images.shape[1:])} as the base images, got "
            f"{target_image.dtype} {tuple(target_image.shape)}"
        )
    if labels is not None and bool((labels != target_class).any()):
        wrong = int((labels != target_class).nonzero()[0, 0])
        raise ValueError(f"labels: expected target_class {target_class}, got {int(labels[wrong])} for image {wrong}")
    for name, value in numbers.items():
        if not is_number(value) or not 0 < float(value) < math.inf or (name == "eps" and value > 1):
            raise ValueError(f"{name}: expected a number above 0{' and at most 1' * (name == 'eps')}, got {value}")
