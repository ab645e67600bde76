"""The demo's last step: a server under a burst that 8 bits cannot carry, once without the dial and once with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitdial.errors import EngineError
from bitdial.loadtest import LoadPlan, Result, Schedule, Target, parse_url, run_load, steps, summarize
from bitdial.serving.control import ServiceTable, Settings

IMAGES = 64  # of a request for digits: large enough that computing, not HTTP, is what queues
POLICIES = {"8 bits only": "fixed:0", "with the dial": "planned"}
CALM = 0.5  # of what 8 bits carry
FILL = 0.6  # how far the burst goes from there to what the top ratio carries
LEAST_GAIN = 1.2


@dataclass(frozen=True)
class Burst:
    """What came of it. results: by the names in POLICIES. gain: of the top ratio in throughput. rates: requests/s, calm and
    burst. carried: by 8 bits and by the top ratio. slo: seconds."""

    results: dict[str, Result]
    gain: float
    rates: tuple[float, float]
    carried: tuple[float, float]
    slo: float

    def as_json(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "gain": self.gain,
            "carried_rates": list(self.carried),
            "calm_rate": self.rates[0],
            "burst_rate": self.rates[1],
            "slo_ms": 1000.0 * self.slo,
            "runs": {name: summarize(result) for name, result in self.results.items()},
        }


def run_burst(
    model: Path, seconds: tuple[float, float], seed: int, progress: Callable[[str, float], None], *, samples: int = IMAGES,
    max_ratio: float | None = None,
) -> Burst:  # fmt: skip
    """Serve the model twice, each time under the same arrivals: calm, burst, calm.

    seconds: of each calm part, of the burst. samples: of a request. max_ratio: of the dial, by default the server's own choice.
    Raises EngineError if the server does not start.
    """
    results: dict[str, Result] = {}
    table: ServiceTable | None = None
    slo, rates, low, high = 1.0, (0.0, 0.0), 0.0, 0.0
    for at, (name, policy) in enumerate(POLICIES.items()):
        progress("burst", at / len(POLICIES))
        if table is None:
            with _Server(model, samples, 1.0, "fixed:0", max_ratio) as first:  # measures what a request costs, and remembers it
                table = first.table
            slo = round(max(0.02, 6.0 * table.latency(0, samples)), 4)
            top = Settings(max_ratio=max_ratio).allowed(table)[-1]
            low, high = (table.throughput(i, samples) / samples for i in (0, top))
            rates = (CALM * low, low + FILL * max(high - low, 0.0))
        with _Server(model, samples, slo, policy, max_ratio) as server:
            levels = [(rates[0], seconds[0]), (rates[1], seconds[1]), (rates[0], seconds[0])]
            times = steps(levels, seed)
            schedule = Schedule(times, 2 * seconds[0] + seconds[1], "calm, burst, calm")
            plan = LoadPlan(schedule=schedule, samples=samples, slo=slo, send_slo=False, seed=seed, title=name)
            results[name] = run_load(server.target, "digits", plan)
    return Burst(results, high / low, rates, (low, high), slo)


class _Server:
    """`bitdial serve` as a process of its own, for as long as the block lasts."""

    def __init__(self, model: Path, samples: int, slo: float, policy: str, max_ratio: float | None) -> None:
        self.command = [
            sys.executable, "-m", "bitdial", "serve", f"digits={model}", "--port", "0", "--slo-ms", f"{1000 * slo:g}",
            "--policy", policy, "--max-batch", str(samples), "--threads", "1", "--json", "--quiet",
            *([] if max_ratio is None else ["--max-ratio", f"{max_ratio:g}"]),
        ]  # fmt: skip

    def __enter__(self) -> _Server:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise EngineError(f"the server did not start; try it by hand: {' '.join(self.command)}")
        ready = json.loads(line)
        self.target: Target = parse_url(ready["address"])[0]
        self.table = ServiceTable.from_json(ready["models"][0]["table"])
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
