"""Tasks beside the requests outlive whatever is raised in them, and what cannot be repaired is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import pytest

from bitdial.errors import EngineError
from bitdial.serving.supervision import Supervisor, Watched


def go(job: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(job, 30))


def quick(**changes: Any) -> Supervisor:
    return Supervisor(
        "model 'm'", **{"first_delay": 0.001, "longest_delay": 0.002, "tries": 3, "patience": 0.0, **changes}
    )


class Step:
    """Fails with each of these errors in turn, then succeeds."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.calls = list(errors), 0
        self.done = asyncio.Event()

    async def __call__(self) -> None:
        self.calls += 1
        await asyncio.sleep(0)
        self.sync()

    def sync(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.done.set()


def test_whatever_is_raised_is_logged_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def job() -> None:
        supervisor, told = quick(), list[Exception]()
        errors = [OSError(24, "Too many open files"), ZeroDivisionError(), asyncio.CancelledError(), EngineError("no")]
        step = Step(*errors)
        await supervisor.once("replacing a worker", step, told.append)
        assert step.calls == 5 and told[:2] + told[3:] == [*errors[:2], errors[3]]
        assert "cancelled from within" in str(told[2])  # not taken for the end of the task
        assert not supervisor.failing and supervisor.problems() == []

    go(job())
    unforeseen = [r for r in caplog.records if r.exc_info]
    assert len(unforeseen) == 3 and all("model 'm': replacing a worker failed" in r.getMessage() for r in unforeseen)
    assert "3 times in a row" in unforeseen[-1].getMessage()
    assert all(r.levelno == logging.ERROR for r in caplog.records)  # what was foreseen is told by who was asked to


def test_a_foreseen_error_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async def job() -> None:
        await quick().once("the end of a worker", Step(EngineError("stuck")))

    go(job())
    (record,) = caplog.records
    assert record.exc_info is None and record.getMessage() == "model 'm': the end of a worker failed (once): stuck"


def test_a_task_without_an_end_goes_on() -> None:
    async def job() -> None:
        for sync in (True, False):
            supervisor = quick()
            step = Step(OSError(), KeyError(1), RecursionError())
            task = supervisor.every(0.001, "looking", step.sync if sync else step)
            await step.done.wait()
            assert not task.done()
            step.done.clear()
            await step.done.wait()  # and again
            assert not supervisor.failing
            await supervisor.stop()
            assert task.cancelled()

    go(job())


def test_what_fails_for_too_long_is_a_problem_until_it_works() -> None:
    async def job() -> None:
        supervisor, broken = quick(), True
        attempts = asyncio.Semaphore(0)

        def step() -> None:
            attempts.release()
            if broken:
                raise OSError("again")

        task = supervisor.once("replacing a worker", step)
        for _ in range(2):
            await attempts.acquire()
        assert supervisor.failing
        for _ in range(2):
            await attempts.acquire()
        (problem,) = supervisor.problems()
        assert problem.startswith("model 'm': replacing a worker has failed ") and "again" not in problem
        supervisor.patience = 3600.0
        assert supervisor.problems() == []  # not for long enough
        supervisor.patience, broken = 0.0, False
        await task
        assert supervisor.problems() == [] and not supervisor.failing

    go(job())


def test_pauses_grow_and_can_be_ended() -> None:
    async def job() -> None:
        supervisor = quick(first_delay=3600.0, longest_delay=3600.0)
        step = Step(OSError(), OSError())
        task = supervisor.once("replacing a worker", step)
        for calls in (1, 2):
            while not supervisor._pauses:
                await asyncio.sleep(0)
            assert step.calls == calls
            supervisor.hurry()
            while step.calls == calls:
                await asyncio.sleep(0)
        await task
        pauses: list[float] = []
        supervisor = quick(first_delay=0.2, longest_delay=30.0)

        async def pause(seconds: float) -> None:
            pauses.append(seconds)

        supervisor._pause = pause  # type: ignore[method-assign]
        await supervisor.once("replacing a worker", Step(*[OSError()] * 10))
        assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]
        pauses.clear()
        await supervisor.once("replacing a worker", Step(OSError()), earlier=2)
        assert pauses == [0.4, 0.8]

    go(job())


def test_a_task_that_is_given_up_ends_at_once_and_leaves_nothing() -> None:
    async def job() -> None:
        supervisor, ended = quick(), []

        async def endless() -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.append(True)

        never, running = supervisor.once("a", endless), supervisor.once("b", endless)
        never.cancel()  # before it has begun
        await asyncio.sleep(0.01)
        running.cancel()
        await asyncio.gather(never, running, return_exceptions=True)
        assert never.cancelled() and running.cancelled() and ended == [True]
        await asyncio.sleep(0)
        assert not supervisor._watched and not supervisor._tasks
        waits = supervisor.once("c", Step(*[OSError()] * 1000))
        await supervisor.stop()
        assert waits.cancelled() and not supervisor._pauses

    go(job())


def test_a_loop_that_ends_is_not_held_up() -> None:
    """`asyncio.run` cancels what is left."""

    async def job() -> None:
        quick().every(0.0, "looking", lambda: None)
        quick().once("a", Step(*[OSError()] * 1000))
        await asyncio.sleep(0.01)

    go(job())


def test_tasks_that_others_run_say_themselves_how_they_fare() -> None:
    supervisor = quick(tries=1)
    watched = supervisor.watch("giving out batches")
    assert isinstance(watched, Watched) and not supervisor.failing
    watched.failed(RuntimeError("x"))
    assert supervisor.failing and "giving out batches has failed once" in supervisor.problems()[0]
    watched.worked()
    assert not supervisor.failing
