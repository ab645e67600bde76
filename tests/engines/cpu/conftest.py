"""What all tests of the CPU engine share: a folder of their own for remembered kernel choices."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for cpu_layers and cpu_networks

COMPILED = (
    "test_cpu_kernels", "test_cpu_engine", "test_cpu_concurrency", "test_cpu_errors", "test_cpu_tuning",
    "test_cpu_training_steps", "test_cpu_mixed", "test_cpu_attention",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the compiled extension these tests are skipped, unless BITDIAL_REQUIRE_NATIVE says that it must be there."""
    from bitdial.engines.cpu import native

    if not native.missing() or os.environ.get("BITDIAL_REQUIRE_NATIVE", "0").lower() not in {"", "0", "false", "off"}:
        return
    skip = pytest.mark.skip(reason=f"CPU ENGINE MISSING: {native.missing()}")
    for item in items:
        if item.path.stem in COMPILED and "without_the_extension" not in item.name:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Kernel choices are remembered in a temporary folder, never in the user's."""
    folder = tmp_path_factory.mktemp("bitdial_cache")
    before = os.environ.get("BITDIAL_CACHE_DIR")
    os.environ["BITDIAL_CACHE_DIR"] = str(folder)
    yield folder
    if before is None:
        del os.environ["BITDIAL_CACHE_DIR"]
    else:
        os.environ["BITDIAL_CACHE_DIR"] = before


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instruction set forced from outside must not hide the others from these tests."""
    monkeypatch.delenv("BITDIAL_CPU_ISA", raising=False)
