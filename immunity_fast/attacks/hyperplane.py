"""The nearest point of a hyperplane within a box: what the FAB attack asks of every step."""

from __future__ import annotations

import torch
from torch import Tensor

from immunity_fast.attacks.projections import UNIT, Bounds, Norm

MOST_STEPS = 60  # of Newton's method; images take 4 to 8
CHECKED = 3  # after so many steps it is asked whether any was needed


def move_to_hyperplane(points: Tensor, slopes: Tensor, gaps: Tensor, norm: Norm, bounds: Bounds = UNIT) -> Tensor:
    """The smallest move d from each point, within a box, to a hyperplane: slopes · d = gap.

    A move along coordinate i is min(λ r_i, room_i) long, with r_i = 1 in Linf and r_i the slope's size in L2; room_i
    is how far the box goes on in the direction that closes the gap. What that closes of the gap is a concave function
    of λ made of straight pieces. Newton's method climbs it from λ = 0 and meets the root after finitely many steps: on
    each it is exact if no further coordinate runs out of room. Nothing is sorted.

    Args:
        points: (…, n) in the box, float32 or float64.
        slopes: (…, n) finite, of a shape that broadcasts with the points'; what counts is their ratio, however small
            they are.
        gaps: (…) what slopes · d is to be; it may be infinite.
        norm: in which the move is smallest, "Linf" or "L2".
        bounds: the lowest and the highest coordinate.

    Returns:
        (…, n) moves, to rounding. Where the box does not reach the hyperplane, the move to the box's nearest point of
        those that come closest: each coordinate whose slope is not 0 goes as far as the box does.
    """
    low, high = bounds
    upwards = (slopes > 0) == (gaps >= 0)[..., None]
    room = torch.where(upwards, high - points, points - low) * (slopes != 0)
    sizes = slopes.abs().expand_as(room)
    # Coordinates without room do not count. The squares of those that do are then no less than what rounding leaves.
    largest = torch.where(room > 0, sizes, 0).amax(-1, keepdim=True)
    sizes = sizes / torch.where(largest > 0, largest, 1)
    gaps = gaps.abs() / torch.where(largest > 0, largest, 1)[..., 0]

    capacity = sizes * room
    whole = capacity.sum(-1)
    if norm == "Linf":
        rates, ends = sizes, room  # of slope · d over λ, and the λ at which a coordinate has run out of room
    else:
        rates, ends = sizes.square(), torch.where(sizes > 0, room / sizes, torch.inf)
    gaps_within = torch.minimum(gaps, whole)
    reach = torch.zeros_like(gaps)  # λ
    for step in range(MOST_STEPS):
        moving = ends > reach[..., None]
        rate = torch.where(moving, rates, 0).sum(-1)
        left = gaps_within - torch.where(moving, 0, capacity).sum(-1)
        further = torch.where(rate > 0, left / rate, reach).maximum(reach)
        if step % CHECKED == CHECKED - 1 and not bool((further > reach).any()):
            break
        reach = further
    lengths = reach[..., None].expand_as(room) if norm == "Linf" else reach[..., None] * sizes
    lengths = torch.where((gaps >= whole)[..., None], room, torch.minimum(lengths, room))
    return torch.where(upwards, lengths, -lengths)
