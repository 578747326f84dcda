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
        """Replaces the rows. The copy to a GPU is asynchronous, and no kernel; PyTorch keeps pinned memory until then.

        Args:
            rows: three addresses (or numbers), and the tensors' length in 32-bit words.
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
def _chunk(addresses_ptr, chunks_ptr, program, CHUNK: tl.constexpr):
    """Where the row of a program's tensor is, where its chunk begins, whether it is whole, its indices and mask."""
    row_ptr = addresses_ptr + tl.load(chunks_ptr + 2 * program) * 4
    start = tl.multiple_of(tl.load(chunks_ptr + 2 * program + 1), CHUNK)
    length = tl.load(row_ptr + _LENGTH)
    index = tl.arange(0, CHUNK)
    return row_ptr, start, start + CHUNK <= length, index, index < length - start


@triton.jit
def _words(row_ptr, column, start, index, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to a chunk's words of the tensor in a column."""
    first_ptr = tl.load(row_ptr + column).to(tl.pointer_type(dtype)) + start
    if ALIGNED:
        first_ptr = tl.multiple_of(first_ptr, 16)
    return first_ptr + index


@triton.jit(do_not_specialize=["count"])
def _squares_kernel(
    addresses_ptr,  # (T, 4) int64: _, _, gradient, length
    chunks_ptr,  # (P, 2) int64: tensor and first element of a chunk
    partials_ptr,  # (programs,) float32, out
    count,  # P
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Σ g² of every so many-th chunk."""
    total = tl.zeros([CHUNK], tl.float32)
    for chunk in range(tl.program_id(0), count, tl.num_programs(0)):
        row_ptr, start, whole, index, mask = _chunk(addresses_ptr, chunks_ptr, chunk, CHUNK)
        grad_ptrs = _words(row_ptr, _GRADIENT, start, index, tl.float32, ALIGNED)
        # Without a mask where it can be: behind one whose length is known only here, loads are one element wide.
        if whole:
            total += _square(grad_ptrs, None, None)
        else:
            total += _square(grad_ptrs, mask, 0.0)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _square(grad_ptrs, mask, other):
    """g² of a block of gradients."""
    grad = tl.load(grad_ptrs, mask=mask, other=other)
    return grad * grad


@triton.jit(do_not_specialize=["partial_count"])
def _sgd_kernel(
    addresses_ptr,  # (T, 4) int64: parameter, momentum, gradient, length
    chunks_ptr,  # (P, 2) int64
    partials_ptr,  # (partial_count,) float32, of the squares kernel; None does not clip
    partial_count,
    scale_ptr,  # () float32, by which gradients are too large; None: 1
    skip_ptr,  # () float32, other than 0 where nothing is to be done; None: 0
    rate, momentum, weight_decay, max_norm,
    NESTEROV: tl.constexpr, HAS_MOMENTUM: tl.constexpr,
    PARTIALS: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One step of SGD on one chunk of a parameter."""
    skipped = False
    if skip_ptr is not None:
        skipped = tl.load(skip_ptr) != 0
    if not skipped:
        divisor = 1.0
        if scale_ptr is not None:
            divisor = tl.load(scale_ptr)
        coefficient = 1.0
        if partials_ptr is not None:
            part = tl.arange(0, PARTIALS)
            squares = tl.sum(tl.load(partials_ptr + part, mask=part < partial_count, other=0), 0)
            norm = tl.div_rn(tl.sqrt_rn(squares), divisor)
            coefficient = tl.div_rn(max_norm, norm + 1e-6)
            coefficient = tl.where(coefficient > 1, 1.0, coefficient)  # NaN stays
        row_ptr, start, whole, index, mask = _chunk(addresses_ptr, chunks_ptr, tl.program_id(0), CHUNK)
        parameter_ptrs = _words(row_ptr, _PARAMETER, start, index, tl.float32, ALIGNED)
        grad_ptrs = _words(row_ptr, _GRADIENT, start, index, tl.float32, ALIGNED)
        momentum_ptrs = _words(row_ptr, _MOMENTUM, start, index, tl.float32, ALIGNED)
        if whole:
            _update(
                parameter_ptrs, grad_ptrs, momentum_ptrs, None, divisor, coefficient, rate, momentum, weight_decay,
                NESTEROV, HAS_MOMENTUM, scale_ptr is not None,
            )  # fmt: skip
        else:
            _update(
                parameter_ptrs, grad_ptrs, momentum_ptrs, mask, divisor, coefficient, rate, momentum, weight_decay,
                NESTEROV, HAS_MOMENTUM, scale_ptr is not None,
            )  # fmt: skip


@triton.jit
def _update(
    parameter_ptrs, grad_ptrs, momentum_ptrs, mask, divisor, coefficient, rate, momentum, weight_decay,
    NESTEROV: tl.constexpr, HAS_MOMENTUM: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """g ← g·coefficient + λ·θ; m ← μ·m + g; θ ← θ − rate·(g + μ·m), or rate·m without Nesterov: `torch.optim.SGD`."""
    parameter, grad = tl.load(parameter_ptrs, mask=mask), tl.load(grad_ptrs, mask=mask)
    if SCALED:
        grad = tl.div_rn(grad, divisor)
    grad = grad * coefficient + weight_decay * parameter
    if HAS_MOMENTUM:
        velocity = momentum * tl.load(momentum_ptrs, mask=mask) + grad
        tl.store(momentum_ptrs, velocity, mask=mask)
        grad = grad + momentum * velocity if NESTEROV else velocity
    tl.store(parameter_ptrs, parameter - rate * grad, mask=mask)


@triton.jit
def _lerp_kernel(
    addresses_ptr,  # (T, 4) int64: average, value, whether it is averaged, length
    chunks_ptr,  # (P, 2) int64
    weight,  # of the value
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A chunk of the averages: average + weight·(value − average), or the value's words as they are."""
    row_ptr, start, whole, index, mask = _chunk(addresses_ptr, chunks_ptr, tl.program_id(0), CHUNK)
    average_ptrs = _words(row_ptr, _AVERAGE, start, index, tl.int32, ALIGNED)
    value_ptrs = _words(row_ptr, _VALUE, start, index, tl.int32, ALIGNED)
    averaged = tl.load(row_ptr + _AVERAGED) != 0
    if whole:
        _mix(average_ptrs, value_ptrs, None, averaged, weight)
    else:
        _mix(average_ptrs, value_ptrs, mask, averaged, weight)


@triton.jit
def _mix(average_ptrs, value_ptrs, mask, averaged, weight):
    """Moves a block of averages towards the values, or copies the words, as `averaged` says."""
    word = tl.load(value_ptrs, mask=mask)
    if averaged:
        value = word.to(tl.float32, bitcast=True)
        average = tl.load(average_ptrs, mask=mask).to(tl.float32, bitcast=True)
        # As torch.lerp: from the nearer end, so that a weight of 1 gives the value exactly.
        near, far = average + weight * (value - average), value - (value - average) * (1 - weight)
        word = tl.where(weight < 0.5, near, far).to(tl.int32, bitcast=True)
    tl.store(average_ptrs, word, mask=mask)


def squares(table: Table) -> Tensor:
    """Σ g² over all gradients of a table, in pieces, for `sgd`.

    Args:
        table: rows of (any number, any number, gradient, elements), as of `sgd`.

    Returns:
        Partial sums, (at most `PARTIALS`,) float32 on the table's device.
    """
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
        momentum: as of `torch.optim.SGD`, with a dampening of 0; its buffers begin at zero.
        weight_decay: as of `torch.optim.SGD`.
        nesterov: as of `torch.optim.SGD`.
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
    """Whether each tensor is a piece of memory without gaps, all on one device where kernels run; False for none."""
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
