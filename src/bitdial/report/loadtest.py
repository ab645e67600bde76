"""Load tests over time: load, latency, ratio, accuracy and what was not answered, as data of the picture and the page.

Several tests can be laid over each other. A request belongs to the window in which it was SCHEDULED, so that a stall shows
where the load met it; the answered rate alone is counted when answers came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdial.errors import ConfigError, DataError
from bitdial.loadtest.result import Result, Status, summarize, warnings_of
from bitdial.report.axis import Axis, nice_ticks, time_axis

Floats = NDArray[np.float64]

MOST_RUNS = 5  # colours that can be told apart
MOST_WINDOWS = 150
_WIDTHS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)
COARSE = 5  # windows that make one of the measured accuracy's
LEAST_SAMPLES = 400  # at 93 % the standard error of that many is 1.3 points
_LOG_FROM = 15.0  # largest over smallest latency from which the axis is logarithmic


@dataclass(frozen=True)
class Windows:
    """One test in windows. edges: seconds [n + 1]; the rest [n], NaN where a window has nothing to say.

    offered, answered, shed, expired, failed: requests/s (expired: dropped by the server or without an answer in time).
    p50, p99: ms. ratio, expected, measured: 0..1. measured has wider windows, since a hundred samples say little: edges in
    measured_edges, NaN where fewer than LEAST_SAMPLES were judged.
    """

    edges: Floats
    offered: Floats
    answered: Floats
    p50: Floats
    p99: Floats
    ratio: Floats
    expected: Floats
    measured: Floats
    measured_edges: Floats
    shed: Floats
    expired: Floats
    failed: Floats


@dataclass(frozen=True)
class Run:
    """A test with its name in the legend."""

    name: str
    result: Result
    windows: Windows
    summary: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """values [n] over the windows of `edges` [n + 1]. colour: index of the run's colour, or -1 (neutral), -2 (warning).
    style: "solid", "dashed" or "area". stepped: constant over each window."""

    name: str
    edges: Floats
    values: Floats
    colour: int
    style: str = "solid"
    stepped: bool = False


@dataclass(frozen=True)
class Panel:
    """One of the pictures that share the time axis. level: (name, value) of a horizontal line."""

    key: str
    title: str
    lines: tuple[Line, ...]
    axis: Axis
    level: tuple[str, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class LoadReport:
    """What a page or picture shows."""

    title: str
    runs: tuple[Run, ...]
    width: float

    @property
    def seconds(self) -> float:
        """End of the time axis."""
        return max(run.result.seconds for run in self.runs)

    @property
    def warnings(self) -> list[tuple[str, str]]:
        """(run, sentence) of everything that makes figures doubtful."""
        return [(run.name, text) for run in self.runs for text in warnings_of(run.result)]


def load_report(results: Sequence[Result], names: Sequence[str] | None = None, title: str = "") -> LoadReport:
    """The data of a report. names: of the tests, by default their titles. Raises ConfigError (none, too many), DataError."""
    if not results:
        raise ConfigError("a load report needs at least one result")
    if len(results) > MOST_RUNS:
        raise ConfigError(f"at most {MOST_RUNS} results can be told apart in one picture, got {len(results)}")
    if names is not None and len(names) != len(results):
        raise ConfigError(f"{len(names)} names for {len(results)} results")
    if any(not len(result.status) for result in results):
        raise DataError("a result without requests cannot be shown")
    shown = list(names) if names is not None else [r.title or str(r.model.get("name", "")) for r in results]
    for k, name in enumerate(shown):
        if not name or shown.index(name) < k:
            shown[k] = f"{name} ({k + 1})" if name else f"test {k + 1}"
    width = window_width(max(r.seconds for r in results))
    runs = tuple(Run(n, r, windows(r, width), summarize(r)) for n, r in zip(shown, results, strict=True))
    if not title:
        title = results[0].title or f"Load test of {results[0].model.get('name') or 'a server'}"
        if len(results) > 1:
            title = "Load tests compared"
    return LoadReport(title, runs, width)


def window_width(seconds: float) -> float:
    """Width of the windows in seconds: at least half a second where that leaves some, at most MOST_WINDOWS of them."""
    least = 0.5 if seconds >= 10 else 0.1
    return next((float(w) for w in _WIDTHS if w >= least and seconds / w <= MOST_WINDOWS), seconds / MOST_WINDOWS)


def windows(result: Result, width: float) -> Windows:
    """The test in windows of `width` seconds; the last may be shorter."""
    count = max(1, math.ceil(result.seconds / width - 1e-9))
    edges = np.append(np.arange(count) * width, result.seconds)
    spans = np.diff(edges)
    place = np.clip(np.searchsorted(edges, result.scheduled, side="right") - 1, 0, count - 1)
    ok = result.ok

    def rate(chosen: NDArray[np.bool_]) -> Floats:
        return np.asarray(np.bincount(place[chosen], minlength=count) / spans)

    def mean(values: Floats) -> Floats:
        known = np.isfinite(values)
        total = np.bincount(place[known], values[known], minlength=count)
        number = np.bincount(place[known], minlength=count)
        return np.asarray(np.where(number > 0, total / np.maximum(number, 1), np.nan))

    latency = 1e3 * result.latency
    quantiles = np.full((2, count), np.nan)
    bounds = np.searchsorted(place, np.arange(count + 1))  # requests are in the order of their scheduled times
    for k in range(count):
        here = latency[bounds[k] : bounds[k + 1]]
        here = here[np.isfinite(here)]
        if len(here):
            quantiles[:, k] = np.percentile(here, (50, 99))
    answered, _ = np.histogram(result.done[ok], edges)
    coarse = edges if count <= COARSE else np.append(edges[:-1:COARSE], edges[-1])
    expired = (result.status == Status.EXPIRED) | (result.status == Status.TIMEOUT)
    return Windows(
        edges,
        rate(np.ones(len(place), np.bool_)),
        answered / spans,
        quantiles[0],
        quantiles[1],
        mean(np.where(ok, result.ratio, np.nan)),
        mean(result.expected_accuracy),
        _measured(result, coarse),
        coarse,
        rate(result.status == Status.SHED),
        rate(expired),
        rate(result.status == Status.FAILED),
    )


def _measured(result: Result, edges: Floats) -> Floats:
    judged = result.right >= 0
    place = np.clip(np.searchsorted(edges, result.scheduled[judged], side="right") - 1, 0, len(edges) - 2)
    right = np.bincount(place, result.right[judged], minlength=len(edges) - 1)
    samples = result.samples * np.bincount(place, minlength=len(edges) - 1)
    return np.asarray(np.where(samples >= LEAST_SAMPLES, right / np.maximum(samples, 1), np.nan))


def panels(report: LoadReport) -> tuple[Panel, ...]:
    """The pictures that have something to show, from top to bottom."""
    runs, single = report.runs, len(report.runs) == 1
    found = [_load_panel(runs, single), _latency_panel(runs, single)]
    ratio = [
        Line(_name(r, "ratio", single), r.windows.edges, 100 * r.windows.ratio, k, stepped=True)
        for k, r in enumerate(runs)
    ]
    ratio = [line for line in ratio if np.isfinite(line.values).any()]
    if ratio:
        axis = Axis(-4.0, 104.0, (0.0, 25.0, 50.0, 75.0, 100.0))
        found.append(Panel("ratio", "Ratio, %", tuple(ratio), axis, note="mean of the requests of each window"))
    accuracy = _accuracy_panel(runs, single)
    return tuple(p for p in (*found, accuracy, _lost_panel(runs, single)) if p is not None)


def _name(run: Run, what: str, single: bool) -> str:
    return what if single else f"{run.name}, {what}"


def _from_zero(values: Sequence[Floats], least: float = 1.0) -> Axis:
    known = np.concatenate([v[np.isfinite(v)] for v in values])
    high = max(float(known.max()) if len(known) else 0.0, least) * 1.06
    return Axis(0.0, high, nice_ticks(0.0, high, 4))


def _load_panel(runs: Sequence[Run], single: bool) -> Panel:
    first = runs[0].result.scheduled
    same = all(
        len(r.result.scheduled) == len(first) and np.allclose(r.result.scheduled, first, atol=1e-5) for r in runs
    )
    lines = [Line("offered", runs[0].windows.edges, runs[0].windows.offered, -1, "area", True)]
    if not same:
        lines = [
            Line(_name(r, "offered", single), r.windows.edges, r.windows.offered, k, "dashed", True)
            for k, r in enumerate(runs)
        ]
    lines += [
        Line(_name(r, "answered", single), r.windows.edges, r.windows.answered, k, "solid", True)
        for k, r in enumerate(runs)
    ]
    return Panel("load", "Requests/s", tuple(lines), _from_zero([line.values for line in lines]))


def _latency_panel(runs: Sequence[Run], single: bool) -> Panel:
    lines = [
        Line(_name(r, name, single), r.windows.edges, values, k, style)
        for k, r in enumerate(runs)
        for name, values, style in (("99th percentile", r.windows.p99, "solid"), ("median", r.windows.p50, "dashed"))
    ]
    slos = {r.result.slo for r in runs}
    slo = next(iter(slos)) if len(slos) == 1 else None
    level = None if slo is None else (f"SLO {1e3 * slo:g} ms", 1e3 * slo)
    known = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    if not len(known):
        known = np.asarray([1.0 if slo is None else 1e3 * slo])
    values = known if slo is None else np.append(known, 1e3 * slo)
    low, high = max(float(values.min()), 1e-3), max(float(values.max()), 2e-3)
    axis = time_axis([low, high]) if high > _LOG_FROM * low else _from_zero([values], 1e-3)
    scale = ", logarithmic" if axis.logarithmic else ""
    return Panel("latency", f"Latency from the scheduled time, ms{scale}", tuple(lines), axis, level)


def _accuracy_panel(runs: Sequence[Run], single: bool) -> Panel | None:
    lines = [
        Line(_name(r, name, single), edges, 100 * values, k, style, stepped=True)
        for k, r in enumerate(runs)
        for name, edges, values, style in (
            ("expected", r.windows.edges, r.windows.expected, "solid"),
            ("measured", r.windows.measured_edges, r.windows.measured, "dashed"),
        )
        if np.isfinite(values).any()
    ]
    if not lines:
        return None
    known = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    low, high = float(known.min()), float(known.max())
    margin = max(0.1 * (high - low), 0.15)
    low, high = max(0.0, low - margin), min(100.0, high + margin)
    ticks = nice_ticks(low, high, 4)
    note = "expected: the model's stored curve at the ratio of each answer"
    return Panel("accuracy", "Accuracy, %", tuple(lines), Axis(low, high, ticks), note=note)


def _lost_panel(runs: Sequence[Run], single: bool) -> Panel | None:
    if single:
        w = runs[0].windows
        named = (("refused (503)", w.shed, 1), ("expired", w.expired, 3), ("failed", w.failed, -2))
        lines = [Line(n, w.edges, v, c, "solid", True) for n, v, c in named if v.any()]
    else:
        lost = [(r, r.windows.shed + r.windows.expired + r.windows.failed) for r in runs]
        if not any(values.any() for _, values in lost):
            return None
        lines = [Line(r.name, r.windows.edges, values, k, "solid", True) for k, (r, values) in enumerate(lost)]
    if not lines:
        return None
    note = "" if single else "refused, expired and failed together"
    return Panel(
        "lost", "Not answered, requests/s", tuple(lines), _from_zero([line.values for line in lines]), note=note
    )


def pieces(line: Line) -> list[list[tuple[float, float]]]:
    """The line as unbroken runs of (seconds, value); it breaks where values are NaN."""
    found: list[list[tuple[float, float]]] = []
    open_piece = False
    for k, value in enumerate(line.values.tolist()):
        if not math.isfinite(value):
            open_piece = False
            continue
        left, right = float(line.edges[k]), float(line.edges[k + 1])
        if not open_piece:
            found.append([])
            open_piece = True
        found[-1] += [(left, value), (right, value)] if line.stepped else [((left + right) / 2, value)]
    return found


def time_ticks(seconds: float) -> tuple[tuple[float, ...], float, str]:
    """(ticks in seconds, seconds per unit, unit) of the time axis."""
    unit, name = (1.0, "s") if seconds <= 300 else (60.0, "min") if seconds <= 3 * 3600 else (3600.0, "h")
    return tuple(unit * t for t in nice_ticks(0.0, seconds / unit, 8)), unit, name


def figure_rows(report: LoadReport) -> list[tuple[str, list[str]]]:
    """The table: (what, one text per run)."""

    def time(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    def share(value: float | None, digits: int = 2) -> str:
        return "–" if value is None else f"{100 * value:.{digits}f}\u00a0%"

    def row(name: str, make: Any) -> tuple[str, list[str]]:
        return name, [make(run.summary) for run in report.runs]

    rows = [
        row("Requests", lambda s: f"{s['requests']:,}"),
        row("Offered, requests/s", lambda s: f"{s['offered_rate']:.1f}"),
        row("Answered, requests/s", lambda s: f"{s['achieved_rate']:.1f}"),
        row("SLO, ms", lambda s: time(s["slo_ms"])),
        row("Answered within the SLO, of all", lambda s: share(s["attainment"])),
    ]
    for q in ("p50", "p90", "p99", "p99.9", "max"):
        rows.append(row(f"Latency {q}, ms", lambda s, q=q: time(s["latency_ms"][q])))
    rows += [
        row("Mean ratio", lambda s: share(s["mean_ratio"], 1)),
        row("Expected accuracy", lambda s: share(s["expected_accuracy"])),
        row("Measured accuracy", lambda s: share(s["measured_accuracy"])),
        row(
            "Changes of the ratio per minute",
            lambda s: "–" if s["ratio_changes_per_minute"] is None else f"{s['ratio_changes_per_minute']:.1f}",
        ),
        row("Refused (503)", lambda s: f"{s['counts']['shed']:,}"),
        row("Expired (504 or no answer in time)", lambda s: f"{s['counts']['expired'] + s['counts']['timeout']:,}"),
        row("Failed", lambda s: f"{s['counts']['failed']:,}"),
        row("Generator late, p99, ms", lambda s: time(s["lateness_ms"]["p99"])),
        row("Waited for a connection, p99, ms", lambda s: time(s["connection_wait_ms"]["p99"])),
        row("Generator late, at most, ms", lambda s: time(s["lateness_ms"]["max"])),
    ]
    return [(name, cells) for name, cells in rows if any(c != "–" for c in cells)]


def run_facts(run: Run) -> dict[str, str]:
    """How one test was made, in words."""
    r, s, g = run.result, run.result.settings, run.result.generator
    found = {
        "Model": str(r.model.get("name", "")),
        "Server": str(s.get("url", "")),
        "Arrivals": str(s.get("arrivals", "")),
        "Duration": f"{r.seconds:.6g} s" + (", stopped early" if s.get("stopped_early") else ""),
        "Request": f"{r.samples} sample{'' if r.samples == 1 else 's'}"
        + (f", {s['body_bytes']:,} bytes" if s.get("body_bytes") else "")
        + (", labelled" if s.get("labelled") else ", random values"),
        "Time": (f"modelled: one of its seconds took {s['dilation']:g} s" if s.get("dilation", 1.0) != 1.0 else ""),
        "Time limit": f"{s['timeout_s']:g} s" if s.get("timeout_s") else "",
        "Generator": (
            f"{g['cpu_ms_per_request']:.3f} ms of processor time a request, " if g.get("cpu_ms_per_request") else ""
        )
        + (f"{g['connections']} connections" if g.get("connections") else ""),
        "Errors": "; ".join(f"{text} ({count})" for text, count in list(r.errors.items())[:8]),
        "Measured": r.created,
    }
    return {name: value.strip(", ") for name, value in found.items() if value}
