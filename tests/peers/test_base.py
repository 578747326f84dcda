"""What all peers refuse, and that several processes train as one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from immunity_fast import ImmunityMoE
from immunity_fast.models.gate import GateKind, gate_of
from immunity_fast.peers import method_of
from immunity_fast.peers.methods import PEERS
from immunity_fast.training.config import TrainConfig
from tests.naive_ensembles import network
from tests.processes import launch

# Each process takes its half of a batch with labels that are missing; BatchNorm is in evaluation mode, in training mode
# it would normalise by half a batch.
WORKER = """
import sys
import torch
from torch.optim import SGD
from immunity_fast import ImmunityMoE
from immunity_fast.models.gate import gate_of
from immunity_fast.peers import method_of
from immunity_fast.runtime import distributed
from immunity_fast.training.step import TrainStep
from tests.naive_ensembles import batch, network

def taken(name, group, mine):
    torch.manual_seed(0)
    experts = [network() for _ in range(3)]
    model = ImmunityMoE.from_experts(experts, stage="2", image_size=6, gate=gate_of("uniform", 3)).double().eval()
    options = {"label_smoothing": 0.1, "class_weights": [1.0, 3.0, 0.5, 2.0, 1.0]}
    method = method_of(name, group_name="" if group is None else group.group_name, **options)
    method.double().begin_epoch(model, 0, 3, 0)
    step = TrainStep(model, model.loss_fn, SGD(model.parameters(), 0.1), group=group, method=method)
    images, labels = batch()[0].repeat(2, 1, 1, 1)[:6], torch.tensor([1, -100, 0, -100, -100, 2])
    for _ in range(2):
        measured = step(images[mine], labels[mine])
    measured = measured if group is None else distributed.mean(measured)
    return measured, [parameter.detach().clone() for parameter in model.experts.parameters()]

def main():
    with distributed.processes(torch.device("cpu")):
        mine = slice(3 * distributed.rank(), 3 * distributed.rank() + 3)
        found = {name: (taken(name, distributed.group(), mine), taken(name, None, slice(6))) for name in sys.argv[2:]}
        if distributed.rank() == 0:
            torch.save(found, sys.argv[1])

main()
"""


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    names = ["adp", "gal", "mrboost"]
    launch("-c", WORKER, str(tmp_path / "out.pt"), *names)
    for name, (several, one) in torch.load(tmp_path / "out.pt", weights_only=True).items():
        torch.testing.assert_close(several, one, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", sorted(PEERS.keys() - {"rse"}))
def test_a_gate_that_nothing_would_train_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"--gate: expected auto, uniform or selection with --ensemble .*, got switch"):
        TrainConfig(ensemble=name, experts=4, epochs=4, gate="switch")
    method = method_of(name)
    assert method is not None
    experts = [network() for _ in range(4)]
    kinds: tuple[GateKind, ...] = ("uniform", "selection")
    for kind in kinds:
        method.check_model(ImmunityMoE.from_experts(experts, stage="2", image_size=6, gate=gate_of(kind, 4)))
    with pytest.raises(ValueError, match=r"gate: expected .*fixed weights"):
        method.check_model(ImmunityMoE.from_experts(experts, stage="2", image_size=6))
