"""The processor that this runs on: what people call it, and how many of its cores this process may use."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

SYSTEM = Path("/")  # where /proc and /sys are


def _lines(path: Path) -> list[str]:
    """Lines of a file, none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def processor_field(*names: str) -> str:
    """The first value under one of these names in /proc/cpuinfo, "" where there is none."""
    for line in _lines(SYSTEM / "proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def processor_name() -> str:
    """Product name; the architecture where the system does not tell, "" where it tells neither."""
    return processor_field("model name", "Model") or platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may keep busy: those it may run on, and no more than the CPU quota of its control groups pays
    for (containers have one; part of a core is not counted, since threads beyond the quota stop in the middle of their work).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota + 1e-6)))


def cpu_quota() -> float | None:
    """Cores' worth of CPU time that the control groups of this process are given: the least of the group and those around
    it; None without a limit."""
    found = []
    for folder, version in control_groups("cpu"):
        if version == 2:
            words = " ".join(_lines(folder / "cpu.max")).split()
        else:
            words = _lines(folder / "cpu.cfs_quota_us") + _lines(folder / "cpu.cfs_period_us")
        if len(words) == 2 and all(word.strip().isdigit() for word in words):  # "max" and -1 say: no limit
            quota, period = map(int, words)
            if quota > 0 and period > 0:
                found.append(quota / period)
    return min(found, default=None)


def memory_limit() -> int | None:
    """Bytes that the control groups of this process may use, the least of the group and those around it; None without a
    limit."""
    found = []
    for folder, version in control_groups("memory"):
        text = "".join(_lines(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))).strip()
        if text.isdigit():
            found.append(int(text))
    return min(found, default=None)


def control_groups(controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, version 1 or 2) of the control groups that this process is in, each group before the one around it.

    A container sees the top of what is mounted as its own group, whatever path the host calls it by.
    """
    paths: dict[int, str] = {}
    for line in _lines(SYSTEM / "proc/self/cgroup"):
        names, _, path = line.partition(":")[2].partition(":")
        if not names or controller in names.split(","):
            paths[1 if names else 2] = path
    for line in _lines(SYSTEM / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        mount, kind = left.split(), right.split()
        if len(mount) < 5 or len(kind) < 3 or not kind[0].startswith("cgroup"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        if version not in paths or (version == 1 and controller not in kind[2].split(",")):
            continue
        top, place = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), text) for text in mount[3:5])
        own = f"{paths[version].rstrip('/')}/"
        below = own.removeprefix(f"{top.rstrip('/')}/") if own.startswith(f"{top.rstrip('/')}/") else ""
        parts = [] if ".." in below.split("/") else [part for part in below.split("/") if part]
        for depth in range(len(parts), -1, -1):
            yield SYSTEM / place.lstrip("/") / "/".join(parts[:depth]), version
