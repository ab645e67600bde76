"""Tables of the accuracy benchmark's rows: networks as columns, configurations as rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from accuracy_rows import SEEDS, accuracy_rows, default_of
from measure import paired_difference, unpack_flags

Rows = Mapping[str, Mapping[str, Any]]  # row name -> row as in a result file


def entry(row: Mapping[str, Any] | None, ratio: float) -> Mapping[str, Any] | None:
    """The figures of a row at a ratio."""
    if row is None:
        return None
    found: list[Mapping[str, Any]] = [e for e in row.get("ratios", []) if math.isclose(e["ratio"], ratio)]
    return found[0] if found else None


def accuracy_text(row: Mapping[str, Any] | None, ratios: Sequence[float]) -> str:
    """ "87.31 / 86.02": accuracy in percent at the ratios; a dash where it was not measured."""
    found = [entry(row, ratio) for ratio in ratios]
    if all(e is None for e in found):
        return "-"
    return " / ".join("-" if e is None else f"{100 * e['accuracy']:.2f}" for e in found)


def difference_text(row: Mapping[str, Any] | None, ratio: float) -> str:
    """Difference to float in points and its paired standard error."""
    found = entry(row, ratio)
    if found is None:
        return "-"
    return f"{100 * found['to_float']:+.2f} ± {100 * found['to_float_standard_error']:.2f}"


def seed_statistics(rows: Rows, name: str, ratio: float) -> tuple[float, float, int] | None:
    """(mean accuracy, standard error of the mean over seeds, seeds) of a row and its repeats; None below two seeds."""
    names = [name, *(f"{name}.seed{seed}" for seed in SEEDS)]
    found = [e for e in (entry(rows.get(n), ratio) for n in names) if e is not None]
    if len(found) < 2:
        return None
    values = np.array([float(e["accuracy"]) for e in found])
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))), len(values)


def seed_mean(values: Sequence[float] | npt.NDArray[np.float64], digits: int) -> str:
    """ "0.1234 ± 0.0012": mean and standard error of the mean over seeds (the mean alone for one seed)."""
    v = np.asarray(values, dtype=np.float64)
    if len(v) < 2:
        return f"{v.mean():.{digits}f}"
    return f"{v.mean():.{digits}f} ± {v.std(ddof=1) / math.sqrt(len(v)):.{digits}f}"


def compared(row: Mapping[str, Any], other: Mapping[str, Any], ratio: float) -> tuple[float, float] | None:
    """(difference in accuracy row - other, paired standard error) on the same images; None if they were others."""
    a, b = entry(row, ratio), entry(other, ratio)
    if a is None or b is None or row.get("samples") != other.get("samples"):
        return None
    n = int(row["samples"])
    return paired_difference(unpack_flags(a["correct"], n), unpack_flags(b["correct"], n))


def table_rows(networks: Mapping[str, Rows]) -> list[list[str]]:
    """Label and one cell per network; configurations without any figure are left out."""
    lines: list[list[str]] = []

    def line(label: str, cells: Sequence[str]) -> None:
        if any(cell != "-" for cell in cells):
            lines.append([label, *cells])

    def each(name: str, ratios: Sequence[float]) -> list[str]:
        return [accuracy_text(rows.get(name), ratios) for rows in networks.values()]

    floats = [rows.get("float32") for rows in networks.values()]
    line("float32", ["-" if row is None else f"{100 * row['accuracy']:.2f}" for row in floats])
    line("8-bit", each("baseline", [0.0]))
    for ratio in (0.25, 0.5, 0.75, 1.0):
        line(f"{100 * ratio:.0f} % low", each("baseline", [ratio]))
    for ratio in (0.0, 0.5, 1.0):
        label = "8-bit" if ratio == 0 else f"{100 * ratio:.0f} %"
        cells = [difference_text(rows.get("baseline"), ratio) for rows in networks.values()]
        line(f"{label}, to float", cells)
    for row in accuracy_rows():
        if row.seed == 0 and row.name != "baseline":
            line(f"{row.label}: 50 / 100 %", each(row.name, [0.5, 1.0]))
    for name in ("baseline", "greedy", "random"):
        label = default_of("selector") if name == "baseline" else name
        for ratio in (0.25, 0.5, 0.75):
            cells = []
            for rows in networks.values():
                found = seed_statistics(rows, name, ratio)
                cells.append("-" if found is None else f"{100 * found[0]:.2f} ± {100 * found[1]:.2f} (n={found[2]})")
            line(f"{label}, {100 * ratio:.0f} %, mean over seeds", cells)
    for better, worse in (("baseline", "greedy"), ("greedy", "random"), ("baseline_pair", "naive")):
        for ratio in (0.25, 0.5, 0.75, 1.0):
            cells = []
            for rows in networks.values():
                a, b = rows.get(better), rows.get(worse)
                difference = compared(a, b, ratio) if a is not None and b is not None else None
                cells.append("-" if difference is None else f"{100 * difference[0]:+.2f} ± {100 * difference[1]:.2f}")
            first = {"baseline": default_of("selector"), "baseline_pair": "default"}.get(better, better)
            if worse != "naive" and ratio == 1.0:
                continue  # nothing is left to select
            line(f"{first} - {worse}, {100 * ratio:.0f} %, paired", cells)
    return lines


def markdown(networks: Mapping[str, Rows], note: str = "") -> str:
    """The table for the README."""
    head = ["top-1, %", *networks]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["---:"] * len(networks)]) + "|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in table_rows(networks)]
    return "\n".join([*lines, *(["", note] if note else [])]) + "\n"
