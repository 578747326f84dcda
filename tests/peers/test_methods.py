"""The text that names a way to train an ensemble: what it may say, and one clear line on what it may not."""

from __future__ import annotations

import pytest

from immunity_fast.peers import method_of
from immunity_fast.peers.adp import ADPLoss
from immunity_fast.training.config import TrainConfig


def test_settings_are_as_they_are_written() -> None:
    method = method_of("adp:alpha=1,beta=1/5")
    assert isinstance(method, ADPLoss)
    assert (method.alpha, method.beta) == (1.0, 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ADP", "expected one of immunity, plain, .*, got ADP"),
        ("adp:alpha=1,alpha=2", "expected each setting of adp once, got another alpha=2"),
        ("adp:beta=", "expected a number for beta, got nothing"),
        ("adp:alpha=1,", "expected adp with alpha=…, beta=…, got nothing"),
        ("adp:alpha=nan", "adp: alpha: expected a finite number of at least 0, got nan"),
        ("adp:alpha=1/0", "expected a number for alpha, got 1/0"),
        ("gal:foo=1", "expected gal with weight=…, got foo=1"),
        ("plain:x=1", "expected plain with no settings, got x=1"),
        ("trs:steps=1.5", "expected a whole number for steps, got 1.5"),
        ("mrboost:warm_start=1", "expected warm_start=true or warm_start=false, got warm_start=1"),
    ],
)
def test_each_mistake_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ensemble: {message}$"):
        method_of(text)


@pytest.mark.parametrize("name", ["adp", "gal", "trs", "dverge", "mrboost", "barre", "hrs"])
def test_what_compares_experts_is_not_done_with_one(name: str) -> None:
    with pytest.raises(ValueError, match=r"^--experts: expected .*, got 1$"):
        TrainConfig(ensemble=name, experts=1)
