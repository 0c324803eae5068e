"""What an object's next step depends on, taken out as plain data and put back to the same bits."""

from __future__ import annotations

import copy
import itertools
import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from birl_ext.errors import BirlError, DtypeError, OptionError, ShapeError

__all__ = ["Stateful", "put", "taken"]

_ELEMENTWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
)
"""Optimisers whose own tensors have the shapes of the parameters, or are numbers."""


class Stateful:
    """An object whose state is that of the attributes named in `STATE`, those of its bases too.

    They may be numbers, None, tensors, generators, modules, optimisers, whatever has a state that
    is a snapshot, and lists and dicts of these. A leading underscore is no part of the name that a
    state has.
    """

    STATE: ClassVar[tuple[str, ...]] = ()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, as a snapshot."""
        return {name.lstrip("_"): taken(getattr(self, name)) for name in self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, which stays as it is.

        Raises:
            OptionError, ShapeError, DtypeError: it is that of another object; nothing has changed.
                What else a part raises whose own `load_state_dict` alone can judge (environments,
                buffers, a log) leaves those before it changed.
        """
        self._check_state(state)
        for name in self._state():
            key = name.lstrip("_")
            setattr(self, name, put(getattr(self, name), state[key]))

    def _check_state(self, state: Any, name: str = "") -> None:
        """Refuse a state that cannot be put, before anything has changed."""
        own = {key.lstrip("_"): getattr(self, key) for key in self._state()}
        _check(own, state, name)

    @contextmanager
    def taken_back(self, *, always: bool = False, without: Sequence[str] = ()) -> Iterator[None]:
        """What happens inside to the state is taken back after an error, or `always`."""
        names = [name for name in self._state() if name not in without]
        held = {name: getattr(self, name) for name in names}
        kept = {name: taken(part) for name, part in held.items()}
        try:
            yield
        except BaseException:
            always = True
            raise
        finally:
            for name, part in kept.items() if always else ():
                setattr(self, name, put(held[name], part))

    @contextmanager
    def loaded_whole(self, optional: Collection[str] = ()) -> Iterator[None]:
        """A state is loaded inside, all of it or nothing: what no check has seen before is taken
        back, by a named error. Only the `optional` parts may be None where they are not.
        """
        kinds = {name: type(getattr(self, name)) for name in self._state()}
        try:
            with self.taken_back():
                yield
                for name, kind in kinds.items():
                    now = getattr(self, name)
                    if name in optional:
                        fits = now is None or isinstance(now, Tensor)
                    else:
                        fits = isinstance(now, kind | int if kind is float else kind)
                    if not fits:
                        raise OptionError(
                            f"the stored {name.lstrip('_')} is {_described(now)}",
                            allowed=f"a {kind.__name__}",
                        )
        except BirlError:
            raise
        except Exception as error:  # of a part that torch judges: an optimiser, a module
            raise OptionError(
                f"the stored state does not fit: {type(error).__name__} {str(error)[:200]}",
                fix="load it into one that was made with the same arguments",
            ) from error

    @classmethod
    def _state(cls) -> list[str]:
        return [name for base in reversed(cls.__mro__) for name in base.__dict__.get("STATE", ())]


def taken(value: Any) -> Any:
    """A snapshot of what an attribute holds, as plain data."""
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
        return {key: taken(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [taken(part) for part in value]
    return copy.deepcopy(value)


def _check(ours: Any, state: Any, name: str) -> None:
    """Refuse what cannot be put into `ours`, by names, shapes and dtypes."""
    kind: type[BirlError] = OptionError
    parts: Iterable[tuple[Any, Any]] = ()
    always = isinstance(ours, torch.Generator | Stateful) or getattr(ours, "requires_grad", False)
    if isinstance(ours, nn.Module):
        ours = ours.state_dict()
    elif isinstance(ours, torch.Generator):
        ours = ours.get_state()
    found, allowed = _described(state), _described(ours)
    if isinstance(ours, Optimizer):
        mine, theirs = _groups(ours.state_dict()), _groups(state)
        fits = mine == theirs
        assert mine is not None
        allowed = f"that of an optimiser of {mine[0]} parameters"
        if theirs is not None:
            found = f"that of an optimiser of {theirs[0]} parameters"
            if theirs[0] == mine[0]:  # but of another kind
                found, allowed = (
                    f"{found} with {_names(theirs[1])}",
                    f"{allowed} with {_names(mine[1])}",
                )
        if fits:
            _check_optimiser(ours, state, name)
    elif isinstance(ours, Mapping):
        fits = isinstance(state, Mapping) and state.keys() == ours.keys()
        parts = ours.items()
        if isinstance(state, Mapping):
            more, less = state.keys() - ours.keys(), ours.keys() - state.keys()
            found = f"a dict that lacks {_names(less)} and has {_names(more)} besides"
    elif isinstance(ours, list | tuple):
        fits = isinstance(state, list | tuple) and len(state) == len(ours)
        parts = enumerate(ours)
    elif ours is None or (state is None and not always and "[" not in name):
        fits = True  # not known yet, or of a part that one of the two does without
    elif isinstance(ours, Tensor):
        fits = isinstance(state, Tensor)
        if fits and (state.shape != ours.shape or state.dtype != ours.dtype):
            fits, kind = False, DtypeError if state.shape == ours.shape else ShapeError
    elif hasattr(ours, "_check_state"):
        ours._check_state(state, name)
        fits = True
    else:
        fits = _is_such_a_number(state, ours)
        allowed = "a whole number" if type(ours) is int else allowed
    if not fits:
        raise kind(
            f"the stored {name or 'state'} is {found}",
            allowed=allowed,
            fix="load it into one that was made with the same arguments",
        )
    for key, part in parts:
        _check(part, state[key], f"{name}[{key!r}]" if name else key)


def _check_optimiser(ours: Optimizer, state: Any, name: str) -> None:
    """Refuse settings that are no numbers where ours are, and tensors whose shapes are not of the
    parameters.
    """

    def refuse(kind: type[BirlError], place: str, found: Any, allowed: str) -> None:
        raise kind(
            f"the stored {name}{place} is {_described(found)}",
            allowed=allowed,
            fix="load it into one that was made with the same arguments",
        )

    groups = state["param_groups"]
    for number, (group, stored) in enumerate(zip(ours.param_groups, groups, strict=True)):
        for key, setting in group.items():
            if key != "params" and not _may_be_set(stored[key], setting):
                place = f"['param_groups'][{number}][{key!r}]"
                refuse(OptionError, place, stored[key], _described(setting))
    order = [one for group in groups for one in group["params"]]
    known = all(type(one) is int for one in order) and state["state"].keys() <= set(order)
    if not known:
        refuse(OptionError, "['state']", state["state"], f"a dict of parameters {order}"[:200])
    stepping = getattr(ours, "inner", ours)  # a projected one has the state of another
    if type(stepping) not in _ELEMENTWISE:
        return
    parameters = (one for group in ours.param_groups for one in group["params"])
    for parameter, number in zip(parameters, order, strict=True):
        kept = state["state"].get(number, {})
        for key, part in kept.items() if isinstance(kept, Mapping) else ():
            wanted = () if key == "step" else tuple(parameter.shape)
            if isinstance(part, Tensor) and tuple(part.shape) != wanted:
                refuse(ShapeError, f"['state'][{number}][{key!r}]", part, str(wanted))


def _may_be_set(stored: Any, ours: Any) -> bool:
    """Whether a setting of an optimiser, of which flags may be whatever torch takes, can be put in
    the place of `ours`.
    """
    if isinstance(ours, list | tuple):
        if not isinstance(stored, list | tuple) or len(stored) != len(ours):
            return False
        return all(_may_be_set(part, own) for part, own in zip(stored, ours, strict=True))
    if isinstance(ours, bool) or not isinstance(ours, numbers.Number | Tensor):
        return True
    if isinstance(stored, Tensor):
        return stored.numel() == 1
    return isinstance(stored, numbers.Number) and not isinstance(stored, bool)


def _is_such_a_number(state: Any, ours: Any) -> bool:
    """Whether it can take the place of `ours`, which may be no number at all."""
    if isinstance(ours, bool):
        return isinstance(state, bool)
    if not isinstance(ours, int | float):
        return True
    kind = int if isinstance(ours, int) else (int, float)
    return isinstance(state, kind) and not isinstance(state, bool)


def _groups(state: Any) -> tuple[list[int], list[str]] | None:
    """How many parameters an optimiser's state is of, by groups, and its settings' names; None if
    it is that of none.
    """
    if not isinstance(state, Mapping):
        return None
    try:
        groups = state["param_groups"]
        sizes = [len(group["params"]) for group in groups if isinstance(state["state"], Mapping)]
        shared = set.intersection(*map(set, groups)) if groups else set()
        return sizes, sorted(shared - {"params"})
    except (KeyError, TypeError, IndexError):
        return None


def _described(value: Any) -> str:
    """Its form, without its numbers."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a dict of {_names(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, int | float):
        return "a number"
    return "None" if value is None else f"a {type(value).__name__}"


def _names(keys: Collection[Any]) -> str:
    some = ", ".join(repr(key)[:40] for key in itertools.islice(keys, 8))
    return (some or "nothing") + ", …" * (len(keys) > 8)


def put(ours: Any, state: Any) -> Any:
    """What takes the place of `ours`: itself where it can be changed, for others may hold it."""
    if isinstance(ours, torch.Generator):
        ours.set_state(state)
    elif hasattr(ours, "load_state_dict"):
        if state is not None:
            ours.load_state_dict(copy.deepcopy(state) if isinstance(ours, Optimizer) else state)
    elif ours is None and isinstance(state, Mapping):
        return None  # of a part that this object does without
    elif isinstance(ours, Tensor) and ours.requires_grad:
        with torch.no_grad():
            ours.copy_(state)
    elif isinstance(ours, Mapping):
        return {key: put(part, state[key]) for key, part in ours.items()}
    elif isinstance(ours, list | tuple):
        parts = [put(part, held) for part, held in zip(ours, state, strict=True)]
        return ours._make(parts) if hasattr(ours, "_make") else type(ours)(parts)
    elif isinstance(state, Tensor):
        return state.clone().to(ours.device) if isinstance(ours, Tensor) else state.clone()
    else:
        return copy.deepcopy(state)
    return ours
