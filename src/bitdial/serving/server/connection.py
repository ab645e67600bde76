"""One client's connection: uvicorn's own protocol, with time limits for slow clients and bounds on what it may send.

uvicorn waits for a request's head and body for ever. Here a clock is set when either begins, and one pass over all connections a
few times a second closes those that are late; so a request costs no timers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from bitdial.serving.protocol.response import error_body

PASS = 0.25  # seconds between looks at all connections
EXTENSION = "bitdial.connection"  # where a request's scope holds its connection
_PHRASES = {
    400: "Bad Request",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Limits:
    """header, body: seconds that a request's head and body may take (body: also the client taking its answer). head_bytes: of
    a head that comes in pieces. connections: at once."""

    header: float = 10.0
    body: float = 30.0
    head_bytes: int = 1 << 16
    connections: int = 1024


class GuardedProtocol(HttpToolsProtocol):
    """See the module docstring. `gone`: called once if the connection is lost; the request being answered sets it."""

    limits: ClassVar[Limits] = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.gone: Callable[[], object] | None = None
        self._in_head, self._head_bytes, self._begun = True, 0, False
        self._until: float | None = time.monotonic() + self.limits.header
        self._stalled: float | None = None
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self.refuse(503, f"this server takes {self.limits.connections} connections at once")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        gone, self.gone = self.gone, None
        if gone is not None:
            gone()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.parser is None or self.transport.is_closing():
            return
        was_in_head = self._in_head
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # no other protocol is offered; the request is answered as it stands
        except httptools.HttpParserError:
            if self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete:
                # What follows a sound request is not one: that request is still answered, then the connection ends.
                self.cycle.keep_alive = False
                self.flow.pause_reading()
            else:
                self.refuse(400, "this is no valid HTTP request")
            return
        if was_in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.head_bytes:
                self.refuse(431, f"the request's head is longer than {self.limits.head_bytes} bytes")

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes, self._begun = True, 0, True
        self._until = time.monotonic() + self.limits.header
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._until = time.monotonic() + self.limits.body
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._until, self._begun = None, False
        super().on_message_complete()

    def pause_writing(self) -> None:
        self._stalled = time.monotonic() + self.limits.body
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalled = None
        super().resume_writing()

    def check(self, now: float) -> None:
        """Close the connection if its client is late."""
        if self.transport is None or self.transport.is_closing():
            if self._stalled is not None and now > self._stalled:
                self.transport.abort()
            return
        if self._stalled is not None and now > self._stalled:
            self.transport.abort()  # it does not take its answer
        elif self._until is not None and now > self._until:
            if self.pipeline:  # more requests at once than are answered at a time: the wait is ours
                self._until = now + self.limits.body
            elif not self._begun or (self.cycle is not None and not self._in_head and self.cycle.response_started):
                self.transport.close()
            else:
                part = "head" if self._in_head else "body"
                seconds = self.limits.header if self._in_head else self.limits.body
                self.refuse(408, f"the request's {part} did not arrive within {seconds:g} seconds")

    def refuse(self, status: int, message: str) -> None:
        """Answer what cannot become a request, and close."""
        body = error_body(message)
        retry = "retry-after: 1\r\n" if status == 503 else ""
        head = (
            f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            f"{retry}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)


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
