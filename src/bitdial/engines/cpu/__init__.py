"""The CPU engine: programs compiled to steps of a C++ extension. Needs no torch for what is compiled."""

from __future__ import annotations

import importlib
from typing import Any

from bitdial.engines.base import Engine, EngineSpec
from bitdial.quantization.program import Program


def _missing() -> str:
    problem: str = importlib.import_module("bitdial.engines.cpu.native").missing()
    return problem


def _can_run(program: Program) -> str:
    return ""


def _create(program: Program, **options: Any) -> Engine:
    engine: Engine = importlib.import_module("bitdial.engines.cpu.engine").CpuEngine(program, **options)
    return engine


SPEC = EngineSpec(
    name="cpu",
    compiled=True,
    options=frozenset({"isa", "threads", "kernels", "memory", "batch_hint", "check_finite"}),
    missing=_missing,
    can_run=_can_run,
    create=_create,
)
