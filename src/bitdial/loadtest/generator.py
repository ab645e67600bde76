"""The open-loop load generator: every request leaves at its scheduled time, whatever became of the ones before.

Latency is counted from the SCHEDULED time, so that a stall of the server shows in every request that fell due meanwhile: no
coordinated omission (G. Tene, "How NOT to Measure Latency", 2013). How late the generator itself was is recorded per request.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import gc
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, InstanceOf, field_validator

from bitdial.errors import ConfigError
from bitdial.loadtest.arrivals import Schedule
from bitdial.loadtest.client import Pool, Target, allow_connections, ask
from bitdial.loadtest.errors import ServerError
from bitdial.loadtest.model import RemoteModel, error_text, find_model
from bitdial.loadtest.payload import LabelledImages, Payload, build_payload, count_right, read_document
from bitdial.loadtest.result import Result, Status
from bitdial.loadtest.timer import LoopTimer
from bitdial.settings import BaseConfig, setting

# Overdue requests sent in one turn of the event loop: answers must not be kept waiting for their time stamp.
BURST = 16
ERROR_KINDS = 20  # different messages that are kept
STOP_SECONDS = 2.0  # after Ctrl-C: how long answers to what is under way are waited for
_SWEEP = 0.05
_NAMES = [s.name.lower() for s in Status]
_QUIET = 0.002  # the progress view is drawn when no request is due within this


_REQUESTS = "Requests"


class LoadPlan(BaseConfig):
    """One test. Seconds."""

    schedule: InstanceOf[Schedule] = Field(description="When requests are due.")
    samples: int = setting(1, "Samples per request.", "N", _REQUESTS, option="--samples --images", ge=1)
    slo: float | None = setting(
        None,
        "Answers should come so soon; sent with every request. Default: the server's own, if it tells.",
        "MS", _REQUESTS, option="--slo-ms", read="ms", gt=0, allow_inf_nan=False,
    )  # fmt: skip
    send_slo: bool = Field(default=True, description="Send `slo` as a parameter, too.")
    max_ratio: float | None = setting(
        None,
        "Sent with every request: the server must not turn the dial further for it (50, 50% or 0.5).",
        "SHARE", _REQUESTS, read="share", ge=0, le=1,
    )  # fmt: skip
    timeout: float = setting(
        10.0, "Give a request up so long after it was due.", "SECONDS", _REQUESTS, gt=0, allow_inf_nan=False
    )
    warmup: int = setting(8, "Requests sent one by one before the test, not counted.", "N", _REQUESTS, ge=0)
    connections: int = Field(default=16, ge=1, description="Connections that are opened ahead.")
    max_connections: int = setting(
        1024, "Never open more; requests then wait (and it is told).", "N", "Connection", ge=1
    )
    seed: int = setting(0, "Seed of every random choice.", "N", ge=0)
    title: str = setting("", "Heading and name in legends.", "TEXT", "Output")

    @field_validator("schedule")
    @classmethod
    def _some(cls, schedule: Schedule) -> Schedule:
        if not len(schedule.times):
            raise ConfigError("the schedule has no request; raise the rate or the duration")
        return schedule


@dataclass(frozen=True)
class Snapshot:
    """How a test stands. elapsed, seconds: of the schedule. The rest is of the last second; times in seconds."""

    elapsed: float
    seconds: float
    sent: int
    total: int
    under_way: int
    offered: float
    answered: float
    p99: float | None
    ratio: float | None
    missed: int
    counts: dict[str, int]


Observer = Callable[[Snapshot], None]


def run_load(
    target: Target,
    model: str | None,
    plan: LoadPlan,
    *,
    data: LabelledImages | None = None,
    observer: Observer | None = None,
    every: float = 0.5,
) -> Result:
    """Run a test to its end, in an event loop of its own (uvloop's, where it is installed).

    observer is called about every `every` seconds, in a quiet moment. Ctrl-C stops sending, waits shortly for the answers that
    are under way and returns what there is; a second one raises KeyboardInterrupt.
    Raises ServerError, ConfigError, DataError before the first request of the test; nothing during it.
    """
    return _run(load(target, model, plan, data=data, observer=observer, every=every))


async def load(
    target: Target,
    model: str | None,
    plan: LoadPlan,
    *,
    data: LabelledImages | None = None,
    observer: Observer | None = None,
    every: float = 0.5,
) -> Result:
    """As `run_load`, within a running event loop."""
    found = await find_model(target, model)
    parameters: dict[str, float] = {}
    if plan.slo is not None and plan.send_slo:
        parameters["slo_ms"] = round(1e3 * plan.slo, 6)
    if plan.max_ratio is not None:
        parameters["max_ratio"] = plan.max_ratio
    payload = build_payload(target, found, plan.samples, data=data, parameters=parameters, seed=plan.seed)
    for k in range(plan.warmup):
        await _warm_up(target, payload.requests[k % len(payload.requests)], plan.timeout)
    run = LoadRun(target, found, plan, payload, observer, every)
    return await run.run()


async def _warm_up(target: Target, request: bytes, timeout: float) -> None:
    """Send one request. Raises ServerError for an answer that says that no request of this form will ever do."""
    answer = await ask(target, request, max(timeout, 30.0))
    if 400 <= answer.status < 500 and answer.status not in (408, 429):
        raise ServerError(f"{target.url} refuses the test's requests ({answer.status}): {error_text(answer.body)}")
    if answer.status == 200:
        try:
            read_document(answer.body, answer.header_length)
        except ValueError as error:
            raise ServerError(f"{target.url} does not answer as an inference server does: {error}") from None


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    try:
        import uvloop
    except ImportError:  # none for this system: asyncio's own loop costs about a third more per request
        return asyncio.run(work)
    return uvloop.run(work)


class LoadRun:
    """The state of one test. All its times are the model's seconds, which are the wall clock's unless the model's are modelled
    (`RemoteModel.dilation`)."""

    def __init__(
        self,
        target: Target,
        model: RemoteModel,
        plan: LoadPlan,
        payload: Payload,
        observer: Observer | None,
        every: float,
    ) -> None:
        self.target, self.model, self.plan, self.payload = target, model, plan, payload
        self.observer, self.every = observer, every
        self.slo = plan.slo if plan.slo is not None else None if model.slo_ms is None else model.slo_ms / 1e3
        self.pace = model.dilation
        self.due: list[float] = plan.schedule.times.tolist()
        n = len(self.due)
        # Plain lists: setting an item costs a third of what it does in a NumPy array.
        self.begun_at: list[float] = [math.nan] * n
        self.sent_at: list[float] = [math.nan] * n
        self.done_at: list[float] = [math.nan] * n
        self.status: list[int] = [-1] * n
        self.ratio: list[float] = [math.nan] * n
        self.queue: list[float] = [math.nan] * n
        self.compute: list[float] = [math.nan] * n
        self.right: list[int] = [-1] * n
        self.errors: dict[str, int] = {}
        self.begin = 0.0
        self.next = self.ended = self.oldest = 0
        self.stopped: float | None = None
        self.counts = {s.name.lower(): 0 for s in Status}
        self.recent: deque[tuple[float, float, float]] = deque()  # done, latency (NaN: not OK), ratio

    async def run(self) -> Result:
        """Send everything, wait for the answers. Returns the result."""
        loop = asyncio.get_running_loop()
        most = allow_connections(self.plan.max_connections)
        self.pool = Pool(self.target, self, most=most, spare=max(4, self.plan.connections // 4))
        self.timer = LoopTimer(loop, self._fire)
        self.finished: asyncio.Future[None] = loop.create_future()
        helpers: list[asyncio.Task[None]] = []
        with self._interruptible(loop), _no_collection():
            try:
                await self.pool.prepare(self.plan.connections)
                cpu = time.process_time()
                self.begin = time.monotonic() + 0.02
                self.timer.set(self._at(self.due[0]))
                helpers = [loop.create_task(self._sweep()), loop.create_task(self._observe())]
                await self.finished
                cpu = time.process_time() - cpu
            finally:
                self.timer.close()
                for helper in helpers:
                    helper.cancel()
                await asyncio.gather(*helpers, return_exceptions=True)
                await self.pool.close()
        return self._result(cpu)

    def stop(self) -> None:
        """Send nothing more; end when what is under way has been answered, or STOP_SECONDS from now."""
        if self.stopped is None and not self.finished.done():
            self.stopped = self._now()
            self.timer.cancel()
            self._end_if_done()
            asyncio.get_running_loop().call_later(STOP_SECONDS, self._finish)

    # What the pool tells.

    def sent(self, slot: int, now: float) -> None:
        self.sent_at[slot] = self._since(now)

    def answered(self, slot: int, now: float, status: int, header_length: int, body: bytes) -> None:
        kind = Status.FAILED
        if status == 200:
            try:
                document = read_document(body, header_length)
                self._read_parameters(slot, document.get("parameters"))
                if self.payload.labels is not None:
                    labels = self.payload.labels[slot % len(self.payload.labels)]
                    self.right[slot] = count_right(document, body, header_length, labels)
                kind = Status.OK
            except ValueError as error:
                self._count_error(f"unreadable answer: {error}")
        else:
            kind = Status.SHED if status == 503 else Status.EXPIRED if status == 504 else Status.FAILED
            self._count_error(f"{status}: {error_text(body)}" if len(self.errors) < ERROR_KINDS else str(status))
        self._ended(slot, now, kind)

    def failed(self, slot: int, now: float, reason: str) -> None:
        self._count_error(reason)
        self._ended(slot, now, Status.FAILED)

    # The rest is the run's own.

    def _since(self, now: float) -> float:
        """A reading of the wall clock in seconds of the test."""
        return (now - self.begin) / self.pace

    def _now(self) -> float:
        return self._since(time.monotonic())

    def _at(self, seconds: float) -> float:
        """The reverse of `_since`."""
        return self.begin + seconds * self.pace

    def _fire(self) -> None:
        """Send what is due."""
        due, requests = self.due, self.payload.requests
        if self.stopped is not None:
            return
        for _ in range(BURST):
            slot = self.next
            if slot == len(due):
                return
            now = self._now()
            if due[slot] > now:
                break
            self.next = slot + 1
            self.begun_at[slot] = now
            self.pool.send(slot, requests[slot % len(requests)])
        if self.next < len(due):
            self.timer.set(self._at(due[self.next]))  # at once, after a turn of the loop, if that has passed

    def _read_parameters(self, slot: int, parameters: Any) -> None:
        if not isinstance(parameters, dict):
            return
        self.ratio[slot] = _number(parameters.get("ratio"))
        self.queue[slot] = _number(parameters.get("queue_ms")) / 1e3
        self.compute[slot] = _number(parameters.get("compute_ms")) / 1e3

    def _count_error(self, text: str) -> None:
        if text not in self.errors and len(self.errors) >= ERROR_KINDS:
            text = "others"
        self.errors[text] = self.errors.get(text, 0) + 1

    def _ended(self, slot: int, now: float, status: Status) -> None:
        if self.status[slot] >= 0:
            return
        done = self._since(now)
        self.status[slot], self.done_at[slot] = status, done
        self.ended += 1
        self.counts[_NAMES[status]] += 1
        self.recent.append((done, done - self.due[slot] if status == Status.OK else math.nan, self.ratio[slot]))
        self._end_if_done()

    def _end_if_done(self) -> None:
        expected = len(self.due) if self.stopped is None else self.next
        if self.ended == expected:
            self._finish()

    def _finish(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)

    async def _sweep(self) -> None:
        """Give up requests whose time is over; all have the same limit, so the oldest come first."""
        while True:
            await asyncio.sleep(min(_SWEEP, self.pace * self.plan.timeout / 4))
            now = self._now()
            while self.oldest < self.next and (
                self.status[self.oldest] >= 0 or self.due[self.oldest] + self.plan.timeout <= now
            ):
                slot = self.oldest
                self.oldest += 1
                if self.status[slot] < 0:
                    self.pool.give_up(slot)
                    self._count_error(f"no answer within {self.plan.timeout:g} s")
                    self._ended(slot, self._at(now), Status.TIMEOUT)

    async def _observe(self) -> None:
        while True:
            await asyncio.sleep(self.every)
            for _ in range(20):
                due = self._at(self.due[self.next]) if self.next < len(self.due) else math.inf
                if due - time.monotonic() > _QUIET:
                    break
                await asyncio.sleep(0.001)
            snapshot = self.snapshot()
            if self.observer is not None:
                self.observer(snapshot)

    def snapshot(self) -> Snapshot:
        """How the test stands."""
        now = self._now()
        recent = self.recent
        while recent and recent[0][0] < now - 1.0:
            recent.popleft()
        times = np.asarray([latency for _, latency, _ in recent if not math.isnan(latency)])
        ratios = [ratio for _, latency, ratio in recent if not math.isnan(latency) and not math.isnan(ratio)]
        first = int(np.searchsorted(self.plan.schedule.times, now - 1.0))
        span = max(min(now, 1.0), 1e-3)
        return Snapshot(
            now, self.plan.schedule.seconds, self.next, len(self.due), self.next - self.ended, max(0, self.next - first) / span,
            len(times) / span, float(np.percentile(times, 99)) if len(times) else None,
            sum(ratios) / len(ratios) if ratios else None, len(recent) - len(times), dict(self.counts),
        )  # fmt: skip

    @contextlib.contextmanager
    def _interruptible(self, loop: asyncio.AbstractEventLoop) -> Any:
        """Ctrl-C stops the test; a second one is handled as before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def interrupt() -> None:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, before)
            self.stop()

        try:
            loop.add_signal_handler(signal.SIGINT, interrupt)
        except (NotImplementedError, RuntimeError):  # Windows
            yield
            return
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, before)

    def _result(self, cpu: float) -> Result:
        plan, pool, n = self.plan, self.pool, self.next if self.stopped is not None else len(self.due)
        status = np.asarray(self.status[:n], np.int64)
        return Result(
            np.asarray(self.due[:n], np.float64),
            np.asarray(self.sent_at[:n], np.float64),
            np.asarray(self.done_at[:n], np.float64),
            np.where(status < 0, Status.UNFINISHED, status).astype(np.uint8),
            np.asarray(self.ratio[:n], np.float64),
            np.asarray(self.queue[:n], np.float64),
            np.asarray(self.compute[:n], np.float64),
            np.asarray(self.right[:n], np.int64),
            plan.schedule.seconds if self.stopped is None else max(min(self.stopped, plan.schedule.seconds), 1e-3),
            plan.samples,
            self.slo,
            {
                "name": self.model.name,
                "ratios": list(self.model.ratios),
                "accuracy": list(self.model.accuracy),
                "platform": self.model.platform,
                "digest": self.model.digest,
            },
            {
                "url": self.target.url,
                "arrivals": plan.schedule.text,
                "samples": plan.samples,
                "timeout_s": plan.timeout,
                "max_ratio": plan.max_ratio,
                "dilation": self.pace,
                "slo_sent": plan.slo is not None and plan.send_slo,
                "seed": plan.seed,
                "warmup": plan.warmup,
                "body_bytes": len(self.payload.requests[0]),
                "labelled": self.payload.labels is not None,
                "stopped_early": self.stopped is not None,
            },
            {
                "cpu_ms_per_request": 1e3 * cpu / max(n, 1),
                "exact_timer": self.timer.exact,
                "connections": pool.peak,
                "max_connections": pool.most,
                "capped": pool.capped,
                "waited_for_connection": pool.waited,
                "retries": pool.retries,
            },
            dict(self.errors),
            plan.title,
            datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            np.asarray(self.begun_at[:n], np.float64),
        )


@contextlib.contextmanager
def _no_collection() -> Any:
    """No pause of the garbage collector during the test: a request leaves no cycles behind."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _number(value: Any) -> float:
    fine = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if fine else math.nan
