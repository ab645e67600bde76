"""The NPU as an engine: results of the arithmetic at hand, time of the cycle model. The hardware is in rtl/, and not
needed."""

from __future__ import annotations

import importlib
from typing import Any

from bitdial.engines.base import Engine, EngineSpec, available_engines
from bitdial.quantization.program import Program


def _missing() -> str:
    others = {name: lacking for name, lacking in available_engines(modelled=False).items() if name in ("cpu", "reference")}
    return "" if "" in others.values() else f"no engine for its arithmetic can run: {'; '.join(others.values())}"


def _create(program: Program, **options: Any) -> Engine:
    engine: Engine = importlib.import_module("bitdial.engines.npu.engine").NpuEngine(program, **options)
    return engine


SPEC = EngineSpec(
    name="npu",
    compiled=False,
    options=frozenset({
        "rows", "columns", "pad_groups", "megahertz", "dram_bytes_per_cycle", "energy", "threads", "check_finite",
    }),
    missing=_missing,
    can_run=lambda program: "",
    create=_create,
    by_name=True, modelled=True,
)
