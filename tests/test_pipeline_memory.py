"""Keeping freed memory while preparing changes no result, ends with errors too, and asks nothing of other C libraries."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from bitdial.pipeline import kept_memory


class _Library:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def mallopt(self, name: int, value: int) -> None:
        self.calls.append((name, value))

    def malloc_trim(self, pad: int) -> None:
        self.calls.append(("trim", pad))


def test_memory_is_kept_within_and_given_back_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    library = _Library()
    monkeypatch.setattr(kept_memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    with pytest.raises(KeyError), kept_memory.kept_memory():
        assert library.calls == [(-3, kept_memory.LARGE), (-1, 2**31 - 1)]
        raise KeyError
    assert library.calls[2:] == [(-3, 32 << 20), (-1, 64 << 20), ("trim", 0)]


def test_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("nothing is asked for"))
    with kept_memory.kept_memory():
        pass
