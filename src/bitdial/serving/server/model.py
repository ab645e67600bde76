"""A served model: the scheduler and the workers put together on the event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from bitdial.errors import BitdialError, ConfigError, InputError
from bitdial.processor import usable_cores
from bitdial.serving.control import Batch, Request, Scheduler, ServiceTable, Settings, make_policy
from bitdial.serving.errors import BadRequest, ComputeFailed, Expired, LoadFailed, NotReady, Overloaded, ServingError
from bitdial.serving.metrics import ModelMetrics
from bitdial.serving.protocol.request import RequestReader
from bitdial.serving.server.exchange import carry_over, prepare_version
from bitdial.serving.server.recording import Recording
from bitdial.serving.supervision import Supervisor
from bitdial.serving.worker.base import WorkerOptions
from bitdial.serving.worker.calibration import measure_dilation, measure_table
from bitdial.serving.worker.errors import SignatureError, WorkerCrash
from bitdial.serving.worker.info import ModelInfo
from bitdial.serving.worker.pool import Lease, MakeWorker, WorkerPool
from bitdial.serving.worker.process import ProcessWorker

Array = npt.NDArray[Any]
Progress = Callable[[float, str], None]

TICK = 1.0  # seconds between looks at workers, waiting requests and gauges while nothing happens

logger = logging.getLogger("bitdial.serving")


@dataclass(slots=True)
class Answer:
    """What a request gets.

    outputs: one array per output of the model. ratio, index: executed. queue, compute: seconds it waited, and that its batch took
    in the engine. batch: samples of that batch. finished: when the batch was done, on the model's clock.
    """

    outputs: list[Array]
    ratio: float
    index: int
    queue: float
    compute: float
    batch: int
    finished: float


@dataclass(slots=True, eq=False)
class _Pending:
    """A request that waits or is computed."""

    request: Request
    inputs: list[Array]
    max_ratio: float | None
    future: asyncio.Future[Answer]


class ServedModel:
    """One model behind its queue. Belongs to the event loop that `start` is called on.

    name, path      in URLs; the file, fixed for good
    settings        how it is served
    policy          what turns the dial, as `make_policy` takes it
    options         of its workers; `max_batch` and `name` are set from the settings and the name
    workers         how many
    table           service times, instead of measuring them
    registry        Prometheus registry for the metrics, or None
    record          file that decisions are recorded to, or None
    make            what makes a worker
    clock           seconds, monotonic
    dilation        seconds of `clock` that one second of an engine whose time is modelled takes; None: as few as its arithmetic
                    needs (`measure_dilation`), found once, at the start

    Where the engine's time is modelled, all that has a time (bounds, waits, decisions, figures) is in the engine's seconds: from
    the start on `clock` is the one given, slowed down by `dilation`, and each batch takes what the model says.

    state: "starting", "ready", "draining" or "failed"; reason: why it failed. supervisor: of what runs beside its requests.
    """

    def __init__(
        self,
        name: str,
        path: str | Path,
        settings: Settings,
        policy: str = "planned",
        *,
        options: WorkerOptions | None = None,
        workers: int = 1,
        table: ServiceTable | None = None,
        registry: Any = None,
        record: Path | None = None,
        make: MakeWorker = ProcessWorker,
        clock: Callable[[], float] = time.monotonic,
        dilation: float | None = None,
    ) -> None:
        make_policy(policy)  # an unknown one is told of now
        self.name, self.path, self.settings, self.policy, self.clock = name, str(path), settings, policy, clock
        self.state, self.reason = "starting", ""
        self.metrics: ModelMetrics | None = None
        self.output_names: list[str] = []
        self.supervisor = Supervisor(f"model '{name}'")
        self._given_table, self._registry, self._record = table, registry, record
        self._asked_dilation, self._dilation = dilation, 0.0
        self._pool = WorkerPool(
            path,
            (options or WorkerOptions()).updated(max_batch=settings.max_batch, name=name),
            workers=workers,
            make=make,
            on_free=self._wake,
            on_crash=self._crashed,
            on_restart=self._restarted,
            supervisor=self.supervisor,
        )
        self._dispatching = self.supervisor.watch("giving out batches")
        self._scheduler: Scheduler | None = None
        self._reader: RequestReader | None = None
        self._recording: Recording | None = None
        self._pending: dict[int, _Pending] = {}
        self._ids = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._woken = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._empty = asyncio.Event()
        self._reloading = asyncio.Lock()

    # ---- to look at ------------------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> bool:
        """Whether its file has been read, so that `info` is there."""
        return self._scheduler is not None

    @property
    def ready(self) -> bool:
        """Whether it takes requests and has a worker to run them."""
        return self.state == "ready" and self._pool.alive > 0

    @property
    def dilation(self) -> float | None:
        """Seconds of the wall clock in one of the model's; None where its time is the wall clock's."""
        return self._dilation or None

    @property
    def closing(self) -> bool:
        """Whether it is about to stop: connections should end with their answers."""
        return self.state == "draining"

    def not_ready(self) -> NotReady:
        """The error of what it cannot do in this state."""
        return NotReady(f"model '{self.name}' is {self.state}", retry_after=1.0, closes=self.closing)

    @property
    def info(self) -> ModelInfo:
        """Of the file in use. Raises NotReady before it is loaded."""
        if self._scheduler is None:
            raise self.not_ready()
        return self._pool.info

    @property
    def scheduler(self) -> Scheduler:
        """The one in use. Raises NotReady before the model is loaded."""
        if self._scheduler is None:
            raise self.not_ready()
        return self._scheduler

    @property
    def pool(self) -> WorkerPool:
        """Its workers."""
        return self._pool

    @property
    def top_ratio(self) -> float:
        """The highest ratio that the dial may take. Raises NotReady before the model is loaded."""
        return self.scheduler.table.table.ratios[self.scheduler.allowed[-1]]

    @property
    def bound_by(self) -> str:
        """Why the dial goes no further (`Settings.bound_by`). Raises NotReady before the model is loaded."""
        return self.settings.bound_by(self.scheduler.table.table)

    def ceiling_words(self) -> str:
        """What the model file says about its ceiling, for people."""
        kept = self.info.kept
        found = "" if kept is None else f": when it was quantized, it kept {kept.found_beyond()}"
        return f"the dial goes up to {100 * self.top_ratio:.4g} %, the ceiling in the model file{found}; --max-ratio overrides"

    def reader(self) -> RequestReader:
        """Of requests to this model. Raises NotReady before it is loaded."""
        if self._reader is None:
            raise self.not_ready()
        return self._reader

    def largest_body(self) -> int:
        """Bytes of the largest sensible request; 0 before the model is loaded."""
        return 0 if self._reader is None else self._reader.largest_body

    def sample_body(self) -> int:
        """Bytes of the largest sensible request of one sample; 0 before the model is loaded."""
        return 0 if self._reader is None else self._reader.sample_body

    # ---- start -----------------------------------------------------------------------------------------------------------

    async def start(self, progress: Progress | None = None) -> None:
        """Load the model, learn what its batches cost, take requests. Raises BitdialError; then nothing is left running."""
        try:
            info = await self._pool.start()
            await self._dilate(info)
            table = await self._first_table(info, progress)
            self._install(info, table)
            if self._record is not None:
                self._recording = Recording(self._record, self.scheduler, self.policy, self._pool.size)
        except BaseException as error:
            self.state, self.reason = "failed", str(error)
            await self._pool.stop()
            raise
        self.supervisor.every(TICK, "looking after workers and requests", self._tick)
        self.state = "ready"

    async def _dilate(self, info: ModelInfo) -> None:
        """Slow the clock down for an engine whose time is modelled. Raises ConfigError if a dilation was asked of another."""
        asked = self._asked_dilation
        if not info.modelled:
            if asked is not None:
                raise ConfigError(
                    f"--dilation slows modelled time down, and the time of engine '{info.engine.get('name')}' is measured: leave "
                    "it out"
                )
            return
        given = self.clock
        crowd = max(1.0, self._pool.size / usable_cores())
        self._dilation = k = asked or crowd * await measure_dilation(self._pool.workers[0], self.settings.max_batch)
        self.clock = lambda: given() / k

    async def _first_table(self, info: ModelInfo, progress: Progress | None) -> ServiceTable:
        given = self._given_table
        if given is None:
            return await measure_table(self._pool.workers[0], self.settings.max_batch, progress)
        if given.ratios != info.ratios:
            raise ConfigError(
                f"the service table is of ratios {list(given.ratios)}, model '{self.name}' has {list(info.ratios)}: "
                "leave --table out to measure one"
            )
        return info.judge(given)

    def _install(self, info: ModelInfo, table: ServiceTable) -> None:
        scheduler = Scheduler(table, self.settings, make_policy(self.policy), self._pool.size)
        if self.metrics is None:
            self.metrics = ModelMetrics(
                self._registry, self.name, info.ratios, table.expected, self.settings.slo, self.clock
            )
            self.metrics.on_read = self._gauges
            self.metrics.dilation = self._dilation or 1.0
        else:
            self.metrics.use_model(info.ratios, table.expected)
        self._reader = RequestReader(info.inputs, info.outputs, self.settings.max_batch)
        self.output_names = [t.name for t in info.outputs]
        self._scheduler = scheduler
        if self.bound_by == "model file":
            logger.info("model '%s': %s", self.name, self.ceiling_words())

    def _end_recording(self, why: str = "") -> None:
        if self._recording is not None:
            self._recording.close(why)
            self._recording = None

    # ---- requests --------------------------------------------------------------------------------------------------------

    async def infer(
        self,
        inputs: list[Array],
        samples: int,
        *,
        slo: float | None = None,
        max_ratio: float | None = None,
        timeout: float | None = None,
        arrived: float | None = None,
    ) -> Answer:
        """Wait for the answer to a request whose arrays fit the model (`RequestReader` sees to that).

        slo: seconds within which the answer should be there; None: the server's. timeout: seconds after which it is of no use.
        max_ratio: largest ratio accepted. arrived: when it came, on the model's clock.
        Raises BadRequest, NotReady, Overloaded, Expired, ComputeFailed. If the caller is cancelled, a waiting request is
        forgotten.
        """
        scheduler, metrics, now = self.scheduler, self.metrics, self.clock()
        assert metrics is not None
        if self.state != "ready":
            raise self.not_ready()
        arrived = now if arrived is None else min(arrived, now)
        metrics.arrived(now, samples)
        if samples > self.settings.max_batch:
            metrics.invalid(now)
            raise BadRequest(f"the request holds {samples} samples, this model takes at most {self.settings.max_batch}")
        request = self._request(scheduler, now, arrived, samples, slo, max_ratio, timeout)
        refusal = scheduler.submit(now, request)
        if refusal is not None:
            metrics.shed(now, refusal.reason)
            what = "the queue is full" if refusal.reason == "queue full" else "it could not be answered in time"
            raise Overloaded(f"model '{self.name}' is overloaded: {what}; try again later", self._wall(refusal.retry_after))
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[request.id] = _Pending(request, inputs, max_ratio, future)
        self._wake()
        try:
            answer = await future
        except asyncio.CancelledError:
            now = self.clock()
            if self._forget(request.id) is not None:
                self.scheduler.cancel(now, request.id)
            metrics.cancelled(now)
            raise
        now = self.clock()
        self.scheduler.answered(now, now - answer.finished)
        total = now - arrived
        metrics.answered(
            now, index=answer.index, queue=answer.queue, compute=answer.compute, total=total, samples=samples,
            met=total <= request.deadline - request.arrival,
        )  # fmt: skip
        return answer

    def _request(
        self, scheduler: Scheduler, now: float, arrived: float, samples: int,
        slo: float | None, max_ratio: float | None, timeout: float | None,
    ) -> Request:  # fmt: skip
        cap = scheduler.cap(max_ratio)
        if cap < scheduler.allowed[0]:
            assert self.metrics is not None
            self.metrics.invalid(now)
            raise BadRequest(
                f"max_ratio {max_ratio:g} is below the smallest ratio of model '{self.name}', "
                f"{scheduler.table.table.ratios[scheduler.allowed[0]]:g}"
            )
        bound = self.settings.slo if slo is None else slo
        useful = bound if self.settings.timeout is None else max(bound, self.settings.timeout)
        if timeout is not None:
            useful = min(useful, timeout)
        return Request(next(self._ids), arrived, arrived + min(bound, useful), arrived + useful, samples, cap)

    def invalid(self) -> None:
        """Count a request that could not be read."""
        if self.metrics is not None:
            self.metrics.invalid(self.clock())

    def _forget(self, id: int) -> _Pending | None:
        pending = self._pending.pop(id, None)
        if not self._pending:
            self._empty.set()
        return pending

    def _fail(self, id: int, error: Exception) -> bool:
        """End a request with an error; whether anyone was waiting for it."""
        pending = self._forget(id)
        if pending is None or pending.future.done():
            return False
        pending.future.set_exception(error)
        return True

    # ---- batches ---------------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Look for a batch to run once what is going on at this moment has been taken in."""
        if not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._woken = False
        scheduler = self._scheduler
        if scheduler is None:
            return
        try:
            now = self.clock()
            scheduler.workers = self._pool.alive
            while self._pool.idle and (batch := scheduler.next_batch(now)) is not None:
                self._launch(scheduler, batch, now)
            if not self._pool.idle:  # deadlines pass all the same
                scheduler.expire(now)
            self._expire(scheduler.take_expired(), now)
            self._set_timer(scheduler, now)
            self._dispatching.worked()
        except Exception as error:  # a bug must not leave anyone waiting for ever
            self._dispatching.failed(error)
            for request in list(scheduler.queue):
                self._fail(request.id, ComputeFailed("the scheduler failed unexpectedly; the server's log says how"))
                scheduler.queue.remove(request.id)

    def _expire(self, gone: Sequence[Request], now: float) -> None:
        assert self.metrics is not None
        for request in gone:
            waited = 1000.0 * (now - request.arrival)
            if self._fail(request.id, Expired(f"the deadline passed after {waited:.0f} ms in the queue")):
                self.metrics.expired(now)

    def _set_timer(self, scheduler: Scheduler, now: float) -> None:
        due = scheduler.wake_at(self._pool.idle > 0)
        if due is None:
            return
        if self._timer is not None:
            if self._wall(now) < self._timer_at <= self._wall(due) + 0.001:
                return  # it goes off in time
            self._timer.cancel()
        delay = max(0.001, self._wall(due - now))
        self._timer_at = self._wall(now) + delay
        self._timer = asyncio.get_running_loop().call_later(delay, self._timed)

    def _wall(self, seconds: float) -> float:
        """Seconds of the model as seconds of the wall clock."""
        return seconds * (self._dilation or 1.0)

    def _timed(self) -> None:
        self._timer = None
        self._pump()

    def _launch(self, scheduler: Scheduler, batch: Batch, now: float) -> None:
        lease = self._pool.lease()
        assert self.metrics is not None and lease is not None
        task = asyncio.get_running_loop().create_task(self._run(scheduler, batch, lease))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.metrics.batch(now, index=batch.index, samples=batch.samples, requests=len(batch.requests))
        self._gauges()

    async def _run(self, scheduler: Scheduler, batch: Batch, lease: Lease) -> None:
        """One batch, from its worker to its answers; whatever happens, each of its requests gets one."""
        try:
            await self._compute(scheduler, batch, lease)
        except BaseException as error:
            self._lose(batch, error)
            scheduler.failed(self.clock(), batch)
            self._wake()
            if not isinstance(error, Exception):
                raise
        finally:
            lease.release()

    async def _compute(self, scheduler: Scheduler, batch: Batch, lease: Lease) -> None:
        waiting = [self._pending.get(r.id) for r in batch.requests]
        alive = [p for p in waiting if p is not None]
        if not alive:  # all senders have left
            scheduler.failed(self.clock(), batch)
            self._wake()
            return
        result = await lease.run([p.inputs for p in alive], batch.index, self._dilation)
        if result.overrun and self.metrics is not None:
            self.metrics.overruns += 1
        now, ratio = self.clock(), lease.worker.info.ratios[batch.index]
        scheduler.completed(now, batch, now - batch.begun)
        self._pump()  # the worker has its next batch before anyone is answered
        for pending, outputs, problem in zip(alive, result.outputs, result.checked, strict=True):
            self._forget(pending.request.id)
            if pending.future.done():
                continue
            if problem:
                assert self.metrics is not None
                self.metrics.invalid(now)
                pending.future.set_exception(BadRequest(problem))
            else:
                queue = batch.begun - pending.request.arrival
                answer = Answer(outputs, ratio, batch.index, queue, result.compute, batch.samples, now)
                pending.future.set_result(answer)

    def _lose(self, batch: Batch, error: BaseException) -> None:
        """Tell the senders of a batch that has no result."""
        now, word = self.clock(), "unexpected"
        answer: ServingError = ComputeFailed("the server failed unexpectedly; its log says how")
        if isinstance(error, WorkerCrash):
            answer, word = (
                ComputeFailed(f"{error}; this request was lost with it, others go on: send it again"),
                "worker crash",
            )
        elif isinstance(error, InputError):
            answer, word = BadRequest(str(error)), ""
        elif isinstance(error, BitdialError):
            answer, word = ComputeFailed(str(error)), "engine"
        elif isinstance(error, Exception):
            logger.error("model '%s': a batch failed unexpectedly", self.name, exc_info=error)
        assert self.metrics is not None
        for request in batch.requests:
            if self._fail(request.id, answer):
                if word:
                    self.metrics.failed(now, word)
                else:
                    self.metrics.invalid(now)

    def _crashed(self, error: BitdialError) -> None:
        logger.warning("model '%s': %s; a new worker is started", self.name, error)
        self._wake()

    def _restarted(self, seconds: float) -> None:
        logger.warning("model '%s': a worker is back after %.1f s", self.name, seconds)
        if self.metrics is not None:
            self.metrics.restarted(self.clock())
        self._wake()

    # ---- a new version of the file ---------------------------------------------------------------------------------------

    async def reload(self) -> bool:
        """Read the file again and, if it has changed, put the new version to use without losing a request. Whether it had. Where
        a worker is missing or another task of the model fails, workers and scheduler are made anew even if it has not.

        Raises LoadFailed and SignatureError, after which the version before is still in use, and NotReady.
        """
        async with self._reloading:
            if self.state != "ready" or self.metrics is None:
                raise self.not_ready()
            self.supervisor.hurry()
            try:
                changed = await self._exchange()
            except BitdialError as error:
                self.metrics.reloaded(self.clock(), False)
                logger.warning("model '%s' was not loaded again: %s", self.name, error)
                if isinstance(error, SignatureError):
                    raise
                raise LoadFailed(self._kept(str(error))) from error
            except Exception as error:
                self.metrics.reloaded(self.clock(), False)
                logger.exception("model '%s' was not loaded again", self.name)
                raise LoadFailed(self._kept("the server failed unexpectedly; its log says how")) from error
            self.metrics.reloaded(self.clock(), True)
            problems = self.supervisor.problems()
            if problems:
                raise LoadFailed(f"{'; '.join(problems)}: if it does not work soon, restart the server")
            return changed

    def _kept(self, why: str) -> str:
        missing = "" if self._pool.alive else ", without a worker until one can be started"
        return f"the version before stays in use{missing}: {why}"

    async def _exchange(self) -> bool:
        digest, sound = self._pool.info.digest, self._pool.whole and not self.supervisor.failing
        version = await prepare_version(
            self._pool, self.settings, self.scheduler.table.table, remembered=self._given_table is None, again=not sound
        )
        if version is None:
            return False
        if self.state != "ready":
            await version.candidate.discard()
            raise self.not_ready()
        self._pool.commit(version.candidate)
        self._adopt(version.candidate.info, version.table)
        self._dispatching.worked()  # by a new scheduler, until it proves otherwise
        logger.warning("model '%s' was loaded again: %s", self.name, version.candidate.info.digest[:12])
        return version.candidate.info.digest != digest

    def _adopt(self, info: ModelInfo, table: ServiceTable) -> None:
        """Go on with another table; requests that wait keep their places."""
        old = self.scheduler
        self._end_recording(f"model '{self.name}' was loaded again")
        self._install(info, table)
        new = self.scheduler
        carry_over(old, new)
        for request in list(old.queue):
            pending = self._pending.get(request.id)
            if pending is None:
                continue
            cap = new.cap(pending.max_ratio)
            if cap < new.allowed[0]:
                self._fail(request.id, BadRequest("max_ratio is below the smallest ratio of the model's new version"))
                continue
            pending.request = dataclasses.replace(request, cap=cap)
            new.queue.add(pending.request)
        self._expire(old.take_expired(), self.clock())
        self._wake()

    # ---- the end ---------------------------------------------------------------------------------------------------------

    async def drain(self, timeout: float) -> bool:
        """Take no more requests and wait until those taken in are answered; whether all were within `timeout` seconds."""
        if self.state in ("ready", "starting"):
            self.state = "draining"
        if self._pending:
            self._empty.clear()
            try:
                await asyncio.wait_for(self._empty.wait(), timeout)
            except asyncio.TimeoutError:
                return False
        return True

    async def stop(self) -> None:
        """End workers; requests that are still there get an error."""
        if self.state in ("ready", "starting"):
            self.state = "draining"
        for id in list(self._pending):
            self._fail(id, NotReady("the server is stopping", retry_after=1.0, closes=True))
        if self._scheduler is not None:
            for request in list(self._scheduler.queue):
                self._scheduler.queue.remove(request.id)
        if self._timer is not None:
            self._timer.cancel()
        await self._pool.stop()
        await self.supervisor.stop()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        self._end_recording()

    # ---- figures ---------------------------------------------------------------------------------------------------------

    def _gauges(self) -> None:
        scheduler = self._scheduler
        if scheduler is None or self.metrics is None:
            return
        now = self.clock()
        self.metrics.gauges(
            now, index=scheduler.dial(now), queue_depth=len(scheduler.queue), queue_samples=scheduler.queue.samples,
            oldest_wait=scheduler.oldest_wait(now), switches=scheduler.switches, workers=self._pool.alive,
        )  # fmt: skip

    def _tick(self) -> None:
        """What events see to as a rule, should one of them have been lost."""
        self._pool.look()
        if self._pending:
            self._wake()
        self._gauges()
