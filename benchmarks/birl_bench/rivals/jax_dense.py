"""JAX on the CPU: value iteration in a while loop, optimistix and jaxopt; where installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from birl_bench.harness import Answer, Candidate
from birl_bench.workloads import DenseProblem

__all__ = ["SOLVERS", "forward", "gradient", "solver", "to_torch"]

SWEEPS = 20_000
"""Most of jaxopt's."""
SOLVERS = {
    "jax": ("JAX while_loop value iteration", ("jax",)),
    "optimistix": ("optimistix Newton", ("jax", "optimistix")),
    "jaxopt": ("jaxopt fixed-point iteration", ("jax", "jaxopt")),
}
"""Key → name and packages. A while loop has no reverse mode; the two others are implicit."""


def forward(problem: DenseProblem, tol: float) -> list[Candidate]:
    """Those who find V*."""
    return [
        Candidate(
            key,
            name,
            functools.partial(_prepare, key, problem, tol, False),
            lambda found: Answer({"value": to_torch(found)}),
            needs=needs,
            excuse=_excuse(problem),
            compiles=True,
        )
        for key, (name, needs) in SOLVERS.items()
    ]


def gradient(problem: DenseProblem, tol: float) -> list[Candidate]:
    """Those who also differentiate Σ w·V* with respect to r and P."""
    return [
        Candidate(
            key,
            f"{name} and its adjoint",
            functools.partial(_prepare, key, problem, tol, True),
            _read,
            needs=needs,
            excuse=_excuse(problem),
            compiles=True,
        )
        for key, (name, needs) in SOLVERS.items()
        if key != "jax"
    ]


def _excuse(problem: DenseProblem) -> str:
    return "" if problem.device.type == "cpu" else "JAX is measured on the CPU only"


def _prepare(key: str, problem: DenseProblem, tol: float, gradient: bool) -> Callable[[], Any]:
    import jax

    jax.config.update("jax_enable_x64", True)
    find = functools.partial(solver, key, problem.discount, problem.temperature, tol)

    def solve_all(reward: Any, transition: Any) -> Any:
        if reward.shape[0] == 1:  # XLA multiplies a batch of one many times slower
            return find(reward[0], transition[0])[None]
        return jax.vmap(find)(reward, transition)

    def loss(reward: Any, transition: Any, weight: Any) -> Any:
        value = solve_all(reward, transition)
        return (weight * value).sum(), value

    arrays = [jax.numpy.asarray(t.numpy()) for t in (problem.reward, problem.transition)]
    if gradient:
        arrays.append(jax.numpy.asarray(problem.weight.numpy()))
        function = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    else:
        function = jax.jit(solve_all)
    return lambda: jax.block_until_ready(function(*arrays))


def solver(
    key: str, discount: float, temperature: float, tol: float, reward: Any, transition: Any
) -> Any:
    """V* of one MDP, (S,), by the library named."""
    import jax
    import jax.numpy as jnp

    def image(value: Any, data: Any) -> Any:
        reward, transition = data
        q = reward + discount * jnp.einsum("sat,t->sa", transition, value)
        return temperature * jax.scipy.special.logsumexp(q / temperature, axis=-1)

    data = reward, transition
    start = jnp.zeros(reward.shape[0], reward.dtype)
    # values are of the order 1/(1 − γ); below that a float32 residual does not fall
    absolute = tol / (1 - discount)
    if key == "optimistix":
        import optimistix

        newton = optimistix.Newton(rtol=tol, atol=absolute)
        return optimistix.fixed_point(image, newton, start, data, throw=False).value
    if key == "jaxopt":
        import jaxopt

        # its default, conjugate gradients on the normal equations, to the tolerance of the rest
        adjoint = functools.partial(jaxopt.linear_solve.solve_normal_cg, tol=tol)
        iteration = jaxopt.FixedPointIteration(
            image, maxiter=SWEEPS, tol=absolute, implicit_diff_solve=adjoint
        )
        return iteration.run(start, data).params

    def unfinished(state: Any) -> Any:
        value, moved = state
        return moved > tol * jnp.abs(value).max()

    def advance(state: Any) -> Any:
        value, _ = state
        new = image(value, data)
        return new, jnp.abs(new - value).max()

    value, _ = jax.lax.while_loop(unfinished, advance, (start, jnp.asarray(jnp.inf, start.dtype)))
    return value


def to_torch(array: Any) -> Tensor:
    """A copy of a JAX or numpy array as a tensor."""
    import numpy as np

    return torch.from_numpy(np.array(array))


def _read(result: Any) -> Answer:
    (_, value), (grad_reward, grad_transition) = result
    found = {"value": value, "grad_reward": grad_reward, "grad_transition": grad_transition}
    return Answer({name: to_torch(array) for name, array in found.items()})
