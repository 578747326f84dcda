"""What follows a backward pass, for all tensors of a model in one launch each, in Triton.

* `squares`: partial sums of the squared gradients, of which clipping makes their norm;
* `sgd`: clipping, weight decay, momentum, update;
* `lerp`: a moving average of weights and running statistics, and a copy of the integers among them.

A kernel is given a table of addresses, since it cannot be given hundreds of tensors, and a program for each chunk of a
tensor. Tensors of a row have the same strides and no gaps: a chunk is a piece of memory, whatever the layout. Sums are
taken in a fixed order: the same bits in every run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from immunity_fast.kernels import launch

# Elements of a program: 16 a thread of eight warps, of three tensors, keep enough loads in flight and spill nothing.
CHUNK = 4096
NUM_WARPS = 8
PARTIALS = launch.ENOUGH_PROGRAMS  # partial sums at most: each program of `sgd` adds all of them up

# Columns of a table (T, 4) int64. Lengths are in 32-bit words.
_LENGTH = tl.constexpr(3)
_PARAMETER, _MOMENTUM, _GRADIENT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_AVERAGE, _VALUE, _AVERAGED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Table:
    """Rows of addresses on a device, which are written there again only when one of them has changed.

    Args:
        device: of all tensors in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._rows: list[tuple[int, int, int, int]] = []
        self._set([])

    def set(self, rows: list[tuple[int, int, int, int]]) -> None:
        """Hold these rows: three addresses (or numbers), and the tensors' length in 32-bit words.

        The copy to a GPU is asynchronous, and no kernel: PyTorch keeps the pinned memory until it is done.
        """
        if rows != self._rows:
            self._set(rows)

    def _set(self, rows: list[tuple[int, int, int, int]]) -> None:
        lengths = [row[3] for row in rows]
        if lengths != [row[3] for row in self._rows] or not rows:
            starts = [(index, start) for index, length in enumerate(lengths) for start in range(0, length, CHUNK)]
            self.programs = len(starts)
            self.chunks = self._to_device(torch.tensor(starts, dtype=torch.int64).reshape(-1, 2))
        self._rows = rows
        self.addresses = self._to_device(torch.tensor(rows, dtype=torch.int64).reshape(-1, 4))
        # Whether 16 bytes can be moved at once. All of an allocation of PyTorch's begins so; a view need not.
        self.aligned = all(address % 16 == 0 for row in rows for address in row[:3] if address > 1)

    def _to_device(self, numbers: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return numbers
        return numbers.pin_memory().to(self.device, non_blocking=True)


@triton.jit
def _chunk(addresses, chunks, program, CHUNK: tl.constexpr):
    """The row of a program's tensor, where its chunk begins, whether all of it is there, and its indices and mask."""
    row = addresses + tl.load(chunks + 2 * program) * 4
    start = tl.multiple_of(tl.load(chunks + 2 * program + 1), CHUNK)
    length = tl.load(row + _LENGTH)
    index = tl.arange(0, CHUNK)
    return row, start, start + CHUNK <= length, index, index < length - start


@triton.jit
def _words(row, column, start, index, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to a chunk's words of the tensor in a column."""
    first = tl.load(row + column).to(tl.pointer_type(dtype)) + start
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + index


@triton.jit(do_not_specialize=["count"])
def _squares_kernel(
    addresses,  # (T, 4) int64: _, _, gradient, length
    chunks,  # (P, 2) int64: tensor and first element of a chunk
    partials,  # (programs,) float32, out
    count,  # P
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Σ g² of every so many-th chunk."""
    total = tl.zeros([CHUNK], tl.float32)
    for chunk in range(tl.program_id(0), count, tl.num_programs(0)):
        row, start, whole, index, mask = _chunk(addresses, chunks, chunk, CHUNK)
        place = _words(row, _GRADIENT, start, index, tl.float32, ALIGNED)
        # Without a mask where it can be: behind one whose length is known only here, loads are one element wide.
        if whole:
            total += _square(place, None, None)
        else:
            total += _square(place, mask, 0.0)
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _square(place, mask, other):
    gradient = tl.load(place, mask=mask, other=other)
    return gradient * gradient


@triton.jit(do_not_specialize=["partial_count"])
def _sgd_kernel(
    addresses,  # (T, 4) int64: parameter, momentum, gradient, length
    chunks,  # (P, 2) int64
    partials,  # (partial_count,) float32, of the squares kernel; None does not clip
    partial_count,
    scale,  # () float32, by which gradients are too large; None: 1
    skip,  # () float32, other than 0 where nothing is to be done; None: 0
    rate, momentum, weight_decay, max_norm,
    NESTEROV: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PARTIALS: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A chunk's update."""
    skipped = False
    if skip is not None:
        skipped = tl.load(skip) != 0
    if not skipped:
        divisor = 1.0
        if scale is not None:
            divisor = tl.load(scale)
        coefficient = 1.0
        if partials is not None:
            part = tl.arange(0, PARTIALS)
            squares = tl.sum(tl.load(partials + part, mask=part < partial_count, other=0), 0)
            norm = tl.div_rn(tl.sqrt_rn(squares), divisor)
            coefficient = tl.div_rn(max_norm, norm + 1e-6)
            coefficient = tl.where(coefficient > 1, 1.0, coefficient)  # NaN stays
        row, start, whole, index, mask = _chunk(addresses, chunks, tl.program_id(0), CHUNK)
        parameters = _words(row, _PARAMETER, start, index, tl.float32, ALIGNED)
        gradients = _words(row, _GRADIENT, start, index, tl.float32, ALIGNED)
        momenta = _words(row, _MOMENTUM, start, index, tl.float32, ALIGNED)
        if whole:
            _update(
                parameters, gradients, momenta, None, divisor, coefficient, rate, momentum, weight_decay,
                NESTEROV, HAS_MOMENTUM, scale is not None,
            )  # fmt: skip
        else:
            _update(
                parameters, gradients, momenta, mask, divisor, coefficient, rate, momentum, weight_decay,
                NESTEROV, HAS_MOMENTUM, scale is not None,
            )  # fmt: skip


@triton.jit
def _update(
    parameters, gradients, momenta, mask, divisor, coefficient, rate, momentum, weight_decay,
    NESTEROV: tl.constexpr, HAS_MOMENTUM: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """g ← g·coefficient + λ·θ; m ← μ·m + g; θ ← θ − rate·(g + μ·m), or rate·m without Nesterov: `torch.optim.SGD`."""
    parameter, slope = tl.load(parameters, mask=mask), tl.load(gradients, mask=mask)
    if SCALED:
        slope = tl.div_rn(slope, divisor)
    slope = slope * coefficient + weight_decay * parameter
    if HAS_MOMENTUM:
        moving = momentum * tl.load(momenta, mask=mask) + slope
        tl.store(momenta, moving, mask=mask)
        slope = slope + momentum * moving if NESTEROV else moving
    tl.store(parameters, parameter - rate * slope, mask=mask)


@triton.jit
def _lerp_kernel(
    addresses,  # (T, 4) int64: average, value, whether it is averaged, length
    chunks,  # (P, 2) int64
    weight,  # of the value
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A chunk of the averages: average + weight·(value − average), or the value's words as they are."""
    row, start, whole, index, mask = _chunk(addresses, chunks, tl.program_id(0), CHUNK)
    averages = _words(row, _AVERAGE, start, index, tl.int32, ALIGNED)
    values = _words(row, _VALUE, start, index, tl.int32, ALIGNED)
    averaged = tl.load(row + _AVERAGED) != 0
    if whole:
        _mix(averages, values, None, averaged, weight)
    else:
        _mix(averages, values, mask, averaged, weight)


@triton.jit
def _mix(averages, values, mask, averaged, weight):
    word = tl.load(values, mask=mask)
    if averaged:
        value = word.to(tl.float32, bitcast=True)
        average = tl.load(averages, mask=mask).to(tl.float32, bitcast=True)
        # As torch.lerp: from the nearer end, so that a weight of 1 gives the value exactly.
        near, far = average + weight * (value - average), value - (value - average) * (1 - weight)
        word = tl.where(weight < 0.5, near, far).to(tl.int32, bitcast=True)
    tl.store(averages, word, mask=mask)


def squares(table: Table) -> Tensor:
    """Partial sums (at most `PARTIALS`,) float32 of the squares of all gradients of a table for `sgd`."""
    partials = torch.empty(min(table.programs, PARTIALS), dtype=torch.float32, device=table.device)
    if table.programs:
        with launch.on_device(partials):
            _squares_kernel[(len(partials),)](
                table.addresses, table.chunks, partials, table.programs,
                CHUNK=CHUNK, ALIGNED=table.aligned, num_warps=NUM_WARPS,
            )  # fmt: skip
    return partials


def sgd(
    table: Table,
    rate: float,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    partials: Tensor | None = None,
    max_norm: float = 0.0,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """One step of `torch.optim.SGD` on the float32 parameters of a table, whose gradients stay as they are.

    Args:
        table: rows of (parameter, momentum, gradient, elements); without momentum any number in its place.
        rate: the learning rate.
        momentum, weight_decay, nesterov: as of `torch.optim.SGD`, with a dampening of 0. Momentum begins at zero.
        partials: of `squares`; then gradients are scaled so that their norm is at most `max_norm`, as by
            `torch.nn.utils.clip_grad_norm_`.
        max_norm: see `partials`.
        scale: () float32 on the device, by which gradients are divided before anything else.
        skip: () float32 on the device: where it is not 0, nothing changes.
    """
    if not table.programs:
        return
    with launch.on_device(table.addresses):
        _sgd_kernel[(table.programs,)](
            table.addresses, table.chunks, partials, 0 if partials is None else len(partials), scale, skip,
            float(rate), float(momentum), float(weight_decay), float(max_norm),
            NESTEROV=nesterov, HAS_MOMENTUM=momentum != 0,
            PARTIALS=PARTIALS, CHUNK=CHUNK, ALIGNED=table.aligned, num_warps=NUM_WARPS,
        )  # fmt: skip


def lerp(table: Table, weight: float) -> None:
    """Moves averages towards values by a share `weight`, as `torch.lerp` does; tensors of integers are copied.

    Args:
        table: rows of (average, value, 1 for float32 or 0 for what is copied, 32-bit words).
        weight: in [0, 1].
    """
    if not table.programs:
        return
    with launch.on_device(table.addresses):
        _lerp_kernel[(table.programs,)](
            table.addresses, table.chunks, float(weight), CHUNK=CHUNK, ALIGNED=table.aligned, num_warps=NUM_WARPS
        )


def fits(tensors: Sequence[Tensor]) -> bool:
    """Whether each tensor is a piece of memory without gaps, all on one device where kernels run."""
    if not tensors:
        return False
    device = tensors[0].device
    return (device.type == "cuda" or (launch.INTERPRETED and device.type == "cpu")) and all(
        tensor.device == device
        and tensor.layout == torch.strided
        and torch.ops.aten.is_non_overlapping_and_dense(tensor)
        for tensor in tensors
    )


def same_strides(tensor: Tensor, other: Tensor) -> bool:
    """Whether elements of two tensors of one shape lie in the same order; an axis of length 1 orders nothing."""
    if tensor.stride() == other.stride():
        return True
    return all(a == b or n == 1 for a, b, n in zip(tensor.stride(), other.stride(), tensor.shape, strict=True))
