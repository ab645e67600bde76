"""Waking an event loop at an exact time.

The timers of asyncio and uvloop go by whole milliseconds (they round up what they hand to epoll). On Linux a timer of the
kernel's own, waited for like a socket, is exact to some tens of microseconds and burns no time; elsewhere the loop's timer
is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable

_CLOCK_MONOTONIC = 1  # the clock of time.monotonic on Linux
_ABSOLUTE = 1
_FLAGS = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0) if sys.platform == "linux" else 0


class _TimeSpec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _TimerSpec(ctypes.Structure):
    _fields_ = [("interval", _TimeSpec), ("value", _TimeSpec)]


class LoopTimer:
    """Calls `callback` once per `set`, in the event loop, at a time of time.monotonic."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self.loop, self.callback = loop, callback
        self._handle: asyncio.TimerHandle | None = None
        self._descriptor = -1
        self._spec = _TimerSpec()
        if sys.platform == "linux":
            self._library = ctypes.CDLL(None, use_errno=True)
            with contextlib.suppress(AttributeError):  # a C library without it
                self._descriptor = self._library.timerfd_create(_CLOCK_MONOTONIC, _FLAGS)
        self.exact = self._descriptor >= 0  # whether the kernel's timer is used
        if self.exact:
            loop.add_reader(self._descriptor, self._ready)

    def set(self, when: float) -> None:
        """Call back at `when`; replaces what was set before."""
        if self._descriptor < 0:
            self.cancel()
            self._handle = self.loop.call_later(max(0.0, when - time.monotonic()), self.callback)
            return
        nanoseconds = max(1, int(when * 1e9))  # zero would disarm it
        self._spec.value.seconds, self._spec.value.nanoseconds = divmod(nanoseconds, 1_000_000_000)
        self._library.timerfd_settime(self._descriptor, _ABSOLUTE, ctypes.byref(self._spec), None)

    def cancel(self) -> None:
        """Take back what was set."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        elif self._descriptor >= 0:
            self._spec.value.seconds = self._spec.value.nanoseconds = 0
            self._library.timerfd_settime(self._descriptor, _ABSOLUTE, ctypes.byref(self._spec), None)

    def close(self) -> None:
        """Free the timer."""
        self.cancel()
        if self._descriptor >= 0:
            self.loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _ready(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 8)
            self.callback()
