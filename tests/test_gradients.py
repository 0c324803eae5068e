"""First derivatives, proved four ways: adjoint and differences in 512 bits, unrolled autograd, and
gradcheck of every op in both modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import SMALL, Case, problems
from closeness import assert_close
from flint import arb
from oracle import exact
from oracle.exact import Cotangents, Model
from torch import Tensor
from torch.autograd import gradcheck

import birl_ext
from birl_ext.model.mdp import DenseMDP, SparseMDP
from birl_ext.ops import policy_solve
from birl_ext.ops.backends import choice
from birl_ext.ops.bellman import bellman as bellman_op
from birl_ext.ops.request import NATIVE, TORCH, Data, Settings
from birl_ext.ops.solve import solve as solve_op
from birl_ext.options import BackendName
from birl_ext.solution import Solution

# forward mode makes torch load decompositions that it still scripts
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

BACKENDS: list[BackendName] = ["torch"] if choice.unavailable("cpu") else ["torch", "cpu"]
CODES = {"torch": TORCH, "cpu": NATIVE}


class Draw(NamedTuple):
    """Fifty random MDPs of one size, as leaves, with the cotangents of a linear objective."""

    leaves: dict[str, Tensor]
    mask: Tensor | None
    terminal: Tensor | None
    cotangents: dict[str, Tensor]

    def mdp(self) -> DenseMDP:
        return DenseMDP(
            self.leaves["reward"],
            self.leaves["transition"],
            self.leaves["discount"],
            mask=self.mask,
            terminal=self.terminal,
            reference=self.leaves.get("reference"),
        )

    def objective(self, outputs: Any) -> Tensor:
        """Σ cV·V + Σ cQ·Q + Σ cπ·π + Σ cl·log π over available actions."""
        total = torch.zeros((), dtype=torch.float64)
        for name, weight in self.cotangents.items():
            term = weight * getattr(outputs, name)
            if self.mask is not None and name != "value":
                term = term.where(self.mask, 0.0)
            total = total + term.sum()
        return total

    def arguments(self, index: int) -> dict[str, Any]:
        """One problem as keyword arguments of the oracles."""
        own: dict[str, Any] = {
            name: leaf[index].detach().numpy() for name, leaf in self.leaves.items()
        }
        for name, flags in (("mask", self.mask), ("terminal", self.terminal)):
            own[name] = None if flags is None else flags[index].numpy()
        return {**own, "discount": float(own["discount"]), "temperature": float(own["temperature"])}


def draw(chunk: int, count: int = 50) -> Draw:
    """Seeded by the chunk: 1 − γ from 1e-4 to 0.5 and τ from 1e-3 to 10, both log-uniform.

    A quarter of the chunks is plain, a quarter has a reference, a quarter masks and terminals, a
    quarter everything; every other problem has sparse rows.
    """
    rng = np.random.default_rng([2024, chunk])
    states, actions = 2 + chunk % 5, 2 + chunk % 3
    reward = rng.normal(size=(count, states, actions))
    transition = rng.dirichlet(np.ones(states), size=(count, states, actions))
    transition[::2] = rng.dirichlet(np.full(states, 0.2), size=transition[::2].shape[:-1])
    transition[transition < 1e-6] = 0.0
    transition /= transition.sum(-1, keepdims=True)
    arrays = {
        "reward": reward,
        "transition": transition,
        "discount": 1 - 10 ** rng.uniform(-4, np.log10(0.5), size=count),
        "temperature": 10 ** rng.uniform(-3, 1, size=count),
    }
    mask = terminal = None
    if chunk % 4 in (1, 3):
        arrays["reference"] = rng.uniform(0.1, 1.0, size=reward.shape)
    if chunk % 4 in (2, 3):
        mask = rng.random(reward.shape) < 0.7
        mask |= np.arange(actions) == rng.integers(actions, size=reward.shape[:-1])[..., None]
        terminal = (np.arange(states) == states - 1) & (rng.random(count) < 0.5)[:, None]
    shapes: dict[str, tuple[int, ...]] = {"value": (count, states)}
    for name in ("q", "policy", "log_policy"):
        shapes[name] = (count, states, actions)
    return Draw(
        {name: torch.from_numpy(array).requires_grad_() for name, array in arrays.items()},
        None if mask is None else torch.from_numpy(mask),
        None if terminal is None else torch.from_numpy(terminal),
        {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in shapes.items()},
    )


def slope_along(model: Model, cotangents: Cotangents, direction: dict[str, Any]) -> float:
    """(L(θ + hd) − L(θ − hd)) / 2h, all parameters moved at once."""

    def objective(_: Model, answer: exact.Answer) -> dict[str, list[Any]]:
        total = arb(0)
        for name in ("value", "q", "policy", "log_policy"):
            weights = np.asarray(getattr(cotangents, name)).ravel().tolist()
            pairs = zip(weights, getattr(answer, name), strict=True)
            total += sum((arb(w) * x for w, x in pairs if x is not None), arb(0))
        return {"L": [total]}

    return float(exact.slopes(model, direction, objective).first["L"][0])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(20))
def test_gradients_of_a_thousand_problems_agree_with_the_oracle(chunk: int) -> None:
    """Against the oracle's adjoint to 1e-9 per parameter block, against its differences along a
    random direction to 1e-7; and neither certificate is ever below the true error. Dense and
    sparse, every backend.
    """
    given = draw(chunk)
    names, leaves = list(given.leaves), list(given.leaves.values())
    runs = {}
    for backend in BACKENDS:
        for form, mdp in (("dense", given.mdp()), ("sparse", given.mdp().to_sparse())):
            solution = birl_ext.solve(mdp, temperature=given.leaves["temperature"], backend=backend)
            found = torch.autograd.grad(given.objective(solution), leaves)
            grads = dict(zip(names, (g.numpy() for g in found), strict=True))
            runs[f"{form} {backend}"] = solution, grads
    rng = np.random.default_rng(chunk)
    for index in range(len(given.cotangents["value"])):
        arguments = given.arguments(index)
        model = Model.of(**arguments)
        cotangents = Cotangents(**{k: v[index].numpy() for k, v in given.cotangents.items()})
        truth = exact.solve(model).floats()
        want = exact.gradients(model, cotangents)._asdict()
        directions = {
            "reward": rng.normal(size=want["reward"].shape),
            "transition": arguments["transition"] * rng.normal(size=want["transition"].shape),
            "discount": -(1 - arguments["discount"]) * np.array(rng.uniform(0.5, 1)),
            "temperature": arguments["temperature"] * np.array(rng.uniform(0.5, 1)),
        }
        if "reference" in names:
            directions["reference"] = arguments["reference"] * rng.normal(size=want["reward"].shape)
        difference = slope_along(model, cotangents, directions)
        for run, (solution, got) in runs.items():
            place = (
                f"{run} γ={arguments['discount']:.6g} τ={arguments['temperature']:.3g} "
                f"problem {index}"
            )
            assert_certified(solution, index, truth, place)
            slope, most = 0.0, 0.0
            for name in names:
                error = np.linalg.norm(got[name][index] - want[name])
                size = np.linalg.norm(want[name])
                assert error <= 1e-9 * size, f"{name}, {place}: relative error {error / size:.3g}"
                slope += float((got[name][index] * directions[name]).sum())
                most += float(np.linalg.norm(got[name][index]) * np.linalg.norm(directions[name]))
            assert abs(slope - difference) <= 1e-7 * most, (
                f"{place}: slope {slope:.12g}, difference {difference:.12g}"
            )


def assert_certified(solution: Solution, index: int, truth: exact.Rounded, place: str) -> None:
    """True errors below the certified bounds, but for the rounding of the exact answer."""
    for name, bound in (
        ("value", solution.error_bound[index]),
        ("log_policy", solution.log_policy_error_bound[index]),
    ):
        want = getattr(truth, name)
        ulp = 2.3e-16 * np.abs(np.where(np.isfinite(want), want, 0.0)).max()
        label = f"{name}, {place}"
        assert_close(getattr(solution, name)[index], want, bound=float(bound) + ulp, label=label)


def unrolled(given: Draw, iterations: int = 30) -> Any:
    """The same fixed point by Newton steps that autograd records, every one of them."""
    leaves = given.leaves
    transition = leaves["transition"]
    tau = leaves["temperature"][:, None, None]
    log_mu = torch.zeros_like(leaves["reward"])
    if "reference" in leaves:
        log_mu = leaves["reference"].log()
    if given.mask is not None and given.terminal is not None:
        transition = transition * ~given.terminal[:, :, None, None]
        log_mu = log_mu.masked_fill(~given.mask, -torch.inf)
    sums = transition.sum(-1, keepdim=True)
    transition = transition / torch.where(sums == 0, 1.0, sums)
    model = leaves["discount"][:, None, None, None] * transition
    eye = torch.eye(transition.shape[1], dtype=torch.float64)
    value = torch.zeros_like(leaves["reward"][..., 0])
    for _ in range(iterations):
        q = leaves["reward"] + (model @ value[:, None, :, None]).squeeze(-1)
        logits = q / tau + log_mu
        image = (tau * logits.logsumexp(-1, keepdim=True)).squeeze(-1)
        policy = logits.softmax(-1)
        system = eye - (policy.unsqueeze(-1) * model).sum(2)
        value = value + torch.linalg.solve(system, image - value)
    q = leaves["reward"] + (model @ value[:, None, :, None]).squeeze(-1)
    logits = q / tau + log_mu
    return _Outputs(value, q, logits.softmax(-1), logits.log_softmax(-1))


class _Outputs(NamedTuple):
    value: Tensor
    q: Tensor
    policy: Tensor
    log_policy: Tensor


@pytest.mark.parametrize("chunk", range(4))
def test_gradients_agree_with_unrolled_newton_steps(chunk: int) -> None:
    given = draw(chunk)
    with torch.no_grad():  # what recording in plain float64 can bear
        given.leaves["discount"].clamp_(max=0.99)
        given.leaves["temperature"].clamp_(min=0.05)
    leaves = list(given.leaves.values())
    solution = birl_ext.solve(given.mdp(), temperature=given.leaves["temperature"])
    found = torch.autograd.grad(given.objective(solution), leaves)
    wanted = torch.autograd.grad(given.objective(unrolled(given)), leaves)
    for name, ours, theirs in zip(given.leaves, found, wanted, strict=True):
        for index in range(len(ours)):
            size = float(theirs[index].norm())
            assert_close(
                ours[index], theirs[index], bound=1e-7 * size, label=f"{name} of problem {index}"
            )


@pytest.mark.parametrize("case", [c for c in SMALL if c.discount < 0.995], ids=str)
def test_gradients_agree_with_unrolled_sweeps(case: Case) -> None:
    """Value iteration recorded sweep by sweep knows nothing of implicit differentiation."""
    mdp = case.mdp()
    reward = mdp.reward.clone().requires_grad_()
    weight = torch.randn(*mdp.batch_shape, case.states, case.actions, dtype=torch.float64)
    solution = birl_ext.solve(mdp.replace(reward=reward), temperature=case.temperature)
    (got,) = torch.autograd.grad(
        (weight * solution.policy).sum() + solution.value.square().sum(), reward
    )
    parts = []
    for index, arguments in problems(mdp, case.temperature):
        own = reward.detach()[index].clone().requires_grad_()
        log_mu = mdp.log_reference
        if log_mu.ndim > 1:
            log_mu = log_mu.expand(*mdp.batch_shape, case.states, case.actions)[index]
        else:
            log_mu = torch.zeros_like(own)
        rows = torch.from_numpy(arguments["transition"].copy())
        gain = own if mdp.mask is None else own.where(mdp.mask.expand(reward.shape)[index], 0.0)
        value = torch.zeros(case.states, dtype=torch.float64)
        for _ in range(int(40 / (1 - case.discount))):
            logits = (gain + case.discount * rows @ value) / case.temperature + log_mu
            value = case.temperature * logits.logsumexp(-1)
        logits = (gain + case.discount * rows @ value) / case.temperature + log_mu
        objective = (weight[index] * logits.softmax(-1)).sum() + value.square().sum()
        parts.append(torch.autograd.grad(objective, own)[0])
    want = torch.stack(parts).reshape(reward.shape)
    assert_close(got, want, bound=1e-10 * float(want.abs().max()), label=str(case))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_occupancy_is_differentiable_in_the_initial_distribution(
    case: Case, backend: BackendName
) -> None:
    """d is linear in ρ: ∂(c·d)/∂ρ = (1−γ)(I − γP_π)⁻¹c, which is the value of a reward c."""
    mdp = case.mdp()
    policy = birl_ext.solve(mdp, temperature=case.temperature).policy
    start = mdp.initial_distribution
    assert start is not None
    start = start.clone().requires_grad_()
    weight = torch.randn(*mdp.batch_shape, case.states, dtype=torch.float64)
    visits = birl_ext.occupancy(policy, mdp, initial_distribution=start, backend=backend)
    (got,) = torch.autograd.grad((weight * visits).sum(), start)
    reward = weight.unsqueeze(-1).expand(policy.shape)
    gain = mdp.replace(reward=reward, mask=None, validate="off")  # π is zero where rows are empty
    value = (1 - case.discount) * birl_ext.evaluate(policy, gain, backend=backend)
    want = value.reshape(-1, case.states).sum(0)  # one ρ for the whole batch
    assert_close(got, want, bound=1e-11, label=str(case))


# gradcheck: reverse, forward, and both batched, of every op and every public function


def dense_inputs(reference: bool) -> dict[str, Tensor]:
    """N = 2 models, G = 2 problems each; rows of P need not sum to one, they are read as P/σ."""
    n, g, s, a = 2, 2, 3, 2
    generator = torch.Generator().manual_seed(3)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "transition": 0.2 + uniform(n, s, a, s),
        "reward": uniform(n, g, s, a) - 0.5,
        "log_reference": uniform(n, g, s, a) - 0.5,
        "discount": 0.4 + 0.4 * uniform(n, g),
        "temperature": 0.3 + uniform(n, g),
        "value": uniform(n, g, s) - 0.5,
        "policy": uniform(n, g, s, a),
        "rhs": uniform(n, g, 2, s) - 0.5,
    }
    if not reference:
        inputs["log_reference"] = torch.empty(0, dtype=torch.float64)
    return {name: t.requires_grad_(t.numel() > 0) for name, t in inputs.items()}


def sparse_inputs(reference: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """CSR with rows of two or three entries, a duplicate, and one row without any: it ends."""
    inputs = dense_inputs(reference)
    columns = [[0, 1], [2, 0, 1], [1, 2], [2, 2], [0, 2], []]
    crow = torch.tensor([0, *np.cumsum([len(c) for c in columns])])
    col = torch.tensor([c for row in columns for c in row])
    inputs["transition"] = (0.2 + torch.rand(2, len(col), dtype=torch.float64)).requires_grad_()
    return inputs, crow, col


def op_under_test(
    op: str, sparse: bool, reference: bool, backend: BackendName
) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of the differentiable inputs alone, and those inputs."""
    if sparse:
        inputs, crow, col = sparse_inputs(reference)
    else:
        inputs = dense_inputs(reference)
        crow = col = torch.empty(0, dtype=torch.int64)
    code = CODES[backend]
    if op in ("discounted_sum", "discounted_visits"):
        system = getattr(policy_solve, op)
        names: tuple[str, ...]
        names = ("transition", "policy", "discount", "rhs")

        def call(transition: Tensor, *rest: Tensor) -> Any:
            policy = rest[0] / rest[0].sum(-1, keepdim=True)
            model = policy_solve.System(transition, crow, col, policy, rest[1])
            return system(model, rest[2], code)[0]
    else:
        names = ("transition", "reward", "log_reference", "discount", "temperature")
        names += ("value",) if op == "bellman" else ()

        def call(transition: Tensor, *rest: Tensor) -> Any:
            if not reference:  # gradcheck hands over what requires grad
                rest = (rest[0], inputs["log_reference"], *rest[1:])
            if op == "bellman":
                return bellman_op(Data(transition, crow, col, *rest[:-1]), rest[-1], code)
            guess = torch.empty(0, dtype=torch.float64)
            how = Settings(rest[0].shape[:2], validate=0, backend=code)
            return solve_op(Data(transition, crow, col, *rest), guess, how)[:5]

    return call, [inputs[name] for name in names if inputs[name].requires_grad]


OPS = [
    ("bellman", False),
    ("bellman", True),
    ("solve", False),
    ("solve", True),
    ("discounted_sum", False),
    ("discounted_visits", False),
]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("op", "reference"), OPS)
def test_gradcheck_of_every_op(
    op: str, sparse: bool, reference: bool, backend: BackendName
) -> None:
    call, inputs = op_under_test(op, sparse, reference, backend)
    gradcheck(
        call,
        inputs,
        atol=1e-7,
        rtol=1e-5,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


def public_functions() -> dict[str, tuple[Callable[..., Any], list[Tensor]]]:
    """Each public function of its differentiable tensors, without validation."""
    generator = torch.Generator().manual_seed(5)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    reward, transition = uniform(2, 3, 2), 0.1 + uniform(3, 2, 3)
    transition = transition / transition.sum(-1, keepdim=True)
    discount, temperature = torch.tensor(0.8).double(), 0.3 + uniform(2)
    reference, value = 0.2 + uniform(3, 2), uniform(2, 3)
    policy = uniform(2, 3, 2).softmax(-1)
    start = uniform(3).softmax(-1)
    off: dict[str, Any] = {"validate": "off"}

    def solve(r: Tensor, p: Tensor, gamma: Tensor, tau: Tensor, mu: Tensor) -> Any:
        got = birl_ext.solve(r, p, discount=gamma, temperature=tau, reference=mu, **off)
        return got.value, got.q, got.policy, got.log_policy, got.advantage

    def solve_csr(r: Tensor, p: Tensor, gamma: Tensor, tau: Tensor) -> Any:
        crow = 2 * torch.arange(7)
        col = torch.tensor([0, 1, 1, 2, 0, 2, 2, 1, 1, 0, 0, 2])
        mdp = SparseMDP(r, p, crow, col, gamma, **off)
        got = birl_ext.solve(mdp, temperature=tau, **off)
        return got.value, got.q, got.policy, got.log_policy, got.advantage

    def bellman(v: Tensor, r: Tensor, p: Tensor, gamma: Tensor, tau: Tensor, mu: Tensor) -> Any:
        return birl_ext.bellman(v, r, p, discount=gamma, temperature=tau, reference=mu, **off)

    def evaluate(pi: Tensor, r: Tensor, p: Tensor, gamma: Tensor) -> Tensor:
        return birl_ext.evaluate(pi, r, p, discount=gamma, **off)

    def occupancy(pi: Tensor, p: Tensor, gamma: Tensor, rho: Tensor) -> Tensor:
        return birl_ext.occupancy(pi, p, discount=gamma, initial_distribution=rho, **off)

    functions: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "solve": (solve, [reward, transition, discount, temperature, reference]),
        "solve_csr": (solve_csr, [reward, uniform(12) + 0.1, discount, temperature]),
        "bellman": (bellman, [value, reward, transition, discount, temperature, reference]),
        "evaluate": (evaluate, [policy, reward, transition, discount]),
        "occupancy": (occupancy, [policy, transition, discount, start]),
    }
    return {
        name: (function, [t.clone().requires_grad_() for t in tensors])
        for name, (function, tensors) in functions.items()
    }


@pytest.mark.parametrize("name", list(public_functions()))
def test_gradcheck_of_every_public_function(name: str) -> None:
    function, inputs = public_functions()[name]
    gradcheck(
        function,
        inputs,
        atol=1e-7,
        rtol=1e-5,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_gradients_have_the_shape_and_dtype_of_their_inputs(dtype: torch.dtype) -> None:
    """Broadcast axes are summed; a scalar tensor gets a scalar."""
    reward = torch.randn(4, 1, 3, 2, dtype=dtype, requires_grad=True)
    transition = torch.rand(5, 3, 2, 3, dtype=dtype).softmax(-1).requires_grad_()
    discount = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    temperature = torch.rand(5, dtype=dtype).add(0.1).requires_grad_()
    reference = torch.rand(2, dtype=dtype).add(0.1).expand(3, 2).clone().requires_grad_()
    inputs = (reward, transition, discount, temperature, reference)
    got = birl_ext.solve(
        reward, transition, discount=discount, temperature=temperature, reference=reference
    )
    grads = torch.autograd.grad(got.value.sum() + got.policy.square().sum(), inputs)
    for tensor, grad in zip(inputs, grads, strict=True):
        assert grad.shape == tensor.shape
        assert grad.dtype == tensor.dtype
        assert torch.isfinite(grad).all()
        assert grad.abs().max() > 0


def test_what_needs_no_gradient_gets_none() -> None:
    """A solution of constants is a constant; residual, bounds and status never carry a gradient."""
    case = Case(seed=3)
    mdp = case.mdp()
    got = birl_ext.solve(mdp, temperature=0.5)
    assert not any(part.requires_grad for part in got)
    got = birl_ext.solve(mdp.replace(reward=mdp.reward.requires_grad_()), temperature=0.5)
    for name in ("residual", "error_bound", "log_policy_error_bound", "iterations", "status"):
        assert not getattr(got, name).requires_grad, name
    for name in ("value", "q", "policy", "log_policy", "advantage"):
        assert getattr(got, name).requires_grad, name
