"""What an object's next step depends on, taken out as plain data and put back to the same bits."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.errors import OptionError, ShapeError

__all__ = ["Stateful"]


class Stateful:
    """An object whose state is that of the attributes named in `STATE`, those of its bases too.

    They may be numbers, None, tensors, generators, modules, optimisers, whatever has a state that
    is a snapshot, and lists and dicts of these. A leading underscore is no part of the name that a
    state has.
    """

    STATE: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, as a snapshot."""
        return {name.lstrip("_"): _taken(getattr(self, name)) for name in self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, which stays as it is.

        Raises:
            OptionError, ShapeError: it is that of another object.
        """
        for name in self._state():
            key = name.lstrip("_")
            setattr(self, name, _put(getattr(self, name), state[key], key))

    @contextmanager
    def taken_back(self, *, always: bool = False, without: Sequence[str] = ()) -> Iterator[None]:
        """What happens inside to the state is taken back after an error, or `always`."""
        names = [name for name in self._state() if name not in without]
        kept = {name: _taken(getattr(self, name)) for name in names}
        try:
            yield
        except BaseException:
            always = True
            raise
        finally:
            for name, part in kept.items() if always else ():
                setattr(self, name, _put(getattr(self, name), part, name))

    @classmethod
    def _state(cls) -> list[str]:
        return [name for base in reversed(cls.__mro__) for name in base.__dict__.get("STATE", ())]


def _taken(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Optimizer):
        return copy.deepcopy(value.state_dict())
    if isinstance(value, nn.Module):  # whose own holds the live parameters
        value = value.state_dict()
    elif hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, Mapping):
        return {key: _taken(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_taken(part) for part in value]
    return copy.deepcopy(value)


def _put(ours: Any, state: Any, name: str) -> Any:
    """What takes the place of `ours`: itself where it can be changed, for others may hold it."""
    if isinstance(ours, torch.Generator):
        ours.set_state(state)
    elif hasattr(ours, "load_state_dict"):
        if state is not None:
            ours.load_state_dict(copy.deepcopy(state) if isinstance(ours, Optimizer) else state)
    elif ours is None and isinstance(state, Mapping):
        return None  # of a part that this object does without
    elif isinstance(ours, Tensor) and ours.requires_grad:
        if ours.shape != state.shape:
            raise ShapeError(
                f"the stored {name} has shape {tuple(state.shape)}", allowed=str(tuple(ours.shape))
            )
        with torch.no_grad():
            ours.copy_(state)
    elif isinstance(ours, Mapping):
        _check_same(name, list(ours), list(state))
        return {key: _put(part, state[key], f"{name}[{key!r}]") for key, part in ours.items()}
    elif isinstance(ours, list | tuple):
        _check_same(name, len(ours), len(state))
        parts = [_put(part, state[i], f"{name}[{i}]") for i, part in enumerate(ours)]
        return ours._make(parts) if hasattr(ours, "_make") else type(ours)(parts)
    elif isinstance(state, Tensor):
        return state.clone().to(ours.device) if isinstance(ours, Tensor) else state.clone()
    elif isinstance(ours, int | float) and state is not None:
        return type(ours)(state)
    else:
        return copy.deepcopy(state)
    return ours


def _check_same(name: str, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        raise OptionError(f"the stored {name} has {theirs}", allowed=str(ours))
