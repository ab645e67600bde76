"""Messages between a worker's process and the server's: JSON objects behind a 4-byte length, over a pair of connected sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

_LENGTH = struct.Struct("<I")
LARGEST = 64 << 20  # bytes; a longer frame means that the other side has lost its mind
_PIECE = 1 << 16


class FrameError(Exception):
    """Bytes that are no frame."""


def encode(message: Message) -> bytes:
    """A frame."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(text)) + text


class Decoder:
    """Frames out of bytes that come in pieces."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are complete now. Raises FrameError."""
        data = self._rest + data if self._rest else data
        messages: list[Message] = []
        at = 0
        while len(data) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, at)
            if length > LARGEST:
                raise FrameError(f"a frame of {length} bytes")
            end = at + _LENGTH.size + length
            if len(data) < end:
                break
            try:
                message = json.loads(data[at + _LENGTH.size : end])
            except (ValueError, RecursionError) as error:
                raise FrameError(f"a frame that is no JSON: {error}") from error
            if not isinstance(message, dict):
                raise FrameError("a frame that is no object")
            messages.append(message)
            at = end
        self._rest = data[at:]
        return messages


class BlockingFrames:
    """A worker's end."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._decoder = sock, Decoder()
        self._ready: list[Message] = []

    def send(self, message: Message) -> None:
        """Raises OSError if the other side has gone."""
        self._socket.sendall(encode(message))

    def receive(self) -> Message | None:
        """The next message; None once the other side has gone."""
        while not self._ready:
            try:
                data = self._socket.recv(_PIECE)
            except ConnectionError:
                return None
            if not data:
                return None
            self._ready = self._decoder.feed(data)
        return self._ready.pop(0)


class AsyncFrames:
    """The server's end, on the running event loop.

    on_message(message) and on_close(reason) are called from the loop, the latter once: the other side has gone (reason "") or
    speaks no frames. Not after `close`.
    """

    def __init__(
        self, sock: socket.socket, on_message: Callable[[Message], None], on_close: Callable[[str], None]
    ) -> None:
        sock.setblocking(False)
        self._socket, self._decoder, self._out = sock, Decoder(), b""
        self._on_message, self._on_close = on_message, on_close
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self.read)
        self._open = True

    def read(self) -> None:
        """Take what has come; the loop calls it when something has."""
        if not self._open:
            return
        try:
            data = self._socket.recv(_PIECE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            return self._gone("")
        try:
            messages = self._decoder.feed(data)
        except FrameError as error:
            return self._gone(f"it sent {error}")
        for message in messages:
            self._on_message(message)

    def send(self, message: Message) -> None:
        """Queue a message; it leaves at once unless the socket is full. A lost connection is told by on_close, soon."""
        data = encode(message)
        if self._out:
            self._out += data
            return
        self._out = self._push(data)
        if self._out:
            self._loop.add_writer(self._socket.fileno(), self._write)

    def _push(self, data: bytes) -> bytes:
        """Send what the socket takes; the rest."""
        try:
            sent = self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return data
        except OSError:
            self._loop.call_soon(self._gone, "")
            return b""
        return data[sent:]

    def _write(self) -> None:
        if not self._open:
            return
        self._out = self._push(self._out)
        if not self._out:
            self._loop.remove_writer(self._socket.fileno())

    def _gone(self, reason: str) -> None:
        if self._open:
            self.close()
            self._on_close(reason)

    def close(self) -> None:
        """Close the socket, which ends the worker."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
