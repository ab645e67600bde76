"""Writing a file so that it is there whole or not at all, and the folder of what can be made again."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from bitdial.errors import OutputError

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space there, or choose a place on another disk",
    errno.EDQUOT: "your share of the disk is used up: free some space there, or choose a place on another disk",
    errno.EFBIG: "the file would be larger than the file system or a limit (ulimit -f) allows: raise it, or choose another disk",
    errno.EROFS: "the file system cannot be written to: choose a place on another one",
    errno.EACCES: "choose a folder that you may write to, or change its permissions",
    errno.EPERM: "choose a folder that you may write to, or change its permissions",
    errno.ENOENT: "create the folder first, or choose one that exists",
    errno.ENOTDIR: "a part of the path is no folder: choose a folder that exists",
    errno.EEXIST: "a file of that name is there: choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "too many files are open: close some, or raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine: close some",
    errno.EIO: "the disk reports a fault: check it, or choose a place on another one",
}


def remedy(error: Exception) -> str:
    """What to do about an error of writing a file or making a folder."""
    code = error.errno if isinstance(error, OSError) else None
    return _REMEDIES.get(code or 0, "choose a folder that exists and that you may write to")


def cache_folder() -> Path:
    """Where what can be made again is kept: BITDIAL_CACHE_DIR, else $XDG_CACHE_HOME/bitdial, else ~/.cache/bitdial."""
    own = os.environ.get("BITDIAL_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "bitdial"


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
        raise OutputError(f"cannot write {named}: {error}; {remedy(error)}") from error
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
