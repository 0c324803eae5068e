"""Other methods of bilevel reinforcement learning, with the interface of ours."""

from birl_ext.bilevel.rivals.amd import AMD
from birl_ext.bilevel.rivals.no_response import NoResponse
from birl_ext.bilevel.rivals.penalty import BellmanPenalty, PenaltyOutcome, ValuePenalty
from birl_ext.bilevel.rivals.unrolled import Unrolled

__all__ = [
    "AMD",
    "BellmanPenalty",
    "NoResponse",
    "PenaltyOutcome",
    "Unrolled",
    "ValuePenalty",
]
