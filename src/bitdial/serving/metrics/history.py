"""What a model did, second by second, for the last quarter of an hour: what the live page draws.

Only seconds in which something happened are kept, so that a clock that leaps costs nothing. Feeding it costs a few attribute
updates; percentiles are worked out once, when a second is over.
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

KEEP = 900  # seconds
LATENCIES = 1024  # latencies kept of one second; above that so many of them, each as likely as the next
TOLERATED = (
    2.0  # seconds that the clock may step back before its readings are shifted; events just carry on in the same second
)
SPARE = 60.0  # a leap ahead counts as at most this much more than what is kept

_MULTIPLIER, _INCREMENT, _MASK = 6364136223846793005, 1442695040888963407, (1 << 64) - 1  # Knuth's MMIX generator


class Second:
    """Sums over one second that began at `time` (whole seconds of the history's clock). Requests unless samples are named.

    Latency, queueing and compute are in seconds and are summed over answered requests; `ratio` and `accuracy` are summed over
    answered samples, `known` counts those whose accuracy is known. `depth`, `depth_samples` and `oldest` are the largest values
    seen, `index` the last.
    """

    def __init__(self, time: int) -> None:
        self.time = time
        self.arrivals = self.arrived_samples = self.answered = self.answered_samples = self.met = self.late = 0
        self.shed = self.expired = self.failed = self.invalid = self.cancelled = 0
        self.batches = self.batch_samples = self.switches = self.depth = self.depth_samples = self.known = 0
        self.queue = self.compute = self.ratio = self.accuracy = self.oldest = self.worst = 0.0
        self.index: int | None = None
        self.latencies: list[float] = []
        self.text: str | None = None

    def close(self) -> None:
        """Write the row down for good and forget the latencies."""
        self.text = self.as_json()
        self.latencies = []

    def as_json(self) -> str:
        """The row as JSON text; see `History.rows`."""
        return self.text or json.dumps(self._row(), separators=(",", ":"), allow_nan=False)

    def _row(self) -> dict[str, float | int | None]:
        answered, samples = self.answered, self.answered_samples
        p50, p90, p99 = percentiles(self.latencies) if self.latencies else (None, None, None)
        return {
            "t": self.time,
            "arrivals": self.arrivals,
            "arrived_samples": self.arrived_samples,
            "answered": answered,
            "answered_samples": samples,
            "met": self.met,
            "late": self.late,
            "shed": self.shed,
            "expired": self.expired,
            "failed": self.failed,
            "invalid": self.invalid,
            "cancelled": self.cancelled,
            "p50": _short(p50),
            "p90": _short(p90),
            "p99": _short(p99),
            "worst": _short(self.worst if answered else None),
            "queue": _short(self.queue / answered if answered else None),
            "compute": _short(self.compute / answered if answered else None),
            "ratio": _short(self.ratio / samples if samples else None),
            "accuracy": _short(self.accuracy / samples if samples and self.known == samples else None),
            "index": self.index,
            "queue_depth": self.depth,
            "queue_samples": self.depth_samples,
            "oldest_wait": _short(self.oldest),
            "batches": self.batches,
            "batch_samples": self.batch_samples,
            "switches": self.switches,
        }


def _short(value: float | None) -> float | None:
    """Six significant digits; None for what JSON cannot hold."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """50th, 90th and 99th percentile by nearest rank (the smallest value that at least so many per cent do not exceed)."""
    ordered = sorted(values)
    last = len(ordered)
    p50, p90, p99 = (ordered[max(0, -(-last * share // 100) - 1)] for share in (50, 90, 99))
    return p50, p90, p99


@dataclass(frozen=True)
class Recent:
    """Sums over the last seconds. None where nothing was answered (or, for the accuracy, where it is not known).

    attainment   share of the requests that were taken up or refused in this time and were answered within their SLO: those
                 shed, expired and failed count as missed; those with bad input or a sender that left do not count
    ratio        mean over answered samples of the ratio they ran at
    accuracy     mean over answered samples of the accuracy measured at their ratio, 0..1
    """

    attainment: float | None
    ratio: float | None
    accuracy: float | None
    requests: int
    samples: int


class History:
    """Per-second rows of the last `keep` seconds. All times are readings of the caller's monotonic clock, in seconds.

    A clock that steps back a little is taken as standing still; one that steps back far is taken to have been set back, and its
    later readings are shifted, so that time goes on from where it was. One that leaps ahead leaves a gap, no longer than needed
    to outdate what is kept. Nothing takes longer for it. `clock` gives the history's own time.

    One thread feeds it, any may read.
    """

    def __init__(self, keep: int = KEEP) -> None:
        self.keep = keep
        self._seconds: deque[Second] = deque()
        self._shift = 0.0
        self._current = Second(0)
        self._seed = 1
        self._latest = -math.inf

    # ---- feeding -----------------------------------------------------------------------------------------------------------

    def at(self, now: float) -> Second:
        """The second to count an event of this moment in."""
        time = now + self._shift
        if self._seconds and self._current.time <= time < self._current.time + 1:
            self._latest = max(self._latest, time)
            return self._current
        return self._turn(now)

    def _turn(self, now: float) -> Second:
        time = self.clock(now)
        if not math.isfinite(time):
            return self._current
        if time != now + self._shift:
            self._shift = time - now
            time = now + self._shift  # as `clock` will say from here on: rounded, it may lie in the next second
        if self._seconds and time < self._current.time + 1:
            return self._current  # no new second: a small step back, or the clock was set back within this one
        self._latest = max(self._latest, time)
        self._current.close()
        second = self._current = Second(math.floor(time))
        self._seconds.append(second)
        while self._seconds[0].time <= second.time - self.keep:
            self._seconds.popleft()
        return second

    def clock(self, now: float) -> float:
        """The history's own time at the caller's `now`: the same, until the caller's clock leaps."""
        time = now + self._shift
        if time < self._latest - TOLERATED:
            return self._latest
        return min(time, self._latest + self.keep + SPARE) if self._seconds else time

    def latency(self, second: Second, seconds: float) -> None:
        """Note the latency of one answer (`second.answered` counts it already)."""
        kept = second.latencies
        if len(kept) < LATENCIES:
            kept.append(seconds)
        else:  # reservoir sampling: every answer of the second is kept with the same probability
            self._seed = (self._seed * _MULTIPLIER + _INCREMENT) & _MASK
            place = (self._seed >> 33) % second.answered
            if place < LATENCIES:
                kept[place] = seconds
        if seconds > second.worst:
            second.worst = seconds

    # ---- looking -----------------------------------------------------------------------------------------------------------

    def rows_json(self, now: float, since: float = -math.inf) -> str:
        """A JSON list of the whole seconds that ended after `since` (a time that `clock` gave) and by `now`, oldest first.

        Of each: t (its start); arrivals, answered, met, late, shed, expired, failed, invalid, cancelled in requests;
        arrived_samples, answered_samples; p50, p90, p99, worst (latency of its answers), queue and compute (means) and
        oldest_wait (its largest) in seconds; ratio and accuracy, means over answered samples; index of the ratio in force;
        queue_depth and queue_samples, their largest; batches and the batch_samples in them; switches of the ratio. null: nothing
        to tell. Seconds without any event have no row. Cheap also for many rows: the texts are ready.
        """
        time = self.clock(now)
        first = time - self.keep - 1
        seconds = list(self._seconds)  # a copy: made in one step, whatever the feeding thread does
        return "[" + ",".join(s.as_json() for s in seconds if s.time > first and since < s.time + 1 <= time) + "]"

    def rows(self, now: float, since: float = -math.inf) -> list[dict[str, Any]]:
        """The same as `rows_json`, parsed."""
        rows: list[dict[str, Any]] = json.loads(self.rows_json(now, since))
        return rows

    def recent(self, now: float, seconds: float = 60.0) -> Recent:
        """Sums over the last `seconds`, the one that is not over yet among them."""
        first = self.clock(now) - seconds
        met = requests = samples = known = 0
        ratio = accuracy = 0.0
        for second in reversed(list(self._seconds)):  # a copy, as above
            if second.time < first:
                break
            met += second.met
            requests += second.answered + second.shed + second.expired + second.failed
            samples += second.answered_samples
            known += second.known
            ratio += second.ratio
            accuracy += second.accuracy
        return Recent(
            met / requests if requests else None,
            ratio / samples if samples else None,
            accuracy / samples if samples and known == samples else None,
            requests,
            samples,
        )
