"""What a load test measured: a row per request, the figures made of them, and the file they are kept in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdial.errors import DataError
from bitdial.files import write_atomically
from bitdial.quantization.curve import non_increasing

FORMAT, VERSION = "bitdial-loadtest", 1
MOST_BYTES = 4 << 30
LATE_SHARE = 0.05  # of the SLO: a generator that is later than this at p99 measures itself
_QUANTILES = (50.0, 90.0, 99.0, 99.9, 100.0)


class Status(IntEnum):
    """What became of a request."""

    OK = 0
    SHED = 1  # 503: the server refused it
    EXPIRED = 2  # 504: the server dropped it because its time was over
    FAILED = 3  # another status, a broken connection, an answer that makes no sense
    TIMEOUT = 4  # no answer within the generator's own limit
    UNFINISHED = 5  # under way when the test was stopped


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """Columns of one entry per request, in the order of their scheduled times; seconds from the start of the test.

    scheduled: when it was due. begun: when the generator took it up; None: when it was sent. sent: when its bytes were given to
    the system, which may be later than begun if it waited for a connection (NaN: never). done: when its fate was known
    (NaN: not). status: values of `Status`. ratio: executed, NaN if the server did not say. queue, compute: seconds, as the
    server says, or NaN. right: samples recognized rightly, -1 if not counted.

    seconds: length of the schedule, or until it was stopped. model: what the server said (name, ratios, accuracy).
    settings: of the run; generator: what the generator says of itself. errors: {what: how often}.
    """

    scheduled: Floats
    sent: Floats
    done: Floats
    status: NDArray[np.uint8]
    ratio: Floats
    queue: Floats
    compute: Floats
    right: NDArray[np.int64]
    seconds: float
    samples: int
    slo: float | None
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    generator: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    title: str = ""
    created: str = ""
    begun: Floats | None = None

    def __post_init__(self) -> None:
        # Typed loosely: the columns hold different kinds of numbers.
        columns: list[NDArray[Any]] = [self.scheduled, self.sent, self.done, self.status]
        columns += [self.ratio, self.queue, self.compute, self.right, *([] if self.begun is None else [self.begun])]
        if (
            len({len(c) for c in columns}) != 1
            or not math.isfinite(self.seconds)
            or self.seconds <= 0
            or self.samples < 1
        ):
            raise DataError("the columns of a load test's result differ in length, or it has no duration or samples")

    @property
    def ok(self) -> NDArray[np.bool_]:
        """Which requests were answered."""
        return np.asarray(self.status == Status.OK)

    @property
    def latency(self) -> Floats:
        """Seconds from the SCHEDULED time to the answer; NaN where there was none (so that a stall counts in full)."""
        return np.where(self.ok, self.done - self.scheduled, np.nan)

    @property
    def lateness(self) -> Floats:
        """Seconds by which the generator itself was late with each request."""
        return (self.sent if self.begun is None else self.begun) - self.scheduled

    @property
    def connection_wait(self) -> Floats:
        """Seconds that each request then waited for a connection: the cap was reached, or the server was slow to accept."""
        return np.zeros(len(self.sent)) if self.begun is None else self.sent - self.begun

    @property
    def expected_accuracy(self) -> Floats:
        """Accuracy (0..1) that the model's stored curve, made non-increasing, gives for the ratio of each answer; NaN where it is
        not known."""
        ratios = np.asarray(self.model.get("ratios") or [], np.float64)
        curve = [math.nan if a is None else float(a) for a in non_increasing(self.model.get("accuracy") or [])]
        if not len(ratios) or len(curve) != len(ratios):
            return np.full(len(self.ratio), np.nan)
        # Ratios come back as text with few digits: the nearest is meant.
        known = np.where(np.isnan(self.ratio), 0.0, self.ratio)
        near = np.abs(known[:, None] - ratios[None, :]).argmin(axis=1)
        return np.where(np.isnan(self.ratio) | ~self.ok, np.nan, np.asarray(curve)[near])


def summarize(result: Result) -> dict[str, Any]:
    """The figures of a test, JSON-able; None for what was not measured. Times in ms, rates in requests/s, shares 0..1.

    attainment: answered within the SLO, of ALL requests (refused, expired and failed ones are misses; those that were under
    way when the test was stopped are left out).
    """
    ok, latency = result.ok, result.latency
    counts = {s.name.lower(): int(np.count_nonzero(result.status == s)) for s in Status}
    total = len(result.status) - counts["unfinished"]
    answered = latency[ok]
    late = result.lateness[np.isfinite(result.lateness)]
    accuracy = result.expected_accuracy
    judged = result.right >= 0
    # Answered within the span of the schedule: an overloaded server that works off its queue afterwards is not faster.
    within = int(np.count_nonzero(ok & (result.done <= result.seconds)))
    met = None if result.slo is None or not total else int(np.count_nonzero(answered <= result.slo)) / total
    lateness = {name: _ms(late, q) for name, q in (("p50", 50), ("p99", 99), ("max", 100))}
    return {
        "requests": len(result.status),
        "seconds": result.seconds,
        "offered_rate": len(result.status) / result.seconds,
        "achieved_rate": within / result.seconds,
        "counts": counts,
        "slo_ms": None if result.slo is None else 1e3 * result.slo,
        "attainment": met,
        "latency_ms": {_quantile_name(q): _ms(answered, q) for q in _QUANTILES},
        "queue_ms": {_quantile_name(q): _ms(result.queue[ok], q) for q in (50.0, 99.0)},
        "compute_ms": {_quantile_name(q): _ms(result.compute[ok], q) for q in (50.0, 99.0)},
        "mean_ratio": _mean(result.ratio[ok]),
        "expected_accuracy": _mean(accuracy[ok]),
        "measured_accuracy": float(result.right[judged].sum() / (judged.sum() * result.samples))
        if judged.any()
        else None,
        "ratio_changes_per_minute": ratio_changes(result),
        "lateness_ms": lateness,
        "connection_wait_ms": {name: _ms(result.connection_wait, q) for name, q in (("p99", 99), ("max", 100))},
    }


def warnings_of(result: Result) -> list[str]:
    """What makes the figures doubtful, as sentences."""
    found = []
    summary = summarize(result)
    late = summary["lateness_ms"]["p99"]
    slo = result.slo
    if late is not None and slo is not None and late > 1e3 * LATE_SHARE * slo:
        found.append(
            f"the generator sent 1 % of its requests more than {late:.3g} ms late, which is more than {100 * LATE_SHARE:.0f} % "
            "of the SLO: latencies (counted from the scheduled time) hold that lateness; give the generator a core of its own"
        )
    waited = summary["connection_wait_ms"]["p99"]
    if (
        waited is not None
        and slo is not None
        and waited > 1e3 * LATE_SHARE * slo
        and not result.generator.get("capped")
    ):
        found.append(
            f"1 % of the requests waited more than {waited:.3g} ms for a new connection, because the server (or its queue of "
            "connections to accept) was slow to take it; latencies hold that wait"
        )
    if result.generator.get("capped"):
        found.append(
            f"all {result.generator.get('max_connections')} connections were in use at times, and requests waited for one; "
            "raise --max-connections"
        )
    retries = result.generator.get("retries") or 0
    if retries:
        found.append(f"{retries} requests were sent again, because the server had just closed an idle connection")
    if summary["counts"]["unfinished"]:
        found.append(
            f"{summary['counts']['unfinished']} requests were under way when the test was stopped; they count nowhere"
        )
    return found


def ratio_changes(result: Result) -> float | None:
    """How often per minute the ratio of an answer differs from that of the answer before it; None if ratios are unknown."""
    seen = result.ok & np.isfinite(result.ratio)
    if not seen.any():
        return None
    # A batch's answers come together; within one moment order by ratio, so that two workers' answers are not mixed finely.
    order = np.lexsort((result.ratio[seen], result.done[seen]))
    changes = np.count_nonzero(np.abs(np.diff(result.ratio[seen][order])) > 1e-9)
    return float(changes / (result.seconds / 60))


def _quantile_name(q: float) -> str:
    return "max" if q == 100.0 else f"p{q:g}"


def _ms(values: Floats, q: float) -> float | None:
    known = values[np.isfinite(values)]
    return float(1e3 * np.percentile(known, q)) if len(known) else None


def _mean(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def result_json(result: Result) -> bytes:
    """The result as JSON text: columns, times in whole microseconds, `status` a string with a digit per request."""
    ratios = np.unique(result.ratio[np.isfinite(result.ratio)])
    columns: dict[str, Any] = {
        "scheduled_us": _whole(1e6 * result.scheduled),
        "late_us": _whole(1e6 * result.lateness),
        "sent_us": _whole(1e6 * (result.sent - result.scheduled)),
        "took_us": _whole(1e6 * (result.done - result.scheduled)),
        "status": "".join(map(str, result.status.tolist())),
        "ratio": None
        if not len(ratios)
        else _whole(np.where(np.isfinite(result.ratio), np.searchsorted(ratios, result.ratio), np.nan)),
        "queue_us": _whole(1e6 * result.queue),
        "compute_us": _whole(1e6 * result.compute),
        "right": _whole(np.where(result.right >= 0, result.right.astype(np.float64), np.nan)),
    }
    document = {
        "format": FORMAT,
        "version": VERSION,
        "title": result.title,
        "created": result.created,
        "seconds": result.seconds,
        "samples": result.samples,
        "slo_s": result.slo,
        "model": result.model,
        "settings": result.settings,
        "generator": result.generator,
        "errors": result.errors,
        "summary": summarize(result),
        "ratios": ratios.tolist(),
        "columns": columns,
    }
    return (json.dumps(document, allow_nan=False, separators=(",", ":")) + "\n").encode()


def result_from_json(content: bytes | str) -> Result:
    """The inverse, to the microsecond. Raises DataError."""
    try:
        held = json.loads(content)
        if not isinstance(held, dict) or held.get("format") != FORMAT:
            raise DataError("this is no result of bitdial loadtest")
        if held.get("version") != VERSION:
            raise DataError(f"this result is of version {held.get('version')!r}; this bitdial reads version {VERSION}")
        columns = held["columns"]
        text = columns["status"]
        n = len(text)
        scheduled = _floats(columns["scheduled_us"], n) / 1e6
        ratios = np.asarray([*held["ratios"], math.nan], np.float64)
        chosen = _floats(columns["ratio"], n)
        right = _floats(columns["right"], n)
        status = np.frombuffer(text.encode("ascii"), np.uint8) - ord("0")
        if n and status.max() > max(Status):
            raise DataError("this result holds an unknown status")
        slo = held["slo_s"]
        return Result(
            scheduled, scheduled + _floats(columns["sent_us"], n) / 1e6, scheduled + _floats(columns["took_us"], n) / 1e6,
            status, ratios[np.where(np.isfinite(chosen), chosen, len(ratios) - 1).astype(np.int64)],
            _floats(columns["queue_us"], n) / 1e6, _floats(columns["compute_us"], n) / 1e6,
            np.where(np.isfinite(right), right, -1).astype(np.int64), float(held["seconds"]),
            int(held["samples" if "samples" in held else "images"]),
            None if slo is None else float(slo), dict(held["model"]), dict(held["settings"]), dict(held["generator"]),
            {str(k): int(v) for k, v in held["errors"].items()}, str(held["title"]), str(held["created"]),
            scheduled + _floats(columns["late_us"], n) / 1e6,
        )  # fmt: skip
    except DataError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"this result is damaged: {type(error).__name__}: {error}") from None


def write_result(result: Result, path: str | os.PathLike[str]) -> None:
    """Write the file, whole or not at all. Raises OutputError."""
    write_atomically(path, result_json(result))


def read_result(path: str | os.PathLike[str]) -> Result:
    """Read what `write_result` wrote. Raises DataError, naming the file."""
    place = Path(path)
    try:
        if place.stat().st_size > MOST_BYTES:
            raise DataError(f"{place} is too large for a result")
        content = place.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the result {place}: {error.strerror or error}") from None
    try:
        return result_from_json(content)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _whole(values: Floats) -> list[int | None] | None:
    """Rounded; None for NaN, and None altogether if nothing else is there."""
    known = np.isfinite(values)
    if not known.any():
        return None
    if known.all():
        return [int(v) for v in np.rint(values).tolist()]
    return [int(round(v)) if math.isfinite(v) else None for v in values.tolist()]


def _floats(values: Sequence[int | None] | None, count: int) -> Floats:
    if values is None:
        return np.full(count, np.nan)
    found = np.asarray([math.nan if v is None else v for v in values], np.float64)
    if found.shape != (count,):
        raise ValueError("columns differ in length")
    return found
