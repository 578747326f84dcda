"""One network alone: trained by its cross-entropy, loaded as one, and measured under attack."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from immunity_fast import FusedImmunityLoss, ImmunityMoE, train
from immunity_fast.models.gate import Switch
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.training import run_evaluation
from immunity_fast.training.adversarial import InnerAttack
from immunity_fast.training.checkpoint import load_model
from immunity_fast.training.run_folder import Run
from tests.adversarial_cases import LABELS, LOSS, chain, kl, noisy_images, train_run, train_step
from tests.small_runs import options, write_data


def _single(batching: Any = "auto") -> SingleNetwork:
    torch.manual_seed(0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    return SingleNetwork("resnet8", 3, image_size=12, batching=batching, mean=mean, std=std).double()


def _small(seed: int = 1) -> Tensor:
    return noisy_images(seed)[..., :12]


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_one_network_alone_is_that_network(batching: str) -> None:
    model = _single(batching)
    (network,) = model.unstack()
    expected = network(_small()).log_softmax(-1)
    torch.testing.assert_close(model(_small()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.expert_logits(_small())[0].log_softmax(-1), network(_small()).log_softmax(-1))
    network = model.unstack()[0].eval()
    for switch in get_args(Switch):
        model.eval().gate.switch = switch
        torch.testing.assert_close(model(_small()), network(_small()).log_softmax(-1), rtol=1e-12, atol=1e-12)
    assert (model.gate_weights(_small()) == 1).all()
    assert not list(model.gate.parameters())
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"experts"}


def test_a_mixture_still_needs_two_experts() -> None:
    with pytest.raises(ValueError, match="num_experts: expected at least 2, got 1"):
        ImmunityMoE("resnet8", num_experts=1)
    with pytest.raises(ValueError, match="experts: expected at least 2 modules, got 1"):
        ImmunityMoE.from_experts([chain()], stage="2")


@pytest.mark.parametrize("method", [None, "pgd", "trades"])
@pytest.mark.parametrize("loss_fn", [LOSS, FusedImmunityLoss(0.0, 0.0, 0.0)], ids=["weighted", "unweighted"])
def test_one_network_is_trained_by_its_cross_entropy_once(
    method: str | None, loss_fn: FusedImmunityLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _single()
    (network,) = model.unstack()
    monkeypatch.setattr(InnerAttack, "__call__", lambda *_: _small(2))
    parameters = dict(network.named_parameters())
    trained_on = _small() if method is None else _small(2)
    if method == "trades":
        first = copy.deepcopy(network)
        clean = torch.func.functional_call(first, parameters, (_small(),))
        for buffer, counted in zip(network.buffers(), first.buffers(), strict=True):
            buffer.copy_(counted)
        log_p, log_q = clean.log_softmax(-1), network(trained_on).log_softmax(-1)
        drift = torch.stack([kl(log_p[b], log_q[b]) for b in range(5)])
        loss = F.cross_entropy(clean, LABELS) + 2.5 * drift.mean()
    else:
        loss = F.cross_entropy(network(trained_on), LABELS)
    loss.backward()
    measured = train_step(model, method, loss_fn, trades_weight=2.5)(_small(), LABELS)
    assert measured.tolist() == pytest.approx([loss.item(), loss.item(), 0, 0], rel=1e-9)
    for name, parameter in model.experts.named_parameters():
        assert parameter.grad is not None
        expected = parameters[name].grad
        assert expected is not None
        torch.testing.assert_close(parameter.grad[0], expected, rtol=1e-9, atol=1e-9, msg=name)
    buffers = dict(network.named_buffers())
    for name, buffer in model.experts.named_buffers():
        torch.testing.assert_close(buffer[0], buffers[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_run_of_one_network_is_loaded_as_one(tmp_path: Path) -> None:
    trainer, run = train_run(tmp_path / "run", experts=1, check_images=4)
    assert isinstance(trainer.model, SingleNetwork)
    (record,) = run.metrics()
    assert record["loss"] == record["cross_entropy"]
    assert record["mutual_information"] == 0
    assert "val_iscore" not in record
    for path in (run.folder, run.checkpoint, run.best_checkpoint):
        model, info = load_model(path)
        assert type(model) is SingleNetwork
        assert info["model"]["num_experts"] == 1
        assert not model.training
        torch.testing.assert_close(model(_small().float()), trainer.model.eval()(_small().float()))


def test_one_network_s_test_accuracy_is_measured_under_attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        run_evaluation, "AFTER_TRAINING", dataclasses.replace(run_evaluation.AFTER_TRAINING, masking_images=0)
    )
    arguments = options(write_data(tmp_path / "data.npz"), experts=1, epochs=1, attack_images=3)
    train.main([*arguments, "--out", str(tmp_path / "run")])
    results = json.loads(Run(tmp_path / "run").results_file.read_text(encoding="utf-8"))
    assert "pgd" in {row["attack"] for row in results["accuracy"]}
