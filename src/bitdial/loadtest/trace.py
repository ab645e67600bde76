"""Reading traces of arrival times."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

from bitdial.errors import DataError
from bitdial.loadtest.arrivals import MOST_ARRIVALS, Times

COLUMN = "arrival_s"
MOST_BYTES = 512 << 20
_WIDEST = 1 << 16  # characters of the first line; longer ones are no CSV header


def read_trace(path: str | os.PathLike[str]) -> Times:
    """Arrival times of a text file: CSV with a header that names a column `arrival_s`, or plainly one number a line.

    Seconds, float64, ascending; unsorted ones are sorted. Empty lines and lines that begin with # are passed over.
    Raises DataError, naming the file and what is wrong: missing, empty, too large, not text, no such column, something that
    is no number, or one that is negative or not finite.
    """
    place = Path(path)
    try:
        size = place.stat().st_size
        if not place.is_file():
            raise DataError(f"{place} is no file; give a CSV file of arrival times")
        if size > MOST_BYTES:
            raise DataError(
                f"{place} has {size / 1e6:.0f} MB; traces of up to {MOST_BYTES / 1e6:.0f} MB are read: cut it"
            )
        text = place.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{place} is no text file; a trace is CSV with a column {COLUMN}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read the trace {place}: {error}") from error
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise DataError(f"{place} is empty; a trace needs at least one arrival time")
    column = 0
    if not _is_number(lines[0].split(",")[0]):
        names = [name.strip() for name in next(csv.reader([lines[0][:_WIDEST]]))]
        if COLUMN not in names:
            shown = ", ".join(names[:8])[:200]
            raise DataError(
                f"{place} has no column {COLUMN} (its first line: {shown}); name the column of times so, in seconds"
            )
        column, lines = names.index(COLUMN), lines[1:]
        if not lines:
            raise DataError(f"{place} has a header and no arrival times")
    elif "," in lines[0].strip().rstrip(","):
        raise DataError(
            f"{place} has several columns and no header; begin it with a line that names the column {COLUMN}"
        )
    if len(lines) > MOST_ARRIVALS:
        raise DataError(f"{place} has {len(lines):,} arrivals; up to {MOST_ARRIVALS:,} are read: cut it")
    try:
        times = np.loadtxt(
            lines, dtype=np.float64, delimiter=",", usecols=column, comments=None, quotechar='"', ndmin=1
        )
    except (ValueError, IndexError, TypeError) as error:
        raise DataError(f"{place} holds something that is no arrival time: {error}") from None
    bad = np.flatnonzero(~(np.isfinite(times) & (times >= 0)))
    if len(bad):
        k = int(bad[0])
        raise DataError(
            f"{place}: arrival {k + 1} is {times[k]:g} ({len(bad)} like it); times are seconds, 0 or more, and finite"
        )
    return np.sort(times) + 0.0  # -0.0 becomes 0.0


def _is_number(text: str) -> bool:
    try:
        float(text.strip().strip('"'))
    except ValueError:
        return False
    return True
