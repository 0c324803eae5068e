"""All private names of torch that the package uses, so that there is one place to look when torch
moves, and what they tell: who follows a computation, and what tensors are. `test_torch_internals`
notices the loss of each.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter as innermost_level
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

__all__ = [
    "BEFORE_TRANSFORMS",
    "DYNAMO",
    "ORDINARY",
    "are_ordinary",
    "computes_directly",
    "copy_all_",
    "custom_function_call",
    "dispatch_modes",
    "excluding_autograd",
    "forward_mode",
    "function_modes",
    "innermost_level",
    "is_concrete",
    "is_first_order",
    "is_mapped_by_the_older_vmap",
    "is_proxied",
    "is_tracing",
    "is_wrapped",
    "is_zero_without_memory",
    "lerp_all_",
    "nobody_follows",
    "transforms_active",
    "unwrap_dead_wrappers",
    "unwrap_level",
    "within_forward_mode",
    "wrap_level",
]

DYNAMO = "torch._dynamo"
BEFORE_TRANSFORMS = "FuncTorchDynamicLayerFrontMode"
"""The dispatch key at which an op meets functorch's innermost level."""

transforms_active = torch._C._are_functorch_transforms_active
is_tracing = torch._C._is_tracing  # by torch.jit.trace
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
excluding_autograd = torch._C._AutoDispatchBelowAutograd
is_wrapped = _functorch.is_functorch_wrapped_tensor
is_mapped_by_the_older_vmap = _functorch.is_legacy_batchedtensor
unwrap_level = _functorch._unwrap_for_grad
wrap_level = _functorch._wrap_for_grad
is_zero_without_memory = Tensor._is_zerotensor
forward_mode = forward_ad._set_fwd_grad_enabled
copy_all_ = torch._foreach_copy_
lerp_all_ = torch._foreach_lerp_

_PROXY = torch._C._TorchDispatchModeKey.PROXY


ORDINARY = (Tensor, torch.nn.Parameter)


def within_forward_mode() -> bool:
    """Whether a `forward_ad.dual_level` is open."""
    return forward_ad._current_level >= 0


def are_ordinary(tensors: Iterable[Tensor]) -> bool:
    """Whether all hold their own numbers: no subclass, not mapped, not lazily negated or zero."""
    for t in tensors:  # a generator would cost as much again
        # tensors that are negated lazily or zero without memory are resolved by the dispatcher too
        if (
            type(t) not in ORDINARY
            or is_mapped_by_the_older_vmap(t)
            or t.is_neg()
            or is_zero_without_memory(t)
        ):
            return False
    return True


def computes_directly(tensors: Iterable[Tensor]) -> bool:
    """Whether an op may be computed at once: ordinary tensors, and nobody listens to the
    dispatcher.

    The dispatcher costs more than the arithmetic of a small problem.
    """
    return not _is_watched() and are_ordinary(tensors)


def nobody_follows(tensors: Iterable[Tensor]) -> bool:
    """Whether no transform, mode, trace or forward derivative follows what ordinary tensors do."""
    return not (transforms_active() or within_forward_mode()) and computes_directly(tensors)


def is_first_order(tensors: Iterable[Tensor]) -> bool:
    """Whether nobody differentiates or maps what is computed now, of ordinary tensors."""
    return not torch.is_grad_enabled() and nobody_follows(tensors)


def is_concrete(*tensors: Tensor | float | None) -> bool:
    """Whether every tensor holds numbers that may be read now without breaking a trace."""
    if torch.compiler.is_compiling() or is_tracing():
        return False
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        # Fake, functional and distributed tensors are subclasses; vmap and grad wrap.
        if type(tensor) not in ORDINARY or tensor.is_meta or is_wrapped(tensor):
            return False
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
    return not is_proxied()


def _is_watched() -> bool:
    """Whether a compiler, a trace or a mode wants to see every op."""
    return bool(
        torch.compiler.is_compiling()
        or is_tracing()
        or dispatch_modes()
        or function_modes()  # a trace before the dispatcher is one of these
    )


def is_proxied() -> bool:
    """Whether make_fx, or an export, records what is computed now."""
    if torch._C._get_dispatch_mode(_PROXY) is not None:
        return True
    # a trace before the dispatcher watches Python functions too
    if not function_modes():
        return False
    return torch._ops._get_dispatch_mode_pre_dispatch(_PROXY) is not None  # type: ignore[no-untyped-call]
