"""The counts of one served model: told of every event by the served model, read by Prometheus and by the live page."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bitdial.serving.metrics.history import History

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# Seconds: from 1 ms to 10 s, close together where SLOs usually lie, so that a quantile read off them is off by a sixth at most.
LATENCY_BOUNDS = (
    0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.125, 0.15,
    0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0,
)  # fmt: skip
BATCH_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)  # samples
OUTCOMES = ("ok", "late", "shed", "expired", "failed", "invalid", "cancelled")
SHED_REASONS = ("queue full", "overloaded")
RECENT = 60.0  # seconds that the gauges over recent requests look back


class Distribution:
    """Counts by size, as a Prometheus histogram has them: `counts[i]` values above bounds[i-1] and up to bounds[i]; the last
    entry counts those above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value (not negative)."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Tally:
    """One counter, held by those that count, so that nothing is looked up."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class ModelMetrics:
    """Counters, distributions and the history of one model.

    registry   where Prometheus finds them (a registry holds all models of a server); None: nowhere
    model      the name that the model is served under, the value of the label `model`
    ratios     ratios of the model, ascending; `index` below is a place in it
    accuracy   per ratio, 0..1; None where it was not measured
    slo        the server's SLO in seconds
    clock      the clock that `now` is read from, in seconds; read when Prometheus asks for what happened in the last minute

    Feed it from one thread. It may be read from any: a reader may see a request in one counter and not yet in the next, never
    a counter that goes back. Every call of the feeding side takes about a microsecond and raises nothing for odd numbers:
    times that are negative or not finite (a clock that was set) count as 0. `now` is a monotonic clock, in seconds.

    `on_read`, if set, is called before the numbers are read, from the reader's thread: the served model may bring the gauges up
    to date in it.
    """

    def __init__(
        self,
        registry: CollectorRegistry | None,
        model: str,
        ratios: Sequence[float],
        accuracy: Sequence[float | None],
        slo: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.slo, self.clock = model, slo, clock
        self.history = History()
        self.on_read: Callable[[], None] | None = None
        self.queue_latency = Distribution(LATENCY_BOUNDS)
        self.compute_latency = Distribution(LATENCY_BOUNDS)
        self.total_latency = Distribution(LATENCY_BOUNDS)
        self.batch_samples = Distribution(BATCH_BOUNDS)
        self.outcomes = {name: Tally() for name in OUTCOMES}
        self.shed_reasons = {name: Tally() for name in SHED_REASONS}
        self.failures: dict[str, Tally] = {}
        self.samples_by_ratio: dict[str, Tally] = {}
        self.batches_by_ratio: dict[str, Tally] = {}
        self.reloads = {"ok": Tally(), "failed": Tally()}
        self.restarts = 0
        self.overruns = 0  # batches whose arithmetic took longer than modelled time allows
        self.dilation = 1.0  # seconds of the wall clock in one of `clock`
        self.arrived_requests = self.arrived_samples = 0
        self.switches = self.queue_depth = self.queue_samples = self.workers = self.index = 0
        self.oldest_wait = 0.0
        self.last_inference = 0.0  # when a request was last answered, seconds since 1970; 0: never
        self._switches_told = 0
        self._growing = (
            threading.Lock()
        )  # held while a table of counters gets a new one, and while such a table is copied
        self._ok, self._late = self.outcomes["ok"], self.outcomes["late"]
        self.use_model(ratios, accuracy)
        if registry is not None:
            from bitdial.serving.metrics.exposition import collector_of

            collector_of(registry).add(self)

    def use_model(self, ratios: Sequence[float], accuracy: Sequence[float | None]) -> None:
        """The model file was replaced by another, with these ratios and accuracies; all counts go on."""
        self.ratios, self.accuracy = tuple(ratios), tuple(accuracy)
        self._last = len(self.ratios) - 1
        with self._growing:
            names = [ratio_label(ratio) for ratio in self.ratios]
            self._samples = [self.samples_by_ratio.setdefault(name, Tally()) for name in names]
            self._batches = [self.batches_by_ratio.setdefault(name, Tally()) for name in names]

    # ---- requests ----------------------------------------------------------------------------------------------------------

    def arrived(self, now: float, samples: int) -> None:
        """A well-formed request came in, whatever becomes of it."""
        self.arrived_requests += 1
        self.arrived_samples += samples
        second = self.history.at(now)
        second.arrivals += 1
        second.arrived_samples += samples

    def answered(
        self, now: float, *, index: int, queue: float, compute: float, total: float, samples: int, met: bool
    ) -> None:
        """A request was answered. Seconds it waited, its batch took, and from its arrival to its answer; whether in time."""
        if index > self._last:  # of a model file that has been replaced since
            index = self._last
        # False for NaN too.
        if not 0.0 <= queue < math.inf:
            queue = 0.0
        if not 0.0 <= compute < math.inf:
            compute = 0.0
        if not 0.0 <= total < math.inf:
            total = 0.0
        self.last_inference = time.time()
        history = self.history
        second = history.at(now)
        second.answered += 1
        second.answered_samples += samples
        if met:
            self._ok.count += 1
            second.met += 1
        else:
            self._late.count += 1
            second.late += 1
        self._samples[index].count += samples
        self.queue_latency.add(queue)
        self.compute_latency.add(compute)
        self.total_latency.add(total)
        second.queue += queue
        second.compute += compute
        second.ratio += samples * self.ratios[index]
        accuracy = self.accuracy[index]
        if accuracy is not None:
            second.accuracy += samples * accuracy
            second.known += samples
        history.latency(second, total)

    def shed(self, now: float, reason: str) -> None:
        """A request was refused for lack of capacity; `reason` as in the scheduler's Refusal ("queue full", "overloaded")."""
        self.outcomes["shed"].count += 1
        self._count(self.shed_reasons, reason)
        self.history.at(now).shed += 1

    def expired(self, now: float) -> None:
        """A request was dropped, because its answer would have come too late."""
        self.outcomes["expired"].count += 1
        self.history.at(now).expired += 1

    def failed(self, now: float, reason: str) -> None:
        """A request got an error that the server is to blame for; `reason` is one of a few fixed words ("worker crash")."""
        self.outcomes["failed"].count += 1
        self._count(self.failures, reason)
        self.history.at(now).failed += 1

    def invalid(self, now: float) -> None:
        """A request got an error that its sender is to blame for. It does not count against the SLO."""
        self.outcomes["invalid"].count += 1
        self.history.at(now).invalid += 1

    def cancelled(self, now: float) -> None:
        """The sender of a request left before its answer. It does not count against the SLO."""
        self.outcomes["cancelled"].count += 1
        self.history.at(now).cancelled += 1

    # ---- batches and the state of the server -------------------------------------------------------------------------------

    def batch(self, now: float, *, index: int, samples: int, requests: int) -> None:
        """A batch of so many samples and requests was given to a worker at ratio `index`."""
        self._batches[min(index, self._last)].count += 1
        self.batch_samples.add(samples)
        second = self.history.at(now)
        second.batches += 1
        second.batch_samples += samples

    def gauges(
        self,
        now: float,
        *,
        index: int,
        queue_depth: int,
        queue_samples: int,
        oldest_wait: float,
        switches: int,
        workers: int,
    ) -> None:
        """How things stand: ratio index in force, waiting requests and samples, seconds that the oldest has waited, changes of
        the ratio so far (as the scheduler counts them), workers that run. Call it at every dispatch and about once a second."""
        second = self.history.at(now)
        second.index = self.index = min(index, self._last)
        self.queue_depth, self.queue_samples, self.workers = queue_depth, queue_samples, workers
        if not 0.0 <= oldest_wait < math.inf:
            oldest_wait = 0.0
        self.oldest_wait = oldest_wait
        if switches != self._switches_told:  # a new scheduler (reload) starts from 0 again; the counter must not
            more = switches - self._switches_told if switches > self._switches_told else switches
            self._switches_told = switches
            self.switches += more
            second.switches += more
        if queue_depth > second.depth:
            second.depth = queue_depth
        if queue_samples > second.depth_samples:
            second.depth_samples = queue_samples
        if oldest_wait > second.oldest:
            second.oldest = oldest_wait

    def restarted(self, now: float) -> None:
        """A worker was started anew after it crashed or hung."""
        self.restarts += 1
        self.history.at(now)

    def reloaded(self, now: float, ok: bool) -> None:
        """The model file was loaded again, or could not be."""
        self.reloads["ok" if ok else "failed"].count += 1
        self.history.at(now)

    def _count(self, table: dict[str, Tally], name: str) -> None:
        tally = table.get(name)
        if tally is None:
            with self._growing:
                tally = table.setdefault(name, Tally())
        tally.count += 1

    # ---- reading -----------------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Have the numbers brought up to date (see `on_read`)."""
        if self.on_read is not None:
            self.on_read()

    def counts(self, table: dict[str, Tally]) -> dict[str, int]:
        """A copy of one of the tables of counters."""
        with self._growing:
            return {name: tally.count for name, tally in table.items()}

    def present(self) -> dict[str, Any]:
        """How things stand, JSON-able, for the live page: index, ratio, queue_depth, queue_samples, oldest_wait (seconds),
        workers, switches, restarts, reloads."""
        return {
            "index": self.index,
            "ratio": self.ratios[self.index],
            "queue_depth": self.queue_depth,
            "queue_samples": self.queue_samples,
            "oldest_wait": self.oldest_wait,
            "workers": self.workers,
            "switches": self.switches,
            "restarts": self.restarts,
            "reloads": {name: tally.count for name, tally in self.reloads.items()},
        }


def ratio_label(ratio: float) -> str:
    """Value of the label `ratio`: "0", "0.25", "1"."""
    return f"{ratio:.6g}"
