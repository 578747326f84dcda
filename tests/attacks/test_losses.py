"""What attacks maximise: each loss against its formula, one sample after the other, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from immunity_fast.attacks import losses as attack_losses
from immunity_fast.attacks.losses import LOSSES
from tests.oracle import assert_matches, attack_loss

TARGETED = pytest.mark.parametrize("targeted", [False, True], ids=["any", "target"])
EACH = pytest.mark.parametrize("loss", LOSSES)
NEEDED = {("ce", False): 1, ("ce", True): 1, ("cw", False): 2, ("cw", True): 2, ("dlr", False): 3, ("dlr", True): 4}


def _classes(classes: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def _case(shape: tuple[int, ...], targeted: bool, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs (…, K) in float64, labels (…,), and targets, of which some are the label itself."""
    outputs = scale * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = _classes(shape[-1], shape[:-1], 2)
    return outputs, labels, _classes(shape[-1], shape[:-1], 3) if targeted else None


def _expected(outputs: Tensor, labels: Tensor, targets: Tensor | None, loss: str) -> Tensor:
    rows = outputs.reshape(-1, outputs.shape[-1])
    goals = [None] * len(rows) if targets is None else targets.flatten().tolist()
    losses = [attack_loss(*case, loss) for case in zip(rows, labels.flatten().tolist(), goals, strict=True)]
    return torch.stack(losses).view(labels.shape)


@EACH
@TARGETED
@pytest.mark.parametrize("shape", [(11, 5), (1, 4), (3, 7, 6), (5,)])
@pytest.mark.parametrize("scale", [1e-3, 3.0, 1e3])
def test_values_and_gradients_are_the_formulas(loss: Any, targeted: bool, shape: tuple[int, ...], scale: float) -> None:
    outputs, labels, targets = _case(shape, targeted, scale)
    upstream = torch.randn(shape[:-1], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = []
    for function in (LOSSES[loss], lambda *case: _expected(*case, loss)):
        leaf = outputs.clone().requires_grad_()
        value = function(leaf, labels, targets)
        found.append((value, torch.autograd.grad((value * upstream).sum(), leaf)[0]))
    for actual, expected in zip(*found, strict=True):
        assert_matches(actual, expected)


@EACH
@TARGETED
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_the_outputs_format_is_kept(loss: Any, targeted: bool, dtype: torch.dtype, tolerance: float) -> None:
    outputs, labels, targets = _case((13, 7), targeted)
    outputs = outputs.to(dtype)
    value = LOSSES[loss](outputs, labels, targets)
    assert value.dtype == dtype
    assert_matches(value, _expected(outputs.double(), labels, targets, loss), tolerance)


@EACH
@TARGETED
def test_log_probabilities_are_as_good_as_logits(loss: Any, targeted: bool) -> None:
    outputs, labels, targets = _case((9, 5), targeted)
    shifted = LOSSES[loss](outputs.log_softmax(-1), labels, targets)
    assert_matches(shifted, LOSSES[loss](outputs, labels, targets))


@TARGETED
def test_dlr_is_free_of_the_logits_scale(targeted: bool) -> None:
    outputs, labels, targets = _case((9, 5), targeted)
    assert_matches(LOSSES["dlr"](1e4 * outputs + 7, labels, targets), LOSSES["dlr"](outputs, labels, targets), 1e-8)


@pytest.mark.parametrize("loss", ["dlr", "cw"])
def test_a_margin_is_positive_where_the_label_is_not_the_largest(loss: Any) -> None:
    outputs, labels, _ = _case((40, 5), False)
    fooled = torch.tensor([max(range(5), key=row.__getitem__) for row in outputs.tolist()]) != labels
    assert 5 < int(fooled.sum()) < 40
    assert torch.equal(LOSSES[loss](outputs, labels, None) > 0, fooled)


def test_a_targeted_margin_is_positive_where_the_target_wins() -> None:
    outputs, labels, targets = _case((40, 5), True)
    reached = torch.tensor([max(range(5), key=row.__getitem__) for row in outputs.tolist()]) == targets
    assert 3 < int(reached.sum()) < 40
    assert torch.equal(LOSSES["cw"](outputs, labels, targets) > 0, reached)


@pytest.mark.parametrize("loss", ["dlr", "cw"])
def test_a_margin_has_a_gradient_where_cross_entropy_has_none(loss: Any) -> None:
    outputs = (1e4 * torch.tensor([[3.0, 2.0, 1.0, 0.5], [-1.0, 0.0, 5.0, 1.0]])).requires_grad_()
    labels = torch.tensor([0, 2])
    assert not torch.autograd.grad(LOSSES["ce"](outputs, labels, None).sum(), outputs)[0].any()
    assert torch.autograd.grad(LOSSES[loss](outputs, labels, None).sum(), outputs)[0].any(-1).all()


@TARGETED
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float16),
    ],
)
def test_dlr_of_equal_logits_is_zero(targeted: bool, dtype: torch.dtype) -> None:
    _, labels, targets = _case((3, 5), targeted)
    assert not attack_losses.loss_of("dlr", torch.zeros(3, 5, dtype=dtype), labels, targets).any()


@TARGETED
@EACH
def test_the_fewest_classes_will_do(loss: Any, targeted: bool) -> None:
    outputs, labels, targets = _case((6, NEEDED[loss, targeted]), targeted)
    assert_matches(LOSSES[loss](outputs, labels, targets), _expected(outputs, labels, targets, loss))


@pytest.mark.parametrize(("classes", "targeted"), [(1, False), (2, False), (1, True), (3, True)])
def test_dlr_of_too_few_classes_is_an_error(classes: int, targeted: bool) -> None:
    outputs, labels, targets = _case((6, classes), targeted)
    needed = NEEDED["dlr", targeted]
    with pytest.raises(ValueError, match=f"loss: dlr needs at least {needed} classes, got {classes}; take cw"):
        LOSSES["dlr"](outputs, labels, targets)


@EACH
@TARGETED
def test_no_samples_have_no_losses(loss: Any, targeted: bool) -> None:
    outputs, labels, targets = _case((0, 5), targeted)
    assert LOSSES[loss](outputs, labels, targets).shape == (0,)
