"""Tables and Markdown of the latency benchmark, from its stored rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peers.cell import fastest_peer

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Text cells; the first column is flush left."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", "| " + " | ".join(self.columns) + " |"]
        lines.append("|" + "|".join("---" if i == 0 else "--:" for i in range(len(self.columns))) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def milliseconds(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
    )


def factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def latency_table(network: str, threads: int, rows: Mapping[int, Row]) -> Table:
    """Contestants against batches: ms, time over bitdial at 0 %, time over the fastest int8 peer. rows: by batch size."""
    columns = ["contestant"]
    for batch in rows:
        columns += [f"batch {batch}, ms", "/ bitdial 0 %", "/ int8 peer"]
    names = dict.fromkeys(name for row in rows.values() for name in row["cases"])
    lines = []
    for name in names:
        line = [name]
        for row in rows.values():
            own = row["cases"].get(name, {})
            few = "*" if own and own.get("repeats", 15) < 15 else ""
            line += [
                milliseconds(own.get("median_ms")) + few, factor(own.get("to_bitdial_0")), factor(own.get("to_int8_peer"))
            ]  # fmt: skip
        lines.append(tuple(line))
    plural = "thread" if threads == 1 else "threads"
    return Table(f"{network}, {threads} {plural}", tuple(columns), tuple(lines))


def gains(row: Row, contestant: str) -> dict[str, float | None] | None:
    """What the dial buys at one cell for one bitdial contestant; None if it has no ratio 0.

    speedup_50, speedup_100   time at 0 % / time at 50 or 100 %
    half_gain                 (t0 - t50) / (t0 - t100), the paper's figure; None where 100 % is no faster
    to_int8_peer              time at 0 % / time of the fastest int8 peer
    to_any_peer               time at 100 % / time of the fastest peer of any precision
    """
    cases = row["cases"]
    own = {f["ratio"]: f for f in cases.values() if f["contestant"] == contestant and "ratio" in f}
    if 0.0 not in own:
        return None
    t = {ratio: f["to_own_0"] for ratio, f in own.items()}  # in units of ratio 0, paired by round
    half, full = t.get(0.5), t.get(1.0)
    peer = fastest_peer(cases)
    return {
        "speedup_50": None if half is None else 1.0 / half,
        "speedup_100": None if full is None else 1.0 / full,
        "half_gain": None if half is None or full is None or full >= 1.0 else (1.0 - half) / (1.0 - full),
        "to_int8_peer": own[0.0]["to_int8_peer"],
        "to_any_peer": None if peer is None or 1.0 not in own else own[1.0]["median_ms"] / cases[peer]["median_ms"],
    }


def gains_table(rows: Iterable[Row]) -> Table:
    """One line per cell and bitdial contestant."""
    lines = []
    for row in rows:
        settings, cases = row["settings"], row["cases"]
        where = f"{settings['network']}, batch {settings['batch']}, {settings['threads']} thr."
        for contestant in dict.fromkeys(f["contestant"] for f in cases.values() if "ratio" in f):
            own = gains(row, contestant)
            if own is None:
                continue
            peer, any_peer = fastest_peer(cases, "int8"), fastest_peer(cases)
            lines.append(
                (
                    f"{where} {contestant}",
                    factor(own["speedup_50"]),
                    factor(own["speedup_100"]),
                    "-" if own["half_gain"] is None else f"{100 * own['half_gain']:.0f} %",
                    factor(own["to_int8_peer"]),
                    peer or "-",
                    factor(own["to_any_peer"]),
                    any_peer or "-",
                )
            )
    columns = (
        "cell", "0 / 50 %", "0 / 100 %", "half gain", "0 % / int8 peer", "fastest int8 peer", "100 % / any peer",
        "fastest peer",
    )  # fmt: skip
    return Table("What the dial buys (times over times)", columns, tuple(lines))


def proof_table(rows: Iterable[Row]) -> Table:
    """What the libraries say they ran: layers in the contestant's precision, kernels, SNR against float32."""
    seen: dict[tuple[str, str], tuple[str, ...]] = {}
    for row in rows:
        for name, own in row["cases"].items():
            share = own.get("layers_in_precision")
            load = row["loads"].get(own["contestant"], {}).get("info", {})
            kernels = own.get("kernels") or load.get("primitives") or load.get("operators") or {}
            if share is None and own.get("low_share") is not None:
                proof = f"{100 * own['low_share']:.1f} % of multiplies low"
            else:
                proof = "-" if share is None else f"{share[0]} of {share[1]} layers {own['precision']}"
            text = ", ".join(f"{n} x {kernel}" for kernel, n in kernels.items())
            key = (row["settings"]["network"], name)
            seen.setdefault(key, (f"{key[0]} {name}", proof, text, f"{own['snr_db']:.1f}"))
    return Table("What was executed", ("case", "precision", "kernels", "SNR, dB"), tuple(seen.values()))


def memory_table(network: str, row: Row) -> Table:
    """Peak resident sets."""
    mib = 2.0**20
    lines = tuple(
        (
            label, f"{own['before_bytes'] / mib:.0f}", f"{own['loaded_peak_bytes'] / mib:.0f}",
            f"{own['peak_bytes'] / mib:.0f}", f"{own['now_bytes'] / mib:.0f}", f"{own['model_bytes'] / mib:.1f}",
            f"{own['load_seconds']:.2f}",
        )
        for label, own in row["processes"].items()
    )  # fmt: skip
    columns = ("process", "before", "peak, loaded", "peak, after runs", "resident", "model file", "load, s")
    return Table(f"{network}, batch 1, 1 thread: resident set, MiB", columns, lines)


def failures(rows: Sequence[Row]) -> list[str]:
    """One line per contestant that could not run somewhere."""
    found: dict[str, str] = {}
    for row in rows:
        for name, why in row.get("failed", {}).items():
            found.setdefault(name, why)
    return [f"{name} left out: {why}" for name, why in found.items()]
