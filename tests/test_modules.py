"""Code of a user's own: how it is found, imported once, remembered, and refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from preference_run import SMALL, make_job

import birl_ext
from birl_ext.cli import main
from birl_ext.environments.vector import make_environments
from birl_ext.errors import BirlError, ConfigError, OptionError
from birl_ext.modules import import_own, locate

OWN = """
import gymnasium
import numpy as np

class Walk(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0.0
        return self.seen(), {}

    def step(self, action):
        self.place += 0.1 if action else -0.1
        return self.seen(), self.place, False, False, {}

    def seen(self):
        return np.array([self.place], np.float32)

gymnasium.register("Walk-v0", Walk, max_episode_steps=20)

class Farther:
    # Likes to be far out, and counts how often it was asked.

    asked = 0

    def __call__(self, first, second):
        ours, theirs = (part.observation[:, -1, 0] for part in (first, second))
        self.asked += len(ours)
        return [None if a == b == 0 else (a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs)]

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]

class Silent:
    def __init__(self, name):
        self.name = name

from birl_ext.preferences.teachers import register_teacher
register_teacher("farther", Farther)
"""
FLAGS = [
    word
    for name, value in SMALL.items()
    for word in (f"--{name.replace('_', '-')}", *map(str, value if name == "hidden" else (value,)))
]


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is imported and registered here is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    modules, path, registered = set(sys.modules), list(sys.path), set(gymnasium.registry)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    for id in set(gymnasium.registry) - registered:
        del gymnasium.registry[id]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "here" / "own_walk.py"
    path.parent.mkdir()
    path.write_text(OWN)
    return path


def birl(*words: str, cwd: Path) -> str:
    """A command in a process that has imported nothing yet."""
    start = "import sys; from birl_ext.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", start, *words], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_in_an_own_environment_is_found_again_from_anywhere(
    own: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    more = own.with_name("own_more.py")
    more.write_text("")
    words = ["--module", "own_walk.py", "--env", "Walk-v0", "--module", "own_more"]
    words += ["--teacher", "own_walk:Farther"]
    birl("run", "preference", *words, *FLAGS, "--out", str(out), cwd=own.parent)
    assert str(own) in (out / "config.toml").read_text()
    assert str(more) in (out / "config.toml").read_text()
    assert "true_return.png" in birl("plot", str(out), cwd=tmp_path)
    assert "4 steps" in birl("run", "--resume", str(out), "--no-figures", cwd=tmp_path)


def test_a_run_whose_module_has_moved_is_read_and_resumed_with_its_new_path(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["--module", str(own), "--env", "Walk-v0", "--teacher", "own_walk:Farther"]
    assert main(["run", "preference", *words, *FLAGS, "--out", str(out), "--no-figures"]) == 0
    moved = tmp_path / "there" / own.name
    moved.parent.mkdir()
    own.rename(moved)
    del sys.modules[own.stem], gymnasium.registry["Walk-v0"]  # as in another process
    sys.path.remove(str(own.parent))
    for again in (["plot", str(out)], ["run", "--resume", str(out)]):
        assert main(again) == 2
        assert "there is no module" in (said := capsys.readouterr().err)
        assert "give the path of its file: --module FILE" in said
    assert main(["plot", str(out), "--module", str(moved)]) == 0
    assert "true_return.png" in capsys.readouterr().out
    assert birl_ext.load_run(out, module=moved).config.module == (str(moved),)
    assert birl_ext.SoBiRL.load(out, module=str(moved)).predict([0.0]) in (0, 1)
    words = ["run", "--resume", str(out), "--module", str(moved), "--no-figures"]
    assert main(words) == 0
    assert main(words[:3] + words[-1:]) == 0  # remembered
    assert main([*words, "--seed", "3"]) == 2  # all else stays
    assert "seed: stored 0, given 3" in capsys.readouterr().err


@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_import_it_too(own: Path, context: str) -> None:
    with make_environments(
        "Walk-v0", count=2, parallel=True, context=context, modules=[str(own)]
    ) as environments:
        assert environments.step(torch.tensor([0, 1])).transitions.reward.tolist() == [
            pytest.approx(-0.1),
            pytest.approx(0.1),
        ]


def test_a_job_hands_its_modules_to_the_workers(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "birl_ext.problems.preference.job.make_environments",
        lambda *a, modules, **k: given.append(modules) or make_environments(*a, **k),
    )
    job = make_job(env="Walk-v0", module=(str(own),))
    job.evaluate()
    assert given == [(str(own),)] * 2


def test_it_is_found_by_its_path_and_by_its_name(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    assert locate("own_walk.py") == locate("own_walk") == locate("../here/own_walk.py") == str(own)
    first = import_own("own_walk")
    assert import_own(str(own)) is first
    monkeypatch.chdir("/")
    assert locate("own_walk") == str(own)  # now importable, and still kept by its path
    assert locate("birl_ext.errors") == "birl_ext.errors"  # of a package by its name
    assert locate("birl_ext") == "birl_ext"
    assert import_own("birl_ext.errors").BirlError is BirlError


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("absent.py", None, r"there is no module '\S*absent.py' at /\S*/absent.py"),
        ("absent", None, r"there is no module '\S*absent'"),
        ("raises.py", "x = 1\nx / 0", r"raised ZeroDivisionError: .*raises.py, line 2\b"),
        ("leaves.py", "import sys\nsys.exit(3)", "raised SystemExit: 3"),
        ("lacks.py", "import not_installed_anywhere", "ModuleNotFoundError: No module named"),
        ("half.py", "def f(:", "SyntaxError"),
        ("json.py", "", r"'json' cannot be imported by this name .*another than that of \S*json"),
        ("two words.py", "", "'two words' cannot be imported .*a Python name"),
    ],
)
def test_what_cannot_be_imported_has_a_name(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        import_own(str(tmp_path / name))
    assert str(caught.value).count("Fix: ") == 1


def test_names_that_lead_nowhere_have_one_too(tmp_path: Path) -> None:
    (tmp_path / "only_a_folder").mkdir()
    sys.path.append(str(tmp_path))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("1 / 0")
    for name in ("nowhere_at_all", "nowhere.at.all", "", ".sub", "only_a_folder"):
        with pytest.raises(ConfigError, match="there is no module"):
            import_own(name)
    with pytest.raises(ConfigError, match="raised ZeroDivisionError"):
        import_own("broken.part")


def test_a_run_whose_module_fails_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "preference", "--module", "absent.py", "--out", "run"]) == 2
    assert "there is no module 'absent.py'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_name_of_an_object_in_a_file_is_no_teacher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "preference", "--teacher", "<my_code:nearer>", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert "the teacher <my_code:nearer> was given as an object" in said
    assert "--module FILE.py --teacher FILE:NAME" in said
    assert not (tmp_path / "run").exists()


def test_the_command_of_the_readme_runs_its_environment_and_its_teacher(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(import gymnasium\n.*?)^```$", text, re.M | re.S)
    own, _ = code.split("budget =")  # the class and the function
    (register,) = re.findall(r"`(gymnasium\.register\([^`]*\))`", text)
    (command,) = re.findall(r"`birl (run preference --module my_code\.py [^`]*)`", text)
    (tmp_path / "my_code.py").write_text(own + register)
    assert "4 steps" in birl(*command.split(), *FLAGS, cwd=tmp_path)


def test_an_id_that_names_code_is_refused_with_the_flag_to_give() -> None:
    with pytest.raises(OptionError, match=r"--module my_code --env Own-v0$"):
        make_job(env="my_code:Own-v0")
    with pytest.raises(OptionError, match=r"[^.]\. Fix: .*--module FILE$"):
        make_job(env="Own-v0")


@pytest.mark.parametrize("name", ["farther", "own_walk:Farther"])
def test_a_teacher_of_an_own_module_is_named_by_a_setting(own: Path, name: str) -> None:
    def made() -> Any:
        return make_job(env="Walk-v0", module=(str(own),), teacher=name)

    job = made()
    while not job.done:
        job.step()
    assert job.teacher.teacher.asked == SMALL["labels"]
    other = made()
    other.load_state_dict(job.state_dict())
    assert other.teacher.teacher.asked == SMALL["labels"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "orcale"}, r"teacher is 'orcale' .*oracle.*MODULE:NAME.*mean 'oracle'"),
        ({"teacher": "elsewhere:T"}, r"'elsewhere' is not named\. Fix: .*--module elsewhere\.py$"),
        ({"teacher": "ownwalk:Farther"}, r"--module ownwalk\.py; or did you mean 'own_walk'\?"),
        ({"teacher": "Farther"}, r"teacher is 'Farther' .*, own_walk:Farther; or MODULE:NAME"),
        ({"teacher": "sys:exit"}, "'sys' is not named"),  # imported, but not for this run
        ({"teacher": "own_walk:Father"}, "the module has no 'Father' at .*mean 'Farther'"),
        ({"teacher": "own_walk:Silent"}, "making the teacher 'own_walk:Silent' raised TypeError"),
        ({"teacher": "own_walk:gymnasium"}, "BIRL-E903 the teacher is builtins:module"),
        ({"teacher": "farther", "sign_only": True}, "sign_only is True, with teacher farther"),
    ],
)
def test_a_teacher_that_is_none_has_a_name(
    own: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BirlError, match=message):
        make_job(env="Walk-v0", module=(str(own),), **changes)
