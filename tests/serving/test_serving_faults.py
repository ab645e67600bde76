"""What goes wrong: hostile bytes, slow and vanishing clients, overload, dying workers, signals under load, clocks that jump."""

from __future__ import annotations

import gzip
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="THE SERVER IS NOT TESTED: fastapi is not installed")
pytest.importorskip("uvloop", reason="THE SERVER IS NOT TESTED: uvloop is not installed")

from served import (
    LIMIT,
    SHAPE,
    Running,
    http,
    infer_bytes,
    message,
    receive,
    serving,
    status,
    until,
    write_model,
    write_table,
)

import bitdial
from bitdial.engines.cpu import native
from bitdial.errors import ConfigError
from bitdial.quantization.config import QuantizeConfig
from bitdial.serving.server import descriptors
from bitdial.serving.server import model as model_module
from bitdial.serving.server import run as run_module
from bitdial.serving.server.config import ServerConfig, make_config
from bitdial.serving.server.connection import GuardedProtocol
from bitdial.serving.worker.base import Result
from bitdial.serving.worker.errors import WorkerCrash
from bitdial.serving.worker.pool import Lease

HEADER_TIME, BODY_TIME = 0.4, 0.5


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Impatient, and with a limit of 64 KiB a body."""
    folder = tmp_path_factory.mktemp("faults")
    limits = {"header_timeout": HEADER_TIME, "body_timeout": BODY_TIME, "max_body_mb": 1 / 16, "max_connections": 40}
    models, tables = {"m": write_model(folder / "m")}, {"m": write_table(folder / "t")}
    with serving(models, tables, server=limits, slo_ms=1000) as running:
        yield running


@pytest.fixture(autouse=True)
def still_serves(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every fault the server must answer as before."""
    yield
    if "server" in request.fixturenames:
        running: Running = request.getfixturevalue("server")
        until(lambda: not connections(running))
        assert status(http(running.port, infer_bytes())) == 200


def connections(running: Running) -> int:
    return len(running.server._uvicorn.server_state.connections)


def images(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((n, *SHAPE), dtype=np.float32)


def post(body: bytes, headers: str = "") -> bytes:
    return (
        f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body
    )


# ---- hostile bytes ---------------------------------------------------------------------------------------------------------

MALFORMED: dict[str, bytes] = {
    "no JSON": post(b"hello"),
    "empty": post(b""),
    "binary rubbish": post(bytes(range(256)) * 8),
    "a number": post(b"5"),
    "deep": post(b"[" * 30_000),
    "nan": post(b'{"inputs": NaN}'),
    "long number": post(b'{"inputs": ' + b"9" * 20_000 + b"}"),
    "header length is text": post(b"{}", "Inference-Header-Content-Length: ten\r\n"),
    "header length is negative": post(b"{}", "Inference-Header-Content-Length: -1\r\n"),
    "header length is too large": post(b"{}", "Inference-Header-Content-Length: 99\r\n"),
    "header length has 500 digits": post(b"{}", f"Inference-Header-Content-Length: {'9' * 500}\r\n"),
    "no gzip": post(b"{}", "Content-Encoding: gzip\r\n"),
    "wrong shape": infer_bytes(np.ones((1, 3, 8, 9), np.float32)),
    "wrong rank": infer_bytes(np.ones((3, 8, 8), np.float32)),
    "not a number": infer_bytes(np.full((2, *SHAPE), np.nan, np.float32)),
    "infinite": infer_bytes(np.full((2, *SHAPE), np.inf, np.float32)),
    "no samples": infer_bytes(np.ones((0, *SHAPE), np.float32)),
    "too many samples": infer_bytes(np.ones((17, *SHAPE), np.float32)),
    "wrong dtype": infer_bytes(inputs=[{"name": "x", "shape": [1, *SHAPE], "datatype": "INT8", "data": [1] * 192}]),
    "two lengths": b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "length and chunks": b"POST /v2/models/m/infer HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    "length is text": b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: two\r\n\r\n{}",
    "bad chunk": b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no target": b"GET\r\n\r\n",
    "star": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "connect": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "odd bytes in the target": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_answered_with_400(server: Running, name: str) -> None:
    answer = http(server.port, MALFORMED[name])
    assert status(answer) == (404 if name == "star" and status(answer) == 404 else 400), answer[:300]
    assert message(answer)


def test_a_request_with_nan_does_not_harm_those_in_its_batch(tmp_path: Path) -> None:
    models = {"m": write_model(tmp_path / "m", seconds=(0.05, 0.05, 0.05))}
    with serving(models, {"m": write_table(tmp_path / "t", (0.05, 0.05, 0.05))}, slo_ms=5000) as running:
        arrays = [np.full((1, *SHAPE), np.nan if i % 3 == 0 else i, np.float32) for i in range(12)]
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda x: http(running.port, infer_bytes(x)), arrays))
        for array, answer in zip(arrays, answers, strict=True):
            assert status(answer) == (400 if np.isnan(array).any() else 200)
        mixed = [sizes for sizes, _ in running.workers[0].batches if len(sizes) > 1]
        assert mixed  # some shared a batch


def test_oversized_bodies(server: Running) -> None:
    limit = 1 << 16
    assert status(http(server.port, post(b" " * limit))) == 400  # taken, and no JSON
    told = http(server.port, post(b" " * (limit + 1)))
    assert status(told) == 413 and b"connection: close" in told and "--max-body-mb" in message(told)
    # Promised, but never sent: refused at once, nothing is waited for.
    promised = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {10**15}\r\n\r\n".encode()
    assert status(http(server.port, promised)) == 413
    asked = promised.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
    assert status(http(server.port, asked)) == 413  # instead of 100
    chunked = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"4000\r\n" + b" " * 0x4000 + b"\r\n" for _ in range(8))
    assert status(http(server.port, chunked + chunks + b"0\r\n\r\n")) == 413
    bomb = gzip.compress(bytes(1 << 24))
    assert len(bomb) < limit and status(http(server.port, post(bomb, "Content-Encoding: gzip\r\n"))) == 413
    index = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n"
    assert status(http(server.port, index + b" " * 2_000_000)) == 413


def test_a_large_upload_that_is_refused_still_reads_its_answer(server: Running) -> None:
    """The whole body is pushed before anything is read: closing at once would take the answer away."""
    assert status(http(server.port, post(b" " * (3 << 20)))) == 413


def test_oversized_heads(server: Running) -> None:
    head = b"GET /v2 HTTP/1.1\r\nHost: x\r\n"
    lines = [b"A: " + b"b" * 4000 + b"\r\n"] * 40
    pieces = [(0.005, line) for line in lines]
    assert status(http(server.port, head, pieces=pieces)) == 431
    assert status(http(server.port, head + b"A: b\r\n" * 100 + b"\r\n")) == 200


def test_more_connections_than_are_taken(server: Running) -> None:
    open_: list[socket.socket] = []
    try:
        for _ in range(40):
            open_.append(socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT))
        until(lambda: connections(server) == 40)
        answer = http(server.port, b"")
        assert status(answer) == 503 and b"retry-after: 1" in answer
    finally:
        for client in open_:
            client.close()


def test_what_follows_a_sound_request_does_not_spoil_it(server: Running) -> None:
    answer = http(server.port, infer_bytes(images(2)) + b"rubbish\r\n\r\n")
    assert status(answer) == 200


# ---- slow and vanishing clients --------------------------------------------------------------------------------------------


def test_slow_clients_are_told_and_closed(server: Running) -> None:
    whole = infer_bytes()
    head, _, _ = whole.partition(b"\r\n\r\n")
    assert http(server.port, b"") == b""  # says nothing: closed without a word
    half_head = http(server.port, head[:40])
    assert status(half_head) == 408 and "head" in message(half_head)
    half_body = http(server.port, whole[:-10])
    assert status(half_body) == 408 and "body" in message(half_body)
    drip = [(0.1, bytes([b])) for b in whole[60:120]]
    assert status(http(server.port, whole[:60], pieces=drip)) == 408
    # A second request on the same connection is watched as the first one is.
    with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT) as client:
        client.sendall(whole)
        assert status(receive(client)) == 200
        time.sleep(HEADER_TIME + 0.4)  # idle is not slow
        client.sendall(whole)
        assert status(receive(client)) == 200
        client.sendall(head[:30])
        assert status(receive(client)) == 408


def test_a_client_that_takes_no_answers_is_let_go(server: Running) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.settimeout(0.5)
        with pytest.raises((TimeoutError, ConnectionError)):
            while True:
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        until(lambda: connections(server) == 0)


def test_a_client_that_vanishes_is_not_computed_for(tmp_path: Path) -> None:
    with serving({"m": write_model(tmp_path / "m")}, {"m": write_table(tmp_path / "t")}, slo_ms=100_000) as running:
        running.hold()
        blocker = threading.Thread(target=http, args=(running.port, infer_bytes(images(16))))
        blocker.start()
        until(lambda: len(running.workers[0].batches) == 1)
        leaving = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(5)]
        for client in leaving:
            client.sendall(infer_bytes(images(3)))
        until(lambda: len(running.model().scheduler.queue) == 5)
        for client in leaving:
            client.close()
        until(lambda: len(running.model().scheduler.queue) == 0)
        running.hold(False)
        blocker.join()
        assert status(http(running.port, infer_bytes(images(1)))) == 200
        assert [sizes for sizes, _ in running.workers[0].batches] == [[16], [1]]
        assert running.model().metrics.outcomes["cancelled"].count == 5
        # In the middle of its batch, in the middle of its body, before its head is whole.
        for data in (infer_bytes(images(2)), infer_bytes(images(2))[:-5], b"POST /v2/mod"):
            with socket.create_connection(("127.0.0.1", running.port)) as client:
                client.sendall(data)
                time.sleep(0.05)
        until(lambda: connections(running) == 0)
        assert status(http(running.port, infer_bytes(images(1)))) == 200


# ---- overload --------------------------------------------------------------------------------------------------------------


def overload(tmp_path: Path, refusals: int, policy: str) -> None:
    """Several times what the lowest precision can do until so many requests were refused, then peace."""
    cost = (0.16, 0.12, 0.08)  # seconds of a full batch: 12.5 requests of 16 samples a second at the top
    models = {"m": write_model(tmp_path / "m", seconds=cost)}
    with serving(models, {"m": write_table(tmp_path / "t", cost)}, slo_ms=500, policy=policy) as running:
        request = infer_bytes(images(16))
        results: list[int] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                results.append(status(http(running.port, request)))
                stop.wait(0.05)

        callers = [threading.Thread(target=ask) for _ in range(48)]
        for caller in callers:
            caller.start()
        try:
            # It goes on answering at the top of the dial, and refuses the rest.
            until(lambda: results.count(503) >= refusals and results.count(200) >= refusals / 10)
            until(lambda: max(index for _, index in running.workers[0].batches) == 2)
        finally:
            stop.set()
            for caller in callers:
                caller.join()
        assert set(results) <= {200, 503, 504}, Counter(results)
        until(lambda: all(status(http(running.port, request)) == 200 for _ in range(8)))
        if policy == "ladder":  # it looks at the queue alone; others remember for a while how much came
            until(lambda: b'"ratio":0.0' in http(running.port, infer_bytes(images(1))))


@pytest.mark.parametrize("policy", ["lookahead", "ladder"])
def test_overload_then_recovery(tmp_path: Path, policy: str) -> None:
    overload(tmp_path, 100, policy)


@pytest.mark.slow
def test_long_overload_then_recovery(tmp_path: Path) -> None:
    overload(tmp_path, 3000, "lookahead")


# ---- workers that die ------------------------------------------------------------------------------------------------------


class Faults:
    """Raises an error whenever it is called, as long as there is one; `count` calls did."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.count = 0

    def __call__(self, *arguments: Any, **more: Any) -> None:
        if self.error is not None:
            self.count += 1
            raise self.error


def test_every_request_is_answered_while_workers_die(tmp_path: Path) -> None:
    seconds = (0.004, 0.003, 0.002)
    models = {"m": write_model(tmp_path / "m", seconds=seconds, crash=15)}
    with serving(models, {"m": write_table(tmp_path / "t", seconds)}, slo_ms=20_000, workers=2) as running:
        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda i: http(running.port, infer_bytes(images(1 + i % 4, i))), range(400)))
        kinds = Counter(map(status, answers))
        assert set(kinds) <= {200, 500, 503, 504} and kinds[200] > 100 and kinds[500] >= 2, kinds
        lost = next(a for a in answers if status(a) == 500)
        assert "worker died" in message(lost) and "send it again" in message(lost)
        assert len(running.workers) > 3 and running.model().metrics.restarts >= 1
        assert running.model().metrics.failures["worker crash"].count == kinds[500]


def test_requests_expire_while_no_worker_is_there(tmp_path: Path) -> None:
    models = {"m": write_model(tmp_path / "m", crash=0, load=0.0)}
    faults = Faults()
    with serving(models, {"m": write_table(tmp_path / "t")}, fault=faults, slo_ms=150) as running:
        faults.error = WorkerCrash("the worker died while loading")
        assert status(http(running.port, infer_bytes())) == 500
        answers = [http(running.port, infer_bytes()) for _ in range(2)]
        assert [status(a) for a in answers] == [504, 504]
        assert status(get(running, "/v2/health/ready")) == 503
        assert status(get(running, "/v2/health/live")) == 200


# ---- what runs beside the requests -----------------------------------------------------------------------------------------


def get(running: Running | Process, path: str, method: str = "GET") -> bytes:
    return http(running.port, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())


def health(running: Running) -> tuple[int, int]:
    """live, ready"""
    live, ready = (status(get(running, f"/v2/health/{what}")) for what in ("live", "ready"))
    return live, ready


def load(running: Running) -> bytes:
    return get(running, "/v2/repository/models/m/load", "POST")


@pytest.fixture
def fragile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, Faults]]:
    """A server that is quick to call a task beyond repair, and how its workers' starts fail."""
    faults = Faults()
    monkeypatch.setattr(model_module, "TICK", 0.05)
    with serving(
        {"m": write_model(tmp_path / "m")}, {"m": write_table(tmp_path / "t")}, fault=faults, slo_ms=200
    ) as running:
        for supervisor in (running.model().supervisor, running.server.supervisor):
            supervisor.tries, supervisor.patience = 3, 0.0
            supervisor.first_delay = supervisor.longest_delay = 0.01
        yield running, faults


@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), ZeroDivisionError("unforeseen"), WorkerCrash("no")]
)
def test_a_worker_that_cannot_be_replaced_is_told_and_repaired(
    fragile: tuple[Running, Faults], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    running, faults = fragile
    faults.error = error
    running.call(running.workers[0].die)
    until(lambda: health(running) == (503, 503))
    told = message(get(running, "/v2/health/live"))
    assert "replacing a worker has failed" in told and str(error) not in told  # strangers may ask
    assert str(error) in caplog.text
    running.model().supervisor.longest_delay = running.model().supervisor.first_delay = 3600.0
    until(lambda: bool(running.model().supervisor._pauses))
    answer = load(running)  # repairs nothing as long as it cannot
    assert status(answer) == 500 and "without a worker until one can be started" in message(answer)
    faults.error = None
    until(lambda: bool(running.model().supervisor._pauses))
    answer = load(running)
    assert status(answer) == 200 and b'"changed":false' in answer
    assert health(running) == (200, 200) and status(http(running.port, infer_bytes())) == 200


def test_a_worker_is_back_by_itself_once_its_start_succeeds(fragile: tuple[Running, Faults]) -> None:
    running, faults = fragile
    faults.error = OSError(24, "Too many open files")
    running.call(running.workers[0].die, False)  # and nobody is told
    until(lambda: health(running) == (503, 503))
    faults.error = None
    until(lambda: health(running) == (200, 200))
    assert running.model().metrics.restarts == 1


def test_looking_after_workers_and_connections_survives_errors(
    fragile: tuple[Running, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, _ = fragile
    for owner, name, what in (
        (running.model().pool, "look", "looking after workers and requests"),
        (run_module, "look_after", "looking after connections"),
    ):
        faults = Faults()
        faults.error = KeyError("unforeseen")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, faults)
            until(lambda: health(running)[0] == 503)
            assert what in message(get(running, "/v2/health/live"))
            assert status(http(running.port, infer_bytes())) == 200  # requests go on
        until(lambda: health(running) == (200, 200))


def test_one_connection_that_makes_trouble_does_not_hide_others(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, first = GuardedProtocol.check, list[GuardedProtocol]()

    def check(self: GuardedProtocol, now: float) -> None:
        first.append(self)
        if self is first[0]:
            raise KeyError("unforeseen")
        real(self, now)

    monkeypatch.setattr(GuardedProtocol, "check", check)
    with socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT) as broken:
        assert receive(broken) == b""  # closed
    assert status(http(server.port, b"GET /v2 HTTP/1.1\r\n")) == 408


def test_a_scheduler_that_fails_is_told_and_made_anew(
    fragile: tuple[Running, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, _ = fragile
    faults = Faults()
    faults.error = IndexError("unforeseen")
    broken = running.model().scheduler
    monkeypatch.setattr(broken, "next_batch", faults)
    for _ in range(3):
        answer = http(running.port, infer_bytes())
        assert status(answer) == 500 and "scheduler failed" in message(answer)
    assert health(running) == (503, 200)
    assert status(load(running)) == 200
    assert running.model().scheduler is not broken
    assert health(running) == (200, 200) and status(http(running.port, infer_bytes())) == 200


@pytest.mark.parametrize("what", ["fewer answers", "completed", "run"])
def test_a_batch_that_meets_an_error_on_its_way_is_answered(
    fragile: tuple[Running, Faults], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    running, _ = fragile
    fault: Any
    if what == "fewer answers":
        owner, name, fault = running.workers[0], "run", answer_nothing
    else:
        fault = Faults()
        fault.error = KeyError("unforeseen")
        owner, name = (running.model().scheduler, "completed") if what == "completed" else (Lease, "run")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fault)
        for _ in range(2):  # the worker is free for the next one
            answer = http(running.port, infer_bytes(parameters={"slo_ms": 60_000}))
            assert status(answer) == 500 and "log says how" in message(answer)
    assert status(http(running.port, infer_bytes())) == 200


async def answer_nothing(requests: Any, index: int) -> Result:
    return Result([], index, 0.0, [])


def test_a_load_that_meets_an_unforeseen_error_is_answered(
    fragile: tuple[Running, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, faults = fragile
    faults.error = ZeroDivisionError("unforeseen")
    answer = load(running)
    assert status(answer) == 500 and "stays in use" in message(answer) and "log says how" in message(answer)
    running.do(running.server.reload())  # SIGHUP: of all models, whatever one meets
    faults.error = None
    assert health(running) == (200, 200) and status(load(running)) == 200


def test_a_running_model_outlives_its_file(fragile: tuple[Running, Faults]) -> None:
    running, _ = fragile
    Path(running.model().path).write_text("{")  # in place
    running.call(running.workers[0].die)
    until(lambda: len(running.workers) == 2 and health(running) == (200, 200))
    assert status(http(running.port, infer_bytes())) == 200
    assert status(load(running)) == 500  # asked for, the new bytes are read


# ---- open files ------------------------------------------------------------------------------------------------------------


def test_connections_are_checked_against_open_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = [256, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.__setitem__(slice(None), new))
    monkeypatch.setattr(descriptors, "_open_now", lambda: 10)
    others = 10 + descriptors.SPARE + descriptors.PER_MODEL + 2 * 3 * descriptors.PER_WORKER

    def config(**server: Any) -> ServerConfig:
        return make_config(["m.bitdial"], None, server, {"workers": 3})

    assert descriptors.connection_limit(config(max_connections=100)) == 100
    assert limits == [256, 4096]  # enough
    assert descriptors.connection_limit(config()) == 1024
    assert limits == [others + 1024, 4096]  # raised
    limits[:] = [256, 500]
    assert descriptors.connection_limit(config()) == 500 - others and limits == [500, 500]
    assert "connections are taken at once instead of 1024" in caplog.text
    with pytest.raises(ConfigError, match=rf"have 500: raise .*ulimit -n.*--max-connections {500 - others}"):
        descriptors.connection_limit(config(max_connections=1024))
    limits[:] = [64, 64]
    with pytest.raises(ConfigError, match=r"have 64: raise its limit \(ulimit -n, or LimitNOFILE of a service\)$"):
        descriptors.connection_limit(config())
    limits[:] = [resource.RLIM_INFINITY] * 2
    assert descriptors.connection_limit(config(max_connections=100_000)) == 100_000
    limits[:] = [256, resource.RLIM_INFINITY]
    assert descriptors.connection_limit(config(max_connections=100_000)) == 100_000

    def refuse(kind: int, new: tuple[int, int]) -> None:
        raise PermissionError

    limits[:] = [256, 4096]
    monkeypatch.setattr(resource, "setrlimit", refuse)
    assert descriptors.connection_limit(config()) == 256 - others


# ---- clocks ----------------------------------------------------------------------------------------------------------------


def test_the_wall_clock_may_jump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = (0.01, 0.008, 0.005)
    models = {"m": write_model(tmp_path / "m", seconds=seconds)}
    with serving(models, {"m": write_table(tmp_path / "t", seconds)}, slo_ms=20_000) as running:
        real, shift = time.time, [0.0]
        monkeypatch.setattr(time, "time", lambda: real() + shift[0])
        for jump in (0.0, 86_400.0, -86_400.0, -1e9, 1e9):
            shift[0] = jump
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda i: http(running.port, infer_bytes(images(1, i))), range(12)))
            assert [status(a) for a in answers] == [200] * 12
            time.sleep(0.12)  # uvicorn writes the Date header anew
        assert running.model().metrics.outcomes["ok"].count == 60


# ---- the real thing: a process, an engine, signals -------------------------------------------------------------------------

LAUNCH = """
import sys
from bitdial.cli import app, main
from bitdial.cli.serve import serve
if not any(command.callback is serve for command in app.registered_commands):
    app.command()(serve)
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model_file(helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(3)
    calibration = helpers.images(12)
    model = helpers.estimate(helpers.conv_net(8, 10), calibration)
    quick = {
        "selector": "random",
        "calibration_images": 12,
        "batch_size": 12,
        "group_size": 4,
        "shift_choice": "value_error",
        "keep_answers": 0.0,  # random weights: no ratio is sound
    }
    quantized = bitdial.quantize(
        model, calibration, QuantizeConfig(target="paper", ratios=(0.0, 0.5, 1.0), **quick), engine="reference"
    )
    path = folder / "net.bitdial"
    quantized.save(path)
    return path


class Process:
    """`bitdial serve` on a model."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        engine = [] if not native.missing() else ["--engine", "reference"]
        environment = {
            **os.environ,
            "BITDIAL_CACHE_DIR": str(folder / "cache"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.log = open(folder / "log", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, "serve", f"net={model}", "--port", "0", "--json", "--threads", "1", "--max-batch", "8",
             "--slo-ms", "1000", *engine, *options],
            stdout=subprocess.PIPE, stderr=self.log, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (folder / "log").read_text()
        self.ready = json.loads(line)
        self.port: int = self.ready["port"]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()

    def children(self) -> list[int]:
        """Its workers."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[1]) == self.process.pid and fields[0] != "Z":
                    found.append(int(entry.name))
        return found

    def rss(self) -> int:
        """Resident bytes of the server itself."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Callers:
    """Threads that send requests, one after another on a connection each, until they are stopped or turned away."""

    def __init__(self, port: int, count: int = 4) -> None:
        self.port, self.answers, self.stopping = port, list[int](), False
        self.unanswered = 0
        self.threads = [threading.Thread(target=self._call, args=(seed,)) for seed in range(count)]
        for thread in self.threads:
            thread.start()

    def _call(self, seed: int) -> None:
        request = infer_bytes(images(1 + seed % 3, seed), model="net")
        while not self.stopping:
            try:
                client = socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT)
            except ConnectionError:
                return  # the server is gone, and took nothing in
            with client:
                while not self.stopping:
                    client.sendall(request)
                    answer = receive(client)
                    self.answers.append(status(answer))
                    if not status(answer):
                        self.unanswered += 1
                        return
                    if status(answer) == 503 and b"connection: close" in answer:
                        return  # turned away: the server is about to stop
                    if b"connection: close" in answer:
                        break

    def join(self) -> None:
        self.stopping = True
        for thread in self.threads:
            thread.join(LIMIT)
            assert not thread.is_alive(), "a request hangs"


def test_a_real_server_under_load_survives_its_worker_reloads_and_drains(model_file: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(model_file, tmp_path / "net.bitdial"))
    process = Process(model, tmp_path)
    try:
        assert process.ready["event"] == "ready" and process.ready["models"][0]["ratios"] == [0.0, 0.5, 1.0]
        assert process.ready["models"][0]["gain"] > 0
        callers = Callers(process.port)
        until(lambda: len(callers.answers) > 40)
        assert set(callers.answers) == {200}

        (worker,) = process.children()
        os.kill(worker, signal.SIGKILL)
        until(lambda: process.children() not in ([], [worker]))
        before = len(callers.answers)
        until(lambda: callers.answers[before:].count(200) > 20)
        assert set(callers.answers) <= {200, 500, 503, 504} and callers.unanswered == 0

        before = len(callers.answers)
        damaged = bytearray(model.read_bytes())
        damaged[-50] ^= 1
        (tmp_path / "part").write_bytes(damaged)
        (tmp_path / "part").replace(model)
        process.process.send_signal(signal.SIGHUP)
        until(lambda: "not loaded again" in (tmp_path / "log").read_text())
        assert set(callers.answers[before:]) == {200}  # the old one stays

        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(LIMIT) == 0
        callers.join()
        assert callers.unanswered == 0
        assert set(callers.answers[before:]) <= {200, 503}
        assert process.children() == []
    finally:
        process.end()


def test_a_second_signal_ends_it_at_once(model_file: Path, tmp_path: Path) -> None:
    process = Process(model_file, tmp_path, "--timeout-ms", "60000")
    try:
        (worker,) = process.children()
        os.kill(worker, signal.SIGSTOP)  # a batch that never ends
        with socket.create_connection(("127.0.0.1", process.port), timeout=LIMIT) as client:
            client.sendall(infer_bytes(model="net", parameters={"slo_ms": 60000}))
            until(lambda: b'bitdial_arrived_samples_total{model="net"} 1.0' in get(process, "/metrics"))
            process.process.send_signal(signal.SIGINT)
            until(lambda: status(get(process, "/v2/health/ready")) == 503)
            assert status(http(process.port, infer_bytes(model="net"))) == 503
            time.sleep(0.2)
            assert process.process.poll() is None  # it waits for the answer
            process.process.send_signal(signal.SIGINT)
            assert process.process.wait(LIMIT) == 130
        os.kill(worker, signal.SIGCONT)
    finally:
        process.end()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "bad.bitdial").write_bytes(b"no model")
    for arguments, words in (
        (["bad.bitdial", "--port", "0"], "bad.bitdial"),
        (["absent.bitdial", "--port", "0"], "absent.bitdial"),
        (["bad.bitdial", "--policy", "magic"], "magic"),
        ([], "no model is named"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", LAUNCH, "serve", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_memory_stays_flat_in_ten_minutes(model_file: Path, tmp_path: Path) -> None:
    """BITDIAL_SOAK_SECONDS shortens it."""
    seconds = float(os.environ.get("BITDIAL_SOAK_SECONDS", "600"))
    process = Process(model_file, tmp_path)
    try:
        callers = Callers(process.port)
        time.sleep(0.2 * seconds)
        first = process.rss()
        end = time.monotonic() + 0.8 * seconds
        while time.monotonic() < end:
            time.sleep(0.02 * seconds)
            http(process.port, post(b"rubbish").replace(b"/m/", b"/net/"))
            with socket.create_connection(("127.0.0.1", process.port)) as client:
                client.sendall(infer_bytes(model="net"))  # and leaves
        last = process.rss()
        callers.join()
        assert set(callers.answers) == {200} and len(callers.answers) > 20 * seconds
        assert last < first + (8 << 20), f"{first} bytes, then {last}"
    finally:
        process.end()


# ---- fuzzing by the description --------------------------------------------------------------------------------------------


def fuzz(running: Running, examples: int, seconds: float) -> None:
    tool = shutil.which(
        "schemathesis", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    )
    if tool is None:
        pytest.skip("THE DESCRIPTION IS NOT FUZZED: schemathesis is not installed")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method"
    done = subprocess.run(
        [tool, "run", f"http://{running.address}/openapi.json", "--checks", checks, "--max-examples", str(examples),
         "--seed", "1", "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all", "--no-color"],
        capture_output=True, text=True, timeout=seconds, check=False, cwd=Path(running.model().path).parent,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_a_short_fuzzing_by_the_served_description(tmp_path: Path) -> None:
    models, tables = {"m": write_model(tmp_path / "m")}, {"m": write_table(tmp_path / "t")}
    with serving(models, tables, slo_ms=1000) as running:
        fuzz(running, 4, 120)


@pytest.mark.slow
def test_a_long_fuzzing_by_the_served_description(tmp_path: Path) -> None:
    models, tables = {"m": write_model(tmp_path / "m")}, {"m": write_table(tmp_path / "t")}
    with serving(models, tables, slo_ms=1000) as running:
        fuzz(running, 200, 1200)
