"""What M-SoBiRL is compared with, where the model is known and where paths are drawn."""

from birl_ext.bilevel.rivals.amd import AMD
from birl_ext.bilevel.rivals.bchg import BCHG
from birl_ext.bilevel.rivals.hpgd import HPGD
from birl_ext.bilevel.rivals.no_response import NoResponse
from birl_ext.bilevel.rivals.penalty import BellmanPenalty, PenaltyOutcome, ValuePenalty
from birl_ext.bilevel.rivals.sampled_zero_order import SampledZeroOrder
from birl_ext.bilevel.rivals.unrolled import Unrolled

__all__ = [
    "AMD",
    "BCHG",
    "HPGD",
    "BellmanPenalty",
    "NoResponse",
    "PenaltyOutcome",
    "SampledZeroOrder",
    "Unrolled",
    "ValuePenalty",
]
