"""Small mixtures in wrappers, in two processes: `python -m tests.wrapped OUT WRAPPER:KIND …` measures and saves."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE
from immunity_fast.runtime.strategies import Batching

KINDS = ("chain", "whole", "different")
SAMPLES = 6


class _Whole(nn.Module):
    """A network that cannot be cut."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, channels, 3, stride=2), nn.Tanh())
        self.last = nn.Linear(channels * 25, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.body(x).flatten(1))
        return result


def _chain() -> nn.Sequential:
    """BatchNorm on both sides of the cut, in evaluation mode: see `mixture`."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def small_mixture(batching: Batching = "auto") -> ImmunityMoE:
    """Three experts with BatchNorm on both sides of the cut, for images of 10×10."""

    def expert() -> nn.Sequential:
        trunk = [nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Tanh()]
        return nn.Sequential(*trunk, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))

    return ImmunityMoE.from_experts([expert() for _ in range(3)], stage="2", image_size=10, batching=batching)


def mixture(kind: str) -> ImmunityMoE:
    """Three experts in float64, in training mode, their BatchNorm in evaluation mode."""
    torch.manual_seed(0)
    if kind == "chain":
        model = ImmunityMoE.from_experts([_chain() for _ in range(3)], stage="2", image_size=11)
    else:
        sizes = (4, 4, 4) if kind == "whole" else (4, 5, 3)
        model = ImmunityMoE.from_experts([_Whole(size) for size in sizes], stage="body", image_size=11)
    model = model.double().train()
    model.loss_fn = FusedImmunityLoss(0.5, 0.7, 1e-2, size=(11, 11))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def data() -> tuple[Tensor, Tensor]:
    images = torch.rand(SAMPLES, 3, 11, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images, torch.tensor([0, 1, 2, 0, 1, 2])


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole ones, of whatever a wrapper makes of parameters, by the names that they have in the mixture."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.replace("_orig_mod.", "").removeprefix("module.")] = whole.detach().clone()
    return found


def _with_ddp(model: ImmunityMoE) -> tuple[nn.Module, Callable[[Tensor], None]]:
    return nn.parallel.DistributedDataParallel(model), lambda loss: loss.backward()


def _with_compiled_ddp(model: ImmunityMoE) -> tuple[nn.Module, Callable[[Tensor], None]]:
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    return nn.parallel.DistributedDataParallel(compiled), lambda loss: loss.backward()


def _with_ddp_compiled(model: ImmunityMoE) -> tuple[nn.Module, Callable[[Tensor], None]]:
    return torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager"), lambda loss: loss.backward()


def _with_accelerate(model: ImmunityMoE) -> tuple[nn.Module, Callable[[Tensor], None]]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    wrapped, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    return wrapped, accelerator.backward


def _with_fsdp(model: ImmunityMoE) -> tuple[nn.Module, Callable[[Tensor], None]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, lambda loss: loss.backward()


def _with_fsdp_of_parts(model: ImmunityMoE) -> tuple[nn.Module, Callable[[Tensor], None]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for expert in model.experts.children():
        fully_shard(expert, mesh=mesh)
    fully_shard(model.gate, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, lambda loss: loss.backward()


def _with_nothing(model: ImmunityMoE) -> tuple[nn.Module, Callable[[Tensor], None]]:
    return model, lambda loss: loss.backward()


WRAPPERS: dict[str, Callable[[ImmunityMoE], tuple[nn.Module, Callable[[Tensor], None]]]] = {
    "ddp": _with_ddp,
    "compiled ddp": _with_compiled_ddp,
    "ddp compiled": _with_ddp_compiled,
    "accelerate": _with_accelerate,
    "fsdp": _with_fsdp,
    "fsdp of parts": _with_fsdp_of_parts,
    "nothing": _with_nothing,
}


def measured(wrapper: str, kind: str) -> dict[str, Any]:
    """Loss, terms and gradients of this process' part of the data, and what was warned of."""
    images, labels = data()
    rank, count = dist.get_rank(), dist.get_world_size()
    model, backward = WRAPPERS[wrapper](mixture(kind))
    own = slice(rank * SAMPLES // count, (rank + 1) * SAMPLES // count)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if wrapper == "nothing":
            logits, maps, gate = model.expert_outputs(images[own])  # type: ignore[operator]
            loss, terms = model.loss_fn(logits, maps, labels[own], gate, return_terms=True)  # type: ignore[operator]
            model.expert_logits(images[own])  # type: ignore[operator]
        else:
            loss, terms = model(images[own], labels[own], return_terms=True)
        backward(loss)
    return {
        "loss": loss.detach(),
        "terms": [term.detach() for term in terms],
        "gradients": gradients(model),
        "warnings": [warning.category.__name__ for warning in caught],
    }


def main() -> None:
    out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for case in cases:
        wrapper, kind = case.split(":")
        try:
            found[case] = measured(wrapper, kind)
        except Exception as error:  # to be told apart from the others'
            found[case] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(found, f"{out}-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
