"""The scheduler of one model: admits requests, forms batches, asks the policy for the ratio, learns from what batches took.

Deterministic: its state changes only in the methods below, and each is told the time. The same calls give the same answers, so a
recorded run can be replayed (`record`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from bitdial.serving.control.queue import Request, RequestQueue
from bitdial.serving.control.rate import ArrivalRate
from bitdial.serving.control.settings import Settings
from bitdial.serving.control.table import CorrectedTable, ServiceTable
from bitdial.serving.control.view import Policy, View, at_most

LOOK = 64  # waiting requests looked at for the next deadline


@dataclass(frozen=True)
class Refusal:
    """Why a request was not taken in, and after how many seconds it is worth trying again."""

    reason: str  # "queue full" | "overloaded"
    retry_after: float


@dataclass
class Batch:
    """Requests to be computed together at one ratio index. `expected`: predicted seconds. `begun`: when it was given out."""

    id: int
    requests: list[Request]
    samples: int
    index: int
    expected: float
    begun: float
    late: list[Request] = field(default_factory=list)  # in this batch, though their deadline cannot be met


class Observer(Protocol):
    """What is told about every call, for recording."""

    def __call__(self, event: str, now: float, **fields: Any) -> None: ...


class Scheduler:
    """See the module docstring. Not safe for several threads: a server calls it from its event loop."""

    def __init__(
        self,
        table: ServiceTable,
        settings: Settings,
        policy: Policy,
        workers: int = 1,
        observer: Observer | None = None,
    ) -> None:
        self.settings, self.policy, self.observer = settings, policy, observer
        self.table = CorrectedTable(table)
        self.allowed = settings.allowed(table)
        limit = getattr(policy, "top", None)
        self.top: int = self.allowed[-1] if limit is None else limit(table, self.allowed)
        self.workers = workers  # may be changed while running
        self.queue = RequestQueue()
        self.rate = ArrivalRate(10.0 * settings.slo, max(100.0 * settings.slo, 10.0))
        self.overhead = 0.0  # seconds that nearly every answer needs after its batch (`answered` measures it)
        self._way_out = self._way_out_spread = 0.0
        settle = getattr(policy, "rest", None)
        self.rest: int = self.allowed[0] if settle is None else settle(table, self.allowed)
        self.current, self.since = self.rest, -math.inf
        self.switches = 0
        self.running: dict[int, Batch] = {}
        self.full_batch = self._full_batch()
        self._expired: list[Request] = []
        self._batches = 0
        self._active = -math.inf  # when there was last something to do
        self._woken = False  # the head of the queue came when there had been nothing to do

    def _full_batch(self) -> int:
        """The smallest batch with nearly the best throughput (97 %) at the top ratio: larger ones only add latency."""
        table, top = self.table.table, self.top
        sizes = [b for b in table.batches if b < self.settings.max_batch] + [self.settings.max_batch]
        best = max(table.throughput(top, b) for b in sizes)
        return next(b for b in sizes if table.throughput(top, b) >= 0.97 * best)

    # ---- requests in -----------------------------------------------------------------------------------------------------

    def cap(self, max_ratio: float | None) -> int:
        """Ratio index that a request's `max_ratio` allows (None: no limit). -1: below the model's smallest ratio."""
        return self.allowed[-1] if max_ratio is None else self.table.table.at_or_below(max_ratio)

    def submit(self, now: float, request: Request) -> Refusal | None:
        """Take a request in; a Refusal if it cannot be: the queue is full, or it would be late even at the top ratio."""
        self.rate.most = 1.5 / self._pace()
        self.rate.arrived(now, request.samples)
        refusal = self._refusal(now, request)
        if self.idle(now):
            self._turn(now, self.rest)
            self._woken = refusal is None
        self._active = max(self._active, now)
        if refusal is None:
            self.queue.add(request)
        if self.observer is not None:
            self.observer(
                "submit", now, id=request.id, arrival=request.arrival, deadline=request.deadline, drop_at=request.drop_at,
                samples=request.samples, cap=request.cap, refused=None if refusal is None else refusal.reason,
            )  # fmt: skip
        return refusal

    def idle(self, now: float) -> bool:
        """Whether nothing has waited or run for one SLO: what comes next belongs to no burst."""
        return not self.queue and not self.running and now - self._active >= self.settings.slo

    def dial(self, now: float) -> int:
        """Ratio index in force: that of the last batch, or where the dial rests when there is nothing to do."""
        return self.rest if self.idle(now) else self.current

    def _turn(self, now: float, index: int) -> None:
        if index != self.current:
            self.switches += 1
            self.current, self.since = index, now

    def _refusal(self, now: float, request: Request) -> Refusal | None:
        pace, busy = self._pace(), self._busy(now) / max(self.workers, 1)
        ahead = busy + self.queue.samples * pace
        if len(self.queue) >= self.settings.max_queue:
            return Refusal("queue full", ahead)
        if not self.settings.refuse_late:
            return None
        if self.queue and request.deadline < self.queue[-1].deadline:  # it will overtake some
            ahead = busy + pace * sum(r.samples for r in self.queue if r.deadline <= request.deadline)
        late = now + ahead + self._quickest(request) + self.overhead - request.drop_at
        if late > 0 and (self.queue or self.running):
            return Refusal("overloaded", late)
        return None

    def _pace(self) -> float:
        """Seconds per sample of all workers in full batches at the top ratio."""
        return self.table.latency(self.top, self.full_batch) / self.full_batch / max(self.workers, 1)

    def _quickest(self, request: Request) -> float:
        """Seconds of a batch of this request alone at the largest ratio that it may have."""
        return self.table.latency(min(self.top, max(request.cap, self.allowed[0])), request.samples)

    def cancel(self, now: float, id: int) -> bool:
        """Forget a waiting request whose sender has gone."""
        found = self.queue.remove(id)
        if self.observer is not None:
            self.observer("cancel", now, id=id, found=found)
        return found

    # ---- batches out -----------------------------------------------------------------------------------------------------

    def _busy(self, now: float) -> float:
        return sum(max(0.0, b.begun + b.expected - now) for b in self.running.values())

    def next_batch(self, now: float) -> Batch | None:
        """The batch that a free worker should run now; None: nothing to do yet (see `wake_at`). Requests that cannot be
        answered before their `drop_at` are set aside for `take_expired`."""
        self._drop(now)
        batch = None
        if self.queue and not self._waits(now):
            batch = self._form(now)
        if self.observer is not None:
            self.observer(
                "next", now, batch=None if batch is None else batch.id,
                ids=[] if batch is None else [r.id for r in batch.requests], index=None if batch is None else batch.index,
                workers=self.workers,
            )  # fmt: skip
        return batch

    def _drop(self, now: float) -> None:
        gone = []
        for at, request in enumerate(self.queue):
            quickest = self._quickest(request)
            if now >= request.drop_at or now + quickest + self.overhead > request.drop_at + 1e-9:
                gone.append(at)
            elif request.drop_at > now + 4.0 * quickest and request.deadline > now + 4.0 * quickest:
                break  # the rest have later deadlines
        if gone:
            self._expired += self.queue.take(gone)

    def expire(self, now: float) -> None:
        """Set aside what cannot be answered in time any more, while no worker is free for a batch."""
        self._drop(now)
        if self.observer is not None:
            self.observer("expire", now)

    def take_expired(self) -> list[Request]:
        """Requests dropped since the last call."""
        gone, self._expired = self._expired, []
        return gone

    def _waits(self, now: float) -> bool:
        """Whether a batch that is not full should wait for more."""
        if self.settings.max_wait <= 0 or self.queue.samples >= self.full_batch:
            return False
        return now < self._wait_until()

    def _wait_until(self) -> float:
        head = self.queue[0]
        oldest = self.queue.oldest_arrival()
        assert oldest is not None
        # Never so long that the head could not be computed at the lowest ratio any more.
        latest = head.deadline - self.overhead - self.table.safe(self.allowed[0], self.full_batch)
        return min(oldest + self.settings.max_wait, latest)

    def wake_at(self, free: bool = True) -> float | None:
        """When `next_batch` (`expire`, if no worker is free) should be called although nothing else happens; None: no need."""
        if not self.queue:
            return None
        due = min(r.drop_at for r in itertools.islice(self.queue, LOOK))
        return min(due, self._wait_until()) if free and self.settings.max_wait > 0 else due

    def _form(self, now: float) -> Batch:
        positions, samples = self._head(now, None)
        view = View(
            now=now, table=self.table, queue=self.queue, batch=samples, requests=len(positions),
            rate=self.rate.present(now), request_size=self.rate.request_size,
            workers=max(self.workers, 1), busy=self._busy(now), slo=self.settings.slo, overhead=self.overhead,
            allowed=self.allowed, full_batch=self.full_batch, current=self.current, since=self.since,
            idle=self._woken and len(positions) == len(self.queue) and not self.running,
        )  # fmt: skip
        self._woken = False
        index = self.policy.choose(view)
        self._turn(now, index)
        head = self.queue[0]
        # The dial's wish is limited by the caller who is next; others join if they accept as much.
        index = at_most(self.allowed, min(index, head.cap))
        positions, samples = self._head(now, index)
        requests = self.queue.take(positions)
        expected = self.table.latency(index, samples)
        self._batches += 1
        late = [r for r in requests if now + expected + self.overhead > r.deadline]
        batch = Batch(self._batches, requests, samples, index, expected, now, late)
        self.running[batch.id] = batch
        return batch

    def _head(self, now: float, index: int | None) -> tuple[list[int], int]:
        """Positions and samples of the next batch: by deadline, up to a full batch, as long as the first deadline can be kept at
        the top ratio. With `index`, only requests that accept it."""
        positions: list[int] = []
        samples = 0
        deadline = self.queue[0].deadline - self.overhead
        for at, request in enumerate(self.queue):
            if index is not None and request.cap < index:
                continue
            more = samples + request.samples
            if positions and (more > self.full_batch or now + self.table.latency(self.top, more) > deadline):
                break
            positions.append(at)
            samples = more
            if samples >= self.full_batch or at >= 4 * self.full_batch:
                break
        return positions, samples

    # ---- batches back ----------------------------------------------------------------------------------------------------

    def completed(self, now: float, batch: Batch, seconds: float) -> None:
        """A batch is done; `seconds` from giving it out to having its results."""
        self.running.pop(batch.id, None)
        self._active = max(self._active, now)
        self.table.observe(batch.index, batch.samples, seconds)
        if self.observer is not None:
            self.observer("done", now, batch=batch.id, seconds=seconds)

    def failed(self, now: float, batch: Batch) -> None:
        """A batch was lost with its worker."""
        self.running.pop(batch.id, None)
        self._active = max(self._active, now)
        if self.observer is not None:
            self.observer("failed", now, batch=batch.id)

    def answered(self, now: float, seconds: float) -> None:
        """An answer left `seconds` after its batch was done: time that deadlines have to spare for it."""
        if math.isfinite(seconds) and 0 <= seconds <= self.settings.slo:
            self._way_out += 0.05 * (seconds - self._way_out)
            self._way_out_spread += 0.05 * (abs(seconds - self._way_out) - self._way_out_spread)
            self.overhead = self._way_out + 2.0 * self._way_out_spread
        if self.observer is not None:
            self.observer("answered", now, seconds=seconds)

    # ---- to look at ------------------------------------------------------------------------------------------------------

    def oldest_wait(self, now: float) -> float:
        """Seconds that the oldest waiting request has waited."""
        oldest = self.queue.oldest_arrival()
        return 0.0 if oldest is None else max(0.0, now - oldest)
