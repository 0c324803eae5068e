"""The documentation runs, prints what it shows, and says what the code says."""

from __future__ import annotations

import ast
import functools
import io
import itertools
import json
import re
import runpy
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from birl_bench.report import digits

import birl_ext.problems
from birl_ext.cli import COMMANDS
from birl_ext.errors import catalogue
from birl_ext.preferences.fragments import Fragments
from birl_ext.preferences.teachers import OwnTeacher

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BRIEFLY = {"sobirl_one_file.py": ["--steps", "2000"]}
FOUR_ROOMS = sorted((ROOT / "benchmarks" / "results").glob("four_rooms_*.json"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
PREFERENCES = sorted((ROOT / "benchmarks" / "results").glob("preference_*.json"))
ADAPTATION = sorted((ROOT / "benchmarks" / "results").glob("adaptation_*.json"))
FOLLOWERS = sorted((ROOT / "benchmarks" / "results").glob("followers_*.json"))
RELIABILITY = sorted((ROOT / "benchmarks" / "results").glob("reliability_*.json"))
TAXES = sorted((ROOT / "benchmarks" / "results").glob("taxes_*.json"))
# what torch itself says while it traces
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of Python, and the text block right behind it, which is its output."""

    page: str
    line: int
    code: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(text: str, page: str) -> list[Block]:
    fences = list(FENCE.finditer(text))
    found = []
    for fence, after in itertools.pairwise([*fences, None]):
        if fence is None or fence[1] != "python":
            continue
        output = None
        if after is not None and after[1] == "text":
            between = text[fence.end() : after.start()]
            output = after[2] if not between.strip() else None
        found.append(Block(page, text.count("\n", 0, fence.start()) + 2, fence[2], output))
    return found


def documented() -> list[Block]:
    return [
        block for page in PAGES for block in blocks(page.read_text(), str(page.relative_to(ROOT)))
    ]


@pytest.fixture
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty directory to write to; what documentation may change for itself is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("birl_ext.problems.PROBLEMS", dict(birl_ext.problems.PROBLEMS))
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch._dynamo.reset()


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("block", documented(), ids=str)
def test_a_block_runs_and_prints_what_is_shown(
    block: Block, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(block.code, str(block), "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    if block.output is not None:
        assert printed == block.output, f"{block} prints\n{printed}"


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(
    example: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [str(example), *BRIEFLY.get(example.name, [])])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def test_blocks_are_found_with_their_output() -> None:
    text = (
        "```python\na\n```\n\n```text\nb\n```\nx\n```python\nc\n```\nno output:\n```text\nd\n```\n"
    )
    found = [(block.line, block.code, block.output) for block in blocks(text, "page")]
    assert found == [(2, "a\n", "b\n"), (10, "c\n", None)]


def between(text: str, name: str) -> str:
    """What stands between the comments of a table that is kept in step with the code."""
    match = re.search(rf"^<!-- {name}: .*-->\n(.*?)^<!-- end of {name} -->$", text, re.M | re.S)
    assert match, f"the page has no part {name!r}"
    return match[1]


def test_every_error_is_in_the_readme() -> None:
    head = "| code | class | meaning | remedy |\n|---|---|---|---|\n"
    rows = [
        f"| {code} | `{cls.__name__}` | {cls.meaning} | {cls.remedy or '–'} |"
        for code, cls in catalogue()
    ]
    table = head + "\n".join(rows) + "\n"
    found = between((ROOT / "README.md").read_text(), "errors")
    assert found == table, f"the table in README.md should be\n\n{table}"


@pytest.mark.skipif(not FOUR_ROOMS, reason="no stored results of four rooms")
def test_the_table_of_four_rooms_is_the_one_measured() -> None:
    report = json.loads(FOUR_ROOMS[-1].read_text())
    table = runpy.run_path(str(ROOT / "benchmarks" / "four_rooms_table.py"))["table"](report)
    found = between((ROOT / "README.md").read_text(), "four rooms")
    assert found == table, f"the table in README.md should be\n\n{table}"


@pytest.mark.skipif(not PREFERENCES, reason="no stored results of preference runs")
def test_the_tables_of_preference_runs_are_those_measured() -> None:
    report = json.loads(PREFERENCES[-1].read_text())
    drawn = runpy.run_path(str(ROOT / "benchmarks" / "preference_table.py"))["table"]
    page = (ROOT / "docs" / "preferences.md").read_text()
    for task in {run["task"] for run in report["runs"]}:
        table = drawn(report, task)
        found = between(page, f"{task} table")
        assert found.strip() == table, f"docs/preferences.md should contain\n\n{table}"


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("additive_credit", "stochastic"),
        ("temperature_gradient", "stochastic"),
        ("score_limit", "stochastic"),
        ("coverage_and_cooling", "coverage_and_cooling"),
        ("few_knobs", "preferences"),
        ("bodies_and_pixels", "preferences"),
        ("modes_by_cost", "bilevel"),
        ("outer_steps", "rates"),
        ("stoc_sobirl_slopes", "stochastic"),
        ("imperfect_followers", "followers_and_bias"),
        ("estimator_bias", "followers_and_bias"),
        ("hpgd_speed", "rivals"),
        ("hpgd_table", "arena"),
    ],
)
def test_the_tables_of_estimators_are_those_measured(name: str, page: str) -> None:
    stored = sorted((ROOT / "benchmarks" / "results").glob(f"{name}_*.json"))[-1]
    table = runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))["table"]
    table = table(json.loads(stored.read_text()))
    found = between((ROOT / "docs" / f"{page}.md").read_text(), name.replace("_", " "))
    assert found.strip() == table, f"docs/{page}.md should contain\n\n{table}"


ARENAS = sorted((ROOT / "benchmarks" / "results").glob("arena_*.json"))


@pytest.mark.parametrize("stored", ARENAS, ids=lambda path: path.stem)
def test_the_tables_of_the_arena_are_those_measured(stored: Path) -> None:
    report = json.loads(stored.read_text())
    table = runpy.run_path(str(ROOT / "benchmarks" / "arena.py"))["table"](report)
    page = (ROOT / "docs" / "arena.md").read_text()
    found = between(page, f"{stored.stem.rsplit('_', 1)[0].replace('_', ' ')}")
    assert found.strip() == table, f"docs/arena.md should contain\n\n{table}"


def test_the_arena_reads_in_the_study_of_preferences() -> None:
    table = runpy.run_path(str(ROOT / "benchmarks" / "arena.py"))["preferences"]
    found = between((ROOT / "docs" / "arena.md").read_text(), "preferences read in")
    assert found.strip() == table(json.loads(PREFERENCES[-1].read_text()))


@pytest.mark.skipif(not ADAPTATION, reason="no stored results of adaptation")
def test_the_tables_of_adaptation_are_those_measured() -> None:
    report = json.loads(ADAPTATION[-1].read_text())
    page = runpy.run_path(str(ROOT / "benchmarks" / "adaptation.py"))
    text = (ROOT / "docs" / "adaptation.md").read_text()
    for name, made in (("adaptation", page["table"]), ("adaptation race", page["race"])):
        table = made(report)
        found = between(text, name)
        assert found.strip() == table, f"docs/adaptation.md should contain\n\n{table}"


@pytest.mark.skipif(not FOLLOWERS, reason="no stored results of followers")
def test_the_table_of_followers_is_the_one_measured() -> None:
    report = json.loads(FOLLOWERS[-1].read_text())
    table = runpy.run_path(str(ROOT / "benchmarks" / "followers.py"))["table"](report)
    found = between((ROOT / "docs" / "preferences.md").read_text(), "followers")
    assert found.strip() == table, f"docs/preferences.md should contain\n\n{table}"


@pytest.mark.skipif(not RELIABILITY, reason="no stored figures of reliability")
def test_the_figures_of_reliability_are_those_measured() -> None:
    report = json.loads(RELIABILITY[-1].read_text())
    page = runpy.run_path(str(ROOT / "benchmarks" / "reliability.py"))
    table = page["table"](report)
    found = between((ROOT / "docs" / "reliability.md").read_text(), "figures")
    assert found.strip() == table, f"docs/reliability.md should contain\n\n{table}"
    assert not report["properties"]["failures"]


def shown_teachers() -> dict[str, ast.FunctionDef]:
    """Every function of (first, second) that documentation shows."""
    sources = {str(block): block.code for block in documented()}
    sources |= {path.name: path.read_text() for path in EXAMPLES}
    return {
        f"{where} {node.name}": node
        for where, code in sources.items()
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.FunctionDef)
        and [a.arg for a in node.args.args] == ["first", "second"]
    }


def test_a_teacher_that_is_shown_leaves_padding_out() -> None:
    """An episode that ended early, far off, against one that went on, nearer to what is liked."""

    def fragment(steps: int, away: float) -> Fragments:
        present = (torch.arange(8) < steps)[None]
        observation = away * present[..., None].expand(1, 8, 4)
        nothing = torch.zeros(1, 8)
        return Fragments(
            observation, nothing.long(), nothing, present, nothing, torch.zeros(1).long()
        )

    for where, node in (teachers := shown_teachers()).items():
        found: dict[str, Any] = {}
        exec(compile(ast.Module([node], []), where, "exec"), found)
        answer = OwnTeacher(found[node.name])
        for short, long in ((3, 8), (8, 3)):
            worse, better = fragment(short, 0.9), fragment(long, 0.5)
            assert answer(worse, better).tolist() == [0], where
            assert answer(better, worse).tolist() == [1], where
    assert len(teachers) == 3


def test_every_command_and_problem_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"^birl (\w+)", text, re.M)) | set(
        re.findall(r"^birl run ([a-z-]+)", text, re.M)
    )
    assert set(COMMANDS) | set(birl_ext.problems.PROBLEMS) <= shown


@pytest.mark.parametrize("script", BENCHMARKS, ids=lambda path: path.name)
def test_a_benchmark_finds_what_it_imports(script: Path) -> None:
    runpy.run_path(str(script), run_name="imported")


# References: to equations, sections, anchors and files, in pages, comments and docstrings.

FOLDERS = ("birl_ext", "csrc", "tests", "benchmarks", "examples", "docs", "cmake")
CODE = (".py", ".h", ".cpp", ".cu", ".cuh")
TREE = [
    *(path for path in ROOT.iterdir() if path.is_file()),
    *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()),
]
TAILS = {"/".join(path.parts[i:]) for path in TREE for i in range(len(ROOT.parts), len(path.parts))}
SOURCES = sorted(path for path in TREE if path.suffix in CODE)


def prose(path: Path) -> str:
    """Where a file may refer to something: of a source, its comments and docstrings."""
    text = path.read_text()
    if path.suffix == ".md":
        return text
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        said = [token.string.lstrip("#") for token in tokens if token.type == tokenize.COMMENT]
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Expr(value=ast.Constant(value=str(docstring))):
                    said.append(f"\n\n{docstring}\n\n")
        text = "\n".join(said)
    else:
        text = re.sub(r"^\s*#include.*$|^\s*//", "", text, flags=re.M)
    return re.sub(r"[ \t]*\n[ \t]*", "\n", text)


@functools.cache
def parts(page: Path) -> list[tuple[str, str]]:
    """The headings of a page, each with what stands below it."""
    pieces = re.split(r"^#+ (.+)$", FENCE.sub("", page.read_text()), flags=re.M)
    return list(zip(pieces[1::2], pieces[2::2], strict=True))


def anchors(page: Path) -> set[str]:
    """What may follow the # of a link to a page."""
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head, _ in parts(page)}


@functools.cache
def equations() -> list[int]:
    return [int(n) for n in re.findall(r"^\*\*\(M(\d+)\)\*\*", MATHS.read_text(), re.M)]


MATHS = ROOT / "docs" / "maths.md"
EQUATION = re.compile(r"\bM(\d+)\b")
SECTION = re.compile(r"\b(\w+)(?:\.md)?[,:]?\ssection\s(\d+)(?:,\s\"([^\"]+)\")?")
LINK = re.compile(r"\]\(([^)\s]+)\)")
ANCHORED = re.compile(r"\b(docs/\w+\.md)#([\w-]+)")
INSIDE = re.compile(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*[\w/](?![\w*<{{…-])")
POINTER = re.compile(r"(?<![\w/.:-])[\w-][\w./-]*\.(?:h|cpp|cu|cuh|py|md)\b(?![\w(])")


def astray(text: str, page: Path | None = None) -> list[str]:
    """The references of a text that lead nowhere; `page` is where links start from."""
    wrong = [f"(M{n})" for n in EQUATION.findall(text) if int(n) not in equations()]
    for stem, number, title in SECTION.findall(text):
        target, title = ROOT / "docs" / f"{stem}.md", " ".join(title.split())
        if target.is_file():  # else it is a section of a publication
            titles = {
                name
                for head, below in parts(target)
                if head.startswith(f"{number}. ")
                for name in (head.removeprefix(f"{number}. "), *re.findall(r"\*([^*]+)\.\*", below))
            }
            if title not in titles:  # nor without one: sections move
                wrong.append(f'{stem} section {number}, "{title}"')
    links = [(ROOT / name, anchor) for name, anchor in ANCHORED.findall(text)]
    for link in LINK.findall(text) if page else ():
        if "://" not in link:
            name, _, anchor = link.partition("#")
            links.append((page.parent / name if name else page, anchor))  # type: ignore[union-attr]
    for target, anchor in links:
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{target.name}#{anchor}".rstrip("#"))
    wrong += [name for name in INSIDE.findall(text) if not (ROOT / name).exists()]
    for name in POINTER.findall(text):
        own = page is not None and name.endswith(".py")  # a name that the reader may choose
        if name not in TAILS and not own:
            wrong.append(name)
    return list(dict.fromkeys(wrong))


def test_references_lead_somewhere() -> None:
    """To give one up, or a file another name, is to mend what refers to it."""
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in [*PAGES, *SOURCES]
        if (found := astray(prose(path), path if path in PAGES else None))
    }
    assert not wrong


def test_equations_are_numbered_in_order() -> None:
    assert equations() == list(range(1, len(equations()) + 1))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("by (M19), M1–M3 and (M99)", ["(M99)"]),
        ('maths section 4, "Occupancy" and maths section 7, "Small\ntemperatures"', []),
        ('maths section 3, "Occupancy"', ['maths section 3, "Occupancy"']),
        ('docs/maths.md section 99, "Occupancy"', ['maths section 99, "Occupancy"']),
        ("(maths\nsection 4)", ['maths section 4, ""']),
        ("Lee et al. (2021), section 99", []),
        ("docs/gradients.md#second-order, docs/gradients.md#third", ["gradients.md#third"]),
        (
            "[a](#8-the-gain-form) [b](#no) [c](none.md) [d](../README.md)",
            ["maths.md#no", "none.md"],
        ),
        ("birl_ext/ops/, `csrc/absent` and `tests/absent.py`", ["csrc/absent", "tests/absent.py"]),
        ("in packed.h, core/common.h, absent.h, https://a.org/b.py", ["absent.h"]),
        ("benchmarks/results/cpu_*.json, tests/native", []),
    ],
)
def test_a_reference_that_leads_nowhere_is_found(text: str, found: list[str]) -> None:
    assert astray(text, MATHS) == found


def test_references_are_looked_for_in_comments_and_docstrings(tmp_path: Path) -> None:
    python, cpp = tmp_path / "a.py", tmp_path / "a.h"
    python.write_text('x = "(M97)"  # (M98)\ny = 0\n"""(M99, maths\n    section 99)."""\n')
    cpp.write_text('#include "absent.h"\n  // (M98), maths\n  // section 99, gone.h\n')
    assert astray(prose(python)) == ["(M98)", "(M99)", 'maths section 99, ""']
    assert astray(prose(cpp)) == ["(M98)", 'maths section 99, ""', "gone.h"]


@pytest.mark.parametrize(
    ("name", "page"), [("solver_choice", "solvers"), ("estimator_slopes", "stochastic")]
)
def test_a_table_is_the_one_measured(name: str, page: str) -> None:
    """The page shows the stored results, not older ones."""
    benchmarks = ROOT / "benchmarks"
    report = json.loads((benchmarks / "results" / f"{name}.json").read_text())
    table = runpy.run_path(str(benchmarks / f"{name}.py"))["table"](report)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert table in text, f"docs/{page}.md should contain\n\n{table}"
    assert report["machine"].split(",")[0] in text


def test_the_table_of_an_outer_step_is_the_one_measured() -> None:
    stored = sorted((ROOT / "benchmarks" / "results").glob("bilevel_loop_*.json"))[-1]
    case = json.loads(stored.read_text())["cases"][0]
    assert case["case"] == "bilevel loop, four rooms"
    text = (ROOT / "docs" / "bilevel.md").read_text()
    for row in case["rows"]:
        cells = [digits(row[key]) for key in ("milliseconds", "median_error", "largest_error")]
        line = next(
            line for line in text.splitlines() if line.startswith(f"| {row['candidate']} |")
        )
        assert [cell for i, cell in enumerate(line.split(" | ")[1:-1]) if i != 1] == cells


def test_the_default_mode_costs_little_more_than_the_cheapest() -> None:
    stored = sorted((ROOT / "benchmarks" / "results").glob("modes_by_cost_*.json"))[-1]
    excess = json.loads(stored.read_text())["excess"]
    assert max(excess.values()) <= 1.3
    said = f"at most {max(excess.values()):.2f} times the cheapest"
    assert said in (ROOT / "docs" / "bilevel.md").read_text()


def newest(name: str) -> dict[str, Any]:
    stored = sorted((ROOT / "benchmarks" / "results").glob(f"{name}_*.json"))[-1]
    report: dict[str, Any] = json.loads(stored.read_text())
    return report


def test_no_error_of_an_imperfect_follower_is_above_its_bound() -> None:
    report = newest("imperfect_followers")
    assert report["violated"] == 0
    said = f"0 of {report['checked']:,} errors are above it"
    assert said in (ROOT / "docs" / "followers_and_bias.md").read_text()


def test_outer_steps_of_the_exact_gradient_are_within_the_bound() -> None:
    rows = {(row["problem"], row["method"]): row for row in newest("outer_steps")["rows"]}
    exact = {name: row for (name, method), row in rows.items() if method == "M-SoBiRL, exact"}
    assert len(exact) == 3
    assert all(0 < row["share_of_bound"] <= 1 for row in exact.values())
    assert all(row["slope"] > -1.05 and row["fitted"] == 20 for row in exact.values())
    assert exact["strongly convex"]["slope"] > exact["quartic"]["slope"] > -0.5


def test_noise_falls_with_the_root_of_the_samples() -> None:
    results = ROOT / "benchmarks" / "results"
    report = json.loads((results / "estimator_slopes.json").read_text())
    assert all(abs(row["slope_of_noise"] + 0.5) < 0.1 for row in report["rows"].values())


def test_the_table_of_taxes_is_the_one_measured() -> None:
    report = json.loads(TAXES[-1].read_text())
    table = runpy.run_path(str(ROOT / "benchmarks" / "taxes_table.py"))["table"](report)
    text = (ROOT / "docs" / "taxes.md").read_text()
    assert table in text, f"docs/taxes.md should contain\n\n{table}"
    assert max(row["error_bound"] for row in report["rows"]) < 7e-6
