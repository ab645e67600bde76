"""What preparing a network costs: seconds of the clock and of processors, and how much of the machine others used meanwhile."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUIET = 0.05  # share of the processors that others may use before seconds are called provisional
_WORKING = (0, 1, 2, 5, 6, 7)  # of /proc/stat: user, nice, system, irq, softirq, steal


def busy_seconds() -> float:
    """Processor seconds that the whole machine has worked since it started; 0 where the kernel does not say."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    return sum(int(fields[i]) for i in _WORKING if i < len(fields)) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor seconds of this process and of its children that ended."""
    return sum(os.times()[:4])


def timed(work: Callable[[], None]) -> dict[str, Any]:
    """{"wall_seconds", "cpu_seconds", "others_share", "provisional"} of a call. others_share: of all processors."""
    busy, own, started = busy_seconds(), own_seconds(), time.perf_counter()
    work()
    wall, cpu = time.perf_counter() - started, own_seconds() - own
    others = (busy_seconds() - busy - cpu) / (max(wall, 1e-9) * (os.cpu_count() or 1)) if busy else 0.0
    others = min(1.0, max(0.0, others))
    return {"wall_seconds": wall, "cpu_seconds": cpu, "others_share": others, "provisional": others > QUIET}


class Stages:
    """A progress callback that adds up seconds by stage, and writes a line to stderr where a stage begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}  # wall, cpu; in order of their first call
        self._stage = ""
        self._since = (time.perf_counter(), own_seconds())

    def __call__(self, stage: str, share: float) -> None:
        if stage != self._stage:
            self.close()
            self._stage = stage
            os.write(2, f"{time.strftime('%H:%M:%S')} {stage}\n".encode())

    def close(self) -> dict[str, list[float]]:
        """End the running stage; {stage: [wall seconds, processor seconds]}."""
        now = (time.perf_counter(), own_seconds())
        if self._stage:
            spent = self.seconds.setdefault(self._stage, [0.0, 0.0])
            spent[0] += now[0] - self._since[0]
            spent[1] += now[1] - self._since[1]
        self._since, self._stage = now, ""
        return self.seconds
