"""Square Attack (Andriushchenko et al., arXiv 1912.00049): random search by forward passes alone."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Sequence
from typing import Protocol, overload

import torch
from torch import Tensor

from immunity_fast.attacks.mixtures import Model
from immunity_fast.attacks.modes import attacked
from immunity_fast.attacks.parts import Aim, Network, Part, at_radii, check_seed, check_settings, in_turn
from immunity_fast.attacks.preprocessing import Preprocessing, preprocessed
from immunity_fast.attacks.projections import UNIT, Bounds, Norm, linf_bounds, rounded_bounds
from immunity_fast.attacks.radii import Given
from immunity_fast.runtime.precision import at_least_float32

Outputs = Callable[[Tensor], Tensor]  # images (B, C, H, W) to logits or log-probabilities (B, K)

WASTED = 0.5  # squares of a pass behind an improvement, which are tried anew, at most about so many an image
STEADY = 0.95  # of the share of squares that improve an image, what a pass keeps of the passes before
LEAST = 0.01
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries of 10,000: the share of the squares
WITHIN = 1 - 1e-6  # of an L2 ball's radius: what rounding to float32 takes away from it


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
    and shrink on the paper's schedule, rescaled to `queries`. Images may be of any size.

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
        ValueError: images out of bounds or not 4-D; labels of another shape, not integers or out of range; an unknown
            norm; eps < 0, queries < 1; outputs that are not (B, K), or that are NaN or infinite, as
            `NotFiniteError` where they are so for an image itself.
        TypeError: images or labels that are no tensors; a seed or `queries` that is not whole.

    Warns:
        MovedStatisticsWarning: the model is a function that asks a module in training mode, whose statistics moved.
    """
    check_settings(images, labels, norm, bounds, queries=queries)
    check_seed(seed)

    def one(radius: float, images: Tensor, labels: Tensor) -> Tensor:
        network = Network(prepared, images.dtype)

        def search(images: Tensor, labels: Tensor, _: Aim | None) -> Tensor:
            return square_search(
                network,
                images,
                labels,
                eps=radius,
                norm=norm,
                bounds=bounds,
                queries=queries,
                rescale=True,
                at_once=0 if network.random else network.whole,
                generator=torch.Generator().manual_seed(operator.index(seed)),
            )

        return in_turn(
            network,
            lambda _: [Part(search)],
            images,
            labels,
            eps=radius,
            norm=norm,
            bounds=bounds,
            seed=seed,
            num_classes=None,
            gradients=False,
        )

    prepared = preprocessed(model, preprocessing)
    with attacked(model):
        return at_radii(one, eps, norm, bounds, images, labels)


def square_search(
    outputs: Outputs,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: Norm,
    bounds: Bounds,
    queries: int,
    rescale: bool,
    generator: torch.Generator | None = None,
    p_init: float = 0.8,
    at_once: int = 0,
) -> Tensor:
    """Images that fool a model, by trying squares at random places and keeping what lowers the margin z_y − max z.

    Each image has places and colours of its own, which may be any in the image: the authors' code leaves out the last
    row and the last column. It gives a window of L2, where the norm of all channels stands for that of each, more than
    the rest of the image; here it is as in the paper.

    Args:
        outputs: images of the given ones' dtype, within the bounds, to finite numbers, or −∞. Images that have fooled
            the model are not asked again. What it is shown is written on afterwards.
        images: (B, C, H, W) of any floating-point dtype, within the bounds.
        labels: (B,) the classes that they are to be kept from.
        eps: radius of the ball, in the images' units.
        norm: "Linf", stripes and squares of the lowest and the highest pixels of the ball, exactly; or "L2", where
            rounding of the pixels may lead a little out of the ball, in half precision above all.
        bounds: the lowest and the highest value of a pixel, rounded to the images' dtype.
        queries: forward passes after the first.
        rescale: squares shrink as fast as these run out, not as if there were 10,000.
        generator: of the CPU; None is PyTorch's default generator.
        p_init: the share of the image that the first squares cover.
        at_once: how many images a pass may hold: where fewer are left, it tries several squares of each, of which the
            first improvement counts and those behind it are not counted. That is the same search in fewer passes.

    Returns:
        (B, C, H, W) of the images' dtype, detached: one that fools the model where one was found, else the image.
    """
    images, found = images.detach(), images.detach().clone()
    if not images.numel():
        return found
    draws, box = _Draws(images, generator), rounded_bounds(bounds, images.dtype)
    search: _Search = (_Linf if norm == "Linf" else _L2)(images.contiguous(), eps, box, draws)
    where = torch.arange(len(images), device=images.device)
    left, steady = _Left(labels, queries), 1.0  # how many squares improve an image lately
    with torch.no_grad():
        said = outputs(search.shown)
        fooled = said.argmax(1) != labels  # the start is kept as it is
        left.margins = _margins(said, labels)
        while len(where):
            done = fooled | (left.used >= queries).to(fooled.device)
            if bool(done.any()):
                found[where[fooled]] = search.shown[fooled]
                rows = (~done).nonzero()[:, 0]
                where, left = where[rows], left.select(rows)
                search.select(rows)
                if not len(where):
                    break
            tries = max(min(at_once // len(where), int(WASTED / steady)), 1)
            exponents = left.halvings(tries, queries if rescale else 10_000)
            sizes = torch.unique(exponents[exponents >= 0]).tolist()
            if tries == 1 and len(sizes) == 1:
                search.propose(p_init / 2 ** sizes[0])
                said = outputs(search.shown)
                fooled, improved = left.judged(said[:, None], torch.ones_like(left.labels, dtype=torch.bool)[:, None])
                search.decide(improved[:, 0])
            else:
                fooled, improved = _several(search, left, exponents, sizes, outputs, p_init)
            steady = max(STEADY * steady + (1 - STEADY) * float(improved[:, 0].double().mean()), LEAST)
            left.count(improved, tries)
    return found


class _Left:
    """What is known of the images that are still attacked.

    Args:
        labels: (B,).
        queries: how many each has.
    """

    def __init__(self, labels: Tensor, queries: int) -> None:
        self.labels, self.queries = labels, queries
        self.margins = torch.full((len(labels),), torch.inf, dtype=torch.float64, device=labels.device)
        self.used = torch.zeros(len(labels), dtype=torch.int64)  # on the CPU, which decides by it

    def select(self, rows: Tensor) -> _Left:
        """Some of them, by their indices."""
        chosen = _Left(self.labels[rows], self.queries)
        chosen.margins, chosen.used = self.margins[rows], self.used[rows.to(self.used.device)]
        return chosen

    def halvings(self, tries: int, scale: int) -> Tensor:
        """(B, tries) how often the squares of the next queries are halved; −1 beyond the last query."""
        numbers = self.used[:, None] + torch.arange(tries)
        return torch.where(numbers < self.queries, _halvings(numbers, scale), -1)

    def judged(self, outputs: Tensor, tried: Tensor) -> tuple[Tensor, Tensor]:
        """(who is fooled (B,) bool, the improvement that is taken (B, tries) bool); margins follow.

        Of several improvements the first is taken, as in a search that tries one after the other.

        Args:
            outputs: (B, tries, K).
            tried: (B, tries) bool, which of them are of a query.
        """
        tries = outputs.shape[1]
        fooled = outputs.argmax(-1) != self.labels[:, None]
        margins = _margins(outputs.flatten(0, 1), self.labels.repeat_interleave(tries)).view(-1, tries)
        improved = (fooled | (margins < self.margins[:, None])) & tried
        first = improved & (improved.long().cumsum(1) == 1)
        self.margins = torch.where(improved.any(1), (torch.where(first, margins, 0)).sum(1), self.margins)
        return (fooled & first).any(1), first

    def count(self, first: Tensor, tries: int) -> None:
        """Count what was tried up to the improvement that was taken, (B, tries) bool; what followed is tried anew."""
        until = torch.where(first.any(1), first.long().argmax(1) + 1, tries)
        self.used += until.to(self.used.device)


def _several(
    search: _Search, left: _Left, exponents: Tensor, sizes: list[int], outputs: Outputs, p_init: float
) -> tuple[Tensor, Tensor]:
    """Several squares for each image by one pass: (who is fooled (B,), the improvement that is taken (B, tries)).

    They are tried on the same image, as in a search in which the ones before have failed.
    """
    device = left.labels.device
    parts, places = [], []
    for size in sizes:
        place = (exponents == size).nonzero()
        part = search.some(place[:, 0].to(device))
        part.propose(p_init / 2**size)
        parts.append(part)
        places.append(place)
    rows, number = torch.cat(places).to(device).unbind(1)
    said = outputs(torch.cat([part.shown for part in parts]))
    every = said.new_zeros(*exponents.shape, said.shape[1])
    every[rows, number] = said
    fooled, first = left.judged(every, (exponents >= 0).to(device))
    begin = 0
    for part in parts:
        end = begin + len(part.shown)
        chosen = first[rows[begin:end], number[begin:end]].nonzero()[:, 0]
        search.take(rows[begin:end][chosen], part, chosen)
        begin = end
    return fooled, first


def _halvings(numbers: Tensor, queries: int) -> Tensor:
    """How often the square of a query, counted from 0, is halved: of int64 numbers of any shape."""
    scaled = (numbers.double() / queries * 10_000).long()
    return (scaled[..., None] > torch.tensor(HALVED_AFTER)).sum(-1)


def _margins(outputs: Tensor, labels: Tensor) -> Tensor:
    """z_y − the largest other (B,), in float64. Where both are −∞, nothing is known: +∞."""
    outputs = outputs.double()
    own = outputs.gather(1, labels[:, None])
    others = outputs.scatter(1, labels[:, None], -torch.inf).amax(1)
    return (own[:, 0] - others).nan_to_num(torch.inf, torch.inf, -torch.inf)


class _Draws:
    """Chance, drawn on the CPU and moved to the images' device: the same whatever that is."""

    def __init__(self, images: Tensor, generator: torch.Generator | None) -> None:
        self.device, self.generator = images.device, generator

    def uniform(self, *size: int) -> Tensor:
        """Numbers in [0, 1), float64."""
        return torch.rand(size, generator=self.generator, dtype=torch.float64).to(self.device)


class _Windows:
    """A square of each image, to be read and written as (B, C, side²).

    Args:
        images: (B, C, H, W), of that size.
        places: (B, 2) in [0, 1), from one end of the image to the other.
        side: at most H and W.
    """

    def __init__(self, images: Tensor, places: Tensor, side: int) -> None:
        samples, channels, height, width = images.shape
        steps = torch.arange(side, device=images.device)
        within = (steps[:, None] * width + steps).flatten()
        planes = torch.arange(channels, device=images.device)[:, None] * (height * width)
        rows, columns = (places[:, i] * (length - side + 1) for i, length in enumerate((height, width)))
        corners = rows.long() * width + columns.long()
        self.places = (corners[:, None, None] + (planes + within)).flatten(1)  # (B, C · side²)
        self.size = (samples, channels, side * side)

    def of(self, images: Tensor) -> Tensor:
        """What stands there in contiguous images (B, C, H, W)."""
        return images.view(len(images), -1).gather(1, self.places).view(self.size)

    def write(self, images: Tensor, values: Tensor) -> None:
        """Write values (B, C, side²) there."""
        images.view(len(images), -1).scatter_(1, self.places, values.flatten(1))


class _Search(Protocol):
    """The images that are still attacked, and what is proposed for them."""

    shown: Tensor  # (B, C, H, W) contiguous: the best so far, and from `propose` to `decide` what is to be tried

    def propose(self, share: float) -> None:
        """Try squares that cover that share of an image."""

    def decide(self, improved: Tensor) -> None:
        """Keep what was proposed where it is an improvement, (B,) bool, and take back the rest."""

    def select(self, rows: Tensor) -> None:
        """Go on with some of the images, by their indices."""

    def some(self, rows: Tensor) -> _Search:
        """A search of some of the images, which may be there several times, by their indices."""
        other = copy.copy(self)
        other.select(rows)
        return other

    def take(self, rows: Tensor, other: _Search, chosen: Tensor) -> None:
        """Take over, for the images `rows` (R,), what another search has proposed for its `chosen` (R,)."""


class _Linf(_Search):
    """Every pixel is the lowest or the highest of its ball."""

    def __init__(self, images: Tensor, eps: float, bounds: Bounds, draws: _Draws) -> None:
        self.draws = draws
        self.low, self.high = linf_bounds(images, eps, bounds)
        samples, channels, _, width = images.shape
        self.shown = torch.where(draws.uniform(samples, channels, 1, width) < 0.5, self.low, self.high)
        self.tried: list[tuple[_Windows, Tensor, Tensor]] = []  # (where, what was there, what was tried)

    def propose(self, share: float) -> None:
        samples, channels, height, width = self.shown.shape
        side = max(min(round(math.sqrt(share * height * width)), height, width), 1)
        drawn = self.draws.uniform(samples, 2 + channels)
        window = _Windows(self.shown, drawn[:, :2], side)
        colour = torch.where(drawn[:, 2:, None] < 0.5, window.of(self.low), window.of(self.high))
        self.tried = [(window, window.of(self.shown), colour)]
        window.write(self.shown, colour)

    def decide(self, improved: Tensor) -> None:
        for window, before, colour in self.tried:
            window.write(self.shown, torch.where(improved[:, None, None], colour, before))

    def select(self, rows: Tensor) -> None:
        self.shown, self.low, self.high = self.shown[rows], self.low[rows], self.high[rows]

    def take(self, rows: Tensor, other: _Search, chosen: Tensor) -> None:
        self.shown[rows] = other.shown[chosen]


class _L2(_Search):
    """Energy, the sum of squares of a move, is taken from two windows of an image and given to one of them."""

    def __init__(self, images: Tensor, eps: float, bounds: Bounds, draws: _Draws) -> None:
        self.draws, self.images, self.bounds = draws, images, bounds
        self.limit = (WITHIN * eps) ** 2
        samples, channels, height, width = images.shape
        side = max(min(height, width) // 5, 1)
        tiles = (-(-height // side), -(-width // side))
        drawn = draws.uniform(samples, 1 + channels, *tiles)
        move = _coloured(_bumps(side, images.device), drawn[:, :1], drawn[:, 1:])  # (B, C, rows, columns, side, side)
        move = move.transpose(3, 4).reshape(samples, channels, tiles[0] * side, tiles[1] * side)
        move = move[..., :height, :width]
        length = torch.linalg.vector_norm(move.flatten(1), dim=1).view(-1, 1, 1, 1)
        self.shown = (images + move * (math.sqrt(self.limit) / length)).clamp(*bounds).to(images.dtype)
        self.energy = _energy((self.shown.double() - images.double()).flatten(1))  # (B,)
        self.tried_energy = self.energy
        self.tried: list[tuple[_Windows, Tensor]] = []  # (where, what was there)
        self.bumps = _bumps(1, images.device)  # of the last queries

    def propose(self, share: float) -> None:
        samples, channels, height, width = self.shown.shape
        side = max(round(math.sqrt(share * height * width)), 3)
        side = min(side + 1 - side % 2, _odd(min(height, width)))
        drawn = self.draws.uniform(samples, 5 + channels)
        window, other = _Windows(self.shown, drawn[:, :2], side), _Windows(self.shown, drawn[:, 2:4], side)
        self.tried = [(window, window.of(self.shown)), (other, other.of(self.shown))]

        images = at_least_float32(window.of(self.images))
        was = at_least_float32(window.of(self.shown)) - images
        window.write(self.shown, window.of(self.images))
        # What both cover is gone by now, and not counted twice.
        taken = at_least_float32(other.of(self.shown)) - at_least_float32(other.of(self.images))
        other.write(self.shown, other.of(self.images))
        energy = _energy(was) + _energy(taken)  # (B, C)
        unused = (self.limit - self.energy).clamp_min(0)

        if side != self.bumps.shape[1]:
            self.bumps = _bumps(side, self.shown.device)
        bumps = _coloured(self.bumps, drawn[:, 4:5], drawn[:, 5:]).flatten(2).to(was.dtype)
        length = (unused[:, None] / channels + energy).sqrt().to(was.dtype)
        move = length[..., None] * _unit(bumps + _unit(was, 0), bumps)
        window.write(self.shown, (images + move).clamp(*self.bounds).to(self.shown.dtype))
        given = at_least_float32(window.of(self.shown)) - images
        self.tried_energy = self.energy - energy.sum(1) + _energy(given).sum(1)

    def decide(self, improved: Tensor) -> None:
        tried = [window.of(self.shown) for window, _ in self.tried]
        for (window, before), now in zip(self.tried, tried, strict=True):
            window.write(self.shown, torch.where(improved[:, None, None], now, before))
        self.energy = torch.where(improved, self.tried_energy, self.energy)

    def select(self, rows: Tensor) -> None:
        self.shown, self.images, self.energy = self.shown[rows], self.images[rows], self.energy[rows]

    def take(self, rows: Tensor, other: _Search, chosen: Tensor) -> None:
        assert isinstance(other, _L2)
        self.shown[rows], self.energy[rows] = other.shown[chosen], other.tried_energy[chosen]


def _odd(side: int) -> int:
    """The largest odd number up to that."""
    return side - 1 + side % 2


def _energy(moves: Tensor) -> Tensor:
    """The sum of squares over the last dimension, in float64."""
    return moves.double().square().sum(-1)


def _unit(moves: Tensor, otherwise: Tensor | float) -> Tensor:
    """Moves with a norm of 1 over the last dimension, and `otherwise` where there is no move."""
    length = torch.linalg.vector_norm(moves, dim=-1, keepdim=True)
    return torch.where(length > 0, moves / length, otherwise)


def _coloured(bumps: Tensor, orientations: Tensor, signs: Tensor) -> Tensor:
    """Bumps (2, side, side) that are drawn by numbers in [0, 1): (B, 1, …) one of the two, (B, C, …) their signs."""
    drawn: Tensor = bumps[(orientations < 0.5).long()] * torch.where(signs < 0.5, -1, 1)[..., None, None]
    return drawn


def _bumps(side: int, device: torch.device) -> Tensor:
    """Two bumps of opposite signs, one above the other, and side by side: (2, side, side), each with a norm of 1.

    In each half, rings around the middle that rise like the sum of 1/k² (equation 2 of the paper).
    """
    half = side // 2
    bumps = torch.cat([_bump(half, side), -_bump(side - half, side)])
    bumps = bumps / torch.linalg.vector_norm(bumps)
    return torch.stack([bumps, bumps.T]).to(device)


def _bump(height: int, width: int) -> Tensor:
    """(height, width) in float64, with a norm of 1."""
    rings = torch.maximum(*torch.meshgrid(*((torch.arange(n) - n // 2).abs() for n in (height, width)), indexing="ij"))
    counts = torch.arange(1, max(height // 2, width // 2) + 2, dtype=torch.float64)
    heights = counts.reciprocal().square().flip(0).cumsum(0).flip(0)
    bump = heights[rings]
    return bump / torch.linalg.vector_norm(bump) if bump.numel() else bump
