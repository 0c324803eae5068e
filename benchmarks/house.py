"""How large is the house: rooms, lines, names, the longest function, the widest call, hops?

    python benchmarks/house.py PLACE [PLACE …] [--python PYTHON] [--wheel FILE] [--out FILE]

A PLACE is a checkout, or the JSON file of one measured before; the table has a column for each.
--python is the interpreter that the last checkout is installed for (by default this one): calls are
followed in it. --wheel is that checkout's wheel.

A room is a folder of sources; a floor, a step in the order of imports of the rooms at the top of
birl_ext, or of the folders of csrc. Code is what is left of lines without blank ones, comments and
docstrings. Hops are the changes of file inside birl_ext during a call, returns included, on 6
states and 3 actions, r and P differentiable.
"""

from __future__ import annotations

import argparse
import ast
import functools
import io
import json
import platform
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

ROWS = {
    "rooms": "rooms: birl_ext, csrc",
    "crowded": "files in the largest room",
    "floors": "floors of birl_ext; its files on a circle of imports",
    "floors_cpp": "floors of csrc; its files on a circle of includes",
    "files": "files: birl_ext, csrc",
    "lines": "product lines, not blank: birl_ext, csrc, both",
    "code": "of them code: birl_ext, csrc, both",
    "names": "public names: `birl_ext`, its packages",
    "longest": "longest function, lines of code: Python",
    "longest_cpp": "longest function, lines of code: C++",
    "call": "widest call, arguments: Python",
    "width": "most parameters: Python",
    "width_cpp": "most parameters: C++",
    "wheel": "wheel, bytes",
}
FUNCTION = re.compile(
    r"^( *)(?!(?:namespace|struct|class|enum|union|if|for|while|switch|do|else|try|return)\b)"
    r"(\w[^;{}]*\)[^;{}()]*)\{ *\n(.*?)^\1\}",
    re.M | re.S,
)
"""Of C++ as clang-format leaves it: a head, and all up to a brace as far left as its first line."""
NO_NAME = ("alignas", "decltype", "noexcept", "__launch_bounds__", "__attribute__")
NOISE = re.compile(
    r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*', re.M | re.S
)


def measure(root: Path, python: str, wheel: Path | None) -> dict[str, Any]:
    """A checkout."""
    ours = sorted((root / "birl_ext").rglob("*.py"))
    theirs = [
        path for path in sorted((root / "csrc").rglob("*")) if path.suffix[:2] in (".c", ".h")
    ]
    trees = {path: ast.parse(path.read_text()) for path in ours}
    crowds = Counter(path.parent.relative_to(root).as_posix() for path in [*ours, *theirs])
    kinds = ours, theirs
    lines = [sum(len(filled(path.read_text())) for path in kind) for kind in kinds]
    code = [sum(map(len, map(code_lines, ours))), sum(len(filled(quiet(path))) for path in theirs)]
    names = {path.parent: exported(trees[path]) for path in ours if path.stem == "__init__"}
    front = names.pop(root / "birl_ext")
    cpp = [found for path in theirs for found in functions_cpp(path)]
    return {
        "rooms": [len({path.parent for path in kind}) for kind in kinds],
        "crowded": [crowds.most_common(1)[0][1], crowds.most_common(1)[0][0]],
        "floors": floors(imports(trees, root), lambda name: name.split(".")[1]),
        "floors_cpp": floors(includes(theirs, root / "csrc"), lambda name: str(Path(name).parent)),
        "files": [len(kind) for kind in kinds],
        "lines": [*lines, sum(lines)],
        "code": [*code, sum(code)],
        "names": [front, sum(names.values())],
        "longest": max(functions(trees, length)),
        "longest_cpp": max((size, name) for size, _, name in cpp),
        "call": max(calls(trees)),
        "width": max(functions(trees, parameters)),
        "width_cpp": max((width, name) for _, width, name in cpp),
        "wheel": wheel.stat().st_size if wheel else None,
        "hops": followed(python),
    }


def filled(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


# Python


@functools.cache
def code_lines(path: Path) -> set[int]:
    """The numbers of the lines that hold code."""
    text = path.read_text()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    silent.add(tokenize.ENDMARKER)
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            found |= {*range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                found -= {*range(node.lineno, (node.end_lineno or 0) + 1)}
    return found


def functions(
    trees: dict[Path, ast.Module], size: Callable[[Path, ast.FunctionDef], int]
) -> Iterator[tuple[int, str]]:
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield size(path, node), f"{path.name}: {node.name}"


def length(path: Path, node: ast.FunctionDef) -> int:
    return len(code_lines(path) & {*range(node.lineno, (node.end_lineno or 0) + 1)})


def parameters(path: Path, node: ast.FunctionDef) -> int:
    names = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return sum(name.arg not in ("self", "cls") for name in names)


def calls(trees: dict[Path, ast.Module]) -> Iterator[tuple[int, str]]:
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                name = f"{path.name}: {ast.unparse(node.func)[:40]}"
                yield len(node.args) + len(node.keywords), name


def exported(tree: ast.Module) -> int:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return len(ast.literal_eval(node.value))
    return 0


def imports(trees: dict[Path, ast.Module], root: Path) -> dict[str, set[str]]:
    """Module → those it imports when it is run, or when one of its functions is."""
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in trees}
    return {
        own: {
            target
            for name in imported(trees[path])
            for target in (name, f"{name}.__init__", name.rpartition(".")[0])
            if target in files and target != own
        }
        for own, path in files.items()
    }


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imported(node)


def floors(arrows: dict[str, set[str]], room: Callable[[str], str]) -> list[int]:
    """The longest chain of rooms each of which uses the next; how many files reach themselves."""
    rooms: dict[str, set[str]] = {}
    for name, others in arrows.items():
        rooms.setdefault(room(name), set()).update({*map(room, others)} - {room(name)})

    @functools.cache
    def height(one: str) -> int:
        below = (height(other) for other in rooms[one] if one not in reached(rooms, other))
        return 1 + max(below, default=0)

    return [max(map(height, rooms)), sum(name in reached(arrows, name) for name in arrows)]


def reached(arrows: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    ends = [start]
    while ends:
        new = arrows[ends.pop()] - found
        found |= new
        ends += new
    return found


# C++


def quiet(path: Path) -> str:
    """Without comments and directives, with empty strings."""
    return NOISE.sub(lambda hit: '""' if hit[1] else "", path.read_text())


def includes(files: list[Path], csrc: Path) -> dict[str, set[str]]:
    names = {path.relative_to(csrc).as_posix(): path for path in files}
    return {
        own: {
            name
            for hit in re.findall(r'^#include "(.+)"', path.read_text(), re.M)
            for name in (hit, (Path(own).parent / hit).as_posix())
            if name in names
        }
        for own, path in names.items()
    }


def functions_cpp(path: Path) -> Iterator[tuple[int, int, str]]:
    """(lines of code, parameters, name); of a lambda the parameters only."""
    text = quiet(path)
    for hit in re.finditer(r"\]\s*\(", text):
        yield 0, parameters_cpp(text[hit.end() :]), f"{path.name}: a lambda"
    for hit in FUNCTION.finditer(text):
        if hit[2].count("(") != hit[2].count(")"):
            continue  # a call that is given a lambda
        for call in re.finditer(r"([\w:~]+)\s*\(", hit[2]):
            if call[1] not in NO_NAME:
                width = parameters_cpp(hit[2][call.end() :])
                yield len(filled(hit[0])), width, f"{path.name}: {call[1]}"
                break


def parameters_cpp(text: str) -> int:
    """How many stand before the bracket that closes."""
    depth, commas, at = 1, 0, 0
    while depth:
        depth += (text[at] in "([{<") - (text[at] in ")]}>")
        commas += depth == 1 and text[at] == ","
        at += 1
    return commas + 1 if text[: at - 1].strip() else 0


# Hops


def followed(python: str) -> dict[str, list[int]]:
    """What `follow` finds in the package that is installed for an interpreter."""
    command = [python, str(Path(__file__).resolve()), "--follow"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} cannot follow a call:\n{done.stderr}activate the environment")
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def follow() -> dict[str, list[int]]:
    """Call → Python functions of the package that it calls, and changes of file."""
    import torch

    import birl_ext

    reward = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    transition = torch.rand(6, 3, 6, dtype=torch.float64)
    transition = (transition / transition.sum(-1, keepdim=True)).requires_grad_()
    data = reward, transition
    mask = torch.arange(18).view(6, 3) > 0

    def solve(**options: Any) -> Any:
        return birl_ext.solve(*data, discount=0.9, temperature=0.5, **options)

    def gradient(found: Any, **options: Any) -> Any:
        return torch.autograd.grad(found.value.sum(), data, retain_graph=True, **options)

    def count(call: Callable[..., Any], *words: Any, **options: Any) -> list[int]:
        stack: list[str] = []
        counts = [0, 0]

        def profile(frame: Any, event: str, _: object) -> None:
            file = frame.f_code.co_filename
            if not file.startswith(str(Path(birl_ext.__file__).parent)):
                return
            if event == "call":
                counts[0] += 1
                counts[1] += stack[-1:] != [file]
                stack.append(file)
            elif event == "return":
                stack.pop()
                counts[1] += stack[-1:] != [file]

        call(*words, **options)  # what is made once is made
        sys.setprofile(profile)
        try:
            call(*words, **options)
        finally:
            sys.setprofile(None)
        return counts

    plain, masked = solve(), solve(mask=mask)
    return {
        "solve": count(solve),
        "its backward": count(gradient, plain),
        "solve(mask=)": count(solve, mask=mask),
        "its backward, compiled": count(gradient, masked),
        "its backward, create_graph": count(gradient, masked, create_graph=True),
    }


# The table


def table(reports: list[dict[str, Any]]) -> str:
    """Markdown, one column per checkout."""
    rows = {words: [cell(report[key]) for report in reports] for key, words in ROWS.items()}
    for call in reports[0]["hops"]:
        rows[f"hops of {call}"] = [cell(report["hops"][call][1]) for report in reports]
    head = ["", *(report["commit"] for report in reports)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join([key, *row])} |" for key, row in rows.items())])


def cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"`{value}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("places", nargs="*", type=Path, metavar="PLACE")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--out", type=Path, help="JSON of the last place")
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.follow:
        print(json.dumps(follow()))
        return
    reports = []
    for place in options.places:
        if place.is_file():
            reports.append(json.loads(place.read_text()))
            continue
        git = ["git", "-C", str(place), "rev-parse", "--short", "HEAD"]
        reports.append(
            {
                "question": (__doc__ or "").splitlines()[0],
                "command": "python benchmarks/house.py",
                "date": date.today().isoformat(),
                "machine": f"{platform.machine()}, {platform.system()}",
                "python": platform.python_version(),
                "commit": subprocess.check_output(git, text=True).strip(),
                **measure(place.resolve(), options.python, options.wheel),
            }
        )
    print(table(reports))
    if options.out:
        options.out.write_text(json.dumps(reports[-1], indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
