"""The open-loop load generator against a small server whose delays are set by the test."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("httptools", reason="the load generator needs httptools (the extra serve)")

from bitdial.errors import ConfigError, DataError
from bitdial.loadtest import (
    LabelledImages,
    LoadPlan,
    Result,
    Schedule,
    ServerError,
    Snapshot,
    Status,
    parse_url,
    read_labelled,
    read_result,
    result_from_json,
    result_json,
    run_load,
    summarize,
    uniform,
    warnings_of,
    write_result,
)

Behaviour = Callable[["Server", int], Any]


class Server:
    """An inference server of one thread. `act(server, number)` is awaited per request and gives (status, parameters) or None,
    which breaks the connection. The network: the class of an image is the index of its largest value."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.metadata: dict[str, Any] = {
            "name": "net",
            "platform": "test",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4]}],
            "parameters": {"ratios": [0.0, 0.5, 1.0], "accuracy": [0.9, 0.8, 0.6]},
        }
        self.act: Behaviour | None = None
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.json_outputs = False
        self.index: Any = [{"name": "net"}]
        self.port = 0
        self.loop = asyncio.new_event_loop()
        started = threading.Event()
        self.thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self.thread.start()
        assert started.wait(60)

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(asyncio.start_server(self._client, "127.0.0.1", 0, ssl=self.tls))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self.loop.run_forever()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(60)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                answer = await self._answer(head[0].split()[1], headers, body)
                if answer is None:
                    writer.transport.abort()
                    return
                status, content, length = answer
                extra = f"Inference-Header-Content-Length: {length}\r\n" if length is not None else ""
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n{extra}\r\n".encode() + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):  # ssl.SSLError is one
            writer.close()

    async def _answer(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes, int | None] | None:
        if path == "/v2/repository/index":
            return (404, b"{}", None) if self.index is None else (200, json.dumps(self.index).encode(), None)
        if not path.endswith("/infer"):
            return (
                (200, json.dumps(self.metadata).encode(), None)
                if path == "/v2/models/net"
                else (404, b'{"error":"no"}', None)
            )
        number = len(self.seen)
        length = int(headers["inference-header-content-length"])
        request = json.loads(body[:length])
        self.seen.append(request)
        self.headers.append(headers)
        shape = request["inputs"][0]["shape"]
        values = np.frombuffer(body[length:], "<f4").reshape(shape)
        status, parameters = 200, {"ratio": 0.5, "queue_ms": 1.5, "compute_ms": 2.5}
        if self.act is not None:
            found = await self.act(self, number)
            if found is None:
                return None
            status, parameters = found
        if status != 200:
            return status, json.dumps({"error": f"status {status}"}).encode(), None
        output: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": shape}
        if self.json_outputs:
            output["data"] = values.ravel().tolist()
            return 200, json.dumps({"outputs": [output], "parameters": parameters}).encode(), None
        output["parameters"] = {"binary_data_size": values.nbytes}
        text = json.dumps({"outputs": [output], "parameters": parameters}).encode()
        return 200, text + values.tobytes(), len(text)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def run(
    server: Server, rate: float = 100.0, seconds: float = 0.5, *, data: LabelledImages | None = None, **more: Any
) -> Result:
    target, _ = parse_url(f"http://127.0.0.1:{server.port}")
    observer = more.pop("observer", None)
    plan = LoadPlan(schedule=Schedule(uniform(rate, seconds), seconds, "even"), **{"slo": 0.1, "warmup": 1, **more})
    return run_load(target, "net", plan, data=data, observer=observer, every=0.1)


def test_a_stall_shows_in_every_request_that_fell_due_meanwhile(server: Server) -> None:
    """No coordinated omission: a server that stands still for a second delays requests by what was left of that second."""
    stalled: list[float] = []

    async def act(server: Server, number: int) -> Any:
        if number == 21:  # number 0 was the warm-up
            stalled.append(time.monotonic())
            time.sleep(1.0)  # blocks the server's whole loop
        return 200, {"ratio": 0.0}

    server.act = act
    result = run(server, 100.0, 2.0, slo=0.1)
    assert result.ok.all() and len(result.ok) == 200
    hit = (result.scheduled >= 0.20) & (result.scheduled < 1.18)
    expected = 1.2 - result.scheduled[hit]
    # Requests of the stalled second waited for the rest of it at least.
    assert hit.sum() == 98
    assert (result.latency[hit] > expected - 0.05).all()
    # They left all the same, and did not wait for one another.
    assert np.count_nonzero(result.sent[hit] < 1.2) > 10
    summary = summarize(result)
    assert summary["latency_ms"]["p50"] > 50 or summary["attainment"] < 0.6
    assert summary["attainment"] == pytest.approx(np.mean(result.latency <= 0.1)) and summary["attainment"] < 0.62
    # A closed loop would have met the stall once: 1 of 200.
    assert np.count_nonzero(result.latency > 0.5) >= 45


def test_statuses_parameters_and_errors_are_counted(server: Server) -> None:
    async def act(server: Server, number: int) -> Any:
        kind = (number - 1) % 5 if number else 0
        if kind == 4:
            return None
        return [200, 503, 504, 500][kind], {"ratio": 1.0, "queue_ms": 3, "compute_ms": 4.5}

    server.act = act
    result = run(server, 200.0, 0.5, max_ratio=0.5)
    counts = summarize(result)["counts"]
    assert counts == {"ok": 20, "shed": 20, "expired": 20, "failed": 40, "timeout": 0, "unfinished": 0}
    assert sum(result.errors.values()) == 80 and result.errors["503: status 503"] == 20
    assert any("closed" in text for text in result.errors)
    assert (result.ratio[result.ok] == 1.0).all() and np.isnan(result.ratio[~result.ok]).all()
    assert np.allclose(result.queue[result.ok], 0.003) and np.allclose(result.compute[result.ok], 0.0045)
    assert summarize(result)["attainment"] <= 0.2  # of ALL requests
    assert summarize(result)["expected_accuracy"] == pytest.approx(0.6)
    assert server.seen[5]["parameters"] == {"slo_ms": 100.0, "max_ratio": 0.5, "binary_data_output": True}


def test_timeouts_are_given_up_and_late_answers_ignored(server: Server) -> None:
    async def act(server: Server, number: int) -> Any:
        if number % 4 == 0 and number:
            await asyncio.sleep(300.0)
        return 200, {}

    server.act = act
    result = run(server, 100.0, 0.4, timeout=2.0)
    counts = summarize(result)["counts"]
    assert counts["timeout"] == 10 and counts["ok"] == 30
    timed_out = result.done[result.status == Status.TIMEOUT] - result.scheduled[result.status == Status.TIMEOUT]
    assert (timed_out >= 2.0).all()
    assert np.isnan(result.latency[result.status == Status.TIMEOUT]).all()


def test_connections_are_capped_and_the_cap_is_told(server: Server) -> None:
    async def act(server: Server, number: int) -> Any:
        await asyncio.sleep(0.05 if number else 0)
        return 200, {}

    server.act = act
    result = run(server, 100.0, 0.4, max_connections=2, connections=2)
    assert result.ok.all() and result.generator["capped"] and result.generator["connections"] == 2
    # 40/s is what two connections carry at 50 ms: the last requests left late, and the latency says so.
    assert result.connection_wait[-1] > 0.2 and result.latency[-1] > result.connection_wait[-1] + 0.04
    assert np.median(result.lateness) < result.connection_wait[-1]  # the generator itself was ready
    assert "--max-connections" in " ".join(warnings_of(result))
    free = run(server, 100.0, 0.4)
    assert not free.generator["capped"]


def test_true_accuracy_from_binary_and_json_outputs(server: Server) -> None:
    random = np.random.default_rng(0)
    images = random.random((60, 4)).astype(np.float64)
    labels = images.argmax(axis=1)
    labels[:15] = (labels[:15] + 1) % 4  # a quarter is wrong
    for server.json_outputs in (False, True):
        result = run(server, 100.0, 0.4, samples=6, data=LabelledImages(images, labels.astype(np.int64)))
        assert (result.right >= 0).all() and summarize(result)["measured_accuracy"] == pytest.approx(0.75)
    assert server.seen[-1]["inputs"][0]["shape"] == [6, 4]
    with pytest.raises(DataError, match="do not fit"):
        run(server, data=LabelledImages(np.zeros((4, 5)), np.zeros(4, np.int64)))
    with pytest.raises(ConfigError, match="fewer"):
        run(server, samples=61, data=LabelledImages(images, labels.astype(np.int64)))


def test_a_server_that_tells_nothing_of_ratios(server: Server) -> None:
    del server.metadata["parameters"]

    async def act(server: Server, number: int) -> Any:
        return 200, {"ratio": True, "queue_ms": "x"}  # and one that tells nonsense

    server.act = act
    summary = summarize(run(server, slo=None))
    assert summary["counts"]["ok"] == 50
    for name in ("mean_ratio", "expected_accuracy", "attainment", "ratio_changes_per_minute", "slo_ms"):
        assert summary[name] is None
    assert "slo_ms" not in server.seen[0]["parameters"]


def test_before_the_test_what_cannot_work_is_said(server: Server) -> None:
    target, name = parse_url(f"127.0.0.1:{server.port}/v2/models/net/infer", api_key="s3cret")
    assert name == "net" and "s3cret" not in target.url
    plan = LoadPlan(schedule=Schedule(uniform(50, 0.1), 0.1, ""))
    assert run_load(target, None, plan).ok.all()  # the server's only model
    assert server.headers[-1]["authorization"] == "Bearer s3cret"
    with pytest.raises(ServerError, match="404"):
        run_load(target, "other", plan)
    server.index = [{"name": "a"}, {"name": "b"}]
    with pytest.raises(ConfigError, match="a, b"):
        run_load(target, None, plan)
    server.index = None
    with pytest.raises(ConfigError, match="name the one"):
        run_load(target, None, plan)

    async def act(server: Server, number: int) -> Any:
        return 400, {}

    server.act = act
    with pytest.raises(ServerError, match="refuses.*400"):
        run_load(target, "net", plan)
    server.metadata["inputs"][0]["datatype"] = "BYTES"
    with pytest.raises(ConfigError, match="BYTES"):
        run_load(target, "net", plan)
    server.metadata["inputs"] = "x"
    with pytest.raises(ServerError, match="inputs"):
        run_load(target, "net", plan)
    closed = Server()
    port = closed.port
    closed.close()
    closed.loop.close()
    with pytest.raises(ServerError, match="cannot connect|did not answer|closed"):
        run_load(parse_url(f"http://127.0.0.1:{_free_port(port)}")[0], "net", plan)


def _free_port(not_this: int) -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://h:99999", "http://u:p@h", "http://[::1"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_url(url)


def test_header_injection_is_refused() -> None:
    target, _ = parse_url("http://h", api_key="a\r\nX: y")
    with pytest.raises(ConfigError, match="line break"):
        target.request("GET", "/")


def test_an_idle_connection_that_the_server_closes_costs_no_request(server: Server) -> None:
    """HTTP servers close idle connections; a request that crosses such a close is sent again, and only such a one."""
    from bitdial.loadtest import client

    async def drive() -> tuple[int, list[str]]:
        told: list[str] = []
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        class Caller:
            def sent(self, slot: int, now: float) -> None: ...

            def answered(self, slot: int, now: float, status: int, header_length: int, body: bytes) -> None:
                told.append(f"{status}")
                done.set_result(None)

            def failed(self, slot: int, now: float, reason: str) -> None:
                told.append(reason)
                done.set_result(None)

        target, _ = parse_url(f"http://127.0.0.1:{server.port}")
        pool = client.Pool(target, Caller(), most=4, spare=0)
        await pool.prepare(1)
        connection = pool.idle[0]
        connection.free_since -= 5.0
        pool.send(0, target.request("GET", "/v2/models/net"))
        assert connection.transport is not None
        connection.connection_lost(None)  # the close arrives before any byte of an answer
        await asyncio.wait_for(done, 5)
        await pool.close()
        return pool.retries, told

    assert asyncio.run(drive()) == (1, ["200"])


def test_interruption_stops_and_still_reports(server: Server) -> None:
    seen: list[Snapshot] = []

    def observer(now: Snapshot) -> None:
        seen.append(now)
        if now.sent > 20 and now.p99 is not None and len(seen) < 1000:
            seen.extend([now] * 1000)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    result = run(server, 100.0, 30.0, observer=observer)
    assert signal.getsignal(signal.SIGINT) is before
    assert result.settings["stopped_early"] and 0.2 < result.seconds < 30.0
    assert 20 < len(result.status) < 3000 and result.ok.all()
    assert seen[-1].offered > 10 and seen[-1].p99 is not None and seen[-1].ratio == 0.5


def test_a_result_survives_its_file(server: Server, tmp_path: Path) -> None:
    result = replace(run(server, title="<b>"), slo=0.05)
    path = tmp_path / "r.json"
    write_result(result, path)
    back = read_result(path)
    for name in ("scheduled", "sent", "lateness", "connection_wait", "done", "queue", "compute"):
        assert np.allclose(getattr(back, name), getattr(result, name), atol=2e-6, equal_nan=True)
    for name in ("status", "ratio", "right"):
        assert np.array_equal(getattr(back, name), getattr(result, name), equal_nan=name == "ratio")
    assert (back.slo, back.title, back.model, back.settings) == (0.05, "<b>", result.model, result.settings)
    assert json.loads(result_json(back))["columns"] == json.loads(path.read_bytes())["columns"]
    with pytest.raises(DataError, match="none.json"):
        read_result(tmp_path / "none.json")


def small() -> Result:
    nan, n = np.full(6, np.nan), 6
    return Result(
        np.arange(n) * 0.1, np.arange(n) * 0.1 + 1e-4, np.arange(n) * 0.1 + 0.02, np.array([0, 0, 0, 1, 4, 5], np.uint8),
        np.array([0.0, 1.0, 0.0, np.nan, np.nan, np.nan]), nan, nan, np.array([1, 2, 2, -1, -1, -1]), 0.6, 2, 0.05,
        {"ratios": [0.0, 1.0], "accuracy": [0.9, None]},
    )  # fmt: skip


def test_figures_of_a_small_result() -> None:
    summary = summarize(small())
    assert summary["attainment"] == pytest.approx(3 / 5)  # the unfinished one counts nowhere
    assert summary["measured_accuracy"] == pytest.approx(5 / 6) and summary["expected_accuracy"] == pytest.approx(0.9)
    assert summary["ratio_changes_per_minute"] == pytest.approx(2 / 0.01) and summary["mean_ratio"] == pytest.approx(
        1 / 3
    )
    assert summary["achieved_rate"] == pytest.approx(5.0) and summary["offered_rate"] == pytest.approx(10.0)
    assert "under way" in warnings_of(small())[0]
    late = replace(small(), begun=small().scheduled + 0.004, sent=small().scheduled + 0.02)
    assert summarize(late)["lateness_ms"]["max"] == pytest.approx(4.0)
    assert summarize(late)["connection_wait_ms"]["max"] == pytest.approx(16.0)
    told = warnings_of(late)
    assert "4 ms late" in told[0] and "16 ms for a new connection" in told[1]


@given(st.data())
@settings(max_examples=60)
def test_damaged_results_raise_data_errors_only(data: st.DataObject) -> None:
    document = json.loads(result_json(small()))
    place: Any = document
    key = data.draw(st.sampled_from(sorted(document)))
    if key == "columns" and data.draw(st.booleans()):
        place, key = document["columns"], data.draw(st.sampled_from(sorted(document["columns"])))
    junk = st.one_of(
        st.none(), st.integers(), st.text(max_size=8), st.lists(st.integers() | st.none() | st.text(), max_size=7)
    )
    place[key] = data.draw(junk | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))
    with contextlib.suppress(DataError):
        assert isinstance(result_from_json(json.dumps(document)), Result)


def test_results_that_count_images_are_read() -> None:
    document = json.loads(result_json(replace(small(), samples=3)))
    document["images"] = document.pop("samples")
    assert result_from_json(json.dumps(document)).samples == 3


def test_labelled_files(tmp_path: Path) -> None:
    good = tmp_path / "good.npz"
    np.savez(good, images=np.zeros((3, 2), np.float32), labels=np.arange(3, dtype=np.uint8))
    assert read_labelled(good).labels.dtype == np.int64
    (tmp_path / "not.npz").write_bytes(b"PK\x03\x04 no archive")
    arrays: dict[str, dict[str, Any]] = {
        "missing": {"images": np.zeros(3)},
        "lengths": {"images": np.zeros((3, 1)), "labels": np.zeros(2, int)},
        "nan": {"images": np.full((1, 1), np.nan), "labels": np.zeros(1, int)},
        "kind": {"images": np.array([["a"]]), "labels": np.zeros(1, int)},
        "object": {"images": np.array([{}], object), "labels": np.zeros(1, int)},
    }
    for name, held in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **held)
    for name in ("not", "gone", *arrays):
        with pytest.raises(DataError, match=name):
            read_labelled(tmp_path / f"{name}.npz")


@pytest.mark.parametrize(
    "wrong", [{"samples": 0}, {"slo": 0.0}, {"max_ratio": 1.5}, {"timeout": 0.0}, {"warmup": -1}, {"max_connections": 0}]
)
def test_impossible_plans(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        LoadPlan(schedule=Schedule(uniform(10, 1), 1.0, ""), **wrong)
    with pytest.raises(ConfigError):
        LoadPlan(schedule=Schedule(np.empty(0), 1.0, ""))


def test_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        str(key),
        "-out",
        str(cert),
        "-days",
        "2",
    ]
    try:
        names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*command, *names], check=True, capture_output=True, timeout=300)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("TLS IS NOT TESTED: openssl cannot make a certificate here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server = Server(context)
    try:
        url = f"https://127.0.0.1:{server.port}"
        plan = LoadPlan(schedule=Schedule(uniform(50, 0.2), 0.2, ""), samples=500)  # 8 kB: several TLS records
        for target in (parse_url(url, ca_file=cert)[0], parse_url(url, verify=False)[0]):
            assert run_load(target, "net", plan).ok.all()
        with pytest.raises(ServerError, match="not trusted"):
            run_load(parse_url(url)[0], "net", plan)
        with pytest.raises(ConfigError, match="certificates"):
            parse_url(url, ca_file=key)
    finally:
        server.close()


def command_line(*arguments: str) -> int:
    """The exit code of `bitdial loadtest` with these arguments; errors are raised."""
    import typer

    from bitdial.cli.loadtest import loadtest

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(loadtest)
    code = app(args=list(arguments), standalone_mode=False)
    return code if isinstance(code, int) else 0


def test_command_line(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, first, second = f"http://127.0.0.1:{server.port}", tmp_path / "a.json", tmp_path / "b.json"
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s\n" + "\n".join(str(k / 50) for k in range(20)))
    page = tmp_path / "a.html"
    assert (
        command_line(url, "--trace", str(trace), "--slo-ms", "200", "-o", str(first), "--html", str(page), "--json")
        == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert printed["summary"]["counts"]["ok"] == 20 and printed["files"] == [str(first), str(page)]
    assert command_line(url, "net", "--step", "50:200ms,100:200ms", "-o", str(second), "-q") == 0
    both = tmp_path / "both.html"
    assert command_line("--compare", str(first), str(second), "-o", str(both)) == 0
    assert "net (2)" in both.read_text() or "b" in both.read_text()
    assert "Answered within the SLO" in capsys.readouterr().out

    async def act(server: Server, number: int) -> Any:
        return 503, {}

    server.act = act
    assert command_line(url, "net", "--uniform", "50", "--duration", "200ms", "-q") == 1  # nothing was answered
    for wrong in (
        (url,),
        (url, "--poisson", "5", "--uniform", "5"),
        (url, "--poisson", "5", "--speed", "2"),
        (url, "--trace", str(trace), "--repeat"),
        (url, "--trace", str(trace), "--keep-peaks"),
        (url, "net", "more", "--poisson", "5"),
        ("--compare", str(first), "--poisson", "5"),
        (url, "--poisson", "5", "--max-ratio", "200"),
    ):
        with pytest.raises(ConfigError):
            command_line(*wrong)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitdial.cli.loadtest import KEY_VARIABLE, read_key

    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, "from-there")
    assert read_key(None) == "from-there"
    path = tmp_path / "key"
    path.write_text(" from-file\n")
    assert read_key(path) == "from-file"
    path.write_text("\n")
    for place in (path, tmp_path / "none"):
        with pytest.raises(DataError):
            read_key(place)
