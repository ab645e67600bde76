"""Memory that is freed between the steps of a preparation, and taken again right away."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
LARGE = 1 << 30  # bytes of an array that is still taken from the heap
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_USUAL_TRIM, _USUAL_MMAP = 64 << 20, 32 << 20  # where glibc's own adjustment of both ends


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within, large arrays come from malloc's heap, which keeps what is freed; afterwards it gives it back.

    Else glibc maps every large array anew, and the kernel zeroes its pages as they are touched: EfficientNet-Lite0 is prepared in
    21 instead of 25 s, ResNet-50 in 62 instead of 67 (AMD Zen 5, two threads), at the same peak. With another C library nothing
    changes. The setting is the process's.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, LARGE)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL_MMAP)
        libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
        libc.malloc_trim(0)


def keeping_memory(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run with kept memory. (A context manager as a decorator would put a frame of the standard library between
    bitdial's, and warnings are given at the first line outside of bitdial.)"""

    @wraps(function)
    def run(*arguments: P.args, **named: P.kwargs) -> R:
        with kept_memory():
            return function(*arguments, **named)

    return run
