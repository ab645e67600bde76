"""The reference engine: torch, exact integers. It defines the results of all others and claims no speed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from bitdial.engines.base import Engine, EngineSpec
from bitdial.quantization.program import Program


def _missing() -> str:
    return "" if importlib.util.find_spec("torch") else "torch is not installed: pip install bitdial[quantize]"


def _create(program: Program, **options: Any) -> Engine:
    engine: Engine = importlib.import_module("bitdial.engines.reference.engine").ReferenceEngine(program, **options)
    return engine


SPEC = EngineSpec(
    name="reference",
    compiled=False,
    options=frozenset({"device", "check_finite"}),
    missing=_missing,
    can_run=lambda program: "",
    create=_create,
)
