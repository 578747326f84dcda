"""Other ways to a robust ensemble: losses for anybody's loop, which `python -m immunity_fast.train --ensemble` uses."""

from immunity_fast.peers.adp import ADPLoss
from immunity_fast.peers.base import EnsembleLoss
from immunity_fast.peers.boosting import BARRELoss, MRBoostLoss
from immunity_fast.peers.dverge import DVERGELoss, distilled
from immunity_fast.peers.gal import GALLoss
from immunity_fast.peers.hrs import HRSLoss
from immunity_fast.peers.methods import METHODS, method_of
from immunity_fast.peers.plain import PlainLoss
from immunity_fast.peers.rse import RSELoss
from immunity_fast.peers.trs import TRSLoss

__all__ = [
    "METHODS",
    "ADPLoss",
    "BARRELoss",
    "DVERGELoss",
    "EnsembleLoss",
    "GALLoss",
    "HRSLoss",
    "MRBoostLoss",
    "PlainLoss",
    "RSELoss",
    "TRSLoss",
    "distilled",
    "method_of",
]
