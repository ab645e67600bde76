"""The benchmark scripts as modules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest) -> Iterator[dict[str, ModuleType]]:
    """The scripts that the test file names in MODULES, fresh for every file (pyproject.toml puts their folder on the path)."""
    names: tuple[str, ...] = request.module.MODULES
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        for name in [n for n in sys.modules if n in names or n.partition(".")[0] == "peers"]:
            sys.modules.pop(name, None)
