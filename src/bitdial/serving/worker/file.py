"""A model file that stays the same file for as long as it is served, whatever happens at its path."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterable, Iterator

from bitdial.errors import ArtifactError

_PIECE = 1 << 24  # bytes
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class ModelFile:
    """The bytes that a model file has now, in memory that nobody can change: workers that are started again later read them
    through this descriptor, whether another file has since been put in its place, or other bytes into it.

    They take memory of the file's size, once for all workers of the model. Raises ArtifactError if the path is no readable
    regular file, or there is no room for its bytes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self._descriptor = os.fspath(path), -1
        source = -1
        try:
            # Not waiting for the other end, should it be a pipe.
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(source).st_mode):
                raise ArtifactError(f"{path}: no regular file; give the path of a .bitdial file")
            if _is_sealed(source):  # it is such memory already
                self._descriptor, source = source, -1
            else:
                self._descriptor = sealed_memory(os.path.basename(self.path), _pieces(source))
        except (OSError, ValueError) as error:  # ValueError: a path with a null character
            raise ArtifactError(f"{path}: cannot be read ({error}); check the path and its permissions") from error
        finally:
            if source >= 0:
                os.close(source)

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def close(self) -> None:
        """May be called more than once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def sealed_memory(name: str, pieces: Iterable[bytes]) -> int:
    """Descriptor of an anonymous file with these bytes, which stay as they are; it goes away with the last descriptor. `name` is
    for people. Raises OSError."""
    descriptor = anonymous_file(name)
    try:
        for piece in pieces:
            view = memoryview(piece)
            while view:
                view = view[os.write(descriptor, view) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def anonymous_file(name: str) -> int:
    """Descriptor of an empty file in memory that can be sealed. `name` is for people, and may be long. Raises OSError."""
    short = os.fsdecode(os.fsencode(name)[:100])  # in bytes: the system takes 249 in all
    return os.memfd_create(f"bitdial-{short}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def _is_sealed(descriptor: int) -> bool:
    try:
        return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:  # on a disk
        return False


def _pieces(descriptor: int) -> Iterator[bytes]:
    """All bytes of an open file, without moving its position (others read through it too)."""
    at = 0
    while piece := os.pread(descriptor, _PIECE, at):
        yield piece
        at += len(piece)


def read_descriptor(descriptor: int, path: str) -> bytes:
    """All bytes of an open file. Raises ArtifactError."""
    try:
        return b"".join(_pieces(descriptor))
    except OSError as error:
        raise ArtifactError.damaged(path, f"cannot be read ({error})") from error
