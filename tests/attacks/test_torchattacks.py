"""The internals of torchattacks that attacks/autoattack.py calls or replaces: when one changes, this says which."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.metadata import version

import pytest
import torch
from torch import Tensor, nn

torchattacks = pytest.importorskip("torchattacks")

SETTINGS = {
    "APGD": ("norm", "eps", "steps", "loss", "eot_iter", "rho"),
    "FAB": ("norm", "eps", "steps", "alpha_max", "eta", "beta", "multi_targeted"),
    "Square": ("norm", "eps", "n_queries", "p_init", "loss", "resc_schedule"),
}
CALLED = {
    ("APGD", "attack_single_run"): 2,
    ("FAB", "attack_single_run_targeted"): 2,
    ("Square", "init_hyperparam"): 1,
    ("Square", "attack_single_run"): 2,
}
# What autoattack.py puts another function or number in the place of, how many arguments that takes, and who uses it.
REPLACED = {
    ("APGD", "dlr_loss"): (2, "attack_single_run"),
    ("FAB", "get_diff_logits_grads_batch_targeted"): (3, "attack_single_run_targeted"),
}
READ = {
    ("APGD", "eot_iter"): "attack_single_run",
    ("APGD", "get_logits"): "attack_single_run",
    ("FAB", "target_class"): "attack_single_run_targeted",
    ("FAB", "get_logits"): "attack_single_run_targeted",
    ("Square", "get_logits"): "margin_and_loss",
}


def _said(kind: str, what: str) -> str:
    return (
        f"torchattacks {version('torchattacks')}: {kind}.{what}, on which attacks/autoattack.py depends; look at what "
        "has changed, mend it there, or bound the version in setup.py"
    )


def _source(kind: str, method: str) -> str:
    found = getattr(getattr(torchattacks, kind), method, None)
    assert found is not None, _said(kind, f"{method} is missing")
    return inspect.getsource(found)


def _check_takes(kind: str, method: str, count: int) -> None:
    found = getattr(getattr(torchattacks, kind), method, None)
    assert found is not None, _said(kind, f"{method} is missing")
    try:
        inspect.signature(found).bind(None, *[None] * count)
    except TypeError as error:
        pytest.fail(_said(kind, f"{method} does not take {count} arguments any more ({error})"))


@pytest.mark.parametrize(("kind", "names"), SETTINGS.items())
def test_an_attack_still_has_its_settings(kind: str, names: Sequence[str]) -> None:
    known = inspect.signature(getattr(torchattacks, kind)).parameters
    missing = [name for name in names if name not in known]
    assert not missing, _said(kind, f"__init__ has no {', '.join(missing)}")


@pytest.mark.parametrize(("place", "count"), CALLED.items())
def test_what_is_called_still_takes_what_it_is_given(place: tuple[str, str], count: int) -> None:
    _check_takes(*place, count)


@pytest.mark.parametrize(("place", "how"), REPLACED.items())
def test_what_is_replaced_is_still_there_and_used(place: tuple[str, str], how: tuple[int, str]) -> None:
    (kind, name), (count, user) = place, how
    _check_takes(kind, name, count)
    assert f"self.{name}" in _source(kind, user), _said(kind, f"{user} uses {name} no more")


@pytest.mark.parametrize(("place", "user"), READ.items())
def test_what_is_set_from_outside_is_still_read(place: tuple[str, str], user: str) -> None:
    kind, name = place
    assert f"self.{name}" in _source(kind, user), _said(kind, f"{user} reads {name} no more")


class _Flat(nn.Module):
    """Logits (B, 5) that are linear in the images; a parameter tells the device."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights


@pytest.mark.parametrize(("kind", "count"), [("APGD", 4), ("Square", 2)])
def test_a_single_run_still_gives_as_much(kind: str, count: int) -> None:
    images = torch.rand(3, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    attack = getattr(torchattacks, kind)(_Flat(), eps=0.1)
    if kind == "Square":
        images = torch.nn.functional.pad(images, (0, 3, 0, 3))
        attack.model = lambda x: _Flat()(x[..., :2, :2])
        attack.init_hyperparam(images)
    found = attack.attack_single_run(images, torch.tensor([0, 1, 2]))
    assert isinstance(found, tuple), _said(kind, "attack_single_run gives no tuple")
    assert len(found) == count, _said(kind, f"attack_single_run gives {len(found)} things, not {count}")
    adversarial = found[3 if kind == "APGD" else 1]
    assert adversarial.shape == images.shape, _said(kind, "attack_single_run gives no images in their place")
