"""One client's connection: uvicorn's own protocol, with time limits for slow clients and bounds on what it may send, and strict
about what a request is.

uvicorn waits for a request's head and body for ever. Here a clock is set when either begins, and one pass over all connections a
few times a second closes those that are late; so a request costs no timers.

What a message is must be what every proxy before the server says it is. So a request that leaves room for two opinions is
refused, and nothing behind it is read; refusals keep their place in the order of answers; an offer to change the protocol is
ignored without a trace; and trailers never become headers. A client that closes its sending side counts as gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from bitdial.serving.protocol.response import error_body

PASS = 0.25  # seconds between looks at all connections
LINGER = 1.0  # seconds between a refusal and the end: a connection closed with unread data takes the answer with it
EXTENSION = "bitdial.connection"  # where a request's scope holds its connection
_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    503: "Service Unavailable",
    505: "HTTP Version Not Supported",
}
_NO_REQUEST = (400, "this is no valid HTTP request")


@dataclass(frozen=True)
class Limits:
    """header, body: seconds that a request's head and body may take (body: also the client taking its answer). head_bytes: of
    a head that comes in pieces, and of what follows a body. connections: at once."""

    header: float = 10.0
    body: float = 30.0
    head_bytes: int = 1 << 16
    connections: int = 1024


class _Fault(Exception):
    """What has arrived cannot be a request. Raised in the parser's callbacks, which end it; the protocol keeps the reason."""


class _Flow(FlowControl):
    """uvicorn reads on whenever an answer is complete or an application asks for a body; here not while further requests wait, or
    a client that asks faster than it is answered would fill the memory."""

    def __init__(self, transport: asyncio.Transport, waiting: deque[Any]) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class GuardedProtocol(HttpToolsProtocol):
    """See the module docstring. `gone`: called once if the connection is lost; the request being answered sets it."""

    limits: ClassVar[Limits] = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.gone: Callable[[], object] | None = None
        self._in_head, self._begun, self._progress, self._silent = True, False, False, 0
        self._until: float | None = time.monotonic() + self.limits.header
        self._stalled: float | None = None
        self._unanswered: deque[RequestResponseCycle] = deque()  # in the order of their coming
        self._fault = _NO_REQUEST  # what a parser that fails has met
        self._refusal: tuple[int, str] | None = None  # ends the connection; nothing more is read
        self._refused = False  # it has been sent
        self._keeps = True  # whether the request at hand leaves the connection open
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        if len(self.connections) > self.limits.connections:
            self.refuse(503, f"this server takes {self.limits.connections} connections at once")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for cycle in self._unanswered:  # uvicorn tells the newest alone
            _tell_off(cycle)
        gone, self.gone = self.gone, None
        if gone is not None:
            gone()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.parser is None or self._refusal is not None or self.transport.is_closing():
            return
        self._progress = False
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.refuse(*self._fault)
            return
        self._silent = 0 if self._progress else self._silent + len(data)
        if self._silent > self.limits.head_bytes:
            part = "head" if self._in_head else "trailer"
            self.refuse(431, f"the request's {part} is longer than {self.limits.head_bytes} bytes")
        elif self._until is None and not self._begun and not self._unanswered:
            self._until = time.monotonic() + self.limits.header  # blank lines before a request buy no time

    def _feed(self, data: bytes) -> None:
        """An offer to change the protocol, which nothing here accepts, must not change what the request is (RFC 9110, 7.8). The
        parser takes a request with one to end with its head, and hands back the rest unread: the head is parsed again without
        the offer, and the rest as what follows it."""
        rest: bytes | memoryview = data
        while True:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = memoryview(rest)[upgrade.args[0] :]
                lines = [
                    b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
                ]
                lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def on_message_begin(self) -> None:
        self._in_head, self._begun = True, True
        self._until = time.monotonic() + self.limits.header
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: self}  # type: ignore[dict-item]

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # not a trailer: that would come behind the back of whoever has looked at the headers
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.get_method() == b"CONNECT":
            self._find(400, "this is a server and no proxy: it knows no CONNECT")
        if self.parser.should_upgrade():
            return  # see _feed
        self._check_head()
        version = self.parser.get_http_version()
        self._keeps = version == "1.1" and self.parser.should_keep_alive()
        super().on_headers_complete()
        self._in_head = False
        self._until = time.monotonic() + self.limits.body
        self._unanswered.append(self.cycle)
        if version == "1.0":
            self.cycle.waiting_for_100_continue = False  # no such answer was known then
        # A client that was not told to go on with its body may leave it out: answered before it has come, the connection ends.
        self.cycle.keep_alive = self._keeps and not self.cycle.waiting_for_100_continue

    def _find(self, status: int, message: str) -> NoReturn:
        self._fault = (status, message)
        raise _Fault(message)

    def _check_head(self) -> None:
        """What the parser lets pass, though where the message ends or for whom it is would be a matter of opinion."""
        version = self.parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self._find(505, f"this server speaks HTTP/1.1, not HTTP/{version}")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (version == "1.1" and not hosts):
            self._find(400, f"a request has one Host header, and this one has {hosts}")
        codings = b",".join(value for name, value in self.headers if name == b"transfer-encoding").lower()
        if codings and version == "1.0":
            self._find(400, "HTTP/1.0 has no Transfer-Encoding")
        names = [part.strip() for part in codings.split(b",")]
        if codings and names != [b"chunked"]:
            if names[-1] != b"chunked" or names.count(b"chunked") > 1:
                self._find(400, "the last Transfer-Encoding of a request must be chunked, and be there once")
            self._find(501, "this server knows no Transfer-Encoding but chunked; compress with Content-Encoding")

    def on_body(self, body: bytes) -> None:
        self._progress = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # see _feed
        self._until, self._begun, self._progress = None, False, True
        if not self.cycle.response_complete:
            self.cycle.keep_alive = self._keeps
        super().on_message_complete()
        self.flow.resume_reading()  # there is no more to hold back, and whether the client leaves is seen by reading

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        super().on_response_complete()
        self.flow.resume_reading()
        self._end()

    def shutdown(self) -> None:
        self._keeps = False
        if self._refused:
            self.transport.close()
        super().shutdown()

    def pause_writing(self) -> None:
        self._stalled = time.monotonic() + self.limits.body
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled = None
        super().resume_writing()

    def check(self, now: float) -> None:
        """Close the connection if its client is late, or has left while nothing is read from it."""
        if self._stalled is not None and now > self._stalled:
            self.transport.abort()  # it does not take its answer
        elif self.transport.is_closing():
            return
        elif self.gone is not None and self.flow.read_paused and _has_left(self.transport):
            self.transport.abort()
        elif self._until is not None and now > self._until:
            own = self._begun and not self._in_head and bool(self._unanswered) and self._unanswered[-1] is self.cycle
            if self._refused:
                self.transport.close()
            elif len(self._unanswered) > own:  # earlier requests are not answered yet: the wait is ours
                self._until = now + self.limits.body
            elif not self._begun:
                self.transport.close()
            else:
                part = "head" if self._in_head else "body"
                seconds = self.limits.header if self._in_head else self.limits.body
                self.refuse(408, f"the request's {part} did not arrive within {seconds:g} seconds")

    def refuse(self, status: int, message: str) -> None:
        """Answer what cannot become a request, once all before it are answered, and close."""
        self._refusal = (status, message)
        if self._begun and not self._in_head:  # a sound head was taken for one
            if not self._unanswered or self._unanswered[-1] is not self.cycle or self.cycle.response_started:
                _tell_off(self.cycle)
                self.transport.close()  # it has an answer, or the beginning of one
                return
            _tell_off(self._unanswered.pop())
            if self.pipeline and self.pipeline[0][0] is self.cycle:
                self.pipeline.popleft()
        self._end()

    def _end(self) -> None:
        """Send the refusal, unless others are to be answered before."""
        if self._refusal is None or self._unanswered or self.transport.is_closing():
            return
        status, message = self._refusal
        body = error_body(message)
        retry = "retry-after: 1\r\n" if status == 503 else ""
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"{retry}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._refused = True
        if status == 503 or not self.transport.can_write_eof():  # one connection too many is not kept
            self.transport.close()
            return
        self.transport.write_eof()
        self._until = time.monotonic() + LINGER
        self.flow.resume_reading()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)


def _tell_off(cycle: RequestResponseCycle) -> None:
    """Nobody waits for this request's answer any more."""
    cycle.disconnected, cycle.waiting_for_100_continue = True, False
    cycle.message_event.set()


def _has_left(transport: asyncio.Transport) -> bool:
    """Whether the client has closed its end, whatever there is still to be read before that shows."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


def guarded(limits: Limits) -> type[GuardedProtocol]:
    """The protocol class with these limits."""
    return type("GuardedProtocol", (GuardedProtocol,), {"limits": limits})


def look_after(state: ServerState) -> None:
    """Close the connections of a server whose clients are late. What goes wrong with one is raised after all have been seen."""
    now, problem = time.monotonic(), None
    for connection in list(state.connections):
        if not isinstance(connection, GuardedProtocol):
            continue
        try:
            connection.check(now)
        except Exception as error:
            problem = error
            with contextlib.suppress(Exception):
                connection.transport.abort()
    if problem is not None:
        raise problem


def connection_of(scope: Any) -> GuardedProtocol | None:
    """The connection that a request came by; None under another server."""
    extensions = scope.get("extensions")
    found = extensions.get(EXTENSION) if extensions else None
    return found if isinstance(found, GuardedProtocol) else None
