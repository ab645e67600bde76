"""The compiled extension: whether it is there, what this processor runs, and how fast it can be at best."""

from __future__ import annotations

import functools
import importlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bitdial.errors import EngineError
from bitdial.processor import processor_field

try:
    _extension: Any = importlib.import_module("bitdial.engines.cpu._native")
except ImportError as error:  # built without a compiler, or for another machine
    _extension, _problem = None, str(error)

ISA_VARIABLE = "BITDIAL_CPU_ISA"
ARM = ("i8mm", "dotprod", "neon")
ARM_STATUS = "on ARM verified under emulation, speed not measured"  # until a machine has run benchmarks/cpu_kernels.py


def missing() -> str:
    """ "" if the extension can be used, else what is missing and how to get it."""
    if _extension is not None:
        return ""
    return (
        f"the compiled extension is not there ({_problem}): install a C++ compiler, then reinstall "
        "with pip install --force-reinstall --no-cache-dir bitdial"
    )


def extension() -> Any:
    """The extension module. Raises EngineError if it is missing."""
    if _extension is None:
        raise EngineError(f"engine 'cpu' cannot run: {missing()}")
    return _extension


def isas() -> list[str]:
    """Instruction sets that this processor runs and the extension has kernels for, best first."""
    return list(extension().supported_isas())


def choose_isa(wanted: str | None = None) -> str:
    """The set asked for, else the one in BITDIAL_CPU_ISA, else the best. Raises EngineError if it cannot run here."""
    name = wanted or os.environ.get(ISA_VARIABLE) or None
    known = isas()
    if name is None:
        return known[0]
    if name not in known:
        source = "" if wanted else f" (from {ISA_VARIABLE})"
        raise EngineError(f"instruction set '{name}'{source} does not run here: choose one of {known}")
    return name


def cpu_name() -> str:
    """Product name of the processor."""
    return str(extension().cpu_name()) or "unknown processor"


def note() -> str:
    """What users should know of the kernels that run here, "" where there is nothing."""
    return ARM_STATUS if _extension is not None and any(isa in ARM for isa in isas()) else ""


def target() -> str:
    """What `bitdial.quantization.targets` calls this processor with the kernels that run on it here (ISA_VARIABLE included).

    Without the extension, and on ARM, "portable", the careful choice. Raises EngineError for a forced set that cannot run here.
    """
    if _extension is None:
        return "portable"
    isa, vendor, family = choose_isa(), processor_field("vendor_id"), processor_field("cpu family")
    zen5 = vendor == "AuthenticAMD" and family.isdigit() and int(family) >= 26
    full_rate = isa == "avx512vnni" and (zen5 or vendor == "GenuineIntel")
    return "avx512vnni-fullrate" if full_rate else "portable" if isa in ARM else isa


@functools.cache
def peak(isa: str, threads: int = 1) -> dict[str, float]:
    """Measured peaks: {"gmacs_per_s": 8-bit multiply-accumulates in registers, "bandwidth_gb_per_s": reading of memory}.

    The best of forty tries of a few milliseconds on every thread at once; threads add up.
    """
    module = extension()
    rounds = 100
    while module.burn(isa, rounds)[1] < 0.002:
        rounds *= 2
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(40):
            results = list(pool.map(lambda _: module.burn(isa, rounds), range(threads)))
            best = max(best, sum(done / seconds for done, seconds in results))
    block = np.zeros(1 << 25, dtype=np.int64)  # 256 MiB
    block[:] = 1
    speed = 0.0
    for _ in range(3):
        begin = time.perf_counter()
        block.sum()
        speed = max(speed, block.nbytes / (time.perf_counter() - begin))
    return {"gmacs_per_s": best / 1e9, "bandwidth_gb_per_s": speed / 1e9}
