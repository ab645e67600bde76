"""The benchmark scripts as modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[dict[str, ModuleType]]:
    """The scripts that the test file names in MODULES; sys.path and sys.modules are left as they were."""
    names: tuple[str, ...] = request.module.MODULES
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in [n for n in sys.modules if n in names or n.startswith("peers.")]:
            sys.modules.pop(name, None)
