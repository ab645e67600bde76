"""bitdial's own engine as a contestant: one process per instruction set, all ratios on one engine, as a user has it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peers.inputs import read_inputs


class BitdialPeer:
    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """settings: model (.bitdial), inputs (see `peers.inputs`), engine, threads, isa (cpu), options."""
        from bitdial.artifact import load_program
        from bitdial.engines.base import create_engine

        inputs = read_inputs(settings["inputs"])
        self.batch = inputs[0] if len(inputs) == 1 else inputs
        self.name, self.threads = settings["engine"], settings["threads"]
        started = time.perf_counter()
        program = load_program(Path(settings["model"]))
        read = time.perf_counter()
        options = dict(settings.get("options") or {})
        if self.name == "cpu":
            options = {"isa": settings["isa"], "threads": self.threads, "batch_hint": len(inputs[0]), **options}
        else:
            import torch

            torch.set_num_threads(self.threads)
        self.engine = create_engine(program, self.name, **options)
        self.ratios: list[float] = self.engine.ratios
        made = time.perf_counter()
        described = self.engine.describe()
        return {
            "engine": described.get("engine"),
            "ratios": self.ratios,
            "read_seconds": read - started,
            "engine_seconds": made - read,
        }

    def run(self, ratio: float) -> Any:
        return self.engine.run(self.batch, ratio)

    def output(self, ratio: float) -> Any:
        return self.engine.run(self.batch, ratio)

    def executed(self, ratio: float) -> dict[str, Any]:
        """What one run executed, as the engine counts it: share of low multiply-accumulates, layers per kernel."""
        if not hasattr(self.engine, "counters"):
            return {"low_share": None, "kernels": {}}
        self.engine.reset_counters()
        self.engine.run(self.batch, ratio)
        rows = self.engine.counters()
        low, high = sum(int(r["low_macs"]) for r in rows), sum(int(r["high_macs"]) for r in rows)
        kernels: dict[str, int] = {}
        for row in rows:
            if int(row["low_macs"]) + int(row["high_macs"]):
                kernels[str(row["kernel"])] = kernels.get(str(row["kernel"]), 0) + 1
        return {"low_share": low / (low + high) if low + high else None, "kernels": kernels}


def create() -> BitdialPeer:
    return BitdialPeer()
