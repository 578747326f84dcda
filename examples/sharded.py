"""A mixture whose weights lie in shards, one in each of two processes, in a training loop of one's own.

    torchrun --nproc-per-node 2 examples/sharded.py

For experts that are too large for one device: each process keeps half of every weight, of its gradient and of what the
optimiser keeps of it, and gathers an expert's weights where they are needed. On a CPU by gloo, on GPUs by NCCL. What
comes out is compared with one process on whole batches.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from immunity_fast import ImmunityMoE
from immunity_fast.training.sharding import shard, whole_tensors

BATCH, STEPS = 8, 3


def mixture() -> ImmunityMoE:
    """Three networks without BatchNorm, whose statistics would be those of half a batch each; the same everywhere."""
    torch.manual_seed(0)
    networks = [
        nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1600, 10)
        )
        for _ in range(3)
    ]
    return ImmunityMoE.from_experts(networks, stage="1", image_size=16).double().train()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64),
            torch.randint(10, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, count = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"

    model = shard(mixture(), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)  # after it: the parameters are others now
    own = slice(rank * BATCH // count, (rank + 1) * BATCH // count)
    for images, labels in batches():
        loss = model(images[own].to(device), labels[own].to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    part = sum(parameter.to_local().numel() for parameter in model.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    print(f"process {rank} of {count} keeps {part:,} of {whole:,} weights")
    together = whole_tensors(model)  # all processes ask, the first one gets them
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        alone = mixture()
        alone.list_experts_()
        begun = copy.deepcopy(alone.state_dict())
        optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01)
        for images, labels in batches():
            loss = alone(images, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
            optimizer.step()
        moved = max(float((value - begun[name]).abs().max()) for name, value in together.items())
        apart = max(float((value - together[name]).abs().max()) for name, value in alone.state_dict().items())
        print(f"{STEPS} steps of {BATCH} images moved a weight by up to {moved:.1e}")
        print(f"{count} processes end within {apart:.1e} of one process on whole batches")


if __name__ == "__main__":
    main()
