"""Gates that are not permuted: one expert at random, and fixed weights; alone and in a mixture."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import immunity_fast
from immunity_fast import ImmunityMoE
from immunity_fast.attacks import arc, pgd
from immunity_fast.models.gate import (
    FixedWeights,
    RandomSwitchGate,
    SelectionGate,
    Switch,
    SwitchingGateWarning,
    gate_of,
    kind_of_gate,
    selected,
)
from immunity_fast.training.checkpoint import described_model

A = [0.5, 0.0, 0.2, 0.3]
IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _selection(switch: Switch = "sample", seed: int | None = 0) -> SelectionGate:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    gate = SelectionGate(4, switch, generator).eval()
    gate.probabilities.copy_(torch.tensor(A))
    return gate


def _mixture(kind: str, seed: int = 0) -> ImmunityMoE:
    torch.manual_seed(seed)
    networks = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)) for _ in range(4)]
    model = ImmunityMoE.from_experts(networks, gate=gate_of(kind, 4), stage="0", image_size=8).eval()  # type: ignore[arg-type]
    if kind == "selection":
        model.gate.probabilities.copy_(torch.tensor(A))
    else:
        model.gate.network.logits.copy_(torch.tensor([0.5, 0.5, 0, 0]).log())
    return model


def _weights(kind: str) -> Tensor:
    return torch.tensor(A if kind == "selection" else [0.5, 0.5, 0, 0])


def test_experts_are_drawn_as_often_as_their_probabilities_say() -> None:
    weights = _selection()(IMAGES[:1].expand(4000, -1, -1, -1))
    assert weights.unique().tolist() == [0, 1]
    assert (weights.sum(-1) == 1).all()
    often = weights.mean(0)
    assert often[1] == 0
    assert (often - torch.tensor(A)).abs().max() < 0.03


def test_a_call_draws_one_for_all_and_a_sample_one_each() -> None:
    call = [_rows for gate in [_selection("call")] for _ in range(40) if len(_rows := gate(IMAGES).unique(dim=0)) == 1]
    assert len(call) == 40
    assert len(torch.cat(call).unique(dim=0)) == 3
    assert len(_selection("sample")(IMAGES.repeat(8, 1, 1, 1)).unique(dim=0)) == 3


def test_a_generator_repeats_itself_and_leaves_the_global_one() -> None:
    before = torch.get_rng_state()
    assert _selection()(IMAGES).equal(_selection()(IMAGES))
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(3)
    first = _selection(seed=None)(IMAGES)
    torch.manual_seed(3)
    assert first.equal(_selection(seed=None)(IMAGES))


@pytest.mark.parametrize("switch", ["off", "mean"])
def test_its_mean_is_its_probabilities(switch: Switch) -> None:
    torch.testing.assert_close(_selection(switch)(IMAGES), torch.tensor(A).expand(5, -1))
    torch.testing.assert_close(_selection("call").train()(IMAGES), torch.tensor(A).expand(5, -1))


def test_probabilities_of_half_precision_sum_to_one() -> None:
    gate = SelectionGate(3, "mean").eval().bfloat16()
    torch.testing.assert_close(gate(IMAGES.bfloat16()).sum(-1), torch.ones(5))
    assert _selection()(IMAGES[:0]).shape == (0, 4)


def test_what_cannot_be_drawn_is_never() -> None:
    rows = torch.tensor([[0.0, 0.0, 1.0]]).expand(300, -1)
    assert selected(rows)[:, 2].all()


@pytest.mark.parametrize("switch", ["call", "sample", "off", "mean"])
@pytest.mark.parametrize("training", [True, False])
def test_fixed_weights_are_never_permuted(switch: Switch, training: bool) -> None:
    gate = gate_of("uniform", 3, switch=switch).train(training)
    assert isinstance(gate.network, FixedWeights)
    gate.network.logits.copy_(torch.tensor([0.25, 0.75, 0]).log())
    before = torch.get_rng_state()
    for _ in range(6):
        torch.testing.assert_close(gate(IMAGES), torch.tensor([0.25, 0.75, 0]).expand(5, -1))
    assert torch.get_rng_state().equal(before)


def test_fixed_weights_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match=r"network: expected logits \(B, N\) = \(5, 3\)"):
        RandomSwitchGate(3, FixedWeights(4)).eval()(IMAGES)
    with pytest.raises(ValueError, match="num_experts"):
        FixedWeights(0)
    with pytest.raises(ValueError, match="gate"):
        gate_of("mean", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "warned"), [("uniform", False), ("selection", True)])
def test_a_gate_warns_if_it_draws(kind: str, warned: bool) -> None:
    gate, images = gate_of(kind, 3).eval(), IMAGES.clone().requires_grad_()  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gate(images)
    assert [each.category for each in said] == [SwitchingGateWarning] * warned


@pytest.mark.parametrize("kind", ["uniform", "selection"])
def test_copies_and_states_keep_the_weights(kind: str) -> None:
    model = _mixture(kind)
    other = _mixture(kind, 1)
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), other):
        with twin.gate.switched("mean"):
            torch.testing.assert_close(twin.gate_weights(IMAGES), _weights(kind).expand(5, -1))


@pytest.mark.parametrize("kind", ["uniform", "selection"])
def test_a_mixture_of_it_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = ImmunityMoE("resnet8", 2, 3, image_size=12, gate=kind).eval()  # type: ignore[arg-type]
    own = torch.tensor([0.9, 0.1])
    (model.gate.probabilities if kind == "selection" else model.gate.network.logits).copy_(
        own if kind == "selection" else own.log()
    )
    model.save_pretrained(tmp_path)
    found = immunity_fast.load(tmp_path)
    assert kind_of_gate(found.gate) == kind
    torch.testing.assert_close(found.gate_weights(IMAGES), own.expand(5, -1))
    torch.testing.assert_close(found(IMAGES), model.deterministic()(IMAGES))


def test_a_checkpoints_description_makes_the_same_gate() -> None:
    description = {"arch": "resnet8", "num_experts": 2, "num_classes": 3, "stage": "layer1", "image_size": [8, 8]}
    for kind in ("uniform", "selection"):
        assert kind_of_gate(described_model(description | {"gate": kind}).gate) == kind
    assert kind_of_gate(described_model(description).gate) == "switch"


@pytest.mark.parametrize("kind", ["uniform", "selection"])
def test_the_mean_of_a_mixture_is_everywhere_the_same(kind: str) -> None:
    model = _mixture(kind)
    with torch.no_grad():
        p = model.expert_logits(IMAGES).double().softmax(-1)
        wanted = torch.einsum("n,nbk->bk", _weights(kind).double(), p).log().float()
        for module in (model.deterministic(), model.for_inference(), model.for_inference("off")):
            torch.testing.assert_close(module(IMAGES), wanted)
    heatmaps = model.heatmaps(IMAGES)
    assert heatmaps.equal(model.heatmaps(IMAGES, wanted.argmax(-1)))


def test_arc_on_a_selection_is_arc_on_its_networks() -> None:
    model, labels = _mixture("selection"), torch.tensor([0, 1, 2, 0, 1])
    networks = [expert.eval() for expert in model.unstack()]
    wanted = arc(networks, IMAGES, labels, weights=A, eps=0.1, steps=3)
    torch.testing.assert_close(arc(model, IMAGES, labels, eps=0.1, steps=3), wanted, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="fixed weights"):
        arc(_mixture("uniform"), IMAGES, labels)


def test_pgd_on_fixed_weights_needs_no_judge() -> None:
    model, labels = _mixture("uniform"), torch.tensor([0, 1, 2, 0, 1])
    settings = {"eps": 0.1, "steps": 3, "random_start": False}
    assert pgd(model, IMAGES, labels, **settings).equal(pgd(model.deterministic(), IMAGES, labels, **settings))
