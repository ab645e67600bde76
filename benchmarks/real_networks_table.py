"""Tables of `real_networks.py`: a line for each quantizer, one for each ratio of bitdial's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from real_networks_rows import CONFIGURATIONS, FLOAT, PEERS

Rows = Mapping[str, Mapping[str, Any]]  # row name -> row as in a result file

HEAD = ("", "accuracy, %", "to float, points", "agreement, %", "prepared in, s", "CPU, s", "peak, MiB", "file, MiB")
NOTE = (
    "To float: difference on the same samples and its paired standard error (for correlations by bootstrap over pairs). "
    "Agreement: share of answers equal to float's (correlations: rank correlation with float's similarities)."
)
PROVISIONAL = "~: others worked on the machine meanwhile; --refresh-seconds measures these again."


def labels() -> dict[str, str]:
    """Row name -> what it is called in tables, in their order."""
    return {FLOAT: "float32", **{p.name: p.label for p in PEERS}, **{c.name: c.label for c in CONFIGURATIONS}}


def table_rows(rows: Rows) -> list[list[str]]:
    """Lines of a network's rows, in the columns of HEAD."""
    lines = []
    for name, label in labels().items():
        row = rows.get(name)
        if row is None:
            continue
        for i, entry in enumerate(row["entries"]):
            costs = _costs(row) if i == 0 else [""] * 4
            lines.append([_label(label, entry["ratio"]), *_figures(entry, float32=name == FLOAT), *costs])
    return lines


def _label(label: str, ratio: float | None) -> str:
    if ratio is None:
        return label
    return f"{label}, 8-bit" if ratio == 0.0 else f"{label}, {100 * ratio:.0f} %"


def _figures(entry: Mapping[str, Any], *, float32: bool) -> list[str]:
    accuracy = f"{100 * entry['accuracy']:.2f}"
    if float32:
        return [f"{accuracy} ± {100 * entry['standard_error']:.2f}", "", ""]
    difference = f"{100 * entry['to_float']:+.2f} ± {100 * entry['to_float_standard_error']:.2f}"
    return [accuracy, difference, f"{100 * entry['agreement']:.1f}"]


def _costs(row: Mapping[str, Any]) -> list[str]:
    size = f"{row['file_bytes'] / 2**20:.1f}"
    spent = row.get("preparation")
    if spent is None:
        return ["", "", "", size]
    mark = "~" if spent["provisional"] else ""
    peak = f"{spent['peak_bytes'] / 2**20:,.0f}"
    return [f"{mark}{spent['wall_seconds']:.0f}", f"{mark}{spent['cpu_seconds']:.0f}", peak, size]


def stage_rows(rows: Rows) -> list[list[str]]:
    """Where bitdial's preparation took its time: row, stage, seconds of the clock and of processors."""
    lines = []
    for name, label in labels().items():
        stages = rows.get(name, {}).get("preparation", {}).get("stages", {})
        lines += [[label, stage, f"{wall:.1f}", f"{cpu:.1f}"] for stage, (wall, cpu) in stages.items()]
    return lines


def provisional(rows: Rows) -> bool:
    return any(row.get("preparation", {}).get("provisional", False) for row in rows.values())


def markdown(networks: Mapping[str, Rows], caption: str = "") -> str:
    """One table of all networks for the README."""
    head = ["network", "quantizer", *HEAD[1:]]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", "---", *["---:"] * (len(head) - 2)]) + "|"]
    for network, rows in networks.items():
        for i, cells in enumerate(table_rows(rows)):
            lines.append("| " + " | ".join([network if i == 0 else "", *cells]) + " |")
    notes = [NOTE, *([PROVISIONAL] if any(map(provisional, networks.values())) else []), *([caption] if caption else [])]
    return "\n".join([*lines, "", " ".join(notes)]) + "\n"


def sample_counts(rows: Rows) -> Sequence[int]:
    return sorted({int(row["samples"]) for row in rows.values() if "samples" in row})
