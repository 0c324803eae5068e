"""What else could solve the problem: birl_ext and its competitors as candidates.

The PyTorch competitors are what a user writes, and what an expert writes. They stop at V, where
birl_ext also returns Q, π, log π and a certificate; they stop when the residual is small, where
birl_ext certifies the error. Both favour them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from harness import Answer, Candidate, Problem
from torch import Tensor
from workloads import policy_system

import birl_ext

__all__ = [
    "BLOCK",
    "CAP",
    "Step",
    "bellman",
    "compiled_step",
    "forward",
    "gradient",
    "midpoint",
    "newton",
    "plain",
]

CAP = 100_000
"""Most sweeps of a loop."""
STEPS = 60
"""Most steps of Newton's method."""
BLOCK = 10
"""Sweeps of plain value iteration in one compiled call."""

Step = Callable[..., tuple[Tensor, Tensor]]


def forward(tol: float, *, span_block: int, list_input: bool = True) -> list[Candidate]:
    """Everyone who finds V*; ours first.

    Args:
        tol: relative: certified error of ours, residual of the others.
        span_block: sweeps of the expert's loop in one compiled call.
        list_input: whether P is small enough for mdpsolver, which takes Python lists.
    """
    lists = "" if list_input else "its input is nested Python lists, gigabytes for this P"
    return [
        Candidate("birl_ext.solve", _ours(tol), _read_ours),
        Candidate("birl_ext.solve, to rounding", _ours(None), _read_ours),
        Candidate("read P once (the floor)", _read, solves="nothing"),
        Candidate("PyTorch value iteration", _loop(plain, 1, tol)),
        Candidate(
            f"torch.compile, {BLOCK} sweeps a call", _loop(plain, BLOCK, tol, True), compiles=True
        ),
        Candidate(
            "expert: torch.compile, midpoint and span",
            _loop(midpoint, span_block, tol, True),
            compiles=True,
        ),
        Candidate("PyTorch Newton, linalg.solve", newton(tol)),
        *_jax(tol, False),
        Candidate(
            "QuantEcon, modified policy iteration",
            _quantecon,
            read=_read_quantecon,
            solves="hard",
            needs=("quantecon",),
            compiles=True,
        ),
        Candidate(
            "mdpsolver, modified policy iteration",
            _mdpsolver,
            read=_read_mdpsolver,
            solves="hard",
            needs=("mdpsolver",),
            excuse=lists,
        ),
    ]


def gradient(tol: float, *, span_block: int) -> list[Candidate]:
    """Everyone who finds V* and the gradient of Σ w·V* with respect to r and P; ours first."""
    return [
        Candidate("birl_ext.solve and backward", _ours_gradient(tol)),
        Candidate("birl_ext.solve and backward, to rounding", _ours_gradient(None)),
        Candidate("PyTorch value iteration, unrolled", _unrolled(tol)),
        Candidate("PyTorch value iteration, implicit by hand", _implicit(_loop(plain, 1, tol))),
        Candidate(
            "expert: torch.compile, midpoint and span, implicit by hand",
            _implicit(_loop(midpoint, span_block, tol, True)),
            compiles=True,
        ),
        Candidate("PyTorch Newton, implicit by hand", _implicit(newton(tol))),
        *_jax(tol, True),
    ]


# Ours


def _ours(tol: float | None) -> Callable[[Problem], Callable[[], Any]]:
    def prepare(problem: Problem) -> Callable[[], birl_ext.Solution]:
        return lambda: birl_ext.solve(
            problem.reward,
            problem.transition,
            discount=problem.discount,
            temperature=problem.temperature,
            tol=tol,
        )

    return prepare


def _ours_gradient(tol: float | None) -> Callable[[Problem], Callable[[], Any]]:
    def prepare(problem: Problem) -> Callable[[], Answer]:
        reward = problem.reward.clone().requires_grad_()
        transition = problem.transition.clone().requires_grad_()

        def run() -> Answer:
            solution = birl_ext.solve(
                reward,
                transition,
                discount=problem.discount,
                temperature=problem.temperature,
                tol=tol,
            )
            loss = (problem.weight * solution.value).sum()
            return _answer(solution.value, torch.autograd.grad(loss, (reward, transition)))

        return run

    return prepare


def _read_ours(solution: birl_ext.Solution) -> Answer:
    return Answer({"value": solution.value}, float(solution.iterations.double().mean()))


def _answer(value: Tensor, gradients: tuple[Tensor, ...]) -> Answer:
    return Answer({"value": value, "grad_reward": gradients[0], "grad_transition": gradients[1]})


def _read(problem: Problem) -> Callable[[], Answer]:
    def run() -> Answer:
        problem.transition.sum()
        return Answer({}, 1.0)

    return run


# PyTorch


def bellman(
    value: Tensor, reward: Tensor, transition: Tensor, discount: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """TV and Q."""
    q = reward + discount * torch.einsum("bsat,bt->bsa", transition, value)
    return temperature * torch.logsumexp(q / temperature, -1), q


def plain(value: Tensor, *data: Any, sweeps: int) -> tuple[Tensor, Tensor]:
    """V after some sweeps, and max |TV − V| of the last."""
    image = value
    for _ in range(sweeps):
        value = image
        image, _ = bellman(value, *data)
    return image, (image - value).abs().amax()


def midpoint(
    value: Tensor,
    reward: Tensor,
    transition: Tensor,
    discount: float,
    temperature: float,
    *,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """The same with the constant mode deflated: V ← TV + γ/(1−γ)·mid(TV − V); half-span (M6)."""
    for _ in range(sweeps):
        image, _ = bellman(value, reward, transition, discount, temperature)
        low, high = (image - value).aminmax(dim=-1, keepdim=True)
        value = image + discount / (1 - discount) * (low + high) / 2
    return value, (high - low).amax() / 2


def _loop(
    step: Step, sweeps: int, tol: float, compiled: bool = False
) -> Callable[[Problem], Callable[[], Answer]]:
    """Repeat a step until its residual is at most tol·max |V|."""

    def prepare(problem: Problem) -> Callable[[], Answer]:
        repeated = compiled_step if compiled else functools.partial
        advance = repeated(step, sweeps=sweeps)
        data = problem.reward, problem.transition, problem.discount, problem.temperature

        def run() -> Answer:
            value = torch.zeros_like(problem.reward[..., 0])
            for done in itertools.count(sweeps, sweeps):
                value, residual = advance(value, *data)
                if done >= CAP or bool(residual <= tol * value.abs().max()):
                    return Answer({"value": value}, done)
            raise AssertionError

        return run

    return prepare


@functools.cache
def compiled_step(step: Step, sweeps: int) -> Step:
    return torch.compile(functools.partial(step, sweeps=sweeps), dynamic=False)


def newton(tol: float) -> Callable[[Problem], Callable[[], Answer]]:
    """V ← V + (I − γP_π)⁻¹(TV − V) (M9), all of the batch in step."""

    def prepare(problem: Problem) -> Callable[[], Answer]:
        data = problem.reward, problem.transition, problem.discount, problem.temperature

        def run() -> Answer:
            value = torch.zeros_like(problem.reward[..., 0])
            for done in range(1, STEPS + 1):  # noqa: B007 (the number of passes is the answer)
                image, q = bellman(value, *data)
                low, high = (image - value).aminmax(dim=-1, keepdim=True)
                if bool((high - low).amax() / 2 <= tol * image.abs().max()):
                    break
                policy = torch.softmax(q / problem.temperature, -1)
                system = policy_system(policy, problem.transition, problem.discount)
                value = value + torch.linalg.solve(system, image - value)
            shift = problem.discount / (1 - problem.discount) * (low + high) / 2
            return Answer({"value": image + shift}, done)

        return run

    return prepare


def _implicit(
    solver: Callable[[Problem], Callable[[], Answer]],
) -> Callable[[Problem], Callable[[], Answer]]:
    """A solver and the implicit function theorem by hand (M12), with one linear solve."""

    def prepare(problem: Problem) -> Callable[[], Answer]:
        solve = solver(problem)
        data = problem.reward, problem.transition, problem.discount, problem.temperature

        def run() -> Answer:
            value = solve().tensors["value"]
            _, q = bellman(value, *data)
            policy = torch.softmax(q / problem.temperature, -1)
            system = policy_system(policy, problem.transition, problem.discount)
            visits = torch.linalg.solve(system.mT, problem.weight).unsqueeze(-1) * policy
            outer = problem.discount * visits.unsqueeze(-1) * value[:, None, None, :]
            return _answer(value, (visits, outer))

        return run

    return prepare


def _unrolled(tol: float) -> Callable[[Problem], Callable[[], Answer]]:
    """Autograd through every sweep of plain value iteration."""

    def prepare(problem: Problem) -> Callable[[], Answer]:
        reward = problem.reward.clone().requires_grad_()
        transition = problem.transition.clone().requires_grad_()

        def run() -> Answer:
            value = torch.zeros_like(problem.weight)
            for _ in range(CAP):
                image, _ = bellman(value, reward, transition, problem.discount, problem.temperature)
                residual = (image - value).detach().abs().max()
                value = image
                if bool(residual <= tol * value.detach().abs().max()):
                    break
            loss = (problem.weight * value).sum()
            return _answer(value, torch.autograd.grad(loss, (reward, transition)))

        return run

    return prepare


# JAX, where installed


def _jax(tol: float, gradient: bool) -> list[Candidate]:
    names = {"optimistix": "optimistix Newton", "jaxopt": "jaxopt fixed-point iteration"}
    return [
        Candidate(
            name + (" and its adjoint" if gradient else ""),
            functools.partial(_prepare_jax, package, tol, gradient),
            read=functools.partial(_read_jax, gradient),
            needs=("jax", package),
            compiles=True,
        )
        for package, name in names.items()
    ]


def _prepare_jax(package: str, tol: float, gradient: bool, problem: Problem) -> Callable[[], Any]:
    import jax

    jax.config.update("jax_enable_x64", True)
    function = _jitted(package, tol, gradient, problem.discount, problem.temperature)
    tensors = (problem.reward, problem.transition, problem.weight)
    arrays = [jax.numpy.asarray(tensor.numpy()) for tensor in tensors]
    return lambda: jax.block_until_ready(function(*arrays))


@functools.cache
def _jitted(package: str, tol: float, gradient: bool, discount: float, temperature: float) -> Any:
    import jax
    import jax.numpy as jnp

    def image(value: Any, data: Any) -> Any:
        reward, transition = data
        q = reward + discount * jnp.einsum("sat,t->sa", transition, value)
        return temperature * jax.scipy.special.logsumexp(q / temperature, axis=-1)

    def solve(reward: Any, transition: Any) -> Any:
        start = jnp.zeros(reward.shape[0], reward.dtype)
        # values are of the order 1/(1 − γ); below that a float32 residual does not fall
        absolute = tol / (1 - discount)
        if package == "optimistix":
            import optimistix

            solver = optimistix.Newton(rtol=tol, atol=absolute)
            return optimistix.fixed_point(
                image, solver, start, (reward, transition), throw=False
            ).value
        import jaxopt

        solver = jaxopt.FixedPointIteration(image, maxiter=1000, tol=absolute)
        return solver.run(start, (reward, transition)).params

    def solve_all(reward: Any, transition: Any) -> Any:
        if reward.shape[0] == 1:  # XLA multiplies a batch of one many times slower
            return solve(reward[0], transition[0])[None]
        return jax.vmap(solve)(reward, transition)

    def loss(reward: Any, transition: Any, weight: Any) -> Any:
        value = solve_all(reward, transition)
        return (weight * value).sum(), value

    if gradient:
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    return jax.jit(lambda reward, transition, weight: solve_all(reward, transition))


def _read_jax(gradient: bool, result: Any) -> Answer:
    import numpy as np

    def tensor(array: Any) -> Tensor:
        return torch.from_numpy(np.array(array))

    if not gradient:
        return Answer({"value": tensor(result)})
    (_, value), gradients = result
    return _answer(tensor(value), tuple(tensor(one) for one in gradients))


# Packages for temperature zero, where installed


def _quantecon(problem: Problem) -> Callable[[], Any]:
    from quantecon.markov import DiscreteDP

    models = [
        DiscreteDP(reward.numpy(), rows.numpy(), problem.discount)
        for reward, rows in zip(problem.reward.double(), problem.transition.double(), strict=True)
    ]
    return lambda: [
        model.solve(method="modified_policy_iteration", epsilon=1e-4, k=20).v for model in models
    ]


def _read_quantecon(values: Any) -> Answer:
    return Answer({"value": torch.stack([torch.from_numpy(value) for value in values])})


def _mdpsolver(problem: Problem) -> Callable[[], Any]:
    import mdpsolver

    models = []
    for reward, rows in zip(problem.reward, problem.transition, strict=True):
        columns = [[row.nonzero()[:, 0].tolist() for row in state] for state in rows]
        entries = [[row[row > 0].tolist() for row in state] for state in rows.double()]
        model = mdpsolver.model()
        model.mdp(
            discount=problem.discount,
            rewards=reward.tolist(),
            tranMatProbs=entries,
            tranMatColumns=columns,
        )
        models.append(model)

    parallel = problem.reward.shape[1] > 100  # threads for a handful of states only cost

    def run() -> list[Any]:
        for model in models:
            model.solve(algorithm="mpi", tolerance=1e-4, postProcessing=False, parallel=parallel)
        return models

    return run


def _read_mdpsolver(models: Any) -> Answer:
    return Answer({"value": torch.tensor([model.getValueVector() for model in models])})
