"""The wheel: what is in it, and that it runs in an environment that holds nothing but its declared dependencies."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

USE = """
import sys
import flexiq
import flexiq.artifact, flexiq.cli, flexiq.engines, flexiq.errors, flexiq.report, flexiq.selection, flexiq.serving
from importlib.metadata import version
assert flexiq.__file__.startswith(sys.prefix), flexiq.__file__
assert version("flexiq") == flexiq.__version__
assert "torch" not in sys.modules
print("ran", flexiq.__version__)
"""


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Variables that would let the surrounding environment leak in.
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out)
    done = run(sys.executable, "-m", "pip", "wheel", *options, ROOT, cwd=out)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("flexiq-*.whl")
    return built


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
        entry_points = archive.read(metadata_name.replace("METADATA", "entry_points.txt")).decode()
    assert "flexiq/py.typed" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert {n.partition("/")[0] for n in names if ".dist-info" not in n} == {"flexiq"}
    modules = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "flexiq").rglob("*.py")}
    assert modules == {n for n in names if n.endswith(".py")}
    assert "flexiq = flexiq.cli:main" in entry_points
    assert metadata["License-Expression"] == "Apache-2.0"
    always = [Requirement(r) for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert {r.name for r in always} == {"numpy", "safetensors", "pydantic", "typer", "rich"}


def closure(requirements: list[Requirement], seen: dict[str, importlib.metadata.Distribution]) -> None:
    """Installed distributions that satisfy the requirements, and theirs, without extras."""
    for requirement in requirements:
        name = requirement.name.lower().replace("_", "-")
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen[name] = importlib.metadata.distribution(requirement.name)
        closure([Requirement(r) for r in seen[name].requires or []], seen)


def test_runs_with_nothing_but_its_dependencies(wheel: Path, tmp_path: Path) -> None:
    """Needs no network: the dependencies are linked from the environment of the tests, torch and the others are not."""
    place = tmp_path / "clean"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).stdout.strip())
    linked: dict[str, importlib.metadata.Distribution] = {}
    closure([Requirement(r) for r in importlib.metadata.distribution("flexiq").requires or []], linked)
    assert "torch" not in linked and "numpy" in linked
    for distribution in linked.values():
        tops = {f.parts[0] for f in distribution.files or [] if f.parts[0] not in ("..", "__pycache__")}
        for top in sorted(tops):
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    done = run(python, "-c", USE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ran ")
    done = run(place / "bin" / "flexiq", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout


@pytest.mark.slow
def test_installs_from_the_index(wheel: Path, tmp_path: Path) -> None:
    """What `pip install flexiq` does on a fresh machine; needs the network."""
    place = tmp_path / "clean"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(python, "-c", USE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run(python, "-c", "import torch", cwd=tmp_path).returncode != 0
