"""Writing a report: the page, and on request its plots as PNG and its tables as CSV."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from bitdial.errors import OutputError
from bitdial.files import remedy, write_atomically
from bitdial.report.charts import render_plots
from bitdial.report.data import ReportData
from bitdial.report.page import render_html
from bitdial.report.tables import csv_tables

AnyPath = str | os.PathLike[str]


def write_report(
    data: ReportData, path: AnyPath, png_dir: AnyPath | None = None, csv_dir: AnyPath | None = None
) -> list[Path]:
    """Write the report as one HTML file to `path`; returns the files written, the page first.

    png_dir   folder for the plots (`plots.render_plots` lists them), made if need be
    csv_dir   folder for the tables (`tables.csv_tables`), UTF-8, made if need be

    Everything is drawn before the first file is written, and each file is there whole or not at all. Files of these
    names are replaced, others in the folders are left alone.
    Raises OutputError if a file cannot be written, and then takes away what this call had made; ConfigError if plots
    are asked for and matplotlib is missing.
    """
    contents = {Path(path): render_html(data).encode()}
    if png_dir is not None:
        contents.update({Path(png_dir) / name: image for name, image in render_plots(data).items()})
    if csv_dir is not None:
        contents.update({Path(csv_dir) / name: text.encode() for name, text in csv_tables(data).items()})
    with contextlib.ExitStack() as undo:
        for folder in (png_dir, csv_dir):
            if folder is not None:
                _make_folder(Path(folder), undo)
        write_files(contents)
        undo.pop_all()  # all went well: nothing to take away
    return list(contents)


def write_files(contents: Mapping[Path, bytes]) -> list[Path]:
    """Write each file whole; returns them in order. Raises OutputError, and then takes away the new ones among those
    written before (a file that was replaced stays replaced)."""
    with contextlib.ExitStack() as undo:
        for target, content in contents.items():
            is_new = not os.path.lexists(target)
            write_atomically(target, content)
            if is_new:
                undo.callback(_remove_file, target)
        undo.pop_all()
    return list(contents)


def _make_folder(folder: Path, undo: contextlib.ExitStack) -> None:
    """Create `folder` and its parents; those that are new are removed again, if still empty, by `undo`."""
    try:
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        for place in reversed(missing):
            place.mkdir(exist_ok=True)
            undo.callback(_remove_folder, place)
        if not folder.is_dir():
            raise OutputError(f"cannot write into {folder}: it is no folder; give the name of a folder")
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise OutputError(f"cannot create folder {folder}: {error}; {remedy(error)}") from error


def _remove_file(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _remove_folder(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()
