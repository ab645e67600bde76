"""Without a compiler, with sources that do not compile and without CMake: a pure wheel that says what it lacks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]
Clean = Callable[[Path, Path], Path]

NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "CMAKE_ARGS": ""}

ENGINES = """
import importlib.util, json
from bitdial.engines.base import available_engines
print(json.dumps([available_engines(), importlib.util.find_spec("bitdial.engines.cpu._native") is None]))
"""
# The hook that pip calls, with no CMake to be found: not on the path, not as a Python package.
WITHOUT_CMAKE = """
import sys
sys.modules["cmake"] = None
sys.path.insert(0, "scripts")
import build_backend
print(build_backend.build_wheel(sys.argv[1], {"build-dir": sys.argv[1] + "/build"}))
"""


def build(run: Run, tree: Path, out: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    build = f"--config-settings=build-dir={out / 'build'}"
    options = ("--verbose", "--no-deps", "--no-build-isolation", build, "--wheel-dir", out)
    return run(sys.executable, "-m", "pip", "wheel", *options, tree, cwd=out, **variables)


def pure_wheel(out: Path) -> Path:
    (built,) = out.glob("bitdial-*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]
        modules = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "bitdial").rglob("*.py")}
        assert modules == {n for n in archive.namelist() if n.endswith(".py")}
    return built


def test_no_compiler(tmp_path: Path, run: Run, clean_environment: Clean) -> None:
    done = build(run, ROOT, tmp_path, BITDIAL_REQUIRE_NATIVE="", **NO_COMPILER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WITHOUT its CPU engine" in done.stdout + done.stderr
    python = clean_environment(tmp_path / "clean", pure_wheel(tmp_path))
    done = run(python, "-c", ENGINES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    engines, absent = json.loads(done.stdout)
    assert absent
    assert engines["cpu"], "the CPU engine says that it can be used, but it was not compiled"
    done = run(tmp_path / "clean" / "bin" / "bitdial", "doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"engine cpu: {engines['cpu']}" in " ".join(done.stdout.split())


def test_no_compiler_is_an_error_where_the_engine_is_required(tmp_path: Path, run: Run) -> None:
    done = build(run, ROOT, tmp_path, BITDIAL_REQUIRE_NATIVE="1", **NO_COMPILER)
    assert done.returncode != 0
    assert "CPU engine did not compile" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.usefixtures("needs_compiler")
def test_sources_that_do_not_compile(tmp_path: Path, run: Run) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    out.mkdir()
    shutil.copytree(
        ROOT / "src" / "bitdial", tree / "src" / "bitdial", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copytree(ROOT / "scripts", tree / "scripts")
    shutil.copytree(ROOT / "csrc" / "cuda", tree / "csrc" / "cuda")  # data of the package
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "csrc" / "cpu" / "bindings").mkdir(parents=True)
    (tree / "csrc" / "cpu" / "bindings" / "module.cpp").write_text("#error this does not compile\n")
    # without optimization: nanobind's own files compile first or beside it
    done = build(run, tree, out, BITDIAL_REQUIRE_NATIVE="", SKBUILD_CMAKE_BUILD_TYPE="Debug")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this does not compile" in done.stdout + done.stderr
    pure_wheel(out)
    done = build(run, tree, out, BITDIAL_REQUIRE_NATIVE="1", SKBUILD_CMAKE_BUILD_TYPE="Debug")
    assert done.returncode != 0
    assert "this does not compile" in done.stdout + done.stderr


def test_no_cmake(tmp_path: Path, run: Run) -> None:
    command = (sys.executable, "-c", WITHOUT_CMAKE, tmp_path)
    done = run(*command, cwd=ROOT, PATH="/nonexistent", BITDIAL_REQUIRE_NATIVE="")
    assert done.returncode == 0, done.stderr
    assert "WITHOUT its CPU engine" in done.stderr
    pure_wheel(tmp_path).unlink()
    done = run(*command, cwd=ROOT, PATH="/nonexistent", BITDIAL_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "Could not find CMake" in done.stderr
