"""A model file's bytes on the cluster, for nodes that cannot read it at its path."""

from __future__ import annotations

import os

from bitdial.serving.worker.file import sealed_memory

STORES = "bitdial"  # Ray's namespace of these actors


class ModelStore:
    """Holds the bytes for as long as the application runs; a Ray actor without a CPU of its own.

    An actor, and not a bare object reference: an object is lost with the process that put it there, and the one that deploys may
    end long before the last replica starts.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data

    def fetch(self) -> bytes:
        """The file's bytes."""
        return self._data


def store_name(application: str, digest: str) -> str:
    """Of the actor that holds an application's model file with that sha256."""
    return f"model of {application} {digest}"


class MemoryFile:
    """Bytes that can be opened at a path for as long as this object lives, and lie on no disk (Linux)."""

    def __init__(self, data: bytes, name: str) -> None:
        self._descriptor = sealed_memory(name, [data])  # sealed, so that the workers need no copy of their own

    @property
    def path(self) -> str:
        """In this process only."""
        return f"/proc/self/fd/{self._descriptor}"

    def close(self) -> None:
        """May be called more than once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
