"""The CUDA engine: programs compiled to launches on NVIDIA GPUs. Needs no torch and no toolkit."""

from __future__ import annotations

import importlib
from typing import Any

from bitdial.engines.base import Engine, EngineSpec
from bitdial.quantization.program import Program


def _missing() -> str:
    problem: str = importlib.import_module("bitdial.engines.cuda.driver").missing()
    return problem


def _can_run(program: Program) -> str:
    problem: str = importlib.import_module("bitdial.engines.cuda.compiler").can_run(program)
    return problem


def _create(program: Program, **options: Any) -> Engine:
    engine: Engine = importlib.import_module("bitdial.engines.cuda.engine").CudaEngine(program, **options)
    return engine


STATUS = "verified by emulation, not yet run on a GPU"  # until benchmarks/gpu_check.py has passed on one

SPEC = EngineSpec(
    name="cuda",
    compiled=True,
    options=frozenset({"gpu", "check_finite"}),
    missing=_missing,
    can_run=_can_run,
    create=_create,
    by_name=True,
    note=STATUS,
)
