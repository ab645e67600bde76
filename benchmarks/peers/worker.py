"""The process of one contestant: `python worker.py ADAPTER FD` reads requests from stdin, answers on file descriptor FD.

Imports nothing but what its adapter needs, so that its peak memory is the contestant's.

  load   {settings} -> {"info": what runs, with proof; "seconds": time to load}
  run    {"calls": n, adapter's own} -> {"seconds": [...]}
  output {"path", adapter's own} -> {} and a .npy file with the outputs for the input batch
  memory {} -> {"peak_bytes", "now_bytes"} resident
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Adapter(Protocol):
    """One contestant: a module `peers.NAME` with a function `create()` that returns one of these.

    load    prepare for the input batch (a .npy file) and number of threads; returns JSON-able proof of what will run
    run     the batch once
    output  what the batch gives, float32 [N, classes]
    """

    def load(self, settings: dict[str, Any]) -> dict[str, Any]: ...
    def run(self, **arguments: Any) -> Any: ...
    def output(self, **arguments: Any) -> Any: ...


def resident() -> dict[str, int]:
    """{"peak_bytes", "now_bytes"} of this process (VmHWM and VmRSS of Linux)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {"peak_bytes": int(fields["VmHWM"].split()[0]) * 1024, "now_bytes": int(fields["VmRSS"].split()[0]) * 1024}


def answer(adapter: Adapter, request: dict[str, Any]) -> dict[str, Any]:
    do = request.pop("do")
    if do == "load":
        started = time.perf_counter()
        info = adapter.load(request)
        return {"info": info, "seconds": time.perf_counter() - started}
    if do == "run":
        calls = request.pop("calls")
        clock, run = time.perf_counter, adapter.run
        seconds = []
        for _ in range(calls):
            started = clock()
            run(**request)
            seconds.append(clock() - started)
        return {"seconds": seconds}
    if do == "output":
        import numpy as np

        np.save(request.pop("path"), np.asarray(adapter.output(**request), np.float32))
        return {}
    if do == "memory":
        return dict(resident())
    if do == "ask":
        return dict(getattr(adapter, request.pop("what"))(**request))
    raise ValueError(f"unknown request {do!r}")


def main() -> None:
    name, descriptor = sys.argv[1], int(sys.argv[2])
    with os.fdopen(descriptor, "w", encoding="utf-8") as answers:

        def tell(content: dict[str, Any]) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        adapter: Adapter | None = None
        for line in sys.stdin:
            try:
                if adapter is None:
                    adapter = importlib.import_module(f"peers.{name}").create()
                tell(answer(adapter, json.loads(line)))
            except Exception as error:  # the contestant's own failure: told to the parent, which goes on without it
                traceback.print_exc()
                tell({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})


if __name__ == "__main__":
    main()
