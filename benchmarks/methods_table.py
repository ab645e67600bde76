"""Tables of the comparison of methods: methods as rows, average widths as columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from comparison import get_method
from measure import unpack_flags
from methods_rows import AVERAGES, Row, all_rows, seeded

Rows = Mapping[str, Mapping[str, Any]]  # stored row name -> row
REFERENCES = ("bitdial", "bitdial_finetuned")
WHOLE_WIDTHS = "*: 5 or 6 bits everywhere, which needs multiplies of that width; the others mix 4 and 8 bits"
HEAD = ["method", *(f"{b:g} bits" for b in AVERAGES), "preparation, s", "switched by", "memory of switching, KiB"]


def measured(rows: Rows, name: str, seeds: Sequence[int]) -> list[Mapping[str, Any]]:
    """The rows of a method over the seeds that were measured."""
    return [rows[seeded(name, s)] for s in seeds if seeded(name, s) in rows]


def point_of(row: Mapping[str, Any], bits: float) -> Mapping[str, Any] | None:
    found = [p for p in row["points"] if math.isclose(p["asked"], bits)]
    return found[0] if found else None


def flags_of(row: Mapping[str, Any], bits: float) -> npt.NDArray[np.float64] | None:
    """float64 [n]: 1 where the image was right."""
    found = point_of(row, bits)
    return None if found is None else unpack_flags(found["correct"], int(row["samples"])).astype(np.float64)


def seed_error(values: Sequence[float] | npt.NDArray[np.float64]) -> float:
    """Standard error of the mean over seeds; 0 for one seed."""
    v = np.asarray(values, np.float64)
    return float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else 0.0


def accuracy_cell(found: Sequence[Mapping[str, Any]], bits: float) -> str:
    """ "86.47 ± 0.05 (4.94)": mean accuracy over seeds in percent, its standard error, the average width if it is not `bits`."""
    points = [p for p in (point_of(row, bits) for row in found) if p is not None]
    if not points:
        return "-"
    values = [100 * p["accuracy"] for p in points]
    reached = float(np.mean([p["reached"] for p in points]))
    text = f"{np.mean(values):.2f}" + (f" ± {seed_error(values):.2f}" if len(values) > 1 else "")
    return text if abs(reached - bits) < 0.02 else f"{text} ({reached:.2f})"


def difference(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], bits: float
) -> tuple[float, float] | None:
    """(mean, standard error) of accuracy a - b on the same images, averaged over the seeds that both have.

    The error joins images (variance over images of the seeds' mean difference) and seeds (variance over seeds), as if
    they were independent: the images of all seeds are the same, so the parts overlap and the error is rather too large.
    """
    pairs = []
    for row in a:
        other = [r for r in b if r["seed"] == row["seed"] and r["samples"] == row["samples"]]
        flags = flags_of(row, bits), flags_of(other[0], bits) if other else None
        if flags[0] is not None and flags[1] is not None:
            pairs.append(flags[0] - flags[1])
    if not pairs:
        return None
    per_image = np.mean(pairs, axis=0)
    images = per_image.std(ddof=1) / math.sqrt(len(per_image)) if len(per_image) > 1 else 0.0
    return float(per_image.mean()), float(math.hypot(images, seed_error([p.mean() for p in pairs])))


def difference_cell(found: tuple[float, float] | None) -> str:
    return "-" if found is None else f"{100 * found[0]:+.2f} ± {100 * found[1]:.2f}"


def table_rows(rows: Rows, seeds: Sequence[int]) -> list[list[str]]:
    """Lines under HEAD. Methods that no engine executes say so in their labels."""
    lines = []
    if "float32" in rows:
        lines.append(["float32", f"{100 * rows['float32']['accuracy']:.2f}", *[""] * (len(HEAD) - 2)])
    for row in all_rows():
        found = measured(rows, row.name, seeds)
        if not found:
            continue
        last = found[0]["switching"]
        how = {"tables": "tables", "fixed": "another copy"}[last["how"]]
        lines.append(
            [
                row.label,
                *(accuracy_cell(found, b) + _star(row, found, b) for b in AVERAGES),
                f"{np.mean([r['prepare_seconds'] for r in found]):.0f}",
                how,
                f"{last['bytes'] / 1024:.0f}",
            ]
        )
    return lines


def _star(row: Row, found: Sequence[Mapping[str, Any]], bits: float) -> str:
    """Marks averages that are a width of every layer."""
    whole = get_method(row.method).widths == "uniform" and 4 < bits < 8
    return "*" if whole and any(point_of(r, bits) is not None for r in found) else ""


def gap_rows(rows: Rows, seeds: Sequence[int], reference: str = "bitdial") -> list[list[str]]:
    """Accuracy of `reference` minus that of every other method, points, paired by image and seed."""
    own = measured(rows, reference, seeds)
    lines = []
    for row in _others(reference):
        found = measured(rows, row.name, seeds)
        cells = [difference_cell(difference(own, found, b)) for b in AVERAGES]
        if own and found and any(c != "-" for c in cells):
            lines.append([row.label, *cells])
    return lines


def float_rows(rows: Rows, seeds: Sequence[int]) -> list[list[str]]:
    """Difference to float32 in points: mean over seeds and the paired standard error per image (mean over seeds)."""
    lines = []
    for row in all_rows():
        cells = []
        for b in AVERAGES:
            points = [p for p in (point_of(r, b) for r in measured(rows, row.name, seeds)) if p is not None]
            if not points:
                cells.append("-")
                continue
            mean = np.mean([p["to_float"] for p in points])
            error = np.mean([p["to_float_standard_error"] for p in points])
            cells.append(difference_cell((float(mean), float(error))))
        if any(c != "-" for c in cells):
            lines.append([row.label, *cells])
    return lines


def _others(reference: str) -> list[Row]:
    return [row for row in all_rows() if row.name != reference]


def markdown(network: str, rows: Rows, seeds: Sequence[int], note: str) -> str:
    """The tables of one network for the documentation."""

    def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
        return [
            "| " + " | ".join(head) + " |",
            "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|",
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
        ]

    widths = [f"{b:g} bits" for b in AVERAGES]
    parts = [f"**{network}**: top-1 accuracy, %", "", *table(HEAD, table_rows(rows, seeds))]
    for reference in REFERENCES:
        gaps = gap_rows(rows, seeds, reference)
        if gaps:
            parts += [f"{get_method(reference).label} minus each method, points", "", *table(["method", *widths], gaps)]
    return "\n".join([*parts, note, ""])
