"""The NPU as an engine: results of the reference arithmetic, time of the cycle model. The hardware is in rtl/, and not
needed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from bitdial.engines.base import Engine, EngineSpec
from bitdial.quantization.program import Program


def _missing() -> str:
    return "" if importlib.util.find_spec("torch") else "torch is not installed: pip install bitdial[quantize]"


def _create(program: Program, **options: Any) -> Engine:
    engine: Engine = importlib.import_module("bitdial.engines.npu.engine").NpuEngine(program, **options)
    return engine


SPEC = EngineSpec(
    name="npu",
    compiled=False,
    options=frozenset({"rows", "columns", "pad_groups", "megahertz", "dram_bytes_per_cycle", "check_finite"}),
    missing=_missing,
    can_run=lambda program: "",
    create=_create,
    by_name=True, modelled=True,
)
