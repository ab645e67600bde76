"""Result files: rows by name, each with the settings it was measured under; written whole after every row."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitdial
from bitdial.errors import DataError, OutputError
from bitdial.files import write_atomically

FORMAT = 1
# Source files that can change a figure; serving, report, command line and the like cannot.
_NUMERIC_PARTS = (
    "graph", "quantization", "layout", "selection", "artifact", "engines", "finetuning", "benchmarking", "zoo", "pipeline",
)  # fmt: skip


def settings_hash(settings: dict[str, Any]) -> str:
    """16 hex digits over JSON-able settings; equal settings give equal digits, in any order of keys."""
    text = json.dumps(settings, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_hash() -> str:
    """16 hex digits over the package's sources that compute figures."""
    root, guests = Path(bitdial.__file__).resolve().parent, Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for folder in (*(root / part for part in _NUMERIC_PARTS), guests / "comparison", guests / "language"):
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu")):
            digest.update(f"{folder.name}/{path.relative_to(folder)}".encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class ResultFile:
    """One JSON file: {"format", "benchmark", "machine", "rows": {name: row}}.

    A row carries "settings", "hash" (of the settings), "code" (of the sources), "machine", "finished" (UTC) beside its
    figures. Raises DataError for a file that is not one of these, OutputError where it cannot be written.
    """

    def __init__(self, path: Path, benchmark: str, machine: dict[str, Any], *, fresh: bool = False) -> None:
        self.path, self.benchmark, self.machine = path, benchmark, machine
        self.code = code_hash()
        self.rows: dict[str, dict[str, Any]] = {}
        self.fresh = fresh
        if path.exists() and not fresh:
            self.rows = read_rows(path, benchmark)

    def find(self, name: str, settings: dict[str, Any], *, changed: bool = False) -> dict[str, Any] | None:
        """The row measured under just these settings, or None.

        changed: a row measured with other sources of the package counts as missing.
        """
        row = self.rows.get(name)
        if row is None or row.get("hash") != settings_hash(settings):
            return None
        return None if changed and row.get("code") != self.code else row

    def stale(self) -> list[str]:
        """Names of the rows measured with other sources of the package."""
        return [name for name, row in self.rows.items() if row.get("code") != self.code]

    def put(self, name: str, settings: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
        """Add a row, or replace the one of that name, and write the file."""
        row = {
            "settings": settings,
            "hash": settings_hash(settings),
            "code": self.code,
            "machine": self.machine,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **figures,
        }
        self.rows[name] = row
        self.write()
        return row

    def write(self) -> None:
        """Replace the file in one step, so that an interrupted run leaves the last complete one."""
        content = {"format": FORMAT, "benchmark": self.benchmark, "machine": self.machine, "rows": self.rows}
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, text.encode())
        except (OSError, OutputError) as error:
            raise OutputError(
                f"{self.path} cannot be written ({error}); choose another folder with --results"
            ) from error

    def measure(
        self,
        name: str,
        settings: dict[str, Any],
        measure: Callable[[], dict[str, Any]],
        *,
        changed: bool = False,
    ) -> tuple[dict[str, Any], bool]:
        """(row, whether it was measured now): the row of the file if there is one, else what `measure` returns."""
        row = self.find(name, settings, changed=changed)
        if row is not None:
            return row, False
        return self.put(name, settings, measure()), True


def read_rows(path: Path, benchmark: str) -> dict[str, dict[str, Any]]:
    """The rows of a result file. Raises DataError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable result file ({error}); start over with --fresh") from error
    if not isinstance(content, dict) or content.get("benchmark") != benchmark or content.get("format") != FORMAT:
        raise DataError(f"{path} is not a result file of '{benchmark}' in format {FORMAT}; start over with --fresh")
    rows = content.get("rows")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise DataError(f"{path} has no rows; start over with --fresh")
    return rows
