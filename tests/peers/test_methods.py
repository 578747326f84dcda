"""The text that names a way to train an ensemble: what it may say, one clear line on what it may not, and its table."""

from __future__ import annotations

import re
from typing import Any

import pytest

from immunity_fast.peers import method_of
from immunity_fast.peers.adp import ADPLoss
from immunity_fast.peers.methods import IMMUNITY, METHODS, PEERS, settings_of
from immunity_fast.training.config import TrainConfig
from tests.places import REPOSITORY


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


def _rows() -> dict[str, list[str]]:
    """The cells of the table in docs/training.md, by the method."""
    page = (REPOSITORY / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.split("\n## Other ensembles\n")[1].split("\n## ")[0]
    lines = section.split("| `--ensemble` |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def test_the_documentation_has_each_method_once_in_order() -> None:
    assert tuple(_rows()) == METHODS


def test_the_documentation_has_the_settings_and_their_defaults() -> None:
    for name, (_, settings, gate, _) in _rows().items():
        known = settings_of(name)
        written = dict(part.split("=", 1) for part in re.findall(r"`(\w+=[^`]*)`", settings))
        assert list(written) == list(known), name
        assert known or settings == "none", name
        expected: Any = "switch" if name == IMMUNITY else PEERS[name].gate
        if name != "rse":  # one network, without a gate
            assert gate.split()[0].strip("`,") == expected, name
        text = ",".join(f"{each}={value}" for each, value in written.items() if value)
        method = method_of(name + ":" * bool(text) + text)
        default = method_of(name)
        for each in known:
            if hasattr(default, each):
                assert getattr(method, each) == getattr(default, each), f"{name}: {each}"
            shown = {True: "true", False: "false"}.get(known[each]) if isinstance(known[each], bool) else known[each]
            same = written[each] == shown if isinstance(shown, str) else float(written[each]) == shown
            assert same, f"{name}: {each}={written[each]}, which is {known[each]}"
