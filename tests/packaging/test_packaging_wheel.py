"""The wheel: what is in it, where it runs, and that it runs in an environment that holds nothing but its dependencies."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]
Clean = Callable[[Path, Path], Path]
EXTENSION = re.compile(r"bitdial/engines/cpu/_native\.[\w-]+\.so")

USE = """
import sys
import bitdial
import bitdial.artifact, bitdial.cli, bitdial.engines, bitdial.errors, bitdial.report, bitdial.selection, bitdial.serving
from importlib.metadata import version
assert bitdial.__file__.startswith(sys.prefix), bitdial.__file__
assert version("bitdial") == bitdial.__version__
assert "torch" not in sys.modules
print("ran", bitdial.__version__)
"""
USE_NATIVE = """
import sys
import bitdial
from bitdial.engines.cpu import _native
assert _native.__file__.startswith(sys.prefix), _native.__file__
assert _native.version() == bitdial.__version__
assert "torch" not in sys.modules
print("ran")
"""


def test_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata_name,) = [n for n in names if n.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
        entry_points = archive.read(metadata_name.replace("METADATA", "entry_points.txt")).decode()
    assert any(n.endswith("licenses/LICENSE") for n in names)
    modules = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "bitdial").rglob("*.py")}
    ours = {n for n in names if ".dist-info" not in n}
    extensions = {n for n in ours if EXTENSION.fullmatch(n)}
    # what the package reads at run time: the live page and its dashboard, the kernels and the example board of exported C, and
    # the CUDA kernels, which are compiled where they run
    data = {
        str(p.relative_to(ROOT / "src"))
        for folder, endings in (("serving/page", "js json svg html css"), ("export/c", "c ld"))
        for ending in endings.split()
        for p in (ROOT / "src" / "bitdial" / folder).rglob(f"*.{ending}")
    }
    data |= {f"bitdial/engines/cuda/kernels/{p.name}" for p in (ROOT / "csrc" / "cuda").iterdir() if p.is_file()}
    assert {"bitdial/serving/page/grafana.json", "bitdial/export/c/runtime/conv.c"} <= data
    assert "bitdial/engines/cuda/kernels/kernels.cu" in data
    # nothing else: no sources of the CPU engine, no build files, no stray extension of a development build
    assert ours == modules | data | extensions | {"bitdial/py.typed", "bitdial/engines/cpu/_native.pyi"}
    assert "bitdial = bitdial.cli:main" in entry_points
    assert metadata["License-Expression"] == "Apache-2.0"
    always = [Requirement(r) for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert {r.name for r in always} == {"numpy", "safetensors", "pydantic", "typer", "rich"}


@pytest.mark.usefixtures("needs_compiler")
def test_the_platform_wheel_holds_one_extension(wheel: Path) -> None:
    _, _, _, tags = parse_wheel_filename(wheel.name)
    (tag,) = tags
    assert tag.platform.startswith("linux_") and tag.platform.endswith(platform.machine())
    with zipfile.ZipFile(wheel) as archive:
        (extension,) = [n for n in archive.namelist() if n.endswith(".so")]
    assert EXTENSION.fullmatch(extension)
    if sys.version_info >= (3, 12) and tag.abi == "abi3":  # one wheel for 3.12 and newer
        assert tag.interpreter == "cp312" and extension.endswith(".abi3.so")
    else:
        assert tag.interpreter == f"cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.fixture(scope="module")
def manylinux(wheel: Path, needs_compiler: None, tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """The wheel that would be published: examined and tagged by auditwheel."""
    out = tmp_path_factory.mktemp("manylinux")
    done = run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", out, wheel, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (repaired,) = out.glob("*.whl")
    return repaired


def test_the_wheel_fits_a_manylinux_policy(wheel: Path, manylinux: Path, run: Run) -> None:
    """It needs nothing beyond the libraries of every Linux of a certain age, and nothing had to be copied in."""
    done = run(sys.executable, "-m", "auditwheel", "show", "--json", wheel, cwd=wheel.parent)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["external_libs"] == {}
    assert set(found["versioned_symbols"]) <= {
        "libc.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libstdc++.so.6",
        "libpthread.so.0",
    }
    _, _, _, tags = parse_wheel_filename(manylinux.name)
    assert any(tag.platform.startswith("manylinux_") for tag in tags)
    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(manylinux) as after:
        assert {n for n in after.namelist() if not n.endswith("/")} == set(before.namelist())


def test_runs_with_nothing_but_its_dependencies(
    wheel: Path, tmp_path: Path, clean_environment: Clean, run: Run
) -> None:
    python = clean_environment(tmp_path / "clean", wheel)
    done = run(python, "-c", USE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ran ")
    done = run(tmp_path / "clean" / "bin" / "bitdial", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "quantize" in done.stdout


def test_the_extension_runs_in_a_clean_environment(
    manylinux: Path, tmp_path: Path, clean_environment: Clean, run: Run
) -> None:
    python = clean_environment(tmp_path / "clean", manylinux)
    done = run(python, "-c", USE_NATIVE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ran"


@pytest.mark.slow
def test_installs_from_the_index(wheel: Path, tmp_path: Path, run: Run) -> None:
    """What `pip install bitdial` does on a fresh machine; needs the network."""
    place = tmp_path / "clean"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(python, "-c", USE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run(python, "-c", "import torch", cwd=tmp_path).returncode != 0
