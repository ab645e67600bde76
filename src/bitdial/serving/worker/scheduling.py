"""How long the system lets a process run before another that has just woken gets its turn."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys

_SYSCALL = {"x86_64": 314, "aarch64": 274}  # sched_setattr
FRONT_SLICE = 100_000  # nanoseconds, the least that Linux takes
ENGINE_SLICE = 4_000_000


class _Attributes(ctypes.Structure):
    """struct sched_attr, first version."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("policy", ctypes.c_uint32),
        ("flags", ctypes.c_uint64),
        ("nice", ctypes.c_int32),
        ("priority", ctypes.c_uint32),
        ("runtime", ctypes.c_uint64),
        ("deadline", ctypes.c_uint64),
        ("period", ctypes.c_uint64),
    )


def set_slice(nanoseconds: int) -> bool:
    """Ask for time slices of this length for the calling thread; whether the system took it.

    On a core that server and engine share, Linux (since 6.6) lets the engine finish its slice, about 3 ms, before a server that
    has a request to read or an answer to send is woken. A thread with a shorter slice goes first (since 6.12) and gets no more
    time in all; so the server asks for short ones. Older kernels ignore the value; other systems have nothing like it.
    """
    number = _SYSCALL.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return False
    with contextlib.suppress(OSError, AttributeError):
        attributes = _Attributes(
            size=ctypes.sizeof(_Attributes), nice=os.getpriority(os.PRIO_PROCESS, 0), runtime=nanoseconds
        )
        status: int = ctypes.CDLL(None).syscall(number, 0, ctypes.byref(attributes), 0)
        return status == 0
    return False
