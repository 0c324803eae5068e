"""Benchmark problems with published numbers, one per file; each is a job that `birl run` runs."""

from birl_ext.arena.config import ArenaConfig
from birl_ext.problems.adaptation import AdaptationConfig, AdaptationJob
from birl_ext.problems.bus import BusConfig, BusJob
from birl_ext.problems.four_rooms import FourRoomsConfig, FourRoomsJob
from birl_ext.problems.preference.config import PreferenceConfig
from birl_ext.problems.random_mdp import RandomMDPConfig, RandomMDPJob
from birl_ext.problems.taxes import TaxesConfig, TaxesJob
from birl_ext.runs.job import Job, Problem

__all__ = ["PROBLEMS"]


def _preference(config: PreferenceConfig) -> Job:
    """Gymnasium is imported only by those who run it."""
    from birl_ext.problems.preference.job import PreferenceJob

    return PreferenceJob(config)


def _arena(config: ArenaConfig) -> Job:
    """The contests are imported only by those who play them."""
    from birl_ext.arena.job import ArenaJob
    from birl_ext.problems.contests import CONTESTS

    return ArenaJob(config, CONTESTS)


PROBLEMS = {
    "random-mdp": Problem(
        RandomMDPConfig, RandomMDPJob, "a random MDP with a quadratic reward model; known optimum"
    ),
    "four-rooms": Problem(
        FourRoomsConfig, FourRoomsJob, "incentives that lead a walker through four rooms"
    ),
    "taxes": Problem(
        TaxesConfig, TaxesJob, "taxes that move the income, and the assets, of those who pay them"
    ),
    "adaptation": Problem(
        AdaptationConfig,
        AdaptationJob,
        "an arm designed for its motor, whose controller learns to use it",
    ),
    "preference": Problem(
        PreferenceConfig,
        _preference,
        "a reward learned from preferences in a Gymnasium environment",
    ),
    "arena": Problem(ArenaConfig, _arena, "every bilevel method on one problem, at equal budgets"),
    "bus": Problem(BusConfig, BusJob, "bus engine replacement, estimated from real decisions"),
}
