"""The source distribution: it holds all that a build needs, nothing that a build left behind, and it builds."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]

BUILD = """
import sys
sys.path.insert(0, "scripts")
import build_backend
print(build_backend.build_sdist(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    done = run(sys.executable, "-c", BUILD, out, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("bitdial-*.tar.gz")
    return built


def files_under(folder: str) -> set[str]:
    """Files of the tree, without what Git ignores: caches, compiled files, what tests and commands write."""
    found = {p.relative_to(ROOT) for p in (ROOT / folder).rglob("*") if p.is_file()}
    caches = {p for p in found if any(part.startswith(".") or part == "__pycache__" for part in p.parts)}
    return {str(p) for p in found - caches if p.suffix not in (".so", ".pyc", ".tmp", ".bitdial")}


def test_contents(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {n.name.partition("/")[2] for n in archive.getmembers() if n.isfile()}
    needed = {
        "CMakeLists.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
        "demo",
        "test",
    }
    assert needed <= names
    for folder in ("csrc", "scripts", "src", "tests"):
        assert {n for n in names if n.startswith(f"{folder}/")} == files_under(folder)
    assert "csrc/cpu/bindings/module.cpp" in names
    assert {n.partition("/")[0] for n in names} == needed | {"csrc", "scripts", "src", "tests", "PKG-INFO"}


@pytest.mark.usefixtures("needs_compiler")
def test_builds(sdist: Path, tmp_path: Path, run: Run) -> None:
    """Without optimization, which takes a fraction of the time: what counts is that no file is missing."""
    options = ("--no-deps", "--no-build-isolation", "--config-settings=cmake.build-type=Debug", "--wheel-dir", tmp_path)
    command = (sys.executable, "-m", "pip", "wheel", *options, sdist)
    done = run(*command, cwd=tmp_path, BITDIAL_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("bitdial-*.whl")
    with zipfile.ZipFile(built) as archive:
        assert [n for n in archive.namelist() if n.endswith(".so")]
