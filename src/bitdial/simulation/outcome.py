"""What became of every request of a simulation, and the figures made of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitdial.errors import ConfigError
from bitdial.serving.control import ServiceTable

ANSWERED, SHED, EXPIRED = 1, 2, 3
_TOLERANCE = 1e-9  # seconds; a deadline met to the last digit is met


@dataclass(frozen=True)
class Outcome:
    """One entry per request [n], in order of arrival; times in seconds on the virtual clock.

    arrival, begun, finish   came, its batch began, its answer was out (NaN where there was none)
    index                    ratio index executed, -1 where none was
    status                   ANSWERED, SHED (refused when it came) or EXPIRED (dropped from the queue)
    replica, batch           where it went; samples of the batch that it was computed in
    samples                  of every request
    end                      when the last thing happened
    busy                     seconds that all workers computed, summed
    switches                 turns of the dial, summed over replicas
    events                   handled by the simulator
    """

    arrival: npt.NDArray[np.float64]
    begun: npt.NDArray[np.float64]
    finish: npt.NDArray[np.float64]
    index: npt.NDArray[np.int16]
    status: npt.NDArray[np.uint8]
    replica: npt.NDArray[np.int32]
    batch: npt.NDArray[np.int32]
    samples: int
    replicas: int
    workers: int
    end: float
    busy: float
    switches: int
    events: int

    @property
    def latency(self) -> npt.NDArray[np.float64]:
        """Seconds from arrival to answer [n]; NaN where there was no answer."""
        return self.finish - self.arrival

    def met(self, slo: float) -> npt.NDArray[np.bool_]:
        """Which requests were answered within `slo` seconds [n]."""
        met: npt.NDArray[np.bool_] = np.nan_to_num(self.latency, nan=math.inf) <= slo + _TOLERANCE
        return met


@dataclass(frozen=True)
class Summary:
    """Figures of a run. Times in seconds, shares in 0..1.

    attainment         requests answered within the SLO, of all that came
    late               answered after the SLO; shed and expired: not answered
    p50, p90, p99      latency of the answered; mean_wait: arrival to the begin of the batch
    accuracy           request-weighted mean of the table's expected accuracy over the answered; None where it has none
    mean_ratio         the same of the ratio
    switches           turns of the dial per minute and replica
    utilisation        time that workers computed
    by_ratio           share of the answered per ratio of the table
    """

    requests: int
    answered: int
    met: int
    late: int
    shed: int
    expired: int
    attainment: float
    rate: float
    p50: float | None
    p90: float | None
    p99: float | None
    mean_latency: float | None
    mean_wait: float | None
    mean_batch: float | None
    accuracy: float | None
    mean_ratio: float | None
    switches: float
    utilisation: float
    by_ratio: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON-able; times are named with their unit."""
        row = asdict(self)
        for name in ("p50", "p90", "p99", "mean_latency", "mean_wait"):
            value = row.pop(name)
            row[f"{name}_ms"] = None if value is None else 1e3 * value
        row["switches_per_minute"] = row.pop("switches")
        row["rate_per_second"] = row.pop("rate")
        row["by_ratio"] = list(self.by_ratio)
        return row


def _known(table: ServiceTable) -> npt.NDArray[np.float64] | None:
    """Accuracy per ratio, as decisions are made by it; None unless it is known of all."""
    known = [a for a in table.expected if a is not None]
    return np.array(known) if len(known) == len(table.expected) else None


def summarize(outcome: Outcome, table: ServiceTable, slo: float) -> Summary:
    """The figures of a run with `table` at `slo` seconds."""
    n = outcome.arrival.size
    answered = outcome.status == ANSWERED
    count = int(answered.sum())
    met = int(outcome.met(slo).sum())
    latency = outcome.latency[answered]
    counts = np.bincount(outcome.index[answered], minlength=len(table.ratios))
    shares = counts / max(count, 1)
    accuracy = _known(table)
    p50, p90, p99 = (float(v) for v in np.quantile(latency, (0.5, 0.9, 0.99))) if count else (None, None, None)
    # Rates refer to the time in which requests came; the last batches run a little beyond it.
    span = max(float(outcome.arrival[-1]), outcome.end, 1e-9)
    return Summary(
        requests=n,
        answered=count,
        met=met,
        late=count - met,
        shed=int((outcome.status == SHED).sum()),
        expired=int((outcome.status == EXPIRED).sum()),
        attainment=met / n,
        rate=n / span,
        p50=p50,
        p90=p90,
        p99=p99,
        mean_latency=float(latency.mean()) if count else None,
        mean_wait=float((outcome.begun - outcome.arrival)[answered].mean()) if count else None,
        mean_batch=float(outcome.batch[answered].mean()) if count else None,
        accuracy=None if accuracy is None or not count else float(shares @ accuracy),
        mean_ratio=float(shares @ np.array(table.ratios)) if count else None,
        switches=60.0 * outcome.switches / span / outcome.replicas,
        utilisation=outcome.busy / (outcome.replicas * outcome.workers * max(outcome.end, 1e-9)),
        by_ratio=tuple(float(s) for s in shares),
    )


@dataclass(frozen=True)
class Second:
    """One window of the time series. Requests belong to the window in which they came.

    begin               seconds from the start
    arrived, met, late, shed, expired   requests
    p50, p99            latency in seconds of the answered; None without any
    ratio, accuracy     mean over the answered; None without any
    waiting             requests in queues at the end of the window
    """

    begin: float
    arrived: int
    met: int
    late: int
    shed: int
    expired: int
    p50: float | None
    p99: float | None
    ratio: float | None
    accuracy: float | None
    waiting: int


def time_series(outcome: Outcome, table: ServiceTable, slo: float, window: float = 1.0) -> list[Second]:
    """Figures per window of so many seconds. Raises ConfigError for windows that are not positive or too many."""
    if not (math.isfinite(window) and window > 0):
        raise ConfigError(f"the window of the time series must be a positive time, got {window}")
    last = float(outcome.arrival[-1])
    windows = int(last // window) + 1
    if windows > 1_000_000:
        raise ConfigError(f"{windows} windows are too many for a time series; take a longer window than {window} s")
    edges = window * np.arange(windows + 1)
    bounds = np.searchsorted(outcome.arrival, edges)
    bounds[-1] = outcome.arrival.size
    met, accuracy, ratios = outcome.met(slo), _known(table), np.array(table.ratios)
    latency = outcome.latency
    # Whatever never began waits until it is dropped: at most until the SLO or timeout, and no window is that precise.
    left = np.sort(np.where(outcome.status == ANSWERED, outcome.begun, outcome.arrival))
    waiting = bounds[1:] - np.searchsorted(left, edges[1:])
    rows = []
    for w in range(windows):
        part = slice(int(bounds[w]), int(bounds[w + 1]))
        status = outcome.status[part]
        answered = status == ANSWERED
        index = outcome.index[part][answered]
        some = index.size > 0
        p50, p99 = (float(v) for v in np.quantile(latency[part][answered], (0.5, 0.99))) if some else (None, None)
        good = int(met[part].sum())
        rows.append(
            Second(
                begin=float(edges[w]),
                arrived=status.size,
                met=good,
                late=int(index.size) - good,
                shed=int((status == SHED).sum()),
                expired=int((status == EXPIRED).sum()),
                p50=p50,
                p99=p99,
                ratio=float(ratios[index].mean()) if some else None,
                accuracy=float(accuracy[index].mean()) if some and accuracy is not None else None,
                waiting=max(0, int(waiting[w])),
            )
        )
    return rows
