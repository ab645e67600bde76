"""Work beside the requests, which must outlive its own failures: logged, tried again, and told of where nothing helps."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from bitdial.errors import BitdialError

# Attempts in a row, and seconds since the first of them, after which a task counts as beyond repair.
TRIES, PATIENCE = 5, 30.0

Step = Callable[[], Awaitable[None] | None]

logger = logging.getLogger("bitdial.serving")


class Watched:
    """How one task fares: its failures since it last worked. Made by `Supervisor.watch`."""

    __slots__ = ("failures", "since", "what", "whose")

    def __init__(self, whose: str, what: str) -> None:
        self.whose, self.what = whose, what
        self.failures, self.since = 0, 0.0

    def worked(self) -> None:
        """It did what it is there for."""
        self.failures = 0

    def failed(self, error: BaseException, quiet: bool = False) -> None:
        """It did not. What nobody has foreseen is logged with its traceback; quiet: other errors are told by the caller."""
        if not self.failures:
            self.since = time.monotonic()
        self.failures += 1
        if not isinstance(error, BitdialError):
            logger.error("%s%s failed unexpectedly (%s)", self.whose, self.what, self._times(), exc_info=error)
        elif not quiet:
            logger.warning("%s%s failed (%s): %s", self.whose, self.what, self._times(), error)

    def _times(self) -> str:
        return "once" if self.failures == 1 else f"{self.failures} times in a row"

    def says(self) -> str:
        """In words, for callers who need not know why."""
        return f"{self.whose}{self.what} has failed {self._times()} in {time.monotonic() - self.since:.0f} s"


class Supervisor:
    """Tasks of a server, or of one model, on the running event loop. An error that ends one, of whatever kind, is logged, and the
    task is tried again after a pause.

    name              whose they are, for the log ("" for the server's own)
    first_delay       seconds before the second attempt; doubled from one to the next up to longest_delay
    tries, patience   a task is a problem (and the server no longer live) once so many attempts in a row have failed and so many
                      seconds have gone by since the first did. It is tried all the same, and is no problem once it succeeds
    """

    def __init__(
        self,
        name: str = "",
        *,
        first_delay: float = 0.2,
        longest_delay: float = 30.0,
        tries: int = TRIES,
        patience: float = PATIENCE,
    ) -> None:
        self.first_delay, self.longest_delay, self.tries, self.patience = first_delay, longest_delay, tries, patience
        self._whose = f"{name}: " if name else ""
        self._watched: set[Watched] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pauses: set[asyncio.Future[None]] = set()

    # ---- to look at ------------------------------------------------------------------------------------------------------

    @property
    def failing(self) -> bool:
        """Whether anything did not work when it was last tried."""
        return any(w.failures for w in self._watched)

    def problems(self) -> list[str]:
        """What has failed for too long, in words."""
        late = time.monotonic() - self.patience
        return sorted(w.says() for w in self._watched if w.failures >= self.tries and w.since <= late)

    # ---- tasks -----------------------------------------------------------------------------------------------------------

    def watch(self, what: str) -> Watched:
        """Of a task that others run, and that says itself how it fares."""
        watched = Watched(self._whose, what)
        self._watched.add(watched)
        return watched

    def once(
        self, what: str, step: Step, failed: Callable[[Exception], None] | None = None, earlier: int = 0
    ) -> asyncio.Task[None]:
        """A task that is done once `step` has succeeded; cancel it to give it up.

        failed: called with the error of an attempt; it tells of what was foreseen (a BitdialError) instead of the log.
        earlier: attempts before this call that count for the length of the pauses.
        """
        watched = self.watch(what)
        return self._start(watched, self._persist(watched, step, failed, earlier))

    def every(self, seconds: float, what: str, step: Step) -> asyncio.Task[None]:
        """A task without an end: `step` again and again, with a pause after each."""
        watched = self.watch(what)

        async def repeat() -> None:
            while True:
                await asyncio.sleep(seconds)
                await self._persist(watched, step)

        return self._start(watched, repeat())

    def _start(self, watched: Watched, job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(job, name=watched.what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._watched.discard(watched))
        return task

    async def _persist(
        self, watched: Watched, step: Step, failed: Callable[[Exception], None] | None = None, earlier: int = 0
    ) -> None:
        while True:
            before = earlier + watched.failures
            if before:
                await self._pause(min(self.first_delay * 2.0 ** min(before - 1, 32), self.longest_delay))
            try:
                await _attempt(step)
                watched.worked()
                return
            except Exception as error:
                watched.failed(error, quiet=failed is not None)
                if failed is not None:
                    failed(error)

    async def _pause(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(seconds, _end, over)
        self._pauses.add(over)
        try:
            await over
        finally:
            timer.cancel()
            self._pauses.discard(over)

    def hurry(self) -> None:
        """End the pauses: whatever has failed is tried again now."""
        for over in self._pauses:
            _end(over)

    async def stop(self) -> None:
        """Give all tasks up."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _attempt(step: Step) -> None:
    """Run it, so that it cannot be mistaken for this task's own end if something cancels it from within."""
    waiting = step()
    if not inspect.isawaitable(waiting):
        return
    attempt = asyncio.ensure_future(waiting)
    try:
        await asyncio.wait({attempt})
    except asyncio.CancelledError:
        attempt.cancel()
        await asyncio.gather(attempt, return_exceptions=True)
        raise
    if attempt.cancelled():
        raise RuntimeError("it was cancelled from within")
    attempt.result()


def _end(pause: asyncio.Future[None]) -> None:
    if not pause.done():
        pause.set_result(None)
