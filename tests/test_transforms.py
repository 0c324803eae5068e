"""Every PyTorch transform of every public function, against unrolled implementations that know no
implicit differentiation: a transform that returns silent zeros fails here.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from closeness import assert_close
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import birl_ext
from birl_ext.model.mdp import SparseMDP
from birl_ext.nn import SoftPlanner

# what torch itself says while it traces, scripts or exports
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
]

STATES, ACTIONS, SWEEPS = 3, 2, 90  # 0.6⁹⁰ < 1e-19
# rows of one, two and three entries
CROW = torch.tensor([0, 1, 3, 6, 8, 9, 11])
COL = torch.tensor([0, 1, 2, 0, 1, 2, 2, 0, 1, 0, 2])
ROW = torch.repeat_interleave(torch.arange(6), CROW.diff())

Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# The unrolled implementations: dense P (S, A, S), one problem


def plain_bellman(value: Tensor, reward: Tensor, rows: Tensor, gamma: Any, tau: Any) -> Any:
    q = reward + gamma * torch.einsum("sat,t->sa", rows, value)
    return tau * torch.logsumexp(q / tau, -1), q, torch.softmax(q / tau, -1)


def plain_solve(reward: Tensor, rows: Tensor, gamma: Any, tau: Any) -> Any:
    value = torch.zeros_like(reward[:, 0])
    for _ in range(SWEEPS):
        value = plain_bellman(value, reward, rows, gamma, tau)[0]
    return plain_bellman(value, reward, rows, gamma, tau)


def plain_evaluate(policy: Tensor, reward: Tensor, rows: Tensor, gamma: Any) -> Tensor:
    gain = (policy * reward).sum(-1)
    value = torch.zeros_like(gain)
    for _ in range(SWEEPS):
        value = gain + gamma * torch.einsum("sa,sat,t->s", policy, rows, value)
    return value


def plain_occupancy(policy: Tensor, rows: Tensor, gamma: Any, start: Tensor) -> Tensor:
    visits = torch.zeros_like(start)
    for _ in range(SWEEPS):
        visits = (1 - gamma) * start + gamma * torch.einsum("s,sa,sat->t", visits, policy, rows)
    return visits


def on_pattern(logits: Tensor) -> Tensor:
    """Row-wise softmax of CSR entries (nnz,)."""
    weight = logits.exp()
    sums = torch.zeros(6, dtype=logits.dtype).index_add(0, ROW, weight)
    return weight / sums[ROW]


def densified(values: Tensor) -> Tensor:
    flat = torch.zeros(6 * STATES, dtype=values.dtype).index_add(0, ROW * STATES + COL, values)
    return flat.reshape(STATES, ACTIONS, STATES)


class Subject(NamedTuple):
    """A public function and its unrolled twin, both of unconstrained inputs to one vector."""

    ours: Function
    plain: Function
    inputs: tuple[Tensor, ...]

    def scalars(self) -> tuple[Function, Function]:
        """Both composed with a scalar that has curvature of its own."""
        return summed(self.ours), summed(self.plain)


def summed(function: Function) -> Function:
    def scalar(*inputs: Tensor) -> Tensor:
        out = function(*inputs)
        weight = torch.linspace(0.5, 1.5, out.shape[-1], dtype=out.dtype)
        return (weight * out * (1 + out)).sum()

    return scalar


def joined(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def subject(name: str) -> Subject:
    kind, _, sparse = name.partition("_")
    logits = draw(len(COL)) if sparse else draw(STATES, ACTIONS, STATES)
    reward, policy = draw(STATES, ACTIONS), draw(STATES, ACTIONS, seed=1)
    gamma, tau = torch.tensor(0.6).double(), torch.tensor(0.5).double()

    def model(r: Tensor, p: Tensor, g: Tensor) -> tuple[Any, dict[str, Any]]:
        if sparse:
            return (SparseMDP(r, on_pattern(p), CROW, COL, g),), {}
        return (r, p.softmax(-1)), {"discount": g}

    def rows(p: Tensor) -> Tensor:
        return densified(on_pattern(p)) if sparse else p.softmax(-1)

    if kind == "solve":

        def ours(r: Tensor, p: Tensor, g: Tensor, t: Tensor) -> Tensor:
            mdp, extras = model(r, p, g)
            got = birl_ext.solve(*mdp, temperature=t, **extras)
            return joined((got.value, got.q, got.policy))

        def plain(r: Tensor, p: Tensor, g: Tensor, t: Tensor) -> Tensor:
            return joined(plain_solve(r, rows(p), g, t))

        return Subject(ours, plain, (reward, logits, gamma, tau))
    if kind == "bellman":

        def ours(v: Tensor, r: Tensor, p: Tensor, g: Tensor, t: Tensor) -> Tensor:  # type: ignore[misc]
            mdp, extras = model(r, p, g)
            return joined(birl_ext.bellman(v, *mdp, temperature=t, **extras))

        def plain(v: Tensor, r: Tensor, p: Tensor, g: Tensor, t: Tensor) -> Tensor:  # type: ignore[misc]
            return joined(plain_bellman(v, r, rows(p), g, t))

        return Subject(ours, plain, (draw(STATES), reward, logits, gamma, tau))
    if kind == "evaluate":

        def ours(pi: Tensor, r: Tensor, p: Tensor, g: Tensor) -> Tensor:  # type: ignore[misc]
            mdp, extras = model(r, p, g)
            return birl_ext.evaluate(pi.softmax(-1), *mdp, **extras)

        def plain(pi: Tensor, r: Tensor, p: Tensor, g: Tensor) -> Tensor:  # type: ignore[misc]
            return plain_evaluate(pi.softmax(-1), r, rows(p), g)

        return Subject(ours, plain, (policy, reward, logits, gamma))

    def ours(pi: Tensor, p: Tensor, g: Tensor, rho: Tensor) -> Tensor:  # type: ignore[no-redef]
        mdp, extras = model(torch.zeros(STATES, ACTIONS).double(), p, g)
        start = rho.softmax(-1)
        return birl_ext.occupancy(
            pi.softmax(-1), mdp[-1], initial_distribution=start, **extras
        )  # fmt: skip

    def plain(pi: Tensor, p: Tensor, g: Tensor, rho: Tensor) -> Tensor:  # type: ignore[no-redef]
        return plain_occupancy(pi.softmax(-1), rows(p), g, rho.softmax(-1))

    return Subject(ours, plain, (policy, logits, gamma, draw(STATES, seed=2)))


SUBJECTS = ("solve", "bellman", "evaluate", "occupancy", "solve_csr", "evaluate_csr")


def stacked(inputs: tuple[Tensor, ...], count: int = 4) -> tuple[Tensor, ...]:
    """Every input with a leading axis, each lane a little different."""
    steps = torch.linspace(0.9, 1.1, count, dtype=torch.float64)
    return tuple(
        x * steps.reshape(-1, *(1,) * x.dim()) if x.dim() else x * steps for x in inputs
    )  # fmt: skip


def nudges(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.linspace(0.5, 1.0, x.numel()).double().reshape(x.shape) for x in inputs)


def all_of(inputs: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


# Each transform maps (vector function, scalar function, inputs) to tensors.


def by_backward(_: Function, scalar: Function, x: tuple[Tensor, ...]) -> Any:
    leaves = [t.clone().requires_grad_() for t in x]
    scalar(*leaves).backward()
    return [leaf.grad for leaf in leaves]


def by_vjp(vector: Function, _: Function, x: tuple[Tensor, ...]) -> Any:
    out, pull = vjp(vector, *x)  # type: ignore[misc]
    return pull(torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype))


def by_grad_of_grad(_: Function, scalar: Function, x: tuple[Tensor, ...]) -> Any:
    along = nudges(x)

    def slope(*inputs: Tensor) -> Tensor:
        found = grad(scalar, all_of(x))(*inputs)
        return sum((g * d).sum() for g, d in zip(found, along, strict=True))

    return grad(slope, all_of(x))(*x)


TRANSFORMS: dict[str, Callable[[Function, Function, tuple[Tensor, ...]], Any]] = {
    "forward": lambda f, s, x: f(*x),
    "backward": by_backward,
    "grad": lambda f, s, x: grad(s, all_of(x))(*x),
    "grad-of-grad": by_grad_of_grad,
    "vjp": by_vjp,
    "jacrev": lambda f, s, x: jacrev(f, all_of(x))(*x),
    "vmap": lambda f, s, x: vmap(f)(*stacked(x)),
    "vmap-of-grad": lambda f, s, x: vmap(grad(s, all_of(x)))(*stacked(x)),
    "jvp": lambda f, s, x: jvp(f, x, nudges(x))[1],
    "jacfwd": lambda f, s, x: jacfwd(f, all_of(x))(*x),
    "hessian": lambda f, s, x: hessian(s, all_of(x))(*x),
    "vmap-of-hessian": lambda f, s, x: vmap(hessian(s))(*stacked(x)),
    "jacfwd-of-jacfwd": lambda f, s, x: jacfwd(jacfwd(s))(*x),
    "vmap-of-jvp": lambda f, s, x: vmap(lambda *y: jvp(f, y, nudges(y))[1])(*stacked(x)),
}


def leaves_of(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for part in tree for leaf in leaves_of(part)]


def assert_agree(got: Any, want: Any, label: str, relative: float = 1e-9) -> None:
    ours, theirs = leaves_of(got), leaves_of(want)
    assert len(ours) == len(theirs), label
    scale = max(float(t.detach().abs().max()) for t in theirs)
    assert scale > 1e-3, f"{label}: nothing to compare"
    for position, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(one, other, bound=relative * scale, label=f"{label}, part {position}")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_eager(name: str, transform: str) -> None:
    of = subject(name)
    ours, plain = of.scalars()
    apply = TRANSFORMS[transform]
    got = apply(of.ours, ours, of.inputs)
    assert_agree(got, apply(of.plain, plain, of.inputs), f"{transform} of {name}")


def along(function: Function, mode: str, direction: tuple[Tensor, ...]) -> Function:
    """The derivative of a scalar function in a direction."""

    def slope(*inputs: Tensor) -> Tensor:
        if mode == "forward":
            return jvp(function, inputs, direction)[1]
        found = grad(function, all_of(inputs))(*inputs)
        return sum((g * d).sum() for g, d in zip(found, direction, strict=True))

    return slope


def towards(inputs: tuple[Tensor, ...], order: int) -> tuple[Tensor, ...]:
    """Another direction for each derivative."""
    return tuple(x / (1 + order) for x in nudges(inputs))


@functools.cache
def unrolled_along(name: str) -> tuple[Tensor, ...]:
    """The second and the third derivative of the unrolled function."""
    of = subject(name)
    plain, found = of.scalars()[1], []
    for order in (1, 2, 3):
        plain = along(plain, "reverse", towards(of.inputs, order))
        found.append(plain(*of.inputs) if order > 1 else torch.zeros(()))
    return tuple(found)


@pytest.mark.parametrize("modes", list(itertools.product(("forward", "reverse"), repeat=3)))
@pytest.mark.parametrize("name", SUBJECTS)
def test_modes_nest_in_any_order(name: str, modes: tuple[str, ...]) -> None:
    """Second and third derivatives; torch switches forward mode off inside a custom rule."""
    of = subject(name)
    ours = of.scalars()[0]
    for order, mode in enumerate(modes, 1):
        ours = along(ours, mode, towards(of.inputs, order))
        if order > 1:
            want = unrolled_along(name)[order - 1]
            assert_agree(ours(*of.inputs), want, f"{modes[:order]} of {name}")


CHECKS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "gradcheck": lambda f, x: gradcheck(f, x, atol=1e-7, rtol=1e-5),
    "gradgradcheck": lambda f, x: gradgradcheck(f, x, atol=1e-6, rtol=1e-5),
    "forward-gradcheck": lambda f, x: gradcheck(
        f, x, atol=1e-7, rtol=1e-5, check_forward_ad=True, check_backward_ad=False
    ),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_finite_differences(name: str, check: str) -> None:
    of = subject(name)
    CHECKS[check](of.ours, tuple(x.clone().requires_grad_() for x in of.inputs))


COMPILER = {"backend": "aot_eager"}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, **COMPILER)  # type: ignore[call-overload]


COMPILED: dict[str, tuple[str, Callable[[Function, Function, tuple[Tensor, ...]], Any]]] = {
    "forward": ("forward", lambda f, s, x: compiled(f)(*x)),
    "forward-and-backward": ("backward", lambda f, s, x: by_backward(f, compiled(s), x)),
    "grad": ("grad", lambda f, s, x: compiled(grad(s, all_of(x)))(*x)),
    "vmap": ("vmap", lambda f, s, x: compiled(vmap(f))(*stacked(x))),
    "jvp": ("jvp", lambda f, s, x: compiled(lambda *y: jvp(f, y, nudges(x))[1])(*x)),
}


@pytest.mark.slow
@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("name", SUBJECTS)
def test_compiled(name: str, transform: str) -> None:
    """In one graph, and with the numbers of the unrolled function run eagerly."""
    of = subject(name)
    ours, plain = of.scalars()
    eager, apply = COMPILED[transform]
    want = TRANSFORMS[eager](of.plain, plain, of.inputs)
    assert_agree(apply(of.ours, ours, of.inputs), want, f"compiled {transform} of {name}")


@pytest.mark.slow
@pytest.mark.parametrize("nested", ["hessian", "jacfwd-of-jacfwd", "vmap-of-grad"])
def test_compiled_higher_transforms(nested: str) -> None:
    of = subject("solve")
    ours, plain = of.scalars()
    x = of.inputs
    if nested == "hessian":
        got, want = compiled(hessian(ours))(*x), hessian(plain)(*x)
    elif nested == "jacfwd-of-jacfwd":
        got, want = compiled(jacfwd(jacfwd(ours)))(*x), hessian(plain)(*x)
    else:
        x = stacked(x)
        got, want = compiled(vmap(grad(ours)))(*x), vmap(grad(plain))(*x)
    assert_agree(got, want, f"compiled {nested}")


# Graphs of ops, which keep nothing of the Python that made them


class Wrapped(torch.nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def exported(f: Function, x: tuple[Tensor, ...], **options: Any) -> torch.export.ExportedProgram:
    return torch.export.export(Wrapped(f), x, **options)


def from_a_file(save: Callable[..., None], load: Callable[..., Any], graph: Any) -> Any:
    buffer = io.BytesIO()
    save(graph, buffer)
    buffer.seek(0)
    return load(buffer)


GRAPHS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "export": lambda f, x: exported(f, x).module(),
    "export-strict": lambda f, x: exported(f, x, strict=True).module(),
    "export-file": lambda f, x: from_a_file(
        torch.export.save, torch.export.load, exported(f, x)
    ).module(),
    "export-decomposed": lambda f, x: exported(f, x).run_decompositions().module(),
    "make_fx": lambda f, x: make_fx(f)(*x),
    "make_fx-symbolic": lambda f, x: make_fx(
        f, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(*x),
    "make_fx-pre-dispatch": lambda f, x: make_fx(f, pre_dispatch=True)(*x),
    "trace-file": lambda f, x: from_a_file(
        torch.jit.save, torch.jit.load, torch.jit.trace(Wrapped(f), x)
    ),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("how", "name"),
    [
        *((how, "solve") for how in GRAPHS),
        *(("export-decomposed", name) for name in SUBJECTS[1:]),
        *(("make_fx", name) for name in SUBJECTS[1:]),
    ],
)
def test_a_graph_of_ops_keeps_the_gradient(how: str, name: str) -> None:
    """Values and gradients at inputs that it was not made with."""
    of = subject(name)
    graph = GRAPHS[how](of.ours, of.inputs)
    other = tuple(1.01 * x for x in of.inputs)
    assert_agree(graph(*other), of.plain(*other), f"{how} of {name}")
    got = by_backward(graph, summed(graph), other)
    assert_agree(got, by_backward(of.plain, of.scalars()[1], other), f"gradient of {how} of {name}")


def restricted() -> Function:
    """With numbers for γ and τ, a mask, an end and a reference."""
    rows, weights = draw(STATES, ACTIONS, STATES).softmax(-1), draw(STATES, ACTIONS).exp()
    mask, terminal = torch.ones(STATES, ACTIONS) > 0, torch.arange(STATES) == STATES - 1
    mask[0, 1] = mask[-1, 1] = False
    options: dict[str, Any] = {"mask": mask, "terminal": terminal, "reference": weights}

    def found(reward: Tensor) -> Tensor:
        got = birl_ext.solve(reward, rows, discount=0.6, temperature=0.5, **options)
        return torch.cat((got.value.flatten(), got.policy.flatten()))

    return found


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", GRAPHS)
def test_a_graph_of_a_restricted_problem_keeps_the_gradient(how: str) -> None:
    eager, inputs = restricted(), (draw(2, STATES, ACTIONS),)
    graph = GRAPHS[how](eager, inputs)
    other = (1.01 * inputs[0],)
    got, want = (by_backward(f, summed(f), other) for f in (graph, eager))
    assert_agree(got, want, how)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_of_any_size_keeps_the_gradient(strict: bool) -> None:
    def policy(reward: Tensor, logits: Tensor) -> Tensor:
        return birl_ext.solve(reward, logits.softmax(-1), discount=0.6, temperature=0.5).policy

    any_size = {i: torch.export.Dim.AUTO for i in range(3)}
    program = exported(
        policy,
        (draw(2, STATES, ACTIONS), draw(STATES, ACTIONS, STATES)),
        dynamic_shapes={"inputs": (any_size, any_size)},
        strict=strict,
    )
    for graph in (program.module(), program.run_decompositions().module()):
        for count, states, actions in ((3, STATES, ACTIONS), (2, 7, 4)):
            other = draw(count, states, actions), draw(states, actions, states)
            got, want = (by_backward(f, summed(f), other) for f in (graph, policy))
            assert_agree(got, want, f"{count} of {states} states")


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        *((how, "solve") for how in (*TRANSFORMS, *(f"compiled-{how}" for how in COMPILED))),
        *((how, name) for how in ("vmap-of-grad", "hessian") for name in SUBJECTS[1:3]),
    ],
)
def test_the_bare_ops_pass_every_transform(transform: str, name: str) -> None:
    of = subject(name)
    bare = make_fx(of.ours)(*of.inputs)
    eager, apply = transform, TRANSFORMS.get(transform)
    if apply is None:
        eager, apply = COMPILED[transform.removeprefix("compiled-")]
    want = TRANSFORMS[eager](of.plain, of.scalars()[1], of.inputs)
    assert_agree(apply(bare, summed(bare), of.inputs), want, f"{transform} of {name}, bare")


@pytest.mark.slow
# the cache on disk does not know when an op changes the shape of what it returns
@torch._inductor.config.patch(fx_graph_cache=False)
@torch._functorch.config.patch(enable_autograd_cache=False)
@pytest.mark.parametrize("transform", COMPILED)
def test_inductor(transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default compiler."""
    monkeypatch.setitem(COMPILER, "backend", "inductor")
    test_compiled("solve", transform)


# vmap over some of the inputs only: each choice takes another path through (N, G)


@pytest.mark.parametrize("name", ["solve", "bellman", "evaluate", "occupancy", "solve_csr"])
@pytest.mark.parametrize("mapped", [0, 1, 2, -1])
def test_vmap_over_one_input(name: str, mapped: int) -> None:
    of = subject(name)
    axes: list[int | None] = [None] * len(of.inputs)
    axes[mapped] = 0
    many = list(of.inputs)
    many[mapped] = stacked(of.inputs)[mapped]
    ours, plain = of.scalars()
    for what, one, other in (
        ("values", of.ours, of.plain),
        ("gradients", grad(ours, all_of(of.inputs)), grad(plain, all_of(of.inputs))),
    ):
        got = vmap(one, tuple(axes))(*many)
        want = vmap(other, tuple(axes))(*many)
        assert_agree(got, want, f"vmap of {name} over input {mapped}, {what}")


def test_vmap_over_an_axis_that_is_not_the_first_and_nested() -> None:
    of = subject("solve")
    reward, logits, gamma, tau = of.inputs
    rewards = torch.stack([reward + 0.1 * i for i in range(6)], -1)

    def values(r: Tensor) -> Tensor:
        return of.ours(r, logits, gamma, tau)

    def wanted(r: Tensor) -> Tensor:
        return of.plain(r, logits, gamma, tau)

    got, want = vmap(values, -1)(rewards), vmap(wanted, -1)(rewards)
    assert_agree(got, want, "vmap over the last axis")
    square = rewards.reshape(STATES, ACTIONS, 2, 3)
    got = vmap(vmap(values, -1), 2)(square)
    assert_agree(got, want.reshape(2, 3, -1), "vmap of vmap")


@pytest.mark.parametrize("batch", [(), (5,)], ids=str)
def test_vmap_meets_batch_axes(batch: tuple[int, ...]) -> None:
    """A function that is already batched, mapped over models: the ensemble case."""
    transition = draw(3, STATES, ACTIONS, STATES).softmax(-1)
    reward = draw(*batch, STATES, ACTIONS)

    def values(rows: Tensor) -> Tensor:
        return birl_ext.solve(reward, rows, discount=0.6, temperature=0.5).value

    got = vmap(values)(transition)
    want = torch.stack([values(rows) for rows in transition])
    assert_close(got, want, bound=1e-13, label="ensemble")


def test_dynamic_shapes_are_compiled_once() -> None:
    """Four batch sizes: the first is specialised, the second makes the axis symbolic."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    transition = draw(STATES, ACTIONS, STATES).softmax(-1)

    @torch.compile(fullgraph=True, backend=counter)
    def slope(reward: Tensor) -> Tensor:
        def total(r: Tensor) -> Tensor:
            got = birl_ext.solve(r, transition, discount=0.6, temperature=0.5)
            return got.policy.square().sum()

        return grad(total)(reward)

    for count in (3, 4, 6, 9):
        reward = draw(count, STATES, ACTIONS)
        leaf = reward.clone().requires_grad_()
        rows = [plain_solve(r, transition, 0.6, 0.5)[2].square().sum() for r in leaf]
        (want,) = torch.autograd.grad(torch.stack(rows).sum(), leaf)
        assert_agree(slope(reward), want, f"batch of {count}")
    assert counter.frame_count <= 2


class Agent(torch.nn.Module):
    """Features to rewards to a soft-optimal policy."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.reward = torch.nn.Linear(4, ACTIONS)
        self.planner = SoftPlanner(
            discount=0.6,
            temperature=0.5,
            transition=draw(STATES, ACTIONS, STATES).softmax(-1).float(),
            learn_temperature=True,
            **options,
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.planner(self.reward(features)).policy

    def plain(self, features: Tensor) -> Tensor:
        assert self.planner.transition is not None
        tau = self.planner.log_temperature.exp()
        reward, rows = self.reward(features).double(), self.planner.transition.double()
        return plain_solve(reward, rows / rows.sum(-1, keepdim=True), 0.6, tau)[2].float()


def loss_and_grads(agent: Agent, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    loss = forward(x).square().sum()
    return [loss, *torch.autograd.grad(loss, list(agent.parameters()))]


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed", "compiled-checkpointed"])
def test_a_planner_inside_a_network(how: str) -> None:
    """The module, its learned temperature included, trains as its unrolled twin does."""
    agent = Agent()
    features = draw(STATES, 4).float()

    def forward(x: Tensor) -> Tensor:
        if "checkpointed" in how:
            out: Tensor = checkpoint(agent, x, use_reentrant=False)
            return out
        result: Tensor = agent(x)
        return result

    run = compiled(forward) if "compiled" in how else forward
    got = loss_and_grads(agent, run, features)
    assert_agree(got, loss_and_grads(agent, agent.plain, features), how, relative=1e-5)


def test_bfloat16_autocast_reaches_the_planner_and_back() -> None:
    agent = Agent()
    features = draw(STATES, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert agent.reward(features).dtype == torch.bfloat16
        got = loss_and_grads(agent, agent, features)
    want = loss_and_grads(agent, agent, features)
    assert_agree(got, want, "autocast", relative=3e-2)


@pytest.mark.parametrize("kind", ["solve", "evaluate"])
def test_autocast_does_not_round_a_gradient(kind: str) -> None:
    transition = draw(STATES, ACTIONS, STATES).softmax(-1).float()
    reward, policy = draw(STATES, ACTIONS).float(), draw(STATES, ACTIONS).softmax(-1).float()

    def total(rows: Tensor) -> Tensor:
        if kind == "solve":
            found = birl_ext.solve(reward, rows, discount=0.6, temperature=0.5).value
        else:
            found = birl_ext.evaluate(policy, reward, rows, discount=0.6)
        return (found * found).sum()

    want = grad(total)(transition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_agree(grad(total)(transition), want, "grad inside", relative=1e-6)
        leaf = transition.clone().requires_grad_()
        total(leaf).backward()
        assert leaf.grad is not None
        assert_agree(leaf.grad, want, "backward inside", relative=1e-6)


def test_a_first_call_in_inference_mode_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(birl_ext.model.layout, "_ABSENT", {})
    transition = draw(STATES, ACTIONS, STATES).softmax(-1)
    problem: dict[str, Any] = {"discount": torch.tensor(0.6).double(), "temperature": 0.5}
    with torch.inference_mode():
        birl_ext.solve(draw(STATES, ACTIONS), transition, **problem)
    reward = draw(STATES, ACTIONS).requires_grad_()
    birl_ext.solve(reward, transition, **problem).value.sum().backward()
    assert reward.grad is not None


def test_inference_mode_and_no_grad() -> None:
    of = subject("solve")
    want = of.plain(*of.inputs)
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            got = of.ours(*of.inputs)
        assert not got.requires_grad
        assert_agree(got, want, context.__name__)


def test_a_parameter_vector_as_functional_call_sees_it() -> None:
    """torch.func.functional_call over an ensemble of modules, the way vmapped training is done."""
    agents = [Agent() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(agents)
    features = draw(STATES, 4).float()

    def loss(own: Any, fixed: Any) -> Tensor:
        policy = torch.func.functional_call(agents[0], (own, fixed), (features,))
        return policy.square().sum()

    got = vmap(grad(loss))(parameters, buffers)
    for i, agent in enumerate(agents):
        want = loss_and_grads(agent, agent.plain, features)[1:]
        own = [got[name][i] for name, _ in agent.named_parameters()]
        assert_agree(own, want, f"agent {i}", relative=1e-5)


# The raw ops keep what they promise to the dispatcher


def raw_arguments(op: str, sparse: bool) -> tuple[Any, ...]:
    n, g = 2, 3
    absent = torch.empty(0, dtype=torch.int64)
    crow, col = (CROW, COL) if sparse else (absent, absent)
    logits = draw(n, len(COL)) if sparse else draw(n, STATES, ACTIONS, STATES)
    rows = torch.stack([on_pattern(one) for one in logits]) if sparse else logits.softmax(-1)
    discount = torch.full((n, g), 0.6, dtype=torch.float64)
    table = draw(n, g, STATES, ACTIONS)
    if op in ("push", "flow"):
        policy, rhs = table.softmax(-1), draw(n, g, 2, STATES)
        mass = (rhs.sum(-1) / (1 - discount.unsqueeze(-1)),) if op == "flow" else ()
        return (rows, crow, col, policy, discount, rhs, *mass, 1, 0)
    log_reference = 0.1 * table
    data = (rows, crow, col, table, log_reference, discount, 0.5 + 0 * discount)
    if op == "bellman":
        return (*data, draw(n, g, STATES), 0)
    return (*data, torch.empty(0, dtype=torch.float64), (n, g), 0, 0.0, 0, 2, False, 0)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("op", ["bellman", "solve", "push", "flow"])
def test_opcheck(op: str, sparse: bool) -> None:
    """Schema, aliasing, derivatives, fake tensors, and tracing with symbolic shapes."""
    torch.library.opcheck(
        getattr(torch.ops.birl_ext, op).default,
        raw_arguments(op, sparse),
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        ),
    )


@pytest.mark.parametrize("transform", ["grad", "compile", "vmap"])
def test_a_failed_solve_is_not_silent_inside_a_transform(transform: str) -> None:
    """Nothing can be read while tracing, so the op itself raises; "status" returns NaN instead."""
    reward, rows = draw(STATES, ACTIONS), draw(STATES, ACTIONS, STATES).softmax(-1)
    rows[1, 0] *= 0.9

    def values(r: Tensor, **options: Any) -> Tensor:
        return birl_ext.solve(r, rows, discount=0.6, temperature=0.5, **options).value.sum()

    apply: Callable[..., Any] = {  # type: ignore[assignment]
        "grad": grad,
        "compile": compiled,
        "vmap": lambda f: lambda r: vmap(f)(r.unsqueeze(0)),
    }[transform]
    with pytest.raises(birl_ext.errors.NonStochasticError, match=r"BIRL-E101 .* state 1, action 0"):
        apply(values)(reward)
    quiet = apply(lambda r: values(r, on_fail="status"))(reward)
    assert torch.isnan(quiet).all()
