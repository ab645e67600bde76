"""A small closed-loop HTTP client for request rates of servers that do next to nothing: N connections, each sends the next
request when it has its answer. Not for latency under load (that is `bitdial loadtest`, which is open-loop)."""

from __future__ import annotations

import asyncio
import time


class Connection(asyncio.Protocol):
    """Sends one prepared request again and again until the time is over."""

    def __init__(self, request: bytes, until: float, done: asyncio.Future[None]) -> None:
        self.request, self.until, self.done = request, until, done
        self.latencies: list[float] = []
        self.failures = 0
        self._buffer = b""
        self._sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self.transport.write(self.request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        lines = self._buffer[:head].lower().split(b"\r\n")
        length = next((int(x.split(b":")[1]) for x in lines if x.startswith(b"content-length:")), None)
        if length is None:
            raise RuntimeError("the server answers without Content-Length")
        if len(self._buffer) < head + 4 + length:
            return
        now = time.perf_counter()
        self.latencies.append(now - self._sent)
        self.failures += b" 200 " not in lines[0] + b" "
        self._buffer = self._buffer[head + 4 + length :]
        if now < self.until:
            self._send()
        else:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def _run(port: int, request: bytes, connections: int, seconds: float) -> tuple[list[float], int, float]:
    loop = asyncio.get_running_loop()
    begin = time.perf_counter()
    made: list[tuple[Connection, asyncio.Future[None]]] = []
    for _ in range(connections):
        done: asyncio.Future[None] = loop.create_future()
        _, protocol = await loop.create_connection(
            lambda done=done: Connection(request, begin + seconds, done),
            "127.0.0.1",
            port,  # type: ignore[misc]
        )
        made.append((protocol, done))
    await asyncio.gather(*(done for _, done in made))
    spent = time.perf_counter() - begin
    return [x for c, _ in made for x in c.latencies], sum(c.failures for c, _ in made), spent


def closed_loop(
    port: int, path: str, body: bytes, headers: dict[str, str], connections: int, seconds: float
) -> dict[str, float]:
    """Requests per second and latency percentiles (milliseconds) of POSTs to 127.0.0.1:port."""
    import numpy as np

    head = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Length: {len(body)}",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    request = "\r\n".join(head).encode() + b"\r\n\r\n" + body
    try:
        from uvloop import run
    except ImportError:
        from asyncio import run
    latencies, failures, spent = run(_run(port, request, connections, seconds))
    values = 1e3 * np.asarray(latencies)
    return {
        "requests_per_second": len(latencies) / spent,
        "p50_ms": float(np.percentile(values, 50)),
        "p99_ms": float(np.percentile(values, 99)),
        "failures": float(failures),
    }
