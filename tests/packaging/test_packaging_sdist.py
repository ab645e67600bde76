"""The source distribution: it holds all that a build needs, nothing that a build left behind, and it builds."""

from __future__ import annotations

import os
import shlex
import shutil
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
    stored = (Path("tests", "artifact"), Path("tests", "artifact", "stored"))
    written = {p for p in found if p.suffix in (".so", ".pyc", ".tmp") or (p.suffix == ".bitdial" and p.parent not in stored)}
    return {str(p) for p in found - caches - written}


def test_contents(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {n.name.partition("/")[2] for n in archive.getmembers() if n.isfile()}
    needed = {
        "CMakeLists.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "constraints.txt",
        "demo",
        "test",
    }
    assert needed <= names
    for folder in ("csrc", "examples", "rtl", "scripts", "src", "tests"):
        assert {n for n in names if n.startswith(f"{folder}/")} == files_under(folder)
    assert "csrc/cpu/bindings/module.cpp" in names
    assert {n.partition("/")[0] for n in names} == needed | {"csrc", "examples", "rtl", "scripts", "src", "tests", "PKG-INFO"}


# Finds every file that the real compiler would, and translates none of the extension's: what CMake tries first is compiled.
COMPILER = """#!/bin/bash
case " $* " in
    *" -c "*/csrc/cpu/* | *" -c "*/nanobind/*)
        out=/dev/null
        kept=()
        while [ $# -gt 0 ]; do
            case $1 in
                -o) out=$2; shift ;;
                -c) ;;
                *) kept+=("$1") ;;
            esac
            shift
        done
        {real} -E "${{kept[@]}}" > /dev/null && {real} -fPIC -x c++ -c /dev/null -o "$out"
        ;;
    *) exec {real} "$@" ;;
esac
"""


def build(sdist: Path, out: Path, run: Run, **variables: str) -> list[str]:
    """Names of the compiled files in the wheel of the source distribution."""
    options = ("--no-deps", "--no-build-isolation", "--config-settings=cmake.build-type=Debug", "--wheel-dir", out)
    command = (sys.executable, "-m", "pip", "wheel", *options, sdist)
    done = run(*command, cwd=out, BITDIAL_REQUIRE_NATIVE="1", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("bitdial-*.whl")
    with zipfile.ZipFile(built) as archive:
        return [n for n in archive.namelist() if n.endswith(".so")]


def without(sdist: Path, place: Path, name: str) -> Path:
    """The same source distribution, one file left out."""
    changed = place / sdist.name
    with tarfile.open(sdist) as archive, tarfile.open(changed, "w:gz") as other:
        for member in archive.getmembers():
            if member.name.partition("/")[2] != name:
                other.addfile(member, archive.extractfile(member) if member.isfile() else None)
    return changed


@pytest.mark.usefixtures("needs_compiler")
def test_no_file_of_the_build_is_missing(sdist: Path, tmp_path: Path, run: Run) -> None:
    """The whole build with a compiler that stops after its preprocessor."""
    real = (os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))).split()
    compiler = tmp_path / "c++"
    compiler.write_text(COMPILER.format(real=shlex.join(real)))
    compiler.chmod(0o755)
    assert build(sdist, tmp_path, run, CXX=str(compiler))
    with pytest.raises(AssertionError, match="conv_args.h"):  # the control
        build(without(sdist, tmp_path, "csrc/cpu/conv/conv_args.h"), tmp_path, run, CXX=str(compiler))


@pytest.mark.slow
@pytest.mark.usefixtures("needs_compiler")
def test_builds(sdist: Path, tmp_path: Path, run: Run) -> None:
    assert build(sdist, tmp_path, run)
