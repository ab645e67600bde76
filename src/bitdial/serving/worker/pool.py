"""Several workers of one model: started together, replaced when they die or hang, exchanged when the model's file is."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bitdial.errors import BitdialError, ConfigError, EngineError
from bitdial.serving.supervision import Supervisor
from bitdial.serving.worker.base import Array, Result, Worker, WorkerOptions
from bitdial.serving.worker.errors import SignatureError, WorkerCrash
from bitdial.serving.worker.file import ModelFile
from bitdial.serving.worker.info import ModelInfo
from bitdial.serving.worker.process import ProcessWorker

MakeWorker = Callable[[ModelFile, WorkerOptions], Worker]


@dataclass(eq=False)
class _Place:
    """Of one worker in the pool; `worker` is None while a new one is being started."""

    worker: Worker | None
    since: float
    leased: bool = False
    retired: bool = False  # its worker ends with its lease
    suspect: bool = False  # its worker was gone at the last look
    failures: int = 0
    restart: asyncio.Task[None] | None = None


class Lease:
    """A worker that belongs to one batch, from the decision what to run until `run` has ended (or `release`, if there is nothing
    to run). A new version that takes over meanwhile, or the pool's end, leaves it its worker. Made by `WorkerPool.lease`."""

    def __init__(self, worker: Worker, give_back: Callable[[], None]) -> None:
        self.worker = worker
        self._give_back: Callable[[], None] | None = give_back

    async def run(self, requests: Sequence[Sequence[Array]], index: int, pace: float = 0.0) -> Result:
        """As `Worker.run`; at its end the worker is free for another lease."""
        try:
            return await self.worker.run(requests, index, pace)
        finally:
            self.release()

    def release(self) -> None:
        """May be called more than once."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()


@dataclass(eq=False)
class Candidate:
    """Workers of a new version of the model, ready but not yet in use. See `WorkerPool.prepare`."""

    info: ModelInfo
    workers: list[Worker]
    file: ModelFile

    async def discard(self) -> None:
        """End the workers."""
        try:
            await asyncio.gather(*(w.stop() for w in self.workers))
        finally:
            self.file.close()


class WorkerPool:
    """n workers of one model on the running event loop.

    path, options    of the model
    workers          how many
    make             what makes a worker: ProcessWorker, ThreadWorker or a function
    on_free          called when a worker has become free in another way than by the end of a lease: restarted, exchanged, done
                     with a batch that was given up
    on_crash         called with the error when a worker was lost, and when a new one could not be started in its place
    on_restart       called with the seconds that went by without it when a worker is back
    supervisor       of the pool's background tasks; None: one of its own. The first attempt to replace a worker is made at once,
                     the pauses before others are the supervisor's
    stable           a worker that lived for so many seconds starts with a clean slate

    Callbacks are called from the event loop by themselves, never within a call of the pool's methods.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: WorkerOptions | None = None,
        *,
        workers: int = 1,
        make: MakeWorker = ProcessWorker,
        on_free: Callable[[], None] | None = None,
        on_crash: Callable[[BitdialError], None] | None = None,
        on_restart: Callable[[float], None] | None = None,
        supervisor: Supervisor | None = None,
        stable: float = 60.0,
    ) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or not 1 <= workers <= 1024:
            raise ConfigError(f"workers must be a whole number in 1..1024, got {workers!r}")
        self.path, self.options, self.size = os.fspath(path), options or WorkerOptions(), workers
        self.on_free, self.on_crash, self.on_restart = on_free, on_crash, on_restart
        self._make = make
        self._supervisor, self._stable = supervisor or Supervisor(), stable
        self._places: list[_Place] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._file: ModelFile | None = None
        self._info: ModelInfo | None = None
        self._stopped = False

    # ---- to look at ------------------------------------------------------------------------------------------------------

    @property
    def info(self) -> ModelInfo:
        """Of the model in use. Raises EngineError before `start`."""
        if self._info is None:
            raise EngineError("the workers have not been started")
        return self._info

    @property
    def alive(self) -> int:
        """Workers that run or could run a batch."""
        return sum(p.worker is not None and p.worker.alive for p in self._places)

    @property
    def idle(self) -> int:
        """Workers that could be leased."""
        return sum(1 for _ in self._free())

    @property
    def workers(self) -> list[Worker]:
        """Those alive."""
        return [p.worker for p in self._places if p.worker is not None and p.worker.alive]

    @property
    def whole(self) -> bool:
        """Whether no worker is missing."""
        return self.alive == self.size

    def _free(self) -> Iterator[tuple[_Place, Worker]]:
        for place in () if self._stopped else self._places:
            if not place.leased and place.worker is not None and place.worker.alive and not place.worker.busy:
                yield place, place.worker

    # ---- start and stop --------------------------------------------------------------------------------------------------

    async def start(self) -> ModelInfo:
        """Start all workers. Raises as `Worker.start`; then nothing is left running."""
        if self._info is not None or self._stopped:
            raise EngineError("a pool can be started once: make a new one")
        self._install(await self._start_group(self.path))
        return self.info

    async def stop(self) -> None:
        """Let running batches finish (as long as the options' grace), end all workers."""
        self._stopped = True
        restarts = [p.restart for p in self._places if p.restart is not None]
        for task in restarts:
            task.cancel()
        await asyncio.gather(*restarts, return_exceptions=True)
        stops = [p.worker.stop() for p in self._places if p.worker is not None]
        await asyncio.gather(*stops, return_exceptions=True)
        if self._tasks:  # ends of workers that were replaced; one that fails again and again is given up
            _, late = await asyncio.wait(self._tasks, timeout=self.options.grace + 1.0)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._file is not None:
            self._file.close()

    async def _start_group(self, path: str) -> Candidate:
        """The first worker by itself: a bad file is found once, and what it measures at load is there for the others."""
        file = await _open(path)
        workers: list[Worker] = []
        try:
            workers += [self._make(file, self.options) for _ in range(self.size)]
            info = await workers[0].start()
            rest = await asyncio.gather(*(w.start() for w in workers[1:]), return_exceptions=True)
            for other in rest:
                if isinstance(other, BaseException):
                    raise other
            return Candidate(info, workers, file)
        except BaseException:
            await asyncio.gather(*(w.stop() for w in workers), return_exceptions=True)
            file.close()
            raise

    def _install(self, candidate: Candidate) -> None:
        now = asyncio.get_running_loop().time()
        self._file, self._info = candidate.file, candidate.info
        self._places = [_Place(worker, now) for worker in candidate.workers]
        for place, worker in zip(self._places, candidate.workers, strict=True):
            self._watch(place, worker)
            if not worker.alive:
                self._loss_of(place)(WorkerCrash("the worker died before it was put to use"))

    def _watch(self, place: _Place, worker: Worker) -> None:
        worker.on_lost, worker.on_free = self._loss_of(place), lambda: self._tell(self.on_free)

    # ---- batches ---------------------------------------------------------------------------------------------------------

    def lease(self) -> Lease | None:
        """A free worker, for one batch; None: there is none. Who wants one looks again when a lease has ended and at `on_free`:
        nothing waits in here."""
        for place, worker in self._free():
            place.leased = True
            return Lease(worker, functools.partial(self._give_back, place))
        return None

    def _give_back(self, place: _Place) -> None:
        place.leased = False
        if place.retired and place.worker is not None:
            self._end(place.worker)

    def _end(self, worker: Worker) -> None:
        """Free what is left of a worker that nobody uses any more."""
        self._keep(self._supervisor.once("the end of a worker", worker.stop))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- supervision -----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Replace workers that are gone without having told so; to be called now and then."""
        for place in self._places:
            gone = place.worker is not None and not place.worker.alive and not self._stopped
            if gone and place.suspect:  # it has had the time to tell
                self._loss_of(place)(WorkerCrash("a worker was found dead"))
            place.suspect = gone

    def _loss_of(self, place: _Place) -> Callable[[WorkerCrash], None]:
        def lost(error: WorkerCrash) -> None:
            dead, place.worker = place.worker, None
            if dead is not None:
                dead.on_lost = dead.on_free = None
                self._end(dead)
            if self._stopped or place.retired:
                return
            self._tell(self.on_crash, error)
            gone = asyncio.get_running_loop().time()
            if gone - place.since > self._stable:
                place.failures = 0
            place.restart = self._supervisor.once(
                "replacing a worker", functools.partial(self._replace, place, gone), self._not_replaced, place.failures
            )

        return lost

    async def _replace(self, place: _Place, gone: float) -> None:
        """One attempt; `gone`: when the worker was lost."""
        place.failures += 1
        assert self._file is not None
        worker = self._make(self._file, self.options)
        try:
            await worker.start()
            if not worker.alive:
                raise WorkerCrash("the worker died before it was put to use")
        except BaseException:
            await worker.stop()
            raise
        place.worker, place.since, place.restart = worker, asyncio.get_running_loop().time(), None
        self._watch(place, worker)
        self._tell(self.on_restart, place.since - gone)
        self._tell(self.on_free)

    def _not_replaced(self, error: Exception) -> None:
        foreseen = isinstance(error, BitdialError)
        self._tell(self.on_crash, error if foreseen else EngineError(f"no worker could be started: {error!r:.300}"))

    @staticmethod
    def _tell(callback: Callable[..., None] | None, *arguments: Any) -> None:
        if callback is not None:
            asyncio.get_running_loop().call_soon(callback, *arguments)

    # ---- a new version ---------------------------------------------------------------------------------------------------

    async def prepare(self, path: str | os.PathLike[str] | None = None) -> Candidate:
        """Start workers of a new version of the model (None: what is now at the same path) beside those in use.

        Raises as `start`, and SignatureError if the new version takes or gives other tensors; workers in use are not touched.
        `commit` it, or await its `discard`.
        """
        info = self.info
        candidate = await self._start_group(self.path if path is None else os.fspath(path))
        difference = info.signature_difference(candidate.info)
        if difference or self._stopped:
            await candidate.discard()
            if difference:
                raise SignatureError(
                    f"{candidate.file.path} is not a new version of the model that is served: {difference}; serve it under "
                    "a name of its own"
                )
            raise WorkerCrash("the workers have been stopped")
        return candidate

    def commit(self, candidate: Candidate) -> None:
        """Put new workers in the place of the old, in one step. Old ones that are leased end with their leases. Nothing is
        awaited here, so that the caller can adapt to other ratios before anything else runs on the event loop."""
        old, file = self._places, self._file
        for place in old:
            place.retired = True
            if place.restart is not None:
                place.restart.cancel()
                self._keep(place.restart)
            elif place.worker is not None and not place.leased:
                self._end(place.worker)
        if file is not None:
            file.close()
        self.path = candidate.file.path
        self._install(candidate)
        self._tell(self.on_free)


async def _open(path: str) -> ModelFile:
    """Beside the event loop: a large file on a slow disk takes its time. Raises ArtifactError."""
    opening = asyncio.ensure_future(asyncio.to_thread(ModelFile, path))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result().close())
        raise
