"""The most memory that a training step holds: kept or recomputed activations, detached weights, half precision.

    python -m benchmarks.memory_table --out FILE [--quick]

On a GPU each step is taken, and what is written down is PyTorch's `max_memory_allocated`, with what the model and the
optimiser hold. On a CPU the bytes of all tensors alive are counted, operation by operation, of steps on tensors without
values (`FakeTensorMode`), so that no size is too large and no result depends on the machine: what a library takes for
one call, such as a convolution's workspace, and what an allocator keeps for later, are not in it. Of small steps that
are computed the count is the same (tests/benchmarks/test_memory_table.py).

Each number is of the second step, behind the one that makes the optimiser's state.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import DEVICE
from benchmarks.outcomes import write
from benchmarks.record import header
from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.runtime.failures import out_of_memory
from immunity_fast.training.optimizers import make_optimizer
from immunity_fast.training.step import TrainStep

MIB = 2**20
CLASSES = 10


class Case(NamedTuple):
    """Experts, and a batch of images."""

    arch: str
    experts: int
    samples: int
    side: int


class Way(NamedTuple):
    """How a step is taken."""

    name: str
    batching: Any = "loop"
    checkpoint: bool = False
    detached: bool = False
    amp: Any = "off"


CASES = [
    Case("googlenet", 5, 32, 32),  # the preset "paper"
    Case("resnet18", 5, 128, 32),
    Case("torchvision:resnet50", 5, 32, 224),
]
SMALL = Case("resnet8", 2, 4, 16)
WAYS = [
    Way("loop"),
    Way("loop, detached weights", detached=True),
    Way("loop, checkpointed", checkpoint=True),
    Way("loop, checkpointed, detached weights", checkpoint=True, detached=True),
    Way("loop, bf16", amp="bf16"),
    Way("loop, bf16, checkpointed", checkpoint=True, amp="bf16"),
    Way("vmap", batching="vmap"),
    Way("vmap, checkpointed", batching="vmap", checkpoint=True),
]


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations in its block have made and that are still there.

    Attributes:
        bytes: now.
        peak: the most there were so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1  # of what checks look at: a label, the least weight, a sum of weights
        result = function(*args, **(kwargs or {}))
        for value in _pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self.note(value)
        return result

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's memory, once, until it is free."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._freed, key, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _freed(self, key: int, size: int) -> None:
        del self._known[key]
        self.bytes -= size


def model_of(case: Case) -> ImmunityMoE:
    """The experts, in training mode."""
    torch.manual_seed(0)
    return ImmunityMoE(case.arch, case.experts, CLASSES, image_size=case.side).train()


def step_of(model: ImmunityMoE, case: Case, way: Way) -> tuple[TrainStep, Tensor, Tensor]:
    """A step of a model, by SGD with momentum, and a batch for it, where the model is."""
    model.batching, model.checkpoint_activations = way.batching, False
    model.zero_grad(set_to_none=True)
    optimizer = make_optimizer("sgd", [{"params": list(model.parameters()), "weight_decay": 5e-4}], 0.01, momentum=0.9)
    loss_fn = FusedImmunityLoss(size=(case.side, case.side), detach_weights=way.detached, ignore_index=None)
    options: dict[str, Any] = {"amp": way.amp, "double_backprop": "reverse", "checkpoint_activations": way.checkpoint}
    step = TrainStep(model, loss_fn, optimizer, **options)
    device = next(model.parameters()).device
    images = torch.zeros(case.samples, 3, case.side, case.side, device=device)
    return step, images, torch.zeros(case.samples, dtype=torch.int64, device=device)


def counted(model: ImmunityMoE, case: Case, way: Way) -> dict[str, int]:
    """Bytes of all tensors alive on a CPU: "held" between two steps, and at the "peak" of the second."""
    with Alive() as alive:
        for tensor in (*model.parameters(), *model.buffers()):
            alive.note(tensor)
        step, images, labels = step_of(model, case, way)
        step(images, labels)
        held = alive.peak = alive.bytes
        step(images, labels)
        return {"held": held, "peak": alive.peak}


def measured(model: ImmunityMoE, case: Case, way: Way) -> dict[str, int]:
    """The same of what a GPU's allocator has given out."""
    step, images, labels = step_of(model, case, way)
    step(images, labels)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(images, labels)
    torch.cuda.synchronize()
    return {"held": held, "peak": torch.cuda.max_memory_allocated()}


@contextmanager
def faked(model: torch.nn.Module) -> Iterator[None]:
    """Tensors without values in a `with` block, those of a model too, which is of no use afterwards."""
    mode = FakeTensorMode()
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                fake = mode.from_tensor(value.detach())
                module._parameters[name] = torch.nn.Parameter(fake, value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    with mode:
        yield


def ways_of(model: ImmunityMoE) -> list[Way]:
    """Experts that run whole are never batched by `vmap` where Grad-CAM looks."""
    return [way for way in WAYS if model.has_head or way.batching != "vmap"]


def record(out: Path, cases: list[Case]) -> dict[str, Any]:
    """The record, as it stands in `out` after each step."""
    cuda = DEVICE.type == "cuda"
    found = header("python -m benchmarks.memory_table") | {"measured": "allocator" if cuda else "count", "records": []}
    for case in cases:
        model = model_of(case).to(DEVICE)
        with nullcontext() if cuda else faked(model):
            for way in ways_of(model):
                row: dict[str, Any] = {**case._asdict(), "way": way.name}
                try:
                    row |= measured(model, case, way) if cuda else counted(model, case, way)
                except Exception as error:
                    if out_of_memory(error) is None:
                        raise
                    row |= {"held": None, "peak": None}
                found["records"].append(row)
                print(line(row), flush=True)
                write(out, found)
                gc.collect()
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the table: MiB at the peak, between steps, and for each image of the difference."""
    what = f"| {row['experts']} × {row['arch']}, {row['samples']} of {row['side']}×{row['side']} | {row['way']} |"
    if row["peak"] is None:
        return f"{what} does not fit | | |"
    peak, held = row["peak"] / MIB, row["held"] / MIB
    return f"{what} {peak:,.0f} | {held:,.0f} | {(peak - held) / row['samples']:,.2f} |"


def main() -> None:
    """The command `python -m benchmarks.memory_table`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="two small experts alone")
    options = parser.parse_args()
    record(options.out, [SMALL] if options.quick else CASES)


if __name__ == "__main__":
    main()
