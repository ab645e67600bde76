"""Writing a file so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bitdial.errors import OutputError


def write_atomically(path: str | os.PathLike[str], data: bytes, what: str = "") -> None:
    """Write `data` to `path`, replacing a file there in one step.

    what: said of the file in messages ("the search checkpoint"). As `open_atomically` otherwise.
    """
    with open_atomically(path, what) as stream:
        stream.write(data)


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike[str], what: str = "") -> Iterator[BinaryIO]:
    """A binary stream whose content is at `path` once the block has ended well, replacing a file there in one step.

    A temporary file in the same folder, fsync, rename, fsync of the folder; on failure the temporary file is removed
    and what was at `path` is untouched. Raises OutputError naming the path.
    """
    named = f"{what} {path}" if what else f"{path}"
    temporary: str | None = None
    try:
        target = Path(os.path.realpath(path))  # the file that a link points to, so that the link stays
        if target.exists() and not target.is_file():
            raise OutputError(f"cannot write {named}: it is no regular file; give the name of a file")
        name = target.parent / f".{target.name[:100]}.{secrets.token_hex(8)}.part"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        descriptor = os.open(name, flags, 0o666)  # less the process's mask, as for any new file
        temporary = str(name)
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise OutputError(
            f"cannot write {named}: {error}; choose a folder that exists and that you may write to"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
