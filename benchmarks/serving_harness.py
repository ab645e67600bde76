"""What the serving benchmarks share: a server on one core, the load generator on another, and what came of a run."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.artifact import load_program
from bitdial.benchmarking.latency import random_inputs
from bitdial.engines.base import create_engine
from bitdial.errors import DataError
from bitdial.loadtest import LoadPlan, Result, Schedule, Target, parse_url, run_load, summarize
from common import RESULTS
from machine import describe_machine
from results import ResultFile

SERVER_CORE, LOAD_CORE = 0, 1


@dataclass(frozen=True)
class Setting:
    """A network as it is served. slo in seconds."""

    images: int
    slo: float


def pin(core: int) -> None:
    """Bind this process to a core, where there are two."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > max(SERVER_CORE, LOAD_CORE):
        os.sched_setaffinity(0, {core})


def unpin() -> None:
    """Let this process and those that it starts use every core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


@contextlib.contextmanager
def server(model: Path, setting: Setting, policy: str, *options: str, log: Path | None = None) -> Iterator[Target]:
    """`bitdial serve` on the server's core, its workers with it; ends with SIGTERM."""
    command = [
        sys.executable, "-m", "bitdial", "serve", f"net={model}", "--port", "0", "--json", "--quiet",
        "--slo-ms", f"{1e3 * setting.slo:g}", "--max-batch", str(setting.images), "--threads", "1", "--policy", policy,
        "--max-ratio", "1", *options,
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(open(log, "w")) if log else None
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, preexec_fn=lambda: pin(SERVER_CORE)
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise DataError(f"the server did not start: {' '.join(command)}")
            yield parse_url(json.loads(line)["address"])[0]
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def begin(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, name: str
) -> tuple[argparse.Namespace, ResultFile]:
    """The options, with those that the serving benchmarks share, and the result file NAME.KIND.json; this process is bound to the
    load generator's core."""
    parser.add_argument(
        "--artifacts", type=Path, help="folder of NETWORK.bitdial files to serve; default: made, in the cache"
    )
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".cache" / "serving")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    # Kernel choices and service times are measured for this benchmark, not taken from a day when the machine was busy.
    os.environ["BITDIAL_CACHE_DIR"] = str(options.cache.absolute())
    machine = describe_machine()
    pin(LOAD_CORE)
    return options, ResultFile(options.results / f"{name}.{machine['kind']}.json", name, machine, fresh=options.fresh)


def engine_seconds(model: Path, images: int, rounds: int = 41) -> list[float]:
    """Median seconds of the bare engine for one request's images, per ratio; ratios interleaved, on the server's core."""
    pin(SERVER_CORE)
    try:
        program = load_program(model)
        engine = create_engine(program, "cpu", threads=1, batch_hint=images)
        inputs = random_inputs(program, images)
        batch = inputs if len(inputs) > 1 else inputs[0]
        times: list[list[float]] = [[] for _ in engine.ratios]
        for at in range(rounds + 3):
            for index, ratio in enumerate(engine.ratios):
                begin = time.perf_counter()
                engine.run(batch, ratio)
                if at >= 3:
                    times[index].append(time.perf_counter() - begin)
        return [float(np.median(t)) for t in times]
    finally:
        pin(LOAD_CORE)


def play(
    target: Target, setting: Setting, times: npt.NDArray[np.float64], seconds: float, about: str, warmup: int = 8
) -> Result:
    """Send requests at these times and wait for what becomes of them."""
    plan = LoadPlan(
        schedule=Schedule(times, seconds, about), samples=setting.images, slo=setting.slo, send_slo=False,
        timeout=max(10.0, 20 * setting.slo), warmup=warmup, connections=32, max_connections=512,
    )  # fmt: skip
    return run_load(target, "net", plan)


def figures(result: Result) -> dict[str, Any]:
    """The summary, and percentiles over ALL requests in which those not answered count as infinite (null)."""
    row = summarize(result)
    latency = np.where(np.isnan(result.latency), math.inf, result.latency)
    for q in (50, 90, 99):
        value = float(np.percentile(latency, q, method="higher"))
        row[f"all_p{q}_ms"] = 1e3 * value if math.isfinite(value) else None
    row["by_ratio"] = {
        f"{r:g}": int(np.count_nonzero(np.isclose(result.ratio, r, atol=1e-3)))
        for r in result.model.get("ratios") or []
    }
    return row


def sustained(rates: Sequence[float], attained: Sequence[float], goal: float) -> float | None:
    """The largest rate up to which the share attained stays at or above the goal, linear between measured rates; None if none
    does. If the largest rate measured still does, that rate."""
    order = np.argsort(rates)
    x, y = np.asarray(rates)[order], np.asarray(attained)[order]
    if y[0] < goal:
        return None
    for at in range(1, len(x)):
        if y[at] < goal:
            share = (y[at - 1] - goal) / (y[at - 1] - y[at])
            return float(x[at - 1] + share * (x[at] - x[at - 1]))
    return float(x[-1])
