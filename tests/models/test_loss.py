"""`model(images, labels)`: the loss through the module's own forward pass, in one process; plain code is beside it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE, ImmunityTerms
from immunity_fast.models.moe import SingleNetwork
from tests import oracle
from tests.adversarial_cases import LABELS, LOSS, noisy_images, small_mixture
from tests.oracle import assert_matches

SIZE = (12, 13)
each_kind = pytest.mark.parametrize("whole", [False, True], ids=["chain", "whole"])


def _model(whole: bool = False, *, training: bool = True, batching: Any = "loop", experts: int = 3) -> ImmunityMoE:
    model = small_mixture(experts, whole=whole, batching=batching).train(training)
    model.loss_fn = FusedImmunityLoss(0.5, 0.7, 1e-3, size=SIZE)
    model.gate.switch = "off"
    return model


def _expected(model: ImmunityMoE) -> tuple[Tensor, list[Tensor]]:
    """The loss and its terms by the oracle, from slopes that autograd takes; BatchNorm counts one pass."""
    logits, activations, gate = model.expert_outputs(noisy_images())
    scores = sum(row[label] for expert in logits for row, label in zip(expert, LABELS.tolist(), strict=True))
    slopes = torch.autograd.grad(scores, activations, create_graph=True)
    maps, slopes = (each[0] if len(each) == 1 else torch.stack(list(each)) for each in ([activations], slopes))
    maps = torch.stack(list(maps)) if isinstance(maps, list) else maps
    information, stability = oracle.heatmap_losses(maps, slopes, SIZE)
    cross_entropies = oracle.cross_entropy(logits, gate, LABELS, 0.5)
    loss = oracle.total(cross_entropies, information, stability, model.num_experts, 0.7, 1e-3)
    return loss, [cross_entropies.mean(), information.mean(), stability / len(LABELS)]


@each_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_it_is_the_oracles_loss_with_its_gradient(whole: bool, training: bool, batching: Any) -> None:
    """Statistics of BatchNorm move as by one pass."""
    if whole and batching == "vmap":
        pytest.skip("networks that run whole have no vmap")
    model = _model(whole, training=training, batching=batching)
    twin = copy.deepcopy(model)
    expected, wanted = _expected(twin)
    loss, terms = model(noisy_images(), LABELS, return_terms=True)
    assert isinstance(terms, ImmunityTerms)
    assert_matches(loss, expected)
    for term, own in zip(terms, wanted, strict=True):
        assert_matches(term, own)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(3 * loss, list(model.parameters()))
    for ours, theirs in zip(gradients, torch.autograd.grad(3 * expected, list(twin.parameters())), strict=True):
        assert_matches(ours, theirs)
    again = copy.deepcopy(twin)
    assert torch.equal(again(noisy_images(), LABELS), again(noisy_images(), LABELS))


def test_labels_by_name_and_a_value_without_gradients() -> None:
    model = _model()
    expected = copy.deepcopy(model)(noisy_images(), LABELS)
    assert torch.equal(copy.deepcopy(model)(images=noisy_images(), labels=LABELS), expected)
    with torch.no_grad():
        assert_matches(model(noisy_images(), LABELS), expected.detach())


@each_kind
def test_a_validations_loss_needs_no_gradients(whole: bool) -> None:
    model = _model(whole, training=False)
    expected, wanted = model(noisy_images(), LABELS, return_terms=True)
    with torch.no_grad():
        loss, terms = model(noisy_images(), LABELS, return_terms=True)
    assert not any(value.requires_grad for value in (loss, *terms))
    assert_matches(loss, expected)
    for term, own in zip(terms, wanted, strict=True):
        assert_matches(term, own)


@each_kind
def test_no_labels_give_log_probabilities(whole: bool) -> None:
    model = _model(whole, training=False)
    outputs = model(noisy_images())
    assert_matches(outputs.exp().sum(-1), torch.ones(5))
    with pytest.raises(ValueError, match=r"labels: expected labels \(B,\), of which the loss has terms, got None"):
        model(noisy_images(), return_terms=True)


def test_one_network_has_its_cross_entropy() -> None:
    network = SingleNetwork("resnet8", 4, image_size=12).double()
    images, labels = torch.rand(5, 3, 12, 12, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 2])
    loss, terms = network(images, labels, return_terms=True)
    expected = F.cross_entropy(network.expert_logits(images)[0], labels)
    assert_matches(loss, expected)
    assert_matches(torch.stack(list(terms)), torch.stack([expected, 0 * expected, 0 * expected]))
    assert network(images[:0], labels[:0]) == 0


def test_an_empty_batch_has_no_loss() -> None:
    assert _model(training=False)(noisy_images()[:0], LABELS[:0]) == 0


def test_the_loss_is_an_attribute_and_no_part_of_the_model() -> None:
    plain = ImmunityMoE("resnet8", 2, 4, image_size=(12, 16))
    assert plain.loss_fn.size == (12, 16)
    names, text = list(plain.state_dict()), repr(plain)
    given = FusedImmunityLoss(beta=0.0)
    assert ImmunityMoE("resnet8", 2, 4, image_size=12, loss_fn=given).loss_fn is given
    plain.loss_fn = given
    assert plain.loss_fn is given
    assert (list(plain.state_dict()), repr(plain)) == (names, text)
    assert not any(isinstance(part, FusedImmunityLoss) for part in plain.modules())
    for twin in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert twin.loss_fn.beta == 0
        assert twin.loss_fn is not given
    with pytest.raises(TypeError, match="loss_fn: expected a FusedImmunityLoss, got CrossEntropyLoss"):
        plain.loss_fn = nn.CrossEntropyLoss()  # type: ignore[assignment]


def test_from_experts_takes_a_loss() -> None:
    parts = [nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3)) for _ in "ab"]
    assert ImmunityMoE.from_experts(parts, stage="0", image_size=11, loss_fn=LOSS).loss_fn is LOSS
    assert ImmunityMoE.from_experts(parts, stage="0", image_size=11).loss_fn.size == (11, 11)
    assert SingleNetwork("resnet8", 4, loss_fn=LOSS).loss_fn is LOSS


@pytest.mark.exhaustive  # of `make test`, a step is one graph, and tests/integrations compile a mixture with its loss
@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_it_compiles_to_one_graph(batching: Any) -> None:
    """Forward and backward; statistics move in compiled code, too."""
    model = _model(batching=batching, experts=2)
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(noisy_images(), LABELS)
    expected = twin(noisy_images(), LABELS)
    assert_matches(loss, expected)
    loss.backward()
    expected.backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_matches(one.grad, other.grad)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()), rtol=1e-12, atol=1e-12)
    torch.compiler.reset()


def test_what_no_graph_can_be_says_to_leave_fullgraph_out() -> None:
    torch.compiler.reset()
    compiled = torch.compile(_model(whole=True), fullgraph=True, backend="eager")
    with pytest.raises(
        Exception, match="differentiated twice, which compiled code cannot do: leave fullgraph=True out"
    ):
        compiled(noisy_images(), LABELS)
