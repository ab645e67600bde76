"""Folders that an export writes into: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bitdial.errors import OutputError
from bitdial.files import remedy, write_atomically


def check_folder(folder: Path, force: bool) -> None:
    """Raise OutputError if files cannot go to `folder`, or (unless `force`) if it holds any."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise OutputError(f"-o {folder} is a file; give the name of a folder")
    if folder.is_dir():
        if any(folder.iterdir()) and not force:
            raise OutputError(f"{folder} holds files already; give another folder, or --force to write into it")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write to {folder}; choose another folder")
        return
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise OutputError(f"-o {folder}: folder {parent} does not exist; create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write to {parent}; choose another folder")


def write_files(files: Mapping[str, bytes], folder: Path, force: bool = False) -> list[Path]:
    """Write the files: a new folder appears whole or not at all; in one that is there, each file is replaced in one step.
    Raises OutputError."""
    check_folder(folder, force)
    if not folder.exists():
        try:
            temporary = Path(
                tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=".part", dir=folder.absolute().parent)
            )
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error}; {remedy(error)}") from error
        try:
            temporary.chmod(0o777 & ~_mask())
            for file, data in files.items():
                write_atomically(temporary / file, data)
            os.rename(temporary, folder)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"cannot write {folder}: {error}; {remedy(error)}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    else:
        for file, data in files.items():
            write_atomically(folder / file, data)
    return [folder / file for file in files]


def _mask() -> int:
    """The process's mask of permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
