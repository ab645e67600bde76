"""The serving benchmark's own arithmetic, and its closed-loop client against a small server."""

from __future__ import annotations

import asyncio
import math
import threading
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("httptools", reason="the load generator needs bitdial[serve]")

from bitdial.loadtest import Result

MODULES = ("machine", "results", "common", "closed_loop", "serving_harness")


def test_sustained_rate(bench: dict[str, ModuleType]) -> None:
    sustained = bench["serving_harness"].sustained
    assert sustained([10, 20, 30], [1.0, 0.98, 0.5], 0.99) == pytest.approx(15)
    assert sustained([30, 10, 20], [0.5, 1.0, 1.0], 0.99) == pytest.approx(20 + 10 * 0.01 / 0.5)
    assert sustained([10, 20], [1.0, 0.995], 0.99) == 20  # the largest that was measured
    assert sustained([10, 20], [0.9, 0.8], 0.99) is None


def test_requests_that_got_no_answer_count_as_infinite(bench: dict[str, ModuleType]) -> None:
    n = 100
    nan = np.full(n, np.nan)
    status = np.zeros(n, np.uint8)
    status[95:] = 1  # refused
    zeros = np.zeros(n)
    fields = {name: zeros for name in Result.__dataclass_fields__ if name in ("scheduled", "begun", "sent")}
    result = Result(
        **fields, done=np.where(status == 0, 0.010, np.nan), status=status, ratio=np.where(status == 0, 0.5, np.nan),
        queue=nan, compute=nan, right=np.full(n, -1), seconds=1.0, samples=1, slo=0.05,
        model={"ratios": [0.0, 0.5, 1.0]},
    )  # fmt: skip
    row = bench["serving_harness"].figures(result)
    assert row["all_p50_ms"] == pytest.approx(10) and row["all_p90_ms"] == pytest.approx(10)
    assert row["all_p99_ms"] is None and row["by_ratio"] == {"0": 0, "0.5": 95, "1": 0}
    assert row["attainment"] == pytest.approx(0.95)


def test_closed_loop_counts_answers_and_failures(bench: dict[str, ModuleType]) -> None:
    answered = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                answered += 1
                status = b"200 OK" if answered % 4 else b"503 Busy"
                writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 2\r\n\r\nok")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    started, port = threading.Event(), 0
    loop = asyncio.new_event_loop()

    def serve() -> None:
        nonlocal port
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(asyncio.start_server(talk, "127.0.0.1", 0))
        port = server.sockets[0].getsockname()[1]
        started.set()
        loop.run_forever()
        server.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert started.wait(5)
    row = bench["closed_loop"].closed_loop(port, "/x", b"body", {}, 2, 0.3)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    count = row["requests_per_second"] * 0.3
    assert count > 20 and row["failures"] == pytest.approx(answered // 4, abs=2)
    assert 0 < row["p50_ms"] <= row["p99_ms"] and math.isfinite(row["p99_ms"])
