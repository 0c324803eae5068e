"""Explicit files of PRISM and Storm: transitions (.tra), rewards, labels (.lab)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from birl_ext.convert.table import Array, Rows, assemble, continuing, mask_ends, refuse_sums
from birl_ext.errors import FileFormatError, OptionError, ShapeError
from birl_ext.files import replacing
from birl_ext.model.mdp import DenseMDP, SparseMDP

__all__ = ["PrismModel", "read_prism", "write_prism"]

StrPath = str | os.PathLike[str]
By = Literal["choice", "name"]
Line = tuple[int, list[str]]

_TOLERANCE = 1e-5
"""Of the sum of a row: files hold as few digits as their writer chose."""


class PrismModel(NamedTuple):
    """A model that was read.

    Args:
        mdp: the MDP.
        labels: of states, (S,) bool each.
        actions: names of the actions, by="name"; else of no use, and empty.
    """

    mdp: SparseMDP
    labels: dict[str, Tensor]
    actions: list[str]


def read_prism(
    transitions: StrPath,
    discount: float,
    *,
    state_rewards: StrPath | None = None,
    transition_rewards: StrPath | None = None,
    labels: StrPath | None = None,
    by: By = "choice",
    dtype: torch.dtype = torch.float64,
) -> PrismModel:
    """The MDP of explicit files, as PRISM exports them (-exportmodel) and Storm reads them.

        r(s, a) = state reward(s) + Σ_t P(t|s, a) · transition reward(s, a, t)

    A line of the transitions is ``state choice next-state probability [name]``, of a Markov chain
    ``state next-state probability``. Rows are divided by their sums, which rounding in the file may
    have moved by 1e-5. A state with fewer choices than others has the rest masked.

    Ends: a deadlock, a state without a choice, is terminal, without an action, worth 0. PRISM
    writes it with a loop to itself. A state that no action leaves stands for an end too: if it pays
    nothing it becomes terminal without an action, worth 0; if all its actions pay the same r it
    keeps one of them, worth r/(1−γ) (`mask_ends`).

    Args:
        transitions: path of the .tra file, with PRISM's header of sizes or Storm's ``mdp``.
        discount: γ in [0, 1): the files have none.
        state_rewards: path of lines ``state reward``: .srew, .rews, .rew.
        transition_rewards: path of lines ``state choice next-state reward``: .trew, .rewt.
        labels: path of the .lab file; a label "init" says where episodes start, alike in each of
            several states.
        by: action a is the choice of number a, or, "name", the a-th of all names in their natural
            order.
        dtype: float64 or float32.

    Raises:
        FileFormatError: a line is not of the form; file and line are named.
        NonStochasticError: a row does not sum to one; state, action and sum are named.
        OptionError: by="name" where a choice has none, or a state has one twice.
    """
    if by not in ("choice", "name"):
        raise OptionError(f"by is {by!r}", allowed="'choice' or 'name'")
    path = Path(transitions)
    lines, sizes, chain = _transitions(path)
    width = 3 if chain else 4
    numbers = np.array([_numbers(path, line, width) for line in lines]).reshape(-1, width)
    whole = numbers[:, :-1].astype(np.int64)
    if chain:
        whole = np.insert(whole, 1, 0, axis=1)
    state, choice, following = whole.T
    states = max(int(sizes[0]), 0) if sizes else int(max(state.max(), following.max())) + 1
    for line, here, there in zip(lines, state, following, strict=True):
        if max(here, there) >= states:
            raise _broken(path, line, f"state {max(here, there)}", f"0 to {states - 1}")
    choices = int(choice.max()) + 1 if len(choice) else 1
    column, names = _columns(path, lines, state, choice, states, choices, chain, by)
    action = column[state, choice]
    actions = len(names) or choices

    sums, paid = np.zeros((2, states, actions))
    np.add.at(sums, (state, action), numbers[:, -1])
    mask = np.zeros((states, actions), bool)
    mask[state, action] = True
    refuse_sums(sums, mask, _TOLERANCE)
    probability = numbers[:, -1] / sums[state, action]
    if state_rewards is not None:
        paid += _state_rewards(Path(state_rewards), states)[:, None]
    if transition_rewards is not None:
        known: dict[tuple[int, int, int], float] = {}
        for s, c, t, p in zip(state, choice, following, probability, strict=True):
            known[s, c, t] = known.get((s, c, t), 0.0) + p
        for (s, c, t), r in _transition_rewards(Path(transition_rewards), known, chain):
            paid[s, column[s, c]] += known[s, c, t] * r
    marks = {} if labels is None else _labels(Path(labels), states)
    start = marks.get("init")
    initial = None if start is None or not start.any() else start / start.sum()
    rows = Rows(state, action, following, probability, np.zeros(len(state), bool))
    mdp = assemble(rows, paid, discount, mask=mask, initial=initial, dtype=dtype)
    return PrismModel(
        mask_ends(mdp), {name: torch.as_tensor(on) for name, on in marks.items()}, names
    )


def write_prism(
    mdp: DenseMDP | SparseMDP,
    stem: StrPath,
    *,
    labels: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write stem.tra, stem.trew and stem.lab, in PRISM's form; `read_prism` reads them back.

    It does by="name" where a mask leaves gaps.

    The reward of an action is that of each of its transitions. Actions are named a0, a1, …

    Ends: an end without an action has one choice, a loop that pays nothing, and the label
    "deadlock", as PRISM writes them. One that is paid leads to such a state, which is added.

    Args:
        mdp: without batch axes or a reference. Its initial distribution has to be uniform on some
            states: the label "init" says which.
        stem: path without suffix.
        labels: further labels, (S,) bool each.

    Returns:
        The paths written.

    Raises:
        ShapeError: it has batch axes, or a label another length.
        OptionError: it has a reference, or its initial distribution is not uniform on some states.
        MissingDependencyError: no scipy.
    """
    found = continuing(mdp, "explicit files")
    states, actions = found.reward.shape
    mask = found.mask.copy()
    mask[found.ends, 1:] = False
    marks: dict[str, Array] = {"init": np.zeros(states, bool), "deadlock": found.ends}
    if mdp.initial_distribution is not None:
        law = mdp.initial_distribution.detach().cpu().double().numpy()
        on = np.flatnonzero(law)
        if np.abs(law[on] - 1 / len(on)).max() > 1e-6:
            raise OptionError(
                "the initial distribution is not uniform on some states",
                allowed="one probability, or zero, in files that say by a label where it starts",
                fix="mdp.replace(initial_distribution=None), and keep it apart",
            )
        marks["init"][on] = True
    for name, given in (labels or {}).items():
        array = np.asarray(given, dtype=bool)
        if array.shape not in ((states,), (mdp.states,)):
            raise ShapeError(f"label {name!r} has shape {array.shape}", allowed=f"({mdp.states},)")
        marks[name] = np.resize(np.append(array, np.zeros(states - len(array), bool)), states)
    crow, col, values = found.transition.indptr, found.transition.indices, found.transition.data
    tra, rew = [], []
    for state in range(states):
        for choice, action in enumerate(np.flatnonzero(mask[state]).tolist()):
            row = state * actions + action
            for i in range(crow[row], crow[row + 1]):
                head = f"{state} {choice} {col[i]}"
                tra.append(f"{head} {float(values[i])!r} a{action}")
                if found.reward[state, action] != 0:
                    rew.append(f"{head} {float(found.reward[state, action])!r}")
    sizes = f"{states} {int(mask.sum())}"
    lab = [" ".join(f'{i}="{name}"' for i, name in enumerate(marks))]
    for state in range(states):
        if on_here := [str(i) for i, on in enumerate(marks.values()) if on[state]]:
            lab.append(f"{state}: {' '.join(on_here)}")
    written = {
        ".tra": [f"{sizes} {len(tra)}", *tra],
        ".trew": [f"{sizes} {len(rew)}", *rew],
        ".lab": lab,
    }
    paths = []
    for suffix, text in written.items():
        target = Path(f"{os.fspath(stem)}{suffix}")
        with replacing(target) as draft:
            draft.write_text("\n".join(text) + "\n")
        paths.append(target)
    return paths


# What is read


def _lines(path: Path) -> list[Line]:
    """(number, words) of the lines that say something."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}", fix="check the path") from None
    found = [(i, line.split()) for i, line in enumerate(text.splitlines(), 1)]
    return [(i, words) for i, words in found if words and not words[0].startswith(("#", "//"))]


def _transitions(path: Path) -> tuple[list[Line], list[int], bool]:
    """Lines, sizes if there is a header, and whether it is a Markov chain."""
    lines = _lines(path)
    if not lines:
        raise FileFormatError(f"{path} is empty", allowed="the transitions of an MDP")
    (_, head), rest = lines[0], lines[1:]
    if head[0].rstrip(":").lower() in ("mdp", "dtmc"):
        chain, sizes = head[0].lower().startswith("dtmc"), []
    else:
        if len(head) not in (2, 3) or not all(word.isdigit() for word in head):
            raise _broken(path, lines[0], " ".join(head), "a header: states [choices] transitions")
        sizes, chain = [int(word) for word in head], len(head) == 2
        if sizes[-1] != len(rest):
            raise FileFormatError(
                f"{path} has {len(rest)} transitions",
                allowed=f"{sizes[-1]}, by its header",
                fix="it may have been cut short: write it again",
            )
    if not rest:
        raise FileFormatError(f"{path} has no transitions", allowed="one at least")
    return rest, sizes, chain


def _numbers(path: Path, line: Line, width: int, least: int | None = None) -> list[float]:
    """The numbers of a line: whole ones, and one behind them."""
    words = line[1]
    fine = len(words) in (width, width + 1) if least is None else len(words) == width
    if not fine or not all(word.isdigit() for word in words[: width - 1]):
        raise _broken(path, line, " ".join(words), _FORMS[width])
    try:
        return [float(word) for word in words[:width]]
    except ValueError:
        raise _broken(path, line, " ".join(words), _FORMS[width]) from None


_FORMS = {
    2: "state number",
    3: "state next-state number",
    4: "state choice next-state number",
}


def _columns(
    path: Path,
    lines: list[Line],
    state: Array,
    choice: Array,
    states: int,
    choices: int,
    chain: bool,
    by: By,
) -> tuple[Array, list[str]]:
    """The action of each choice, (S, choices), and the names of the actions."""
    column = np.tile(np.arange(choices), (states, 1))
    if by == "choice" or chain:
        return column, []
    named: dict[tuple[int, int], str] = {}
    for line, s, c in zip(lines, state.tolist(), choice.tolist(), strict=True):
        if len(line[1]) < 5:
            raise OptionError(
                "a choice has no name",
                where=f"{path}, line {line[0]}",
                allowed="a name for each, by='name'",
                fix="read it by='choice'",
            )
        if named.setdefault((s, c), line[1][4]) != line[1][4]:
            raise _broken(path, line, line[1][4], f"{named[s, c]}, as before")
    names = sorted({*named.values()}, key=_natural)
    taken: set[tuple[int, str]] = set()
    for (s, c), name in named.items():
        if (s, name) in taken:
            raise OptionError(
                f"two choices have the name {name!r}",
                where=f"state {s}",
                allowed="a name for each, by='name'",
                fix="read it by='choice'",
            )
        taken.add((s, name))
        column[s, c] = names.index(name)
    return column, names


def _natural(name: str) -> list[Any]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", name) if p]


def _state_rewards(path: Path, states: int) -> Array:
    lines = _lines(path)
    if lines and lines[0][1][0] == str(states):  # a header: no state has this number
        lines = _without_header(path, lines)
    paid = np.zeros(states)
    for line in lines:
        state, reward = _numbers(path, line, 2, 2)
        if state >= states:
            raise _broken(path, line, f"state {int(state)}", f"0 to {states - 1}")
        paid[int(state)] = reward
    return paid


def _transition_rewards(
    path: Path, known: Mapping[tuple[int, int, int], float], chain: bool
) -> Iterable[tuple[tuple[int, int, int], float]]:
    lines, width = _lines(path), 3 if chain else 4
    if lines and len(lines[0][1]) == width - 1:
        lines = _without_header(path, lines)
    for line in lines:
        *place, reward = _numbers(path, line, width, width)
        where = int(place[0]), 0 if chain else int(place[1]), int(place[-1])
        if where not in known:
            raise _broken(path, line, "a transition that the model lacks", "one that it has")
        yield where, reward


def _without_header(path: Path, lines: list[Line]) -> list[Line]:
    head, *rest = lines
    if not head[1][-1].isdigit() or int(head[1][-1]) != len(rest):
        said = head[1][-1]
        raise FileFormatError(
            f"{path} has {len(rest)} rewards",
            allowed=f"{said}, by its header",
            fix="it may have been cut short: write it again",
        )
    return rest


def _labels(path: Path, states: int) -> dict[str, Array]:
    lines = _lines_of_labels(path)
    if lines and lines[0][1] == ["#DECLARATION"]:
        return _storm_labels(path, lines, states)
    if not lines:
        raise FileFormatError(f"{path} is empty", allowed='labels: 0="init" …')
    names = dict(re.findall(r'(\d+)="([^"]*)"', " ".join(lines[0][1])))
    marks = {name: np.zeros(states, bool) for name in names.values()}
    for line in lines[1:]:
        state, *numbers = line[1]
        if not state.endswith(":") or not state[:-1].isdigit():
            raise _broken(path, line, " ".join(line[1]), "state: label label …")
        if int(state[:-1]) >= states:
            raise _broken(path, line, f"state {int(state[:-1])}", f"0 to {states - 1}")
        for number in numbers:
            if number not in names:
                raise _broken(path, line, f"label {number}", "those of the first line")
            marks[names[number]][int(state[:-1])] = True
    return marks


def _storm_labels(path: Path, lines: list[Line], states: int) -> dict[str, Array]:
    ends = [i for i, (_, words) in enumerate(lines) if words == ["#END"]]
    if not ends:
        raise FileFormatError(f"{path} has no #END", allowed="#DECLARATION … #END")
    marks = {name: np.zeros(states, bool) for _, words in lines[1 : ends[0]] for name in words}
    for line in lines[ends[0] + 1 :]:
        state, *names = line[1]
        if not state.isdigit() or int(state) >= states:
            raise _broken(path, line, f"state {state}", f"0 to {states - 1}")
        for name in names:
            if name not in marks:
                raise _broken(path, line, f"label {name}", "those declared")
            marks[name][int(state)] = True
    return marks


def _lines_of_labels(path: Path) -> list[Line]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}", fix="check the path") from None
    return [(i, line.split()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def _broken(path: Path, line: Line, found: str, allowed: str) -> FileFormatError:
    return FileFormatError(
        f"{path} has {found}", where=f"line {line[0]}", allowed=allowed, fix="write it again"
    )
