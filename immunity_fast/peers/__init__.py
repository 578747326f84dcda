"""Other ways to a robust ensemble: losses for anybody's loop, which `python -m immunity_fast.train --ensemble` uses."""

from immunity_fast.peers.base import EnsembleLoss
from immunity_fast.peers.boosting import BARRELoss, MRBoostLoss
from immunity_fast.peers.hrs import HRSLoss
from immunity_fast.peers.methods import METHODS, method_of
from immunity_fast.peers.plain import PlainLoss

__all__ = ["METHODS", "BARRELoss", "EnsembleLoss", "HRSLoss", "MRBoostLoss", "PlainLoss", "method_of"]
