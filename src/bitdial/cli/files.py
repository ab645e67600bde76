"""Files that a command writes: their places are checked before long work begins, and at its end all are written or none."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bitdial.cli.terminal import plain
from bitdial.errors import ConfigError, OutputError
from bitdial.files import remedy

_DRAWN = ("--plot", "--png")
_REPLACED = {"--output": (".json",), "--save-schedule": (".json",), "--html": (".html", ".htm")}


def check_output(path: Path, force: bool, option: str = "-o") -> None:
    """Raise OutputError, naming the remedy, if a file cannot be put at `path` or is there already (unless `force`)."""
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder; give the name of a file")
    if os.path.lexists(path) and not force:
        raise OutputError(f"{path} exists already; give another name, or --force to replace it")
    check_folder(path.absolute().parent, option)


def check_outputs(**outputs: Path | None) -> None:
    """Raise OutputError or ConfigError early if the file of an option (by its name) could not be written or drawn, or if two are
    the same. Pictures, pages and figures are made again and again: a former one is replaced without asking.
    """
    given = {f"--{name.replace('_', '-')}": path for name, path in outputs.items() if path is not None}
    if len({path.absolute() for path in given.values()}) < len(given):
        raise ConfigError(f"two of {', '.join(given)} name the same file; give each its own")
    for option, path in given.items():
        if option in _DRAWN:
            from bitdial.report.drawing import check_plot_path

            check_plot_path(path, option)
        check_output(path, force=option in _DRAWN or path.suffix.lower() in _REPLACED.get(option, ()), option=option)


def write_made(*outputs: tuple[Path | None, Callable[[], Any]]) -> list[Path]:
    """Make what was asked for (a path, and what makes its text, bytes, picture or JSON-able object), then write all files or
    none; returns them. Raises OutputError, ConfigError."""
    from bitdial.report.drawing import Chart, plot_for
    from bitdial.report.writing import write_files

    contents: dict[Path, bytes] = {}
    for path, make in outputs:
        if path is not None:
            made = make()
            if isinstance(made, Chart):
                made = plot_for(made, path)
            elif isinstance(made, Mapping):
                made = json.dumps(plain(made), allow_nan=False, indent=1) + "\n"
            contents[path] = made.encode() if isinstance(made, str) else made
    return write_files(contents)


def check_folder(folder: Path, option: str) -> None:
    """Raise OutputError if files cannot be created in `folder`."""
    if not folder.is_dir():
        raise OutputError(f"{option}: folder {folder} does not exist; create it first")
    probe = folder / f".bitdial-{secrets.token_hex(8)}.tmp"  # permission bits do not tell of read-only file systems
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{option}: cannot write to {folder} ({error.strerror or error}); {remedy(error)}") from error


def make_folder(folder: Path, option: str) -> None:
    """Create `folder` if need be and check that files can be put there. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{option}: cannot create folder {folder} ({error.strerror or error}); {remedy(error)}"
        ) from error
    check_folder(folder, option)
