"""A mixture in two processes, through its own forward pass: by accelerate where it is installed, else by PyTorch's DDP.

    pip install '.[train]' accelerate
    python examples/wrappers.py

`model(images, labels)` is the loss, so a wrapper sees all of the forward pass, and averages the gradients of all of it.
Two processes on a CPU, each with its half of every batch, take three steps; what they end with is compared with one
process that has taken them on whole batches. No network is needed: the processes meet through a file.
"""

import argparse
import importlib.util
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from immunity_fast import ImmunityMoE

PROCESSES, BATCH, STEPS = 2, 8, 3


def mixture() -> ImmunityMoE:
    """Three small networks without BatchNorm, whose statistics would be those of half a batch each."""
    torch.manual_seed(0)
    networks = [
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(200, 10))
        for _ in range(3)
    ]
    return ImmunityMoE.from_experts(networks, stage="2", image_size=16).double().train()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64),
            torch.randint(10, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def train(rank: int, processes: int, by: str, folder: str) -> None:
    """Three steps of a process, on its part of each batch; the first process saves the weights."""
    model = mixture()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapped, backward = model, torch.Tensor.backward
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # which accelerate asks for, and nobody uses
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=processes)
    if processes > 1 and by == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        backward = accelerator.backward
    elif processes > 1:
        wrapped = nn.parallel.DistributedDataParallel(model)
    own = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    for images, labels in batches():
        loss = wrapped(images[own], labels[own])  # not model.expert_outputs: no wrapper would see it
        optimizer.zero_grad()
        backward(loss)
        optimizer.step()
    if rank == 0:
        torch.save(model.state_dict(), Path(folder) / f"{processes}.pt")
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description="A mixture trained in two processes by its own forward pass.")
    installed = "ddp" if importlib.util.find_spec("accelerate") is None else "accelerate"
    parser.add_argument("--by", choices=("accelerate", "ddp"), default=installed)
    by = parser.parse_args().by
    with tempfile.TemporaryDirectory() as folder:
        # Before anything is differentiated here: a fork, which need not import everything again, would not survive it.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        multiprocessing.start_processes(train, (PROCESSES, by, folder), PROCESSES, start_method=method)
        train(0, 1, by, folder)
        alone, together = (torch.load(Path(folder) / f"{count}.pt") for count in (1, PROCESSES))
    moved = max(float((alone[name] - first).abs().max()) for name, first in mixture().state_dict().items())
    apart = max(float((alone[name] - weights).abs().max()) for name, weights in together.items())
    print(f"{STEPS} steps of {BATCH} images moved a weight by up to {moved:.1e}")
    print(f"{PROCESSES} processes by {by} end within {apart:.1e} of one process on whole batches")


if __name__ == "__main__":
    main()
