"""Private names of torch stand in one file, and each of them does what the package takes it for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from birl_ext import torch_internals as internals

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
PACKAGE = Path(__file__).resolve().parents[1] / "birl_ext"


def private_names(source: str) -> list[str]:
    """The private names of torch in a file, as far as they can be told without running it."""
    tree = ast.parse(source)
    ours, found = {"torch"}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            ours |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            paths = [node.value] if re.fullmatch(r"torch(\.\w+)+", node.value) else []
        else:
            continue
        found += [path for path in paths if re.search(r"\._", path)]
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)):
            continue
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            root = root.value
        name = root.id if isinstance(root, ast.Name) else ""
        if name in ours or (name != "self" and hasattr(Tensor, node.attr)):
            found.append(ast.unparse(node))
    return found


def test_no_other_file_has_private_names_of_torch() -> None:
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in sorted(PACKAGE.rglob("*.py"))
        if (names := private_names(path.read_text()))
    }
    assert list(found) == ["torch_internals.py"], found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch._C._is_tracing()", True),
        ("import torch._dynamo", True),
        ("from torch._functorch import utils", True),
        ("from torch import _foreach_copy_", True),
        ("from torch import Tensor as T\nT._is_zerotensor", True),
        ("def f(t): return t._is_zerotensor()", True),
        ("name = 'torch._dynamo'", True),
        ("'''Of torch._dynamo it is said.'''", False),
        ("import torch\ntorch.compiler.is_compiling()", False),
        ("self._cache = layout._replace(order=None)", False),
    ],
)
def test_private_names_are_recognised(source: str, found: bool) -> None:
    assert bool(private_names(source)) == found


# ---- one test for each name ---------------------------------------------------------------------


def test_every_name_has_a_test() -> None:
    tested = {name for name in globals() if name.startswith("test_")}
    missing = [
        name for name in internals.__all__ if f"test_{name.lower().strip('_')}" not in tested
    ]
    assert not missing


def test_dynamo() -> None:
    code = (
        f"import sys, torch; before = {internals.DYNAMO!r} in sys.modules; torch.compile(abs)(-1)"
    )
    code += f"; print(before, {internals.DYNAMO!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "True", done.stdout


def test_before_transforms() -> None:
    """Implemented at that key, an op is asked before a transform has been applied to it."""
    library = torch.library.Library("birl_ext_test_key", "DEF")
    library.define("double(Tensor x) -> Tensor")
    seen = []

    def told(x: Tensor) -> Tensor:
        seen.append(internals.is_wrapped(x))
        return x

    library.impl("double", told, internals.BEFORE_TRANSFORMS)
    torch.func.vmap(torch.ops.birl_ext_test_key.double)(torch.ones(2))
    assert seen == [True]


def seen_by(transform: Any, question: Any) -> Any:
    """What a question about a tensor is answered inside a transform."""
    answers = []

    def ask(x: Tensor) -> Tensor:
        answers.append(question(x))
        return x.sum()

    transform(ask)(torch.ones(2, 2))
    return answers[0]


def test_transforms_active() -> None:
    for transform in (torch.func.vmap, torch.func.grad, torch.func.jacfwd):
        assert seen_by(transform, lambda _: internals.transforms_active())
    assert not internals.transforms_active()


def test_is_wrapped() -> None:
    for transform in (torch.func.vmap, torch.func.grad, torch.func.jacfwd):
        assert seen_by(transform, internals.is_wrapped)
    assert not internals.is_wrapped(torch.ones(2))


def test_is_mapped_by_the_older_vmap() -> None:
    x = torch.ones(2, requires_grad=True)
    y = x.square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    seen = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, bar: Tensor) -> Tensor:
            seen.append(internals.is_mapped_by_the_older_vmap(bar))
            return bar

    (first,) = torch.autograd.grad(Identity.apply(x).square().sum(), x, create_graph=True)
    seen.clear()
    torch.autograd.grad(first, x, torch.eye(2), is_grads_batched=True)
    assert seen == [True]
    assert not internals.is_mapped_by_the_older_vmap(x)


def test_innermost_level() -> None:
    def nested(x: Tensor) -> Tensor:
        outer = internals.innermost_level().level()
        inner = seen_by(torch.func.vmap, lambda _: internals.innermost_level().level())
        assert inner == outer + 1
        return x.sum()

    torch.func.grad(nested)(torch.ones(2))


def test_unwrap_level() -> None:
    def plain_inside(x: Tensor) -> bool:
        inside = internals.unwrap_level(x, internals.innermost_level().level())
        return not internals.is_wrapped(inside)

    assert seen_by(torch.func.grad, plain_inside)


def test_wrap_level() -> None:
    def again(x: Tensor) -> bool:
        level = internals.innermost_level().level()
        inside = internals.unwrap_level(x, level)
        return internals.is_wrapped(internals.wrap_level(inside, level))

    assert seen_by(torch.func.grad, again)


def test_unwrap_dead_wrappers() -> None:
    kept = []
    torch.func.grad(lambda x: kept.append(x) or x.sum())(torch.ones(2))
    assert internals.is_wrapped(kept[0])
    (alive,) = internals.unwrap_dead_wrappers((kept[0],))
    assert not internals.is_wrapped(alive)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        return 3 * bar  # not two: so the rule is known to be used


def test_custom_function_call() -> None:
    def tripled(x: Tensor) -> Tensor:
        return internals.custom_function_call(Doubled, x).sum()

    assert torch.func.grad(tripled)(torch.ones(2)).tolist() == [3, 3]


def test_excluding_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    with internals.excluding_autograd():
        assert not (2 * x).requires_grad
    assert (2 * x).requires_grad


def test_is_zero_without_memory() -> None:
    zero = torch._efficientzerotensor(3)
    assert internals.is_zero_without_memory(zero)
    assert not internals.is_zero_without_memory(torch.zeros(3))


def test_within_forward_mode() -> None:
    assert not internals.within_forward_mode()
    with forward_ad.dual_level():
        assert internals.within_forward_mode()


def test_forward_mode() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with internals.forward_mode(False):
            assert forward_ad.unpack_dual(2 * dual).tangent is None
            with internals.forward_mode(True):
                assert forward_ad.unpack_dual(2 * dual).tangent.tolist() == [2, 2]


def test_is_tracing() -> None:
    seen = []

    def told(x: Tensor) -> Tensor:
        seen.append(internals.is_tracing())
        return x + 1

    torch.jit.trace(told, torch.ones(1), check_trace=False)
    assert seen == [True]
    assert not internals.is_tracing()


def test_dispatch_modes() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    assert internals.dispatch_modes() == 0
    with TorchDispatchMode():
        assert internals.dispatch_modes() == 1


def test_function_modes() -> None:
    from torch.overrides import TorchFunctionMode

    assert internals.function_modes() == 0
    with TorchFunctionMode():
        assert internals.function_modes() == 1


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_is_proxied(pre_dispatch: bool) -> None:
    seen = []

    def told(x: Tensor) -> Tensor:
        seen.append(internals.is_proxied())
        return x + 1

    make_fx(told, pre_dispatch=pre_dispatch)(torch.ones(1))
    assert seen == [True]
    assert not internals.is_proxied()


def test_copy_all() -> None:
    ours = [torch.zeros(2), torch.zeros(1)]
    internals.copy_all_(ours, [torch.ones(2), torch.ones(1)])
    assert [x.sum().item() for x in ours] == [2, 1]


def test_lerp_all() -> None:
    ours = [torch.zeros(2), torch.zeros(1)]
    internals.lerp_all_(ours, [torch.ones(2), torch.ones(1)], 0.25)
    assert [x.sum().item() for x in ours] == [0.5, 0.25]


# ---- what they tell together --------------------------------------------------------------------


class Labelled(Tensor):
    """A subclass: its operators are its own."""


def unusual() -> list[Tensor]:
    """Tensors whose numbers are not simply there."""
    return [
        torch.ones(2).as_subclass(Labelled),
        torch._neg_view(torch.ones(2)),
        torch._efficientzerotensor(2),
    ]


def test_ordinary() -> None:
    assert type(torch.ones(1)) in internals.ORDINARY
    assert type(torch.nn.Parameter(torch.ones(1))) in internals.ORDINARY
    assert Labelled not in internals.ORDINARY


def test_are_ordinary() -> None:
    assert internals.are_ordinary([torch.ones(2), torch.nn.Parameter(torch.ones(2))])
    for tensor in unusual():
        assert not internals.are_ordinary([torch.ones(2), tensor]), tensor


def followed(question: Any, *, dual: bool) -> list[bool]:
    """What is answered inside transforms, modes and traces that follow every computation."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    answers: list[bool] = []
    asked = [torch.ones(2)]

    def ask(x: Tensor) -> Tensor:
        answers.append(question(asked))
        return x + 1

    for mode in (TorchFunctionMode, TorchDispatchMode):
        with mode():
            answers.append(question(asked))
    torch.jit.trace(ask, torch.ones(1), check_trace=False)
    if dual:
        torch.func.vmap(ask)(torch.ones(1))
        with forward_ad.dual_level():
            ask(torch.ones(1))
    return answers


def test_computes_directly() -> None:
    assert internals.computes_directly([torch.ones(2)])
    assert followed(internals.computes_directly, dual=False) == [False] * 3
    assert not internals.computes_directly(unusual())


def test_nobody_follows() -> None:
    assert internals.nobody_follows([torch.ones(2)])
    assert followed(internals.nobody_follows, dual=True) == [False] * 5
    assert not internals.nobody_follows(unusual())


def test_is_first_order() -> None:
    assert not internals.is_first_order([torch.ones(2)])
    with torch.no_grad():
        assert internals.is_first_order([torch.ones(2)])
        assert followed(internals.is_first_order, dual=True) == [False] * 5
        assert not internals.is_first_order(unusual())


def test_is_concrete() -> None:
    assert internals.is_concrete(torch.ones(2), None, 1.0, torch.nn.Parameter(torch.ones(2)))
    for tensor in (torch.ones(2, device="meta"), torch.ones(2).as_subclass(Labelled)):
        assert not internals.is_concrete(torch.ones(2), tensor)
    for transform in (torch.func.vmap, torch.func.grad):
        assert not seen_by(transform, internals.is_concrete)
        outside = torch.ones(2)
        assert seen_by(transform, lambda _, x=outside: internals.is_concrete(x))
