"""The event loop: replicas, each with the server's own `Scheduler`, under a virtual clock.

What happens at a replica, as in the server: a request comes, costs the server's thread some time, is taken in or refused; a free
worker gets the scheduler's next batch; the batch takes what the service table says, times noise; its answers go out. Events are
kept in one heap of tuples; arrivals, known beforehand and in order, are merged with it instead of being put in. Measured on one
Zen 4 core: the loop alone takes 4 us a request, the scheduler and its policy 14 to 20 us; SimPy 4 takes 9 us for requests that
only queue for a resource.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field

from bitdial.errors import ConfigError
from bitdial.serving.control import Batch, Policy, Request, Scheduler, ServiceTable, Settings, make_policy
from bitdial.serving.control.scheduler import Observer
from bitdial.settings import BaseConfig, setting
from bitdial.simulation.balancers import make_balancer
from bitdial.simulation.outcome import ANSWERED, EXPIRED, SHED, Outcome

MOST_REPLICAS = 100_000
_SUBMIT, _DONE, _WAKE, _SENT = range(4)
_PROGRESS_STEP = 4096  # requests between two calls of `progress`


_PANEL = "Fleet"


class Fleet(BaseConfig):
    """What serves: replicas, each with its own queue and dial. Seconds.

    Half of the overhead comes before the queue, half after the batch. On a shared core the engine stands still while the server's
    thread works.
    """

    replicas: int = Field(default=1, ge=1, le=MOST_REPLICAS, description="Servers.")
    workers: int = setting(1, "Engines of one server.", "N", _PANEL, ge=1)
    balancer: str = setting("power-of-two", "round-robin, least-loaded or power-of-two.", "NAME", _PANEL)
    overhead: float = setting(
        0.0, "The server's own time per request.", "MS", _PANEL, option="--overhead-ms", read="ms", ge=0, allow_inf_nan=False
    )
    shared_core: bool = setting(False, "Server and engine share a core: it delays batches too.", "", _PANEL)


class Noise(BaseConfig):
    """How far batches depart from the service table: lognormal factors with median 1. 0.03: most batches within 6 %. Those of
    servers hold for the whole run."""

    batch: float = setting(
        0.03, "Spread of batch times (of their logarithm).", "SIGMA", _PANEL, option="--noise", ge=0, allow_inf_nan=False
    )
    replica: float = setting(
        0.0, "The same between servers.", "SIGMA", _PANEL, option="--replica-noise", ge=0, allow_inf_nan=False
    )
    factor: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Of all batches: machines that are slower (above 1) or faster than the one measured.",
    )


@dataclass(frozen=True)
class Load:
    """What comes. arrivals: float64 [n], seconds, ascending, from 0 or later. samples: of every request. caps: int [n], the
    largest ratio index that each sender accepts; None: no limits."""

    arrivals: npt.NDArray[np.float64]
    samples: int = 1
    caps: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        arrivals = np.ascontiguousarray(self.arrivals, dtype=np.float64)
        object.__setattr__(self, "arrivals", arrivals)
        if arrivals.ndim != 1 or arrivals.size == 0:
            raise ConfigError("the load holds no request: give a trace or a rate that brings some")
        if not np.isfinite(arrivals).all() or arrivals[0] < 0 or (np.diff(arrivals) < 0).any():
            raise ConfigError("arrival times must be finite, ascending and not negative")
        if self.samples < 1:
            raise ConfigError(f"a request needs at least one sample, got {self.samples}")
        if self.caps is not None and self.caps.shape != arrivals.shape:
            raise ConfigError(f"{arrivals.size} requests need as many caps, got {self.caps.shape}")

    @property
    def duration(self) -> float:
        """Seconds from 0 to the last arrival."""
        return float(self.arrivals[-1])


class _Replica:
    """One server: its scheduler and what is going on."""

    __slots__ = ("busy", "ends", "factor", "free", "loop_free", "scheduler", "wake")

    def __init__(self, scheduler: Scheduler, workers: int, factor: float) -> None:
        self.scheduler, self.free, self.factor = scheduler, workers, factor
        self.loop_free = 0.0  # when the server's thread has done what it knows of
        self.ends: dict[int, float] = {}  # of running batches, by their number; the server's thread may put them off
        self.wake = math.inf
        self.busy = 0.0


class _Factors:
    """Lognormal factors, drawn in blocks."""

    BLOCK = 4096

    def __init__(self, sigma: float, factor: float, seed: int) -> None:
        self._sigma, self._factor = sigma, factor
        self._generator = np.random.default_rng([seed, 1])
        self._left: list[float] = []

    def next(self) -> float:
        if not self._left:
            drawn = self._generator.standard_normal(self.BLOCK)
            self._left = (self._factor * np.exp(self._sigma * drawn))[::-1].tolist()
        return self._left.pop()


def simulate(
    table: ServiceTable,
    settings: Settings,
    policy: str | Callable[[], Policy],
    load: Load,
    fleet: Fleet | None = None,
    noise: Noise | None = None,
    seed: int = 0,
    observer: Callable[[int], Observer | None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> Outcome:
    """Serve `load` with `fleet`. Every request ends answered, shed (refused when it came) or expired (dropped from the queue).

    policy: its text (`make_policy`) or what makes one per replica. observer: for the scheduler of the replica of that number
    (a `Recorder`), None: none. progress: called with the share of requests that have come. Raises ConfigError for settings that
    contradict the table.
    """
    fleet, noise = fleet or Fleet(), noise or Noise()
    make = (lambda: make_policy(policy)) if isinstance(policy, str) else policy
    return _Run(table, settings, make, load, fleet, noise, seed, observer).run(progress)


class _Run:
    def __init__(
        self,
        table: ServiceTable,
        settings: Settings,
        make: Callable[[], Policy],
        load: Load,
        fleet: Fleet,
        noise: Noise,
        seed: int,
        observer: Callable[[int], Observer | None] | None,
    ) -> None:
        self.table, self.settings, self.load, self.fleet = table, settings, load, fleet
        spread = np.random.default_rng([seed, 3]).standard_normal(fleet.replicas) * noise.replica
        self.replicas = [
            _Replica(
                Scheduler(table, settings, make(), fleet.workers, observer(r) if observer else None),
                fleet.workers,
                math.exp(spread[r]),
            )
            for r in range(fleet.replicas)
        ]
        self.factors = _Factors(noise.batch, noise.factor, seed)
        self.outstanding = [0] * fleet.replicas
        self.balancer = make_balancer(fleet.balancer, self.outstanding, seed)
        self.heap: list[tuple[float, int, int, int, object]] = []  # time, order, kind, replica, what
        self.order = 0
        self.seconds: dict[tuple[int, int], float] = {}  # of the table, looked up once per cell
        n = load.arrivals.size
        self.status, self.index, self.where = bytearray(n), [-1] * n, [-1] * n
        self.begun, self.finish, self.batched = [math.nan] * n, [math.nan] * n, [0] * n
        self.before = self.after = 0.5 * fleet.overhead
        self.events = 0
        self.end = 0.0

    def push(self, time: float, kind: int, replica: int, what: object) -> None:
        heapq.heappush(self.heap, (time, self.order, kind, replica, what))
        self.order += 1

    def run(self, progress: Callable[[float], None] | None) -> Outcome:
        load, heap, pick = self.load, self.heap, self.balancer.pick
        direct = self.fleet.overhead == 0.0
        arrivals: list[float] = load.arrivals.tolist()
        n, samples = len(arrivals), load.samples
        outstanding, changed, where = self.outstanding, self.balancer.changed, self.where
        now = 0.0
        for id, arrival in enumerate(arrivals):
            while heap and heap[0][0] <= arrival:
                now = heap[0][0]
                self.happen()
            now = arrival
            self.events += 1
            at = pick()
            where[id] = at
            outstanding[at] += samples
            changed(at)
            if direct:
                self.submit(now, at, id)
            else:
                replica = self.replicas[at]
                replica.loop_free = max(now, replica.loop_free) + self.before
                self.stall(replica, self.before)
                self.push(replica.loop_free, _SUBMIT, at, id)
            if progress is not None and id % _PROGRESS_STEP == 0:
                progress(id / n)
        while heap:
            now = heap[0][0]
            self.happen()
        self.end = now
        if progress is not None:
            progress(1.0)
        return self.outcome()

    def happen(self) -> None:
        """Take the next event off the heap and let it happen."""
        now, _, kind, at, what = heapq.heappop(self.heap)
        replica = self.replicas[at]
        self.events += 1
        if kind == _DONE:
            self.done(now, at, replica, what)  # type: ignore[arg-type]
        elif kind == _SUBMIT:
            self.submit(now, at, what)  # type: ignore[arg-type]
        elif kind == _WAKE:
            if replica.wake == now:
                replica.wake = math.inf
                self.dispatch(now, at, replica)
        else:
            for seconds in what:  # type: ignore[attr-defined]
                replica.scheduler.answered(now, seconds)

    def submit(self, now: float, at: int, id: int) -> None:
        replica, settings = self.replicas[at], self.settings
        arrival = float(self.load.arrivals[id])
        deadline = arrival + settings.slo
        drop_at = deadline if settings.timeout is None else arrival + settings.timeout
        caps = self.load.caps
        cap = replica.scheduler.allowed[-1] if caps is None else int(caps[id])
        request = Request(id, arrival, deadline, drop_at, self.load.samples, cap)
        if replica.scheduler.submit(now, request) is not None:
            self.lost(at, id, SHED)
        elif replica.free:
            self.dispatch(now, at, replica)

    def lost(self, at: int, id: int, status: int) -> None:
        self.status[id] = status
        self.outstanding[at] -= self.load.samples
        self.balancer.changed(at)

    def dispatch(self, now: float, at: int, replica: _Replica) -> None:
        """Give free workers what the scheduler has for them."""
        scheduler = replica.scheduler
        while replica.free and scheduler.queue:
            batch = scheduler.next_batch(now)
            for request in scheduler.take_expired():
                self.lost(at, request.id, EXPIRED)
            if batch is None:
                wake = scheduler.wake_at()
                if wake is not None and wake != replica.wake:
                    # A moment that has passed already and brought nothing must not stop the clock.
                    replica.wake = max(wake, math.nextafter(now, math.inf))
                    self.push(replica.wake, _WAKE, at, None)
                return
            key = (batch.index, batch.samples)
            seconds = self.seconds.get(key)
            if seconds is None:
                seconds = self.seconds[key] = self.table.latency(*key)
            seconds *= self.factors.next() * replica.factor
            if self.fleet.shared_core:
                seconds += max(0.0, replica.loop_free - now)
            replica.free -= 1
            replica.busy += seconds
            replica.ends[batch.id] = now + seconds
            self.push(now + seconds, _DONE, at, batch)

    def stall(self, replica: _Replica, seconds: float) -> None:
        """The server's thread takes the core away from the engines for so long."""
        if self.fleet.shared_core:
            seconds /= self.fleet.workers  # its core is that of one of them
            for id in replica.ends:
                replica.ends[id] += seconds
                replica.busy += seconds

    def done(self, now: float, at: int, replica: _Replica, batch: Batch) -> None:
        end = replica.ends[batch.id]
        if end > now:  # put off by the server's thread since
            self.push(end, _DONE, at, batch)
            return
        del replica.ends[batch.id]
        replica.free += 1
        replica.scheduler.completed(now, batch, now - batch.begun)
        self.outstanding[at] -= batch.samples
        self.balancer.changed(at)
        if replica.scheduler.queue:  # the next batch goes out before the answers
            self.dispatch(now, at, replica)
        after, out, sent = self.after, now, []
        if after:
            replica.loop_free = max(now, replica.loop_free)
        begun, index, samples = batch.begun, batch.index, batch.samples
        for request in batch.requests:
            if after:
                out = replica.loop_free = replica.loop_free + after
                sent.append(out - now)
            id = request.id
            self.status[id] = ANSWERED
            self.begun[id], self.finish[id], self.index[id], self.batched[id] = begun, out, index, samples
        if sent:
            self.stall(replica, after * len(sent))
            self.push(out, _SENT, at, sent)

    def outcome(self) -> Outcome:
        return Outcome(
            arrival=self.load.arrivals,
            begun=np.array(self.begun),
            finish=np.array(self.finish),
            index=np.array(self.index, dtype=np.int16),
            status=np.frombuffer(bytes(self.status), dtype=np.uint8),
            replica=np.array(self.where, dtype=np.int32),
            batch=np.array(self.batched, dtype=np.int32),
            samples=self.load.samples,
            replicas=self.fleet.replicas,
            workers=self.fleet.workers,
            end=self.end,
            busy=sum(replica.busy for replica in self.replicas),
            switches=sum(replica.scheduler.switches for replica in self.replicas),
            events=self.events,
        )
