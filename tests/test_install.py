"""Installing with and without a compiler, and what a broken compiled module does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from birl_ext.ops.backends import loader

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "CMakeLists.txt", "cmake", "README.md", "LICENSE", "csrc", "birl_ext")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a source distribution holds, without compiled modules."""
    target = tmp_path / "source"
    target.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, target / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, target)
    return target


def build_wheel(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`pip wheel` as a user runs it, but offline: the build requirements are those installed."""
    pytest.importorskip("scikit_build_core")
    pytest.importorskip("pybind11")
    command = [
        sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "--wheel-dir", "wheels",
    ]  # fmt: skip
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BIRL_", "CMAKE_"))}
    return subprocess.run(
        command, cwd=tree, env=clean | environment, capture_output=True, text=True, check=False
    )


def wheel_of(tree: Path) -> Path:
    (wheel,) = (tree / "wheels").glob("*.whl")
    return wheel


@pytest.mark.slow
def test_with_a_compiler_the_wheel_holds_the_cpu_module(tree: Path) -> None:
    # what the wheel holds does not depend on how well it is optimised
    options = "-DBIRL_CUDA=OFF -DCMAKE_CXX_FLAGS_DEBUG=-O0"
    done = build_wheel(
        tree, BIRL_REQUIRE_EXT="1", CMAKE_ARGS=options, SKBUILD_CMAKE_BUILD_TYPE="Debug"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(wheel_of(tree)).namelist()
    assert [n for n in names if n.startswith("birl_ext/_cpu.") and n.endswith(".so")]
    assert "birl_ext/functional.py" in names
    assert not [n for n in names if n.startswith("csrc") or n.endswith((".cpp", ".h", ".cu"))]


@pytest.mark.slow
def test_without_a_compiler_a_pure_wheel_is_built(tree: Path) -> None:
    done = build_wheel(tree, CXX="/nowhere/c++")
    assert done.returncode == 0, done.stdout + done.stderr
    assert wheel_of(tree).name.endswith("-py3-none-any.whl")
    assert not [n for n in zipfile.ZipFile(wheel_of(tree)).namelist() if n.endswith(".so")]


@pytest.mark.slow
def test_required_extension_makes_a_failed_build_final(tree: Path) -> None:
    done = build_wheel(tree, CXX="/nowhere/c++", BIRL_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert not list(tree.glob("wheels/*.whl"))


@pytest.mark.slow
def test_cuda_on_without_nvcc_is_an_error(tree: Path) -> None:
    done = build_wheel(
        tree, BIRL_REQUIRE_EXT="1", CUDACXX="/nowhere/nvcc", CMAKE_ARGS="-DBIRL_CUDA=ON"
    )
    assert done.returncode != 0


@pytest.fixture
def lone(tree: Path) -> Path:
    """Sources that are no clone: the modules of an installed package are not for them."""
    shutil.rmtree(tree / "csrc")
    return tree


def run_in(tree: Path, program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BIRL_")}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(program)],
        cwd=tree, env=clean | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


USE_TWICE = """
    import warnings
    from birl_ext.errors import BackendFallbackWarning
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        import torch, birl_ext
        from birl_ext.ops.backends import loader
        assert not [w for w in seen if w.category is BackendFallbackWarning], "warned at import"
        assert not loader.available("cpu")
        assert not loader.available("cpu")
        p = torch.full((3, 2, 3), 1 / 3, dtype=torch.float64)
        r = torch.ones(3, 2, dtype=torch.float64)
        v = birl_ext.solve(r, p, discount=0.5, temperature=1e-3).value
        assert torch.allclose(v, torch.full_like(v, 2 + 2e-3 * 0.6931471805599453)), v
    warned = [w for w in seen if w.category is BackendFallbackWarning]
    assert len(warned) == 1, warned
    print(warned[0].message)
"""


def suffix() -> str:
    import importlib.machinery

    return importlib.machinery.EXTENSION_SUFFIXES[0]


@pytest.mark.parametrize("fault", ["absent", "not_a_library", "another_version"])
def test_unusable_module_gives_one_warning_and_the_torch_path(lone: Path, fault: str) -> None:
    if fault == "not_a_library":
        (lone / "birl_ext" / f"_cpu{suffix()}").write_bytes(b"\x7fELF and nothing else")
    if fault == "another_version":
        (lone / "birl_ext" / "_cpu.py").write_text("def build_info(): return {'version': '0.0.1'}")
    done = run_in(lone, USE_TWICE)
    assert done.returncode == 0, done.stderr
    told = {"absent": "not built", "not_a_library": "does not load", "another_version": "0.0.1"}
    assert told[fault] in done.stdout


def test_a_clone_uses_the_module_of_the_installed_package_and_only_of_the_same_sources(
    tree: Path, tmp_path: Path
) -> None:
    """As in a clone with a virtual environment in it: the sources shadow what was installed."""
    if loader.reason("cpu"):
        pytest.skip("no compiled CPU module")
    site = tmp_path / "site" / "birl_ext"
    site.mkdir(parents=True)
    file = loader._backends["cpu"].require().__file__
    assert file is not None
    (site / f"_cpu{suffix()}").symlink_to(file)
    path = os.pathsep.join([str(tree), str(site.parent)])
    program = """
        import birl_ext
        from birl_ext.ops.backends import loader
        print(loader.available("cpu"), loader.reason("cpu"))
    """
    done = run_in(tree, program, PYTHONPATH=path)
    assert done.stdout.startswith("True"), done.stderr
    (tree / "csrc" / "core" / ".#control.h").symlink_to("someone@somewhere")  # an editor's lock
    done = run_in(tree, program, PYTHONPATH=path)
    assert done.stdout.startswith("True"), done.stderr
    (header := tree / "csrc" / "core" / "common.h").write_text(header.read_text() + "// changed")
    done = run_in(tree, program, PYTHONPATH=path)
    assert "False" in done.stdout
    assert "was built from other sources than" in done.stdout
    assert "reinstall birl_ext" in done.stderr
    (site / f"_cpu{suffix()}").unlink()
    (site / f"_cpu{suffix()}").write_bytes(b"")  # an installation that was cut short
    done = run_in(tree, program, PYTHONPATH=path)
    assert "does not load" in done.stdout, done.stderr


def test_required_extension_makes_a_missing_module_an_error_at_first_use(lone: Path) -> None:
    program = """
        import birl_ext
        from birl_ext.ops.backends import loader
        assert not loader.report()["_cpu"]["loaded"]
        from birl_ext.errors import BackendUnavailableError
        try:
            loader.available("cpu")
        except BackendUnavailableError as error:
            print(error)
    """
    done = run_in(lone, program, BIRL_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stderr
    assert "BIRL-E601" in done.stdout
    assert "not built" in done.stdout
