"""Several workers of one model: started together, replaced when they die or hang, exchanged when the model's file is."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bitdial.errors import BitdialError, ConfigError, EngineError
from bitdial.quantization.curve import at_or_below
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
    busy: bool = False
    retired: bool = False  # its worker ends when it is free
    suspect: bool = False  # its worker was gone at the last look
    failures: int = 0
    restart: asyncio.Task[None] | None = None


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
    on_free          called when a worker has become free in another way than by the end of a `run`: restarted, exchanged
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
        self._waiting: deque[asyncio.Future[_Place]] = deque()
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
        """Workers that could take a batch at once."""
        return sum(self._is_free(p) for p in self._places)

    @property
    def workers(self) -> list[Worker]:
        """Those alive."""
        return [p.worker for p in self._places if p.worker is not None and p.worker.alive]

    @property
    def whole(self) -> bool:
        """Whether no worker is missing."""
        return self.alive == self.size

    @staticmethod
    def _is_free(place: _Place) -> bool:
        return not place.busy and place.worker is not None and place.worker.alive

    # ---- start and stop --------------------------------------------------------------------------------------------------

    async def start(self) -> ModelInfo:
        """Start all workers. Raises as `Worker.start`; then nothing is left running."""
        if self._info is not None or self._stopped:
            raise EngineError("a pool can be started once: make a new one")
        self._install(await self._start_group(self.path))
        return self.info

    async def stop(self) -> None:
        """Let running batches finish (as long as the options' grace), end all workers. Calls of `run` that wait for a worker
        end with WorkerCrash."""
        self._stopped = True
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(WorkerCrash("the workers have been stopped"))
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
            worker.on_lost = self._loss_of(place)
            if not worker.alive:
                self._loss_of(place)(WorkerCrash("the worker died before it was put to use"))
        for place in self._places:
            self._hand_over(place)

    # ---- batches ---------------------------------------------------------------------------------------------------------

    async def run(self, requests: Sequence[Sequence[Array]], index: int) -> Result:
        """Run a batch on a free worker, waiting for one if need be. Raises as `Worker.run`.

        `index` is one of `info` at the time of the call. Should a new version with other ratios take over while the call waits,
        the batch runs at that version's largest ratio at or below, and the result's index is the new version's.
        """
        if self._stopped or self._info is None:
            raise WorkerCrash("the workers have been stopped" if self._stopped else "the workers have not been started")
        ratios = self._info.ratios
        place = next((p for p in self._places if self._is_free(p)), None)
        if place is None:
            waiter: asyncio.Future[_Place] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                place = await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                    self._give_back(waiter.result())  # it was this call's turn
                raise
        place.busy = True
        try:
            if place.worker is None:
                raise WorkerCrash("the worker died before it could be given the batch")
            current = place.worker.info.ratios
            if current is not ratios and current != ratios and 0 <= index < len(ratios):
                index = max(0, at_or_below(current, ratios[index]))
            return await place.worker.run(requests, index)
        finally:
            self._give_back(place)

    def _give_back(self, place: _Place) -> None:
        place.busy = False
        if place.retired:
            if place.worker is not None:
                self._end(place.worker)
        else:
            self._hand_over(place)

    def _hand_over(self, place: _Place) -> None:
        """Give a free worker to the call that has waited longest."""
        while self._waiting and self._is_free(place):
            waiter = self._waiting.popleft()
            if not waiter.done():
                place.busy = True
                waiter.set_result(place)

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
                dead.on_lost = None
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
        worker.on_lost = self._loss_of(place)
        self._tell(self.on_restart, place.since - gone)
        self._hand_over(place)
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
        """Put new workers in the place of the old, in one step. Batches that run on old ones finish; then those end."""
        old, file = self._places, self._file
        for place in old:
            place.retired = True
            if place.restart is not None:
                place.restart.cancel()
                self._keep(place.restart)
            elif place.worker is not None and not place.busy:
                self._end(place.worker)
        if file is not None:
            file.close()
        self.path = candidate.file.path
        self._install(candidate)
        self._tell(self.on_free)

    async def swap(
        self,
        path: str | os.PathLike[str] | None = None,
        before: Callable[[Candidate], Awaitable[None]] | None = None,
    ) -> ModelInfo:
        """`prepare`, then `before` (to measure the new version, say; if it raises, the old workers stay), then `commit`.

        Nothing else runs on the event loop between the exchange and this call's return when it is awaited directly, so that
        the caller can adapt to other ratios first.
        """
        candidate = await self.prepare(path)
        try:
            if before is not None:
                await before(candidate)
            if self._stopped:
                raise WorkerCrash("the workers have been stopped")
        except BaseException:
            with contextlib.suppress(BitdialError):
                await candidate.discard()
            raise
        self.commit(candidate)
        return candidate.info


async def _open(path: str) -> ModelFile:
    """Beside the event loop: a large file on a slow disk takes its time. Raises ArtifactError."""
    opening = asyncio.ensure_future(asyncio.to_thread(ModelFile, path))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(lambda done: None if done.cancelled() or done.exception() else done.result().close())
        raise
