"""Peak resident set of a process that loads a network and runs it: what a server pays beside its own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peers.contestants import Contestant
from peers.models import ModelFiles
from peers.protocol import PeerError, Worker

RUNS = 3


def measure_memory(
    contestants: Sequence[tuple[str, Contestant, dict[str, Any]]],
    files: ModelFiles,
    network: str,
    report: Callable[[str, float], None],
    environment: dict[str, str],
) -> dict[str, Any]:
    """{"processes": {label: {"loaded_peak_bytes", "peak_bytes", "now_bytes", "seconds"}}, "failed": {label: why}}.

    contestants: (label, contestant, further load settings). One process each, batch 1, one thread; peaks are the kernel's
    VmHWM. A first process fills caches that a library keeps on disk; the second one counts.
    """
    processes: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    inputs = files.inputs(network, 1)
    for number, (label, contestant, extra) in enumerate(contestants):
        report(f"memory of {label}", number / len(contestants))
        settings = {**contestant.load_settings(files, network, inputs, 1), "proof": False, **extra}
        arguments = {"ratio": 0.0} if contestant.library == "bitdial" else {}
        try:
            for _ in range(2):
                worker = Worker(contestant.adapter, files.folder / "logs" / "memory.log", environment=environment)
                try:
                    base = worker.ask("memory")
                    load = worker.ask("load", **settings)
                    loaded = worker.ask("memory")
                    worker.calls(RUNS, **arguments)
                    after = worker.ask("memory")
                finally:
                    worker.close()
            processes[label] = {
                "before_bytes": base["now_bytes"],
                "loaded_peak_bytes": loaded["peak_bytes"],
                "peak_bytes": after["peak_bytes"],
                "now_bytes": after["now_bytes"],
                "load_seconds": load["seconds"],
                "model_bytes": model_bytes(settings["model"]),
            }
        except PeerError as error:
            failed[label] = str(error)
    return {"processes": processes, "failed": failed}


def model_bytes(path: str) -> int:
    """Size of the model's files."""
    from pathlib import Path

    main = Path(path)
    weights = main.with_suffix(".bin")
    return main.stat().st_size + (weights.stat().st_size if main.suffix == ".xml" and weights.exists() else 0)
