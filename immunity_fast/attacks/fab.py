"""The targeted FAB attack (Croce & Hein, arXiv 1907.02044), as AutoAttack runs it, where a ball is all that counts.

Each step takes the model for linear, as its gradient says, and moves to the nearest point of the boundary, drawn a
little to the point that is nearest to the image itself. A point that fools the model is drawn back. Elsewhere the pass
that finds the gradient is also the one that says so; and it need not be asked of a point that is to be drawn back,
which is foreseen from the step before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from immunity_fast.attacks.dependence import image_gradient
from immunity_fast.attacks.hyperplane import move_to_hyperplane
from immunity_fast.attacks.projections import Bounds, Norm, largest_magnitude, outside

Outputs = Callable[[Tensor], Tensor]  # images (B, C, H, W) to logits or log-probabilities (B, K)


class _Rows(NamedTuple):
    """What is known of R images, each on its way to one class."""

    where: Tensor  # (R,) their indices in what the attack was given
    images: Tensor  # (R, C, H, W) as they were
    points: Tensor  # (R, C, H, W) as they are now
    labels: Tensor  # (R,)
    targets: Tensor  # (R,)
    back: Tensor  # (R,) bool: whether the last step's point fooled the model, and was drawn back

    def select(self, rows: Tensor) -> _Rows:
        """Some of them, by their indices in ascending order."""
        if len(rows) == len(self.where):
            return self
        return _Rows(*(tensor[rows] for tensor in self))

    def drawn_back(self, fooling: Tensor, beta: float) -> _Rows:
        """Points that fool the model, (R,) bool, nearer to their images."""
        nearer = self.images + (self.points - self.images) * beta
        points = torch.where(fooling[:, None, None, None], nearer, self.points)
        return self._replace(points=points, back=self.back | fooling)


def fab_targeted(
    outputs: Outputs,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    eps: float,
    norm: Norm,
    bounds: Bounds,
    groups: Tensor | None = None,
    steps: int = 100,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> Tensor:
    """The nearest image that a model takes for another class, searched towards one class for each; it draws nothing.

    Args:
        outputs: images within the bounds to finite numbers, or −∞, with a gradient. A `parts.Network` may compile it.
        images: (B, C, H, W), float32 or float64, within the bounds.
        labels: (B,) the classes that they are to be kept from.
        targets: (B,) the class that each is moved to; that the model takes it for any other class than its label will
            do.
        eps: radius of the ball, in the images' units. An image is done when one that fools the model is in it.
        norm: "Linf" or "L2".
        bounds: the lowest and the highest value of a pixel.
        groups: (B,) integers ≥ 0: rows of one number are done as soon as one of them is, such as an image that is
            given once for each target. None: each on its own.
        steps: moves, at most.
        alpha_max: how much of the point nearest to the image itself a step takes in, at most.
        eta: how far beyond the boundary a step goes, over the way to it.
        beta: what is left of the move when a point that fools the model from outside the ball is drawn back.

    Returns:
        (B, C, H, W) of the images' dtype, detached: an image of the ball that fools the model where one was found;
        otherwise the nearest beyond it that does, which, moved into the ball, may do so, too; otherwise the image.

    Raises:
        ValueError: outputs have no gradient with respect to the images, or one that is NaN or infinite where outputs
            are finite.
    """
    images = images.detach()
    none = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    rows = _Rows(torch.arange(len(images), device=images.device), images, images, labels, targets, none)
    search = _Search(outputs, images, eps, norm, groups)
    for _ in range(steps):
        rows = rows.select(search.left(rows))
        judged = rows.back  # who fooled the model last time probably does so now
        rows = rows._replace(back=torch.zeros_like(judged)).drawn_back(search.judge(rows, judged), beta)
        left = search.left(rows)
        if not len(left):
            break
        rows, judged = rows.select(left), judged[left]
        differences, gradients, fooling = search.look(rows)
        rows = rows.drawn_back(fooling & ~judged, beta)
        late = (rows.back & ~judged & ~search.is_done(rows)).nonzero()[:, 0]
        if len(late):
            differences[late], gradients[late], _ = search.look(rows.select(late))
        differences, gradients = _scaled(differences, gradients)
        rows = rows._replace(points=_moved(rows, differences, gradients, norm, bounds, alpha_max, eta))
    search.judge(rows, ~search.is_done(rows))
    return search.found


class _Search:
    """The model, and what of it was found so far.

    Args:
        outputs: see `fab_targeted`.
        images: (B, C, H, W).
        eps: radius of the ball.
        norm: "Linf" or "L2".
        groups: (B,) or None.
    """

    def __init__(self, outputs: Outputs, images: Tensor, eps: float, norm: Norm, groups: Tensor | None) -> None:
        self.outputs, self.eps, self.norm = outputs, eps, norm
        self.found = images.clone()  # what is handed back
        self.nearest = images.new_full((len(images),), torch.inf)  # how far away it is; 0 in the ball
        self.groups = torch.arange(len(images), device=images.device) if groups is None else groups
        count = int(self.groups.max()) + 1 if len(images) else 0
        self.done = torch.zeros(count, dtype=torch.bool, device=images.device)  # each group

    def is_done(self, rows: _Rows) -> Tensor:
        """(R,) bool: whether one of a row's group has been found."""
        return self.done[self.groups[rows.where]]

    def left(self, rows: _Rows) -> Tensor:
        """The rows that are not done, as indices."""
        return (~self.is_done(rows)).nonzero()[:, 0]

    def judge(self, rows: _Rows, asked: Tensor) -> Tensor:
        """(R,) bool: which of the rows that are asked, (R,) bool, fool the model, by a forward pass of these."""
        fooling = torch.zeros_like(asked)
        some = asked.nonzero()[:, 0]
        if len(some):
            of_some = rows.select(some)
            with torch.no_grad():
                fooling[some] = self._kept(of_some, self.outputs(of_some.points))
        return fooling

    def look(self, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
        """One pass there and back over the rows' points.

        Returns:
            (differences, gradients, fooling): (R,) z_target − z_label, (R, C, H, W) its gradient and (R,) bool, whether
            the point fools the model. Where all rows are done by it, without the way back: the gradient is 0.
        """
        if (differentiated := self.differences(rows)) is not None:
            differences, gradients, said = differentiated
            return differences.to(rows.points.dtype), gradients.to(rows.points.dtype), self._kept(rows, said)
        with torch.enable_grad():
            points = rows.points.detach().requires_grad_()
            outputs = self.outputs(points)
            of_targets, of_labels = (outputs.gather(1, y[:, None])[:, 0] for y in (rows.targets, rows.labels))
            differences = (of_targets - of_labels).to(points.dtype)
            fooling = self._kept(rows, outputs.detach())
            if bool(self.is_done(rows).all()):
                gradients = torch.zeros_like(rows.points)
            else:
                gradients = image_gradient(differences.sum(), points)
        return differences.detach(), gradients, fooling

    def differences(self, rows: _Rows) -> tuple[Tensor, Tensor, Tensor] | None:
        """What `Network.differences` gives, where the model is one that may be compiled."""
        compiled = getattr(self.outputs, "differences", None)
        return None if compiled is None else compiled(rows.points, rows.labels, rows.targets)

    def _kept(self, rows: _Rows, outputs: Tensor) -> Tensor:
        """Which rows fool the model, (R,) bool; the nearest points that do are kept."""
        fooling = outputs.argmax(1) != rows.labels
        some = fooling.nonzero()[:, 0]
        if len(some):
            where, points, images = rows.where[some], rows.points[some], rows.images[some]
            inside = ~outside(points, images, self.eps, self.norm)
            distances = torch.where(inside, 0, _lengths((points - images).flatten(1), self.norm))
            nearer = distances < self.nearest[where]
            self.found[where[nearer]] = points[nearer]
            self.nearest[where[nearer]] = distances[nearer]
            self.done[self.groups[where[inside]]] = True
        return fooling


def _scaled(differences: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Both over the gradient's largest magnitude, which moves no boundary. Next to an output of −∞ all is 0.

    Raises:
        ValueError: gradients of finite outputs are NaN or infinite.
    """
    known = differences.isfinite()
    broken = ~gradients.flatten(1).isfinite().all(1)
    if bool((broken & known).any()):
        raise ValueError("model: expected finite gradients, got NaN or infinite ones for an image of the ball")
    differences, gradients = torch.where(known, differences, 0), torch.where(known[:, None, None, None], gradients, 0)
    largest = largest_magnitude(gradients)
    return differences / largest.flatten(), gradients / largest


def _moved(
    rows: _Rows, differences: Tensor, gradients: Tensor, norm: Norm, bounds: Bounds, alpha_max: float, eta: float
) -> Tensor:
    """The points, a step further (R, C, H, W)."""
    points, images, slopes = (tensor.flatten(1) for tensor in (rows.points, rows.images, gradients))
    here = -differences
    gaps = torch.stack([here, here + (slopes * (points - images)).sum(1)])
    moves = move_to_hyperplane(torch.stack([points, images]), slopes, gaps, norm, bounds)
    lengths = _lengths(moves, norm).clamp_min(torch.finfo(moves.dtype).tiny)  # no 0/0
    alpha = (lengths[0] / (lengths[0] + lengths[1])).clamp_max(alpha_max)[:, None]
    moved = (points + eta * moves[0]) * (1 - alpha) + (images + eta * moves[1]) * alpha
    return moved.clamp(*bounds).view_as(rows.points)


def _lengths(moves: Tensor, norm: Norm) -> Tensor:
    """(…) of moves (…, n)."""
    lengths: Tensor = torch.linalg.vector_norm(moves, ord=torch.inf if norm == "Linf" else 2, dim=-1)
    return lengths
