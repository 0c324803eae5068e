"""Runs: the run directory, metrics, checkpoint and resume, progress, figures.

Importing this package imports neither torch nor any optional package.
"""

from birl_ext.runs.job import Job, Problem, State

__all__ = ["Job", "Problem", "State"]
