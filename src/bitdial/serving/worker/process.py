"""A worker in a process of its own: what happens to an engine there cannot take the server with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from bitdial.errors import EngineError
from bitdial.serving.worker.base import Array, Result, Worker, WorkerOptions
from bitdial.serving.worker.batching import fill, split
from bitdial.serving.worker.errors import WorkerCrash, error_from_json
from bitdial.serving.worker.file import ModelFile, anonymous_file
from bitdial.serving.worker.frames import AsyncFrames, Message
from bitdial.serving.worker.info import ModelInfo
from bitdial.serving.worker.memory import BatchMemory

_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # until the child ignores them itself


class ProcessWorker(Worker):
    """See `Worker`. The process ends with this one, or rather with the thread that called `start`. Its standard output goes to
    standard error."""

    def __init__(self, model: str | os.PathLike[str] | ModelFile, options: WorkerOptions | None = None) -> None:
        super().__init__(model, options)
        self._process: subprocess.Popen[bytes] | None = None
        self._frames: AsyncFrames | None = None
        self._memory: BatchMemory | None = None
        self._reply: asyncio.Future[Message] | None = None
        self._sent = 0.0  # when the batch was
        self._held = 0.0  # how long it is to be held
        self._timer: asyncio.TimerHandle | None = None
        self._overdue = False

    @property
    def pid(self) -> int | None:
        """Of the child while there is one."""
        return None if self._process is None else self._process.pid

    # ---- start -----------------------------------------------------------------------------------------------------------

    async def _load(self, file: ModelFile) -> ModelInfo:
        memory = -1
        try:
            try:
                memory = anonymous_file(os.path.basename(file.path))
                self._spawn(file, memory)
            except OSError as error:  # no more descriptors, processes or memory
                raise EngineError(f"no process could be started for a worker: {error}") from error
            assert self._frames is not None
            self._reply = reply = asyncio.get_running_loop().create_future()
            self._frames.send({"path": file.path, "loading": self.options.loading()})
            # Not wait_for: before Python 3.12 it drops a cancellation that comes in the moment of the reply, and the worker
            # would run on with nobody to stop it.
            await asyncio.wait({reply}, timeout=self.options.start_timeout)
            if not reply.done():
                raise WorkerCrash(
                    f"{file.path}: loading took longer than {self.options.start_timeout:g} s and was given up"
                )
            message = reply.result()
            if "error" in message:
                raise error_from_json(message["error"])
            info = ModelInfo.from_json(message["info"])
            self._memory = BatchMemory(memory, info, self.options.max_batch)
            return info
        finally:
            if memory >= 0:
                os.close(memory)

    async def _abandon(self) -> None:
        if self._reply is not None:
            self._reply.cancel()  # nobody waits for it any more
        await self._end(0.0)

    def _spawn(self, file: ModelFile, memory: int) -> None:
        """Raises OSError; then nothing is left of it."""
        ours, theirs = socket.socketpair()
        descriptors = (theirs.fileno(), memory, file.fileno())
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(self.options.threads))  # torch, where an engine needs it
        # The child finds the modules that this process has, wherever they came from, and no others.
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        environment["PYTHONSAFEPATH"] = "1"
        command = [sys.executable, "-m", "bitdial.serving.worker.child", *map(str, descriptors), str(os.getpid())]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=_standard_error(), pass_fds=descriptors, env=environment
            )
            self._frames = AsyncFrames(ours, self._message, self._closed)
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    # ---- batches ---------------------------------------------------------------------------------------------------------

    async def run(self, requests: Sequence[Sequence[Array]], index: int, pace: float = 0.0) -> Result:
        samples = self._check(requests, index)
        self._held = hold = self._hold(samples, index, pace)
        assert self._memory is not None and self._frames is not None
        fill(self.info, self._memory.inputs(sum(samples)), requests)
        loop = asyncio.get_running_loop()
        self.busy = True
        self._reply = reply = loop.create_future()
        self._sent = loop.time()
        if self._timer is None:
            self._timer = loop.call_at(self._sent + hold + self.options.patience, self._watch)
        self._frames.send({"samples": samples, "index": index, **({"hold": hold} if hold else {})})
        try:
            message = await reply
            if "error" in message:
                raise error_from_json(message["error"])
            checked = message.get("checked") or [""] * len(samples)
            good = sum(n for n, problem in zip(samples, checked, strict=True) if not problem)
            # One copy, of which each request gets its part; before anything else can put a batch into the memory.
            outputs = [a.copy() for a in self._memory.outputs(good)] if good else []
        finally:
            if reply.done() and not reply.cancelled():
                self._freed(False)
        return self._result(split(self.info, outputs, samples, checked), index, message["compute"], checked, hold, pace)

    def _freed(self, abandoned: bool) -> None:
        self._overdue = False
        super()._freed(abandoned)

    def _message(self, message: Message) -> None:
        reply, self._reply = self._reply, None
        if reply is not None and not reply.done():
            reply.set_result(message)
        else:
            self._freed(True)

    def _watch(self) -> None:
        """The watchdog: one timer that follows the batches, rather than one for each."""
        self._timer = None
        try:
            if self._frames is not None:
                self._frames.read()  # an answer may be there that the loop has had no time for
        finally:  # whatever became of it, the watch goes on
            self._look()

    def _look(self) -> None:
        if not (self.busy and self._reply is not None and self.alive):
            return
        loop = asyncio.get_running_loop()
        due = self._sent + self._held + self.options.patience
        if self._overdue and loop.time() >= due:
            self._crash = WorkerCrash(f"the worker did not answer for {self.options.patience:g} s and was killed")
            self._kill()
            return
        # Time may have passed for this process without passing for the child (both were stopped): it gets a little more.
        self._overdue = loop.time() >= due
        self._timer = loop.call_at(max(due, loop.time() + 0.1 * self.options.patience), self._watch)

    # ---- the end ---------------------------------------------------------------------------------------------------------

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _closed(self, reason: str, tries: int = 0) -> None:
        """The child's end of the socket is gone: it has died, or is about to have."""
        assert self._process is not None
        if self._process.poll() is None:
            if tries == (0 if reason else 500):  # talking nonsense, or without a connection and alive all the same
                self._kill()
            asyncio.get_running_loop().call_later(0.002, self._closed, reason, tries + 1)
            return
        while_loading = "" if self._info is not None else " while loading"
        how = reason or describe_exit(self._process.returncode)
        self._crash = self._crash or WorkerCrash(f"the worker died{while_loading}: {how}")
        self._disarm()
        self._let_go(self._crash)
        self._lose(self._crash)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _let_go(self, error: WorkerCrash) -> None:
        """There is no child any more."""
        reply, self._reply = self._reply, None
        if reply is not None and not reply.done():
            reply.set_exception(error)
        self._freed(False)
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    async def stop(self) -> None:
        self._stopping = True
        until = time.monotonic() + self.options.grace
        while self.busy and self._crash is None and time.monotonic() < until:
            await asyncio.sleep(0.002)
        await self._end(max(0.0, until - time.monotonic()))

    async def _end(self, grace: float) -> None:
        """End the child, in `grace` seconds by itself, and free everything; at once if this call is cancelled."""
        self._disarm()
        if self._frames is not None:
            self._frames.close()
        try:
            if self._process is not None:
                until = time.monotonic() + grace
                while self._process.poll() is None and time.monotonic() < until:
                    await asyncio.sleep(0.002)
        finally:
            if self._process is not None and self._process.poll() is None:
                self._kill()
                self._process.wait()  # a killed process is gone in a moment
            self._let_go(WorkerCrash("the worker was stopped before it answered"))


def _standard_error() -> int:
    """Where the child's standard output goes, so that it does not mix with the server's own."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2


def describe_exit(code: int) -> str:
    """In words, how a process ended."""
    if code >= 0:
        return f"it ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
