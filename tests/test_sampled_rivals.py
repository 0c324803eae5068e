"""Methods that learn from samples, against gradients of a three-state MDP that NumPy finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close, assert_same_state
from torch import Tensor

import birl_ext
from birl_ext.bilevel import SampledProblem, StocSoBiRLDescent, geometric
from birl_ext.bilevel.bias_meter import measure_estimator
from birl_ext.bilevel.estimated_model import EstimatedModel, TransitionCounts
from birl_ext.bilevel.rivals.bchg import BCHG
from birl_ext.bilevel.rivals.hpgd import HPGD
from birl_ext.bilevel.rivals.sampled_zero_order import SampledZeroOrder
from birl_ext.bilevel.rivals.tables import advantage_from, mean_of_cells, returns_to_go
from birl_ext.bilevel.sampled import SampledDescent
from birl_ext.bilevel.stoc_sobirl import Effort
from birl_ext.errors import (
    InitialDistributionError,
    OptionError,
    PolicyError,
    ShapeError,
    TemperatureError,
)
from birl_ext.model.mdp import DenseMDP
from birl_ext.simulators.finite import FiniteFollower, FiniteSimulator
from birl_ext.simulators.paths import Paths

STATES, ACTIONS, D = 3, 2, 2
GAMMA, ABOVE, TAU = 0.5, 0.6, 0.5
DRAWS = np.random.default_rng(3)
P = DRAWS.dirichlet([0.7] * STATES, (STATES, ACTIONS))
P[2] = 0.0  # where the process ends
FEATURES = DRAWS.normal(size=(STATES, ACTIONS, D))
OWN, LEAN = DRAWS.normal(size=(STATES, ACTIONS)), DRAWS.normal(size=(STATES, ACTIONS, D))
START = np.array([0.6, 0.3, 0.1])
X = 0.25 * DRAWS.normal(size=D)

# The oracle: plain NumPy, which shares nothing with the package


def soft_policy(x: np.ndarray, tau: float = TAU) -> np.ndarray:
    value = np.zeros(STATES)
    for _ in range(200):
        q = FEATURES @ x + GAMMA * P @ value
        value = tau * np.log(np.exp(q / tau).sum(-1))
    return np.exp((q - value[:, None]) / tau)


def cost_of(x: np.ndarray) -> np.ndarray:
    return OWN + 0.3 * LEAN @ x


def discounted(policy: np.ndarray, table: np.ndarray, gamma: float) -> np.ndarray:
    """Q, (S, A, …), of a policy."""
    moves = np.einsum("sa,sat->st", policy, P)
    own = np.einsum("sa,sa...->s...", policy, table)
    value = np.linalg.solve(np.eye(STATES) - gamma * moves, own)
    return table + gamma * np.tensordot(P, value, 1)


def objective(x: np.ndarray, tau: float = TAU) -> float:
    policy = soft_policy(x, tau)
    return float(START @ (policy * discounted(policy, cost_of(x), ABOVE)).sum(-1))


def slope(function: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    step = 1e-5
    return np.array(
        [(function(x + step * e) - function(x - step * e)) / (2 * step) for e in np.eye(len(x))]
    )


def visits(policy: np.ndarray) -> np.ndarray:
    """Σ γ_uᵗ P(s_t = s, a_t = a), (S, A)."""
    moves = np.einsum("sa,sat->st", policy, P)
    return np.linalg.solve((np.eye(STATES) - ABOVE * moves).T, START)[:, None] * policy


def expected_gradient(advantage: np.ndarray, score: np.ndarray, x: np.ndarray = X) -> np.ndarray:
    """Direct part, and visits times an advantage (S, A) times a score (S, A, D), over τ."""
    weight = visits(soft_policy(x))
    direct = np.einsum("sa,sad->d", weight, 0.3 * LEAN)
    return direct + np.einsum("sa,sa,sad->d", weight, advantage, score) / TAU


# The methods


def as_torch(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def sampled(steps: int = 16) -> SampledProblem:
    features, own, lean = map(as_torch, (FEATURES, OWN, LEAN))
    return SampledProblem(
        lambda x: features @ x,
        cost=lambda x: own + 0.3 * lean @ x,
        steps=steps,
        discount=ABOVE,
    )


def process(**changes: Any) -> birl_ext.DenseMDP:
    given = {
        "terminal": torch.tensor([False, False, True]),
        "initial_distribution": as_torch(START),
        **changes,
    }
    mdp = birl_ext.DenseMDP(torch.zeros(STATES, ACTIONS).double(), as_torch(P), GAMMA, **given)
    mdp._set(free_ends=False)
    return mdp


def simulator(seed: int = 0) -> FiniteSimulator:
    return FiniteSimulator(process(), torch.Generator().manual_seed(seed))


def known(x: Tensor, tau: float) -> Tensor:
    return as_torch(soft_policy(x.detach().numpy(), tau))


def make(kind: Any, *, steps: int = 16, seed: int = 0, **options: Any) -> Any:
    extra: dict[str, Any] = {"batch": 200}
    if kind is SampledZeroOrder:
        extra["radius"] = 0.5
    if kind is StocSoBiRLDescent:
        extra = {"effort": Effort(batch=5, horizon=5, sweeps=3)}
    given = {
        "discount": GAMMA,
        "temperature": TAU,
        "optimiser": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        "follower": known,
        **extra,
        **options,
    }
    return kind(sampled(steps), simulator(seed), as_torch(X), **given)


def agrees(algorithm: SampledDescent, wanted: np.ndarray, repetitions: int, least: float) -> None:
    """The mean estimate is the wanted one within 4 standard errors, which are small."""
    wanted_ = as_torch(wanted)
    report = measure_estimator(
        lambda: algorithm.hypergradient()[1], wanted_, repetitions=repetitions
    )
    assert report.noise < least, report
    assert report.relative_error < 4 * report.noise, report


EXACT = slope(objective, X)
POLICY = soft_policy(X)
LOWER = discounted(POLICY, FEATURES, GAMMA)  # ∇Q
UPPER = discounted(POLICY, cost_of(X), ABOVE)
ADVANTAGE = UPPER - (POLICY * UPPER).sum(-1, keepdims=True)


def test_the_oracle_of_these_tests_has_one_gradient() -> None:
    np.testing.assert_allclose(expected_gradient(ADVANTAGE, LOWER), EXACT, rtol=1e-6)


def test_the_oracle_of_hpgd_has_the_exact_gradient() -> None:
    algorithm = make(HPGD, sampling="oracle", model=process())
    table = algorithm.problem.reward(algorithm.x)
    score, advantage = algorithm._exact(
        table, algorithm.problem.cost(algorithm.x).detach(), FiniteFollower(as_torch(POLICY))
    )
    assert_close(advantage, ADVANTAGE, bound=1e-9, label="A_f")
    weight = as_torch(visits(POLICY)) * advantage / TAU
    (indirect,) = torch.autograd.grad((weight * score).sum(), algorithm.x)
    direct = np.einsum("sa,sad->d", visits(POLICY), 0.3 * LEAN)
    assert_close(indirect, EXACT - direct, bound=1e-7, label="∇φ less the direct part")
    agrees(algorithm, EXACT, 30, 0.05)
    before = algorithm.simulator.samples
    assert before <= 30 * 200 * 15  # the oracle draws the paths alone


@pytest.mark.parametrize("sampling", ["on-policy", "uniform"])
def test_hpgd_of_many_paths_comes_near_the_exact_gradient(sampling: str) -> None:
    algorithm = make(HPGD, sampling=sampling, batch=20_000)
    report = measure_estimator(lambda: algorithm.hypergradient()[1], as_torch(EXACT), repetitions=4)
    assert report.relative_error < 0.03, report


def test_hpgd_of_one_path_has_the_bias_that_its_tables_have() -> None:
    """Its expectation, a sum over all paths of three steps, is far from the gradient."""
    steps = 3

    def one(path: list[tuple[int, int]]) -> np.ndarray:
        found = np.zeros(D)
        lower, upper = [], []
        for t in range(len(path)):
            lower.append(sum(GAMMA ** (k - t) * FEATURES[path[k]] for k in range(t, len(path))))
            upper.append(sum(ABOVE ** (k - t) * cost_of(X)[path[k]] for k in range(t, len(path))))
        for t, (s, a) in enumerate(path):
            cells = [k for k in range(len(path)) if path[k] == (s, a)]
            rows = [k for k in range(len(path)) if path[k][0] == s]
            parts = []
            for sums in (lower, upper):
                q = sum(sums[k] for k in cells) / len(cells)
                parts.append(q - sum(sums[k] for k in rows) / len(rows))
            found += ABOVE**t * (0.3 * LEAN[s, a] + parts[0] * parts[1] / TAU)
        return found

    wanted = np.zeros(D)
    pairs = list(itertools.product(range(STATES), range(ACTIONS)))
    for path in itertools.product(pairs, repeat=steps):
        chance, taken = START[path[0][0]] * POLICY[path[0]], [path[0]]
        for here, there in itertools.pairwise(path):
            if here[0] == 2:  # ended: what is written behind it is one path, not six
                chance *= 1 / len(pairs)
                continue
            chance *= P[here[0], here[1], there[0]] * POLICY[there]
            taken.append(there)
        wanted += chance * one(taken)
    algorithm = make(HPGD, steps=steps, batch=1)
    agrees(algorithm, wanted, 1500, 0.1)
    assert np.linalg.norm(wanted - EXACT) > 0.3 * np.linalg.norm(EXACT)


@pytest.mark.parametrize("critic", ["exact", "wrong"])
def test_bchg_is_as_right_as_its_critic(critic: str) -> None:
    """No bias beside that of the critic, whose own is the advantage's."""
    algorithm = make(BCHG, rate=1e-15, replays=1, minibatch=1)
    wrong = UPPER + (np.arange(6).reshape(3, 2) if critic == "wrong" else 0.0)
    algorithm.upper_q = as_torch(wrong)
    off = wrong - (POLICY * wrong).sum(-1, keepdims=True)
    wanted = expected_gradient(off, LOWER)
    assert (np.linalg.norm(wanted - EXACT) < 1e-6) == (critic == "exact")
    agrees(algorithm, wanted, 60, 0.05)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BCHG, {"minibatch": 10_000, "replays": 12, "rate": 1.0}),
        (BCHG, {"replays": 0, "rate": 0.2}),
        (HPGD, {"critic": "sarsa", "rate": 0.2}),
    ],
)
def test_a_critic_learns_what_the_policy_costs_above(kind: Any, options: Any) -> None:
    algorithm = make(
        kind,
        batch=2000,
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        **options,
    )
    for _ in range(8):
        algorithm.step()
    # where the policy hardly goes nothing is learned
    gap = (algorithm.upper_q - as_torch(UPPER)) * as_torch(POLICY)
    assert_close(gap, np.zeros((STATES, ACTIONS)), bound=0.1, label="π (Q̂_f − Q_f)")


def test_a_lower_critic_learns_where_the_policy_goes() -> None:
    algorithm = make(
        BCHG,
        batch=4000,
        minibatch=10_000,
        replays=15,
        rate=1.0,
        lower="critic",
        optimiser=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )
    for _ in range(3):
        algorithm.step()
    wanted = discounted(POLICY, np.eye(6).reshape(3, 2, 6), GAMMA).reshape(6, 6)
    assert_close(algorithm._visits, wanted, bound=0.1, label="M")
    algorithm._visits, algorithm.upper_q = as_torch(wanted), as_torch(UPPER)
    algorithm.rate, algorithm.replays, algorithm.batch = 1e-15, 1, 200
    agrees(algorithm, EXACT, 30, 0.03)


def test_a_replay_keeps_the_latest_transitions() -> None:
    algorithm = make(BCHG, capacity=5)
    path = Paths(
        torch.tensor([[0, 1, 2, 2], [1, 0, 1, 2]]),
        torch.tensor([[0, 1, 0, 0], [1, 1, 0, 1]]),
        torch.tensor([[True, True, True, False], [True, True, True, True]]),
    )
    algorithm._keep(path)
    kept = {tuple(row) for row in algorithm._kept.tolist()}
    # (s, a) as 2s + a, s', whether the path went on; the oldest of six is gone
    assert kept == {(3, 2, 1), (4, 2, 0), (3, 0, 1), (1, 1, 1), (2, 2, 1)}
    assert algorithm._count == 5


def test_zero_order_has_the_gradient_of_a_smoothed_objective() -> None:
    """E[(φ(x + uZ) − φ(x)) Z/u] by Gauss-Hermite quadrature."""
    radius = 1.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(11)
    weights = weights / weights.sum()
    wanted = np.zeros(D)
    for (i, j), z in (
        ((i, j), np.array([nodes[i], nodes[j]])) for i in range(11) for j in range(11)
    ):
        wanted += weights[i] * weights[j] * objective(X + radius * z) * z / radius
    assert np.linalg.norm(wanted - EXACT) > 0.02 * np.linalg.norm(EXACT)
    agrees(make(SampledZeroOrder, radius=radius), wanted, 800, 0.1)


def test_zero_order_moves_the_process_with_x() -> None:
    """From state 0 the one action leads to state 1, which costs 1, with chance σ(x): φ = σ(x)/2."""

    def transition(x: torch.Tensor) -> torch.Tensor:
        there = torch.sigmoid(x)
        return torch.stack([torch.cat([1 - there, there]), there.new_tensor([0, 1])]).unsqueeze(1)

    def cost(x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0], [1.0]], dtype=torch.float64) + 0 * x

    problem = SampledProblem(
        lambda x: 0 * cost(x), transition=transition, cost=cost, steps=2, discount=0.5
    )
    x = torch.tensor([0.4], dtype=torch.float64)
    first = torch.tensor([1.0, 0.0], dtype=torch.float64)
    mdp = DenseMDP(cost(x), transition(x), 0.5, initial_distribution=first)
    algorithm = SampledZeroOrder(
        problem,
        FiniteSimulator(mdp, torch.Generator().manual_seed(0)),
        x,
        discount=0.5,
        temperature=1.0,
        optimiser=lambda p: torch.optim.SGD(p, lr=0.0),
        batch=2000,
        radius=0.5,
        sweeps=1,
    )
    found = torch.stack([algorithm.hypergradient()[1] for _ in range(400)])
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5 * 16 / 4000
    wanted = (weight * (torch.sigmoid(x + 0.5 * z) - torch.sigmoid(x)) / 2 * z / 0.5).sum()
    error = float(found.std() / 20)
    assert abs(float(found.mean() - wanted)) < 4 * error
    assert error < 0.1 * float(wanted)


def test_zero_order_takes_a_loss_of_paths() -> None:
    problem = sampled()
    paid = problem.cost
    assert paid is not None
    powers = ABOVE ** torch.arange(16).double()
    whole = SampledProblem(
        problem.reward,
        lambda x, paths: (paid(x)[paths[0][:2]] * paths[0].present) @ powers,
        paths=1,
        steps=16,
    )
    found = []
    for given in (problem, whole):
        algorithm = make(SampledZeroOrder)
        algorithm.problem = given
        found.append(algorithm.hypergradient())
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1])


# What they share

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (HPGD, {}),
    (HPGD, {"sampling": "uniform", "critic": "sarsa"}),
    (HPGD, {"sampling": "oracle", "model": process()}),
    (BCHG, {"minibatch": 50, "replays": 3}),
    (BCHG, {"replays": 0}),
    (BCHG, {"minibatch": 50, "replays": 3, "lower": "critic"}),
    (SampledZeroOrder, {}),
    (StocSoBiRLDescent, {}),
]


@pytest.mark.parametrize("follower", [known, None])
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_run_goes_on_to_the_same_bits(kind: Any, options: Any, follower: Any) -> None:
    given = {"follower": follower, "noise": 0.1, "temperature": geometric(1.0, TAU, 4), **options}
    if kind is not StocSoBiRLDescent:
        given["batch"] = 7

    def new(seed: int) -> Any:
        return make(kind, seed=seed, optimiser=lambda p: torch.optim.Adam(p, lr=0.05), **given)

    whole, half, again = new(1), new(1), new(2)
    for _ in range(6):
        whole.step()
    for _ in range(3):
        half.step()
    again.load_state_dict(half.state_dict())
    for _ in range(3):
        again.step()
    assert_same_state(again.state_dict(), whole.state_dict())


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_what_is_drawn_is_counted_and_a_known_follower_costs_nothing(
    kind: Any, options: Any
) -> None:
    counts = []
    for follower in (known, None):
        algorithm = make(kind, follower=follower, **options)
        outcome = algorithm.step()
        assert outcome.samples == algorithm.simulator.samples > 0
        counts.append(outcome.samples)
    if kind is StocSoBiRLDescent:  # whose critic learns from the same sweeps
        return
    sweeps = (2 if kind is SampledZeroOrder else 1) * algorithm.sweeps * STATES * ACTIONS
    assert abs(counts[1] - counts[0] - sweeps) < 0.5 * counts[0]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_temperature_may_be_a_schedule(kind: Any, options: Any) -> None:
    asked = []

    def asks(x: Tensor, tau: float) -> Tensor:
        asked.append(tau)
        return known(x, tau)

    algorithm = make(kind, temperature=geometric(2.0, 0.5, 2), follower=asks, **options)
    for _ in range(3):
        algorithm.step()
    each = 2 if kind is SampledZeroOrder else 1
    assert asked == [tau for tau in (2.0, 1.0, 0.5) for _ in range(each)]
    algorithm = make(kind, temperature=lambda step: 1.0 - step, **options)
    algorithm.step()
    with pytest.raises(TemperatureError, match="outer step 1 of the schedule"):
        algorithm.step()


def test_a_learned_follower_is_the_known_one_after_enough_sweeps() -> None:
    algorithm = make(HPGD, follower=None, sweeps=20_000, batch=1)
    algorithm.hypergradient()
    policy = algorithm._preference().softmax(-1)
    assert_close(policy, POLICY, bound=0.03, label="π")


def test_noise_has_its_standard_deviation() -> None:
    """Of 500 numbers, each a copy of the same one in the levels."""
    features, own, lean = map(as_torch, (FEATURES, OWN, LEAN))

    def short(x: Tensor) -> Tensor:
        return x[:D] + 0.0 * x.sum()

    problem = SampledProblem(
        lambda x: features @ short(x),
        cost=lambda x: own + 0.3 * lean @ short(x),
        steps=5,
        discount=ABOVE,
    )
    moved = []
    for noise in (0.0, 3.0):
        algorithm = HPGD(
            problem,
            simulator(),
            torch.zeros(500).double(),
            discount=GAMMA,
            temperature=TAU,
            optimiser=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
            batch=5,
            noise=noise,
            follower=lambda x, tau: as_torch(POLICY),
        )
        algorithm.step()
        moved.append(algorithm.x.detach())
    assert abs(float((moved[1] - moved[0]).std()) / 3.0 - 1) < 4 / (2 * 500) ** 0.5


@pytest.mark.parametrize("kind", [BCHG, HPGD])
def test_descent_lowers_the_objective(kind: Any) -> None:
    algorithm = make(kind, temperature=geometric(1.0, TAU, 20))
    algorithm.run(60, progress=False)
    assert objective(algorithm.x.detach().numpy()) < objective(X) - 0.1


def test_errors_are_named() -> None:
    with pytest.raises(OptionError, match="sampling is 'all'"):
        make(HPGD, sampling="all")
    with pytest.raises(OptionError, match="critic is 'td'"):
        make(HPGD, critic="td")
    with pytest.raises(OptionError, match="model is None"):
        make(HPGD, sampling="oracle")
    with pytest.raises(OptionError, match="model is not None"):
        make(HPGD, model=process())
    for kind in (HPGD, BCHG):
        with pytest.raises(OptionError, match="rate is"):
            make(kind, rate=1.5)
        with pytest.raises(OptionError, match="batch is 0"):
            make(kind, batch=0)
    with pytest.raises(OptionError, match="lower is 'td'"):
        make(BCHG, lower="td")
    with pytest.raises(OptionError, match="replays is 0"):
        make(BCHG, lower="critic", replays=0)
    with pytest.raises(OptionError, match="radius is 0"):
        make(SampledZeroOrder, radius=0.0)
    paths = SampledProblem(lambda x: x, lambda x, paths: x.sum())
    moving = SampledProblem(lambda x: x, transition=lambda x: x, cost=lambda x: x, discount=0.5)
    given: dict[str, Any] = {
        "discount": 0.5,
        "temperature": 1.0,
        "optimiser": torch.optim.SGD,
        "batch": 1,
    }
    for kind in (HPGD, BCHG):
        for problem, what in ((paths, "loss of whole paths"), (moving, "x moves")):
            with pytest.raises(OptionError, match=what):
                kind(problem, simulator(), as_torch(X), **given)
    with pytest.raises(OptionError, match="a follower is given"):
        SampledZeroOrder(moving, simulator(), as_torch(X), radius=1.0, follower=known, **given)
    with pytest.raises(TemperatureError):
        make(HPGD, temperature=0.0)
    with pytest.raises(ShapeError, match=r"temperature has shape \(2,\)"):
        make(HPGD, temperature=torch.ones(2)).step()


def test_a_follower_that_plays_no_policy_is_refused() -> None:
    with pytest.raises(PolicyError, match="what `follower` returned") as caught:
        make(HPGD, follower=lambda x, tau: torch.full((3, 2), 0.4).double()).step()
    assert "sums to 0.8" in str(caught.value)
    algorithm = make(HPGD, follower=lambda x, tau: torch.full((2, 3), 0.5).double())
    before = algorithm.state_dict()
    with pytest.raises(ShapeError, match=r"follower returned shape \(2, 3\)"):
        algorithm.step()
    assert_same_state(algorithm.state_dict(), before)
    with pytest.raises(OptionError, match="follower"):
        make(HPGD, follower=3)


@pytest.mark.parametrize("start", [[0.0, 0.0, 0.0], [0.5, 0.2, 0.1]])
def test_a_start_of_probability_zero_is_refused(start: list[float]) -> None:
    """Also where nobody has validated the MDP."""
    mdp = process(initial_distribution=torch.tensor(start).double(), validate="off")
    with pytest.raises(InitialDistributionError, match="sums to"):
        FiniteSimulator(mdp, torch.Generator())


# Tables


def test_tables_are_those_of_plain_loops() -> None:
    draws = torch.Generator().manual_seed(0)
    path = simulator().rollout(FiniteFollower(as_torch(POLICY)), 6, 5)
    paid = torch.randn(6, 5, generator=draws, dtype=torch.float64)
    to_go = returns_to_go(paid, path.present, 0.9)
    advantage = advantage_from(path, to_go, STATES, ACTIONS)
    sums: dict[Any, list[float]] = {}
    for i in range(6):
        for t in range(5):
            if not path.present[i, t]:
                continue
            wanted = sum(
                0.9 ** (k - t) * float(paid[i, k]) for k in range(t, 5) if path.present[i, k]
            )
            assert float(to_go[i, t]) == pytest.approx(wanted)
            s, a = int(path.observation[i, t]), int(path.action[i, t])
            sums.setdefault((s, a), []).append(wanted)
            sums.setdefault(s, []).append(wanted)
    for s, a in itertools.product(range(STATES), range(ACTIONS)):
        known_ = (s, a) in sums
        gap = np.mean(sums[s, a]) - np.mean(sums[s]) if known_ else 0.0
        assert float(advantage[s, a]) == pytest.approx(gap, abs=1e-12)
    none = mean_of_cells(torch.tensor([2]), torch.tensor([3.0]), 4)
    assert none.tolist() == [0, 0, 3, 0]


# A model that is estimated


def starts(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, D, generator=generator, dtype=torch.float64)


def bounded() -> SampledProblem:
    """The same rewards and costs of tanh x, so that there is a least φ."""
    problem = sampled()
    assert problem.cost is not None
    reward, cost = problem.reward, problem.cost
    return SampledProblem(
        lambda x: reward(3 * x.tanh()),
        cost=lambda x: cost(3 * x.tanh()),
        steps=16,
        discount=ABOVE,
    )


def estimated(seed: int = 0, **options: Any) -> EstimatedModel:
    given = {
        "discount": GAMMA,
        "temperature": TAU,
        "first": 300,
        "more": 100,
        "count": 8,
        "candidates": 3,
        "climb": 12,
        **options,
    }
    return EstimatedModel(bounded(), simulator(seed), starts, **given)


def test_counts_are_those_of_a_plain_loop() -> None:
    path = simulator().rollout(FiniteFollower(as_torch(POLICY)), 50, 6)
    counts = TransitionCounts(STATES, ACTIONS)
    counts.add(path)
    counts.add(path)
    seen, ends = np.zeros((STATES, ACTIONS, STATES)), np.zeros((STATES, ACTIONS))
    for states, actions, present in zip(*(part.tolist() for part in path), strict=True):
        for t in range(5):
            if present[t] and present[t + 1]:
                seen[states[t], actions[t], states[t + 1]] += 2
            elif present[t]:
                ends[states[t], actions[t]] += 2
    assert counts.seen.tolist() == seen.tolist()
    assert counts.ends.tolist() == ends.tolist()
    assert ends.sum() > 0
    assert not ends[:2].any()


def test_the_model_becomes_the_process() -> None:
    algorithm = estimated()
    algorithm.explore(torch.full((STATES, ACTIONS), 0.5).double(), 200_000)
    mdp = algorithm.model().to_dense()
    error = 4 * np.sqrt(P * (1 - P) / 20_000) + 1e-12
    assert_close(mdp.transition, P, bound=error, label="P̂")
    assert mdp.terminal is not None
    assert mdp.terminal.tolist() == [False, False, True]


def test_what_was_not_seen_stays_where_it_is() -> None:
    algorithm = estimated()
    only = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]).double()
    algorithm.explore(only, 500)
    mdp = algorithm.model().to_dense()
    assert mdp.transition[:2, 1].tolist() == torch.eye(3)[:2].tolist()
    assert not mdp.transition[2].any()  # an end counts for the state, whatever else it offers
    assert estimated().model().to_dense().transition.tolist() == (
        torch.eye(3).unsqueeze(1).expand(3, 2, 3).tolist()
    )


@pytest.mark.parametrize("explorer", ["uniform", "hot"])
@pytest.mark.parametrize("follower", [known, None])
def test_a_round_draws_what_it_was_given(explorer: Any, follower: Any) -> None:
    algorithm = estimated(explorer=explorer, follower=follower)
    rounds = algorithm.run(3, progress=False)
    assert [outcome.samples for outcome in rounds] == [300, 100, 100]
    assert algorithm.simulator.samples == 500


def test_a_process_that_ends_at_once_does_not_hang() -> None:
    mdp = process(initial_distribution=torch.tensor([0.0, 0.0, 1.0]).double())
    algorithm = EstimatedModel(
        bounded(),
        FiniteSimulator(mdp, torch.Generator().manual_seed(0)),
        starts,
        discount=GAMMA,
        temperature=TAU,
        count=4,
        candidates=2,
        climb=4,
        first=10,
    )
    assert algorithm.step().samples == 0


def test_the_best_of_a_learned_model_is_nearly_the_best_of_all() -> None:
    algorithm = estimated(first=20_000, more=5000, climb=100, follower=None)
    outcome = algorithm.run(2, progress=False)[-1]

    def folded(x: np.ndarray) -> float:
        return objective(3 * np.tanh(x))

    grid = np.linspace(-3, 3, 25)
    best = min(folded(np.array([a, b])) for a in grid for b in grid)
    found = folded(algorithm.x.numpy())
    assert found < best + 0.03
    assert abs(found - outcome.objective) < 0.05


@pytest.mark.parametrize("explorer", ["uniform", "hot"])
def test_rounds_go_on_to_the_same_bits(explorer: Any) -> None:
    whole, half, again = (estimated(seed, explorer=explorer) for seed in (1, 1, 2))
    whole.run(4, progress=False)
    half.run(2, progress=False)
    again.load_state_dict(half.state_dict())
    again.run(2, progress=False)
    assert_same_state(again.state_dict(), whole.state_dict())


def test_what_a_model_refuses() -> None:
    for options, what in (
        ({"explorer": "cold"}, "explorer is 'cold'"),
        ({"heat": 0.5}, "heat is 0.5"),
        ({"candidates": 9}, "candidates is 9"),
        ({"first": 0}, "first is 0"),
        ({"climb": 2}, "climb is 2"),
        ({"follower": 3}, "follower"),
    ):
        with pytest.raises(OptionError, match=what):
            estimated(**options)
    for problem in (
        SampledProblem(lambda x: x, lambda x, paths: x.sum()),
        SampledProblem(lambda x: x, cost=lambda x: x),
    ):
        with pytest.raises(OptionError, match="no cost of each step"):
            EstimatedModel(problem, simulator(), starts, discount=GAMMA, temperature=TAU)
    with pytest.raises(ShapeError, match="starts returned shape"):
        EstimatedModel(
            bounded(), simulator(), lambda n, g: torch.zeros(D), discount=GAMMA, temperature=TAU
        )
    wrong = SampledProblem(lambda x: x, cost=lambda x: x, discount=0.5)
    algorithm = EstimatedModel(wrong, simulator(), starts, discount=GAMMA, temperature=TAU)
    before = algorithm.state_dict()
    with pytest.raises(ShapeError, match="reward has shape"):
        algorithm.step()
    assert_same_state(algorithm.state_dict(), before)
    masked = process(mask=torch.tensor([[True, False], [True, True], [True, True]]))
    with pytest.raises(OptionError, match="mask"):
        EstimatedModel(
            bounded(),
            FiniteSimulator(masked, torch.Generator()),
            starts,
            discount=GAMMA,
            temperature=TAU,
        )
