import platform
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for simple_support and simple_definitions
import simple_support

from bitdial.engines.cpu import native

# Those of this architecture that have these kernels themselves; avxvnni, avx512, dotprod and i8mm take another's.
ARM = platform.machine().lower() in ("aarch64", "arm64")
SETS = ["neon", "portable"] if ARM else ["avx512vnni", "avx2", "portable"]


@pytest.fixture(scope="session")
def kernels() -> simple_support.Kernels:
    """The extension's kernels; with sanitizers where scripts/sanitize.sh has put them under Python."""
    if native.missing():
        pytest.skip(f"CPU ENGINE MISSING: {native.missing()}")
    return simple_support.Kernels(native.extension())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", SETS, indirect=True, scope="session")


@pytest.fixture(scope="session")
def isa(request: pytest.FixtureRequest, kernels: simple_support.Kernels) -> str:
    """An instruction set of this build that this processor runs."""
    if request.param not in kernels.isas:
        pytest.skip(f"this processor does not run {request.param}")
    return str(request.param)
