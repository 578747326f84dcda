"""Other ways to a robust ensemble: losses for anybody's loop, which `python -m immunity_fast.train --ensemble` uses."""

from immunity_fast.peers.base import EnsembleLoss
from immunity_fast.peers.methods import METHODS, method_of
from immunity_fast.peers.plain import PlainLoss
from immunity_fast.peers.rse import RSELoss

__all__ = ["METHODS", "EnsembleLoss", "PlainLoss", "RSELoss", "method_of"]
