"""What is known of gates with fixed weights without a draw, against loops over the members in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from immunity_fast.models.gate import SelectionGate, gate_of
from immunity_fast.selection import (
    all_right,
    always_fooled_by_one,
    mean_logits,
    mean_mixture,
    nobody_right_alone,
    shares_selected,
    worst_selected,
)

A = torch.tensor([0.5, 0.0, 0.2, 0.3])


def _case() -> tuple[Tensor, Tensor, Tensor]:
    logits = 2 * torch.randn(4, 60, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (60,), generator=torch.Generator().manual_seed(1))
    return logits, A.expand(60, -1), labels


def _right(logits: Tensor, labels: Tensor) -> list[list[bool]]:
    return [[int(row.argmax()) == int(label) for row, label in zip(own, labels, strict=True)] for own in logits]


def test_shares_are_sums_over_the_members() -> None:
    logits, weights, labels = _case()
    right = _right(logits, labels)
    wanted = [sum(a * r[b] for a, r in zip([0.5, 0, 0.2, 0.3], right, strict=True)) for b in range(60)]
    torch.testing.assert_close(shares_selected(logits, weights, labels).tolist(), wanted, atol=1e-7, rtol=0)
    assert {0.0, 1.0} <= set(shares_selected(logits, weights, labels).tolist())  # exactly


def test_the_worst_is_of_members_that_may_be_drawn() -> None:
    logits, weights, labels = _case()
    right = _right(logits, labels)
    drawn = [0, 2, 3]
    assert all_right(logits, weights, labels).tolist() == [all(right[i][b] for i in drawn) for b in range(60)]
    fooled = always_fooled_by_one(logits, weights, labels)
    assert fooled.tolist() == [not any(right[i][b] for i in drawn) for b in range(60)]
    targets = (labels + 1) % 3
    aimed = _right(logits, targets)
    reached = always_fooled_by_one(logits, weights, labels, targets)
    assert reached.tolist() == [all(aimed[i][b] for i in drawn) for b in range(60)]
    assert 0 < fooled.sum() < 60


def test_the_worst_expert_has_the_largest_margin() -> None:
    logits, weights, labels = _case()
    chosen = worst_selected(logits, weights, labels)
    p = logits.double().softmax(-1)
    for b in range(60):
        margins = [
            max(float(p[i, b, m]) for m in range(3) if m != labels[b]) - float(p[i, b, labels[b]]) if A[i] else -9.0
            for i in range(4)
        ]
        assert chosen[b].tolist() == [float(i == margins.index(max(margins))) for i in range(4)]


def test_nobody_is_right_where_neither_one_nor_the_mean_is() -> None:
    logits, weights, labels = _case()
    p = logits.double().softmax(-1)
    mean = torch.einsum("n,nbk->bk", A.double(), p)
    answers = torch.cat([p, mean[None]])
    wanted = (answers.argmax(-1) != labels).all(0)
    assert nobody_right_alone(logits, weights, labels).equal(wanted)
    assert 0 < wanted.sum() < 60
    # Each is wrong in its own way, and together they are right.
    together = torch.tensor([[[0.4, 0.6, 1e-9]], [[0.4, 1e-9, 0.6]]]).log()
    assert not nobody_right_alone(together, torch.tensor([[0.5, 0.5]]), torch.tensor([0])).any()


@pytest.mark.parametrize("kind", ["switch", "uniform", "selection"])
def test_the_mean_is_the_gates_own(kind: str) -> None:
    gate = gate_of(kind, 4)  # type: ignore[arg-type]
    weights = torch.full((4,), 0.25)
    if isinstance(gate, SelectionGate):
        weights = gate.probabilities.copy_(A)
    elif kind == "uniform":
        weights = torch.tensor([0.5, 0.5, 0, 0])
        gate.network.logits.copy_(weights.log())  # type: ignore[union-attr, operator]
    logits = _case()[0]
    wanted = torch.einsum("n,nbk->bk", weights.double(), logits.double().softmax(-1))
    torch.testing.assert_close(mean_mixture(gate, logits).double().exp(), wanted, atol=1e-6, rtol=0)
    averaged = torch.einsum("n,nbk->bk", weights.double(), logits.double())
    torch.testing.assert_close(mean_logits(gate, logits).double(), averaged, atol=1e-6, rtol=0)
