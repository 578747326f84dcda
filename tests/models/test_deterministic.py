"""A mixture for outside libraries: by its exact mean, sharing its tensors; and the warning of a gate that switches."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from immunity_fast import FusedImmunityLoss, ImmunityMoE, SwitchingGateWarning
from immunity_fast.attacks import pgd
from immunity_fast.attacks.autoattack import autoattack
from immunity_fast.data.datasets import Split
from immunity_fast.evaluation.ledger import Ledger
from immunity_fast.evaluation.runner import Evaluation, Plan
from immunity_fast.evaluation.targets import MixtureTarget, NetworkTarget
from immunity_fast.models.gate import Switch
from immunity_fast.models.moe import SingleNetwork
from immunity_fast.training.adversarial import InnerAttack, InnerAttackSettings
from tests import grids
from tests.adversarial_cases import LABELS, noisy_images, small_mixture, train_step


def _mixture(**options: Any) -> ImmunityMoE:
    """In evaluation mode, in float64; its experts' weights differ, and so do the gate's for each image."""
    model = small_mixture(**options).eval()
    model.gate.switch = "call"
    return model


def _mean(model: ImmunityMoE, images: Tensor) -> Tensor:
    """By all N! permutations, one after the other."""
    with torch.no_grad(), model.gate.switched("off"):
        probabilities = model.expert_logits(images).softmax(-1)
        weights = model.gate_weights(images)
    orders = list(itertools.permutations(range(model.num_experts)))
    total = sum(torch.einsum("nbk,bn->bk", probabilities, weights[:, list(order)]) for order in orders)
    return torch.log(total / len(orders))  # type: ignore[operator]


@pytest.mark.parametrize(("switch", "whole"), grids.every(2, get_args(Switch), [False, True]))
def test_it_answers_by_the_exact_mean(whole: bool, switch: Switch) -> None:
    model = _mixture(whole=whole)
    model.gate.switch = switch
    images, state = noisy_images(), torch.get_rng_state()
    torch.testing.assert_close(model.deterministic()(images), _mean(model, images), rtol=1e-10, atol=1e-12)
    assert model.gate.switch == switch
    assert torch.equal(torch.get_rng_state(), state)
    model.gate.switch = "mean"
    torch.testing.assert_close(model.deterministic()(images), model(images), rtol=1e-12, atol=1e-12)


def test_one_network_is_itself() -> None:
    network = SingleNetwork("resnet8", 4, image_size=12).eval()
    images = torch.rand(3, 3, 12, 12)
    torch.testing.assert_close(network.deterministic()(images), network(images))


def test_it_shares_tensors_and_passes_modes_and_moves_on() -> None:
    model = _mixture()
    exact = model.deterministic()
    assert isinstance(exact, nn.Module)
    assert not exact.training
    own = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    assert {id(tensor) for tensor in exact.state_dict(keep_vars=True).values()} == own
    exact.train()
    assert all(part.training for part in model.modules())
    assert exact.training
    assert model.deterministic().training
    exact.eval()
    assert not any(part.training for part in model.modules())
    exact.to(torch.float32)
    assert next(model.parameters()).dtype == torch.float32
    exact(noisy_images(dtype=torch.float32))[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.experts.parameters())
    assert all(parameter.grad is None for parameter in model.gate.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_it_can_be_copied_and_pickled(copied: Any) -> None:
    exact = _mixture().deterministic()
    twin = copied(exact)
    assert torch.equal(twin(noisy_images()), exact(noisy_images()))
    assert not twin.training


def test_it_compiles_exports_and_runs_under_vmap_and_processes() -> None:
    exact, images = _mixture(experts=2).deterministic(), noisy_images()
    expected = exact(images)
    torch.compiler.reset()
    compiled = torch.compile(exact, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), expected)
    exported = torch.export.export(exact, (images,)).module()
    torch.testing.assert_close(exported(images), expected)
    gradients = torch.func.vmap(torch.func.grad(lambda x: exact(x[None])[0, 0]))(images)
    leaf = images.clone().requires_grad_()
    torch.testing.assert_close(gradients, torch.autograd.grad(exact(leaf)[:, 0].sum(), leaf)[0])


# The warning


def _gradient(model: Any, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    found: Tensor = torch.autograd.grad(model(leaf).sum(), leaf)[0]
    return found


@pytest.mark.parametrize("switch", ["call", "sample"])
def test_gradients_through_a_gate_that_switches_warn_once(switch: Switch) -> None:
    model = _mixture()
    model.gate.switch = switch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            _gradient(model, noisy_images())
        _gradient(copy.deepcopy(model), noisy_images())
        torch.func.grad(lambda x: model(x).sum())(noisy_images())
    assert [warning.category for warning in caught] == [SwitchingGateWarning] * 2  # a copy is another mixture
    assert f"(switch={switch!r})" in str(caught[0].message)
    assert "model.deterministic()" in str(caught[0].message)


def test_under_torch_func_it_warns_too() -> None:
    model = _mixture()
    with pytest.warns(SwitchingGateWarning):
        torch.func.grad(lambda x: model(x).sum())(noisy_images())
    model = copy.deepcopy(model)
    model.gate.switch = "sample"
    with pytest.warns(SwitchingGateWarning):
        torch.func.vmap(torch.func.grad(lambda x: model(x[None]).sum()), randomness="different")(noisy_images())


@pytest.fixture
def silent() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SwitchingGateWarning)
        yield


def test_where_nothing_is_drawn_or_nothing_follows_it_is_silent(silent: None) -> None:
    model, images = _mixture(), noisy_images()
    for switch in ("off", "mean"):
        model.gate.switch = switch  # type: ignore[assignment]
        _gradient(model, images)
    model.gate.switch = "call"
    _gradient(model.deterministic(), images)
    with torch.no_grad():
        model(images.clone().requires_grad_())
    model(images).sum().backward()  # of weights alone
    model.train()
    _gradient(model, images)
    model.eval()
    for switch in ("call", "sample"):
        with model.gate.switched(switch):  # type: ignore[arg-type]
            _gradient(model, images)
    _gradient(SingleNetwork("resnet8", 4, image_size=12).eval(), torch.rand(2, 3, 12, 12))


def test_compiled_and_exported_code_has_no_warning_in_it(silent: None) -> None:
    model, images = _mixture(experts=2), noisy_images()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert _gradient(compiled, images).shape == images.shape
    exported = torch.export.export(model, (images.clone().requires_grad_(),))
    assert exported.module()(images).shape == (5, 3)


@pytest.mark.parametrize("gate", get_args(Switch))
def test_training_is_silent(silent: None, gate: Switch) -> None:
    model = small_mixture()
    model.gate.switch = "call"
    settings = InnerAttackSettings("pgd", steps=2, gate=gate)
    InnerAttack(model, settings)(noisy_images(), LABELS)
    model.gate.switch = "call"
    train_step(model, "pgd")(noisy_images(), LABELS)
    loss_fn = FusedImmunityLoss(size=(8, 9))
    logits, maps, weights = model.expert_outputs(noisy_images().requires_grad_())
    loss_fn(logits, maps, LABELS, weights).backward()


@pytest.mark.parametrize("kind", ["mixture", "network"])
def test_evaluations_are_silent(silent: None, kind: str, tmp_path: Any) -> None:
    model = _mixture(experts=2).float()
    images = (255 * noisy_images()).round().byte()
    test = Split(images, LABELS)
    target = MixtureTarget(model, 3) if kind == "mixture" else NetworkTarget(model, 3, draws=2)
    attacks = ("pgd", "autoattack") if kind == "network" else ("pgd",)
    plan = Plan(attacks=attacks, images=5, masking_images=2, autoattack_steps=2, queries=2)
    Evaluation(target, test, plan, Ledger(tmp_path / "ledger"), data="noise").run(lambda *_: None)


def test_our_own_attacks_take_what_the_model_answers_and_warn() -> None:
    model = _mixture()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for options in ({}, {"keep_best": True}):
            pgd(model, noisy_images(), LABELS, steps=3, **options)
    assert [warning.category for warning in caught] == [SwitchingGateWarning]


def test_averaging_over_draws_is_silent(silent: None) -> None:
    images = noisy_images(dtype=torch.float32)
    model = _mixture(experts=2).float()
    for attacked in (model, lambda x: 2 * model(x)):
        autoattack(attacked, images, LABELS, num_classes=3, version="rand", steps=2, queries=2)
    assert model.gate.switch == "call"
