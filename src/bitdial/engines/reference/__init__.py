"""The reference engine: torch, exact integers. It defines the results of all others and claims no speed."""

from __future__ import annotations

import importlib.util

from bitdial.engines.base import EngineSpec, lazily


def _missing() -> str:
    return "" if importlib.util.find_spec("torch") else "torch is not installed: pip install bitdial[quantize]"


SPEC = EngineSpec(
    name="reference",
    compiled=False,
    options=frozenset({"device", "check_finite"}),
    missing=_missing,
    create=lazily("bitdial.engines.reference.engine", "ReferenceEngine"),
)
