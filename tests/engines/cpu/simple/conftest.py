import fcntl
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for simple_support and simple_definitions
import simple_support


@pytest.fixture(scope="session")
def simple_ops_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared library of the operators; compiled once, also where several processes test. With sanitizers where
    scripts/sanitize.sh has put their runtime under Python."""
    if simple_support.compiler() is None:
        pytest.skip("NO C++ COMPILER: the operators of the CPU engine are not tested here")
    sanitize = "BITDIAL_SANITIZED_NATIVE" in os.environ
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "simple_ops"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "simple_ops.so"
        return library if library.exists() else simple_support.build(folder, sanitize)


@pytest.fixture(scope="session")
def shim(simple_ops_library: Path) -> simple_support.Shim:
    return simple_support.Shim(simple_ops_library)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", list(simple_support.ISA_FLAGS), indirect=True, scope="session")


@pytest.fixture(scope="session")
def isa(request: pytest.FixtureRequest, shim: simple_support.Shim) -> str:
    """An instruction set of this build that this processor runs."""
    if request.param not in shim.isas:
        pytest.skip(f"this processor does not run {request.param}")
    return str(request.param)
