"""A worker in a thread of this process: for places where the process is a worker already, as replicas on a cluster are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from bitdial.errors import EngineError
from bitdial.serving.worker.base import Array, Result, Worker, WorkerOptions
from bitdial.serving.worker.batching import join, split
from bitdial.serving.worker.errors import WorkerCrash, error_from_json, error_to_json
from bitdial.serving.worker.file import ModelFile, read_descriptor
from bitdial.serving.worker.info import ModelInfo
from bitdial.serving.worker.model import LoadedModel

_Job = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class ThreadWorker(Worker):
    """See `Worker`. No protection from crashes; a hung batch makes the worker lost, but its thread cannot be ended."""

    def __init__(self, model: str | os.PathLike[str] | ModelFile, options: WorkerOptions | None = None) -> None:
        super().__init__(model, options)
        self._model: LoadedModel | None = None
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def _load(self, file: ModelFile) -> ModelInfo:
        self._loop = asyncio.get_running_loop()
        path = file.path
        try:
            descriptor = os.dup(file.fileno())  # the file may be closed while the thread still reads
            try:
                thread = threading.Thread(target=self._work, name=f"bitdial-{os.path.basename(path)}", daemon=True)
                thread.start()
            except BaseException:
                os.close(descriptor)
                raise
        except (OSError, RuntimeError) as error:  # no more descriptors or threads
            raise EngineError(f"no thread could be started for a worker: {error}") from error
        self._thread = thread

        def load() -> LoadedModel:
            try:
                data = read_descriptor(descriptor, path)
            finally:
                os.close(descriptor)
            return LoadedModel(data, path, **self.options.loading())

        self._model = await self._submit(load, self.options.start_timeout, f"{path}: loading took longer than")
        return self._model.info

    async def _abandon(self) -> None:
        self._jobs.put(None)

    async def run(self, requests: Sequence[Sequence[Array]], index: int, pace: float = 0.0) -> Result:
        samples, model = self._check(requests, index), self._model
        hold = self._hold(samples, index, pace)
        assert model is not None

        def compute() -> tuple[list[list[Array]], float, list[str]]:
            inputs = join(model.info, requests)
            outputs, seconds, checked = model.run_held(inputs, samples, index, hold)
            return split(model.info, [o.copy() for o in outputs], samples, checked), seconds, checked

        outputs, seconds, checked = await self._submit(compute, hold + self.options.patience, "the worker did not answer for")
        return self._result(outputs, index, seconds, checked, hold, pace)

    async def _submit(self, job: Callable[[], Any], patience: float, late: str) -> Any:
        """Have the thread do it. Raises WorkerCrash if that takes too long."""
        assert self._loop is not None
        future: asyncio.Future[Any] = self._loop.create_future()
        self.busy = True
        self._jobs.put((job, future))
        self._timer = self._loop.call_later(patience, self._give_up, future, f"{late} {patience:g} s")
        return await future

    def _give_up(self, future: asyncio.Future[Any], what: str) -> None:
        crash = WorkerCrash(f"{what} and was given up")
        if not future.done():
            future.set_exception(crash)
        self._jobs.put(None)
        self._lose(crash)

    def _work(self) -> None:
        """The thread."""
        while (job := self._jobs.get()) is not None:
            work, future = job
            try:
                result, problem = work(), None
            except Exception as error:
                result, problem = None, error_from_json(error_to_json(error))
            assert self._loop is not None
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._settle, future, result, problem)
            del job, work, future, result

    def _settle(self, future: asyncio.Future[Any], result: Any, problem: Exception | None) -> None:
        abandoned = future.done()
        if self._timer is not None:
            self._timer.cancel()
        if not abandoned:
            if problem is None:
                future.set_result(result)
            else:
                future.set_exception(problem)
        self._freed(abandoned)

    async def stop(self) -> None:
        if self._thread is None:
            self._stopping = True
            return
        first, self._stopping = not self._stopping, True
        if first:
            self._jobs.put(None)  # after the batch that runs
        loop = asyncio.get_running_loop()
        until = loop.time() + self.options.grace
        while self._thread.is_alive() and self._crash is None and loop.time() < until:
            await asyncio.sleep(0.002)
