"""What the server costs: per request over the bare engine, and requests per second of a model that does nothing.

    python benchmarks/serving_overhead.py                     # both
    python benchmarks/serving_overhead.py --peer-python ~/litserve/bin/python    # where LitServe is installed

Servers and engines run on core 0, the client on core 1. A closed loop: every connection sends its next request when it has its
answer; medians of rounds in which the contestants take turns.

  request   one connection, binary tensors: latency minus the bare engine's time on the same images (median and 99 %)
  nothing   four numbers as JSON, a model of a single 4x4 layer, 1 and 16 connections, beside a plain FastAPI app (no queue, no
            batching, no worker process: the floor) and LitServe (one worker; left out where it is not installed)
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bitdial.artifact import load_program
from bitdial.benchmarking.latency import random_inputs
from bitdial.engines.base import create_engine
from closed_loop import closed_loop
from common import note, print_table, run_command
from serving import SETTINGS, model_file
from serving_harness import LOAD_CORE, SERVER_CORE, Setting, begin, pin, server

PEERS = Path(__file__).parent / "peers" / "serving"


def binary_request(array: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an infer request with one binary tensor."""
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": array[0],
                    "shape": list(array[1].shape),
                    "datatype": "FP32",
                    "parameters": {"binary_data_size": array[1].nbytes},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    return head + array[1].tobytes(), {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }


def engine_times(program: Any, images: int, seconds: float) -> list[float]:
    """Milliseconds of the bare engine at ratio 0, one after another for so long, on the server's core."""
    pin(SERVER_CORE)
    engine = create_engine(program, "cpu", threads=1, batch_hint=images)
    batch = random_inputs(program, images)[0]
    for _ in range(5):
        engine.run(batch, 0.0)
    times = []
    until = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < until:
        engine.run(batch, 0.0)
        times.append(1e3 * (time.perf_counter() - begin))
    pin(LOAD_CORE)
    return times


def request_overhead(network: str, model: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Latency over HTTP and of the bare engine, in turns."""
    setting, program = SETTINGS[network], load_program(model)
    batch = random_inputs(program, setting.images)[0]
    body, headers = binary_request((program.inputs[0], batch))
    bare: list[dict[str, float]] = []
    served: list[dict[str, float]] = []
    lenient = Setting(setting.images, 10.0)
    with server(model, lenient, "fixed:0") as target:
        port = target.port
        closed_loop(port, "/v2/models/net/infer", body, headers, 1, 1.0)
        for _ in range(rounds):
            times = engine_times(program, setting.images, seconds)
            bare.append({"p50_ms": float(np.percentile(times, 50)), "p99_ms": float(np.percentile(times, 99))})
            served.append(closed_loop(port, "/v2/models/net/infer", body, headers, 1, seconds))
    if any(r["failures"] for r in served):
        raise RuntimeError("requests failed")
    figures: dict[str, Any] = {"body_bytes": len(body)}
    for q in ("p50_ms", "p99_ms"):
        figures[f"engine_{q}"] = float(np.median([r[q] for r in bare]))
        figures[f"served_{q}"] = float(np.median([r[q] for r in served]))
        figures[f"overhead_{q}"] = float(np.median([s[q] - b[q] for s, b in zip(served, bare, strict=True)]))
    return figures


def tiny_model(folder: Path) -> Path:
    """A model of one 4x4 linear layer."""
    path = folder / "nothing.bitdial"
    if not path.exists():
        import torch

        import bitdial

        torch.manual_seed(0)
        bitdial.quantize(torch.nn.Linear(4, 4), torch.randn(64, 4), bitdial.QuantizeConfig(selector="greedy")).save(path)
    return path


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def peer(python: str, script: str, port: int) -> Iterator[None]:
    """A peer's server on the server's core."""
    process = subprocess.Popen(
        [python, str(PEERS / script), str(port)], preexec_fn=lambda: (os.setsid(), pin(SERVER_CORE)),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        body = json.dumps({"input": [1.0, 2.0, 3.0, 4.0]}).encode()
        for _ in range(240):
            if process.poll() is not None:
                raise RuntimeError(f"{script} did not start")
            with contextlib.suppress(OSError):
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "application/json"}
                )
                urllib.request.urlopen(request, timeout=1).read()
                break
            time.sleep(0.25)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        time.sleep(0.5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def nothing(folder: Path, peer_python: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Requests per second by contestant and connections."""
    path, numbers = tiny_model(folder), [1.0, 2.0, 3.0, 4.0]
    name = load_program(path).inputs[0]
    plain = json.dumps({"input": numbers}).encode()
    ours = json.dumps({"inputs": [{"name": name, "shape": [1, 4], "datatype": "FP32", "data": numbers}]}).encode()
    headers = {"Content-Type": "application/json"}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(server(path, Setting(8, 1.0), "planned"))
        contestants = {"bitdial": (target.port, "/v2/models/net/infer", ours)}
        for label, python, script in (
            ("fastapi", sys.executable, "fastapi_server.py"),
            ("litserve", peer_python, "litserve_server.py"),
        ):
            port = free_port()
            try:
                stack.enter_context(peer(python, script, port))
                contestants[label] = (port, "/predict", plain)
            except (RuntimeError, OSError) as error:
                note(f"{label} is left out: {error}")
        for at in range(rounds + 1):
            for label, (port, url, body) in contestants.items():
                for connections in (1, 16):
                    row = closed_loop(port, url, body, headers, connections, seconds if at else 0.5)
                    if at:
                        found.setdefault(label, {}).setdefault(str(connections), []).append(row)
    return {
        label: {c: {k: float(np.median([r[k] for r in rows])) for k in rows[0]} for c, rows in by.items()}
        for label, by in found.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/serving_overhead.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", default="vgg,resnet50")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has LitServe")
    options, results = begin(parser, arguments, "serving_overhead")
    print(f"{results.machine['cpu']}; servers on core 0, client on core 1")
    key = {"rounds": options.rounds, "seconds": options.seconds}
    lines = []
    for network in filter(None, options.networks.split(",")):
        model = model_file(network, options.cache, options.artifacts)
        row, _ = results.measure(
            f"request/{network}",
            key,
            lambda n=network, m=model: request_overhead(n, m, options.rounds, options.seconds),
        )
        lines.append([
            network, f"{row['body_bytes'] / 1000:.0f} kB",
            *(f"{row[f'{who}_{q}_ms']:.2f}" for q in ("p50", "p99") for who in ("engine", "served", "overhead")),
        ])  # fmt: skip
    print_table(
        "One request at a time, ratio 0, ms",
        ["network", "body", "engine p50", "served p50", "overhead p50", "engine p99", "served p99", "overhead p99"],
        lines,
    )
    row, _ = results.measure(
        "nothing",
        key,
        lambda: {"servers": nothing(options.cache, options.peer_python, options.rounds, options.seconds)},
    )
    print_table(
        "A model that does nothing, requests/s (p50 / p99 ms)",
        ["server", "1 connection", "16 connections"],
        [
            [
                who,
                *(
                    f"{by[c]['requests_per_second']:.0f} ({by[c]['p50_ms']:.2f} / {by[c]['p99_ms']:.2f})"
                    for c in ("1", "16")
                ),
            ]
            for who, by in row["servers"].items()
        ],
    )


if __name__ == "__main__":
    run_command(main)
