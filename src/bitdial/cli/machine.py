"""What this machine is, and how many of its cores torch may use. Linux is told in full, other systems in part."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from bitdial.processor import memory_limit, processor_field, processor_name, usable_cores

__all__ = ["cpu_model", "instruction_sets", "memory", "set_threads", "usable_cores", "yield_waiting_cores"]

# Flags of /proc/cpuinfo that 8-bit arithmetic depends on.
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def cpu_model() -> str:
    """The processor's name, "unknown" if the system does not tell."""
    return processor_name() or "unknown"


def instruction_sets() -> dict[str, bool]:
    """Name -> whether this processor has it; those of other architectures are left out."""
    flags = set(processor_field("flags", "Features").split())
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return {name: name in flags for name in INSTRUCTION_SETS if (name in ("asimd", "asimddp", "i8mm")) == arm}


def memory() -> dict[str, Any]:
    """Bytes of memory: total and available of the machine, and the limit of the container (None if there is none)."""
    fields = dict(line.split(":", 1) for line in _read("/proc/meminfo").splitlines() if ":" in line)

    def kilobytes(name: str) -> int | None:
        parts = fields.get(name, "").split()
        return int(parts[0]) * 1024 if parts and parts[0].isdigit() else None

    total, bound = kilobytes("MemTotal"), memory_limit()
    if bound is not None and total is not None and bound >= total:
        bound = None
    return {"total_bytes": total, "available_bytes": kilobytes("MemAvailable"), "container_limit_bytes": bound}


def yield_waiting_cores() -> None:
    """Let threads of torch that wait give their core away. Call before torch is imported; a set variable stays.

    By default they spin. Where other processes want the same cores that costs much: the demo's training took 61 s with
    and 27 s without on two busy cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def set_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; None leaves its own choice."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
