"""Mixtures with weights in shards, in two processes: `python -m tests.sharded OUT DATA` does all of it in one start.

Each process saves what it found, in OUT.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE, train
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.runtime import distributed, sharding
from immunity_fast.training import session
from immunity_fast.training.ema import WeightAverage
from immunity_fast.training.sharding import shard, whole_tensors
from immunity_fast.training.state import TrainingState
from tests.nodes import smooth_options
from tests.own_networks import smooth
from tests.small_runs import interrupted

SAMPLES, STEPS, SIDE = 6, 3, 12
SETTINGS: dict[str, Any] = {"epochs": 2, "ema": 0.9, "clip-grad-norm": 1.0, "optimizer": "adamw", "lr": 0.01}
KINDS = ("stack", "single", "different", "by hand")


def mixture(kind: str) -> ImmunityMoE:
    """In float64, without BatchNorm; Grad-CAM looks where much of each expert is behind."""
    torch.manual_seed(0)
    networks = [smooth(3) for _ in range(1 if kind == "single" else 3)]
    if kind == "different":
        networks[1] = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), *list(smooth(3))[2:])
        networks[1][2] = nn.Conv2d(5, 6, 3, padding=1)
    made = SingleNetwork if kind == "single" else ImmunityMoE
    model = made.from_experts(networks, stage="2", image_size=SIDE).double().train()
    model.loss_fn = FusedImmunityLoss(0.5, 0.7, 1e-2, size=(SIDE, SIDE))
    return model


def data() -> tuple[Tensor, Tensor]:
    images = torch.rand(SAMPLES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images, torch.tensor([0, 1, 2, 0, 1, 2])


def trained_weights(kind: str) -> dict[str, Any]:
    """Some steps of a process' own images, by hand: loss, gradient's norm, weights and their average."""
    model = mixture(kind)
    if kind == "by hand":  # as a user would, around the whole
        from torch.distributed.fsdp import fully_shard

        model.list_experts_()
        fully_shard(model)
    elif distributed.count() > 1:
        shard(model)
    else:
        model.list_experts_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    average = WeightAverage(model, 0.9)
    images, labels = data()
    share = SAMPLES // distributed.count()
    own = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
    for _ in range(STEPS):
        loss = model(images[own], labels[own])
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        average.update()
    parameters = list(model.parameters())
    return {
        "loss": distributed.mean(loss.detach()),
        "norm": sharding.whole(norm),
        "weights": {name: sharding.whole(value) for name, value in model.state_dict().items()},
        "average": {name: sharding.whole(value) for name, value in average.tensors().items()},
        "part": sum(sharding.local(p).numel() for p in parameters) / sum(p.numel() for p in parameters),
        "gathered": list(whole_tensors(model)),
        "freed": all(hasattr(p, "to_local") for p in parameters),
    }


def by_hand(_data: Path) -> dict[str, Any]:
    with distributed.processes(torch.device("cpu")), mock.patch.object(sharding, "LARGE", 50):
        return {kind: trained_weights(kind) for kind in KINDS}


def stopped(arguments: list[str], step: int) -> int:
    """Train until a process gets SIGTERM; the status with which the command ends."""
    advance = TrainingState.advance

    def signalled(state: TrainingState, batch: Any) -> Any:
        if state.step == step and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(state, batch)

    with mock.patch.object(TrainingState, "advance", signalled):
        try:
            train.main(arguments)
        except KeyboardInterrupt as interrupt:
            return int(getattr(interrupt, "status", 0))
    return 0


def two_one_two(data: Path) -> dict[str, Any]:
    """A run of two processes, then of one that is killed, then of two again; and what lay in its folder between."""
    start = smooth_options(data, **SETTINGS, checkpoint_every=2)
    folder, found = Path("resharded"), {}
    found["status"] = stopped([*start, "--shard", "--out", str(folder)], 3)
    found["of two"] = checkpoints(folder)
    if os.environ["RANK"] == "0":
        with mock.patch.dict(os.environ, WORLD_SIZE="1"):
            interrupted((TrainingState, "advance"), 5, ["--resume", str(folder), "--trust-code"])
        found["of one"] = checkpoints(folder)
    train.main(["--resume", str(folder), "--trust-code"])
    found["at the end"] = checkpoints(folder)
    return found


def checkpoints(folder: Path) -> list[str]:
    if os.environ["RANK"] != "0":
        return []
    return sorted(str(path.relative_to(folder / "checkpoints")) for path in (folder / "checkpoints").rglob("*"))


def with_everything(data: Path) -> None:
    """BatchNorm, an attack in the step, half precision, several batches a step, and the best epoch kept."""
    settings: dict[str, Any] = {"epochs": 1, "check-images": 4, "amp": "bf16", "accumulate": 2}
    attack: dict[str, Any] = {"adversarial": "pgd", "attack-steps": 2}
    arguments = smooth_options(data, **settings, **attack, arch="tests.own_networks:Plain", stage="second")
    train.main([*arguments, "--shard", "--out", "everything"])


CASES: dict[str, Callable[[Path], Any]] = {
    "by hand": by_hand,
    "two one two": two_one_two,
    "everything": with_everything,
}


def main() -> None:
    out, data = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    os.chdir(out)
    session.evaluate_trained = lambda *_: None  # what one process does alone is looked at elsewhere
    found = {name: case(data) for name, case in CASES.items()}
    torch.save(found, f"{os.environ['RANK']}.pt")
    assert not dist.is_initialized()


if __name__ == "__main__":
    main()
