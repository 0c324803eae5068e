"""All private names of torch that the package uses, so that there is one place to look when torch
moves; `tests/test_torch_internals.py` notices the loss of each.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.autograd_function import custom_function_call
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter as innermost_level
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

__all__ = [
    "DYNAMO",
    "copy_all_",
    "custom_function_call",
    "dispatch_modes",
    "excluding_autograd",
    "forward_mode",
    "function_modes",
    "innermost_level",
    "is_mapped_by_the_older_vmap",
    "is_proxied",
    "is_tracing",
    "is_wrapped",
    "is_zero_without_memory",
    "lerp_all_",
    "transforms_active",
    "unwrap_dead_wrappers",
    "unwrap_level",
    "within_forward_mode",
    "wrap_level",
]

DYNAMO = "torch._dynamo"

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


def within_forward_mode() -> bool:
    """Whether a `forward_ad.dual_level` is open."""
    return forward_ad._current_level >= 0


def is_proxied() -> bool:
    """Whether make_fx, or an export, records what is computed now."""
    if torch._C._get_dispatch_mode(_PROXY) is not None:
        return True
    # a trace before the dispatcher watches Python functions too
    if not function_modes():
        return False
    return torch._ops._get_dispatch_mode_pre_dispatch(_PROXY) is not None  # type: ignore[no-untyped-call]
