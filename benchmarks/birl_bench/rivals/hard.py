"""Packages for temperature zero, an easier problem: QuantEcon and mdpsolver; where installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from birl_bench.harness import Answer, Candidate
from birl_bench.workloads import DenseProblem, GridProblem

__all__ = ["dense", "sparse"]

EPSILON = 1e-4
"""Error that both are asked for, in units of value."""
SWEEPS = 20
"""Of modified policy iteration between two improvements."""


def dense(problem: DenseProblem, lists: str) -> list[Candidate]:
    """Dense MDPs, one model each; `lists` says why P is not turned into Python lists."""
    where = "" if problem.device.type == "cpu" else "runs on the CPU only"
    return [
        Candidate(
            f"quantecon {method}",
            f"QuantEcon, {method.replace('_', ' ')}",
            functools.partial(_quantecon_dense, problem, method),
            _read_quantecon,
            solves="hard",
            needs=("quantecon",),
            excuse=where,
            compiles=True,
        )
        for method in ("modified_policy_iteration", "policy_iteration")
    ] + [
        Candidate(
            "mdpsolver",
            "mdpsolver, modified policy iteration",
            lambda: _mdpsolver(*_dense_lists(problem)),
            _read_mdpsolver,
            solves="hard",
            needs=("mdpsolver",),
            once=True,  # a second solve begins at the solution of the first
            excuse=where or lists,
        ),
    ]


def sparse(problem: GridProblem, *, slow: str, lists: str) -> list[Candidate]:
    """One sparse MDP; `slow` says why QuantEcon is left out, `lists` the same for mdpsolver."""
    where = "" if problem.device.type == "cpu" else "runs on the CPU only"
    return [
        Candidate(
            "quantecon modified_policy_iteration",
            "QuantEcon, modified policy iteration",
            lambda: _quantecon([_sparse_model(problem)], "modified_policy_iteration"),
            _read_quantecon,
            solves="hard",
            needs=("quantecon", "scipy"),
            excuse=where or slow,
            compiles=True,
        ),
        Candidate(
            "mdpsolver",
            "mdpsolver, modified policy iteration",
            lambda: _mdpsolver(*_sparse_lists(problem)),
            _read_mdpsolver,
            solves="hard",
            needs=("mdpsolver",),
            once=True,  # a second solve begins at the solution of the first
            excuse=where or lists,
        ),
    ]


# QuantEcon


def _quantecon_dense(problem: DenseProblem, method: str) -> Callable[[], Any]:
    return _quantecon(_models(problem), method)


def _models(problem: DenseProblem) -> list[Any]:
    from quantecon.markov import DiscreteDP

    pairs = zip(problem.reward.double(), problem.transition.double(), strict=True)
    return [DiscreteDP(reward.numpy(), rows.numpy(), problem.discount) for reward, rows in pairs]


def _sparse_model(problem: GridProblem) -> Any:
    import numpy as np
    from quantecon.markov import DiscreteDP
    from scipy.sparse import csr_matrix

    matrix, (states, actions) = problem.csr, problem.reward.shape
    parts = (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    rows = csr_matrix(tuple(part.numpy() for part in parts), shape=tuple(matrix.shape))
    index = np.repeat(np.arange(states), actions), np.tile(np.arange(actions), states)
    return DiscreteDP(problem.reward.flatten().numpy(), rows, problem.discount, *index)


def _quantecon(models: list[Any], method: str) -> Callable[[], Any]:
    keywords = {"epsilon": EPSILON, "k": SWEEPS} if method.startswith("modified") else {}
    return lambda: [model.solve(method=method, **keywords).v for model in models]


def _read_quantecon(values: Any) -> Answer:
    return Answer({"value": torch.stack([torch.from_numpy(value) for value in values])})


# mdpsolver


def _mdpsolver(models: list[Any], states: int) -> Callable[[], Any]:
    parallel = states > 100  # threads for a handful of states only cost

    def run() -> list[Any]:
        for model in models:
            model.solve(algorithm="mpi", tolerance=EPSILON, postProcessing=False, parallel=parallel)
        return models

    return run


def _dense_lists(problem: DenseProblem) -> tuple[list[Any], int]:
    """The non-zero entries of each row: what that package is best at."""
    models = []
    for reward, rows in zip(problem.reward, problem.transition, strict=True):
        columns = [[row.nonzero()[:, 0].tolist() for row in state] for state in rows]
        entries = [[row[row > 0].tolist() for row in state] for state in rows.double()]
        models.append(_model(problem.discount, reward.tolist(), entries, columns))
    return models, problem.shape[1]


def _sparse_lists(problem: GridProblem) -> tuple[list[Any], int]:
    matrix, (states, actions) = problem.csr, problem.reward.shape
    crow, values = matrix.crow_indices().tolist(), matrix.values().tolist()
    col = matrix.col_indices().tolist()

    def nested(flat: list[Any]) -> list[list[list[Any]]]:
        rows = [flat[crow[i] : crow[i + 1]] for i in range(states * actions)]
        return [rows[s * actions : (s + 1) * actions] for s in range(states)]

    model = _model(problem.discount, problem.reward.tolist(), nested(values), nested(col))
    return [model], states


def _model(discount: float, reward: Any, entries: Any, columns: Any) -> Any:
    import mdpsolver

    model = mdpsolver.model()
    model.mdp(discount=discount, rewards=reward, tranMatProbs=entries, tranMatColumns=columns)
    return model


def _read_mdpsolver(models: Any) -> Answer:
    return Answer({"value": torch.tensor([model.getValueVector() for model in models])})
