"""What the connection takes for a request, held against h11: bytes go into the protocol class itself, behind a transport that
only notes what is done to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="THE SERVER IS NOT TESTED: fastapi is not installed")
pytest.importorskip("uvloop", reason="THE SERVER IS NOT TESTED: uvloop is not installed")
h11 = pytest.importorskip("h11", reason="THE PARSER IS NOT TESTED: h11 is not installed")

import uvicorn  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from served import FakeWorker, infer_bytes, receive, serving, status, write_model, write_table  # noqa: E402
from uvicorn.server import ServerState  # noqa: E402

from bitdial.serving.errors import Gone  # noqa: E402
from bitdial.serving.server.app import read_body  # noqa: E402
from bitdial.serving.server.connection import Limits, guarded  # noqa: E402


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def do() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs coroutines, all on one loop."""
    loop = asyncio.new_event_loop()
    yield loop.run_until_complete
    loop.close()


class Wire(asyncio.Transport):
    """A transport to nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.closed, self.paused = b"", False, False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False


class Peer:
    """A client and the server's end of its connection. seen: (method, target, body) of requests the application was given whole;
    headers: of each. hold: requests wait for `release` before they are answered. early: they are answered unread."""

    def __init__(self, hold: bool = False, early: bool = False, **limits: Any) -> None:
        self.seen: list[tuple[bytes, bytes, bytes]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.gone: list[str] = []
        self.early, self.release = early, asyncio.Event()
        if not hold:
            self.release.set()
        self.protocol = guarded(Limits(**limits))(CONFIG, ServerState(), {"peer": self})
        self.wire = Wire()
        self.protocol.connection_made(self.wire)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        if not self.early:
            body = await read_body(headers, receive, 1 << 30)
            query = b"?" + scope["query_string"] if scope["query_string"] else b""
            self.seen.append((scope["method"].encode(), scope["raw_path"] + query, body))
            self.headers.append(headers)
            await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def send(self, *pieces: bytes) -> None:
        """Deliver them as a socket would: none while reading is paused."""
        waiting = list(pieces)
        idle, before = 0, -1
        while idle < 6:
            if waiting and not self.wire.paused and not self.wire.closed:
                self.protocol.data_received(waiting.pop(0))
            await asyncio.sleep(0)
            now = len(waiting) + len(self.wire.sent) + len(self.seen)
            idle, before = idle + 1 if now == before else 0, now

    @property
    def answers(self) -> list[int]:
        """Status of each answer, 100 among them."""
        found, rest = [], self.wire.sent
        while rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 "), self.wire.sent
            found.append(int(head.split(b" ")[1]))
            length = [line for line in head.split(b"\r\n") if line.startswith(b"content-length: ")]
            rest = rest[int(length[0].split()[1]) :] if length else rest
        return found

    @property
    def refused(self) -> bool:
        return self.wire.closed and bool(self.answers) and self.answers[-1] >= 400


async def _to_its_peer(scope: Any, receive: Any, send: Any) -> None:
    with contextlib.suppress(Gone):
        await scope["state"]["peer"].answer(scope, receive, send)


CONFIG = uvicorn.Config(
    _to_its_peer, interface="asgi3", ws="none", log_config=None, access_log=False, proxy_headers=False
)
CONFIG.load()


async def exchange(*pieces: bytes, **options: Any) -> Peer:
    peer = Peer(**options)
    await peer.send(*pieces)
    return peer


def post(path: str = "/a", body: bytes = b"hello", headers: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def chunked(body: bytes, path: str = "/a", headers: str = "", trailer: bytes = b"") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n{headers}\r\n".encode()
    return head + b"%x\r\n%s\r\n0\r\n%s\r\n" % (len(body), body, trailer)


HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: x\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize("offer", ["h2c", "websocket", "TLS/1.0, h2c"])
@pytest.mark.parametrize("make", [post, chunked])
def test_an_ignored_upgrade_leaves_the_request_as_it_is(do: Any, offer: str, make: Any) -> None:
    headers = f"Connection: keep-alive, Upgrade\r\nUpgrade: {offer}\r\nX-Kept: 1\r\n"
    data = make(body=HIDDEN, headers=headers)
    for pieces in ([data + data + NEXT], [data, NEXT], [bytes([b]) for b in data + NEXT]):
        peer = do(exchange(*pieces))
        whole = [(b"POST", b"/a", HIDDEN)] * (len(peer.seen) - 1) + [(b"GET", b"/next", b"")]
        assert peer.seen == whole and peer.answers == [200] * len(whole) and not peer.wire.closed
        assert peer.headers[0][b"x-kept"] == b"1" and b"upgrade" not in peer.headers[0]
    bare = b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert [path for _, path, _ in do(exchange(bare + NEXT)).seen] == [b"/a", b"/next"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 501),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /a HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", 400),
        (b"POST /a HTTP/2.0\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", 505),
        (b"POST /a HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 400),
        (b"POST /a HTTP/1.1\r\nHost: x\r\nHost: y\r\nContent-Length: 5\r\n\r\nhello", 400),
        (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (post(headers="Connection: upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n"), 400),
    ],
)  # fmt: skip
def test_what_leaves_room_for_two_opinions_is_refused(do: Any, data: bytes, status: int) -> None:
    for pieces in ([data + NEXT], [bytes([b]) for b in data + NEXT]):
        peer = do(exchange(*pieces))
        assert (peer.seen, peer.answers, peer.wire.closed) == ([], [status], True)
        assert b"connection: close" in peer.wire.sent and json.loads(peer.wire.sent.rpartition(b"\r\n")[2])["error"]


def test_a_refusal_keeps_its_place_behind_earlier_answers(do: Any) -> None:
    async def scenario(bad: bytes) -> None:
        peer = Peer(hold=True)
        await peer.send(post("/first") + bad, NEXT)
        assert [path for _, path, _ in peer.seen] == [b"/first"] and peer.wire.sent == b""
        peer.release.set()
        await peer.send()
        assert [path for _, path, _ in peer.seen] == [b"/first"] and peer.answers == [200, 400] and peer.wire.closed

    for bad in (
        b"rubbish\r\n\r\n",
        b"POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
        b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ):
        do(scenario(bad))


def test_a_body_that_breaks_off_wrongly_ends_its_request(do: Any) -> None:
    head = b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    peer = do(exchange(head, b"zz\r\n", NEXT))
    assert (peer.seen, peer.answers, peer.wire.closed) == ([], [400], True)
    answered = do(exchange(head, b"zz\r\n", NEXT, early=True))  # it has its answer, and no second one
    assert answered.answers == [200] and answered.wire.closed


def test_trailers_are_no_headers_and_have_an_end(do: Any) -> None:
    trailer = b"X-Api-Key: secret\r\nContent-Encoding: gzip\r\nConnection: upgrade\r\nUpgrade: h2c\r\n"
    peer = do(exchange(chunked(b"hello", trailer=trailer) + NEXT))
    assert [body for _, _, body in peer.seen] == [b"hello", b""] and peer.answers == [200, 200]
    assert set(peer.headers[0]) == {b"host", b"transfer-encoding"}
    endless = chunked(b"hello")[:-2] + b"A: "
    peer = do(exchange(endless, *[b"b" * 3000] * 4, head_bytes=10_000))
    assert (peer.seen, peer.answers, peer.wire.closed) == ([], [431], True)


def test_expectations(do: Any) -> None:
    asking = post(headers="Expect: 100-continue\r\n")
    head, body = asking[:-5], asking[-5:]
    assert do(exchange(head)).answers == [100]
    peer = do(exchange(head, body, NEXT))
    assert peer.answers == [100, 200, 200] and not peer.wire.closed and peer.seen[0][2] == b"hello"
    early = do(exchange(head, NEXT, early=True))  # whether the body comes is anyone's guess
    assert early.answers == [200] and early.wire.closed and b"connection: close" in early.wire.sent
    old = do(exchange(head.replace(b"HTTP/1.1", b"HTTP/1.0"), body))
    assert old.answers == [200] and old.wire.closed


def test_connections_end_when_they_are_to(do: Any) -> None:
    for last in (post(headers="Connection: close\r\n"), post().replace(b"HTTP/1.1", b"HTTP/1.0")):
        for pieces in ([last + NEXT], [last, NEXT]):
            peer = do(exchange(*pieces))
            assert len(peer.seen) == 1 and peer.answers == [200] and peer.wire.closed

    async def blank_lines() -> None:
        peer = await exchange(NEXT, b"\r\n")
        peer.protocol.check(time.monotonic() + 1000.0)
        assert peer.wire.closed and peer.answers == [200]

    do(blank_lines())


def test_a_late_second_request_does_not_speak_into_the_first_ones_answer(do: Any) -> None:
    async def scenario() -> None:
        peer = Peer(hold=True)
        await peer.send(post("/first"), b"POST /second HT")
        peer.protocol.check(time.monotonic() + 20.0)
        assert not peer.wire.sent and not peer.wire.closed
        peer.release.set()
        await peer.send(b"TP/1.1\r\nHost: x\r\n\r\n")
        assert peer.answers == [200, 200] and [path for _, path, _ in peer.seen] == [b"/first", b"/second"]

    do(scenario())


def test_reading_goes_on_behind_a_whole_request_and_stops_behind_a_second(do: Any) -> None:
    async def scenario() -> None:
        large = Peer(hold=True)
        await large.send(post(body=bytes(1 << 20)))
        assert large.seen and not large.wire.paused  # or nobody would see the client leave
        left = []
        large.protocol.gone = lambda: left.append(1)
        large.protocol.connection_lost(None)
        assert left == [1]

        many = Peer(hold=True)
        await many.send(NEXT * 50)
        assert many.wire.paused
        many.release.set()
        resumed = []
        many.wire.resume_reading = lambda: resumed.append(len(many.seen))  # type: ignore[method-assign]
        await many.send()
        assert many.answers == [200] * 50
        assert resumed == [49]  # when the last one's turn had come

    do(scenario())


# ---- against h11 -----------------------------------------------------------------------------------------------------------


def by_h11(data: bytes) -> tuple[list[tuple[bytes, bytes, bytes]], bool]:
    """What h11 takes the bytes for: whole requests, and whether they end in an error. It skips one blank line before a request,
    the server any number, which is nobody's loss."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(data.lstrip(b"\r\n"))
    found: list[tuple[bytes, bytes, bytes]] = []
    body = b""
    request: Any = None
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            return found, True
        if event in (h11.NEED_DATA, h11.PAUSED, h11.ConnectionClosed()):  # the last: no bytes are left
            return found, False
        if isinstance(event, h11.Request):
            request, body = event, b""
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            found.append((bytes(request.method), bytes(request.target), body))
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return found, False
            rest = connection.trailing_data[0].lstrip(b"\r\n")
            connection = h11.Connection(h11.SERVER)
            connection.receive_data(rest)


BODIES = st.sampled_from([b"", b"x", b"hello", HIDDEN, HIDDEN * 3, b"\r\n\r\n", b"0\r\n\r\n" + HIDDEN, b"a" * 3000])
PLAIN = [
    "X: 1", "Connection: keep-alive", "Connection: upgrade", "Connection: Upgrade, keep-alive", "Upgrade: h2c", "Upgrade:",
    "Upgrade: websocket", "Expect: 100-continue", "Accept:", "X-Empty: \t ", 'Cookie: a=b; c="d"', "Keep-Alive: 5",
]  # fmt: skip
ODD = [
    "Connection: close", "Host: y", "Content-Length: 3", "Content-Length: 0", "Content-Length: +5", "Content-Length: 5, 5",
    "Content-Length:", "Transfer-Encoding: chunked", "Transfer-Encoding: Chunked", "Transfer-Encoding: gzip, chunked",
    "Transfer-Encoding: chunked, chunked", "Transfer-Encoding: identity", "Transfer-Encoding: \x0bchunked", "X: \xff", "X: a\rb",
    "Transfer-Encoding : chunked", " folded: 1", "Content-Length : 3", "X: a\x00b", "Bad Name: 1", "\tX: 1",
]  # fmt: skip


@st.composite
def requests(draw: Any, sound: bool) -> bytes:
    """A request's bytes; sound: such that nobody may refuse it."""
    body: bytes = draw(BODIES)
    method = draw(st.sampled_from(["GET", "POST", "PUT", "DELETE", "OPTIONS"]))
    target = draw(st.sampled_from(["/", "/a", "/a?b=c", "/a%2Fb", "//a/b", "/a/../b?x=%20"]))
    headers = draw(st.lists(st.sampled_from(PLAIN if sound else PLAIN + ODD), max_size=4))
    version = "1.1" if sound else draw(st.sampled_from(["1.1"] * 8 + ["1.0", "2.0"]))
    if sound or draw(st.integers(0, 9)):
        headers.insert(draw(st.integers(0, len(headers))), "Host: x")
    framing = draw(st.sampled_from(["length", "chunks", "none"] if sound else ["length", "chunks", "none", "wrong"]))
    content = b""
    if framing == "length":
        headers.append(f"content-length: {'0' * draw(st.integers(0, 2))}{len(body)}")
        content = body
    elif framing == "chunks":
        headers.append("Transfer-Encoding: chunked")
        size = draw(st.sampled_from([1, 7, 1000])) if len(body) < 200 else 1000
        extension = draw(st.sampled_from(["", ";a", ";a=b"]))
        for at in range(0, len(body), size):
            part = body[at : at + size]
            content += f"{len(part):x}{extension}\r\n".encode() + part + b"\r\n"
        trailers = [b"", b"X: 1\r\nHost: z\r\n"] + ([] if sound else [b"Content-Length: 3\r\n"])
        content += b"0\r\n" + draw(st.sampled_from(trailers)) + b"\r\n"
    elif framing == "wrong":
        content = body
    end = "\r\n" if sound else draw(st.sampled_from(["\r\n"] * 9 + ["\n"]))
    head = end.join([f"{method} {target} HTTP/{version}", *headers, "", ""])
    data = head.encode("latin-1") + content
    if not sound and not draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(data)))
        # No blanks: the parser takes several in a request line for one, as RFC 9112 (3) allows, and h11 does not.
        data = data[:at] + draw(st.sampled_from([b"", b"\r", b"\n", b"\x00", b"0", b":"])) + data[at + 1 :]
    return data


def cut(data: bytes, at: Sequence[int]) -> list[bytes]:
    places = sorted({0, len(data), *(a % (len(data) + 1) for a in at)})
    return [data[a:b] for a, b in zip(places[:-1], places[1:], strict=True)]


PLACES = st.lists(st.integers(0, 1 << 14), max_size=12)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(requests(sound=True), min_size=1, max_size=4), at=PLACES)
def test_sound_requests_are_what_h11_says(do: Any, parts: list[bytes], at: list[int]) -> None:
    data = b"".join(parts)
    peer = do(exchange(*cut(data, at)))
    expected, wrong = by_h11(data)
    assert not wrong and len(expected) == len(parts)
    assert peer.seen == expected and not peer.wire.closed
    assert [a for a in peer.answers if a != 100] == [200] * len(parts)


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(requests(sound=False), min_size=1, max_size=4), at=PLACES)
def test_any_bytes_are_what_h11_says_or_refused(do: Any, parts: list[bytes], at: list[int]) -> None:
    data = b"".join(parts)
    peer = do(exchange(*cut(data, at)))
    expected, _ = by_h11(data)
    assert peer.seen == expected[: len(peer.seen)], data
    assert len(peer.seen) == len(expected) or peer.refused, (peer.answers, peer.seen)


# ---- clients that leave ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "clients"), [(256, 60), (25_600, 60), (524_288, 20)], ids=["1 KB", "100 KB", "2 MB"]
)
def test_clients_that_leave_the_queue_are_cancelled_whatever_they_sent(
    tmp_path: Path, numbers: int, clients: int
) -> None:
    workers: list[Held] = []

    class Held(FakeWorker):
        """Its batches take until they are let go."""

        async def run(self, requests: Any, index: int, pace: float = 0.0) -> Any:
            self.free = asyncio.Event()
            self.begun.set()
            await self.free.wait()
            return await super().run(requests, index)

    def make(file: Any, options: Any) -> Held:
        workers.append(Held(file, options))
        workers[-1].begun = threading.Event()
        return workers[-1]

    models = {"m": write_model(tmp_path / "m", shape=[numbers])}
    ask = infer_bytes(np.ones((1, numbers), np.float32))
    with serving(models, {"m": write_table(tmp_path / "t")}, make=make, slo_ms=600_000, policy="fixed:0") as running:
        with socket.create_connection(("127.0.0.1", running.port)) as patient:
            patient.sendall(ask)
            assert workers[0].begun.wait(30)
            queue = running.model().scheduler.queue
            leaving = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(clients)]
            for at, client in enumerate(leaving):
                client.sendall(ask if at % 4 else ask + NEXT)  # some ask for more before they are answered
            until(lambda: len(queue) == clients)
            for client in leaving:
                client.close()
            until(lambda: len(queue) == 0)
            running.loop.call_soon_threadsafe(workers[0].free.set)
            assert status(receive(patient)) == 200
        assert [sizes for sizes, _ in workers[0].batches] == [[1]]
        assert running.model().metrics.outcomes["cancelled"].count == clients
