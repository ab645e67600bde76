"""A model file that stays the same file for as long as it is served, whatever happens at its path."""

from __future__ import annotations

import os
import stat

from bitdial.errors import ArtifactError


class ModelFile:
    """An open model file. Workers that are started again later read it through this descriptor: a file that has since been
    put in its place (by renaming, as bitdial's `save` does) is not taken for it.

    Raises ArtifactError if the path is no readable regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            # Not waiting for the other end, should it be a pipe.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise ArtifactError(f"{path}: cannot be read ({error}); check the path and its permissions") from error
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            self.close()
            raise ArtifactError(f"{path}: no regular file; give the path of a .bitdial file")

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def close(self) -> None:
        """May be called more than once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_descriptor(descriptor: int, path: str) -> bytes:
    """All bytes of an open file, without moving its position (others read through it too). Raises ArtifactError."""
    pieces, at = [], 0
    try:
        while piece := os.pread(descriptor, 1 << 24, at):
            pieces.append(piece)
            at += len(piece)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); get a sound copy of the file") from error
    return b"".join(pieces)
