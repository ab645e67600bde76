"""The processor that this runs on: what people call it, and how many of its cores this process may use."""

from __future__ import annotations

import os
import platform


def processor_field(*names: str) -> str:
    """The first value under one of these names in /proc/cpuinfo, "" where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                name, _, value = line.partition(":")
                if name.strip() in names:
                    return value.strip()
    except OSError:
        pass
    return ""


def processor_name() -> str:
    """Product name; the architecture where the system does not tell, "" where it tells neither."""
    return processor_field("model name", "Model") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
