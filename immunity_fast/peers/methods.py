"""Which ways to train an ensemble there are, and the text that names one with its settings: `adp:alpha=2,beta=0.5`."""

from __future__ import annotations

import inspect
from typing import Any

from immunity_fast.peers.adp import ADPLoss
from immunity_fast.peers.base import EnsembleLoss
from immunity_fast.peers.boosting import BARRELoss, MRBoostLoss
from immunity_fast.peers.dverge import DVERGELoss
from immunity_fast.peers.gal import GALLoss
from immunity_fast.peers.hrs import HRSLoss
from immunity_fast.peers.plain import PlainLoss
from immunity_fast.peers.rse import RSELoss
from immunity_fast.peers.trs import TRSLoss

IMMUNITY = "immunity"  # whose loss is `FusedImmunityLoss`
PEERS: dict[str, type[EnsembleLoss]] = {
    "plain": PlainLoss,
    "adp": ADPLoss,
    "gal": GALLoss,
    "trs": TRSLoss,
    "dverge": DVERGELoss,
    "mrboost": MRBoostLoss,
    "barre": BARRELoss,
    "hrs": HRSLoss,
    "rse": RSELoss,
}
METHODS: tuple[str, ...] = (IMMUNITY, *PEERS)
_SHARED = frozenset(inspect.signature(EnsembleLoss).parameters)  # of cross-entropy, which a training sets itself


def method_of(text: str, **shared: Any) -> EnsembleLoss | None:
    """The loss that a text names; None is the package's own, `FusedImmunityLoss`.

    Args:
        text: NAME, or NAME:setting=number,….
        shared: what every `EnsembleLoss` takes.

    Raises:
        ValueError: there is no such method or setting, or a value is out of its range.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"ensemble: expected one of {', '.join(METHODS)}, got {text}")
    known = settings_of(name)
    settings: dict[str, Any] = {}
    for part in rest.split(",") if rest else ():
        setting, equals, value = part.partition("=")
        if not equals or setting not in known:
            named = ", ".join(f"{each}=…" for each in known) or "no settings"
            raise ValueError(f"ensemble: expected {name} with {named}, got {part or 'nothing'}")
        if setting in settings:
            raise ValueError(f"ensemble: expected each setting of {name} once, got another {part}")
        settings[setting] = _value(setting, value, known[setting])
    if name == IMMUNITY:
        return None
    try:
        return PEERS[name](**settings, **shared)
    except (ValueError, TypeError) as error:
        raise ValueError(f"ensemble: {name}: {error}") from error


def settings_of(name: str) -> dict[str, Any]:
    """The settings of a method of this name, and their defaults."""
    if name == IMMUNITY:
        return {}
    parameters = inspect.signature(PEERS[name]).parameters
    own = (each for each in parameters.values() if each.kind is not each.VAR_KEYWORD)
    return {each.name: each.default for each in own if each.name not in _SHARED}


def _value(name: str, text: str, default: Any) -> Any:
    """A setting as its default is: a number, whole or not, whether or not, or a word."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(f"ensemble: expected {name}=true or {name}=false, got {name}={text}")
        return text == "true"
    if isinstance(default, str):
        return text
    kind = int if isinstance(default, int) else float
    try:
        if kind is float and "/" in text:
            above, _, below = text.partition("/")
            return float(above) / float(below)
        return kind(text)
    except (ValueError, ZeroDivisionError):
        expected = "a whole number" if kind is int else "a number"
        raise ValueError(f"ensemble: expected {expected} for {name}, got {text or 'nothing'}") from None
